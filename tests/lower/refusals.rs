//! What cannot be lowered, and the errors that say so.

use lapidary::graph::Graph;
use lapidary::graph::op::{Binary, Op, Unary};
use lapidary::lower::synthetic::Decoder;
use lapidary::lower::{LowerError, LowerOptions, lower, lower_graph};
use lapidary::network::{Logits, Profile, Tokens};
use lapidary::tensor::{DType, Tensor};

use crate::models::dims;

fn all(tokens: usize) -> Profile {
    Profile {
        logits: Logits::All,
        ..Profile::prefill(tokens, 16)
    }
}

/// Every obstacle at once, and not those that only follow from another.
#[test]
fn every_obstacle_is_named() {
    let mut graph = Graph::new("odd");
    let x = graph.add_input("x", DType::F32, dims(&[2, 3]));
    let unknown = Op::Unknown {
        domain: "acme".into(),
        op_type: "Frobnicate".into(),
    };
    let a = graph.add_node("first", unknown, &[x]);
    let a = graph.add_node("follows", Op::Unary(Unary::Exp), &[a]);
    let axis = graph.add_constant("axis", Tensor::from_i64(vec![], &[1]));
    let sum = Op::CumSum {
        exclusive: false,
        reverse: false,
    };
    let b = graph.add_node("second", sum, &[x, axis]);
    let c = graph.add_node("third", Op::Binary(Binary::Mod), &[x, x]);
    let shape = dims(&[2, 3]);
    for id in [a, b, c] {
        let value = graph.value_mut(id);
        (value.dtype, value.shape) = (Some(DType::F32), Some(shape.clone()));
    }
    graph.outputs = vec![a, b, c];
    let error = lower_graph(&graph, &all(4), &LowerOptions::default()).unwrap_err();
    let LowerError::Unsupported(obstacles) = &error else {
        panic!("{error}")
    };
    let named: Vec<&str> = obstacles.iter().map(|o| o.node.as_str()).collect();
    assert_eq!(named, ["first", "second", "third"]);
    let text = error.to_string();
    assert!(text.starts_with("3 nodes have no lowering"), "{text}");
    assert!(text.contains("\"first\" (acme::Frobnicate)"), "{text}");
}

#[test]
fn layer_faults_name_node_and_shapes() {
    let mut graph = Graph::new("odd");
    let a = graph.add_input("a", DType::F32, dims(&[2, 3]));
    let b = graph.add_input("b", DType::F16, dims(&[2, 3]));
    let y = graph.add_node("mixed", Op::Binary(Binary::Add), &[a, b]);
    graph.outputs = vec![y];
    let error = lower_graph(&graph, &all(4), &LowerOptions::default())
        .unwrap_err()
        .to_string();
    for part in ["mixed", "f32[2, 3]", "f16[2, 3]", "Cast"] {
        assert!(error.contains(part), "{error}");
    }
}

#[test]
fn profiles_that_cannot_be() {
    let graph = Decoder::tiny().graph();
    let refused = |profile: Profile| {
        lower(&graph, &profile, &LowerOptions::default())
            .unwrap_err()
            .to_string()
    };
    let error = refused(Profile::prefill(17, 16));
    assert!(error.contains("17 tokens do not fit a cache of 16 slots"), "{error}");
    let error = refused(Profile {
        tokens: Tokens::Dynamic { min: 4, opt: 2, max: 8 },
        ..Profile::decode(16)
    });
    assert!(error.contains("4 to 8 tokens (opt 2)"), "{error}");
    let error = refused(Profile {
        batch: 0,
        ..Profile::decode(16)
    });
    assert!(
        error.contains("0 sequences") || error.contains("at least 1") || error.contains("empty"),
        "{error}"
    );
}

#[test]
fn graphs_that_are_not_canonical() {
    let mut graph = Graph::new("no decoder");
    let x = graph.add_input("x", DType::F32, dims(&[2, 3]));
    let y = graph.add_node("y", Op::Unary(Unary::Exp), &[x]);
    graph.outputs = vec![y];
    assert!(lower_graph(&graph, &all(4), &LowerOptions::default()).is_ok());
    let error = lower(&graph, &all(4), &LowerOptions::default())
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("input_ids") && error.contains("\"x\" f32[2, 3]"),
        "{error}"
    );
}

/// A batch that the export fixed cannot become another.
#[test]
fn a_fixed_batch_stays() {
    let mut graph = Decoder::tiny().graph();
    for id in graph.inputs.clone() {
        let shape = graph.value_mut(id).shape.as_mut().unwrap();
        shape[0] = dims(&[1])[0].clone();
    }
    assert!(lower(&graph, &Profile::decode(16), &LowerOptions::default()).is_ok());
    let error = lower(
        &graph,
        &Profile {
            batch: 2,
            ..Profile::decode(16)
        },
        &LowerOptions::default(),
    )
    .unwrap_err();
    assert!(error.to_string().contains("[2, 1]"), "{error}");
}
