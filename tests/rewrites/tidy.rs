//! Folding, idle operators, linear layers, dtypes.

use lapidary::graph::op::{Binary, Unary};
use lapidary::graph::{ConstantSource, Graph, Op, ValueId};
use lapidary::passes::{PassError, cleanup, decompose, dtype, fold, linear};
use lapidary::tensor::{DType, Tensor};
use proptest::prelude::*;

use super::small::{Small, count, random, rewrite};

#[test]
fn operators_that_change_nothing_disappear() {
    let mut s = Small::new(DType::F32);
    let x = s.input("x", &["batch", "tokens", "8"]);
    let (one, zero) = (s.number(1.0), s.number(0.0));
    let mut at = s.op(Op::Identity, &[x]);
    at = s.cast(at, DType::F32);
    at = s.mul(one, at);
    at = s.add(at, zero);
    at = s.binary(Binary::Pow, at, one);
    at = s.op(Op::Concat { axis: 1 }, &[at]);
    let perm = |p: &[usize]| Op::Transpose { perm: Some(p.to_vec()) };
    at = s.op(perm(&[2, 0, 1]), &[at]);
    at = s.op(perm(&[1, 2, 0]), &[at]);
    let (starts, ends) = (s.ints(&[0]), s.ints(&[i64::MAX]));
    at = s.op(Op::Slice, &[at, starts, ends]);
    at = s.reshape(at, &[0, 0, 2, 4]);
    at = s.reshape(at, &[0, 0, 8]);
    let axes = s.ints(&[0]);
    at = s.op(Op::Unsqueeze, &[at, axes]);
    at = s.op(Op::Squeeze, &[at, axes]);
    let end = s.unary(Unary::Exp, at);
    let (rewritten, _) = rewrite(&s.finish(&[end]), cleanup::run, 0.0);
    assert_eq!(rewritten.node_ids().count(), 1);
}

#[test]
fn operators_that_change_something_stay() {
    // No two constants of one graph are equal: merging them would count as a rewrite.
    let builds: [fn(&mut Small, ValueId) -> ValueId; 5] = [
        // Ones that broadcast to another shape.
        |s, x| {
            let ones = s.graph.add_constant("ones", Tensor::from_f32(vec![3, 1, 1], &[1.0; 3]));
            s.mul(x, ones)
        },
        |s, x| {
            let (starts, ends) = (s.ints(&[1]), s.ints(&[i64::MAX]));
            let axes = s.ints(&[-1]);
            s.op(Op::Slice, &[x, starts, ends, axes])
        },
        // All of the axis, but backwards.
        |s, x| {
            let (starts, ends) = (s.ints(&[3]), s.ints(&[i64::MIN]));
            let (axes, steps) = (s.ints(&[1]), s.ints(&[-1]));
            s.op(Op::Slice, &[x, starts, ends, axes, steps])
        },
        |s, x| {
            let mixed = s
                .graph
                .add_constant("mixed", Tensor::from_bool(vec![4], &[true, false, true, true]));
            let zero = s.number(0.0);
            s.op(Op::Where, &[mixed, x, zero])
        },
        |s, x| s.op(Op::Transpose { perm: Some(vec![1, 0]) }, &[x]),
    ];
    for build in builds {
        let mut s = Small::new(DType::F32);
        let x = s.input("x", &["4", "4"]);
        let changed = build(&mut s, x);
        let end = s.unary(Unary::Exp, changed);
        let graph = s.finish(&[end]);
        assert_eq!(rewrite(&graph, cleanup::run, 0.0).1, 0);
    }
}

#[test]
fn equal_nodes_and_equal_constants_become_one() {
    let mut s = Small::new(DType::F32);
    let x = s.input("x", &["batch", "64"]);
    let (a, b) = (s.constant(&[64, 64], 3), s.constant(&[64, 64], 3));
    let other = s.constant(&[64, 64], 4);
    let products = [a, b, other].map(|w| s.op(Op::MatMul, &[x, w]));
    let sum = s.add(products[0], products[1]);
    let end = s.add(sum, products[2]);
    let (rewritten, rewrites) = rewrite(&s.finish(&[end]), cleanup::run, 1e-6);
    assert_eq!((rewrites, count(&rewritten, "MatMul")), (2, 2));

    // Two fills of one shape differ in what no text of the operator shows.
    let mut s = Small::new(DType::F32);
    let shape = s.ints(&[2]);
    let fills = [1.0, 2.0].map(|v| {
        let value = Tensor::from_f32(vec![1], &[v]);
        s.op(Op::ConstantOfShape { value }, &[shape])
    });
    let end = s.binary(Binary::Sub, fills[0], fills[1]);
    assert_eq!(rewrite(&s.finish(&[end]), cleanup::run, 0.0).1, 0);
}

/// TorchScript's way to expand: shapes in which -1 stands for "as it is".
#[test]
fn shape_arithmetic_folds() {
    let mut s = Small::new(DType::F32);
    let x = s.input("x", &["batch", "tokens", "8"]);
    let shape = s.op(Op::Shape { start: 0, end: None }, &[x]);
    let heads = s.ints(&[2, 4]);
    let (zero, two) = (s.ints(&[0]), s.ints(&[2]));
    let leading = s.op(Op::Slice, &[shape, zero, two]);
    let target = s.op(Op::Concat { axis: 0 }, &[leading, heads]);
    let split = s.op(Op::Reshape { allowzero: false }, &[x, target]);
    // Where(wanted == -1, ones, wanted) with nothing to keep.
    let (wanted, minus) = (s.ints(&[1, 1, 2, 4]), s.ints(&[-1, -1, -1, -1]));
    let four = s.ints(&[4]);
    let one = Tensor::from_i64(vec![1], &[1]);
    let ones = s.op(Op::ConstantOfShape { value: one }, &[four]);
    let kept = s.op(Op::Binary(Binary::Equal), &[wanted, minus]);
    let chosen = s.op(Op::Where, &[kept, ones, wanted]);
    let expanded = s.op(Op::Expand, &[split, chosen]);
    let end = s.unary(Unary::Exp, expanded);
    let (rewritten, _) = rewrite(&s.finish(&[end]), fold::run, 0.0);
    assert_eq!((rewritten.node_ids().count(), count(&rewritten, "Reshape")), (2, 1));
}

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

/// A few bytes that would become a gigabyte stay an operator.
#[test]
fn folding_does_not_blow_up() {
    let mut s = Small::new(DType::F32);
    let (number, shape) = (s.number(1.0), s.ints(&[1 << 14, 1 << 14]));
    let large = s.op(Op::Expand, &[number, shape]);
    let count_ = s.op(Op::Shape { start: 0, end: None }, &[large]);
    let mut graph = s.finish(&[large, count_]);
    fold::run(&mut graph).unwrap();
    assert_eq!(count(&graph, "Expand"), 1);
    assert!(graph.constant(graph.outputs[1]).is_some());
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

/// GPT-2's linear layer: flattened, multiplied, unflattened.
#[test]
fn flattening_around_a_layer_cancels() {
    let mut s = Small::new(DType::F32);
    let x = s.input("x", &["batch", "tokens", "16"]);
    let flat = s.reshape(x, &[-1, 16]);
    let (w, b) = (s.constant(&[16, 12], 1), s.constant(&[12], 2));
    let op = Op::Gemm {
        alpha: 1.0,
        beta: 1.0,
        trans_a: false,
        trans_b: false,
    };
    let product = s.op(op, &[flat, w, b]);
    let shape = s.op(Op::Shape { start: 0, end: Some(2) }, &[x]);
    let width = s.ints(&[12]);
    let target = s.op(Op::Concat { axis: 0 }, &[shape, width]);
    let whole = s.op(Op::Reshape { allowzero: false }, &[product, target]);
    let end = s.unary(Unary::Exp, whole);
    let graph = s.finish(&[end]);
    let both = |graph: &mut Graph| Ok(linear::run(graph)? + fold::run(graph)?);
    let (rewritten, _) = rewrite(&graph, both, 1e-5);
    assert_eq!(count(&rewritten, "Reshape"), 0);
    assert_eq!(rewritten.node_ids().count(), 4, "transpose, matmul, add, exp");
}

/// A weight that is read twice, once as a table, stays one constant.
#[test]
fn tied_weights_stay_tied() {
    let mut s = Small::new(DType::F32);
    let table = s.constant(&[97, 16], 1);
    let x = s.input("x", &["batch", "16"]);
    let head = s.op(Op::Transpose { perm: None }, &[table]);
    let logits = s.op(Op::MatMul, &[x, head]);
    let picks = s.ints(&[3, 1]);
    let rows = s.op(Op::Gather { axis: 0 }, &[table, picks]);
    let graph = s.finish(&[logits, rows]);
    let all = |graph: &mut Graph| Ok(fold::run(graph)? + linear::run(graph)? + cleanup::run(graph)?);
    let (rewritten, _) = rewrite(&graph, all, 1e-5);
    let tables = rewritten
        .value_ids()
        .filter(|v| rewritten.uses().contains_key(v) && rewritten.constant(*v).is_some_and(|c| c.len() == 97 * 16));
    assert_eq!(tables.count(), 1);
}

#[test]
fn integer_products_stay() {
    let mut s = Small::new(DType::F32);
    let (a, b) = (s.ints(&[1, 2]), s.ints(&[3, 4]));
    let (a, b) = (s.reshape(a, &[1, 2]), s.reshape(b, &[2, 1]));
    let end = s.op(Op::MatMul, &[a, b]);
    assert_eq!(rewrite(&s.finish(&[end]), linear::run, 0.0).1, 0);
}

#[test]
fn contrib_operators_come_apart() {
    for (bias, sum) in [(false, false), (true, true)] {
        let mut s = Small::new(DType::F32);
        let (x, skip) = (
            s.input("x", &["batch", "tokens", "8"]),
            s.input("skip", &["batch", "tokens", "8"]),
        );
        let (scale, shift) = (s.constant(&[8], 1), s.constant(&[8], 2));
        let bias = bias.then(|| s.constant(&[8], 3));
        let outputs: Vec<Option<ValueId>> = vec![
            Some(s.graph.add_value("rms")),
            None,
            None,
            sum.then(|| s.graph.add_value("sum")),
        ];
        let inputs = vec![Some(x), Some(skip), Some(scale), bias];
        let op = Op::SkipRmsNormalization { epsilon: 1e-5 };
        s.graph.add_node_with_outputs("skip", op, inputs, outputs.clone());
        let layer = s.graph.add_value("layer");
        let inputs = vec![Some(x), Some(skip), Some(scale), Some(shift), bias];
        let op = Op::SkipLayerNormalization { epsilon: 1e-5 };
        s.graph.add_node_with_outputs("skip", op, inputs, vec![Some(layer)]);
        let product = Op::FusedMatMul {
            alpha: 0.25,
            trans_a: false,
            trans_b: true,
        };
        let scores = s.op(product, &[x, skip]);
        let ends: Vec<ValueId> = outputs.into_iter().flatten().chain([layer, scores]).collect();
        let (rewritten, rewrites) = rewrite(&s.finish(&ends), decompose::contrib::run, 1e-5);
        assert_eq!((rewrites, count(&rewritten, "RMSNormalization")), (3, 1));
        assert!(rewritten.node_ids().all(|id| rewritten.node(id).op.domain().is_empty()));
    }
}

/// One position is the first token's; a matrix of them is one for each.
#[test]
fn contrib_rotary_reads_both_kinds_of_positions() {
    for positions in [
        Tensor::from_i64(vec![1], &[4]),
        Tensor::from_i64(vec![2, 3], &[4, 5, 6, 0, 1, 2]),
    ] {
        let mut s = Small::new(DType::F32);
        let x = s.input("x", &["batch", "tokens", "16"]);
        let positions = s.graph.add_constant("positions", positions);
        let tables = [1, 2].map(|seed| s.graph.add_constant("table", random(DType::F32, vec![32, 4], seed)));
        let op = Op::ContribRotaryEmbedding {
            interleaved: false,
            num_heads: None,
            rotary_dim: 0,
        };
        let end = s.op(op, &[x, positions, tables[0], tables[1]]);
        let (rewritten, rewrites) = rewrite(&s.finish(&[end]), decompose::contrib::run, 1e-6);
        assert_eq!((rewrites, count(&rewritten, "RotaryEmbedding")), (1, 1));
    }
}

/// `x + c` in fp16.
fn half_with(constant: Tensor) -> (Graph, Result<usize, PassError>) {
    let mut s = Small::new(DType::F32);
    let x = s.input("x", &["batch", "4"]);
    let c = s.graph.add_constant("the.constant", constant);
    let end = s.add(x, c);
    let mut graph = s.finish(&[end]);
    let result = dtype::run(&mut graph, DType::F16, false);
    (graph, result)
}

#[test]
fn numbers_fp16_cannot_hold_are_named_or_are_mask_fills() {
    for bad in [vec![1e6f32], vec![1e-9], vec![0.0, 7e4, 1.0, 2.0]] {
        let (_, result) = half_with(Tensor::from_f32(vec![bad.len()], &bad));
        let error = result.unwrap_err().to_string();
        assert!(error.contains("the.constant") && error.contains("bf16"), "{error}");
    }
    let fills = [
        (vec![f32::MIN], vec![-65504.0f32]),
        (vec![f32::NEG_INFINITY], vec![f32::NEG_INFINITY]),
        (
            vec![0.0, f32::MIN, f32::NEG_INFINITY, 0.0],
            vec![0.0, -65504.0, f32::NEG_INFINITY, 0.0],
        ),
        (vec![65504.0], vec![65504.0]),
    ];
    for (before, after) in fills {
        let (graph, result) = half_with(Tensor::from_f32(vec![before.len()], &before));
        result.unwrap();
        let constant = graph.value_ids().find_map(|v| graph.constant(v)).unwrap();
        assert_eq!(constant.materialize().unwrap().to_f32(), after);
        assert!(graph.inputs.iter().all(|i| graph.value(*i).dtype == Some(DType::F16)));
    }
}

#[test]
fn bf16_takes_every_fp32_number() {
    let mut s = Small::new(DType::F32);
    let x = s.input("x", &["batch", "4"]);
    let large = s.number(-1e30);
    let wide = s.cast(x, DType::F16);
    let back = s.cast(wide, DType::F32);
    let end = s.add(back, large);
    let mut graph = s.finish(&[end]);
    dtype::run(&mut graph, DType::Bf16, false).unwrap();
    // The casts between float types went away with the types.
    assert_eq!(graph.node_ids().count(), 1);
    assert_eq!(graph.value(graph.outputs[0]).dtype, Some(DType::Bf16));
}
