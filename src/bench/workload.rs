//! Prompts of a benchmark: from a file that all systems share, or from a seed.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::result::PromptHash;
use crate::help::Help;

/// Lengths of the prompts whose outputs are recorded, if no file says otherwise.
const LENGTHS: [usize; 3] = [1, 17, 128];
/// Length of the timed prompt, if no file says otherwise; more if required.
const TIMED: usize = 8192;

/// Prompts of a benchmark.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Workload {
    pub seed: u64,
    /// Prefill, decode and end-to-end runs use the beginning of it.
    pub timed: Vec<u32>,
    /// Prompts for recorded outputs.
    pub prompts: Vec<Vec<u32>>,
    /// For each prompt, tokens to feed after it while logits are recorded: a reference's, so that all systems see the same.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub forced: Option<Vec<Vec<u32>>>,
}

#[derive(Debug, thiserror::Error)]
pub enum WorkloadError {
    #[error("{}: {source}", path.display())]
    Io { path: PathBuf, source: std::io::Error },
    #[error("{}: {message}", path.display())]
    Invalid { path: PathBuf, message: String },
    #[error("the timed prompt has {has} tokens, but {wanted} are required")]
    TooShort { has: usize, wanted: usize },
}

impl Help for WorkloadError {
    fn help(&self) -> Option<String> {
        let help = match self {
            WorkloadError::TooShort { .. } => "give a --prompts file with a longer one, or ask for less",
            WorkloadError::Io { .. } | WorkloadError::Invalid { .. } => {
                "--prompts wants {\"seed\": S, \"timed\": [ids], \"prompts\": [[ids], …]}"
            }
        };
        Some(help.to_string())
    }
}

impl Workload {
    /// Prompts from the [`ids`] of a seed: at least `longest` tokens for timing, and a few lengths that leave `room` of
    /// `capacity` for outputs.
    pub fn of_seed(seed: u64, vocabulary: usize, longest: usize, capacity: usize, room: usize) -> Self {
        let fitting = LENGTHS.into_iter().filter(|n| n + room <= capacity);
        Workload {
            seed,
            timed: ids(seed, vocabulary, longest.max(TIMED)),
            prompts: fitting.map(|n| ids(seed, vocabulary, n)).collect(),
            forced: None,
        }
    }

    /// `{"seed": s, "timed": [ids], "prompts": [[ids], …], "forced": [[ids], …]}`, as written by `scripts/baselines/`.
    pub fn read(path: &Path, vocabulary: usize) -> Result<Self, WorkloadError> {
        let invalid = |message: String| WorkloadError::Invalid {
            path: path.to_path_buf(),
            message,
        };
        let text = std::fs::read_to_string(path).map_err(|source| WorkloadError::Io {
            path: path.to_path_buf(),
            source,
        })?;
        let mut json = serde_json::Deserializer::from_str(&text);
        let workload: Workload =
            serde_path_to_error::deserialize(&mut json).map_err(|e| invalid(format!("{}: {}", e.path(), e.inner())))?;
        if workload.prompts.iter().chain([&workload.timed]).any(Vec::is_empty) {
            return Err(invalid("holds a prompt without tokens".into()));
        }
        let forced = workload.forced.as_ref();
        if forced.is_some_and(|forced| forced.len() != workload.prompts.len()) {
            return Err(invalid("has not as many `forced` as `prompts`".into()));
        }
        let all = workload.prompts.iter().chain(forced.into_iter().flatten()).flatten();
        let all = all.chain(&workload.timed);
        if let Some(id) = all.copied().find(|id| *id as usize >= vocabulary) {
            return Err(invalid(format!(
                "holds the token {id}, and the model's vocabulary is {vocabulary}"
            )));
        }
        Ok(workload)
    }

    /// The first `n` ids of the timed prompt.
    pub fn prompt(&self, n: usize) -> Result<&[u32], WorkloadError> {
        self.timed.get(..n).ok_or(WorkloadError::TooShort {
            has: self.timed.len(),
            wanted: n,
        })
    }

    /// The prompts' description in a result.
    pub fn hashes(&self) -> Vec<PromptHash> {
        let all = std::iter::once(&self.timed).chain(&self.prompts);
        all.map(|ids| prompt_hash(ids)).collect()
    }
}

/// Token ids of a seed; shorter lists are prefixes of longer ones: the i-th is `3 + z % (vocabulary - 3)`, `z` being
/// output `seed * 2^32 + i` of SplitMix64 from state 0 (Steele, Lea and Flood, "Fast Splittable Pseudorandom Number
/// Generators", 2014). The first three ids, often special tokens, are not used if there are more.
pub fn ids(seed: u64, vocabulary: usize, n: usize) -> Vec<u32> {
    let first = if vocabulary > 3 { 3 } else { 0 };
    let range = (vocabulary - first) as u64;
    let id = |i: usize| {
        let state = (seed << 32)
            .wrapping_add(i as u64 + 1)
            .wrapping_mul(0x9e37_79b9_7f4a_7c15);
        let z = (state ^ (state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        first as u32 + ((z ^ (z >> 31)) % range) as u32
    };
    (0..n).map(id).collect()
}

/// A prompt's identification in a result.
pub fn prompt_hash(ids: &[u32]) -> PromptHash {
    let bytes: Vec<u8> = ids.iter().flat_map(|id| id.to_le_bytes()).collect();
    let digest = Sha256::digest(&bytes);
    PromptHash {
        tokens: ids.len(),
        sha256: digest.iter().map(|byte| format!("{byte:02x}")).collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_are_in_range_and_prefixes_of_longer_ones() {
        let long = ids(7, 97, 500);
        assert_eq!(ids(7, 97, 20), long[..20]);
        assert!(long.iter().all(|id| (3..97).contains(id)));
        assert_ne!(ids(8, 97, 20), long[..20]);
        let used: std::collections::BTreeSet<&u32> = long.iter().collect();
        assert!(used.len() > 80, "most of the vocabulary comes up");
        assert!(ids(0, 2, 9).iter().all(|id| *id < 2));
    }

    /// SplitMix64 from 0 begins with e220a8397b1dcdaf (the reference implementation's first output).
    #[test]
    fn the_generator_is_splitmix64() {
        assert_eq!(u64::from(ids(0, usize::MAX, 1)[0]), {
            let z = 0xe220_a839_7b1d_cdaf_u64;
            u64::from(3u32.wrapping_add((z % (usize::MAX as u64 - 3)) as u32))
        });
    }

    /// `hashlib.sha256(struct.pack("<3I", 1, 2, 300)).hexdigest()`
    #[test]
    fn hashes_are_those_of_python() {
        let hash = prompt_hash(&[1, 2, 300]);
        assert_eq!(hash.tokens, 3);
        assert_eq!(hash.sha256, PYTHON);
    }

    const PYTHON: &str = "ec23a88fb0aa4b38d5442523720f6576ba6310212cb39a86e9b71f42741f74f8";
}
