//! Modules derived from canonical graphs: all exporters' weights agree once their modules are known.

use std::collections::BTreeMap;
use std::path::Path;

use lapidary::lower::stored_weights;
use lapidary::weights::config;
use lapidary::weights::model::{ModelWeights, NameKind};
use lapidary::weights::modules::modules;
use lapidary::weights::recipe::Recipe;
use lapidary::weights::source::WeightSource;

use lapidary::{onnx, passes};

use crate::support::fixture;

fn canonical(model: &Path) -> passes::Canonical {
    let options = passes::CanonicalizeOptions {
        max_positions: 64,
        ..passes::CanonicalizeOptions::default()
    };
    passes::canonicalize(onnx::read(model).unwrap(), &options).unwrap()
}

fn exports() -> Vec<(String, std::path::PathBuf)> {
    let mut all: Vec<_> = std::fs::read_dir(fixture("exports"))
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|folder| folder.join("model.onnx").is_file())
        .map(|folder| {
            (
                folder.file_name().unwrap().to_str().unwrap().to_string(),
                folder.join("model.onnx"),
            )
        })
        .collect();
    all.sort();
    assert!(all.len() > 40, "{}", all.len());
    all
}

/// The values of every module of an export.
fn numbers(weights: &ModelWeights) -> BTreeMap<String, Vec<f32>> {
    let modules = weights.names(NameKind::Module).into_iter();
    let numbers = modules.map(|name| {
        let (_, constant) = weights.tensor(NameKind::Module, name).unwrap().unwrap();
        (name.to_string(), constant.materialize().unwrap().to_f32())
    });
    numbers.collect()
}

#[test]
fn every_weight_of_every_export_is_some_module() {
    for (name, model) in exports() {
        let canonical = canonical(&model);
        let modules = modules(&canonical.graph);
        for (id, weight) in stored_weights(&canonical.graph) {
            match Recipe::of(&weight.constant) {
                Some(_) => assert!(modules.contains_key(&id), "{name}: {} is unknown", weight.name),
                None => assert!(!modules.contains_key(&id), "{name}: {} was computed", weight.name),
            }
        }
    }
}

#[test]
fn exporters_of_one_model_agree_on_every_module() {
    /// An export, its modules' values, and its graph.
    type First = (String, BTreeMap<String, Vec<f32>>, passes::Canonical);
    let mut families: BTreeMap<String, First> = BTreeMap::new();
    let mut compared = 0;
    for (name, model) in exports() {
        let family = name.split('-').next().unwrap().to_string();
        let this = canonical(&model);
        let weights = ModelWeights::of_graph(&this.graph, String::new());
        let found = numbers(&weights);
        // The first of a family is fp32, from torch, and names its initializers after the modules.
        let (first, expected, canonical) = families
            .entry(family)
            .or_insert_with(|| (name.clone(), found.clone(), canonical(&model)));
        // The architecture for which the weights were trained also agrees.
        let source = WeightSource::package(&model, weights, this.graph, this.architecture);
        let checked = config::check(&source, &canonical.graph, &canonical.architecture, None);
        checked.unwrap_or_else(|e| panic!("{name} for {first}: {e}"));
        let tolerance = if name.contains("16") && !name.contains("opset") || name.ends_with("fp16") {
            1e-3
        } else {
            0.0
        };
        for (module, expected) in expected.iter() {
            let Some(found) = found.get(module) else {
                // An export may store a tied head separately from the embedding, or the other way round.
                assert_eq!(module, "head.weight", "{name} has no {module}, which {first} has");
                continue;
            };
            assert_eq!(found.len(), expected.len(), "{name} {module}");
            let difference = found
                .iter()
                .zip(expected)
                .map(|(a, b)| (a - b).abs())
                .fold(0.0, f32::max);
            assert!(
                difference <= tolerance,
                "{name}: {module} differs from {first}'s by {difference}"
            );
            compared += 1;
        }
    }
    assert!(compared > 500, "{compared}");
}

#[test]
fn modules_are_what_their_names_in_torch_say() {
    // dynamo keeps the parameters' own names, which are those of Hugging Face's checkpoints.
    for export in [
        "llama-dynamo-opset18",
        "qwen2-dynamo-opset23",
        "qwen3-dynamo-opset18",
        "gpt2-dynamo-opset18",
    ] {
        let model = fixture("exports").join(export).join("model.onnx");
        let canonical = canonical(&model);
        let weights = ModelWeights::of_graph(&canonical.graph, String::new());
        let graph = onnx::read(&model).unwrap();
        let parameters: BTreeMap<String, _> = graph
            .value_ids()
            .filter_map(|id| {
                let constant = graph.constant(id)?;
                // The wrapper that was exported calls the model `m`.
                let name = constant.origin()?.trim_start_matches("m.");
                Some((name.to_string(), constant.clone()))
            })
            .collect();
        let names = weights.names(NameKind::Module).into_iter();
        let modules: BTreeMap<&str, _> = names
            .map(|name| (name, weights.tensor(NameKind::Module, name).unwrap().unwrap().1))
            .collect();
        let rows = modules
            .iter()
            .map(|(name, c)| (name.to_string(), c.shape()[0]))
            .collect();
        let convention = match export.starts_with("gpt2") {
            true => &lapidary::weights::checkpoint::GPT2,
            false => &lapidary::weights::checkpoint::LLAMA,
        };
        let mut named = 0;
        for (module, constant) in &modules {
            let gated = modules.contains_key("layers.0.feed_forward.gate.weight");
            let Some((name, found)) = convention.find(module, gated, |n| parameters.get(n).cloned(), &rows) else {
                continue;
            };
            // If dynamo folded the transpose into the parameter, it is transposed; the values still identify it.
            let (a, b) = (found.materialize().unwrap(), constant.materialize().unwrap());
            if a.shape() == b.shape() {
                assert_eq!(a.to_f32(), b.to_f32(), "{export}: {module} is not {name}");
                named += 1;
            }
        }
        // dynamo folds the transposes into most matrices and calls them val_84; norms and the embedding keep their names.
        assert!(named >= 6, "{export}: only {named} of {} have names", modules.len());
    }
}
