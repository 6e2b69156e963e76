//! Text dumps of canonical graphs, what `inspect` reports, and other element types.

use lapidary::graph::dump;
use std::collections::BTreeSet;
use std::path::Path;

use lapidary::passes::{CanonicalizeOptions, PASSES, canonicalize, recognize};
use lapidary::tensor::DType;

use crate::canonical::{canonical, exports, for_each};
use crate::decoder::{Decoder, distance};

#[test]
fn canonical_dumps() {
    for name in ["qwen3-optimum", "mistral-dynamo-static"] {
        let export = exports()
            .into_iter()
            .find(|e| e.name == name)
            .expect("the fixture is there");
        let graph = canonical(&export).unwrap().graph;
        insta::assert_snapshot!(name, dump(&graph).to_string());
    }
}

/// The table of passes, with the descriptions for reports, has exactly the passes that run.
#[test]
fn the_table_of_passes_is_what_runs() {
    let options = CanonicalizeOptions {
        max_positions: 64,
        dtype: Some(DType::F16),
        allow_overflow: false,
        activations: Default::default(),
        mask_windows: Default::default(),
    };
    // With the maximum of sequences per call, and with two.
    let batched = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/families/torchscript17-llama-batch2/model.onnx");
    let free = exports().into_iter().find(|e| e.name == "llama-optimum");
    let graphs = [
        free.expect("the fixture is there").read(),
        lapidary::onnx::read(batched).unwrap(),
    ];
    let reports: Vec<_> = graphs.map(|graph| canonicalize(graph, &options).unwrap().report).into();
    let ran: BTreeSet<&str> = reports.iter().flatten().map(|pass| pass.name).collect();
    let listed: BTreeSet<&str> = PASSES.iter().map(|info| info.name).collect();
    assert_eq!(ran, listed);
}

#[test]
fn inspection_recognizes_every_export() {
    for_each(|export| {
        let options = CanonicalizeOptions {
            max_positions: 64,
            ..CanonicalizeOptions::default()
        };
        let (report, _) = recognize(&export.read(), &options);
        let expected = match export.reference.exporter.as_str() {
            "ort-genai" if export.reference.dtype == "fp32" => &["group_query_attention"][..],
            "mobius" => &["attention_past"],
            "mobius-static" => &["tensor_scatter"],
            "torchscript-static" => &["scatter_elements", "scatter_nd"],
            name if name.contains("static") => &["scatter_nd", "scatter_elements"],
            _ => &["concat"],
        };
        if !report.obstacles.is_empty() || report.architecture.is_none() {
            return Err(format!("{:?}", report.obstacles));
        }
        if report.layers.len() != export.reference.model.layers {
            return Err(format!("{} layers", report.layers.len()));
        }
        if !expected.contains(&report.cache.as_str()) {
            return Err(format!("its cache is {}, expected {expected:?}", report.cache));
        }
        Ok(())
    });
}

#[test]
fn other_element_types_compute_nearly_the_same() {
    for name in ["llama-optimum", "gpt2-dynamo-opset18", "qwen3-mobius-static"] {
        let export = exports()
            .into_iter()
            .find(|e| e.name == name)
            .expect("the fixture is there");
        for (dtype, tolerance) in [(DType::F16, 3e-2), (DType::Bf16, 2.5e-1)] {
            let options = CanonicalizeOptions {
                max_positions: 64,
                dtype: Some(dtype),
                allow_overflow: false,
                activations: Default::default(),
                mask_windows: Default::default(),
            };
            let graph = canonicalize(export.read(), &options)
                .unwrap_or_else(|e| panic!("{name}: {e}"))
                .graph;
            for id in &graph.inputs[3..] {
                assert_eq!(graph.value(*id).dtype, Some(dtype));
            }
            let logits = Decoder::new(&graph, 1, 16).step(std::slice::from_ref(&export.reference.prompt));
            let worst = distance(&logits[0], &export.reference.prefill_last_logits);
            assert!(worst <= tolerance, "{name} as {dtype}: {worst:e}");
        }
    }
}

/// `LAPIDARY_MODEL=/path/model.onnx cargo test --release --test passes -- --ignored --nocapture a_large_model`
#[test]
#[ignore = "measures a model given in LAPIDARY_MODEL"]
fn a_large_model() {
    let path = std::env::var_os("LAPIDARY_MODEL").expect("LAPIDARY_MODEL names a model");
    let graph = lapidary::onnx::read(path).unwrap();
    let start = std::time::Instant::now();
    let canonical = canonicalize(graph, &CanonicalizeOptions::default()).unwrap_or_else(|e| panic!("{e}"));
    println!(
        "{:.3} s in all\n{:#?}",
        start.elapsed().as_secs_f64(),
        canonical.architecture
    );
    for pass in &canonical.report {
        let (before, after) = (pass.nodes_before, pass.nodes_after);
        println!(
            "{:>12} {:>5} rewrites {before:>5} -> {after:>5} nodes {:.3} s",
            pass.name, pass.rewrites, pass.seconds
        );
    }
}
