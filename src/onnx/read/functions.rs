//! Model-local functions: their table, and their bodies in place of calls.

use std::collections::HashMap;

use super::{Frame, Opsets, Origin, Reader, Scope, domain_of};
use crate::graph::{Op, ValueId};
use crate::onnx::error::ReadErrorKind;
use crate::onnx::proto::{AttributeProto, FunctionProto, ModelProto};

/// Functions may call functions; more levels than this mean recursion.
const MAX_CALL_DEPTH: usize = 64;

/// Domain, name and overload.
pub(super) type FunctionKey<'m> = (&'m str, &'m str, &'m str);

pub(super) struct Function<'m> {
    proto: &'m FunctionProto,
    opsets: Opsets,
}

pub(super) fn functions(model: &ModelProto) -> Result<HashMap<FunctionKey<'_>, Function<'_>>, ReadErrorKind> {
    let mut functions = HashMap::new();
    for proto in &model.functions {
        let name = proto.name.as_deref().unwrap_or_default();
        let key = (
            domain_of(proto.domain.as_deref()),
            name,
            proto.overload.as_deref().unwrap_or_default(),
        );
        let opsets = Opsets::new(&proto.opset_import, &format!(" in its function {name:?}"))?;
        if functions.insert(key, Function { proto, opsets }).is_some() {
            return Err(ReadErrorKind::Functions {
                reason: format!("{name:?} of the domain {:?} is defined twice", key.0),
            });
        }
    }
    Ok(functions)
}

impl<'m> Reader<'m> {
    /// Puts the body of a function where it is called.
    pub(super) fn inline(
        &mut self,
        key: FunctionKey<'m>,
        name: String,
        inputs: Vec<Option<ValueId>>,
        outputs: Vec<Option<ValueId>>,
        attributes: Vec<AttributeProto>,
        depth: usize,
    ) -> Result<(), ReadErrorKind> {
        let broken = |reason: String| ReadErrorKind::Functions {
            reason: format!("{:?}, called by node {name:?}, {reason}", key.1),
        };
        if depth >= MAX_CALL_DEPTH {
            return Err(broken("calls itself".to_string()));
        }
        let function = &self.functions[&key];
        let proto = function.proto;
        if inputs.len() > proto.input.len() || outputs.len() > proto.output.len() {
            return Err(broken(format!(
                "has {} inputs and {} outputs, and gets {} and {}",
                proto.input.len(),
                proto.output.len(),
                inputs.len(),
                outputs.len()
            )));
        }
        let mut scope = Scope::default();
        for (i, formal) in proto.input.iter().enumerate() {
            if scope.origin.insert(formal, Origin::Input).is_some() {
                return Err(broken(format!("has two inputs {formal:?}")));
            }
            scope.values.insert(formal, inputs.get(i).copied().flatten());
        }
        // An output that is an input, or is listed twice, cannot be given the caller's value; it is copied below.
        let mut results: HashMap<&str, ValueId> = HashMap::new();
        let mut copies = Vec::new();
        for (formal, actual) in proto.output.iter().zip(&outputs) {
            let Some(actual) = *actual else { continue };
            if scope.origin.contains_key(formal.as_str()) || results.contains_key(formal.as_str()) {
                copies.push((formal, actual));
            } else {
                results.insert(formal, actual);
            }
        }
        let given: HashMap<&str, AttributeProto> = {
            let named = |a: &'m AttributeProto| (a.name.as_deref().unwrap_or_default(), a.clone());
            let mut given: HashMap<&str, AttributeProto> = proto.attribute_proto.iter().map(named).collect();
            for attribute in attributes {
                let wanted = attribute.name.as_deref().unwrap_or_default();
                let known = |n: &&String| n.as_str() == wanted;
                let formal = proto.attribute.iter().find(known).map(String::as_str);
                let formal = formal.or_else(|| given.keys().find(|k| **k == wanted).copied());
                // An attribute the function does not declare has no effect on its body.
                if let Some(formal) = formal {
                    given.insert(formal, attribute);
                }
            }
            given
        };
        let frame = Frame {
            opsets: &function.opsets,
            prefix: format!("{name}/"),
            added: "",
            attributes: Some(given),
            depth: depth + 1,
        };
        self.nodes(&proto.node, &mut scope, &results, &frame)?;
        for formal in results.keys() {
            if !scope.values.contains_key(formal) {
                return Err(broken(format!("does not define its output {formal:?}")));
            }
        }
        for (formal, actual) in copies {
            let source = scope.values.get(formal.as_str()).copied().flatten();
            let source = source.ok_or_else(|| broken(format!("does not define its output {formal:?}")))?;
            let copy = format!("{name}/{formal}");
            self.graph
                .add_node_with_outputs(&copy, Op::Identity, vec![Some(source)], vec![Some(actual)]);
        }
        Ok(())
    }
}

/// Attributes of a node in a function's body, with the caller's values substituted; omitted where the caller omits
/// them.
pub(super) fn resolve_references(
    attributes: &[AttributeProto],
    caller: Option<&HashMap<&str, AttributeProto>>,
) -> Vec<AttributeProto> {
    let resolve = |attribute: &AttributeProto| match attribute.ref_attr_name.as_deref() {
        None | Some("") => Some(attribute.clone()),
        Some(reference) => caller.and_then(|c| c.get(reference)).map(|value| AttributeProto {
            name: attribute.name.clone(),
            ref_attr_name: None,
            ..value.clone()
        }),
    };
    attributes.iter().filter_map(resolve).collect()
}
