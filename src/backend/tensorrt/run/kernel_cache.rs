//! Kernels that TensorRT compiled when it loaded a plan, stored for the next process.
//!
//! There is one file per plan, GPU, driver and library version. A file under another key is never read; a file that TensorRT
//! rejects is ignored and replaced. Cache errors never fail a load: without the file it only takes longer.

use std::path::{Path, PathBuf};
use std::time::Duration;

use super::Runtime;
use crate::backend::tensorrt::flavour::KernelStore;

pub(super) struct KernelCache {
    file: PathBuf,
    store: KernelStore,
    /// Hash of what the file holds.
    kept: Option<blake3::Hash>,
}

impl KernelCache {
    /// Loads the cached kernels of this plan into TensorRT, if there are any.
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
        KernelCache { file, store, kept }
    }

    pub fn store(&self) -> &KernelStore {
        &self.store
    }

    /// Writes the file if there are new kernels.
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

/// Suffix of an unfinished file.
const UNFINISHED: &str = "part";
/// No file takes this long to write: its process has ended.
const ABANDONED: Duration = Duration::from_secs(3600);

/// Writes atomically: two processes may write the same file.
fn write(file: &Path, bytes: &[u8]) -> std::io::Result<()> {
    let folder = file.parent().unwrap_or(Path::new("."));
    std::fs::create_dir_all(folder)?;
    sweep(folder);
    let unfinished = file.with_extension(format!("{}.{UNFINISHED}", std::process::id()));
    let written = std::fs::write(&unfinished, bytes).and_then(|()| std::fs::rename(&unfinished, file));
    written.inspect_err(|_| drop(std::fs::remove_file(&unfinished)))
}

/// Removes unfinished files of processes that have ended.
fn sweep(folder: &Path) {
    let Ok(entries) = std::fs::read_dir(folder) else { return };
    for entry in entries.flatten() {
        let changed = entry.metadata().and_then(|facts| facts.modified());
        let age = changed.ok().and_then(|changed| changed.elapsed().ok());
        if entry.path().extension().is_some_and(|e| e == UNFINISHED) && age.is_some_and(|age| age > ABANDONED) {
            let _ = std::fs::remove_file(entry.path());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_appear_whole_and_abandoned_ones_are_removed() {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join("kernels").join(name);
        write(&path("a.kernels"), b"one").unwrap();
        for (name, age) in [("b.1.part", ABANDONED * 2), ("c.2.part", Duration::ZERO)] {
            std::fs::write(path(name), "half").unwrap();
            let file = std::fs::File::options().write(true).open(path(name)).unwrap();
            file.set_modified(std::time::SystemTime::now() - age).unwrap();
        }
        write(&path("a.kernels"), b"two").unwrap();
        assert_eq!(std::fs::read(path("a.kernels")).unwrap(), b"two");
        assert!(!path("b.1.part").exists() && path("c.2.part").exists());
        // A folder with the file's name: no temporary file remains.
        std::fs::create_dir_all(path("d.kernels/e")).unwrap();
        write(&path("d.kernels"), b"three").unwrap_err();
        assert_eq!(std::fs::read_dir(folder.path().join("kernels")).unwrap().count(), 3);
    }
}
