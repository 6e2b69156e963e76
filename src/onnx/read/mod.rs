//! From a file to a graph: definitions and uses of values, node by node.
//!
//! `decode` decodes a file, or reports what it is if it is not an ONNX model. `functions` inlines model-local
//! functions, `branches` replaces every `If` with a known condition (`condition`) by one branch. `normalize` reads
//! single nodes, `tensor` tensors.

mod branches;
mod chosen_constants;
mod condition;
mod decode;
mod functions;

use std::collections::HashMap;
use std::path::Path;

use self::functions::{Function, FunctionKey, functions};
use super::OPSETS;
use super::attributes::Attributes;
use super::error::{ReadError, ReadErrorKind};
use super::normalize::{self, SourceNode};
use super::proto::{AttributeProto, GraphProto, ModelProto, NodeProto, OperatorSetIdProto, TypeProto, ValueInfoProto};
use super::tensor::{self, Folder};
use crate::dim::Dim;
use crate::graph::{Definition, Graph, LAPIDARY, Op, Producer, Shape, ValueId};
use crate::tensor::DType;

/// Functions that call functions twice grow exponentially; no real model has nearly this many nodes.
const MAX_NODES: usize = 4_000_000;

/// Reads a model. Weights stay in the mapped files, so this takes no memory for them.
///
/// The graph is sorted, its values have unique names, initializers that are inputs as well (IR version 3) are constants
/// only. Only inputs and constants have types; run `graph::infer` for the rest.
pub fn read(path: impl AsRef<Path>) -> Result<Graph, ReadError> {
    let path = path.as_ref();
    read_file(path, false, false).map_err(|kind| kind.at(path))
}

/// Reads a model without its weights, as in a stripped package: constants whose external file is missing have only a
/// dtype and a shape.
pub fn read_stripped(path: impl AsRef<Path>) -> Result<Graph, ReadError> {
    let path = path.as_ref();
    read_file(path, true, false).map_err(|kind| kind.at(path))
}

/// Reads a merged decoder with the branch that [`read`] leaves out, the one for a prompt without past keys and values.
/// For any other model the same as [`read`].
pub fn read_prompt_branch(path: impl AsRef<Path>) -> Result<Graph, ReadError> {
    let path = path.as_ref();
    read_file(path, false, true).map_err(|kind| kind.at(path))
}

fn read_file(path: &Path, stripped: bool, prompt_branch: bool) -> Result<Graph, ReadErrorKind> {
    if path.is_dir() {
        return Err(ReadErrorKind::Folder);
    }
    let bytes = tensor::map(path).map_err(ReadErrorKind::Open)?;
    let model = decode::decode(bytes)?;
    let mut reader = Reader {
        graph: Graph::default(),
        folder: Folder::of(path, stripped),
        functions: &functions(&model)?,
        made: 0,
        switches: HashMap::new(),
        prompt_branch,
    };
    reader.model(&model)?;
    Ok(reader.graph)
}

/// Domain and version; `ai.onnx` is another name of the standard domain.
fn domain_of(domain: Option<&str>) -> &str {
    match domain {
        None | Some("ai.onnx") => "",
        Some(domain) => domain,
    }
}

struct Opsets(HashMap<String, i64>);

impl Opsets {
    /// Checks the standard domain's version; `place` completes the message.
    fn new(imports: &[OperatorSetIdProto], place: &str) -> Result<Self, ReadErrorKind> {
        let version = |o: &OperatorSetIdProto| (domain_of(o.domain.as_deref()).to_string(), o.version.unwrap_or(0));
        let map: HashMap<String, i64> = imports.iter().map(version).collect();
        match map.get("") {
            Some(version) if !OPSETS.contains(version) => Err(ReadErrorKind::Opset {
                version: *version,
                place: place.to_string(),
            }),
            _ => Ok(Opsets(map)),
        }
    }

    fn of(&self, domain: &str) -> Option<i64> {
        self.0.get(domain).copied()
    }
}

/// Names that nodes can read, and their values: `None` for an omitted optional input of a function.
#[derive(Default)]
struct Scope<'m> {
    values: HashMap<&'m str, Option<ValueId>>,
    /// What defined each name, for messages: a node by its number.
    origin: HashMap<&'m str, Origin>,
}

impl<'m> Scope<'m> {
    /// Removes a name and returns its value.
    fn take(&mut self, name: &str) -> (Option<Option<ValueId>>, Option<Origin>) {
        (self.values.remove(name), self.origin.remove(name))
    }

    /// Records the definition of a name, which must not be defined yet. `nodes` are those of the scope.
    fn claim(&mut self, name: &'m str, origin: Origin, nodes: &[NodeProto]) -> Result<(), ReadErrorKind> {
        let describe = |origin: Origin| match origin {
            Origin::Input => "an input".to_string(),
            Origin::Initializer => "an initializer".to_string(),
            Origin::Node(i) => format!("node {:?}", node_name(&nodes[i])),
        };
        match self.origin.insert(name, origin) {
            None => Ok(()),
            Some(first) => {
                let (first, second) = (describe(first), describe(origin));
                let second = if first == second { "another".to_string() } else { second };
                let value = name.to_string();
                Err(ReadErrorKind::Duplicate { value, first, second })
            }
        }
    }
}

#[derive(Clone, Copy)]
enum Origin {
    Input,
    Initializer,
    Node(usize),
}

/// The scope in which a list of nodes is read.
struct Frame<'f> {
    opsets: &'f Opsets,
    /// Prefix of values and nodes: empty in the graph, `caller/` in a function.
    prefix: String,
    /// The prefix that a merge put before names of nodes and values; it is removed.
    added: &'f str,
    /// The caller's attributes; `None` in the graph.
    attributes: Option<HashMap<&'f str, AttributeProto>>,
    depth: usize,
}

impl Frame<'_> {
    /// The name of a node.
    fn name(&self, node: &NodeProto) -> String {
        self.value(node_name(node))
    }

    /// The name of a value.
    fn value(&self, name: &str) -> String {
        format!("{}{}", self.prefix, name.strip_prefix(self.added).unwrap_or(name))
    }
}

struct Reader<'m> {
    graph: Graph,
    folder: Folder,
    functions: &'m HashMap<FunctionKey<'m>, Function<'m>>,
    /// Nodes read so far, those of inlined functions included.
    made: usize,
    /// Inputs that choose the branch of an `If`, with the value at which past keys and values are read.
    switches: HashMap<ValueId, bool>,
    /// The other branch is taken.
    prompt_branch: bool,
}

impl<'m> Reader<'m> {
    fn model(&mut self, model: &'m ModelProto) -> Result<(), ReadErrorKind> {
        let opsets = Opsets::new(&model.opset_import, "")?;
        if opsets.of("").is_none() {
            return Err(ReadErrorKind::NoOpset);
        }
        let graph = model.graph.as_ref().expect("decode checks this");
        let mut imports: Vec<(String, i64)> = opsets.0.iter().map(|(d, v)| (d.clone(), *v)).collect();
        imports.sort();
        self.graph = Graph::new(graph.name.clone().unwrap_or_default());
        self.graph.producer = Producer {
            name: model.producer_name.clone().unwrap_or_default(),
            version: model.producer_version.clone().unwrap_or_default(),
            ir_version: model.ir_version.unwrap_or(0),
            opsets: imports,
            switch: None,
        };

        let mut scope = Scope::default();
        self.initializers(graph, &mut scope)?;
        self.inputs(graph, &mut scope)?;
        let frame = Frame {
            opsets: &opsets,
            prefix: String::new(),
            added: "",
            attributes: None,
            depth: 0,
        };
        self.nodes(&graph.node, &mut scope, &HashMap::new(), &frame)?;
        for output in &graph.output {
            let name = output.name.as_deref().unwrap_or_default();
            let value = scope.values.get(name).copied().flatten();
            let value = value.ok_or_else(|| ReadErrorKind::Undefined {
                value: name.to_string(),
                reader: "the list of outputs".to_string(),
            })?;
            self.graph.outputs.push(value);
        }
        self.declared_types(graph, &scope);
        self.drop_unread_outputs();
        self.drop_switches();
        self.graph.sort()?;
        Ok(())
    }

    fn initializers(&mut self, graph: &'m GraphProto, scope: &mut Scope<'m>) -> Result<(), ReadErrorKind> {
        if !graph.sparse_initializer.is_empty() {
            return Err(ReadErrorKind::Sparse);
        }
        for proto in &graph.initializer {
            let name = proto.name.as_deref().unwrap_or_default();
            let constant = self.folder.constant(proto, name)?.with_origin(name);
            let value = self.define(graph, scope, name, Origin::Initializer)?;
            self.graph.set_constant(value, constant);
        }
        Ok(())
    }

    fn inputs(&mut self, graph: &'m GraphProto, scope: &mut Scope<'m>) -> Result<(), ReadErrorKind> {
        for info in &graph.input {
            let name = info.name.as_deref().unwrap_or_default();
            if matches!(scope.origin.get(name), Some(Origin::Initializer)) {
                continue;
            }
            let value = self.define(graph, scope, name, Origin::Input)?;
            let (dtype, shape) = tensor_type(info, name)?;
            let input = self.graph.value_mut(value);
            (input.dtype, input.shape, input.definition) = (Some(dtype), shape, Definition::Input);
            self.graph.inputs.push(value);
        }
        Ok(())
    }

    /// A new value of that name, which must not be defined yet.
    fn define(
        &mut self,
        graph: &GraphProto,
        scope: &mut Scope<'m>,
        name: &'m str,
        origin: Origin,
    ) -> Result<ValueId, ReadErrorKind> {
        if name.is_empty() {
            return Err(match origin {
                Origin::Initializer => ReadErrorKind::Tensor {
                    tensor: String::new(),
                    reason: "an initializer has no name".to_string(),
                },
                _ => ReadErrorKind::Input {
                    name: String::new(),
                    reason: "has no name".to_string(),
                },
            });
        }
        scope.claim(name, origin, &graph.node)?;
        let value = self.graph.add_value(name);
        scope.values.insert(name, Some(value));
        Ok(value)
    }

    /// Reads nodes in any order: first their outputs, then their inputs. `results` are values that names of this scope
    /// must define, as the outputs of a function.
    fn nodes(
        &mut self,
        nodes: &'m [NodeProto],
        scope: &mut Scope<'m>,
        results: &HashMap<&'m str, ValueId>,
        frame: &Frame,
    ) -> Result<(), ReadErrorKind> {
        self.made += nodes.len();
        if self.made > MAX_NODES {
            return Err(ReadErrorKind::Functions {
                reason: format!("they grow to more than {MAX_NODES} nodes"),
            });
        }
        for (i, node) in nodes.iter().enumerate() {
            for name in node.output.iter().filter(|n| !n.is_empty()) {
                scope.claim(name, Origin::Node(i), nodes)?;
                let value = match results.get(name.as_str()) {
                    Some(value) => *value,
                    None => self.graph.add_value(&frame.value(name)),
                };
                scope.values.insert(name, Some(value));
            }
        }
        // A condition may be computed by nodes that come later in the list.
        let mut waiting = Vec::new();
        for node in nodes {
            match branches::is_if(node) {
                true if !self.branch(node, scope, frame)? => waiting.push(node),
                true => {}
                false => self.node(node, scope, frame)?,
            }
        }
        loop {
            let before = waiting.len();
            let mut still = Vec::new();
            for node in waiting {
                if !self.branch(node, scope, frame)? {
                    still.push(node);
                }
            }
            waiting = still;
            if waiting.is_empty() || waiting.len() == before {
                break;
            }
        }
        for node in waiting {
            self.keep_if(
                node,
                "its condition is computed from another If that is not resolved",
                scope,
                frame,
            )?;
        }
        Ok(())
    }

    fn node(&mut self, node: &'m NodeProto, scope: &Scope<'m>, frame: &Frame) -> Result<(), ReadErrorKind> {
        let name = frame.name(node);
        let op_type = node.op_type.as_deref().unwrap_or_default();
        let mut inputs = Vec::with_capacity(node.input.len());
        for input in &node.input {
            inputs.push(match (input.as_str(), scope.values.get(input.as_str())) {
                ("", _) => None,
                (_, Some(value)) => *value,
                (_, None) => {
                    return Err(ReadErrorKind::Undefined {
                        value: input.clone(),
                        reader: format!("node {name:?} ({op_type})"),
                    });
                }
            });
        }
        if node.attribute.iter().any(|a| a.g.is_some()) {
            inputs.extend(self.captured(node, scope, &name)?);
        }
        let named = |n: &String| {
            if n.is_empty() {
                None
            } else {
                scope.values.get(n.as_str()).copied()
            }
        };
        let output = |n: &String| named(n).flatten();
        let mut outputs: Vec<Option<ValueId>> = node.output.iter().map(output).collect();
        // Omitted trailing outputs count as absent.
        for list in [&mut inputs, &mut outputs] {
            while list.last() == Some(&None) {
                list.pop();
            }
        }
        let attributes = functions::resolve_references(&node.attribute, frame.attributes.as_ref());
        let domain = domain_of(node.domain.as_deref());
        let overload = node.overload.as_deref().unwrap_or_default();
        // The functions of Lapidary's own operators are for other readers.
        if domain != LAPIDARY && self.functions.contains_key(&(domain, op_type, overload)) {
            return self.inline(
                (domain, op_type, overload),
                name,
                inputs,
                outputs,
                attributes,
                frame.depth,
            );
        }
        let Some(opset) = frame.opsets.of(domain).or((!domain.is_empty()).then_some(1)) else {
            return Err(ReadErrorKind::NoOpset);
        };
        normalize::add_node(SourceNode {
            graph: &mut self.graph,
            folder: &self.folder,
            name,
            domain,
            op_type,
            opset,
            inputs,
            outputs,
            attributes: Attributes::new(attributes),
        })
    }

    /// Types that the export declares for the outputs of unknown operators, so that inference can continue after them.
    fn declared_types(&mut self, graph: &'m GraphProto, scope: &Scope<'m>) {
        let unknown = |graph: &Graph, value: ValueId| {
            let op = graph.def(value).map(|(_, node)| &node.op);
            matches!(op, Some(Op::Unknown { .. }))
        };
        for info in graph.value_info.iter().chain(&graph.output) {
            let name = info.name.as_deref().unwrap_or_default();
            let Some(value) = scope.values.get(name).copied().flatten() else {
                continue;
            };
            if unknown(&self.graph, value)
                && let Ok((dtype, shape)) = tensor_type(info, name)
            {
                let value = self.graph.value_mut(value);
                (value.dtype, value.shape) = (Some(dtype), shape);
            }
        }
    }

    /// Optional outputs that nothing reads (the mask of a dropout, the mean of a normalization) are omitted. They are
    /// kept if the number of outputs has a meaning, as for `Split`.
    fn drop_unread_outputs(&mut self) {
        let mut read: std::collections::HashSet<ValueId> = self.graph.outputs.iter().copied().collect();
        let nodes: Vec<_> = self.graph.node_ids().collect();
        for id in &nodes {
            read.extend(self.graph.node(*id).inputs.iter().flatten());
        }
        for id in nodes {
            let node = self.graph.node_mut(id);
            if node.outputs.len() < 2 || node.op.info().outputs == usize::MAX {
                continue;
            }
            let mut dropped = Vec::new();
            for output in &mut node.outputs[1..] {
                if output.is_some_and(|v| !read.contains(&v)) {
                    dropped.extend(output.take());
                }
            }
            while node.outputs.last() == Some(&None) {
                node.outputs.pop();
            }
            for value in dropped {
                self.graph.value_mut(value).definition = Definition::Dead;
            }
        }
    }
}

/// The node's name, or that of its first output.
fn node_name(node: &NodeProto) -> &str {
    match node.name.as_deref() {
        Some(name) if !name.is_empty() => name,
        _ => node.output.iter().find(|o| !o.is_empty()).map_or("", String::as_str),
    }
}

/// The declared type of a graph's input. A dim without a name gets one.
fn tensor_type(info: &ValueInfoProto, name: &str) -> Result<(DType, Option<Shape>), ReadErrorKind> {
    let wrong = |reason: &str| ReadErrorKind::Input {
        name: name.to_string(),
        reason: reason.to_string(),
    };
    let Some(TypeProto {
        tensor_type: Some(tensor),
    }) = &info.r#type
    else {
        return Err(wrong("is not declared as a tensor"));
    };
    let code = tensor.elem_type.unwrap_or(0);
    let dtype = DType::of_onnx_code(code).ok_or_else(|| ReadErrorKind::DType {
        tensor: name.to_string(),
        dtype: tensor::code_name(code),
    })?;
    let dim = |(i, dim): (usize, &super::proto::DimensionProto)| match (dim.dim_value, dim.dim_param.as_deref()) {
        (Some(value), _) if value >= 0 => Dim::constant(value),
        (None, Some(text)) if !text.trim().is_empty() => match Dim::parse(text).as_const() {
            None => Dim::parse(text),
            // A label is a symbol even if it looks like a number; `7` as a dim would be read back as the number.
            Some(_) if text.trim().bytes().all(|byte| byte.is_ascii_digit()) => {
                Dim::named(format!("dim_{}", text.trim()))
            }
            Some(_) => Dim::named(format!("{name}.{i}")),
        },
        _ => Dim::named(format!("{name}.{i}")),
    };
    let shape = tensor.shape.as_ref();
    Ok((dtype, shape.map(|s| s.dim.iter().enumerate().map(dim).collect())))
}
