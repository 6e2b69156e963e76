//! Strip, refit and information about weights, with the real program.

use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::support::{command, fixture, ids, lapidary, names, package, text};

pub fn export(name: &str) -> PathBuf {
    fixture("exports").join(name).join("model.onnx")
}

/// Greedy tokens after the reference's prompt.
pub fn tokens(pkg: &Path, name: &str) -> Value {
    let reference: Value =
        serde_json::from_str(&std::fs::read_to_string(export(name).with_file_name("reference.json")).unwrap()).unwrap();
    let prompt = ids(&reference["prompt"]);
    let run = lapidary([
        "generate",
        text(pkg),
        "--prompt-ids",
        &prompt,
        "--temperature",
        "0",
        "--max-new-tokens",
        "6",
        "--ignore-eos",
        "--json",
    ]);
    run.ok().json()["tokens"].clone()
}

pub fn set_hash(pkg: &Path) -> String {
    let manifest = lapidary(["info", text(pkg), "--json"]).ok().json();
    manifest["weights"]["set_hash"].as_str().unwrap().to_string()
}

#[test]
fn stripped_and_brought_back_from_every_kind_of_source() {
    let folder = tempfile::tempdir().unwrap();
    let flags = ["--capacity", "32,64"];
    let pkg = package(folder.path(), &export("qwen2-optimum"), &flags);
    let (expected, hash) = (tokens(&pkg, "qwen2-optimum"), set_hash(&pkg));

    // A checkpoint under Hugging Face's names, one in shards, one of TensorRT-LLM.
    let checkpoint = folder.path().join("hf");
    lapidary(["weights", text(&pkg), "--export", text(&checkpoint)]).ok();
    let engine = folder.path().join("trtllm");
    lapidary([
        "weights",
        text(&pkg),
        "--export",
        text(&engine),
        "--format",
        "tensorrt-llm",
    ])
    .ok();
    assert_eq!(names(&engine), ["config.json", "rank0.safetensors"]);
    let config: Value = serde_json::from_str(&std::fs::read_to_string(engine.join("config.json")).unwrap()).unwrap();
    assert_eq!(config["num_hidden_layers"], 2);
    let shards = sharded(folder.path(), &checkpoint.join("model.safetensors"));

    let bare = folder.path().join("bare");
    lapidary(["strip", text(&pkg), "-o", text(&bare)]).ok();
    assert!(!names(&bare).contains(&"weights.safetensors".to_string()));
    let (message, help) = lapidary(["generate", text(&bare), "--prompt-ids", "1,2"]).refused();
    assert!(message.contains("stripped package"), "{message}");
    assert!(help.contains(&format!("lapidary refit {}", bare.display())), "{help}");
    let listed = lapidary(["weights", text(&bare), "--json"]).ok().json();
    assert_eq!(listed["stripped"], true);
    assert_eq!(listed["weights"][0]["present"], false);

    for source in [
        export("qwen2-optimum"),
        export("qwen2-dynamo-opset23"),
        export("qwen2-ort-genai"),
        export("qwen2-torchscript-static"),
        export("qwen2-mobius-static"),
        checkpoint.join("model.safetensors"),
        checkpoint.clone(),
        engine,
        shards,
        pkg.clone(),
    ] {
        let again = folder.path().join("again");
        lapidary(["strip", text(&pkg), "-o", text(&again), "--force"]).ok();
        // Checked without touching anything, then refitted.
        let checked = lapidary(["weights", text(&again), "--check", text(&source), "--json"])
            .ok()
            .json();
        assert_eq!(checked["identical"], true, "{}: {checked}", source.display());
        lapidary(["refit", text(&again), "--from", text(&source), "--mode", "identical"]).ok();
        assert_eq!(set_hash(&again), hash, "{}", source.display());
        assert_eq!(tokens(&again, "qwen2-optimum"), expected, "{}", source.display());
    }
    assert_eq!(
        names(folder.path()),
        ["again", "bare", "hf", "pkg", "shards", "trtllm"],
        "nothing is left behind"
    );
}

/// The tensors of a safetensors file in two shards with an index.
fn sharded(folder: &Path, file: &Path) -> PathBuf {
    let to = folder.join("shards");
    std::fs::create_dir(&to).unwrap();
    let bytes = std::fs::read(file).unwrap();
    let parsed = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let mut map = serde_json::Map::new();
    let all: Vec<_> = parsed.iter().collect();
    let (front, back) = all.split_at(all.len() / 2);
    for (i, part) in [front, back].into_iter().enumerate() {
        let name = format!("model-0000{}-of-00002.safetensors", i + 1);
        let data = part.iter().map(|(name, view)| (*name, view));
        std::fs::write(to.join(&name), safetensors::serialize(data, None).unwrap()).unwrap();
        map.extend(
            part.iter()
                .map(|(tensor, _)| (tensor.to_string(), Value::String(name.clone()))),
        );
    }
    let index = serde_json::json!({"metadata": {}, "weight_map": map});
    std::fs::write(to.join("model.safetensors.index.json"), index.to_string()).unwrap();
    to
}

#[test]
fn other_weights_of_the_architecture() {
    let folder = tempfile::tempdir().unwrap();
    // Families have different values; Mistral's shapes equal Llama's, but with a window.
    let pkg = package(folder.path(), &export("gpt2-optimum"), &["--capacity", "32"]);
    let hash = set_hash(&pkg);
    let checkpoint = folder.path().join("hf");
    lapidary(["weights", text(&pkg), "--export", text(&checkpoint), "--format", "gpt2"]).ok();
    let file = checkpoint.join("model.safetensors");
    change(&file, "transformer.h.1.mlp.c_fc.weight", |v| v * 1.5);

    let (message, help) = lapidary(["refit", text(&pkg), "--from", text(&file), "--mode", "identical"]).refused();
    assert!(
        message.contains("another weight set") && message.contains("1 of "),
        "{message}"
    );
    assert!(help.contains("--mode general"), "{help}");
    assert_eq!(set_hash(&pkg), hash);

    let checked = lapidary(["weights", text(&pkg), "--check", text(&file), "--json"])
        .ok()
        .json();
    assert_eq!(checked["different"].as_array().unwrap().len(), 1);
    let before = tokens(&pkg, "gpt2-optimum");
    lapidary(["refit", text(&pkg), "--from", text(&file)]).ok();
    assert_ne!(set_hash(&pkg), hash);
    let manifest = lapidary(["info", text(&pkg), "--json", "--check"]).ok().json();
    assert_eq!(manifest["weights"]["refit"]["kind"], "Hugging Face, GPT-2");
    // And back again.
    lapidary(["refit", text(&pkg), "--from", text(&export("gpt2-dynamo-opset18"))]).ok();
    assert_eq!(set_hash(&pkg), hash);
    assert_eq!(tokens(&pkg, "gpt2-optimum"), before);
}

/// Rewrites one fp32 tensor of a safetensors file.
pub fn change(file: &Path, name: &str, f: impl Fn(f32) -> f32) {
    let mut bytes = std::fs::read(file).unwrap();
    let start = bytes.as_ptr() as usize;
    let parsed = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let data = parsed.tensor(name).unwrap();
    let at = data.data().as_ptr() as usize - start;
    let values: Vec<u8> = data
        .data()
        .as_chunks::<4>()
        .0
        .iter()
        .flat_map(|b| f(f32::from_le_bytes(*b)).to_le_bytes())
        .collect();
    drop(parsed);
    bytes[at..at + values.len()].copy_from_slice(&values);
    std::fs::write(file, bytes).unwrap();
}

#[test]
fn half_precision_packages_take_fp32_weights_and_the_other_way_round() {
    let folder = tempfile::tempdir().unwrap();
    let (full, half) = (folder.path().join("full"), folder.path().join("half"));
    for (pkg, dtype) in [(&full, "fp32"), (&half, "fp16")] {
        let model = export("llama-optimum");
        lapidary([
            "convert",
            text(&model),
            "-o",
            text(pkg),
            "--dtype",
            dtype,
            "--capacity",
            "32",
        ])
        .ok();
    }
    let hash = set_hash(&half);
    lapidary(["refit", text(&half), "--from", text(&full)]).ok();
    assert_eq!(set_hash(&half), hash);
    lapidary(["refit", text(&full), "--from", text(&half)]).ok();
    // Rounded once: refitting the halves from it changes nothing.
    lapidary(["refit", text(&half), "--from", text(&full), "--mode", "identical"]).ok();
}

#[test]
fn killed_at_any_moment_the_package_is_the_old_one_or_the_new_one() {
    let folder = tempfile::tempdir().unwrap();
    let pkg = package(folder.path(), &export("llama-optimum"), &["--capacity", "32"]);
    let checkpoint = folder.path().join("hf");
    lapidary(["weights", text(&pkg), "--export", text(&checkpoint)]).ok();
    let file = checkpoint.join("model.safetensors");
    let old = set_hash(&pkg);
    change(&file, "model.norm.weight", |v| v + 1.0);
    let other = folder.path().join("other");
    lapidary(["strip", text(&pkg), "-o", text(&other)]).ok();
    lapidary(["refit", text(&other), "--from", text(&file)]).ok();
    let new = set_hash(&other);
    let mut killed = 0;
    for wait in 0..16 {
        let mut child = command()
            .args(["refit", text(&pkg), "--from", text(&file)])
            .stdout(std::process::Stdio::null())
            .spawn()
            .unwrap();
        std::thread::sleep(std::time::Duration::from_millis(wait * 8));
        killed += usize::from(child.try_wait().unwrap().is_none());
        child.kill().unwrap();
        child.wait().unwrap();
        lapidary(["info", text(&pkg), "--check"]).ok();
        assert!([&old, &new].contains(&&set_hash(&pkg)));
    }
    assert!(killed > 0, "every refit was over before it could be killed");
    // The next run removes what killed ones left.
    lapidary(["refit", text(&pkg), "--from", text(&file)]).ok();
    assert_eq!(set_hash(&pkg), new);
    assert_eq!(names(folder.path()), ["hf", "other", "pkg"]);
}

/// TensorRT-LLM's weightless engine: built from an export without weights, filled later by name.
#[test]
fn built_with_the_weights_absent() {
    let folder = tempfile::tempdir().unwrap();
    for name in ["llama-optimum", "qwen3-dynamo-opset23", "gpt2-dynamo-opset18"] {
        let (whole, bare) = (
            folder.path().join(format!("{name}-whole")),
            folder.path().join(format!("{name}-bare")),
        );
        lapidary(["convert", text(&export(name)), "-o", text(&whole), "--capacity", "32"]).ok();
        // The export with its weights in their own file, and then without it.
        let model = folder.path().join(format!("{name}.onnx"));
        let mut graph = ::lapidary::onnx::read(export(name)).unwrap();
        ::lapidary::graph::infer(&mut graph).unwrap();
        ::lapidary::onnx::write_with_data(&graph, &model).unwrap();
        std::fs::remove_file(folder.path().join(format!("{name}.onnx.data"))).unwrap();

        let convert = ["convert", text(&model), "-o", text(&bare), "--capacity", "32"];
        let (message, _) = lapidary(convert).refused();
        assert!(message.contains("cannot be opened"), "{message}");
        lapidary(convert.into_iter().chain(["--without-weights"])).ok();
        let (message, _) = lapidary(["generate", text(&bare), "--prompt-ids", "1"]).refused();
        assert!(message.contains("stripped package"), "{message}");
        let checkpoint = folder.path().join(format!("{name}-hf"));
        let format = if name.starts_with("gpt2") {
            "gpt2"
        } else {
            "hugging-face"
        };
        lapidary([
            "weights",
            text(&whole),
            "--export",
            text(&checkpoint),
            "--format",
            format,
        ])
        .ok();
        let refit = ["refit", text(&bare), "--from", text(&checkpoint)];
        let (message, _) = lapidary(refit.into_iter().chain(["--mode", "identical"])).refused();
        assert!(message.contains("made without weights"), "{message}");
        lapidary(refit).ok();
        assert_eq!(tokens(&bare, name), tokens(&whole, name), "{name}");
    }
}
