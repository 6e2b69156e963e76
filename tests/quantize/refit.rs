//! Refits of quantized packages: floats are quantized again, codes must fit or are refused by name.

use std::path::{Path, PathBuf};

use lapidary::package::Package;
use safetensors::tensor::{Dtype, TensorView};

use crate::packages::{converted, export};
use crate::support::{lapidary, text};

fn set_hash(pkg: &Path) -> String {
    Package::open(pkg).unwrap().manifest.weights.set_hash
}

fn forms(pkg: &Path) -> Vec<Option<String>> {
    let weights = Package::open(pkg).unwrap().manifest.weights.tensors;
    weights
        .iter()
        .map(|w| w.quantized.as_ref().map(|q| q.to_string()))
        .collect()
}

/// A checkpoint in floating point of the same model, every number of one matrix times `factor`.
fn checkpoint(folder: &Path, factor: f32) -> PathBuf {
    let float = converted(&export("llama-optimum"), folder, &format!("float-{factor}"), "");
    let to = folder.join(format!("checkpoint-{factor}"));
    lapidary(["weights", text(&float.folder), "--export", text(&to)]).ok();
    let file = to.join("model.safetensors");
    let bytes = std::fs::read(&file).unwrap();
    let parsed = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let tensors: Vec<(String, Vec<usize>, Vec<u8>)> = parsed
        .iter()
        .map(|(name, view)| {
            let numbers = view.data().as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b));
            let by = if name.contains("layers.0.mlp.up_proj") {
                factor
            } else {
                1.0
            };
            let data = numbers.flat_map(|v| (v * by).to_le_bytes()).collect();
            (name.to_string(), view.shape().to_vec(), data)
        })
        .collect();
    let views = tensors.iter().map(|(name, shape, data)| {
        let view = TensorView::new(Dtype::F32, shape.clone(), data).unwrap();
        (name.as_str(), view)
    });
    std::fs::write(&file, safetensors::serialize(views, None).unwrap()).unwrap();
    to
}

#[test]
fn floats_become_codes_of_the_same_format() {
    let folder = tempfile::tempdir().unwrap();
    let model = export("llama-optimum");
    let same = checkpoint(folder.path(), 1.0);
    let other = checkpoint(folder.path(), 3.0);
    for (i, spec) in ["int4", "\"int8,asymmetric,group=16\"", "fp8"].into_iter().enumerate() {
        let package = converted(&model, folder.path(), &format!("pkg-{i}"), &format!("quantize: {spec}"));
        let (pkg, hash) = (package.folder.as_path(), package.manifest.weights.set_hash.clone());
        let before = forms(pkg);
        // From the export, and from a checkpoint of the same values: the same codes.
        for from in [model.as_path(), same.as_path()] {
            let checked = lapidary(["weights", text(pkg), "--check", text(from), "--json"])
                .ok()
                .json();
            assert_eq!(checked["identical"], true, "{spec}");
            lapidary(["refit", text(pkg), "--from", text(from), "--mode", "identical"]).ok();
            assert_eq!((set_hash(pkg), forms(pkg)), (hash.clone(), before.clone()), "{spec}");
        }
        // Other values give other codes in the same format.
        lapidary(["refit", text(pkg), "--from", text(&other)]).ok();
        assert_ne!(set_hash(pkg), hash, "{spec}");
        assert_eq!(forms(pkg), before, "{spec}");
        Package::open(pkg).unwrap().check_hashes().unwrap();
        // After stripping it can be refitted.
        let bare = folder.path().join(format!("bare-{i}"));
        lapidary(["strip", text(pkg), "-o", text(&bare)]).ok();
        lapidary(["refit", text(&bare), "--from", text(&same)]).ok();
        assert_eq!((set_hash(&bare), forms(&bare)), (hash, before), "{spec}");
    }
}

#[test]
fn a_package_made_without_weights_is_filled() {
    let folder = tempfile::tempdir().unwrap();
    let (pkg, whole) = (folder.path().join("pkg"), folder.path().join("whole"));
    let model = export("llama-optimum");
    let args = ["--quantize", "int4", "--capacity", "32"];
    lapidary([&["convert", text(&model), "-o", text(&whole)], &args[..]].concat()).ok();
    lapidary(
        [
            &["convert", text(&model), "-o", text(&pkg), "--without-weights"],
            &args[..],
        ]
        .concat(),
    )
    .ok();
    // The export contains its weights, so the refit was complete; the weight set shows it.
    if !Package::open(&pkg).unwrap().manifest.weights.stripped {
        assert_eq!(set_hash(&pkg), set_hash(&whole));
        return;
    }
    lapidary(["refit", text(&pkg), "--from", text(&model)]).ok();
    assert_eq!(set_hash(&pkg), set_hash(&whole));
}

#[test]
fn codes_of_another_format_are_named() {
    let folder = tempfile::tempdir().unwrap();
    let model = export("llama-optimum");
    let int4 = converted(&model, folder.path(), "int4", "quantize: int4");
    let int8 = converted(&model, folder.path(), "int8", "quantize: int8");
    let hash = int4.manifest.weights.set_hash.clone();
    let (message, _) = lapidary(["refit", text(&int4.folder), "--from", text(&int8.folder)]).refused();
    assert!(
        message.contains("it is f32 of i8 in blocks of 32 on axis 1, and the package's is i4 in blocks of "),
        "{message}"
    );
    assert_eq!(set_hash(&int4.folder), hash, "nothing was written");
    // Codes in the same format are used unchanged.
    let other = converted(
        &export("llama-dynamo-opset18"),
        folder.path(),
        "other",
        "quantize: int4",
    );
    lapidary(["refit", text(&other.folder), "--from", text(&int4.folder)]).ok();
    let codes = |package: &Package| {
        let weights = package
            .manifest
            .weights
            .tensors
            .iter()
            .filter(|w| w.quantized.is_some());
        let mut hashes: Vec<String> = weights.map(|w| w.blake3.clone()).collect();
        hashes.sort();
        hashes
    };
    assert_eq!(codes(&Package::open(&other.folder).unwrap()), codes(&int4));
}

/// A LoRA adapter of rank 2 for the queries of the first layer, `[64, 32]`.
fn adapter(folder: &Path) -> PathBuf {
    let at = folder.join("adapter");
    std::fs::create_dir_all(&at).unwrap();
    let config = r#"{"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}"#;
    std::fs::write(at.join("adapter_config.json"), config).unwrap();
    let numbers = |count: u8, phase: f32| -> Vec<u8> {
        let values = (0..count).map(|i| (f32::from(i) * phase).sin() * 0.5);
        values.flat_map(f32::to_le_bytes).collect()
    };
    let (a, b) = (numbers(64, 0.7), numbers(128, 1.3));
    let name = |half: &str| format!("base_model.model.model.layers.0.self_attn.q_proj.{half}.weight");
    let views = [
        (name("lora_A"), TensorView::new(Dtype::F32, vec![2, 32], &a).unwrap()),
        (name("lora_B"), TensorView::new(Dtype::F32, vec![64, 2], &b).unwrap()),
    ];
    std::fs::write(
        at.join("adapter_model.safetensors"),
        safetensors::serialize(views, None).unwrap(),
    )
    .unwrap();
    at
}

#[test]
fn an_adapter_needs_floats_or_leave_to_quantize_again() {
    let folder = tempfile::tempdir().unwrap();
    let model = export("llama-optimum");
    let pkg = converted(&model, folder.path(), "pkg", "quantize: int8").folder;
    let (hash, before) = (set_hash(&pkg), forms(&pkg));
    let adapter = adapter(folder.path());
    let lora = ["--lora", text(&adapter)];
    let own = [&["refit", text(&pkg), "--from", text(&pkg)], &lora[..]].concat();
    let (message, _) = lapidary(own.clone()).refused();
    assert!(
        message.contains("and it is quantized (f32 of i8 in blocks of 32 on axis 1)")
            && message.contains("--requantize"),
        "{message}"
    );
    assert_eq!(set_hash(&pkg), hash);
    lapidary([&own[..], &["--requantize"]].concat()).ok();
    let again = set_hash(&pkg);
    assert_ne!(again, hash);
    assert_eq!(forms(&pkg), before);
    // From floats the sum is rounded once, and needs no flag.
    lapidary([&["refit", text(&pkg), "--from", text(&model)], &lora[..]].concat()).ok();
    assert_ne!(set_hash(&pkg), hash);
    assert_eq!(forms(&pkg), before);
}
