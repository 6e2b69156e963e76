//! Kernels that TensorRT compiled when it loaded a plan, kept for the next process.
//!
//! One file a plan, GPU, driver and library version; a file under another key is never looked at, one that TensorRT does
//! not take is ignored and replaced. Nothing here can fail a load: without the file it only takes longer.

use std::path::{Path, PathBuf};

use super::Runtime;
use crate::backend::tensorrt::flavour::KernelStore;

pub(super) struct Kernels {
    file: PathBuf,
    store: KernelStore,
    /// Hash of what the file holds.
    kept: Option<blake3::Hash>,
}

impl Kernels {
    /// Gives TensorRT what was kept for this plan, if anything.
    pub fn open(folder: &Path, plan: &[u8], runtime: &Runtime, store: KernelStore) -> Self {
        let facts = runtime.cuda().facts();
        let mut key = blake3::Hasher::new();
        key.update(plan);
        let driver = facts.driver_version.as_deref().unwrap_or(&facts.cuda_version);
        for part in [runtime.gpu(), driver, &runtime.version().to_string()] {
            key.update(&[0]).update(part.as_bytes());
        }
        let file = folder.join(format!("{}.kernels", &key.finalize().to_hex()[..32]));
        let mut kept = None;
        if let Ok(bytes) = std::fs::read(&file) {
            match store.fill(&bytes) {
                true => kept = Some(blake3::hash(&bytes)),
                false => drop(runtime.capture.take_errors()),
            }
        }
        Kernels { file, store, kept }
    }

    pub fn store(&self) -> &KernelStore {
        &self.store
    }

    /// Writes the file if there is anything new.
    pub fn keep(&mut self) {
        let Some(memory) = self.store.bytes() else { return };
        let bytes = memory.as_ref();
        let hash = blake3::hash(bytes);
        if bytes.is_empty() || self.kept == Some(hash) {
            return;
        }
        if write(&self.file, bytes).is_ok() {
            self.kept = Some(hash);
        }
    }
}

/// Whole or not at all: two processes may write the same file.
fn write(file: &Path, bytes: &[u8]) -> std::io::Result<()> {
    let folder = file.parent().unwrap_or(Path::new("."));
    std::fs::create_dir_all(folder)?;
    let draft = file.with_extension(format!("{}.part", std::process::id()));
    std::fs::write(&draft, bytes)?;
    std::fs::rename(&draft, file)
}
