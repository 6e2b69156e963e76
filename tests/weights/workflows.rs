//! The workflows of docs/guides/weights.md: build once, serve several. Engines are built, so this needs TensorRT-RTX:
//! `source scripts/setup.sh tensorrt`.

use std::path::Path;

use lapidary::backend::tensorrt::Library;
use serde_json::Value;

use crate::refit::{change, export, set_hash, tokens};
use crate::support::{lapidary, package, text};

fn engines(pkg: &Path) -> Vec<(String, Value)> {
    let info = lapidary(["info", text(pkg), "--json", "--check"]).ok().json();
    let engines = info["engines"].as_array().unwrap().iter();
    engines
        .map(|e| (e["file"].as_str().unwrap().to_string(), e["blake3"].clone()))
        .collect()
}

/// One build, ten fine-tuned models: every package has the same plans, stored once on disk, and its own weights.
#[test]
fn built_once_for_ten_fine_tunes() {
    let library = Library::load(None).unwrap_or_else(|e| panic!("{e}"));
    let folder = tempfile::tempdir().unwrap();
    let flags = "--target cpu,tensorrt-rtx --capacity 32 --prefill 8 --tensorrt-lib";
    let flags: Vec<&str> = flags.split(' ').chain([text(library.path())]).collect();
    let pkg = package(folder.path(), &export("llama-optimum"), &flags);
    let (built, hash, first) = (engines(&pkg), set_hash(&pkg), tokens(&pkg, "llama-optimum"));
    assert_eq!(built.len(), 2);

    let mut hashes = vec![hash.clone()];
    for tune in 1..=10u8 {
        let checkpoint = folder.path().join(format!("tune-{tune}"));
        lapidary(["weights", text(&pkg), "--export", text(&checkpoint)]).ok();
        let file = checkpoint.join("model.safetensors");
        change(&file, "lm_head.weight", |v| v * (1.0 + f32::from(tune)));
        change(&file, "model.layers.0.mlp.up_proj.weight", |v| {
            v - f32::from(tune) * 0.01
        });
        let served = folder.path().join(format!("serve-{tune}"));
        lapidary(["strip", text(&pkg), "-o", text(&served)]).ok();
        // No library is given: nothing is built.
        lapidary(["refit", text(&served), "--from", text(&checkpoint)]).ok();
        assert_eq!(engines(&served), built);
        for (file, _) in &built {
            use std::os::unix::fs::MetadataExt;
            let inode = |pkg: &Path| pkg.join(file).metadata().unwrap().ino();
            assert_eq!(inode(&served), inode(&pkg), "a copy costs no disk");
        }
        hashes.push(set_hash(&served));
        // Its current weights and their source.
        let listed = lapidary(["weights", text(&served), "--json"]).ok().json();
        assert_eq!(listed["refit"]["source"], format!("tune-{tune}"));
        let checked = lapidary(["weights", text(&served), "--check", text(&checkpoint), "--json"])
            .ok()
            .json();
        assert_eq!(checked["identical"], true);
    }
    hashes.sort();
    hashes.dedup();
    assert_eq!(hashes.len(), 11, "eleven weight sets");
    // The first is unchanged.
    assert_eq!((set_hash(&pkg), tokens(&pkg, "llama-optimum")), (hash, first));
}
