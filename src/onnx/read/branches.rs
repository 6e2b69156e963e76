//! `If`: one of its branches replaces it while the model is read.
//!
//! The branch is known in two cases. The condition is the same in every call (`condition`). Or it is computed from one
//! boolean input that switches between a decoder without past keys and values, for the prompt, and one with them, for
//! the following tokens (optimum's merged decoders, `use_cache_branch`). Then the branch that reads the past is taken:
//! with an empty past it also computes the prompt, as the passes prove for every export, and it must have every weight
//! that the other branch reads. The branch that reads the past is identified by the inputs of its outputs, not by
//! names. Whether both branches are the same model is tested by execution when a package is written (`convert`).
//!
//! Branches that are constants become a choice between them (`chosen_constants`). Any other `If` stays in the graph as an
//! unsupported operator, with the reason.

use std::collections::{BTreeSet, HashMap, HashSet};

use super::condition::{Condition, by_value, computed_from, condition};
use super::{Frame, Reader, Scope, node_name};
use crate::graph::{Constant, Definition, Graph, Op, Switch, ValueId};
use crate::onnx::error::ReadErrorKind;
use crate::onnx::proto::{GraphProto, NodeProto, TensorProto};
use crate::tensor::DType;

/// More levels of nested branches than any model has.
const MAX_DEPTH: usize = 64;

pub(super) fn is_if(node: &NodeProto) -> bool {
    node.op_type.as_deref() == Some("If") && super::domain_of(node.domain.as_deref()).is_empty()
}

/// Both branches of an `If`: for a true condition, and for a false one.
pub(super) struct Branches<'m> {
    then: &'m GraphProto,
    otherwise: &'m GraphProto,
}

impl<'m> Branches<'m> {
    pub(super) fn at(&self, condition: bool) -> &'m GraphProto {
        if condition { self.then } else { self.otherwise }
    }
}

impl<'m> Reader<'m> {
    /// Replaces an `If` by a branch, or keeps the `If` if no branch is known. Returns false if more nodes must be read
    /// first.
    pub(super) fn branch(
        &mut self,
        node: &'m NodeProto,
        scope: &mut Scope<'m>,
        frame: &Frame,
    ) -> Result<bool, ReadErrorKind> {
        let branches = self.checked_branches(node, scope, frame)?;
        let condition_name = node.input.first().map_or("", String::as_str);
        let Some(id) = scope.values.get(condition_name).copied().flatten() else {
            return Err(match condition_name {
                "" => broken(node, frame, "it has no condition".into()),
                _ => ReadErrorKind::Undefined {
                    value: condition_name.to_string(),
                    reader: format!("node {:?} (If)", frame.name(node)),
                },
            });
        };
        let taken = match condition(&self.graph, id) {
            Condition::Pending => return Ok(false),
            Condition::Known(value) => Ok(branches.at(value)),
            Condition::Input { id, at } => match self.switches.get(&id) {
                Some(value) => Ok(branches.at(at[usize::from(*value != self.prompt_branch)])),
                None => {
                    let found = self.with_past(&branches, at, scope);
                    if let Ok(value) = found {
                        self.switches.insert(id, value);
                    }
                    found.map(|value| branches.at(at[usize::from(value != self.prompt_branch)]))
                }
            },
            Condition::Open(reason) => Err(reason),
        };
        match taken {
            Ok(branch) => self.put(branch, node, scope, frame)?,
            Err(reason) => {
                let named = |n: &String| scope.values.get(n.as_str()).copied().flatten();
                let outputs: Vec<Option<ValueId>> = node.output.iter().map(named).collect();
                if !self.choose_constants(&branches, id, &outputs, &frame.name(node)) {
                    self.keep_if(node, &reason, scope, frame)?;
                }
            }
        }
        Ok(true)
    }

    /// An `If` without a known branch, as an unsupported operator.
    pub(super) fn keep_if(
        &mut self,
        node: &'m NodeProto,
        reason: &str,
        scope: &Scope<'m>,
        frame: &Frame,
    ) -> Result<(), ReadErrorKind> {
        let name = frame.name(node);
        let named = |n: &String| scope.values.get(n.as_str()).copied().flatten();
        let mut inputs: Vec<Option<ValueId>> = node.input.iter().map(named).collect();
        inputs.extend(self.captured(node, scope, &name)?);
        let outputs = node.output.iter().map(named).collect();
        let op = Op::Unknown {
            domain: String::new(),
            op_type: format!("If({reason})"),
        };
        self.graph.add_node_with_outputs(&name, op, inputs, outputs);
        Ok(())
    }

    /// Values around a node that its subgraphs read.
    pub(super) fn captured(
        &self,
        node: &'m NodeProto,
        scope: &Scope<'m>,
        name: &str,
    ) -> Result<Vec<Option<ValueId>>, ReadErrorKind> {
        let graphs = node.attribute.iter().filter_map(|a| a.g.as_deref());
        let names: BTreeSet<&str> = graphs.flat_map(read_from_around).collect();
        let of = |value: &&'m str| match scope.values.get(value) {
            Some(id) => Ok(*id),
            None => Err(ReadErrorKind::Undefined {
                value: value.to_string(),
                reader: format!(
                    "a subgraph of node {name:?} ({})",
                    node.op_type.as_deref().unwrap_or_default()
                ),
            }),
        };
        names.iter().map(of).collect()
    }

    /// The branches, after checking that they have as many outputs as the node, no inputs, and their own names.
    fn checked_branches(
        &self,
        node: &'m NodeProto,
        scope: &Scope<'m>,
        frame: &Frame,
    ) -> Result<Branches<'m>, ReadErrorKind> {
        let branch = |name: &str| -> Result<&'m GraphProto, ReadErrorKind> {
            let refuse = |reason: String| broken(node, frame, format!("its {name} {reason}"));
            let attribute = node.attribute.iter().find(|a| a.name.as_deref() == Some(name));
            let Some(graph) = attribute.and_then(|a| a.g.as_deref()) else {
                return Err(refuse("is missing".into()));
            };
            if !graph.input.is_empty() {
                return Err(refuse("has inputs, which a branch cannot have".into()));
            }
            if graph.output.len() != node.output.len() {
                let (found, expected) = (graph.output.len(), node.output.len());
                return Err(refuse(format!("has {found} outputs, but the node has {expected}")));
            }
            // Nothing inside reads the node's outputs, so a branch may use the same names for its results, as optimum
            // does.
            let own = |name: &str| {
                let result = graph.node.iter().any(|n| n.output.iter().any(|o| o == name));
                result && node.output.iter().any(|o| o == name) && graph.output.iter().any(|o| o.name() == name)
            };
            let again = |name: &&str| scope.values.contains_key(name) && !own(name);
            if let Some(name) = defined_in(graph).find(again) {
                return Err(refuse(format!(
                    "defines {name:?} again, which is defined around the node"
                )));
            }
            Ok(graph)
        };
        let branches = Branches {
            then: branch("then_branch")?,
            otherwise: branch("else_branch")?,
        };
        // Check both, though only one of them is read.
        self.captured(node, scope, &frame.name(node))?;
        Ok(branches)
    }

    /// Reads a branch in place of its node.
    fn put(
        &mut self,
        branch: &'m GraphProto,
        node: &'m NodeProto,
        scope: &mut Scope<'m>,
        frame: &Frame,
    ) -> Result<(), ReadErrorKind> {
        if frame.depth >= MAX_DEPTH {
            return Err(broken(node, frame, format!("it is nested more than {MAX_DEPTH} deep")));
        }
        // The node's output values receive the results. A result that no node of the branch computes is copied.
        let of_nodes: HashSet<&str> = branch.node.iter().flat_map(|n| &n.output).map(String::as_str).collect();
        let mut results: HashMap<&str, ValueId> = HashMap::new();
        let mut copies = Vec::new();
        for (given, wanted) in branch.output.iter().zip(&node.output) {
            let given = given.name.as_deref().unwrap_or_default();
            let Some(wanted) = scope.values.get(wanted.as_str()).copied().flatten() else {
                continue;
            };
            match of_nodes.contains(given) && !results.contains_key(given) {
                true => {
                    results.insert(given, wanted);
                }
                false => copies.push((given, wanted)),
            }
        }
        // Apart from the node's outputs, the branch redefines no name, so its names can be added to the enclosing scope
        // while it is read.
        let outputs: Vec<_> = node.output.iter().map(|name| scope.take(name)).collect();
        self.initializers(branch, scope)?;
        let frame = Frame {
            opsets: frame.opsets,
            prefix: frame.prefix.clone(),
            added: common_prefix(branch).unwrap_or(frame.added),
            attributes: frame.attributes.clone(),
            depth: frame.depth + 1,
        };
        self.nodes(&branch.node, scope, &results, &frame)?;
        for (given, wanted) in copies {
            let source = scope.values.get(given).copied().flatten();
            let source = source.ok_or_else(|| ReadErrorKind::Undefined {
                value: given.to_string(),
                reader: format!("the list of outputs of a branch of node {:?}", frame.name(node)),
            })?;
            let name = frame.name(node);
            self.graph
                .add_node_with_outputs(&name, Op::Identity, vec![Some(source)], vec![Some(wanted)]);
        }
        self.declared_types(branch, scope);
        for name in defined_in(branch) {
            scope.take(name);
        }
        for (name, (value, origin)) in node.output.iter().zip(outputs) {
            scope.values.extend(value.map(|value| (name.as_str(), value)));
            scope.origin.extend(origin.map(|origin| (name.as_str(), origin)));
        }
        Ok(())
    }

    /// The value of the switching input at which the branch reads past keys and values; `at` is the condition for false
    /// and for true.
    fn with_past(&self, branches: &Branches<'m>, at: [bool; 2], scope: &Scope<'m>) -> Result<bool, String> {
        let pasts = [false, true].map(|value| self.pasts(branches.at(at[usize::from(value)]), scope));
        let value = match (pasts[0].is_subset(&pasts[1]), pasts[1].is_subset(&pasts[0])) {
            _ if pasts.iter().all(HashSet::is_empty) => {
                return Err("an input chooses the branch, but no branch reads past keys and values".into());
            }
            // If both do, true selects the past.
            (true, _) => true,
            (false, true) => false,
            (false, false) => {
                return Err("an input chooses the branch, but the branches read different past states".into());
            }
        };
        let [kept, dropped] = [value, !value].map(|value| branches.at(at[usize::from(value)]));
        match self.unshared_weight(kept, dropped, scope) {
            Some(name) => Err(format!(
                "an input chooses the branch, but the one without past keys and values has weights that the other does not have \
                 ({name})"
            )),
            None => Ok(value),
        }
    }

    /// Inputs that can be a state and from which the outputs of a branch are computed.
    fn pasts(&self, branch: &'m GraphProto, scope: &Scope<'m>) -> HashSet<ValueId> {
        let outputs = branch.output.iter().filter_map(|o| o.name.as_deref());
        let around = needed_from_around(branch, outputs.collect());
        let around: Vec<ValueId> = around
            .iter()
            .filter_map(|n| scope.values.get(n).copied().flatten())
            .collect();
        let (read, _) = computed_from(&self.graph, &around, by_value);
        let state = |id: &ValueId| {
            let value = self.graph.value(*id);
            let counts = matches!(value.dtype, Some(DType::I64 | DType::I32 | DType::Bool) | None);
            let deep = value.shape.as_ref().is_some_and(|s| s.len() > 2);
            matches!(value.definition, Definition::Input) && !counts && deep
        };
        read.into_iter().filter(state).collect()
    }

    /// A weight of the dropped branch that the kept one does not have: the two are different models.
    fn unshared_weight(&self, kept: &'m GraphProto, dropped: &'m GraphProto, scope: &Scope<'m>) -> Option<String> {
        let (mut known, other) = (self.weights(kept, scope), self.weights(dropped, scope));
        let mut prints: Option<HashSet<_>> = None;
        for (id, (name, constant)) in other {
            if id.is_some_and(|id| known.iter().any(|(known, _)| *known == Some(id))) {
                continue;
            }
            // Exporters may fold a transposition in only one branch, so the order of elements cannot be compared.
            let prints = prints.get_or_insert_with(|| known.drain(..).map(|(_, (_, c))| fingerprint(&c)).collect());
            if !prints.contains(&fingerprint(&constant)) {
                return Some(name);
            }
        }
        None
    }

    /// Matrices that a branch reads: constants of the enclosing graph, and its own.
    fn weights(&self, branch: &'m GraphProto, scope: &Scope<'m>) -> Vec<(Option<ValueId>, (String, Constant))> {
        let around = read_from_around(branch);
        let around: Vec<ValueId> = around
            .iter()
            .filter_map(|n| scope.values.get(n).copied().flatten())
            .collect();
        let (read, _) = computed_from(&self.graph, &around, |_| true);
        let constant = |id: ValueId| Some((Some(id), (name_of(&self.graph, id), self.graph.constant(id)?.clone())));
        let outer = read.into_iter().filter_map(constant);
        let own = tensors(branch).into_iter().filter_map(|(name, proto)| {
            let constant = self.folder.constant(proto, name).ok()?;
            Some((None, (name.to_string(), constant)))
        });
        let is_matrix = |constant: &Constant| {
            let wide = constant.shape().iter().filter(|n| **n > 1).count() > 1;
            wide && !constant.is_empty() && !matches!(constant.dtype(), DType::I64 | DType::I32 | DType::Bool)
        };
        outer.chain(own).filter(|(_, (_, c))| is_matrix(c)).collect()
    }

    /// Removes inputs that only chose a branch.
    pub(super) fn drop_switches(&mut self) {
        let uses = self.graph.uses();
        let mut switches: Vec<(ValueId, bool)> = self.switches.iter().map(|(id, value)| (*id, *value)).collect();
        switches.sort_unstable();
        // The nodes that compute the condition still read it.
        let outputs = self.graph.outputs.clone();
        let (needed, _) = computed_from(&self.graph, &outputs, |_| true);
        for (id, value) in switches {
            if needed.contains(&id) {
                continue;
            }
            let readers = uses.get(&id).into_iter().flatten();
            let mut stack: Vec<_> = readers.map(|(node, _)| *node).collect();
            while let Some(node) = stack.pop() {
                if !self.graph.contains(node) {
                    continue;
                }
                for output in self.graph.node(node).outputs.clone().into_iter().flatten() {
                    stack.extend(uses.get(&output).into_iter().flatten().map(|(node, _)| *node));
                }
                self.graph.remove_node(node);
            }
            let rank = self.graph.shape(id).map_or(0, Vec::len);
            let name = self.graph.value(id).name.clone();
            self.graph.inputs.retain(|input| *input != id);
            self.graph.value_mut(id).definition = Definition::Dead;
            self.graph.producer.switch = Some(Switch { name, value, rank });
        }
    }
}

fn broken(node: &NodeProto, frame: &Frame, reason: String) -> ReadErrorKind {
    ReadErrorKind::Node {
        node: frame.name(node),
        op: "If".to_string(),
        reason,
    }
}

fn name_of(graph: &Graph, id: ValueId) -> String {
    let origin = graph.constant(id).and_then(Constant::origin);
    origin.unwrap_or(&graph.value(id).name).to_string()
}

/// The prefix that a merge put before the path of every node of a branch: `with_past/` of
/// `with_past//model/layers.0/mlp/Mul`.
fn common_prefix(branch: &GraphProto) -> Option<&str> {
    let mut names = branch.node.iter().map(node_name);
    let path = names.clone().find(|name| name.contains("//"))?;
    let prefix = &path[..=path.find("//")?];
    names.all(|name| name.starts_with(prefix)).then_some(prefix)
}

/// Names that a subgraph defines itself.
fn defined_in(graph: &GraphProto) -> impl Iterator<Item = &str> {
    let inputs = graph.input.iter().filter_map(|i| i.name.as_deref());
    let initializers = graph.initializer.iter().filter_map(|t| t.name.as_deref());
    let results = graph.node.iter().flat_map(|n| &n.output).map(String::as_str);
    inputs
        .chain(initializers)
        .chain(results)
        .filter(|name| !name.is_empty())
}

/// Names that a node reads: its inputs, and what its subgraphs read from enclosing scopes.
fn read_by(node: &NodeProto) -> Vec<&str> {
    let inputs = node.input.iter().map(String::as_str).filter(|name| !name.is_empty());
    let graphs = node.attribute.iter().filter_map(|a| a.g.as_deref());
    inputs.chain(graphs.flat_map(read_from_around)).collect()
}

/// Names that a subgraph reads and does not define, each once, in order.
fn read_from_around(graph: &GraphProto) -> Vec<&str> {
    let defined: HashSet<&str> = defined_in(graph).collect();
    let outputs = graph.output.iter().filter_map(|o| o.name.as_deref());
    let mut seen = HashSet::new();
    let all = graph.node.iter().flat_map(read_by).chain(outputs);
    all.filter(|name| !name.is_empty() && !defined.contains(name) && seen.insert(*name))
        .collect()
}

/// The outer values that these names of a subgraph are computed from, except those of which only the shape is used.
fn needed_from_around<'m>(graph: &'m GraphProto, names: Vec<&'m str>) -> Vec<&'m str> {
    let mut producers: HashMap<&str, &NodeProto> = HashMap::new();
    for node in &graph.node {
        producers.extend(node.output.iter().map(|name| (name.as_str(), node)));
    }
    let own: HashSet<&str> = defined_in(graph).collect();
    let mut seen: HashSet<&str> = HashSet::new();
    let mut around = Vec::new();
    let mut stack = names;
    while let Some(name) = stack.pop() {
        if !seen.insert(name) {
            continue;
        }
        match producers.get(name) {
            Some(node) if matches!(node.op_type.as_deref(), Some("Shape" | "Size")) => {}
            Some(node) => stack.extend(read_by(node)),
            None if !own.contains(name) => around.push(name),
            None => {}
        }
    }
    around
}

/// The tensors of a subgraph and of those in it, with a name for each.
fn tensors(graph: &GraphProto) -> Vec<(&str, &TensorProto)> {
    let mut found: Vec<(&str, &TensorProto)> = graph
        .initializer
        .iter()
        .map(|t| (t.name.as_deref().unwrap_or_default(), t))
        .collect();
    for node in &graph.node {
        for attribute in &node.attribute {
            found.extend(attribute.t.as_ref().map(|t| (node_name(node), t)));
            found.extend(attribute.g.as_deref().into_iter().flat_map(tensors));
        }
    }
    found
}

/// Equal for matrices with the same elements in any order: dtype, sorted dims, and the sum of the elements' hashes. The
/// sum is `None` if the elements are absent.
fn fingerprint(constant: &Constant) -> (DType, Vec<usize>, Option<u64>) {
    let dtype = constant.dtype();
    let mut dims: Vec<usize> = constant.shape().to_vec();
    dims.sort_unstable();
    let width = (dtype.bits() / 8).max(1);
    let mixed = |bytes: &[u8]| {
        let word = bytes.iter().rev().fold(0u64, |word, byte| word << 8 | u64::from(*byte));
        // The finalizer of SplitMix64.
        let word = word.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let word = (word ^ (word >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let word = (word ^ (word >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        word ^ (word >> 31)
    };
    let sum = constant.materialize().ok().map(|tensor| {
        let elements = tensor.data().chunks(width);
        elements.fold(0u64, |sum, element| sum.wrapping_add(mixed(element)))
    });
    (dtype, dims, sum)
}
