//! Attention of one token per sequence, with rotation and cache write.

use crate::ir_text::{Cursor, Parsed};
use crate::tensor::DType;

/// Attention of one new token of each sequence over its cache.
///
/// Each head of the query and the key is normalized (`x * rsqrt(mean(x²) + epsilon) * weight`) if it has a norm,
/// rotated if there is a rotation, and rounded; key and value go to the slot `write_indices[sequence]` of the caches;
/// then `softmax(cap(scale * q kᵀ)) v` over the visible slots: those up to and including the new one, or with a window
/// the last `window` of them. `cap(s)` is `soft_cap * tanh(s / soft_cap)`. A sink is an additional score of each head
/// that takes part in the softmax but has no value. All in fp32, except the rounded operands.
///
/// | input | |
/// |---|---|
/// | query, key, value | `[batch, 1, heads * head_dim]`, `[batch, 1, kv_heads * head_dim]` twice, in fp16 or bf16; or one tensor with the three concatenated, if `packed` |
/// | caches of keys and values | `[batch, kv_heads, capacity, head_dim]`, network inputs |
/// | write_indices | `[batch]` i32 |
/// | positions, cosines, sines | `[batch, 1]` i32; `[positions, rotary_dim / 2]` fp32; if there is a rotation |
/// | norms of query and key | `[head_dim]`, in the query's dtype; each optional |
/// | sinks | `[heads]` fp32, if there are any |
///
/// | output | |
/// |---|---|
/// | the result | `[batch, 1, heads * head_dim]` |
/// | updated caches of keys and values | like the caches, in their memory; network outputs |
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct DecodeAttention {
    /// Query heads.
    pub heads: usize,
    /// Heads of keys and values; query head h reads head `h / (heads / kv_heads)`.
    pub kv_heads: usize,
    /// Whether query, key and value are one tensor.
    pub packed: bool,
    /// How query and key are rotated.
    pub rotation: Option<Rotation>,
    /// Whether each head of the query is normalized.
    pub query_norm: bool,
    /// Whether each head of the key is normalized.
    pub key_norm: bool,
    /// Epsilon of both norms.
    pub epsilon: f32,
    /// Visible slots; `None` for all.
    pub window: Option<usize>,
    /// Factor of the scores.
    pub scale: f32,
    /// Bound of the scaled scores.
    pub soft_cap: Option<f32>,
    /// Whether each head has a sink.
    pub sinks: bool,
}

/// A rotation by position.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Rotation {
    /// Number of elements of a head that rotate, from the first; even.
    pub rotary_dim: usize,
    /// Which pairs: (2i, 2i + 1), or (i, i + rotary_dim / 2).
    pub interleaved: bool,
}

/// The inputs of a [`DecodeAttention`] by name.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct AttentionInputs<T> {
    /// Query, key and value; the same tensor three times if packed.
    pub qkv: [T; 3],
    /// Keys and values.
    pub caches: [T; 2],
    /// Slots of the new tokens.
    pub write_indices: T,
    /// Positions, cosines and sines.
    pub rotation: Option<[T; 3]>,
    /// The norm of the query.
    pub query_norm: Option<T>,
    /// The norm of the key.
    pub key_norm: Option<T>,
    /// One number per head.
    pub sinks: Option<T>,
}

impl<T: Copy> AttentionInputs<T> {
    /// From a layer's inputs; `None` if there are too many or too few.
    pub fn of(attention: &DecodeAttention, inputs: &[T]) -> Option<Self> {
        let mut inputs = inputs.iter().copied();
        let qkv = match attention.packed {
            true => [inputs.next()?; 3],
            false => [inputs.next()?, inputs.next()?, inputs.next()?],
        };
        let caches = [inputs.next()?, inputs.next()?];
        let write_indices = inputs.next()?;
        let rotation = match attention.rotation {
            Some(_) => Some([inputs.next()?, inputs.next()?, inputs.next()?]),
            None => None,
        };
        let mut next_if = |there: bool| match there {
            true => inputs.next().map(Some),
            false => Some(None),
        };
        let read = AttentionInputs {
            qkv,
            caches,
            write_indices,
            rotation,
            query_norm: next_if(attention.query_norm)?,
            key_norm: next_if(attention.key_norm)?,
            sinks: next_if(attention.sinks)?,
        };
        next_if(true).is_none().then_some(read)
    }

    /// In the layer's order.
    pub fn listed(&self, packed: bool) -> Vec<T> {
        let mut inputs = match packed {
            true => vec![self.qkv[0]],
            false => self.qkv.to_vec(),
        };
        inputs.extend(self.caches);
        inputs.push(self.write_indices);
        inputs.extend(self.rotation.into_iter().flatten());
        inputs.extend([self.query_norm, self.key_norm, self.sinks].into_iter().flatten());
        inputs
    }
}

impl DecodeAttention {
    /// The head sizes with kernels.
    pub const HEAD_SIZES: [usize; 11] = [16, 32, 48, 64, 80, 96, 112, 128, 160, 192, 256];

    /// `heads: 32, kv_heads: 8, ...`: the layer's text without its inputs.
    pub(in crate::network) fn parameters(&self) -> Vec<String> {
        let mut text = vec![format!("heads: {}, kv_heads: {}", self.heads, self.kv_heads)];
        if let Some(rotation) = self.rotation {
            text.push(format!("rotary_dim: {}", rotation.rotary_dim));
        }
        let interleaved = self.rotation.is_some_and(|rotation| rotation.interleaved);
        for (flag, name) in [
            (interleaved, "pairs"),
            (self.packed, "packed"),
            (self.query_norm, "query_norm"),
            (self.key_norm, "key_norm"),
            (self.sinks, "sinks"),
        ] {
            if flag {
                text.push(format!("{name}: true"));
            }
        }
        if self.query_norm || self.key_norm {
            text.push(format!("epsilon: {}", self.epsilon));
        }
        text.extend(self.window.map(|window| format!("window: {window}")));
        text.push(format!("scale: {}", self.scale));
        text.extend(self.soft_cap.map(|cap| format!("soft_cap: {cap}")));
        text
    }

    /// Reads what [`DecodeAttention::parameters`] writes, from the number of heads on. `parameter` skips the name of a
    /// parameter if it comes next.
    pub(in crate::network) fn parse(
        line: &mut Cursor,
        mut parameter: impl FnMut(&mut Cursor, &str) -> bool,
    ) -> Parsed<DecodeAttention> {
        let heads = line.integer()?;
        let float = |line: &mut Cursor| -> Parsed<f32> { Ok(line.number(DType::F32)?.float as f32) };
        let mut required = |line: &mut Cursor, name: &str| match parameter(line, name) {
            true => Ok(()),
            false => Err(line.error(format!("the parameter \"{name}: \""))),
        };
        required(line, "kv_heads")?;
        let kv_heads = line.integer()?;
        let rotary_dim = match parameter(line, "rotary_dim") {
            true => Some(line.integer()?),
            false => None,
        };
        let mut flags = [false; 5];
        for (flag, name) in flags
            .iter_mut()
            .zip(["pairs", "packed", "query_norm", "key_norm", "sinks"])
        {
            if parameter(line, name) {
                line.expect("true")?;
                *flag = true;
            }
        }
        let [interleaved, packed, query_norm, key_norm, sinks] = flags;
        let epsilon = match parameter(line, "epsilon") {
            true => float(line)?,
            false => 0.0,
        };
        let window = match parameter(line, "window") {
            true => Some(line.integer()?),
            false => None,
        };
        if !parameter(line, "scale") {
            return Err(line.error("the parameter \"scale: \"".to_string()));
        }
        let scale = float(line)?;
        let soft_cap = match parameter(line, "soft_cap") {
            true => Some(float(line)?),
            false => None,
        };
        Ok(DecodeAttention {
            heads,
            kv_heads,
            packed,
            rotation: rotary_dim.map(|rotary_dim| Rotation {
                rotary_dim,
                interleaved,
            }),
            query_norm,
            key_norm,
            epsilon,
            window,
            scale,
            soft_cap,
            sinks,
        })
    }
}
