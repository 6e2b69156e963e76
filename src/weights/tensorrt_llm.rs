//! `config.json` of a TensorRT-LLM checkpoint: every field that would otherwise have a default, or the reasons why none
//! of its models matches the graph.
//!
//! Fields and defaults are those of `LLaMAConfig`, `QWenConfig` and `GPTConfig` in TensorRT-LLM
//! (`tensorrt_llm/models/{llama,qwen,gpt}/config.py`); each model's computation is from `model.py` beside them.

use std::collections::HashMap;

use serde_json::{Value, json};

use super::export::is_gpt_j;
use super::rotary::{self, RotaryBase};
use crate::graph::op::{Attention, Binary, Op, Unary};
use crate::graph::{Constant, Graph, Node};
use crate::passes::Architecture;
use crate::tensor::DType;

/// The fields, or all reasons against writing them. `modules` are those of the checkpoint.
pub(super) fn config(
    graph: &Graph,
    architecture: &Architecture,
    modules: &HashMap<String, Constant>,
) -> Result<Value, Vec<String>> {
    let mut reasons = foreign(graph, architecture);
    let a = architecture;
    let dtype = modules.get("embedding.weight").map_or(DType::F32, Constant::dtype);
    let positions = modules.get("positions.weight").map(|c| c.shape()[0]);
    let mut config = json!({
        "dtype": if dtype.is_half() { dtype.onnx_name() } else { "float32" },
        "logits_dtype": "float32",
        "num_hidden_layers": a.layers,
        "num_attention_heads": a.heads,
        "num_key_value_heads": a.kv_heads,
        "head_size": a.head_dim,
        "hidden_size": a.hidden,
        "intermediate_size": a.intermediate,
        "vocab_size": a.vocabulary,
        "max_position_embeddings": positions.or(a.max_positions),
        "hidden_act": activation(graph),
        "norm_epsilon": epsilon(graph, &mut reasons),
        "tie_word_embeddings": !modules.contains_key("head.weight"),
        "mapping": {"world_size": 1, "tp_size": 1, "pp_size": 1},
        "quantization": {"quant_algo": null, "kv_cache_quant_algo": null},
    });
    let fields = match positions {
        Some(_) => gpt(modules, &mut reasons),
        None if is_gpt_j(modules) => gpt_j(graph, a, modules, &mut reasons),
        None => llama(graph, a, modules, &mut reasons),
    };
    for (name, value) in fields {
        config[name] = value;
    }
    match reasons.is_empty() {
        true => Ok(config),
        false => Err(reasons),
    }
}

type Fields = Vec<(&'static str, Value)>;

/// GPT-2: learned positions, norms with a bias, every matrix with a bias.
fn gpt(modules: &HashMap<String, Constant>, reasons: &mut Vec<String>) -> Fields {
    if !modules.contains_key("layers.0.attention_norm.bias") {
        reasons.push("it has learned positions, and norms without a bias".to_string());
    }
    for part in [
        "attention.query",
        "attention.output",
        "feed_forward.up",
        "feed_forward.down",
    ] {
        if !modules.contains_key(&format!("layers.0.{part}.bias")) {
            reasons.push(format!("{part} has no bias, which GPTForCausalLM's has"));
        }
    }
    vec![
        ("architecture", json!("GPT2LMHeadModel")),
        ("position_embedding_type", json!("learned_absolute")),
        ("bias", json!(true)),
        ("apply_query_key_layer_scaling", json!(false)),
        ("rotary_pct", json!(1.0)),
        ("rotary_base", json!(10000.0)),
        ("rotary_scaling", Value::Null),
    ]
}

/// GPT-J: parallel blocks, neighboring elements of a head rotated, biases only in the feed-forward block and the head.
fn gpt_j(graph: &Graph, a: &Architecture, modules: &HashMap<String, Constant>, reasons: &mut Vec<String>) -> Fields {
    let has = |part: &str| modules.contains_key(part);
    for part in [
        "attention.query",
        "attention.key",
        "attention.value",
        "attention.output",
    ] {
        if has(&format!("layers.0.{part}.bias")) {
            reasons.push(format!("{part} has a bias, which GPTJForCausalLM's has not"));
        }
    }
    for part in ["layers.0.feed_forward.up", "layers.0.feed_forward.down", "head"] {
        if !has(&format!("{part}.bias")) {
            reasons.push(format!("{part} has no bias, which GPTJForCausalLM's has"));
        }
    }
    let mut rotary_dim = Value::Null;
    match &a.rotary {
        Some(rotary) if rotary.interleaved => rotary_dim = json!(rotary.rotary_dim),
        _ => {
            reasons.push("GPTJForCausalLM rotates neighboring elements of a head, and this graph does not".to_string())
        }
    }
    match rotary::base(graph) {
        // Its configuration has no field for another base.
        RotaryBase::Plain(10000.0) => {}
        RotaryBase::Plain(base) => reasons.push(format!("GPTJForCausalLM's rotary base is 10000, and not {base}")),
        RotaryBase::Other(why) => reasons.push(why),
    }
    vec![
        ("architecture", json!("GPTJForCausalLM")),
        ("position_embedding_type", json!("rope_gptj")),
        ("rotary_dim", rotary_dim),
    ]
}

/// Llama, Qwen 2 (biases of query, key and value) and Qwen 3 (norms of query and key).
fn llama(graph: &Graph, a: &Architecture, modules: &HashMap<String, Constant>, reasons: &mut Vec<String>) -> Fields {
    let has = |part: &str| modules.contains_key(&format!("layers.0.{part}"));
    if has("attention_norm.bias") {
        reasons.push("it has rotary positions, and norms with a bias".to_string());
    }
    if has("attention_output_norm.weight") || has("feed_forward_output_norm.weight") {
        reasons.push("it has norms behind its blocks".to_string());
    }
    if !has("feed_forward.gate.weight") {
        reasons.push("its feed-forward blocks have no gate".to_string());
    }
    let qkv_bias = has("attention.query.bias");
    if has("attention.key.bias") != qkv_bias || has("attention.value.bias") != qkv_bias {
        reasons.push("only some of query, key and value have a bias".to_string());
    }
    let (output_bias, mlp_bias) = (has("attention.output.bias"), has("feed_forward.up.bias"));
    if has("feed_forward.down.bias") != mlp_bias || has("feed_forward.gate.bias") != mlp_bias {
        reasons.push("only some matrices of the feed-forward block have a bias".to_string());
    }
    let normed = (has("attention.query_norm.weight"), has("attention.key_norm.weight"));
    let (name, qwen_type) = match (normed, qkv_bias, output_bias) {
        ((false, false), false, false) | ((false, false), true, true) => ("LlamaForCausalLM", None),
        ((false, false), true, false) => ("Qwen2ForCausalLM", Some("qwen2")),
        ((true, true), _, false) => ("Qwen3ForCausalLM", Some("qwen3")),
        _ => {
            reasons.push("no model has these norms and biases in its attention".to_string());
            ("LlamaForCausalLM", None)
        }
    };
    let (mut base, mut kind) = (Value::Null, "rope_gpt_neox");
    match &a.rotary {
        None => reasons.push("it has neither learned nor rotary positions".to_string()),
        Some(rotary) => {
            if rotary.rotary_dim != a.head_dim {
                reasons.push(format!(
                    "{} of {} elements of a head are rotated",
                    rotary.rotary_dim, a.head_dim
                ));
            }
            if rotary.interleaved {
                kind = "rope_gptj";
            }
            match rotary::base(graph) {
                RotaryBase::Plain(found) => base = json!(found),
                RotaryBase::Other(why) => reasons.push(why),
            }
        }
    }
    let mut fields = vec![
        ("architecture", json!(name)),
        ("position_embedding_type", json!(kind)),
        ("rotary_base", base),
        ("rotary_scaling", Value::Null),
        ("attn_bias", json!(qkv_bias)),
        ("mlp_bias", json!(mlp_bias)),
        ("qk_layernorm", json!(normed == (true, true))),
        ("residual_mlp", json!(false)),
    ];
    if let Some(qwen_type) = qwen_type {
        fields.extend([("qwen_type", json!(qwen_type)), ("use_logn_attn", json!(false))]);
    }
    fields
}

/// Features that no model of the format has.
fn foreign(graph: &Graph, a: &Architecture) -> Vec<String> {
    let mut reasons = Vec::new();
    let windows = a.windows.iter().flatten().count();
    if windows > 0 {
        reasons.push(format!("{windows} of {} layers have a sliding window", a.layers));
    }
    if let Some(cap) = a.attention_softcap {
        reasons.push(format!("scores are soft-capped at {cap}"));
    }
    if a.value_dim != a.head_dim {
        reasons.push(format!("values are {} wide, keys {}", a.value_dim, a.head_dim));
    }
    if a.caches != a.layers {
        reasons.push(format!("{} layers share {} caches", a.layers, a.caches));
    }
    for node in graph.node_ids().map(|id| graph.node(id)) {
        reasons.extend(foreign_node(graph, node, a));
    }
    reasons.dedup();
    reasons
}

fn foreign_node(graph: &Graph, node: &Node, a: &Architecture) -> Option<String> {
    match &node.op {
        Op::Attention(Attention { scale, .. }) => {
            let usual = 1.0 / (a.head_dim as f32).sqrt();
            let scale = scale.unwrap_or(usual);
            let other = (scale / usual - 1.0).abs() > 1e-3;
            other.then(|| format!("scores are scaled by {scale}, not by 1/sqrt({})", a.head_dim))
        }
        Op::BiasedAttention(_) => Some("attention has slopes (ALiBi) or sinks".to_string()),
        Op::RoundedAttention(_) => Some("scores or probabilities are rounded to codes".to_string()),
        Op::Binary(Binary::Mul | Binary::Div) => {
            let number = node
                .inputs
                .iter()
                .flatten()
                .find_map(|v| graph.constant(*v).filter(|c| c.len() == 1))?;
            let value = number.materialize().ok()?.to_f64()[0];
            (value != 1.0).then(|| format!("{:?} multiplies or divides by {value}", node.name))
        }
        Op::Unary(Unary::Tanh) => Some(format!("{:?} is a hyperbolic tangent: a soft cap", node.name)),
        _ => None,
    }
}

fn activation(graph: &Graph) -> Option<&'static str> {
    graph.node_ids().find_map(|id| match graph.node(id).op {
        Op::Swish { .. } => Some("silu"),
        Op::Gelu { tanh: true } => Some("gelu_new"),
        Op::Gelu { tanh: false } => Some("gelu"),
        Op::Unary(Unary::Relu) => Some("relu"),
        _ => None,
    })
}

/// The common epsilon of all norms.
fn epsilon(graph: &Graph, reasons: &mut Vec<String>) -> Option<f32> {
    let mut found = graph.node_ids().filter_map(|id| match graph.node(id).op {
        Op::RmsNormalization { epsilon, .. } | Op::LayerNormalization { epsilon, .. } => Some(epsilon),
        _ => None,
    });
    let first = found.next()?;
    if let Some(other) = found.find(|other| *other != first) {
        reasons.push(format!("norms have the epsilons {first} and {other}"));
    }
    Some(first)
}
