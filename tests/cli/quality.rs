//! `lapidary perplexity` and `lapidary evaluate` on a tiny package: numbers by their definitions, and refusals.
//!
//! The tiny models have 97 ids; in the tokenizer those are special tokens and single characters. Each digit is a token,
//! so the models can read texts of digits.

use std::path::{Path, PathBuf};

use lapidary::decode::{DeviceChoice, Session, SessionOptions};
use lapidary::sample::logprobs::Logprobs;
use serde_json::{Value, json};

use crate::support::{Run, fixture, lapidary, package, text};

const DIGITS: &str = "31415926535897932384626433832795028841971693993751058209749445923";

/// Ids of digits in the tokenizer.
fn digits(text: &str) -> Vec<u32> {
    text.bytes().map(|b| u32::from(b - b'0') + 32).collect()
}

struct Scene {
    folder: tempfile::TempDir,
    pkg: PathBuf,
}

impl Scene {
    fn new(flags: &[&str]) -> Scene {
        Scene::of("exports/llama-optimum", &fixture("smollm2"), flags)
    }

    fn of(export: &str, tokenizer: &Path, flags: &[&str]) -> Scene {
        let folder = tempfile::tempdir().unwrap();
        let model = fixture(export).join("model.onnx");
        let flags = [&["--tokenizer", text(tokenizer)], flags].concat();
        let pkg = package(folder.path(), &model, &flags);
        Scene { folder, pkg }
    }

    fn file(&self, name: &str, contents: impl AsRef<[u8]>) -> PathBuf {
        let path = self.folder.path().join(name);
        std::fs::write(&path, contents).unwrap();
        path
    }

    fn perplexity(&self, file: &Path, flags: &[&str]) -> Run {
        let given = ["perplexity", text(&self.pkg), "--text", text(file), "--json"];
        lapidary([&given, flags].concat())
    }

    /// Log-probabilities after each token, fed one at a time.
    fn distributions(&self, tokens: &[u32]) -> Vec<Vec<f64>> {
        let package = lapidary::Package::open(&self.pkg).unwrap();
        let options = SessionOptions {
            device: DeviceChoice::Cpu,
            ..SessionOptions::default()
        };
        let mut session = Session::open(&package, &options).unwrap();
        let rows = tokens.iter().map(|token| {
            let logprobs = Logprobs::new(session.feed(&[*token]).unwrap());
            (0..97).map(|id| logprobs.of(id)).collect()
        });
        rows.collect()
    }
}

fn near(value: &Value, expected: f64) {
    let found = value.as_f64().unwrap();
    assert!(
        (found - expected).abs() <= 1e-5 * expected.abs().max(1.0),
        "{found} is not {expected}"
    );
}

/// The mean of `-ln p` over windows, each given with the first row that it scores.
fn mean_nll(scene: &Scene, windows: &[(&[u32], usize, &[u32])]) -> f64 {
    let mut all = Vec::new();
    for (fed, skip, targets) in windows {
        let rows = scene.distributions(fed);
        all.extend(
            targets
                .iter()
                .enumerate()
                .map(|(i, target)| -rows[skip + i][*target as usize]),
        );
    }
    all.iter().sum::<f64>() / all.len() as f64
}

#[test]
fn perplexity_is_that_of_the_definition_however_the_text_is_cut() {
    let scene = Scene::new(&["--capacity", "16,64"]);
    let file = scene.file("pi.txt", DIGITS);
    let ids = digits(DIGITS);
    // One window of 64 covers the 65 digits: the last one is predicted and not fed.
    let whole = scene.perplexity(&file, &[]).ok().json();
    assert_eq!((&whole["tokens"], &whole["scored"]), (&json!(65), &json!(64)));
    assert_eq!(
        (&whole["window"], &whole["stride"], &whole["prefix"]),
        (&json!(64), &json!(64), &json!([]))
    );
    let expected = mean_nll(&scene, &[(&ids[..64], 0, &ids[1..])]);
    near(&whole["nll"]["mean"], expected);
    near(&whole["perplexity"], expected.exp());
    let error = whole["nll"]["error"].as_f64().unwrap();
    near(&whole["perplexity_error"], expected.exp() * error);
    assert!(error > 0.0 && error < expected);
    assert_eq!(whole["schema"], "lapidary-perplexity/1");
    assert_eq!(whole["model"]["format"], "f32");

    let cut = scene
        .perplexity(&file, &["--window", "30", "--tokens", "50"])
        .ok()
        .json();
    assert_eq!(cut["scored"], 49);
    near(
        &cut["nll"]["mean"],
        mean_nll(&scene, &[(&ids[..30], 0, &ids[1..31]), (&ids[30..49], 0, &ids[31..50])]),
    );
    let overlapping = scene.perplexity(&file, &["--window", "20", "--stride", "8", "--tokens", "40"]);
    near(
        &overlapping.ok().json()["nll"]["mean"],
        mean_nll(
            &scene,
            &[
                (&ids[..20], 0, &ids[1..21]),
                (&ids[8..28], 12, &ids[21..29]),
                (&ids[16..36], 12, &ids[29..37]),
                (&ids[24..39], 12, &ids[37..40]),
            ],
        ),
    );

    // Ids of a file are the same tokens.
    let list: Vec<String> = ids.iter().map(u32::to_string).collect();
    let list = scene.file("ids.txt", list.join(",\n"));
    let by_ids = lapidary(["perplexity", text(&scene.pkg), "--ids", text(&list), "--json"])
        .ok()
        .json();
    assert_eq!(by_ids["nll"], whole["nll"]);
    let printed = lapidary(["perplexity", text(&scene.pkg), "--text", text(&file)])
        .ok()
        .stdout;
    assert!(
        printed.contains("pi.txt, 65 tokens, 64 scored, windows of 64 with stride 64, no first token added"),
        "{printed}"
    );
}

#[test]
fn a_first_token_begins_every_window() {
    let tokenizer = tempfile::tempdir().unwrap();
    let source = std::fs::read_to_string(fixture("smollm2/tokenizer.json")).unwrap();
    let mut value: Value = serde_json::from_str(&source).unwrap();
    value["post_processor"] = json!({"type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<|im_start|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}},
            {"SpecialToken": {"id": "<|im_end|>", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<|im_start|>": {"id": "<|im_start|>", "ids": [1], "tokens": ["<|im_start|>"]},
            "<|im_end|>": {"id": "<|im_end|>", "ids": [2], "tokens": ["<|im_end|>"]}}});
    std::fs::write(tokenizer.path().join("tokenizer.json"), value.to_string()).unwrap();
    let scene = Scene::of("exports/llama-optimum", tokenizer.path(), &["--capacity", "64"]);
    let file = scene.file("pi.txt", &DIGITS[..40]);
    let ids = digits(&DIGITS[..40]);
    let found = scene.perplexity(&file, &["--window", "25"]).ok().json();
    assert_eq!((&found["prefix"], &found["scored"]), (&json!([1]), &json!(40)));
    let after_first = |ids: &[u32]| [&[1], ids].concat();
    near(
        &found["nll"]["mean"],
        mean_nll(
            &scene,
            &[
                (&after_first(&ids[..24]), 0, &ids[..25]),
                (&after_first(&ids[25..39]), 0, &ids[25..]),
            ],
        ),
    );
}

#[test]
fn divergence_from_another_package_is_that_of_the_definition() {
    let scene = Scene::new(&["--capacity", "64"]);
    let other = Scene::of("exports/mistral-optimum", &fixture("smollm2"), &["--capacity", "48"]);
    let file = scene.file("pi.txt", &DIGITS[..40]);
    let ids = digits(&DIGITS[..40]);
    let found = scene.perplexity(&file, &["--against", text(&other.pkg)]).ok().json();
    assert_eq!(found["window"], 48, "the smaller capacity");
    let (p, q) = (scene.distributions(&ids[..39]), other.distributions(&ids[..39]));
    let best = |row: &[f64]| (0..97).max_by(|a, b| row[*a].total_cmp(&row[*b])).unwrap();
    let (mut kl, mut same) = (0.0, 0);
    for (p, q) in p.iter().zip(&q) {
        kl += (0..97).map(|v| q[v].exp() * (q[v] - p[v])).sum::<f64>() / 39.0;
        same += usize::from(best(p) == best(q));
    }
    assert!(kl > 1e-3 && same < 39);
    near(&found["against"]["kl"]["mean"], kl);
    near(&found["against"]["same_best"], same as f64 / 39.0);
    near(
        &found["against"]["nll"]["mean"],
        mean_nll(&other, &[(&ids[..39], 0, &ids[1..])]),
    );
    assert!(found["against"]["kl_largest"].as_f64().unwrap() >= kl);

    // Against itself the divergence is 0.
    let itself = scene.perplexity(&file, &["--against", text(&scene.pkg)]).ok().json();
    assert_eq!(itself["against"]["kl"], json!({"mean": 0.0, "error": 0.0}));
    assert_eq!(itself["against"]["same_best"], 1.0);
    assert_eq!(itself["against"]["perplexity"], itself["perplexity"]);
    let args = [
        "perplexity",
        text(&scene.pkg),
        "--text",
        text(&file),
        "--against",
        text(&other.pkg),
    ];
    let printed = lapidary(args).ok().stdout;
    assert!(printed.contains("nats/token, KL(pkg || pkg)"), "{printed}");
}

#[test]
fn a_text_or_package_that_cannot_be_scored_is_refused_by_name() {
    let scene = Scene::new(&["--capacity", "64"]);
    let refused = |file: &Path, flags: &[&str]| {
        let (message, help) = scene.perplexity(file, flags).refused();
        (message, help)
    };
    let good = scene.file("pi.txt", DIGITS);
    for (name, contents, expected) in [
        ("empty.txt", &b""[..], "it is empty"),
        ("blank.txt", b" \n\n", "it is empty"),
        ("binary.txt", b"\xff\xfe\x00", "it is not text in UTF-8"),
        ("one.txt", b"3", "the text has 1 tokens"),
        ("words.txt", b"two words", "and the model's vocabulary is 97"),
    ] {
        let file = scene.file(name, contents);
        let (message, _) = refused(&file, &[]);
        assert!(message.contains(expected), "{message}");
        assert!(message.contains(name) || name == "words.txt", "{message}");
    }
    assert!(refused(Path::new("no-such-file"), &[]).0.starts_with("no-such-file: "));
    assert!(
        refused(&good, &["--window", "65"])
            .0
            .contains("--window 65: the largest cache capacity of")
    );
    assert!(
        refused(&good, &["--window", "8", "--stride", "9"])
            .0
            .contains("a stride of 9 tokens")
    );

    let other = Scene::of("families/optimum-gptneox", &fixture("smollm2"), &["--capacity", "64"]);
    let (message, help) = refused(&good, &["--against", text(&other.pkg)]);
    assert!(
        message.contains("has 97 tokens and") && message.contains("cannot be compared"),
        "{message}"
    );
    assert!(help.contains("--against"), "{help}");

    let bare = scene.folder.path().join("bare");
    lapidary(["strip", text(&scene.pkg), "-o", text(&bare)]).ok();
    for args in [
        [
            "perplexity",
            text(&bare),
            "--text",
            text(&good),
            "--against",
            text(&scene.pkg),
        ],
        [
            "perplexity",
            text(&scene.pkg),
            "--text",
            text(&good),
            "--against",
            text(&bare),
        ],
    ] {
        let (message, help) = lapidary(args).refused();
        assert!(message.contains("bare") && help.contains("refit"), "{message} {help}");
    }
    let ids = |contents: &str| {
        let file = scene.file("ids.txt", contents);
        lapidary(["perplexity", text(&scene.pkg), "--ids", text(&file)])
            .refused()
            .0
    };
    assert!(ids("1 2 97").contains("the token id 97 is outside the vocabulary of 97"));
    assert!(ids("1 2 x").contains("\"x\" is not a token id"));

    let folder = tempfile::tempdir().unwrap();
    let without = package(
        folder.path(),
        &fixture("exports/llama-optimum/model.onnx"),
        &["--capacity", "64"],
    );
    let (message, help) = lapidary(["perplexity", text(&without), "--text", text(&good)]).refused();
    assert!(
        message.contains("--text needs a tokenizer") && help.contains("--ids"),
        "{message} {help}"
    );
}

#[test]
fn answers_are_scored_and_thresholds_fail() {
    let scene = Scene::new(&["--capacity", "64"]);
    let answer = |prompt: &str| -> String {
        let args = [
            "generate",
            text(&scene.pkg),
            "--prompt",
            prompt,
            "--temperature",
            "0",
            "--max-new-tokens",
            "8",
        ];
        let generated = lapidary([&args[..], &["--ignore-eos", "--json"]].concat()).ok().json();
        generated["text"].as_str().unwrap().to_string()
    };
    let (first, second) = (answer("31415"), answer("27182"));
    let line = |prompt: &str, reference: &str| json!({"prompt": prompt, "reference": reference}).to_string();
    let task = [
        line("31415", &format!(" {first}\n")),
        line("27182", &format!("{second} and more")),
    ]
    .join("\n");
    let file = scene.file("task.jsonl", task);
    let evaluate = |flags: &[&str]| {
        let given = [
            "evaluate",
            text(&scene.pkg),
            "--task",
            text(&file),
            "--max-new-tokens",
            "8",
            "--ignore-eos",
        ];
        lapidary([&given, flags].concat())
    };
    let found = evaluate(&["--json", "--threshold", "exact_match=0.5"]).ok().json();
    assert_eq!(
        (&found["schema"], &found["passed"]),
        (&json!("lapidary-task/1"), &json!(true))
    );
    assert_eq!(found["scores"]["exact_match"], 0.5);
    assert_eq!(found["lines"][0]["scores"]["exact_match"], 1.0);
    assert_eq!(found["lines"][1]["text"], second.as_str());
    assert_eq!(found["lines"][1]["tokens"], 8);
    assert_eq!(found["thresholds"][0]["found"], 0.5);
    let scores = &found["lines"][1]["scores"]["rouge1"];
    assert_eq!(scores["precision"], 1.0, "{found:#}");
    assert!(scores["recall"].as_f64().unwrap() < 1.0);
    near(&found["errors"]["exact_match"], 0.5);

    let failed = evaluate(&["--threshold", "exact_match=0.6", "--threshold", "rouge1=0.1"]);
    assert_eq!(failed.status, 1);
    assert!(
        failed.stderr.contains("exact_match is 0.5000, below 0.6"),
        "{}",
        failed.stderr
    );
    assert!(
        failed.stdout.contains("FAILED") && failed.stdout.contains("ok"),
        "{}",
        failed.stdout
    );
    // A line alone gives the same result as among others.
    let alone = evaluate(&["--json", "--lines", "1"]).ok().json();
    assert_eq!(alone["lines"], json!([found["lines"][0]]));
}

#[test]
fn a_task_that_cannot_be_run_is_refused_by_line() {
    let scene = Scene::new(&["--capacity", "16"]);
    let refused = |task: &str, flags: &[&str]| {
        let file = scene.file("task.jsonl", task);
        let given = ["evaluate", text(&scene.pkg), "--task", text(&file)];
        lapidary([&given, flags].concat()).refused().0
    };
    let good = "{\"prompt\": \"1\", \"reference\": \"2\"}\n";
    assert!(refused("", &[]).ends_with("task.jsonl: it is empty"));
    assert!(refused(&format!("{good}[]"), &[]).contains("task.jsonl: line 2: "));
    let long = format!("{good}{{\"prompt\": \"{}\", \"reference\": \"2\"}}", &DIGITS[..17]);
    assert!(refused(&long, &[]).contains("task.jsonl: line 2: the prompt has 17 tokens"));
    for (flag, expected) in [
        ("rouge3=0.1", "unknown metric \"rouge3\""),
        ("rouge1", "METRIC=VALUE"),
        ("rouge1=30", "a number from 0 to 1"),
    ] {
        assert!(refused(good, &["--threshold", flag]).contains(expected));
    }
    // The model does not have the template's words.
    assert!(refused(good, &["--chat"]).contains("they do not belong together"));
}
