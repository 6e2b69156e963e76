//! `convert FOLDER`: which export of a folder is chosen, and the files that belong to it.

use std::path::{Path, PathBuf};

use serde_json::json;

use crate::support::{fixture, lapidary, text};

/// A Hugging Face folder: configurations at the top, these files of `onnx/`.
fn folder(root: &Path, files: &[&str]) -> PathBuf {
    let folder = root.join("repository");
    std::fs::create_dir_all(folder.join("onnx")).unwrap();
    for file in files {
        let to = folder.join(file);
        std::fs::create_dir_all(to.parent().unwrap()).unwrap();
        std::fs::copy(fixture("bad/good.onnx"), to).unwrap();
    }
    for file in ["tokenizer.json", "tokenizer_config.json"] {
        std::fs::copy(fixture("smollm2").join(file), folder.join(file)).unwrap();
    }
    let config = json!({"max_position_embeddings": 24, "eos_token_id": 3}).to_string();
    std::fs::write(folder.join("config.json"), config).unwrap();
    std::fs::write(
        folder.join("generation_config.json"),
        json!({"eos_token_id": [7]}).to_string(),
    )
    .unwrap();
    folder
}

/// The stdout of a conversion of the folder, with its manifest.
fn converted(folder: &Path, flags: &[&str]) -> (String, serde_json::Value) {
    let package = folder.with_file_name("pkg");
    let mut args = vec!["convert", text(folder), "-o", text(&package), "--force"];
    args.extend(flags);
    let run = lapidary(&args);
    assert_eq!(run.status, 0, "{}", run.stderr);
    let manifest = std::fs::read_to_string(package.join("manifest.json")).unwrap();
    (run.stdout, serde_json::from_str(&manifest).unwrap())
}

#[test]
fn one_export_is_taken_with_the_files_at_the_top() {
    let root = tempfile::tempdir().unwrap();
    let folder = folder(root.path(), &["onnx/model_q4f16.onnx", "onnx/vision_encoder.onnx"]);
    for given in [
        folder.clone(),
        folder.join("onnx"),
        folder.join("onnx/model_q4f16.onnx"),
    ] {
        let (_, manifest) = converted(&given, &[]);
        assert_eq!(manifest["source"]["file"], "model_q4f16.onnx");
        assert!(manifest["tokenizer"].is_object(), "{}", given.display());
        assert_eq!(manifest["capacities"], json!([24]), "{}", given.display());
        let ends = manifest["eos_token_ids"].as_array().unwrap();
        assert!(ends.contains(&json!(7)), "{ends:?}");
        std::fs::remove_dir_all(given.with_file_name("pkg")).unwrap();
    }
}

#[test]
fn the_plain_export_of_several_is_taken_and_others_are_named() {
    let root = tempfile::tempdir().unwrap();
    let files = ["onnx/model.onnx", "onnx/model_q4f16.onnx", "onnx/model_quantized.onnx"];
    let folder = folder(root.path(), &files);
    let (said, manifest) = converted(&folder, &[]);
    assert_eq!(manifest["source"]["file"], "model.onnx");
    assert!(
        said.contains("other variants (--variant): q4f16 (onnx/model_q4f16.onnx, "),
        "{said}"
    );
    for (name, file) in [
        ("q4f16", "model_q4f16.onnx"),
        ("quantized", "model_quantized.onnx"),
        ("q8", "model_quantized.onnx"),
        ("model", "model.onnx"),
        ("fp32", "model.onnx"),
        ("model_q4f16", "model_q4f16.onnx"),
        ("onnx/model_q4f16.onnx", "model_q4f16.onnx"),
    ] {
        let (_, manifest) = converted(&folder, &["--variant", name]);
        assert_eq!(manifest["source"]["file"], file, "{name}");
    }
    let args = ["convert", text(&folder), "-o", "never", "--variant", "q5"];
    let (message, help) = lapidary(args).refused();
    for part in [
        "no variant \"q5\"",
        "model (onnx/model.onnx",
        "q4f16 (",
        "quantized (",
        "kB)",
    ] {
        assert!(message.contains(part), "{part:?} is not in {message}");
    }
    assert!(help.contains("--variant"), "{help}");
    let run = lapidary(["inspect", text(&folder), "--variant", "q4f16", "--json"])
        .ok()
        .json();
    assert_eq!(run["variants"].as_array().unwrap().len(), 3);
    assert_eq!(run["variants"][1]["name"], "q4f16");
    assert_eq!(run["file"], json!(folder.join("onnx/model_q4f16.onnx")));
    assert_eq!(run["convertible"], true);
    let said = lapidary(["inspect", text(&folder)]).ok().stdout;
    assert!(said.contains("variant        q4f16 (onnx/model_q4f16.onnx"), "{said}");
}

#[test]
fn several_of_which_none_is_plain_are_listed() {
    let root = tempfile::tempdir().unwrap();
    let folder = folder(root.path(), &["onnx/model_q4.onnx", "onnx/model_fp16.onnx"]);
    std::fs::write(folder.join("onnx/model_q4.onnx_data"), vec![0; 2_000_000]).unwrap();
    let (message, help) = lapidary(["convert", text(&folder), "-o", "never"]).refused();
    assert!(message.contains("the folder contains several exports"), "{message}");
    assert!(
        message.contains("fp16 (onnx/model_fp16.onnx, 10.4 kB)") || message.contains("fp16 (onnx/model_fp16.onnx"),
        "{message}"
    );
    assert!(message.contains("q4 (onnx/model_q4.onnx, 2.0 MB)"), "{message}");
    assert_eq!(help, "choose one with --variant NAME");
    let (message, _) = lapidary(["inspect", text(&folder)]).refused();
    assert!(message.contains("q4 ("), "{message}");
}

#[test]
fn decoders_come_before_those_without_a_cache_and_parts_are_none() {
    let root = tempfile::tempdir().unwrap();
    let files = [
        "onnx/decoder_model.onnx",
        "onnx/decoder_model_merged.onnx",
        "onnx/decoder_model_merged_q4.onnx",
        "onnx/decoder_with_past_model.onnx",
        "onnx/encoder_model.onnx",
        "onnx/embed_tokens.onnx",
    ];
    let folder = folder(root.path(), &files);
    let (said, manifest) = converted(&folder, &[]);
    assert_eq!(manifest["source"]["file"], "decoder_model_merged.onnx");
    assert!(
        !said.contains("embed_tokens") && said.contains("decoder_with_past_model"),
        "{said}"
    );
    let (_, manifest) = converted(&folder, &["--variant", "decoder_with_past_model"]);
    assert_eq!(manifest["source"]["file"], "decoder_with_past_model.onnx");
    for file in &files[..4] {
        std::fs::remove_file(folder.join(file)).unwrap();
    }
    let (message, help) = lapidary(["convert", text(&folder), "-o", "never"]).refused();
    assert!(
        message.contains("no export of a decoder") && message.contains("encoder_model.onnx"),
        "{message}"
    );
    assert!(help.contains("decoder_model_merged.onnx"), "{help}");
}

#[test]
fn the_model_builders_configuration_names_the_export() {
    let root = tempfile::tempdir().unwrap();
    let folder = folder(
        root.path(),
        &["phi.onnx", "other.onnx", "cpu/int4/model.onnx", "gpu/int4/model.onnx"],
    );
    let config = |name: &str| json!({"model": {"decoder": {"filename": name}}}).to_string();
    std::fs::write(folder.join("genai_config.json"), config("phi.onnx")).unwrap();
    let (said, manifest) = converted(&folder, &[]);
    assert_eq!(manifest["source"]["file"], "phi.onnx");
    assert!(said.contains("cpu/int4 (cpu/int4/model.onnx"), "{said}");
    let (_, manifest) = converted(&folder, &["--variant", "gpu/int4"]);
    assert_eq!(manifest["source"]["file"], "model.onnx");
    for (contents, expected) in [
        (config("none.onnx"), "names the decoder \"none.onnx\", which is missing"),
        ("{}".to_string(), "names no file of a decoder"),
        ("{".to_string(), "EOF"),
        (
            json!({"model": {"decoder": {"pipeline": []}}}).to_string(),
            "a pipeline of several exports",
        ),
    ] {
        std::fs::write(folder.join("genai_config.json"), contents).unwrap();
        let (message, help) = lapidary(["convert", text(&folder), "-o", "never"]).refused();
        assert!(
            message.contains(expected) && message.contains("genai_config.json"),
            "{message}"
        );
        assert_eq!(help, "give the .onnx file itself");
    }
}

#[test]
fn folders_without_an_export_and_variants_of_files() {
    let root = tempfile::tempdir().unwrap();
    let (message, help) = lapidary(["convert", text(root.path()), "-o", "never"]).refused();
    assert!(
        message.contains("the folder contains no export of a decoder"),
        "{message}"
    );
    assert!(help.contains("model.onnx"), "{help}");
    let file = fixture("bad/good.onnx");
    let (message, _) = lapidary(["convert", text(&file), "-o", "never", "--variant", "q4"]).refused();
    assert!(message.contains("this is a file"), "{message}");
}
