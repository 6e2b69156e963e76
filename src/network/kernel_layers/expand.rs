//! Lapidary's layers expanded into TensorRT's: this defines their meaning, and the CPU executor runs it.

use std::collections::HashMap;

use super::{
    AttentionInputs, CodeLayout, DecodeAttention, PartInputs, ProductInputs, ProductPart, RowActivation, RowProduct,
};
use crate::dim::Dim;
use crate::network::{
    Activation, BuildError, Elementwise, Layer, LayerKind, MatrixOp, Network, NetworkBuilder, ReduceOp, TensorId,
    UnaryOp, VerifyError,
};
use crate::tensor::quantized::Granularity;
use crate::tensor::{DType, Tensor};

type Added = Result<TensorId, BuildError>;

/// Added to a score that is masked out.
const MASKED: f64 = -1e30;

impl Network {
    /// Whether it has layers that TensorRT does not have.
    pub fn has_kernel_layers(&self) -> bool {
        self.layers.iter().any(|layer| layer.kind.is_kernel_layer())
    }

    /// The same network with Lapidary's own layers expanded. Inputs, outputs and weights keep their names and order.
    pub fn expanded(&self) -> Result<Network, VerifyError> {
        Expansion::new(self)
            .and_then(Expansion::layers)
            .unwrap_or_else(|error| unreachable!("the layers of a verified network expand: {error}"))
            .finish()
    }
}

struct Expansion<'n> {
    network: &'n Network,
    b: NetworkBuilder,
    ids: HashMap<TensorId, TensorId>,
}

impl<'n> Expansion<'n> {
    fn new(network: &'n Network) -> Result<Self, BuildError> {
        let mut b = NetworkBuilder::new(network.name.clone(), network.profile);
        let mut ids = HashMap::new();
        for id in &network.inputs {
            let tensor = network.tensor(*id);
            ids.insert(*id, b.input(&tensor.name, tensor.dtype, &tensor.shape)?);
        }
        Ok(Expansion { network, b, ids })
    }

    fn layers(mut self) -> Result<NetworkBuilder, BuildError> {
        for layer in &self.network.layers {
            let inputs: Vec<TensorId> = layer.inputs.iter().map(|id| self.ids[id]).collect();
            let outputs = self.layer(layer, &inputs)?;
            self.ids.extend(layer.outputs.iter().copied().zip(outputs));
        }
        for id in &self.network.outputs {
            self.b.output(&self.network.tensor(*id).name, self.ids[id])?;
        }
        if let Some(interface) = &self.network.interface {
            self.b.interface(interface.clone().map(|id| self.ids[&id]));
        }
        Ok(self.b)
    }

    fn layer(&mut self, layer: &Layer, inputs: &[TensorId]) -> Result<Vec<TensorId>, BuildError> {
        let name = &layer.name;
        match &layer.kind {
            LayerKind::RowProduct(product) => {
                let inputs = ProductInputs::of(product, inputs).expect("verified");
                Ok(vec![self.product(name, product, &inputs)?])
            }
            LayerKind::DecodeAttention(attention) => {
                let inputs = AttentionInputs::of(attention, inputs).expect("verified");
                Ok(self.attention(name, attention, &inputs)?.to_vec())
            }
            LayerKind::Weight(id) => {
                let weight = self.network.weight(*id);
                Ok(vec![self.b.weight(
                    &weight.name,
                    weight.constant.clone(),
                    weight.mode,
                )?])
            }
            kind => {
                let dtype = self.network.tensor(layer.outputs[0]).dtype;
                Ok(vec![self.b.add_as(name, kind.clone(), inputs, dtype)?])
            }
        }
    }

    fn wide(&mut self, name: &str, x: TensorId) -> Added {
        self.b.cast(&format!("{name}/wide"), DType::F32, x)
    }

    fn number(&mut self, name: &str, rank: usize, value: f64) -> Added {
        self.b.number(name, DType::F32, rank, value)
    }

    fn dims(&self, x: TensorId) -> Vec<Dim> {
        self.b.shape(x).clone()
    }

    /// `x * rsqrt(mean(x²) + epsilon) * weight` over the last axis, in fp32 and rounded once to x's dtype.
    fn norm(&mut self, name: &str, x: TensorId, weight: TensorId, epsilon: f32) -> Added {
        let part = |part: &str| format!("{name}/{part}");
        let (dtype, rank) = (self.b.dtype(x), self.b.rank(x));
        let x = self.wide(name, x)?;
        let square = self.b.elementwise(&part("square"), Elementwise::Prod, x, x)?;
        let mean = LayerKind::Reduce {
            op: ReduceOp::Avg,
            axes: vec![rank - 1],
            keep_dims: true,
        };
        let mean = self.b.add(&part("mean"), mean, &[square])?;
        let epsilon = self.number(&part("epsilon"), rank, f64::from(epsilon))?;
        let shifted = self.b.elementwise(&part("shifted"), Elementwise::Sum, mean, epsilon)?;
        let root = self.b.unary(&part("root"), UnaryOp::Sqrt, shifted)?;
        let normal = self.b.elementwise(&part("normal"), Elementwise::Div, x, root)?;
        let weight = self.wide(&part("weight"), weight)?;
        let weight = self.b.raise(&part("weight/raised"), weight, rank)?;
        let scaled = self.b.elementwise(&part("scaled"), Elementwise::Prod, normal, weight)?;
        self.b.cast(name, dtype, scaled)
    }

    fn product(&mut self, name: &str, product: &RowProduct, inputs: &ProductInputs<TensorId>) -> Added {
        let dtype = self.b.dtype(inputs.x);
        let mut x = inputs.x;
        if let (Some(weight), Some(epsilon)) = (inputs.norm, product.norm) {
            x = self.norm(&format!("{name}/norm"), x, weight, epsilon)?;
        }
        let x = self.wide(&format!("{name}/x"), x)?;
        let rank = self.b.rank(x);
        let mut sums = Vec::new();
        for (i, (part, of_part)) in product.parts.iter().zip(&inputs.parts).enumerate() {
            let name = format!("{name}/{i}");
            let weights = self.matrix(&name, part, of_part)?;
            let weights = self.b.raise(&format!("{name}/raised"), weights, rank)?;
            let mut sum = self.b.linear(&format!("{name}/product"), x, weights)?;
            if let Some(bias) = of_part.bias {
                let bias = self.wide(&format!("{name}/bias"), bias)?;
                let bias = self.b.raise(&format!("{name}/bias/raised"), bias, rank)?;
                sum = self
                    .b
                    .elementwise(&format!("{name}/sum"), Elementwise::Sum, sum, bias)?;
            }
            sums.push(sum);
        }
        let activated = format!("{name}/activated");
        let mut y = match product.gated {
            true => {
                let gate = self.activated(&activated, sums[0], product.activation)?;
                self.b
                    .elementwise(&format!("{name}/gated"), Elementwise::Prod, gate, sums[1])?
            }
            false => {
                let all = match sums[..] {
                    [only] => only,
                    _ => {
                        let joined = LayerKind::Concatenation { axis: rank - 1 };
                        self.b.add(&format!("{name}/joined"), joined, &sums)?
                    }
                };
                self.activated(&activated, all, product.activation)?
            }
        };
        if let Some(residual) = inputs.residual {
            let residual = self.wide(&format!("{name}/residual"), residual)?;
            y = self
                .b
                .elementwise(&format!("{name}/added"), Elementwise::Sum, residual, y)?;
        }
        match product.to_f32 {
            true => Ok(y),
            false => self.b.cast(name, dtype, y),
        }
    }

    /// A matrix of floats unchanged, or of codes as `(code - zero point) * scale`; fp32.
    fn matrix(&mut self, name: &str, part: &ProductPart, inputs: &PartInputs<TensorId>) -> Added {
        let (Some(layout), Some(scales)) = (part.codes, inputs.scales) else {
            return self.wide(name, inputs.weights);
        };
        let dims = self.dims(inputs.weights);
        let size = |dim: &Dim| dim.as_const().expect("weights have numbers") as usize;
        let [n, k] = [size(&dims[0]), size(&dims[1])];
        let group = layout.group.unwrap_or(k);
        // A scale of 1 converts codes to numbers.
        let one = self.number(&format!("{name}/one"), 0, 1.0)?;
        let numbers = LayerKind::Dequantize(Granularity::Tensor);
        let numbers = self
            .b
            .add(&format!("{name}/numbers"), numbers, &[inputs.weights, one])?;
        let of_groups: Vec<Dim> = [n, k / group, group].map(Dim::from).to_vec();
        let mut values = self.b.reshape(&format!("{name}/groups"), numbers, of_groups)?;
        if let Some(points) = inputs.zero_points {
            let points = self.of_groups(&format!("{name}/points"), points, layout, [n, k / group])?;
            let half = 1 << (self.b.dtype(inputs.weights).bits() - 1);
            let half = self.number(&format!("{name}/half"), 3, f64::from(half))?;
            let signed = format!("{name}/points/signed");
            let points = self.b.elementwise(&signed, Elementwise::Sub, points, half)?;
            values = self
                .b
                .elementwise(&format!("{name}/centered"), Elementwise::Sub, values, points)?;
        }
        let scales = self.of_groups(&format!("{name}/scales"), scales, layout, [n, k / group])?;
        let values = self
            .b
            .elementwise(&format!("{name}/scaled"), Elementwise::Prod, values, scales)?;
        self.b.reshape(name, values, vec![n.into(), k.into()])
    }

    /// Scales or zero points as `[n, groups, 1]`, fp32.
    fn of_groups(&mut self, name: &str, x: TensorId, layout: CodeLayout, [n, groups]: [usize; 2]) -> Added {
        let x = self.wide(name, x)?;
        let x = match layout.group {
            Some(_) => self.by_row(&format!("{name}/rows"), x, [n, groups])?,
            None => x,
        };
        self.b.reshape(name, x, vec![n.into(), groups.into(), 1usize.into()])
    }

    /// Values per group from the kernels' order, `[rows / 8, columns, 8, groups]`, to `[rows, groups]`.
    fn by_row(&mut self, name: &str, x: TensorId, [n, groups]: [usize; 2]) -> Added {
        let dims = self.dims(x);
        let padded = [&dims[0] * &dims[2], &dims[1] * &dims[3]].to_vec();
        let rows = LayerKind::Shuffle {
            first: Some(vec![0, 2, 1, 3]),
            reshape: Some(padded),
            second: None,
        };
        let rows = self.b.add(&format!("{name}/padded"), rows, &[x])?;
        let slice = LayerKind::Slice {
            start: vec![0, 0],
            size: vec![n.into(), groups.into()],
            stride: vec![1, 1],
        };
        self.b.add(name, slice, &[rows])
    }

    fn activated(&mut self, name: &str, x: TensorId, activation: RowActivation) -> Added {
        let part = |part: &str| format!("{name}/{part}");
        match activation {
            RowActivation::None => Ok(x),
            RowActivation::Silu => {
                let sigmoid = self.b.activation(&part("sigmoid"), Activation::Sigmoid, x)?;
                self.b.elementwise(name, Elementwise::Prod, x, sigmoid)
            }
            RowActivation::GeluErf => self.b.activation(name, Activation::GeluErf, x),
            RowActivation::GeluTanh => self.b.activation(name, Activation::GeluTanh, x),
            RowActivation::Relu => self.b.activation(name, Activation::Relu, x),
            RowActivation::ReluSquared => {
                let relu = self.b.activation(&part("relu"), Activation::Relu, x)?;
                self.b.elementwise(name, Elementwise::Prod, relu, relu)
            }
        }
    }

    /// The result and both updated caches.
    fn attention(
        &mut self,
        name: &str,
        attention: &DecodeAttention,
        inputs: &AttentionInputs<TensorId>,
    ) -> Result<[TensorId; 3], BuildError> {
        let part = |part: &str| format!("{name}/{part}");
        let cache = self.dims(inputs.caches[0]);
        let [batch, kv, capacity, width] = [0, 1, 2, 3].map(|i| cache[i].clone());
        let (heads, group) = (attention.heads, attention.heads / attention.kv_heads);
        let dtype = self.b.dtype(inputs.caches[0]);
        let one = || Dim::from(1usize);
        let [query, key, value] = self.rows(name, attention, inputs, &width)?;
        let query = self.operand(&part("query"), attention, inputs, query, inputs.query_norm)?;
        let key = self.operand(&part("key"), attention, inputs, key, inputs.key_norm)?;
        let mut updated = [TensorId(0); 2];
        for ((to, name), (cache, rows)) in updated
            .iter_mut()
            .zip([part("keys"), part("values")])
            .zip(inputs.caches.into_iter().zip([key, value]))
        {
            *to = self
                .b
                .add(&name, LayerKind::KvCacheUpdate, &[cache, rows, inputs.write_indices])?;
        }
        let keys = self.wide(&part("keys"), updated[0])?;
        let values = self.wide(&part("values"), updated[1])?;
        let query = self.wide(&part("query"), query)?;
        let folded = vec![batch.clone(), kv.clone(), Dim::from(group), width.clone()];
        let query = self.b.reshape(&part("query/groups"), query, folded)?;
        let transposed = LayerKind::MatrixMultiply {
            op_a: MatrixOp::None,
            op_b: MatrixOp::Transpose,
        };
        let scores = self.b.add(&part("scores"), transposed, &[query, keys])?;
        let scale = self.number(&part("scale"), 4, f64::from(attention.scale))?;
        let mut scores = self
            .b
            .elementwise(&part("scores/scaled"), Elementwise::Prod, scores, scale)?;
        if let Some(cap) = attention.soft_cap {
            let cap = self.number(&part("cap"), 4, f64::from(cap))?;
            let shares = self
                .b
                .elementwise(&part("scores/shares"), Elementwise::Div, scores, cap)?;
            let bent = self.b.activation(&part("scores/bent"), Activation::Tanh, shares)?;
            scores = self
                .b
                .elementwise(&part("scores/capped"), Elementwise::Prod, bent, cap)?;
        }
        let seen = self.seen(name, attention, inputs.write_indices, &capacity)?;
        let masked = self.number(&part("masked"), 4, MASKED)?;
        let mut scores = self
            .b
            .add(&part("scores/seen"), LayerKind::Select, &[seen, scores, masked])?;
        let with_sink = attention.sinks;
        if let Some(sinks) = inputs.sinks {
            let column = vec![one(), kv.clone(), Dim::from(group), one()];
            let sinks = self.b.reshape(&part("sinks"), sinks, column)?;
            let sinks = self.repeated(&part("sinks/rows"), sinks, &batch)?;
            let joined = LayerKind::Concatenation { axis: 3 };
            scores = self.b.add(&part("scores/sinks"), joined, &[scores, sinks])?;
        }
        let mut shares = self.b.add(&part("shares"), LayerKind::Softmax { axis: 3 }, &[scores])?;
        if with_sink {
            let size = vec![batch.clone(), kv.clone(), Dim::from(group), capacity];
            let slots = LayerKind::Slice {
                start: vec![0; 4],
                size,
                stride: vec![1; 4],
            };
            shares = self.b.add(&part("shares/slots"), slots, &[shares])?;
        }
        let plain = LayerKind::MatrixMultiply {
            op_a: MatrixOp::None,
            op_b: MatrixOp::None,
        };
        let attended = self.b.add(&part("attended"), plain, &[shares, values])?;
        let to = vec![batch, one(), &Dim::from(heads) * &width];
        let attended = self.b.reshape(&part("attended/row"), attended, to)?;
        Ok([self.b.cast(name, dtype, attended)?, updated[0], updated[1]])
    }

    /// Query, key and value as `[batch, heads, 1, head_dim]`.
    fn rows(
        &mut self,
        name: &str,
        attention: &DecodeAttention,
        inputs: &AttentionInputs<TensorId>,
        width: &Dim,
    ) -> Result<[TensorId; 3], BuildError> {
        let mut rows = inputs.qkv;
        let batch = self.dims(inputs.qkv[0])[0].clone();
        let head_dim = width.as_const().unwrap_or(0);
        let mut first = 0;
        let heads = [attention.heads, attention.kv_heads, attention.kv_heads];
        for ((row, heads), what) in rows.iter_mut().zip(heads).zip(["query", "key", "value"]) {
            let name = format!("{name}/{what}");
            if attention.packed {
                let columns = LayerKind::Slice {
                    start: vec![0, 0, first],
                    size: vec![batch.clone(), Dim::from(1usize), &Dim::from(heads) * width],
                    stride: vec![1; 3],
                };
                *row = self.b.add(&format!("{name}/columns"), columns, &[*row])?;
                first += heads as i64 * head_dim;
            }
            let to = vec![batch.clone(), Dim::from(heads), Dim::from(1usize), width.clone()];
            *row = self.b.reshape(&format!("{name}/heads"), *row, to)?;
        }
        Ok(rows)
    }

    /// A query or key, normalized and rotated.
    fn operand(
        &mut self,
        name: &str,
        attention: &DecodeAttention,
        inputs: &AttentionInputs<TensorId>,
        rows: TensorId,
        norm: Option<TensorId>,
    ) -> Added {
        let dtype = self.b.dtype(rows);
        let mut rows = rows;
        if let Some(weight) = norm {
            let wide = self.wide(&format!("{name}/norm/x"), rows)?;
            let weight = self.wide(&format!("{name}/norm/weight"), weight)?;
            rows = self.norm(&format!("{name}/norm"), wide, weight, attention.epsilon)?;
        }
        if let (Some(rotation), Some([positions, cosines, sines])) = (attention.rotation, inputs.rotation) {
            let wide = self.wide(&format!("{name}/rotated"), rows)?;
            let kind = LayerKind::RotaryEmbedding {
                interleaved: rotation.interleaved,
                rotary_dim: rotation.rotary_dim,
            };
            rows = self
                .b
                .add(&format!("{name}/rotated"), kind, &[wide, cosines, sines, positions])?;
        }
        self.b.cast(name, dtype, rows)
    }

    /// `[batch, 1, 1, capacity]`, true for visible slots.
    fn seen(&mut self, name: &str, attention: &DecodeAttention, write_indices: TensorId, capacity: &Dim) -> Added {
        let part = |part: &str| format!("{name}/{part}");
        let batch = self.dims(write_indices)[0].clone();
        let one = || Dim::from(1usize);
        let slots = self.b.fill(&part("slots"), DType::I32, capacity.clone(), 0.0, 1.0)?;
        let slots = self
            .b
            .reshape(&part("slots/row"), slots, vec![one(), one(), one(), capacity.clone()])?;
        let new = self
            .b
            .reshape(&part("new"), write_indices, vec![batch, one(), one(), one()])?;
        let after = |name: &str, b: &mut NetworkBuilder, count: i32| -> Added {
            let constant = Tensor::from_i32(vec![1; 4], &[count]);
            let constant = b.constant(&format!("{name}/count"), constant)?;
            b.elementwise(name, Elementwise::Sum, new, constant)
        };
        let end = after(&part("end"), &mut self.b, 1)?;
        let seen = self.b.elementwise(&part("seen"), Elementwise::Less, slots, end)?;
        let Some(window) = attention.window else {
            return Ok(seen);
        };
        let window = i32::try_from(window).unwrap_or(i32::MAX);
        let before = after(&part("before"), &mut self.b, -window)?;
        let recent = self
            .b
            .elementwise(&part("recent"), Elementwise::Greater, slots, before)?;
        self.b.elementwise(&part("window"), Elementwise::And, seen, recent)
    }

    /// `x` with its first axis of 1 repeated.
    fn repeated(&mut self, name: &str, x: TensorId, batch: &Dim) -> Added {
        let mut size = self.dims(x);
        if size[0] == *batch {
            return Ok(x);
        }
        size[0] = batch.clone();
        let repeated = LayerKind::Slice {
            start: vec![0; 4],
            size,
            stride: vec![0, 1, 1, 1],
        };
        self.b.add(name, repeated, &[x])
    }
}
