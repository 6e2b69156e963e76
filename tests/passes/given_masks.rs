//! Masks of `[batch, 1, tokens, total]` that the caller fills, one for each kind of layer: flags or the model's
//! configuration define what they hide; it is never guessed.

use std::path::Path;

use lapidary::convert::{ConvertOptions, convert};
use lapidary::dim::Dim;
use lapidary::graph::{Graph, infer};
use lapidary::help::Help;
use lapidary::passes::{CanonicalizeOptions, canonicalize};
use lapidary::spec::Spec;
use lapidary::tensor::DType;

use crate::refusals::{export, mask_additions, rewire, says};

/// The export whose layers read a mask each, `names` in order.
fn given(names: [&str; 2]) -> Graph {
    let mut graph = export("llama-optimum");
    let dims = [
        "batch_size",
        "1",
        "sequence_length",
        "past_sequence_length + sequence_length",
    ]
    .map(Dim::parse);
    let masks = names.map(|name| {
        let known = graph.find(name);
        known.unwrap_or_else(|| graph.add_input(name, DType::F32, dims.to_vec()))
    });
    for (node, mask) in mask_additions(&graph).into_iter().zip(masks) {
        rewire(&mut graph, node, 1, |_, _| mask);
    }
    graph.remove_dead_nodes();
    graph
}

fn options(windows: &[(&str, Option<usize>)]) -> CanonicalizeOptions {
    CanonicalizeOptions {
        max_positions: 32,
        mask_windows: windows
            .iter()
            .map(|(name, window)| (name.to_string(), *window))
            .collect(),
        ..CanonicalizeOptions::default()
    }
}

fn refusal(graph: Graph, windows: &[(&str, Option<usize>)]) -> String {
    let error = canonicalize(graph, &options(windows)).map(|_| ()).unwrap_err();
    format!("{error}; {}", error.help().unwrap_or_default())
}

#[test]
fn masks_are_what_is_said_of_them() {
    for (windows, expected) in [
        ([("a", None), ("b", Some(8))], [None, Some(8)]),
        ([("a", Some(3)), ("b", Some(8))], [Some(3), Some(8)]),
        ([("a", None), ("b", None)], [None, None]),
        // Longer than all that is converted.
        ([("a", Some(1000)), ("b", Some(8))], [None, Some(8)]),
    ] {
        let made = canonicalize(given(["a", "b"]), &options(&windows)).unwrap();
        assert_eq!(made.architecture.windows, expected, "{windows:?}");
        let inputs: Vec<&str> = made
            .graph
            .inputs
            .iter()
            .map(|id| made.graph.value(*id).name.as_str())
            .collect();
        assert_eq!(inputs[..3], ["input_ids", "position_ids", "write_indices"]);
    }
    // One mask that all layers read, with a window.
    let made = canonicalize(given(["a", "a"]), &options(&[("a", Some(5))])).unwrap();
    assert_eq!(made.architecture.windows, [Some(5), Some(5)]);
}

#[test]
fn what_is_not_said_is_refused_with_the_flags_that_say_it() {
    let text = refusal(given(["full_attention_mask", "sliding_attention_mask"]), &[]);
    says(
        &text,
        &[
            "the caller fills the masks full_attention_mask [batch_size, 1, ",
            "--mask-window full_attention_mask=N --mask-window sliding_attention_mask=N",
            "sliding_window and layer_types",
        ],
    );
    // A flag for only one mask is not enough.
    says(
        &refusal(given(["a", "b"]), &[("b", Some(8))]),
        &["a [batch_size", "b [batch_size"],
    );
    let text = refusal(given(["a", "b"]), &[("a", None), ("b", None), ("c", Some(8))]);
    says(&text, &["a window is given for \"c\"", "are a, b"]);
    says(
        &refusal(export("llama-optimum"), &[("mask", Some(8))]),
        &["no input of the export is a mask"],
    );
}

/// Windows of the layers and of the masks.
type Windows = (Vec<Option<usize>>, Vec<(String, usize)>);

/// Converts the export beside this `config.json`.
fn by_config(folder: &Path, config: &str) -> Result<Windows, String> {
    let mut graph = given(["a", "b"]);
    graph.sort().unwrap();
    infer(&mut graph).unwrap();
    let model = folder.join("model.onnx");
    lapidary::onnx::write_with_data(&graph, &model).unwrap();
    std::fs::write(folder.join("config.json"), config).unwrap();
    let spec = Spec::parse("capacity: [32]").unwrap().resolve().unwrap();
    let options = ConvertOptions {
        force: true,
        ..ConvertOptions::default()
    };
    let made = convert(&model, &folder.join("pkg"), spec, &options).map_err(|error| error.to_string())?;
    let manifest = made.manifest;
    Ok((
        manifest.architecture.windows,
        manifest.mask_windows.into_iter().collect(),
    ))
}

#[test]
fn a_configuration_says_what_masks_hide_by_the_layers_that_read_them() {
    let folder = tempfile::tempdir().unwrap();
    let of = |config: &str| by_config(folder.path(), config);
    let windows = |a: usize, b: usize| vec![("a".to_string(), a), ("b".to_string(), b)];
    let types =
        |first: &str, second: &str| format!(r#"{{"sliding_window": 8, "layer_types": ["{first}", "{second}"]}}"#);
    let (full, sliding) = ("full_attention", "sliding_attention");
    assert_eq!(of(&types(full, sliding)), Ok((vec![None, Some(8)], windows(0, 8))));
    assert_eq!(of(&types(sliding, full)), Ok((vec![Some(8), None], windows(8, 0))));
    let nested = format!(r#"{{"model_type": "gemma3", "text_config": {}}}"#, types(full, sliding));
    assert_eq!(of(&nested), Ok((vec![None, Some(8)], windows(0, 8))));
    let pattern = r#"{"sliding_window": 8, "num_hidden_layers": 2, "sliding_window_pattern": 2}"#;
    assert_eq!(of(pattern), Ok((vec![Some(8), None], windows(8, 0))));
    // Layers that it does not describe, windows that it does not name.
    for config in [
        r#"{"sliding_window": 8, "layer_types": ["full_attention"]}"#,
        r#"{"sliding_window": 8, "layer_types": ["full_attention", "chunked_attention"]}"#,
        r#"{"layer_types": ["full_attention", "sliding_attention"]}"#,
        "{}",
        "{",
    ] {
        let error = of(config).unwrap_err();
        assert!(error.contains("the caller fills the masks"), "{config}: {error}");
    }
}
