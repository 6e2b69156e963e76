//! Matrix products of every path against the definition: a few rows and many, weights of each dtype at any alignment,
//! both orientations, batches that broadcast.

use lapidary::graph::Constant;
use lapidary::network::{LayerKind, MatrixOp, WeightMode};
use lapidary::tensor::{DType, Tensor};
use proptest::prelude::*;

use super::reference::{Value, evaluate};
use super::soundness::misaligned;
use super::support::{Random, assert_close, builder, dims, every_option, one_layer, run, tolerance};

fn check(x: &Tensor, w: &Tensor, op_a: MatrixOp, op_b: MatrixOp) {
    let kind = LayerKind::MatrixMultiply { op_a, op_b };
    let want = evaluate(&kind, &[Value::from(x), Value::from(w)]);
    let depth = x.len() as f64;
    let mut b = builder();
    let id = b.input("x0", x.dtype(), &dims(x.shape())).unwrap();
    let weight = b
        .weight("w", Constant::tensor(misaligned(w)), WeightMode::Bind)
        .unwrap();
    let y = b.add("product", kind, &[id, weight]).unwrap();
    let y = b.cast("y32", DType::F32, y).unwrap();
    b.output("y", y).unwrap();
    let network = b.finish().unwrap();
    let mut by_threads: Vec<Vec<u8>> = Vec::new();
    for options in every_option() {
        let got = run(&network, std::slice::from_ref(x), &options);
        let what = format!("{x:?} {op_a:?} by {w:?} {op_b:?}, {options:?}");
        assert_close(&got, &want.data, 1.0, tolerance(1e-6 * depth.sqrt(), x.dtype()), &what);
        by_threads.push(got.data().to_vec());
    }
    for pair in by_threads.chunks_exact(2) {
        assert!(pair[0] == pair[1], "{x:?} by {w:?}: the result depends on the threads");
    }
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(60) })]
    #[test]
    fn linear_layers(
        // Beyond every tile and block, but not all at once in every case: unoptimized kernels take seconds for that.
        rows in prop_oneof![3 => 1usize..10, 2 => 10usize..40, 1 => 40usize..70],
        depth in prop_oneof![3 => 1usize..20, 3 => 60usize..70, 1 => 250usize..270, 1 => 500usize..530],
        columns in prop_oneof![3 => 1usize..40, 1 => 40usize..140],
        dtype in prop_oneof![Just(DType::F32), Just(DType::F16), Just(DType::Bf16)],
        transpose in any::<bool>(),
        seed in any::<u64>(),
    ) {
        let mut random = Random::new(seed);
        let x = random.floats(dtype, &[1, rows, depth], 1.0);
        let (shape, op) = match transpose {
            true => ([1, columns, depth], MatrixOp::Transpose),
            false => ([1, depth, columns], MatrixOp::None),
        };
        let w = random.floats(dtype, &shape, 1.0);
        check(&x, &w, MatrixOp::None, op);
    }

    #[test]
    fn batches_of_matrices(
        batch in prop_oneof![Just(([2usize, 3], [2usize, 3])), Just(([2, 3], [1, 3])), Just(([1, 3], [2, 1])), Just(([2, 1], [2, 1])), Just(([2, 3], [1, 1]))],
        rows in 1usize..20,
        depth in 1usize..40,
        columns in 1usize..40,
        ops in any::<(bool, bool)>(),
        seed in any::<u64>(),
    ) {
        let mut random = Random::new(seed);
        let op = |t: bool| if t { MatrixOp::Transpose } else { MatrixOp::None };
        let shape = |lead: [usize; 2], m, n, t: bool| {
            let [m, n] = if t { [n, m] } else { [m, n] };
            [lead[0], lead[1], m, n]
        };
        let a = random.floats(DType::F32, &shape(batch.0, rows, depth, ops.0), 1.0);
        let b = random.floats(DType::F32, &shape(batch.1, depth, columns, ops.1), 1.0);
        let kind = LayerKind::MatrixMultiply { op_a: op(ops.0), op_b: op(ops.1) };
        let want = evaluate(&kind, &[Value::from(&a), Value::from(&b)]);
        let network = one_layer(kind, &[a.clone(), b.clone()]);
        for options in every_option() {
            let got = run(&network, &[a.clone(), b.clone()], &options);
            prop_assert_eq!(got.shape(), want.shape.as_slice());
            assert_close(&got, &want.data, 1.0, 1e-5, "batch");
        }
    }
}

#[test]
fn two_dimensional_weights_and_rows_in_a_batch() {
    let mut random = Random::new(11);
    for (x, w) in [
        (&[5usize, 48][..], &[33usize, 48][..]),
        (&[2, 3, 48], &[1, 33, 48]),
        (&[2, 9, 48], &[1, 33, 48]),
        (&[1, 1, 1, 48], &[1, 1, 33, 48]),
    ] {
        let x = random.floats(DType::F32, x, 1.0);
        let w = random.floats(DType::F32, w, 1.0);
        check(&x, &w, MatrixOp::None, MatrixOp::Transpose);
    }
}

#[test]
fn a_product_with_views_on_both_sides() {
    // Heads split by a transpose, multiplied without copying, as decomposed attention does.
    let mut random = Random::new(12);
    for tokens in [1, 3, 20] {
        let q = random.floats(DType::F32, &[1, tokens, 4 * 8], 1.0);
        let split = LayerKind::Shuffle {
            first: None,
            reshape: Some(dims(&[1, tokens, 4, 8])),
            second: Some(vec![0, 2, 1, 3]),
        };
        let product = LayerKind::MatrixMultiply {
            op_a: MatrixOp::None,
            op_b: MatrixOp::Transpose,
        };
        let back = LayerKind::Shuffle {
            first: Some(vec![0, 2, 1, 3]),
            reshape: Some(dims(&[1, tokens, 4 * tokens])),
            second: None,
        };
        let heads = evaluate(&split, &[Value::from(&q)]);
        let want = evaluate(&back, &[evaluate(&product, &[heads.clone(), heads])]);
        let mut b = builder();
        let x = b.input("x0", DType::F32, &dims(q.shape())).unwrap();
        let heads = b.add("heads", split, &[x]).unwrap();
        let scores = b.add("scores", product, &[heads, heads]).unwrap();
        let y = b.add("merge", back, &[scores]).unwrap();
        b.output("y", y).unwrap();
        let network = b.finish().unwrap();
        for options in every_option() {
            let got = run(&network, std::slice::from_ref(&q), &options);
            assert_close(&got, &want.data, 1.0, 1e-5, "heads");
        }
    }
}
