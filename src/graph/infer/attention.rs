//! Rotary embeddings and attention.

use super::node::{NodeInference, Outputs, one};
use super::{Fact, InferError};
use crate::dim::Dim;
use crate::graph::op::{Attention, GroupQueryAttention, Op};

impl NodeInference<'_> {
    /// The rules of [`Family::Attention`](crate::graph::op::Family).
    pub(super) fn attention_rule(&mut self) -> Result<Outputs, InferError> {
        match &self.node.op {
            Op::RotaryEmbedding { num_heads, .. } => self.rotary_embedding(*num_heads),
            Op::Attention(attention) => self.attention(attention),
            Op::RoundedAttention(rounded) => {
                let mut facts = self.attention(&rounded.unrounded())?;
                facts.truncate(1);
                Ok(facts)
            }
            Op::BiasedAttention(biased) => {
                let heads = self.heads(0, None)?[1].clone();
                for i in [4, 5] {
                    let [length] = &self.input(i)?.shape.clone()[..] else {
                        return Err(self.error(format!("{} needs 1 dimension", self.operand(i))));
                    };
                    self.unify(&heads, length, 0, i)?;
                }
                // The inputs after the mask are not caches, unlike those of the plain operator.
                self.inputs.truncate(4);
                let mut facts = self.attention(&biased.unbiased())?;
                facts.truncate(1);
                Ok(facts)
            }
            Op::GroupQueryAttention(attention) => self.group_query_attention(attention),
            _ => self.no_rule(),
        }
    }

    /// x is `[batch, heads, tokens, head_dim]` or `[batch, tokens, heads*head_dim]`.
    pub(super) fn rotary_embedding(&mut self, num_heads: Option<usize>) -> Result<Outputs, InferError> {
        let x = self.input(0)?.clone();
        let tokens = match (x.shape.len(), num_heads) {
            (4, _) => 2,
            (3, Some(_)) => 1,
            _ => return Err(self.error(format!("{} needs 4 dimensions, or 3 and num_heads", self.operand(0)))),
        };
        // `[batch, tokens]` of the positions, or of the tables without positions.
        let i = if self.optional(3).is_some() { 3 } else { 1 };
        let other = self.input(i)?.clone();
        if let [batch, length, ..] = other.shape.as_slice() {
            self.broadcast_dim(&x.shape[0], batch, 0, i)?;
            self.broadcast_dim(&x.shape[tokens], length, 0, i)?;
        }
        one(Fact::new(x.dtype, x.shape))
    }

    /// Inputs: q, k, v, mask?, past_key?, past_value?, nonpad_kv_seqlen?. Outputs: y, present_key?, present_value?, qk?.
    pub(super) fn attention(&mut self, attributes: &Attention) -> Result<Outputs, InferError> {
        let dtype = self.input(0)?.dtype;
        let q = self.heads(0, attributes.q_num_heads)?;
        let k = self.heads(1, attributes.kv_num_heads)?;
        let v = self.heads(2, attributes.kv_num_heads)?;
        let batch = self.broadcast_dim(&q[0], &k[0], 0, 1)?;
        self.broadcast_dim(&batch, &v[0], 0, 2)?;
        self.unify(&k[1], &v[1], 1, 2)?;
        let new = self.unify(&k[2], &v[2], 1, 2)?;
        self.unify(&q[3], &k[3], 0, 1)?;
        let past = match (self.optional(4).cloned(), self.optional(5).cloned()) {
            (Some(key), Some(value)) => {
                for (i, past, now) in [(4, key.shape, &k), (5, value.shape.clone(), &v)] {
                    if past.len() != 4 {
                        return Err(self.error(format!("{} needs 4 dimensions", self.operand(i))));
                    }
                    for axis in [0, 1, 3] {
                        self.unify(&past[axis], &now[axis], i, i - 3)?;
                    }
                }
                let key = self.input(4)?.shape[2].clone();
                self.unify(&key, &value.shape[2], 4, 5)?
            }
            _ => Dim::default(),
        };
        let total = &past + &new;
        if let Some(mask) = self.optional(3).cloned() {
            let rank = mask.shape.len();
            if rank >= 2 {
                self.broadcast_dim(&q[2], &mask.shape[rank - 2], 0, 3)?;
            }
            // A mask may be shorter than the keys (opset 24), so a number is no equation.
            if let Some(length) = mask.shape.last()
                && length.as_const().is_none()
                && total.as_const().is_none()
            {
                // A conflict is not an error: the mask may be shorter by a symbol as well.
                let _ = self.unifier.unify(length, &total);
            }
        }
        let mut y = vec![batch.clone(), q[1].clone(), q[2].clone(), v[3].clone()];
        if self.input(0)?.shape.len() == 3 {
            y = vec![batch.clone(), q[2].clone(), &q[1] * &v[3]];
        }
        let present = |of: &[Dim]| vec![batch.clone(), of[1].clone(), total.clone(), of[3].clone()];
        let (key, value) = (self.input(1)?.dtype, self.input(2)?.dtype);
        Ok(vec![
            Some(Fact::new(dtype, y)),
            Some(Fact::new(key, present(&k))),
            Some(Fact::new(value, present(&v))),
            Some(Fact::new(
                dtype,
                vec![batch.clone(), q[1].clone(), q[2].clone(), total.clone()],
            )),
        ])
    }

    /// Input `i` as `[batch, heads, tokens, head_dim]`, in either layout.
    fn heads(&self, i: usize, heads: Option<usize>) -> Result<[Dim; 4], InferError> {
        match (self.input(i)?.shape.as_slice(), heads) {
            ([batch, heads, tokens, size], _) => Ok([batch.clone(), heads.clone(), tokens.clone(), size.clone()]),
            ([batch, tokens, hidden], Some(heads)) => {
                let heads = Dim::from(heads);
                let size = hidden.div_exact(&heads);
                let size = size.ok_or_else(|| self.error(format!("{} has no {heads} heads", self.operand(i))))?;
                Ok([batch.clone(), heads, tokens.clone(), size])
            }
            _ => Err(self.error(format!(
                "{} needs 4 dimensions, or 3 and the number of heads",
                self.operand(i)
            ))),
        }
    }

    /// Query (or packed qkv), key?, value?, past_key?, past_value?, seqlens_k, total_sequence_length, cos?, sin?, ….
    /// Outputs: y, present_key, present_value. The cache is assumed to grow: `past + tokens`.
    pub(super) fn group_query_attention(&mut self, attributes: &GroupQueryAttention) -> Result<Outputs, InferError> {
        let q = self.input(0)?.clone();
        let [batch, tokens, hidden] = q.shape.as_slice() else {
            return Err(self.error(format!("{} needs 3 dimensions", self.operand(0))));
        };
        let (heads, kv_heads) = (Dim::from(attributes.num_heads), Dim::from(attributes.kv_num_heads));
        let packed = self.optional(1).is_none();
        let all = if packed {
            &heads + &(&kv_heads * &Dim::constant(2))
        } else {
            heads.clone()
        };
        let size = hidden.div_exact(&all);
        let size = size.ok_or_else(|| self.error(format!("{} has no {all} heads", self.operand(0))))?;
        for i in [1, 2] {
            if let Some(fact) = self.optional(i).cloned() {
                let [other_batch, other_tokens, hidden] = fact.shape.as_slice() else {
                    return Err(self.error(format!("{} needs 3 dimensions", self.operand(i))));
                };
                self.unify(batch, other_batch, 0, i)?;
                self.unify(tokens, other_tokens, 0, i)?;
                self.unify(hidden, &(&kv_heads * &size), i, 0)?;
            }
        }
        let mut present = vec![batch.clone(), kv_heads.clone(), tokens.clone(), size.clone()];
        if let (Some(key), Some(value)) = (self.optional(3).cloned(), self.optional(4).cloned()) {
            for (i, past) in [(3, &key.shape), (4, &value.shape)] {
                if past.len() != 4 {
                    return Err(self.error(format!("{} needs 4 dimensions", self.operand(i))));
                }
                for axis in [0, 1, 3] {
                    present[axis] = self.unify(&past[axis], &present[axis], i, 0)?;
                }
            }
            let past = self.unify(&key.shape[2], &value.shape[2], 3, 4)?;
            // A cache of fixed size is written in place.
            present[2] = match past.as_const() {
                Some(_) => past.clone(),
                None => &past + tokens,
            };
            if past.as_const().is_none()
                && let Some(total) = self.optional(6).and_then(Fact::single).cloned()
            {
                // `total_sequence_length` comes from the model's own arithmetic; it is ignored if it disagrees.
                let _ = self.unifier.unify(&total, &present[2]);
            }
        }
        if let Some(lengths) = self.optional(5).cloned()
            && let [rows] = lengths.shape.as_slice()
        {
            self.unify(batch, rows, 0, 5)?;
        }
        let y = vec![batch.clone(), tokens.clone(), &heads * &size];
        Ok(vec![
            Some(Fact::new(q.dtype, y)),
            Some(Fact::new(q.dtype, present.clone())),
            Some(Fact::new(q.dtype, present)),
        ])
    }
}
