//! docs/reference/models.md is the table of exports that the tests convert and run.

use std::collections::BTreeSet;
use std::fmt::Write;
use std::path::{Path, PathBuf};

use lapidary::onnx;
use lapidary::passes::{CanonicalizeOptions, LayerReport, Recognition, recognize};

use crate::runner::check_page;

const HEAD: &str = "\
# Exporters and families

Every export that the tests convert and run, as it is recognized. Written by `UPDATE_FILES=1 cargo nextest run --test files`; do not
edit. All of them are random weights of two or three layers; [exporting.md](../guides/exporting.md) says how to make such exports of a model
of your own, and what does not work.

- *Exporter*: as the file shows it, with its opset and the domain of contrib operators.
- *Cache*: how the export writes it.
- *Attention*: query heads over KV heads, elements of a head, the rotation of pairs (`half` apart or `interleaved`) and how many
  elements it turns, sliding windows, and caps of scores.
- *Answers*: `ONNX Runtime`: tokens and log-probabilities are compared with those of ONNX Runtime on the same file; `converted`: the
  passes prove what they rewrite, and other tests convert it and run it.
";

/// The folders that tests run completely, with descriptions.
const SETS: [(&str, &str); 3] = [
    ("exports", "Five families by every exporter"),
    ("families", "Other families"),
    ("experts", "Mixtures of experts"),
];

fn fixtures(set: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures").join(set)
}

/// Folders with a model, sorted.
fn folders(set: &str) -> Vec<String> {
    let entries = std::fs::read_dir(fixtures(set))
        .unwrap()
        .map(|entry| entry.unwrap().path());
    let folders = entries.filter(|folder| folder.join("model.onnx").is_file());
    let mut names: Vec<String> = folders
        .map(|folder| folder.file_name().unwrap().to_string_lossy().into_owned())
        .collect();
    names.sort();
    names
}

/// Those with a reference from ONNX Runtime: their own, or one of the set.
fn with_answers(set: &str) -> BTreeSet<String> {
    let of_set = std::fs::read_to_string(fixtures(set).join("reference.json")).unwrap_or_else(|_| "{}".into());
    let of_set: serde_json::Map<String, serde_json::Value> = serde_json::from_str(&of_set).unwrap();
    let own = folders(set)
        .into_iter()
        .filter(|name| fixtures(set).join(name).join("reference.json").is_file());
    own.chain(of_set.into_iter().map(|(name, _)| name)).collect()
}

/// Equal layers once: `4/2 heads of 16, half 16, window 8 in 1 of 2`.
fn attention(found: &Recognition) -> String {
    let heads = |layer: &LayerReport| format!("{}/{} heads of {}", layer.heads, layer.kv_heads, layer.head_dim);
    let rotary = |layer: &LayerReport| match layer.rotary.as_str() {
        "none" => String::new(),
        kind => format!("{kind} {}", layer.rotary_dim),
    };
    let all = found.layers.len();
    let distinct = |of: &dyn Fn(&LayerReport) -> String| -> Vec<String> {
        let values: BTreeSet<String> = found.layers.iter().map(of).filter(|text| !text.is_empty()).collect();
        values.into_iter().collect()
    };
    let mut parts = distinct(&heads);
    parts.extend(distinct(&rotary));
    let windows: Vec<usize> = found.layers.iter().filter_map(|layer| layer.scores.window).collect();
    if let Some(window) = windows.first() {
        parts.push(format!("window {window} in {} of {all}", windows.len()));
    }
    if let Some(cap) = found.layers.iter().find_map(|layer| layer.scores.softcap) {
        parts.push(format!("cap {cap}"));
    }
    parts.join(", ")
}

fn page() -> String {
    let mut text = HEAD.to_string();
    for (set, title) in SETS {
        let answers = with_answers(set);
        let _ = writeln!(text, "\n## {title}\n");
        let _ = writeln!(
            text,
            "| `fixtures/{set}` | exporter | cache | attention | answers |\n|---|---|---|---|---|"
        );
        for name in folders(set) {
            let model = fixtures(set).join(&name).join("model.onnx");
            let graph = onnx::read(&model).unwrap_or_else(|error| panic!("{error}"));
            let options = CanonicalizeOptions {
                max_positions: 64,
                ..CanonicalizeOptions::default()
            };
            let (found, canonical) = recognize(&graph, &options);
            let obstacles: Vec<String> = found.obstacles.iter().map(|o| o.to_string()).collect();
            assert!(
                canonical.is_some(),
                "{set}/{name} is not converted: {}",
                obstacles.join("; ")
            );
            let opsets = graph
                .producer
                .opsets
                .iter()
                .filter_map(|(domain, version)| match domain.as_str() {
                    "" => Some(version.to_string()),
                    "com.microsoft" => Some(domain.clone()),
                    _ => None,
                });
            let _ = writeln!(
                text,
                "| {name} | {}, {} | {} | {} | {} |",
                onnx::exporter(&graph),
                opsets.collect::<Vec<_>>().join(" + "),
                found.cache,
                attention(&found),
                if answers.contains(&name) {
                    "ONNX Runtime"
                } else {
                    "converted"
                },
            );
        }
    }
    text
}

/// References name existing exports, and the page has every export of the sets.
#[test]
fn the_page_is_what_the_tests_run() {
    for (set, _) in SETS {
        let (there, answers) = (folders(set), with_answers(set));
        let missing: Vec<&String> = answers.iter().filter(|name| !there.contains(name)).collect();
        assert!(
            missing.is_empty(),
            "fixtures/{set} has answers for {missing:?}, and no export"
        );
    }
    check_page("reference/models.md", &page());
}
