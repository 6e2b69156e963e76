//! Contents of a full report that these files lack: listed, never filled in.

use super::ablations::ablations;
use super::ceilings::Ceilings;
use super::headlines::system;
use super::input::{Group, Input};
use super::markdown::cite;
use super::measure::Measure;
use super::quality;

/// Expected ablations by name: their descriptions and other names.
const SWITCHES: [(&str, &[&str]); 7] = [
    ("static against dynamic shapes", &["shapes"]),
    ("bind, embed and strip", &["weights"]),
    ("a growing cache against one large capacity", &["cache"]),
    (
        "folded query groups against plain attention",
        &["attention", "fold_groups", "groups"],
    ),
    ("CUDA graphs", &["cuda_graphs", "graphs"]),
    ("prefill chunk size", &["chunks", "prefill_chunks", "chunk"]),
    ("DRY", &["dry", "sampler"]),
];

/// transformers' modes on a GPU, as named in `scripts/baselines/transformers_baseline.py`.
const TRANSFORMERS: [&str; 5] = [
    "eager, SDPA",
    "eager, FlashAttention 2",
    "static cache",
    "static cache, torch.compile",
    "bare compiled step, CUDA graphs",
];

/// Missing parts.
pub fn missing(input: &Input) -> Vec<String> {
    let mut out = Vec::new();
    if input.groups.is_empty() {
        out.push("no result in the bench schema was given: there are no benchmark tables".to_string());
    }
    if input.conversions.is_empty() {
        out.push("no package was given (`--package`): what the conversion did to a model is not shown".to_string());
    }
    out.extend(quality::missing(input));
    for group in &input.groups {
        let title = group.title();
        of_group(group, &mut |what| out.push(format!("{title}: {what}")));
    }
    if !input.groups.iter().chain(&input.peers).any(|g| g.on_gpu) {
        out.push("no result of a GPU was given".to_string());
    }
    if !input
        .peers
        .iter()
        .any(|g| g.results.iter().any(|r| r.of.system.name == "onnxruntime-genai"))
    {
        out.push("no session with ONNX Runtime GenAI was given".to_string());
    }
    if input.serving.is_empty() {
        out.push(
            "no result of `lapidary bench --serve` was given: throughput against concurrency is not shown".to_string(),
        );
    }
    for group in &input.peers {
        for r in &group.failed {
            let why = r.of.error.as_deref().unwrap_or_default();
            let label = &r.of.system.label;
            out.push(format!(
                "{}: {label} did not run: {why}{}",
                group.title(),
                cite(r.source)
            ));
        }
    }
    let tried: Vec<String> = input
        .groups
        .iter()
        .flat_map(|g| ablations(g).into_iter().map(|a| a.name))
        .collect();
    for (what, names) in SWITCHES {
        if !tried.iter().any(|t| names.contains(&t.as_str())) {
            out.push(format!("the ablation of {what} was not run"));
        }
    }
    out
}

fn of_group(group: &Group, say: &mut dyn FnMut(String)) {
    if group.ours().is_none() {
        say("no result of Lapidary, so nothing to compare others with".to_string());
    }
    if group.reference.is_none() {
        say("no fp32 reference of transformers among the files, so outputs are compared with none here".to_string());
    }
    let systems: &[&str] = match group.on_gpu {
        true => &["transformers", "tensorrt-onnx-parser"],
        false => &["transformers", "onnxruntime", "tract"],
    };
    for name in systems {
        let there = |r: &super::input::ResultFile| r.of.system.name == *name;
        if !group.results.iter().any(there) && !group.failed.iter().any(there) {
            say(format!("no result of {}", system(name)));
        }
    }
    if group.on_gpu && group.results.iter().any(|r| r.of.system.name == "transformers") {
        for variant in TRANSFORMERS {
            if !group.results.iter().any(|r| r.of.system.variant == variant) {
                say(format!("no result of transformers, {variant}"));
            }
        }
    }
    for r in &group.failed {
        let why = r.of.error.as_deref().unwrap_or_default();
        say(format!("{} did not run: {why}{}", r.of.system.label, cite(r.source)));
    }
    let ours = group.ours().map(|r| r.source);
    // Other runs of Lapidary show one setting: they need not be complete, and other systems need not match them.
    let is_whole = |r: &&super::input::ResultFile| r.of.system.name != "lapidary" || Some(r.source) == ours;
    let whole = || group.results.iter().filter(is_whole);
    let ceilings = Ceilings::of(group);
    let measures = Measure::union(whole());
    for r in whole() {
        let (d, label) = (&r.of, &r.of.system.label);
        let lacking = measures.iter().filter(|m| m.of(d).is_none());
        let mut gaps: Vec<String> = lacking
            .map(|m| match m {
                Measure::Token(n) => format!("decode at context {n}"),
                Measure::Prompt(n) => format!("prefill of {n} tokens"),
                Measure::Text(n, new) => format!("{n} + {new} tokens end to end"),
            })
            .collect();
        if ceilings.bandwidth(d).is_none() {
            gaps.push("copy bandwidth, and so MBU".to_string());
        }
        if group.on_gpu && d.memory.as_ref().is_none_or(|m| m.device.is_none()) {
            gaps.push("device memory".to_string());
        }
        if !gaps.is_empty() {
            say(format!("{label} lacks {}{}", gaps.join(", "), cite(r.source)));
        }
    }
    if let Some(ours) = group.ours() {
        let d = &ours.of;
        let mut gaps = Vec::new();
        if ceilings.peak(d).is_none() {
            gaps.push("a peak of arithmetic, and so MFU and the roof of the roofline");
        }
        if group.on_gpu && d.profile.is_none() {
            gaps.push("time by layer (`lapidary bench --profile`)");
        }
        if group.on_gpu && d.load.as_ref().is_none_or(|l| l.first_load_ms.is_none()) {
            gaps.push("the time of a first load (`lapidary bench --first-load`)");
        }
        if !gaps.is_empty() {
            say(format!(
                "{} lacks {}{}",
                d.system.label,
                gaps.join("; "),
                cite(ours.source)
            ));
        }
    }
}

/// Numbers of unstable and of all measurements.
pub fn unstable(input: &Input) -> (usize, usize) {
    let groups = input.groups.iter().chain(&input.peers);
    let results = groups.flat_map(|g| g.results.iter().chain(&g.ablations));
    let all = results.flat_map(|r| Measure::all(&r.of).into_iter().filter_map(|m| m.of(&r.of)));
    all.fold((0, 0), |(unstable, all), (_, stable)| {
        (unstable + usize::from(!stable), all + 1)
    })
}
