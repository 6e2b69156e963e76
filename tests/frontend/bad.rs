//! Errors of the front end for invalid files: one clear message each, and never a panic.

use std::fmt::Write;
use std::fs;
use std::path::{Path, PathBuf};

use lapidary::graph::{infer, verify};
use lapidary::help::Help;
use lapidary::onnx;

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/bad")
}

/// The message of the first stage that refuses a model, with its help, or none.
fn refusal(path: &Path) -> Option<String> {
    let mut graph = match onnx::read(path) {
        Ok(graph) => graph,
        Err(error) => {
            let help = error.help().map_or(String::new(), |help| format!("\nhelp: {help}"));
            return Some(format!("{error}{help}"));
        }
    };
    // The verifier's list of all obstacles says more than inference's first error.
    let inferred = infer(&mut graph);
    match (verify(&graph), inferred) {
        (Err(obstacles), Ok(_)) => Some(obstacles.to_string()),
        (_, Err(error)) => Some(error.to_string()),
        (Ok(()), Ok(_)) => None,
    }
}

#[test]
fn each_bad_model_has_its_message() {
    let mut cases: Vec<PathBuf> = fs::read_dir(folder())
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.is_dir())
        .collect();
    cases.sort();
    let mut text = String::new();
    for case in &cases {
        let name = case.file_name().unwrap().to_string_lossy();
        let message = match refusal(&case.join("model.onnx")) {
            Some(message) => message.replace(&*folder().to_string_lossy(), "BAD"),
            // Refused by the passes, which check that it is a language model.
            None => "(no fault of the file)".to_string(),
        };
        writeln!(text, "{name}\n  {}", message.replace('\n', "\n  ")).unwrap();
    }
    insta::assert_snapshot!("messages", text);
}

#[test]
fn the_model_the_bad_ones_are_made_from_is_good() {
    assert_eq!(refusal(&folder().join("good.onnx")), None);
}

#[test]
fn paths_that_are_no_files() {
    let scratch = tempfile::tempdir().unwrap();
    let message = |path: &Path| onnx::read(path).unwrap_err().kind.to_string();
    assert!(message(scratch.path()).contains("is a folder"));
    assert!(message(&scratch.path().join("none.onnx")).contains("cannot be opened"));
    let pointer = scratch.path().join("pointer.onnx");
    fs::write(
        &pointer,
        "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
    )
    .unwrap();
    assert!(message(&pointer).contains("Git LFS pointer"));
}

#[cfg(unix)]
#[test]
fn a_link_out_of_the_models_folder_is_refused() {
    let outside = tempfile::tempdir().unwrap();
    let inside = tempfile::tempdir().unwrap();
    // `external-parent` without the detour in its text: the location is plain, the file is a link.
    let source = folder().join("external-missing/model.onnx");
    fs::copy(source, inside.path().join("model.onnx")).unwrap();
    fs::write(outside.path().join("weights"), vec![0u8; 1 << 16]).unwrap();
    std::os::unix::fs::symlink(outside.path().join("weights"), inside.path().join("model.onnx.data")).unwrap();
    let error = onnx::read(inside.path().join("model.onnx")).unwrap_err().to_string();
    assert!(error.contains("symbolic link out of the model's folder"), "{error}");
}
