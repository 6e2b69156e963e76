//! Every export under fixtures/exports is read, typed with no symbols except those of its inputs, and unchanged after
//! being written and read again.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use lapidary::dim::Sym;
use lapidary::graph::{Graph, dump, infer, verify};
use lapidary::help::Help;
use lapidary::onnx::{self, Exporter};

/// Name and model file of every export, or of those in the folder that `LAPIDARY_EXPORTS` names.
fn exports() -> Vec<(String, PathBuf)> {
    let folder = match std::env::var_os("LAPIDARY_EXPORTS") {
        Some(folder) => PathBuf::from(folder),
        None => Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/exports"),
    };
    let mut found: Vec<(String, PathBuf)> = std::fs::read_dir(&folder)
        .unwrap_or_else(|e| panic!("{}: {e}", folder.display()))
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.join("model.onnx").exists())
        .map(|path| {
            let name = path.file_name().unwrap().to_string_lossy().into_owned();
            (name, path.join("model.onnx"))
        })
        .collect();
    found.sort();
    assert!(found.len() >= 9, "only {} exports in {}", found.len(), folder.display());
    found
}

/// Runs a check on every export and reports all failures together.
fn for_each_export(check: impl Fn(&str, &Path) -> Result<(), String>) {
    let failed: Vec<String> = exports()
        .iter()
        .filter_map(|(name, path)| check(name, path).err().map(|e| format!("{name}: {e}")))
        .collect();
    assert!(failed.is_empty(), "{}", failed.join("\n"));
}

fn typed(path: &Path) -> Result<Graph, String> {
    let mut graph = onnx::read(path).map_err(|e| e.to_string())?;
    infer(&mut graph).map_err(|e| e.to_string())?;
    Ok(graph)
}

#[test]
fn inference_learns_nothing_about_the_inputs_that_is_not_so() {
    for_each_export(|_, path| {
        let before = onnx::read(path).map_err(|e| e.to_string())?;
        let after = typed(path)?;
        for input in &before.inputs {
            let (old, new) = (before.shape(*input).unwrap(), after.shape(*input).unwrap());
            for (old, new) in old.iter().zip(new) {
                // ORT-GenAI leaves the head size open; its attention operator determines it.
                let open = old.as_sym().is_some_and(|s| s.name() == "kv_cache_dim");
                if old.as_const() != new.as_const() && !open {
                    return Err(format!("{:?}: {old} became {new}", before.value(*input).name));
                }
            }
        }
        Ok(())
    });
}

fn input_symbols(graph: &Graph) -> BTreeSet<Sym> {
    let shapes = graph.inputs.iter().filter_map(|v| graph.shape(*v));
    shapes.flatten().flat_map(|d| d.symbols()).collect()
}

#[test]
fn types_need_no_symbol_that_the_inputs_do_not_have() {
    for_each_export(|_, path| {
        let graph = typed(path)?;
        verify(&graph).map_err(|e| e.to_string())?;
        let known = input_symbols(&graph);
        for id in graph.node_ids() {
            for output in graph.node(id).outputs.iter().flatten() {
                let value = graph.value(*output);
                let shape = value.shape.as_ref().ok_or(format!("{:?} has no shape", value.name))?;
                if let Some(symbol) = shape.iter().flat_map(|d| d.symbols()).find(|s| !known.contains(s)) {
                    return Err(format!("{:?} is {shape:?}, and no input has {symbol}", value.name));
                }
            }
        }
        Ok(())
    });
}

#[test]
fn the_exporter_is_recognized() {
    for_each_export(|name, path| {
        let found = onnx::exporter(&onnx::read(path).map_err(|e| e.to_string())?);
        let expected = [
            ("dynamo", Exporter::TorchDynamo),
            ("torchscript", Exporter::TorchScript),
            ("optimum", Exporter::Optimum),
            ("ort-genai", Exporter::OrtGenAi),
            ("mobius", Exporter::Mobius),
        ];
        match expected.iter().find(|(part, _)| name.contains(part)) {
            Some((_, expected)) if *expected == found => Ok(()),
            expected => Err(format!("taken for {found:?}, not {expected:?}")),
        }
    });
}

/// The text form without its first line, which names the producer.
fn body(graph: &Graph) -> String {
    dump(graph).to_string().lines().skip(1).collect::<Vec<_>>().join("\n")
}

#[test]
fn writing_and_reading_again_gives_the_same_graph() {
    let folder = tempfile::tempdir().unwrap();
    for_each_export(|name, path| {
        let before = typed(path)?;
        let copy = folder.path().join(format!("{name}.onnx"));
        onnx::write_with_data(&before, &copy).map_err(|e| e.to_string())?;
        let after = typed(&copy)?;
        assert_eq!(body(&before), body(&after), "{name}");
        for value in before.value_ids() {
            let Some(constant) = before.constant(value) else {
                continue;
            };
            let Some(other) = after.find(&before.value(value).name) else {
                continue;
            };
            let other = after.constant(other).ok_or("a constant became something else")?;
            if constant.materialize().unwrap() != other.materialize().unwrap() {
                return Err(format!("{:?} has other bytes", before.value(value).name));
            }
        }
        Ok(())
    });
}

#[test]
fn a_model_without_its_weights_is_read_and_written_again() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.onnx");
    let (_, source) = &exports()[0];
    onnx::write_with_data(&typed(source).unwrap(), &path).unwrap();
    let whole = body(&typed(&path).unwrap());
    std::fs::remove_file(folder.path().join("model.onnx.data")).unwrap();

    let error = onnx::read(&path).unwrap_err().to_string();
    assert!(error.contains("model.onnx.data, which cannot be opened"), "{error}");
    let mut stripped = onnx::read_stripped(&path).unwrap();
    infer(&mut stripped).unwrap();
    assert_eq!(body(&stripped), whole);
    let absent = stripped
        .value_ids()
        .filter_map(|v| stripped.constant(v))
        .find_map(|c| c.materialize().err())
        .expect("some weight is absent");
    assert!(absent.help().unwrap().contains("lapidary refit"), "{absent}");
    // Its bytes are outside, so it can only be written with a layout that places them.
    assert!(onnx::encode(&stripped, None).is_err());
}
