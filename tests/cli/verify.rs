//! `lapidary verify`: prompts longer than every length at which results could change, and a message about lengths not
//! covered.

use lapidary::dim::Dim;
use lapidary::graph::op::{Binary, Op, Unary};
use lapidary::graph::{Graph, NodeId};
use lapidary::tensor::{DType, Tensor};

use crate::support::{fixture, lapidary, package, text};

/// A Llama whose angles are halved in calls of more than `above` tokens, as with rotary scaling for long texts.
fn switched(above: i64) -> Graph {
    let mut graph = lapidary::onnx::read(fixture("exports/llama-optimum/model.onnx")).unwrap();
    let mask = graph.find("attention_mask").unwrap();
    let total = graph.add_node("total", Op::Shape { start: 1, end: Some(2) }, &[mask]);
    let limit = graph.add_constant("switch.length", Tensor::from_i64(vec![1], &[above]));
    let long = graph.add_node("long", Op::Binary(Binary::Greater), &[total, limit]);
    let one = graph.add_constant("short.factor", Tensor::from_f32(vec![], &[1.0]));
    let half = graph.add_constant("long.factor", Tensor::from_f32(vec![], &[0.5]));
    let factor = graph.add_node("factor", Op::Where, &[long, half, one]);
    let trigonometric = |op: &Op| matches!(op, Op::Unary(Unary::Cos | Unary::Sin));
    let nodes: Vec<NodeId> = graph
        .node_ids()
        .filter(|id| trigonometric(&graph.node(*id).op))
        .collect();
    for node in nodes {
        let angle = graph.node(node).input(0).unwrap();
        let scaled = graph.add_node("angle", Op::Binary(Binary::Mul), &[angle, factor]);
        graph.node_mut(node).inputs[0] = Some(scaled);
    }
    for id in graph.outputs.clone() {
        let value = graph.value_mut(id);
        value.dtype = Some(DType::F32);
        let rank = if value.name == "logits" { 3 } else { 4 };
        value.shape = Some((0..rank).map(|axis| Dim::named(format!("out.{axis}"))).collect());
    }
    graph.sort().unwrap();
    graph
}

#[test]
fn a_difference_that_begins_after_hundred_tokens_is_noticed() {
    let folder = tempfile::tempdir().unwrap();
    let other = folder.path().join("other.onnx");
    lapidary::onnx::write_with_data(&switched(100), &other).unwrap();
    let plain = fixture("exports/llama-optimum/model.onnx");
    // Below the switch the two models are equal, and verify reports the longest length compared.
    let pkg = package(folder.path(), &plain, &["--capacity", "96"]);
    let verify = |pkg: &std::path::Path, flags: &[&str]| {
        let args = ["verify", text(pkg), "--against", text(&other), "--engine", "eval"];
        lapidary(args.iter().chain(flags))
    };
    let short = verify(&pkg, &[]).ok();
    assert!(
        short.stdout.contains("longest sequence compared: 96 tokens\n")
            && short
                .stdout
                .contains("not covered: 100 (switch.length): the package's cache ends at 96"),
        "{}",
        short.stdout
    );
    // Beyond it they differ.
    std::fs::remove_dir_all(&pkg).unwrap();
    let pkg = package(folder.path(), &plain, &["--capacity", "64,256"]);
    let long = verify(&pkg, &[]);
    assert_eq!(long.status, 1, "{}{}", long.stdout, long.stderr);
    assert!(long.stderr.contains("differs from"), "{}", long.stderr);
    assert!(
        long.stdout
            .contains("longest sequence compared: 108 tokens; it covers 100 (switch.length)"),
        "{}",
        long.stdout
    );
    // With fewer requested tokens it is not covered, and verify says so.
    let report = verify(&pkg, &["--longest", "60", "--json"]).ok().json();
    assert_eq!(
        (&report["passed"], &report["compared_tokens"]),
        (&true.into(), &60.into())
    );
    let lengths = report["lengths"].as_array().unwrap();
    let switch = lengths.iter().find(|mark| mark["tokens"] == 100).unwrap();
    assert_eq!(
        (&switch["covered"], &switch["what"]),
        (&false.into(), &"switch.length".into())
    );
    assert!(switch["reason"].as_str().unwrap().contains("--longest"), "{switch}");
}

#[test]
fn windows_and_the_end_of_tables_are_passed() {
    for (export, covered) in [("mistral-optimum", 8), ("gpt2-optimum", 64)] {
        let folder = tempfile::tempdir().unwrap();
        let model = fixture("exports").join(export).join("model.onnx");
        let pkg = package(folder.path(), &model, &[]);
        let run = lapidary([
            "verify",
            text(&pkg),
            "--against",
            text(&model),
            "--engine",
            "eval",
            "--json",
        ])
        .ok();
        let report = run.json();
        let lengths = report["lengths"].as_array().unwrap();
        let mark = lengths.iter().find(|mark| mark["tokens"] == covered);
        assert_eq!(
            mark.map(|mark| &mark["covered"]),
            Some(&true.into()),
            "{export}: {report}"
        );
    }
}
