use std::collections::HashMap;

use super::*;
use crate::graph::Graph;
use crate::graph::op::{Attention, Binary, GroupQueryAttention, Reduction, ScatterMode, Unary};
use crate::tensor::{DType, Tensor};

fn one(op: Op, inputs: &[Tensor]) -> Tensor {
    let inputs: Vec<_> = inputs.iter().cloned().map(Some).collect();
    eval_op(&op, &inputs).unwrap()[0].clone().unwrap()
}

fn fails(op: Op, inputs: &[Tensor]) -> String {
    let inputs: Vec<_> = inputs.iter().cloned().map(Some).collect();
    eval_op(&op, &inputs).unwrap_err().to_string()
}

fn iota(shape: &[usize]) -> Tensor {
    let n: usize = shape.iter().product();
    Tensor::from_f32(
        shape.to_vec(),
        &(0..n).map(|i| i as f32 * 0.37 - 1.0).collect::<Vec<_>>(),
    )
}

fn vector(values: &[i64]) -> Tensor {
    Tensor::from_i64(vec![values.len()], values)
}

fn scalar(value: i64) -> Tensor {
    Tensor::from_i64(vec![], &[value])
}

#[test]
fn slices_take_extreme_bounds_and_negative_steps() {
    let x = vector(&[0, 1, 2, 3, 4]);
    let slice = |s: i64, e: i64, step: i64| {
        one(
            Op::Slice,
            &[x.clone(), vector(&[s]), vector(&[e]), vector(&[-1]), vector(&[step])],
        )
        .to_i64()
    };
    assert_eq!(slice(i64::MIN, i64::MAX, 1), [0, 1, 2, 3, 4]);
    assert_eq!(slice(i64::MAX, i64::MIN, -1), [4, 3, 2, 1, 0]);
    assert_eq!(slice(-1, i64::MIN, -2), [4, 2, 0]);
    assert_eq!(slice(1, -1, 2), [1, 3]);
    assert_eq!(slice(3, 1, 1), [0i64; 0]);
    assert_eq!(slice(0, 5, i64::MAX), [0]);
    assert_eq!(slice(4, 0, i64::MIN), [4]);
    let empty = Tensor::from_f32(vec![0, 2], &[]);
    let all = one(Op::Slice, &[empty, vector(&[i64::MIN]), vector(&[i64::MAX])]);
    assert_eq!(all.shape(), [0, 2]);
}

#[test]
fn reshape_copies_infers_and_refuses() {
    let reshape = |shape: &[usize], target: &[i64], allowzero| {
        one(Op::Reshape { allowzero }, &[iota(shape), vector(target)])
            .shape()
            .to_vec()
    };
    assert_eq!(reshape(&[2, 3, 4], &[0, -1, 2], false), [2, 6, 2]);
    assert_eq!(reshape(&[0, 4], &[2, 0], true), [2, 0]);
    assert_eq!(reshape(&[0, 4], &[0, -1], false), [0, 0]);
    let error = fails(Op::Reshape { allowzero: false }, &[iota(&[2, 3]), vector(&[4, -1])]);
    assert!(error.contains("[2, 3]") && error.contains("[4, -1]"), "{error}");
}

#[test]
fn integers_divide_and_wrap_as_onnx_says() {
    let binary = |op, a: &[i64], b: &[i64]| one(Op::Binary(op), &[vector(a), vector(b)]).to_i64();
    assert_eq!(binary(Binary::Div, &[-7, 7], &[2, -2]), [-3, -3]);
    assert_eq!(binary(Binary::Mod, &[-7, 7, 6], &[2, -2, 3]), [1, -1, 0]);
    assert_eq!(binary(Binary::Pow, &[3, 2], &[4, 0]), [81, 1]);
    assert!(fails(Op::Binary(Binary::Div), &[vector(&[1]), vector(&[0])]).contains("zero"));
    let wide = vector(&[300, -1]);
    assert_eq!(one(Op::Cast { to: DType::U8 }, &[wide]).to_i64(), [44, 255]);
    let floats = Tensor::from_f32(vec![3], &[-1.9, 1e20, f32::NAN]);
    let cast = one(Op::Cast { to: DType::I32 }, &[floats]).to_i64();
    assert_eq!(cast, [-1, i64::from(i32::MAX), 0]);
    let big = Tensor::from_f32(vec![2], &[65520.0, -3.4e38]);
    assert_eq!(
        one(Op::Cast { to: DType::F16 }, &[big]).to_f32(),
        [f32::INFINITY, f32::NEG_INFINITY]
    );
}

#[test]
fn erf_is_exact_to_double_precision() {
    // Abramowitz and Stegun, table 7.1.
    for (x, y) in [
        (0.5, 0.5204998778130465),
        (1.0, 0.8427007929497149),
        (2.0, 0.9953222650189527),
    ] {
        assert!((elementwise::erf(x) - y).abs() < 1e-15);
        assert!((elementwise::erf(-x) + y).abs() < 1e-15);
    }
    assert_eq!(elementwise::erf(0.0), 0.0);
    assert_eq!(elementwise::erf(f64::INFINITY), 1.0);
}

#[test]
fn zero_sized_operands_are_ordinary() {
    let none = Tensor::from_f32(vec![2, 0, 3], &[]);
    assert_eq!(one(Op::MatMul, &[none.clone(), iota(&[3, 4])]).shape(), [2, 0, 4]);
    let summed = one(
        Op::MatMul,
        &[Tensor::from_f32(vec![2, 0], &[]), Tensor::from_f32(vec![0, 2], &[])],
    );
    assert_eq!(summed.to_f32(), [0.0; 4]);
    assert_eq!(
        one(Op::Concat { axis: -2 }, &[none.clone(), iota(&[2, 1, 3])]).shape(),
        [2, 1, 3]
    );
    let sum = Op::Reduce {
        reduction: Reduction::Sum,
        keepdims: false,
        noop_with_empty_axes: false,
    };
    assert_eq!(one(sum, &[none.clone(), vector(&[1])]).to_f32(), [0.0; 6]);
    assert_eq!(
        one(Op::Softmax { axis: 1 }, std::slice::from_ref(&none)).shape(),
        [2, 0, 3]
    );
    assert_eq!(one(Op::Range, &[scalar(3), scalar(3), scalar(1)]).shape(), [0]);
    assert_eq!(
        one(Op::Expand, &[Tensor::from_f32(vec![1], &[1.0]), vector(&[0])]).shape(),
        [0]
    );
}

#[test]
fn scatters_and_gathers_undo_each_other() {
    let x = iota(&[2, 4, 3]);
    let indices = Tensor::from_i64(vec![2, 2], &[-1, 0, 2, 1]);
    let batched = one(
        Op::GatherNd { batch_dims: 1 },
        &[x.clone(), Tensor::from_i64(vec![2, 1], &[3, -4])],
    );
    assert_eq!(batched.shape(), [2, 3]);
    assert_eq!(batched.to_f32()[3..], x.to_f32()[12..15]);
    let rows = one(Op::Gather { axis: 1 }, &[x.clone(), indices]);
    assert_eq!(rows.shape(), [2, 2, 2, 3]);
    let replace = Op::ScatterNd {
        mode: ScatterMode::Replace,
    };
    let tuple = Tensor::from_i64(vec![1, 2], &[1, -1]);
    let written = one(
        replace,
        &[x.clone(), tuple.clone(), Tensor::from_f32(vec![1, 3], &[7.0, 8.0, 9.0])],
    );
    let read = one(Op::GatherNd { batch_dims: 0 }, &[written, tuple]);
    assert_eq!(read.to_f32(), [7.0, 8.0, 9.0]);
    let cache = Tensor::from_f32(vec![1, 1, 3, 1], &[0.0; 3]);
    let update = Tensor::from_f32(vec![1, 1, 2, 1], &[1.0, 2.0]);
    let write = |circular| Op::TensorScatter { axis: -2, circular };
    let inputs = [cache, update, vector(&[2])];
    assert_eq!(one(write(true), &inputs).to_f32(), [2.0, 0.0, 1.0]);
    assert!(fails(write(false), &inputs).contains("slot 3"));
}

fn plain_attention(is_causal: bool) -> Attention {
    Attention {
        is_causal,
        scale: None,
        softcap: 0.0,
        q_num_heads: None,
        kv_num_heads: None,
        softmax_precision: None,
    }
}

#[test]
fn attention_equals_its_parts() {
    let (q, k, v) = (iota(&[1, 2, 3, 4]), iota(&[1, 2, 5, 4]), iota(&[1, 2, 5, 4]));
    let fused = one(
        Op::Attention(plain_attention(false)),
        &[q.clone(), k.clone(), v.clone()],
    );
    let kt = one(
        Op::Transpose {
            perm: Some(vec![0, 1, 3, 2]),
        },
        &[k],
    );
    let scores = one(Op::MatMul, &[q, kt]);
    let scaled = one(Op::Binary(Binary::Mul), &[scores, Tensor::from_f32(vec![], &[0.5])]);
    let parts = one(Op::MatMul, &[one(Op::Softmax { axis: -1 }, &[scaled]), v]);
    for (a, b) in fused.to_f32().iter().zip(parts.to_f32()) {
        assert!((a - b).abs() < 1e-5);
    }
}

/// The last token over a past, causal over everything, and grouped attention over a cache all see the same keys.
#[test]
fn caches_and_offsets_agree() {
    let (q, k, v) = (iota(&[1, 4, 6, 2]), iota(&[1, 2, 6, 2]), iota(&[1, 2, 6, 2]));
    let rows =
        |t: &Tensor, from: i64, to: i64| one(Op::Slice, &[t.clone(), vector(&[from]), vector(&[to]), vector(&[2])]);
    let full = one(Op::Attention(plain_attention(true)), &[q.clone(), k.clone(), v.clone()]);
    let last = rows(&full, 4, 6);
    let inputs: Vec<Option<Tensor>> = vec![
        Some(rows(&q, 4, 6)),
        Some(rows(&k, 4, 6)),
        Some(rows(&v, 4, 6)),
        None,
        Some(rows(&k, 0, 4)),
        Some(rows(&v, 0, 4)),
    ];
    let with_past = eval_op(&Op::Attention(plain_attention(true)), &inputs).unwrap();
    assert_eq!(with_past[0].as_ref().unwrap().to_f32(), last.to_f32());
    assert_eq!(with_past[1].as_ref().unwrap().to_f32(), k.to_f32());

    let flat = |t: Tensor| {
        let [_, heads, tokens, dim] = *t.shape() else {
            unreachable!()
        };
        let turned = one(
            Op::Transpose {
                perm: Some(vec![0, 2, 1, 3]),
            },
            &[t],
        );
        turned.reshaped(vec![1, tokens, heads * dim]).unwrap()
    };
    let grouped = Op::GroupQueryAttention(GroupQueryAttention {
        num_heads: 4,
        kv_num_heads: 2,
        scale: None,
        softcap: 0.0,
        local_window_size: -1,
        do_rotary: false,
        rotary_interleaved: false,
        smooth_softmax: 0,
        qk_norm_epsilon: 1e-6,
    });
    let inputs = [
        flat(rows(&q, 4, 6)),
        flat(rows(&k, 4, 6)),
        flat(rows(&v, 4, 6)),
        rows(&k, 0, 4),
        rows(&v, 0, 4),
        Tensor::from_i32(vec![1], &[5]),
        Tensor::from_i32(vec![], &[6]),
    ];
    assert_eq!(one(grouped, &inputs).to_f32(), flat(last).to_f32());
}

#[test]
fn evaluator_runs_only_what_is_asked_and_names_what_fails() {
    let mut graph = Graph::new("g");
    let x = graph.add_input("x", DType::F32, vec![]);
    let unbound = graph.add_input("mask", DType::F32, vec![]);
    let y = graph.add_node("y", Op::Unary(Unary::Neg), &[x]);
    let z = graph.add_node("z", Op::Binary(Binary::Add), &[y, unbound]);
    let mut run = Evaluator::new(&graph, HashMap::from([(x, iota(&[2]))]));
    assert_eq!(run.value(y).unwrap().to_f32(), [1.0, 0.63]);
    assert!(run.value(z).unwrap_err().to_string().contains("mask"));
    // A binding inside the graph hides the definition.
    let mut cut = Evaluator::new(&graph, HashMap::from([(y, iota(&[3])), (unbound, iota(&[2]))]));
    let error = cut.value(z).unwrap_err().to_string();
    assert!(
        error.contains("\"z\"") && error.contains("f32[3]") && error.contains("f32[2]"),
        "{error}"
    );
}

/// Weights beyond a million elements are multiplied in panels of rows.
#[test]
fn products_in_panels_are_products() {
    let (k, n) = (1300, 1000);
    let b: Vec<f32> = (0..k * n).map(|i| (i % 7) as f32 - 3.0).collect();
    let a: Vec<f32> = (0..2 * k).map(|i| (i % 5) as f32 - 2.0).collect();
    let expected = |m: usize, j: usize| -> f32 { (0..k).map(|i| a[m * k + i] * b[i * n + j]).sum() };
    let (x, w) = (Tensor::from_f32(vec![1, 2, k], &a), Tensor::from_f32(vec![k, n], &b));
    let product = one(Op::MatMul, &[x, w.clone()]);
    assert_eq!(product.shape(), [1, 2, n]);
    let bias = Tensor::from_f32(vec![n], &vec![0.5; n]);
    let gemm = Op::Gemm {
        alpha: 2.0,
        beta: 1.0,
        trans_a: false,
        trans_b: false,
    };
    let scaled = one(gemm, &[Tensor::from_f32(vec![2, k], &a), w, bias]);
    for (at, (plain, scaled)) in product.to_f32().iter().zip(scaled.to_f32()).enumerate() {
        let sum = expected(at / n, at % n);
        assert_eq!((*plain, scaled), (sum, 2.0 * sum + 0.5), "element {at}");
    }
}
