//! `lapidary report` of committed results: what it says, that every figure leads to a file, and what it refuses.
//!
//! `results/` is made by `make_results.py`: made-up times in the bench schema. `results/conversion.json` is what
//! `lapidary info --conversion` said of the Llama fixture.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use crate::measured::{llama, quick};
use crate::support::{Run, command, lapidary, text};

fn results() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/bench/results")
}

/// All result files, without the conversion.
fn names() -> Vec<String> {
    let entries = std::fs::read_dir(results())
        .unwrap()
        .map(|e| e.unwrap().file_name().into_string().unwrap());
    let mut names: Vec<String> = entries.filter(|n| n != "conversion.json").collect();
    names.sort();
    names
}

struct Reported {
    folder: tempfile::TempDir,
    run: Run,
}

impl Reported {
    /// Runs in the folder of results, so that files are named as they are.
    fn of(files: &[String], flags: &[&str]) -> Reported {
        let folder = tempfile::tempdir().unwrap();
        let output = folder.path().join("REPORT.md");
        let mut command = command();
        command
            .current_dir(results())
            .arg("report")
            .args(files)
            .args(flags)
            .arg("-o")
            .arg(&output);
        let run = Run::of(command.output().unwrap());
        Reported { folder, run }
    }

    fn markdown(self) -> String {
        let text = std::fs::read_to_string(self.folder.path().join("REPORT.md"));
        self.run.ok();
        text.unwrap()
    }
}

/// A copy of a result with something changed, in a folder of its own.
fn changed(name: &str, change: impl FnOnce(&mut Value)) -> (tempfile::TempDir, String) {
    let text_of = std::fs::read_to_string(results().join(name)).unwrap();
    let mut value: Value = serde_json::from_str(&text_of).unwrap();
    change(&mut value);
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join(format!("changed-{name}"));
    std::fs::write(&path, value.to_string()).unwrap();
    let path = text(&path).to_string();
    (folder, path)
}

#[test]
fn the_whole_report() {
    let markdown = Reported::of(&names(), &["--package", "conversion.json"]).markdown();
    insta::with_settings!({ snapshot_path => "snapshots", prepend_module_to_snapshot => false, omit_expression => true }, {
        insta::assert_snapshot!("report", markdown);
    });
}

/// Tables end in a footnote, but for those of a conversion, whose introduction has it; every footnote is a file.
#[test]
fn every_figure_leads_to_a_file() {
    let markdown = Reported::of(&names(), &["--package", "conversion.json"]).markdown();
    let (body, sources) = markdown.split_once("## Sources").unwrap();
    let (_, sources) = sources.split_once("\n[^").unwrap();
    let mut defined = BTreeSet::new();
    for line in format!("[^{sources}").lines().filter(|l| l.starts_with("[^")) {
        let (mark, rest) = line.split_once(": `").unwrap();
        let file = rest.split('`').next().unwrap();
        assert!(results().join(file).is_file(), "{file}");
        defined.insert(mark.to_string());
    }
    assert_eq!(defined.len(), names().len() + 1);
    let (mut introduced, mut rows) = (String::new(), 0);
    let lines: Vec<&str> = body.lines().collect();
    for (i, line) in lines.iter().enumerate() {
        if !line.starts_with('|') {
            if !line.is_empty() {
                introduced = line.to_string();
            }
            continue;
        }
        let is_head = lines[i..].iter().take(2).any(|l| l.starts_with("|--"));
        if !is_head {
            rows += 1;
            assert!(line.contains("[^") || introduced.contains("[^"), "{line}");
        }
    }
    assert!(rows > 60, "{rows}");
    for mark in body
        .split("[^")
        .skip(1)
        .map(|rest| format!("[^{}]", rest.split(']').next().unwrap()))
    {
        assert!(defined.contains(&mark), "{mark} is nowhere explained");
    }
    // Sentences with figures have a mark too.
    for line in body.lines().filter(|l| l.starts_with("- ") && l.contains(" ms")) {
        assert!(line.contains("[^"), "{line}");
    }
}

/// Numbers of the tables are those of the files, computed here once more.
#[test]
fn figures_are_those_of_the_files() {
    let markdown = Reported::of(&names(), &[]).markdown();
    for name in ["lapidary", "eager", "compiled"] {
        let value: Value =
            serde_json::from_str(&std::fs::read_to_string(results().join(format!("{name}.json"))).unwrap()).unwrap();
        let label = value["system"]["label"].as_str().unwrap();
        for decode in value["decode"].as_array().unwrap() {
            let mut samples: Vec<f64> = decode["samples_ms"]
                .as_array()
                .unwrap()
                .iter()
                .map(|s| s.as_f64().unwrap())
                .collect();
            samples.sort_by(f64::total_cmp);
            // Sixteen samples: the median is between the eighth and the ninth.
            let median = (samples[7] + samples[8]) / 2.0;
            let printed = if median >= 10.0 {
                format!("{median:.2}")
            } else {
                format!("{median:.3}")
            };
            let start = format!("| equal (4 rows) | {} | {label} | {printed} |", decode["live"]);
            assert!(markdown.contains(&start), "{start}");
        }
    }
    let loading = |label: &str| {
        let start = format!("| {label} | ");
        let tables = markdown.split(": loading and memory").nth(1).unwrap();
        tables
            .lines()
            .find_map(|l| l.strip_prefix(&start)?.rsplit_once(" | "))
            .unwrap()
            .0
            .to_string()
    };
    assert_eq!(loading("lapidary"), "4200 | 900.0 | 2 | 16.0 MB | 7.0");
    assert_eq!(
        loading("lapidary without CUDA graphs"),
        "4100 | — | 2 | 16.0 MB | from the cache"
    );
    assert_eq!(loading("transformers eager"), "900.0 | — | — | — | —");
    // Ours is slower in one thing, and the report says so itself.
    let slower = markdown.split("### Where it falls short").nth(1).unwrap();
    let slower = slower.split("\n## ").next().unwrap();
    assert!(slower.contains("TTFT ms, prompt 512"), "{slower}");
    assert!(slower.contains("the time of transformers static + compile"), "{slower}");
    assert!(!slower.contains("ms/token at"), "{slower}");
}

/// Shares are of the reference's bandwidth and peak for every system, and of each file's own where there is no reference.
#[test]
fn shares_are_of_one_bandwidth_and_one_peak() {
    let value = |name: &str| -> Value {
        serde_json::from_str(&std::fs::read_to_string(results().join(format!("{name}.json"))).unwrap()).unwrap()
    };
    let reference = &value("reference")["machine"];
    let [bandwidth, peak] = [
        &reference["copy_bandwidth_bytes_per_s"],
        &reference["peak_flops"]["flops"],
    ]
    .map(|n| n.as_f64().unwrap());
    let machine = &value("lapidary")["machine"];
    let [own_bandwidth, own_peak] =
        [&machine["copy_bandwidth_bytes_per_s"], &machine["peak_flops"]["flops"]].map(|n| n.as_f64().unwrap());
    assert!(bandwidth != own_bandwidth && peak != own_peak);
    let with = Reported::of(&names(), &[]).markdown();
    let alone: Vec<String> = names().into_iter().filter(|n| n != "reference.json").collect();
    let alone = Reported::of(&alone, &[]).markdown();
    let printed = |markdown: &str, label: &str, at: usize, what: &str| {
        let section = markdown.split(&format!("H200: {what}\n")).nth(1).unwrap();
        let cell = format!("| {at} | {label} |");
        section.lines().find(|l| l.contains(&cell)).unwrap().to_string()
    };
    for name in ["lapidary", "eager"] {
        let value = value(name);
        let label = value["system"]["label"].as_str().unwrap();
        let mbu = value["decode"][1]["mbu"].as_f64().unwrap() * 100.0;
        let mfu = value["prefill"][1]["mfu"].as_f64().unwrap() * 100.0;
        for (markdown, of_bandwidth, of_peak) in [(&with, bandwidth, peak), (&alone, own_bandwidth, own_peak)] {
            let (mbu, mfu) = (mbu * own_bandwidth / of_bandwidth, mfu * own_peak / of_peak);
            let row = printed(markdown, label, 300, "decode");
            assert!(row.contains(&format!("| {mbu:.1} % |")), "{mbu}: {row}");
            let row = printed(markdown, label, 512, "prefill");
            assert!(row.contains(&format!("| {mfu:.1} % |")), "{mfu}: {row}");
        }
    }
    assert!(
        with.contains("MBU is of 4.0 TB/s for every system: the copy bandwidth that the reference's run measured.[^")
    );
    assert!(with.contains("MFU is of 700.0 TFLOP/s for every system"));
    assert!(alone.contains("MBU is of the copy bandwidth that each run measured itself."));

    // On a CPU a reference may have had busier neighbours, and its product is no peak.
    let on_cpu = |name: &str| changed(name, |v| v["system"]["settings"]["device"] = json!("cpu"));
    let ((_one, ours), (_two, reference)) = (on_cpu("lapidary.json"), on_cpu("reference.json"));
    let markdown = Reported::of(&[ours, reference], &[]).markdown();
    assert!(
        markdown
            .contains("MBU is of 4.2 TB/s for every system: the highest copy bandwidth that a run here measured.[^1]"),
        "{markdown}"
    );
    assert!(markdown.contains("MFU is of the peak that each run has itself."));
}

/// Files of before had another rule for groups: what is drawn follows from layers.
#[test]
fn layers_are_grouped_by_one_rule() {
    let (_folder, before) = changed("lapidary.json", |v| {
        let groups = v["profile"]["decode"]["groups"].as_object_mut().unwrap();
        let attention = groups.remove("attention").unwrap().as_f64().unwrap();
        groups["rest"] = json!(groups["rest"].as_f64().unwrap() + attention);
    });
    let drawn = |file: String| {
        let reported = Reported::of(&[file], &[]);
        let name = "docs/plots/llama-1b-fp16-nvidia-h200-layers.svg";
        std::fs::read_to_string(reported.folder.path().join(name)).unwrap()
    };
    let now = drawn("lapidary.json".into());
    assert!(now.contains("0.410 ms, 28 %"), "{now}");
    assert_eq!(drawn(before), now);
}

#[test]
fn what_did_not_hold_still_is_marked_in_plots() {
    let reported = Reported::of(&names(), &[]);
    let svg = |kind: &str| {
        let name = format!("docs/plots/llama-1b-fp16-nvidia-h200-{kind}.svg");
        std::fs::read_to_string(reported.folder.path().join(name)).unwrap()
    };
    for kind in ["throughput", "ablations"] {
        assert!(svg(kind).contains(", unstable"), "{kind}");
    }
    for kind in ["latency", "roofline"] {
        assert!(svg(kind).contains("unstable"), "{kind}");
    }
    // A system that was measured at one length is named there, and not where it never was.
    let latency = svg("latency");
    let place = |label: &str| -> f64 {
        let before = latency.split(&format!("\n{label}: ")).next().unwrap();
        let tag = before.rsplit("<text ").next().unwrap();
        tag.split("x=\"")
            .nth(1)
            .unwrap()
            .split('"')
            .next()
            .unwrap()
            .parse()
            .unwrap()
    };
    assert!(place("lapidary without CUDA graphs") < place("lapidary") - 100.0);
    assert_eq!(place("transformers eager"), place("lapidary"));
}

#[test]
fn plots_come_in_two_forms() {
    let reported = Reported::of(&names(), &[]);
    let plots = reported.folder.path().join("docs/plots");
    let name = |kind: &str| format!("llama-1b-fp16-nvidia-h200-{kind}");
    for kind in ["latency", "throughput", "roofline", "layers", "memory", "ablations"] {
        let svg = std::fs::read_to_string(plots.join(name(kind) + ".svg")).unwrap();
        assert!(svg.starts_with("<svg") && svg.contains("llama-1b in fp16"), "{kind}");
        let png = std::fs::read(plots.join(name(kind) + ".png")).unwrap();
        assert_eq!(&png[..8], b"\x89PNG\r\n\x1a\n", "{kind}");
        let side = |at: usize| u32::from_be_bytes(png[at..at + 4].try_into().unwrap());
        assert_eq!(side(16), 2 * 960, "{kind}: two pixels a unit");
        assert!(side(20) > 300 && png.len() > 10_000, "{kind}");
    }
    let markdown = reported.markdown();
    assert!(markdown.contains("](docs/plots/llama-1b-fp16-nvidia-h200-latency.svg)"));

    let elsewhere = tempfile::tempdir().unwrap();
    let there = elsewhere.path().join("p");
    let markdown = Reported::of(&names(), &["--plots", text(&there)]).markdown();
    assert!(there.join(name("memory") + ".png").is_file());
    assert!(markdown.contains(&format!("]({}/llama", text(&there))));
}

/// A tagged run is compared with the untagged one that is most like it, with several where it differs in as few settings.
#[test]
fn an_ablation_finds_its_baseline() {
    let (_one, small) = changed("lapidary.json", |v| {
        v["system"]["label"] = json!("lapidary, 1024 slots");
        v["system"]["settings"]["cache"] = json!("one capacity");
        v["system"]["settings"]["capacities"] = json!([1024]);
    });
    let (_two, chunk) = changed("embedded.json", |v| {
        v["system"]["label"] = json!("chunk: 128");
        let settings = &mut v["system"]["settings"];
        settings["weights"] = json!("bind");
        settings["cache"] = json!("one capacity");
        settings["capacities"] = json!([1024]);
        settings["prefill_chunks"] = json!([128]);
        settings["ablation"] = json!({"group": "chunk", "switch": "128"});
    });
    let files = ["lapidary.json".into(), "one-capacity.json".into(), small, chunk];
    let markdown = Reported::of(&files, &[]).markdown();
    let titles: Vec<&str> = markdown
        .lines()
        .filter(|l| !l.starts_with('|') && l.contains(", against "))
        .collect();
    let device = "llama-1b in fp16 on NVIDIA H200";
    // The second untagged run differs from the first in its cache alone, so it is one too. What has a section of its own
    // stands there, and nowhere again.
    assert_eq!(
        titles,
        [
            format!("{device}: cache, against lapidary (growing)."),
            format!("{device}: cache, against lapidary, 1024 slots (one capacity)."),
            format!("### chunk, against lapidary, 1024 slots: {device}"),
        ]
    );
    assert!(markdown.contains("[static cache](#static-cache)"));
    // Its times drift.
    let row = |part: &str| markdown.lines().find(|l| l.contains(part)).unwrap();
    let drifting = row("ms/token at context 300 | 128 |");
    assert!(drifting.contains("| unstable[^"), "{drifting}");
    let steady = row("| 4096 slots |");
    assert!(steady.contains("| [^"), "{steady}");
    let missing = markdown.split("## Missing").nth(1).unwrap();
    assert!(
        !missing.contains("prefill chunk size") && !missing.contains("a growing cache"),
        "{missing}"
    );
}

/// What is not there is named, and nothing stands in its place.
#[test]
fn what_is_missing_is_named() {
    let only = ["lapidary.json".to_string()];
    let markdown = Reported::of(&only, &[]).markdown();
    let missing = markdown.split("## Missing").nth(1).unwrap();
    let missing = missing.split("\n## ").next().unwrap();
    for part in [
        "no package was given",
        "no fp32 reference",
        "no result of transformers",
        "no result of tensorrt-onnx-parser",
        "the ablation of DRY was not run",
        "the ablation of CUDA graphs was not run",
        "bind, embed and strip",
    ] {
        assert!(missing.contains(part), "{part}: {missing}");
    }
    assert!(markdown.contains("| no reference | 300 | lapidary |"));
    assert!(markdown.contains("No package was given, so the steps cannot be shown for a model."));
    assert!(!markdown.contains("### In short"), "there is nothing to compare with");

    let whole = Reported::of(&names(), &["--package", "conversion.json"]).markdown();
    let missing = whole.split("## Missing").nth(1).unwrap();
    assert!(missing.contains("TensorRT ONNX parser did not run: the parser has no importer for Attention"));
    assert!(missing.contains("transformers static cache lacks decode at context 64"));
    assert!(whole.contains("transformers static cache: prefill of 512, decode at context 300, decode at context 4080"));

    // What could not run has no dtype of its own, so it stands where the model was measured.
    let (_folder, other_dtype) = changed("parser.json", |v| v["model"]["dtype"] = json!("fp32"));
    let mut files: Vec<String> = names().into_iter().filter(|n| n != "parser.json").collect();
    files.push(other_dtype);
    let whole = Reported::of(&files, &[]).markdown();
    assert!(
        whole.contains("in fp16 on NVIDIA H200: TensorRT ONNX parser did not run"),
        "{whole}"
    );
    assert!(!whole.contains("in fp32 on"), "no group of failures alone");

    // What another run of ours measured is asked of nobody.
    let (_folder, another) = changed("one-capacity.json", |v| {
        v["system"]["settings"].as_object_mut().unwrap().remove("ablation");
        (v["decode"][0]["live"], v["decode"][0]["mbu"]) = (json!(4000), Value::Null);
    });
    let mut files: Vec<String> = names().into_iter().filter(|n| n != "one-capacity.json").collect();
    files.push(another);
    let whole = Reported::of(&files, &[]).markdown();
    assert!(whole.contains("| equal (4 rows) | 4000 | one capacity"), "{whole}");
    assert!(!whole.contains("decode at context 4000"), "{whole}");

    // Less measured, fewer plots, and it says why.
    let (_folder, bare) = changed("lapidary.json", |v| {
        for key in ["profile", "end_to_end", "decode"] {
            v[key] = json!([]);
        }
        v["profile"] = Value::Null;
        v["prefill"] = json!([]);
        v["machine"]["peak_flops"] = Value::Null;
    });
    let reported = Reported::of(&[bare], &[]);
    let drawn = std::fs::read_dir(reported.folder.path().join("docs/plots"))
        .unwrap()
        .count();
    assert_eq!(drawn, 2, "memory alone");
    let markdown = reported.markdown();
    assert!(markdown.contains("lapidary lacks a peak of arithmetic"), "{markdown}");
    assert!(markdown.contains("time by layer (`lapidary bench --profile`)"));
}

#[test]
fn other_json_is_listed_and_left_alone() {
    let folder = tempfile::tempdir().unwrap();
    let other = folder.path().join("h200-old.json");
    std::fs::write(&other, json!({"decode": {"wall_ms": 1.24}}).to_string()).unwrap();
    let markdown = Reported::of(&["lapidary.json".into(), text(&other).into()], &[]).markdown();
    let list = markdown.split("not in the bench schema").nth(1).unwrap();
    assert!(list.contains("h200-old.json"));
    assert!(!markdown.contains("[^2]"), "no figure is cited from it");
}

#[test]
fn what_must_not_stand_side_by_side_is_refused() {
    let refused = |name: &str, change: &dyn Fn(&mut Value)| {
        let (_folder, path) = changed(name, |v| change(v));
        Reported::of(&["lapidary.json".into(), path], &[]).run.refused()
    };
    let (message, help) = refused("eager.json", &|v| v["model"]["weights_hash"] = json!("cd"));
    assert!(
        message.contains("lapidary.json") && message.contains("changed-eager.json"),
        "{message}"
    );
    assert!(
        message.contains("llama-1b in fp16, but not of the same weights"),
        "{message}"
    );
    assert!(help.contains("--model-name"), "{help}");
    let prompts = |v: &mut Value| v["workload"]["prompts"][1]["sha256"] = json!("00");
    assert!(refused("eager.json", &prompts).0.contains("not of the same prompts"));
    assert!(
        refused("reference.json", &prompts)
            .0
            .contains("not of the same prompts")
    );
    assert!(
        refused("embedded.json", &prompts).0.contains("not of the same prompts"),
        "ablations too"
    );
    let (message, help) = refused("eager.json", &|v| v["system"]["label"] = json!("lapidary"));
    assert!(
        message.contains("both called \"lapidary\"") && help.contains("--label"),
        "{message}"
    );

    // Another dtype, model or machine is another table.
    let apart = |change: &dyn Fn(&mut Value)| {
        let (_folder, path) = changed("eager.json", |v| change(v));
        Reported::of(&["lapidary.json".into(), path], &[]).markdown()
    };
    let markdown = apart(&|v| v["model"]["dtype"] = json!("bf16"));
    assert!(markdown.contains("llama-1b in bf16 on NVIDIA H200: decode") && !markdown.contains("### In short"));
    let markdown = apart(&|v| v["machine"]["gpu"]["name"] = json!("NVIDIA H100"));
    assert!(markdown.contains("llama-1b in fp16 on NVIDIA H100: decode"));
}

#[test]
fn files_that_do_not_hold_together_are_refused() {
    let refused = |change: &dyn Fn(&mut Value)| {
        let (_folder, path) = changed("lapidary.json", |v| change(v));
        let reported = Reported::of(&[path], &[]);
        assert!(!reported.folder.path().join("REPORT.md").exists(), "nothing is written");
        reported.run.refused().0
    };
    let message = refused(&|v| v["decode"][1]["ms"]["median"] = json!(0.9));
    assert!(
        message.contains("changed-lapidary.json: decode[1].ms.median is 0.9, and its samples give 1.25"),
        "{message}"
    );
    assert!(refused(&|v| v["schema"] = json!("lapidary-bench/9")).contains("the schema is \"lapidary-bench/9\""));
    let message = refused(&|v| {
        v["model"].as_object_mut().unwrap().remove("layers");
    });
    assert!(message.contains("model: missing field `layers`"), "{message}");
    let broken = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(broken.path(), "{").unwrap();
    assert!(
        Reported::of(&[text(broken.path()).into()], &[])
            .run
            .refused()
            .0
            .contains("is not JSON")
    );
    assert!(
        Reported::of(&["nothing.json".into()], &[])
            .run
            .refused()
            .0
            .contains("nothing.json")
    );
    let message = Reported::of(&["lapidary.json".into()], &["--package", "eager.json"])
        .run
        .refused()
        .0;
    assert!(message.contains("neither a package nor a conversion"), "{message}");
    assert_eq!(lapidary(["report", "-o", "x.md"]).status, 2);
}

/// A real run, and a real package, from end to end.
#[test]
fn a_real_result_becomes_a_report() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("run.json");
    let run = quick(llama(), &["--prefill", "5", "--decode", "4", "--model-name", "tiny"]);
    std::fs::write(&file, run.to_string()).unwrap();
    let report = folder.path().join("R.md");
    let args = ["report", text(&file), "--package", text(llama()), "-o", text(&report)];
    let said = lapidary(args).ok().stdout;
    assert!(said.contains("measurements are missing"), "{said}");
    let markdown = std::fs::read_to_string(report).unwrap();
    assert!(
        markdown.contains("| rms_norm | finds RMSNorm in its parts | 5 |"),
        "{markdown}"
    );
    assert!(markdown.contains("| KvCacheUpdate | 4 |"), "{markdown}");
    assert!(markdown.contains("tiny in fp32 on "), "{markdown}");
    // Kept facts of the package say the same.
    let kept = folder.path().join("kept.json");
    std::fs::write(&kept, lapidary(["info", text(llama()), "--conversion"]).ok().stdout).unwrap();
    let again = folder.path().join("S.md");
    lapidary(["report", "--package", text(&kept), "-o", text(&again)]).ok();
    let tables = |markdown: &str| {
        let part = markdown.split("The passes that changed it").nth(1).unwrap();
        part.split("\n## ")
            .next()
            .unwrap()
            .replace("[^2]", "")
            .replace("[^1]", "")
    };
    assert_eq!(tables(&std::fs::read_to_string(again).unwrap()), tables(&markdown));
}

/// Engines of a real conversion, where there is a TensorRT to build them; no GPU is needed.
#[cfg(feature = "tensorrt-rtx")]
#[test]
fn engines_are_listed_with_their_layers() {
    use crate::support::{fixture, package};
    use lapidary::backend::tensorrt::Library;
    let library = Library::load(None).unwrap_or_else(|e| panic!("{e}"));
    let folder = tempfile::tempdir().unwrap();
    let flags = "--target cpu,tensorrt-rtx --capacity 16,32 --prefill 8 --tensorrt-lib";
    let flags: Vec<&str> = flags.split(' ').chain([text(library.path())]).collect();
    let package = package(folder.path(), &fixture("exports/llama-optimum/model.onnx"), &flags);
    let report = folder.path().join("R.md");
    lapidary(["report", "--package", text(&package), "-o", text(&report)]).ok();
    let markdown = std::fs::read_to_string(report).unwrap();
    // Profiles with the same layers share a column.
    assert!(
        markdown.contains("| layer | b1-t1-c16, b1-t1-c32 | b1-t8-c16, b1-t8-c32 |"),
        "{markdown}"
    );
    for profile in ["b1-t1-c16", "b1-t8-c32"] {
        assert!(
            markdown.contains(&format!("| {profile} | bind | none | ")),
            "{markdown}"
        );
    }
    assert!(markdown.contains("| chunks of 8 | 16, 32 | 4 |"), "{markdown}");
    // The same package measured: build times and plan sizes are in the result.
    let run = quick(&package, &["--prefill", "3", "--outputs", "0"]);
    let built = run["build"]["engines"].as_array().unwrap();
    let bytes: u64 = built.iter().map(|e| e["bytes"].as_u64().unwrap()).sum();
    assert_eq!((built.len(), run["sizes"]["plans_bytes"].as_u64().unwrap()), (4, bytes));
}

/// A result of `lapidary perplexity`, with something changed.
fn perplexity(name: &str, hash: &str, change: impl FnOnce(&mut Value)) -> Value {
    let nll: f64 = 2.5;
    let mut value = json!({
        "schema": "lapidary-perplexity/1", "date": "2026-11-29T12:00:00Z", "command": "", "commit": "", "lapidary": "0.1.0",
        "device": "cpu",
        "model": {"name": name, "dtype": "fp32", "format": "f32", "weight_bytes": 4_000_000, "weights_hash": hash},
        "text": {"file": "book.txt", "bytes": 9, "blake3": "ab"}, "tokens": 100, "scored": 99, "prefix": [],
        "window": 64, "stride": 64, "perplexity": nll.exp(), "perplexity_error": 0.25,
        "nll": {"mean": nll, "error": 0.02}, "ms_per_token": 1.5,
    });
    change(&mut value);
    value
}

#[test]
fn quality_stands_beside_bytes_and_times() {
    let folder = tempfile::tempdir().unwrap();
    let write = |name: &str, value: Value| {
        let path = folder.path().join(name);
        std::fs::write(&path, value.to_string()).unwrap();
        text(&path).to_string()
    };
    let ours: Value = serde_json::from_str(&std::fs::read_to_string(results().join("lapidary.json")).unwrap()).unwrap();
    let hash = ours["model"]["weights_hash"].as_str().unwrap();
    let quantized = perplexity("small", "other", |v| {
        v["model"]["format"] = json!("u4 in blocks of 32 on axis 1; f32");
        v["model"]["weight_bytes"] = json!(1_000_000);
        v["against"] = json!({"model": v["model"], "perplexity": 1.0, "perplexity_error": 0.0,
            "nll": {"mean": 0.0, "error": 0.0}, "kl": {"mean": 0.0123, "error": 0.0004}, "kl_largest": 2.0,
            "same_best": 0.955});
        v["against"]["model"]["name"] = json!("whole");
    });
    // Times are those of the same precision.
    let dtype = &ours["model"]["dtype"];
    let elsewhere = perplexity("whole", hash, |v| {
        v["window"] = json!(32);
        v["model"]["dtype"] = dtype.clone();
    });
    let files = [
        write("quantized.json", quantized.clone()),
        write(
            "whole.json",
            perplexity("whole", hash, |v| v["model"]["dtype"] = dtype.clone()),
        ),
        write("window.json", elsewhere),
        "lapidary.json".to_string(),
    ];
    let markdown = Reported::of(&files, &[]).markdown();
    let section = markdown
        .split("\n## Quality\n")
        .nth(1)
        .unwrap()
        .split("\n## ")
        .next()
        .unwrap();
    let tables: Vec<&str> = section.split("book.txt, ").skip(1).collect();
    assert_eq!(tables.len(), 2, "another window is another table: {section}");
    assert!(
        tables[0].starts_with("99 tokens scored, in windows of 64 every 64, nothing put before them.[^1][^2]"),
        "{section}"
    );
    let rows: Vec<&str> = tables[0].lines().filter(|l| l.starts_with("| ")).skip(1).collect();
    let live = &ours["decode"][0]["live"];
    assert!(
        rows[0].starts_with("| whole | f32 | 4.0 MB | 12.182 ± 0.250 | — | — | ")
            && rows[0].ends_with(&format!(" (after {live}) | [^2][^4] |")),
        "{section}"
    );
    assert_eq!(
        rows[1],
        "| small | u4 in blocks of 32 on axis 1; f32 | 1.0 MB | 12.182 ± 0.250 | 0.01230 ± 0.00040 of whole | 95.5 % | — | \
         [^1] |"
    );
    let missing = markdown.split("## Missing").nth(1).unwrap();
    assert!(
        missing.contains("- small: no bench result of the same weights, so the time per output token is not shown[^1]"),
        "{missing}"
    );
    assert!(!missing.contains("lapidary perplexity"), "{missing}");

    // What was changed by hand, or is no number, is refused.
    let refused = |change: fn(&mut Value)| {
        let mut value = quantized.clone();
        change(&mut value);
        Reported::of(&[write("changed.json", value)], &[]).run.refused().0
    };
    assert!(refused(|v| v["perplexity"] = json!(9.0)).contains("changed.json: perplexity: is 9, and e^nll is 12.18"));
    assert!(refused(|v| v["against"]["same_best"] = json!(1.5)).contains("against.same_best"));
    assert!(refused(|v| v["against"]["kl"]["mean"] = json!(-0.1)).contains("against.kl"));
    assert!(refused(|v| drop(v["model"].as_object_mut().unwrap().remove("format"))).contains("missing field `format`"));
}
