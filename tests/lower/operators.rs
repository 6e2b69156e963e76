//! Single operators that canonical graphs may have besides the fused ones, and the fused ones alone.

use lapidary::graph::op::{
    Attention, Binary, ChosenWeights, ExpertActivation, Experts, Op, Reduction, RouterScores, Routing, Unary,
};
use lapidary::graph::{Graph, ValueId};
use lapidary::lower::{LowerOptions, lower_graph};
use lapidary::network::Profile;
use lapidary::tensor::{DType, Tensor};

use crate::case::Case;

#[test]
fn unaries() {
    use Unary::*;
    for op in [
        Abs, Ceil, Cos, Erf, Exp, Floor, Neg, Reciprocal, Relu, Round, Sigmoid, Sign, Sin, Softplus, Tanh, IsNan,
    ] {
        let mut case = Case::new();
        let x = case.floats(&[2, 3]);
        case.node(Op::Unary(op), &[x], 1);
    }
    for op in [Neg, Abs, Sign] {
        let mut case = Case::new();
        let x = case.ints(&[4], &[-3, 0, 5, 7]);
        case.node(Op::Unary(op), &[x], 1);
    }
    for op in [Sqrt, Log] {
        let mut case = Case::new();
        let x = case.bound(Tensor::from_f32(vec![3], &[0.25, 1.0, 7.0]));
        case.node(Op::Unary(op), &[x], 1);
    }
    let mut case = Case::new();
    let x = case.bools(&[2], &[true, false]);
    case.node(Op::Unary(Not), &[x], 1);
}

#[test]
fn routing_of_every_kind() {
    for scores in [RouterScores::Softmax, RouterScores::Sigmoid, RouterScores::Logits] {
        for weights in [
            ChosenWeights::Scores,
            ChosenWeights::Normalized,
            ChosenWeights::Softmax,
            ChosenWeights::Sigmoid,
            ChosenWeights::SparseMixer,
        ] {
            for (groups, is_corrected) in [(0, false), (0, true), (4, false), (4, true)] {
                let mut case = Case::new();
                let logits = case.floats(&[2, 3, 8]);
                let correction = case.weight(&[8]);
                let routing = Routing {
                    top_k: 3,
                    scores,
                    weights,
                    margin: 0.6,
                    scale: 2.5,
                    groups,
                    top_groups: if groups > 0 { 2 } else { 0 },
                    group_best: if groups > 0 { 2 } else { 0 },
                };
                // Outside of the chosen groups scores count as 0, which logits may be below.
                if groups > 0 && scores == RouterScores::Logits {
                    continue;
                }
                let inputs = if is_corrected {
                    vec![logits, correction]
                } else {
                    vec![logits]
                };
                case.node(Op::Routing(routing), &inputs, 2);
            }
        }
    }
}

#[test]
fn experts_in_every_form() {
    for (activation, limit, beta) in [
        (ExpertActivation::Swish, 0.0, 0.0),
        (ExpertActivation::Swish, 0.5, 1.0),
        (ExpertActivation::Gelu, 0.0, 0.0),
        (ExpertActivation::GeluTanh, 0.0, 0.0),
        (ExpertActivation::Relu, 0.0, 0.0),
        (ExpertActivation::ReluSquared, 0.0, 0.0),
    ] {
        for (is_gated, biases) in [(true, 0), (true, 3), (true, 1), (false, 0), (false, 2)] {
            let mut case = Case::new();
            let x = case.floats(&[2, 3, 8]);
            let weights = case.floats(&[2, 3, 2]);
            let experts = case.ints(&[2, 3, 2], &[0, 1, 2, 0, 3, 1, 1, 2, 3, 0, 2, 3]);
            let gate = case.weight(&[4 * 6, 8]);
            let up = case.weight(&[4 * 6, 8]);
            let down = case.weight(&[4 * 5, 6]);
            let of_gate = case.weight(&[4 * 6]);
            let of_up = case.weight(&[4 * 6]);
            let of_down = case.weight(&[4 * 5]);
            let op = Op::Experts(Experts {
                experts: 4,
                activation,
                alpha: 1.702,
                beta,
                limit,
            });
            let some = |is: bool, value| is.then_some(value);
            // A bias that is missing beside others is 0.
            let inputs = vec![
                Some(x),
                Some(weights),
                Some(experts),
                Some(gate),
                some(is_gated, up),
                Some(down),
                some(biases > 0, of_gate),
                some(biases > 2, of_up),
                some(biases > 1, of_down),
            ];
            let y = case.graph.add_value("y");
            case.graph
                .add_node_with_outputs("node", op.clone(), inputs, vec![Some(y)]);
            case.graph.outputs = vec![y];
            case.check(&format!("{op:?}, {is_gated}, {biases} biases"));
        }
    }
}

#[test]
fn binaries_broadcast_ranks() {
    use Binary::*;
    for op in [
        Add,
        Sub,
        Mul,
        Div,
        Max,
        Min,
        Less,
        Greater,
        LessOrEqual,
        GreaterOrEqual,
        Equal,
    ] {
        for shapes in [[&[2, 3, 4][..], &[4][..]], [&[3, 1], &[2, 1, 4]], [&[], &[2, 2]]] {
            let mut case = Case::new();
            let a = case.floats(shapes[0]);
            let b = case.floats(shapes[1]);
            case.node(Op::Binary(op), &[a, b], 1);
        }
    }
    for op in [Add, Mul, Mod, Max, Less, Greater, LessOrEqual, GreaterOrEqual, Equal] {
        for flip in [false, true] {
            let mut case = Case::new();
            let a = case.ints(&[2, 3], &[5, -5, 7, 2, 3, -3]);
            let b = case.ints(&[1], &[3]);
            let inputs = if flip && op != Mod { [b, a] } else { [a, b] };
            case.node(Op::Binary(op), &inputs, 1);
        }
    }
    for op in [And, Or, Xor, Equal] {
        let mut case = Case::new();
        let a = case.bools(&[2, 2], &[true, true, false, false]);
        let b = case.bools(&[2], &[true, false]);
        case.node(Op::Binary(op), &[a, b], 1);
    }
    for exponent in [1.0, 2.0, 3.0, 4.0] {
        let mut case = Case::new();
        let x = case.floats(&[2, 3]);
        let e = case.scalar(exponent);
        case.node(Op::Binary(Pow), &[x, e], 1);
    }
    for exponent in [0.5, -0.5, 1.7] {
        let mut case = Case::new();
        let x = case.bound(Tensor::from_f32(vec![3], &[0.25, 1.0, 7.0]));
        let e = case.scalar(exponent);
        case.node(Op::Binary(Pow), &[x, e], 1);
    }
}

#[test]
fn selection_and_casts() {
    let mut case = Case::new();
    let c = case.bools(&[2, 1], &[true, false]);
    let (a, b) = (case.floats(&[3]), case.scalar(f32::NEG_INFINITY));
    case.node(Op::Where, &[c, a, b], 1);
    let mut case = Case::new();
    let c = case.bools(&[2, 2], &[true, true, false, false]);
    let a = case.bools(&[2], &[true, false]);
    let b = case.bools(&[1, 2], &[false, true]);
    case.node(Op::Where, &[c, a, b], 1);
    let mut case = Case::new();
    let x = case.ints(&[3], &[0, 1, -2]);
    case.node(Op::Cast { to: DType::Bool }, &[x], 1);
    let mut case = Case::new();
    let x = case.bound(Tensor::from_f32(vec![3], &[0.5, -1.5, 2.0]));
    case.node(Op::Cast { to: DType::I64 }, &[x], 1);
    let mut case = Case::new();
    let (x, like) = (case.ints(&[3], &[0, 1, -2]), case.scalar(0.0));
    case.node(Op::CastLike, &[x, like], 1);
    let mut case = Case::new();
    let (x, low, high) = (case.floats(&[4]), case.scalar(-0.2), case.scalar(0.3));
    case.node(Op::Clip, &[x, low, high], 1);
    let mut case = Case::new();
    let x = case.floats(&[2, 4]);
    case.node(Op::Swish { alpha: 1.7 }, &[x], 1);
    for tanh in [false, true] {
        let mut case = Case::new();
        let x = case.floats(&[5]);
        case.node(Op::Gelu { tanh }, &[x], 1);
    }
    for alpha in [1.0, 0.3] {
        let mut case = Case::new();
        let x = case.floats(&[2, 5]);
        case.node(Op::Elu { alpha }, &[x], 1);
    }
}

#[test]
fn reductions_and_softmax() {
    for reduction in [
        Reduction::Mean,
        Reduction::Sum,
        Reduction::Max,
        Reduction::Min,
        Reduction::Prod,
        Reduction::SumSquare,
    ] {
        for keepdims in [true, false] {
            let mut case = Case::new();
            let x = case.floats(&[2, 3, 4]);
            let axes = case.i64s(&[-1, 0]);
            let op = Op::Reduce {
                reduction,
                keepdims,
                noop_with_empty_axes: false,
            };
            case.node(op, &[x, axes], 1);
        }
        let mut case = Case::new();
        let x = case.floats(&[2, 3]);
        let op = Op::Reduce {
            reduction,
            keepdims: false,
            noop_with_empty_axes: false,
        };
        case.node(op, &[x], 1);
    }
    for op in [Op::Softmax { axis: 1 }, Op::LogSoftmax { axis: -1 }] {
        let mut case = Case::new();
        let x = case.floats(&[2, 3, 4]);
        case.node(op, &[x], 1);
    }
}

#[test]
fn products() {
    let shapes: [[&[usize]; 2]; 8] = [
        [&[2, 3], &[3, 4]],
        [&[2, 5, 3], &[3, 4]],
        [&[2, 5, 3], &[2, 3, 4]],
        [&[3], &[3, 4]],
        [&[2, 3], &[3]],
        [&[3], &[3]],
        [&[2, 1, 5, 3], &[4, 3, 2]],
        [&[3], &[2, 3, 4]],
    ];
    for [a, b] in shapes {
        let mut case = Case::new();
        let (a, b) = (case.floats(a), case.floats(b));
        case.node(Op::MatMul, &[a, b], 1);
    }
    for (shape, perm) in [(&[2, 4, 3][..], vec![0, 2, 1]), (&[4, 3], vec![1, 0])] {
        let mut case = Case::new();
        let (a, b) = (case.floats(&[2, 5, 3]), case.weight(shape));
        let turned = case.graph.add_node("turned", Op::Transpose { perm: Some(perm) }, &[b]);
        case.node(Op::MatMul, &[a, turned], 1);
    }
    for (trans_a, trans_b, alpha, beta) in [
        (false, false, 1.0, 1.0),
        (true, true, 0.5, 2.0),
        (false, true, 1.0, 0.0),
    ] {
        let mut case = Case::new();
        let a = case.floats(if trans_a { &[3, 2] } else { &[2, 3] });
        let b = case.weight(if trans_b { &[4, 3] } else { &[3, 4] });
        let c = case.floats(&[4]);
        let op = Op::Gemm {
            alpha,
            beta,
            trans_a,
            trans_b,
        };
        case.node(op, &[a, b, c], 1);
    }
    let mut case = Case::new();
    let (a, b) = (case.floats(&[2, 2, 3]), case.floats(&[2, 4, 3]));
    let op = Op::FusedMatMul {
        alpha: 0.25,
        trans_a: false,
        trans_b: true,
    };
    case.node(op, &[a, b], 1);
}

#[test]
fn norms() {
    for axis in [-1, 1] {
        let (inner, epsilon) = (if axis == 1 { vec![3, 4] } else { vec![4] }, 1e-5);
        let mut case = Case::new();
        let (x, scale) = (case.floats(&[2, 3, 4]), case.weight(&inner));
        case.node(Op::RmsNormalization { axis, epsilon }, &[x, scale], 1);
        let mut case = Case::new();
        let (x, scale) = (case.floats(&[2, 3, 4]), case.weight(&inner));
        case.node(Op::LayerNormalization { axis, epsilon }, &[x, scale], 1);
        let mut case = Case::new();
        let (x, scale, bias) = (case.floats(&[2, 3, 4]), case.weight(&inner), case.floats(&inner));
        case.node(Op::LayerNormalization { axis, epsilon }, &[x, scale, bias], 1);
    }
}

#[test]
fn rotations() {
    for interleaved in [false, true] {
        for (shape, num_heads, rotary_dim) in [
            (&[2, 3, 4, 8][..], None, 0),
            (&[2, 3, 4, 8], None, 4),
            (&[2, 4, 24], Some(3), 0),
        ] {
            let half = if rotary_dim == 0 { 4 } else { rotary_dim / 2 };
            let op = Op::RotaryEmbedding {
                interleaved,
                num_heads,
                rotary_dim,
            };
            let mut case = Case::new();
            let (x, cos, sin) = (case.floats(shape), case.weight(&[10, half]), case.weight(&[10, half]));
            let positions = case.ints(&[2, 4], &[0, 1, 2, 3, 6, 7, 8, 9]);
            case.node(op.clone(), &[x, cos, sin, positions], 1);
            // Tables by token, without positions.
            let mut case = Case::new();
            let (x, cos, sin) = (
                case.floats(shape),
                case.floats(&[2, 4, half]),
                case.floats(&[2, 4, half]),
            );
            case.node(op, &[x, cos, sin], 1);
        }
    }
}

#[test]
fn attentions() {
    let op = |heads: Option<usize>, kv: Option<usize>, softcap| {
        Op::Attention(Attention {
            is_causal: false,
            scale: Some(0.3),
            softcap,
            q_num_heads: heads,
            kv_num_heads: kv,
            softmax_precision: None,
        })
    };
    for softcap in [0.0, 1.5] {
        for tokens in [1, 3] {
            let mut case = Case::new();
            let (q, k, v) = (
                case.floats(&[2, 4, tokens, 8]),
                case.floats(&[2, 2, 5, 8]),
                case.floats(&[2, 2, 5, 8]),
            );
            case.node(op(None, None, softcap), &[q, k, v], 1);
            // An additive mask by head, with one row for all tokens.
            let mut case = Case::new();
            let (q, k, v) = (
                case.floats(&[2, 4, tokens, 8]),
                case.floats(&[2, 2, 5, 8]),
                case.floats(&[2, 2, 5, 8]),
            );
            let mask = case.floats(&[4, 1, 5]);
            case.node(op(None, None, softcap), &[q, k, v, mask], 1);
            let mut case = Case::new();
            let (q, k, v) = (
                case.floats(&[2, tokens, 32]),
                case.floats(&[2, 5, 16]),
                case.floats(&[2, 5, 16]),
            );
            let mask = case.bools(&[1, 5], &[true, false, true, true, false]);
            case.node(op(Some(4), Some(2), softcap), &[q, k, v, mask], 1);
        }
    }
}

/// Operators of the canonical graph that occur only inside masks, rotary tables and caches, which the passes replace.
const INSIDE_PATTERNS: [&str; 4] = ["CumSum", "GatherElements", "GatherND", "Trilu"];

/// `lower`'s files match on the operators of their family with a fallback, so the compiler does not report a new
/// operator without a lowering. This test does.
#[test]
fn every_canonical_operator_has_a_lowering() {
    let mut missing = Vec::new();
    for op in Op::all().into_iter().filter(|op| op.info().canonical) {
        let mut graph = Graph::new("one");
        let inputs: Vec<ValueId> = op
            .info()
            .inputs
            .iter()
            .filter(|input| !input.optional)
            .map(|input| {
                let types = [DType::F32, DType::Bool, DType::I64, DType::I32];
                let dtype = types.into_iter().find(|dtype| input.types.takes(*dtype)).unwrap();
                graph.add_input("x", dtype, vec![2usize.into(), 2usize.into()])
            })
            .collect();
        let name = op.name();
        let y = graph.add_node("y", op, &inputs);
        let value = graph.value_mut(y);
        (value.dtype, value.shape) = (Some(DType::F32), Some(vec![2usize.into(), 2usize.into()]));
        graph.outputs.push(y);
        let lowered = lower_graph(&graph, &Profile::prefill(1, 16), &LowerOptions::default());
        let without = lowered.is_err_and(|error| error.to_string().contains("lowered only as part of"));
        if without != INSIDE_PATTERNS.contains(&name.as_str()) {
            missing.push(name);
        }
    }
    assert!(
        missing.is_empty(),
        "without a lowering (or listed as such): {}",
        missing.join(", ")
    );
}
