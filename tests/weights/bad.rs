//! Invalid weights: each is refused with one message that names every obstacle, and nothing is changed.

use std::path::{Path, PathBuf};

use lapidary::onnx::proto::ModelProto;
use prost::Message;
use safetensors::tensor::{Dtype, TensorView};
use serde_json::json;

use crate::refit::{change, export, set_hash};
use crate::support::{lapidary, names, package, text};

struct Bench {
    folder: tempfile::TempDir,
    pkg: PathBuf,
    file: PathBuf,
    hash: String,
}

/// A package and its weights as a checkpoint.
fn bench(flags: &[&str]) -> Bench {
    let folder = tempfile::tempdir().unwrap();
    let all: Vec<&str> = ["--capacity", "32"].into_iter().chain(flags.iter().copied()).collect();
    let pkg = package(folder.path(), &export("llama-optimum"), &all);
    let checkpoint = folder.path().join("hf");
    lapidary(["weights", text(&pkg), "--export", text(&checkpoint)]).ok();
    let hash = set_hash(&pkg);
    Bench {
        file: checkpoint.join("model.safetensors"),
        folder,
        pkg,
        hash,
    }
}

impl Bench {
    fn refused(&self, from: &Path, flags: &[&str]) -> (String, String) {
        let mut args = vec!["refit", text(&self.pkg), "--from", text(from)];
        args.extend(flags);
        let said = lapidary(args).refused();
        assert_eq!(set_hash(&self.pkg), self.hash, "nothing has changed");
        let leftovers: Vec<_> = names(self.folder.path())
            .into_iter()
            .filter(|n| n.starts_with('.'))
            .collect();
        assert!(leftovers.is_empty(), "{leftovers:?}");
        said
    }

    /// The checkpoint with its tensors passed through `f`: name and shape in, whether to keep it.
    fn rewritten(&self, mut f: impl FnMut(&mut String, &mut Vec<usize>) -> bool) -> PathBuf {
        let bytes = std::fs::read(&self.file).unwrap();
        let parsed = safetensors::SafeTensors::deserialize(&bytes).unwrap();
        let mut kept = Vec::new();
        for (name, view) in parsed.iter() {
            let (mut name, mut shape) = (name.to_string(), view.shape().to_vec());
            if f(&mut name, &mut shape) {
                kept.push((name, TensorView::new(view.dtype(), shape, view.data()).unwrap()));
            }
        }
        let path = self.folder.path().join("other.safetensors");
        std::fs::write(&path, safetensors::serialize(kept, None).unwrap()).unwrap();
        path
    }
}

#[test]
fn all_that_is_missing_extra_or_of_another_shape_in_one_message() {
    let bench = bench(&[]);
    let other = bench.rewritten(|name, shape| match name.as_str() {
        "model.layers.0.self_attn.k_proj.weight" | "model.norm.weight" => false,
        "model.layers.1.mlp.down_proj.weight" => {
            shape.reverse();
            true
        }
        "model.layers.0.mlp.up_proj.weight" => {
            *name = "vision_tower.up.weight".to_string();
            true
        }
        _ => true,
    });
    let (message, help) = bench.refused(&other, &[]);
    for part in [
        "missing: model.layers.0.self_attn.k_proj.weight",
        "missing: model.norm.weight",
        "missing: model.layers.0.mlp.up_proj.weight",
        "does not fit: model.layers.1.mlp.down_proj.weight",
        "the transpose of it",
        "not used: vision_tower.up.weight",
    ] {
        assert!(message.contains(part), "{part}: {message}");
    }
    assert!(help.contains("lapidary weights"), "{help}");
}

#[test]
fn extra_tensors_are_named_and_can_be_ignored() {
    let bench = bench(&[]);
    let data = [0u8; 8];
    let bytes = std::fs::read(&bench.file).unwrap();
    let parsed = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let mut all: Vec<(String, TensorView)> = parsed.iter().map(|(n, v)| (n.to_string(), v)).collect();
    all.push((
        "adapter.gate".into(),
        TensorView::new(Dtype::F32, vec![2], &data).unwrap(),
    ));
    // Buffers of older checkpoints are ignored.
    all.push((
        "model.layers.0.self_attn.rotary_emb.inv_freq".into(),
        TensorView::new(Dtype::F32, vec![2], &data).unwrap(),
    ));
    let path = bench.folder.path().join("extra.safetensors");
    std::fs::write(&path, safetensors::serialize(all, None).unwrap()).unwrap();
    let (message, help) = bench.refused(&path, &[]);
    assert!(
        message.contains("not used: adapter.gate") && !message.contains("inv_freq"),
        "{message}"
    );
    assert!(help.contains("--ignore-extra"), "{help}");
    lapidary(["refit", text(&bench.pkg), "--from", text(&path), "--ignore-extra"]).ok();
    assert_eq!(set_hash(&bench.pkg), bench.hash);
}

#[test]
fn another_architecture() {
    let bench = bench(&[]);
    for other in ["gpt2-optimum", "qwen3-optimum"] {
        let (message, _) = bench.refused(&export(other), &[]);
        assert!(
            message.contains("not the weights of this package"),
            "{other}: {message}"
        );
    }
}

#[test]
fn numbers_no_model_can_use() {
    let nan = bench(&[]);
    change(&nan.file, "model.layers.0.mlp.up_proj.weight", |v| {
        if v > 0.0 { f32::NAN } else { v }
    });
    let (message, help) = nan.refused(&nan.file, &[]);
    assert!(message.contains("are NaN or infinite in the source"), "{message}");
    assert!(help.contains("--allow-nonfinite"), "{help}");
    lapidary(["refit", text(&nan.pkg), "--from", text(&nan.file), "--allow-nonfinite"]).ok();
    assert_ne!(set_hash(&nan.pkg), nan.hash);

    let half = bench(&["--dtype", "fp16"]);
    let full = bench(&[]);
    change(&full.file, "model.layers.1.self_attn.o_proj.weight", |v| {
        if v > 0.0 { 1e5 } else { v }
    });
    let (message, _) = half.refused(&full.file, &[]);
    assert!(message.contains("too large for f16: the largest is 1e5"), "{message}");
    half.refused(&full.file, &["--allow-nonfinite"]);
    lapidary(["refit", text(&half.pkg), "--from", text(&full.file), "--allow-overflow"]).ok();
}

/// An export whose largest weight has other values, and that weight's name.
fn poisoned(to: &Path, numbers: [f32; 2]) -> String {
    let mut model = ModelProto::decode(std::fs::read(export("llama-optimum")).unwrap().as_slice()).unwrap();
    let graph = model.graph.as_mut().unwrap();
    let weights = graph.initializer.iter_mut().filter(|t| t.dims.len() == 2);
    let weight = weights
        .max_by_key(|t| t.raw_data.as_ref().map_or(0, |d| d.len()))
        .unwrap();
    let mut bytes = weight.raw_data.take().expect("weights lie in the file").to_vec();
    for (i, number) in numbers.into_iter().enumerate() {
        bytes[i * 4000..][..4].copy_from_slice(&number.to_le_bytes());
    }
    weight.raw_data = Some(bytes.into());
    let name = weight.name.clone().unwrap();
    std::fs::write(to, model.encode_to_vec()).unwrap();
    name
}

#[test]
fn numbers_no_model_can_use_do_not_get_into_a_package() {
    let folder = tempfile::tempdir().unwrap();
    let (model, pkg) = (folder.path().join("model.onnx"), folder.path().join("pkg"));
    let convert = |flags: &[&str]| {
        let mut args = vec!["convert", text(&model), "-o", text(&pkg), "--capacity", "16"];
        args.extend(flags);
        lapidary(args)
    };
    for (numbers, flags, said, remedy) in [
        (
            [f32::NAN, f32::NEG_INFINITY],
            &[][..],
            "2 of 3104 values",
            "--allow-nonfinite",
        ),
        (
            [f32::NAN, f32::INFINITY],
            &["--dtype", "fp16"],
            "NaN or infinite in the source",
            "--allow-nonfinite",
        ),
        (
            [f32::NAN, 1e6],
            &["--dtype", "fp16", "--allow-nonfinite"],
            "(1e6)",
            "--allow-overflow",
        ),
        (
            [f32::NAN, 1e6],
            &["--dtype", "fp16", "--allow-overflow"],
            "1 of 3104 values",
            "--allow-nonfinite",
        ),
        (
            [1e6, -7e4],
            &["--dtype", "fp16"],
            "f16 cannot hold these constants",
            "--allow-overflow",
        ),
    ] {
        let name = poisoned(&model, numbers);
        let (message, help) = convert(flags).refused();
        for part in [said, name.as_str(), "model.onnx"] {
            assert!(message.contains(part), "{part}: {message}");
        }
        assert!(help.contains(remedy), "{help}");
        assert_eq!(names(folder.path()), ["model.onnx"], "nothing is left behind");
        let dtype = flags.iter().copied().filter(|f| !f.starts_with("--allow"));
        let once: Vec<&str> = dtype.chain(["--allow-nonfinite", "--allow-overflow"]).collect();
        convert(&once).ok();
        std::fs::remove_dir_all(&pkg).unwrap();
    }
    // bfloat16 has room for it.
    poisoned(&model, [1e6, -7e4]);
    convert(&["--dtype", "bf16"]).ok();
}

#[test]
fn a_bfloat16_checkpoint_that_fp16_has_no_room_for() {
    let half = bench(&["--dtype", "fp16"]);
    let bytes = std::fs::read(&half.file).unwrap();
    let parsed = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let name = "model.layers.1.mlp.down_proj.weight";
    let converted: Vec<(String, Vec<usize>, Vec<u8>)> = parsed
        .iter()
        .map(|(tensor, view)| {
            let values = view
                .data()
                .as_chunks::<2>()
                .0
                .iter()
                .map(|b| half::f16::from_le_bytes(*b).to_f32());
            let mut values: Vec<f32> = values.collect();
            if tensor == name {
                values[7] = -3e38;
            }
            let bytes = values
                .iter()
                .flat_map(|v| half::bf16::from_f32(*v).to_le_bytes())
                .collect();
            (tensor.to_string(), view.shape().to_vec(), bytes)
        })
        .collect();
    let views = converted
        .iter()
        .map(|(name, shape, data)| (name.clone(), TensorView::new(Dtype::BF16, shape.clone(), data).unwrap()));
    let path = half.folder.path().join("bf16.safetensors");
    std::fs::write(&path, safetensors::serialize(views, None).unwrap()).unwrap();
    let (message, help) = half.refused(&path, &[]);
    assert!(message.contains("layers.1.mlp.down_proj"), "{message}");
    assert!(
        message.contains("1 of 1536 values") && message.contains("too large for f16"),
        "{message}"
    );
    assert!(help.contains("--allow-overflow"), "{help}");
}

#[test]
fn files_that_lie() {
    let bench = bench(&[]);
    let good = std::fs::read(&bench.file).unwrap();
    let write = |name: &str, bytes: &[u8]| {
        let path = bench.folder.path().join(name);
        std::fs::write(&path, bytes).unwrap();
        path
    };
    let with_header = |header: &str, data: &[u8]| {
        let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
        bytes.extend(header.as_bytes());
        bytes.extend(data);
        bytes
    };
    let f32s = |from: usize, to: usize| json!({"dtype": "F32", "shape": [2], "data_offsets": [from, to]}).to_string();
    for (name, bytes, part) in [
        ("short.safetensors", good[..good.len() / 2].to_vec(), "truncated"),
        ("tiny.safetensors", vec![1, 2, 3], "fewer than 8 bytes"),
        (
            "header.safetensors",
            u64::MAX.to_le_bytes().to_vec(),
            "not a valid safetensors file",
        ),
        (
            "offsets.safetensors",
            with_header(&format!("{{\"a\": {}}}", f32s(4, 12)), &[0; 8]),
            "not a valid safetensors file",
        ),
        (
            "shape.safetensors",
            with_header(&format!("{{\"a\": {}}}", f32s(0, 4)), &[0; 4]),
            "not a valid safetensors file",
        ),
        (
            "twice.safetensors",
            with_header(&format!("{{\"a\": {0}, \"a\": {0}}}", f32s(0, 8)), &[0; 8]),
            "two tensors called \"a\"",
        ),
        ("weights.bin", vec![0; 64], "PyTorch pickle"),
        ("weights.txt", vec![0; 64], "neither .onnx nor .safetensors"),
    ] {
        let path = write(name, &bytes);
        let (message, _) = bench.refused(&path, &[]);
        assert!(message.contains(part) && message.contains(name), "{name}: {message}");
    }
    bench.refused(&bench.folder.path().join("not-there.safetensors"), &[]);
}

#[test]
fn an_index_that_leads_elsewhere() {
    let bench = bench(&[]);
    let folder = bench.folder.path().join("model");
    std::fs::create_dir(&folder).unwrap();
    let index = folder.join("model.safetensors.index.json");
    for (shard, part) in [
        ("../hf/model.safetensors", "outside its folder"),
        ("/etc/passwd", "outside its folder"),
        ("gone.safetensors", "gone.safetensors"),
    ] {
        let map = json!({"weight_map": {"model.norm.weight": shard}});
        std::fs::write(&index, map.to_string()).unwrap();
        let (message, _) = bench.refused(&folder, &[]);
        assert!(message.contains(part), "{message}");
    }
    std::fs::write(&index, "{").unwrap();
    assert!(bench.refused(&folder, &[]).0.contains("not a valid index"));
    std::fs::remove_file(&index).unwrap();
    assert!(bench.refused(&folder, &[]).0.contains("holds no .safetensors"));
}

#[test]
fn a_tied_head_that_is_not_the_embedding() {
    let folder = tempfile::tempdir().unwrap();
    let pkg = package(folder.path(), &export("qwen2-optimum"), &["--capacity", "32"]);
    let checkpoint = folder.path().join("hf");
    lapidary(["weights", text(&pkg), "--export", text(&checkpoint)]).ok();
    let bytes = std::fs::read(checkpoint.join("model.safetensors")).unwrap();
    let parsed = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let embedding = parsed.tensor("model.embed_tokens.weight").unwrap();
    let other: Vec<u8> = embedding.data().iter().rev().copied().collect();
    for (data, fits) in [(embedding.data().to_vec(), true), (other, false)] {
        let head = TensorView::new(embedding.dtype(), embedding.shape().to_vec(), &data).unwrap();
        let mut all: Vec<(String, TensorView)> = parsed.iter().map(|(n, v)| (n.to_string(), v)).collect();
        all.push(("lm_head.weight".into(), head));
        let path = folder.path().join("headed.safetensors");
        std::fs::write(&path, safetensors::serialize(all, None).unwrap()).unwrap();
        let run = lapidary(["refit", text(&pkg), "--from", text(&path)]);
        match fits {
            true => drop(run.ok()),
            false => assert!(run.refused().0.contains("not used: lm_head.weight")),
        }
    }
}

/// Shapes cannot distinguish a square matrix from its transpose; the hashes of the package's weights can.
#[test]
fn transposed_twice() {
    let folder = tempfile::tempdir().unwrap();
    let pkg = package(folder.path(), &export("gpt2-optimum"), &["--capacity", "32"]);
    let (hash, checkpoint) = (set_hash(&pkg), folder.path().join("hf"));
    lapidary(["weights", text(&pkg), "--export", text(&checkpoint), "--format", "gpt2"]).ok();
    let bytes = std::fs::read(checkpoint.join("model.safetensors")).unwrap();
    let parsed = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let name = "transformer.h.0.attn.c_proj.weight";
    let matrix = parsed.tensor(name).unwrap();
    let [n, columns] = matrix.shape()[..] else {
        panic!("a matrix")
    };
    assert_eq!(n, columns);
    let numbers = matrix.data().as_chunks::<4>().0;
    let turned: Vec<u8> = (0..n * n).flat_map(|i| numbers[i % n * n + i / n]).collect();
    let all = parsed.iter().map(|(other, view)| {
        let data = if other == name { &turned } else { view.data() };
        (
            other,
            TensorView::new(view.dtype(), view.shape().to_vec(), data).unwrap(),
        )
    });
    let file = folder.path().join("turned.safetensors");
    std::fs::write(&file, safetensors::serialize(all, None).unwrap()).unwrap();

    let checked = lapidary(["weights", text(&pkg), "--check", text(&file), "--json"])
        .ok()
        .json();
    assert_eq!(checked["different"].as_array().unwrap().len(), 1);
    assert_eq!(checked["transposed"], checked["different"]);
    let told = lapidary(["weights", text(&pkg), "--check", text(&file)]).ok().stdout;
    assert!(told.contains("is the transpose of what the package had"), "{told}");
    let (message, _) = lapidary(["refit", text(&pkg), "--from", text(&file), "--mode", "identical"]).refused();
    assert!(
        message.contains("is the transpose of what the package had"),
        "{message}"
    );
    assert_eq!(set_hash(&pkg), hash);
}
