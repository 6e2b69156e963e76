//! One ONNX node of any opset from 11 to 25 becomes nodes of the graph, in their opset-24 form.
//!
//! Input: a node whose values are resolved. Output: nodes (or a constant) in the graph. Unknown operators become
//! [`Op::Unknown`], and so do known operators with an unsupported attribute, such as `Cast(to=string)`. So all
//! obstacles of a model are reported at once. Malformed nodes are errors. Arity and dtypes are checked by the verifier.

mod einsum;
mod experts;
mod microsoft;
mod older;
mod on_codes;
mod quantized;
mod standard;
mod tensorrt;

use super::attributes::{Attributes, Problem};
use super::error::ReadErrorKind;
use super::tensor::{Folder, code_name};
use crate::graph::op::{AttributeError, AttributeSource, Binary, LAPIDARY, MICROSOFT, Op};
use crate::graph::{Constant, Graph, ValueId};
use crate::tensor::{DType, Tensor};

/// A node with resolved values.
pub(super) struct SourceNode<'a> {
    pub graph: &'a mut Graph,
    pub folder: &'a Folder,
    pub name: String,
    pub domain: &'a str,
    pub op_type: &'a str,
    /// Opset of the node's domain, in the graph or function the node is in.
    pub opset: i64,
    pub inputs: Vec<Option<ValueId>>,
    pub outputs: Vec<Option<ValueId>>,
    pub attributes: Attributes,
}

/// What replaces a node.
enum Replacement {
    /// One operator with the node's inputs and outputs.
    Op(Op),
    /// One operator with other inputs.
    Rewired(Op, Vec<Option<ValueId>>),
    /// One operator with the node's inputs and outputs, with a list that was an attribute of that name as input 1.
    WithList(Op, &'static str, Vec<i64>),
    /// An operator over the last axis of the node's input, in which the axes from this one on are merged.
    Flattened(Op, i64),
    /// The first operator with the node's inputs, the second on its result.
    Pipe(Op, Op),
    /// A chain over all inputs; divided by their number for `Mean`.
    Chain(Binary, bool),
    /// Input 0 unchanged.
    Pass,
    Constant(Constant),
    /// A product with a quantized weight.
    Linear(quantized::QuantizedLinear),
    /// An operator whose operands are codes.
    OnCodes(Box<on_codes::OnCodes>),
    /// `Gather` of a constant.
    Lookup {
        table: Constant,
        indices: Option<ValueId>,
        axis: i64,
    },
    /// A sum of products.
    Einsum(Box<einsum::Sum>),
    /// A mixture of experts.
    Experts(Box<experts::ExpertNodes>),
    /// Unknown, with the reason in brackets.
    Unknown(Option<String>),
}

pub(super) enum Failure {
    /// The node is malformed.
    Problem(Problem),
    /// An attribute has an unknown value, `name=value`.
    Unsupported(String),
    /// A tensor in an attribute cannot be read.
    Tensor(ReadErrorKind),
}

impl From<&str> for Failure {
    fn from(problem: &str) -> Self {
        Failure::Problem(problem.to_string())
    }
}

impl From<Problem> for Failure {
    fn from(problem: Problem) -> Self {
        Failure::Problem(problem)
    }
}

impl From<AttributeError> for Failure {
    fn from(error: AttributeError) -> Self {
        match error {
            AttributeError::Malformed(problem) => Failure::Problem(problem),
            AttributeError::Unsupported(detail) => Failure::Unsupported(detail),
        }
    }
}

impl AttributeSource for SourceNode<'_> {
    type Error = Failure;

    fn int(&self, name: &str) -> Result<Option<i64>, Failure> {
        Ok(self.attributes.int(name)?)
    }
    fn float(&self, name: &str) -> Result<Option<f32>, Failure> {
        Ok(self.attributes.float(name)?)
    }
    fn ints(&self, name: &str) -> Result<Option<Vec<i64>>, Failure> {
        Ok(self.attributes.ints(name)?)
    }
    fn text(&self, name: &str) -> Result<Option<String>, Failure> {
        Ok(self.attributes.string(name)?)
    }
    /// 0 is ONNX's "undefined".
    fn dtype(&self, name: &str) -> Result<Option<DType>, Failure> {
        let Some(code) = self.attributes.int(name)?.filter(|code| *code != 0) else {
            return Ok(None);
        };
        let code = i32::try_from(code).unwrap_or(-1);
        match DType::of_onnx_code(code) {
            // Other operators must not produce a storage-only type: that is quantization, which a dtype does not
            // describe.
            Some(dtype) if !dtype.is_storage_only() || self.domain == LAPIDARY => Ok(Some(dtype)),
            _ => Err(Failure::Unsupported(format!("{name}={}", code_name(code)))),
        }
    }
    fn tensor(&self, name: &str) -> Result<Option<Tensor>, Failure> {
        let Some(proto) = self.attributes.tensor(name)? else {
            return Ok(None);
        };
        self.folder.tensor(proto, &self.name).map(Some).map_err(Failure::Tensor)
    }
    fn ignore(&self, names: &[&str]) {
        self.attributes.ignore(names);
    }
}

/// Adds the node to the graph.
pub(super) fn add_node(mut source: SourceNode) -> Result<(), ReadErrorKind> {
    let replacement = match source.replacement() {
        Ok(replacement) => replacement,
        Err(Failure::Unsupported(detail)) => Replacement::Unknown(Some(detail)),
        Err(Failure::Problem(reason)) => {
            return Err(ReadErrorKind::Node {
                node: source.name.clone(),
                op: source.op_type.to_string(),
                reason,
            });
        }
        Err(Failure::Tensor(error)) => return Err(error),
    };
    let replacement = match (replacement, source.attributes.left_over()) {
        (Replacement::Unknown(detail), _) => Replacement::Unknown(detail),
        (_, Some(attribute)) => Replacement::Unknown(Some(attribute)),
        (replacement, None) => replacement,
    };
    source.carry_out(replacement);
    Ok(())
}

impl SourceNode<'_> {
    fn carry_out(&mut self, replacement: Replacement) {
        let inputs = std::mem::take(&mut self.inputs);
        let outputs = std::mem::take(&mut self.outputs);
        match replacement {
            Replacement::Op(op) => self.emit(op, inputs, outputs),
            Replacement::Rewired(op, inputs) => self.emit(op, inputs, outputs),
            Replacement::WithList(op, name, list) => {
                let list = self.graph.add_i64(&format!("{}.{name}", self.name), &list);
                self.emit(op, vec![inputs.first().copied().flatten(), Some(list)], outputs);
            }
            Replacement::Flattened(op, axis) => {
                let mut value = |part: &str| Some(self.graph.add_value(&format!("{}.{part}", self.name)));
                let (flat, result, shape) = (value("flat"), value("result"), value("shape"));
                let start_to_end = Op::Shape { start: 0, end: None };
                self.emit(start_to_end, inputs.clone(), vec![shape]);
                self.emit(Op::Flatten { axis }, inputs, vec![flat]);
                self.emit(op, vec![flat], vec![result]);
                self.emit(Op::Reshape { allowzero: false }, vec![result, shape], outputs);
            }
            Replacement::Pipe(first, second) => {
                let middle = Some(self.graph.add_value(&format!("{}.0", self.name)));
                self.emit(first, inputs, vec![middle]);
                self.emit(second, vec![middle], outputs);
            }
            Replacement::Chain(op, mean) => {
                let count = inputs.len();
                let (mut sum, rest) = (inputs[0], &inputs[1..]);
                for (i, input) in rest.iter().enumerate() {
                    let last = i + 1 == rest.len() && !mean;
                    let result = if last {
                        outputs[0]
                    } else {
                        Some(self.graph.add_value(&format!("{}.{i}", self.name)))
                    };
                    self.emit(Op::Binary(op), vec![sum, *input], vec![result]);
                    sum = result;
                }
                if mean {
                    let count = Tensor::from_f32(vec![], &[count as f32]);
                    let count = self.graph.add_constant(&format!("{}.count", self.name), count);
                    let like = self.graph.add_value(&format!("{}.count.like", self.name));
                    self.emit(Op::CastLike, vec![Some(count), sum], vec![Some(like)]);
                    self.emit(Op::Binary(Binary::Div), vec![sum, Some(like)], outputs);
                }
            }
            Replacement::Pass => self.emit(Op::Identity, inputs[..1].to_vec(), outputs),
            Replacement::Constant(constant) => {
                if let Some(value) = outputs.first().copied().flatten() {
                    self.graph.set_constant(value, constant);
                }
            }
            Replacement::Linear(linear) => self.linear(linear, outputs),
            Replacement::OnCodes(operator) => self.emit_on_codes(*operator, outputs),
            Replacement::Lookup { table, indices, axis } => {
                let name = table.origin().unwrap_or(&self.name).to_string();
                let table = self.graph.add_constant(&format!("{name}.table"), table);
                self.emit(Op::Gather { axis }, vec![Some(table), indices], outputs);
            }
            Replacement::Einsum(sum) => self.emit_einsum(*sum, &inputs, outputs),
            Replacement::Experts(nodes) => self.experts(*nodes, outputs),
            Replacement::Unknown(detail) => {
                let op_type = match detail {
                    Some(detail) => format!("{}({detail})", self.op_type),
                    None => self.op_type.to_string(),
                };
                let domain = self.domain.to_string();
                self.emit(Op::Unknown { domain, op_type }, inputs, outputs);
            }
        }
    }

    /// The columns of x in the weight's order, their product with it, and the bias.
    fn linear(&mut self, linear: quantized::QuantizedLinear, outputs: Vec<Option<ValueId>>) {
        let quantized::QuantizedLinear {
            mut x,
            weight,
            order,
            bias,
        } = linear;
        if let Some(order) = order {
            let order = self.graph.add_constant(&format!("{}.order", self.name), order);
            let ordered = self.graph.add_value(&format!("{}.ordered", self.name));
            self.emit(Op::Gather { axis: -1 }, vec![x, Some(order)], vec![Some(ordered)]);
            x = Some(ordered);
        }
        let name = weight.origin().unwrap_or(&self.name).to_string();
        let weight = self.graph.add_constant(&format!("{name}.weight"), weight);
        let Some(bias) = bias else {
            return self.emit(Op::MatMul, vec![x, Some(weight)], outputs);
        };
        let product = self.graph.add_value(&format!("{}.product", self.name));
        self.emit(Op::MatMul, vec![x, Some(weight)], vec![Some(product)]);
        self.emit(Op::Binary(Binary::Add), vec![Some(product), Some(bias)], outputs);
    }

    /// Routing and experts over rows of tokens, reshaped to the shape of the input.
    fn experts(&mut self, nodes: experts::ExpertNodes, outputs: Vec<Option<ValueId>>) {
        let mut value = |part: &str| Some(self.graph.add_value(&format!("{}.{part}", self.name)));
        let [shape, rows, weights, chosen, result] = ["shape", "rows", "weights", "experts", "result"].map(&mut value);
        let to_rows = self
            .graph
            .add_i64(&format!("{}.flat", self.name), &[-1, nodes.hidden as i64]);
        self.emit(Op::Shape { start: 0, end: None }, vec![nodes.x], vec![shape]);
        self.emit(
            Op::Reshape { allowzero: false },
            vec![nodes.x, Some(to_rows)],
            vec![rows],
        );
        self.emit(Op::Routing(nodes.routing), vec![nodes.logits], vec![weights, chosen]);
        let mut inputs = vec![rows, weights, chosen];
        let [of_gate, of_up, of_down] = nodes.biases;
        let constants = [
            ("gate", Some(nodes.gate)),
            ("up", nodes.up),
            ("down", Some(nodes.down)),
            ("gate_bias", of_gate),
            ("up_bias", of_up),
            ("down_bias", of_down),
        ];
        for (what, constant) in constants {
            inputs.push(constant.map(|constant| {
                let name = constant.origin().unwrap_or(&self.name).to_string();
                self.graph.add_constant(&format!("{name}.{what}"), constant)
            }));
        }
        while inputs.last() == Some(&None) {
            inputs.pop();
        }
        self.emit(Op::Experts(nodes.experts), inputs, vec![result]);
        self.emit(Op::Reshape { allowzero: false }, vec![result, shape], outputs);
    }

    fn emit(&mut self, op: Op, inputs: Vec<Option<ValueId>>, outputs: Vec<Option<ValueId>>) {
        self.graph.add_node_with_outputs(&self.name, op, inputs, outputs);
    }

    fn replacement(&self) -> Result<Replacement, Failure> {
        match self.domain {
            "" => self.standard_operator(),
            MICROSOFT => self.contrib_operator(),
            LAPIDARY => self.own_operator(),
            tensorrt::TENSORRT => self.tensorrt_operator(),
            _ => Ok(Replacement::Unknown(None)),
        }
    }
}
