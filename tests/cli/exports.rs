//! `convert` and `generate` on every export: ONNX Runtime's greedy tokens and log-probabilities.

use std::path::Path;

use serde_json::Value;

use crate::support::{fixture, ids, lapidary, names, package, text};

/// Log-softmax of a row of logits.
fn logprobs(logits: &Value) -> Vec<f64> {
    let logits: Vec<f64> = logits.as_array().unwrap().iter().map(|v| v.as_f64().unwrap()).collect();
    let max = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let log_sum = max + logits.iter().map(|l| (l - max).exp()).sum::<f64>().ln();
    logits.iter().map(|l| l - log_sum).collect()
}

/// The largest difference of the log-probabilities reported, or what is wrong.
fn check(folder: &Path, flags: &[&str], tolerance: f64) -> Result<f64, String> {
    let reference: Value =
        serde_json::from_str(&std::fs::read_to_string(folder.join("reference.json")).unwrap()).unwrap();
    let scratch = tempfile::tempdir().unwrap();
    let pkg = package(scratch.path(), &folder.join("model.onnx"), flags);
    let greedy = &reference["greedy_tokens"];
    let n = greedy.as_array().unwrap().len().to_string();
    let prompt = ids(&reference["prompt"]);
    let run = lapidary([
        "generate",
        text(&pkg),
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
fn other_dtypes_stay_close() {
    check(&fixture("exports/llama-optimum"), &["--dtype", "fp16"], 2e-2).unwrap();
    check(&fixture("exports/qwen3-optimum-fp16"), &["--dtype", "fp32"], 2e-2).unwrap();
}
