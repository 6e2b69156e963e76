//! Inputs and outputs of a model, as one typed description that every level carries.
//!
//! An [`Interface`] lists the inputs and outputs of a model by [`Role`], and its caches with the shape of their rows.
//! `passes` build it for the canonical graph, the lowering copies it to the network (and adds the choice of rows that
//! get logits), the package's manifest stores it without ids ([`Signature`]), and sessions bind by role. So no level
//! identifies an input by its name or shape. Names exist only in formats that have nothing else: ONNX files, text dumps
//! and TensorRT plans. Only [`Role`]'s `Display` and `FromStr` define these names.
//!
//! [`Interface::new`] refuses interfaces that no session can run: a role that is missing, duplicated, or on the wrong
//! side. Dtypes and dims are checked by the levels that have them, [`Graph`](crate::graph::Graph::canonical_interface)
//! and [`Network`](crate::network::verify_interface).
//!
//! [`CacheRows`] is the arithmetic that all devices share when a cache grows.

mod error;
mod role;
mod rows;

use std::fmt;

use serde::{Deserialize, Serialize};

pub use error::{InterfaceError, InterfaceErrors, Side};
pub use role::{CacheId, CachePart, Role, UnknownName};
pub use rows::{CacheRows, RowCopy};

use crate::tensor::DType;

/// One input or output: its role, and its value in a graph or tensor in a network.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Port<Id> {
    /// Its role.
    pub role: Role,
    /// The value or tensor.
    pub id: Id,
}

/// The shape of a cache, `[batch, kv_heads, capacity, head_dim]`, as far as the model defines it: batch and capacity
/// belong to a profile.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct CacheShape {
    /// Which cache.
    #[serde(flatten)]
    pub cache: CacheId,
    /// Heads of keys or values.
    pub kv_heads: usize,
    /// Elements of one head of one token.
    pub head_dim: usize,
    /// Element type; a float.
    pub dtype: DType,
}

/// `key_cache.0 f16[batch, 2, capacity, 64]`
impl fmt::Display for CacheShape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (role, dtype) = (Role::Cache(self.cache), self.dtype);
        write!(
            f,
            "{role} {dtype}[batch, {}, capacity, {}]",
            self.kv_heads, self.head_dim
        )
    }
}

/// A cache: an input, and the output that is its update.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct CachePair<Id> {
    /// Which cache, and the shape of its rows.
    pub shape: CacheShape,
    /// The cache before a call.
    pub input: Id,
    /// The cache with the call's rows; in a network, in the memory of the input.
    pub output: Id,
}

/// Inputs and outputs of a model. See the module's head.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Interface<Id> {
    inputs: Vec<Port<Id>>,
    outputs: Vec<Port<Id>>,
    caches: Vec<CachePair<Id>>,
}

/// An [`Interface`] without ids, which is the same for the canonical graph, its manifest and, except for the choice of
/// rows, every network lowered from it.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Signature {
    /// In order.
    pub inputs: Vec<Role>,
    /// In order.
    pub outputs: Vec<Role>,
    /// In the order of their inputs.
    pub caches: Vec<CacheShape>,
}

/// Inputs that every model needs, besides token ids or embeddings.
const REQUIRED_INPUTS: [Role; 2] = [Role::PositionIds, Role::WriteIndices];
const REQUIRED_OUTPUTS: [Role; 1] = [Role::Logits];

impl<Id: Copy + PartialEq> Interface<Id> {
    /// The interface of these ports, which must be complete, unique and in the order of [`Role`]. `shape` gives the shape
    /// of a cache input. All errors are reported at once.
    pub fn new(
        inputs: Vec<Port<Id>>,
        outputs: Vec<Port<Id>>,
        mut shape: impl FnMut(CacheId, Id) -> Result<CacheShape, InterfaceError>,
    ) -> Result<Self, InterfaceErrors> {
        let mut errors = Vec::new();
        check_side(Side::Input, &inputs, &mut errors);
        check_side(Side::Output, &outputs, &mut errors);
        let find = |ports: &[Port<Id>], role: Role| ports.iter().find(|port| port.role == role).map(|port| port.id);
        match [Role::TokenIds, Role::Embeddings].map(|role| find(&inputs, role)) {
            [None, None] => errors.push(InterfaceError::Missing { role: Role::TokenIds }),
            [Some(_), Some(_)] => errors.push(InterfaceError::TwoTokenInputs),
            _ => {}
        }
        let required = REQUIRED_INPUTS.map(|role| (&inputs, role)).into_iter();
        let required = required.chain(REQUIRED_OUTPUTS.map(|role| (&outputs, role)));
        // A layer with any of its four ports has all of them, like the layers before it.
        let layers = inputs.iter().chain(&outputs).filter_map(|port| port.role.cache());
        let layers = layers.map(|cache| cache.layer.saturating_add(1)).max().unwrap_or(0);
        let caches: Vec<CacheId> = (0..layers.min(inputs.len() + outputs.len()))
            .flat_map(|layer| CachePart::ALL.map(|part| CacheId { layer, part }))
            .collect();
        let of_caches = caches
            .iter()
            .flat_map(|id| [(&inputs, Role::Cache(*id)), (&outputs, Role::UpdatedCache(*id))]);
        for (ports, role) in required.chain(of_caches) {
            if find(ports, role).is_none() {
                errors.push(InterfaceError::Missing { role });
            }
        }
        let mut pairs = Vec::with_capacity(caches.len());
        for id in caches {
            let (Some(input), Some(output)) = (find(&inputs, Role::Cache(id)), find(&outputs, Role::UpdatedCache(id)))
            else {
                continue;
            };
            match shape(id, input) {
                Ok(shape) => pairs.push(CachePair { shape, input, output }),
                Err(error) => errors.push(error),
            }
        }
        match errors.is_empty() {
            true => Ok(Interface {
                inputs,
                outputs,
                caches: pairs,
            }),
            false => Err(InterfaceErrors(errors)),
        }
    }

    /// The interface of ports that a format knows only by name; see [`Interface::new`]. A name that is not one of
    /// [`Role`]'s is an error too.
    pub fn from_names<'n>(
        inputs: impl IntoIterator<Item = (&'n str, Id)>,
        outputs: impl IntoIterator<Item = (&'n str, Id)>,
        shape: impl FnMut(CacheId, Id) -> Result<CacheShape, InterfaceError>,
    ) -> Result<Self, InterfaceErrors> {
        let mut unknown = Vec::new();
        let mut ports = |side: Side, names: Vec<(&'n str, Id)>| -> Vec<Port<Id>> {
            let parsed = names.into_iter().filter_map(|(name, id)| match name.parse() {
                Ok(role) => Some(Port { role, id }),
                Err(UnknownName(name)) => {
                    unknown.push(InterfaceError::Unknown { side, name });
                    None
                }
            });
            parsed.collect()
        };
        let inputs = ports(Side::Input, inputs.into_iter().collect());
        let outputs = ports(Side::Output, outputs.into_iter().collect());
        let made = Interface::new(inputs, outputs, shape);
        match (unknown.is_empty(), made) {
            (true, made) => made,
            (false, made) => {
                unknown.extend(made.err().into_iter().flat_map(|errors| errors.0));
                Err(InterfaceErrors(unknown))
            }
        }
    }

    /// Inputs, in the order of [`Role`].
    pub fn inputs(&self) -> &[Port<Id>] {
        &self.inputs
    }

    /// Outputs, in the order of [`Role`].
    pub fn outputs(&self) -> &[Port<Id>] {
        &self.outputs
    }

    /// Caches, in the order of their inputs: keys and values of the first layer, then of the next.
    pub fn caches(&self) -> &[CachePair<Id>] {
        &self.caches
    }

    /// The input of that role.
    pub fn input(&self, role: Role) -> Option<Id> {
        self.inputs.iter().find(|port| port.role == role).map(|port| port.id)
    }

    /// The input with an element or a row per token: token ids or embeddings.
    pub fn token_input(&self) -> Id {
        let found = self.input(Role::TokenIds).or_else(|| self.input(Role::Embeddings));
        found.expect("an interface has one of them")
    }

    /// Whether it takes embeddings instead of token ids.
    pub fn takes_embeddings(&self) -> bool {
        self.input(Role::Embeddings).is_some()
    }

    /// The output of that role.
    pub fn output(&self, role: Role) -> Option<Id> {
        self.outputs.iter().find(|port| port.role == role).map(|port| port.id)
    }

    /// The logits, which every interface has.
    pub fn logits(&self) -> Id {
        self.output(Role::Logits).expect("an interface has logits")
    }

    /// The role of an input or output.
    pub fn role_of(&self, id: Id) -> Option<Role> {
        let mut ports = self.inputs.iter().chain(&self.outputs);
        ports.find(|port| port.id == id).map(|port| port.role)
    }

    /// The interface without ids.
    pub fn signature(&self) -> Signature {
        let roles = |ports: &[Port<Id>]| ports.iter().map(|port| port.role).collect();
        Signature {
            inputs: roles(&self.inputs),
            outputs: roles(&self.outputs),
            caches: self.caches.iter().map(|pair| pair.shape).collect(),
        }
    }

    /// The same interface over other ids.
    pub fn map<To>(&self, mut to: impl FnMut(Id) -> To) -> Interface<To> {
        let mut ports = |ports: &[Port<Id>]| -> Vec<Port<To>> {
            let mapped = ports.iter().map(|Port { role, id }| Port {
                role: *role,
                id: to(*id),
            });
            mapped.collect()
        };
        let (inputs, outputs) = (ports(&self.inputs), ports(&self.outputs));
        let pairs = self.caches.iter().map(|pair| CachePair {
            shape: pair.shape,
            input: to(pair.input),
            output: to(pair.output),
        });
        let caches = pairs.collect();
        Interface {
            inputs,
            outputs,
            caches,
        }
    }

    /// Replaces the output `old` by another value.
    pub(crate) fn replace_output(&mut self, old: Id, new: Id) {
        let ports = self.outputs.iter_mut().map(|port| &mut port.id);
        let pairs = self.caches.iter_mut().map(|pair| &mut pair.output);
        for id in ports.chain(pairs).filter(|id| **id == old) {
            *id = new;
        }
    }

    /// Changes the dtype of the caches.
    pub(crate) fn set_cache_dtypes(&mut self, mut of: impl FnMut(Id) -> Option<DType>) {
        for pair in &mut self.caches {
            pair.shape.dtype = of(pair.input).unwrap_or(pair.shape.dtype);
        }
    }
}

impl Signature {
    /// Without the choice of rows that get logits, which only networks have.
    pub fn of_graph(mut self) -> Self {
        self.inputs.retain(|role| *role != Role::LogitRows);
        self
    }
}

fn check_side<Id: Copy + PartialEq>(side: Side, ports: &[Port<Id>], errors: &mut Vec<InterfaceError>) {
    for (i, port) in ports.iter().enumerate() {
        let role = port.role;
        if role.side() != side {
            errors.push(InterfaceError::WrongSide { role });
        }
        if ports[..i]
            .iter()
            .any(|before| before.role == role || before.id == port.id)
        {
            errors.push(InterfaceError::Duplicate { role });
        }
    }
    if !ports.is_sorted_by_key(|port| port.role) {
        let found = ports.iter().map(|port| port.role).collect();
        errors.push(InterfaceError::Order { side, found });
    }
}

#[cfg(test)]
mod tests;
