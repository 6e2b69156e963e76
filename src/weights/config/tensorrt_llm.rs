//! The `config.json` of a TensorRT-LLM checkpoint
//! (<https://nvidia.github.io/TensorRT-LLM/legacy/architecture/checkpoint.html>).

use serde_json::{Map, Value};

use super::facts::{Activation, Facts};
use super::hugging_face::activation;
use super::rope::Rope;
use super::{Comparison, Difference};

/// Everything in which the file contradicts the package, and a mapping to several ranks, since only one is available.
pub fn compare(fields: &Map<String, Value>, facts: &Facts) -> Vec<Difference> {
    let mut compared = Comparison::new(fields);
    ranks(&mut compared);
    let a = &facts.architecture;
    compared.size(&["num_hidden_layers"], Some(a.layers));
    compared.size(&["num_attention_heads"], Some(a.heads));
    compared.size(&["num_key_value_heads"], Some(a.kv_heads));
    compared.size(&["head_size"], Some(a.head_dim));
    compared.size(&["hidden_size"], a.hidden);
    compared.size(&["intermediate_size"], a.intermediate);
    compared.size(&["vocab_size"], a.vocabulary);
    let epsilons = match facts.rms_epsilons.is_empty() {
        true => &facts.layer_epsilons,
        false => &facts.rms_epsilons,
    };
    compared.epsilon("norm_epsilon", epsilons);
    if let Some(name) = compared.text("hidden_act") {
        let known = match name {
            "silu" | "swiglu" | "fast-swiglu" => &[Activation::Silu][..],
            // Its own "gelu" is the approximation; converters write Hugging Face's name.
            "gelu" | "geglu" => &[Activation::Gelu, Activation::GeluTanh],
            "gelu_new" | "gelu_pytorch_tanh" | "gelu_fast" => &[Activation::GeluTanh],
            "relu" => &[Activation::Relu],
            _ => &[],
        };
        if !known.is_empty() {
            activation(&mut compared, facts, "hidden_act", name, known);
        }
    }
    rotary(&mut compared, facts);
    scores(&mut compared, facts);
    compared.differences
}

/// With several ranks, each holds parts of the weights, and some parts have the shape of the whole.
fn ranks(compared: &mut Comparison<'_>) {
    let mapping = compared.value("mapping").and_then(Value::as_object);
    let says = |name: &str| {
        mapping
            .and_then(|m| m.get(name))
            .or(compared.fields.get(name))
            .and_then(Value::as_u64)
    };
    let found: Vec<(&str, u64)> = ["tp_size", "pp_size", "world_size"]
        .into_iter()
        .filter_map(|name| Some((name, says(name)?)))
        .filter(|(_, size)| *size > 1)
        .collect();
    if let Some((name, size)) = found.first() {
        compared.differs(name, size, "the whole model, but one rank holds a part");
    }
}

fn rotary(compared: &mut Comparison<'_>, facts: &Facts) {
    let mut tables = facts.layers.iter().filter_map(|l| l.rotary.as_ref());
    let kind = compared.text("position_embedding_type");
    let Some(first) = tables.clone().next() else {
        if kind.is_some_and(|kind| kind.starts_with("rope")) && !facts.layers.is_empty() {
            compared.differs(
                "position_embedding_type",
                kind.unwrap_or_default(),
                "no rotary embedding",
            );
        }
        return;
    };
    let interleaved = facts.architecture.rotary.as_ref().map(|r| r.interleaved);
    let meant = match kind {
        Some("rope_gpt_neox") => Some(false),
        Some("rope_gptj") => Some(true),
        Some("learned_absolute" | "alibi") => {
            compared.differs("position_embedding_type", kind.unwrap_or_default(), "rotary embedding");
            None
        }
        _ => None,
    };
    if let (Some(meant), Some(interleaved)) = (meant, interleaved)
        && meant != interleaved
    {
        let package = if interleaved { "rope_gptj" } else { "rope_gpt_neox" };
        compared.differs("position_embedding_type", kind.unwrap_or_default(), package);
    }
    compared.size(&["rotary_dim", "rotary_embedding_dim"], Some(first.rotary_dim()));
    let head_dim = facts.architecture.head_dim as f64;
    for name in ["rotary_pct", "partial_rotary_factor"] {
        if let Some(part) = compared.number(name)
            && (part * head_dim) as usize != first.rotary_dim()
        {
            compared.differs(name, part, super::shown(first.rotary_dim() as f64 / head_dim));
        }
    }
    let Some(theta) = compared.number("rotary_base") else {
        return;
    };
    let rope = Rope {
        theta,
        scaling: compared.value("rotary_scaling").and_then(Value::as_object).cloned(),
        positions: compared.number("max_position_embeddings"),
        original: compared.number("original_max_position_embeddings"),
    };
    // If layers have separate tables, the format uses other fields.
    if facts.architecture.rotary.as_ref().is_some_and(|r| r.tables == 1)
        && let Some(other) = tables.find(|table| !table.is(&rope))
    {
        match rope.is_scaled() {
            true => {
                let scaling = compared.value("rotary_scaling").cloned().unwrap_or(Value::Null);
                compared.differs("rotary_scaling", format!("{theta} with {scaling}"), other.describe());
            }
            false => compared.differs("rotary_base", theta, other.describe()),
        }
    }
}

fn scores(compared: &mut Comparison<'_>, facts: &Facts) {
    let head_dim = facts.architecture.head_dim as f64;
    let Some(layer) = facts.layers.first() else { return };
    if let Some(scaling) = compared.number("q_scaling").filter(|s| *s > 0.0) {
        let found = 1.0 / (layer.scale * head_dim.sqrt());
        compared.factor("q_scaling", scaling, found, 2e-3);
    }
    if let Some(scalar) = compared.number("query_pre_attn_scalar").filter(|s| *s > 0.0) {
        compared.factor("query_pre_attn_scalar", scalar, layer.scale.powi(-2), 4e-3);
    }
    for (name, package) in [
        ("attn_logit_softcapping", layer.softcap),
        ("final_logit_softcapping", facts.logits_softcap),
    ] {
        if compared.fields.contains_key(name) {
            compared.optional(name, compared.number(name), package);
        }
    }
    if let Some(multiplier) = compared.number("embedding_multiplier") {
        compared.factor("embedding_multiplier", multiplier, facts.embedding_factor, 1e-2);
    }
}
