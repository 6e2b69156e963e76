//! `convert --target tensorrt-rtx`: engines built by TensorRT-RTX, as listed by `info`. Needs no GPU, but the library:
//! `source scripts/setup.sh tensorrt`.

use lapidary::backend::tensorrt::Library;
use serde_json::{Value, json};

use crate::support::{fixture, lapidary, names, package, text};

#[test]
fn convert_builds_the_engines_that_info_names() {
    let library = Library::load(None).unwrap_or_else(|e| panic!("{e}"));
    let folder = tempfile::tempdir().unwrap();
    let pkg = package(
        folder.path(),
        &fixture("exports/llama-optimum/model.onnx"),
        &[
            "--target",
            "cpu,tensorrt-rtx",
            "--capacity",
            "16,32",
            "--prefill",
            "24",
            "--tensorrt-lib",
            text(library.path()),
        ],
    );
    let info = lapidary(["info", text(&pkg), "--json", "--check"]).ok().json();
    assert_eq!(info["targets"], json!(["cpu", "tensorrt-rtx"]));

    // Decoding at both capacities; a chunk of 24 tokens fits the larger one only.
    let labels = ["b1-t1-c16", "b1-t1-c32", "b1-t24-c32"];
    let engines = info["engines"].as_array().unwrap();
    let of = |key: &str| -> Vec<Value> { engines.iter().map(|e| e[key].clone()).collect() };
    let files = labels.map(|label| format!("engines/{label}-tensorrt-rtx.plan"));
    assert_eq!(of("file"), files.clone().map(Value::from));
    assert_eq!(
        of("tensorrt_version"),
        [(); 3].map(|()| Value::from(library.version().to_string()))
    );
    assert_eq!(of("weight_mode"), ["bind"; 3].map(Value::from));
    let plans = files.clone().map(|file| std::fs::read(pkg.join(file)).unwrap());
    assert_eq!(of("bytes"), plans.clone().map(|plan| Value::from(plan.len())));
    assert_eq!(names(&pkg.join("engines")).len(), 3);

    // Every engine reads every weight, and the table names the engines.
    let tensors = info["weights"]["tensors"].as_array().unwrap();
    let taken = tensors.iter().filter(|t| t["engines"] == json!(labels)).count();
    assert!(taken > 10, "{tensors:#?}");
    let printed = lapidary(["info", text(&pkg)]).ok().stdout;
    assert!(labels.iter().all(|label| printed.contains(label)), "{printed}");

    // A refit changes none of this, for tables either. Kernels compiled for these plans stay with them.
    let model = fixture("exports/llama-optimum/model.onnx");
    let kernels = pkg.join("engines/kernels");
    std::fs::create_dir(&kernels).unwrap();
    std::fs::write(kernels.join("a.kernels"), "compiled").unwrap();
    lapidary(["refit", text(&pkg), "--from", text(&model)]).ok();
    assert_eq!(std::fs::read_to_string(kernels.join("a.kernels")).unwrap(), "compiled");
    let after = lapidary(["info", text(&pkg), "--json", "--check"]).ok().json();
    assert_eq!(after["engines"], info["engines"]);
    assert_eq!(after["constants"], info["constants"]);
}

/// Plans with embedded weights are invalid for other weights: `strip` removes them and `refit` builds them again.
#[test]
fn embedded_engines_are_built_again_with_the_weights() {
    let library = Library::load(None).unwrap_or_else(|e| panic!("{e}"));
    let library = text(library.path());
    let folder = tempfile::tempdir().unwrap();
    let model = fixture("exports/llama-optimum/model.onnx");
    let flags = "--target cpu,tensorrt-rtx --weights embed --capacity 16 --prefill 8 --tensorrt-lib";
    let flags: Vec<&str> = flags.split(' ').chain([library]).collect();
    let pkg = package(folder.path(), &model, &flags);
    let built = names(&pkg.join("engines"));
    assert_eq!(built.len(), 2);
    let bare = folder.path().join("bare");
    let printed = lapidary(["strip", text(&pkg), "-o", text(&bare)]).ok().stdout;
    assert!(
        printed.contains("2 engines with embedded weights were omitted"),
        "{printed}"
    );
    assert!(!bare.join("engines").exists());
    lapidary(["refit", text(&bare), "--from", text(&model), "--tensorrt-lib", library]).ok();
    assert_eq!(names(&bare.join("engines")), built);
    lapidary(["info", text(&bare), "--check"]).ok();
}

/// Engines stripped for an identical refit, the default of `strip`, accept other values at load without an error:
/// `refit` must prevent that. Such engines cannot be built without a driver, so the manifest of a package with bound
/// ones is edited.
#[test]
fn engines_stripped_for_an_identical_refit_get_no_other_weights() {
    let library = Library::load(None).unwrap_or_else(|e| panic!("{e}"));
    let folder = tempfile::tempdir().unwrap();
    let model = fixture("exports/llama-optimum/model.onnx");
    let small = ["--target", "cpu,tensorrt-rtx", "--capacity", "16", "--prefill", "16"];
    let flags = [&small[..], &["--tensorrt-lib", text(library.path())]].concat();
    let pkg = package(folder.path(), &model, &flags);
    let path = pkg.join("manifest.json");
    let mut manifest: serde_json::Value = serde_json::from_str(&std::fs::read_to_string(&path).unwrap()).unwrap();
    manifest["weight_mode"] = "strip".into();
    for engine in manifest["engines"].as_array_mut().unwrap() {
        engine["weight_mode"] = "strip".into();
        assert_eq!(engine["refit"], "none");
    }
    std::fs::write(&path, manifest.to_string()).unwrap();

    // The same values rounded to fp16.
    let other = fixture("exports/llama-optimum-fp16/model.onnx");
    let others = |flags: &[&str]| lapidary(["refit", text(&pkg), "--from", text(&other)].iter().chain(flags)).refused();
    let (refused, _) = others(&[]);
    assert!(
        refused.contains("another weight set than this package had"),
        "{refused}"
    );
    let (refused, help) = others(&["--mode", "general"]);
    assert!(
        refused.contains("take back only the weights that they were built with"),
        "{refused}"
    );
    assert!(help.contains("--refit general"), "{help}");
    // Its own weights are accepted.
    lapidary(["refit", text(&pkg), "--from", text(&model)]).ok();
}

/// A cached plan is found for the same network, and an embedded one only for the same weights.
#[test]
fn an_engine_cache_knows_what_a_plan_depends_on() {
    let library = Library::load(None).unwrap_or_else(|e| panic!("{e}"));
    let folder = tempfile::tempdir().unwrap();
    let cache = folder.path().join("plans");
    let convert = |name: &str, weights: &str, to: &str| {
        let pkg = folder.path().join(to);
        let model = fixture("exports").join(name).join("model.onnx");
        let flags = [
            "--target",
            "cpu,tensorrt-rtx",
            "--capacity",
            "16",
            "--prefill",
            "16",
            "--weights",
            weights,
        ];
        let run = lapidary(
            [
                "convert",
                text(&model),
                "-o",
                text(&pkg),
                "--json",
                "--tensorrt-lib",
                text(library.path()),
            ]
            .into_iter()
            .chain(flags)
            .chain(["--engine-cache", text(&cache)]),
        );
        let engines = run.ok().json()["engines"].clone();
        let engines = engines.as_array().unwrap().iter();
        let built: Vec<bool> = engines.clone().map(|e| e["build_ms"] != 0).collect();
        (built, engines.map(|e| e["blake3"].clone()).collect::<Vec<_>>())
    };
    let (built, plans) = convert("llama-optimum", "bind", "a");
    assert_eq!(built, [true, true]);
    assert_eq!(convert("llama-optimum", "bind", "b"), (vec![false, false], plans));
    assert_eq!(convert("llama-optimum", "embed", "c").0, [true, true]);
    assert_eq!(convert("llama-optimum", "embed", "d").0, [false, false]);
    assert_eq!(names(&cache).len(), 4);

    // Other values: the embedded plans are built again, and the old ones stay in the cache.
    let checkpoint = folder.path().join("hf");
    lapidary(["weights", text(&folder.path().join("d")), "--export", text(&checkpoint)]).ok();
    let file = checkpoint.join("model.safetensors");
    let mut bytes = std::fs::read(&file).unwrap();
    let last = bytes.len() - 2;
    bytes[last] ^= 1;
    std::fs::write(&file, bytes).unwrap();
    let pkg = folder.path().join("d");
    let library = text(library.path());
    let flags = ["--tensorrt-lib", library, "--engine-cache", text(&cache)];
    lapidary(["refit", text(&pkg), "--from", text(&file)].into_iter().chain(flags)).ok();
    assert_eq!(names(&cache).len(), 6);
}

/// A spec with the lowering of single engines, as `--tune` writes it, is used to build them, and is written again
/// unchanged.
#[test]
fn lowerings_of_a_spec_are_those_of_the_engines() {
    let library = Library::load(None).unwrap_or_else(|e| panic!("{e}"));
    let folder = tempfile::tempdir().unwrap();
    let spec = folder.path().join("tuned.yaml");
    let tuned = r#"{"targets": ["tensorrt-rtx"], "capacity": [16, 32], "prefill": [24], "tuned": [
        {"profile": "b1-t1-c32", "lowering": {"fuse_linear": false, "fold_groups": false, "attention": "decomposed"}}]}"#;
    std::fs::write(&spec, tuned).unwrap();
    let saved = folder.path().join("saved.yaml");
    let flags = [
        "--spec",
        text(&spec),
        "--save-spec",
        text(&saved),
        "--tensorrt-lib",
        text(library.path()),
    ];
    let pkg = package(folder.path(), &fixture("exports/llama-optimum/model.onnx"), &flags);
    let lowerings = |pkg| -> Vec<(Value, Value)> {
        let info = lapidary(["info", text(pkg), "--json"]).ok().json();
        let engines = info["engines"].as_array().unwrap().iter();
        engines.map(|e| (e["file"].clone(), e["lowering"].clone())).collect()
    };
    let made = lowerings(&pkg);
    let forms: Vec<&Value> = made.iter().map(|(_, lowering)| &lowering["attention"]).collect();
    assert_eq!(forms, ["by_capacity", "decomposed", "by_capacity"]);
    assert_eq!(made[1].1["fuse_linear"], false);

    let again = tempfile::tempdir().unwrap();
    let flags = ["--spec", text(&saved), "--tensorrt-lib", text(library.path())];
    let pkg = package(again.path(), &fixture("exports/llama-optimum/model.onnx"), &flags);
    assert_eq!(lowerings(&pkg), made);
}

/// Without a GPU, `--tune` fails before reading any input, and writes nothing.
#[test]
fn tuning_needs_a_gpu() {
    let library = Library::load(None).unwrap_or_else(|e| panic!("{e}"));
    let folder = tempfile::tempdir().unwrap();
    let pkg = folder.path().join("pkg");
    let model = fixture("exports/llama-optimum/model.onnx");
    let convert = |flags: &[&str]| {
        let mut all = vec!["convert", text(&model), "-o", text(&pkg), "--tune"];
        all.extend(flags);
        lapidary(all)
    };
    let (printed, help) = convert(&[]).refused();
    assert!(
        printed.contains("needs a target with engines") && help.contains("--target tensorrt-rtx"),
        "{printed} {help}"
    );
    if lapidary::backend::tensorrt::probe(Some(library.path())).run.possible {
        return;
    }
    let (printed, help) = convert(&["--target", "tensorrt-rtx", "--tensorrt-lib", text(library.path())]).refused();
    assert!(
        printed.contains("--tune measures on the GPU of this machine"),
        "{printed}"
    );
    assert!(help.contains("--save-spec"), "{help}");
    assert!(!pkg.exists());
}

/// With two optimization profiles one plan decodes and prefills; the manifest has an entry for each, and refit keeps
/// the file.
#[test]
fn one_engine_for_decode_and_prefill() {
    let library = Library::load(None).unwrap_or_else(|e| panic!("{e}"));
    let folder = tempfile::tempdir().unwrap();
    let model = fixture("exports/llama-optimum/model.onnx");
    let flags = [
        "--target",
        "tensorrt-rtx",
        "--capacity",
        "16,32",
        "--prefill",
        "1:8:24",
        "--one-engine",
    ];
    let library = ["--tensorrt-lib", text(library.path())];
    let pkg = package(folder.path(), &model, &[&flags[..], &library[..]].concat());
    let printed = || {
        let info = lapidary(["info", text(&pkg), "--json", "--check"]).ok().json();
        let engines = info["engines"].as_array().unwrap().clone();
        let profiles: Vec<Value> = engines.iter().map(|e| e["optimization_profile"].clone()).collect();
        let files: Vec<Value> = engines.iter().map(|e| e["file"].clone()).collect();
        (profiles, files)
    };
    let (profiles, files) = printed();
    assert_eq!(profiles, [Value::Null, 1.into(), Value::Null, 1.into()]);
    let expected = ["b1-t1_8_16-c16", "b1-t1_8_16-c16", "b1-t1_8_24-c32", "b1-t1_8_24-c32"];
    assert_eq!(
        files,
        expected.map(|file| Value::from(format!("engines/{file}-tensorrt-rtx.plan")))
    );
    assert_eq!(names(&pkg.join("engines")).len(), 2);
    lapidary(["refit", text(&pkg), "--from", text(&model)]).ok();
    assert_eq!(printed(), (profiles, files));

    let refused = |flags: &[&str]| {
        let other = folder.path().join("other");
        let all = [
            &["convert", text(&model), "-o", text(&other), "--target", "tensorrt-rtx"],
            &library[..],
            flags,
        ]
        .concat();
        lapidary(all).refused().0
    };
    assert!(refused(&["--one-engine", "--prefill", "8"]).contains("needs a prefill range"));
    let strip = ["--one-engine", "--prefill", "1:8:24", "--weights", "strip"];
    assert!(refused(&strip).contains("have one optimization profile"));
}

/// Decoding and a chunk of a prompt of every family, in half precision.
#[test]
fn engines_of_every_family_are_built() {
    let library = Library::load(None).unwrap_or_else(|e| panic!("{e}"));
    let library = text(library.path());
    let flags = "--target cpu,tensorrt-rtx --dtype fp16 --capacity 16 --prefill 4 --tensorrt-lib";
    let flags: Vec<&str> = flags.split(' ').chain([library]).collect();
    let folder = tempfile::tempdir().unwrap();
    let families = names(&fixture("families"));
    let mut built = 0;
    for family in families.iter().filter(|family| !family.contains('.')) {
        let model = fixture(&format!("families/{family}/model.onnx"));
        let pkg = package(folder.path(), &model, &flags);
        assert_eq!(names(&pkg.join("engines")).len(), 2, "{family}");
        built += 1;
        std::fs::remove_dir_all(pkg).unwrap();
    }
    assert!(built >= 25, "{families:?}");
}

/// A head and an embedding of one matrix: a kernel reads its codes, and a gather reads them as bytes.
#[test]
fn kernels_read_codes_of_an_embedding() {
    let library = Library::load(None).unwrap_or_else(|e| panic!("{e}"));
    let library = text(library.path());
    let folder = tempfile::tempdir().unwrap();
    let model = fixture("exports/gpt2-optimum/model.onnx");
    for format in ["int4,keep=none", "int4,asymmetric,keep=none", "int8,keep=none"] {
        let flags = "--target tensorrt-rtx --dtype fp16 --capacity 16 --prefill 4 --quantize";
        let flags: Vec<&str> = flags.split(' ').chain([format, "--tensorrt-lib", library]).collect();
        let pkg = package(folder.path(), &model, &flags);
        let info = lapidary(["info", text(&pkg), "--json", "--check"]).ok().json();
        assert_eq!(info["engines"].as_array().unwrap().len(), 2, "{format}");
        std::fs::remove_dir_all(pkg).unwrap();
    }
}

#[test]
fn convert_builds_engines_for_several_sequences_or_says_why_not() {
    let library = Library::load(None).unwrap_or_else(|e| panic!("{e}"));
    let folder = tempfile::tempdir().unwrap();
    let common = [
        "--target",
        "tensorrt-rtx",
        "--capacity",
        "16,32",
        "--prefill",
        "24",
        "--tensorrt-lib",
    ];
    let flags = |more: &[&'static str]| -> Vec<String> {
        let all = common
            .iter()
            .copied()
            .chain([text(library.path())])
            .chain(more.iter().copied());
        all.map(str::to_string).collect()
    };
    let of_halves = flags(&["--dtype", "fp16", "--batch", "16,2"]);
    let of_halves: Vec<&str> = of_halves.iter().map(String::as_str).collect();
    let pkg = package(folder.path(), &fixture("exports/llama-optimum/model.onnx"), &of_halves);
    let info = lapidary(["info", text(&pkg), "--json", "--check"]).ok().json();
    let engines = info["engines"].as_array().unwrap();
    let profiles = engines
        .iter()
        .map(|e| (e["profile"]["batch"].clone(), e["profile"]["capacity"].clone()));
    let expected = [(1, 16), (1, 32), (1, 32), (2, 32), (16, 32)];
    assert!(
        profiles.eq(expected.map(|(batch, capacity)| (json!(batch), json!(capacity)))),
        "{engines:#?}"
    );
    // Only the row of the embedding table is left for TensorRT.
    let plans = |e: &Value| e["plans"].as_array().map(Vec::len);
    assert_eq!(
        engines.iter().map(plans).collect::<Vec<_>>(),
        [Some(1), Some(1), None, Some(1), Some(1)]
    );

    // Layer norms and fp32 have no kernels, and kernels cannot read embedded weights.
    let refused = |model: &str, more: &[&'static str]| {
        let output = folder.path().join("refused");
        let mut arguments = vec!["convert".to_string(), text(&fixture(model)).to_string()];
        arguments.extend(["-o".to_string(), text(&output).to_string()]);
        arguments.extend(flags(more));
        let (message, help) = lapidary(&arguments).refused();
        assert!(!output.exists(), "{message}");
        (message, help)
    };
    for model in ["exports/gpt2-optimum/model.onnx", "exports/llama-optimum/model.onnx"] {
        let halves: &[&str] = &["--batch", "4", "--dtype", "fp16"];
        let (message, help) = refused(model, if model.contains("gpt2") { halves } else { &halves[..2] });
        assert!(
            message.contains("has no kernel") && help.contains("--dtype fp16"),
            "{message}\n{help}"
        );
    }
    let (message, _) = refused(
        "exports/llama-optimum/model.onnx",
        &["--batch", "4", "--weights", "embed"],
    );
    assert!(message.contains("bound weights"), "{message}");
    let (message, _) = refused("exports/llama-optimum/model.onnx", &["--batch", "1,17"]);
    assert!(message.contains("2 to 16"), "{message}");
}
