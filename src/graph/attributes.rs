//! Attributes of the operators as ONNX names them, for the writer and for dumps.

use super::op::{Op, ScatterMode};
use crate::tensor::{DType, Tensor};

/// The value of an attribute.
#[derive(Clone, Debug, PartialEq)]
pub enum Attribute {
    Int(i64),
    Float(f32),
    Ints(Vec<i64>),
    Text(&'static str),
    DType(DType),
    Tensor(Tensor),
}

/// Gathers attributes, leaving out those that have ONNX's default.
#[derive(Default)]
struct List(Vec<(&'static str, Attribute)>);

impl List {
    fn int(mut self, name: &'static str, value: i64, default: i64) -> Self {
        if value != default {
            self.0.push((name, Attribute::Int(value)));
        }
        self
    }
    fn flag(self, name: &'static str, value: bool) -> Self {
        self.int(name, i64::from(value), 0)
    }
    fn count(self, name: &'static str, value: Option<usize>) -> Self {
        self.int(name, value.unwrap_or(0) as i64, 0)
    }
    fn float(mut self, name: &'static str, value: f32, default: f32) -> Self {
        if value != default {
            self.0.push((name, Attribute::Float(value)));
        }
        self
    }
    fn always(mut self, name: &'static str, value: Attribute) -> Self {
        self.0.push((name, value));
        self
    }
    fn maybe(self, name: &'static str, value: Option<Attribute>) -> Self {
        match value {
            Some(value) => self.always(name, value),
            None => self,
        }
    }
}

impl Op {
    /// The operator's attributes with their ONNX names, in a fixed order; those with ONNX's default are left out. The
    /// `fmod` of a float `Mod` is not among them: it depends on the operands.
    pub fn attributes(&self) -> Vec<(&'static str, Attribute)> {
        let list = List::default();
        let list = match self {
            Op::Unary(_)
            | Op::Binary(_)
            | Op::Clip
            | Op::Identity
            | Op::CastLike
            | Op::Where
            | Op::MatMul
            | Op::Size
            | Op::Squeeze
            | Op::Unsqueeze
            | Op::Expand
            | Op::Tile
            | Op::Slice
            | Op::Range
            | Op::Unknown { .. } => list,
            Op::Gelu { tanh } => list.maybe("approximate", tanh.then_some(Attribute::Text("tanh"))),
            Op::Swish { alpha } => list.float("alpha", *alpha, 1.0),
            Op::Cast { to } => list.always("to", Attribute::DType(*to)),
            Op::Gemm {
                alpha,
                beta,
                trans_a,
                trans_b,
            } => list
                .float("alpha", *alpha, 1.0)
                .float("beta", *beta, 1.0)
                .flag("transA", *trans_a)
                .flag("transB", *trans_b),
            Op::FusedMatMul {
                alpha,
                trans_a,
                trans_b,
            } => list
                .float("alpha", *alpha, 1.0)
                .flag("transA", *trans_a)
                .flag("transB", *trans_b),
            Op::Softmax { axis } | Op::LogSoftmax { axis } => list.int("axis", *axis, -1),
            Op::Reduce {
                keepdims,
                noop_with_empty_axes,
                ..
            } => list
                .int("keepdims", i64::from(*keepdims), 1)
                .flag("noop_with_empty_axes", *noop_with_empty_axes),
            Op::CumSum { exclusive, reverse } => list.flag("exclusive", *exclusive).flag("reverse", *reverse),
            Op::Shape { start, end } => list.int("start", *start, 0).maybe("end", end.map(Attribute::Int)),
            Op::Reshape { allowzero } => list.flag("allowzero", *allowzero),
            Op::Transpose { perm } => {
                let perm = perm.as_ref().map(|p| p.iter().map(|i| *i as i64).collect());
                list.maybe("perm", perm.map(Attribute::Ints))
            }
            Op::Flatten { axis } => list.int("axis", *axis, 1),
            Op::Concat { axis } => list.always("axis", Attribute::Int(*axis)),
            Op::Split { axis } | Op::Gather { axis } | Op::GatherElements { axis } => list.int("axis", *axis, 0),
            Op::GatherNd { batch_dims } => list.count("batch_dims", Some(*batch_dims)),
            Op::ConstantOfShape { value } => list.always("value", Attribute::Tensor(value.clone())),
            Op::Trilu { upper } => list.int("upper", i64::from(*upper), 1),
            Op::ScatterNd { mode } => list.maybe("reduction", reduction(*mode)),
            Op::ScatterElements { axis, mode } => list.int("axis", *axis, 0).maybe("reduction", reduction(*mode)),
            Op::TensorScatter { axis, circular } => list
                .int("axis", *axis, -2)
                .maybe("mode", circular.then_some(Attribute::Text("circular"))),
            Op::LayerNormalization { axis, epsilon } | Op::RmsNormalization { axis, epsilon } => {
                list.int("axis", *axis, -1).float("epsilon", *epsilon, 1e-5)
            }
            Op::RotaryEmbedding {
                interleaved,
                num_heads,
                rotary_dim,
            }
            | Op::ContribRotaryEmbedding {
                interleaved,
                num_heads,
                rotary_dim,
            } => list
                .flag("interleaved", *interleaved)
                .count("num_heads", *num_heads)
                .count("rotary_embedding_dim", Some(*rotary_dim)),
            Op::Attention(a) => list
                .flag("is_causal", a.is_causal)
                .maybe("scale", a.scale.map(Attribute::Float))
                .float("softcap", a.softcap, 0.0)
                .count("q_num_heads", a.q_num_heads)
                .count("kv_num_heads", a.kv_num_heads)
                .maybe("softmax_precision", a.softmax_precision.map(Attribute::DType)),
            Op::GroupQueryAttention(a) => list
                .count("num_heads", Some(a.num_heads))
                .count("kv_num_heads", Some(a.kv_num_heads))
                .maybe("scale", a.scale.map(Attribute::Float))
                .float("softcap", a.softcap, 0.0)
                .int("local_window_size", a.local_window_size, -1)
                .flag("do_rotary", a.do_rotary)
                .flag("rotary_interleaved", a.rotary_interleaved),
            Op::SkipRmsNormalization { epsilon } | Op::SkipLayerNormalization { epsilon } => {
                list.always("epsilon", Attribute::Float(*epsilon))
            }
        };
        list.0
    }
}

fn reduction(mode: ScatterMode) -> Option<Attribute> {
    match mode {
        ScatterMode::Replace => None,
        ScatterMode::Add => Some(Attribute::Text("add")),
        ScatterMode::Mul => Some(Attribute::Text("mul")),
        ScatterMode::Max => Some(Attribute::Text("max")),
        ScatterMode::Min => Some(Attribute::Text("min")),
    }
}
