//! A cache of plans from earlier conversions: an engine with the same input for TensorRT is not built twice.
//!
//! The key is a hash over the network (every layer, shape, name and small constant), how its weights enter, the refit
//! mode, the code that builds the plan, the library's version, and with full TensorRT the GPU. If the plan depends on
//! the weights' values, because it contains them or accepts no others in a refit, their hash is part of the key too. So
//! an identical refit never gets a plan for other weights, and a general or bound plan is reused for every fine-tuned
//! model.

use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use super::staging::{sweep, temporary_name};
use crate::backend::tensorrt::{BuildOptions, EMITTER};
use crate::network::{LayerKind, Network, WeightMode};
use crate::target::Refit;

/// A folder of plans.
#[derive(Clone, Debug)]
pub struct PlanCache {
    folder: PathBuf,
}

impl PlanCache {
    pub fn new(folder: &Path) -> Self {
        PlanCache {
            folder: folder.to_path_buf(),
        }
    }

    /// `fits`: see [`Library::fits`](crate::backend::tensorrt::Library::fits). `weights`: a hash of all weights and
    /// tables of the package.
    pub fn key(network: &Network, options: &BuildOptions, fits: &str, weights: &str) -> String {
        let mut hasher = blake3::Hasher::new();
        let mut part = |bytes: &[u8]| {
            hasher.update(&(bytes.len() as u64).to_le_bytes());
            hasher.update(bytes);
        };
        part(EMITTER.as_bytes());
        part(network.to_string().as_bytes());
        // The text omits long constants.
        for layer in &network.layers {
            if let LayerKind::Constant(tensor) = &layer.kind {
                part(tensor.data());
            }
        }
        let refit = options.refit;
        part(format!("{refit:?} {fits}").as_bytes());
        if options.decode_profile {
            part(b"a profile for decoding too");
        }
        let holds = |mode: WeightMode| match mode {
            WeightMode::Bind => false,
            WeightMode::Embed => true,
            // Stripped engines that are not built for a general refit take back only the values they were built with.
            WeightMode::Strip => refit != Refit::General,
        };
        if network.weights.iter().any(|w| holds(w.mode)) {
            part(weights.as_bytes());
        }
        hasher.finalize().to_hex().to_string()
    }

    fn path(&self, key: &str) -> PathBuf {
        self.folder.join(format!("{key}.plan"))
    }

    /// A cached plan; a damaged one counts as missing.
    pub fn get(&self, key: &str) -> Option<Vec<u8>> {
        let bytes = fs::read(self.path(key)).ok()?;
        let (hash, plan) = bytes.split_at_checked(blake3::OUT_LEN)?;
        (blake3::hash(plan).as_bytes() == hash).then(|| plan.to_vec())
    }

    /// Stores a plan. Others may write the same one at the same time: each writes its own file and renames it.
    pub fn put(&self, key: &str, plan: &[u8]) -> io::Result<()> {
        fs::create_dir_all(&self.folder)?;
        let temporary = temporary_name(key);
        sweep(&self.folder, &temporary);
        let temporary = self.folder.join(temporary);
        let written = fs::File::create(&temporary).and_then(|mut file| {
            file.write_all(blake3::hash(plan).as_bytes())?;
            file.write_all(plan)
        });
        written
            .and_then(|()| fs::rename(&temporary, self.path(key)))
            .inspect_err(|_| drop(fs::remove_file(&temporary)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lower::synthetic::Decoder;
    use crate::lower::{LowerOptions, lower};
    use crate::network::Profile;

    fn network(mode: WeightMode, capacity: usize) -> Network {
        let options = LowerOptions {
            weight_mode: mode,
            ..LowerOptions::default()
        };
        lower(&Decoder::tiny().graph(), &Profile::decode(capacity), &options).unwrap()
    }

    #[test]
    fn the_key_has_the_weights_only_where_they_matter() {
        let [version, later] = ["TensorRT-RTX 1.6.1", "TensorRT-RTX 1.7.0"];
        let options = |refit| BuildOptions {
            refit,
            ..BuildOptions::default()
        };
        let key = |mode, refit, weights| PlanCache::key(&network(mode, 16), &options(refit), version, weights);
        for (mode, refit, depends) in [
            (WeightMode::Bind, Refit::None, false),
            (WeightMode::Bind, Refit::Identical, false),
            (WeightMode::Embed, Refit::None, true),
            (WeightMode::Embed, Refit::General, true),
            (WeightMode::Strip, Refit::General, false),
            (WeightMode::Strip, Refit::Identical, true),
            (WeightMode::Strip, Refit::None, true),
        ] {
            let same = key(mode, refit, "one") == key(mode, refit, "two");
            assert_eq!(same, !depends, "{mode:?} {refit:?}");
        }
        let all = [Refit::None, Refit::General, Refit::Identical].map(|refit| key(WeightMode::Strip, refit, "one"));
        assert!(all[0] != all[1] && all[1] != all[2] && all[0] != all[2]);
        let other = PlanCache::key(&network(WeightMode::Bind, 32), &options(Refit::None), version, "one");
        assert_ne!(other, key(WeightMode::Bind, Refit::None, "one"));
        let newer = PlanCache::key(&network(WeightMode::Bind, 16), &options(Refit::None), later, "one");
        assert_ne!(newer, key(WeightMode::Bind, Refit::None, "one"));
    }

    #[test]
    fn a_damaged_plan_is_none() {
        let folder = tempfile::tempdir().unwrap();
        let cache = PlanCache::new(&folder.path().join("plans"));
        assert_eq!(cache.get("k"), None);
        cache.put("k", b"a plan").unwrap();
        assert_eq!(cache.get("k").unwrap(), b"a plan");
        let path = folder.path().join("plans/k.plan");
        let mut bytes = fs::read(&path).unwrap();
        bytes.pop();
        fs::write(&path, &bytes).unwrap();
        assert_eq!(cache.get("k"), None);
        // An unfinished file of a killed process is removed when the same plan is stored: no process has this id.
        fs::write(folder.path().join("plans/.k.lapidary-4194305"), "half").unwrap();
        cache.put("k", b"a plan").unwrap();
        assert_eq!(fs::read_dir(folder.path().join("plans")).unwrap().count(), 1);
    }
}
