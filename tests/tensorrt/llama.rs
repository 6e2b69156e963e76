//! Whole Llama-shaped networks, weights bound and absent, by hand; the real lowering has its own builds.

use lapidary::dim::Dim;
use lapidary::graph::Constant;
use lapidary::network::{
    Activation, Elementwise, LayerKind, MatrixOp, Network, ReduceOp, Shape, TensorId, Tokens, UnaryOp, WeightMode,
};
use lapidary::tensor::{DType, Tensor};

use crate::net::{Net, build, bytes_of};

#[derive(Clone, Copy)]
struct Llama {
    layers: usize,
    hidden: usize,
    heads: usize,
    kv_heads: usize,
    head_dim: usize,
    ffn: usize,
    vocabulary: usize,
    capacity: usize,
}

const TINY: Llama = Llama {
    layers: 2,
    hidden: 64,
    heads: 4,
    kv_heads: 2,
    head_dim: 16,
    ffn: 128,
    vocabulary: 320,
    capacity: 64,
};

/// Llama-3-8B.
const LARGE: Llama = Llama {
    layers: 32,
    hidden: 4096,
    heads: 32,
    kv_heads: 8,
    head_dim: 128,
    ffn: 14336,
    vocabulary: 128_256,
    capacity: 1024,
};

struct Maker {
    net: Net,
    tokens: Dim,
    c: Llama,
}

impl Maker {
    fn shape(&self, dims: &[usize]) -> Shape {
        // 0 stands for the token dim, which is nowhere empty.
        let dim = |d: &usize| if *d == 0 { self.tokens.clone() } else { Dim::from(*d) };
        dims.iter().map(dim).collect()
    }

    fn add(&mut self, name: String, kind: LayerKind, inputs: &[TensorId], shape: &[usize]) -> TensorId {
        let shape = self.shape(shape);
        self.net.layer(&name, kind, inputs.iter().copied(), DType::F16, shape)
    }

    fn weight(&mut self, name: &str, shape: &[usize]) -> TensorId {
        self.net
            .weight(name, Constant::absent(DType::F16, shape.to_vec()), WeightMode::Bind)
    }

    fn linear(&mut self, x: TensorId, name: String, from: usize, to: usize) -> TensorId {
        let w = self.weight(&format!("{name}.weight"), &[1, to, from]);
        let kind = LayerKind::MatrixMultiply {
            op_a: MatrixOp::None,
            op_b: MatrixOp::Transpose,
        };
        self.add(name, kind, &[x, w], &[1, 0, to])
    }

    fn rms_norm(&mut self, x: TensorId, name: String) -> TensorId {
        let h = self.c.hidden;
        let f32s = |maker: &mut Self, part: &str, kind, inputs: &[TensorId], last| {
            let shape = maker.shape(&[1, 0, last]);
            maker.net.layer(
                &format!("{name}/{part}"),
                kind,
                inputs.iter().copied(),
                DType::F32,
                shape,
            )
        };
        let wide = f32s(self, "wide", LayerKind::Cast { to: DType::F32 }, &[x], h);
        let square = f32s(
            self,
            "square",
            LayerKind::Elementwise(Elementwise::Prod),
            &[wide, wide],
            h,
        );
        let mean = LayerKind::Reduce {
            op: ReduceOp::Avg,
            axes: vec![2],
            keep_dims: true,
        };
        let mean = f32s(self, "mean", mean, &[square], 1);
        let epsilon = self
            .net
            .constant(&format!("{name}/epsilon"), Tensor::from_f32(vec![1, 1, 1], &[1e-5]));
        let shifted = f32s(
            self,
            "shifted",
            LayerKind::Elementwise(Elementwise::Sum),
            &[mean, epsilon],
            1,
        );
        let root = f32s(self, "root", LayerKind::Unary(UnaryOp::Sqrt), &[shifted], 1);
        let normal = f32s(
            self,
            "normal",
            LayerKind::Elementwise(Elementwise::Div),
            &[wide, root],
            h,
        );
        let narrow = self.add(
            format!("{name}/narrow"),
            LayerKind::Cast { to: DType::F16 },
            &[normal],
            &[1, 0, h],
        );
        let w = self.weight(&format!("{name}.weight"), &[1, 1, h]);
        self.add(
            name,
            LayerKind::Elementwise(Elementwise::Prod),
            &[narrow, w],
            &[1, 0, h],
        )
    }

    /// True where a cache slot is not after the token: bool `[1, 1, tokens, capacity]`.
    fn causal_mask(&mut self, positions: TensorId) -> TensorId {
        let capacity = self.c.capacity;
        let slots = Tensor::from_i32(vec![1, 1, 1, capacity], &(0..capacity as i32).collect::<Vec<_>>());
        let slots = self.net.constant("slots", slots);
        let column = LayerKind::Shuffle {
            first: None,
            reshape: Some(self.shape(&[1, 1, 0, 1])),
            second: None,
        };
        let shape = self.shape(&[1, 1, 0, 1]);
        let positions = self
            .net
            .layer("position_column", column, [positions], DType::I32, shape);
        let shape = self.shape(&[1, 1, 0, capacity]);
        let future = LayerKind::Elementwise(Elementwise::Greater);
        let future = self
            .net
            .layer("future", future, [slots, positions], DType::Bool, shape.clone());
        self.net
            .layer("mask", LayerKind::Unary(UnaryOp::Not), [future], DType::Bool, shape)
    }

    fn heads(&mut self, x: TensorId, name: String, count: usize) -> TensorId {
        let d = self.c.head_dim;
        let kind = LayerKind::Shuffle {
            first: None,
            reshape: Some(self.shape(&[1, 0, count, d])),
            second: Some(vec![0, 2, 1, 3]),
        };
        self.add(name, kind, &[x], &[1, count, 0, d])
    }
}

/// Decode or prefill over a static cache, as the lowering makes it; `fold` puts a group's query heads into rows.
fn llama(c: Llama, tokens: Tokens, fold: bool) -> Network {
    let count = match tokens {
        Tokens::Static(n) => Dim::from(n),
        Tokens::Dynamic { .. } => Dim::named("tokens"),
    };
    let mut net = Net::new(tokens);
    net.0.profile.capacity = c.capacity;
    let mut m = Maker { net, tokens: count, c };
    let row = m.shape(&[1, 0]);
    let ids = m.net.input("input_ids", DType::I32, row.clone());
    let positions = m.net.input("position_ids", DType::I32, row);
    let at = m.net.input("write_indices", DType::I32, vec![Dim::from(1usize)]);
    let mask = m.causal_mask(positions);
    let table = [c.capacity, c.head_dim / 2];
    let cos = m.net.constant("cos", bytes_of(DType::F16, &table, |_| 1));
    let sin = m.net.constant("sin", bytes_of(DType::F16, &table, |_| 1));
    let scale = Tensor::from_f64_as(DType::F16, vec![1, 1, 1, 1], &[(c.head_dim as f64).powf(-0.5)]);
    let scale = m.net.constant("scale", scale);
    let embedding = m.weight("embed.weight", &[c.vocabulary, c.hidden]);
    let mut x = m.add(
        "embed".into(),
        LayerKind::Gather { axis: 0 },
        &[embedding, ids],
        &[1, 0, c.hidden],
    );
    let d = c.head_dim;
    for i in 0..c.layers {
        let n = |part: &str| format!("layers.{i}.{part}");
        let h = m.rms_norm(x, n("input_norm"));
        let q = m.linear(h, n("q_proj"), c.hidden, c.heads * d);
        let k = m.linear(h, n("k_proj"), c.hidden, c.kv_heads * d);
        let v = m.linear(h, n("v_proj"), c.hidden, c.kv_heads * d);
        let q = m.heads(q, n("q_heads"), c.heads);
        let k = m.heads(k, n("k_heads"), c.kv_heads);
        let v = m.heads(v, n("v_heads"), c.kv_heads);
        let rope = || LayerKind::RotaryEmbedding {
            interleaved: false,
            rotary_dim: d,
        };
        let q = m.add(n("q_rope"), rope(), &[q, cos, sin, positions], &[1, c.heads, 0, d]);
        let k = m.add(n("k_rope"), rope(), &[k, cos, sin, positions], &[1, c.kv_heads, 0, d]);
        let q = m.add(
            n("q_scaled"),
            LayerKind::Elementwise(Elementwise::Prod),
            &[q, scale],
            &[1, c.heads, 0, d],
        );
        let slots = [1, c.kv_heads, c.capacity, d];
        let mut caches = [k, v];
        for (cache, kind) in caches.iter_mut().zip(["key", "value"]) {
            let shape = m.shape(&slots);
            let old = m.net.input(&format!("{kind}_cache.{i}"), DType::F16, shape);
            let updated = m.add(
                n(&format!("{kind}_update")),
                LayerKind::KvCacheUpdate,
                &[old, *cache, at],
                &slots,
            );
            m.net.0.outputs.push(updated);
            *cache = updated;
        }
        let [k, v] = caches;
        let reshape = |m: &Maker, to: &[usize]| LayerKind::Shuffle {
            first: None,
            reshape: Some(m.shape(to)),
            second: None,
        };
        let a = if fold {
            let rows = [1, c.kv_heads, c.heads / c.kv_heads, d];
            let kind = reshape(&m, &rows);
            let q = m.add(n("fold"), kind, &[q], &rows);
            let a = m.add(n("attention"), LayerKind::Attention, &[q, k, v, mask], &rows);
            let kind = reshape(&m, &[1, c.heads, 1, d]);
            m.add(n("unfold"), kind, &[a], &[1, c.heads, 1, d])
        } else {
            m.add(
                n("attention"),
                LayerKind::Attention,
                &[q, k, v, mask],
                &[1, c.heads, 0, d],
            )
        };
        let merge = LayerKind::Shuffle {
            first: Some(vec![0, 2, 1, 3]),
            reshape: Some(m.shape(&[1, 0, c.heads * d])),
            second: None,
        };
        let a = m.add(n("merge"), merge, &[a], &[1, 0, c.heads * d]);
        let o = m.linear(a, n("o_proj"), c.heads * d, c.hidden);
        let sum = || LayerKind::Elementwise(Elementwise::Sum);
        let prod = || LayerKind::Elementwise(Elementwise::Prod);
        x = m.add(n("attention_residual"), sum(), &[x, o], &[1, 0, c.hidden]);
        let h = m.rms_norm(x, n("post_norm"));
        let gate = m.linear(h, n("gate_proj"), c.hidden, c.ffn);
        let up = m.linear(h, n("up_proj"), c.hidden, c.ffn);
        let open = m.add(
            n("sigmoid"),
            LayerKind::Activation(Activation::Sigmoid),
            &[gate],
            &[1, 0, c.ffn],
        );
        let silu = m.add(n("silu"), prod(), &[gate, open], &[1, 0, c.ffn]);
        let gated = m.add(n("gated"), prod(), &[silu, up], &[1, 0, c.ffn]);
        let down = m.linear(gated, n("down_proj"), c.ffn, c.hidden);
        x = m.add(n("mlp_residual"), sum(), &[x, down], &[1, 0, c.hidden]);
    }
    let x = m.rms_norm(x, "norm".into());
    let logits = m.linear(x, "lm_head".into(), c.hidden, c.vocabulary);
    let shape = m.shape(&[1, 0, c.vocabulary]);
    m.net.out(
        "logits",
        LayerKind::Cast { to: DType::F32 },
        [logits],
        DType::F32,
        shape,
    );
    m.net.0
}

#[test]
fn decode_prefill_and_dynamic_prefill_build() {
    for (tokens, fold) in [
        (Tokens::Static(1), true),
        (Tokens::Static(1), false),
        (Tokens::Static(16), false),
        (
            Tokens::Dynamic {
                min: 1,
                opt: 8,
                max: 32,
            },
            false,
        ),
    ] {
        let plan = build(&Net(llama(TINY, tokens, fold))).unwrap();
        eprintln!("{tokens:?} folded {fold}: {plan:?}");
    }
}

/// `cargo nextest run --run-ignored only -E 'test(llama_8b)' --no-capture`: time and peak memory of the large shape.
#[test]
#[ignore = "half a minute; run it to measure"]
fn llama_8b_builds_without_weights() {
    let dynamic = Tokens::Dynamic {
        min: 1,
        opt: 128,
        max: 512,
    };
    for (tokens, fold) in [
        (Tokens::Static(1), true),
        (Tokens::Static(128), false),
        (dynamic, false),
    ] {
        let plan = build(&Net(llama(LARGE, tokens, fold))).unwrap();
        let status = std::fs::read_to_string("/proc/self/status").unwrap();
        let peak = status.lines().find(|line| line.starts_with("VmHWM")).unwrap();
        eprintln!("{tokens:?} folded {fold}: {plan:?}, {peak}");
    }
}
