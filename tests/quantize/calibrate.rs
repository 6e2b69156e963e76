//! Calibration: scaling channels does not change results, and reduces rounding errors.

use std::path::{Path, PathBuf};

use lapidary::convert::ConvertError;
use lapidary::decode::Session;
use lapidary::decode::cpu::CpuDevice;
use lapidary::graph::op::Op;
use lapidary::graph::{Graph, NodeId};
use lapidary::help::Help;
use lapidary::package::Package;
use lapidary::quantize::sites::{Fold, scale, sites};
use lapidary::quantize::{self, moments, statistics};
use lapidary::{ConvertOptions, SessionOptions, Spec, convert, onnx, passes};
use serde_json::json;

use crate::packages::export;
use crate::support::{fixture, lapidary, names, text};

fn canonical(model: &Path) -> passes::Canonical {
    let options = passes::CanonicalizeOptions {
        max_positions: 32,
        ..passes::CanonicalizeOptions::default()
    };
    passes::canonicalize(onnx::read(model).unwrap(), &options).unwrap()
}

/// Logits after each of a few tokens.
fn logits(graph: &Graph, vocabulary: usize) -> Vec<f32> {
    let device = CpuDevice::new(graph.clone(), vocabulary, Some(2));
    let mut session = Session::new(Box::new(device), &[32], vocabulary);
    let mut all = session.feed(&[1, 20, 5]).unwrap().to_vec();
    for token in [33, 71, 2] {
        all.extend(session.feed(&[token]).unwrap());
    }
    all
}

/// Scaled by any factors, the model in floating point is the same up to rounding.
#[test]
fn every_fold_is_exact() {
    let mut wrong = Vec::new();
    for (model, folds) in [
        // Two norms a layer and the last one; `up` before `down`.
        (export("llama-optimum"), (5, 2)),
        // Biases of queries, keys and values. The tied head's matrix is also read as a table.
        (export("qwen2-dynamo-opset18"), (4, 2)),
        // Norms of queries and keys, which are not sites.
        (export("qwen3-optimum"), (5, 2)),
        // LayerNorm with biases, and an activation that no factor passes through.
        (export("gpt2-optimum"), (4, 0)),
        // One norm before attention and feed-forward.
        (fixture("families/optimum-gptj2048/model.onnx"), (3, 0)),
        (fixture("families/optimum-gemma3/model.onnx"), (6, 3)),
    ] {
        let name = model.display().to_string();
        let passes::Canonical {
            mut graph,
            architecture,
            ..
        } = canonical(&model);
        let vocabulary = architecture.vocabulary.unwrap();
        let before = logits(&graph, vocabulary);
        let mut found = (0, 0);
        for (i, site) in sites(&graph).into_iter().enumerate() {
            match site.fold {
                Some(Fold::Vectors(_)) => found.0 += 1,
                Some(Fold::Rows { .. }) => found.1 += 1,
                None => continue,
            }
            let channels = graph.shape(site.input).unwrap().last().unwrap().as_const().unwrap();
            let factor = |c: i64| 0.25 + ((c * 7 + i as i64 * 3) % 16) as f32 / 4.0;
            scale(&mut graph, &site, &(0..channels).map(factor).collect::<Vec<f32>>());
        }
        if found != folds {
            wrong.push(format!("{name}: {found:?} folds, expected {folds:?}"));
        }
        lapidary::graph::infer(&mut graph).unwrap();
        let after = logits(&graph, vocabulary);
        let largest = before.iter().fold(0f32, |most, v| most.max(v.abs()));
        let apart = before.iter().zip(&after).map(|(a, b)| (a - b).abs());
        let apart = apart.fold(0.0, f32::max);
        if apart > 2e-5 * largest.max(1.0) || apart == 0.0 {
            wrong.push(format!("{name}: {apart} of {largest}"));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

/// A tokenizer of the words `w0` to `w96`, in its own folder.
fn tokenizer(folder: &Path, words: usize) -> PathBuf {
    let vocabulary: serde_json::Map<String, serde_json::Value> =
        (0..words).map(|i| (format!("w{i}"), json!(i))).collect();
    let tokenizer = json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": [], "normalizer": null,
        "pre_tokenizer": {"type": "WhitespaceSplit"}, "post_processor": null, "decoder": null,
        "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": "w0"}
    });
    let path = folder.join("tokenizer.json");
    std::fs::write(&path, tokenizer.to_string()).unwrap();
    path
}

/// A text of this many words.
fn words(folder: &Path, count: usize) -> PathBuf {
    let text: Vec<String> = (0..count)
        .map(|i| format!("w{}", (i * i * 31 + i * 7 + 3) % 97))
        .collect();
    let path = folder.join("words.txt");
    std::fs::write(&path, text.join(" ")).unwrap();
    path
}

fn try_convert(model: &Path, output: &Path, spec: &str) -> Result<Package, ConvertError> {
    let conversion = Spec::parse(&format!("capacity: [32]\n{spec}"))
        .unwrap()
        .resolve()
        .unwrap();
    convert(model, output, conversion, &ConvertOptions::default())?;
    Ok(Package::open(output).unwrap())
}

/// A spec with a tokenizer and a text.
fn spec(folder: &Path, quantize: &str) -> String {
    let (tokenizer, text) = (tokenizer(folder, 97), words(folder, 300));
    format!("quantize: {quantize}\ncalibrate: {text:?}\ntokenizer: {tokenizer:?}")
}

/// The diagonal of second moments has the sums of the channels' squares, and spans are parts of the whole.
#[test]
fn second_moments() {
    // Inputs of three axes, of two, and of four.
    second_moments_of(&export("llama-optimum"));
    second_moments_of(&export("gpt2-optimum"));
    second_moments_of(&fixture("families/dynamo18-minicpm3/model.onnx"));
}

fn second_moments_of(model: &Path) {
    let passes::Canonical { graph, .. } = canonical(model);
    let folder = tempfile::tempdir().unwrap();
    let tokenizer = lapidary::text::Tokenizer::open(&tokenizer(folder.path(), 97)).unwrap();
    let read = quantize::Text::read(&words(folder.path(), 61), &tokenizer).unwrap();
    let sites = sites(&graph);
    let inputs: Vec<_> = sites.iter().map(|site| site.input).collect();
    let channels = statistics::measure(&graph, &inputs, &read, Some(32), |_| ()).unwrap();
    let width = |i: usize| channels[&inputs[i]].square.len();
    let sums = |cut: &dyn Fn(usize) -> Vec<usize>| {
        let wanted = sites.iter().enumerate().map(|(i, site)| (site.clone(), cut(width(i))));
        let wanted: Vec<moments::Wanted> = wanted.collect();
        moments::measure(&graph, &wanted, &read.tokens, Some(32), |_| ()).unwrap()
    };
    let (whole, halves) = (sums(&|width| vec![width]), sums(&|width| vec![width - 8, 8]));
    for ((i, whole), halves) in whole.iter().enumerate().zip(&halves) {
        let width = width(i);
        let [(sum, _)] = &whole.spans[..] else {
            panic!("one span")
        };
        let largest = sum.iter().fold(0f32, |most, v| most.max(v.abs()));
        let close = |a: f32, b: f32| (a - b).abs() <= 2e-5 * largest;
        for (channel, square) in channels[&inputs[i]].square.iter().enumerate() {
            assert!(
                close(sum[channel * width + channel], square * 61.0),
                "{}, channel {channel} of site {i}",
                model.display()
            );
        }
        assert!(sum[1] != 0.0 && close(sum[1], sum[width]));
        let mut start = 0;
        for (part, of) in &halves.spans {
            for (row, values) in part.chunks(*of).enumerate() {
                let own = &sum[(start + row) * width + start..][..*of];
                assert!(
                    values.iter().zip(own).all(|(a, b)| close(*a, *b)),
                    "{}, span at {start} of site {i}",
                    model.display()
                );
            }
            start += of;
        }
        assert_eq!(start, width);
    }
}

/// One export of each family: inputs of any number of axes, experts, joined and latent projections.
#[test]
fn every_family_is_calibrated() {
    let folder = tempfile::tempdir().unwrap();
    // The smallest vocabulary has 48 tokens; other words become the first.
    let (tokenizer, text) = (tokenizer(folder.path(), 48), words(folder.path(), 300));
    let spec = format!("quantize: int4\ncalibrate: {text:?}\ntokenizer: {tokenizer:?}");
    let mut seen = std::collections::BTreeSet::new();
    for group in ["families", "experts"] {
        for name in names(&fixture(group)) {
            let model = fixture(&format!("{group}/{name}/model.onnx"));
            let (exporter, family) = name.split_once('-').unwrap_or(("", &name));
            // One of those is quantized.
            if exporter == "contrib" || !model.exists() || !seen.insert(family.to_string()) {
                continue;
            }
            let output = folder.path().join("package");
            let package = try_convert(&model, &output, &spec).unwrap_or_else(|e| panic!("{name}: {e}"));
            let record = package.manifest.quantization.as_ref().unwrap();
            assert!(record.weights >= 4 && record.calibration.is_some(), "{name}");
            std::fs::remove_dir_all(output).unwrap();
        }
    }
    assert!(seen.len() >= 25, "{seen:?}");
}

/// The tiny Llama with two channels before its feed-forward blocks that are much larger than the others, as large models
/// have them.
fn with_outliers(folder: &Path) -> PathBuf {
    let mut graph = canonical(&export("llama-optimum")).graph;
    let uses = graph.uses();
    let before_gate_and_up = |id: &NodeId| {
        let output = graph.node(*id).output(0).unwrap();
        matches!(graph.node(*id).op, Op::RmsNormalization { .. }) && uses.get(&output).is_some_and(|r| r.len() == 2)
    };
    let norms: Vec<_> = graph
        .node_ids()
        .filter(before_gate_and_up)
        .filter_map(|id| graph.node(id).input(1))
        .collect();
    assert_eq!(norms.len(), 2);
    for norm in norms {
        let constant = graph.constant(norm).unwrap().clone();
        let mut values = constant.materialize().unwrap().to_f32();
        (values[3], values[17]) = (values[3] * 30.0, values[17] * 20.0);
        let made = lapidary::tensor::Tensor::from_f32(constant.shape().to_vec(), &values);
        let made = lapidary::graph::Constant::tensor(made).with_origin(constant.origin().unwrap());
        graph.set_constant(norm, made);
    }
    let model = folder.join("outliers.onnx");
    onnx::write_with_data(&graph, &model).unwrap();
    model
}

#[test]
fn outliers_cost_less_with_calibration() {
    let folder = tempfile::tempdir().unwrap();
    let model = with_outliers(folder.path());
    let logits = |package: &Package| {
        let mut session = Session::open(package, &SessionOptions::default()).unwrap();
        let mut all = Vec::new();
        for start in 0..5u32 {
            session.restart();
            let tokens: Vec<u32> = (0..20).map(|i| (start * 17 + i * 11 + 5) % 97).collect();
            all.extend_from_slice(session.feed(&tokens).unwrap());
        }
        all
    };
    let at = |name: &str| folder.path().join(name);
    let float = logits(&try_convert(&model, &at("float"), "").unwrap());
    let error = |package: &Package| -> f64 {
        let found = logits(package);
        float.iter().zip(&found).map(|(a, b)| f64::from(a - b).powi(2)).sum()
    };
    let plain = try_convert(&model, &at("plain"), "quantize: int4").unwrap();
    let calibrated = try_convert(&model, &at("calibrated"), &spec(folder.path(), "int4")).unwrap();
    let (plain, better) = (error(&plain), error(&calibrated));
    assert!(better < plain * 0.5, "{better} for {plain}");
    let record = calibrated
        .manifest
        .quantization
        .as_ref()
        .unwrap()
        .calibration
        .as_ref()
        .unwrap();
    assert_eq!((record.text.as_str(), record.tokens), ("words.txt", 300));
    assert!(record.scaled >= 4, "{record:?}");
    // The same again, to the last byte.
    let again = try_convert(&model, &at("again"), &spec(folder.path(), "int4")).unwrap();
    assert_eq!(again.manifest.weights.set_hash, calibrated.manifest.weights.set_hash);
    // Recipes record that values were calibrated together, including norms.
    let recipes = calibrated
        .manifest
        .weights
        .tensors
        .iter()
        .map(|w| w.recipe.as_ref().unwrap());
    let calibrated_ones = recipes.filter(|recipe| recipe.is_calibrated()).count();
    assert!(calibrated_ones >= 14 + record.scaled.min(4), "{calibrated_ones}");
}

#[test]
fn a_calibrated_package_takes_no_other_floats() {
    let folder = tempfile::tempdir().unwrap();
    let model = export("llama-optimum");
    let pkg = folder.path().join("pkg");
    let package = try_convert(&model, &pkg, &spec(folder.path(), "int8")).unwrap();
    let info = lapidary(["info", text(&pkg)]).ok();
    assert!(
        info.stdout.contains("calibrated on 300 tokens of words.txt"),
        "{}",
        info.stdout
    );
    let (message, help) = lapidary(["refit", text(&pkg), "--from", text(&model)]).refused();
    assert!(
        message.contains("its weights were calibrated together on the text \"words.txt\"")
            && message.contains("model.onnx"),
        "{message}"
    );
    assert!(help.contains("--calibrate"), "{help}");
    assert_eq!(Package::open(&pkg).unwrap().manifest, package.manifest);
    // Removed weights are restored from a copy of it.
    let bare = folder.path().join("bare");
    lapidary(["strip", text(&pkg), "-o", text(&bare)]).ok();
    lapidary(["refit", text(&bare), "--from", text(&pkg)]).ok();
    assert_eq!(
        Package::open(&bare).unwrap().manifest.weights.set_hash,
        package.manifest.weights.set_hash
    );
    // Another package does not accept its weights as those of the model.
    let float = folder.path().join("float");
    try_convert(&model, &float, "").unwrap();
    assert_eq!(lapidary(["refit", text(&float), "--from", text(&pkg)]).status, 2);
}

#[test]
fn texts_that_cannot_be_calibrated_on() {
    let folder = tempfile::tempdir().unwrap();
    let model = export("llama-optimum");
    let target = tempfile::tempdir().unwrap();
    let refused = |spec: &str| {
        let error = try_convert(&model, &target.path().join("pkg"), spec).expect_err("it is refused");
        assert_eq!(names(target.path()), [""; 0], "nothing is left behind");
        (error.to_string(), error.help().unwrap_or_default())
    };
    let words = words(folder.path(), 300);
    let (error, help) = refused(&format!("quantize: int4\ncalibrate: {words:?}"));
    assert!(
        error.contains("needs the model's tokenizer, and there is none in the export's folder"),
        "{error}"
    );
    assert!(help.contains("--tokenizer"), "{help}");
    let tokenizer = tokenizer(folder.path(), 97);
    let with = |file: &Path| {
        refused(&format!(
            "quantize: int4\ncalibrate: {file:?}\ntokenizer: {tokenizer:?}"
        ))
        .0
    };
    let path = folder.path().join("bad.txt");
    assert!(with(&path).contains("bad.txt: No such file"));
    std::fs::write(&path, [0xff, 0xfe, 0x00]).unwrap();
    assert!(with(&path).ends_with("bad.txt: it is not UTF-8"));
    std::fs::write(&path, "w1 w2 w3").unwrap();
    assert!(with(&path).contains("it has 3 tokens, and calibrating needs 16 at least"));
    let other = tempfile::tempdir().unwrap();
    let larger = self::tokenizer(other.path(), 200);
    std::fs::write(&path, "w150 ".repeat(40)).unwrap();
    let (error, _) = refused(&format!("quantize: int4\ncalibrate: {path:?}\ntokenizer: {larger:?}"));
    assert!(
        error.contains("the token 150 of it, and the model's vocabulary is 97"),
        "{error}"
    );
    let (message, _) = lapidary([
        "convert",
        text(&model),
        "-o",
        "/nowhere/pkg",
        "--calibrate",
        text(&words),
    ])
    .refused();
    assert!(message.contains("needs a quantization to calibrate"), "{message}");
}
