//! Packages with LoRA adapters, selected by name.

use std::path::{Path, PathBuf};

use lapidary::package::Package;
use lapidary::weights::model::NameKind;
use safetensors::tensor::{Dtype, TensorView};
use serde_json::{Value, json};

use crate::client::{Server, read};
use crate::models::talker;
use crate::support::{fixture, lapidary, package, text};

/// Writes an adapter of rank 2 for the queries and values of a package's layers; `phase` gives its values.
fn adapter(folder: &Path, pkg: &Path, phase: f32) -> PathBuf {
    std::fs::create_dir_all(folder).unwrap();
    let config = r#"{"peft_type": "LORA", "r": 2, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj"]}"#;
    std::fs::write(folder.join("adapter_config.json"), config).unwrap();
    let weights = Package::open(pkg).unwrap().model_weights().unwrap();
    let mut tensors = Vec::new();
    for (module, layer) in [("query", "q_proj"), ("value", "v_proj")] {
        let name = format!("layers.0.attention.{module}.weight");
        let (_, constant) = weights.tensor(NameKind::Module, &name).unwrap().unwrap();
        let [out, width] = *constant.shape() else {
            panic!("a matrix")
        };
        for (half, shape) in [("lora_A", vec![2, width]), ("lora_B", vec![out, 2])] {
            let n: usize = shape.iter().product();
            let number = |i: usize| ((i + half.len()) as f32 * phase).sin() * 0.4;
            let bytes: Vec<u8> = (0..n).flat_map(|i| number(i).to_le_bytes()).collect();
            let name = format!("base_model.model.model.layers.0.self_attn.{layer}.{half}.weight");
            tensors.push((name, shape, bytes));
        }
    }
    let views = tensors.iter().map(|(name, shape, bytes)| {
        let view = TensorView::new(Dtype::F32, shape.clone(), bytes).unwrap();
        (name.as_str(), view)
    });
    let bytes = safetensors::serialize(views, None).unwrap();
    std::fs::write(folder.join("adapter_model.safetensors"), bytes).unwrap();
    folder.to_path_buf()
}

fn body(model: Option<&str>, prompt: &[u32], more: Value) -> Value {
    let mut body = json!({"prompt": prompt, "max_tokens": 20, "ignore_eos": true, "return_token_ids": true});
    if let Some(model) = model {
        body["model"] = model.into();
    }
    for (name, value) in more.as_object().unwrap() {
        body[name] = value.clone();
    }
    body
}

#[test]
fn adapters_are_models_of_their_own() {
    let folder = tempfile::tempdir().unwrap();
    let pkg = talker(folder.path(), "64");
    let [first, second] =
        [("first", 0.7), ("second", 1.9)].map(|(name, phase)| adapter(&folder.path().join(name), &pkg, phase));
    // The results of a package with merged weights.
    let merged = folder.path().join("merged");
    std::fs::create_dir(&merged).unwrap();
    let merged = talker(&merged, "64");
    lapidary(["refit", text(&merged), "--from", text(&pkg), "--lora", text(&first)]).ok();
    let prompt: Vec<u32> = (0..24).map(|i| 3 + (i * 7) % 90).collect();
    let ids = prompt.iter().map(u32::to_string).collect::<Vec<_>>().join(",");
    let generated = |pkg: &Path| {
        let run = lapidary([
            "generate",
            text(pkg),
            "--prompt-ids",
            &ids,
            "--temperature",
            "0",
            "--max-new-tokens",
            "20",
            "--ignore-eos",
            "--json",
            "--device",
            "cpu",
            "--threads",
            "2",
        ]);
        run.ok().json()["tokens"].clone()
    };
    let [plain, with_first] = [generated(&pkg), generated(&merged)];
    assert_ne!(plain, with_first);

    let adapters = [format!("one={}", text(&first)), format!("pkg:two={}", text(&second))];
    let flags = [
        "--adapter",
        &adapters[0],
        "--adapter",
        &adapters[1],
        "--prefill-chunk",
        "8",
    ];
    let server = Server::of(folder, &[&pkg], &flags);
    let list = server.get("/v1/models").ok();
    let listed: Vec<Value> = list["data"]
        .as_array()
        .unwrap()
        .iter()
        .map(|m| json!([m["id"], m["parent"]]))
        .collect();
    assert_eq!(json!(listed), json!([["pkg", null], ["one", "pkg"], ["two", "pkg"]]));

    let greedy = json!({"temperature": 0});
    let ask =
        |model: Option<&str>, more: &Value| server.post("/v1/completions", &body(model, &prompt, more.clone())).ok();
    let tokens = |document: &Value| document["choices"][0]["token_ids"].clone();
    // No name, or the package's own, selects no adapter.
    assert_eq!(tokens(&ask(None, &greedy)), plain);
    assert_eq!(tokens(&ask(Some("pkg"), &greedy)), plain);
    // Prefixes are shared only within an adapter.
    let cached = |document: &Value| document["usage"]["prompt_tokens_details"]["cached_tokens"].clone();
    let once = ask(Some("one"), &greedy);
    assert_eq!((tokens(&once), cached(&once)), (with_first.clone(), json!(0)));
    let again = ask(Some("one"), &greedy);
    assert_eq!((tokens(&again), cached(&again)), (with_first, json!(16)));
    let two = ask(Some("two"), &greedy);
    assert_eq!(cached(&two), 0);
    assert_ne!(tokens(&two), tokens(&once));

    // All at once, sampled with seeds: each gets the same as alone.
    let requests: Vec<(Option<&str>, Value)> = (0..12)
        .map(|i| {
            (
                [None, Some("one"), Some("two")][i % 3],
                json!({"temperature": 1, "seed": i}),
            )
        })
        .collect();
    let alone: Vec<Value> = requests
        .iter()
        .map(|(model, more)| tokens(&ask(*model, more)))
        .collect();
    let open: Vec<_> = requests
        .iter()
        .map(|(model, more)| {
            server.send(
                "POST",
                "/v1/completions",
                &[],
                &body(*model, &prompt, more.clone()).to_string(),
            )
        })
        .collect();
    for (stream, alone) in open.into_iter().zip(alone) {
        assert_eq!(tokens(&read(stream).ok()), alone);
    }
    assert_eq!(
        server
            .post("/v1/completions", &body(Some("three"), &prompt, greedy))
            .error()
            .0,
        404
    );
}

#[test]
fn adapters_that_cannot_be_served_are_refused_by_name() {
    let folder = tempfile::tempdir().unwrap();
    let pkg = talker(folder.path(), "64");
    let good = adapter(&folder.path().join("good"), &pkg, 0.7);
    let other = folder.path().join("other");
    std::fs::create_dir(&other).unwrap();
    let other = package(
        &other,
        &fixture("exports/mistral-optimum/model.onnx"),
        &["--capacity", "32"],
    );
    let renamed = folder.path().join("mistral");
    std::fs::rename(other, &renamed).unwrap();
    let quantized = folder.path().join("quantized");
    std::fs::create_dir(&quantized).unwrap();
    let model = fixture("exports/llama-optimum/model.onnx");
    let quantized = package(&quantized, &model, &["--capacity", "64", "--quantize", "int8"]);
    let good = text(&good);
    let refused = |packages: &[&Path], adapters: &[&str]| {
        let mut args = vec![
            "serve".to_string(),
            "--port".into(),
            "0".into(),
            "--device".into(),
            "cpu".into(),
        ];
        args.extend(packages.iter().map(|path| text(path).to_string()));
        args.extend(
            adapters
                .iter()
                .flat_map(|adapter| ["--adapter".to_string(), adapter.to_string()]),
        );
        lapidary(args).refused()
    };
    let named = format!("one={good}");
    let flag = format!("--adapter {named}: ");
    let (message, _) = refused(&[&quantized], &[&named]);
    assert!(message.starts_with(&flag) && message.contains("quantized"), "{message}");
    // A model of other layers.
    let changed = folder.path().join("changed");
    std::fs::create_dir(&changed).unwrap();
    for file in ["adapter_config.json", "adapter_model.safetensors"] {
        std::fs::copy(Path::new(good).join(file), changed.join(file)).unwrap();
    }
    let tensors = changed.join("adapter_model.safetensors");
    let bytes = std::fs::read(&tensors).unwrap();
    let at = bytes.windows(10).position(|w| w == b".layers.0.").unwrap();
    let mut elsewhere = bytes.clone();
    let count = bytes.windows(10).filter(|w| *w == b".layers.0.").count();
    for i in 0..bytes.len() - 10 {
        if &bytes[i..i + 10] == b".layers.0." {
            elsewhere[i + 8] = b'9';
        }
    }
    assert!(count == 4 && at > 0);
    std::fs::write(&tensors, elsewhere).unwrap();
    let unfit = format!("one={}", text(&changed));
    let (message, _) = refused(&[&pkg], &[&unfit]);
    assert!(
        message.starts_with(&format!("--adapter {unfit}: ")) && message.contains("layers.9"),
        "{message}"
    );
    let (message, _) = refused(&[&pkg], &["one=/nowhere"]);
    assert!(
        message.starts_with("--adapter one=/nowhere: ") && message.contains("adapter_config.json"),
        "{message}"
    );
    // Names.
    let (message, _) = refused(&[&pkg], &[&format!("pkg={good}")]);
    assert!(message.contains("another one is called \"pkg\", too"), "{message}");
    let (message, _) = refused(&[&pkg], &[&named, &named]);
    assert!(message.contains("another one is called \"one\", too"), "{message}");
    let (message, help) = refused(&[&pkg, &renamed], &[&named]);
    assert!(
        message.contains("several packages") && help.contains("--adapter pkg:one=DIR"),
        "{message} {help}"
    );
    let (message, _) = refused(&[&pkg, &renamed], &[&format!("x:one={good}")]);
    assert!(
        message.contains("no package \"x\"; there are pkg, mistral"),
        "{message}"
    );
    let run = lapidary(["serve", text(&pkg), "--adapter", "one"]);
    assert_eq!(run.status, 2, "{}", run.stderr);
    assert!(run.stderr.contains("NAME=DIR"), "{}", run.stderr);
}
