//! The text form of layers: written by [`LayerKind::expression`], read by [`LayerKind::parse`].

use super::{Activation, Elementwise, Greatest, LayerKind, MatrixOp, ReduceOp, UnaryOp};
use crate::graph::op::{ExpertActivation, Gating};
use crate::ir_text::{self, Cursor, MAX_SHOWN, Parsed, push_list};
use crate::network::Shape;
use crate::network::kernel_layers::{DecodeAttention, RowProduct};
use crate::tensor::quantized::Granularity;
use crate::tensor::{self, DType};

impl LayerKind {
    /// `Layer(inputs, parameter: value)`, the text of the layer over inputs of these names. Facts that follow from the
    /// output's type (a fill's length) are omitted.
    pub(in crate::network) fn expression(&self, inputs: Vec<String>) -> String {
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
                // In the order of application.
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
    pub(in crate::network) fn parse(
        line: &mut Cursor,
        (dtype, shape): (DType, &Shape),
        mut input: impl FnMut(&mut Cursor) -> Parsed<()>,
    ) -> Parsed<LayerKind> {
        let start = line.position();
        let head = line.take(char::is_alphanumeric);
        line.expect("(")?;
        let mut arguments = Arguments { first: true };
        // For a product: whether each operand is transposed.
        let mut transposed = Vec::new();
        // Inputs come first; a constant and a cast start with a word that is not an input.
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

/// The position in a list of arguments.
struct Arguments {
    first: bool,
}

impl Arguments {
    /// Skips the comma before an input. A parameter is `name: value`, or the word `interleaved` or `keep_dims`.
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

    /// Skips the name of a parameter if it comes next.
    fn passes(&mut self, line: &mut Cursor, name: &str) -> bool {
        let separator = if self.first { "" } else { ", " };
        let there = line.eat(&format!("{separator}{name}: "));
        self.first &= !there;
        there
    }

    /// Skips the name of a parameter, which must come next.
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

/// The elements of a constant, or their number if it is large.
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

/// Constants of a network are tables of positions and masks; no real one is larger.
const MAX_MADE_UP: usize = 1 << 28;

/// The tensor of a constant's text. For a large one only the number of elements is given, and the elements are
/// synthetic.
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
