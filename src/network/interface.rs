//! The interface of a network: derived from its names if a format stores only names, and checked against its tensors.

use super::verify::VerifyError;
use super::{Logits, Network, Tensor, TensorId, Tokens};
use crate::dim::{Dim, Sym};
use crate::interface::{CacheId, CacheShape, Interface, InterfaceError, InterfaceErrors, Port, Role};
use crate::tensor::DType;

impl Network {
    /// The interface that follows from the names of the inputs and outputs: for networks from a text dump or written by
    /// hand. The lowering knows the roles, and sets [`Network::interface`] itself.
    pub fn canonical_interface(&self) -> Result<Interface<TensorId>, InterfaceErrors> {
        let names = |ids: &[TensorId]| -> Vec<(&str, TensorId)> {
            ids.iter().map(|id| (self.tensor(*id).name.as_str(), *id)).collect()
        };
        Interface::from_names(names(&self.inputs), names(&self.outputs), |cache, id| {
            self.cache_shape(cache, id)
        })
    }

    /// The shape of a cache input, `[batch, kv_heads, capacity, head_dim]` with numbers for heads and elements.
    pub(crate) fn cache_shape(&self, cache: CacheId, id: TensorId) -> Result<CacheShape, InterfaceError> {
        let tensor = self.tensor(id);
        let number = |dim: &Dim| dim.as_const().and_then(|n| usize::try_from(n).ok());
        let dims = match &tensor.shape[..] {
            [_, heads, _, width] => number(heads).zip(number(width)),
            _ => None,
        };
        match dims {
            Some((kv_heads, head_dim)) if tensor.dtype.is_float() => Ok(CacheShape {
                cache,
                kv_heads,
                head_dim,
                dtype: tensor.dtype,
            }),
            _ => Err(InterfaceError::Shape {
                role: Role::Cache(cache),
                expected: "float[batch, kv_heads, capacity, head_dim]".into(),
                found: format!("{}{:?}", tensor.dtype, tensor.shape),
            }),
        }
    }
}

/// Whether a decoder session can run the network: it has an interface, which names every input and output, with the names,
/// dtypes and shapes of the table at the head of [`network`](super). Assumes [`verify`](super::verify()).
pub fn verify_interface(network: &Network) -> Result<(), VerifyError> {
    let Some(interface) = &network.interface else {
        return Err(VerifyError::NoInterface {
            inputs: describe_all(network, &network.inputs),
            outputs: describe_all(network, &network.outputs),
        });
    };
    let mut errors = Vec::new();
    let ids = |ports: &[Port<TensorId>]| -> Vec<TensorId> { ports.iter().map(|port| port.id).collect() };
    for (what, found, expected) in [
        ("inputs", &network.inputs, ids(interface.inputs())),
        ("outputs", &network.outputs, ids(interface.outputs())),
    ] {
        if *found != expected {
            let wanted = format!("the {what} {}", describe_all(network, &expected));
            let found = describe_all(network, found);
            return Err(VerifyError::Interface { wanted, found });
        }
    }
    let rows = network.profile.logits == Logits::Rows;
    if interface.input(Role::LogitRows).is_some() != rows {
        let have = |there: bool| if there { "an input" } else { "no input" };
        return Err(VerifyError::Interface {
            wanted: format!("{} {} by its profile", have(rows), Role::LogitRows),
            found: have(!rows).into(),
        });
    }
    for port in interface.inputs().iter().chain(interface.outputs()) {
        let tensor = network.tensor(port.id);
        let expected = expected(network, interface, *port);
        let fits = expected
            .as_ref()
            .is_some_and(|(dtype, shape)| (*dtype, shape) == (tensor.dtype, &tensor.shape));
        if !fits || tensor.name != port.role.name() {
            errors.push(InterfaceError::Shape {
                role: port.role,
                expected: expected.map_or_else(
                    || "a cache or logits with a vocabulary".into(),
                    |(dtype, shape)| format!("{:?} {dtype}{shape:?}", port.role.name()),
                ),
                found: describe(tensor),
            });
        }
    }
    let updates: Vec<(TensorId, TensorId)> = network.aliases().collect();
    for pair in interface.caches() {
        let actual = network.cache_shape(pair.shape.cache, pair.input);
        if actual.as_ref() != Ok(&pair.shape) {
            errors.push(actual.err().unwrap_or(InterfaceError::Shape {
                role: Role::Cache(pair.shape.cache),
                expected: pair.shape.to_string(),
                found: describe(network.tensor(pair.input)),
            }));
        }
        if !updates.contains(&(pair.input, pair.output)) {
            errors.push(InterfaceError::Missing {
                role: Role::UpdatedCache(pair.shape.cache),
            });
        }
    }
    match errors.is_empty() {
        true => Ok(()),
        false => Err(VerifyError::Ports(InterfaceErrors(errors))),
    }
}

/// The dtype and shape that a port must have by its role; `None` if the interface lacks what they follow from.
fn expected(network: &Network, interface: &Interface<TensorId>, port: Port<TensorId>) -> Option<(DType, Vec<Dim>)> {
    let profile = network.profile;
    let batch = Dim::from(profile.batch);
    let tokens = match profile.tokens {
        Tokens::Static(n) => Dim::from(n),
        Tokens::Dynamic { .. } => Dim::sym(Sym::tokens()),
    };
    Some(match port.role {
        Role::TokenIds | Role::PositionIds => (DType::I32, vec![batch, tokens]),
        Role::Embeddings => {
            let tensor = network.tensor(port.id);
            let width = tensor.shape.last()?.as_const().filter(|width| *width > 0)?;
            let dtype = Some(tensor.dtype).filter(|dtype| dtype.is_float())?;
            (dtype, vec![batch, tokens, width.into()])
        }
        Role::WriteIndices | Role::TotalLengths | Role::LogitRows => (DType::I32, vec![batch]),
        Role::Cache(cache) | Role::UpdatedCache(cache) => {
            let shape = interface.caches().iter().find(|pair| pair.shape.cache == cache)?.shape;
            let dims = vec![
                batch,
                shape.kv_heads.into(),
                profile.capacity.into(),
                shape.head_dim.into(),
            ];
            (shape.dtype, dims)
        }
        Role::Logits => {
            let rows = match profile.logits {
                Logits::All => tokens,
                Logits::Rows => Dim::from(1usize),
            };
            let vocabulary = network.tensor(port.id).shape.last().cloned()?;
            (DType::F32, vec![batch, rows, vocabulary])
        }
    })
}

fn describe(tensor: &Tensor) -> String {
    format!("{:?} {}{:?}", tensor.name, tensor.dtype, tensor.shape)
}

fn describe_all(network: &Network, ids: &[TensorId]) -> String {
    let all: Vec<String> = ids.iter().map(|id| describe(network.tensor(*id))).collect();
    all.join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::interface::CachePart;
    use crate::lower::synthetic::Decoder;
    use crate::lower::{LowerOptions, lower};
    use crate::network::Profile;

    fn network() -> Network {
        let graph = Decoder::tiny().graph();
        lower(&graph, &Profile::prefill(3, 16), &LowerOptions::default()).unwrap()
    }

    /// The error for a changed network.
    fn refused(change: impl FnOnce(&mut Network)) -> VerifyError {
        let mut network = network();
        verify_interface(&network).unwrap();
        change(&mut network);
        verify_interface(&network).unwrap_err()
    }

    /// Sets the network's interface to the one that follows from its names.
    fn by_names(network: &mut Network) -> Result<(), InterfaceErrors> {
        network.interface = Some(network.canonical_interface()?);
        Ok(())
    }

    const KEY: CacheId = CacheId {
        layer: 0,
        part: CachePart::Key,
    };

    #[test]
    fn a_network_without_interface_is_refused() {
        let error = refused(|network| network.interface = None);
        assert!(matches!(error, VerifyError::NoInterface { .. }), "{error}");
        assert!(error.to_string().contains("\"input_ids\" i32[1, 3]"), "{error}");
    }

    #[test]
    fn a_network_without_logits_or_cache_output_has_no_interface() {
        for role in [Role::Logits, Role::UpdatedCache(KEY)] {
            let mut network = network();
            let id = network.interface.as_ref().unwrap().output(role).unwrap();
            network.outputs.retain(|output| *output != id);
            let errors = by_names(&mut network).unwrap_err().0;
            assert_eq!(errors, [InterfaceError::Missing { role }]);
            // Its previous interface does not fit either.
            let error = verify_interface(&network).unwrap_err();
            assert!(matches!(error, VerifyError::Interface { .. }), "{error}");
        }
    }

    #[test]
    fn rows_are_chosen_exactly_if_the_profile_says_so() {
        let error = refused(|network| network.profile.logits = Logits::All);
        assert!(
            error.to_string().contains("no input logit_rows by its profile"),
            "{error}"
        );
        let error = refused(|network| {
            let rows = network.interface.as_ref().unwrap().input(Role::LogitRows).unwrap();
            network.inputs.retain(|input| *input != rows);
            by_names(network).unwrap();
        });
        assert!(
            error.to_string().contains("an input logit_rows by its profile"),
            "{error}"
        );
    }

    #[test]
    fn tensors_have_the_shapes_and_names_of_their_roles() {
        let roles = [
            Role::TokenIds,
            Role::PositionIds,
            Role::WriteIndices,
            Role::LogitRows,
            Role::Cache(KEY),
            Role::Logits,
            Role::UpdatedCache(KEY),
        ];
        let of = |network: &Network, role: Role| -> TensorId {
            let interface = network.interface.as_ref().unwrap();
            interface.input(role).or(interface.output(role)).unwrap()
        };
        for role in roles {
            let changes: [fn(&mut Tensor); 3] = [
                |tensor| tensor.shape[0] = Dim::from(2usize),
                |tensor| tensor.dtype = DType::Bool,
                |tensor| tensor.name.push('?'),
            ];
            for change in changes {
                let error = refused(|network| {
                    let id = of(network, role);
                    change(&mut network.tensors[id.0 as usize]);
                });
                let VerifyError::Ports(InterfaceErrors(errors)) = &error else {
                    panic!("{role}: {error}")
                };
                let named = |error: &InterfaceError| matches!(error, InterfaceError::Shape { role: found, .. } if *found == role);
                assert!(errors.iter().any(named), "{role}: {errors:?}");
            }
        }
    }

    /// A cache output that no update computes is not in the memory of its input.
    #[test]
    fn every_cache_is_updated() {
        let error = refused(|network| {
            network
                .layers
                .retain(|layer| !layer.name.contains("updated_key_cache.0"))
        });
        let VerifyError::Ports(InterfaceErrors(errors)) = &error else {
            panic!("{error}")
        };
        let role = Role::UpdatedCache(KEY);
        assert_eq!(errors[..], [InterfaceError::Missing { role }], "{error}");
    }
}
