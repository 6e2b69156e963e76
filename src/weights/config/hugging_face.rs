//! Hugging Face's `config.json`, as transformers 4 and 5 write and read it. For multimodal models, its `text_config`.

use std::collections::BTreeMap;

use serde_json::{Map, Value};

use super::facts::{Activation, Facts, Layer};
use super::rope::Rope;
use super::{Comparison, Difference};
use crate::graph::Constant;

/// The language model's configuration in multimodal models.
const NESTED: [&str; 3] = ["text_config", "llm_config", "language_config"];

/// Models whose attention has no window.
const WITHOUT_WINDOW: [&str; 6] = ["llama", "gemma", "gpt2", "gptj", "gpt_neox", "phi"];

/// Models whose layers all have the window of `sliding_window`.
const WINDOW_EVERYWHERE: [&str; 4] = ["mistral", "mixtral", "phi3", "starcoder2"];

/// Models that use `sliding_window` if `use_sliding_window` is true.
const WINDOW_ON_REQUEST: [&str; 5] = ["qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "smollm3"];

/// Models that multiply embeddings by the root of the hidden size, and norms by 1 + weight.
const GEMMA: [&str; 6] = ["gemma", "gemma2", "gemma3", "gemma3_text", "gemma3n", "gemma3n_text"];

/// Models that do not scale embeddings.
const PLAIN_EMBEDDINGS: [&str; 12] = [
    "llama",
    "mistral",
    "mixtral",
    "qwen2",
    "qwen3",
    "phi",
    "phi3",
    "gpt2",
    "gpt_neo",
    "gpt_neox",
    "gptj",
    "starcoder2",
];

/// Models whose `rope_theta` defaults to 10000.
const USUAL_THETA: [&str; 8] = [
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "phi3",
    "gemma",
    "gemma2",
    "starcoder2",
];

/// Everything in which the file contradicts the package. `tensors`: of the checkpoint.
pub fn compare(fields: &Map<String, Value>, facts: &Facts, tensors: &BTreeMap<String, Constant>) -> Vec<Difference> {
    let nested = NESTED.iter().find_map(|name| fields.get(*name)?.as_object());
    let text = nested.unwrap_or(fields);
    let mut reader = Reader {
        kind: text.get("model_type").and_then(Value::as_str).unwrap_or_default(),
        compared: Comparison::new(text),
        facts,
    };
    reader.sizes();
    reader.norms();
    reader.activation();
    reader.attention();
    reader.windows();
    reader.rotary();
    reader.embeddings();
    let tied = [text, fields]
        .into_iter()
        .find_map(|fields| fields.get("tie_word_embeddings")?.as_bool());
    reader.head(tied, tensors);
    reader.compared.differences
}

struct Reader<'a> {
    /// `model_type`; empty if missing.
    kind: &'a str,
    compared: Comparison<'a>,
    facts: &'a Facts,
}

impl<'a> Reader<'a> {
    fn sizes(&mut self) {
        let a = &self.facts.architecture;
        let compared = &mut self.compared;
        compared.size(&["num_hidden_layers", "n_layer", "num_layers"], Some(a.layers));
        compared.size(&["num_attention_heads", "n_head", "num_heads"], Some(a.heads));
        compared.size(&["num_key_value_heads"], Some(a.kv_heads));
        compared.size(&["head_dim"], Some(a.head_dim));
        compared.size(&["hidden_size", "n_embd"], a.hidden);
        // The graph's value is that of the narrowest of several products, so the file may mean another matrix.
        let there = |size: f64| {
            self.facts
                .extents
                .iter()
                .any(|n| *n as f64 == size || *n as f64 == 2.0 * size)
        };
        for (name, package) in [
            ("intermediate_size", a.intermediate),
            ("n_inner", a.intermediate),
            ("vocab_size", a.vocabulary),
        ] {
            if compared.number(name).is_some_and(|size| !there(size)) {
                compared.size(&[name], package);
            }
        }
    }

    fn norms(&mut self) {
        self.compared.epsilon("rms_norm_eps", &self.facts.rms_epsilons);
        for name in ["layer_norm_eps", "layer_norm_epsilon"] {
            self.compared.epsilon(name, &self.facts.layer_epsilons);
        }
    }

    fn activation(&mut self) {
        // If both exist, the newer name applies.
        let field = ["hidden_activation", "hidden_act", "activation_function"]
            .into_iter()
            .find(|name| self.compared.value(name).is_some());
        let Some((field, name)) = field.and_then(|field| Some((field, self.compared.text(field)?))) else {
            return;
        };
        let known = match name {
            "silu" | "swish" => &[Activation::Silu][..],
            // Files of the first Gemma have "gelu" but mean the approximation.
            "gelu" if self.kind == "gemma" => &[Activation::Gelu, Activation::GeluTanh],
            "gelu" | "gelu_python" => &[Activation::Gelu],
            "gelu_new" | "gelu_pytorch_tanh" | "gelu_fast" | "gelu_accurate" => &[Activation::GeluTanh],
            "quick_gelu" => &[Activation::QuickGelu],
            "relu" => &[Activation::Relu],
            _ => return,
        };
        activation(&mut self.compared, self.facts, field, name, known);
    }

    fn attention(&mut self) {
        let head_dim = self.facts.architecture.head_dim as f64;
        let mut expected: Option<(&str, Vec<f64>)> = None;
        let layers = self.facts.layers.len();
        if let Some(scalar) = self.compared.number("query_pre_attn_scalar") {
            expected = Some(("query_pre_attn_scalar", vec![scalar.powf(-0.5); layers]));
        } else if let Some(scale) = self.compared.number("attention_multiplier") {
            expected = Some(("attention_multiplier", vec![scale; layers]));
        } else if self.kind == "gpt2" {
            let scaled = self.compared.flag("scale_attn_weights") != Some(false);
            let inverse = self.compared.flag("scale_attn_by_inverse_layer_idx") == Some(true);
            let of_layer = |layer: usize| {
                let scale = if scaled { head_dim.powf(-0.5) } else { 1.0 };
                scale / if inverse { (layer + 1) as f64 } else { 1.0 }
            };
            let field = if inverse {
                "scale_attn_by_inverse_layer_idx"
            } else {
                "scale_attn_weights"
            };
            expected = Some((field, (0..layers).map(of_layer).collect()));
        }
        if let Some((field, scales)) = expected {
            let other = self
                .facts
                .layers
                .iter()
                .zip(scales)
                .find(|(l, s)| (l.scale - s).abs() > 2e-3 * s);
            if let Some((layer, scale)) = other {
                let value = self.compared.fields.get(field).cloned().unwrap_or(Value::Null);
                self.compared.differs(
                    field,
                    format!("{value} (scores times {})", super::shown(scale)),
                    format!("scores times {}", super::shown(layer.scale)),
                );
            }
        }
        // Gemma 3's files have these fields, as null, and others may contain them unused.
        if self.kind == "gemma2" || self.kind.starts_with("gemma3") {
            let says = |name: &str| (self.compared.fields.contains_key(name)).then(|| self.compared.number(name));
            let (attention, logits) = (says("attn_logit_softcapping"), says("final_logit_softcapping"));
            if let (Some(file), Some(layer)) = (attention, self.facts.layers.first()) {
                self.compared.optional("attn_logit_softcapping", file, layer.softcap);
            }
            if let Some(file) = logits {
                self.compared
                    .optional("final_logit_softcapping", file, self.facts.logits_softcap);
            }
        }
        if let Some(parallel) = self.compared.flag("use_parallel_residual")
            && self.kind == "gpt_neox"
            && parallel != self.facts.parallel_blocks
        {
            self.compared
                .differs("use_parallel_residual", parallel, self.facts.parallel_blocks);
        }
    }

    /// Layers and whether each has a window, in the model's own words; `None` if unknown.
    fn layer_types(&self) -> Option<Vec<bool>> {
        let layers = self.facts.layers.len();
        if let Some(types) = self.compared.value("layer_types").and_then(Value::as_array) {
            let each = types.iter().map(|kind| match kind.as_str() {
                Some("sliding_attention") => Some(true),
                Some("full_attention") => Some(false),
                _ => None,
            });
            return each.collect::<Option<Vec<_>>>().filter(|types| types.len() == layers);
        }
        let every = |pattern: usize| (0..layers).map(|i| !(i + 1).is_multiple_of(pattern.max(1))).collect();
        let pattern = self
            .compared
            .number("sliding_window_pattern")
            .or(self.compared.number("_sliding_window_pattern"));
        match self.kind {
            kind if WINDOW_ON_REQUEST.contains(&kind) => {
                let full = self.compared.number("max_window_layers").unwrap_or(28.0);
                Some((0..layers).map(|i| i as f64 >= full).collect())
            }
            "gemma2" => Some(every(2)),
            "gemma3" | "gemma3_text" => Some(every(pattern.map_or(6, |p| p as usize))),
            "cohere2" => Some(every(pattern.map_or(4, |p| p as usize))),
            "gpt_neo" => self.types_of_gpt_neo().filter(|types| types.len() == layers),
            _ => None,
        }
    }

    /// `[[["global", "local"], 6]]`: the list, six times.
    fn types_of_gpt_neo(&self) -> Option<Vec<bool>> {
        let local = |kind: &Value| Some(kind.as_str()? == "local");
        let mut types = Vec::new();
        for group in self.compared.value("attention_types")?.as_array()? {
            let [kinds, times] = &group.as_array()?[..] else {
                return None;
            };
            let kinds: Vec<bool> = kinds.as_array()?.iter().map(local).collect::<Option<_>>()?;
            let times = usize::try_from(times.as_u64()?)
                .ok()
                .filter(|n| *n <= self.facts.layers.len())?;
            types.extend(kinds.repeat(times));
        }
        Some(types)
    }

    fn windows(&mut self) {
        let layers = self.facts.layers.len();
        let field = if self.kind == "gpt_neo" {
            "window_size"
        } else {
            "sliding_window"
        };
        let says = self.compared.fields.contains_key(field);
        let window = self.compared.number(field).map(|w| w as usize);
        let requested = self.compared.flag("use_sliding_window");
        let (field, expected) = match self.kind {
            kind if WITHOUT_WINDOW.contains(&kind) => ("model_type", vec![None; layers]),
            kind if WINDOW_EVERYWHERE.contains(&kind) && says => (field, vec![window; layers]),
            kind if WINDOW_ON_REQUEST.contains(&kind) && requested != Some(true) => match says || requested.is_some() {
                true => ("use_sliding_window", vec![None; layers]),
                false => return,
            },
            kind if WINDOW_EVERYWHERE.contains(&kind) => return,
            _ => match (self.layer_types(), says) {
                (Some(types), true) => (
                    field,
                    types.into_iter().map(|slides| window.filter(|_| slides)).collect(),
                ),
                _ => return,
            },
        };
        let expected: Vec<Option<usize>> = expected
            .into_iter()
            .map(|window| window.filter(|w| self.facts.counts(*w)))
            .collect();
        let found: Vec<Option<usize>> = self.facts.layers.iter().map(|l| l.window).collect();
        if let Some(layer) = (0..layers).find(|i| expected[*i] != found[*i]) {
            let text = |window: Option<usize>| window.map_or("no window".to_string(), |w| format!("a window of {w}"));
            let value = self.compared.fields.get(field).cloned().unwrap_or(Value::Null);
            self.compared.differs(
                field,
                format!("{value} ({} in layer {layer})", text(expected[layer])),
                text(found[layer]),
            );
        }
    }

    fn rotary(&mut self) {
        let rotated: Vec<&Layer> = self.facts.layers.iter().filter(|l| l.rotary.is_some()).collect();
        let Some(dim) = rotated
            .first()
            .and_then(|l| l.rotary.as_ref())
            .map(|table| table.rotary_dim())
        else {
            return;
        };
        let head_dim = self.facts.architecture.head_dim as f64;
        let parameters = self.compared.value("rope_parameters").and_then(Value::as_object);
        let nested = parameters.and_then(|p| p.get("partial_rotary_factor")?.as_f64());
        for (field, file) in [
            (
                "partial_rotary_factor",
                self.compared.number("partial_rotary_factor").or(nested),
            ),
            ("rotary_pct", self.compared.number("rotary_pct")),
        ] {
            if let Some(part) = file.filter(|part| (part * head_dim) as usize != dim) {
                self.compared.differs(field, part, super::shown(dim as f64 / head_dim));
            }
        }
        self.compared.size(&["rotary_dim"], Some(dim));
        if let Some(flags) = self.compared.value("no_rope_layers").and_then(Value::as_array)
            && flags.len() == self.facts.layers.len()
            && self.kind == "smollm3"
        {
            let differs =
                |(layer, flag): (&Layer, &Value)| flag.as_u64().is_some_and(|f| (f != 0) != layer.rotary.is_some());
            if let Some(layer) = self.facts.layers.iter().zip(flags).position(differs) {
                let rotated = self.facts.layers[layer].rotary.is_some();
                let text = |rotated: bool| format!("layer {layer} {}rotated", if rotated { "" } else { "not " });
                self.compared.differs("no_rope_layers", text(!rotated), text(rotated));
            }
        }
        self.tables();
    }

    /// Compares every description of rotary tables in the file with the tables of its layers.
    fn tables(&mut self) {
        let parameters = self.compared.value("rope_parameters").and_then(Value::as_object);
        let types = self.layer_types();
        let of = |sliding: bool| {
            let types = types.clone().unwrap_or_default();
            move |layer: usize| types.get(layer) == Some(&sliding)
        };
        if let Some(parameters) = parameters {
            let by_type =
                ["full_attention", "sliding_attention"].map(|kind| parameters.get(kind).and_then(Value::as_object));
            match by_type {
                [None, None] => self.tables_of("rope_parameters", parameters, |_| true),
                [full, sliding] => {
                    for (kind, slides) in [(full, false), (sliding, true)] {
                        if let Some(parameters) = kind {
                            self.tables_of("rope_parameters", parameters, of(slides));
                        }
                    }
                }
            }
        }
        // Version 4's fields.
        let scaling = self.compared.value("rope_scaling").and_then(Value::as_object);
        let usual = USUAL_THETA.contains(&self.kind).then_some(10000.0);
        let theta = ["rope_theta", "rotary_emb_base"]
            .into_iter()
            .find_map(|name| Some((name, self.compared.number(name)?)));
        let theta = theta.or(usual.filter(|_| scaling.is_some()).map(|theta| ("rope_theta", theta)));
        let local = self.compared.number("rope_local_base_freq");
        if let Some((field, theta)) = theta {
            let rope = self.rope(theta, scaling.cloned());
            match local.is_some() {
                true => self.table(field, &rope, of(false)),
                false => self.table(field, &rope, |_| true),
            }
        }
        if let Some(theta) = local {
            self.table("rope_local_base_freq", &self.rope(theta, None), of(true));
        }
    }

    fn tables_of(&mut self, field: &str, parameters: &Map<String, Value>, layers: impl Fn(usize) -> bool) {
        let usual = USUAL_THETA.contains(&self.kind).then_some(10000.0);
        let theta = parameters.get("rope_theta").and_then(Value::as_f64);
        if let Some(theta) = theta.or(self.compared.number("rope_theta")).or(usual) {
            self.table(field, &self.rope(theta, Some(parameters.clone())), layers);
        }
    }

    fn rope(&self, theta: f64, scaling: Option<Map<String, Value>>) -> Rope {
        Rope {
            theta,
            scaling,
            positions: self.compared.number("max_position_embeddings"),
            original: self.compared.number("original_max_position_embeddings"),
        }
    }

    fn table(&mut self, field: &str, rope: &Rope, layers: impl Fn(usize) -> bool) {
        let tables = self.facts.layers.iter().enumerate().filter(|(i, _)| layers(*i));
        let other = tables
            .filter_map(|(_, layer)| layer.rotary.as_ref())
            .find(|table| !table.is(rope));
        let Some(other) = other else { return };
        let mut file = rope.theta.to_string();
        let mut field = field;
        if let Some(scaling) = rope.scaling.as_ref().filter(|_| rope.is_scaled()) {
            field = if field == "rope_parameters" {
                field
            } else {
                "rope_scaling"
            };
            file += &format!(" with {}", brief(scaling));
        }
        self.compared.differs(field, file, other.describe());
    }

    fn embeddings(&mut self) {
        let factor = self.facts.embedding_factor;
        let hidden = self.facts.architecture.hidden.map(|n| (n as f64).sqrt());
        let expected = match (self.compared.number("embedding_multiplier"), hidden) {
            (Some(multiplier), _) => Some(("embedding_multiplier", multiplier)),
            (None, Some(root)) if GEMMA.contains(&self.kind) => Some(("model_type", root)),
            _ if PLAIN_EMBEDDINGS.contains(&self.kind) => Some(("model_type", 1.0)),
            _ => None,
        };
        // Half precision rounds the factor.
        if let Some((field, expected)) = expected.filter(|(_, e)| (e - factor).abs() > 1e-2 * e) {
            let value = match field {
                "model_type" => format!("{:?} (embeddings times {})", self.kind, super::shown(expected)),
                _ => expected.to_string(),
            };
            self.compared
                .differs(field, value, format!("embeddings times {}", super::shown(factor)));
        }
    }

    /// `tied`: the file's value for the head.
    fn head(&mut self, tied: Option<bool>, tensors: &BTreeMap<String, Constant>) {
        let is_head = |name: &str| name.contains("lm_head.weight") || name.ends_with("embed_out.weight");
        let head = tensors.iter().find(|(name, _)| is_head(name));
        match (tied, head) {
            (Some(false), None) if !tensors.is_empty() => {
                let package = "a head, which the checkpoint does not hold";
                self.compared.differs("tie_word_embeddings", false, package);
            }
            (Some(true), Some((name, head))) if self.facts.architecture.tied_embeddings == Some(false) => {
                let is_embedding = |name: &str| {
                    ["embed_tokens.weight", "wte.weight", "embed_in.weight"]
                        .iter()
                        .any(|end| name.ends_with(end))
                };
                let embedding = tensors.iter().find(|(name, _)| is_embedding(name));
                let bytes = |constant: &Constant| constant.materialize().ok();
                let same = embedding.is_none_or(|(_, embedding)| match (bytes(head), bytes(embedding)) {
                    (Some(a), Some(b)) => a.dtype() == b.dtype() && a.data() == b.data(),
                    _ => true,
                });
                if !same {
                    let package = format!("a separate head, and {name} is not the embedding");
                    self.compared.differs("tie_word_embeddings", true, package);
                }
            }
            _ => {}
        }
    }
}

/// Compares a function's name with what the graph applies; nothing if the graph's function was not recognized.
pub(super) fn activation(compared: &mut Comparison<'_>, facts: &Facts, field: &str, name: &str, known: &[Activation]) {
    let found = &facts.activations;
    if !found.is_empty() && !known.iter().any(|a| found.contains(a)) {
        let names: Vec<&str> = found.iter().map(|a| a.name()).collect();
        compared.differs(field, name, names.join(" and "));
    }
}

/// The JSON of a scaling, with long lists truncated.
fn brief(scaling: &Map<String, Value>) -> String {
    let mut scaling = scaling.clone();
    for value in scaling.values_mut() {
        if let Value::Array(items) = value
            && items.len() > 4
        {
            *value = Value::String(format!("{} numbers", items.len()));
        }
    }
    Value::Object(scaling).to_string()
}
