//! Types of every value of a graph: dtypes, shapes of symbolic dims, and the elements of small integer tensors.
//!
//! Input: a graph whose inputs and constants have types; [`infer`] fills in the rest and returns [`InferenceFacts`].
//! Exporters compute shapes in the graph (`Shape` → `Gather` → `Concat` → `Reshape`), give one length several names and
//! read equal lengths from different tensors. So elements of small tensors are tracked as dims, and every equation that
//! an operator implies (two operands of a broadcast, the other axes of a `Concat`, the inner dims of a `MatMul`) goes
//! to a [`Unifier`]. A later equation can decide an earlier question, so inference repeats until nothing new is
//! learned.
//!
//! Dtypes are propagated, not checked: the verifier finds mixed operands. Values after an unknown operator
//! without declared types stay untyped.
//!
//! Modules: `node` selects the rule of a node, `elements` has the arithmetic on elements of small tensors. The
//! rules are in `elementwise`, `movement` (reshape, concat, slice …), `indexing` (gather, scatter), `selection` (top-k, one-hot),
//! `experts`, `linear` (products, reductions, normalizations) and `attention`.

mod attention;
mod elements;
mod elementwise;
mod experts;
mod indexing;
mod linear;
mod movement;
mod node;
mod quantization;
mod selection;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, HashMap};
use std::fmt;

#[cfg(test)]
pub(in crate::graph) use self::node::NO_RULE;
use self::node::NodeInference;
use super::op::Op;
use super::{Definition, Graph, NodeId, Shape, ValueId};
use crate::dim::{Dim, DimConflict, Sym, Unifier};
use crate::tensor::DType;

/// Larger tensors are data, not shapes: their elements are not tracked.
const MAX_CONTENTS: usize = 128;
/// Rounds until nothing new is learned; real exports need two.
const MAX_ROUNDS: usize = 8;

/// A description of a node's operand, for messages.
#[derive(Clone, Debug, PartialEq)]
pub struct Operand {
    pub name: String,
    pub dtype: DType,
    pub shape: Shape,
}

impl fmt::Display for Operand {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?} {}{:?}", self.name, self.dtype, self.shape)
    }
}

/// A graph that cannot be typed. The names are those of the export's nodes and values.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[non_exhaustive]
#[allow(missing_docs, reason = "the message says what the fields are")]
pub enum InferError {
    #[error("node {node:?} ({op}): {left} and {right} do not fit, because the {conflict}")]
    Conflict {
        node: String,
        op: String,
        left: Operand,
        right: Operand,
        conflict: DimConflict,
    },
    #[error("node {node:?} ({op}): {reason}")]
    Node { node: String, op: String, reason: String },
    #[error("input {input:?} has the shape {shape:?}; its dimension {axis} cannot be {wanted}")]
    Bind {
        input: String,
        shape: Shape,
        axis: usize,
        wanted: Dim,
    },
}

/// The elements of a small tensor, in row-major order; the tensor's shape and dtype are in the graph.
#[derive(Clone, Debug, PartialEq)]
pub struct Contents {
    /// False and true are 0 and 1. The elements of a float tensor are known only if they are whole numbers.
    pub elements: Vec<Dim>,
    /// The tensor has rank 0.
    pub scalar: bool,
}

impl Contents {
    /// The elements, if all are numbers.
    pub fn as_consts(&self) -> Option<Vec<i64>> {
        self.elements.iter().map(Dim::as_const).collect()
    }

    /// The element of a tensor that has exactly one, whatever its rank.
    pub fn single(&self) -> Option<&Dim> {
        match self.elements.as_slice() {
            [element] => Some(element),
            _ => None,
        }
    }
}

/// What inference found in addition to the types, which are in the graph.
#[derive(Clone, Debug, Default)]
pub struct InferenceFacts {
    contents: HashMap<ValueId, Contents>,
    unifier: Unifier,
}

impl InferenceFacts {
    /// The elements of a value, if it is small and every one of them is known as a dim.
    pub fn contents(&self, value: ValueId) -> Option<&Contents> {
        self.contents.get(&value)
    }

    /// A dim with every equation applied.
    pub fn resolve(&self, dim: &Dim) -> Dim {
        self.unifier.resolve(dim)
    }

    /// The equations learned, solved for single symbols.
    pub fn solved(&self) -> &BTreeMap<Sym, Dim> {
        self.unifier.solved()
    }
}

/// Types every value. The graph must be sorted. Graph inputs are rewritten to the common names of their dims, too.
pub fn infer(graph: &mut Graph) -> Result<InferenceFacts, InferError> {
    let mut tables = Tables::new(graph);
    let nodes: Vec<NodeId> = graph.node_ids().collect();
    for _ in 0..MAX_ROUNDS {
        let known = tables.unifier.solved().len();
        for id in &nodes {
            tables.node(graph, *id)?;
        }
        if tables.unifier.solved().len() == known {
            break;
        }
    }
    Ok(tables.into_facts(graph))
}

/// Gives dims of graph inputs their roles before inference: `(input, axis, dim)`, for example
/// `(attention_mask, 1, past + tokens)`. Each declared symbol that a role solves is replaced in all inputs; a declared
/// number stays, and a symbol of the role becomes that number.
pub fn bind_input_dims(graph: &mut Graph, roles: &[(ValueId, usize, Dim)]) -> Result<(), InferError> {
    // The export's "past" may mean something else.
    let canonical = [Sym::batch(), Sym::tokens(), Sym::past(), Sym::capacity()];
    let set_aside: BTreeMap<Sym, Dim> = canonical
        .iter()
        .map(|s| (s.clone(), Dim::named(format!("export.{s}"))))
        .collect();
    let inputs = graph.inputs.clone();
    let declared: HashMap<ValueId, Shape> = inputs
        .iter()
        .filter_map(|v| Some((*v, graph.shape(*v)?.iter().map(|d| d.substitute(&set_aside)).collect())))
        .collect();
    let mut unifier = Unifier::new();
    unifier.keep(roles.iter().flat_map(|(_, _, dim)| dim.symbols()));
    for (value, axis, wanted) in roles {
        let refuse = || InferError::Bind {
            input: graph.value(*value).name.clone(),
            shape: graph.shape(*value).cloned().unwrap_or_default(),
            axis: *axis,
            wanted: wanted.clone(),
        };
        let dim = declared.get(value).and_then(|s| s.get(*axis)).ok_or_else(refuse)?;
        unifier.unify(dim, wanted).map_err(|_| refuse())?;
    }
    for (value, shape) in declared {
        graph.value_mut(value).shape = Some(shape.iter().map(|d| unifier.resolve(d)).collect());
    }
    Ok(())
}

/// Elements of a small tensor; `None` where one is not known.
type Elements = Vec<Option<Dim>>;

/// What is known about one value.
#[derive(Clone, Debug)]
struct Fact {
    dtype: DType,
    shape: Shape,
    elements: Option<Elements>,
}

impl Fact {
    fn new(dtype: DType, shape: Shape) -> Self {
        Fact {
            dtype,
            shape,
            elements: None,
        }
    }

    fn with(mut self, elements: Option<Elements>) -> Self {
        let worth = |e: &Elements| e.is_empty() || e.iter().any(Option::is_some);
        self.elements = elements.filter(|e| e.len() <= MAX_CONTENTS && worth(e));
        self
    }

    /// The elements if all are numbers, for example of an `axes` input.
    fn consts(&self) -> Option<Vec<i64>> {
        let elements = self.elements.as_ref()?;
        elements.iter().map(|e| e.as_ref()?.as_const()).collect()
    }

    /// The only element.
    fn single(&self) -> Option<&Dim> {
        match self.elements.as_deref() {
            Some([Some(element)]) => Some(element),
            _ => None,
        }
    }
}

struct Tables {
    facts: Vec<Option<Fact>>,
    unifier: Unifier,
}

impl Tables {
    fn new(graph: &Graph) -> Self {
        let mut unifier = Unifier::new();
        let facts = graph.value_ids().map(|id| {
            let value = graph.value(id);
            match &value.definition {
                Definition::Input => Some(Fact::new(value.dtype?, value.shape.clone()?)),
                Definition::Constant(constant) => {
                    let shape = constant.shape().iter().map(|d| Dim::from(*d)).collect();
                    Some(Fact::new(constant.dtype(), shape).with(elements::of_constant(constant)))
                }
                // Declared types are used only for unknown operators.
                Definition::Node { node, .. } if matches!(graph.node(*node).op, Op::Unknown { .. }) => {
                    Some(Fact::new(value.dtype?, value.shape.clone()?))
                }
                _ => None,
            }
        });
        let facts = facts.collect();
        let declared = |v: &ValueId| graph.shape(*v).into_iter().flatten().flat_map(Dim::symbols);
        unifier.keep(graph.inputs.iter().flat_map(declared));
        Tables { facts, unifier }
    }

    fn resolved(&self, id: ValueId) -> Option<Fact> {
        let fact = self.facts[id.0 as usize].as_ref()?;
        let elements = fact.elements.as_ref().map(|elements| {
            let resolve = |e: &Option<Dim>| e.as_ref().map(|d| self.unifier.resolve(d));
            elements.iter().map(resolve).collect()
        });
        Some(Fact {
            dtype: fact.dtype,
            shape: fact.shape.iter().map(|d| self.unifier.resolve(d)).collect(),
            elements,
        })
    }

    fn node(&mut self, graph: &Graph, id: NodeId) -> Result<(), InferError> {
        let node = graph.node(id);
        if matches!(node.op, Op::Unknown { .. }) {
            return Ok(());
        }
        let mut inputs = Vec::with_capacity(node.inputs.len());
        for input in &node.inputs {
            inputs.push(match input {
                None => None,
                Some(value) => match self.resolved(*value) {
                    Some(fact) => Some(fact),
                    // After an unknown operator.
                    None => return Ok(()),
                },
            });
        }
        let mut node_inference = NodeInference {
            graph,
            node,
            inputs,
            unifier: &mut self.unifier,
        };
        let outputs = node_inference.rule()?;
        for (value, fact) in node.outputs.iter().zip(outputs) {
            if let Some(value) = value {
                self.facts[value.0 as usize] = fact;
            }
        }
        Ok(())
    }

    fn into_facts(self, graph: &mut Graph) -> InferenceFacts {
        let mut contents = HashMap::new();
        for id in graph.value_ids() {
            let fact = self.resolved(id);
            let value = graph.value_mut(id);
            match (&value.definition, fact) {
                (Definition::Constant(_) | Definition::Dead, _) => {}
                (_, None) => (value.dtype, value.shape) = (value.dtype, None),
                (_, Some(fact)) => (value.dtype, value.shape) = (Some(fact.dtype), Some(fact.shape)),
            }
        }
        for (id, fact) in graph.value_ids().zip(&self.facts) {
            let Some(Fact {
                elements: Some(e),
                shape,
                ..
            }) = fact
            else {
                continue;
            };
            let elements: Option<Vec<Dim>> = e.iter().map(|e| e.as_ref().map(|d| self.unifier.resolve(d))).collect();
            if let Some(elements) = elements {
                let scalar = shape.is_empty();
                contents.insert(id, Contents { elements, scalar });
            }
        }
        InferenceFacts {
            contents,
            unifier: self.unifier,
        }
    }
}
