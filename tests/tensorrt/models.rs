//! Whole decoders through the real lowering: every supported relative of Llama, and the largest shape.

use lapidary::backend::tensorrt::{self, BuildOptions, Plan};
use lapidary::graph::Graph;
use lapidary::graph::op::Rounding;
use lapidary::lower::synthetic::Decoder;
use lapidary::lower::{AttentionForm, LinearForm, LowerOptions, lower};
use lapidary::network::segments::Steps;
use lapidary::network::{Logits, Profile, Tokens, WeightMode};
use lapidary::passes::{CanonicalizeOptions, canonicalize};
use lapidary::tensor::DType;

use crate::net::{bytes_of, library};
use crate::rounded::rounded;

pub const DYNAMIC: Tokens = Tokens::Dynamic {
    min: 1,
    opt: 8,
    max: 16,
};

/// Decode, a prefill chunk, a dynamic prefill, and all logits.
pub fn profiles(capacity: usize) -> [Profile; 4] {
    let dynamic = Profile {
        tokens: DYNAMIC,
        ..Profile::decode(capacity)
    };
    let all = Profile {
        logits: Logits::All,
        ..dynamic
    };
    [Profile::decode(capacity), Profile::prefill(8, capacity), dynamic, all]
}

/// Lowers and builds, or says for which profile it failed and why.
pub fn try_build(graph: &Graph, profile: &Profile, options: &LowerOptions) -> Result<Vec<Plan>, String> {
    let what = || format!("{profile} {:?}", options.weight_mode);
    let network = lower(graph, profile, options).map_err(|error| format!("{}: {error}", what()))?;
    tensorrt::build_all(&library(), &network, &BuildOptions::default()).map_err(|error| format!("{}: {error}", what()))
}

fn builds(name: &str, graph: &Graph, options: &LowerOptions) {
    let failed: Vec<String> = profiles(32)
        .iter()
        .filter_map(|profile| try_build(graph, profile, options).err())
        .collect();
    assert!(failed.is_empty(), "{name}:\n{}", failed.join("\n"));
}

/// A model's graph with small finite weights.
fn filled(decoder: &Decoder) -> Graph {
    decoder.graph_with(|_, dtype, shape| bytes_of(dtype, &shape, |i| (i % 41) as u8).into())
}

fn tiny(dtype: DType) -> Decoder {
    Decoder {
        dtype,
        ..Decoder::tiny()
    }
}

#[test]
fn relatives_build_with_bound_weights() {
    let f16 = || tiny(DType::F16);
    let relatives = [
        ("llama", f16()),
        ("all heads", Decoder { kv_heads: 4, ..f16() }),
        ("tied", Decoder { tied: true, ..f16() }),
        (
            "qwen2",
            Decoder {
                qkv_bias: true,
                ..f16()
            },
        ),
        ("qwen3", Decoder { qk_norm: true, ..f16() }),
        (
            "mistral",
            Decoder {
                window: Some(4),
                ..f16()
            },
        ),
        ("softcap", Decoder { softcap: 30.0, ..f16() }),
    ];
    for (name, decoder) in relatives {
        builds(name, &decoder.graph(), &LowerOptions::default());
    }
}

#[test]
fn every_float_type_builds_bound_and_embedded() {
    for dtype in [DType::F32, DType::F16, DType::Bf16] {
        for weight_mode in [WeightMode::Bind, WeightMode::Embed] {
            let options = LowerOptions {
                weight_mode,
                ..LowerOptions::default()
            };
            builds(dtype.name(), &filled(&tiny(dtype)), &options);
        }
    }
}

#[test]
fn every_choice_of_the_lowering_builds() {
    let graph = tiny(DType::F16).graph();
    let with = |linear, attention, fold_groups| LowerOptions {
        fold_groups,
        linear,
        attention,
        ..LowerOptions::default()
    };
    for options in [
        LowerOptions::for_engines(),
        with(LinearForm::FlattenActivation, AttentionForm::Layer, true),
        with(LinearForm::RaiseWeight, AttentionForm::Layer, false),
        with(LinearForm::RaiseWeight, AttentionForm::Decomposed, false),
        with(LinearForm::ReduceRow, AttentionForm::Split(4), false),
        LowerOptions {
            fold_prefill: Some(0),
            ..with(LinearForm::ReduceRow, AttentionForm::ReducedScores, true)
        },
    ] {
        builds(&format!("{options:?}"), &graph, &options);
    }
}

/// Weights that are summed in fp32 are still stored in two bytes per value: TensorRT would fold the cast of a constant.
#[test]
fn embedded_halves_stay_halves() {
    let decoder = Decoder {
        layers: 1,
        hidden: 512,
        ffn: 1024,
        vocabulary: 2000,
        ..tiny(DType::F16)
    };
    // No two weights alike, or TensorRT stores one for both.
    let mut number = 0usize;
    let graph = decoder.graph_with(|_, dtype, shape| {
        number += 1;
        let of = number;
        bytes_of(dtype, &shape, |i| {
            ((i / 2 * 7919 + of * 104_729) >> 3) as u8 & if i % 2 == 1 { 0x3b } else { 0xff }
        })
        .into()
    });
    for weight_mode in [WeightMode::Embed, WeightMode::Bind] {
        let options = LowerOptions {
            weight_mode,
            kernels: false,
            ..LowerOptions::for_engines()
        };
        let network = lower(&graph, &Profile::decode(32), &options).unwrap();
        let weights: usize = network.weights.iter().map(|weight| weight.constant.byte_len()).sum();
        let plan = tensorrt::build(&library(), &network, &BuildOptions::default()).unwrap();
        let stored = plan.bytes().len() as f64 / weights as f64;
        // Besides weights a plan has its kernels: under 2 MB here, of 7 MB.
        match weight_mode {
            WeightMode::Embed => assert!((1.0..1.4).contains(&stored), "{stored} times the weights"),
            _ => assert!(stored < 0.4, "{stored} times the weights"),
        }
    }
}

#[test]
fn head_sizes_and_groups_of_real_models_build() {
    for (heads, kv_heads, head_dim) in [
        (9, 3, 64),
        (6, 2, 32),
        (14, 2, 64),
        (32, 4, 64),
        (8, 8, 128),
        (3, 1, 16),
    ] {
        let decoder = Decoder {
            layers: 3,
            heads,
            kv_heads,
            head_dim,
            hidden: 96,
            vocabulary: 331,
            ..tiny(DType::F16)
        };
        builds(
            &format!("{heads}/{kv_heads} heads of {head_dim}"),
            &decoder.graph(),
            &LowerOptions::default(),
        );
    }
}

/// `cargo nextest run --run-ignored only -E 'test(llama_8b)' --no-capture`: time and peak memory of the large shape.
#[test]
#[ignore = "half a minute; run it to measure"]
fn llama_8b_builds_without_weights() {
    let graph = Decoder::llama_8b().graph();
    let dynamic = Tokens::Dynamic {
        min: 1,
        opt: 128,
        max: 512,
    };
    for tokens in [Tokens::Static(1), Tokens::Static(128), dynamic] {
        let profile = Profile {
            tokens,
            ..Profile::decode(1024)
        };
        let plan = try_build(&graph, &profile, &LowerOptions::default()).unwrap();
        let status = std::fs::read_to_string("/proc/self/status").unwrap();
        let peak = status.lines().find(|line| line.starts_with("VmHWM")).unwrap();
        eprintln!("{profile}: {plan:?}, {peak}");
    }
}

/// Roundings of keys, values, scores and probabilities, of integer and float codes.
#[test]
fn attention_that_rounds_builds() {
    let of = |to, scale, zero_point| Some(Rounding { to, scale, zero_point });
    for dtype in [DType::F32, DType::F16] {
        let graph = rounded(
            filled(&tiny(dtype)),
            of(DType::U8, 0.02, 110),
            of(DType::F8E4M3Fn, 0.002, 0),
        );
        builds(&format!("{dtype}"), &graph, &LowerOptions::default());
    }
}

/// Families with norms, experts or latent caches between Lapidary's own layers: every segment builds, and segments of
/// equal layers share a plan.
#[test]
fn segments_between_layers_of_our_own_build() {
    let fixtures = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures");
    for (name, segments, plans) in [
        ("families/dynamo18-gemma2", 6, 3),
        ("families/optimum-gpt-oss", 3, 2),
        ("families/dynamo18-minicpm3", 7, 4),
        ("families/optimum-gptneox", 5, 4),
        ("exports/llama-optimum", 1, 1),
    ] {
        let options = CanonicalizeOptions {
            max_positions: 64,
            dtype: Some(DType::F16),
            ..CanonicalizeOptions::default()
        };
        let export = lapidary::onnx::read(fixtures.join(name).join("model.onnx")).unwrap();
        let graph = canonicalize(export, &options).unwrap().graph;
        let network = lower(&graph, &Profile::decode(64), &LowerOptions::for_engines()).unwrap();
        let steps = Steps::of(&network);
        let built = tensorrt::build_all(&library(), &network, &BuildOptions::default());
        let built = built.unwrap_or_else(|error| panic!("{name}: {error}"));
        assert_eq!((steps.segments.len(), built.len()), (segments, plans), "{name}");
    }
}
