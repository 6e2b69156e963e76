//! The graph level: a decoder's ONNX graph, typed, with symbolic dims.
//!
//! A [`Graph`] is an arena of [`Value`]s and [`Node`]s. A value is a graph input, a constant or the output of one node;
//! it has a name (unique in the graph), and, after inference, a dtype and a shape of [`Dim`]s. Nodes are in static
//! single assignment form: each value has one definition, no node comes before what it reads once
//! [`Graph::sort`] has run. Nodes hold an [`Op`], normalized to opset 24.
//!
//! The front end (`onnx`) builds graphs, `passes` rewrite them, `lower` reads the canonical one. Its modules: `op` the
//! operators, `constant` and `transform` tensors with deferred work, `infer` dtypes and shapes, `eval` operator
//! semantics on concrete tensors, `verify` the rules, `dump` the text form and `parse` the way back.
//!
//! # The canonical graph
//!
//! The output of the passes and the input of the lowering; valid ONNX at opset 24. [`Graph::interface`] gives the role
//! of each value; the names are those of [`Role`](crate::interface::Role). With `i` counting layers:
//!
//! | inputs | dtype | shape |
//! |---|---|---|
//! | `input_ids` | i64 | `[batch, tokens]` |
//! | `inputs_embeds`, instead of `input_ids` | float | `[batch, tokens, hidden]` |
//! | `position_ids` | i64 | `[batch, tokens]`: the slot and the position of each token |
//! | `write_indices` | i64 | `[batch]`: the slot of the first token, `position_ids[:, 0]` |
//! | `total_lengths` | i64 | `[batch]`: the position after the last token of the run, of which this call may be a part. Only where the model depends on it |
//! | `key_cache.i`, `value_cache.i` | f32, f16 or bf16 | `[batch, kv_heads, capacity, head_dim]` |
//!
//! | outputs | dtype | shape |
//! |---|---|---|
//! | `logits` | float | `[batch, tokens, vocabulary]` |
//! | `updated_key_cache.i`, `updated_value_cache.i` | as the cache | as the cache |
//!
//! Slot `s` of a sequence holds the token at position `s`; a query at position `p` attends to slots `0..=p`, or to the
//! last `window` of them. Its mask is computed in the graph from `position_ids` alone, once per distinct window: a bool
//! `[batch, 1, tokens, capacity]` from `Range`, comparisons and `And`, true where attended to. Slots beyond `p` may
//! hold any finite values.
//!
//! Every cache is written by `TensorScatter(axis = 2)` and read by `Attention` with four-dimensional q, k, v, a mask
//! and `is_causal = 0`; grouped heads are native (heads a multiple of kv_heads). Rotary positions are `RotaryEmbedding`
//! with tables `[max_position, rotary_dim/2]` and `position_ids`. Linear weights are constants `[out, in]` read through
//! `Transpose(perm = [1, 0])` by `MatMul`; a bias is an `Add` after it. `batch` is the constant 1 if the export fixed
//! it.

mod attention;
mod constant;
mod dump;
pub mod eval;
pub(crate) mod infer;
mod interface;
pub mod op;
mod parse;
pub mod quantize;
pub mod quantized;
mod transform;
mod verify;

use std::collections::{HashMap, HashSet};

pub use crate::ir_text::{ParseError, made_up};
pub use attention::AttentionScores;
pub use constant::{Constant, ConstantError, ConstantSource, Transform};
pub use dump::{dump, identity_text};
pub use infer::{Contents, InferError, InferenceFacts, infer};
pub use op::Op;
pub(crate) use op::{Attribute, LAPIDARY, MICROSOFT};
pub use parse::{parse, parse_with};
pub use quantized::Quantized;
pub use verify::{Obstacle, Obstacles, verify};

use crate::dim::Dim;
use crate::help::Help;
use crate::interface::Interface;
use crate::tensor::{DType, Tensor};

/// The name of [`Graph::embedding`].
pub const EMBEDDING_TABLE: &str = "token_embeddings";

/// A shape of symbolic dims.
pub type Shape = Vec<Dim>;

/// A value of one graph.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub struct ValueId(u32);

/// A node of one graph.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub struct NodeId(u32);

/// What defines a value.
#[derive(Clone, Debug)]
pub enum Definition {
    /// An input of the graph.
    Input,
    /// A constant.
    Constant(Constant),
    /// Output number `output` of `node`.
    Node {
        /// The node that computes it.
        node: NodeId,
        /// Which of the node's outputs it is.
        output: usize,
    },
    /// Nothing: the value was replaced or its node removed.
    Dead,
}

/// One tensor of a graph.
#[derive(Clone, Debug)]
pub struct Value {
    /// Unique in the graph.
    pub name: String,
    /// `None`: not inferred yet.
    pub dtype: Option<DType>,
    /// `None`: not inferred yet.
    pub shape: Option<Shape>,
    /// Its definition.
    pub definition: Definition,
}

/// One operator with its operands.
#[derive(Clone, Debug)]
pub struct Node {
    /// As in the export, or derived from the node it replaced; not necessarily unique.
    pub name: String,
    /// What it computes.
    pub op: Op,
    /// `None` for an omitted optional input.
    pub inputs: Vec<Option<ValueId>>,
    /// `None` for an omitted optional output.
    pub outputs: Vec<Option<ValueId>>,
}

impl Node {
    /// Input `i` if present.
    pub fn input(&self, i: usize) -> Option<ValueId> {
        self.inputs.get(i).copied().flatten()
    }
    /// Output `i` if present.
    pub fn output(&self, i: usize) -> Option<ValueId> {
        self.outputs.get(i).copied().flatten()
    }
}

/// The exporter.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Producer {
    /// The exporter's name; empty if unknown.
    pub name: String,
    /// The exporter's version.
    pub version: String,
    /// IR version of the file format.
    pub ir_version: i64,
    /// Domain (`""` for ai.onnx) and version, sorted.
    pub opsets: Vec<(String, i64)>,
    /// The input that switched between the branches of a merged decoder; it is not an input of the graph.
    pub switch: Option<Switch>,
}

/// An input that a merged decoder chooses its branch by. The graph is the branch that reads past keys and values.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Switch {
    /// Its name in the export.
    pub name: String,
    /// Its value for the branch of the graph.
    pub value: bool,
    /// 0 or 1; every dim is 1.
    pub rank: usize,
}

/// See the module's head.
#[derive(Clone, Debug, Default)]
pub struct Graph {
    /// As the export names it; may be empty.
    pub name: String,
    /// What wrote the export.
    pub producer: Producer,
    /// In the export's order.
    pub inputs: Vec<ValueId>,
    /// In the export's order.
    pub outputs: Vec<ValueId>,
    /// The roles of inputs and outputs in a canonical graph; `None` in an export.
    pub interface: Option<Interface<ValueId>>,
    /// In a canonical graph that takes embeddings: the embedding table, `[vocabulary, hidden]`, named
    /// [`EMBEDDING_TABLE`]. No node reads it; a session does.
    pub embedding: Option<ValueId>,
    values: Vec<Value>,
    nodes: Vec<Option<Node>>,
    order: Vec<NodeId>,
    names: HashMap<String, ValueId>,
}

/// A node depends on its own output; the names are those of nodes on one cycle.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the graph has a cycle through {}", .nodes.join(" -> "))]
pub struct CycleError {
    /// Names of the nodes on one cycle.
    pub nodes: Vec<String>,
}

impl Help for CycleError {
    fn help(&self) -> Option<String> {
        Some("no exporter writes such a graph; export it again".to_string())
    }
}

impl Graph {
    /// An empty graph.
    pub fn new(name: impl Into<String>) -> Self {
        Graph {
            name: name.into(),
            ..Graph::default()
        }
    }

    // Values

    /// The value of an id of this graph.
    pub fn value(&self, id: ValueId) -> &Value {
        &self.values[id.0 as usize]
    }
    /// The value, mutable; use [`Graph::rename`] to change its name.
    pub fn value_mut(&mut self, id: ValueId) -> &mut Value {
        &mut self.values[id.0 as usize]
    }
    /// Every value ever added, in order, including those without a definition.
    pub fn value_ids(&self) -> impl Iterator<Item = ValueId> + use<> {
        (0..self.values.len() as u32).map(ValueId)
    }
    /// The value of this name.
    pub fn find(&self, name: &str) -> Option<ValueId> {
        self.names.get(name).copied()
    }
    /// The shape of a value, if it is known.
    pub fn shape(&self, id: ValueId) -> Option<&Shape> {
        self.value(id).shape.as_ref()
    }
    /// The constant that a value is, if it is one.
    pub fn constant(&self, id: ValueId) -> Option<&Constant> {
        match &self.value(id).definition {
            Definition::Constant(constant) => Some(constant),
            _ => None,
        }
    }

    /// `base` if the name is free, else `base` with the first free number.
    pub fn fresh_name(&self, base: &str) -> String {
        if !base.is_empty() && !self.names.contains_key(base) {
            return base.to_string();
        }
        (1..)
            .map(|n| format!("{base}.{n}"))
            .find(|name| !self.names.contains_key(name))
            .expect("some number is free")
    }

    fn push_value(&mut self, value: Value) -> ValueId {
        let id = ValueId(self.values.len() as u32);
        self.names.insert(value.name.clone(), id);
        self.values.push(value);
        id
    }

    /// A value without a definition or type; `name` is made unique.
    pub fn add_value(&mut self, name: &str) -> ValueId {
        let name = self.fresh_name(name);
        self.push_value(Value {
            name,
            dtype: None,
            shape: None,
            definition: Definition::Dead,
        })
    }

    /// A new input of this type; the name is made unique.
    pub fn add_input(&mut self, name: &str, dtype: DType, shape: Shape) -> ValueId {
        let id = self.add_value(name);
        let value = self.value_mut(id);
        (value.dtype, value.shape, value.definition) = (Some(dtype), Some(shape), Definition::Input);
        self.inputs.push(id);
        id
    }

    /// A new constant with its type; the name is made unique.
    pub fn add_constant(&mut self, name: &str, constant: impl Into<Constant>) -> ValueId {
        let id = self.add_value(name);
        self.set_constant(id, constant.into());
        id
    }

    /// Turns an existing value into a constant, for example when a node is folded. The node that defined it loses that
    /// output.
    pub fn set_constant(&mut self, id: ValueId, constant: Constant) {
        self.detach(id);
        let value = self.value_mut(id);
        value.dtype = Some(constant.dtype());
        value.shape = Some(constant.shape().iter().map(|d| Dim::from(*d)).collect());
        value.definition = Definition::Constant(constant);
    }

    /// A new constant vector of i64.
    pub fn add_i64(&mut self, name: &str, values: &[i64]) -> ValueId {
        self.add_constant(name, Tensor::from_i64(vec![values.len()], values))
    }

    /// Gives a value another name, which must be free.
    pub fn rename(&mut self, id: ValueId, name: &str) {
        assert!(!self.names.contains_key(name), "the name {name:?} is taken");
        let old = std::mem::replace(&mut self.value_mut(id).name, name.to_string());
        self.names.remove(&old);
        self.names.insert(name.to_string(), id);
    }

    // Nodes

    /// The node of an id. Panics if it was removed.
    pub fn node(&self, id: NodeId) -> &Node {
        self.nodes[id.0 as usize].as_ref().expect("the node was removed")
    }
    /// The node, mutable. Panics if it was removed.
    pub fn node_mut(&mut self, id: NodeId) -> &mut Node {
        self.nodes[id.0 as usize].as_mut().expect("the node was removed")
    }
    /// Nodes in order of execution, as of the last [`Graph::sort`]; nodes added since come last.
    pub fn node_ids(&self) -> impl DoubleEndedIterator<Item = NodeId> + '_ {
        self.order
            .iter()
            .copied()
            .filter(|id| self.nodes[id.0 as usize].is_some())
    }
    /// Whether the node still exists.
    pub fn contains(&self, id: NodeId) -> bool {
        self.nodes[id.0 as usize].is_some()
    }
    /// The node that computes a value, and which of its outputs the value is.
    pub fn producer_of(&self, id: ValueId) -> Option<(NodeId, usize)> {
        match self.value(id).definition {
            Definition::Node { node, output } => Some((node, output)),
            _ => None,
        }
    }
    /// The operator that computes a value, with its node.
    pub fn def(&self, id: ValueId) -> Option<(NodeId, &Node)> {
        self.producer_of(id).map(|(node, _)| (node, self.node(node)))
    }

    /// Adds a node that computes existing values; for the reader.
    pub fn add_node_with_outputs(
        &mut self,
        name: &str,
        op: Op,
        inputs: Vec<Option<ValueId>>,
        outputs: Vec<Option<ValueId>>,
    ) -> NodeId {
        let id = NodeId(self.nodes.len() as u32);
        for (output, value) in outputs.iter().enumerate() {
            if let Some(value) = value {
                self.detach(*value);
                self.value_mut(*value).definition = Definition::Node { node: id, output };
            }
        }
        self.nodes.push(Some(Node {
            name: name.to_string(),
            op,
            inputs,
            outputs,
        }));
        self.order.push(id);
        id
    }

    /// Adds a node with one output and returns that output, named after the node; its type is left to inference.
    pub fn add_node(&mut self, name: &str, op: Op, inputs: &[ValueId]) -> ValueId {
        let output = self.add_value(name);
        let inputs = inputs.iter().map(|v| Some(*v)).collect();
        self.add_node_with_outputs(name, op, inputs, vec![Some(output)]);
        output
    }

    /// Removes a node; its outputs lose their definition.
    pub fn remove_node(&mut self, id: NodeId) {
        let node = self.nodes[id.0 as usize].take().expect("the node was removed already");
        for output in node.outputs.into_iter().flatten() {
            self.value_mut(output).definition = Definition::Dead;
        }
    }

    /// Detaches a value from the node that defines it, if any.
    fn detach(&mut self, id: ValueId) {
        if let Definition::Node { node, output } = self.value(id).definition {
            if let Some(node) = self.nodes[node.0 as usize].as_mut() {
                node.outputs[output] = None;
            }
            self.value_mut(id).definition = Definition::Dead;
        }
    }

    /// Every reader of `old`, graph outputs included, reads `new` instead. An output keeps its position, not its name.
    pub fn replace_uses(&mut self, old: ValueId, new: ValueId) {
        for node in self.nodes.iter_mut().flatten() {
            for input in node.inputs.iter_mut().filter(|i| **i == Some(old)) {
                *input = Some(new);
            }
        }
        for output in self.outputs.iter_mut().filter(|o| **o == old) {
            *output = new;
        }
        if let Some(interface) = &mut self.interface {
            interface.replace_output(old, new);
        }
    }

    /// The readers of each value: (node, input number). Graph outputs are not included.
    pub fn uses(&self) -> HashMap<ValueId, Vec<(NodeId, usize)>> {
        let mut uses: HashMap<ValueId, Vec<(NodeId, usize)>> = HashMap::new();
        for id in self.node_ids() {
            for (i, input) in self.node(id).inputs.iter().enumerate() {
                if let Some(value) = input {
                    uses.entry(*value).or_default().push((id, i));
                }
            }
        }
        uses
    }

    /// Removes every node that no output depends on. Unread inputs stay: they are the export's interface.
    pub fn remove_dead_nodes(&mut self) {
        let mut live = HashSet::new();
        let mut stack: Vec<ValueId> = self.outputs.clone();
        while let Some(value) = stack.pop() {
            if let Some((node, _)) = self.producer_of(value)
                && live.insert(node)
            {
                stack.extend(self.node(node).inputs.iter().flatten());
            }
        }
        let dead: Vec<NodeId> = self.node_ids().filter(|id| !live.contains(id)).collect();
        for id in dead {
            self.remove_node(id);
        }
    }

    /// Sorts the nodes so that each comes after its inputs, as close to the current order as possible.
    pub fn sort(&mut self) -> Result<(), CycleError> {
        #[derive(Clone, Copy, PartialEq)]
        enum Mark {
            Unseen,
            Open,
            Done,
        }
        let mut marks = vec![Mark::Unseen; self.nodes.len()];
        let mut sorted = Vec::with_capacity(self.nodes.len());
        let present: Vec<NodeId> = self.node_ids().collect();
        for root in present {
            // Depth first without recursion: graphs of deep models have thousands of nodes.
            let mut stack = vec![(root, 0usize)];
            while let Some((id, next)) = stack.pop() {
                if next == 0 {
                    if marks[id.0 as usize] != Mark::Unseen {
                        continue;
                    }
                    marks[id.0 as usize] = Mark::Open;
                }
                let node = self.node(id);
                match node.inputs.get(next) {
                    None => {
                        marks[id.0 as usize] = Mark::Done;
                        sorted.push(id);
                    }
                    Some(input) => {
                        stack.push((id, next + 1));
                        if let Some((from, _)) = input.and_then(|v| self.producer_of(v)) {
                            match marks[from.0 as usize] {
                                Mark::Unseen => stack.push((from, 0)),
                                Mark::Done => {}
                                Mark::Open => {
                                    let start = stack.iter().position(|(n, _)| *n == from).unwrap_or(0);
                                    let on_cycle = stack[start..].iter().map(|(n, _)| *n);
                                    let name = |n: NodeId| self.node(n).name.clone();
                                    return Err(CycleError {
                                        nodes: on_cycle.map(name).collect(),
                                    });
                                }
                            }
                        }
                    }
                }
            }
        }
        self.order = sorted;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::op::{Binary, Unary};
    use super::*;

    #[test]
    fn sorts_removes_the_dead_and_finds_cycles() {
        let mut graph = Graph::new("g");
        let x = graph.add_input("x", DType::F32, vec![Dim::named("n")]);
        let late = graph.add_value("late");
        let sum = graph.add_node("sum", Op::Binary(Binary::Add), &[x, late]);
        graph.add_node_with_outputs("neg", Op::Unary(Unary::Neg), vec![Some(x)], vec![Some(late)]);
        graph.add_node("unread", Op::Unary(Unary::Exp), &[x]);
        graph.outputs.push(sum);
        graph.sort().unwrap();
        graph.remove_dead_nodes();
        let names: Vec<&str> = graph.node_ids().map(|n| graph.node(n).name.as_str()).collect();
        assert_eq!(names, ["neg", "sum"]);

        let (neg, _) = graph.producer_of(late).unwrap();
        graph.node_mut(neg).inputs[0] = Some(sum);
        let cycle = graph.sort().unwrap_err();
        assert!(cycle.to_string().contains("neg") && cycle.to_string().contains("sum"));
    }

    #[test]
    fn replacing_a_value_reaches_outputs_too() {
        let mut graph = Graph::new("g");
        let x = graph.add_input("x", DType::F32, vec![]);
        let y = graph.add_node("y", Op::Identity, &[x]);
        let z = graph.add_node("z", Op::Unary(Unary::Exp), &[y]);
        graph.outputs = vec![y, z];
        graph.replace_uses(y, x);
        assert_eq!(graph.outputs, [x, z]);
        assert_eq!(graph.def(z).unwrap().1.inputs, [Some(x)]);
        assert_eq!(graph.fresh_name("y"), "y.1");
    }
}
