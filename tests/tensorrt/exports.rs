//! Every export under fixtures/exports becomes engines: decode, prefill chunk and dynamic prefill, bound and embedded.

use std::path::Path;

use lapidary::lower::LowerOptions;
use lapidary::network::WeightMode;
use lapidary::{onnx, passes};

use crate::models::{profiles, try_build};

/// One test a family, so that they run side by side.
const FAMILIES: [&str; 5] = ["gpt2", "llama", "mistral", "qwen2", "qwen3"];

fn exports() -> Vec<String> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/exports");
    let entries = std::fs::read_dir(&folder).unwrap_or_else(|error| panic!("{}: {error}", folder.display()));
    let folders = entries
        .map(|entry| entry.unwrap())
        .filter(|entry| entry.path().join("model.onnx").exists());
    let mut names: Vec<String> = folders.map(|e| e.file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

fn family_builds(family: &str) {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/exports");
    let of_family = |name: &String| name.split('-').next() == Some(family);
    let names: Vec<String> = exports().into_iter().filter(of_family).collect();
    assert!(names.len() >= 5, "{family}: {names:?}");
    let mut failed = Vec::new();
    for name in names {
        let model = folder.join(&name).join("model.onnx");
        let graph = onnx::read(&model).unwrap_or_else(|error| panic!("{error}"));
        let options = passes::CanonicalizeOptions {
            max_positions: 64,
            ..Default::default()
        };
        let canonical = match passes::canonicalize(graph, &options) {
            Ok(canonical) => canonical.graph,
            Err(error) => {
                failed.push(format!("{name}: {error}"));
                continue;
            }
        };
        for weight_mode in [WeightMode::Bind, WeightMode::Embed] {
            let options = LowerOptions {
                weight_mode,
                ..LowerOptions::default()
            };
            // Logits of every token are for `verify`, on the CPU; the models' tests build them.
            for profile in &profiles(32)[..3] {
                if let Err(error) = try_build(&canonical, profile, &options) {
                    failed.push(format!("{name} {error}"));
                }
            }
        }
    }
    assert!(failed.is_empty(), "{} failures:\n{}", failed.len(), failed.join("\n"));
}

#[test]
fn no_export_is_left_out() {
    for name in exports() {
        let family = name.split('-').next().unwrap();
        assert!(FAMILIES.contains(&family), "{name} has no test: add its family");
    }
}

#[test]
fn gpt2_exports_build() {
    family_builds("gpt2");
}

#[test]
fn llama_exports_build() {
    family_builds("llama");
}

#[test]
fn mistral_exports_build() {
    family_builds("mistral");
}

#[test]
fn qwen2_exports_build() {
    family_builds("qwen2");
}

#[test]
fn qwen3_exports_build() {
    family_builds("qwen3");
}
