//! Products with quantized weights.

use super::super::LinearForm;
use super::super::context::{Lowered, Lowering, one};
use super::QuantizedWeight;
use super::parts::{Coding, Parts, Zero};
use crate::dim::Dim;
use crate::network::{Elementwise, LayerKind, MatrixOp, ReduceOp, Shape, TensorId};
use crate::tensor::DType;
use crate::tensor::quantized::Granularity;

/// `x · weightᵀ`.
const BY_ROWS: LayerKind = LayerKind::MatrixMultiply {
    op_a: MatrixOp::None,
    op_b: MatrixOp::Transpose,
};

impl Lowering<'_> {
    /// `x · weightᵀ` for a quantized weight `[out, in]`, if `weight` is one.
    pub(in crate::lower) fn quantized_linear(
        &mut self,
        name: &str,
        x: TensorId,
        values: TensorId,
    ) -> Lowered<Option<TensorId>> {
        let weight = match self.quantized.get(&values) {
            Some(weight) if weight.shape.len() == 2 => weight.clone(),
            _ => return Ok(None),
        };
        let shape = self.b.shape(x).clone();
        let flat = match shape.len() {
            2 => x,
            _ => self.flattened(x)?,
        };
        let by_row = self.b.shape(flat)[0].is_one()
            && weight.parts.coding != Coding::Scaled
            && self.options.linear == LinearForm::ReduceRow;
        let in_sums = match by_row {
            true => self.reduced_codes(name, flat, &weight)?,
            false => None,
        };
        let product = match (in_sums, weight.parts.zero) {
            (Some(product), _) => product,
            (None, Zero::Scaled(offsets)) if weight.before_products => {
                match self.centered_product(name, flat, &weight, offsets)? {
                    Some(product) => product,
                    None => self.b.add(name, BY_ROWS, &[flat, values])?,
                }
            }
            (None, _) => self.b.add(name, BY_ROWS, &[flat, values])?,
        };
        let to = shape[..shape.len() - 1].iter().cloned();
        let to = to.chain([Dim::from(weight.shape[0])]).collect();
        Ok(Some(self.reshape(&format!("{name}/unflat"), product, to)?))
    }

    /// `x · (codes * scales)ᵀ - sums of x by block · offsetsᵀ`: offsets subtracted from values would come between codes
    /// and the product. `None` unless blocks are along rows.
    fn centered_product(
        &mut self,
        name: &str,
        x: TensorId,
        weight: &QuantizedWeight,
        offsets: TensorId,
    ) -> Lowered<Option<TensorId>> {
        let part = |part: &str| format!("{name}/{part}");
        let Granularity::Block { axis: 1, size } = weight.parts.granularity else {
            return Ok(None);
        };
        let blocks = weight.shape[1] / size;
        let kind = LayerKind::Dequantize(weight.parts.granularity);
        let scaled = self
            .b
            .add(&part("scaled"), kind, &[weight.parts.codes, weight.parts.scales])?;
        let product = self.b.add(&part("uncentered"), BY_ROWS, &[x, scaled])?;
        let view = vec![self.b.shape(x)[0].clone(), Dim::from(blocks), Dim::from(size)];
        let x = self.reshape(&part("blocks"), x, view)?;
        let sums = LayerKind::Reduce {
            op: ReduceOp::Sum,
            axes: vec![2],
            keep_dims: false,
        };
        let sums = self.b.add(&part("sums"), sums, &[x])?;
        let offset = self.b.add(&part("offset"), BY_ROWS, &[sums, offsets])?;
        let centered = self.b.elementwise(name, Elementwise::Sub, product, offset)?;
        Ok(Some(centered))
    }

    /// `[1, k] · [n, k]ᵀ` as sums over products with codes, in fp32. `None` if scales are not per row.
    fn reduced_codes(&mut self, name: &str, x: TensorId, weight: &QuantizedWeight) -> Lowered<Option<TensorId>> {
        let part = |part: &str| format!("{name}/{part}");
        let (rows, depth) = (weight.shape[0], weight.shape[1]);
        let Parts {
            codes,
            coding,
            scales,
            zero,
            ..
        } = weight.parts;
        let each = match coding {
            Coding::Bytes(each) => each,
            _ => 1,
        };
        let (count, of_rows) = match weight.parts.granularity {
            Granularity::Block { axis: 1, size } => (depth / size, rows),
            Granularity::Channel { axis: 0 } => (1, rows),
            Granularity::Tensor => (1, 1),
            _ => return Ok(None),
        };
        let size = depth / count;
        if !size.is_multiple_of(each) {
            return Ok(None);
        }
        let dtype = self.b.dtype(x);
        let dims = |dims: [usize; 3]| -> Shape { dims.map(Dim::from).to_vec() };
        let x = self.b.cast(&part("row"), DType::F32, x)?;
        let x = self.reshape(&part("blocks"), x, dims([1, count, size]))?;
        let scales = self.b.cast(&part("scale"), DType::F32, scales)?;
        let scales = self.reshape(&part("scales"), scales, dims([of_rows, count, 1]))?;
        let numbers = match coding {
            Coding::Bytes(each) => {
                let codes = self.reshape(&part("codes"), codes, dims([rows, count, size / each]))?;
                self.digits(name, codes, each, DType::F32)?
            }
            _ => {
                let numbers = self.codes_as_numbers(name, codes, coding, DType::F32)?;
                vec![self.reshape(&part("codes"), numbers, dims([rows, count, size]))?]
            }
        };
        let zero = match zero {
            Zero::Number(0) => None,
            Zero::Number(number) => Some(self.number(DType::F32, 3, number as f64)?),
            Zero::Points(points) | Zero::Scaled(points) => {
                let points = self.b.cast(&part("zero"), DType::F32, points)?;
                Some(self.reshape(&part("zeros"), points, dims([of_rows, count, 1]))?)
            }
        };
        let mut terms = None;
        for (i, number) in numbers.into_iter().enumerate() {
            let x = match each {
                1 => x,
                _ => {
                    let kind = LayerKind::Slice {
                        start: vec![0, 0, i as i64],
                        size: dims([1, count, size / each]),
                        stride: vec![1, 1, each as i64],
                    };
                    self.b.add(&part("every"), kind, &[x])?
                }
            };
            let number = match zero {
                Some(zero) => self.b.elementwise(&part("centered"), Elementwise::Sub, number, zero)?,
                None => number,
            };
            let product = self.b.elementwise(&part("terms"), Elementwise::Prod, number, x)?;
            terms = Some(match terms {
                Some(sum) => self.b.elementwise(&part("sum"), Elementwise::Sum, sum, product)?,
                None => product,
            });
        }
        let terms = terms.expect("a byte holds codes");
        let scaled = self.b.elementwise(&part("scaled"), Elementwise::Prod, terms, scales)?;
        let sum = LayerKind::Reduce {
            op: ReduceOp::Sum,
            axes: vec![1, 2],
            keep_dims: true,
        };
        let sums = self.b.add(&part("sums"), sum, &[scaled])?;
        let sums = self.b.cast(&part("narrow"), dtype, sums)?;
        Ok(Some(self.reshape(name, sums, vec![one(), Dim::from(rows)])?))
    }
}
