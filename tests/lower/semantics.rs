//! The lowered network computes the same as the canonical graph: every model, profile and choice.

use std::collections::BTreeMap;

use lapidary::backend::cpu::{self, bind_tokens, execute};
use lapidary::graph::Graph;
use lapidary::graph::op::Rounding;
use lapidary::lower::synthetic::Decoder;
use lapidary::lower::{AttentionForm, LinearForm, LowerOptions, lower};
use lapidary::network::{LayerKind, Logits, Network, Profile, Tokens, WeightMode};
use lapidary::tensor::{DType, Tensor};

use crate::interpret::interpret;
use crate::models::{Call, call, decoder, decoders, difference, evaluate, gpt2};
use crate::rounded::rounded;

const CAPACITY: usize = 12;

/// The call in the network's form: i32, and the rows that get logits.
fn network_inputs(call: &Call, network: &Network, rows: &[i32]) -> BTreeMap<String, Tensor> {
    let narrow = |t: &Tensor| match t.dtype() {
        DType::I64 => {
            let values: Vec<i32> = t.to_i64().into_iter().map(|v| v as i32).collect();
            Tensor::from_i32(t.shape().to_vec(), &values)
        }
        _ => t.clone(),
    };
    let mut inputs: BTreeMap<String, Tensor> = call.iter().map(|(n, t)| (n.clone(), narrow(t))).collect();
    if network.find("logit_rows").is_some() {
        inputs.insert("logit_rows".into(), Tensor::from_i32(vec![rows.len()], rows));
    }
    inputs
}

/// Row `rows[b]` of each batch row, as f32.
fn picked(logits: &Tensor, rows: &[i32]) -> Tensor {
    let [batch, tokens, vocabulary] = logits.shape()[..] else {
        panic!("three axes")
    };
    let values = logits.to_f32();
    let chosen = (0..batch).flat_map(|b| {
        let at = (b * tokens + rows[b] as usize) * vocabulary;
        values[at..at + vocabulary].to_vec()
    });
    Tensor::from_f32(vec![batch, 1, vocabulary], &chosen.collect::<Vec<_>>())
}

/// Rounding differs (the graph rounds once an operator, the network at other places), and halves round much.
fn tolerance(graph: &Graph) -> f32 {
    let cache = graph.find("key_cache.0").and_then(|v| graph.value(v).dtype);
    match cache {
        Some(DType::F16) => 3e-2,
        Some(DType::Bf16) => 2e-1,
        _ => 1e-5,
    }
}

/// A call, and the graph's results.
struct Prepared {
    past: usize,
    tokens: usize,
    call: Call,
    /// The rows with logits, one per batch row.
    rows: Vec<i32>,
    expected: BTreeMap<String, Tensor>,
}

fn prepared(graph: &Graph, profile: Profile, calls: &[(usize, usize)]) -> Vec<Prepared> {
    let prepare = |(seed, (past, tokens)): (usize, &(usize, usize))| {
        let call = call(graph, seed as u64 + 1, profile.batch, *past, *tokens, profile.capacity);
        let rows: Vec<i32> = (0..profile.batch)
            .map(|b| (tokens - 1).saturating_sub(b) as i32)
            .collect();
        let mut expected = evaluate(graph, &call);
        let logits = expected.remove("logits").expect("logits");
        let logits = match profile.logits {
            Logits::All => logits,
            Logits::Rows => picked(&logits, &rows),
        };
        expected.insert("logits".into(), logits);
        Prepared {
            past: *past,
            tokens: *tokens,
            call,
            rows,
            expected,
        }
    };
    calls.iter().enumerate().map(prepare).collect()
}

fn check(what: &str, graph: &Graph, profile: Profile, options: &LowerOptions, calls: &[(usize, usize)]) {
    check_prepared(what, graph, profile, options, &prepared(graph, profile, calls));
}

fn check_prepared(what: &str, graph: &Graph, profile: Profile, options: &LowerOptions, calls: &[Prepared]) {
    let network = lower(graph, &profile, options).unwrap_or_else(|e| panic!("{what} {profile}: {e}"));
    for prepared in calls {
        let (past, tokens, expected) = (prepared.past, prepared.tokens, &prepared.expected);
        let inputs = network_inputs(&prepared.call, &network, &prepared.rows);
        let bound = bind_tokens(&network, tokens).expect("tokens of the profile");
        let list: Vec<(&str, Tensor)> = inputs.iter().map(|(n, t)| (n.as_str(), t.clone())).collect();
        let executed = execute(&bound, &list, &cpu::CompileOptions::default());
        let executed = executed.unwrap_or_else(|e| panic!("{what} {profile}: {e}"));
        // Both by the evaluator's semantics, layer by layer, and by the real back end.
        for (by, found) in [
            ("layers", interpret(&network, &inputs)),
            ("cpu", executed.into_iter().collect()),
        ] {
            assert_eq!(found.keys().collect::<Vec<_>>(), expected.keys().collect::<Vec<_>>());
            for (name, expected) in expected {
                let scale = expected.to_f32().iter().fold(1f32, |m, v| m.max(v.abs()));
                let worst = difference(&found[name], expected) / scale;
                assert!(
                    worst <= tolerance(graph),
                    "{what} {profile} {options:?}: {name} by {by} differs by {worst}, {past} past and {tokens} tokens"
                );
            }
        }
    }
}

fn profiles(batch: usize) -> Vec<(Profile, Vec<(usize, usize)>)> {
    let dynamic = Tokens::Dynamic { min: 1, opt: 4, max: 8 };
    let mut profiles = Vec::new();
    for logits in [Logits::Rows, Logits::All] {
        let with = |tokens| Profile {
            batch,
            tokens,
            capacity: CAPACITY,
            logits,
        };
        profiles.push((with(Tokens::Static(1)), vec![(0, 1), (7, 1)]));
        profiles.push((with(Tokens::Static(5)), vec![(0, 5), (4, 5)]));
        profiles.push((with(dynamic), vec![(0, 8), (6, 1), (5, 3)]));
    }
    profiles
}

#[test]
fn every_model_and_profile() {
    for (name, config) in decoders() {
        let graph = decoder(&config);
        for (profile, calls) in profiles(1) {
            check(name, &graph, profile, &LowerOptions::default(), &calls);
        }
    }
    for (profile, calls) in profiles(1) {
        check("gpt2", &gpt2(), profile, &LowerOptions::default(), &calls);
    }
}

/// Every choice of the lowering, for one model.
fn every_choice(model: &str) {
    let (name, config) = decoders()
        .into_iter()
        .find(|(name, _)| *name == model)
        .expect("a model");
    let graph = decoder(&config);
    let cases: Vec<(Profile, Vec<Prepared>)> = profiles(1)
        .into_iter()
        .map(|(profile, calls)| (profile, prepared(&graph, profile, &calls)))
        .collect();
    for fold_groups in [false, true] {
        for (linear, fuse_linear) in [
            (LinearForm::FlattenActivation, false),
            (LinearForm::FlattenActivation, true),
            (LinearForm::RaiseWeight, false),
            (LinearForm::RaiseWeight, true),
            (LinearForm::ReduceRow, false),
            (LinearForm::ReduceRow, true),
        ] {
            for attention in [
                AttentionForm::Layer,
                AttentionForm::Decomposed,
                AttentionForm::Split(4),
                AttentionForm::ReducedScores,
                AttentionForm::ByCapacity,
            ] {
                let options = LowerOptions {
                    fold_groups,
                    linear,
                    fuse_linear,
                    attention,
                    weight_mode: WeightMode::Embed,
                    ..LowerOptions::default()
                };
                // The less important choices, as given and all changed.
                let others = LowerOptions {
                    reduce_depth: Some(16),
                    fuse_pairs: false,
                    fold_prefill: Some(0),
                    prefill_linear: Some(LinearForm::RaiseWeight),
                    ..options.clone()
                };
                for (profile, calls) in &cases {
                    check_prepared(name, &graph, *profile, &options, calls);
                    if fold_groups && attention == AttentionForm::Layer {
                        check_prepared(name, &graph, *profile, &others, calls);
                    }
                }
            }
        }
    }
}

// One test per model, so that they run in parallel.
#[test]
fn every_choice_with_grouped_heads() {
    every_choice("grouped");
}

#[test]
fn every_choice_with_a_soft_cap() {
    every_choice("softcap");
}

#[test]
fn every_choice_in_half_precision() {
    every_choice("half");
}

/// More rows than one Attention layer gets: the heads of a group are divided among two.
#[test]
fn folded_groups_of_many_rows() {
    let options = LowerOptions {
        fold_prefill: Some(0),
        ..LowerOptions::default()
    };
    let config = Decoder {
        positions: 80,
        window: Some(40),
        heads: 16,
        kv_heads: 1,
        ..Decoder::tiny()
    };
    let graph = decoder(&config);
    let profile = Profile::prefill(70, 80);
    let layers = lower(&graph, &profile, &options).expect("a decoder").layers;
    let attentions = layers.iter().filter(|layer| matches!(layer.kind, LayerKind::Attention));
    assert_eq!(attentions.count(), 2 * config.layers, "two for each of the model's");
    check("many rows", &graph, profile, &options, &[(10, 70)]);
}

#[test]
fn batches() {
    for (name, config) in decoders()
        .into_iter()
        .filter(|(n, _)| ["grouped", "window"].contains(n))
    {
        let graph = decoder(&config);
        for (profile, calls) in profiles(2) {
            check(name, &graph, profile, &LowerOptions::default(), &calls);
        }
    }
    for (profile, calls) in profiles(3) {
        check("gpt2", &gpt2(), profile, &LowerOptions::default(), &calls);
    }
}

#[test]
fn roundings_inside_attention() {
    let of = |to, scale, zero_point| Some(Rounding { to, scale, zero_point });
    let int8 = of(DType::U8, 0.02, 110);
    let fp8 = of(DType::F8E4M3Fn, 0.002, 0);
    let models = decoders();
    for (name, scores, probabilities) in [
        ("grouped", int8, of(DType::U8, 0.003, 0)),
        ("window", int8, None),
        ("softcap", fp8, of(DType::I8, 0.008, 0)),
        ("all_heads", None, fp8),
    ] {
        let (_, config) = models.iter().find(|(n, _)| *n == name).unwrap();
        let graph = rounded(decoder(config), scores, probabilities);
        for (profile, calls) in profiles(1) {
            check(name, &graph, profile, &LowerOptions::default(), &calls);
        }
        // They are not dropped by both.
        let call = call(&graph, 3, 1, 4, 5, CAPACITY);
        let plain = evaluate(&decoder(config), &call);
        assert!(
            difference(&evaluate(&graph, &call)["logits"], &plain["logits"]) > 1e-3,
            "{name}"
        );
    }
}
