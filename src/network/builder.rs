//! Builds a [`Network`] layer by layer.
//!
//! Adds layers and returns tensors: dtype and shape of every output are inferred at once by the rules of `infer`, so a
//! mistake is an error at its own layer. Names of tensors and layers are made unique here. `lower` is the main user;
//! tests of the back ends build small networks by hand:
//!
//! ```
//! use lapidary::network::{Activation, NetworkBuilder, LayerKind, Profile, WeightMode};
//! use lapidary::graph::Constant;
//! use lapidary::tensor::DType;
//!
//! let mut b = NetworkBuilder::new("mlp", Profile::decode(16));
//! let x = b.input("x", DType::F16, &[1usize.into(), 64usize.into()])?;
//! let w = b.weight("up.weight", Constant::absent(DType::F16, vec![128, 64]), WeightMode::Bind)?;
//! let y = b.linear("up", x, w)?;
//! let y = b.add("act", LayerKind::Activation(Activation::Relu), &[y])?;
//! b.output("y", y)?;
//! let network = b.finish()?;
//! assert_eq!(network.tensor(y).shape, [1usize.into(), 128usize.into()]);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

use std::collections::{HashMap, HashSet};
use std::fmt;

use crate::dim::Dim;
use crate::graph::Constant;
use crate::interface::Interface;
use crate::tensor::{self, DType};

use super::infer::{LayerFault, infer};
use super::verify::{VerifyError, verify};
use super::{
    Activation, Elementwise, Layer, LayerKind, MatrixOp, Network, Profile, Shape, Tensor, TensorId, UnaryOp, Weight,
    WeightId, WeightMode,
};

/// A layer that is invalid in TensorRT: a bug of the code that built the network, with the details needed to find it.
#[derive(Clone, Debug, PartialEq)]
pub struct LayerError {
    /// Its name.
    pub layer: String,
    /// What it computes, [`LayerKind::name`].
    pub kind: &'static str,
    /// Its inputs.
    pub inputs: Vec<Tensor>,
    /// The rule that it violates.
    pub fault: LayerFault,
}

impl fmt::Display for LayerError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "layer {:?} ({}): {}", self.layer, self.kind, self.fault)?;
        for (i, input) in self.inputs.iter().enumerate() {
            let Tensor { name, dtype, shape } = input;
            write!(
                f,
                "{} {name:?} {dtype}{shape:?}",
                if i == 0 { "; inputs:" } else { "," }
            )?;
        }
        Ok(())
    }
}

impl std::error::Error for LayerError {}

/// Why something could not be added.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[allow(missing_docs, reason = "the message says what the fields are")]
pub enum BuildError {
    #[error(transparent)]
    Layer(Box<LayerError>),
    #[error("the name {0:?} of an input, output or weight is already taken")]
    Name(String),
    #[error("the weight {name:?} is {first}, and a layer reads it as {second}; give the second form a name of its own")]
    WeightForm {
        name: String,
        first: String,
        second: String,
    },
    #[error("the input {name:?} would have rank {rank}; TensorRT has at most 8 axes")]
    Rank { name: String, rank: usize },
    #[error(
        "{tensor:?} cannot become the output {output:?}: it is an input or a weight, or is an output already; put an empty Shuffle between"
    )]
    Output { output: String, tensor: String },
}

/// See the module's head.
pub struct NetworkBuilder {
    network: Network,
    names: HashMap<String, TensorId>,
    layer_names: HashSet<String>,
    /// Next number to try for a base name, so that unique names cost no search.
    numbers: HashMap<String, usize>,
    weights: HashMap<String, (WeightId, TensorId)>,
    /// Inputs, outputs and weights: their names are fixed.
    fixed: HashSet<TensorId>,
    /// The layer that computes each tensor; none for inputs.
    producers: Vec<Option<u32>>,
}

impl NetworkBuilder {
    /// An empty network.
    pub fn new(name: impl Into<String>, profile: Profile) -> Self {
        NetworkBuilder {
            network: Network::new(name, profile),
            names: HashMap::new(),
            layer_names: HashSet::new(),
            numbers: HashMap::new(),
            weights: HashMap::new(),
            fixed: HashSet::new(),
            producers: Vec::new(),
        }
    }

    /// The network so far.
    pub fn network(&self) -> &Network {
        &self.network
    }
    /// The element type of a tensor.
    pub fn dtype(&self, id: TensorId) -> DType {
        self.network.tensor(id).dtype
    }
    /// The shape of a tensor.
    pub fn shape(&self, id: TensorId) -> &Shape {
        &self.network.tensor(id).shape
    }
    /// The number of axes of a tensor.
    pub fn rank(&self, id: TensorId) -> usize {
        self.shape(id).len()
    }

    /// The layer that computes a tensor; none for a network input.
    pub fn producer(&self, id: TensorId) -> Option<&Layer> {
        self.producers[id.0 as usize].map(|i| &self.network.layers[i as usize])
    }

    fn unique(numbers: &mut HashMap<String, usize>, base: &str, taken: impl Fn(&str) -> bool) -> String {
        if !taken(base) {
            return base.to_string();
        }
        let next = numbers.entry(base.to_string()).or_insert(1);
        loop {
            let name = format!("{base}.{next}");
            *next += 1;
            if !taken(&name) {
                return name;
            }
        }
    }

    fn push(&mut self, name: String, dtype: DType, shape: Shape) -> TensorId {
        let id = TensorId(self.network.tensors.len() as u32);
        self.names.insert(name.clone(), id);
        self.network.tensors.push(Tensor { name, dtype, shape });
        self.producers.push(None);
        id
    }

    /// Frees `name` for an input, output or weight: another tensor with this name is renamed.
    fn claim(&mut self, name: &str) -> Result<(), BuildError> {
        let Some(holder) = self.names.get(name).copied() else {
            return Ok(());
        };
        if self.fixed.contains(&holder) {
            return Err(BuildError::Name(name.to_string()));
        }
        let other = Self::unique(&mut self.numbers, name, |n| self.names.contains_key(n));
        self.names.remove(name);
        self.names.insert(other.clone(), holder);
        self.network.tensors[holder.0 as usize].name = other;
        Ok(())
    }

    /// A network input. The name must not be one of an input, output or weight.
    pub fn input(&mut self, name: &str, dtype: DType, shape: &[Dim]) -> Result<TensorId, BuildError> {
        if shape.len() > super::infer::MAX_RANK {
            let (name, rank) = (name.to_string(), shape.len());
            return Err(BuildError::Rank { name, rank });
        }
        self.claim(name)?;
        let id = self.push(name.to_string(), dtype, shape.to_vec());
        self.fixed.insert(id);
        self.network.inputs.push(id);
        Ok(id)
    }

    /// Makes a tensor a network output with that name.
    pub fn output(&mut self, name: &str, id: TensorId) -> Result<(), BuildError> {
        if self.fixed.contains(&id) {
            return Err(BuildError::Output {
                output: name.to_string(),
                tensor: self.network.tensor(id).name.clone(),
            });
        }
        self.claim(name)?;
        let old = std::mem::replace(&mut self.network.tensors[id.0 as usize].name, name.to_string());
        self.names.remove(&old);
        self.names.insert(name.to_string(), id);
        self.fixed.insert(id);
        self.network.outputs.push(id);
        Ok(())
    }

    /// Sets the roles of inputs and outputs.
    pub fn interface(&mut self, interface: Interface<TensorId>) {
        self.network.interface = Some(interface);
    }

    /// The weight as a tensor. One layer per name: a repeated call returns the same tensor.
    pub fn weight(&mut self, name: &str, constant: Constant, mode: WeightMode) -> Result<TensorId, BuildError> {
        if let Some((id, tensor)) = self.weights.get(name) {
            let first = &self.network.weight(*id).constant;
            if (first.dtype(), first.shape()) != (constant.dtype(), constant.shape()) {
                return Err(BuildError::WeightForm {
                    name: name.to_string(),
                    first: format!("{}{:?}", first.dtype(), first.shape()),
                    second: format!("{}{:?}", constant.dtype(), constant.shape()),
                });
            }
            return Ok(*tensor);
        }
        self.claim(name)?;
        let id = WeightId(self.network.weights.len() as u32);
        self.network.weights.push(Weight {
            name: name.to_string(),
            constant,
            mode,
        });
        let tensor = self.add(name, LayerKind::Weight(id), &[])?;
        self.weights.insert(name.to_string(), (id, tensor));
        self.fixed.insert(tensor);
        Ok(tensor)
    }

    /// A constant layer.
    pub fn constant(&mut self, name: &str, tensor: tensor::Tensor) -> Result<TensorId, BuildError> {
        self.add(name, LayerKind::Constant(tensor), &[])
    }

    /// One number in the given rank, every dim 1.
    pub fn number(&mut self, name: &str, dtype: DType, rank: usize, value: f64) -> Result<TensorId, BuildError> {
        let shape = vec![1; rank];
        let tensor = match dtype {
            DType::I32 => tensor::Tensor::from_i32(shape, &[value as i32]),
            DType::I64 => tensor::Tensor::from_i64(shape, &[value as i64]),
            DType::Bool => tensor::Tensor::from_bool(shape, &[value != 0.0]),
            // No layer computes in these: the rule of the layer that reads the number reports it.
            DType::I8 | DType::U8 => {
                let byte = bytes::Bytes::from(vec![value as i64 as u8]);
                tensor::Tensor::new(dtype, shape, byte).expect("one element of one byte")
            }
            _ => tensor::Tensor::from_f64_as(dtype, shape, &[value]),
        };
        self.constant(name, tensor)
    }

    /// `start + step * i` for `length` numbers, i32 or f32.
    pub fn fill(
        &mut self,
        name: &str,
        dtype: DType,
        length: Dim,
        start: f64,
        step: f64,
    ) -> Result<TensorId, BuildError> {
        self.add_typed(name, LayerKind::Fill { length, start, step }, &[], Some(dtype))
    }

    /// Adds a layer and returns its output; both get the layer's name, made unique.
    pub fn add(&mut self, name: &str, kind: LayerKind, inputs: &[TensorId]) -> Result<TensorId, BuildError> {
        self.add_typed(name, kind, inputs, None)
    }

    /// The same; `dtype` is that of a fill, others have theirs by their rule.
    pub(super) fn add_as(
        &mut self,
        name: &str,
        kind: LayerKind,
        inputs: &[TensorId],
        dtype: DType,
    ) -> Result<TensorId, BuildError> {
        self.add_typed(name, kind, inputs, Some(dtype))
    }

    fn add_typed(
        &mut self,
        name: &str,
        kind: LayerKind,
        inputs: &[TensorId],
        fill: Option<DType>,
    ) -> Result<TensorId, BuildError> {
        Ok(self.add_layer(name, kind, inputs, fill)?[0])
    }

    /// Adds a layer and returns all its outputs: the first has the layer's name, others are numbered.
    pub fn add_with_outputs(
        &mut self,
        name: &str,
        kind: LayerKind,
        inputs: &[TensorId],
    ) -> Result<Vec<TensorId>, BuildError> {
        self.add_layer(name, kind, inputs, None)
    }

    fn add_layer(
        &mut self,
        name: &str,
        kind: LayerKind,
        inputs: &[TensorId],
        fill: Option<DType>,
    ) -> Result<Vec<TensorId>, BuildError> {
        let tensors: Vec<&Tensor> = inputs.iter().map(|id| self.network.tensor(*id)).collect();
        let types = infer(&kind, &tensors, &self.network.weights, fill).map_err(|fault| {
            BuildError::Layer(Box::new(LayerError {
                layer: name.to_string(),
                kind: kind.name(),
                inputs: tensors.into_iter().cloned().collect(),
                fault,
            }))
        })?;
        let layer = Self::unique(&mut self.numbers, name, |n| self.layer_names.contains(n));
        let mut outputs = Vec::with_capacity(types.len());
        for (dtype, shape) in types {
            let tensor = Self::unique(&mut self.numbers, &layer, |n| self.names.contains_key(n));
            let output = self.push(tensor, dtype, shape);
            self.producers[output.0 as usize] = Some(self.network.layers.len() as u32);
            outputs.push(output);
        }
        self.layer_names.insert(layer.clone());
        self.network.layers.push(Layer {
            name: layer,
            kind,
            inputs: inputs.to_vec(),
            outputs: outputs.clone(),
        });
        Ok(outputs)
    }

    // Frequent layers

    /// An elementwise layer over tensors of equal rank and dtype.
    pub fn elementwise(
        &mut self,
        name: &str,
        op: Elementwise,
        a: TensorId,
        b: TensorId,
    ) -> Result<TensorId, BuildError> {
        self.add(name, LayerKind::Elementwise(op), &[a, b])
    }

    /// A unary layer.
    pub fn unary(&mut self, name: &str, op: UnaryOp, x: TensorId) -> Result<TensorId, BuildError> {
        self.add(name, LayerKind::Unary(op), &[x])
    }

    /// An activation layer.
    pub fn activation(&mut self, name: &str, op: Activation, x: TensorId) -> Result<TensorId, BuildError> {
        self.add(name, LayerKind::Activation(op), &[x])
    }

    /// `x` itself if it already has that dtype.
    pub fn cast(&mut self, name: &str, to: DType, x: TensorId) -> Result<TensorId, BuildError> {
        match self.dtype(x) == to {
            true => Ok(x),
            false => self.add(name, LayerKind::Cast { to }, &[x]),
        }
    }

    /// A shuffle layer that only reshapes.
    pub fn reshape(&mut self, name: &str, x: TensorId, to: Shape) -> Result<TensorId, BuildError> {
        let kind = LayerKind::Shuffle {
            first: None,
            reshape: Some(to),
            second: None,
        };
        self.add(name, kind, &[x])
    }

    /// A shuffle layer that only permutes the axes.
    pub fn transpose(&mut self, name: &str, x: TensorId, order: &[usize]) -> Result<TensorId, BuildError> {
        let kind = LayerKind::Shuffle {
            first: Some(order.to_vec()),
            reshape: None,
            second: None,
        };
        self.add(name, kind, &[x])
    }

    /// `x` with leading dims of 1 up to `rank`; `x` itself if it has that rank or more.
    pub fn raise(&mut self, name: &str, x: TensorId, rank: usize) -> Result<TensorId, BuildError> {
        let shape = self.shape(x);
        if shape.len() >= rank {
            return Ok(x);
        }
        let mut to = vec![Dim::from(1usize); rank - shape.len()];
        to.extend(shape.iter().cloned());
        self.reshape(name, x, to)
    }

    /// `x [.., in] · w [out, in]ᵀ`, both of one rank.
    pub fn linear(&mut self, name: &str, x: TensorId, w: TensorId) -> Result<TensorId, BuildError> {
        let kind = LayerKind::MatrixMultiply {
            op_a: MatrixOp::None,
            op_b: MatrixOp::Transpose,
        };
        self.add(name, kind, &[x, w])
    }

    /// The finished network, verified by its layers' rules (not against the interface of a language model:
    /// [`verify_interface`](super::verify_interface) does that).
    pub fn finish(self) -> Result<Network, VerifyError> {
        verify(&self.network)?;
        Ok(self.network)
    }

    /// The network without layers and weights that no output depends on, verified.
    pub fn finish_pruned(mut self) -> Result<Network, VerifyError> {
        super::prune::prune(&mut self.network);
        self.finish()
    }
}
