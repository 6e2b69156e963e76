//! Equations and roles of dims, which text cases cannot show. tests/files/infer has the rest.

use super::*;

fn dims(text: &str) -> Shape {
    text.split(',')
        .filter(|d| !d.trim().is_empty())
        .map(Dim::parse)
        .collect()
}

fn shown(graph: &Graph, value: ValueId) -> String {
    format!("{:?}", graph.shape(value).expect("a shape"))
}

#[test]
fn equations_solve_other_dims() {
    let mut graph = Graph::new("g");
    let past = graph.add_input("past", DType::F32, dims("p, 16"));
    let new = graph.add_input("new", DType::F32, dims("s, 16"));
    let mask = graph.add_input("mask", DType::F32, dims("total, 16"));
    let all = graph.add_node("all", Op::Concat { axis: 0 }, &[past, new]);
    graph.add_node("masked", Op::Binary(crate::graph::op::Binary::Add), &[all, mask]);
    let facts = infer(&mut graph).unwrap();
    assert_eq!(facts.resolve(&Dim::parse("total - p")), Dim::named("s"));
}

#[test]
fn roles_are_given_to_the_inputs_dims() {
    let mut graph = Graph::new("g");
    // The export's "past" is the total length, and its batch is fixed.
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
