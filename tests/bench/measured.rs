//! `lapidary bench` of a fixture on the CPU: every requested measurement is present and follows from its samples.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use lapidary::bench::workload::{ids, prompt_hash};
use lapidary::bench::{self, Document};
use serde_json::{Value, json};

use crate::support::{fixture, lapidary, package, text};

/// A package of the Llama fixture with three capacities, shared by all tests.
pub fn llama() -> &'static Path {
    static MADE: OnceLock<(tempfile::TempDir, PathBuf)> = OnceLock::new();
    let (_, package) = MADE.get_or_init(|| {
        let folder = tempfile::tempdir().unwrap();
        let model = fixture("exports/llama-optimum/model.onnx");
        let package = package(folder.path(), &model, &["--capacity", "16,32,64", "--prefill", "8"]);
        (folder, package)
    });
    package
}

/// A quick run with these additional flags.
pub fn quick(package: &Path, flags: &[&str]) -> Value {
    let mut args = vec![
        "bench",
        text(package),
        "--device",
        "cpu",
        "--threads",
        "1",
        "--warmup",
        "1",
        "--repetitions",
        "5",
        "--decode-samples",
        "20",
        "--runs",
        "2",
        "--json",
    ];
    args.extend(flags);
    // Measured only in the test that checks it, which writes a file.
    if !flags.contains(&"-o") {
        args.extend(["--copy-bandwidth", "2e10"]);
    }
    lapidary(args).ok().json()
}

fn parsed(value: &Value) -> Document {
    bench::parse(Path::new("run.json"), &value.to_string()).unwrap()
}

#[test]
fn everything_asked_for_is_measured_and_holds_together() {
    let folder = tempfile::tempdir().unwrap();
    let (file, table) = (folder.path().join("r.json"), folder.path().join("r.csv"));
    let flags = [
        "--prefill",
        "5,20",
        "--decode",
        "4,40",
        "--end-to-end",
        "6:30",
        "--outputs",
        "8",
        "--model-name",
        "tiny",
        "--label",
        "one thread",
        "--setting",
        "ablation.group=threads",
        "--setting",
        "ablation.switch=1",
        "-o",
        text(&file),
        "--csv",
        text(&table),
    ];
    let value = quick(llama(), &flags);
    let d = parsed(&value);
    assert_eq!(bench::read(&file).unwrap(), d, "the file is what was printed");

    assert_eq!((d.model.name.as_str(), d.model.dtype.as_str()), ("tiny", "fp32"));
    assert_eq!(
        (d.system.name.as_str(), d.system.label.as_str()),
        ("lapidary", "one thread")
    );
    let settings = json!({"group": "threads", "switch": 1});
    assert_eq!(d.system.settings["ablation"], settings);
    assert_eq!(
        (&d.system.settings["threads"], &d.system.settings["sampler"]),
        (&json!(1), &json!("greedy"))
    );
    assert_eq!(
        (&d.system.settings["cache"], &d.system.settings["shapes"]),
        (&json!("growing"), &json!("static"))
    );

    let lengths: Vec<(usize, usize)> = d.prefill.iter().map(|p| (p.tokens, p.ms.count)).collect();
    assert_eq!(lengths, [(5, 5), (20, 5)]);
    // Sixteen tokens per run, so twenty samples take two runs.
    let live: Vec<_> = d.decode.iter().map(|p| (p.live, p.capacity, p.ms.count)).collect();
    assert_eq!(live, [(4, Some(32), 32), (40, Some(64), 32)]);
    assert!(
        d.decode
            .iter()
            .all(|p| p.mbu.is_some_and(|mbu| mbu > 0.0) && p.gpu_ms.is_none())
    );
    let [whole] = &d.end_to_end[..] else { panic!() };
    assert_eq!(
        (whole.prompt, whole.new_tokens, whole.runs.len(), whole.runs[0].tokens),
        (6, 30, 2, 30)
    );
    // The end of a run comes after its last token.
    assert!(whole.itl_ms.mean >= whole.tpot_ms.mean && whole.latency_ms.min > whole.ttft_ms.max);

    let outputs = d.outputs.as_ref().unwrap();
    assert_eq!(outputs.prompts.iter().map(Vec::len).collect::<Vec<_>>(), [1, 17]);
    assert!(outputs.greedy_tokens.iter().all(|tokens| tokens.len() == 8));
    assert_eq!(outputs.logits.len(), 2);
    assert_eq!(
        outputs.logits[1].top[0].0, outputs.greedy_tokens[1][0],
        "greedy takes the largest logit"
    );
    assert_eq!(d.workload.prompts[2], prompt_hash(&ids(0, 97, 17)));
    assert_eq!(d.workload.prompts[0].tokens, 8192);

    let machine = &d.machine;
    assert!(machine.gpu.is_none() && machine.peak_flops.is_none() && !machine.cpu.is_empty());
    assert!(machine.copy_bandwidth_bytes_per_s.unwrap() > 1e8);
    let memory = d.memory.as_ref().unwrap();
    assert!(memory.device.is_none());
    if cfg!(target_os = "linux") {
        // It excludes the copies of the bandwidth measurement.
        let peak = memory.peak_host_bytes.unwrap();
        assert!((2 << 20..512 << 20).contains(&peak), "{peak}");
        let anonymous = memory.peak_anonymous_host_bytes.unwrap();
        assert!((1 << 20..peak).contains(&anonymous), "{anonymous} of {peak}");
    }
    assert!(d.load.as_ref().unwrap().load_ms.unwrap() > 0.0 && d.build.is_none());
    let sizes = d.sizes.as_ref().unwrap();
    assert!(sizes.package_bytes.unwrap() > sizes.weights_bytes.unwrap() && sizes.plans_bytes == Some(0));

    let rows = rows(&table);
    assert_eq!(rows.len(), 2 + 2 + 4);
    let decode = &rows[3];
    assert_eq!(
        (decode["measurement"].as_str(), decode["tokens"].as_str()),
        ("decode", "40")
    );
    assert_eq!(decode["median"].parse::<f64>().unwrap(), d.decode[1].ms.median);
    assert_eq!(
        decode["share_of_peak"].parse::<f64>().unwrap(),
        d.decode[1].mbu.unwrap()
    );
    assert_eq!(
        (rows[7]["measurement"].as_str(), rows[7]["new_tokens"].as_str()),
        ("latency", "30")
    );
    // Every row names its run.
    for row in &rows {
        let settings: Value = serde_json::from_str(&row["settings"]).unwrap();
        assert_eq!(settings, Value::from(d.system.settings.clone()));
        assert_eq!(
            (&row["commit"], &row["cpu"], &row["gpu"]),
            (&d.commit, &machine.cpu, &String::new())
        );
        assert_eq!(row["versions"], format!("lapidary {}", env!("CARGO_PKG_VERSION")));
        let number = |column: &str| row[column].parse::<f64>().unwrap();
        assert_eq!(number("load_ms"), d.load.as_ref().unwrap().load_ms.unwrap());
        assert_eq!(number("weights_bytes") as u64, sizes.weights_bytes.unwrap());
        if let Some(bytes) = memory.peak_anonymous_host_bytes {
            assert_eq!(number("peak_anonymous_host_bytes") as u64, bytes);
        }
        for none in ["driver", "first_load_ms", "build_ms", "device_total_bytes", "gpu_ms"] {
            assert_eq!(row[none], "", "{none}");
        }
    }
}

fn rows(path: &Path) -> Vec<BTreeMap<String, String>> {
    let mut reader = csv::Reader::from_path(path).unwrap();
    reader.deserialize().map(Result::unwrap).collect()
}

/// Sizes that can be computed by hand: 2 layers, hidden 32, feed-forward 48, 4 heads over 2 KV heads of 16, vocabulary
/// 97.
#[test]
fn the_models_sizes_are_right() {
    let model = parsed(&quick(llama(), &["--prefill", "3", "--outputs", "0"])).model;
    let manifest: Value = lapidary(["info", text(llama()), "--json"]).ok().json();
    let attention = 2 * 32 * (4 * 16) + 2 * 32 * (2 * 16);
    let matrices = 2 * (attention + 3 * 32 * 48);
    assert_eq!(model.matrix_parameters, Some(matrices));
    let norms = 5 * 32;
    let table = 97 * 32;
    let tied = manifest["architecture"]["tied_embeddings"].as_bool().unwrap();
    assert_eq!(
        model.parameters,
        matrices + norms + if tied { table } else { 2 * table }
    );
    // The embedding is read completely if it is the head, else one row of it.
    let read = matrices + norms + table + if tied { 0 } else { 32 };
    assert_eq!(model.weight_bytes_per_token, 4 * read);
    assert_eq!(model.kv_bytes_per_token_slot, 2 * 2 * 2 * 16 * 4);
}

/// The hash depends only on the weights' values, not on the exporter or the rest of the package.
#[test]
fn the_weights_hash_is_that_of_the_checkpoint() {
    let folder = tempfile::tempdir().unwrap();
    let hash = |export: &str, flags: &[&str]| {
        let folder = folder.path().join(export);
        std::fs::create_dir_all(&folder).unwrap();
        let model = fixture("exports").join(export).join("model.onnx");
        let mut all = vec!["--capacity", "32", "--force"];
        all.extend(flags);
        let package = package(&folder, &model, &all);
        let model = parsed(&quick(&package, &["--prefill", "3", "--outputs", "0"])).model;
        (model.weights_hash, model.dtype)
    };
    let (optimum, _) = hash("llama-optimum", &[]);
    assert_eq!(optimum.len(), 64);
    assert_eq!(hash("llama-dynamo-opset18", &[]).0, optimum);
    assert_eq!(hash("llama-ort-genai", &[]).0, optimum);
    let (rounded, dtype) = hash("llama-optimum", &["--dtype", "fp16"]);
    assert_eq!(dtype, "fp16");
    assert_ne!(rounded, optimum, "fp32 numbers that fp16 cannot hold are others then");
    let (gpt2, _) = hash("gpt2-optimum", &[]);
    assert_eq!(gpt2.len(), 64, "GPT-2 has names of its own: {gpt2}");
    assert_eq!(hash("gpt2-dynamo-opset18", &[]).0, gpt2);
}

#[test]
fn outputs_are_compared_with_a_reference() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    let prompts = [ids(3, 97, 4), ids(4, 97, 9)];
    let write = |name: &str, value: &Value| {
        std::fs::write(path(name), value.to_string()).unwrap();
        path(name)
    };
    let plain = json!({"seed": 3, "timed": ids(5, 97, 12), "prompts": prompts});
    let workload = write("workload.json", &plain);
    let flags = |file: &Path| {
        [
            "--prompts".to_string(),
            text(file).into(),
            "--prefill".into(),
            "12".into(),
            "--outputs".into(),
            "6".into(),
        ]
    };
    let run = |flags: &[String]| quick(llama(), &flags.iter().map(String::as_str).collect::<Vec<_>>());
    let first = run(&flags(&workload));
    // A result as its own reference, with its own tokens forced.
    let greedy = first["outputs"]["greedy_tokens"].clone();
    let mut forced = plain.clone();
    forced["forced"] = greedy.clone();
    let forced = write("forced.json", &forced);
    let reference = run(&flags(&forced));
    assert_eq!(parsed(&reference).outputs.unwrap().logits.len(), 2 * 6);
    let reference_file = write("reference.json", &reference);
    let compared = |reference: &Path| {
        let mut flags = flags(&forced).to_vec();
        flags.extend(["--reference".to_string(), text(reference).to_string()]);
        parsed(&run(&flags)).outputs.unwrap().reference.unwrap()
    };
    let same = compared(&reference_file);
    assert!(same.equal && same.worst_relative_logit_error < 1e-12, "{same:?}");
    assert_eq!(
        (same.rows, same.same_best, &same.greedy_equal_up_to[..]),
        (12, 12, &[6, 6][..])
    );

    // A reference with a clearly different output.
    let mut other = reference.clone();
    for row in other["outputs"]["logits"].as_array_mut().unwrap() {
        let top = row["top"].as_array_mut().unwrap();
        for pair in top.iter_mut() {
            pair[1] = json!(pair[1].as_f64().unwrap() * 1.5);
        }
        // A margin that contradicts its logits, if the second were listed.
        top.truncate(1);
        row["margin"] = json!(100.0);
    }
    other["outputs"]["greedy_tokens"][1][2] = json!(96 - greedy[1][2].as_u64().unwrap());
    let wrong = compared(&write("other.json", &other));
    assert!(!wrong.equal);
    assert!((wrong.worst_relative_logit_error - 1.0 / 3.0).abs() < 1e-6, "{wrong:?}");
    assert_eq!(wrong.greedy_equal_up_to, [6, 2]);
    let difference = wrong.first_difference[1].as_ref().unwrap();
    assert_eq!(
        (difference.step, difference.margin, difference.within_error),
        (2, Some(100.0), false)
    );

    let mut args = vec![
        "bench".to_string(),
        text(llama()).into(),
        "--reference".into(),
        text(&reference_file).into(),
    ];
    let (message, help) = lapidary(&args).refused();
    assert!(
        message.ends_with("reference.json: its outputs are for other prompts"),
        "{message}"
    );
    assert!(help.contains("--prompts"), "{help}");
    args[3] = text(&path("nothing.json")).into();
    assert!(lapidary(&args).refused().0.contains("nothing.json"));
}

/// docs/reference/benchmarks.md describes every field that is written.
#[test]
fn every_field_is_documented() {
    fn keys(value: &Value, into: &mut BTreeMap<String, ()>) {
        match value {
            Value::Object(map) => {
                for (key, inner) in map {
                    into.insert(key.clone(), ());
                    // These hold free names.
                    if key != "settings" && key != "versions" {
                        keys(inner, into);
                    }
                }
            }
            Value::Array(items) => items.iter().for_each(|item| keys(item, into)),
            _ => {}
        }
    }
    let flags = [
        "--prefill",
        "5",
        "--decode",
        "4",
        "--end-to-end",
        "3:5",
        "--peak-flops",
        "1e9",
    ];
    let mut found = BTreeMap::new();
    keys(&quick(llama(), &flags), &mut found);
    let docs =
        std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/reference/benchmarks.md")).unwrap();
    let documented = |key: &str| {
        let ends = ["`", "[]`", "."];
        let any = |before: &str| ends.iter().any(|end| docs.contains(&format!("{before}{key}{end}")));
        any("`") || any(".")
    };
    let missing: Vec<&String> = found.keys().filter(|key| !documented(key)).collect();
    assert!(found.len() > 70 && missing.is_empty(), "{missing:?}");
}

#[test]
fn the_sampler_is_recorded_and_does_its_work() {
    let sampled = quick(
        llama(),
        &[
            "--decode",
            "10",
            "--outputs",
            "0",
            "--dry-multiplier",
            "0.8",
            "--temperature",
            "0.5",
        ],
    );
    let printed = &sampled["system"]["settings"]["sampler"];
    assert_eq!(
        (
            &printed["temperature"],
            printed["dry_multiplier"].as_f64().map(|m| m as f32)
        ),
        (&json!(0.5), Some(0.8))
    );
    assert_eq!(printed.get("repetition_penalty"), None, "what is off is not recorded");
}

#[test]
fn a_person_gets_a_table() {
    let args = [
        "bench",
        text(llama()),
        "--prefill",
        "4",
        "--end-to-end",
        "3:5",
        "--repetitions",
        "4",
        "--runs",
        "1",
    ];
    let printed = lapidary(args).ok().stdout;
    for part in [
        "median ms",
        "prefill 4",
        "3 + 5, time to first token",
        "unstable",
        "copy bandwidth",
    ] {
        assert!(printed.contains(part), "{part}: {printed}");
    }
}
