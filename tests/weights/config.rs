//! `config.json` beside a checkpoint, against the graphs of real exports.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, OnceLock};

use lapidary::tensor::DType;
use lapidary::weights::config::{self, ConfigError};
use lapidary::weights::source::{SourceContext, WeightSource};
use lapidary::{onnx, passes};
use safetensors::tensor::{Dtype, TensorView};
use serde_json::{Value, json};

use crate::refit::export;
use crate::support::fixture;

type Made = (lapidary::graph::Graph, passes::Architecture);

/// The canonical graph of an export, made once.
fn canonical(model: &Path) -> &'static Made {
    static MADE: OnceLock<Mutex<HashMap<PathBuf, &'static Made>>> = OnceLock::new();
    let mut made = MADE.get_or_init(Mutex::default).lock().unwrap();
    made.entry(model.to_path_buf()).or_insert_with(|| {
        let options = passes::CanonicalizeOptions {
            max_positions: 64,
            ..passes::CanonicalizeOptions::default()
        };
        let canonical = passes::canonicalize(onnx::read(model).unwrap(), &options).unwrap();
        Box::leak(Box::new((canonical.graph, canonical.architecture)))
    })
}

fn context() -> SourceContext {
    SourceContext {
        positions: 64,
        dtype: DType::F32,
        architecture_hash: String::new(),
        activations: lapidary::passes::ActivationPolicy::default(),
        mask_windows: Default::default(),
    }
}

/// A checkpoint with these tensors, of one element each, and this configuration.
fn checkpoint(folder: &Path, config: &Value, tensors: &[(&str, f32)]) -> WeightSource {
    let bytes: Vec<_> = tensors.iter().map(|(name, v)| (*name, v.to_le_bytes())).collect();
    let views = bytes
        .iter()
        .map(|(name, bytes)| (*name, TensorView::new(Dtype::F32, vec![1], bytes).unwrap()));
    let bytes = safetensors::serialize(views, None).unwrap();
    std::fs::write(folder.join("model.safetensors"), bytes).unwrap();
    std::fs::write(folder.join("config.json"), config.to_string()).unwrap();
    WeightSource::open(folder, &context()).unwrap()
}

const UNTIED: &[(&str, f32)] = &[("model.embed_tokens.weight", 1.0), ("lm_head.weight", 2.0)];

/// The contradictions, as they are written.
fn contradictions(model: &Path, config: &Value, tensors: &[(&str, f32)]) -> Vec<String> {
    let folder = tempfile::tempdir().unwrap();
    let source = checkpoint(folder.path(), config, tensors);
    let (graph, architecture) = canonical(model);
    match config::check(&source, graph, architecture, Some(64)) {
        Ok(()) => Vec::new(),
        Err(ConfigError::Contradiction { path, differences }) => {
            assert_eq!(path, folder.path().join("config.json"));
            let line = |d: &config::Difference| format!("{}: {} / {}", d.field, d.file, d.package);
            differences.iter().map(line).collect()
        }
        Err(other) => panic!("{other}"),
    }
}

/// What transformers 4.57 writes for the models of `fixtures/exports`.
fn config_of(family: &str) -> Value {
    let common = json!({
        "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
        "intermediate_size": 48, "vocab_size": 97, "max_position_embeddings": 64, "rms_norm_eps": 1e-5,
        "hidden_act": "silu", "rope_theta": 10000.0, "rope_scaling": null, "model_type": family,
    });
    let more = match family {
        "llama" => {
            json!({"tie_word_embeddings": false, "attention_bias": false, "mlp_bias": false, "pretraining_tp": 1})
        }
        "mistral" => json!({"tie_word_embeddings": false, "sliding_window": 8}),
        "qwen2" => json!({
            "tie_word_embeddings": true, "use_sliding_window": false, "sliding_window": null, "max_window_layers": 28,
            "layer_types": ["full_attention", "full_attention"],
        }),
        "qwen3" => json!({
            "tie_word_embeddings": false, "use_sliding_window": false, "sliding_window": 4096, "max_window_layers": 28,
        }),
        _ => {
            return json!({
                "model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 4, "n_inner": 48, "n_positions": 64,
                "vocab_size": 97, "layer_norm_epsilon": 1e-5, "activation_function": "gelu_new",
                "scale_attn_weights": true, "scale_attn_by_inverse_layer_idx": false, "tie_word_embeddings": true,
            });
        }
    };
    with(&common, more)
}

/// With some fields of another object.
fn with(config: &Value, more: Value) -> Value {
    let mut config = config.as_object().unwrap().clone();
    config.extend(more.as_object().unwrap().clone());
    Value::Object(config)
}

#[test]
fn the_configuration_that_fits_is_accepted() {
    let names = std::fs::read_dir(export("llama-optimum").ancestors().nth(2).unwrap()).unwrap();
    let mut checked = 0;
    for name in names {
        let name = name.unwrap().file_name().into_string().unwrap();
        let family = name.split('-').next().unwrap();
        // These exporters drop the window, so a configuration with a window must be refused.
        let windowless = ["mistral-mobius", "mistral-mobius-static", "mistral-ort-genai"].contains(&name.as_str());
        if !name.contains('-') {
            continue;
        }
        let found = contradictions(&export(&name), &config_of(family), UNTIED);
        match windowless {
            false => assert_eq!(found, [] as [&str; 0], "{name}"),
            true => assert_eq!(
                found,
                ["sliding_window: 8 (a window of 8 in layer 0) / no window"],
                "{name}"
            ),
        }
        checked += 1;
    }
    assert!(checked > 40, "{checked}");
}

#[test]
fn every_field_that_contradicts_is_named_with_both_values() {
    let llama3 = json!({
        "rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    });
    let plain = "10000 without scaling";
    let cases = [
        (
            "llama",
            json!({"rope_theta": 1e6}),
            format!("rope_theta: 1000000 / {plain}"),
        ),
        (
            "llama",
            json!({"rope_parameters": {"rope_theta": 1e6, "rope_type": "default"}}),
            format!("rope_parameters: 1000000 / {plain}"),
        ),
        (
            "llama",
            json!({"rope_scaling": {"rope_type": "linear", "factor": 8.0}}),
            format!(r#"rope_scaling: 10000 with {{"rope_type":"linear","factor":8.0}} / {plain}"#),
        ),
        (
            "llama",
            json!({"rope_scaling": llama3}),
            format!("rope_scaling: 10000 with {llama3} / {plain}"),
        ),
        (
            "llama",
            json!({"rope_scaling": {"type": "yarn", "factor": 4.0}}),
            format!(r#"rope_scaling: 10000 with {{"type":"yarn","factor":4.0}} / {plain}"#),
        ),
        (
            "llama",
            json!({"rope_scaling": {"type": "of next year", "factor": 4.0}}),
            format!(r#"rope_scaling: 10000 with {{"type":"of next year","factor":4.0}} / {plain}"#),
        ),
        (
            "llama",
            json!({"partial_rotary_factor": 0.5}),
            "partial_rotary_factor: 0.5 / 1".into(),
        ),
        ("llama", json!({"rms_norm_eps": 0.1}), "rms_norm_eps: 0.1 / 1e-5".into()),
        (
            "llama",
            json!({"rms_norm_eps": 1e-6}),
            "rms_norm_eps: 1e-6 / 1e-5".into(),
        ),
        ("llama", json!({"hidden_act": "gelu"}), "hidden_act: gelu / silu".into()),
        (
            "llama",
            json!({"num_attention_heads": 2}),
            "num_attention_heads: 2 / 4".into(),
        ),
        (
            "llama",
            json!({"num_key_value_heads": 4}),
            "num_key_value_heads: 4 / 2".into(),
        ),
        ("llama", json!({"head_dim": 8}), "head_dim: 8 / 16".into()),
        ("llama", json!({"hidden_size": 64}), "hidden_size: 64 / 32".into()),
        (
            "llama",
            json!({"num_hidden_layers": 3}),
            "num_hidden_layers: 3 / 2".into(),
        ),
        (
            "llama",
            json!({"intermediate_size": 100}),
            "intermediate_size: 100 / 48".into(),
        ),
        ("llama", json!({"vocab_size": 98}), "vocab_size: 98 / 97".into()),
        (
            "llama",
            json!({"model_type": "gemma"}),
            r#"model_type: "gemma" (embeddings times 5.65685) / embeddings times 1"#.into(),
        ),
        (
            "llama",
            json!({"sliding_window": 16, "model_type": "mistral"}),
            "sliding_window: 16 (a window of 16 in layer 0) / no window".into(),
        ),
        (
            "mistral",
            json!({"sliding_window": 16}),
            "sliding_window: 16 (a window of 16 in layer 0) / a window of 8".into(),
        ),
        (
            "mistral",
            json!({"sliding_window": null}),
            "sliding_window: null (no window in layer 0) / a window of 8".into(),
        ),
        (
            "mistral",
            json!({"model_type": "llama"}),
            r#"model_type: "llama" (no window in layer 0) / a window of 8"#.into(),
        ),
        (
            "qwen3",
            json!({"use_sliding_window": true, "sliding_window": 16, "max_window_layers": 1}),
            "sliding_window: 16 (a window of 16 in layer 1) / no window".into(),
        ),
        (
            "qwen2",
            json!({"use_sliding_window": true, "sliding_window": 16,
                   "layer_types": ["sliding_attention", "full_attention"]}),
            "sliding_window: 16 (a window of 16 in layer 0) / no window".into(),
        ),
        (
            "gpt2",
            json!({"layer_norm_epsilon": 1e-12}),
            "layer_norm_epsilon: 1e-12 / 1e-5".into(),
        ),
        (
            "gpt2",
            json!({"activation_function": "gelu"}),
            "activation_function: gelu / gelu_pytorch_tanh".into(),
        ),
        ("gpt2", json!({"n_head": 2}), "n_head: 2 / 4".into()),
        (
            "gpt2",
            json!({"scale_attn_weights": false}),
            "scale_attn_weights: false (scores times 1) / scores times 0.353553".into(),
        ),
        (
            "gpt2",
            json!({"scale_attn_by_inverse_layer_idx": true}),
            "scale_attn_by_inverse_layer_idx: true (scores times 0.176777) / scores times 0.353553".into(),
        ),
    ];
    for (family, change, expected) in cases {
        let model = export(&format!("{family}-optimum"));
        let config = with(&config_of(family), change.clone());
        assert_eq!(contradictions(&model, &config, UNTIED), [expected], "{family} {change}");
    }
}

/// These fields do not change results, or are not supported.
#[test]
fn what_does_not_contradict() {
    let model = export("llama-optimum");
    for change in [
        json!({"rope_scaling": {}}),
        json!({"rope_scaling": {"rope_type": "default"}}),
        json!({"rope_scaling": {"type": "dynamic", "factor": 2.0}}),
        json!({"rope_parameters": {"rope_theta": 10000, "rope_type": "default"}}),
        json!({"rope_theta": null, "rms_norm_eps": null, "hidden_act": null, "head_dim": null}),
        json!({"hidden_act": "swish"}),
        json!({"rms_norm_eps": 9.999999747378752e-06}),
        json!({"model_type": "mistral", "sliding_window": 4096}),
        json!({"model_type": "mistral", "sliding_window": 64}),
        json!({"model_type": "of next year", "sliding_window": 16}),
        json!({"hidden_act": "of next year"}),
        json!({"torch_dtype": "float16", "initializer_range": 0.5, "attention_dropout": 0.5, "use_cache": false}),
        json!({"model_type": null}),
        json!({"max_position_embeddings": 131072}),
    ] {
        let config = with(&config_of("llama"), change.clone());
        assert_eq!(contradictions(&model, &config, UNTIED), [] as [&str; 0], "{change}");
    }
    assert_eq!(contradictions(&model, &json!({}), UNTIED), [] as [&str; 0]);
    // For a multimodal model: outer fields belong to another part.
    let nested = json!({"model_type": "llava", "hidden_size": 1000, "text_config": config_of("llama")});
    assert_eq!(contradictions(&model, &nested, UNTIED), [] as [&str; 0]);
    let nested = json!({"model_type": "llava", "text_config": with(&config_of("llama"), json!({"rope_theta": 5e5}))});
    assert_eq!(
        contradictions(&model, &nested, UNTIED),
        ["rope_theta: 500000 / 10000 without scaling"]
    );
}

#[test]
fn a_head_that_is_missing_or_not_meant() {
    let embedding = &UNTIED[..1];
    let (untied, tied) = (export("llama-optimum"), export("qwen2-optimum"));
    let says = |family: &str, tie: Value| with(&config_of(family), json!({"tie_word_embeddings": tie}));
    let missing = ["tie_word_embeddings: false / a head, which the checkpoint does not hold"];
    for (model, family) in [(&untied, "llama"), (&tied, "qwen2")] {
        assert_eq!(contradictions(model, &says(family, json!(false)), embedding), missing);
        for tie in [json!(true), json!(null)] {
            assert_eq!(contradictions(model, &says(family, tie), embedding), [] as [&str; 0]);
        }
    }
    let other = contradictions(&untied, &says("llama", json!(true)), UNTIED);
    assert_eq!(
        other,
        ["tie_word_embeddings: true / a separate head, and lm_head.weight is not the embedding"]
    );
    let same = [("model.embed_tokens.weight", 1.0), ("lm_head.weight", 1.0)];
    assert_eq!(
        contradictions(&untied, &says("llama", json!(true)), &same),
        [] as [&str; 0]
    );
}

#[test]
fn configurations_of_tensorrt_llm() {
    let llama = json!({
        "architecture": "LlamaForCausalLM", "dtype": "float32", "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_size": 16, "hidden_size": 32, "intermediate_size": 48, "vocab_size": 97,
        "position_embedding_type": "rope_gpt_neox", "max_position_embeddings": 64, "hidden_act": "silu",
        "norm_epsilon": 1e-5, "rotary_base": 10000.0, "rotary_scaling": null,
        "mapping": {"world_size": 1, "tp_size": 1, "pp_size": 1},
    });
    let model = export("llama-optimum");
    assert_eq!(contradictions(&model, &llama, UNTIED), [] as [&str; 0]);
    for (change, expected) in [
        (
            json!({"mapping": {"world_size": 2, "tp_size": 2, "pp_size": 1}}),
            "tp_size: 2 / the whole model, but one rank holds a part",
        ),
        (
            json!({"mapping": {"world_size": 2}}),
            "world_size: 2 / the whole model, but one rank holds a part",
        ),
        (
            json!({"rotary_base": 1e6}),
            "rotary_base: 1000000 / 10000 without scaling",
        ),
        (
            json!({"rotary_scaling": {"type": "linear", "factor": 2.0}}),
            r#"rotary_scaling: 10000 with {"type":"linear","factor":2.0} / 10000 without scaling"#,
        ),
        (json!({"norm_epsilon": 1e-6}), "norm_epsilon: 1e-6 / 1e-5"),
        (json!({"hidden_act": "gelu"}), "hidden_act: gelu / silu"),
        (json!({"head_size": 8}), "head_size: 8 / 16"),
        (
            json!({"position_embedding_type": "rope_gptj"}),
            "position_embedding_type: rope_gptj / rope_gpt_neox",
        ),
        (
            json!({"position_embedding_type": "learned_absolute"}),
            "position_embedding_type: learned_absolute / rotary embedding",
        ),
        (json!({"rotary_pct": 0.25}), "rotary_pct: 0.25 / 1"),
        (json!({"q_scaling": 2.0}), "q_scaling: 2 / 1"),
    ] {
        let found = contradictions(&model, &with(&llama, change.clone()), UNTIED);
        assert_eq!(found, [expected], "{change}");
    }
}

/// Exports of other families.
#[test]
fn other_families() {
    let more = fixture("families");
    let gemma = json!({
        "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
        "intermediate_size": 96, "vocab_size": 320, "rms_norm_eps": 1e-5, "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": 16, "sliding_window": 16, "tie_word_embeddings": true,
    });
    let gemma3 = with(
        &gemma,
        json!({"model_type": "gemma3_text", "rope_theta": 1e6, "rope_local_base_freq": 10000.0,
               "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
               "attn_logit_softcapping": null, "final_logit_softcapping": null}),
    );
    let gemma2 = with(
        &gemma,
        json!({"model_type": "gemma2", "num_hidden_layers": 2, "rope_theta": 10000.0, "rms_norm_eps": 1e-5,
               "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}),
    );
    let neox = json!({
        "model_type": "gpt_neox", "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 320,
        "intermediate_size": 96, "hidden_act": "gelu", "rotary_pct": 0.25, "rotary_emb_base": 10000,
        "layer_norm_eps": 1e-5, "use_parallel_residual": true, "tie_word_embeddings": false,
    });
    let phi3 = json!({
        "model_type": "phi3", "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "intermediate_size": 96, "vocab_size": 320, "hidden_act": "silu",
        "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "rope_scaling": null, "sliding_window": null,
    });
    let embedding = &UNTIED[..1];
    let found = |name: &str, config: &Value, change: Value, tensors: &[(&str, f32)]| {
        let model = more.join(name).join("model.onnx");
        model
            .is_file()
            .then(|| contradictions(&model, &with(config, change), tensors))
    };
    for (name, config, change, expected) in [
        ("optimum-gemma3", &gemma3, json!({}), ""),
        (
            "optimum-gemma3",
            &gemma3,
            json!({"rope_local_base_freq": 5000.0}),
            "rope_local_base_freq: 5000",
        ),
        (
            "optimum-gemma3",
            &gemma3,
            json!({"query_pre_attn_scalar": 64}),
            "query_pre_attn_scalar: 64 (scores times 0.125)",
        ),
        (
            "optimum-gemma3",
            &gemma3,
            json!({"attn_logit_softcapping": 50.0}),
            "attn_logit_softcapping: 50 / none",
        ),
        (
            "optimum-gemma3",
            &gemma3,
            json!({"sliding_window": 32}),
            "sliding_window: 32",
        ),
        (
            "optimum-gemma3",
            &gemma3,
            json!({"model_type": "llama"}),
            "model_type: \"llama\" (embeddings times 1)",
        ),
        ("dynamo18-gemma2", &gemma2, json!({}), ""),
        (
            "dynamo18-gemma2",
            &gemma2,
            json!({"final_logit_softcapping": null}),
            "final_logit_softcapping: none / 30",
        ),
        (
            "dynamo18-gemma2",
            &gemma2,
            json!({"attn_logit_softcapping": 20.0}),
            "attn_logit_softcapping: 20 / 50",
        ),
    ] {
        if let Some(found) = found(name, config, change.clone(), embedding) {
            let right = match expected.is_empty() {
                true => found.is_empty(),
                false => found.iter().any(|line| line.starts_with(expected)),
            };
            assert!(right, "{name} {change}: {found:?}");
        }
    }
    let untied = [("gpt_neox.embed_in.weight", 1.0), ("embed_out.weight", 2.0)];
    for (name, config, change, expected) in [
        ("optimum-gptneox", &neox, json!({}), ""),
        (
            "optimum-gptneox",
            &neox,
            json!({"use_parallel_residual": false}),
            "use_parallel_residual: false / true",
        ),
        (
            "optimum-gptneox",
            &neox,
            json!({"rotary_pct": 1.0}),
            "rotary_pct: 1 / 0.25",
        ),
        (
            "optimum-gptneox",
            &neox,
            json!({"rotary_emb_base": 1000}),
            "rotary_emb_base: 1000 / 10000",
        ),
        ("optimum-phi3", &phi3, json!({}), ""),
        (
            "optimum-phi3",
            &phi3,
            json!({"sliding_window": 16}),
            "sliding_window: 16",
        ),
    ] {
        if let Some(found) = found(name, config, change.clone(), &untied) {
            let right = match expected.is_empty() {
                true => found.is_empty(),
                false => found.iter().any(|line| line.starts_with(expected)),
            };
            assert!(right, "{name} {change}: {found:?}");
        }
    }
}

#[test]
fn a_damaged_configuration() {
    let folder = tempfile::tempdir().unwrap();
    let (graph, architecture) = canonical(&export("llama-optimum"));
    let source = checkpoint(folder.path(), &json!({}), UNTIED);
    std::fs::write(folder.path().join("config.json"), "{\"rope_theta\": ").unwrap();
    let error = config::check(&source, graph, architecture, None)
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("config.json") && error.contains("not a valid"),
        "{error}"
    );
    // A shard or a single file has it beside it.
    let single = WeightSource::open(&folder.path().join("model.safetensors"), &context()).unwrap();
    assert!(config::check(&single, graph, architecture, None).is_err());
    std::fs::remove_file(folder.path().join("config.json")).unwrap();
    assert!(config::check(&single, graph, architecture, None).is_ok());
}
