//! Matrix products: `MatMul`, `Gemm`, `FusedMatMul`.
//!
//! A linear layer is `MatMul(x, Transpose(weight [out, in]))`; the transpose becomes a flag of the product, and the
//! weight is read as stored. A bias is a separate `Add`.

use super::LinearForm;
use super::context::{Lowered, Lowering, one};
use super::demand::through_transpose;
use super::dispatch::no_lowering;
use super::error::Reason;
use crate::dim::Dim;
use crate::graph::{Node, Op};
use crate::network::{Elementwise, LayerKind, MatrixOp, ReduceOp, Shape, TensorId};
use crate::tensor::DType;

fn op_of(transposed: bool) -> MatrixOp {
    match transposed {
        true => MatrixOp::Transpose,
        false => MatrixOp::None,
    }
}

/// The number of elements of these dims.
pub(super) fn volume(dims: &[Dim]) -> Dim {
    dims.iter().fold(one(), |product, dim| &product * dim)
}

impl Lowering<'_> {
    /// The operators of [`Family::Product`](crate::graph::op::Family::Product).
    pub(super) fn product_node(&mut self, node: &Node, name: &str) -> Lowered {
        match &node.op {
            Op::MatMul => self.matmul(node, name),
            Op::Gemm {
                alpha,
                beta,
                trans_a,
                trans_b,
            } => self.gemm(node, name, [*alpha, *beta], [*trans_a, *trans_b]),
            Op::FusedMatMul {
                alpha,
                trans_a,
                trans_b,
            } => self.fused_matmul(node, name, *alpha, [*trans_a, *trans_b]),
            _ => no_lowering(node),
        }
    }

    pub(super) fn matmul(&mut self, node: &Node, name: &str) -> Lowered {
        let mut sides = [(TensorId(0), false); 2];
        for (i, side) in sides.iter_mut().enumerate() {
            let (id, transposed) = through_transpose(self.graph, self.input_id(node, i)?);
            *side = (self.value(id)?, transposed);
        }
        self.product(name, sides)
    }

    /// `a · b` after their transposes, of any ranks as in numpy's `matmul`.
    pub(super) fn product(&mut self, name: &str, [a, b]: [(TensorId, bool); 2]) -> Lowered {
        let (rank_a, rank_b) = (self.b.rank(a.0), self.b.rank(b.0));
        if rank_a == 0 || rank_b == 0 {
            return Reason::unsupported("a product of scalars");
        }
        // A vector is a row on the left, a column on the right; its axis is dropped from the result.
        if rank_a == 1 || rank_b == 1 {
            return self.vector_product(name, [a, b]);
        }
        if b.1
            && !a.1
            && let Some(product) = self.quantized_linear(name, a.0, b.0)?
        {
            return Ok(product);
        }
        if rank_b == 2 && rank_a > 2 && !a.1 {
            let shape = self.b.shape(a.0);
            let rows = volume(&shape[..shape.len() - 1]);
            if self.options.form(&rows) != LinearForm::RaiseWeight {
                return self.flat_product(name, a.0, b);
            }
        }
        let rank = rank_a.max(rank_b);
        let (left, right) = (self.raise(a.0, rank)?, self.raise(b.0, rank)?);
        let kind = LayerKind::MatrixMultiply {
            op_a: op_of(a.1),
            op_b: op_of(b.1),
        };
        Ok(self.b.add(name, kind, &[left, right])?)
    }

    /// `[.., m, k] · [k, n]` as one product of matrices.
    fn flat_product(&mut self, name: &str, a: TensorId, (b, transposed): (TensorId, bool)) -> Lowered {
        let shape = self.b.shape(a).clone();
        let leading = &shape[..shape.len() - 1];
        let flat = self.flattened(a)?;
        let product = self.matrix_product(name, flat, b, transposed)?;
        let mut to: Shape = leading.to_vec();
        to.push(self.b.shape(product)[1].clone());
        self.reshape(&format!("{name}/unflat"), product, to)
    }

    /// `[m, k] · [k, n]`, or `[m, k] · [n, k]ᵀ` if `transposed`.
    pub(super) fn matrix_product(&mut self, name: &str, a: TensorId, b: TensorId, transposed: bool) -> Lowered {
        let is_weight = self
            .b
            .producer(b)
            .is_some_and(|layer| matches!(layer.kind, LayerKind::Weight(_)));
        let depth = self.b.shape(a)[1].as_const().unwrap_or(i64::MAX) as usize;
        let fits = transposed && is_weight && self.options.reduce_depth.is_none_or(|limit| depth <= limit);
        if fits && self.b.shape(a)[0].is_one() && self.options.linear == LinearForm::ReduceRow {
            return self.reduced_product(name, a, b);
        }
        let kind = LayerKind::MatrixMultiply {
            op_a: MatrixOp::None,
            op_b: op_of(transposed),
        };
        Ok(self.b.add(name, kind, &[a, b])?)
    }

    /// `[1, k] · [n, k]ᵀ` as sums over products, in fp32 whatever the dtype: TensorRT fuses the four layers into one
    /// kernel.
    fn reduced_product(&mut self, name: &str, a: TensorId, b: TensorId) -> Lowered {
        let part = |part: &str| format!("{name}/{part}");
        let dtype = self.b.dtype(a);
        let row = self.b.cast(&part("row"), DType::F32, a)?;
        let weight = self.kept_narrow(name, b)?;
        let weight = self.b.cast(&part("weight"), DType::F32, weight)?;
        let terms = self.b.elementwise(&part("terms"), Elementwise::Prod, weight, row)?;
        let sum = LayerKind::Reduce {
            op: ReduceOp::Sum,
            axes: vec![1],
            keep_dims: true,
        };
        let sums = self.b.add(&part("sums"), sum, &[terms])?;
        let sums = self.b.cast(&part("narrow"), dtype, sums)?;
        let to = vec![one(), self.b.shape(b)[0].clone()];
        self.reshape(name, sums, to)
    }

    /// `[.., m, k]` as `[.. * m, k]`; shared by all readers, such as q, k and v.
    pub(super) fn flattened(&mut self, a: TensorId) -> Lowered {
        if let Some(flat) = self.flat.get(&a) {
            return Ok(*flat);
        }
        let shape = self.b.shape(a).clone();
        let (last, leading) = shape.split_last().expect("rank above 2");
        let base = self.b.network().tensor(a).name.clone();
        let flat = self.reshape(&format!("{base}/flat"), a, vec![volume(leading), last.clone()])?;
        self.flat.insert(a, flat);
        Ok(flat)
    }

    fn vector_product(&mut self, name: &str, [a, b]: [(TensorId, bool); 2]) -> Lowered {
        let (row, column) = (self.b.rank(a.0) == 1, self.b.rank(b.0) == 1);
        let left = self.raise(a.0, 2)?;
        let mut to = self.b.shape(b.0).clone();
        let right = match column {
            true => {
                to.push(one());
                self.reshape(&format!("{name}/column"), b.0, to)?
            }
            false => b.0,
        };
        let product = self.product(&format!("{name}/product"), [(left, a.1), (right, b.1)])?;
        let mut shape = self.b.shape(product).clone();
        if column {
            shape.pop();
        }
        if row {
            shape.remove(shape.len() - if column { 1 } else { 2 });
        }
        self.reshape(name, product, shape)
    }

    /// `alpha · a · b + beta · c`.
    pub(super) fn gemm(&mut self, node: &Node, name: &str, factors: [f32; 2], transposes: [bool; 2]) -> Lowered {
        let (a, b) = (self.data(node, 0)?, self.data(node, 1)?);
        let product = self.product(&format!("{name}/product"), [(a, transposes[0]), (b, transposes[1])])?;
        let product = self.scaled(&format!("{name}/alpha"), product, factors[0])?;
        if node.input(2).is_none() || factors[1] == 0.0 {
            return Ok(product);
        }
        let c = self.operand(node, 2, 2)?;
        let c = self.scaled(&format!("{name}/beta"), c, factors[1])?;
        Ok(self.b.elementwise(name, Elementwise::Sum, product, c)?)
    }

    pub(super) fn fused_matmul(&mut self, node: &Node, name: &str, alpha: f32, transposes: [bool; 2]) -> Lowered {
        let (a, b) = (self.data(node, 0)?, self.data(node, 1)?);
        let product = self.product(&format!("{name}/product"), [(a, transposes[0]), (b, transposes[1])])?;
        self.scaled(name, product, alpha)
    }

    /// `x * factor` in the dtype of `x`.
    pub(super) fn scaled(&mut self, name: &str, x: TensorId, factor: f32) -> Lowered {
        if factor == 1.0 {
            return Ok(x);
        }
        let factor = self.number(self.b.dtype(x), self.b.rank(x), f64::from(factor))?;
        Ok(self.b.elementwise(name, Elementwise::Prod, x, factor)?)
    }
}
