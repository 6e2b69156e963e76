//! Mixtures of experts of all available exporters against ONNX Runtime.

use std::path::Path;

use lapidary::decode::Session;
use lapidary::decode::cpu::CpuDevice;
use lapidary::{onnx, passes};
use serde_json::Value;

/// Log-probabilities of these tokens after the prompt and this many of the tokens that follow.
fn check(name: &str, model: &Path, cases: &Value) {
    let options = passes::CanonicalizeOptions {
        max_positions: 64,
        ..passes::CanonicalizeOptions::default()
    };
    let canonical = passes::canonicalize(onnx::read(model).unwrap(), &options);
    let canonical = canonical.unwrap_or_else(|error| panic!("{name}: {error}"));
    let vocabulary = canonical.architecture.vocabulary.unwrap();
    for case in cases.as_array().unwrap() {
        let list = |value: &Value| -> Vec<u32> {
            let all = value.as_array().unwrap().iter();
            all.map(|v| v.as_u64().unwrap() as u32).collect()
        };
        let (prompt, tokens) = (list(&case["prompt"]), list(&case["tokens"]));
        let device = CpuDevice::new(canonical.graph.clone(), vocabulary, Some(2));
        let mut session = Session::new(Box::new(device), &[64], vocabulary);
        let mut logits = session.feed(&prompt).unwrap().to_vec();
        for (step, token) in tokens.iter().enumerate() {
            let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            let sum: f32 = logits.iter().map(|x| (x - max).exp()).sum();
            for pair in case["top"][step].as_array().unwrap() {
                let (id, wanted) = (pair[0].as_u64().unwrap() as usize, pair[1].as_f64().unwrap());
                let found = f64::from(logits[id] - max - sum.ln());
                assert!(
                    (found - wanted).abs() < 2e-4,
                    "{name}, step {step}: {id} has {found}, not {wanted}"
                );
            }
            if step + 1 < tokens.len() {
                logits = session.feed(&[*token]).unwrap().to_vec();
            }
        }
    }
}

fn references(folder: &Path) -> Option<Value> {
    let text = std::fs::read_to_string(folder.join("reference.json")).ok()?;
    Some(serde_json::from_str(&text).unwrap())
}

#[test]
fn fixtures_give_the_answers_of_onnx_runtime() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/experts");
    let references = references(&folder).unwrap();
    let all = references.as_object().unwrap();
    assert!(all.len() >= 6);
    for (name, cases) in all {
        check(name, &folder.join(name).join("model.onnx"), cases);
    }
}

/// The samples beside the repository, if present.
#[test]
fn samples_beside_the_repository_do_so_too() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../shared/exports/more");
    let Some(references) = references(&folder) else { return };
    for name in ["dynamo18-qwen3moe", "optimum-qwen3moe", "mobius-mixtral"] {
        check(name, &folder.join(name).join("model.onnx"), &references[name]);
    }
}
