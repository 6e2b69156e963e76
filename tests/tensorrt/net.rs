//! Tiny hand-written networks, and the library shared by all tests.

use lapidary::backend::tensorrt::{self, BuildOptions, EngineBuildError, Library, Plan};
use lapidary::dim::Dim;
use lapidary::graph::Constant;
use lapidary::network::{
    Layer, LayerKind, Logits, Network, Profile, Shape, Tensor, TensorId, Tokens, Weight, WeightId, WeightMode,
};
use lapidary::tensor::DType;

/// The library of this machine; a test that needs it fails without it.
pub fn library() -> Library {
    Library::load(None).unwrap_or_else(|error| panic!("{error}\n(for these tests: source scripts/setup.sh tensorrt)"))
}

pub fn build(net: &Net) -> Result<Plan, EngineBuildError> {
    tensorrt::build(&library(), &net.0, &BuildOptions::default())
}

/// `shape(["1", "tokens", "2*tokens"])`.
pub fn shape<const N: usize>(dims: [&str; N]) -> Shape {
    dims.iter().map(|dim| Dim::parse(dim)).collect()
}

/// `dims([1, 2, 3])`.
pub fn dims<const N: usize>(dims: [i64; N]) -> Shape {
    dims.iter().map(|dim| Dim::constant(*dim)).collect()
}

pub fn bytes_of(dtype: DType, shape: &[usize], fill: impl Fn(usize) -> u8) -> lapidary::tensor::Tensor {
    let count = dtype.byte_len(shape.iter().product());
    let data: Vec<u8> = (0..count).map(fill).collect();
    lapidary::tensor::Tensor::new(dtype, shape.to_vec(), data.into()).unwrap()
}

pub struct Net(pub Network);

impl Net {
    pub fn new(tokens: Tokens) -> Self {
        let profile = Profile {
            batch: 1,
            tokens,
            capacity: 32,
            logits: Logits::All,
        };
        Net(Network::new("test", profile))
    }

    pub fn fixed() -> Self {
        Net::new(Tokens::Static(4))
    }

    fn tensor(&mut self, name: String, dtype: DType, shape: Shape) -> TensorId {
        self.0.tensors.push(Tensor { name, dtype, shape });
        TensorId(self.0.tensors.len() as u32 - 1)
    }

    pub fn input(&mut self, name: &str, dtype: DType, shape: Shape) -> TensorId {
        let id = self.tensor(name.to_string(), dtype, shape);
        self.0.inputs.push(id);
        id
    }

    /// A layer whose output has the layer's name with `.out`.
    pub fn layer(
        &mut self,
        name: &str,
        kind: LayerKind,
        inputs: impl IntoIterator<Item = TensorId>,
        dtype: DType,
        shape: Shape,
    ) -> TensorId {
        let output = self.tensor(format!("{name}.out"), dtype, shape);
        self.0.layers.push(Layer {
            name: name.to_string(),
            kind,
            inputs: inputs.into_iter().collect(),
            outputs: vec![output],
        });
        output
    }

    /// The same, as an output of the network.
    pub fn out(
        &mut self,
        name: &str,
        kind: LayerKind,
        inputs: impl IntoIterator<Item = TensorId>,
        dtype: DType,
        shape: Shape,
    ) -> TensorId {
        let id = self.layer(name, kind, inputs, dtype, shape);
        self.0.outputs.push(id);
        id
    }

    pub fn constant(&mut self, name: &str, tensor: lapidary::tensor::Tensor) -> TensorId {
        let (dtype, shape) = (tensor.dtype(), tensor.shape().iter().map(|d| Dim::from(*d)).collect());
        self.layer(name, LayerKind::Constant(tensor), [], dtype, shape)
    }

    pub fn weight(&mut self, name: &str, constant: impl Into<Constant>, mode: WeightMode) -> TensorId {
        let constant = constant.into();
        let (dtype, shape) = (
            constant.dtype(),
            constant.shape().iter().map(|d| Dim::from(*d)).collect(),
        );
        self.0.weights.push(Weight {
            name: name.to_string(),
            constant,
            mode,
        });
        let id = WeightId(self.0.weights.len() as u32 - 1);
        self.layer(&format!("{name}/weight"), LayerKind::Weight(id), [], dtype, shape)
    }
}
