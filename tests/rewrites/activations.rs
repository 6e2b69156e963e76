//! Activations in their parts, and what only looks like them.

use lapidary::graph::op::{Binary, Unary};
use lapidary::graph::{Op, ValueId};
use lapidary::passes::activation;
use lapidary::tensor::DType;

use super::small::{Small, rewrite};

type Build = fn(&mut Small, ValueId) -> ValueId;

fn apply(build: Build, dtype: DType) -> (Vec<Op>, usize) {
    let mut s = Small::new(dtype);
    let x = s.input("x", &["batch", "tokens", "8"]);
    let end = build(&mut s, x);
    let graph = s.finish(&[end]);
    let tolerance = if dtype == DType::F32 { 1e-5 } else { 5e-3 };
    let (rewritten, rewrites) = rewrite(&graph, activation::run, tolerance);
    let ops = rewritten.node_ids().map(|id| rewritten.node(id).op.clone()).collect();
    (ops, rewrites)
}

fn silu(s: &mut Small, x: ValueId) -> ValueId {
    let gate = s.unary(Unary::Sigmoid, x);
    s.mul(x, gate)
}

fn silu_swapped(s: &mut Small, x: ValueId) -> ValueId {
    let gate = s.unary(Unary::Sigmoid, x);
    s.mul(gate, x)
}

fn quick_gelu(s: &mut Small, x: ValueId) -> ValueId {
    let factor = s.number(1.702);
    let scaled = s.mul(factor, x);
    let gate = s.unary(Unary::Sigmoid, scaled);
    s.mul(x, gate)
}

/// `(1 + erf(x / √2))`
fn erf_share(s: &mut Small, x: ValueId) -> ValueId {
    let (root, one) = (s.number(std::f64::consts::SQRT_2), s.number(1.0));
    let inner = s.binary(Binary::Div, x, root);
    let erf = s.unary(Unary::Erf, inner);
    s.add(erf, one)
}

fn gelu(s: &mut Small, x: ValueId) -> ValueId {
    let (share, half) = (erf_share(s, x), s.number(0.5));
    let product = s.mul(x, share);
    s.mul(product, half)
}

fn gelu_half_first(s: &mut Small, x: ValueId) -> ValueId {
    let (share, half) = (erf_share(s, x), s.number(0.5));
    let halved = s.mul(half, x);
    s.mul(halved, share)
}

fn gelu_half_inside(s: &mut Small, x: ValueId) -> ValueId {
    let (share, half) = (erf_share(s, x), s.number(0.5));
    let halved = s.mul(share, half);
    s.mul(x, halved)
}

/// GPT-2's `gelu_new`: `0.5 x (1 + tanh(√(2/π) (x + 0.044715 x³)))`.
fn gelu_new(s: &mut Small, x: ValueId) -> ValueId {
    let (three, c, root) = (s.number(3.0), s.number(0.044715), s.number(0.7978845608028654));
    let (one, half) = (s.number(1.0), s.number(0.5));
    let cube = s.binary(Binary::Pow, x, three);
    let bent = s.mul(c, cube);
    let sum = s.add(x, bent);
    let inner = s.mul(root, sum);
    let tanh = s.unary(Unary::Tanh, inner);
    let share = s.add(one, tanh);
    let halved = s.mul(half, x);
    s.mul(halved, share)
}

/// The same with x² factored out and the product in another order.
fn gelu_factored(s: &mut Small, x: ValueId) -> ValueId {
    let (c, root) = (s.number(0.044715), s.number(0.7978845608028654));
    let (one, half) = (s.number(1.0), s.number(0.5));
    let square = s.mul(x, x);
    let bent = s.mul(square, c);
    let sum = s.add(one, bent);
    let scaled = s.mul(x, root);
    let inner = s.mul(scaled, sum);
    let tanh = s.unary(Unary::Tanh, inner);
    let share = s.add(tanh, one);
    let product = s.mul(x, share);
    s.mul(product, half)
}

#[test]
fn every_spelling_is_recognised() {
    let all: [(Build, Op); 8] = [
        (silu, Op::Swish { alpha: 1.0 }),
        (silu_swapped, Op::Swish { alpha: 1.0 }),
        (quick_gelu, Op::Swish { alpha: 1.702 }),
        (gelu, Op::Gelu { tanh: false }),
        (gelu_half_first, Op::Gelu { tanh: false }),
        (gelu_half_inside, Op::Gelu { tanh: false }),
        (gelu_new, Op::Gelu { tanh: true }),
        (gelu_factored, Op::Gelu { tanh: true }),
    ];
    for (build, wanted) in all {
        for dtype in [DType::F32, DType::F16] {
            assert_eq!(apply(build, dtype), (vec![wanted.clone()], 1));
        }
    }
}

/// The argument is itself a product: only the activation is taken, not what comes before it.
#[test]
fn scaled_arguments_stay_outside() {
    let (ops, rewrites) = apply(
        |s, x| {
            let factor = s.number(3.0);
            let scaled = s.mul(x, factor);
            gelu(s, scaled)
        },
        DType::F32,
    );
    assert_eq!(
        (ops, rewrites),
        (vec![Op::Binary(Binary::Mul), Op::Gelu { tanh: false }], 1)
    );
}

#[test]
fn what_only_looks_like_an_activation_stays() {
    let wrong_root: Build = |s, x| {
        let (root, one) = (s.number(1.41), s.number(1.0));
        let inner = s.binary(Binary::Div, x, root);
        let erf = s.unary(Unary::Erf, inner);
        let share = s.add(erf, one);
        let half = s.number(0.5);
        let product = s.mul(x, share);
        s.mul(product, half)
    };
    let not_halved: Build = |s, x| {
        let share = erf_share(s, x);
        s.mul(x, share)
    };
    let other_gate: Build = |s, x| {
        let other = s.input("y", &["batch", "tokens", "8"]);
        let gate = s.unary(Unary::Sigmoid, other);
        s.mul(x, gate)
    };
    let softcap: Build = |s, x| {
        let cap = s.number(30.0);
        let small = s.binary(Binary::Div, x, cap);
        let tanh = s.unary(Unary::Tanh, small);
        s.mul(tanh, cap)
    };
    let bare: Build = |s, x| s.unary(Unary::Sigmoid, x);
    for build in [wrong_root, not_halved, other_gate, softcap, bare] {
        assert_eq!(apply(build, DType::F32).1, 0);
    }
}

/// A gate that is read by something else, too, keeps being computed.
#[test]
fn shared_gates_survive() {
    let mut s = Small::new(DType::F32);
    let x = s.input("x", &["batch", "8"]);
    let gate = s.unary(Unary::Sigmoid, x);
    let y = s.mul(x, gate);
    let (rewritten, rewrites) = rewrite(&s.finish(&[y, gate]), activation::run, 1e-5);
    assert_eq!((rewrites, rewritten.node_ids().count()), (1, 2));
}
