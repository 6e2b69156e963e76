//! Which constants become weights, under which names.

use lapidary::graph::op::Op;
use lapidary::graph::{Constant, Graph};
use lapidary::lower::synthetic::Decoder;
use lapidary::lower::{LowerOptions, lower, lower_graph, weights};
use lapidary::network::{Logits, Profile, WeightMode};
use lapidary::tensor::{DType, Tensor};

use crate::models::{decoder, dims, gpt2};

fn names(network: &lapidary::network::Network) -> Vec<String> {
    network.weights.iter().map(|w| w.name.clone()).collect()
}

#[test]
fn every_profile_has_the_weights_of_the_graph() {
    for graph in [
        decoder(&Decoder::tiny()),
        gpt2(),
        Decoder {
            qk_norm: true,
            tied: true,
            ..Decoder::tiny()
        }
        .graph(),
    ] {
        let mut expected: Vec<String> = weights(&graph).into_iter().map(|w| w.name).collect();
        expected.sort();
        for (tokens, logits) in [(1, Logits::Rows), (4, Logits::All)] {
            let profile = Profile {
                logits,
                ..Profile::prefill(tokens, 16)
            };
            let mut found = names(&lower(&graph, &profile, &LowerOptions::default()).unwrap());
            found.sort();
            assert_eq!(found, expected);
        }
    }
}

#[test]
fn a_tied_embedding_is_one_weight() {
    let config = Decoder {
        tied: true,
        ..Decoder::tiny()
    };
    let network = lower(&config.graph(), &Profile::decode(16), &LowerOptions::default()).unwrap();
    let vocabulary = |w: &&lapidary::network::Weight| w.constant.shape() == [config.vocabulary, config.hidden];
    assert_eq!(network.weights.iter().filter(vocabulary).count(), 1);
    let untied = lower(&Decoder::tiny().graph(), &Profile::decode(16), &LowerOptions::default()).unwrap();
    assert_eq!(untied.weights.iter().filter(vocabulary).count(), 2);
}

#[test]
fn names_are_those_of_the_export() {
    let network = lower(&gpt2(), &Profile::decode(16), &LowerOptions::default()).unwrap();
    let names = names(&network);
    for name in [
        "wte",
        "wpe",
        "ln_1.weight",
        "ln_1.bias",
        "c_attn.weight",
        "c_attn.bias",
        "mlp_proj.weight",
    ] {
        assert!(names.iter().any(|n| n == name), "{name} is missing from {names:?}");
    }
    assert!(
        !names.iter().any(|n| n.contains("zero") || n.contains("const/")),
        "{names:?}"
    );
}

/// Two slices of one initializer have one origin; the same slice made twice is one weight.
#[test]
fn parts_of_one_initializer_get_numbers() {
    let mut graph = Graph::new("parts");
    let x = graph.add_input("x", DType::F32, dims(&[1, 2, 4]));
    let packed = Constant::tensor(Tensor::from_f32(vec![8, 4], &[0.5; 32])).with_origin("qkv");
    let parts = [packed.sliced(0, 0, 4), packed.sliced(0, 4, 8), packed.sliced(0, 0, 4)];
    for (i, part) in parts.into_iter().enumerate() {
        let w = graph.add_constant(&format!("part{i}"), part);
        let perm = Some(vec![1, 0]);
        let turned = graph.add_node("turned", Op::Transpose { perm }, &[w]);
        let y = graph.add_node("y", Op::MatMul, &[x, turned]);
        graph.outputs.push(y);
    }
    let profile = Profile {
        logits: Logits::All,
        ..Profile::prefill(2, 16)
    };
    let options = LowerOptions {
        weight_mode: WeightMode::Strip,
        ..LowerOptions::default()
    };
    let network = lower_graph(&graph, &profile, &options).unwrap();
    assert_eq!(names(&network), ["qkv", "qkv.1"]);
    assert!(network.weights.iter().all(|w| w.mode == WeightMode::Strip));
}

/// A weight that is called like an input of the network, or small integers, or a scalar from the export.
#[test]
fn what_is_no_weight_and_what_cannot_keep_its_name() {
    let mut graph = Graph::new("odd");
    let x = graph.add_input("x", DType::F32, dims(&[1, 2, 4]));
    let scale = graph.add_constant(
        "scale",
        Constant::tensor(Tensor::from_f32(vec![], &[2.0])).with_origin("scale"),
    );
    let bias = graph.add_constant(
        "b",
        Constant::tensor(Tensor::from_f32(vec![4], &[1.0; 4])).with_origin("logit_rows"),
    );
    let y = graph.add_node("scaled", Op::Binary(lapidary::graph::op::Binary::Mul), &[x, scale]);
    let y = graph.add_node("y", Op::Binary(lapidary::graph::op::Binary::Add), &[y, bias]);
    graph.outputs.push(y);
    let network = lower_graph(&graph, &Profile::prefill(2, 16), &LowerOptions::default()).unwrap();
    assert_eq!(names(&network), ["logit_rows.1"]);
}

#[test]
fn integer_tables_become_32_bits() {
    let mut graph = Graph::new("table");
    let ids = graph.add_input("ids", DType::I64, dims(&[1, 2]));
    let big: Vec<i64> = (0..20_000).collect();
    let table = graph.add_constant("table", Tensor::from_i64(vec![20_000], &big));
    let y = graph.add_node("y", Op::Gather { axis: 0 }, &[table, ids]);
    graph.outputs.push(y);
    let profile = Profile {
        logits: Logits::All,
        ..Profile::prefill(2, 16)
    };
    let network = lower_graph(&graph, &profile, &LowerOptions::default()).unwrap();
    let weight = &network.weights[0];
    assert_eq!((weight.name.as_str(), weight.constant.dtype()), ("table", DType::I32));
    assert_eq!(weight.constant.materialize().unwrap().to_i64()[19_999], 19_999);
}
