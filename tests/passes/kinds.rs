//! Refusals name the kind of model, with all obstacles at once.

use lapidary::dim::Dim;
use lapidary::graph::op::{Op, Unary};
use lapidary::graph::{Graph, ValueId};
use lapidary::help::Help;
use lapidary::passes::{CanonicalizeOptions, Recognition, canonicalize, recognize};
use lapidary::tensor::DType;

use crate::refusals::{export, nodes, says};

fn options() -> CanonicalizeOptions {
    CanonicalizeOptions {
        max_positions: 32,
        ..CanonicalizeOptions::default()
    }
}

/// The message and the help of `convert`, and the output of `inspect`.
fn refused(graph: Graph) -> (String, Recognition) {
    let error = canonicalize(graph.clone(), &options()).map(|_| ()).unwrap_err();
    let text = format!("{error}; {}", error.help().unwrap_or_default());
    let (found, canonical) = recognize(&graph, &options());
    assert!(canonical.is_none() && !found.obstacles.is_empty());
    for text in found.obstacles.iter().map(|o| o.to_string()).chain([text.clone()]) {
        for debug in ["Some(", "None", "Sym(", "ValueId", "NodeId", "DType", "{ "] {
            assert!(!text.contains(debug), "{debug:?} is in: {text}");
        }
    }
    (text, found)
}

fn unknown(graph: &mut Graph, wanted: impl Fn(&Op) -> bool) -> Vec<String> {
    let found = nodes(graph, wanted);
    let names = found.iter().map(|id| graph.node(*id).name.clone()).collect();
    for id in found {
        graph.node_mut(id).op = Op::Unknown {
            domain: "ai.example".into(),
            op_type: "Swoosh".into(),
        };
    }
    names
}

fn past_inputs(graph: &Graph) -> Vec<ValueId> {
    let is_past = |id: &ValueId| graph.value(*id).name.starts_with("past");
    graph.inputs.iter().copied().filter(is_past).collect()
}

#[test]
fn an_unknown_operator_hides_nothing_else() {
    let mut graph = export("llama-optimum");
    let names = unknown(&mut graph, |op| matches!(op, Op::Unary(Unary::Sigmoid)));
    // A batch of more than can be proved, and an input for which there is no role.
    let ids = graph.find("input_ids").unwrap();
    graph.value_mut(ids).shape.as_mut().unwrap()[0] = Dim::from(99usize);
    let odd = graph.add_input("temperature", DType::F32, vec![]);
    let logits = graph.outputs[0];
    graph.outputs[0] = graph.add_node("scaled", Op::Binary(lapidary::graph::op::Binary::Mul), &[logits, odd]);
    let (text, found) = refused(graph);
    says(
        &text,
        &[
            "ai.example::Swoosh",
            &names[0],
            "not clear what these inputs are for: temperature",
            "batch is 99",
            "export it again with operators of ONNX",
            "dynamic axes",
        ],
    );
    assert_eq!(found.obstacles.len(), 3);
    let roles: Vec<(&str, &str)> = found
        .inputs
        .iter()
        .map(|i| (i.name.as_str(), i.role.as_str()))
        .collect();
    for known in [
        ("input_ids", "input_ids"),
        ("attention_mask", "padding_mask"),
        ("past_key_values.1.value", "cache"),
        ("temperature", "?"),
    ] {
        assert!(roles.contains(&known), "{known:?} is not in {roles:?}");
    }
    let outline = found.outline.unwrap();
    assert_eq!((outline.hidden, outline.candidates), (Some(32), 2));
}

#[test]
fn what_stands_before_an_unknown_operator_is_recognized() {
    let mut graph = export("llama-optimum");
    let names = unknown(&mut graph, |op| matches!(op, Op::Unary(Unary::Sigmoid)));
    let (text, found) = refused(graph);
    says(&text, &["ai.example::Swoosh", &names[0], &names[1]]);
    assert_eq!(found.obstacles.len(), 1, "{:?}", found.obstacles);
    // The second is after the operator, and has no types there.
    assert_eq!(found.layers.len(), 1);
    assert_eq!(found.outline.unwrap().heads, Some((4, 2, 16)));
    assert_eq!(found.kind, None);
}

#[test]
fn no_operator_that_is_not_known_makes_a_pass_fail() {
    for name in [
        "llama-optimum",
        "gpt2-dynamo-opset23",
        "llama-ort-genai",
        "llama-mobius-static",
    ] {
        let graph = export(name);
        let kinds: std::collections::BTreeSet<String> = graph.node_ids().map(|id| graph.node(id).op.name()).collect();
        for kind in kinds {
            let mut edited = graph.clone();
            unknown(&mut edited, |op| op.name() == kind);
            let (text, _) = refused(edited);
            assert!(text.contains("ai.example::Swoosh"), "{name} without {kind}: {text}");
        }
    }
}

/// The export without past keys and values; the outputs that are kept.
fn without_past(kept: &[&str]) -> Graph {
    let mut graph = export("llama-optimum");
    for past in past_inputs(&graph) {
        let dtype = graph.value(past).dtype.unwrap();
        let empty = lapidary::tensor::Tensor::from_f64_as(dtype, vec![1, 2, 0, 16], &[]);
        let empty = graph.add_constant("empty", empty);
        graph.replace_uses(past, empty);
    }
    let pasts = past_inputs(&graph);
    graph.inputs.retain(|id| !pasts.contains(id));
    let outputs = kept.iter().map(|name| graph.find(name).unwrap());
    graph.outputs = outputs.collect();
    graph
}

#[test]
fn models_without_a_cache_are_named_by_what_they_give() {
    let (text, found) = refused(without_past(&["logits"]));
    says(
        &text,
        &[
            "a language model exported without its cache",
            "text-generation-with-past",
            "models.builder",
        ],
    );
    assert_eq!(found.kind, Some("no_cache"));

    let norm = "/model/norm/Mul_1_output_0";
    let (text, found) = refused(without_past(&[norm]));
    says(&text, &["an encoder or an embedding model", norm, "hidden states"]);
    assert_eq!(found.kind, Some("encoder"));

    let mut graph = without_past(&["logits"]);
    let first = graph.add_constant("first", lapidary::tensor::Tensor::from_i64(vec![], &[0]));
    let logits = graph.outputs[0];
    graph.outputs[0] = graph.add_node("scores", Op::Gather { axis: 1 }, &[logits, first]);
    let (text, found) = refused(graph);
    says(
        &text,
        &[
            "a classification or embedding model",
            "scores",
            "one row for each sequence",
        ],
    );
    assert_eq!(found.kind, Some("classifier_or_embedding"));

    let mut graph = Graph::new("vision");
    let dims = ["batch", "3", "224", "224"].map(Dim::parse).to_vec();
    let pixels = graph.add_input("arg0", DType::F32, dims);
    let y = graph.add_node("y", Op::Unary(Unary::Tanh), &[pixels]);
    graph.outputs.push(y);
    let (text, _) = refused(graph);
    says(&text, &["arg0 [batch, 3, 224, 224]"]);
}

#[test]
fn states_of_fixed_size_are_named() {
    let mut graph = export("llama-optimum");
    // Beside the cache of keys and values a state of fixed size.
    let dims = ["batch_size", "32", "3"].map(Dim::parse).to_vec();
    let state = graph.add_input("past.0.conv", DType::F32, dims);
    let op = Op::Unknown {
        domain: String::new(),
        op_type: "Conv".into(),
    };
    let next = graph.add_node("conv", op, &[state]);
    graph.value_mut(next).dtype = Some(DType::F32);
    graph.outputs.push(next);
    let (text, found) = refused(graph);
    says(
        &text,
        &[
            "a hybrid of attention",
            "past.0.conv [batch_size, 32, 3]",
            "the operator Conv is not supported",
            "ONNX Runtime",
        ],
    );
    assert_eq!(found.kind, Some("hybrid"));

    // A model of nothing else.
    let mut graph = Graph::new("mamba");
    let dims = |dims: &[&str]| dims.iter().map(|dim| Dim::parse(dim)).collect();
    let ids = graph.add_input("input_ids", DType::I64, dims(&["batch", "tokens"]));
    let table = lapidary::tensor::Tensor::from_f32(vec![3, 2], &[0.5; 6]);
    let table = graph.add_constant("table", table);
    let rows = graph.add_node("rows", Op::Gather { axis: 0 }, &[table, ids]);
    let state = graph.add_input("past_ssm.0", DType::F32, dims(&["batch", "2", "8"]));
    let scan = Op::Unknown {
        domain: String::new(),
        op_type: "Scan".into(),
    };
    let y = graph.add_node("scan", scan, &[rows, state]);
    graph.outputs = vec![y];
    let (text, found) = refused(graph);
    says(
        &text,
        &[
            "states of fixed size, as Mamba",
            "past_ssm.0 [batch, 2, 8]",
            "the operator Scan",
        ],
    );
    assert_eq!(found.kind, Some("state_space"));
}

#[test]
fn keys_and_values_that_nothing_updates_come_from_an_encoder() {
    // By their names, and by what is done with them.
    for name in ["past_key_values.0.encoder.key", "arg9"] {
        let mut graph = export("llama-optimum");
        let dims = ["batch_size", "4", "encoder_length", "16"].map(Dim::parse).to_vec();
        let keys = graph.add_input(name, DType::F32, dims);
        let cross = graph.add_node("cross", Op::MatMul, &[keys, keys]);
        graph.outputs.push(cross);
        let (text, found) = refused(graph);
        says(
            &text,
            &["the decoder of an encoder-decoder model", name, "ORTModelForSeq2SeqLM"],
        );
        assert_eq!(found.kind, Some("encoder_decoder"));
    }
}
