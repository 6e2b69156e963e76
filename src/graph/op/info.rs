//! Properties of an operator for other levels, as plain data.

use crate::tensor::DType;

/// The domain of ONNX Runtime's contrib operators.
pub const MICROSOFT: &str = "com.microsoft";

/// The domain of Lapidary's own operators, which ONNX cannot express in one node.
pub const LAPIDARY: &str = "lapidary";

/// Element types that an operand may have.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum ElementTypes {
    /// Every type.
    Any,
    /// f16, bf16, f32, f64.
    Float,
    /// Every type except bool.
    Number,
    /// i32 or i64.
    Index,
    /// i32 alone.
    I32,
    /// i64 alone.
    I64,
    /// bool alone.
    Bool,
}

impl ElementTypes {
    /// Whether the dtype is one of them.
    pub fn takes(self, dtype: DType) -> bool {
        match self {
            ElementTypes::Any => true,
            ElementTypes::Float => dtype.is_float(),
            ElementTypes::Number => dtype.is_float() || dtype.is_int(),
            ElementTypes::Index => matches!(dtype, DType::I32 | DType::I64),
            ElementTypes::I32 => dtype == DType::I32,
            ElementTypes::I64 => dtype == DType::I64,
            ElementTypes::Bool => dtype == DType::Bool,
        }
    }

    /// As in messages: "must be a float type".
    pub fn name(self) -> &'static str {
        match self {
            ElementTypes::Any => "anything",
            ElementTypes::Float => "a float type",
            ElementTypes::Number => "a number",
            ElementTypes::Index => "i32 or i64",
            ElementTypes::I32 => "i32",
            ElementTypes::I64 => "i64",
            ElementTypes::Bool => "bool",
        }
    }
}

/// One input of an operator.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Input {
    /// Element types that it may have.
    pub types: ElementTypes,
    /// All inputs marked so must have one element type.
    pub same: bool,
    /// It may be omitted.
    pub optional: bool,
    /// It, or only its type, is read while the network is built (a shape, axes): no layer needs its elements.
    pub parameter: bool,
}

impl Input {
    const fn of(types: ElementTypes) -> Self {
        Input {
            types,
            same: false,
            optional: false,
            parameter: false,
        }
    }
    pub(super) const fn same(self) -> Self {
        Input { same: true, ..self }
    }
    pub(super) const fn optional(self) -> Self {
        Input { optional: true, ..self }
    }
    pub(super) const fn parameter(self) -> Self {
        Input {
            parameter: true,
            ..self
        }
    }
}

pub(super) const fn any() -> Input {
    Input::of(ElementTypes::Any)
}
pub(super) const fn float() -> Input {
    Input::of(ElementTypes::Float)
}
pub(super) const fn number() -> Input {
    Input::of(ElementTypes::Number)
}
pub(super) const fn index() -> Input {
    Input::of(ElementTypes::Index)
}
pub(super) const fn int32() -> Input {
    Input::of(ElementTypes::I32)
}
pub(super) const fn int64() -> Input {
    Input::of(ElementTypes::I64)
}
pub(super) const fn boolean() -> Input {
    Input::of(ElementTypes::Bool)
}

/// Which file of `graph::infer`, `graph::eval` and `lower` handles the operator.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Family {
    /// Each element from the elements at the same position, with broadcasting.
    Elementwise,
    /// Softmax, reductions and cumulative sums.
    Reduction,
    /// Matrix products.
    Product,
    /// Normalizations over trailing axes.
    Normalization,
    /// Shapes, and elements in another order or another shape.
    Movement,
    /// Elements read or written at given indices.
    Indexing,
    /// Elements chosen by value, and their indices.
    Selection,
    /// Attention and rotary embeddings.
    Attention,
    /// A mixture of experts.
    Experts,
    /// Quantization and dequantization.
    Quantization,
    /// [`Op::Unknown`](super::Op::Unknown).
    Unknown,
}

/// Whether row `[.., t, :]` of the output is computed from the same row of every input alone.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum RowWise {
    /// With any attributes.
    Always,
    /// If its axis is the last one.
    OverLastAxis,
    /// Not in general.
    Never,
}

/// Whether an operator only moves elements.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Moves {
    /// It computes.
    No,
    /// It only changes the shape; elements keep their order.
    InOrder,
    /// It only moves, repeats or drops elements.
    Elsewhere,
}

/// How dtypes and shapes of the outputs follow.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum TypeRule {
    /// Output 0 has the dtype and shape of input 0.
    LikeInput,
    /// A rule in the family's file of `graph::infer`.
    Own,
}

/// The table's entry of one operator.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct OperatorInfo {
    /// `""` for ai.onnx.
    pub domain: &'static str,
    /// The name within its domain.
    pub op_type: &'static str,
    /// The opset versions up to 24 that redefine it, ascending; 1 alone in other domains.
    pub versions: &'static [i64],
    /// The inputs in order.
    pub inputs: &'static [Input],
    /// The last input may be repeated.
    pub variadic: bool,
    /// The maximum number of outputs; `usize::MAX` if their number has a meaning.
    pub outputs: usize,
    /// Attributes without effect here, which the reader skips.
    pub ignored: &'static [&'static str],
    /// Which file defines its meaning.
    pub family: Family,
    /// How its outputs are typed.
    pub types: TypeRule,
    /// Whether tokens stay independent.
    pub row_wise: RowWise,
    /// Whether it only moves elements.
    pub moves: Moves,
    /// Whether a canonical graph may contain it, subject to its attributes.
    pub canonical: bool,
}

/// An operator of ONNX's own domain with one output and its own rule; the methods below change that.
pub(super) const fn onnx(op_type: &'static str, versions: &'static [i64], inputs: &'static [Input]) -> OperatorInfo {
    OperatorInfo {
        domain: "",
        op_type,
        versions,
        inputs,
        variadic: false,
        outputs: 1,
        ignored: &[],
        family: Family::Unknown,
        types: TypeRule::Own,
        row_wise: RowWise::Never,
        moves: Moves::No,
        canonical: true,
    }
}

/// A contrib operator of ONNX Runtime: the passes rewrite it, so canonical graphs contain none.
pub(super) const fn contrib(op_type: &'static str, inputs: &'static [Input]) -> OperatorInfo {
    OperatorInfo {
        domain: MICROSOFT,
        canonical: false,
        ..onnx(op_type, &[1], inputs)
    }
}

/// One of Lapidary's own operators; in files it is a function of standard operators.
pub(super) const fn own(op_type: &'static str, inputs: &'static [Input]) -> OperatorInfo {
    OperatorInfo {
        domain: LAPIDARY,
        ..onnx(op_type, &[1], inputs)
    }
}

pub(super) const fn unknown() -> OperatorInfo {
    const ANYTHING: &[Input] = &[any().optional()];
    OperatorInfo {
        variadic: true,
        outputs: usize::MAX,
        canonical: false,
        ..onnx("", &[], ANYTHING)
    }
}

impl OperatorInfo {
    pub(super) const fn op_type(self, op_type: &'static str) -> Self {
        OperatorInfo { op_type, ..self }
    }
    pub(super) const fn family(self, family: Family) -> Self {
        OperatorInfo { family, ..self }
    }
    pub(super) const fn variadic(self) -> Self {
        OperatorInfo { variadic: true, ..self }
    }
    pub(super) const fn outputs(self, outputs: usize) -> Self {
        OperatorInfo { outputs, ..self }
    }
    pub(super) const fn ignores(self, ignored: &'static [&'static str]) -> Self {
        OperatorInfo { ignored, ..self }
    }
    pub(super) const fn like_input(self) -> Self {
        OperatorInfo {
            types: TypeRule::LikeInput,
            ..self
        }
    }
    pub(super) const fn row_wise(self, row_wise: RowWise) -> Self {
        OperatorInfo { row_wise, ..self }
    }
    pub(super) const fn moves(self, moves: Moves) -> Self {
        OperatorInfo { moves, ..self }
    }
    pub(super) const fn not_canonical(self) -> Self {
        OperatorInfo {
            canonical: false,
            ..self
        }
    }

    pub(super) fn is_named(&self, domain: &str, op_type: &str) -> bool {
        (self.domain, self.op_type) == (domain, op_type)
    }
}
