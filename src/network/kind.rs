//! The kinds of layers: what each means, what it is called, and its text form.
//!
//! One file for everything that is one fact of a kind. Its rule is in `infer`; what runs it is in the back ends' files
//! named `layers`. docs/contributing/adding-an-operator.md walks through a new kind.

use super::kernel_layers::{DecodeAttention, RowProduct};
use super::{Shape, WeightId};
use crate::dim::Dim;
use crate::graph::op::{ExpertActivation, Gating};
use crate::ir_text::{self, Cursor, MAX_SHOWN, Parsed, push_list};
use crate::tensor::quantized::Granularity;
use crate::tensor::{self, DType};

/// An enum without fields, with the list of its variants and their names as dumps write them.
macro_rules! words {
    ($(#[$meta:meta])* $name:ident { $( $(#[$doc:meta])* $variant:ident, )* }) => {
        $(#[$meta])*
        #[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
        #[allow(missing_docs, reason = "the variants are TensorRT's operations of the same name")]
        pub enum $name {
            $( $(#[$doc])* $variant, )*
        }

        impl $name {
            fn named(word: &str) -> Option<Self> {
                match word { $( stringify!($variant) => Some($name::$variant), )* _ => None }
            }
        }
    };
}

/// What a matrix product does to an operand first.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum MatrixOp {
    /// Nothing.
    None,
    /// The last two axes swapped.
    Transpose,
}

words! {
    /// `IElementWiseLayer` operations. Comparisons and logic give bool.
    Elementwise {
        Sum,
        Sub,
        Prod,
        Div,
        Pow,
        Max,
        Min,
        /// Rounds toward negative infinity.
        FloorDiv,
        And,
        Or,
        Xor,
        Equal,
        Greater,
        Less,
    }
}

words! {
    /// `IUnaryLayer` operations, and rounding to the nearest number of a float of 8 bits, saturated, which TensorRT does by
    /// quantizing and dequantizing.
    UnaryOp {
        Abs,
        Ceil,
        Cos,
        Erf,
        Exp,
        Floor,
        IsNan,
        Log,
        Neg,
        Not,
        Recip,
        Round,
        RoundE4M3,
        RoundE5M2,
        Sign,
        Sin,
        Sqrt,
    }
}

words! {
    /// `IActivationLayer` functions.
    Activation {
        Relu,
        Sigmoid,
        Tanh,
        GeluErf,
        GeluTanh,
        Softplus,
    }
}

words! {
    /// `IReduceLayer` operations.
    ReduceOp {
        Sum,
        Prod,
        Max,
        Min,
        Avg,
    }
}

words! {
    /// What a TopK layer gives.
    Greatest {
        /// The elements.
        Values,
        /// Where they are along the axis, i32.
        Indices,
    }
}

/// One layer. Inputs and outputs in the order given; axes count from 0.
#[derive(Clone, Debug)]
pub enum LayerKind {
    /// No input; gives the weight. A constant layer, or a network input when the weight is bound.
    Weight(WeightId),
    /// No input; a small constant that is part of the lowering (an epsilon, a table), always in the plan.
    Constant(tensor::Tensor),
    /// Inputs a `[.., m, k]`, b `[.., k, n]` after their ops; leading dims broadcast where 1; equal ranks.
    MatrixMultiply {
        /// Applied to a.
        op_a: MatrixOp,
        /// Applied to b.
        op_b: MatrixOp,
    },
    /// Two inputs of equal rank and dtype.
    Elementwise(Elementwise),
    /// One input.
    Unary(UnaryOp),
    /// One input, a float.
    Activation(Activation),
    /// Axes are kept with size 1 if `keep_dims`.
    Reduce {
        /// How elements combine.
        op: ReduceOp,
        /// Which axes.
        axes: Vec<usize>,
        /// Whether they stay, with size 1.
        keep_dims: bool,
    },
    /// Over one axis.
    Softmax {
        /// Counted from 0.
        axis: usize,
    },
    /// Transpose, then reshape to the given dims (of equal volume), then transpose: each optional.
    Shuffle {
        /// The transpose before the reshape.
        first: Option<Vec<usize>>,
        /// The dims to reshape to.
        reshape: Option<Shape>,
        /// The transpose after the reshape.
        second: Option<Vec<usize>>,
    },
    /// `start` and `stride` are numbers; `size` is the output's shape and may hold `tokens`. A stride of 0 repeats the
    /// element at `start`, which is how a dim of 1 is expanded.
    Slice {
        /// The first element, for each axis.
        start: Vec<i64>,
        /// The output's shape.
        size: Shape,
        /// The step between elements, for each axis.
        stride: Vec<i64>,
    },
    /// All inputs, of one dtype, joined along one axis.
    Concatenation {
        /// Which axis.
        axis: usize,
    },
    /// Inputs data, indices (i32 or i64); the output's shape is `data[..axis] + indices + data[axis+1..]`. Every index
    /// lies in `0..data[axis]`: another one is an error of the caller. The CPU executor refuses it and names it;
    /// TensorRT does not check and promises nothing about the result, so sessions check token ids before they run.
    Gather {
        /// Which axis of the data.
        axis: usize,
    },
    /// Inputs condition (bool), then, else; equal ranks.
    Select,
    /// One input, converted element by element.
    Cast {
        /// The output's dtype.
        to: DType,
    },
    /// `start + step * i` along one new axis: `[length]`, i32 or f32 by the dtype of the output.
    Fill {
        /// Number of elements.
        length: Dim,
        /// The first element.
        start: f64,
        /// The step from one to the next.
        step: f64,
    },
    /// LayerNorm over `axes`: inputs x, scale, bias; scale and bias have x's rank, with 1 outside `axes`.
    Normalization {
        /// The trailing axes that are normalized.
        axes: Vec<usize>,
        /// Added to the variance.
        epsilon: f32,
    },
    /// Inputs x `[batch, heads, tokens, head_dim]`, cos and sin `[max_position, rotary_dim/2]`, position_ids
    /// `[batch, tokens]` i32. Dims of a head beyond `rotary_dim` pass through. Not interleaved: pairs are
    /// (i, i + rotary_dim/2); interleaved: (2i, 2i + 1).
    RotaryEmbedding {
        /// How elements pair.
        interleaved: bool,
        /// Elements of a head that rotate.
        rotary_dim: usize,
    },
    /// `softmax(q kᵀ + mask) v`; inputs q `[batch, heads, tokens, d]`, k and v `[batch, kv_heads, slots, d]`, and an
    /// optional mask `[batch or 1, heads or 1, tokens, slots]` (bool, true = attend, or the dtype of q, added; TensorRT
    /// broadcasts it over batch and heads only). **Does not scale**: the lowering scales q. heads is a multiple of
    /// kv_heads; query head h reads KV head `h / (heads / kv_heads)`.
    Attention,
    /// Inputs codes (i8, i4 or f8e4m3fn) and scales of the shape that [`Granularity::scale_shape`] gives: `code * scale` in the
    /// scales' dtype. TensorRT takes channels and blocks of constants only.
    Dequantize(Granularity),
    /// The `k` greatest elements of the last axis of one float input, in falling order.
    TopK {
        /// How many.
        k: usize,
        /// Which output of TensorRT's layer.
        part: Greatest,
    },
    /// What [`Op::Experts`](crate::graph::op::Op::Experts) computes, for an executor that computes the chosen experts alone;
    /// TensorRT gets other layers. Inputs x, weights (f32), experts (i32), gate, up?, down, then gate_bias, up_bias? and
    /// down_bias together or not at all; there is an up_bias where there is an up, so the number of inputs says what they are
    /// ([`ExpertInputs`]).
    Experts {
        /// How many there are.
        experts: usize,
        /// What stands before `down`.
        gating: Gating,
    },
    /// Inputs cache `[batch, heads, capacity, d]` (a network input), update `[batch, heads, tokens, d]`, write_indices
    /// `[batch]` i32. Writes in place; the output is a network output in the cache's memory.
    KvCacheUpdate,
    /// See [`RowProduct`]; a kernel of ours.
    RowProduct(RowProduct),
    /// See [`DecodeAttention`]; a kernel of ours, and the only kind with several outputs.
    DecodeAttention(DecodeAttention),
}

/// The inputs of a [`LayerKind::Experts`] by what they are.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ExpertInputs<T> {
    /// `[.., in]`.
    pub x: T,
    /// `[.., top_k]`.
    pub weights: T,
    /// `[.., top_k]`.
    pub experts: T,
    /// `[experts * hidden, in]`.
    pub gate: T,
    /// As gate.
    pub up: Option<T>,
    /// `[experts * out, hidden]`.
    pub down: T,
    /// Of gate, `up` and down, each with an element a row.
    pub biases: Option<(T, Option<T>, T)>,
}

impl<T: Copy> ExpertInputs<T> {
    /// Of a layer's inputs; `None` if they are too many or too few.
    pub fn of(inputs: &[T]) -> Option<Self> {
        let (first, up, down, biases) = match *inputs {
            [x, w, e, gate, down] => ([x, w, e, gate], None, down, None),
            [x, w, e, gate, up, down] => ([x, w, e, gate], Some(up), down, None),
            [x, w, e, gate, down, a, c] => ([x, w, e, gate], None, down, Some((a, None, c))),
            [x, w, e, gate, up, down, a, b, c] => ([x, w, e, gate], Some(up), down, Some((a, Some(b), c))),
            _ => return None,
        };
        let [x, weights, experts, gate] = first;
        Some(ExpertInputs {
            x,
            weights,
            experts,
            gate,
            up,
            down,
            biases,
        })
    }
}

/// Which axis a layer works along, if it computes rows apart from one another.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum RowLayer {
    /// Each element by itself.
    Elements,
    /// Along this axis of input 0, which keeps its place.
    Along(usize),
    /// Not of this kind.
    No,
}

impl LayerKind {
    /// The layer's name in TensorRT's terms, as errors and dumps say it.
    pub fn name(&self) -> &'static str {
        match self {
            LayerKind::Weight(_) => "Weight",
            LayerKind::Constant(_) => "Constant",
            LayerKind::MatrixMultiply { .. } => "MatrixMultiply",
            LayerKind::Elementwise(_) => "Elementwise",
            LayerKind::Unary(_) => "Unary",
            LayerKind::Activation(_) => "Activation",
            LayerKind::Reduce { .. } => "Reduce",
            LayerKind::Softmax { .. } => "Softmax",
            LayerKind::Shuffle { .. } => "Shuffle",
            LayerKind::Slice { .. } => "Slice",
            LayerKind::Concatenation { .. } => "Concatenation",
            LayerKind::Gather { .. } => "Gather",
            LayerKind::Select => "Select",
            LayerKind::Cast { .. } => "Cast",
            LayerKind::Fill { .. } => "Fill",
            LayerKind::Normalization { .. } => "Normalization",
            LayerKind::RotaryEmbedding { .. } => "RotaryEmbedding",
            LayerKind::Attention => "Attention",
            LayerKind::Dequantize(_) => "Dequantize",
            LayerKind::TopK { .. } => "TopK",
            LayerKind::Experts { .. } => "Experts",
            LayerKind::KvCacheUpdate => "KvCacheUpdate",
            LayerKind::RowProduct(_) => "RowProduct",
            LayerKind::DecodeAttention(_) => "DecodeAttention",
        }
    }

    /// Whether it is one of ours, which TensorRT does not have: see [`kernel_layers`](super::kernel_layers).
    pub fn is_kernel_layer(&self) -> bool {
        matches!(self, LayerKind::RowProduct(_) | LayerKind::DecodeAttention(_))
    }

    /// How many tensors it gives.
    pub(super) fn output_count(&self) -> usize {
        match self {
            LayerKind::DecodeAttention(_) => 3,
            _ => 1,
        }
    }

    /// Whether it computes rows apart from one another, so that a back end may run it with its neighbours row by row.
    pub(crate) fn row_layer(&self) -> RowLayer {
        match self {
            LayerKind::Elementwise(_)
            | LayerKind::Unary(_)
            | LayerKind::Activation(_)
            | LayerKind::Select
            | LayerKind::Cast { .. }
            | LayerKind::Fill { .. } => RowLayer::Elements,
            LayerKind::Reduce {
                axes, keep_dims: true, ..
            }
            | LayerKind::Normalization { axes, .. }
                if axes.len() == 1 =>
            {
                RowLayer::Along(axes[0])
            }
            LayerKind::Softmax { axis } => RowLayer::Along(*axis),
            _ => RowLayer::No,
        }
    }

    /// `Layer(inputs, parameter: value)`, the text of the layer over inputs of these names. What the output's type says
    /// (a fill's length) is not in it.
    pub(super) fn expression(&self, inputs: Vec<String>) -> String {
        let mut arguments = inputs;
        let mut head = self.name().to_string();
        match self {
            LayerKind::Weight(_) | LayerKind::Select | LayerKind::Attention | LayerKind::KvCacheUpdate => {}
            LayerKind::Constant(tensor) => arguments.push(elements(tensor)),
            LayerKind::MatrixMultiply { op_a, op_b } => {
                for (argument, op) in arguments.iter_mut().zip([op_a, op_b]) {
                    if *op == MatrixOp::Transpose {
                        argument.push_str("^T");
                    }
                }
            }
            LayerKind::Elementwise(op) => head = format!("{op:?}"),
            LayerKind::Unary(op) => head = format!("{op:?}"),
            LayerKind::Activation(op) => head = format!("{op:?}"),
            LayerKind::Reduce { op, axes, keep_dims } => {
                head = format!("Reduce{op:?}");
                arguments.push(format!("axes: {axes:?}"));
                if !keep_dims {
                    arguments.push("keep_dims: false".to_string());
                }
            }
            LayerKind::Softmax { axis } | LayerKind::Concatenation { axis } | LayerKind::Gather { axis } => {
                arguments.push(format!("axis: {axis}"));
            }
            LayerKind::Shuffle { first, reshape, second } => {
                // In the order in which they happen.
                arguments.extend(first.as_ref().map(|o| format!("transpose: {o:?}")));
                arguments.extend(reshape.as_ref().map(|to| format!("reshape: {}", ir_text::shape(to))));
                arguments.extend(second.as_ref().map(|o| format!("transpose: {o:?}")));
            }
            LayerKind::Slice { start, size, stride } => {
                arguments.push(format!("start: {start:?}, size: {}", ir_text::shape(size)));
                if stride.iter().any(|s| *s != 1) {
                    arguments.push(format!("stride: {stride:?}"));
                }
            }
            LayerKind::Cast { to } => arguments.push(to.to_string()),
            LayerKind::Fill { start, step, .. } => arguments.push(format!("start: {start}, step: {step}")),
            LayerKind::Normalization { axes, epsilon } => {
                arguments.push(format!("axes: {axes:?}, epsilon: {epsilon}"));
            }
            LayerKind::RotaryEmbedding {
                interleaved,
                rotary_dim,
            } => {
                arguments.push(format!("rotary_dim: {rotary_dim}"));
                if *interleaved {
                    arguments.push("interleaved".to_string());
                }
            }
            LayerKind::TopK { k, part } => {
                head = format!("TopK{part:?}");
                arguments.push(format!("k: {k}"));
            }
            LayerKind::Experts { experts, gating } => {
                let Gating {
                    activation,
                    alpha,
                    beta,
                    limit,
                } = gating;
                arguments.push(format!("experts: {experts}, activation: {}", activation.word()));
                arguments.push(format!("alpha: {alpha}, beta: {beta}, limit: {limit}"));
            }
            LayerKind::RowProduct(product) => arguments.extend(product.parameters()),
            LayerKind::DecodeAttention(attention) => arguments.extend(attention.parameters()),
            LayerKind::Dequantize(Granularity::Tensor) => {}
            LayerKind::Dequantize(Granularity::Channel { axis }) => arguments.push(format!("axis: {axis}")),
            LayerKind::Dequantize(Granularity::Block { axis, size }) => {
                arguments.push(format!("axis: {axis}, block: {size}"));
            }
        }
        format!("{head}({})", arguments.join(", "))
    }

    /// Reads what [`LayerKind::expression`] writes, for an output of this type. `input` reads one input by its name.
    pub(super) fn parse(
        line: &mut Cursor,
        (dtype, shape): (DType, &Shape),
        mut input: impl FnMut(&mut Cursor) -> Parsed<()>,
    ) -> Parsed<LayerKind> {
        let start = line.position();
        let head = line.take(char::is_alphanumeric);
        line.expect("(")?;
        let mut arguments = Arguments { first: true };
        // Of the product: whether each operand is transposed.
        let mut transposed = Vec::new();
        // Inputs come first; a constant and a cast have a word that is none.
        let count = match head {
            "Constant" | "Fill" => 0,
            "Cast" => 1,
            _ => usize::MAX,
        };
        while transposed.len() < count && arguments.next_is_input(line)? {
            input(line)?;
            transposed.push(line.eat("^T"));
        }
        let a = &mut arguments;
        let kind = match head {
            "Constant" => LayerKind::Constant(constant(line, dtype, shape)?),
            "MatrixMultiply" => {
                let op = |i: usize| match transposed.get(i) {
                    Some(true) => MatrixOp::Transpose,
                    _ => MatrixOp::None,
                };
                LayerKind::MatrixMultiply {
                    op_a: op(0),
                    op_b: op(1),
                }
            }
            "Softmax" => LayerKind::Softmax {
                axis: a.required(line, "axis", Cursor::integer)?,
            },
            "Concatenation" => LayerKind::Concatenation {
                axis: a.required(line, "axis", Cursor::integer)?,
            },
            "Gather" => LayerKind::Gather {
                axis: a.required(line, "axis", Cursor::integer)?,
            },
            "Shuffle" => LayerKind::Shuffle {
                first: a.optional(line, "transpose", Cursor::sizes)?,
                reshape: a.optional(line, "reshape", Cursor::shape)?,
                second: a.optional(line, "transpose", Cursor::sizes)?,
            },
            "Slice" => {
                let start: Vec<i64> = a.required(line, "start", |c| c.list(Cursor::integer))?;
                LayerKind::Slice {
                    size: a.required(line, "size", Cursor::shape)?,
                    stride: match a.optional(line, "stride", |c| c.list(Cursor::integer))? {
                        Some(stride) => stride,
                        None => vec![1; start.len()],
                    },
                    start,
                }
            }
            "Select" => LayerKind::Select,
            "Cast" => {
                line.expect(", ")?;
                LayerKind::Cast { to: line.dtype()? }
            }
            "Fill" => LayerKind::Fill {
                start: a.required(line, "start", float)?,
                step: a.required(line, "step", float)?,
                length: shape.first().cloned().unwrap_or_default(),
            },
            "Normalization" => LayerKind::Normalization {
                axes: a.required(line, "axes", Cursor::sizes)?,
                epsilon: a.required(line, "epsilon", |c| Ok(c.number(DType::F32)?.float as f32))?,
            },
            "RotaryEmbedding" => LayerKind::RotaryEmbedding {
                rotary_dim: a.required(line, "rotary_dim", Cursor::integer)?,
                interleaved: line.eat(", interleaved"),
            },
            "Attention" => LayerKind::Attention,
            "Dequantize" => {
                let axis = a.optional(line, "axis", Cursor::integer)?;
                let size = a.optional(line, "block", Cursor::integer)?;
                LayerKind::Dequantize(match (axis, size) {
                    (None, _) => Granularity::Tensor,
                    (Some(axis), None) => Granularity::Channel { axis },
                    (Some(axis), Some(size)) => Granularity::Block { axis, size },
                })
            }
            "KvCacheUpdate" => LayerKind::KvCacheUpdate,
            "RowProduct" => {
                a.next(line, "parts")?;
                LayerKind::RowProduct(RowProduct::parse(line, |line, name| a.passes(line, name))?)
            }
            "DecodeAttention" => {
                a.next(line, "heads")?;
                LayerKind::DecodeAttention(DecodeAttention::parse(line, |line, name| a.passes(line, name))?)
            }
            "Experts" => LayerKind::Experts {
                experts: a.required(line, "experts", Cursor::integer)?,
                gating: Gating {
                    activation: a.required(line, "activation", |c| {
                        let at = c.position();
                        let word = c.take(|c| c.is_ascii_alphanumeric() || c == '_');
                        ExpertActivation::named(word).ok_or_else(|| c.error_at(at, "an activation such as swish"))
                    })?,
                    alpha: a.required(line, "alpha", float)? as f32,
                    beta: a.required(line, "beta", float)? as f32,
                    limit: a.required(line, "limit", float)? as f32,
                },
            },
            word => {
                if let Some(part) = word.strip_prefix("TopK").and_then(Greatest::named) {
                    let k = a.required(line, "k", Cursor::integer)?;
                    line.expect(")")?;
                    return Ok(LayerKind::TopK { k, part });
                }
                let reduce = word.strip_prefix("Reduce").and_then(ReduceOp::named);
                match (
                    Elementwise::named(word),
                    UnaryOp::named(word),
                    Activation::named(word),
                    reduce,
                ) {
                    (Some(op), ..) => LayerKind::Elementwise(op),
                    (_, Some(op), ..) => LayerKind::Unary(op),
                    (_, _, Some(op), _) => LayerKind::Activation(op),
                    (.., Some(op)) => LayerKind::Reduce {
                        op,
                        axes: a.required(line, "axes", Cursor::sizes)?,
                        keep_dims: !line.eat(", keep_dims: false"),
                    },
                    _ => return Err(line.error_at(start, "a layer")),
                }
            }
        };
        line.expect(")")?;
        Ok(kind)
    }
}

/// Where in a list of arguments the reader is.
struct Arguments {
    first: bool,
}

impl Arguments {
    /// Passes over the comma before an input. A parameter is `name: value`, or the word `interleaved` or `keep_dims`.
    fn next_is_input(&mut self, line: &mut Cursor) -> Parsed<bool> {
        let mut ahead = line.clone();
        if !self.first {
            if !ahead.eat(", ") {
                return Ok(false);
            }
        } else if ahead.rest().starts_with(')') {
            return Ok(false);
        }
        if !ahead.rest().starts_with('"') {
            let word = ahead.take(|c| !matches!(c, ',' | ')' | ' '));
            if word.ends_with(':') || word == "interleaved" {
                return Ok(false);
            }
        }
        if !self.first {
            line.expect(", ")?;
        }
        self.first = false;
        Ok(true)
    }

    fn optional<'a, T>(
        &mut self,
        line: &mut Cursor<'a>,
        name: &str,
        value: impl FnOnce(&mut Cursor<'a>) -> Parsed<T>,
    ) -> Parsed<Option<T>> {
        match self.passes(line, name) {
            true => value(line).map(Some),
            false => Ok(None),
        }
    }

    /// Passes over the name of a parameter if it comes next.
    fn passes(&mut self, line: &mut Cursor, name: &str) -> bool {
        let separator = if self.first { "" } else { ", " };
        let there = line.eat(&format!("{separator}{name}: "));
        self.first &= !there;
        there
    }

    /// Passes over the name of a parameter that must come next.
    fn next(&mut self, line: &mut Cursor, name: &str) -> Parsed<()> {
        match self.passes(line, name) {
            true => Ok(()),
            false => Err(line.error(format!("the parameter \"{name}: \""))),
        }
    }

    fn required<'a, T>(
        &mut self,
        line: &mut Cursor<'a>,
        name: &str,
        value: impl FnOnce(&mut Cursor<'a>) -> Parsed<T>,
    ) -> Parsed<T> {
        match self.optional(line, name, value)? {
            Some(value) => Ok(value),
            None => Err(line.error(format!("the parameter \"{name}: \""))),
        }
    }
}

fn float(line: &mut Cursor) -> Parsed<f64> {
    Ok(line.number(DType::F64)?.float)
}

/// The elements of a constant; of a large one their number.
fn elements(tensor: &tensor::Tensor) -> String {
    if tensor.len() > MAX_SHOWN {
        return format!("{} elements", tensor.len());
    }
    let mut text = String::new();
    match tensor.dtype() {
        DType::Bool => push_list(&mut text, &tensor.to_i64().iter().map(|v| *v != 0).collect::<Vec<_>>()),
        DType::F64 => push_list(&mut text, &tensor.to_f64()),
        // The shortest decimal that reads back as the same f32, not its expansion in f64.
        dtype if dtype.is_float() => {
            push_list(
                &mut text,
                &tensor.to_f64().iter().map(|v| *v as f32).collect::<Vec<_>>(),
            );
        }
        _ => push_list(&mut text, &tensor.to_i64()),
    }
    text[1..text.len() - 1].to_string()
}

/// Constants of a network are tables of positions and masks; no real one has more elements.
const MAX_MADE_UP: usize = 1 << 28;

/// The tensor of a constant's text. Of a large one only the number of elements is there: they are made up.
fn constant(line: &mut Cursor, dtype: DType, shape: &Shape) -> Parsed<tensor::Tensor> {
    let sizes: Option<Vec<usize>> = shape.iter().map(|d| usize::try_from(d.as_const()?).ok()).collect();
    let sized = sizes.and_then(|sizes| Some((ir_text::volume(&sizes)?, sizes)));
    let Some((count, sizes)) = sized.filter(|(count, _)| *count <= MAX_MADE_UP) else {
        return Err(line.error("a constant whose sizes are numbers, and not too large"));
    };
    let start = line.position();
    if count > MAX_SHOWN {
        line.expect(&format!("{count} elements"))?;
        return Ok(ir_text::made_up(dtype, sizes, count as u64));
    }
    let mut numbers = Vec::with_capacity(count);
    while numbers.len() < count {
        if !numbers.is_empty() {
            line.expect(", ")?;
        }
        numbers.push(line.number(dtype)?);
    }
    match line.rest().starts_with(')') {
        true => Ok(ir_text::tensor_of(dtype, sizes, &numbers)),
        false => Err(line.error_at(start, format!("{count} elements"))),
    }
}
