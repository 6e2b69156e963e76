//! Packages of quantized weights: contents, results, and refusals.

use std::path::{Path, PathBuf};
use std::process::Command;

use lapidary::convert::{ConvertError, Converted};
use lapidary::graph::Graph;
use lapidary::package::{Manifest, Package};
use lapidary::tensor::DType;
use lapidary::{ConvertOptions, Spec, convert, lower, onnx};
use serde_json::{Value, json};

use crate::support::{fixture, ids, lapidary, names, package, text};

pub fn export(name: &str) -> PathBuf {
    fixture("exports").join(name).join("model.onnx")
}

pub fn try_convert(model: &Path, output: &Path, spec: &str) -> Result<Converted, ConvertError> {
    let conversion = Spec::parse(&format!("capacity: [32]\n{spec}"))
        .unwrap()
        .resolve()
        .unwrap();
    convert(model, output, conversion, &ConvertOptions::default())
}

/// Converts into `folder/name`.
pub fn converted(model: &Path, folder: &Path, name: &str, spec: &str) -> Package {
    let output = folder.join(name);
    try_convert(model, &output, spec).unwrap_or_else(|e| panic!("{spec}: {e}"));
    Package::open(&output).unwrap()
}

/// Weights that are quantized, by name, each with its form.
pub fn forms(manifest: &Manifest) -> Vec<(&str, String)> {
    let weights = manifest.weights.tensors.iter();
    weights
        .filter_map(|w| Some((w.name.as_str(), w.quantized.as_ref()?.to_string())))
        .collect()
}

/// Largest difference of logits of one prefill, and the size of the largest logit.
pub fn difference(a: &Package, b: &Package) -> (f32, f32) {
    let logits = |package: &Package| {
        let mut session = ::lapidary::Session::open(package, &::lapidary::SessionOptions::default()).unwrap();
        session.feed(&[1, 20, 5, 33, 71, 2, 60]).unwrap().to_vec()
    };
    let (a, b) = (logits(a), logits(b));
    let differences = a.iter().zip(&b).map(|(a, b)| (a - b).abs());
    (
        differences.fold(0.0, f32::max),
        a.iter().fold(0.0, |most, v| most.max(v.abs())),
    )
}

#[test]
fn every_format_of_every_family_becomes_a_package() {
    let folder = tempfile::tempdir().unwrap();
    for name in ["llama-optimum", "qwen2-optimum", "gpt2-optimum", "llama-ort-genai-fp16"] {
        let model = export(name);
        let float = converted(&model, folder.path(), &format!("{name}-float"), "");
        for (format, form, bound) in [
            ("int4", "i4 in blocks of ", 0.6),
            (
                "int4,asymmetric,group=16",
                "u4 in blocks of 16 on axis 1 with zero points",
                0.6,
            ),
            ("int4,group=channel", "i4 per channel of axis 0", 0.6),
            ("int8", "i8 in blocks of ", 0.05),
            ("int8,group=channel", "i8 per channel of axis 0", 0.05),
            (
                "int8,asymmetric,group=16",
                "u8 in blocks of 16 on axis 1 with zero points",
                0.05,
            ),
            ("fp8", "f8e4m3fn per channel of axis 0", 0.25),
            ("fp8,group=16", "f8e4m3fn in blocks of 16 on axis 1", 0.25),
        ] {
            let what = format!("{name} {format}");
            let package = converted(&model, folder.path(), &what, &format!("quantize: \"{format}\""));
            let manifest = &package.manifest;
            package.check_hashes().unwrap();
            let record = manifest.quantization.as_ref().unwrap();
            assert!(record.format.to_string().starts_with(format.split(',').next().unwrap()));
            let found = forms(manifest);
            assert!(
                found.len() >= 8 && found.iter().all(|(_, f)| f.starts_with(form)),
                "{what}: {found:?}"
            );
            assert_eq!(found.len(), record.weights, "{what}");
            // By default the head, the embeddings, and everything that is not a matrix stay in floating point.
            for weight in manifest.weights.tensors.iter().filter(|w| w.quantized.is_none()) {
                let matrix = weight.shape.len() == 2;
                let vocabulary = weight.shape[0] == 97 || weight.name.contains("wpe");
                assert!(!matrix || vocabulary, "{what}: {} stays", weight.name);
            }
            let (apart, largest) = difference(&float, &package);
            assert!(apart > 0.0 && apart < bound * largest, "{what}: {apart} of {largest}");
        }
    }
}

#[test]
fn what_is_kept() {
    let folder = tempfile::tempdir().unwrap();
    let model = export("llama-optimum");
    let kept = |name: &str, options: &str| {
        let package = converted(&model, folder.path(), name, &format!("quantize: \"int8{options}\""));
        let mut modules: Vec<String> = Vec::new();
        for weight in &package.manifest.weights.tensors {
            if weight.shape.len() == 2 && weight.quantized.is_none() {
                let recipe = weight.modules.as_ref().unwrap();
                modules.extend(recipe.leaves().iter().map(|leaf| leaf.name.to_string()));
            }
        }
        modules.sort();
        modules
    };
    let none: [&str; 0] = [];
    assert_eq!(kept("a", ""), ["embedding.weight", "head.weight"]);
    assert_eq!(kept("b", ",keep=none"), none);
    assert_eq!(kept("c", ",keep=none,keep=lm_head"), ["head.weight"]);
    assert_eq!(kept("d", ",keep=none,keep=embeddings"), ["embedding.weight"]);
    assert_eq!(
        kept("e", ",keep=none,keep=layers.1.*.value.*,keep=layers.0.attention"),
        [
            "layers.0.attention.key.weight",
            "layers.0.attention.output.weight",
            "layers.0.attention.query.weight",
            "layers.0.attention.value.weight",
            "layers.1.attention.value.weight"
        ]
    );
}

/// One weight is read as a table and as a matrix: it stays one, in floating point or quantized.
#[test]
fn a_tied_table_stays_one_weight() {
    let folder = tempfile::tempdir().unwrap();
    let model = export("qwen2-optimum");
    let float = converted(&model, folder.path(), "float", "");
    let tables = |package: &Package| {
        let weights = package.manifest.weights.tensors.iter();
        let tables = weights.filter(|w| w.shape == [97, 32]);
        tables
            .map(|w| w.quantized.as_ref().map(|q| q.to_string()))
            .collect::<Vec<_>>()
    };
    assert_eq!(tables(&float), [None]);
    for (i, keep) in ["", ",keep=none,keep=lm_head", ",keep=none,keep=embeddings"]
        .iter()
        .enumerate()
    {
        let package = converted(
            &model,
            folder.path(),
            &format!("kept-{i}"),
            &format!("quantize: \"int8{keep}\""),
        );
        assert_eq!(tables(&package), [None], "{keep}");
    }
    let package = converted(
        &model,
        folder.path(),
        "all",
        "quantize: \"int8,group=channel,keep=none\"",
    );
    assert_eq!(tables(&package), [Some("i8 per channel of axis 0".to_string())]);
    let (apart, largest) = difference(&float, &package);
    assert!(apart < 0.05 * largest, "{apart} of {largest}");
}

#[test]
fn the_same_export_gives_the_same_bytes() {
    let folder = tempfile::tempdir().unwrap();
    let model = export("llama-optimum");
    for spec in ["quantize: int4", "quantize: \"fp8,group=16\"\ndtype: fp16"] {
        let first = converted(&model, folder.path(), "a", spec);
        let second = converted(&model, folder.path(), "b", spec);
        assert_eq!(first.manifest.weights, second.manifest.weights, "{spec}");
        let bytes = |package: &Package| std::fs::read(package.folder.join(&package.manifest.weights.file)).unwrap();
        assert_eq!(bytes(&first), bytes(&second), "{spec}");
        for folder in [first.folder, second.folder] {
            std::fs::remove_dir_all(folder).unwrap();
        }
    }
}

#[test]
fn scales_have_the_dtype_of_the_package() {
    let folder = tempfile::tempdir().unwrap();
    for (dtype, expected) in [("fp16", DType::F16), ("bf16", DType::Bf16), ("fp32", DType::F32)] {
        let spec = format!("dtype: {dtype}\nquantize: int4");
        let package = converted(&export("llama-optimum"), folder.path(), dtype, &spec);
        let weights = package
            .manifest
            .weights
            .tensors
            .iter()
            .filter(|w| w.quantized.is_some());
        for weight in weights {
            let parts = weight.quantized.as_ref().unwrap().parts();
            assert_eq!((weight.dtype, parts[1].dtype), (expected, expected), "{}", weight.name);
        }
    }
}

#[test]
fn info_shows_what_was_quantized() {
    let folder = tempfile::tempdir().unwrap();
    let spec = folder.path().join("spec.yaml");
    let args = [
        "--quantize",
        "int4,group=16,keep=layers.0.attention",
        "--capacity",
        "32",
        "--save-spec",
        text(&spec),
    ];
    let model = export("llama-optimum");
    let pkg = package(folder.path(), &model, &args);
    let shown = lapidary(["info", text(&pkg)]).ok();
    let line =
        "quantized      10 weights as int4,group=16,symmetric,keep=lm_head,keep=embeddings,keep=layers.0.attention\n";
    assert!(shown.stdout.contains(line), "{}", shown.stdout);
    let info = lapidary(["info", text(&pkg), "--json"]).ok().json();
    assert_eq!(info["quantization"]["weights"], 10);
    assert_eq!(info["quantization"]["kept"].as_array().unwrap().len(), 6);
    let recipe = &info["weights"]["tensors"]
        .as_array()
        .unwrap()
        .iter()
        .find(|w| w["name"].as_str().unwrap().contains("down_proj") || !w["quantized"].is_null())
        .unwrap()["recipe"]["round_to_nearest"];
    assert_eq!(
        recipe["format"],
        json!({"codes": "i4", "granularity": {"block": {"axis": 1, "size": 16}}})
    );
    let listed = lapidary(["weights", text(&pkg)]).ok();
    assert!(
        listed.stdout.contains("f32 of i4 in blocks of 16 on axis 1"),
        "{}",
        listed.stdout
    );
    // The spec produces the same package.
    let again = folder.path().join("again");
    lapidary(["convert", text(&model), "-o", text(&again), "--spec", text(&spec)]).ok();
    let set = |pkg: &Path| Package::open(pkg).unwrap().manifest.weights.set_hash;
    assert_eq!(set(&pkg), set(&again));
}

/// The emitted graph is valid ONNX, and ONNX Runtime gives the package's results without optimizations; with them it
/// turns some products into integer products and rounds activations.
#[test]
fn onnx_runtime_agrees() {
    let Some(python) = std::env::var_os("LAPIDARY_PYTHON") else {
        assert!(std::env::var_os("CI").is_none(), "CI has to set LAPIDARY_PYTHON");
        eprintln!("LAPIDARY_PYTHON is not set: nothing is run in ONNX Runtime");
        return;
    };
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("scripts/check_canonical.py");
    let folder = tempfile::tempdir().unwrap();
    let mut failed = Vec::new();
    for (name, format) in [
        ("llama-optimum", "int4"),
        ("llama-optimum", "int4,asymmetric,keep=none"),
        ("qwen2-optimum", "int8,keep=none"),
        ("gpt2-optimum", "int8,asymmetric,group=16"),
        ("llama-optimum", "fp8,group=16"),
    ] {
        let at = folder.path().join(format!("{name} {format}"));
        std::fs::create_dir(&at).unwrap();
        let emitted = at.join("canonical.onnx");
        let conversion = Spec::parse(&format!("capacity: [32]\nquantize: \"{format}\"")).unwrap();
        let options = ConvertOptions {
            emit_onnx: Some(&emitted),
            ..ConvertOptions::default()
        };
        let pkg = at.join("pkg");
        convert(&export(name), &pkg, conversion.resolve().unwrap(), &options).unwrap();
        let prompt = json!([1, 20, 5, 33, 71, 2, 60]);
        let ids = ids(&prompt);
        let args = [
            "--prompt-ids",
            &ids,
            "--max-new-tokens",
            "5",
            "--logprobs",
            "8",
            "--ignore-eos",
        ];
        let args = [
            &[
                "generate",
                text(&pkg),
                "--temperature",
                "0",
                "--json",
                "--device",
                "cpu",
            ],
            &args[..],
        ]
        .concat();
        let answer = lapidary(args).ok().json();
        let steps = answer["steps"].as_array().unwrap().iter();
        let reference = json!({
            "prompt": prompt,
            "greedy_tokens": answer["tokens"],
            "top_logprobs": steps.map(|step| step["top_logprobs"].clone()).collect::<Vec<Value>>(),
        });
        std::fs::write(at.join("reference.json"), reference.to_string()).unwrap();
        let output = Command::new(&python)
            .arg(&script)
            .args([&at.join("reference.json"), &emitted])
            .args(["--tolerance", "2e-4", "--capacity", "32", "--unoptimized"])
            .output()
            .expect("LAPIDARY_PYTHON can be run");
        if !output.status.success() {
            failed.push(format!("{name} {format}: {}", String::from_utf8_lossy(&output.stdout)));
        }
        // And it is read back as the same weights.
        let graph: Graph = onnx::read(&emitted).unwrap();
        let codes = lower::stored_weights(&graph).into_iter();
        assert!(
            codes.filter(|(_, w)| w.constant.as_quantized().is_some()).count() >= 8,
            "{name} {format}"
        );
    }
    assert!(failed.is_empty(), "{}", failed.join("\n"));
}

/// The error and its help.
fn refused(model: &Path, spec: &str) -> (String, String) {
    use lapidary::help::Help;
    let folder = tempfile::tempdir().unwrap();
    let error = try_convert(model, &folder.path().join("pkg"), spec)
        .map(|_| ())
        .unwrap_err();
    assert_eq!(names(folder.path()), [""; 0], "nothing is left behind");
    (error.to_string(), error.help().unwrap_or_default())
}

#[test]
fn what_cannot_be_quantized_is_refused_by_name() {
    let model = export("llama-optimum");
    let (error, help) = refused(&model, "quantize: \"int4,group=24\"");
    assert!(
        error.ends_with("blocks of 24 do not divide axis 1 of codes of shape [64, 32]"),
        "{error}"
    );
    assert!(error.contains("cannot be quantized"), "{error}");
    assert!(
        help.starts_with("use group=16 or group=auto, or keep it in floating point: keep="),
        "{help}"
    );
    let (error, help) = refused(&model, "quantize: \"int4,keep=layers.7.*\"");
    assert!(error.ends_with("keep=layers.7.*: no weight matches"), "{error}");
    assert!(help.contains("embedding.weight"), "{help}");
    let (error, _) = refused(&model, "quantize: \"int4,keep=*\"");
    assert!(
        error.contains("no weight is left to be quantized: all 16 matrices stay in floating point"),
        "{error}"
    );
    let (message, _) = lapidary(["convert", text(&model), "-o", "/nowhere/pkg", "--quantize", "int3"]).refused();
    assert!(
        message.contains("\"int3\" is not a format: use int4, int8 or fp8"),
        "{message}"
    );
    let (message, _) = lapidary([
        "convert",
        text(&model),
        "-o",
        "/nowhere/pkg",
        "--quantize",
        "fp8,asymmetric",
    ])
    .refused();
    assert!(message.contains("fp8 is symmetric"), "{message}");
}

/// An export with a weight changed before it is written again.
fn changed(folder: &Path, change: impl Fn(&mut Vec<f32>)) -> PathBuf {
    let mut graph = onnx::read(export("llama-optimum")).unwrap();
    lapidary_infer(&mut graph);
    let id = graph
        .value_ids()
        .find(|id| {
            graph
                .constant(*id)
                .is_some_and(|c| c.shape() == [32, 32] && c.dtype() == DType::F32)
        })
        .unwrap();
    let constant = graph.constant(id).unwrap().clone();
    let mut values = constant.materialize().unwrap().to_f32();
    change(&mut values);
    let tensor = ::lapidary::tensor::Tensor::from_f32(constant.shape().to_vec(), &values);
    graph.set_constant(id, tensor.into());
    let model = folder.join("model.onnx");
    onnx::write_with_data(&graph, &model).unwrap();
    model
}

fn lapidary_infer(graph: &mut Graph) {
    graph.sort().unwrap();
    ::lapidary::graph::infer(graph).unwrap();
}

#[test]
fn numbers_that_have_no_codes_are_refused() {
    for bad in [f32::NAN, f32::INFINITY] {
        let folder = tempfile::tempdir().unwrap();
        let model = changed(folder.path(), |values| values[77] = bad);
        let (error, help) = refused(&model, "quantize: int8");
        assert!(
            error.contains("cannot be quantized: 1 of 1024 values are NaN or infinite"),
            "{error}"
        );
        assert!(help.contains("keep="), "{help}");
    }
}

#[test]
fn a_quantized_export_is_not_quantized_again() {
    let folder = tempfile::tempdir().unwrap();
    let emitted = folder.path().join("canonical.onnx");
    let conversion = Spec::parse("capacity: [32]\nquantize: int8")
        .unwrap()
        .resolve()
        .unwrap();
    let options = ConvertOptions {
        emit_onnx: Some(&emitted),
        ..ConvertOptions::default()
    };
    convert(
        &export("llama-optimum"),
        &folder.path().join("pkg"),
        conversion,
        &options,
    )
    .unwrap();
    let (error, help) = refused(&emitted, "quantize: int4");
    assert!(
        error.contains("its weights are quantized already") && error.contains("i8 in blocks of 32"),
        "{error}"
    );
    assert!(help.contains("without --quantize"), "{help}");
}
