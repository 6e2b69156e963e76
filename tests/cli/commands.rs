//! The normal output of the commands.

use serde_json::{Value, json};

use crate::support::{fixture, lapidary, names, package, text};

#[test]
fn help_lists_the_commands_that_exist() {
    let help = lapidary(["--help"]).ok().stdout;
    let commands: Vec<&str> = help
        .lines()
        .skip_while(|l| !l.starts_with("Commands:"))
        .skip(1)
        .take_while(|l| l.starts_with("  "))
        .filter_map(|l| l.split_whitespace().next())
        .collect();
    assert_eq!(
        commands,
        [
            "inspect",
            "convert",
            "info",
            "generate",
            "chat",
            "serve",
            "sample",
            "verify",
            "refit",
            "weights",
            "strip",
            "bench",
            "perplexity",
            "evaluate",
            "report",
            "doctor",
            "completions",
            "man",
            "help"
        ]
    );
}

#[test]
fn inspect_tells_exporter_cache_architecture_and_patterns() {
    let inspect = |export: &str| {
        let model = fixture("exports").join(export).join("model.onnx");
        lapidary(["inspect", text(&model), "--json"]).ok().json()
    };
    let optimum = inspect("mistral-optimum");
    assert_eq!(optimum["exporter"], "optimum");
    assert_eq!(optimum["cache"], "concat");
    assert_eq!(optimum["convertible"], true);
    assert_eq!(optimum["architecture"]["layers"], 2);
    assert_eq!(optimum["architecture"]["kv_heads"], 2);
    assert_eq!(optimum["architecture"]["vocabulary"], 97);
    assert_eq!(optimum["architecture"]["windows"], json!([8, 8]));
    assert_eq!(optimum["patterns"]["attention"], 2);
    assert_eq!(optimum["inputs"][0]["name"], "input_ids");
    assert!(optimum["weight_bytes"].as_u64().unwrap() > 10_000);
    assert_eq!(inspect("llama-ort-genai")["cache"], "group_query_attention");
    assert_eq!(inspect("llama-mobius-static")["cache"], "tensor_scatter");

    let model = fixture("exports/llama-optimum/model.onnx");
    let printed = lapidary(["inspect", text(&model)]).ok().stdout;
    assert!(printed.contains("This model can be converted."), "{printed}");
    assert!(
        printed.contains("2 layers, 4 query heads over 2 KV heads of 16"),
        "{printed}"
    );
}

#[test]
fn dumps_show_each_level() {
    let model = fixture("exports/llama-optimum/model.onnx");
    let dump = |level: &str| {
        lapidary(["inspect", text(&model), "--dump", level, "--capacity", "32"])
            .ok()
            .stdout
    };
    assert!(dump("graph").contains("past_key_values.0.key"));
    let canonical = dump("canonical");
    assert!(
        canonical.contains("TensorScatter") && canonical.contains("key_cache.0"),
        "{canonical}"
    );
    let network = dump("network");
    assert!(
        network.contains("b1-t1-c32") && network.contains("KvCacheUpdate"),
        "{network}"
    );
}

#[test]
fn a_package_tells_what_it_is() {
    let folder = tempfile::tempdir().unwrap();
    let model = fixture("exports/llama-optimum/model.onnx");
    let pkg = package(folder.path(), &model, &["--capacity", "32,16", "--prefill", "8"]);
    assert_eq!(
        names(&pkg),
        [
            "constants.safetensors",
            "graph.onnx",
            "manifest.json",
            "weights.safetensors"
        ]
    );
    let info = lapidary(["info", text(&pkg), "--json", "--check"]).ok().json();
    assert_eq!(info["format_version"], 1);
    assert_eq!(info["source"]["file"], "model.onnx");
    assert_eq!(info["source"]["blake3"].as_str().unwrap().len(), 64);
    assert_eq!(info["capacities"], json!([16, 32]));
    assert_eq!(info["prefill"], json!([8]));
    assert_eq!(info["weight_mode"], "bind");
    assert_eq!(info["dtype"], "f32");
    let tensors = info["weights"]["tensors"].as_array().unwrap();
    assert!(
        tensors.iter().any(|t| t["source_name"] == "model.embed_tokens.weight"),
        "{tensors:#?}"
    );
    assert!(tensors.iter().all(|t| t["blake3"].as_str().unwrap().len() == 64));
    let printed = lapidary(["info", text(&pkg)]).ok().stdout;
    assert!(
        printed.contains("none: runs on the CPU") && printed.contains("prompts are token ids"),
        "{printed}"
    );
}

#[test]
fn flags_override_a_spec() {
    let folder = tempfile::tempdir().unwrap();
    let spec = folder.path().join("s.yaml");
    std::fs::write(
        &spec,
        "capacity: [16]\nprefill: {min: 1, opt: 4, max: 8}\nrefit: none\n",
    )
    .unwrap();
    let model = fixture("exports/llama-optimum/model.onnx");
    let pkg = package(folder.path(), &model, &["--spec", text(&spec), "--capacity", "24"]);
    let info = lapidary(["info", text(&pkg), "--json"]).ok().json();
    assert_eq!(info["capacities"], json!([24]));
    assert_eq!(info["prefill"], json!({"min": 1, "opt": 4, "max": 8}));
}

#[test]
fn the_canonical_graph_can_be_written_out_and_converted_again() {
    let folder = tempfile::tempdir().unwrap();
    let model = fixture("exports/qwen2-optimum/model.onnx");
    let emitted = folder.path().join("canonical.onnx");
    let first = package(
        folder.path(),
        &model,
        &["--capacity", "32", "--emit-onnx", text(&emitted)],
    );
    let again = tempfile::tempdir().unwrap();
    let second = package(again.path(), &emitted, &["--capacity", "32"]);
    let run = |pkg| {
        let args = [
            "generate",
            text(pkg),
            "--prompt-ids",
            "5,6,7,8",
            "--temperature",
            "0",
            "--max-new-tokens",
            "12",
        ];
        lapidary(args).ok().stdout
    };
    assert_eq!(run(&first), run(&second));
}

fn smollm2_tokenizer_package(folder: &std::path::Path) -> std::path::PathBuf {
    // The tiny model has 97 ids and the tokenizer 49152; its text consists of the first ones: special tokens,
    // punctuation, digits, letters.
    let model = fixture("exports/llama-optimum/model.onnx");
    package(
        folder,
        &model,
        &["--capacity", "64", "--tokenizer", text(&fixture("smollm2"))],
    )
}

#[test]
fn text_streams_and_equals_the_json() {
    let folder = tempfile::tempdir().unwrap();
    let pkg = smollm2_tokenizer_package(folder.path());
    let common = [
        "generate",
        text(&pkg),
        "--prompt-ids",
        "40,41,42",
        "--seed",
        "3",
        "--temperature",
        "1.5",
    ];
    let run = |more: &[&str]| lapidary(common.iter().chain(more).copied().collect::<Vec<_>>()).ok();
    let flags = ["--max-new-tokens", "20", "--ignore-eos"];
    let streamed = run(&flags).stdout;
    let document = run(&[&flags[..], &["--json"]].concat()).json();
    assert_eq!(streamed, format!("{}\n", document["text"].as_str().unwrap()));
    assert_eq!(document["tokens"].as_array().unwrap().len(), 20);
    assert_eq!(document["seed"], 3);
    assert_eq!(document["device"], "cpu");
    for field in ["load_ms", "ttft_ms", "tpot_ms", "tokens_per_s"] {
        assert!(document["timing"][field].as_f64().unwrap() > 0.0, "{field}");
    }
    assert!(document["steps"][0].get("top_logprobs").is_none());

    // Stop strings end the text right before them.
    let whole = document["text"].as_str().unwrap();
    let middle: String = whole.chars().skip(whole.chars().count() / 2).take(2).collect();
    let stopped = run(&[&flags[..], &["--json", "--stop", &middle]].concat()).json();
    assert_eq!(stopped["finish_reason"], "stop");
    assert_eq!(
        stopped["text"].as_str().unwrap(),
        &whole[..whole.find(&middle).unwrap()]
    );
    // Another seed, other tokens.
    let other = lapidary([
        "generate",
        text(&pkg),
        "--prompt-ids",
        "40,41,42",
        "--seed",
        "4",
        "--temperature",
        "1.5",
        "--max-new-tokens",
        "20",
        "--ignore-eos",
        "--json",
    ]);
    assert_ne!(other.ok().json()["tokens"], document["tokens"]);
}

#[test]
fn end_tokens_end_and_full_caches_end() {
    let folder = tempfile::tempdir().unwrap();
    let model = fixture("exports/llama-optimum/model.onnx");
    let pkg = package(folder.path(), &model, &["--capacity", "4,8"]);
    let generate = |flags: &[&str]| -> Value {
        let common = [
            "generate",
            text(&pkg),
            "--prompt-ids",
            "1,2,3",
            "--temperature",
            "0",
            "--json",
        ];
        lapidary(common.iter().chain(flags).copied().collect::<Vec<_>>())
            .ok()
            .json()
    };
    let full = generate(&["--ignore-eos"]);
    assert_eq!(full["finish_reason"], "capacity");
    // Eight slots: three prompt tokens and five generated ones, after which one more can be drawn but not fed.
    assert_eq!(full["tokens"].as_array().unwrap().len(), 6);
    let short = generate(&["--ignore-eos", "--max-new-tokens", "2"]);
    assert_eq!(
        (&short["finish_reason"], short["tokens"].as_array().unwrap().len()),
        (&json!("length"), 2)
    );

    // Make the second token an end token.
    let second = full["tokens"][1].clone();
    let path = pkg.join("manifest.json");
    let mut manifest: Value = serde_json::from_str(&std::fs::read_to_string(&path).unwrap()).unwrap();
    manifest["eos_token_ids"] = json!([second]);
    std::fs::write(&path, manifest.to_string()).unwrap();
    let ended = generate(&[]);
    assert_eq!(ended["finish_reason"], "stop");
    let first_end = full["tokens"]
        .as_array()
        .unwrap()
        .iter()
        .position(|t| *t == second)
        .unwrap();
    assert_eq!(ended["tokens"].as_array().unwrap().len(), first_end + 1);
    assert_eq!(generate(&["--ignore-eos"])["tokens"], full["tokens"]);
}

#[test]
fn verify_agrees_with_the_export_and_notices_another_model() {
    let folder = tempfile::tempdir().unwrap();
    let model = fixture("exports/llama-optimum/model.onnx");
    let pkg = package(folder.path(), &model, &["--capacity", "16,64"]);
    let run = lapidary([
        "verify",
        text(&pkg),
        "--against",
        text(&model),
        "--engine",
        "eval",
        "--json",
    ])
    .ok();
    let report = run.json();
    assert_eq!((&report["passed"], &report["engine"]), (&json!(true), &json!("eval")));
    assert!(report["prompts"].as_array().unwrap().len() >= 3);
    // A static export works in the same way with a cache of fixed size.
    let fixed = fixture("exports/llama-mobius-static/model.onnx");
    lapidary(["verify", text(&pkg), "--against", text(&fixed), "--engine", "eval"]).ok();

    let other = fixture("exports/mistral-optimum/model.onnx");
    let run = lapidary(["verify", text(&pkg), "--against", text(&other), "--engine", "eval"]);
    assert_eq!(run.status, 1);
    assert!(run.stdout.contains("FAILED"), "{}", run.stdout);
    assert!(run.stderr.contains("differs from"), "{}", run.stderr);

    if !cfg!(feature = "tract") {
        let (message, help) =
            lapidary(["verify", text(&pkg), "--against", text(&model), "--engine", "tract"]).refused();
        assert_eq!(message, "this lapidary was compiled without tract");
        assert!(
            help.contains("--features tract") && help.contains("--engine eval"),
            "{help}"
        );
    }
}

#[cfg(feature = "tract")]
#[test]
fn tract_agrees_on_every_family() {
    for export in [
        "llama-optimum",
        "qwen2-optimum",
        "qwen3-optimum",
        "mistral-optimum",
        "gpt2-optimum",
    ] {
        let folder = tempfile::tempdir().unwrap();
        let model = fixture("exports").join(export).join("model.onnx");
        let pkg = package(folder.path(), &model, &["--capacity", "16,64"]);
        let report = lapidary([
            "verify",
            text(&pkg),
            "--against",
            text(&model),
            "--engine",
            "tract",
            "--json",
        ])
        .ok()
        .json();
        assert_eq!(report["engine"], "tract");
    }
}

#[test]
fn doctor_tells_the_machine() {
    let printed = lapidary(["doctor"]).ok().stdout;
    assert!(printed.contains("convert, and generate on the CPU"), "{printed}");
    let facts = lapidary(["doctor", "--json"]).ok().json();
    assert!(facts["cpu"]["threads"].as_u64().unwrap() >= 1);
    assert_eq!(facts["tensorrt"]["compiled"], cfg!(feature = "engines"));
}
