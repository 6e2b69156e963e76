//! `adapter_config.json`: the effect of each field on the merged sum.
//!
//! Every field that PEFT's `LoraConfig` had up to version 0.18 and its `main` of August 2026 is in a table: read,
//! without effect on the computation, or not supported. A field that is not in the table is refused unless it is null,
//! false or empty, because it may change what the tensors mean. Null means PEFT's default, as in PEFT.

use serde_json::{Map, Value};

use super::pattern::Pattern;

/// The part of a configuration that determines the sum.
pub struct Config {
    rank: usize,
    alpha: f64,
    rank_pattern: Vec<(Pattern, usize)>,
    alpha_pattern: Vec<(Pattern, f64)>,
    rank_stabilised: bool,
    /// Each row of the merged matrix gets its own length.
    pub dora: bool,
    /// The base model stores the changed matrices as `[in, out]`.
    pub fan_in_fan_out: bool,
}

/// Why an adapter cannot be merged.
#[derive(Debug, PartialEq, Eq)]
pub struct Refusal {
    /// With the field and its value.
    pub message: String,
    /// What to do about it.
    pub help: &'static str,
}

/// How a field is treated.
#[derive(Clone, Copy)]
enum Meaning {
    /// It affects the sum.
    Read,
    /// It describes the training or origin of the adapter, or repeats what the tensors show.
    NoEffect,
    /// It changes what is computed in this way, unless it is null, false or empty.
    Unsupported(&'static str),
}

use Meaning::{NoEffect, Read, Unsupported};

/// PEFT's defaults.
const RANK: usize = 8;
const ALPHA: f64 = 8.0;

const MERGE: &str = "merge it into its base model with PEFT's merge_and_unload, and refit from that";
const CONVERT: &str = "save it with PEFT's save_pretrained(path_initial_model_for_weight_conversion=...), which makes a plain \
                       LoRA adapter of it, or merge it into its own base model and refit from that";
const NULL: &str = "if the field does not change what the adapter computes, set it to null in a copy; else merge the adapter \
                    with what it was made by, and refit from that";
const OTHER: &str = "no weights compute what it does; train a plain LoRA adapter, or refit without it";
const CORRECT: &str = "correct the configuration";

const FIELDS: &[(&str, Meaning)] = &[
    ("peft_type", Read),
    ("r", Read),
    ("lora_alpha", Read),
    ("rank_pattern", Read),
    ("alpha_pattern", Read),
    ("use_rslora", Read),
    ("use_dora", Read),
    ("init_lora_weights", Read),
    ("fan_in_fan_out", Read),
    // Origin.
    ("auto_mapping", NoEffect),
    ("base_model_name_or_path", NoEffect),
    ("inference_mode", NoEffect),
    ("peft_version", NoEffect),
    ("revision", NoEffect),
    ("runtime_config", NoEffect),
    ("task_type", NoEffect),
    // Which layers have an adapter; the tensors show that.
    ("ensure_weight_tying", NoEffect),
    ("exclude_modules", NoEffect),
    ("layers_pattern", NoEffect),
    ("layers_to_transform", NoEffect),
    ("target_modules", NoEffect),
    // Trained biases are tensors of the file and are refused there.
    ("bias", NoEffect),
    // Training: dropout, the start of `init_lora_weights`, the backward pass.
    ("corda_config", NoEffect),
    ("eva_config", NoEffect),
    ("loftq_config", NoEffect),
    ("lora_dropout", NoEffect),
    ("lora_ga_config", NoEffect),
    ("velora_config", NoEffect),
    // Options of disabled features.
    ("megatron_core", NoEffect),
    ("qalora_group_size", NoEffect),
    // Written by old versions and by ms-swift: how to load and how fast to train.
    ("lora_dtype", NoEffect),
    ("lorap_emb_lr", NoEffect),
    ("lorap_lr_ratio", NoEffect),
    ("merge_weights", NoEffect),
    (
        "alora_invocation_tokens",
        Unsupported("it applies only to tokens from its invocation on"),
    ),
    (
        "arrow_config",
        Unsupported("a router chooses among adapters for each token"),
    ),
    (
        "enable_lora",
        Unsupported("it changes some parts of a fused matrix only"),
    ),
    ("kasa_config", Unsupported("it truncates the base model's matrices")),
    ("layer_replication", Unsupported("it repeats layers of the base model")),
    ("lora_bias", Unsupported("it adds biases")),
    (
        "megatron_config",
        Unsupported("its matrices are those of parallel layers"),
    ),
    (
        "modules_to_save",
        Unsupported("it replaces whole modules of the base model"),
    ),
    ("monteclora_config", Unsupported("it samples its matrices")),
    (
        "target_parameters",
        Unsupported("it changes parameters that are not layers"),
    ),
    (
        "trainable_token_indices",
        Unsupported("it replaces rows of the embedding"),
    ),
    ("use_bdlora", Unsupported("its matrices are block-diagonal")),
    ("use_qalora", Unsupported("it pools the inputs of quantized layers")),
];

/// Adapters that PEFT cannot merge either.
const UNMERGEABLE: [&str; 3] = ["alora_invocation_tokens", "arrow_config", "layer_replication"];

/// Values of `init_lora_weights` that leave the base model unchanged, in lower case; `true`, `false` and null do too.
const PLAIN_STARTS: [&str; 4] = ["gaussian", "eva", "orthogonal", "mica"];

/// Those that change it before training, by prefix.
const CHANGED_BASES: [(&str, &str); 5] = [
    (
        "pissa",
        "PiSSA takes the principal components out of the base model's matrices",
    ),
    (
        "olora",
        "OLoRA takes an orthonormal part out of the base model's matrices",
    ),
    (
        "corda",
        "CorDA takes context-oriented components out of the base model's matrices",
    ),
    (
        "lora_ga",
        "LoRA-GA takes the first gradient's directions out of the base model's matrices",
    ),
    ("loftq", "LoftQ trains on a quantized base model"),
];

impl Config {
    /// Reads the fields of a configuration, or refuses one by name.
    pub fn read(fields: &Map<String, Value>) -> Result<Config, Refusal> {
        if let Some(kind) = fields.get("peft_type").filter(|kind| !is_off(kind))
            && kind != "LORA"
        {
            return Err(Refusal {
                message: format!("is an adapter of type {}", kind.as_str().unwrap_or("that is not text")),
                help: "only LORA can be merged",
            });
        }
        for (name, value) in fields {
            let known = FIELDS.iter().find(|(field, _)| field == name);
            match known.map(|(_, meaning)| *meaning) {
                Some(Read | NoEffect) => {}
                _ if is_off(value) => {}
                Some(Unsupported(why)) => {
                    let help = if UNMERGEABLE.contains(&name.as_str()) {
                        OTHER
                    } else {
                        MERGE
                    };
                    return Err(refusal(name, value, why, help));
                }
                None => return Err(refusal(name, value, "a field that is not known", NULL)),
            }
        }
        check_start(fields.get("init_lora_weights"))?;
        let value = |name: &str| fields.get(name).filter(|value| !value.is_null());
        let flag = |name: &str| match value(name) {
            None => Ok(false),
            Some(Value::Bool(flag)) => Ok(*flag),
            Some(other) => Err(refusal(name, other, "it must be true or false", CORRECT)),
        };
        Ok(Config {
            rank: value("r").map_or(Ok(RANK), |v| rank("r", v))?,
            alpha: value("lora_alpha").map_or(Ok(ALPHA), |v| alpha("lora_alpha", v))?,
            rank_pattern: patterns(value("rank_pattern"), "rank_pattern", rank)?,
            alpha_pattern: patterns(value("alpha_pattern"), "alpha_pattern", alpha)?,
            rank_stabilised: flag("use_rslora")?,
            dora: flag("use_dora")?,
            fan_in_fan_out: flag("fan_in_fan_out")?,
        })
    }

    /// The rank of a layer: that of the first matching pattern, or the adapter's.
    pub fn rank(&self, layer: &str) -> usize {
        first(&self.rank_pattern, layer).unwrap_or(self.rank)
    }

    /// The factor of a layer's product.
    pub fn scale(&self, layer: &str) -> f64 {
        let alpha = first(&self.alpha_pattern, layer).unwrap_or(self.alpha);
        let rank = self.rank(layer) as f64;
        match self.rank_stabilised {
            true => alpha / rank.sqrt(),
            false => alpha / rank,
        }
    }
}

fn first<T: Copy>(patterns: &[(Pattern, T)], layer: &str) -> Option<T> {
    let found = patterns.iter().find(|(pattern, _)| pattern.matches(layer));
    found.map(|(_, value)| *value)
}

/// In the order of the file, which decides among several matches.
fn patterns<T>(
    table: Option<&Value>,
    field: &str,
    read: impl Fn(&str, &Value) -> Result<T, Refusal>,
) -> Result<Vec<(Pattern, T)>, Refusal> {
    let table = match table {
        None => return Ok(Vec::new()),
        Some(Value::Object(table)) => table,
        Some(other) => return Err(refusal(field, other, "it must map patterns to numbers", CORRECT)),
    };
    let entries = table.iter().map(|(key, value)| {
        let pattern = Pattern::new(key).map_err(|why| Refusal {
            message: format!("has the pattern {key:?} in {field:?}, which is not understood: {why}"),
            help: "write the layers it means in a simpler regular expression, or their names in full",
        })?;
        Ok((pattern, read(&format!("{field}[{key:?}]"), value)?))
    });
    entries.collect()
}

fn rank(field: &str, value: &Value) -> Result<usize, Refusal> {
    let number = value.as_u64().and_then(|n| usize::try_from(n).ok());
    let rank = number.filter(|rank| *rank > 0);
    rank.ok_or_else(|| refusal(field, value, "a rank must be a positive integer", CORRECT))
}

fn alpha(field: &str, value: &Value) -> Result<f64, Refusal> {
    let number = value.as_f64().filter(|alpha| alpha.is_finite());
    number.ok_or_else(|| refusal(field, value, "an alpha must be a number", CORRECT))
}

fn check_start(start: Option<&Value>) -> Result<(), Refusal> {
    let Some(start) = start else { return Ok(()) };
    let field = "init_lora_weights";
    match start {
        Value::Null | Value::Bool(_) => Ok(()),
        Value::String(name) => {
            let lower = name.to_lowercase();
            if PLAIN_STARTS.contains(&lower.as_str()) {
                return Ok(());
            }
            match CHANGED_BASES.iter().find(|(begins, _)| lower.starts_with(begins)) {
                Some(("loftq", why)) => Err(refusal(field, start, why, MERGE)),
                Some((_, why)) => Err(refusal(field, start, why, CONVERT)),
                None => Err(refusal(field, start, "a start that is not known", NULL)),
            }
        }
        _ => Err(refusal(field, start, "a start that is not known", NULL)),
    }
}

fn refusal(field: &str, value: &Value, why: &str, help: &'static str) -> Refusal {
    let mut text = value.to_string();
    if text.chars().count() > 60 {
        text = text.chars().take(60).collect::<String>() + "...";
    }
    Refusal {
        message: format!("has {field}: {text}: {why}"),
        help,
    }
}

/// Null, false, or without contents.
fn is_off(value: &Value) -> bool {
    match value {
        Value::Null | Value::Bool(false) => true,
        Value::String(text) => text.is_empty(),
        Value::Array(items) => items.is_empty(),
        Value::Object(items) => items.is_empty(),
        Value::Bool(true) | Value::Number(_) => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(json: &str) -> Result<Config, Refusal> {
        Config::read(&serde_json::from_str(json).unwrap())
    }

    fn message(json: &str) -> String {
        read(json).err().unwrap_or_else(|| panic!("{json} is accepted")).message
    }

    #[test]
    fn the_first_pattern_of_the_file_decides() {
        let config = read(
            r#"{"r": 4, "lora_alpha": 8, "alpha_pattern": {"q_proj": 40, "0.self_attn.q_proj": 80},
                "rank_pattern": {".*\\.1\\..*q_proj": 2}}"#,
        )
        .unwrap();
        let layer = |i: usize, name: &str| format!("model.layers.{i}.self_attn.{name}");
        assert_eq!(config.scale(&layer(0, "q_proj")), 10.0);
        assert_eq!(config.scale(&layer(1, "q_proj")), 20.0);
        assert_eq!(config.scale(&layer(0, "k_proj")), 2.0);
        assert_eq!(config.rank(&layer(1, "q_proj")), 2);
    }

    #[test]
    fn null_is_the_default() {
        let names = FIELDS.iter().map(|(name, _)| format!("{name:?}: null"));
        let config = read(&format!("{{{}}}", names.collect::<Vec<_>>().join(", "))).unwrap();
        assert_eq!((config.rank("x"), config.scale("x")), (8, 1.0));
        assert!(!config.dora && !config.fan_in_fan_out);
        assert_eq!(read("{}").unwrap().scale("x"), 1.0);
    }

    #[test]
    fn a_rank_stabilised_scale() {
        let config = read(r#"{"r": 16, "lora_alpha": 8, "use_rslora": true, "rank_pattern": {"k": 4}}"#).unwrap();
        assert_eq!((config.scale("q"), config.scale("k")), (2.0, 4.0));
    }

    /// An ordinary adapter, as PEFT 0.18 writes it.
    #[test]
    fn a_file_of_peft() {
        read(
            r#"{"alora_invocation_tokens": null, "alpha_pattern": {}, "arrow_config": null, "auto_mapping": null,
            "base_model_name_or_path": "HuggingFaceTB/SmolLM2-135M", "bias": "none", "corda_config": null,
            "ensure_weight_tying": false, "eva_config": null, "exclude_modules": null, "fan_in_fan_out": false,
            "inference_mode": true, "init_lora_weights": true, "layer_replication": null, "layers_pattern": null,
            "layers_to_transform": null, "loftq_config": {}, "lora_alpha": 16, "lora_bias": false, "lora_dropout": 0.05,
            "megatron_config": null, "megatron_core": "megatron.core", "modules_to_save": null, "peft_type": "LORA",
            "peft_version": "0.18.0", "qalora_group_size": 16, "r": 8, "rank_pattern": {}, "revision": null,
            "target_modules": ["v_proj", "q_proj"], "target_parameters": null, "task_type": "CAUSAL_LM",
            "trainable_token_indices": null, "use_dora": false, "use_qalora": false, "use_rslora": false}"#,
        )
        .unwrap();
    }

    #[test]
    fn other_bases_are_refused() {
        for start in [
            "pissa",
            "pissa_niter_16",
            "olora",
            "OLoRA",
            "corda",
            "loftq",
            "lora_ga",
            "pizza",
        ] {
            let message = message(&format!(r#"{{"init_lora_weights": "{start}"}}"#));
            assert!(
                message.contains("init_lora_weights") && message.contains(start),
                "{message}"
            );
        }
        for start in [
            r#""gaussian""#,
            r#""Gaussian""#,
            r#""eva""#,
            r#""orthogonal""#,
            r#""mica""#,
            "true",
            "false",
        ] {
            assert!(read(&format!(r#"{{"init_lora_weights": {start}}}"#)).is_ok(), "{start}");
        }
    }

    #[test]
    fn fields_that_change_what_is_computed_are_refused() {
        for (name, meaning) in FIELDS {
            if let Unsupported(why) = meaning {
                for value in ["true", "[1]", r#"{"a": 1}"#, "1", r#""a""#] {
                    let message = message(&format!(r#"{{"{name}": {value}}}"#));
                    assert!(message.contains(name) && message.contains(why), "{message}");
                }
                for value in ["null", "false", "[]", "{}"] {
                    assert!(read(&format!(r#"{{"{name}": {value}}}"#)).is_ok(), "{name} {value}");
                }
            }
        }
    }

    #[test]
    fn what_is_not_known_is_refused() {
        assert!(message(r#"{"use_something": true}"#).contains("use_something"));
        assert!(read(r#"{"use_something": false, "something_config": null}"#).is_ok());
        assert!(message(r#"{"peft_type": "IA3"}"#).contains("IA3"));
        assert!(message(r#"{"use_dora": "false"}"#).contains("true or false"));
        assert!(message(r#"{"r": 0}"#).contains("positive"));
        assert!(message(r#"{"r": 1.5}"#).contains("positive"));
        assert!(message(r#"{"rank_pattern": {"q": 0}}"#).contains("rank_pattern[\"q\"]"));
        assert!(message(r#"{"alpha_pattern": {"q": "8"}}"#).contains("alpha_pattern[\"q\"]"));
        assert!(message(r#"{"alpha_pattern": ["q"]}"#).contains("alpha_pattern"));
        assert!(message(r#"{"alpha_pattern": {"(?=q)": 8}}"#).contains("(?=q)"));
    }
}
