//! Mixtures of experts: each recognized spelling, and refusals of other computations.

use std::path::Path;

use lapidary::graph::op::{Binary, ChosenWeights, ExpertActivation, Experts, Op, RouterScores, Routing};
use lapidary::graph::{Constant, Graph};
use lapidary::onnx;
use lapidary::passes::{CanonicalizeOptions, canonicalize};
use lapidary::tensor::{DType, Tensor};

use crate::refusals::{nodes, refusal_at, rewire, says};

fn fixture(name: &str) -> Graph {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/experts");
    onnx::read(folder.join(name).join("model.onnx")).unwrap()
}

fn family(name: &str) -> Graph {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/families");
    onnx::read(folder.join(name).join("model.onnx")).unwrap()
}

fn canonical(graph: Graph) -> Graph {
    let options = CanonicalizeOptions {
        max_positions: 64,
        ..CanonicalizeOptions::default()
    };
    canonicalize(graph, &options).unwrap().graph
}

fn found(graph: &Graph) -> Vec<(Routing, Experts)> {
    let of = |id| match &graph.node(id).op {
        Op::Experts(experts) => {
            let (_, routing) = graph.def(graph.node(id).input(1).unwrap()).unwrap();
            match &routing.op {
                Op::Routing(routing) => Some((routing.clone(), experts.clone())),
                other => panic!("weights come from {other:?}"),
            }
        }
        _ => None,
    };
    graph.node_ids().filter_map(of).collect()
}

#[test]
fn every_spelling_becomes_the_same_operators() {
    let routing = |weights| Routing {
        top_k: 2,
        scores: RouterScores::Softmax,
        weights,
        margin: 0.0,
        scale: 1.0,
        groups: 0,
        top_groups: 0,
        group_best: 0,
    };
    let experts = Experts {
        experts: 4,
        activation: ExpertActivation::Swish,
        alpha: 1.0,
        beta: 0.0,
        limit: 0.0,
    };
    for (name, weights) in [
        ("dynamo18-qwen2moe", ChosenWeights::Scores),
        ("dynamo18-granitemoe", ChosenWeights::Normalized),
        ("optimum-qwen3moe", ChosenWeights::Normalized),
        ("mobius-mixtral", ChosenWeights::Normalized),
    ] {
        let graph = canonical(fixture(name));
        let blocks = found(&graph);
        assert_eq!(blocks.len(), 2, "{name}");
        for (of_routing, of_experts) in blocks {
            // The softmax of chosen logits is that of all of them, divided by their sum.
            assert_eq!(of_routing, routing(weights), "{name}");
            assert_eq!(of_experts, experts, "{name}");
        }
        // Tokens keep their axes, so that the last layer computes on the chosen row alone.
        for id in graph
            .node_ids()
            .filter(|id| matches!(graph.node(*id).op, Op::Experts(_)))
        {
            let rank = |i: usize| graph.shape(graph.node(id).input(i).unwrap()).unwrap().len();
            assert_eq!([rank(0), rank(1), rank(2)], [3; 3], "{name}");
        }
    }
    let clamped = Experts {
        alpha: 1.702,
        beta: 1.0,
        limit: 0.5,
        ..experts
    };
    let blocks = found(&canonical(fixture("contrib-moe")));
    assert_eq!(blocks.len(), 2);
    assert!(blocks.iter().all(|(_, experts)| *experts == clamped));
}

/// Phi-3.5-MoE: the second expert is chosen without the first, and weights are shares among close logits.
#[test]
fn experts_chosen_one_after_the_other() {
    for name in ["dynamo18-phimoe", "torchscript17-phimoe"] {
        let blocks = found(&canonical(family(name)));
        assert_eq!(blocks.len(), 2, "{name}");
        for (routing, experts) in blocks {
            let wanted = Routing {
                top_k: 2,
                scores: RouterScores::Logits,
                weights: ChosenWeights::SparseMixer,
                margin: 0.4,
                scale: 1.0,
                groups: 0,
                top_groups: 0,
                group_best: 0,
            };
            assert_eq!((routing, experts.experts), (wanted, 4), "{name}");
        }
    }
}

#[test]
fn a_margin_of_each_choice_is_refused() {
    let mut graph = family("dynamo18-phimoe");
    let comparisons = nodes(&graph, |op| *op == Op::Binary(Binary::Greater));
    let margins: Vec<_> = comparisons
        .into_iter()
        .filter(|id| {
            let margin = graph.node(*id).input(1).and_then(|v| graph.constant(v));
            margin.is_some_and(|margin| margin.dtype() == DType::F32 && margin.len() == 1)
        })
        .collect();
    assert_eq!(margins.len(), 4);
    rewire(&mut graph, margins[0], 1, |graph, _| constant(graph, &[], &[0.3]));
    says(
        &refusal(graph),
        &["mixture of experts", "not the sum of its experts' results"],
    );
}

/// Codes of ONNX Runtime's operator stay codes.
#[test]
fn quantized_experts_keep_their_codes() {
    let graph = canonical(fixture("contrib-qmoe4"));
    let mut quantized = 0;
    for id in graph
        .node_ids()
        .filter(|id| matches!(graph.node(*id).op, Op::Experts(_)))
    {
        for i in [3, 4, 5] {
            let constant = graph.constant(graph.node(id).input(i).unwrap()).unwrap();
            let parts = constant.as_quantized().expect("it is quantized");
            assert_eq!((parts.codes.dtype(), parts.zero_points.is_some()), (DType::U4, true));
            quantized += 1;
        }
    }
    assert_eq!(quantized, 6);
}

fn refusal(graph: Graph) -> String {
    refusal_at(graph, 64)
}

fn constant(graph: &mut Graph, shape: &[usize], values: &[f32]) -> lapidary::graph::ValueId {
    graph.add_constant("edit", Constant::tensor(Tensor::from_f32(shape.to_vec(), values)))
}

/// The numbers in the comparisons identify the experts, in any order of the graph.
#[test]
fn experts_in_another_order_are_known_by_their_weights() {
    let mut graph = fixture("mobius-mixtral");
    let gates = |graph: &Graph| -> Vec<Vec<f32>> {
        let graph = canonical(graph.clone());
        let id = nodes(&graph, |op| matches!(op, Op::Experts(_)))[0];
        let gate = graph.constant(graph.node(id).input(3).unwrap()).unwrap();
        let numbers = gate.materialize().unwrap().to_f32();
        numbers.chunks_exact(numbers.len() / 4).map(<[f32]>::to_vec).collect()
    };
    let before = gates(&graph);
    let comparisons = nodes(&graph, |op| *op == Op::Binary(Binary::Equal));
    for (place, expert) in [2, 0, 3, 1].into_iter().enumerate() {
        let number = graph.add_constant("expert", Constant::tensor(Tensor::from_i64(vec![], &[expert])));
        graph.node_mut(comparisons[place]).inputs[1] = Some(number);
    }
    let after = gates(&graph);
    for (place, expert) in [2, 0, 3, 1].into_iter().enumerate() {
        assert_eq!(after[expert], before[place]);
    }
}

#[test]
fn weights_of_another_kind_are_refused() {
    // The normalized weights squared.
    let mut graph = fixture("mobius-mixtral");
    let divisions = nodes(&graph, |op| *op == Op::Binary(Binary::Div));
    let of_experts: Vec<_> = divisions
        .into_iter()
        .filter(|id| {
            let from = graph.node(*id).input(0).and_then(|v| graph.def(v));
            from.is_some_and(|(_, node)| matches!(node.op, Op::TopK { .. }))
        })
        .collect();
    assert_eq!(of_experts.len(), 2);
    let weights = graph.node(of_experts[0]).output(0).unwrap();
    let squared = graph.add_node("squared", Op::Binary(Binary::Mul), &[weights, weights]);
    let readers = nodes(&graph, |op| *op == Op::Binary(Binary::Mul));
    for reader in readers {
        if graph.node(reader).output(0) != Some(squared) && graph.node(reader).input(0) == Some(weights) {
            graph.node_mut(reader).inputs[0] = Some(squared);
        }
    }
    graph.sort().unwrap();
    says(
        &refusal(graph),
        &["mixture of experts", "not the sum of its experts' results", "TopK"],
    );
}

#[test]
fn rows_that_are_not_the_tokens_are_refused() {
    // One expert's input is shifted.
    let mut graph = fixture("optimum-qwen3moe");
    let products = nodes(&graph, |op| *op == Op::MatMul);
    let product = products
        .into_iter()
        .find(|id| graph.node(*id).name.contains("experts.2/up_proj"))
        .unwrap();
    rewire(&mut graph, product, 0, |graph, old| {
        let one = constant(graph, &[], &[1.0]);
        graph.add_node("shifted", Op::Binary(Binary::Add), &[old, one])
    });
    graph.sort().unwrap();
    says(
        &refusal(graph),
        &["mixture of experts", "is not the rows of its tokens", "TopK"],
    );
}

#[test]
fn an_activation_of_its_own_is_refused() {
    let mut graph = fixture("dynamo18-granitemoe");
    // After the gate: the sigmoid of twice the gate, times the gate and three.
    let sigmoids = nodes(&graph, |op| *op == Op::Unary(lapidary::graph::op::Unary::Sigmoid));
    rewire(&mut graph, sigmoids[0], 0, |graph, old| {
        graph.add_node("bent", Op::Unary(lapidary::graph::op::Unary::Tanh), &[old])
    });
    graph.sort().unwrap();
    says(
        &refusal(graph),
        &["mixture of experts", "the function between the matrices", "node_topk"],
    );
}

#[test]
fn experts_of_another_count_are_refused() {
    let mut graph = fixture("contrib-moe");
    for id in nodes(&graph, |op| matches!(op, Op::Routing(_))) {
        if let Op::Routing(routing) = &mut graph.node_mut(id).op {
            routing.top_k = 9;
        }
    }
    says(&refusal(graph), &["chooses 9 of 4 experts", "moe"]);
    let mut graph = fixture("contrib-moe");
    for id in nodes(&graph, |op| matches!(op, Op::Experts(_))) {
        if let Op::Experts(experts) = &mut graph.node_mut(id).op {
            experts.experts = 3;
        }
    }
    says(&refusal(graph), &["is not of 3 experts", "moe"]);
}
