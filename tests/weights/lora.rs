//! LoRA adapters, merged while refitting.

use std::path::Path;

use lapidary::graph::Constant;
use lapidary::package::Package;
use lapidary::tensor::{DType, Tensor};
use lapidary::weights::lora::Adapter;
use lapidary::weights::model::NameKind;
use safetensors::tensor::{Dtype, TensorView};

use crate::refit::{export, set_hash};
use crate::support::{lapidary, package, text};

/// Writes an adapter: layers with (out, in), rank 2, values from a small formula.
pub fn adapter(folder: &Path, layers: &[(&str, usize, usize)], config: &str) {
    std::fs::create_dir_all(folder).unwrap();
    std::fs::write(folder.join("adapter_config.json"), config).unwrap();
    let mut tensors = Vec::new();
    for (layer, out, width) in layers {
        for (half, shape) in [("lora_A", vec![2, *width]), ("lora_B", vec![*out, 2])] {
            let n: usize = shape.iter().product();
            let bytes: Vec<u8> = (0..n).flat_map(|i| number(half, i).to_le_bytes()).collect();
            tensors.push((format!("base_model.model.{layer}.{half}.weight"), shape, bytes));
        }
    }
    let views = tensors.iter().map(|(name, shape, bytes)| {
        (
            name.as_str(),
            TensorView::new(Dtype::F32, shape.clone(), bytes).unwrap(),
        )
    });
    std::fs::write(
        folder.join("adapter_model.safetensors"),
        safetensors::serialize(views, None).unwrap(),
    )
    .unwrap();
}

fn number(half: &str, i: usize) -> f32 {
    let phase = if half == "lora_A" { 0.7 } else { 1.3 };
    (i as f32 * phase).sin() * 0.25
}

fn module(pkg: &Path, name: &str) -> (Vec<usize>, Vec<f32>) {
    let weights = Package::open(pkg).unwrap().model_weights().unwrap();
    let (_, constant) = weights.tensor(NameKind::Module, name).unwrap().unwrap();
    let tensor = constant.materialize().unwrap();
    (tensor.shape().to_vec(), tensor.to_f32())
}

const CONFIG: &str = r#"{"peft_type": "LORA", "r": 2, "lora_alpha": 6, "target_modules": ["q_proj"]}"#;

#[test]
fn the_sum_is_the_formulas() {
    let folder = tempfile::tempdir().unwrap();
    let pkg = package(folder.path(), &export("llama-optimum"), &["--capacity", "32"]);
    let name = "layers.1.attention.query.weight";
    let (shape, before) = module(&pkg, name);
    let other = module(&pkg, "layers.0.attention.query.weight");
    let (out, width) = (shape[0], shape[1]);
    let path = folder.path().join("adapter");
    adapter(&path, &[("model.layers.1.self_attn.q_proj", out, width)], CONFIG);
    lapidary([
        "refit",
        text(&pkg),
        "--from",
        text(&export("llama-optimum")),
        "--lora",
        text(&path),
    ])
    .ok();
    let (_, after) = module(&pkg, name);
    for row in 0..out {
        for column in 0..width {
            let delta: f32 = (0..2)
                .map(|r| number("lora_B", row * 2 + r) * number("lora_A", r * width + column))
                .sum();
            let expected = before[row * width + column] + 3.0 * delta;
            let found = after[row * width + column];
            assert!(
                (found - expected).abs() < 1e-6,
                "[{row}, {column}]: {found} for {expected}"
            );
        }
    }
    assert_eq!(module(&pkg, "layers.0.attention.query.weight"), other);
    let manifest = lapidary(["info", text(&pkg), "--json"]).ok().json();
    assert_eq!(manifest["weights"]["refit"]["lora"], "adapter");
}

#[test]
fn a_fused_layer_changes_in_all_its_parts() {
    let folder = tempfile::tempdir().unwrap();
    let pkg = package(folder.path(), &export("gpt2-optimum"), &["--capacity", "32"]);
    let parts = ["query", "key", "value"].map(|m| format!("layers.0.attention.{m}.weight"));
    let before = parts.clone().map(|m| module(&pkg, &m).1);
    let path = folder.path().join("adapter");
    adapter(&path, &[("transformer.h.0.attn.c_attn", 96, 32)], CONFIG);
    lapidary([
        "refit",
        text(&pkg),
        "--from",
        text(&export("gpt2-optimum")),
        "--lora",
        text(&path),
    ])
    .ok();
    for (part, before) in before.iter().enumerate() {
        let after = module(&pkg, &parts[part]).1;
        let row = part * 32 + 5;
        let delta: f32 = (0..2)
            .map(|r| number("lora_B", row * 2 + r) * number("lora_A", r * 32 + 7))
            .sum();
        let at = 5 * 32 + 7;
        assert!((after[at] - before[at] - 3.0 * delta).abs() < 1e-6, "{}", parts[part]);
    }
}

#[test]
fn adapters_that_do_not_belong() {
    let folder = tempfile::tempdir().unwrap();
    let pkg = package(folder.path(), &export("llama-optimum"), &["--capacity", "32"]);
    let hash = set_hash(&pkg);
    let path = folder.path().join("adapter");
    let refused = |layers: &[(&str, usize, usize)], config: &str| {
        adapter(&path, layers, config);
        let model = export("llama-optimum");
        let run = lapidary(["refit", text(&pkg), "--from", text(&model), "--lora", text(&path)]);
        run.refused().0
    };
    let message = refused(&[("model.layers.7.self_attn.q_proj", 64, 32)], CONFIG);
    assert!(
        message.contains("the adapter changes model.layers.7.self_attn.q_proj"),
        "{message}"
    );
    let message = refused(&[("model.layers.0.self_attn.q_proj", 60, 32)], CONFIG);
    assert!(
        message.contains("the adapter changes model.layers.0.self_attn.q_proj"),
        "{message}"
    );
    let rank = CONFIG.replace("\"r\": 2", "\"r\": 4");
    let message = refused(&[("model.layers.0.self_attn.q_proj", 64, 32)], &rank);
    assert!(message.contains("do not have the rank 4"), "{message}");
    let pissa = CONFIG.replace("\"r\": 2", "\"r\": 2, \"init_lora_weights\": \"pissa\"");
    let message = refused(&[("model.layers.0.self_attn.q_proj", 64, 32)], &pissa);
    assert!(
        message.contains("init_lora_weights") && message.contains("PiSSA"),
        "{message}"
    );
    let other = CONFIG.replace("LORA", "IA3");
    assert!(refused(&[("model.layers.0.self_attn.q_proj", 64, 32)], &other).contains("IA3"));
    assert_eq!(set_hash(&pkg), hash);
}

/// Writes the tensors of an adapter.
fn tensors(folder: &Path, config: &str, tensors: &[(&str, Tensor)]) {
    std::fs::create_dir_all(folder).unwrap();
    std::fs::write(folder.join("adapter_config.json"), config).unwrap();
    let dtype = |tensor: &Tensor| match tensor.dtype() {
        DType::F32 => Dtype::F32,
        DType::F16 => Dtype::F16,
        DType::I32 => Dtype::I32,
        other => panic!("{other}"),
    };
    let views = tensors
        .iter()
        .map(|(name, t)| (*name, TensorView::new(dtype(t), t.shape().to_vec(), t.data()).unwrap()));
    let bytes = safetensors::serialize(views, None).unwrap();
    std::fs::write(folder.join("adapter_model.safetensors"), bytes).unwrap();
}

fn values(shape: &[usize], phase: f32) -> Tensor {
    let n: usize = shape.iter().product();
    let values: Vec<f32> = (0..n).map(|i| (i as f32 * phase + phase).sin()).collect();
    Tensor::from_f32(shape.to_vec(), &values)
}

const QUERY: &str = "base_model.model.model.layers.0.self_attn.q_proj";

/// A weight `[3, 4]` with the adapter's change, the weight, and the adapter's matrices of rank 2.
fn merged(config: &str, magnitude: Option<&str>, turned: bool) -> Result<[Vec<f64>; 5], String> {
    let folder = tempfile::tempdir().unwrap();
    let (a, b, m) = (values(&[2, 4], 0.7), values(&[3, 2], 1.3), values(&[3], 2.1));
    let mut all = vec![
        (format!("{QUERY}.lora_A.weight"), a.clone()),
        (format!("{QUERY}.lora_B.weight"), b.clone()),
    ];
    if let Some(end) = magnitude {
        all.push((format!("{QUERY}.lora_magnitude_vector{end}"), m.clone()));
    }
    let all: Vec<_> = all.iter().map(|(name, t)| (name.as_str(), t.clone())).collect();
    tensors(folder.path(), config, &all);
    let adapter = Adapter::open(folder.path()).map_err(|e| e.to_string())?;
    let weight = Constant::tensor(values(&[3, 4], 0.3));
    let stored = if turned {
        weight.transposed(&[1, 0])
    } else {
        weight.clone()
    };
    let (layer, change) = adapter.change_of("model.layers.0.self_attn.q_proj.weight").unwrap();
    assert_eq!(layer, "model.layers.0.self_attn.q_proj");
    assert_eq!(change.shape().to_vec(), stored.shape());
    let merged = change.merged(&stored);
    let merged = if turned { merged.transposed(&[1, 0]) } else { merged };
    let numbers = |c: &Constant| c.materialize().unwrap().to_f64();
    Ok([numbers(&merged), numbers(&weight), a.to_f64(), b.to_f64(), m.to_f64()])
}

/// `m_i (W + s B A)_i / ||(W + s B A)_i||`, in double precision, where `m` is given.
fn formula([_, w, a, b, m]: &[Vec<f64>; 5], scale: f64, dora: bool) -> Vec<f64> {
    let mut sum = w.clone();
    for row in 0..3 {
        for column in 0..4 {
            let product: f64 = (0..2).map(|r| b[row * 2 + r] * a[r * 4 + column]).sum();
            sum[row * 4 + column] += scale * product;
        }
        let norm: f64 = sum[row * 4..row * 4 + 4].iter().map(|v| v * v).sum::<f64>().sqrt();
        if dora {
            sum[row * 4..row * 4 + 4].iter_mut().for_each(|v| *v *= m[row] / norm);
        }
    }
    sum
}

fn close(found: &[f64], expected: &[f64]) {
    let near = found.iter().zip(expected).all(|(f, e)| (f - e).abs() < 1e-6);
    assert!(near, "{found:?} for {expected:?}");
}

#[test]
fn rank_stabilised_and_plain_scales() {
    let plain = merged(r#"{"r": 2, "lora_alpha": 6}"#, None, false).unwrap();
    close(&plain[0], &formula(&plain, 3.0, false));
    let stabilised = merged(r#"{"r": 2, "lora_alpha": 6, "use_rslora": true}"#, None, false).unwrap();
    close(&stabilised[0], &formula(&stabilised, 6.0 / 2f64.sqrt(), false));
    // PEFT writes null for unset values; alpha is then 8.
    let null = r#"{"peft_type": null, "r": 2, "lora_alpha": null, "alpha_pattern": null, "rank_pattern": null, "use_rslora": null}"#;
    let null = merged(null, None, false).unwrap();
    close(&null[0], &formula(&null, 4.0, false));
}

#[test]
fn dora_gives_rows_their_lengths() {
    let config = r#"{"r": 2, "lora_alpha": 6, "use_dora": true}"#;
    for end in ["", ".weight", ".default.weight"] {
        let found = merged(config, Some(end), false).unwrap();
        close(&found[0], &formula(&found, 3.0, true));
    }
    // A base that stores [in, out], like GPT-2: rows are those of the layer, not of the file.
    let turned = config.replace("\"r\": 2", "\"r\": 2, \"fan_in_fan_out\": true");
    let found = merged(&turned, Some(""), true).unwrap();
    close(&found[0], &formula(&found, 3.0, true));
    let stabilised = config.replace("\"r\": 2", "\"r\": 2, \"use_rslora\": true");
    let found = merged(&stabilised, Some(""), false).unwrap();
    close(&found[0], &formula(&found, 6.0 / 2f64.sqrt(), true));

    let message = merged(config, None, false).unwrap_err();
    assert!(message.contains("no lora_magnitude_vector"), "{message}");
    let message = merged(r#"{"r": 2, "lora_alpha": 6}"#, Some(""), false).unwrap_err();
    assert!(message.contains("use_dora"), "{message}");
}

/// The numbers of numpy's `m[:, None] * (W + s * B @ A) / np.linalg.norm(W + s * B @ A, axis=1, keepdims=True)`, which is what
/// PEFT's `DoraLinearVariant.merge_safe` computes.
#[test]
fn dora_in_numbers() {
    let folder = tempfile::tempdir().unwrap();
    let matrix = |shape: &[usize], values: &[f32]| Tensor::from_f32(shape.to_vec(), values);
    tensors(
        folder.path(),
        r#"{"r": 1, "lora_alpha": 2, "use_dora": true}"#,
        &[
            (&format!("{QUERY}.lora_A.weight"), matrix(&[1, 3], &[1.0, -2.0, 0.5])),
            (&format!("{QUERY}.lora_B.weight"), matrix(&[2, 1], &[0.5, -1.0])),
            (&format!("{QUERY}.lora_magnitude_vector"), matrix(&[2], &[2.0, 0.25])),
        ],
    );
    let adapter = Adapter::open(folder.path()).unwrap();
    let (_, change) = adapter.change_of("model.layers.0.self_attn.q_proj.weight").unwrap();
    let weight = Constant::tensor(matrix(&[2, 3], &[1.0, 4.0, 0.5, 2.0, -1.0, 3.0]));
    let found = change.merged(&weight).materialize().unwrap().to_f64();
    close(&found, &DORA);
}

/// A fused layer's rows keep their own lengths.
#[test]
fn dora_of_a_fused_layer() {
    let folder = tempfile::tempdir().unwrap();
    let pkg = package(folder.path(), &export("gpt2-optimum"), &["--capacity", "32"]);
    let parts = ["query", "key", "value"].map(|m| format!("layers.0.attention.{m}.weight"));
    let before = parts.clone().map(|m| module(&pkg, &m).1);
    let path = folder.path().join("adapter");
    let layer = "base_model.model.transformer.h.0.attn.c_attn";
    let (a, b, m) = (values(&[2, 32], 0.7), values(&[96, 2], 1.3), values(&[96], 2.1));
    tensors(
        &path,
        r#"{"peft_type": "LORA", "r": 2, "lora_alpha": 6, "use_dora": true, "fan_in_fan_out": true}"#,
        &[
            (&format!("{layer}.lora_A.weight"), a.clone()),
            (&format!("{layer}.lora_B.weight"), b.clone()),
            (&format!("{layer}.lora_magnitude_vector"), m.clone()),
        ],
    );
    let model = export("gpt2-optimum");
    lapidary(["refit", text(&pkg), "--from", text(&model), "--lora", text(&path)]).ok();
    let (a, b, m) = (a.to_f32(), b.to_f32(), m.to_f32());
    for (part, before) in before.iter().enumerate() {
        let after = module(&pkg, &parts[part]).1;
        for row in [0, 5, 31] {
            let of = part * 32 + row;
            let sum: Vec<f32> = (0..32)
                .map(|c| before[row * 32 + c] + 3.0 * (0..2).map(|r| b[of * 2 + r] * a[r * 32 + c]).sum::<f32>())
                .collect();
            let norm = sum.iter().map(|v| v * v).sum::<f32>().sqrt();
            for (c, v) in sum.iter().enumerate() {
                assert!(
                    (after[row * 32 + c] - m[of] * v / norm).abs() < 1e-5,
                    "{} {row} {c}",
                    parts[part]
                );
            }
        }
    }
}

#[test]
fn tensors_that_are_no_plain_adapter() {
    let folder = tempfile::tempdir().unwrap();
    let (a, b) = (values(&[2, 4], 0.7), values(&[3, 2], 1.3));
    let (name_a, name_b) = (format!("{QUERY}.lora_A.weight"), format!("{QUERY}.lora_B.weight"));
    let other = |end: &str| format!("{QUERY}.{end}");
    let whole = "base_model.model.lm_head.weight".to_string();
    let integers = Tensor::from_i64_as(DType::I32, vec![2, 4], &[1; 8]);
    for (extra, tensor, what) in [
        (whole.clone(), values(&[3, 4], 1.0), "lm_head"),
        (other("lora_embedding_A"), a.clone(), "lora_embedding_A"),
        (other("lora_B.bias"), values(&[3], 1.0), "lora_B.bias"),
        (other("lora_A.other.weight"), a.clone(), "lora_A.other"),
        (other("lora_A.default.weight"), a.clone(), "two tensors"),
        (other("base_layer.bias"), values(&[3], 1.0), "base_layer.bias"),
        (other("lora_diag"), values(&[2], 1.0), "lora_diag"),
        ("base_model.model.x.lora_A.weight".into(), a.clone(), "only one of"),
        ("base_model.model.x.lora_A.weight".into(), integers, "not floats"),
    ] {
        let all = [(&*name_a, a.clone()), (&*name_b, b.clone()), (&*extra, tensor)];
        tensors(folder.path(), r#"{"r": 2, "lora_alpha": 6}"#, &all);
        let message = Adapter::open(folder.path()).map(drop).unwrap_err().to_string();
        assert!(message.contains(what), "{extra}: {message}");
    }
}

/// Of [`dora_in_numbers`]: rows [2, 2, 1] and [0, 3, 2] before they get the lengths 2 and 0.25.
const DORA: [f64; 6] = [
    1.3333333333333333,
    1.3333333333333333,
    0.6666666666666666,
    0.0,
    0.20801257358446093,
    0.1386750490563073,
];
