//! `RotaryEmbedding`: TensorRT's layer of the same name, over four axes and with positions.

use super::context::{Lowered, Lowering};
use super::linear::volume;
use crate::graph::Node;
use crate::network::{LayerKind, TensorId};
use crate::tensor::DType;

impl Lowering<'_> {
    pub(super) fn rotary(
        &mut self,
        node: &Node,
        name: &str,
        interleaved: bool,
        num_heads: Option<usize>,
        rotary_dim: usize,
    ) -> Lowered {
        let part = |part: &str| format!("{name}/{part}");
        let given = self.data(node, 0)?;
        let flat_heads = self.b.rank(given) == 3;
        let x = match flat_heads {
            true => self.split_heads(&part("heads"), given, num_heads)?,
            false => given,
        };
        let rotary_dim = match (rotary_dim, self.b.shape(x).last().and_then(|d| d.as_const())) {
            (0, Some(head_dim)) => head_dim as usize,
            (0, None) => return super::error::Reason::unsupported("the head size is not a number"),
            (dim, _) => dim,
        };
        let dtype = self.b.dtype(x);
        let mut tables = [TensorId(0); 2];
        for (table, (i, what)) in tables.iter_mut().zip([(1, "cos"), (2, "sin")]) {
            let given = self.data(node, i)?;
            *table = self.b.cast(&part(what), dtype, given)?;
        }
        let positions = match node.input(3) {
            Some(_) => self.data(node, 3)?,
            None => self.own_rows(name, &mut tables)?,
        };
        let kind = LayerKind::RotaryEmbedding {
            interleaved,
            rotary_dim,
        };
        let rotated = self.b.add(name, kind, &[x, tables[0], tables[1], positions])?;
        match flat_heads {
            true => self.join_heads(&part("joined"), rotated),
            false => Ok(rotated),
        }
    }

    /// Tables `[batch, tokens, n]` that are already per token: token number i overall has position i.
    fn own_rows(&mut self, name: &str, tables: &mut [TensorId; 2]) -> Lowered {
        let shape = self.b.shape(tables[0]).clone();
        let [batch, tokens, half] = &shape[..] else {
            return super::error::Reason::unsupported("tables without positions must be [batch, tokens, rotary_dim/2]");
        };
        let rows = volume(&[batch.clone(), tokens.clone()]);
        for table in tables {
            *table = self.reshape(&format!("{name}/rows"), *table, vec![rows.clone(), half.clone()])?;
        }
        let iota = self.b.fill(&format!("{name}/iota"), DType::I32, rows, 0.0, 1.0)?;
        self.reshape(&format!("{name}/positions"), iota, vec![batch.clone(), tokens.clone()])
    }

    /// `[batch, tokens, heads * d]` → `[batch, heads, tokens, d]`.
    pub(super) fn split_heads(&mut self, name: &str, x: TensorId, heads: Option<usize>) -> Lowered {
        let shape = self.b.shape(x).clone();
        let (3, Some(heads)) = (shape.len(), heads) else {
            return super::error::Reason::unsupported("three axes need the number of heads");
        };
        let width = shape[2].as_const().unwrap_or(0) as usize;
        if heads == 0 || width == 0 || !width.is_multiple_of(heads) {
            return super::error::Reason::unsupported(format!("{} does not hold {heads} equal heads", shape[2]));
        }
        let to = vec![shape[0].clone(), shape[1].clone(), heads.into(), (width / heads).into()];
        let split = self.reshape(&format!("{name}/split"), x, to)?;
        self.transpose(name, split, &[0, 2, 1, 3])
    }

    /// `[batch, heads, tokens, d]` → `[batch, tokens, heads * d]`.
    pub(super) fn join_heads(&mut self, name: &str, x: TensorId) -> Lowered {
        let shape = self.b.shape(x).clone();
        let first = self.transpose(&format!("{name}/by_token"), x, &[0, 2, 1, 3])?;
        let to = vec![
            shape[0].clone(),
            shape[2].clone(),
            volume(&[shape[1].clone(), shape[3].clone()]),
        ];
        self.reshape(name, first, to)
    }
}
