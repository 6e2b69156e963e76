//! What ONNX calls the operators of the graph level: domain and operator type, for the writer, dumps and messages.

use super::op::{Binary, Op, Reduction, Unary};

/// The domain of ONNX Runtime's contrib operators.
pub const MICROSOFT: &str = "com.microsoft";

impl Op {
    /// The operator type as ONNX writes it, `Add` for example. Of an unknown operator, with its domain if it has one.
    pub fn name(&self) -> String {
        match self {
            Op::Unknown { domain, op_type } if !domain.is_empty() => format!("{domain}::{op_type}"),
            Op::Unknown { op_type, .. } => op_type.clone(),
            _ => self.op_type().to_string(),
        }
    }

    /// `""` for ai.onnx.
    pub fn domain(&self) -> &str {
        match self {
            Op::GroupQueryAttention(_)
            | Op::ContribRotaryEmbedding { .. }
            | Op::SkipRmsNormalization { .. }
            | Op::SkipLayerNormalization { .. }
            | Op::FusedMatMul { .. } => MICROSOFT,
            Op::Unknown { domain, .. } => domain,
            _ => "",
        }
    }

    /// The operator type within its domain.
    pub fn op_type(&self) -> &str {
        match self {
            Op::Unary(op) => op.op_type(),
            Op::Binary(op) => op.op_type(),
            Op::Gelu { .. } => "Gelu",
            Op::Swish { .. } => "Swish",
            Op::Clip => "Clip",
            Op::Identity => "Identity",
            Op::Cast { .. } => "Cast",
            Op::CastLike => "CastLike",
            Op::Where => "Where",
            Op::MatMul => "MatMul",
            Op::Gemm { .. } => "Gemm",
            Op::Softmax { .. } => "Softmax",
            Op::LogSoftmax { .. } => "LogSoftmax",
            Op::Reduce { reduction, .. } => reduction.op_type(),
            Op::CumSum { .. } => "CumSum",
            Op::Shape { .. } => "Shape",
            Op::Size => "Size",
            Op::Reshape { .. } => "Reshape",
            Op::Transpose { .. } => "Transpose",
            Op::Squeeze => "Squeeze",
            Op::Unsqueeze => "Unsqueeze",
            Op::Flatten { .. } => "Flatten",
            Op::Expand => "Expand",
            Op::Tile => "Tile",
            Op::Concat { .. } => "Concat",
            Op::Split { .. } => "Split",
            Op::Slice => "Slice",
            Op::Gather { .. } => "Gather",
            Op::GatherElements { .. } => "GatherElements",
            Op::GatherNd { .. } => "GatherND",
            Op::Range => "Range",
            Op::ConstantOfShape { .. } => "ConstantOfShape",
            Op::Trilu { .. } => "Trilu",
            Op::ScatterNd { .. } => "ScatterND",
            Op::ScatterElements { .. } => "ScatterElements",
            Op::TensorScatter { .. } => "TensorScatter",
            Op::LayerNormalization { .. } => "LayerNormalization",
            Op::RmsNormalization { .. } => "RMSNormalization",
            Op::RotaryEmbedding { .. } | Op::ContribRotaryEmbedding { .. } => "RotaryEmbedding",
            Op::Attention(_) => "Attention",
            Op::GroupQueryAttention(_) => "GroupQueryAttention",
            Op::SkipRmsNormalization { .. } => "SkipSimplifiedLayerNormalization",
            Op::SkipLayerNormalization { .. } => "SkipLayerNormalization",
            Op::FusedMatMul { .. } => "FusedMatMul",
            Op::Unknown { op_type, .. } => op_type,
        }
    }
}

impl Unary {
    pub fn op_type(self) -> &'static str {
        match self {
            Unary::Abs => "Abs",
            Unary::Ceil => "Ceil",
            Unary::Cos => "Cos",
            Unary::Erf => "Erf",
            Unary::Exp => "Exp",
            Unary::Floor => "Floor",
            Unary::IsNan => "IsNaN",
            Unary::Log => "Log",
            Unary::Neg => "Neg",
            Unary::Not => "Not",
            Unary::Reciprocal => "Reciprocal",
            Unary::Relu => "Relu",
            Unary::Round => "Round",
            Unary::Sigmoid => "Sigmoid",
            Unary::Sign => "Sign",
            Unary::Sin => "Sin",
            Unary::Softplus => "Softplus",
            Unary::Sqrt => "Sqrt",
            Unary::Tanh => "Tanh",
        }
    }
}

impl Binary {
    pub fn op_type(self) -> &'static str {
        match self {
            Binary::Add => "Add",
            Binary::Sub => "Sub",
            Binary::Mul => "Mul",
            Binary::Div => "Div",
            Binary::Pow => "Pow",
            Binary::Mod => "Mod",
            Binary::Max => "Max",
            Binary::Min => "Min",
            Binary::And => "And",
            Binary::Or => "Or",
            Binary::Xor => "Xor",
            Binary::Equal => "Equal",
            Binary::Less => "Less",
            Binary::LessOrEqual => "LessOrEqual",
            Binary::Greater => "Greater",
            Binary::GreaterOrEqual => "GreaterOrEqual",
        }
    }

    /// Whether the result is bool whatever the operands are.
    pub fn is_predicate(self) -> bool {
        matches!(
            self,
            Binary::And
                | Binary::Or
                | Binary::Xor
                | Binary::Equal
                | Binary::Less
                | Binary::LessOrEqual
                | Binary::Greater
                | Binary::GreaterOrEqual
        )
    }
}

impl Reduction {
    pub fn op_type(self) -> &'static str {
        match self {
            Reduction::Mean => "ReduceMean",
            Reduction::Sum => "ReduceSum",
            Reduction::Max => "ReduceMax",
            Reduction::Min => "ReduceMin",
            Reduction::Prod => "ReduceProd",
            Reduction::SumSquare => "ReduceSumSquare",
        }
    }
}
