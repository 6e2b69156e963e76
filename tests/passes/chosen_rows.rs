//! Exports that select tokens before or after their head: all tokens get logits, or the selection is refused by name.

use lapidary::dim::Dim;
use lapidary::graph::op::{Binary, Op, Reduction, Unary};
use lapidary::graph::{Graph, ValueId};
use lapidary::passes::{CanonicalizeOptions, canonicalize};
use lapidary::tensor::{DType, Tensor};

use crate::decoder::{Decoder, distance};
use crate::refusals::{export, says};

/// Where tokens are chosen.
#[derive(Clone, Copy, PartialEq, Debug)]
enum Place {
    Hidden,
    Logits,
}

const PLACES: [Place; 2] = [Place::Hidden, Place::Logits];

/// The export with an operator on `[batch, tokens, n]` before its head or after it.
fn with(place: Place, choose: impl Fn(&mut Graph, ValueId) -> ValueId) -> Graph {
    let mut graph = export("llama-optimum");
    let logits = graph.outputs[0];
    let (head, _) = graph.producer_of(logits).unwrap();
    assert_eq!(graph.node(head).op, Op::MatMul);
    match place {
        Place::Hidden => {
            let hidden = graph.node(head).input(0).unwrap();
            let chosen = choose(&mut graph, hidden);
            graph.node_mut(head).inputs[0] = Some(chosen);
        }
        Place::Logits => graph.outputs[0] = choose(&mut graph, logits),
    }
    graph
}

fn gather(index: Tensor) -> impl Fn(&mut Graph, ValueId) -> ValueId {
    move |graph, x| {
        let index = graph.add_constant("chosen.index", index.clone());
        graph.add_node("chosen", Op::Gather { axis: 1 }, &[x, index])
    }
}

/// From `start` to the end.
fn slice(graph: &mut Graph, x: ValueId, start: ValueId) -> ValueId {
    let end = graph.add_i64("chosen.end", &[i64::MAX]);
    let axis = graph.add_i64("chosen.axis", &[1]);
    graph.add_node("chosen", Op::Slice, &[x, start, end, axis])
}

fn slice_from(start: i64) -> impl Fn(&mut Graph, ValueId) -> ValueId {
    move |graph, x| {
        let start = graph.add_i64("chosen.start", &[start]);
        slice(graph, x, start)
    }
}

/// The last tokens, as many as an input of this shape says.
fn counted(shape: &[i64]) -> impl Fn(&mut Graph, ValueId) -> ValueId {
    move |graph, x| {
        let shape = shape.iter().map(|d| Dim::constant(*d)).collect();
        let count = graph.add_input("num_logits_to_keep", DType::I64, shape);
        let negative = graph.add_node("negative", Op::Unary(Unary::Neg), &[count]);
        let one = graph.add_i64("one", &[1]);
        let start = graph.add_node("start", Op::Reshape { allowzero: false }, &[negative, one]);
        slice(graph, x, start)
    }
}

fn listed(graph: &mut Graph, x: ValueId) -> ValueId {
    let rows = graph.add_input("logits_to_keep", DType::I64, vec![Dim::parse("kept")]);
    graph.add_node("chosen", Op::Gather { axis: 1 }, &[x, rows])
}

fn made(graph: Graph) -> Result<Graph, String> {
    let options = CanonicalizeOptions {
        max_positions: 512,
        ..CanonicalizeOptions::default()
    };
    canonicalize(graph, &options)
        .map(|c| c.graph)
        .map_err(|e| e.to_string())
}

fn logits(graph: &Graph) -> Vec<f64> {
    let mut decoder = Decoder::new(graph, 1, 24);
    let mut logits = decoder.step(&[vec![5, 9, 2, 7, 11]]);
    logits.extend(decoder.step(&[vec![3]]));
    logits.concat()
}

#[test]
fn all_tokens_get_logits() {
    let expected = logits(&made(export("llama-optimum")).unwrap());
    let last = || Tensor::from_i64(vec![1], &[-1]);
    for place in PLACES {
        let forms: Vec<(&str, Graph)> = vec![
            ("an index", with(place, gather(last()))),
            ("a scalar index", with(place, gather(Tensor::from_i64(vec![], &[-1])))),
            ("a slice", with(place, slice_from(-1))),
            ("three", with(place, slice_from(-3))),
            ("a count", with(place, counted(&[]))),
            ("a count in a list", with(place, counted(&[1]))),
            ("a list", with(place, listed)),
        ];
        for (name, graph) in forms {
            let graph = made(graph).unwrap_or_else(|e| panic!("{name}, {place:?}: {e}"));
            let shape = graph.shape(graph.outputs[0]).unwrap();
            assert_eq!(format!("{:?}", &shape[..2]), "[batch, tokens]", "{name}, {place:?}");
            assert_eq!(graph.inputs.len(), 7, "{name}, {place:?}");
            let found = logits(&graph);
            assert_eq!(found.len(), expected.len(), "{name}, {place:?}");
            assert!(distance(&found, &expected) < 1e-5, "{name}, {place:?}");
        }
    }
}

#[test]
fn other_choices_are_named() {
    for place in PLACES {
        let refused = |choose: &dyn Fn(&mut Graph, ValueId) -> ValueId| made(with(place, choose)).unwrap_err();
        let chooses = "chosen: it chooses tokens that get logits, and of";
        says(
            &refused(&gather(Tensor::from_i64(vec![1], &[0]))),
            &[chooses, "[0], not [4]"],
        );
        says(&refused(&gather(Tensor::from_i64(vec![], &[-2]))), &[chooses]);
        // Right up to 300 tokens.
        let bounded = |graph: &mut Graph, x: ValueId| {
            let ids = graph.find("input_ids").unwrap();
            let tokens = graph.add_node("tokens", Op::Shape { start: 1, end: Some(2) }, &[ids]);
            let (most, one) = (graph.add_i64("most", &[300]), graph.add_i64("one", &[1]));
            let least = graph.add_node("least", Op::Binary(Binary::Min), &[tokens, most]);
            let index = graph.add_node("index", Op::Binary(Binary::Sub), &[least, one]);
            graph.add_node("chosen", Op::Gather { axis: 1 }, &[x, index])
        };
        says(&refused(&bounded), &[chooses, "[299], not [300]"]);
        // The token with the greatest id, as some exports find the end of a text.
        let by_id = |graph: &mut Graph, x: ValueId| {
            let ids = graph.find("input_ids").unwrap();
            let largest = Op::Reduce {
                reduction: Reduction::Max,
                keepdims: false,
                noop_with_empty_axes: false,
            };
            let index = graph.add_node("largest", largest, &[ids]);
            graph.add_node("chosen", Op::Gather { axis: 1 }, &[x, index])
        };
        says(
            &refused(&by_id),
            &["chosen: it chooses tokens that get logits, and", "input_ids"],
        );
        // From the start instead of the end.
        let from_start = |graph: &mut Graph, x: ValueId| {
            let count = graph.add_input("num_logits_to_keep", DType::I64, vec![Dim::constant(1)]);
            slice(graph, x, count)
        };
        says(&refused(&from_start), &[chooses]);
    }
}

#[test]
fn an_input_that_does_more_than_choose_is_named() {
    let graph = with(Place::Hidden, |graph, x| {
        let chosen = counted(&[])(graph, x);
        let count = graph.find("num_logits_to_keep").unwrap();
        let factor = graph.add_node("factor", Op::Cast { to: DType::F32 }, &[count]);
        graph.add_node("scaled", Op::Binary(Binary::Mul), &[chosen, factor])
    });
    let text = made(graph).unwrap_err();
    says(&text, &["num_logits_to_keep"]);
}
