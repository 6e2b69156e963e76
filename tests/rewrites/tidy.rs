//! Folding and linear layers, over many graphs at once. Single graphs are in tests/files/passes.

use lapidary::graph::op::Unary;
use lapidary::graph::{ConstantSource, Graph, Op};
use lapidary::passes::{fold, linear};
use lapidary::tensor::DType;
use proptest::prelude::*;

use super::small::{Small, count, rewrite};

#[test]
fn weights_are_moved_by_recipe() {
    let mut s = Small::new(DType::F32);
    let x = s.input("x", &["batch", "300"]);
    let weight = s.constant(&[200, 300], 5);
    let number = s.number(0.5);
    let half = s.mul(weight, number);
    let cast = s.cast(half, DType::F16);
    let back = s.cast(cast, DType::F32);
    let turned = s.op(Op::Transpose { perm: None }, &[back]);
    let (starts, ends, axes) = (s.ints(&[0]), s.ints(&[-100]), s.ints(&[1]));
    let part = s.op(Op::Slice, &[turned, starts, ends, axes]);
    let end = s.op(Op::MatMul, &[x, part]);
    let (rewritten, _) = rewrite(&s.finish(&[end]), fold::run, 1e-6);
    assert_eq!(rewritten.node_ids().count(), 1);
    let product = rewritten.node(rewritten.node_ids().next().unwrap());
    let constant = rewritten.constant(product.input(1).unwrap()).unwrap();
    assert!(matches!(constant.source(), ConstantSource::Derived(_)));
    assert_eq!(constant.shape(), [300, 100]);
}

fn gemm_case(flags: [bool; 2], factors: [f32; 2], constant: [bool; 2], bias: &[usize]) -> Graph {
    let mut s = Small::new(DType::F32);
    let a = s.input("a", if flags[0] { &["16", "batch"] } else { &["batch", "16"] });
    let shape = if flags[1] { [12, 16] } else { [16, 12] };
    let dims = shape.map(|d: usize| d.to_string());
    let b = if constant[0] {
        s.constant(&shape, 1)
    } else {
        s.input("b", &[&dims[0], &dims[1]])
    };
    let dims: Vec<String> = bias.iter().map(usize::to_string).collect();
    let c = if constant[1] {
        s.constant(bias, 2)
    } else {
        s.input("c", &dims.iter().map(String::as_str).collect::<Vec<_>>())
    };
    let op = Op::Gemm {
        alpha: factors[0],
        beta: factors[1],
        trans_a: flags[0],
        trans_b: flags[1],
    };
    let end = s.op(op, &[a, b, c]);
    s.finish(&[end])
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn any_gemm_becomes_a_matmul(
        flags: [bool; 2],
        constant: [bool; 2],
        factors in prop::array::uniform2(prop::sample::select(vec![1.0f32, 0.5, 0.0, -2.0])),
        bias in prop::sample::select(vec![vec![], vec![12], vec![1, 12], vec![1]]),
    ) {
        let graph = gemm_case(flags, factors, constant, &bias);
        let (rewritten, rewrites) = rewrite(&graph, linear::run, 1e-5);
        prop_assert_eq!((rewrites, count(&rewritten, "Gemm"), count(&rewritten, "MatMul")), (1, 0, 1));
    }

    /// Any chain of movements computes the same after cleaning and folding.
    #[test]
    fn movement_chains_keep_their_meaning(steps in prop::collection::vec(0usize..8, 1..12)) {
        let mut s = Small::new(DType::F32);
        let mut at = s.input("x", &["batch", "tokens", "8"]);
        for step in steps {
            let perm = |p: [usize; 3]| Op::Transpose { perm: Some(p.to_vec()) };
            let axes = s.ints(&[1]);
            at = match step {
                0 => s.op(perm([1, 0, 2]), &[at]),
                1 => s.op(perm([2, 0, 1]), &[at]),
                2 => { let wide = s.op(Op::Unsqueeze, &[at, axes]); s.op(Op::Squeeze, &[wide, axes]) }
                3 => { let flat = s.reshape(at, &[-1]); let shape = s.op(Op::Shape { start: 0, end: None }, &[at]); s.op(Op::Reshape { allowzero: false }, &[flat, shape]) }
                4 => { let one = s.number(1.0); s.mul(at, one) }
                5 => { let shape = s.op(Op::Shape { start: 0, end: None }, &[at]); s.op(Op::Expand, &[at, shape]) }
                6 => { let (a, b) = (s.ints(&[0]), s.ints(&[i64::MAX])); s.op(Op::Slice, &[at, a, b]) }
                _ => s.unary(Unary::Neg, at),
            };
        }
        let end = s.unary(Unary::Neg, at);
        let graph = s.finish(&[end]);
        let (rewritten, _) = rewrite(&graph, fold::run, 0.0);
        prop_assert_eq!(count(&rewritten, "Expand") + count(&rewritten, "Slice") + count(&rewritten, "Mul"), 0);
    }
}
