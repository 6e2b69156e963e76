//! The interface of a canonical graph, derived from names in ONNX.

use super::{Constant, EMBEDDING_TABLE, Graph, ValueId};
use crate::dim::{Dim, Sym};
use crate::interface::{CacheId, CacheShape, Interface, InterfaceError, InterfaceErrors, Role};
use crate::tensor::DType;

impl Graph {
    /// The interface that follows from the names, dtypes and shapes of the inputs and outputs: for graphs from a file
    /// or a text dump, and for graphs written by hand. Passes know the roles, and set [`Graph::interface`] themselves.
    ///
    /// Errors: a name without a role, a role that is missing, duplicated or out of order, a dtype or shape that does
    /// not match the role. Outputs may be untyped, as before inference.
    pub fn canonical_interface(&self) -> Result<Interface<ValueId>, InterfaceErrors> {
        let names = |ids: &[ValueId]| -> Vec<(&str, ValueId)> {
            ids.iter().map(|id| (self.value(*id).name.as_str(), *id)).collect()
        };
        let interface = Interface::from_names(names(&self.inputs), names(&self.outputs), |cache, id| {
            self.cache_shape(cache, id)
        })?;
        let errors = self.wrong_shapes(&interface);
        match errors.is_empty() {
            true => Ok(interface),
            false => Err(InterfaceErrors(errors)),
        }
    }

    /// Sets [`Graph::interface`] to [`Graph::canonical_interface`], and [`Graph::embedding`] by its name.
    pub fn set_canonical_interface(&mut self) -> Result<(), InterfaceErrors> {
        let interface = self.canonical_interface()?;
        self.embedding = match interface.takes_embeddings() {
            true => self.find(EMBEDDING_TABLE).filter(|id| self.constant(*id).is_some()),
            false => None,
        };
        self.interface = Some(interface);
        Ok(())
    }

    /// Elements of one embedding, if the graph takes embeddings.
    pub fn embedding_width(&self) -> Option<usize> {
        let id = self.interface.as_ref()?.input(Role::Embeddings)?;
        usize::try_from(self.shape(id)?.last()?.as_const()?).ok()
    }

    /// Adds the embedding table to a graph that takes embeddings: `[vocabulary, hidden]`, in the dtype of its input.
    pub fn set_embedding(&mut self, table: Constant) {
        let id = self.add_constant(EMBEDDING_TABLE, table);
        self.embedding = Some(id);
    }

    /// The shape of a cache input, `[batch, kv_heads, capacity, head_dim]` with numbers for heads and elements.
    pub(crate) fn cache_shape(&self, cache: CacheId, id: ValueId) -> Result<CacheShape, InterfaceError> {
        let value = self.value(id);
        let number = |dim: &Dim| dim.as_const().and_then(|n| usize::try_from(n).ok());
        let dims = match value.shape.as_deref() {
            Some([_, heads, _, width]) => number(heads).zip(number(width)),
            _ => None,
        };
        match (dims, value.dtype) {
            (Some((kv_heads, head_dim)), Some(dtype)) if dtype.is_float() => Ok(CacheShape {
                cache,
                kv_heads,
                head_dim,
                dtype,
            }),
            _ => Err(InterfaceError::Shape {
                role: Role::Cache(cache),
                expected: "float[batch, kv_heads, capacity, head_dim]".into(),
                found: self.describe(id),
            }),
        }
    }

    /// Ports whose dtype or shape differs from the table at the head of `graph`.
    fn wrong_shapes(&self, interface: &Interface<ValueId>) -> Vec<InterfaceError> {
        let ids = self.shape(interface.token_input()).cloned().unwrap_or_default();
        let row = match &ids[..] {
            [batch, tokens] | [batch, tokens, _] => [batch.clone(), tokens.clone()],
            _ => [Dim::sym(Sym::batch()), Dim::sym(Sym::tokens())],
        };
        let mut errors = Vec::new();
        for port in interface.inputs().iter().chain(interface.outputs()) {
            let value = self.value(port.id);
            let fits = match port.role {
                Role::TokenIds | Role::PositionIds => {
                    value.dtype == Some(DType::I64) && value.shape.as_deref() == Some(&row[..])
                }
                Role::Embeddings => {
                    let shape = value.shape.as_deref().unwrap_or_default();
                    let wide = matches!(shape, [_, _, width] if width.as_const().is_some_and(|width| width > 0));
                    value.dtype.is_some_and(DType::is_float) && wide
                }
                Role::WriteIndices | Role::TotalLengths => {
                    value.dtype == Some(DType::I64) && value.shape.as_deref() == Some(&row[..1])
                }
                Role::LogitRows => false,
                Role::Cache(_) => value.shape.as_deref().is_some_and(|shape| shape[0] == row[0]),
                Role::Logits => {
                    let shape = value.shape.as_deref();
                    value.dtype.is_none_or(DType::is_float)
                        && shape.is_none_or(|shape| shape.len() == 3 && shape[..2] == row)
                }
                Role::UpdatedCache(cache) => {
                    let input = interface.input(Role::Cache(cache)).map(|id| self.value(id));
                    input.is_some_and(|input| {
                        (value.dtype.is_none() || value.dtype == input.dtype)
                            && (value.shape.is_none() || value.shape == input.shape)
                    })
                }
            };
            if !fits {
                errors.push(InterfaceError::Shape {
                    role: port.role,
                    expected: expected(port.role, &row),
                    found: self.describe(port.id),
                });
            }
        }
        errors
    }

    fn describe(&self, id: ValueId) -> String {
        let value = self.value(id);
        let dtype = value.dtype.map_or("an unknown type", DType::name);
        match &value.shape {
            Some(shape) => format!("{dtype}{shape:?}"),
            None => format!("{dtype} of unknown shape"),
        }
    }
}

fn expected(role: Role, [batch, tokens]: &[Dim; 2]) -> String {
    match role {
        Role::TokenIds | Role::PositionIds => format!("i64[{batch}, {tokens}]"),
        Role::Embeddings => format!("float[{batch}, {tokens}, hidden]"),
        Role::WriteIndices | Role::TotalLengths => format!("i64[{batch}]"),
        Role::LogitRows => "no input of a graph: networks alone choose rows".into(),
        Role::Cache(_) => format!("float[{batch}, kv_heads, capacity, head_dim]"),
        Role::Logits => format!("float[{batch}, {tokens}, vocabulary]"),
        Role::UpdatedCache(_) => "the dtype and shape of the cache".into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::interface::{CachePart, Side};
    use crate::lower::synthetic::Decoder;

    fn refused(graph: &Graph) -> Vec<InterfaceError> {
        graph.canonical_interface().unwrap_err().0
    }

    const SECOND_VALUE: CacheId = CacheId {
        layer: 1,
        part: CachePart::Value,
    };

    #[test]
    fn a_missing_cache_output_is_named() {
        let mut graph = Decoder::tiny().graph();
        graph.outputs.pop();
        let role = Role::UpdatedCache(SECOND_VALUE);
        assert_eq!(refused(&graph), [InterfaceError::Missing { role }]);
    }

    #[test]
    fn an_extra_output_is_named() {
        let mut graph = Decoder::tiny().graph();
        let updated = graph.outputs[1];
        graph.outputs.push(updated);
        assert!(matches!(
            refused(&graph)[..],
            [
                InterfaceError::Duplicate {
                    role: Role::UpdatedCache(_)
                },
                InterfaceError::Order { side: Side::Output, .. }
            ]
        ));
        let mut graph = Decoder::tiny().graph();
        let hidden = graph.add_node("hidden_states", crate::graph::Op::Identity, &[graph.outputs[0]]);
        graph.outputs.push(hidden);
        let (side, name) = (Side::Output, "hidden_states".to_string());
        assert_eq!(refused(&graph), [InterfaceError::Unknown { side, name }]);
    }

    #[test]
    fn dtypes_and_shapes_go_with_the_roles() {
        let typed = |role: Role, dtype: DType, shape: &[&str]| {
            let mut graph = Decoder::tiny().graph();
            let id = graph.find(&role.name()).unwrap();
            let value = graph.value_mut(id);
            (value.dtype, value.shape) = (Some(dtype), Some(shape.iter().map(|d| Dim::parse(d)).collect()));
            refused(&graph)
        };
        for (role, dtype, shape) in [
            (Role::PositionIds, DType::I32, &["batch", "tokens"][..]),
            (Role::PositionIds, DType::I64, &["batch", "past"]),
            (Role::WriteIndices, DType::I64, &["1"]),
            (Role::Logits, DType::F32, &["batch", "vocabulary"]),
            (Role::Logits, DType::I64, &["batch", "tokens", "32"]),
            (
                Role::UpdatedCache(SECOND_VALUE),
                DType::F16,
                &["batch", "2", "capacity", "8"],
            ),
            (
                Role::UpdatedCache(SECOND_VALUE),
                DType::F32,
                &["batch", "2", "capacity", "4"],
            ),
            (Role::Cache(SECOND_VALUE), DType::I64, &["batch", "2", "capacity", "8"]),
            (Role::Cache(SECOND_VALUE), DType::F32, &["batch", "2", "8"]),
            (
                Role::Cache(SECOND_VALUE),
                DType::F32,
                &["batch", "heads", "capacity", "8"],
            ),
        ] {
            let errors = typed(role, dtype, shape);
            let named =
                |error: &InterfaceError| matches!(error, InterfaceError::Shape { role: found, .. } if *found == role);
            assert!(errors.iter().any(named), "{role} {dtype}{shape:?}: {errors:?}");
        }
    }

    /// An output that a pass replaces stays the output of its role.
    #[test]
    fn replacing_an_output_keeps_its_role() {
        let mut graph = Decoder::tiny().graph();
        let old = graph.outputs[0];
        let new = graph.add_node("other", crate::graph::Op::Identity, &[old]);
        graph.replace_uses(old, new);
        assert_eq!(graph.interface.as_ref().unwrap().logits(), new);
    }
}
