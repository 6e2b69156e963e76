//! Weights of an export without names and without a recognizable structure: found by their values in a checkpoint that
//! is given once, and afterwards by the names learned from it.

use std::path::Path;

use lapidary::onnx::proto::{ModelProto, NodeProto};
use prost::Message;
use safetensors::tensor::TensorView;
use serde_json::Value;

use crate::lora::adapter;
use crate::refit::{change, export, set_hash, tokens};
use crate::support::{lapidary, package, text};

/// The Llama export without names and with the up projection negated twice: the same function, but no rule recognizes
/// this form of a feed-forward block.
fn nameless(to: &Path) {
    let mut model = ModelProto::decode(std::fs::read(export("llama-optimum")).unwrap().as_slice()).unwrap();
    let graph = model.graph.as_mut().unwrap();
    let renamed: Vec<(String, String)> = graph
        .initializer
        .iter_mut()
        .enumerate()
        .map(|(i, tensor)| (tensor.name.replace(format!("val_{i}")).unwrap(), format!("val_{i}")))
        .collect();
    let negation = |from: &str, to: &str| NodeProto {
        op_type: Some("Neg".into()),
        name: Some(format!("{to}/Neg")),
        input: vec![from.to_string()],
        output: vec![to.to_string()],
        ..NodeProto::default()
    };
    let mut nodes = Vec::new();
    for mut node in graph.node.drain(..) {
        for input in &mut node.input {
            if let Some((_, new)) = renamed.iter().find(|(old, _)| old == input) {
                *input = new.clone();
            }
        }
        if node.name().contains("mlp/up_proj/MatMul") {
            let end = node.output[0].clone();
            let (plain, once) = (format!("{end}/plain"), format!("{end}/once"));
            node.output[0] = plain.clone();
            nodes.extend([node, negation(&plain, &once), negation(&once, &end)]);
        } else {
            nodes.push(node);
        }
    }
    graph.node = nodes;
    std::fs::write(to, model.encode_to_vec()).unwrap();
}

fn weights(pkg: &Path) -> Vec<Value> {
    let listed = lapidary(["weights", text(pkg), "--json"]).ok().json();
    listed["weights"].as_array().unwrap().clone()
}

#[test]
fn names_learned_from_numbers() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    // Known: a package of the same model, and its checkpoint.
    let plain = package(folder.path(), &export("llama-optimum"), &["--capacity", "32"]);
    let (hf, tune) = (at("hf"), at("tune"));
    for to in [&hf, &tune] {
        lapidary(["weights", text(&plain), "--export", text(to)]).ok();
    }
    for (name, factor) in [("mlp.up_proj", 1.5), ("mlp.down_proj", -2.0), ("self_attn.q_proj", 0.5)] {
        let name = format!("model.layers.0.{name}.weight");
        change(&tune.join("model.safetensors"), &name, |v| v * factor);
    }

    let model = at("nameless.onnx");
    nameless(&model);
    for dtype in ["fp32", "fp16"] {
        let pkg = at(dtype);
        lapidary([
            "convert",
            text(&model),
            "-o",
            text(&pkg),
            "--capacity",
            "32",
            "--dtype",
            dtype,
        ])
        .ok();
        let hash = set_hash(&pkg);
        let unknown = weights(&pkg)
            .iter()
            .filter(|w| w["modules"] == serde_json::json!([]))
            .count();
        assert_eq!(unknown, 4, "up and down of two layers");

        // A fine-tuned model alone is not enough: its values differ.
        let (message, help) = lapidary(["refit", text(&pkg), "--from", text(&tune)]).refused();
        assert!(message.contains("missing: val_"), "{message}");
        assert!(help.contains("refit once from the checkpoint"), "{help}");
        assert_eq!(set_hash(&pkg), hash, "nothing has changed");

        // The package's original weights, stripped or not, are enough.
        let bare = at(&format!("{dtype}-bare"));
        lapidary(["strip", text(&pkg), "-o", text(&bare)]).ok();
        let checked = lapidary(["weights", text(&bare), "--check", text(&hf), "--json"])
            .ok()
            .json();
        assert_eq!(checked["identical"], true);
        lapidary(["refit", text(&bare), "--from", text(&hf), "--mode", "identical"]).ok();
        assert_eq!(set_hash(&bare), hash);
        let learned: Vec<Value> = weights(&bare)
            .iter()
            .map(|w| w["learned"].clone())
            .filter(|l| *l != Value::Null)
            .collect();
        let names = ["up_proj", "down_proj"].map(|p| [0, 1].map(|i| format!("model.layers.{i}.mlp.{p}.weight")));
        for name in names.concat() {
            assert!(learned.contains(&serde_json::json!([name])), "{name}: {learned:?}");
        }
        assert_eq!(learned.len(), 4);

        // Now fine-tuned models fit, with the same result as in a package that recognized the structure.
        lapidary(["refit", text(&bare), "--from", text(&tune)]).ok();
        let known = at(&format!("{dtype}-known"));
        lapidary([
            "convert",
            text(&export("llama-optimum")),
            "-o",
            text(&known),
            "--capacity",
            "32",
            "--dtype",
            dtype,
        ])
        .ok();
        lapidary(["refit", text(&known), "--from", text(&tune)]).ok();
        assert_ne!(set_hash(&bare), hash);
        let numbers = |pkg: &Path| -> Vec<String> {
            let mut all: Vec<String> = weights(pkg).iter().map(|w| w["blake3"].to_string()).collect();
            all.sort();
            all
        };
        assert_eq!(numbers(&bare), numbers(&known));
        assert_eq!(tokens(&bare, "llama-optimum"), tokens(&known, "llama-optimum"));

        // An adapter applies too.
        let change = at("adapter");
        let config = r#"{"peft_type": "LORA", "r": 2, "lora_alpha": 6, "target_modules": ["up_proj"]}"#;
        let shape = weights(&known)
            .into_iter()
            .find(|w| w["modules"][0] == "layers.0.feed_forward.up.weight")
            .unwrap();
        let size = |i: usize| shape["shape"][i].as_u64().unwrap() as usize;
        adapter(&change, &[("model.layers.0.mlp.up_proj", size(0), size(1))], config);
        for pkg in [&bare, &known] {
            lapidary(["refit", text(pkg), "--from", text(&tune), "--lora", text(&change)]).ok();
        }
        assert_eq!(numbers(&bare), numbers(&known));
    }
}

/// If two tensors have the same values, nothing is guessed.
#[test]
fn equal_tensors_are_not_guessed() {
    let folder = tempfile::tempdir().unwrap();
    let plain = package(folder.path(), &export("llama-optimum"), &["--capacity", "32"]);
    let (hf, model, pkg) = (
        folder.path().join("hf"),
        folder.path().join("nameless.onnx"),
        folder.path().join("nameless"),
    );
    lapidary(["weights", text(&plain), "--export", text(&hf)]).ok();
    nameless(&model);
    lapidary(["convert", text(&model), "-o", text(&pkg), "--capacity", "32"]).ok();
    let bytes = std::fs::read(hf.join("model.safetensors")).unwrap();
    let parsed = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let mut all: Vec<(String, TensorView)> = parsed.iter().map(|(n, v)| (n.to_string(), v)).collect();
    let copy = parsed.tensor("model.layers.1.mlp.up_proj.weight").unwrap();
    all.push(("model.layers.1.mlp.spare.weight".into(), copy));
    let file = folder.path().join("copies.safetensors");
    std::fs::write(&file, safetensors::serialize(all, None).unwrap()).unwrap();
    let (message, _) = lapidary(["refit", text(&pkg), "--from", text(&file), "--ignore-extra"]).refused();
    for part in [
        "model.layers.1.mlp.spare.weight, model.layers.1.mlp.up_proj.weight",
        "cannot be known",
    ] {
        assert!(message.contains(part), "{part}: {message}");
    }
}

/// The same if the structure is known but the checkpoint's names are not.
#[test]
fn a_checkpoint_whose_names_nobody_knows() {
    let folder = tempfile::tempdir().unwrap();
    let pkg = package(folder.path(), &export("llama-optimum"), &["--capacity", "32"]);
    let (hash, hf) = (set_hash(&pkg), folder.path().join("hf"));
    lapidary(["weights", text(&pkg), "--export", text(&hf)]).ok();
    let renamed = |to: &str, file: &Path| {
        let bytes = std::fs::read(file).unwrap();
        let parsed = safetensors::SafeTensors::deserialize(&bytes).unwrap();
        let mut all: Vec<(String, TensorView)> = parsed.iter().map(|(n, v)| (n.to_string(), v)).collect();
        all.sort_by(|a, b| a.0.cmp(&b.0));
        let numbered = all
            .into_iter()
            .enumerate()
            .map(|(i, (_, view))| (format!("t{i}"), view));
        let to = folder.path().join(to);
        std::fs::write(&to, safetensors::serialize(numbered, None).unwrap()).unwrap();
        to
    };
    let file = hf.join("model.safetensors");
    let base = renamed("base.safetensors", &file);
    change(&file, "model.layers.1.self_attn.o_proj.weight", |v| v + 1.0);
    let tune = renamed("tune.safetensors", &file);

    assert!(
        lapidary(["refit", text(&pkg), "--from", text(&tune)])
            .refused()
            .0
            .contains("missing")
    );
    lapidary(["refit", text(&pkg), "--from", text(&base)]).ok();
    assert_eq!(set_hash(&pkg), hash);
    lapidary(["refit", text(&pkg), "--from", text(&tune)]).ok();
    let by_number = set_hash(&pkg);
    lapidary(["refit", text(&pkg), "--from", text(&file)]).ok();
    assert_eq!(set_hash(&pkg), by_number);
}
