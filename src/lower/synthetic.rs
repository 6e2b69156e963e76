//! Canonical graphs built from a model's dimensions.
//!
//! For builds of models without their weights (a bound engine needs only their shapes) and for tests, which use random
//! weights. The graph equals that of a Llama after the passes: RMSNorm, rotary positions, grouped attention over a
//! static cache, SwiGLU, with the variations of related models.

use crate::dim::{Dim, Sym};
use crate::graph::op::{Attention, Binary, Op};
use crate::graph::{Constant, Graph, Shape, ValueId};
use crate::interface::{CacheId, CachePart, Role};
use crate::tensor::{DType, Tensor};

/// The dimensions of a decoder of the Llama family.
#[derive(Clone, Debug)]
pub struct Decoder {
    /// Transformer layers.
    pub layers: usize,
    /// Width of the residual stream.
    pub hidden: usize,
    /// Query heads.
    pub heads: usize,
    /// Key and value heads; divides `heads`.
    pub kv_heads: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// Width between the feed-forward's matrices.
    pub ffn: usize,
    /// Tokens.
    pub vocabulary: usize,
    /// Rows of the rotary tables.
    pub positions: usize,
    /// Base of the rotary frequencies.
    pub rope_theta: f64,
    /// Element type of weights and caches.
    pub dtype: DType,
    /// Embedding and output weight are one constant.
    pub tied: bool,
    /// Biases of q, k and v (Qwen2).
    pub qkv_bias: bool,
    /// RMSNorm of each head's q and k (Qwen3).
    pub qk_norm: bool,
    /// How many positions a query attends to, itself included (Mistral).
    pub window: Option<usize>,
    /// Soft cap of the attention scores (Gemma 2); 0 for none.
    pub softcap: f32,
}

impl Decoder {
    /// Llama-3-8B in fp16.
    pub fn llama_8b() -> Self {
        Decoder {
            layers: 32,
            hidden: 4096,
            heads: 32,
            kv_heads: 8,
            head_dim: 128,
            ffn: 14336,
            vocabulary: 128_256,
            positions: 8192,
            rope_theta: 500_000.0,
            dtype: DType::F16,
            tied: false,
            qkv_bias: false,
            qk_norm: false,
            window: None,
            softcap: 0.0,
        }
    }

    /// TinyLlama-1.1B in fp16.
    pub fn llama_1b() -> Self {
        Decoder {
            layers: 22,
            hidden: 2048,
            kv_heads: 4,
            head_dim: 64,
            ffn: 5632,
            vocabulary: 32_000,
            positions: 2048,
            rope_theta: 10_000.0,
            ..Decoder::llama_8b()
        }
    }

    /// SmolLM2-135M in fp16.
    pub fn smollm2_135m() -> Self {
        Decoder {
            layers: 30,
            hidden: 576,
            heads: 9,
            kv_heads: 3,
            head_dim: 64,
            ffn: 1536,
            vocabulary: 49_152,
            positions: 8192,
            rope_theta: 100_000.0,
            tied: true,
            ..Decoder::llama_8b()
        }
    }

    /// A model for tests, in fp32: two query heads to each of two KV heads.
    pub fn tiny() -> Self {
        Decoder {
            layers: 2,
            hidden: 32,
            heads: 4,
            kv_heads: 2,
            head_dim: 8,
            ffn: 48,
            vocabulary: 40,
            positions: 32,
            rope_theta: 10_000.0,
            dtype: DType::F32,
            ..Decoder::llama_8b()
        }
    }

    /// The canonical graph with weights of known shape and absent bytes.
    pub fn graph(&self) -> Graph {
        self.graph_with(|_, dtype, shape| Constant::absent(dtype, shape))
    }

    /// The canonical graph; `weight(name, dtype, shape)` provides each weight except the rotary tables, which are
    /// computed.
    pub fn graph_with(&self, weight: impl FnMut(&str, DType, Vec<usize>) -> Constant) -> Graph {
        let mut maker = Maker {
            graph: Graph::new("decoder"),
            config: self,
            weight,
        };
        maker.decoder();
        maker.graph
    }
}

struct Maker<'c, W> {
    graph: Graph,
    config: &'c Decoder,
    weight: W,
}

impl<W: FnMut(&str, DType, Vec<usize>) -> Constant> Maker<'_, W> {
    fn typed(&mut self, name: &str, op: Op, inputs: &[ValueId], dtype: DType, shape: Shape) -> ValueId {
        let id = self.graph.add_node(name, op, inputs);
        let value = self.graph.value_mut(id);
        (value.dtype, value.shape) = (Some(dtype), Some(shape));
        id
    }

    /// A node whose output has the model's dtype.
    fn float(&mut self, name: &str, op: Op, inputs: &[ValueId], shape: Shape) -> ValueId {
        self.typed(name, op, inputs, self.config.dtype, shape)
    }

    fn parameter(&mut self, name: &str, shape: &[usize]) -> ValueId {
        let constant = (self.weight)(name, self.config.dtype, shape.to_vec()).with_origin(name);
        self.graph.add_constant(name, constant)
    }

    fn scalar(&mut self, name: &str, value: i64) -> ValueId {
        self.graph.add_constant(name, Tensor::from_i64(vec![], &[value]))
    }

    /// `[batch, tokens, n]`.
    fn row(&self, n: usize) -> Shape {
        vec![Dim::sym(Sym::batch()), Dim::sym(Sym::tokens()), n.into()]
    }

    fn linear(&mut self, name: &str, x: ValueId, from: usize, to: usize) -> ValueId {
        let weight = self.parameter(&format!("{name}.weight"), &[to, from]);
        self.product(name, x, weight, from, to)
    }

    fn product(&mut self, name: &str, x: ValueId, weight: ValueId, from: usize, to: usize) -> ValueId {
        let transpose = Op::Transpose { perm: Some(vec![1, 0]) };
        let shape = vec![from.into(), to.into()];
        let transposed = self.float(&format!("{name}/transpose"), transpose, &[weight], shape);
        let shape = self.row(to);
        self.float(name, Op::MatMul, &[x, transposed], shape)
    }

    fn rms_norm(&mut self, name: &str, x: ValueId, width: usize, shape: Shape) -> ValueId {
        let scale = self.parameter(&format!("{name}.weight"), &[width]);
        let op = Op::RmsNormalization {
            axis: -1,
            epsilon: 1e-5,
        };
        self.float(name, op, &[x, scale], shape)
    }

    /// `[batch, heads, tokens, head_dim]`, normalized by head if `norm` is given.
    fn heads(&mut self, name: &str, x: ValueId, heads: usize, norm: Option<&str>) -> ValueId {
        let d = self.config.head_dim;
        let to = self
            .graph
            .add_i64(&format!("{name}/shape"), &[0, 0, heads as i64, d as i64]);
        let [batch, tokens, _] = &self.row(0)[..] else {
            unreachable!()
        };
        let (batch, tokens) = (batch.clone(), tokens.clone());
        let split = vec![batch.clone(), tokens.clone(), heads.into(), d.into()];
        let reshape = Op::Reshape { allowzero: false };
        let mut x = self.float(&format!("{name}/split"), reshape, &[x, to], split.clone());
        if let Some(norm) = norm {
            x = self.rms_norm(norm, x, d, split);
        }
        let perm = Some(vec![0, 2, 1, 3]);
        let shape = vec![batch, heads.into(), tokens, d.into()];
        self.float(name, Op::Transpose { perm }, &[x], shape)
    }

    fn decoder(&mut self) {
        let c = self.config;
        let (batch, tokens) = (Dim::sym(Sym::batch()), Dim::sym(Sym::tokens()));
        let ids = self
            .graph
            .add_input(&Role::TokenIds.name(), DType::I64, vec![batch.clone(), tokens.clone()]);
        let positions = self
            .graph
            .add_input(&Role::PositionIds.name(), DType::I64, vec![batch.clone(), tokens]);
        let at = self
            .graph
            .add_input(&Role::WriteIndices.name(), DType::I64, vec![batch.clone()]);
        let slots: Shape = vec![batch, c.kv_heads.into(), Dim::sym(Sym::capacity()), c.head_dim.into()];
        let mut caches = Vec::new();
        for layer in 0..c.layers {
            let names = CachePart::ALL.map(|part| Role::Cache(CacheId { layer, part }).name());
            caches.push(names.map(|name| self.graph.add_input(&name, c.dtype, slots.clone())));
        }
        let mask = self.mask(positions, caches[0][0]);
        let tables = self.tables();
        let embedding = self.parameter("model.embed_tokens.weight", &[c.vocabulary, c.hidden]);
        let shape = self.row(c.hidden);
        let mut x = self.float("embed", Op::Gather { axis: 0 }, &[embedding, ids], shape);
        let mut updated = Vec::new();
        for (i, cache) in caches.into_iter().enumerate() {
            x = self.layer(i, x, [positions, at, mask], tables, cache, &mut updated);
        }
        let shape = self.row(c.hidden);
        let x = self.rms_norm("model.norm", x, c.hidden, shape);
        let name = Role::Logits.name();
        let logits = match c.tied {
            true => self.product(&name, x, embedding, c.hidden, c.vocabulary),
            false => self.linear("lm_head", x, c.hidden, c.vocabulary),
        };
        if self.graph.value(logits).name != name {
            self.graph.rename(logits, &name);
        }
        self.graph.outputs = std::iter::once(logits).chain(updated).collect();
        let named = self.graph.set_canonical_interface();
        named.expect("this module gives inputs and outputs their canonical names");
    }

    /// bool `[batch, 1, tokens, capacity]`.
    fn mask(&mut self, positions: ValueId, cache: ValueId) -> ValueId {
        let capacity = Dim::sym(Sym::capacity());
        let size = Op::Shape { start: 2, end: Some(3) };
        let size = self.typed("mask/capacity", size, &[cache], DType::I64, vec![1usize.into()]);
        let size = self.typed("mask/limit", Op::Squeeze, &[size], DType::I64, vec![]);
        let (zero, one) = (self.scalar("mask/zero", 0), self.scalar("mask/one", 1));
        let slots = self.typed(
            "mask/slots",
            Op::Range,
            &[zero, size, one],
            DType::I64,
            vec![capacity.clone()],
        );
        let axes = self.graph.add_i64("mask/axes", &[1, 3]);
        let [batch, tokens, one] = &self.row(1)[..] else {
            unreachable!()
        };
        let column = vec![batch.clone(), one.clone(), tokens.clone(), one.clone()];
        let full = vec![batch.clone(), one.clone(), tokens.clone(), capacity];
        let rows = self.typed(
            "mask/positions",
            Op::Unsqueeze,
            &[positions, axes],
            DType::I64,
            column.clone(),
        );
        let op = Op::Binary(Binary::LessOrEqual);
        let causal = self.typed("mask", op, &[slots, rows], DType::Bool, full.clone());
        let Some(window) = self.config.window else {
            return causal;
        };
        let window = self.scalar("mask/window", window as i64);
        let before = self.typed(
            "mask/before",
            Op::Binary(Binary::Sub),
            &[rows, window],
            DType::I64,
            column,
        );
        let op = Op::Binary(Binary::Greater);
        let recent = self.typed("mask/recent", op, &[slots, before], DType::Bool, full.clone());
        self.typed(
            "mask/windowed",
            Op::Binary(Binary::And),
            &[causal, recent],
            DType::Bool,
            full,
        )
    }

    /// Cosines and sines `[positions, head_dim / 2]`.
    fn tables(&mut self) -> [ValueId; 2] {
        let (rows, half, theta) = (self.config.positions, self.config.head_dim / 2, self.config.rope_theta);
        let angle = move |i: usize| {
            let frequency = theta.powf(-((i % half) as f64) / half as f64);
            (i / half) as f64 * frequency
        };
        [("rope.cos", f64::cos as fn(f64) -> f64), ("rope.sin", f64::sin)].map(|(name, f)| {
            let values: Vec<f64> = (0..rows * half).map(|i| f(angle(i))).collect();
            let table = Tensor::from_f64_as(self.config.dtype, vec![rows, half], &values);
            self.graph.add_constant(name, Constant::tensor(table).with_origin(name))
        })
    }

    fn layer(
        &mut self,
        i: usize,
        x: ValueId,
        [positions, at, mask]: [ValueId; 3],
        tables: [ValueId; 2],
        caches: [ValueId; 2],
        updated: &mut Vec<ValueId>,
    ) -> ValueId {
        let c = self.config;
        let n = |part: &str| format!("model.layers.{i}.{part}");
        let (width, kv_width) = (c.heads * c.head_dim, c.kv_heads * c.head_dim);
        let hidden = self.row(c.hidden);
        let h = self.rms_norm(&n("input_layernorm"), x, c.hidden, hidden.clone());
        let mut qkv = [
            ("q", c.heads, width),
            ("k", c.kv_heads, kv_width),
            ("v", c.kv_heads, kv_width),
        ]
        .map(|(part, heads, width)| {
            let name = n(&format!("self_attn.{part}_proj"));
            let mut y = self.linear(&name, h, c.hidden, width);
            if c.qkv_bias {
                let bias = self.parameter(&format!("{name}.bias"), &[width]);
                let shape = self.row(width);
                y = self.float(&format!("{name}/biased"), Op::Binary(Binary::Add), &[y, bias], shape);
            }
            let norm = n(&format!("self_attn.{part}_norm"));
            let norm = (c.qk_norm && part != "v").then_some(norm.as_str());
            self.heads(&n(&format!("self_attn.{part}")), y, heads, norm)
        });
        for (x, part) in qkv.iter_mut().zip(["q", "k"]) {
            let rotary = Op::RotaryEmbedding {
                interleaved: false,
                num_heads: None,
                rotary_dim: 0,
            };
            let shape = self.graph.shape(*x).expect("heads are typed").clone();
            let inputs = [*x, tables[0], tables[1], positions];
            *x = self.float(&n(&format!("self_attn.{part}_rope")), rotary, &inputs, shape);
        }
        let [q, k, v] = qkv;
        let [k, v] = [(k, caches[0], CachePart::Key), (v, caches[1], CachePart::Value)].map(|(x, cache, part)| {
            let scatter = Op::TensorScatter {
                axis: 2,
                circular: false,
            };
            let shape = self.graph.shape(cache).expect("inputs are typed").clone();
            let name = Role::UpdatedCache(CacheId { layer: i, part }).name();
            let written = self.float(&name, scatter, &[cache, x, at], shape);
            updated.push(written);
            written
        });
        let attention = Op::Attention(Attention {
            is_causal: false,
            scale: None,
            softcap: c.softcap,
            q_num_heads: None,
            kv_num_heads: None,
            softmax_precision: None,
        });
        let by_head = self.graph.shape(q).expect("heads are typed").clone();
        let a = self.float(&n("self_attn"), attention, &[q, k, v, mask], by_head.clone());
        let by_token = [0, 2, 1, 3].map(|axis: usize| by_head[axis].clone()).to_vec();
        let perm = Some(vec![0, 2, 1, 3]);
        let a = self.float(&n("self_attn/by_token"), Op::Transpose { perm }, &[a], by_token);
        let to = self.graph.add_i64(&n("self_attn/shape"), &[0, 0, width as i64]);
        let shape = self.row(width);
        let a = self.float(
            &n("self_attn/joined"),
            Op::Reshape { allowzero: false },
            &[a, to],
            shape,
        );
        let o = self.linear(&n("self_attn.o_proj"), a, width, c.hidden);
        let x = self.float(&n("residual"), Op::Binary(Binary::Add), &[x, o], hidden.clone());

        let h = self.rms_norm(&n("post_attention_layernorm"), x, c.hidden, hidden.clone());
        let gate = self.linear(&n("mlp.gate_proj"), h, c.hidden, c.ffn);
        let up = self.linear(&n("mlp.up_proj"), h, c.hidden, c.ffn);
        let wide = self.row(c.ffn);
        let gate = self.float(&n("mlp.act"), Op::Swish { alpha: 1.0 }, &[gate], wide.clone());
        let gated = self.float(&n("mlp.gated"), Op::Binary(Binary::Mul), &[gate, up], wide);
        let down = self.linear(&n("mlp.down_proj"), gated, c.ffn, c.hidden);
        self.float(&n("output"), Op::Binary(Binary::Add), &[x, down], hidden)
    }
}
