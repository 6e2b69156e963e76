//! Weights written for other programs: complete, with the right names, and with all settings that a reader would
//! otherwise guess.

use std::path::{Path, PathBuf};

use lapidary::graph::{Constant, Graph, Op};
use lapidary::package::{self, Package, RefitRequest};
use lapidary::tensor::Tensor;
use lapidary::weights::checks::Allowed;
use lapidary::weights::export::{ExportError, Format, export};
use lapidary::weights::model::NameKind;
use lapidary::weights::norm_parameter::NormParameter;
use lapidary::weights::source::WeightSource;
use lapidary::{ConvertOptions, Spec, convert};
use safetensors::SafeTensors;
use serde_json::{Value, json};

use crate::support::fixture;

fn converted(export: &str, folder: &Path) -> Package {
    let output = folder.join(export.replace('/', "-"));
    let conversion = Spec::parse("capacity: [32]").unwrap().resolve().unwrap();
    let model = fixture(export).join("model.onnx");
    convert(&model, &output, conversion, &ConvertOptions::default()).unwrap_or_else(|e| panic!("{e}"));
    Package::open(&output).unwrap()
}

fn written(package: &Package, norms: Option<NormParameter>, format: Format, to: &Path) -> Result<PathBuf, ExportError> {
    let (weights, graph) = (package.model_weights().unwrap(), package.architecture().unwrap());
    export(&weights, &graph, &package.manifest.architecture, norms, format, to)?;
    Ok(to.to_path_buf())
}

fn refit(package: &Package, from: &Path) -> Result<Package, String> {
    let source = WeightSource::open(from, &package.source_context()).map_err(|e| e.to_string())?;
    let request = RefitRequest {
        source: &source,
        adapter: None,
        identical: None,
        allowed: Allowed::default(),
        extra_allowed: false,
    };
    let writer = package::refit(package, &request, |_, _| {}).map_err(|e| e.to_string())?;
    writer.finish().map_err(|e| e.to_string())?;
    Ok(Package::open(&package.folder).unwrap())
}

/// One fp32 tensor of a safetensors file.
fn tensor(file: &Path, name: &str) -> Vec<f32> {
    let bytes = std::fs::read(file).unwrap();
    let parsed = SafeTensors::deserialize(&bytes).unwrap();
    let view = parsed
        .tensor(name)
        .unwrap_or_else(|_| panic!("{name} of {:?}", parsed.names()));
    let numbers = view.data().as_chunks::<4>().0;
    numbers.iter().map(|b| f32::from_le_bytes(*b)).collect()
}

#[test]
fn tensorrt_llm_gets_every_field() {
    let folder = tempfile::tempdir().unwrap();
    for (model, expected) in [
        (
            "exports/llama-optimum",
            json!({"architecture": "LlamaForCausalLM", "attn_bias": false, "mlp_bias": false, "qk_layernorm": false,
                   "rotary_base": 10000.0, "rotary_scaling": null, "position_embedding_type": "rope_gpt_neox",
                   "hidden_act": "silu", "num_attention_heads": 4, "num_key_value_heads": 2, "head_size": 16,
                   "tie_word_embeddings": false}),
        ),
        (
            "exports/qwen2-optimum",
            json!({"architecture": "Qwen2ForCausalLM", "qwen_type": "qwen2", "attn_bias": true, "use_logn_attn": false,
                   "mlp_bias": false, "tie_word_embeddings": true}),
        ),
        (
            "exports/qwen3-optimum",
            json!({"architecture": "Qwen3ForCausalLM", "qwen_type": "qwen3", "attn_bias": false, "qk_layernorm": true}),
        ),
        (
            "exports/gpt2-optimum",
            json!({"architecture": "GPT2LMHeadModel", "position_embedding_type": "learned_absolute", "bias": true,
                   "hidden_act": "gelu_new", "max_position_embeddings": 64}),
        ),
        (
            "families/optimum-phi3",
            json!({"architecture": "LlamaForCausalLM", "rotary_base": 10000.0, "intermediate_size": 96}),
        ),
        (
            "families/optimum-gptj2048",
            json!({"architecture": "GPTJForCausalLM", "position_embedding_type": "rope_gptj", "rotary_dim": 8}),
        ),
    ] {
        let package = converted(model, folder.path());
        let to = folder.path().join(format!("{}-trtllm", model.replace('/', "-")));
        let to = written(&package, None, Format::TensorRtLlm, &to).unwrap_or_else(|e| panic!("{model}: {e}"));
        let config: Value = serde_json::from_str(&std::fs::read_to_string(to.join("config.json")).unwrap()).unwrap();
        for (field, value) in expected.as_object().unwrap() {
            assert_eq!(config.get(field), Some(value), "{model}: {field}");
        }
        assert!(
            config["norm_epsilon"]
                .as_f64()
                .is_some_and(|e| (1e-7..1e-4).contains(&e)),
            "{config}"
        );
        // And it is read back as the same weights, without contradictions.
        let hash = package.manifest.weights.set_hash.clone();
        let again = refit(&package, &to).unwrap_or_else(|e| panic!("{model}: {e}"));
        assert_eq!(again.manifest.weights.set_hash, hash, "{model}");
    }
}

#[test]
fn what_tensorrt_llm_cannot_compute_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    for (model, parts) in [
        ("exports/mistral-optimum", &["2 of 2 layers have a sliding window"][..]),
        ("families/optimum-gemma3", &["attention_output_norm"]),
        (
            "families/optimum-gptneox",
            &["gpt_neox.layers.0.attention.query_key_value"],
        ),
    ] {
        let package = converted(model, folder.path());
        let to = folder.path().join("none");
        let error = written(&package, None, Format::TensorRtLlm, &to)
            .unwrap_err()
            .to_string();
        for part in parts {
            assert!(error.contains(part), "{model}: {error}");
        }
        assert!(!to.exists(), "{model}");
    }
}

/// Another export or package, with weights trained for another graph.
#[test]
fn a_source_that_computes_otherwise_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let package = converted("exports/llama-optimum", folder.path());
    let refused = |change: &dyn Fn(&mut Graph)| {
        let mut graph = package.architecture().unwrap();
        change(&mut graph);
        let architecture = package.manifest.architecture.clone();
        let source = WeightSource::package(folder.path(), package.model_weights().unwrap(), graph, architecture);
        let found = package::find_weights(&package, &source, None, false);
        found.map(|_| ()).map_err(|e| e.to_string())
    };
    assert_eq!(refused(&|_| {}), Ok(()));
    let error = refused(&|graph| {
        let norms: Vec<_> = graph.node_ids().collect();
        for id in norms {
            if let Op::RmsNormalization { epsilon, .. } = &mut graph.node_mut(id).op {
                *epsilon = 0.1;
            }
        }
    });
    let error = error.unwrap_err();
    assert!(
        error.contains("epsilon of the norms: 0.1 in the file, 1e-5 in the package"),
        "{error}"
    );
    // Every second row: another base, or a scaling.
    let error = refused(&|graph| {
        let rotations = graph.node_ids().map(|id| graph.node(id).clone());
        let rotations: Vec<_> = rotations
            .filter(|n| matches!(n.op, Op::RotaryEmbedding { .. }))
            .collect();
        for table in rotations
            .iter()
            .flat_map(|node| [node.input(1).unwrap(), node.input(2).unwrap()])
        {
            let tensor = graph.constant(table).unwrap().materialize().unwrap();
            let (rows, width) = (tensor.shape()[0], tensor.shape()[1]);
            let values = tensor.to_f32();
            let row = |i: usize| &values[(2 * i).min(rows - 1) * width..][..width];
            let slower: Vec<f32> = (0..rows).flat_map(|i| row(i).to_vec()).collect();
            graph.set_constant(table, Constant::tensor(Tensor::from_f32(vec![rows, width], &slower)));
        }
    });
    let error = error.unwrap_err();
    assert!(error.contains("rotary base of layer 0"), "{error}");
}

/// A scale of the scores, a soft cap or a factor that the format has no field for.
#[test]
fn a_foreign_factor_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let package = converted("exports/llama-optimum", folder.path());
    let mut graph = package.architecture().unwrap();
    let attention = graph
        .node_ids()
        .find(|id| matches!(graph.node(*id).op, Op::Attention(_)));
    if let Op::Attention(attention) = &mut graph.node_mut(attention.unwrap()).op {
        attention.scale = Some(0.5);
    }
    let weights = package.model_weights().unwrap();
    let to = folder.path().join("none");
    let architecture = &package.manifest.architecture;
    let error = export(&weights, &graph, architecture, None, Format::TensorRtLlm, &to).unwrap_err();
    assert!(error.to_string().contains("scores are scaled by 0.5"), "{error}");
}

/// The checkpoint of a Gemma, whose norms store the factor minus 1.
fn gemma_checkpoint(package: &Package, folder: &Path) -> PathBuf {
    let norms = Some(NormParameter::FactorMinusOne);
    written(package, norms, Format::HuggingFace, &folder.join("gemma3")).unwrap()
}

#[test]
fn gemma_from_its_own_checkpoint() {
    let folder = tempfile::tempdir().unwrap();
    let package = converted("families/optimum-gemma3", folder.path());
    let hash = package.manifest.weights.set_hash.clone();
    // Nothing shows that the exporter stored 1 + w in its initializers.
    let error = written(&package, None, Format::HuggingFace, &folder.path().join("none")).unwrap_err();
    assert!(matches!(error, ExportError::UnknownNorms), "{error}");

    let checkpoint = gemma_checkpoint(&package, folder.path());
    let file = checkpoint.join("model.safetensors");
    // Every norm of Gemma 3 is present, with w of the graph's 1 + w.
    let weights = package.model_weights().unwrap();
    for (name, module) in [
        ("model.norm", "norm"),
        ("model.layers.1.input_layernorm", "layers.1.attention_norm"),
        (
            "model.layers.1.post_attention_layernorm",
            "layers.1.attention_output_norm",
        ),
        ("model.layers.1.pre_feedforward_layernorm", "layers.1.feed_forward_norm"),
        (
            "model.layers.1.post_feedforward_layernorm",
            "layers.1.feed_forward_output_norm",
        ),
        ("model.layers.1.self_attn.q_norm", "layers.1.attention.query_norm"),
    ] {
        let (_, factor) = weights
            .tensor(NameKind::Module, &format!("{module}.weight"))
            .unwrap()
            .unwrap();
        let factor = factor.materialize().unwrap().to_f32();
        let held = tensor(&file, &format!("{name}.weight"));
        assert!(held.iter().zip(&factor).all(|(w, factor)| w + 1.0 == *factor), "{name}");
        assert!(held.iter().any(|w| *w != 0.0));
    }

    // Equal values prove what the checkpoint stores, even if its configuration leaves it open.
    assert_eq!(refit(&package, &checkpoint).unwrap().manifest.weights.set_hash, hash);
    // A fine-tuned model without a configuration could store either.
    crate::refit::change(&file, "model.norm.weight", |w| w + 0.25);
    for name in [
        "model.layers.0.input_layernorm.weight",
        "model.layers.0.self_attn.q_norm.weight",
    ] {
        crate::refit::change(&file, name, |w| w * 1.5);
    }
    let package = converted("families/optimum-gemma3", &folder.path().join("again"));
    assert_eq!(package.manifest.norms, None);
    let bare = package::strip(&package, &folder.path().join("bare"), false);
    bare.unwrap();
    std::fs::write(checkpoint.join("config.json"), r#"{"model_type": "gemma3_text"}"#).unwrap();
    let tuned = refit(&package, &checkpoint).unwrap();
    assert_ne!(tuned.manifest.weights.set_hash, hash);
    assert_eq!(tuned.manifest.norms, Some(NormParameter::FactorMinusOne));
    let weights = tuned.model_weights().unwrap();
    let (_, factor) = weights.tensor(NameKind::Module, "norm.weight").unwrap().unwrap();
    let held = tensor(&file, "model.norm.weight");
    let factor = factor.materialize().unwrap().to_f32();
    assert!(held.iter().zip(&factor).all(|(w, factor)| w + 1.0 == *factor));
    // Now it is known: written weights equal those read.
    let again = folder.path().join("again-written");
    written(&tuned, tuned.manifest.norms, Format::HuggingFace, &again).unwrap();
    // Bits lost by rounding 1 + w are not restored.
    let written = tensor(&again.join("model.safetensors"), "model.norm.weight");
    assert!(written.iter().zip(&held).all(|(a, b)| a + 1.0 == b + 1.0));
}

#[test]
fn norms_of_unknown_meaning_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let package = converted("families/optimum-gemma3", folder.path());
    let checkpoint = gemma_checkpoint(&package, folder.path());
    let file = checkpoint.join("model.safetensors");
    let norms: Vec<String> = {
        let bytes = std::fs::read(&file).unwrap();
        let parsed = SafeTensors::deserialize(&bytes).unwrap();
        parsed
            .names()
            .into_iter()
            .filter(|n| n.contains("norm"))
            .map(|n| n.to_string())
            .collect()
    };
    for name in &norms {
        crate::refit::change(&file, name, |w| w * 1.5 + 0.125);
    }
    let hash = package.manifest.weights.set_hash.clone();
    let error = refit(&package, &checkpoint)
        .map(|_| ())
        .expect_err("nothing says what it holds");
    assert!(
        error.contains("w or 1 + w cannot be known without its config.json"),
        "{error}"
    );
    assert_eq!(Package::open(&package.folder).unwrap().manifest.weights.set_hash, hash);
}

#[test]
fn a_weight_without_a_name_is_not_left_out() {
    let folder = tempfile::tempdir().unwrap();
    let package = converted("families/optimum-gptneox", folder.path());
    for format in [Format::HuggingFace, Format::Gpt2, Format::TensorRtLlm] {
        let to = folder.path().join("none");
        let error = written(&package, None, format, &to).unwrap_err();
        match &error {
            ExportError::NoName { names, .. } => {
                assert!(names.iter().any(|n| n.contains("query_key_value")), "{error}");
            }
            other => panic!("{format:?}: {other}"),
        }
        assert!(!to.exists());
    }
}
