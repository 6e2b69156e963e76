//! Quantized weights as layers over their parts, as in engines: products and rows of every kind of codes, scales and
//! blocks, against `dequantize` and a product in f64.

use lapidary::dim::Dim;
use lapidary::graph::op::Op;
use lapidary::graph::{Graph, ValueId};
use lapidary::lower::{LinearForm, LowerOptions, QuantizedForm, lower_graph};
use lapidary::network::{LayerKind, Logits, Network, Profile, WeightMode};
use lapidary::tensor::quantized::Granularity;
use lapidary::tensor::{DType, Tensor};

use super::quantized::{INTEGERS, Weight, product};
use super::support::{Random, every_option, on_tensorrt, outputs};

/// Rows and columns of every weight.
const OUT: usize = 32;
const DEPTH: usize = 64;

fn granularities() -> [Granularity; 6] {
    [
        Granularity::Tensor,
        Granularity::Channel { axis: 0 },
        Granularity::Channel { axis: 1 },
        Granularity::Block { axis: 1, size: 32 },
        Granularity::Block { axis: 1, size: 16 },
        Granularity::Block { axis: 0, size: 16 },
    ]
}

fn every_weight(random: &mut Random, scale: DType) -> Vec<(String, Weight)> {
    let mut all = Vec::new();
    for dtype in INTEGERS.into_iter().chain([DType::F8E4M3Fn, DType::Nf4]) {
        for granularity in granularities() {
            for zeros in [false, true] {
                if zeros && !INTEGERS.contains(&dtype) {
                    continue;
                }
                let weight = Weight::random(random, dtype, scale, &[OUT, DEPTH], granularity, zeros);
                let zeros = if zeros { " with zero points" } else { "" };
                all.push((format!("{dtype} {granularity}{zeros}"), weight));
            }
        }
    }
    all
}

/// What reads the weights.
#[derive(Clone, Copy, PartialEq, Debug)]
enum Reader {
    Product,
    Rows,
}

/// All weights in one graph, each with a reader and its own output.
fn graph(reader: Reader, weights: &[(String, Weight)], x: &Tensor) -> Graph {
    let mut graph = Graph::new("quantized");
    let shape = |tensor: &Tensor| tensor.shape().iter().map(|d| Dim::from(*d)).collect();
    let input = graph.add_input("x0", x.dtype(), shape(x));
    // Every decoder has one; the barrier between a Dequantize layer and a product is computed from it.
    let ids = graph.add_input("ids", DType::I32, vec![Dim::from(1usize)]);
    for (i, (_, weight)) in weights.iter().enumerate() {
        let name = format!("w{i}");
        let constant = weight.constant().with_origin(&name);
        let weight = graph.add_constant(&name, constant);
        let out: ValueId = match reader {
            Reader::Product => {
                let perm = Some(vec![1, 0]);
                let transposed = graph.add_node(&format!("t{i}"), Op::Transpose { perm }, &[weight]);
                graph.add_node(&format!("y{i}"), Op::MatMul, &[input, transposed])
            }
            Reader::Rows => graph.add_node(&format!("y{i}"), Op::Gather { axis: 0 }, &[weight, input]),
        };
        graph.outputs.push(out);
    }
    let kept = graph.add_node("kept", Op::Identity, &[ids]);
    graph.outputs.push(kept);
    graph
}

fn one_id() -> Tensor {
    Tensor::from_i32(vec![1], &[7])
}

fn lowered(graph: &Graph, mode: WeightMode, form: QuantizedForm, reduce_depth: Option<usize>) -> Network {
    let options = LowerOptions {
        weight_mode: mode,
        linear: LinearForm::ReduceRow,
        reduce_depth,
        quantized: form,
        ..LowerOptions::default()
    };
    let profile = Profile {
        logits: Logits::All,
        ..Profile::decode(16)
    };
    lower_graph(graph, &profile, &options).unwrap_or_else(|e| panic!("{e}"))
}

/// Every mode, form and depth at which sums are split.
fn choices() -> Vec<(WeightMode, QuantizedForm, Option<usize>)> {
    let mut all = Vec::new();
    for form in [
        QuantizedForm::Dequantize,
        QuantizedForm::DequantizeApart,
        QuantizedForm::Elementwise,
    ] {
        all.extend([
            (WeightMode::Bind, form, None),
            // Deeper than one sum.
            (WeightMode::Bind, form, Some(DEPTH / 2)),
            (WeightMode::Embed, form, None),
        ]);
    }
    all
}

fn products(dtype: DType, tolerance: f64) {
    let mut random = Random::new(11);
    let weights = every_weight(&mut random, dtype);
    for rows in [1, 3] {
        let x = random.floats(dtype, &[1, rows, DEPTH], 1.0);
        let graph = graph(Reader::Product, &weights, &x);
        for (mode, form, depth) in choices() {
            // TensorRT builds such engines but fails to load some of them, so packages do not use them.
            if on_tensorrt() && rows > 1 && form == QuantizedForm::Dequantize {
                continue;
            }
            let network = lowered(&graph, mode, form, depth);
            let found = outputs(&network, &[("x0", x.clone()), ("ids", one_id())], &every_option()[0]);
            for ((name, weight), found) in weights.iter().zip(found) {
                let (want, size) = product(&x.to_f64(), &weight.values(), [rows, DEPTH, OUT], true);
                for (i, got) in found.to_f64().into_iter().enumerate() {
                    let error = (got - want[i]).abs();
                    assert!(
                        error <= tolerance * size[i],
                        "{name}, {rows} rows, {mode:?} {form:?} {depth:?}: element {i} is {got}, not {}",
                        want[i]
                    );
                }
            }
        }
    }
}

#[test]
fn products_in_f32() {
    products(DType::F32, 2e-6);
}

#[test]
fn products_in_f16() {
    products(DType::F16, 1e-3);
}

#[test]
fn rows_of_tables() {
    let mut random = Random::new(12);
    for (scale, tolerance) in [(DType::F32, 1e-6), (DType::F16, 1e-3), (DType::Bf16, 8e-3)] {
        let weights = every_weight(&mut random, scale);
        let ids = Tensor::from_i32(vec![1, 3], &[5, 0, OUT as i32 - 1]);
        let graph = graph(Reader::Rows, &weights, &ids);
        for (mode, form, depth) in choices() {
            let network = lowered(&graph, mode, form, depth);
            let found = outputs(&network, &[("x0", ids.clone()), ("ids", one_id())], &every_option()[0]);
            for ((name, weight), found) in weights.iter().zip(found) {
                let values = weight.values();
                // Zero points of constants are subtracted from values that are already rounded.
                let largest = values.iter().fold(0.0, |most: f64, v| most.max(v.abs()));
                // Scales of an output of fp16 may be subnormal.
                let least = match (mode, form) {
                    (WeightMode::Bind, QuantizedForm::Elementwise) => largest * 1e-3,
                    _ => largest,
                };
                let rows = ids.to_i64().into_iter();
                let want = rows.flat_map(|row| values[row as usize * DEPTH..][..DEPTH].to_vec());
                for (i, (got, want)) in found.to_f64().into_iter().zip(want).enumerate() {
                    let close = (got - want).abs() <= tolerance * want.abs().max(least);
                    assert!(close, "{name}, {mode:?} {form:?}: element {i} is {got}, not {want}");
                }
            }
        }
    }
}

/// The bound data are codes, with the size in the file, and no copy of the values.
#[test]
fn bound_weights_are_their_codes() {
    let mut random = Random::new(13);
    let weights = every_weight(&mut random, DType::F16);
    let x = random.floats(DType::F16, &[1, 1, DEPTH], 1.0);
    let network = lowered(
        &graph(Reader::Product, &weights, &x),
        WeightMode::Bind,
        QuantizedForm::Elementwise,
        None,
    );
    let bytes = |name: &str| -> usize {
        let own = network
            .weights
            .iter()
            .filter(|w| w.name.split('.').next() == Some(name));
        own.map(|w| w.constant.byte_len()).sum()
    };
    for (i, (name, weight)) in weights.iter().enumerate() {
        let found = bytes(&format!("w{i}"));
        let stored = weight.constant().stored_byte_len();
        match name.starts_with("nf4") {
            true => assert_eq!(found, 2 * OUT * DEPTH, "{name}: values of nf4"),
            // Zero points of less than a byte take one.
            false => assert!(
                found >= stored && found <= stored + OUT * DEPTH / 16,
                "{name}: {found} for {stored}"
            ),
        }
    }
    let codes = |kind: &LayerKind| matches!(kind, LayerKind::Dequantize(_));
    assert!(network.layers.iter().any(|layer| codes(&layer.kind)), "f8 codes");
}
