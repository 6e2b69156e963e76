//! Describes a run: the system, and all its settings.

use serde_json::{Map, Value, json};

use super::Args;
use crate::bench::result::System;
use crate::package::Package;
use crate::package::manifest::EngineEntry;
use crate::sample::Settings;
use crate::target::{Prefill, Refit};

/// Settings come from the package, the flags and `--setting`, which takes precedence.
pub fn system(args: &Args, package: &Package, sampler: &Settings, on_gpu: bool, threads: usize) -> System {
    let manifest = &package.manifest;
    let mode = json!(manifest.weight_mode);
    let mut settings = Map::new();
    let mut set = |key: &str, value: Value| settings.insert(key.to_string(), value);
    set("device", json!(if on_gpu { "cuda" } else { "cpu" }));
    set("weights", mode.clone());
    set("capacities", json!(manifest.capacities));
    let cache = if manifest.capacities.len() > 1 {
        "growing"
    } else {
        "one capacity"
    };
    set("cache", json!(cache));
    match &manifest.prefill {
        Prefill::Chunks(chunks) => {
            set("shapes", json!("static"));
            set("prefill_chunks", json!(chunks));
        }
        range => {
            set("shapes", json!("dynamic"));
            set("prefill_range", json!(range));
        }
    }
    match on_gpu {
        true => {
            set("cuda_graphs", json!(!args.no_cuda_graphs));
            set("lowering", lowering(&manifest.engines));
            if manifest.refit != Refit::None {
                set("refit", json!(manifest.refit));
            }
        }
        false => {
            set("threads", json!(threads));
        }
    }
    set("sampler", sampler_settings(sampler));
    for (key, value) in &args.setting {
        nest(&mut settings, key, value.clone());
    }
    let variant = match on_gpu {
        true => format!("{}, {cache} cache", mode.as_str().unwrap_or_default()),
        false => "cpu".to_string(),
    };
    System {
        name: "lapidary".to_string(),
        label: args.label.clone().unwrap_or_else(|| format!("lapidary ({variant})")),
        variant,
        settings,
    }
}

/// The engines' lowering, as in a spec; by profile if a tuner chose for each. Weights are a separate setting.
fn lowering(engines: &[EngineEntry]) -> Value {
    let choices_of = |engine: &EngineEntry| {
        let mut choices = json!(engine.lowering);
        choices.as_object_mut().expect("a struct").remove("weight_mode");
        choices
    };
    match engines {
        [first, others @ ..] if others.iter().all(|other| choices_of(other) == choices_of(first)) => choices_of(first),
        _ => engines.iter().map(|e| (e.profile.to_string(), choices_of(e))).collect(),
    }
}

/// `greedy`, or the settings of all active samplers.
fn sampler_settings(s: &Settings) -> Value {
    let mut settings = Map::new();
    if s.temperature > 0.0 {
        settings.extend([
            ("temperature".to_string(), json!(s.temperature)),
            ("top_k".to_string(), json!(s.top_k)),
            ("top_p".to_string(), json!(s.top_p)),
            ("min_p".to_string(), json!(s.min_p)),
            ("seed".to_string(), json!(s.seed)),
        ]);
    }
    if s.dry.is_on() {
        settings.extend([
            ("dry_multiplier".to_string(), json!(s.dry.multiplier)),
            ("dry_base".to_string(), json!(s.dry.base)),
            ("dry_allowed_length".to_string(), json!(s.dry.allowed_length)),
        ]);
    }
    for (name, value, off) in [
        ("repetition_penalty", s.repetition_penalty, 1.0),
        ("frequency_penalty", s.frequency_penalty, 0.0),
        ("presence_penalty", s.presence_penalty, 0.0),
    ] {
        if value != off {
            settings.insert(name.to_string(), json!(value));
        }
    }
    match settings.is_empty() {
        true => json!("greedy"),
        false => Value::Object(settings),
    }
}

/// `a.b` becomes `{"a": {"b": value}}`.
fn nest(map: &mut Map<String, Value>, key: &str, value: Value) {
    match key.split_once('.') {
        None => {
            map.insert(key.to_string(), value);
        }
        Some((first, rest)) => {
            let inner = map.entry(first).or_insert_with(|| Value::Object(Map::new()));
            if !inner.is_object() {
                *inner = Value::Object(Map::new());
            }
            nest(inner.as_object_mut().expect("made one above"), rest, value);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::tensorrt::FLAVOUR;
    use crate::lower::{AttentionForm, LowerOptions};
    use crate::network::{Profile, WeightMode};

    fn engine(capacity: usize, lowering: LowerOptions) -> EngineEntry {
        EngineEntry {
            file: String::new(),
            bytes: 0,
            blake3: String::new(),
            plans: None,
            target: FLAVOUR.target,
            profile: Profile::decode(capacity),
            built_as: None,
            optimization_profile: 0,
            weight_mode: WeightMode::Bind,
            refit: Refit::None,
            lowering,
            built_with: None,
            tensorrt_version: String::new(),
            build_ms: 0,
        }
    }

    #[test]
    fn the_lowering_is_recorded_once_or_by_profile() {
        let usual = LowerOptions::for_engines();
        let layer = LowerOptions {
            attention: AttentionForm::Layer,
            ..usual.clone()
        };
        let embedded = LowerOptions {
            weight_mode: WeightMode::Embed,
            ..usual.clone()
        };
        let alike = lowering(&[engine(16, usual.clone()), engine(32, embedded)]);
        assert_eq!(alike["attention"], json!("by_capacity"));
        assert_eq!(alike["linear"], json!("reduce_row"));
        assert_eq!(alike.get("weight_mode"), None);
        let tuned = lowering(&[engine(16, usual), engine(32, layer)]);
        assert_eq!(
            (&tuned["b1-t1-c16"]["attention"], &tuned["b1-t1-c32"]["attention"]),
            (&json!("by_capacity"), &json!("layer"))
        );
    }
}
