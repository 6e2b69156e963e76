//! Damaged files: for any bytes, reading returns a graph or an error. A panic fails the test; an allocation far beyond
//! the file's size ends the process.

use std::fs;
use std::path::Path;

use lapidary::graph::{dump, infer, verify};
use lapidary::onnx;
use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};

/// Small exports of different exporters; only the first has its weights in the file.
const VICTIMS: [&str; 3] = [
    "fixtures/bad/good.onnx",
    "fixtures/exports/llama-ort-genai/model.onnx",
    "fixtures/exports/llama-mobius-static/model.onnx",
];

/// One edit: a position (as a fraction of the length), and the change.
#[derive(Clone, Debug)]
enum Damage {
    Cut,
    Flip(u8),
    Set(u8),
    Remove(usize),
    Repeat(usize),
}

fn damage() -> impl Strategy<Value = (f64, Damage)> {
    let kind = prop_oneof![
        1 => Just(Damage::Cut),
        6 => (0u8..8).prop_map(Damage::Flip),
        3 => any::<u8>().prop_map(Damage::Set),
        1 => (1usize..40).prop_map(Damage::Remove),
        1 => (1usize..40).prop_map(Damage::Repeat),
    ];
    (0.0..1.0, kind)
}

fn apply(bytes: &mut Vec<u8>, place: f64, damage: &Damage) {
    if bytes.is_empty() {
        return;
    }
    let at = ((bytes.len() as f64 * place) as usize).min(bytes.len() - 1);
    match damage {
        Damage::Cut => bytes.truncate(at),
        Damage::Flip(bit) => bytes[at] ^= 1 << bit,
        Damage::Set(value) => bytes[at] = *value,
        Damage::Remove(n) => drop(bytes.drain(at..(at + n).min(bytes.len()))),
        Damage::Repeat(n) => {
            let piece = bytes[at..(at + n).min(bytes.len())].to_vec();
            bytes.splice(at..at, piece);
        }
    }
}

/// All steps of the front end with a file, until the first error.
fn go_through(path: &Path) {
    if let Ok(mut graph) = onnx::read(path) {
        let _ = onnx::exporter(&graph);
        let inferred = infer(&mut graph);
        let _ = dump(&graph).to_string();
        let verified = verify(&graph);
        if inferred.is_ok() && verified.is_ok() {
            let _ = onnx::encode(&graph, None);
        }
    }
}

#[test]
fn damaged_models_are_read_or_refused() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    for victim in VICTIMS {
        let original = fs::read(root.join(victim)).unwrap();
        let folder = tempfile::tempdir().unwrap();
        let data = root.join(victim).with_file_name("model.onnx.data");
        if data.exists() {
            fs::copy(data, folder.path().join("model.onnx.data")).unwrap();
        }
        let number = std::cell::Cell::new(0);
        let config = Config {
            cases: 1500,
            failure_persistence: None,
            ..Config::default()
        };
        let edits = prop::collection::vec(damage(), 1..6);
        TestRunner::new(config)
            .run(&edits, |edits| {
                let mut bytes = original.clone();
                for (place, damage) in &edits {
                    apply(&mut bytes, *place, damage);
                }
                // A new name each time: a file that is still mapped must not be written again.
                number.set(number.get() + 1);
                let path = folder.path().join(format!("{}.onnx", number.get()));
                fs::write(&path, &bytes).unwrap();
                go_through(&path);
                fs::remove_file(&path).unwrap();
                Ok(())
            })
            .unwrap();
    }
}

#[test]
fn every_prefix_of_a_model_is_refused() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let original = fs::read(root.join(VICTIMS[0])).unwrap();
    let folder = tempfile::tempdir().unwrap();
    for length in (0..original.len()).step_by(7) {
        let path = folder.path().join(format!("{length}.onnx"));
        fs::write(&path, &original[..length]).unwrap();
        // Only the opsets come after the graph, and nothing is read without them.
        assert!(onnx::read(&path).is_err(), "the first {length} bytes pass for a model");
        fs::remove_file(&path).unwrap();
    }
}
