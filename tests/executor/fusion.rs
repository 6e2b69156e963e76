//! Layers together: fused chains, results needed twice, arena reuse, weights that are views.

use lapidary::backend::cpu::execute;
use lapidary::graph::Constant;
use lapidary::help::Help;
use lapidary::network::{
    Activation, Elementwise, LayerKind, Network, NetworkBuilder, ReduceOp, TensorId, UnaryOp, WeightMode,
};
use lapidary::tensor::{DType, Tensor};
use proptest::prelude::*;

use super::reference::{Value, evaluate};
use super::support::{Random, assert_close, builder, dims, every_option};

/// Runs a network layer by layer from the definitions.
fn interpret(network: &Network, inputs: &[(&str, Tensor)]) -> Vec<Value> {
    let mut values: Vec<Option<Value>> = vec![None; network.tensors.len()];
    for id in &network.inputs {
        let name = &network.tensor(*id).name;
        let tensor = &inputs.iter().find(|(n, _)| n == name).unwrap().1;
        values[id.0 as usize] = Some(Value::from(tensor));
    }
    for layer in &network.layers {
        let value = match &layer.kind {
            LayerKind::Weight(id) => Value::from(&network.weight(*id).constant.materialize().unwrap()),
            LayerKind::Constant(tensor) => Value::from(tensor),
            LayerKind::Fill { length, start, step } => Value {
                dtype: network.tensor(layer.outputs[0]).dtype,
                shape: vec![length.as_const().unwrap() as usize],
                data: (0..length.as_const().unwrap())
                    .map(|i| start + step * i as f64)
                    .collect(),
            },
            kind => {
                let arguments: Vec<Value> = layer
                    .inputs
                    .iter()
                    .map(|i| values[i.0 as usize].clone().unwrap())
                    .collect();
                evaluate(kind, &arguments)
            }
        };
        values[layer.outputs[0].0 as usize] = Some(value);
    }
    network
        .outputs
        .iter()
        .map(|id| values[id.0 as usize].clone().unwrap())
        .collect()
}

fn check(network: &Network, inputs: &[(&str, Tensor)], tolerance: f64) {
    let want = interpret(network, inputs);
    for options in every_option() {
        let got = execute(network, inputs, &options).unwrap();
        for ((name, got), want) in got.iter().zip(&want) {
            assert_eq!(
                (got.dtype(), got.shape()),
                (want.dtype, want.shape.as_slice()),
                "{name}"
            );
            assert_close(got, &want.data, 1.0, tolerance, &format!("{name}, {options:?}"));
        }
    }
}

fn rms_norm(b: &mut NetworkBuilder, x: TensorId, scale: TensorId) -> TensorId {
    let rank = b.rank(x);
    let wide = b.cast("wide", DType::F32, x).unwrap();
    let square = b.elementwise("square", Elementwise::Prod, wide, wide).unwrap();
    let mean = LayerKind::Reduce {
        op: ReduceOp::Avg,
        axes: vec![rank - 1],
        keep_dims: true,
    };
    let mean = b.add("mean", mean, &[square]).unwrap();
    let epsilon = b.number("epsilon", DType::F32, rank, 1e-5).unwrap();
    let sum = b.elementwise("plus epsilon", Elementwise::Sum, mean, epsilon).unwrap();
    let root = b.unary("root", UnaryOp::Sqrt, sum).unwrap();
    let normal = b.elementwise("normal", Elementwise::Div, wide, root).unwrap();
    let normal = b.cast("narrow", b.dtype(x), normal).unwrap();
    b.elementwise("scaled", Elementwise::Prod, normal, scale).unwrap()
}

/// Two MLP blocks with norms and residuals, as in a decoder.
#[test]
fn a_decoder_mlp() {
    for dtype in [DType::F32, DType::F16, DType::Bf16] {
        for tokens in [1, 5, 21] {
            let mut random = Random::new(41);
            let mut b = builder();
            let input = b.input("x", dtype, &dims(&[1, tokens, 48])).unwrap();
            let mut x = input;
            for i in 0..2 {
                let mut weight = |b: &mut NetworkBuilder, name: &str, shape: &[usize]| {
                    let tensor = random.floats(dtype, shape, 0.3);
                    let id = b
                        .weight(&format!("{name}{i}"), Constant::tensor(tensor), WeightMode::Embed)
                        .unwrap();
                    b.raise("raised", id, 3).unwrap()
                };
                let scale = weight(&mut b, "scale", &[48]);
                let (gate, up, down) = (
                    weight(&mut b, "gate", &[80, 48]),
                    weight(&mut b, "up", &[80, 48]),
                    weight(&mut b, "down", &[48, 80]),
                );
                let normal = rms_norm(&mut b, x, scale);
                let gate = b.linear("gated", normal, gate).unwrap();
                let sigmoid = b.activation("sigmoid", Activation::Sigmoid, gate).unwrap();
                let silu = b.elementwise("silu", Elementwise::Prod, gate, sigmoid).unwrap();
                let up = b.linear("upped", normal, up).unwrap();
                let both = b.elementwise("both", Elementwise::Prod, silu, up).unwrap();
                let down = b.linear("downed", both, down).unwrap();
                x = b.elementwise("residual", Elementwise::Sum, x, down).unwrap();
            }
            let y = b.cast("y32", DType::F32, x).unwrap();
            let y = if dtype == DType::F32 {
                b.unary("same", UnaryOp::Neg, y).unwrap()
            } else {
                y
            };
            b.output("y", y).unwrap();
            let network = b.finish().unwrap();
            let x = random.floats(dtype, &[1, tokens, 48], 1.0);
            check(&network, &[("x", x)], 1e-4);
        }
    }
}

/// The canonical causal mask with a window, from positions.
#[test]
fn a_mask_made_of_comparisons() {
    for tokens in [1, 7, 40] {
        let (capacity, window) = (300, 20);
        let mut b = builder();
        let positions = b.input("position_ids", DType::I32, &dims(&[1, tokens])).unwrap();
        let slots = b.fill("slots", DType::I32, capacity.into(), 0.0, 1.0).unwrap();
        let slots = b.reshape("slots4", slots, dims(&[1, 1, 1, capacity])).unwrap();
        let queries = b.reshape("queries", positions, dims(&[1, 1, tokens, 1])).unwrap();
        let after = b.elementwise("after", Elementwise::Greater, slots, queries).unwrap();
        let causal = b.unary("causal", UnaryOp::Not, after).unwrap();
        let width = b.number("window", DType::I32, 4, f64::from(window)).unwrap();
        let first = b.elementwise("first", Elementwise::Sub, queries, width).unwrap();
        let recent = b.elementwise("recent", Elementwise::Greater, slots, first).unwrap();
        let mask = b.elementwise("mask", Elementwise::And, causal, recent).unwrap();
        b.output("mask", mask).unwrap();
        let network = b.finish().unwrap();
        let positions: Vec<i32> = (0..tokens as i32).map(|t| t + 11).collect();
        check(
            &network,
            &[("position_ids", Tensor::from_i32(vec![1, tokens], &positions))],
            0.0,
        );
    }
}

#[test]
fn outputs_that_are_inputs_constants_views_or_the_same() {
    let mut b = builder();
    let x = b.input("x", DType::F32, &dims(&[2, 3])).unwrap();
    let shared = b.unary("negative", UnaryOp::Neg, x).unwrap();
    let turned = b.transpose("turned", shared, &[1, 0]).unwrap();
    let constant = b.constant("constant", Tensor::from_i32(vec![2], &[4, 5])).unwrap();
    let half = b.cast("half", DType::F16, shared).unwrap();
    let double = b.elementwise("double", Elementwise::Sum, shared, shared).unwrap();
    let copy = LayerKind::Shuffle {
        first: None,
        reshape: None,
        second: None,
    };
    let copy = b.add("copy", copy, &[x]).unwrap();
    for (name, id) in [
        ("a", shared),
        ("b", turned),
        ("c", constant),
        ("d", half),
        ("e", double),
        ("f", copy),
    ] {
        b.output(name, id).unwrap();
    }
    let network = b.finish().unwrap();
    check(
        &network,
        &[("x", Random::new(42).floats(DType::F32, &[2, 3], 1.0))],
        1e-3,
    );
}

/// One element per row, repeated along it by a slice, counts with the row's length in a reduction.
#[test]
fn an_expanded_column_is_a_row() {
    let mut b = builder();
    let x = b.input("x", DType::F32, &dims(&[3, 1])).unwrap();
    let y = b.input("y", DType::F32, &dims(&[3, 40])).unwrap();
    let expand = LayerKind::Slice {
        start: vec![0, 0],
        size: dims(&[3, 40]),
        stride: vec![1, 0],
    };
    let wide = b.add("wide", expand, &[x]).unwrap();
    for (name, op) in [("sum", ReduceOp::Sum), ("product", ReduceOp::Prod)] {
        let kind = LayerKind::Reduce {
            op,
            axes: vec![1],
            keep_dims: true,
        };
        let sum = b.add(name, kind, &[wide]).unwrap();
        let scaled = b.elementwise("scaled", Elementwise::Prod, y, sum).unwrap();
        b.output(&format!("{name} of x"), scaled).unwrap();
    }
    let softmax = b.add("softmax", LayerKind::Softmax { axis: 1 }, &[wide]).unwrap();
    b.output("s", softmax).unwrap();
    let network = b.finish().unwrap();
    let mut random = Random::new(44);
    let inputs = [
        ("x", random.floats(DType::F32, &[3, 1], 1.0)),
        ("y", random.floats(DType::F32, &[3, 40], 1.0)),
    ];
    check(&network, &inputs, 1e-5);
}

#[test]
fn deferred_weights_are_made_when_compiled() {
    let mut random = Random::new(43);
    let stored = random.floats(DType::F16, &[40, 30], 1.0);
    let constant = Constant::tensor(stored)
        .transposed(&[1, 0])
        .cast(DType::F32)
        .scaled(0.5);
    let mut b = builder();
    let x = b.input("x", DType::F32, &dims(&[2, 40])).unwrap();
    let w = b.weight("w", constant, WeightMode::Bind).unwrap();
    let y = b.linear("y", x, w).unwrap();
    b.output("y", y).unwrap();
    check(
        &b.finish().unwrap(),
        &[("x", random.floats(DType::F32, &[2, 40], 1.0))],
        1e-5,
    );

    let mut b = builder();
    let x = b.input("x", DType::F32, &dims(&[2, 40])).unwrap();
    let w = b
        .weight(
            "head.weight",
            Constant::absent(DType::F32, vec![30, 40]),
            WeightMode::Bind,
        )
        .unwrap();
    let y = b.linear("y", x, w).unwrap();
    b.output("y", y).unwrap();
    let error = execute(&b.finish().unwrap(), &[], &every_option()[0]).unwrap_err();
    assert!(error.help().unwrap().contains("lapidary refit"), "{error}");
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(60) })]
    /// Random graphs of elementwise layers, reductions and reshapes over a few shapes: for any fusion the values equal
    /// those of the layers one by one.
    #[test]
    fn random_graphs(seed in any::<u64>(), layers in 3usize..40) {
        let mut random = Random::new(seed);
        let mut b = builder();
        let n = [1, 3, 17, 40][random.below(4)];
        let t = [1, 2, 9][random.below(3)];
        let x = b.input("x", DType::F32, &dims(&[1, t, n])).unwrap();
        let w = b.constant("w", random.floats(DType::F16, &[1, 1, n], 1.0)).unwrap();
        let mut pool = vec![x, b.cast("w32", DType::F32, w).unwrap()];
        for i in 0..layers {
            let name = format!("l{i}");
            let a = pool[random.below(pool.len())];
            let c = pool[random.below(pool.len())];
            let id = match random.below(9) {
                0 => b.elementwise(&name, Elementwise::Sum, a, c),
                1 => b.elementwise(&name, Elementwise::Prod, a, c),
                2 => b.elementwise(&name, Elementwise::Max, a, c),
                3 => b.activation(&name, Activation::Tanh, a),
                4 => b.unary(&name, UnaryOp::Neg, a),
                5 => b.add(&name, LayerKind::Reduce { op: ReduceOp::Avg, axes: vec![2], keep_dims: true }, &[a]),
                6 => b.add(&name, LayerKind::Softmax { axis: 2 }, &[a]),
                7 => {
                    let shape = b.shape(a).clone();
                    let flat = b.reshape(&name, a, vec![lapidary::dim::Dim::from(1usize), &shape[1] * &shape[2]]).unwrap();
                    let flat = b.activation("tanh", Activation::Tanh, flat).unwrap();
                    b.reshape("back", flat, shape)
                }
                _ => {
                    let greater = b.elementwise("greater", Elementwise::Greater, a, c).unwrap();
                    b.add(&name, LayerKind::Select, &[greater, c, a])
                }
            };
            // Keep values small, so that errors do not grow with depth.
            let id = b.activation("bounded", Activation::Tanh, id.unwrap()).unwrap();
            pool.push(id);
        }
        let last = *pool.last().unwrap();
        b.output("y", last).unwrap();
        if pool.len() > 4 {
            let middle = pool[pool.len() / 2];
            if middle != last && b.output("z", middle).is_err() {
                // An input or the weight: not an output.
            }
        }
        let network = b.finish_pruned().unwrap();
        let x = random.floats(DType::F32, &[1, t, n], 1.0);
        check(&network, &[("x", x)], 1e-4);
    }
}
