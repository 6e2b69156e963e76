//! `convert` and `generate` on every export: ONNX Runtime's greedy tokens and log-probabilities.

use std::path::{Path, PathBuf};

use lapidary::onnx::proto::{ModelProto, TensorProto};
use prost::Message;
use serde_json::Value;

use crate::support::{fixture, ids, lapidary, names, package, text};

/// Log-softmax of a row of logits.
fn logprobs(logits: &Value) -> Vec<f64> {
    let logits: Vec<f64> = logits.as_array().unwrap().iter().map(|v| v.as_f64().unwrap()).collect();
    let max = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let log_sum = max + logits.iter().map(|l| (l - max).exp()).sum::<f64>().ln();
    logits.iter().map(|l| l - log_sum).collect()
}

/// Converts the export in `folder` and compares.
fn check(folder: &Path, flags: &[&str], tolerance: f64) -> Result<f64, String> {
    let scratch = tempfile::tempdir().unwrap();
    let pkg = package(scratch.path(), &folder.join("model.onnx"), flags);
    compare(&pkg, folder, tolerance)
}

/// The largest difference of the reported log-probabilities, or the error.
fn compare(pkg: &Path, folder: &Path, tolerance: f64) -> Result<f64, String> {
    let reference: Value =
        serde_json::from_str(&std::fs::read_to_string(folder.join("reference.json")).unwrap()).unwrap();
    let greedy = &reference["greedy_tokens"];
    let n = greedy.as_array().unwrap().len().to_string();
    let prompt = ids(&reference["prompt"]);
    let run = lapidary([
        "generate",
        text(pkg),
        "--prompt-ids",
        &prompt,
        "--temperature",
        "0",
        "--max-new-tokens",
        &n,
        "--ignore-eos",
        "--json",
        "--logprobs",
        "8",
    ]);
    let document = run.ok().json();
    if document["tokens"] != *greedy {
        return Err(format!("tokens {}, expected {greedy}", document["tokens"]));
    }
    if document["finish_reason"] != "length" || document["prompt_ids"] != reference["prompt"] {
        return Err(format!("{}, {}", document["finish_reason"], document["prompt_ids"]));
    }
    let rows = std::iter::once(&reference["prefill_last_logits"]).chain(reference["step_logits"].as_array().unwrap());
    let mut worst = 0f64;
    for (step, row) in document["steps"].as_array().unwrap().iter().zip(rows) {
        let expected = logprobs(row);
        let top = step["top_logprobs"].as_array().unwrap();
        assert_eq!(top.len(), 8);
        assert_eq!(top[0][0], step["token"], "greedy takes the most probable");
        assert_eq!(top[0][1], step["logprob"]);
        for pair in top {
            let id = pair[0].as_u64().unwrap() as usize;
            worst = worst.max((pair[1].as_f64().unwrap() - expected[id]).abs());
        }
    }
    match worst <= tolerance {
        true => Ok(worst),
        false => Err(format!("log-probabilities differ by {worst:.2e}")),
    }
}

/// Every export of a family.
fn family(name: &str) {
    let exports = fixture("exports");
    let mut failures = Vec::new();
    let mut count = 0;
    for folder in names(&exports).into_iter().filter(|n| n.starts_with(name)) {
        let path = exports.join(&folder);
        if !path.join("model.onnx").is_file() {
            continue;
        }
        count += 1;
        let tolerance = if folder.ends_with("fp16") { 2e-2 } else { 1e-3 };
        if let Err(problem) = check(&path, &[], tolerance) {
            failures.push(format!("{folder}: {problem}"));
        }
    }
    assert!(count >= 6, "only {count} exports of {name}");
    assert!(failures.is_empty(), "{}", failures.join("\n"));
}

#[test]
fn llama() {
    family("llama-");
}

#[test]
fn qwen2() {
    family("qwen2-");
}

#[test]
fn qwen3() {
    family("qwen3-");
}

#[test]
fn mistral() {
    family("mistral-");
}

#[test]
fn gpt2() {
    family("gpt2-");
}

#[test]
fn a_small_first_capacity_moves_up_and_changes_nothing() {
    // 11 prompt tokens and 9 more: 12 slots, then 16, then 20.
    for export in ["llama-optimum", "mistral-optimum", "gpt2-optimum"] {
        check(&fixture("exports").join(export), &["--capacity", "12,16,20"], 1e-3).unwrap();
    }
}

#[test]
fn another_dtype_is_what_the_package_holds_and_stays_close() {
    for (export, asked, dtype) in [
        ("llama-optimum", "fp16", "f16"),
        ("qwen3-optimum-fp16", "fp32", "f32"),
        ("gpt2-optimum", "fp32", "f32"),
    ] {
        let folder = fixture("exports").join(export);
        let scratch = tempfile::tempdir().unwrap();
        let pkg = package(scratch.path(), &folder.join("model.onnx"), &["--dtype", asked]);
        // The package has the requested properties in its manifest, its weights and the caches of its graph.
        let info = lapidary(["info", text(&pkg), "--json"]).ok().json();
        assert_eq!(info["dtype"], dtype, "{export}");
        let tensors = info["weights"]["tensors"].as_array().unwrap();
        let floats = ["f16", "bf16", "f32"];
        let mut stored = tensors
            .iter()
            .filter(|t| floats.contains(&t["dtype"].as_str().unwrap()));
        assert!(stored.clone().count() > 10, "{export}: {tensors:#?}");
        assert!(stored.all(|t| t["dtype"] == dtype), "{export}: {tensors:#?}");
        let graph = lapidary::onnx::read(pkg.join("graph.onnx")).unwrap();
        let caches = graph.inputs.iter().map(|id| graph.value(*id));
        let caches: Vec<_> = caches.filter(|v| v.name.contains("_cache.")).collect();
        assert_eq!(caches.len(), 4, "{export}");
        for cache in caches {
            assert_eq!(cache.dtype.unwrap().to_string(), dtype, "{export}: {}", cache.name);
        }
        compare(&pkg, &folder, 2e-2).unwrap();
    }
}

/// This many greedy tokens after a prompt of ids, with log-probabilities.
fn greedy(pkg: &Path, prompt: &str, tokens: usize) -> Value {
    let n = tokens.to_string();
    let flags = [
        "generate",
        text(pkg),
        "--prompt-ids",
        prompt,
        "--temperature",
        "0",
        "--json",
    ];
    let more = ["--max-new-tokens", &n, "--ignore-eos", "--logprobs", "8"];
    lapidary(flags.iter().chain(&more)).ok().json()
}

/// Models of other families in a folder beside the project's, if there is one: `reference.json` has ONNX Runtime's
/// greedy tokens and the best log-probabilities of each step, for prompts of two lengths.
#[test]
fn other_families_where_they_are_at_hand() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../shared/exports/more");
    let Ok(reference) = std::fs::read_to_string(root.join("reference.json")) else {
        return;
    };
    let reference: Value = serde_json::from_str(&reference).unwrap();
    for name in [
        "optimum-gptneo",
        "optimum-gptj2048",
        "oldA-gpt2",
        "shape_lasttoken",
        "edit_num_logits",
        "oldB-llama",
        "dynamo18-falcon",
        "dims_same",
    ] {
        let scratch = tempfile::tempdir().unwrap();
        let pkg = package(scratch.path(), &root.join(name).join("model.onnx"), &[]);
        for case in reference[name].as_array().unwrap() {
            let (prompt, tokens) = (ids(&case["prompt"]), case["tokens"].as_array().unwrap());
            let document = greedy(&pkg, &prompt, tokens.len());
            assert_eq!(document["tokens"], case["tokens"], "{name}");
            let steps = document["steps"].as_array().unwrap().iter();
            for (step, best) in steps.zip(case["top"].as_array().unwrap()) {
                let difference = step["logprob"].as_f64().unwrap() - best[0][1].as_f64().unwrap();
                assert!(difference.abs() < 1e-3, "{name}: {step} {best}");
            }
        }
    }
}

/// A copy of a model with all fp16 converted to fp32, as in scripts/quantized_references.py.
fn in_fp32(model: &Path, folder: &Path) -> PathBuf {
    // In TensorProto.DataType.
    const HALF: i32 = 10;
    const SINGLE: i32 = 1;
    let widen = |tensor: &mut TensorProto| {
        if tensor.data_type != Some(HALF) {
            return;
        }
        let halves = tensor
            .raw_data()
            .chunks_exact(2)
            .map(|b| half::f16::from_le_bytes([b[0], b[1]]));
        let wide: Vec<u8> = halves.flat_map(|value| value.to_f32().to_le_bytes()).collect();
        (tensor.data_type, tensor.raw_data) = (Some(SINGLE), Some(wide.into()));
    };
    let mut made = ModelProto::decode(&std::fs::read(model).unwrap()[..]).unwrap();
    let graph = made.graph.as_mut().unwrap();
    graph.value_info.clear();
    graph.initializer.iter_mut().for_each(widen);
    for node in &mut graph.node {
        let is_cast = node.op_type() == "Cast";
        for attribute in &mut node.attribute {
            if is_cast && attribute.i == Some(i64::from(HALF)) {
                attribute.i = Some(i64::from(SINGLE));
            }
            attribute.t.iter_mut().for_each(widen);
        }
    }
    for value in graph.input.iter_mut().chain(&mut graph.output) {
        if let Some(of) = value.r#type.as_mut().and_then(|of| of.tensor_type.as_mut())
            && of.elem_type == Some(HALF)
        {
            of.elem_type = Some(SINGLE);
        }
    }
    let path = folder.join("fp32.onnx");
    std::fs::write(&path, made.encode_to_vec()).unwrap();
    path
}

/// Static QDQ exports as ONNX Runtime's extended optimizations save them (`QLinear..`, `QGemm`, codes that are moved), and weights
/// in microscaling formats and 2 bits, as opset 25 has them: scripts/make_quantized_fixtures.py.
#[test]
fn quantized_exports_of_other_forms() {
    let mut failures = Vec::new();
    for (name, tolerance) in [
        ("llama-products", 1e-4),
        ("llama-many", 1e-4),
        ("gpt2-many", 1e-4),
        ("llama-mxfp8", 1e-4),
        ("llama-mxfp4", 1e-4),
        ("llama-int2", 1e-4),
    ] {
        match check(&fixture("quantized").join(name), &[], tolerance) {
            Ok(worst) => println!("{name}: {worst:.1e}"),
            Err(problem) => failures.push(format!("{name}: {problem}")),
        }
    }
    assert!(failures.is_empty(), "{}", failures.join("\n"));
}

/// The output of `inspect` for them, and a package of microscales written as ONNX and converted again.
#[test]
fn microscales_are_described_and_written_again() {
    let export = fixture("quantized/llama-mxfp4/model.onnx");
    let said = lapidary(["inspect", text(&export)]);
    let said = said.ok();
    for part in ["f4e2m1 in blocks of 32 on axis", "with scales of f8e8m0"] {
        assert!(said.stdout.contains(part), "{}", said.stdout);
    }
    let scratch = tempfile::tempdir().unwrap();
    let written = scratch.path().join("written.onnx");
    let target = scratch.path().join("first");
    let arguments = [
        "convert",
        text(&export),
        "-o",
        text(&target),
        "--emit-onnx",
        text(&written),
    ];
    lapidary(arguments).ok();
    let again = package(scratch.path(), &written, &[]);
    compare(&again, &fixture("quantized/llama-mxfp4"), 1e-4).unwrap();
}

/// Quantized exports in a folder beside the project's, if there is one, against ONNX Runtime with basic optimizations
/// (`quantized_references.json`, by scripts/quantized_references.py). The `reference.json` beside the exports was made
/// with all optimizations, which round activations to 8 bits where files do not specify it; docs/explanation/quantized-weights.md
/// lists the differences.
#[test]
fn quantized_exports_where_they_are_at_hand() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../shared/exports/quantized");
    if !root.join("reference.json").is_file() {
        return;
    }
    let reference: Value = serde_json::from_str(include_str!("quantized_references.json")).unwrap();
    let mut compared = 0;
    let mut wrong = Vec::new();
    for (name, tolerance) in [
        ("post_q4-optimum-llama_big", 1e-4),
        ("post_q4_asym-optimum-llama_big", 1e-4),
        ("post_q8-optimum-llama_big", 1e-4),
        ("post_bnb4-optimum-llama_big", 1e-4),
        ("post_q4_qdq-optimum-llama_big", 1e-4),
        ("mo_int4_awq", 1e-4),
        ("genai_cpu_int4-llama_big", 1e-4),
        ("genai_cpu_int4-qwen3_big_tied_shared_embedtrue", 1e-4),
        ("genai_NvTensorRtRtx_int4-llama_big", 3e-2),
        ("dq_nvfp4", 1e-4),
        ("post_q4f16-optimum-llama_big", 3e-2),
        // Activations are rounded.
        ("post_quantized-optimum-llama_big", 1e-4),
        ("post_static-optimum-llama_big", 1e-4),
        ("mo_fp8", 1e-4),
    ] {
        let scratch = tempfile::tempdir().unwrap();
        let mut model = root.join(name).join("model.onnx");
        // In fp16 two levels of ONNX Runtime differ by up to 0.6, so the reference is the file in fp32.
        if reference[name]["by"] == "fp32" {
            model = in_fp32(&model, scratch.path());
        }
        let pkg = package(scratch.path(), &model, &[]);
        let mut worst = 0f64;
        for case in reference[name]["cases"].as_array().unwrap() {
            let (prompt, tokens) = (ids(&case["prompt"]), case["tokens"].as_array().unwrap());
            let document = greedy(&pkg, &prompt, tokens.len());
            let found = document["tokens"].as_array().unwrap();
            let steps = document["steps"].as_array().unwrap().iter();
            for (i, (step, best)) in steps.zip(case["top"].as_array().unwrap()).enumerate() {
                let log_probability = |pairs: &Value, token: &Value| {
                    let mut pairs = pairs.as_array().unwrap().iter();
                    pairs.find(|pair| pair[0] == *token).and_then(|pair| pair[1].as_f64())
                };
                for pair in best.as_array().unwrap() {
                    // The last of the listed tokens may differ.
                    if let Some(ours) = log_probability(&step["top_logprobs"], &pair[0]) {
                        worst = worst.max((ours - pair[1].as_f64().unwrap()).abs());
                        compared += 1;
                    }
                }
                if found[i] != tokens[i] {
                    let margin = best[0][1].as_f64().unwrap() - best[1][1].as_f64().unwrap();
                    if margin > 2.0 * tolerance {
                        wrong.push(format!("{name}: token {i} is {}, expected {}", found[i], tokens[i]));
                    }
                    break;
                }
            }
        }
        println!("{name}: {worst:.1e}");
        if worst > tolerance {
            wrong.push(format!("{name}: log-probabilities differ by {worst:.1e}"));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    assert!(compared > 14 * 2 * 9 * 6, "only {compared} log-probabilities compared");
    for name in ["mo_fp8", "post_static-optimum-llama_big"] {
        let scratch = tempfile::tempdir().unwrap();
        let model = root.join(name).join("model.onnx");
        let target = scratch.path().join("pkg");
        let partial = lapidary(["convert", text(&model), "-o", text(&target), "--activations", "partial"]);
        assert_eq!(partial.status, 0, "{}", partial.stderr);
        assert!(partial.stderr.contains("stay floating point"), "{}", partial.stderr);
    }
}
