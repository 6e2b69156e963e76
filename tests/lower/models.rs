//! Canonical graphs with random weights, calls of them, and their results by `graph::eval`.

use std::collections::{BTreeMap, HashMap};

use lapidary::dim::{Dim, Sym};
use lapidary::graph::eval::Evaluator;
use lapidary::graph::op::{Attention, Binary, Op};
use lapidary::graph::{Constant, Graph, ValueId};
use lapidary::lower::synthetic::Decoder;
use lapidary::tensor::{DType, Tensor};

/// Small numbers with no pattern, the same on every run (xorshift).
pub struct Random(u64);

impl Random {
    pub fn new(seed: u64) -> Self {
        Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }
    pub fn unit(&mut self) -> f64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 11) as f64 / (1u64 << 53) as f64 * 2.0 - 1.0
    }
    pub fn tensor(&mut self, dtype: DType, shape: &[usize]) -> Tensor {
        let values: Vec<f64> = (0..shape.iter().product()).map(|_| self.unit()).collect();
        Tensor::from_f64_as(dtype, shape.to_vec(), &values)
    }
    pub fn ids(&mut self, shape: &[usize], below: usize) -> Tensor {
        let values: Vec<i64> = (0..shape.iter().product())
            .map(|_| ((self.unit() + 1.0) / 2.0 * below as f64) as i64 % below as i64)
            .collect();
        Tensor::from_i64(shape.to_vec(), &values)
    }
}

pub fn dims(sizes: &[usize]) -> Vec<Dim> {
    sizes.iter().map(|n| Dim::from(*n)).collect()
}

/// The decoder's graph with random weights.
pub fn decoder(config: &Decoder) -> Graph {
    let mut random = Random::new(7);
    config.graph_with(|_, dtype, shape| Constant::tensor(random.tensor(dtype, &shape)))
}

/// Decoders that cover the cases of a lowering.
pub fn decoders() -> Vec<(&'static str, Decoder)> {
    let tiny = Decoder::tiny;
    vec![
        ("grouped", tiny()),
        ("all_heads", Decoder { kv_heads: 4, ..tiny() }),
        (
            "window",
            Decoder {
                window: Some(3),
                tied: true,
                ..tiny()
            },
        ),
        (
            "qwen3",
            Decoder {
                qk_norm: true,
                ..tiny()
            },
        ),
        (
            "qwen2",
            Decoder {
                qkv_bias: true,
                tied: true,
                ..tiny()
            },
        ),
        (
            "softcap",
            Decoder {
                softcap: 2.0,
                window: Some(4),
                ..tiny()
            },
        ),
        (
            "half",
            Decoder {
                dtype: DType::F16,
                ..tiny()
            },
        ),
        (
            "bfloat",
            Decoder {
                dtype: DType::Bf16,
                head_dim: 32,
                ..tiny()
            },
        ),
    ]
}

/// A GPT-2: positions from a table, LayerNorm with bias, biases everywhere, packed qkv, gelu, weights `[in, out]` of a
/// Conv1D turned by the passes.
pub fn gpt2() -> Graph {
    let (hidden, heads, vocabulary, rows) = (24, 3, 30, 32);
    let mut random = Random::new(11);
    let mut g = Graph::new("gpt2");
    let (batch, tokens) = (Dim::sym(Sym::batch()), Dim::sym(Sym::tokens()));
    let row = vec![batch.clone(), tokens];
    let ids = g.add_input("input_ids", DType::I64, row.clone());
    let positions = g.add_input("position_ids", DType::I64, row);
    let at = g.add_input("write_indices", DType::I64, vec![batch.clone()]);
    let d = hidden / heads;
    let slots = vec![batch, heads.into(), Dim::sym(Sym::capacity()), d.into()];
    let caches = ["key_cache.0", "value_cache.0"].map(|n| g.add_input(n, DType::F32, slots.clone()));
    let mut parameter = |g: &mut Graph, name: &str, shape: &[usize]| {
        let tensor = random.tensor(DType::F32, shape);
        g.add_constant(name, Constant::tensor(tensor).with_origin(name))
    };
    let wte = parameter(&mut g, "wte", &[vocabulary, hidden]);
    let wpe = parameter(&mut g, "wpe", &[rows, hidden]);
    let x = g.add_node("embed", Op::Gather { axis: 0 }, &[wte, ids]);
    let p = g.add_node("positions", Op::Gather { axis: 0 }, &[wpe, positions]);
    let mut x = g.add_node("sum", Op::Binary(Binary::Add), &[x, p]);

    let mut norm = |g: &mut Graph, name: &str, x| {
        let scale = parameter(g, &format!("{name}.weight"), &[hidden]);
        let bias = parameter(g, &format!("{name}.bias"), &[hidden]);
        let op = Op::LayerNormalization {
            axis: -1,
            epsilon: 1e-5,
        };
        g.add_node(name, op, &[x, scale, bias])
    };
    let h = norm(&mut g, "ln_1", x);
    let mut linear = {
        let mut random = Random::new(13);
        move |g: &mut Graph, name: &str, x, from: usize, to: usize| {
            // [in, out] in the export: the pass transposed it.
            let stored =
                Constant::tensor(random.tensor(DType::F32, &[from, to])).with_origin(&format!("{name}.weight"));
            let weight = g.add_constant(&format!("{name}.weight"), stored.transposed(&[1, 0]));
            let bias = Constant::tensor(random.tensor(DType::F32, &[to])).with_origin(&format!("{name}.bias"));
            let bias = g.add_constant(&format!("{name}.bias"), bias);
            let perm = Some(vec![1, 0]);
            let turned = g.add_node(&format!("{name}/transpose"), Op::Transpose { perm }, &[weight]);
            let y = g.add_node(&format!("{name}/matmul"), Op::MatMul, &[x, turned]);
            g.add_node(name, Op::Binary(Binary::Add), &[y, bias])
        }
    };
    let qkv = linear(&mut g, "c_attn", h, hidden, 3 * hidden);
    let parts: Vec<ValueId> = ["q", "k", "v"].iter().map(|n| g.add_value(n)).collect();
    let sizes = g.add_i64("sizes", &[hidden as i64; 3]);
    g.add_node_with_outputs(
        "split",
        Op::Split { axis: -1 },
        vec![Some(qkv), Some(sizes)],
        parts.iter().map(|v| Some(*v)).collect(),
    );
    let by_head = g.add_i64("by_head", &[0, -1, heads as i64, d as i64]);
    let heads_of = |g: &mut Graph, x| {
        let x = g.add_node("heads", Op::Reshape { allowzero: false }, &[x, by_head]);
        let perm = Some(vec![0, 2, 1, 3]);
        g.add_node("by_head", Op::Transpose { perm }, &[x])
    };
    let q = heads_of(&mut g, parts[0]);
    let k = heads_of(&mut g, parts[1]);
    let v = heads_of(&mut g, parts[2]);
    let scatter = || Op::TensorScatter {
        axis: 2,
        circular: false,
    };
    let k = g.add_node("updated_key_cache.0", scatter(), &[caches[0], k, at]);
    let v = g.add_node("updated_value_cache.0", scatter(), &[caches[1], v, at]);
    let mask = {
        let op = Op::Shape { start: 2, end: Some(3) };
        let size = g.add_node("capacity", op, &[caches[0]]);
        let limit = g.add_node("limit", Op::Squeeze, &[size]);
        let zero = g.add_constant("zero", Tensor::from_i64(vec![], &[0]));
        let one = g.add_constant("one", Tensor::from_i64(vec![], &[1]));
        let slots = g.add_node("slots", Op::Range, &[zero, limit, one]);
        let axes = g.add_i64("axes", &[1, 3]);
        let rows = g.add_node("rows", Op::Unsqueeze, &[positions, axes]);
        g.add_node("mask", Op::Binary(Binary::GreaterOrEqual), &[rows, slots])
    };
    let attention = Op::Attention(Attention {
        is_causal: false,
        scale: None,
        softcap: 0.0,
        q_num_heads: None,
        kv_num_heads: None,
        softmax_precision: None,
    });
    let a = g.add_node("attention", attention, &[q, k, v, mask]);
    let perm = Some(vec![0, 2, 1, 3]);
    let a = g.add_node("by_token", Op::Transpose { perm }, &[a]);
    let joined = g.add_i64("joined", &[0, 0, hidden as i64]);
    let a = g.add_node("join", Op::Reshape { allowzero: false }, &[a, joined]);
    let o = linear(&mut g, "c_proj", a, hidden, hidden);
    x = g.add_node("residual", Op::Binary(Binary::Add), &[x, o]);
    let h = norm(&mut g, "ln_2", x);
    let h = linear(&mut g, "c_fc", h, hidden, 4 * hidden);
    let h = g.add_node("gelu", Op::Gelu { tanh: true }, &[h]);
    let h = linear(&mut g, "mlp_proj", h, 4 * hidden, hidden);
    x = g.add_node("output", Op::Binary(Binary::Add), &[x, h]);
    let x = norm(&mut g, "ln_f", x);
    let perm = Some(vec![1, 0]);
    let head = g.add_node("wte/transpose", Op::Transpose { perm }, &[wte]);
    let logits = g.add_node("logits", Op::MatMul, &[x, head]);
    g.outputs = vec![logits, k, v];
    g.set_canonical_interface().unwrap();
    g
}

/// One call of a model: values by input name. i64 as in the graph; converted to i32 for the network.
pub type Call = BTreeMap<String, Tensor>;

/// `tokens` tokens a row after `past` ones (row `b` has `past - b`, so that rows differ), in caches full of noise.
pub fn call(graph: &Graph, seed: u64, batch: usize, past: usize, tokens: usize, capacity: usize) -> Call {
    let mut random = Random::new(seed);
    let start = |b: usize| past.saturating_sub(b) as i64;
    let mut call = Call::new();
    for id in &graph.inputs {
        let value = graph.value(*id);
        let tensor = match value.name.as_str() {
            "input_ids" => random.ids(&[batch, tokens], 30),
            "position_ids" => {
                let positions: Vec<i64> = (0..batch)
                    .flat_map(|b| (0..tokens as i64).map(move |t| start(b) + t))
                    .collect();
                Tensor::from_i64(vec![batch, tokens], &positions)
            }
            "write_indices" => Tensor::from_i64(vec![batch], &(0..batch).map(start).collect::<Vec<_>>()),
            _ => {
                let sizes = [(Sym::batch(), batch), (Sym::capacity(), capacity)].map(|(s, n)| (s, n as i64));
                let shape = value.shape.as_ref().expect("caches have shapes").iter();
                let shape: Vec<usize> = shape.map(|d| d.eval(&sizes.clone().into()).unwrap() as usize).collect();
                random.tensor(value.dtype.unwrap(), &shape)
            }
        };
        call.insert(value.name.clone(), tensor);
    }
    call
}

/// Every output of the graph, by name.
pub fn evaluate(graph: &Graph, call: &Call) -> BTreeMap<String, Tensor> {
    let bindings: HashMap<ValueId, Tensor> = graph
        .inputs
        .iter()
        .map(|id| (*id, call[&graph.value(*id).name].clone()))
        .collect();
    let mut evaluator = Evaluator::new(graph, bindings);
    let values = evaluator.values(&graph.outputs).expect("the graph evaluates");
    let names = graph.outputs.iter().map(|id| graph.value(*id).name.clone());
    names.zip(values).collect()
}

/// The largest difference between two tensors of equal shape.
pub fn difference(a: &Tensor, b: &Tensor) -> f32 {
    assert_eq!(a.shape(), b.shape());
    let pairs = a.to_f32().into_iter().zip(b.to_f32());
    pairs
        .map(|(a, b)| if a == b { 0.0 } else { (a - b).abs() })
        .fold(0.0, |worst, d| if d > worst || d.is_nan() { d } else { worst })
}
