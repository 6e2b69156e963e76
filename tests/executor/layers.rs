//! Layers that compute, each alone, against its definition.

use lapidary::backend::cpu::{CpuError, Program};
use lapidary::dim::Dim;
use lapidary::network::{Activation, Elementwise, LayerKind, ReduceOp, UnaryOp};
use lapidary::tensor::{DType, Tensor};

use super::reference::{Value, evaluate};
use super::support::{Random, assert_close, every_option, on_tensorrt, one_layer, run, side_by_side};

const FLOATS: [DType; 3] = [DType::F32, DType::F16, DType::Bf16];

/// The allowed error of a result rounded to a dtype.
fn rounding(dtype: DType) -> f64 {
    match dtype {
        // TensorRT's softmax of halves is good to ten bits.
        DType::F16 if on_tensorrt() => 2e-3,
        DType::Bf16 if on_tensorrt() => 1.6e-2,
        DType::F16 => 1e-3,
        DType::Bf16 => 8e-3,
        _ => 1e-5,
    }
}

fn map(x: &Tensor, f: impl Fn(f64) -> f64) -> Tensor {
    let values: Vec<f64> = x.to_f64().into_iter().map(f).collect();
    Tensor::from_f64_as(x.dtype(), x.shape().to_vec(), &values)
}

/// Single layers, checked against their definitions: dtype, shape and values.
#[derive(Default)]
pub struct Cases(Vec<(LayerKind, Vec<Tensor>)>);

impl Cases {
    pub fn add(&mut self, kind: LayerKind, inputs: &[Tensor]) {
        self.0.push((kind, inputs.to_vec()));
    }

    /// On the CPU each layer is a network, run on every instruction set. A TensorRT build takes most of a second for
    /// one layer or many, so this many share a network there; the CPU runs that network once too.
    pub fn check(self) {
        if !on_tensorrt() {
            for (kind, inputs) in &self.0 {
                let want = meant(kind, inputs);
                let network = one_layer(kind.clone(), inputs);
                for options in every_option() {
                    let got = run(&network, inputs, &options);
                    compare(&got, &want, &format!("{kind:?} of {inputs:?}, {options:?}"));
                }
            }
        }
        let options = every_option().remove(0);
        for cases in self.0.chunks(24) {
            for ((kind, inputs), got) in cases.iter().zip(side_by_side(cases, &options)) {
                let what = format!("{kind:?} of {inputs:?}, beside others");
                compare(&got, &meant(kind, inputs), &what);
            }
        }
    }
}

fn meant(kind: &LayerKind, inputs: &[Tensor]) -> Value {
    let values: Vec<Value> = inputs.iter().map(Value::from).collect();
    evaluate(kind, &values)
}

fn compare(got: &Tensor, want: &Value, what: &str) {
    assert_eq!(
        (got.dtype(), got.shape()),
        (want.dtype, want.shape.as_slice()),
        "{what}"
    );
    assert_close(got, &want.data, 1.0, rounding(want.dtype), what);
}

/// Operations of both floats and integers.
const ARITHMETIC: [Elementwise; 10] = [
    Elementwise::Sum,
    Elementwise::Sub,
    Elementwise::Prod,
    Elementwise::Div,
    Elementwise::Max,
    Elementwise::Min,
    Elementwise::FloorDiv,
    Elementwise::Equal,
    Elementwise::Greater,
    Elementwise::Less,
];

/// Pairs of shapes that broadcast with every pattern of strides.
pub const PAIRS: [(&[usize], &[usize]); 10] = [
    (&[1], &[1]),
    (&[7], &[7]),
    (&[5, 40], &[5, 40]),
    (&[5, 40], &[1, 40]),
    (&[5, 40], &[5, 1]),
    (&[1, 40], &[5, 1]),
    (&[2, 1, 3, 1], &[1, 4, 1, 9]),
    (&[2, 4, 3, 9], &[1, 1, 1, 1]),
    (&[1, 1, 1, 1], &[1, 1, 1, 1]),
    (&[3, 1, 2500], &[3, 1, 2500]),
];

#[test]
fn elementwise_on_floats() {
    use Elementwise as E;
    let mut cases = Cases::default();
    let mut random = Random::new(1);
    for op in ARITHMETIC {
        for (a, b) in PAIRS {
            for dtype in FLOATS {
                let a = random.floats(dtype, a, 2.0);
                // Not too close to 0, where a quotient may be floored either way.
                let b = map(&random.floats(dtype, b, 2.0), |x| x + 3.5 * x.signum());
                cases.add(LayerKind::Elementwise(op), &[a, b]);
            }
        }
    }
    let base = Tensor::from_f32(vec![2, 3], &[0.5, 2.0, 3.0, 1.5, 9.0, 4.0]);
    for exponent in [2.0, 3.0, 0.5, -1.0, 2.5] {
        let exponent = Tensor::from_f32(vec![1, 1], &[exponent]);
        cases.add(LayerKind::Elementwise(E::Pow), &[base.clone(), exponent]);
    }
    cases.check();
}

#[test]
fn elementwise_on_integers_and_bools() {
    use Elementwise as E;
    let mut cases = Cases::default();
    let mut random = Random::new(2);
    for dtype in [DType::I32, DType::I64] {
        for op in ARITHMETIC {
            for (a, b) in PAIRS {
                // TensorRT divides integers of different signs differently (its floor of 0 / -3 is -1). Lengths and
                // positions, all that exports divide, are not negative.
                let inputs = match op {
                    E::Div | E::FloorDiv if on_tensorrt() => [random.ints(dtype, a, 0, 9), random.ints(dtype, b, 1, 9)],
                    _ => [random.any(dtype, a), random.any(dtype, b)],
                };
                cases.add(LayerKind::Elementwise(op), &inputs);
            }
        }
    }
    for op in [E::And, E::Or, E::Xor] {
        for (a, b) in PAIRS {
            cases.add(
                LayerKind::Elementwise(op),
                &[random.any(DType::Bool, a), random.any(DType::Bool, b)],
            );
        }
    }
    let wrapped = [
        Tensor::from_i32(vec![2], &[i32::MAX, i32::MIN]),
        Tensor::from_i32(vec![2], &[1, -1]),
    ];
    let network = one_layer(LayerKind::Elementwise(E::Sum), &wrapped);
    for options in every_option() {
        assert_eq!(
            run(&network, &wrapped, &options).to_i64(),
            [i64::from(i32::MIN), i64::from(i32::MAX)]
        );
    }
    cases.check();
}

#[test]
fn unary_and_activations() {
    use UnaryOp as U;
    let mut cases = Cases::default();
    let mut random = Random::new(3);
    for shape in [&[1usize][..], &[3, 50], &[2, 1, 1100]] {
        for dtype in FLOATS {
            for op in [
                U::Abs,
                U::Ceil,
                U::Cos,
                U::Erf,
                U::Exp,
                U::Floor,
                U::IsNan,
                U::Neg,
                U::Round,
                U::Sign,
                U::Sin,
            ] {
                cases.add(LayerKind::Unary(op), &[random.floats(dtype, shape, 3.0)]);
            }
            let positive = map(&random.floats(dtype, shape, 3.0), |x| x.abs() + 0.5);
            for op in [U::Log, U::Recip, U::Sqrt] {
                cases.add(LayerKind::Unary(op), std::slice::from_ref(&positive));
            }
            for op in [
                Activation::Relu,
                Activation::Sigmoid,
                Activation::Tanh,
                Activation::GeluErf,
                Activation::GeluTanh,
                Activation::Softplus,
            ] {
                cases.add(LayerKind::Activation(op), &[random.floats(dtype, shape, 6.0)]);
            }
        }
        cases.add(LayerKind::Unary(U::Not), &[random.any(DType::Bool, shape)]);
        cases.add(LayerKind::Unary(U::Sign), &[random.any(DType::I32, shape)]);
    }
    let halves = Tensor::from_f32(vec![6], &[-2.5, -1.5, -0.5, 0.5, 1.5, 2.5]);
    cases.add(LayerKind::Unary(U::Round), &[halves]);
    cases.check();
}

#[test]
fn not_a_number_and_infinities_pass_as_ieee_says() {
    let (nan, inf) = (f32::NAN, f32::INFINITY);
    let a = Tensor::from_f32(vec![6], &[nan, 1.0, inf, -inf, inf, 0.0]);
    let b = Tensor::from_f32(vec![6], &[1.0, nan, inf, inf, -inf, 0.0]);
    let expect = |op: LayerKind, inputs: &[Tensor], want: &[f64]| {
        let network = one_layer(op.clone(), inputs);
        for options in every_option() {
            let got = run(&network, inputs, &options).to_f64();
            // A maximum or minimum with NaN is the other number on TensorRT, as in IEEE 754-2008.
            let of_two = matches!(
                op,
                LayerKind::Elementwise(Elementwise::Max | Elementwise::Min)
                    | LayerKind::Activation(Activation::Relu)
                    | LayerKind::Reduce { op: ReduceOp::Max, .. }
            );
            let skips = on_tensorrt() && of_two;
            let same = |(g, w): (&f64, &f64)| g == w || w.is_nan() && (g.is_nan() || skips);
            assert!(got.iter().zip(want).all(same), "{op:?}: {got:?}, not {want:?}");
        }
    };
    let (n, i) = (f64::NAN, f64::INFINITY);
    let pair = [a.clone(), b];
    expect(LayerKind::Elementwise(Elementwise::Sum), &pair, &[n, n, i, n, n, 0.0]);
    expect(
        LayerKind::Elementwise(Elementwise::Prod),
        &pair,
        &[n, n, i, -i, -i, 0.0],
    );
    expect(LayerKind::Elementwise(Elementwise::Div), &pair, &[n, n, n, n, n, n]);
    expect(LayerKind::Elementwise(Elementwise::Max), &pair, &[n, n, i, i, i, 0.0]);
    expect(LayerKind::Elementwise(Elementwise::Min), &pair, &[n, n, i, -i, -i, 0.0]);
    expect(
        LayerKind::Elementwise(Elementwise::Equal),
        &pair,
        &[0.0, 0.0, 1.0, 0.0, 0.0, 1.0],
    );
    let one = [a];
    expect(LayerKind::Unary(UnaryOp::IsNan), &one, &[1.0, 0.0, 0.0, 0.0, 0.0, 0.0]);
    expect(
        LayerKind::Unary(UnaryOp::Exp),
        &one,
        &[n, std::f64::consts::E as f32 as f64, i, 0.0, i, 1.0][..]
            .to_vec()
            .iter()
            .map(|x| f64::from(*x as f32))
            .collect::<Vec<_>>(),
    );
    expect(LayerKind::Activation(Activation::Relu), &one, &[n, 1.0, i, 0.0, i, 0.0]);
    let sum = LayerKind::Reduce {
        op: ReduceOp::Max,
        axes: vec![0],
        keep_dims: true,
    };
    expect(sum, &one, &[n]);
    // A NaN in one row of a product stays in that row.
    let mut x = vec![1f32; 3 * 40];
    x[45] = nan;
    let x = Tensor::from_f32(vec![3, 40], &x);
    let w = Tensor::from_f32(vec![40, 2], &[1.0; 80]);
    let product = LayerKind::MatrixMultiply {
        op_a: lapidary::network::MatrixOp::None,
        op_b: lapidary::network::MatrixOp::None,
    };
    expect(product, &[x, w], &[40.0, 40.0, n, n, 40.0, 40.0]);
}

#[test]
fn reductions_over_any_axes() {
    let mut cases = Cases::default();
    let mut random = Random::new(4);
    let shapes: [&[usize]; 4] = [&[9], &[3, 40], &[2, 5, 70], &[2, 3, 4, 5]];
    for shape in shapes {
        for mask in 1..1usize << shape.len() {
            let axes: Vec<usize> = (0..shape.len()).filter(|a| mask >> a & 1 == 1).collect();
            for op in [
                ReduceOp::Sum,
                ReduceOp::Avg,
                ReduceOp::Prod,
                ReduceOp::Max,
                ReduceOp::Min,
            ] {
                for keep_dims in [true, false] {
                    let kind = LayerKind::Reduce {
                        op,
                        axes: axes.clone(),
                        keep_dims,
                    };
                    cases.add(kind.clone(), &[random.floats(DType::F32, shape, 1.3)]);
                    if op != ReduceOp::Avg && op != ReduceOp::Prod {
                        cases.add(kind, &[random.any(DType::I32, shape)]);
                    }
                }
            }
        }
    }
    cases.check();
}

#[test]
fn softmax_and_normalization_over_any_axes() {
    let mut cases = Cases::default();
    let mut random = Random::new(5);
    let shapes: [&[usize]; 4] = [&[33], &[3, 40], &[2, 5, 70], &[2, 3, 4, 5]];
    for shape in shapes {
        // TensorRT's softmax needs at least two axes.
        for axis in 0..if on_tensorrt() && shape.len() < 2 {
            0
        } else {
            shape.len()
        } {
            for dtype in FLOATS {
                cases.add(LayerKind::Softmax { axis }, &[random.floats(dtype, shape, 9.0)]);
            }
        }
        for mask in 1..1usize << shape.len() {
            let axes: Vec<usize> = (0..shape.len()).filter(|a| mask >> a & 1 == 1).collect();
            let own: Vec<usize> = (0..shape.len())
                .map(|a| if axes.contains(&a) { shape[a] } else { 1 })
                .collect();
            let kind = LayerKind::Normalization { axes, epsilon: 1e-3 };
            for dtype in [DType::F32, DType::F16] {
                let inputs = [
                    random.floats(dtype, shape, 2.0),
                    random.floats(dtype, &own, 1.0),
                    random.floats(dtype, &own, 1.0),
                ];
                cases.add(kind.clone(), &inputs);
            }
        }
    }
    cases.check();
}

#[test]
fn rotary_embeddings() {
    let mut cases = Cases::default();
    let mut random = Random::new(9);
    for dtype in FLOATS {
        for (dim, rotary_dim) in [(16, 16), (16, 8), (6, 2), (64, 64)] {
            for interleaved in [false, true] {
                let tables = [9, rotary_dim / 2];
                let inputs = [
                    random.floats(dtype, &[2, 3, 5, dim], 1.0),
                    random.floats(dtype, &tables, 1.0),
                    random.floats(dtype, &tables, 1.0),
                    random.ints(DType::I32, &[2, 5], 0, 8),
                ];
                cases.add(
                    LayerKind::RotaryEmbedding {
                        interleaved,
                        rotary_dim,
                    },
                    &inputs,
                );
            }
        }
    }
    cases.check();
}

#[test]
fn a_dynamic_network_is_refused_with_what_to_do() {
    let mut b = lapidary::network::NetworkBuilder::new(
        "dynamic",
        lapidary::network::Profile {
            tokens: lapidary::network::Tokens::Dynamic { min: 1, opt: 4, max: 8 },
            ..lapidary::network::Profile::decode(16)
        },
    );
    let x = b
        .input("x0", DType::F32, &[Dim::parse("tokens"), Dim::from(3usize)])
        .unwrap();
    let y = b.unary("y", UnaryOp::Neg, x).unwrap();
    b.output("y", y).unwrap();
    let network = b.finish().unwrap();
    let options = every_option().remove(0);
    let error = Program::compile(&network, &options).unwrap_err();
    assert!(matches!(error, CpuError::Dynamic { .. }), "{error}");
    let bound = lapidary::backend::cpu::bind_tokens(&network, 2).unwrap();
    let x = Tensor::from_f32(vec![2, 3], &[1.0, 2.0, 3.0, 4.0, 5.0, 6.0]);
    assert_eq!(
        run(&bound, &[x], &options).to_f32(),
        [-1.0, -2.0, -3.0, -4.0, -5.0, -6.0]
    );
    let error = lapidary::backend::cpu::bind_tokens(&network, 9).unwrap_err();
    assert_eq!(error.to_string(), "9 tokens are outside the profile's 1 to 8");
}
