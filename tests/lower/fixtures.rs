//! Every fixture through passes, lowering and the CPU executor: prefill and greedy steps give ONNX Runtime's logits and
//! tokens, in every kind of profile.

use std::fs;
use std::path::{Path, PathBuf};

use lapidary::backend::cpu::{self, Bindings, KvCaches, Program, bind_tokens};
use lapidary::graph::Graph;
use lapidary::interface::Role;
use lapidary::lower::{AttentionForm, LinearForm, LowerOptions, lower};
use lapidary::network::{Logits, Profile, Tokens};
use lapidary::passes::{self, canonicalize};

#[derive(serde::Deserialize)]
struct Reference {
    dtype: String,
    model: Model,
    prompt: Vec<i32>,
    greedy_tokens: Vec<i32>,
    prefill_last_logits: Vec<f32>,
    step_logits: Vec<Vec<f32>>,
}

#[derive(serde::Deserialize)]
struct Model {
    vocabulary: usize,
}

/// Folders with a reference below `fixtures/exports`, or below `LAPIDARY_EXPORTS`; `LAPIDARY_EXPORT` keeps those whose
/// name contains it.
fn exports() -> Vec<PathBuf> {
    let fixtures = || Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/exports");
    let root = std::env::var_os("LAPIDARY_EXPORTS").map_or_else(fixtures, PathBuf::from);
    let wanted = std::env::var("LAPIDARY_EXPORT").unwrap_or_default();
    let entries = fs::read_dir(&root).unwrap_or_else(|e| panic!("{}: {e}", root.display()));
    let mut found: Vec<PathBuf> = entries.map(|entry| entry.unwrap().path()).collect();
    found.retain(|p| p.join("reference.json").exists() && p.to_string_lossy().contains(&wanted));
    found.sort();
    assert!(!found.is_empty(), "no exports in {}", root.display());
    found
}

/// How a session might call the model: a profile for the prompt and one for each step.
struct Plan {
    what: &'static str,
    prefill: Tokens,
    decode: Tokens,
    logits: Logits,
    options: LowerOptions,
}

fn plans(prompt: usize) -> Vec<Plan> {
    let dynamic = Tokens::Dynamic {
        min: 1,
        opt: prompt,
        max: prompt,
    };
    vec![
        Plan {
            what: "static, rows",
            prefill: Tokens::Static(prompt),
            decode: Tokens::Static(1),
            logits: Logits::Rows,
            options: LowerOptions::default(),
        },
        Plan {
            what: "dynamic, all logits",
            prefill: dynamic,
            decode: dynamic,
            logits: Logits::All,
            options: LowerOptions::default(),
        },
        Plan {
            what: "static, rows, everything the other way",
            prefill: Tokens::Static(prompt),
            decode: Tokens::Static(1),
            logits: Logits::Rows,
            options: LowerOptions {
                fold_groups: false,
                linear: LinearForm::RaiseWeight,
                attention: AttentionForm::Decomposed,
                ..LowerOptions::default()
            },
        },
    ]
}

/// Feeds `tokens` after `past` others and returns the last one's logits.
fn step(
    graph: &Graph,
    plan: &Plan,
    caches: &mut Option<KvCaches>,
    past: usize,
    tokens: &[i32],
) -> Result<Vec<f32>, String> {
    let profile = Profile {
        batch: 1,
        tokens: if tokens.len() == 1 { plan.decode } else { plan.prefill },
        capacity: 24,
        logits: plan.logits,
    };
    let network = lower(graph, &profile, &plan.options).map_err(|e| e.to_string())?;
    let network = bind_tokens(&network, tokens.len()).map_err(|e| e.to_string())?;
    let mut program = Program::compile(&network, &cpu::CompileOptions::default()).map_err(|e| e.to_string())?;
    let caches = match caches {
        Some(caches) => caches,
        None => caches.insert(KvCaches::new(&network).map_err(|e| e.to_string())?),
    };
    let interface = network.interface.as_ref().expect("a lowered model has an interface");
    let logits = network.tensor(interface.logits());
    let mut values = vec![0f32; logits.shape.iter().map(|d| d.as_const().unwrap() as usize).product()];
    let positions: Vec<i32> = (past..past + tokens.len()).map(|p| p as i32).collect();
    let (at, last) = ([past as i32], [tokens.len() as i32 - 1]);
    let mut bindings = Bindings::new();
    bindings
        .input(Role::TokenIds, tokens)
        .input(Role::PositionIds, &positions[..])
        .input(Role::WriteIndices, &at[..])
        .caches(caches)
        .output(Role::Logits, &mut values[..]);
    if plan.logits == Logits::Rows {
        bindings.input(Role::LogitRows, &last[..]);
    }
    program.run(&mut bindings).map_err(|e| e.to_string())?;
    drop(bindings);
    let vocabulary = logits.shape[2].as_const().unwrap() as usize;
    Ok(values.split_off(values.len() - vocabulary))
}

fn argmax(values: &[f32]) -> i32 {
    let best = values.iter().enumerate().max_by(|a, b| a.1.total_cmp(b.1));
    best.expect("some values").0 as i32
}

fn check(folder: &Path) -> Result<(), String> {
    let text = fs::read_to_string(folder.join("reference.json")).map_err(|e| e.to_string())?;
    let reference: Reference = serde_json::from_str(&text).map_err(|e| e.to_string())?;
    let options = passes::CanonicalizeOptions {
        max_positions: 64,
        ..passes::CanonicalizeOptions::default()
    };
    let graph = lapidary::onnx::read(folder.join("model.onnx")).map_err(|e| e.to_string())?;
    let graph = canonicalize(graph, &options).map_err(|e| e.to_string())?.graph;
    let half = reference.dtype != "fp32";
    let tolerance = match reference.dtype.as_str() {
        "fp32" => 1e-4,
        "fp16" => 2e-2,
        // bf16 keeps three bits less.
        _ => 1.6e-1,
    };
    for plan in plans(reference.prompt.len()) {
        let mut caches = None;
        let mut logits = step(&graph, &plan, &mut caches, 0, &reference.prompt)?;
        let mut past = reference.prompt.len();
        let expected = std::iter::once(&reference.prefill_last_logits).chain(&reference.step_logits);
        for (i, (expected, token)) in expected.zip(&reference.greedy_tokens).enumerate() {
            assert_eq!(logits.len(), reference.model.vocabulary);
            let pairs = logits.iter().zip(expected);
            let worst = pairs
                .map(|(a, b)| (a - b).abs())
                .fold(0f32, |w, d| if d.is_nan() { f32::INFINITY } else { w.max(d) });
            if worst > tolerance {
                return Err(format!("{}: logits of step {i} differ by {worst:e}", plan.what));
            }
            if !half && argmax(&logits) != *token {
                return Err(format!("{}: token {i} is {}, not {token}", plan.what, argmax(&logits)));
            }
            if i < reference.step_logits.len() {
                logits = step(&graph, &plan, &mut caches, past, &[*token])?;
                past += 1;
            }
        }
    }
    Ok(())
}

#[test]
fn lowered_exports_compute_what_the_exports_did() {
    let mut failed = Vec::new();
    for folder in exports() {
        let name = folder.file_name().unwrap_or_default().to_string_lossy().into_owned();
        // One export's panic must not hide the others.
        match std::panic::catch_unwind(|| check(&folder)) {
            Ok(Ok(())) => {}
            Ok(Err(reason)) => failed.push(format!("{name}: {reason}")),
            Err(_) => failed.push(format!("{name}: panicked")),
        }
    }
    assert!(
        failed.is_empty(),
        "{} exports failed:\n{}",
        failed.len(),
        failed.join("\n")
    );
}
