//! Unusable input: exit status 2, one message that names the location, no partial output.

use std::path::Path;
use std::process::Stdio;

use serde_json::json;

use crate::support::{Run, command, fixture, lapidary, names, package, text};

/// Every file of `fixtures/bad`, with the required text of its message.
const REFUSED: [(&str, &[&str]); 33] = [
    ("truncated", &["truncated"]),
    ("text", &["not an ONNX model"]),
    ("empty", &["empty"]),
    ("zip-archive", &["not an ONNX model"]),
    ("no-graph", &["no graph"]),
    ("external-missing", &["embed", "model.onnx.data"]),
    ("external-short", &["embed", "model.onnx.data", "100"]),
    ("external-offset", &["embed", "model.onnx.data"]),
    ("external-offset-text", &["embed", "not a number"]),
    ("external-length", &["embed", "832"]),
    (
        "external-parent",
        &["embed", "../good.onnx", "leaves the model's folder"],
    ),
    (
        "external-detour",
        &["embed", "sub/../../good.onnx", "leaves the model's folder"],
    ),
    ("external-absolute", &["embed", "/etc/passwd", "absolute path"]),
    ("weight-short", &["lm_head", "792"]),
    ("weight-overflow", &["lm_head", "1099511627776"]),
    ("weight-negative", &["lm_head", "negative"]),
    ("weight-complex", &["lm_head", "complex64"]),
    ("missing-initializer", &["\"o\"", "o_proj"]),
    (
        "unknown-ops",
        &["fancy", "FancyGate", "words", "WordConvEmbedding", "twirl", "Twirl"],
    ),
    ("wrong-dtype", &["residual", "f16", "f32"]),
    ("wrong-shape", &["\"o\"", "o_proj", "32", "16"]),
    ("cycle", &["cycle", "residual", "loop"]),
    ("duplicate-value", &["\"k\"", "\"v\""]),
    ("duplicate-input", &["input_ids"]),
    ("missing-output", &["logits"]),
    ("control-flow-if", &["choose", "If"]),
    ("control-flow-loop", &["repeat", "Loop"]),
    ("opset-old", &["opset 9"]),
    ("opset-new", &["opset 99"]),
    ("unpaired-cache", &["past_key_values.0.value"]),
    ("no-cache", &["no past keys and values"]),
    ("not-a-language-model", &["x"]),
    ("no-such-folder", &["No such file"]),
];

#[test]
fn every_bad_model_is_refused_by_name_and_leaves_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let known: Vec<&str> = REFUSED.iter().map(|(name, _)| *name).collect();
    for name in names(&fixture("bad")) {
        let is_case = fixture("bad").join(&name).is_dir();
        assert!(
            !is_case || known.contains(&name.as_str()),
            "fixtures/bad/{name} has no expectation"
        );
    }
    let mut failures = Vec::new();
    for (name, wanted) in REFUSED {
        let model = fixture("bad").join(name).join("model.onnx");
        let run = lapidary(["convert", text(&model), "-o", text(&folder.path().join("pkg"))]);
        let said = run.stderr.clone();
        if run.status != 2 || !said.contains(text(&model)) || wanted.iter().any(|w| !said.contains(w)) {
            failures.push(format!("{name}: status {}, {said}", run.status));
        }
        assert_eq!(names(folder.path()), [""; 0], "{name} left something");
    }
    assert!(failures.is_empty(), "{}", failures.join("\n"));
}

#[test]
fn the_model_they_were_made_from_is_good() {
    let folder = tempfile::tempdir().unwrap();
    package(folder.path(), &fixture("bad/good.onnx"), &[]);
}

#[test]
fn inspect_tells_of_bad_models_what_it_can() {
    for (name, _) in REFUSED {
        let model = fixture("bad").join(name).join("model.onnx");
        let run = lapidary(["inspect", text(&model), "--json"]);
        assert!(run.status == 0 || run.status == 2, "{name}: {}", run.stderr);
        assert!(
            run.status == 0 || run.stderr.contains(text(&model)),
            "{name}: {}",
            run.stderr
        );
        if run.status == 0 {
            assert_eq!(run.json()["convertible"], false, "{name}");
        }
    }
    let run = lapidary(["inspect", text(&fixture("bad/unknown-ops/model.onnx")), "--json"]).ok();
    let unsupported = &run.json()["unsupported"];
    assert_eq!(unsupported["com.example::FancyGate"], json!(["fancy"]), "{unsupported}");
}

/// Whether a pass, inference, the verifier or the evaluator finds the fault: the file is named.
#[test]
fn every_command_names_the_bad_model() {
    let folder = tempfile::tempdir().unwrap();
    let good = fixture("bad/good.onnx");
    let pkg = package(folder.path(), &good, &["--capacity", "32"]);
    let mut failures = Vec::new();
    for (name, _) in REFUSED {
        let model = fixture("bad").join(name).join("model.onnx");
        for args in [
            vec!["inspect", text(&model), "--dump", "canonical"],
            vec!["inspect", text(&model), "--dump", "network"],
            vec!["verify", text(&pkg), "--against", text(&model), "--engine", "eval"],
        ] {
            let run = lapidary(&args);
            // The evaluator may run files that no pass supports; then it differs or agrees.
            let may_run = args[0] == "verify" && run.status != 2;
            let named = run.stderr.starts_with("error: ") && run.stderr.contains(text(&model));
            if !(may_run || run.status == 2 && named) {
                failures.push(format!("{name}: {args:?}: status {}, {}", run.status, run.stderr));
            }
        }
    }
    assert!(failures.is_empty(), "{}", failures.join("\n"));
    let (message, _) = lapidary(["convert", text(&good), "-o", "never", "--capacity", "99999999"]).refused();
    assert!(message.contains(text(&good)), "{message}");
}

#[test]
fn a_sequence_longer_than_the_cache_of_the_export() {
    let folder = tempfile::tempdir().unwrap();
    let pkg = package(
        folder.path(),
        &fixture("exports/llama-optimum/model.onnx"),
        &["--capacity", "64"],
    );
    let export = fixture("exports/llama-mobius-static/model.onnx");
    let ids = ["1"; 32].join(",");
    let verify = ["verify", text(&pkg), "--against", text(&export), "--engine", "eval"];
    let (message, help) = lapidary(verify.into_iter().chain(["--prompt-ids", &ids])).refused();
    assert_eq!(
        message,
        format!(
            "{}: the sequence of 39 tokens does not fit the cache of the export, which has 32 slots",
            export.display()
        )
    );
    assert_eq!(help, "use fewer --tokens or shorter --prompt-ids");
}

#[test]
fn a_prompt_that_does_not_fit_and_ids_outside_the_vocabulary() {
    let folder = tempfile::tempdir().unwrap();
    let pkg = package(
        folder.path(),
        &fixture("exports/llama-optimum/model.onnx"),
        &["--capacity", "8,16"],
    );
    let generate = |ids: &str| lapidary(["generate", text(&pkg), "--prompt-ids", ids, "--temperature", "0"]);
    let long: Vec<String> = (0..17).map(|i| i.to_string()).collect();
    let (message, help) = generate(&long.join(",")).refused();
    assert_eq!(
        message,
        "17 tokens do not fit the largest cache capacity of this package, 16"
    );
    assert_eq!(
        help,
        "shorten the prompt, or convert the model again with a larger --capacity"
    );
    let (message, _) = generate("1,2,97").refused();
    assert_eq!(
        message,
        "token id 97 at position 2 is outside the vocabulary of 97 (ids 0 to 96)"
    );
    let (message, _) = generate("-1").refused();
    assert!(message.contains("--prompt-ids"), "{message}");
}

#[test]
fn text_needs_a_tokenizer() {
    let folder = tempfile::tempdir().unwrap();
    let pkg = package(
        folder.path(),
        &fixture("exports/llama-optimum/model.onnx"),
        &["--capacity", "16"],
    );
    for flags in [
        &["--prompt", "hi"][..],
        &["--chat", "hi"],
        &["--prompt-ids", "1", "--stop", "x"],
    ] {
        let mut args = vec!["generate", text(&pkg)];
        args.extend(flags);
        let (message, help) = lapidary(args).refused();
        assert!(
            message.ends_with("needs a tokenizer, and the package has none"),
            "{message}"
        );
        assert!(help.contains("--tokenizer"), "{help}");
    }
}

#[test]
fn packages_that_are_newer_damaged_or_none() {
    let folder = tempfile::tempdir().unwrap();
    let pkg = package(
        folder.path(),
        &fixture("exports/llama-optimum/model.onnx"),
        &["--capacity", "16"],
    );
    let manifest = pkg.join("manifest.json");
    let original = std::fs::read_to_string(&manifest).unwrap();
    let info = || lapidary(["info", text(&pkg)]);

    // A later version may have any structure.
    std::fs::write(&manifest, r#"{"format_version": 2, "everything": "new"}"#).unwrap();
    let (message, help) = info().refused();
    assert_eq!(
        message,
        format!(
            "{}: the package has format version 2, this Lapidary reads up to 1",
            pkg.display()
        )
    );
    assert!(help.contains("newer"), "{help}");

    std::fs::write(&manifest, "{").unwrap();
    assert!(info().refused().0.contains("not a valid manifest"));

    let escaping = original.replace("\"graph.onnx\"", "\"../graph.onnx\"");
    std::fs::write(&manifest, escaping).unwrap();
    assert!(info().refused().0.contains("outside the package"));

    std::fs::write(&manifest, &original).unwrap();
    let weights = pkg.join("weights.safetensors");
    let mut bytes = std::fs::read(&weights).unwrap();
    let last = bytes.len() - 1;
    bytes[last] ^= 1;
    std::fs::write(&weights, &bytes).unwrap();
    info().ok();
    let (message, _) = lapidary(["info", text(&pkg), "--check"]).refused();
    assert!(message.contains("the weight") && message.contains("hash"), "{message}");
    bytes.pop();
    std::fs::write(&weights, &bytes).unwrap();
    let (message, _) = info().refused();
    assert_eq!(
        message,
        format!(
            "{}: has {} bytes, the manifest says {}",
            weights.display(),
            bytes.len(),
            bytes.len() + 1
        )
    );
    std::fs::remove_file(&weights).unwrap();
    assert!(info().refused().0.contains("missing from the package"));

    let (message, help) = lapidary(["generate", text(folder.path()), "--prompt-ids", "1"]).refused();
    assert!(
        message.ends_with("not a package: there is no manifest.json in it"),
        "{message}"
    );
    assert!(help.contains("lapidary convert"), "{help}");
}

#[test]
fn an_existing_package_is_replaced_only_by_force_and_nothing_else_ever() {
    let folder = tempfile::tempdir().unwrap();
    let model = fixture("exports/llama-optimum/model.onnx");
    let pkg = package(folder.path(), &model, &["--capacity", "16"]);
    let again = |flags: &[&str], to: &Path| {
        let mut args = vec!["convert", text(&model), "-o", text(to), "--capacity", "32"];
        args.extend(flags);
        lapidary(args)
    };
    let (message, help) = again(&[], &pkg).refused();
    assert_eq!(message, format!("{}: exists already", pkg.display()));
    assert_eq!(help, "choose another name, or replace it with --force");
    again(&["--force"], &pkg).ok();
    let info = lapidary(["info", text(&pkg), "--json"]).ok().json();
    assert_eq!(info["capacities"], json!([32]));
    assert_eq!(names(folder.path()), ["pkg"]);

    let other = folder.path().join("other");
    std::fs::create_dir(&other).unwrap();
    std::fs::write(other.join("thesis.txt"), "").unwrap();
    assert!(again(&["--force"], &other).refused().0.contains("is not a package"));
    assert_eq!(names(&other), ["thesis.txt"]);
}

/// A file-size limit replaces a full disk if no file system can be mounted: both fail in the middle of a write.
#[test]
fn a_full_disk_is_said_so_and_leaves_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let model = fixture("exports/llama-optimum/model.onnx");
    let disk = folder.path().join("disk");
    std::fs::create_dir(&disk).unwrap();
    let mounted = std::process::Command::new("mount")
        .args(["-t", "tmpfs", "-o", "size=64k", "tmpfs", text(&disk)])
        .stderr(Stdio::null())
        .status()
        .is_ok_and(|s| s.success());
    let run = if mounted {
        lapidary(["convert", text(&model), "-o", text(&disk.join("pkg"))])
    } else {
        // SIGXFSZ is ignored, so that the write fails instead.
        let script = "trap '' XFSZ; ulimit -f 16; exec \"$0\" convert \"$1\" -o \"$2\"";
        let mut shell = std::process::Command::new("bash");
        shell.args([
            "-c",
            script,
            env!("CARGO_BIN_EXE_lapidary"),
            text(&model),
            text(&disk.join("pkg")),
        ]);
        Run::of(shell.output().unwrap())
    };
    let left = names(&disk);
    if mounted {
        std::process::Command::new("umount").arg(&disk).status().unwrap();
    }
    let (message, help) = run.refused();
    assert!(message.contains("disk"), "{message}");
    assert!(
        message.contains("No space left on device") || message.contains("File too large"),
        "{message}"
    );
    assert!(help.contains("free some space"), "{help}");
    assert_eq!(left, [""; 0]);
}

#[test]
fn no_tensorrt_library_is_reported_before_any_work() {
    let folder = tempfile::tempdir().unwrap();
    let model = fixture("exports/llama-optimum/model.onnx");
    let missing = folder.path().join("libtensorrt.so");
    let target = if cfg!(feature = "tensorrt") {
        "tensorrt"
    } else {
        "tensorrt-rtx"
    };
    let (message, help) = lapidary([
        "convert",
        text(&model),
        "-o",
        text(&folder.path().join("pkg")),
        "--target",
        target,
        "--tensorrt-lib",
        text(&missing),
    ])
    .refused();
    if cfg!(feature = "engines") {
        assert!(
            message.contains("libtensorrt.so") && message.contains("--tensorrt-lib"),
            "{message}"
        );
    } else {
        assert_eq!(message, "this lapidary was compiled without TensorRT");
        assert_eq!(help, "build it with `cargo build --features tensorrt-rtx`");
    }
    assert_eq!(names(folder.path()), [""; 0]);
}

#[test]
fn wrong_usage_names_the_flag() {
    let model = fixture("exports/llama-optimum/model.onnx");
    let folder = tempfile::tempdir().unwrap();
    let pkg = folder.path().join("pkg");
    let convert = |flags: &[&str]| {
        let mut args = vec!["convert", text(&model), "-o", text(&pkg)];
        args.extend(flags);
        lapidary(args).refused()
    };
    assert!(convert(&["--capacity", "0"]).0.contains("above 0"));
    assert!(convert(&["--prefill", "4:2:8"]).0.contains("4:2:8"));
    assert!(convert(&["--dtype", "fp8"]).0.contains("--dtype"));
    assert!(convert(&["--weights", "glue"]).0.contains("--weights"));
    // A binary supports one TensorRT, and says how to get the other.
    let other = if cfg!(feature = "tensorrt") {
        "tensorrt-rtx"
    } else {
        "tensorrt"
    };
    let (message, help) = convert(&["--target", other]);
    if cfg!(feature = "engines") {
        assert!(
            message.contains("was compiled for") && help.contains("cargo build"),
            "{message}: {help}"
        );
    }
    assert!(convert(&["--refit", "general"]).0.contains("bound weights"));
    assert!(convert(&["--tokenizer", "/no/such"]).0.contains("/no/such"));

    let spec = folder.path().join("spec.yaml");
    std::fs::write(&spec, "capacities: [16]\n").unwrap();
    let (message, _) = convert(&["--spec", text(&spec)]);
    assert!(
        message.contains("spec.yaml") && message.contains("unknown field `capacities`"),
        "{message}"
    );
    assert_eq!(names(folder.path()), ["spec.yaml"]);

    assert_eq!(lapidary(["generate", "x"]).status, 2);
    assert_eq!(lapidary(["frobnicate"]).status, 2);
    assert_eq!(lapidary(["--help"]).status, 0);
}

#[test]
fn a_reader_that_goes_away_is_no_panic() {
    let mut child = command()
        .args([
            "inspect",
            text(&fixture("exports/llama-optimum/model.onnx")),
            "--dump",
            "graph",
        ])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    drop(child.stdout.take());
    let run = Run::of(child.wait_with_output().unwrap());
    assert_eq!(run.stderr, "");
    assert!(run.status == 0 || run.status == 1);
}
