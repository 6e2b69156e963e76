//! Single operators that canonical graphs may hold beside the fused ones: lowered, run layer by layer, and compared with
//! the graph's evaluator.

use std::collections::{BTreeMap, HashMap};

use lapidary::dim::Dim;
use lapidary::graph::eval::Evaluator;
use lapidary::graph::op::{Attention, Binary, Op, Reduction, Unary};
use lapidary::graph::{Constant, Graph, ValueId};
use lapidary::lower::{LinearForm, Options, lower_graph};
use lapidary::network::{Logits, Profile};
use lapidary::tensor::{DType, Tensor};

use crate::interpret::interpret;
use crate::models::{Random, difference};

/// A graph over random inputs and given constants.
struct Case {
    graph: Graph,
    random: Random,
    bindings: HashMap<ValueId, Tensor>,
}

impl Case {
    fn new() -> Self {
        Case {
            graph: Graph::new("case"),
            random: Random::new(3),
            bindings: HashMap::new(),
        }
    }

    fn bound(&mut self, tensor: Tensor) -> ValueId {
        let shape = tensor.shape().iter().map(|d| Dim::from(*d)).collect();
        let id = self
            .graph
            .add_input(&format!("in{}", self.bindings.len()), tensor.dtype(), shape);
        self.bindings.insert(id, tensor);
        id
    }
    fn floats(&mut self, shape: &[usize]) -> ValueId {
        let tensor = self.random.tensor(DType::F32, shape);
        self.bound(tensor)
    }
    fn ints(&mut self, shape: &[usize], values: &[i64]) -> ValueId {
        self.bound(Tensor::from_i64(shape.to_vec(), values))
    }
    fn bools(&mut self, shape: &[usize], values: &[bool]) -> ValueId {
        self.bound(Tensor::from_bool(shape.to_vec(), values))
    }
    fn i64s(&mut self, values: &[i64]) -> ValueId {
        self.graph.add_i64("parameter", values)
    }
    fn scalar(&mut self, value: f32) -> ValueId {
        self.graph.add_constant("scalar", Tensor::from_f32(vec![], &[value]))
    }
    fn weight(&mut self, shape: &[usize]) -> ValueId {
        let tensor = Constant::tensor(self.random.tensor(DType::F32, shape)).with_origin("weight");
        self.graph.add_constant("weight", tensor)
    }

    /// The node's outputs, lowered and interpreted, equal what the evaluator gives.
    fn node(mut self, op: Op, inputs: &[ValueId], outputs: usize) {
        let text = format!("{op:?}");
        let outputs: Vec<ValueId> = (0..outputs).map(|i| self.graph.add_value(&format!("out{i}"))).collect();
        let some = |ids: &[ValueId]| ids.iter().map(|id| Some(*id)).collect();
        self.graph
            .add_node_with_outputs("node", op, some(inputs), some(&outputs));
        self.graph.outputs = outputs;
        self.check(&text);
    }

    fn check(self, what: &str) {
        let Case { graph, bindings, .. } = self;
        let expected = Evaluator::new(&graph, bindings.clone())
            .values(&graph.outputs)
            .unwrap_or_else(|e| panic!("{what}: {e}"));
        let profile = Profile {
            logits: Logits::All,
            ..Profile::prefill(3, 16)
        };
        let narrow = |t: &Tensor| match t.dtype() {
            DType::I64 => Tensor::from_i32(
                t.shape().to_vec(),
                &t.to_i64().iter().map(|v| *v as i32).collect::<Vec<_>>(),
            ),
            _ => t.clone(),
        };
        let inputs: BTreeMap<String, Tensor> = bindings
            .iter()
            .map(|(id, t)| (graph.value(*id).name.clone(), narrow(t)))
            .collect();
        for linear in [LinearForm::FlattenActivation, LinearForm::RaiseWeight] {
            let options = Options {
                linear,
                ..Options::default()
            };
            let network = lower_graph(&graph, &profile, &options).unwrap_or_else(|e| panic!("{what}: {e}"));
            let found = interpret(&network, &inputs);
            for (id, expected) in graph.outputs.iter().zip(&expected) {
                let found = &found[&graph.value(*id).name];
                assert_eq!(found.dtype(), narrow(expected).dtype(), "{what}");
                assert_eq!(found.shape(), expected.shape(), "{what}");
                let worst = difference(found, expected);
                assert!(worst < 1e-5, "{what}: differs by {worst}");
            }
        }
    }
}

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
fn movements() {
    for (from, to) in [
        (&[2, 3, 4][..], &[0, -1][..]),
        (&[2, 3, 4], &[4, 6]),
        (&[6], &[1, 2, 3]),
        (&[2, 3], &[-1]),
    ] {
        let mut case = Case::new();
        let (x, to) = (case.floats(from), case.i64s(to));
        case.node(Op::Reshape { allowzero: false }, &[x, to], 1);
    }
    for perm in [None, Some(vec![1, 0, 2]), Some(vec![0, 2, 1])] {
        for shape in [&[2, 3, 4][..], &[1, 3, 1]] {
            let mut case = Case::new();
            let x = case.floats(shape);
            case.node(Op::Transpose { perm: perm.clone() }, &[x], 1);
        }
    }
    for axis in [0, 1, 3, -1] {
        let mut case = Case::new();
        let x = case.floats(&[2, 3, 4]);
        case.node(Op::Flatten { axis }, &[x], 1);
    }
    let mut case = Case::new();
    let (x, axes) = (case.floats(&[2, 1, 3, 1]), case.i64s(&[-1, 1]));
    case.node(Op::Squeeze, &[x, axes], 1);
    let mut case = Case::new();
    let x = case.floats(&[2, 1, 3, 1]);
    case.node(Op::Squeeze, &[x], 1);
    let mut case = Case::new();
    let (x, axes) = (case.floats(&[2, 3]), case.i64s(&[0, -1]));
    case.node(Op::Unsqueeze, &[x, axes], 1);
    for (from, to) in [(&[3, 1][..], &[2, 3, 4][..]), (&[2, 3], &[1]), (&[1, 4], &[3, 1])] {
        let mut case = Case::new();
        let (x, to) = (case.floats(from), case.i64s(to));
        case.node(Op::Expand, &[x, to], 1);
    }
    let mut case = Case::new();
    let (x, repeats) = (case.floats(&[2, 3]), case.i64s(&[2, 3]));
    case.node(Op::Tile, &[x, repeats], 1);
    let mut case = Case::new();
    let (a, b) = (case.floats(&[2, 3]), case.floats(&[2, 1]));
    case.node(Op::Concat { axis: -1 }, &[a, b], 1);
    let mut case = Case::new();
    let (x, sizes) = (case.floats(&[2, 6]), case.i64s(&[1, 2, 3]));
    case.node(Op::Split { axis: 1 }, &[x, sizes], 3);
}

#[test]
fn chained_shuffles_keep_their_order() {
    let mut case = Case::new();
    let x = case.floats(&[1, 3, 8]);
    let g = &mut case.graph;
    let heads = g.add_i64("heads", &[1, 3, 2, 4]);
    let y = g.add_node("split", Op::Reshape { allowzero: false }, &[x, heads]);
    let perm = |p: &[usize]| Op::Transpose { perm: Some(p.to_vec()) };
    let y = g.add_node("first", perm(&[0, 2, 1, 3]), &[y]);
    let y = g.add_node("second", perm(&[0, 1, 3, 2]), &[y]);
    let flat = g.add_i64("flat", &[6, 4]);
    let z = g.add_node("joined", Op::Reshape { allowzero: false }, &[y, flat]);
    let w = g.add_node("third", perm(&[1, 0]), &[z]);
    let v = g.add_node("same", perm(&[1, 0]), &[w]);
    g.outputs = vec![y, z, w, v];
    case.check("chained shuffles");
}

#[test]
fn slices() {
    for (starts, ends, axes, steps) in [
        (&[1][..], &[3][..], &[1][..], &[1][..]),
        (&[-2, 0], &[i64::MAX, -1], &[2, 0], &[1, 1]),
        (&[0], &[100], &[2], &[2]),
        (&[-1], &[i64::MIN], &[1], &[-1]),
    ] {
        let mut case = Case::new();
        let x = case.floats(&[2, 3, 5]);
        let parameters = [starts, ends, axes, steps].map(|p| case.i64s(p));
        let inputs = [&[x][..], &parameters].concat();
        case.node(Op::Slice, &inputs, 1);
    }
}

#[test]
fn gathers() {
    let mut case = Case::new();
    let (table, ids) = (case.weight(&[6, 4]), case.ints(&[2, 3], &[0, 5, 2, 1, 1, 3]));
    case.node(Op::Gather { axis: 0 }, &[table, ids], 1);
    let mut case = Case::new();
    let (x, last) = (
        case.floats(&[2, 3, 4]),
        case.graph.add_constant("last", Tensor::from_i64(vec![], &[-1])),
    );
    case.node(Op::Gather { axis: 1 }, &[x, last], 1);
    let mut case = Case::new();
    let (x, picks) = (case.floats(&[2, 4]), case.i64s(&[3, -4]));
    case.node(Op::Gather { axis: -1 }, &[x, picks], 1);
}

#[test]
fn shapes_read_as_data() {
    let mut case = Case::new();
    let x = case.floats(&[2, 3, 4]);
    case.node(Op::Shape { start: 1, end: None }, &[x], 1);
    let mut case = Case::new();
    let x = case.floats(&[2, 3]);
    case.node(Op::Size, &[x], 1);
    let mut case = Case::new();
    let to = case.i64s(&[2, 3]);
    let value = Tensor::from_f32(vec![1], &[1.5]);
    case.node(Op::ConstantOfShape { value }, &[to], 1);
    let mut case = Case::new();
    let ends: Vec<ValueId> = [3, 12, 4]
        .iter()
        .map(|v| case.graph.add_constant("end", Tensor::from_i64(vec![], &[*v])))
        .collect();
    case.node(Op::Range, &ends, 1);
    // Reshape to a shape that is computed from another tensor's.
    let mut case = Case::new();
    let (x, like) = (case.floats(&[6]), case.floats(&[2, 3]));
    let shape = case.graph.add_node("shape", Op::Shape { start: 0, end: None }, &[like]);
    case.node(Op::Reshape { allowzero: false }, &[x, shape], 1);
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
