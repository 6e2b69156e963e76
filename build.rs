//! Digests the sources that decide what a plan is, so that a cache of plans never gives one that an older emitter built.

use std::hash::{DefaultHasher, Hasher};
use std::path::{Path, PathBuf};

/// Layers become TensorRT's here, and flags and profiles are set. What they are given is part of the cache's key by itself.
const SOURCES: [&str; 2] = ["src/backend/tensorrt/emit", "src/backend/tensorrt/builder.rs"];

fn main() {
    let mut files = Vec::new();
    for source in SOURCES {
        println!("cargo::rerun-if-changed={source}");
        collect(Path::new(source), &mut files);
    }
    files.sort();
    let mut hasher = DefaultHasher::new();
    for file in files {
        hasher.write(&std::fs::read(&file).unwrap_or_else(|error| panic!("{}: {error}", file.display())));
    }
    println!("cargo::rustc-env=LAPIDARY_EMITTER={:016x}", hasher.finish());
    println!("cargo::rerun-if-changed=build.rs");
}

fn collect(path: &Path, files: &mut Vec<PathBuf>) {
    match std::fs::read_dir(path) {
        Ok(entries) => {
            for entry in entries.flatten() {
                collect(&entry.path(), files);
            }
        }
        Err(_) => files.push(path.to_path_buf()),
    }
}
