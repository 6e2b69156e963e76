//! Top-k, and mixtures of experts: every activation, with and without gates and biases, for one token, few and many,
//! with weights in every float type and quantized.

use lapidary::backend::cpu::{CpuError, Indexed, execute};
use lapidary::graph::Constant;
use lapidary::graph::op::{ExpertActivation, Gating};
use lapidary::network::{Greatest, LayerKind, Network, WeightMode};
use lapidary::tensor::quantized::Granularity;
use lapidary::tensor::{DType, Tensor};

use super::quantized::Weight;
use super::reference::{Value, evaluate};
use super::support::{Random, assert_close, builder, dims, every_option, on_tensorrt, one_layer, run};

#[test]
fn the_greatest_come_first_and_equal_ones_in_their_order() {
    let mut random = Random::new(31);
    for shape in [&[2, 5][..], &[1, 3, 17], &[4, 1, 2, 40]] {
        for k in [1, 2, shape[shape.len() - 1]] {
            for part in [Greatest::Values, Greatest::Indices] {
                let x = random.floats(DType::F32, shape, 3.0);
                let kind = LayerKind::TopK { k, part };
                let want = evaluate(&kind, &[Value::from(&x)]);
                let network = one_layer(kind, std::slice::from_ref(&x));
                for options in every_option() {
                    let got = run(&network, std::slice::from_ref(&x), &options);
                    assert_close(
                        &got,
                        &want.data,
                        1.0,
                        0.0,
                        &format!("{part:?} {k} of {shape:?}, {options:?}"),
                    );
                }
            }
        }
    }
    if on_tensorrt() {
        return;
    }
    let x = Tensor::from_f32(vec![1, 6], &[1.0, f32::NAN, 3.0, 3.0, f32::NEG_INFINITY, 1.0]);
    let kind = LayerKind::TopK {
        k: 5,
        part: Greatest::Indices,
    };
    let network = one_layer(kind, std::slice::from_ref(&x));
    for options in every_option() {
        let got = run(&network, std::slice::from_ref(&x), &options);
        assert_eq!(got.to_i64(), [2, 3, 0, 5, 1]);
    }
}

/// Sizes of a mixture.
#[derive(Clone, Copy, Debug)]
struct Sizes {
    tokens: usize,
    top_k: usize,
    experts: usize,
    width: usize,
    hidden: usize,
    out: usize,
}

/// Variants besides sizes.
#[derive(Clone, Copy, Debug)]
struct How {
    gating: Gating,
    is_gated: bool,
    is_biased: bool,
    dtype: DType,
}

const PLAIN: Gating = Gating {
    activation: ExpertActivation::Swish,
    alpha: 1.0,
    beta: 0.0,
    limit: 0.0,
};

/// x, weights and experts, the experts of a token distinct.
fn tokens(random: &mut Random, sizes: Sizes) -> [Tensor; 3] {
    let Sizes {
        tokens,
        top_k,
        experts,
        width,
        ..
    } = sizes;
    let mut chosen = Vec::new();
    for _ in 0..tokens {
        let mut all: Vec<i64> = (0..experts as i64).collect();
        for i in 0..top_k {
            let at = i + random.below(experts - i);
            all.swap(i, at);
        }
        chosen.extend(all.into_iter().take(top_k).map(|e| e as i32));
    }
    [
        random.floats(DType::F32, &[1, tokens, width], 1.0),
        random.floats(DType::F32, &[1, tokens, top_k], 1.0),
        Tensor::from_i32(vec![1, tokens, top_k], &chosen),
    ]
}

/// The matrices and biases in the layer's order.
fn weights(random: &mut Random, sizes: Sizes, how: How) -> Vec<Tensor> {
    let Sizes {
        experts,
        width,
        hidden,
        out,
        ..
    } = sizes;
    let mut matrix = |rows: usize, columns: usize| {
        random.floats(
            how.dtype,
            &[experts * rows, columns],
            (1.0 / columns as f64).sqrt() * 2.0,
        )
    };
    let mut all = vec![matrix(hidden, width)];
    if how.is_gated {
        all.push(matrix(hidden, width));
    }
    all.push(matrix(out, hidden));
    if how.is_biased {
        let bias = |random: &mut Random, rows: usize| random.floats(how.dtype, &[experts * rows], 1.0);
        all.push(bias(random, hidden));
        if how.is_gated {
            all.push(bias(random, hidden));
        }
        all.push(bias(random, out));
    }
    all
}

/// A network of one layer of experts whose matrices are weights.
fn network(sizes: Sizes, gating: Gating, inputs: &[Tensor; 3], weights: &[Constant]) -> Network {
    let mut b = builder();
    let mut ids = Vec::new();
    for (i, tensor) in inputs.iter().enumerate() {
        ids.push(
            b.input(&format!("x{i}"), tensor.dtype(), &dims(tensor.shape()))
                .unwrap(),
        );
    }
    if weights[0].dtype() != DType::F32 {
        ids[0] = b.cast("x", weights[0].dtype(), ids[0]).unwrap();
    }
    for (i, weight) in weights.iter().enumerate() {
        ids.push(b.weight(&format!("w{i}"), weight.clone(), WeightMode::Bind).unwrap());
    }
    let kind = LayerKind::Experts {
        experts: sizes.experts,
        gating,
    };
    let y = b.add("experts", kind, &ids).unwrap();
    let y = b.cast("y32", DType::F32, y).unwrap();
    b.output("y", y).unwrap();
    b.finish().unwrap()
}

fn check(sizes: Sizes, how: How, random: &mut Random) {
    let inputs = tokens(random, sizes);
    let weights = weights(random, sizes, how);
    let kind = LayerKind::Experts {
        experts: sizes.experts,
        gating: how.gating,
    };
    let all: Vec<Value> = inputs.iter().chain(&weights).map(Value::from).collect();
    let want = evaluate(&kind, &all);
    let constants: Vec<Constant> = weights.iter().cloned().map(Constant::tensor).collect();
    let network = network(sizes, how.gating, &inputs, &constants);
    // The reference has only one GELU.
    let tolerance = if how.gating.activation == ExpertActivation::Gelu {
        5e-3
    } else {
        2e-5
    };
    let mut by_threads: Vec<Vec<u8>> = Vec::new();
    for options in every_option() {
        let got = run(&network, &inputs, &options);
        assert_close(
            &got,
            &want.data,
            1.0,
            tolerance,
            &format!("{sizes:?} {how:?}, {options:?}"),
        );
        by_threads.push(got.data().to_vec());
    }
    for pair in by_threads.chunks_exact(2) {
        assert!(
            pair[0] == pair[1],
            "{sizes:?} {how:?}: the result depends on the threads"
        );
    }
}

#[test]
fn mixtures_of_all_sizes_and_kinds() {
    if on_tensorrt() {
        return;
    }
    let mut random = Random::new(32);
    let sizes = |tokens, top_k, experts, [width, hidden, out]: [usize; 3]| Sizes {
        tokens,
        top_k,
        experts,
        width,
        hidden,
        out,
    };
    let all = [
        sizes(1, 1, 2, [8, 8, 8]),
        sizes(1, 2, 4, [33, 17, 9]),
        sizes(1, 8, 12, [64, 96, 64]),
        sizes(5, 2, 3, [20, 50, 70]),
        // More rows per expert than the kernels for few rows handle, and experts without any.
        sizes(30, 2, 4, [270, 65, 33]),
        sizes(40, 1, 9, [31, 40, 20]),
    ];
    for sizes in all {
        for dtype in [DType::F32, DType::F16, DType::Bf16] {
            for (is_gated, is_biased) in [(true, false), (false, false), (true, true), (false, true)] {
                let how = How {
                    gating: PLAIN,
                    is_gated,
                    is_biased,
                    dtype,
                };
                check(sizes, how, &mut random);
            }
        }
    }
    for activation in [
        ExpertActivation::Swish,
        ExpertActivation::Gelu,
        ExpertActivation::GeluTanh,
        ExpertActivation::Relu,
        ExpertActivation::ReluSquared,
    ] {
        for is_gated in [true, false] {
            let how = How {
                gating: Gating {
                    activation,
                    alpha: 1.702,
                    beta: if is_gated { 1.0 } else { 0.0 },
                    limit: 0.7,
                },
                is_gated,
                is_biased: true,
                dtype: DType::F32,
            };
            check(sizes(12, 3, 5, [40, 24, 30]), how, &mut random);
        }
    }
}

#[test]
fn quantized_experts_are_read_as_codes() {
    if on_tensorrt() {
        return;
    }
    let mut random = Random::new(33);
    let block = |size| Granularity::Block { axis: 1, size };
    for tokens_ in [1, 3, 30] {
        for (dtype, granularity, zeros) in [
            (DType::I8, Granularity::Channel { axis: 0 }, false),
            (DType::U4, block(32), true),
            (DType::I4, block(16), false),
            (DType::F8E4M3Fn, Granularity::Tensor, false),
            (DType::Nf4, block(64), false),
            // Blocks over rows of two experts: read as values.
            (DType::I8, Granularity::Block { axis: 0, size: 128 }, false),
        ] {
            let sizes = Sizes {
                tokens: tokens_,
                top_k: 2,
                experts: 4,
                width: 64,
                hidden: 96,
                out: 64,
            };
            let inputs = tokens(&mut random, sizes);
            let shapes = [[4 * 96, 64], [4 * 96, 64], [4 * 64, 96]];
            let granularity = |shape: &[usize; 2]| match granularity {
                Granularity::Block { axis: 1, size: 64 } if shape[1] == 96 => Granularity::Block { axis: 1, size: 32 },
                other => other,
            };
            let made: Vec<Weight> = shapes
                .iter()
                .map(|shape| Weight::random(&mut random, dtype, DType::F32, shape, granularity(shape), zeros))
                .collect();
            let constants: Vec<Constant> = made.iter().map(Weight::constant).collect();
            let mut all: Vec<Value> = inputs.iter().map(Value::from).collect();
            all.extend(made.iter().zip(shapes).map(|(weight, shape)| Value {
                dtype: DType::F32,
                shape: shape.to_vec(),
                data: weight.values(),
            }));
            let kind = LayerKind::Experts {
                experts: 4,
                gating: PLAIN,
            };
            let want = evaluate(&kind, &all);
            let scale = want.data.iter().map(|v| v.abs()).fold(1.0, f64::max);
            let network = network(sizes, PLAIN, &inputs, &constants);
            for options in every_option() {
                let got = run(&network, &inputs, &options);
                let what = format!("{tokens_} tokens, {:?}, {options:?}", constants[0]);
                assert_close(&got, &want.data, scale, 3e-5, &what);
            }
        }
    }
}

#[test]
fn an_index_that_is_no_expert_is_named() {
    if on_tensorrt() {
        return;
    }
    let mut random = Random::new(34);
    let sizes = Sizes {
        tokens: 2,
        top_k: 2,
        experts: 3,
        width: 8,
        hidden: 8,
        out: 8,
    };
    let how = How {
        gating: PLAIN,
        is_gated: true,
        is_biased: true,
        dtype: DType::F32,
    };
    let [x, w, _] = tokens(&mut random, sizes);
    let weights = weights(&mut random, sizes, how);
    let constants: Vec<Constant> = weights.into_iter().map(Constant::tensor).collect();
    for bad in [3, -1, i32::MAX] {
        let inputs = [x.clone(), w.clone(), Tensor::from_i32(vec![1, 2, 2], &[0, 1, bad, 2])];
        let network = network(sizes, PLAIN, &inputs, &constants);
        let named: Vec<(&str, Tensor)> = ["x0", "x1", "x2"].into_iter().zip(inputs).collect();
        for options in every_option() {
            let error = execute(&network, &named, &options).unwrap_err();
            let CpuError::Index { what, index, bound, .. } = error else {
                panic!("{error}")
            };
            assert_eq!((what, index, bound), (Indexed::Index, i64::from(bad), 3));
        }
    }
}
