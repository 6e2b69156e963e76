//! LoRA adapters, merged while refitting.

use std::path::Path;

use lapidary::package::Package;
use lapidary::weights::source::WeightSource;
use safetensors::tensor::{Dtype, TensorView};

use crate::refit::{export, set_hash};
use crate::support::{lapidary, package, text};

/// Writes an adapter: layers with (out, in), rank 2, numbers from a small formula.
pub fn adapter(folder: &Path, layers: &[(&str, usize, usize)], config: &str) {
    std::fs::create_dir_all(folder).unwrap();
    std::fs::write(folder.join("adapter_config.json"), config).unwrap();
    let mut tensors = Vec::new();
    for (layer, out, width) in layers {
        for (half, shape) in [("lora_A", vec![2, *width]), ("lora_B", vec![*out, 2])] {
            let n: usize = shape.iter().product();
            let bytes: Vec<u8> = (0..n).flat_map(|i| number(half, i).to_le_bytes()).collect();
            tensors.push((format!("base_model.model.{layer}.{half}.weight"), shape, bytes));
        }
    }
    let views = tensors.iter().map(|(name, shape, bytes)| {
        (
            name.as_str(),
            TensorView::new(Dtype::F32, shape.clone(), bytes).unwrap(),
        )
    });
    std::fs::write(
        folder.join("adapter_model.safetensors"),
        safetensors::serialize(views, None).unwrap(),
    )
    .unwrap();
}

fn number(half: &str, i: usize) -> f32 {
    let phase = if half == "lora_A" { 0.7 } else { 1.3 };
    (i as f32 * phase).sin() * 0.25
}

fn module(pkg: &Path, name: &str) -> (Vec<usize>, Vec<f32>) {
    let graph = Package::open(pkg).unwrap().architecture().unwrap();
    let source = WeightSource::canonical(pkg, &graph);
    let (_, constant) = source.modules().find(|(n, _)| *n == name).unwrap();
    let tensor = constant.materialize().unwrap();
    (tensor.shape().to_vec(), tensor.to_f32())
}

const CONFIG: &str = r#"{"peft_type": "LORA", "r": 2, "lora_alpha": 6, "target_modules": ["q_proj"]}"#;

#[test]
fn the_sum_is_the_formulas() {
    let folder = tempfile::tempdir().unwrap();
    let pkg = package(folder.path(), &export("llama-optimum"), &["--capacity", "32"]);
    let name = "layers.1.attention.query.weight";
    let (shape, before) = module(&pkg, name);
    let other = module(&pkg, "layers.0.attention.query.weight");
    let (out, width) = (shape[0], shape[1]);
    let path = folder.path().join("adapter");
    adapter(&path, &[("model.layers.1.self_attn.q_proj", out, width)], CONFIG);
    lapidary([
        "refit",
        text(&pkg),
        "--from",
        text(&export("llama-optimum")),
        "--lora",
        text(&path),
    ])
    .ok();
    let (_, after) = module(&pkg, name);
    for row in 0..out {
        for column in 0..width {
            let delta: f32 = (0..2)
                .map(|r| number("lora_B", row * 2 + r) * number("lora_A", r * width + column))
                .sum();
            let expected = before[row * width + column] + 3.0 * delta;
            let found = after[row * width + column];
            assert!(
                (found - expected).abs() < 1e-6,
                "[{row}, {column}]: {found} for {expected}"
            );
        }
    }
    assert_eq!(module(&pkg, "layers.0.attention.query.weight"), other);
    let manifest = lapidary(["info", text(&pkg), "--json"]).ok().json();
    assert_eq!(manifest["weights"]["refit"]["lora"], "adapter");
}

#[test]
fn a_fused_layer_changes_in_all_its_parts() {
    let folder = tempfile::tempdir().unwrap();
    let pkg = package(folder.path(), &export("gpt2-optimum"), &["--capacity", "32"]);
    let parts = ["query", "key", "value"].map(|m| format!("layers.0.attention.{m}.weight"));
    let before = parts.clone().map(|m| module(&pkg, &m).1);
    let path = folder.path().join("adapter");
    adapter(&path, &[("transformer.h.0.attn.c_attn", 96, 32)], CONFIG);
    lapidary([
        "refit",
        text(&pkg),
        "--from",
        text(&export("gpt2-optimum")),
        "--lora",
        text(&path),
    ])
    .ok();
    for (part, before) in before.iter().enumerate() {
        let after = module(&pkg, &parts[part]).1;
        let row = part * 32 + 5;
        let delta: f32 = (0..2)
            .map(|r| number("lora_B", row * 2 + r) * number("lora_A", r * 32 + 7))
            .sum();
        let at = 5 * 32 + 7;
        assert!((after[at] - before[at] - 3.0 * delta).abs() < 1e-6, "{}", parts[part]);
    }
}

#[test]
fn adapters_that_do_not_belong() {
    let folder = tempfile::tempdir().unwrap();
    let pkg = package(folder.path(), &export("llama-optimum"), &["--capacity", "32"]);
    let hash = set_hash(&pkg);
    let path = folder.path().join("adapter");
    let refused = |layers: &[(&str, usize, usize)], config: &str| {
        adapter(&path, layers, config);
        let model = export("llama-optimum");
        let run = lapidary(["refit", text(&pkg), "--from", text(&model), "--lora", text(&path)]);
        run.refused().0
    };
    let message = refused(&[("model.layers.7.self_attn.q_proj", 64, 32)], CONFIG);
    assert!(
        message.contains("the adapter changes model.layers.7.self_attn.q_proj"),
        "{message}"
    );
    let message = refused(&[("model.layers.0.self_attn.q_proj", 60, 32)], CONFIG);
    assert!(
        message.contains("the adapter changes model.layers.0.self_attn.q_proj"),
        "{message}"
    );
    let rank = CONFIG.replace("\"r\": 2", "\"r\": 4");
    let message = refused(&[("model.layers.0.self_attn.q_proj", 64, 32)], &rank);
    assert!(message.contains("do not have the rank 4"), "{message}");
    let dora = CONFIG.replace("\"r\": 2", "\"r\": 2, \"use_dora\": true");
    assert!(refused(&[("model.layers.0.self_attn.q_proj", 64, 32)], &dora).contains("DoRA"));
    let other = CONFIG.replace("LORA", "IA3");
    assert!(refused(&[("model.layers.0.self_attn.q_proj", 64, 32)], &other).contains("IA3"));
    assert_eq!(set_hash(&pkg), hash);
}
