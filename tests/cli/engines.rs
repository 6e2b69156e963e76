//! `convert --target tensorrt-rtx`: engines that TensorRT-RTX really builds, told by `info`. No GPU is needed, but the
//! library is: `source scripts/setup.sh tensorrt`.

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

    // Every weight is taken by every engine, and the table names the engines.
    let tensors = info["weights"]["tensors"].as_array().unwrap();
    let taken = tensors.iter().filter(|t| t["engines"] == json!(labels)).count();
    assert!(taken > 10, "{tensors:#?}");
    let told = lapidary(["info", text(&pkg)]).ok().stdout;
    assert!(labels.iter().all(|label| told.contains(label)), "{told}");
}

/// Plans with the weights inside cannot survive other weights: they go with `strip` and are built again by `refit`.
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
    let told = lapidary(["strip", text(&pkg), "-o", text(&bare)]).ok().stdout;
    assert!(told.contains("2 engines that hold weights were left out"), "{told}");
    assert!(!bare.join("engines").exists());
    lapidary(["refit", text(&bare), "--from", text(&model), "--tensorrt-lib", library]).ok();
    assert_eq!(names(&bare.join("engines")), built);
    lapidary(["info", text(&bare), "--check"]).ok();
}
