//! How an attention computes its scores, defined once for passes, operators, lowering and reports.

use serde::Serialize;

use super::op::{Attention, BiasedAttention, GroupQueryAttention, Op, RoundedAttention};
use crate::tensor::DType;

/// `softmax(cap(scale * q kᵀ) + mask)`, where `cap(s)` is `softcap * tanh(s / softcap)`.
///
/// In the canonical graph scale and soft cap are attributes of `Attention`, and the window is part of the mask.
#[derive(Clone, Copy, PartialEq, Debug, Serialize)]
pub struct AttentionScores {
    /// Factor of the products of queries and keys.
    pub scale: f32,
    /// Bound of the scaled scores; `None` for none.
    pub softcap: Option<f32>,
    /// How many positions a query attends to, itself included; `None` for all before it.
    pub window: Option<usize>,
}

impl AttentionScores {
    /// The scale that ONNX and most models use, `1/sqrt(head_dim)`.
    pub fn usual_scale(head_dim: usize) -> f32 {
        1.0 / (head_dim as f32).sqrt()
    }

    /// The canonical operator, with the mask as an input; `softmax_precision` as in ONNX.
    pub fn operator(&self, softmax_precision: Option<DType>) -> Attention {
        Attention {
            is_causal: false,
            scale: Some(self.scale),
            softcap: self.softcap.unwrap_or(0.0),
            q_num_heads: None,
            kv_num_heads: None,
            softmax_precision,
        }
    }
}

/// In ONNX 0 means none.
fn softcap(attribute: f32) -> Option<f32> {
    (attribute != 0.0).then_some(attribute)
}

impl Attention {
    /// The scores that the attributes define for heads of this width. Windows are in the mask.
    pub fn scores(&self, head_dim: usize) -> AttentionScores {
        AttentionScores {
            scale: self.scale.unwrap_or_else(|| AttentionScores::usual_scale(head_dim)),
            softcap: softcap(self.softcap),
            window: None,
        }
    }
}

/// The plain operator with these scores, in fp32.
fn in_fp32(scale: f32, cap: f32) -> Attention {
    let scores = AttentionScores {
        scale,
        softcap: softcap(cap),
        window: None,
    };
    scores.operator(Some(DType::F32))
}

impl RoundedAttention {
    /// The same without rounding; scores in fp32.
    pub fn unrounded(&self) -> Attention {
        in_fp32(self.scale, self.softcap)
    }
}

impl BiasedAttention {
    /// The same without slopes and sinks; scores in fp32.
    pub fn unbiased(&self) -> Attention {
        in_fp32(self.scale, self.softcap)
    }
}

impl Op {
    /// The attributes of an attention, except its roundings, slopes and sinks.
    pub fn attention(&self) -> Option<Attention> {
        match self {
            Op::Attention(attention) => Some(attention.clone()),
            Op::RoundedAttention(rounded) => Some(rounded.unrounded()),
            Op::BiasedAttention(biased) => Some(biased.unbiased()),
            _ => None,
        }
    }
}

impl GroupQueryAttention {
    /// The scores that the attributes define for heads of this width.
    pub fn scores(&self, head_dim: usize) -> AttentionScores {
        AttentionScores {
            // 0 means the usual one, too.
            scale: self
                .scale
                .filter(|scale| *scale != 0.0)
                .unwrap_or_else(|| AttentionScores::usual_scale(head_dim)),
            softcap: softcap(self.softcap),
            window: usize::try_from(self.local_window_size)
                .ok()
                .filter(|window| *window > 0),
        }
    }
}
