//! An independent engine runs the canonical graphs: `scripts/check_canonical.py` loads what `onnx::write` wrote into
//! onnx.checker and ONNX Runtime. Needs a Python with onnx and onnxruntime in `LAPIDARY_PYTHON`, as the README's test
//! command sets up; CI always has it. Without the variable the tests print a message and pass.

use std::path::Path;
use std::process::Command;

use crate::canonical::{canonical, exports};

fn family(name: &str) {
    let Some(python) = std::env::var_os("LAPIDARY_PYTHON") else {
        assert!(std::env::var_os("CI").is_none(), "CI has to set LAPIDARY_PYTHON");
        eprintln!("LAPIDARY_PYTHON is not set: {name} is not run in ONNX Runtime");
        return;
    };
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("scripts/check_canonical.py");
    let folder = tempfile::tempdir().unwrap();
    let mut failed = Vec::new();
    for export in exports().into_iter().filter(|e| e.reference.family == name) {
        let file = folder.path().join(format!("{}.onnx", export.name));
        let graph = canonical(&export)
            .unwrap_or_else(|e| panic!("{}: {e}", export.name))
            .graph;
        lapidary::onnx::write_with_data(&graph, &file).unwrap_or_else(|e| panic!("{}: {e}", export.name));
        let output = Command::new(&python)
            .arg(&script)
            .args([export.path.parent().unwrap(), &file])
            .args(["--tolerance", &export.tolerance().to_string(), "--chunk", "5"])
            .output()
            .expect("LAPIDARY_PYTHON can be run");
        if !output.status.success() {
            let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).trim().to_string();
            failed.push(format!(
                "{}: {} {}",
                export.name,
                text(&output.stdout),
                text(&output.stderr)
            ));
        }
    }
    assert!(failed.is_empty(), "{}", failed.join("\n"));
}

#[test]
fn onnx_runtime_agrees_on_llama() {
    family("llama");
}

#[test]
fn onnx_runtime_agrees_on_qwen2() {
    family("qwen2");
}

#[test]
fn onnx_runtime_agrees_on_qwen3() {
    family("qwen3");
}

#[test]
fn onnx_runtime_agrees_on_mistral() {
    family("mistral");
}

#[test]
fn onnx_runtime_agrees_on_gpt2() {
    family("gpt2");
}
