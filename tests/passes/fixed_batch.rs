//! Exports for a fixed number of sequences: they support any number if sequences are independent, and are refused with
//! the operator's name if not.

use lapidary::dim::Dim;
use lapidary::graph::op::{Binary, Op, Reduction};
use lapidary::graph::{Graph, ValueId};
use lapidary::passes::{CanonicalizeOptions, canonicalize};
use lapidary::tensor::{DType, Tensor};

use crate::decoder::{Decoder, distance};
use crate::refusals::{export, refusal_at, says};

/// Gives the batch of inputs whose name contains `only` this number; the others keep their symbol.
fn fixed(mut graph: Graph, number: usize, only: &str) -> Graph {
    let mut count = 0;
    for id in graph.inputs.clone() {
        let mut shape = graph.shape(id).cloned().unwrap();
        if graph.value(id).name.contains(only)
            && let Some(batch) = shape.first_mut().filter(|dim| dim.to_string().contains("batch"))
        {
            *batch = Dim::from(number);
            count += 1;
        }
        graph.value_mut(id).shape = Some(shape);
    }
    assert!(count > 0, "{only:?} has no batch");
    graph
}

fn canonical(graph: Graph) -> Graph {
    let options = CanonicalizeOptions {
        max_positions: 64,
        ..CanonicalizeOptions::default()
    };
    let canonical = canonicalize(graph, &options).unwrap_or_else(|error| panic!("{error}"));
    assert_eq!(canonical.architecture.batch, None);
    canonical.graph
}

/// Logits of three sequences, unsupported by the original export, after a prompt and a token.
fn logits(graph: &Graph) -> Vec<Vec<f64>> {
    let mut decoder = Decoder::new(graph, 3, 12);
    let prompt: Vec<Vec<i64>> = (0..3)
        .map(|row| (0..5).map(|t| 3 + 7 * row + 2 * t).collect())
        .collect();
    let mut all = decoder.step(&prompt);
    all.extend(decoder.step(&[vec![4], vec![9], vec![30]]));
    all
}

fn worst(a: &Graph, b: &Graph) -> f64 {
    let pairs = logits(a).into_iter().zip(logits(b));
    pairs.map(|(a, b)| distance(&a, &b)).fold(0.0, f64::max)
}

#[test]
fn a_fixed_number_of_sequences_becomes_any() {
    for (name, number, only) in [
        // As many as key heads.
        ("llama-optimum", 2, ""),
        // As many as query heads, and as tokens in some of the trials.
        ("llama-dynamo-opset18", 4, ""),
        ("llama-optimum", 3, "past_key_values"),
        ("llama-optimum", 5, "input_ids"),
        // Sequences and tokens are one axis.
        ("gpt2-dynamo-opset18", 2, ""),
        ("gpt2-optimum", 3, ""),
        ("qwen3-dynamo-opset23", 2, ""),
        ("gpt2-mobius", 4, ""),
        ("llama-mobius-static", 2, ""),
        ("llama-ort-genai", 2, ""),
        ("mistral-dynamo-dynamiccache", 2, ""),
    ] {
        let (free, fixed) = (canonical(export(name)), canonical(fixed(export(name), number, only)));
        let worst = worst(&free, &fixed);
        assert!(worst < 1e-6, "{name}, {number} sequences by {only:?}: {worst:e}");
    }
}

/// The export with something done to the rows before its head, `[batch, tokens, hidden]`.
fn with(change: impl Fn(&mut Graph, ValueId) -> ValueId) -> Graph {
    let mut graph = export("llama-optimum");
    let (head, _) = graph.producer_of(graph.outputs[0]).unwrap();
    let hidden = graph.node(head).input(0).unwrap();
    let changed = change(&mut graph, hidden);
    graph.node_mut(head).inputs[0] = Some(changed);
    graph
}

/// Adds a constant of this shape.
fn added(shape: &[usize], number: impl Fn(usize) -> f32 + Copy) -> impl Fn(&mut Graph, ValueId) -> ValueId {
    move |graph, x| {
        let numbers: Vec<f32> = (0..shape.iter().product()).map(number).collect();
        let constant = graph.add_constant("shift", Tensor::from_f32(shape.to_vec(), &numbers));
        graph.add_node("shifted", Op::Binary(Binary::Add), &[x, constant])
    }
}

#[test]
fn what_a_graph_repeats_for_each_sequence_is_taken_once() {
    let width = 32;
    let once = canonical(with(added(&[1, 1, width], |i| i as f32 / 16.0)));
    let repeated = with(added(&[2, 1, width], |i| (i % width) as f32 / 16.0));
    let repeated = canonical(fixed(repeated, 2, ""));
    assert!(worst(&once, &repeated) < 1e-6);
    let expanded = with(|graph, x| {
        let numbers: Vec<f32> = (0..width).map(|i| i as f32 / 16.0).collect();
        let row = graph.add_constant("row", Tensor::from_f32(vec![1, width], &numbers));
        let target = graph.add_i64("target", &[2, 1, width as i64]);
        let rows = graph.add_node("rows", Op::Expand, &[row, target]);
        graph.add_node("shifted", Op::Binary(Binary::Add), &[x, rows])
    });
    assert!(worst(&once, &canonical(fixed(expanded, 2, ""))) < 1e-6);
}

#[test]
fn sequences_that_meet_are_refused_by_the_operator() {
    let refusal = |graph: Graph| refusal_at(fixed(graph, 2, ""), 64);
    // Separate rows.
    says(
        &refusal(with(added(&[2, 1, 32], |i| i as f32 / 16.0))),
        &[
            "shifted",
            "fixes a batch of 2",
            "shift is not the same for all sequences",
        ],
    );
    let less_the_mean = |graph: &mut Graph, x: ValueId| {
        let axis = graph.add_i64("axis", &[0]);
        let mean = Op::Reduce {
            reduction: Reduction::Mean,
            keepdims: true,
            noop_with_empty_axes: false,
        };
        let mean = graph.add_node("mean_of_all", mean, &[x, axis]);
        graph.add_node("less", Op::Binary(Binary::Sub), &[x, mean])
    };
    says(&refusal(with(less_the_mean)), &["mean_of_all", "sequences meet"]);
    let of_all = |graph: &mut Graph, x: ValueId| graph.add_node("of_all", Op::LogSoftmax { axis: 0 }, &[x]);
    says(&refusal(with(of_all)), &["of_all", "sequences meet"]);
    let first_row = |graph: &mut Graph, x: ValueId| {
        let index = graph.add_constant("first", Tensor::from_i64(vec![1], &[0]));
        let row = graph.add_node("row", Op::Gather { axis: 0 }, &[x, index]);
        graph.add_node("sum", Op::Binary(Binary::Add), &[x, row])
    };
    says(&refusal(with(first_row)), &["row", "sequences are chosen by an index"]);
    // Sequences and elements swap axes, so rows no longer belong to sequences.
    let mixed = |graph: &mut Graph, x: ValueId| {
        let perm = Some(vec![1, 2, 0]);
        let turned = graph.add_node("turned", Op::Transpose { perm }, &[x]);
        let target = graph.add_i64("target", &[2, -1, 32]);
        graph.add_node("mixed", Op::Reshape { allowzero: false }, &[turned, target])
    };
    says(&refusal(with(mixed)), &["mixed", "no axis counts the sequences"]);
}

#[test]
fn numbers_of_sequences_that_disagree_are_refused() {
    let mut graph = fixed(export("llama-optimum"), 2, "");
    let cache = graph.find("past_key_values.1.key").unwrap();
    graph.value_mut(cache).shape.as_mut().unwrap()[0] = Dim::from(4usize);
    says(
        &refusal_at(graph, 64),
        &["input_ids [2, sequence_length]: batch is 2 (axis 0)"],
    );
    says(
        &refusal_at(fixed(export("llama-optimum"), 65, ""), 64),
        &["batch is 65 (axis 0)", "one number for all inputs, up to 64"],
    );
    // One row of positions or of a mask is for all sequences.
    let mut graph = fixed(export("llama-optimum"), 2, "");
    let positions = graph.find("position_ids").unwrap();
    graph.value_mut(positions).shape.as_mut().unwrap()[0] = Dim::from(1usize);
    assert_eq!(graph.value(positions).dtype, Some(DType::I64));
    assert!(worst(&canonical(graph), &canonical(export("llama-optimum"))) < 1e-6);
}
