//! Lapidary's own layers against their definition in f64: on the CPU in expanded form, and with
//! `LAPIDARY_TEST_BACKEND=tensorrt` as kernels on the GPU.

use lapidary::dim::Dim;
use lapidary::graph::op::Op;
use lapidary::graph::{Constant, Graph};
use lapidary::lower::{LowerOptions, lower_graph};
use lapidary::network::{
    DecodeAttention, LayerKind, Logits, Network, NetworkBuilder, ProductPart, Profile, Rotation, RowActivation,
    RowProduct,
};
use lapidary::tensor::quantized::Granularity;
use lapidary::tensor::{DType, Tensor};

use super::quantized::Weight;
use super::support::{Random, assert_close, dims, every_option, outputs};

const HALVES: [DType; 2] = [DType::F16, DType::Bf16];

/// The rounding error of a type, relative to the largest element of a result and of its inputs.
fn tolerance(dtype: DType) -> f64 {
    match dtype {
        DType::F16 => 2e-3,
        DType::Bf16 => 1.6e-2,
        _ => 1e-4,
    }
}

fn largest(values: &[f64]) -> f64 {
    values.iter().fold(0.0, |most, v| v.abs().max(most))
}

/// `x [k] · wᵀ [n, k]`.
fn product(x: &[f64], w: &[f64]) -> Vec<f64> {
    let rows = w.chunks(x.len());
    rows.map(|row| row.iter().zip(x).map(|(w, x)| w * x).sum()).collect()
}

/// Every form of weights that the lowering passes to kernels, all in one network.
#[test]
fn products_of_every_form_of_weights() {
    for dtype in HALVES {
        for (n, k) in [(40, 128), (37, 384), (8, 1152)] {
            let mut random = Random::new(k as u64);
            let mut forms: Vec<(String, Option<Weight>, Tensor)> = Vec::new();
            let floats = random.floats(dtype, &[n, k], 0.2);
            forms.push(("floats".into(), None, floats));
            let by_row = Granularity::Channel { axis: 0 };
            let block = |size| Granularity::Block { axis: 1, size };
            let mut all = vec![(DType::I8, by_row, false)];
            for (codes, sizes) in [(DType::I8, &[32, 64, 128][..]), (DType::I4, &[16, 32, 64, 128])] {
                let unsigned = if codes == DType::I8 { DType::U8 } else { DType::U4 };
                for size in sizes {
                    all.extend([(codes, block(*size), false), (codes, block(*size), true)]);
                    all.push((unsigned, block(*size), true));
                }
            }
            for (codes, granularity, zeros) in all {
                let weight = Weight::random(&mut random, codes, dtype, &[n, k], granularity, zeros);
                let values = Tensor::from_f64_as(DType::F64, vec![n, k], &weight.values());
                forms.push((format!("{codes} {granularity} {zeros}"), Some(weight), values));
            }
            let rows = [1, 3, 16][(n + k) % 3];
            let x = random.floats(dtype, &[rows, 1, k], 1.0);
            let mut graph = Graph::new("products");
            let input = graph.add_input("x", dtype, dims(&[rows, 1, k]));
            for (i, (_, weight, values)) in forms.iter().enumerate() {
                let constant = weight
                    .as_ref()
                    .map_or_else(|| Constant::tensor(values.clone()), Weight::constant);
                let name = format!("w{i}");
                let weight = graph.add_constant(&name, constant.with_origin(&name));
                let perm = Some(vec![1, 0]);
                let turned = graph.add_node(&format!("t{i}"), Op::Transpose { perm }, &[weight]);
                let y = graph.add_node(&format!("y{i}"), Op::MatMul, &[input, turned]);
                graph.outputs.push(y);
            }
            let network = lowered(&graph, rows);
            let kernels = network
                .layers
                .iter()
                .filter(|layer| matches!(layer.kind, LayerKind::RowProduct(_)));
            assert_eq!(kernels.count(), forms.len(), "{n} {k}");
            let found = outputs(&network, &[("x", x.clone())], &every_option().pop().unwrap());
            for ((name, _, values), found) in forms.iter().zip(found) {
                let x = x.to_f64();
                let expected: Vec<f64> = x.chunks(k).flat_map(|x| product(x, &values.to_f64())).collect();
                let what = format!("{dtype} {name} {rows} {n} {k}");
                assert_close(&found, &expected, largest(&expected), tolerance(dtype), &what);
            }
        }
    }
}

fn lowered(graph: &Graph, rows: usize) -> Network {
    let options = LowerOptions {
        kernels: true,
        ..LowerOptions::default()
    };
    let profile = Profile {
        batch: rows,
        logits: Logits::All,
        ..Profile::decode(16)
    };
    lower_graph(graph, &profile, &options).unwrap_or_else(|error| panic!("{error}"))
}

fn activated(kind: RowActivation, x: f64) -> f64 {
    // Abramowitz and Stegun 7.1.26, within 1.5e-7.
    let erf = |x: f64| {
        let t = 1.0 / (1.0 + 0.3275911 * x.abs());
        let sum = ((((1.061405429 * t - 1.453152027) * t + 1.421413741) * t - 0.284496736) * t + 0.254829592) * t;
        (1.0 - sum * (-x * x).exp()).copysign(x)
    };
    match kind {
        RowActivation::None => x,
        RowActivation::Silu => x / (1.0 + (-x).exp()),
        RowActivation::GeluErf => x / 2.0 * (1.0 + erf(x / 2f64.sqrt())),
        RowActivation::GeluTanh => {
            x / 2.0 * (1.0 + ((2.0 / std::f64::consts::PI).sqrt() * (x + 0.044715 * x.powi(3))).tanh())
        }
        RowActivation::Relu => x.max(0.0),
        RowActivation::ReluSquared => x.max(0.0).powi(2),
    }
}

/// `x / sqrt(mean(x²) + epsilon) * weight`.
fn normalized(x: &[f64], weight: &[f64], epsilon: f32) -> Vec<f64> {
    let mean = x.iter().map(|x| x * x).sum::<f64>() / x.len() as f64;
    let root = (mean + f64::from(epsilon)).sqrt();
    x.iter().zip(weight).map(|(x, w)| x / root * w).collect()
}

/// Norms, biases, activations, gates, residuals and several matrices in all valid combinations.
#[test]
fn products_with_all_that_stands_around_them() {
    use RowActivation::{GeluErf, GeluTanh, None, Relu, ReluSquared, Silu};
    let mut case = 0u64;
    for activation in [None, Silu, GeluErf, GeluTanh, Relu, ReluSquared] {
        for (matrices, gated) in [(1, false), (2, false), (3, false), (2, true)] {
            // Each of the other choices is combined with each of these, in one of the two types.
            for bits in 0..16u64 {
                case += 1;
                let flag = |bit: u64| bits >> bit & 1 == 1;
                let layer = RowProduct {
                    parts: vec![
                        ProductPart {
                            codes: Option::None,
                            bias: flag(0)
                        };
                        matrices
                    ],
                    norm: flag(1).then_some(1e-5),
                    activation,
                    gated,
                    residual: flag(2),
                    to_f32: flag(3),
                };
                let odd = bits.count_ones() as u64 + case / 16;
                check_product(HALVES[(odd % 2) as usize], &layer, case);
            }
        }
    }
}

fn check_product(dtype: DType, layer: &RowProduct, seed: u64) {
    let mut random = Random::new(seed);
    let k = 8 * (1 + random.below(40));
    let rows_of_x = [1, 1, 2, 8, 11, 16][random.below(6)];
    let rows: Vec<usize> = (0..layer.parts.len()).map(|_| 1 + random.below(70)).collect();
    let rows = if layer.gated { vec![rows[0]; 2] } else { rows };
    let width: usize = if layer.gated { rows[0] } else { rows.iter().sum() };
    let mut tensors = vec![random.floats(dtype, &[rows_of_x, 1, k], 1.0)];
    tensors.extend(layer.norm.map(|_| random.floats(dtype, &[k], 1.0)));
    let residual = layer
        .residual
        .then(|| random.floats(dtype, &[rows_of_x, 1, width], 1.0));
    tensors.extend(residual);
    for (part, n) in layer.parts.iter().zip(&rows) {
        tensors.push(random.floats(dtype, &[*n, k], 0.2));
        tensors.extend(part.bias.then(|| random.floats(dtype, &[*n], 1.0)));
    }
    let act = |values: &[f64]| -> Vec<f64> { values.iter().map(|v| activated(layer.activation, *v)).collect() };
    let (mut expected, mut all_sums) = (Vec::new(), Vec::new());
    for row in 0..rows_of_x {
        let mut next = tensors.iter().map(Tensor::to_f64);
        let mut x = next.next().unwrap()[row * k..(row + 1) * k].to_vec();
        if let Some(epsilon) = layer.norm {
            let weight = next.next().unwrap();
            let exact = normalized(&x, &weight, epsilon);
            x = Tensor::from_f64_as(dtype, vec![k], &exact).to_f64();
        }
        let residual = layer.residual.then(|| next.next().unwrap());
        let mut sums = Vec::new();
        for part in &layer.parts {
            let mut sum = product(&x, &next.next().unwrap());
            if part.bias {
                sum = sum.iter().zip(next.next().unwrap()).map(|(s, b)| s + b).collect();
            }
            sums.push(sum);
        }
        let mut y: Vec<f64> = match layer.gated {
            true => act(&sums[0]).iter().zip(&sums[1]).map(|(g, u)| g * u).collect(),
            false => sums.iter().flat_map(|sum| act(sum)).collect(),
        };
        if let Some(residual) = residual {
            let residual = &residual[row * width..];
            y.iter_mut().zip(residual).for_each(|(y, r)| *y += r);
        }
        expected.extend(y);
        all_sums.extend(sums.concat());
    }
    let mut b = NetworkBuilder::new("product", Profile::decode(16));
    let names: Vec<String> = (0..tensors.len()).map(|i| format!("x{i}")).collect();
    let ids: Vec<_> = names
        .iter()
        .zip(&tensors)
        .map(|(name, tensor)| b.input(name, tensor.dtype(), &dims(tensor.shape())).unwrap())
        .collect();
    let y = b.add("layer", LayerKind::RowProduct(layer.clone()), &ids).unwrap();
    b.output("y", y).unwrap();
    let network = b.finish().unwrap();
    let inputs: Vec<(&str, Tensor)> = names.iter().map(String::as_str).zip(tensors.iter().cloned()).collect();
    // If the norm rounds in the other direction, sums differ by that amount.
    let tolerance = match (layer.to_f32, layer.norm) {
        (true, None) => 1e-4,
        _ => tolerance(dtype),
    };
    let options = every_option().pop().unwrap();
    let found = outputs(&network, &inputs, &options).remove(0);
    let magnitude = largest(&all_sums).max(largest(&expected)).max(1.0);
    assert_close(
        &found,
        &expected,
        magnitude,
        tolerance,
        &format!("{dtype} {layer:?} {rows_of_x} {k} {rows:?}"),
    );
}

/// Variants of an attention besides its heads.
#[derive(Clone, Copy, Debug)]
struct Case {
    heads: usize,
    kv_heads: usize,
    head_dim: usize,
    /// Tokens in the cache, of each sequence.
    past: &'static [usize],
    layer: DecodeAttention,
}

#[test]
fn attention_of_one_token() {
    let mut random = Random::new(5);
    let grouped = [(1, 1), (4, 2), (9, 3), (12, 1), (16, 16)];
    let mut cases = 0;
    for (i, dtype) in HALVES.into_iter().enumerate() {
        for (j, (heads, kv_heads)) in grouped.into_iter().enumerate() {
            // Each size with each grouping, in one of the two types.
            for head_dim in DecodeAttention::HEAD_SIZES.into_iter().skip((i + j) % 2).step_by(2) {
                let past: [&[usize]; 9] = [
                    &[0],
                    &[1],
                    &[15],
                    &[16],
                    &[17],
                    &[40],
                    &[129],
                    &[3, 80],
                    &[0, 129, 15, 64, 63],
                ];
                let past = past[random.below(past.len())];
                let chance = |random: &mut Random| random.below(2) == 0;
                let dim = [head_dim, head_dim / 2][random.below(2)];
                let layer = DecodeAttention {
                    heads,
                    kv_heads,
                    packed: chance(&mut random),
                    rotation: (random.below(3) > 0).then(|| Rotation {
                        rotary_dim: dim,
                        interleaved: random.below(2) == 0,
                    }),
                    query_norm: chance(&mut random),
                    key_norm: chance(&mut random),
                    epsilon: 1e-6,
                    window: (random.below(3) == 0).then(|| 1 + random.below(40)),
                    scale: 0.1 + random.below(10) as f32 / 20.0,
                    soft_cap: (random.below(3) == 0).then_some(2.5),
                    sinks: random.below(3) == 0,
                };
                let case = Case {
                    heads,
                    kv_heads,
                    head_dim,
                    past,
                    layer,
                };
                check_attention(dtype, &case, &mut random);
                cases += 1;
            }
        }
    }
    assert_eq!(cases, 5 * 11);
}

fn check_attention(dtype: DType, case: &Case, random: &mut Random) {
    const CAPACITY: usize = 160;
    let Case {
        heads,
        kv_heads,
        head_dim: d,
        past,
        layer,
    } = *case;
    let widths = [heads * d, kv_heads * d, kv_heads * d];
    let sequences = past.len();
    let mut named: Vec<(String, Tensor)> = Vec::new();
    let mut give = |name: &str, tensor: Tensor| {
        named.push((name.to_string(), tensor.clone()));
        tensor.to_f64()
    };
    // Of each sequence.
    let qkv: [Vec<Vec<f64>>; 3] = if layer.packed {
        let all = give("qkv", random.floats(dtype, &[sequences, 1, widths.iter().sum()], 1.0));
        let rows = || all.chunks(widths.iter().sum());
        let part = |at: usize, width: usize| rows().map(|row| row[at..at + width].to_vec()).collect();
        [
            part(0, widths[0]),
            part(widths[0], widths[1]),
            part(widths[0] + widths[1], widths[2]),
        ]
    } else {
        [("q", 0), ("k", 1), ("v", 2)].map(|(name, i)| {
            let all = give(name, random.floats(dtype, &[sequences, 1, widths[i]], 1.0));
            all.chunks(widths[i]).map(<[f64]>::to_vec).collect()
        })
    };
    let cache_shape = [sequences, kv_heads, CAPACITY, d];
    let mut keys = give("keys", random.floats(dtype, &cache_shape, 1.0));
    let mut values = give("values", random.floats(dtype, &cache_shape, 1.0));
    let places: Vec<i32> = past.iter().map(|past| *past as i32).collect();
    give("write_indices", Tensor::from_i32(vec![sequences], &places));
    let table = layer.rotation.map(|rotation| {
        give("positions", Tensor::from_i32(vec![sequences, 1], &places));
        let half = rotation.rotary_dim / 2;
        let angles: Vec<f64> = (0..CAPACITY * half)
            .map(|i| (i / half) as f64 / (1.0 + (i % half) as f64))
            .collect();
        let of = |f: fn(f64) -> f64| -> Tensor {
            let numbers: Vec<f32> = angles.iter().map(|a| f(*a) as f32).collect();
            Tensor::from_f32(vec![CAPACITY, half], &numbers)
        };
        [give("cosines", of(f64::cos)), give("sines", of(f64::sin))]
    });
    let query_norm = layer
        .query_norm
        .then(|| give("query_norm", random.floats(dtype, &[d], 1.0)));
    let key_norm = layer
        .key_norm
        .then(|| give("key_norm", random.floats(dtype, &[d], 1.0)));
    let sinks = layer
        .sinks
        .then(|| give("sinks", random.floats(DType::F32, &[heads], 1.0)));

    let round = |x: &[f64]| Tensor::from_f64_as(dtype, vec![x.len()], x).to_f64();
    let operand = |head: &[f64], norm: &Option<Vec<f64>>, past: usize| -> Vec<f64> {
        let mut x = match norm {
            Some(weight) => normalized(head, weight, layer.epsilon),
            None => head.to_vec(),
        };
        if let (Some(rotation), Some([cosines, sines])) = (layer.rotation, &table) {
            let half = rotation.rotary_dim / 2;
            for i in 0..half {
                let (a, b) = if rotation.interleaved {
                    (2 * i, 2 * i + 1)
                } else {
                    (i, i + half)
                };
                let (c, s) = (cosines[past * half + i], sines[past * half + i]);
                (x[a], x[b]) = (x[a] * c - x[b] * s, x[b] * c + x[a] * s);
            }
        }
        round(&x)
    };
    let mut expected = Vec::new();
    for (sequence, past) in past.iter().copied().enumerate() {
        let [q, k, v] = qkv.each_ref().map(|of| &of[sequence]);
        let slot = |head: usize, slot: usize| {
            let at = ((sequence * kv_heads + head) * CAPACITY + slot) * d;
            at..at + d
        };
        for head in 0..kv_heads {
            let of_head = head * d..(head + 1) * d;
            keys[slot(head, past)].copy_from_slice(&operand(&k[of_head.clone()], &key_norm, past));
            values[slot(head, past)].copy_from_slice(&v[of_head]);
        }
        for head in 0..heads {
            let query = operand(&q[head * d..(head + 1) * d], &query_norm, past);
            let kv = head / (heads / kv_heads);
            let first = layer.window.map_or(0, |window| (past + 1).saturating_sub(window));
            let mut scores: Vec<f64> = (first..=past)
                .map(|s| {
                    let dot: f64 = query.iter().zip(&keys[slot(kv, s)]).map(|(q, k)| q * k).sum();
                    let score = dot * f64::from(layer.scale);
                    layer
                        .soft_cap
                        .map_or(score, |cap| f64::from(cap) * (score / f64::from(cap)).tanh())
                })
                .collect();
            scores.extend(sinks.as_ref().map(|sinks| sinks[head]));
            let most = scores.iter().copied().fold(f64::MIN, f64::max);
            let shares: Vec<f64> = scores.iter().map(|s| (s - most).exp()).collect();
            let sum: f64 = shares.iter().sum();
            for i in 0..d {
                let of_slot = |s: usize| shares[s - first] / sum * values[slot(kv, s)][i];
                expected.push((first..=past).map(of_slot).sum());
            }
        }
    }

    let mut b = NetworkBuilder::new("attention", Profile::decode(CAPACITY));
    let ids: Vec<_> = named
        .iter()
        .map(|(name, tensor)| b.input(name, tensor.dtype(), &dims(tensor.shape())).unwrap())
        .collect();
    let given = b
        .add_with_outputs("attention", LayerKind::DecodeAttention(layer), &ids)
        .unwrap();
    for (name, id) in ["result", "updated_keys", "updated_values"].into_iter().zip(given) {
        b.output(name, id).unwrap();
    }
    let network = b.finish().unwrap();
    assert_eq!(
        network.tensor(network.outputs[0]).shape,
        [sequences, 1, heads * d].map(Dim::from)
    );
    let inputs: Vec<(&str, Tensor)> = named
        .iter()
        .map(|(name, tensor)| (name.as_str(), tensor.clone()))
        .collect();
    let what = format!("{dtype} {case:?}");
    let options = every_option().pop().unwrap();
    let found = outputs(&network, &inputs, &options);
    assert_close(&found[0], &expected, 1.0, tolerance(dtype), &what);
    // The new slot may round in the other direction; the others are unchanged.
    assert_close(&found[1], &keys, 1.0, tolerance(dtype), &what);
    assert_close(&found[2], &values, 1.0, 0.0, &what);
}
