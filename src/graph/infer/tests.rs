use super::*;
use crate::graph::op::{Binary, Reduction, Unary};
use crate::graph::verify;
use crate::tensor::Tensor;

fn dims(text: &str) -> Shape {
    text.split(',')
        .filter(|d| !d.trim().is_empty())
        .map(Dim::parse)
        .collect()
}

fn shown(graph: &Graph, value: ValueId) -> String {
    format!("{:?}", graph.shape(value).expect("a shape"))
}

/// A scalar length taken from a tensor, as exporters do: `Gather(Shape(x), axis)`.
fn length_of(graph: &mut Graph, x: ValueId, axis: i64) -> ValueId {
    let shape = graph.add_node("shape", Op::Shape { start: 0, end: None }, &[x]);
    let axis = graph.add_constant("axis", Tensor::from_i64(vec![], &[axis]));
    graph.add_node("length", Op::Gather { axis: 0 }, &[shape, axis])
}

fn vector(graph: &mut Graph, scalar: ValueId) -> ValueId {
    let zero = graph.add_i64("zero", &[0]);
    graph.add_node("vector", Op::Unsqueeze, &[scalar, zero])
}

#[test]
fn shapes_computed_in_the_graph_are_followed() {
    let mut graph = Graph::new("g");
    let x = graph.add_input("x", DType::F32, dims("batch, tokens, 64"));
    let (batch, tokens) = (length_of(&mut graph, x, 0), length_of(&mut graph, x, 1));
    let (batch, tokens) = (vector(&mut graph, batch), vector(&mut graph, tokens));
    let heads = graph.add_i64("heads", &[4, -1]);
    let target = graph.add_node("target", Op::Concat { axis: 0 }, &[batch, tokens, heads]);
    let split = graph.add_node("split", Op::Reshape { allowzero: false }, &[x, target]);
    let perm = Some(vec![0, 2, 1, 3]);
    let y = graph.add_node("y", Op::Transpose { perm }, &[split]);
    let facts = infer(&mut graph).unwrap();
    assert_eq!(shown(&graph, y), "[batch, 4, tokens, 16]");
    let target = facts.contents(target).unwrap();
    assert_eq!(
        format!("{:?} {}", target.elements, target.scalar),
        "[batch, tokens, 4, -1] false"
    );
    let batch = facts.contents(batch).unwrap();
    assert_eq!(batch.single(), Some(&Dim::named("batch")));
}

#[test]
fn the_idiom_where_minus_one_keeps_a_dim_is_decided() {
    // Where(Equal(shape, -1), ones, shape) before Expand, as TorchScript writes it.
    let mut graph = Graph::new("g");
    let x = graph.add_input("x", DType::F32, dims("batch, 1, tokens"));
    let batch = length_of(&mut graph, x, 0);
    let batch = vector(&mut graph, batch);
    let rest = graph.add_i64("rest", &[8, -1]);
    let shape = graph.add_node("wanted", Op::Concat { axis: 0 }, &[batch, rest]);
    let three = graph.add_i64("three", &[3]);
    let value = Tensor::from_i64(vec![1], &[1]);
    let ones = graph.add_node("ones", Op::ConstantOfShape { value }, &[three]);
    let minus = graph.add_constant("minus", Tensor::from_i64(vec![], &[-1]));
    let minus = graph.add_node("minuses", Op::Binary(Binary::Mul), &[ones, minus]);
    let keep = graph.add_node("keep", Op::Binary(Binary::Equal), &[shape, minus]);
    let target = graph.add_node("target", Op::Where, &[keep, ones, shape]);
    let y = graph.add_node("y", Op::Expand, &[x, target]);
    let facts = infer(&mut graph).unwrap();
    assert_eq!(shown(&graph, y), "[batch, 8, tokens]");
    assert_eq!(facts.contents(keep).unwrap().as_consts(), Some(vec![0, 0, 1]));
}

#[test]
fn lengths_from_different_tensors_become_one() {
    let mut graph = Graph::new("g");
    let key = graph.add_input("past.0.key", DType::F32, dims("b, 2, p0, 16"));
    let value = graph.add_input("past.1.value", DType::F32, dims("b, 2, p1, 16"));
    let mask = graph.add_input("mask", DType::F32, dims("b, 1, s, total"));
    let new = graph.add_input("new", DType::F32, dims("b, 2, s, 16"));
    let keys = graph.add_node("keys", Op::Concat { axis: -2 }, &[key, new]);
    let values = graph.add_node("values", Op::Concat { axis: -2 }, &[value, new]);
    let perm = Some(vec![0, 1, 3, 2]);
    let turned = graph.add_node("turned", Op::Transpose { perm }, &[keys]);
    let scores = graph.add_node("scores", Op::MatMul, &[new, turned]);
    let masked = graph.add_node("masked", Op::Binary(Binary::Add), &[scores, mask]);
    let y = graph.add_node("y", Op::MatMul, &[masked, values]);
    let facts = infer(&mut graph).unwrap();
    assert_eq!(shown(&graph, masked), "[b, 2, s, p1 + s]");
    assert_eq!(shown(&graph, y), "[b, 2, s, 16]");
    // Inputs take the common names too.
    assert_eq!(shown(&graph, mask), "[b, 1, s, p1 + s]");
    assert_eq!(shown(&graph, key), "[b, 2, p1, 16]");
    assert_eq!(facts.resolve(&Dim::parse("total - p1")), Dim::named("s"));
}

#[test]
fn what_is_learned_late_decides_what_came_before() {
    let mut graph = Graph::new("g");
    let x = graph.add_input("x", DType::F32, dims("n, 4"));
    let other = graph.add_input("other", DType::F32, dims("m, 4"));
    // -1 of [n*4] over m is known only once n and m are.
    let m = length_of(&mut graph, other, 0);
    let m = vector(&mut graph, m);
    let open = graph.add_i64("open", &[-1]);
    let target = graph.add_node("target", Op::Concat { axis: 0 }, &[m, open]);
    let y = graph.add_node("y", Op::Reshape { allowzero: false }, &[x, target]);
    graph.add_node("sum", Op::Binary(Binary::Add), &[x, other]);
    infer(&mut graph).unwrap();
    let shape = graph.shape(y).unwrap();
    assert_eq!(shape[1], Dim::constant(4));
}

#[test]
fn broadcasting_of_ones_zeros_and_symbols() {
    let cases = [
        ("tokens, 1", "1, 8", "[tokens, 8]"),
        ("0, 1", "1, 8", "[0, 8]"),
        ("1", "0", "[0]"),
        ("n", "4", "[4]"),
        ("", "n", "[n]"),
        ("1", "past + tokens", "[past + tokens]"),
        // Not an equation: an export that does this works for no past, and for one token.
        ("tokens", "past + tokens", "[past + tokens]"),
    ];
    for (left, right, expected) in cases {
        for (a, b) in [(left, right), (right, left)] {
            let mut graph = Graph::new("g");
            let a = graph.add_input("a", DType::F32, dims(a));
            let b = graph.add_input("b", DType::F32, dims(b));
            let y = graph.add_node("y", Op::Binary(Binary::Add), &[a, b]);
            infer(&mut graph).unwrap();
            assert_eq!(shown(&graph, y), expected);
        }
    }
}

#[test]
fn ranges_slices_and_reductions_of_lengths() {
    let mut graph = Graph::new("g");
    let past = graph.add_input("past", DType::F32, dims("past, 16"));
    let x = graph.add_input("x", DType::F32, dims("tokens, 16"));
    let (start, new) = (length_of(&mut graph, past, 0), length_of(&mut graph, x, 0));
    let end = graph.add_node("end", Op::Binary(Binary::Add), &[start, new]);
    let one = graph.add_constant("one", Tensor::from_i64(vec![], &[1]));
    let range = graph.add_node("range", Op::Range, &[start, end, one]);
    let zero = graph.add_i64("from", &[0]);
    let far = graph.add_i64("far", &[i64::MAX]);
    let half = graph.add_i64("half", &[8]);
    let last = graph.add_i64("last", &[-1]);
    let count = vector(&mut graph, new);
    let upper = graph.add_node("upper", Op::Slice, &[x, half, far, last]);
    let table = graph.add_constant("table", Tensor::from_f32(vec![64, 2], &[0.0; 128]));
    let rows = graph.add_node("rows", Op::Slice, &[table, zero, count]);
    let shape = graph.add_node("whole", Op::Shape { start: 0, end: None }, &[x]);
    let reduce = Op::Reduce {
        reduction: Reduction::Prod,
        keepdims: false,
        noop_with_empty_axes: false,
    };
    let size = graph.add_node("size", reduce, &[shape]);
    let facts = infer(&mut graph).unwrap();
    assert_eq!(shown(&graph, range), "[tokens]");
    assert_eq!(shown(&graph, upper), "[tokens, 8]");
    assert_eq!(shown(&graph, rows), "[tokens, 2]");
    assert_eq!(facts.contents(size).unwrap().single(), Some(&Dim::parse("16*tokens")));
}

#[test]
fn conflicts_name_the_node_and_both_operands() {
    let mut graph = Graph::new("g");
    let a = graph.add_input("a", DType::F32, dims("batch, 4"));
    let b = graph.add_input("b", DType::F32, dims("batch, 5"));
    graph.add_node("sum", Op::Binary(Binary::Add), &[a, b]);
    let error = infer(&mut graph).unwrap_err();
    assert_eq!(
        error.to_string(),
        "node \"sum\" (Add): \"a\" f32[batch, 4] and \"b\" f32[batch, 5] do not fit, because the dimensions 4 and 5 cannot be equal"
    );
}

#[test]
fn roles_are_given_to_the_inputs_dims() {
    let mut graph = Graph::new("g");
    // The export's own "past" is the whole length, and its batch is fixed.
    let ids = graph.add_input("input_ids", DType::I64, dims("1, s"));
    let mask = graph.add_input("mask", DType::I64, dims("1, past"));
    let key = graph.add_input("key", DType::F32, dims("1, 2, p, 16"));
    let roles = [
        (ids, 0, Dim::sym(Sym::batch())),
        (ids, 1, Dim::sym(Sym::tokens())),
        (key, 2, Dim::sym(Sym::past())),
        (mask, 1, Dim::parse("past + tokens")),
    ];
    bind_input_dims(&mut graph, &roles).unwrap();
    assert_eq!(shown(&graph, ids), "[1, tokens]");
    assert_eq!(shown(&graph, mask), "[1, past + tokens]");
    assert_eq!(shown(&graph, key), "[1, 2, past, 16]");
    let error = bind_input_dims(&mut graph, &[(key, 1, Dim::constant(3))]).unwrap_err();
    assert!(error.to_string().contains("\"key\""), "{error}");
    assert!(bind_input_dims(&mut graph, &[(key, 4, Dim::constant(3))]).is_err());
}

#[test]
fn values_behind_an_unknown_operator_stay_untyped_and_only_it_is_reported() {
    let mut graph = Graph::new("g");
    let x = graph.add_input("x", DType::F32, dims("n"));
    let unknown = Op::Unknown {
        domain: "com.example".to_string(),
        op_type: "Fancy".to_string(),
    };
    let y = graph.add_node("fancy", unknown, &[x]);
    let z = graph.add_node("z", Op::Unary(Unary::Exp), &[y]);
    graph.outputs.push(z);
    infer(&mut graph).unwrap();
    assert_eq!(graph.value(z).dtype, None);
    let obstacles = verify(&graph).unwrap_err();
    assert_eq!(
        obstacles.to_string(),
        "the operator com.example::Fancy is not supported (node \"fancy\")"
    );
}

#[test]
fn all_obstacles_are_reported_at_once() {
    let mut graph = Graph::new("g");
    let a = graph.add_input("a", DType::F32, dims("n"));
    let b = graph.add_input("b", DType::F16, dims("n"));
    let sum = graph.add_node("sum", Op::Binary(Binary::Add), &[a, b]);
    let not = graph.add_node("not", Op::Unary(Unary::Not), &[sum]);
    graph.add_node("lonely", Op::Binary(Binary::Mul), &[a]);
    graph.outputs.push(not);
    let text = verify(&graph).unwrap_err().to_string();
    let lines: Vec<&str> = text.lines().collect();
    assert_eq!(
        lines[0],
        "node \"sum\" (Add): \"a\" is f32 and \"b\" is f16, and they must be of one type"
    );
    assert!(text.contains("node \"lonely\" (Mul) has no input 1"), "{text}");
}
