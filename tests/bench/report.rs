//! `lapidary report` of committed results: its text, a source file for every figure, and refusals.
//!
//! `results/` and `peers/` are written by `make_results.py`: synthetic times in the bench schema.
//! `results/conversion.json` is the output of `lapidary info --conversion` for the Llama fixture.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use lapidary::report::plots::Figure;
use lapidary::report::{Input, report};
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

/// A run of the program, which draws PNGs: for refusals, and for the files that it writes.
struct Reported {
    folder: tempfile::TempDir,
    run: Run,
}

impl Reported {
    /// Runs in the folder of results, so that messages have plain file names.
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

/// The report without the program, to save the time for PNGs.
struct Made {
    markdown: String,
    figures: Vec<Figure>,
}

impl Made {
    fn svg(&self, name: &str) -> &str {
        let figure = self.figures.iter().find(|f| f.name == name);
        &figure.unwrap_or_else(|| panic!("no figure {name}")).svg
    }
}

fn made(files: &[String], packages: &[&str]) -> Made {
    let path = |name: &str| results().join(name);
    let files: Vec<PathBuf> = files.iter().map(|name| path(name)).collect();
    let packages: Vec<PathBuf> = packages.iter().map(|name| path(name)).collect();
    let input = Input::read(&files, &packages).unwrap_or_else(|e| panic!("{e}"));
    let report = report(&input, "docs/plots");
    Made {
        // Files have their names in their folder.
        markdown: report.markdown.replace(&format!("{}/", results().display()), ""),
        figures: report.figures,
    }
}

/// A copy of a result with something changed, in its own folder.
fn changed(name: &str, change: impl FnOnce(&mut Value)) -> (tempfile::TempDir, String) {
    let text_of = std::fs::read_to_string(results().join(name)).unwrap();
    let mut value: Value = serde_json::from_str(&text_of).unwrap();
    change(&mut value);
    let folder = tempfile::tempdir().unwrap();
    let file = Path::new(name).file_name().unwrap().to_str().unwrap();
    let path = folder.path().join(format!("changed-{file}"));
    std::fs::write(&path, value.to_string()).unwrap();
    let path = text(&path).to_string();
    (folder, path)
}

#[test]
fn the_whole_report() {
    let markdown = made(&names(), &["conversion.json"]).markdown;
    insta::with_settings!({ snapshot_path => "snapshots", prepend_module_to_snapshot => false, omit_expression => true }, {
        insta::assert_snapshot!("report", markdown);
    });
}

/// Tables end in a footnote, except those of a conversion, whose introduction has it; every footnote is a file.
#[test]
fn every_figure_leads_to_a_file() {
    let markdown = made(&names(), &["conversion.json"]).markdown;
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
    // Sentences with figures have a footnote too.
    for line in body.lines().filter(|l| l.starts_with("- ") && l.contains(" ms")) {
        assert!(line.contains("[^"), "{line}");
    }
}

/// Numbers in the tables equal those recomputed here from the files.
#[test]
fn figures_are_those_of_the_files() {
    let markdown = made(&names(), &[]).markdown;
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
            let factor = if name == "lapidary" { " |" } else { " (" };
            let start = format!("| {} | {label} | {printed}{factor}", decode["live"]);
            assert!(markdown.contains(&start), "{start}");
        }
        assert!(markdown.contains(&format!("| {label} | equal (4 rows): ")), "{label}");
    }
    let loading = |label: &str| -> Vec<String> {
        let section = markdown.split("### Loading on NVIDIA H200").nth(1).unwrap();
        let section = section.split("\n###").next().unwrap();
        let start = format!("| {label} | ");
        let rows = section.lines().filter_map(|l| l.strip_prefix(&start));
        rows.map(|row| row.rsplit_once(" | ").unwrap().0.replace(" | ", ": "))
            .collect()
    };
    assert_eq!(
        loading("lapidary"),
        [
            "cold load ms: 4200",
            "warm load ms: 900.0",
            "engines: 2",
            "plans: 16.0 MB",
            "build s: 7.0"
        ]
    );
    assert_eq!(
        loading("lapidary without CUDA graphs"),
        [
            "cold load ms: 4100",
            "engines: 2",
            "plans: 16.0 MB",
            "build s: from the cache"
        ]
    );
    assert_eq!(loading("transformers eager"), ["cold load ms: 900.0"]);
    // Lapidary is slower in one measurement, and the report says so.
    let slower = markdown.split("### Where Lapidary is slower").nth(1).unwrap();
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
    let with = made(&names(), &[]).markdown;
    let alone: Vec<String> = names().into_iter().filter(|n| n != "reference.json").collect();
    let alone = made(&alone, &[]).markdown;
    let printed = |markdown: &str, at: usize, what: &str| {
        let section = markdown.split(&format!("### {what} on NVIDIA H200\n")).nth(1).unwrap();
        let start = format!("| llama-1b fp16 | {at} | ");
        section.lines().find(|l| l.starts_with(&start)).unwrap().to_string()
    };
    {
        let value = value("lapidary");
        let mbu = value["decode"][1]["mbu"].as_f64().unwrap() * 100.0;
        let mfu = value["prefill"][1]["mfu"].as_f64().unwrap() * 100.0;
        for (markdown, of_bandwidth, of_peak) in [(&with, bandwidth, peak), (&alone, own_bandwidth, own_peak)] {
            let (mbu, mfu) = (mbu * own_bandwidth / of_bandwidth, mfu * own_peak / of_peak);
            let row = printed(markdown, 300, "Decode");
            assert!(row.contains(&format!("| {mbu:.1} % |")), "{mbu}: {row}");
            let row = printed(markdown, 512, "Prefill");
            assert!(row.contains(&format!("| {mfu:.1} % |")), "{mfu}: {row}");
        }
    }
    assert!(
        with.contains("MBU is of 4.0 TB/s for every system: the copy bandwidth that the reference's run measured.[^")
    );
    assert!(with.contains("MFU is of 700.0 TFLOP/s for every system"));
    assert!(alone.contains("MBU is of the copy bandwidth that each run measured itself."));

    // On a CPU other processes may have slowed the reference, and its matrix product is not a peak.
    let on_cpu = |name: &str| changed(name, |v| v["system"]["settings"]["device"] = json!("cpu"));
    let ((_one, ours), (_two, reference)) = (on_cpu("lapidary.json"), on_cpu("reference.json"));
    let markdown = made(&[ours, reference], &[]).markdown;
    assert!(
        markdown
            .contains("MBU is of 4.2 TB/s for every system: the highest copy bandwidth that a run here measured.[^1]"),
        "{markdown}"
    );
    assert!(markdown.contains("MFU is of the peak that each run has itself."));
}

/// Older files had another rule for groups: plots are computed from layers.
#[test]
fn layers_are_grouped_by_one_rule() {
    let (_folder, before) = changed("lapidary.json", |v| {
        let groups = v["profile"]["decode"]["groups"].as_object_mut().unwrap();
        let attention = groups.remove("attention").unwrap().as_f64().unwrap();
        groups["rest"] = json!(groups["rest"].as_f64().unwrap() + attention);
    });
    let drawn = |file: String| made(&[file], &[]).svg("llama-1b-fp16-nvidia-h200-layers").to_string();
    let now = drawn("lapidary.json".into());
    assert!(now.contains("0.410 ms, 28 %"), "{now}");
    assert_eq!(drawn(before), now);
}

#[test]
fn unstable_measurements_are_marked_in_plots() {
    let report = made(&names(), &[]);
    let svg = |kind: &str| report.svg(&format!("llama-1b-fp16-nvidia-h200-{kind}"));
    assert!(svg("ablations").contains(", unstable"));
    for kind in ["latency", "prefill", "roofline"] {
        assert!(svg(kind).contains("unstable"), "{kind}");
    }
    // A system that was measured at one length appears only there.
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
    for kind in ["latency", "prefill", "roofline", "layers", "memory", "ablations"] {
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
    let markdown = Reported::of(&["eager.json".into()], &["--plots", text(&there)]).markdown();
    assert!(there.join(name("memory") + ".png").is_file());
    assert!(markdown.contains(&format!("]({}/llama", text(&there))));
}

/// A tagged run is compared with the most similar untagged run, or with several that differ in equally few settings.
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
    let markdown = made(&files, &[]).markdown;
    let titles: Vec<&str> = markdown
        .lines()
        .filter(|l| !l.starts_with('|') && l.contains(", against "))
        .collect();
    let device = "llama-1b in fp16 on NVIDIA H200";
    // The second untagged run differs from the first only in its cache, so it is an ablation too. Runs with their own
    // section appear only there.
    assert_eq!(
        titles
            .iter()
            .map(|title| title.split(". ").next().unwrap())
            .collect::<Vec<_>>(),
        [
            format!("{device}: cache, against lapidary (growing)"),
            format!("{device}: cache, against lapidary, 1024 slots (one capacity)"),
            format!("#### chunk, against lapidary, 1024 slots: {device}"),
        ]
    );
    // Its times drift.
    let row = |part: &str| markdown.lines().find(|l| l.contains(part)).unwrap();
    let drifting = row("| 128 | no reference |");
    assert!(drifting.contains(" ×, unstable) | "), "{drifting}");
    let steady = row("| 4096 slots |");
    assert!(!steady.contains("unstable"), "{steady}");
    let missing = markdown.split("## Missing").nth(1).unwrap();
    assert!(
        !missing.contains("prefill chunk size") && !missing.contains("a growing cache"),
        "{missing}"
    );
}

/// Missing results are named, and not replaced.
#[test]
fn what_is_missing_is_named() {
    let only = ["lapidary.json".to_string()];
    let markdown = made(&only, &[]).markdown;
    let missing = markdown.split("## Missing").nth(1).unwrap();
    let missing = missing.split("\n## ").next().unwrap();
    for part in [
        "no package was given",
        "no fp32 reference",
        "no result of transformers",
        "no result of TensorRT's ONNX parser",
        "no session with ONNX Runtime GenAI",
        "no result of `lapidary bench --serve`",
        "the ablation of DRY was not run",
        "the ablation of CUDA graphs was not run",
        "bind, embed and strip",
    ] {
        assert!(missing.contains(part), "{part}: {missing}");
    }
    assert!(markdown.contains("| lapidary | no reference | "));
    assert!(markdown.contains("No package was given, so the steps cannot be shown for a model."));
    assert!(
        !markdown.contains("| model | measurement |"),
        "there is nothing to compare with"
    );

    let whole = made(&names(), &["conversion.json"]).markdown;
    let missing = whole.split("## Missing").nth(1).unwrap();
    assert!(missing.contains("TensorRT ONNX parser did not run: the parser has no importer for Attention"));
    assert!(missing.contains("transformers static cache lacks decode at context 64"));
    let wrong = whole
        .lines()
        .find(|l| l.starts_with("| 300 | transformers static cache | "))
        .unwrap();
    assert!(
        wrong.contains("(outputs: **not equal** (4 rows), unstable) |"),
        "{wrong}"
    );

    // A system that could not run has no dtype, so it is listed where the model was measured.
    let (_folder, other_dtype) = changed("parser.json", |v| v["model"]["dtype"] = json!("fp32"));
    let mut files: Vec<String> = names().into_iter().filter(|n| n != "parser.json").collect();
    files.push(other_dtype);
    let whole = made(&files, &[]).markdown;
    assert!(
        whole.contains("in fp16 on NVIDIA H200: TensorRT ONNX parser did not run"),
        "{whole}"
    );
    assert!(!whole.contains("in fp32 on"), "no group of failures alone");

    // Measurements that only another Lapidary run has are not reported as missing.
    let (_folder, another) = changed("one-capacity.json", |v| {
        v["system"]["settings"].as_object_mut().unwrap().remove("ablation");
        (v["decode"][0]["live"], v["decode"][0]["mbu"]) = (json!(4000), Value::Null);
    });
    let mut files: Vec<String> = names().into_iter().filter(|n| n != "one-capacity.json").collect();
    files.push(another);
    let whole = made(&files, &[]).markdown;
    assert!(whole.contains("| 4000 | one capacity |"), "{whole}");
    assert!(!whole.contains("decode at context 4000"), "{whole}");

    // With fewer measurements there are fewer plots, and the report says why.
    let (_folder, bare) = changed("lapidary.json", |v| {
        for key in ["profile", "end_to_end", "decode"] {
            v[key] = json!([]);
        }
        v["profile"] = Value::Null;
        v["prefill"] = json!([]);
        v["machine"]["peak_flops"] = Value::Null;
    });
    let report = made(&[bare], &[]);
    assert_eq!(report.figures.len(), 1, "memory alone");
    let markdown = report.markdown;
    assert!(markdown.contains("lapidary lacks a peak of arithmetic"), "{markdown}");
    assert!(markdown.contains("time by layer (`lapidary bench --profile`)"));
}

#[test]
fn other_json_is_listed_and_left_alone() {
    let folder = tempfile::tempdir().unwrap();
    let other = folder.path().join("h200-old.json");
    std::fs::write(&other, json!({"decode": {"wall_ms": 1.24}}).to_string()).unwrap();
    let markdown = made(&["lapidary.json".into(), text(&other).into()], &[]).markdown;
    let list = markdown.split("Files in other forms").nth(1).unwrap();
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

    // Another dtype, model or machine gets another table.
    let apart = |change: &dyn Fn(&mut Value)| {
        let (_folder, path) = changed("eager.json", |v| change(v));
        made(&["lapidary.json".into(), path], &[]).markdown
    };
    let markdown = apart(&|v| v["model"]["dtype"] = json!("bf16"));
    assert!(
        markdown.contains("| context | system | llama-1b bf16 | llama-1b fp16 |"),
        "{markdown}"
    );
    assert!(!markdown.contains("| model | measurement |"));
    let markdown = apart(&|v| v["machine"]["gpu"]["name"] = json!("NVIDIA H100"));
    assert!(markdown.contains("### Decode on NVIDIA H100"));
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

/// A real run and a real package, end to end.
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
        markdown.contains("| rms_norm | fuses RMSNorm from its parts | 5: "),
        "{markdown}"
    );
    assert!(markdown.contains("| KvCacheUpdate | 4 | "), "{markdown}");
    assert!(markdown.contains("tiny in fp32 on "), "{markdown}");
    // The stored facts of the package agree.
    let kept = folder.path().join("kept.json");
    std::fs::write(&kept, lapidary(["info", text(llama()), "--conversion"]).ok().stdout).unwrap();
    let again = folder.path().join("S.md");
    lapidary(["report", "--package", text(&kept), "-o", text(&again)]).ok();
    let tables = |markdown: &str| {
        let part = markdown.split("What each pass did").nth(1).unwrap();
        part.split("\n## ")
            .next()
            .unwrap()
            .replace("[^2]", "")
            .replace("[^1]", "")
    };
    assert_eq!(tables(&std::fs::read_to_string(again).unwrap()), tables(&markdown));
}

/// Engines of a real conversion, if TensorRT is installed; no GPU is needed.
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
        markdown.contains(": decode, capacity 16, 32 | ") && markdown.contains(": prefill, capacity 16, 32 |"),
        "{markdown}"
    );
    for profile in ["b1-t1-c16", "b1-t8-c32"] {
        assert!(markdown.contains(&format!("| {profile} | ")), "{markdown}");
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
    // Times are from the same precision.
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
    let markdown = made(&files, &[]).markdown;
    let section = markdown
        .split("\n## Quality of quantized models\n")
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

    // Values that were edited or are not numbers are refused.
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

/// A file of a session with peers.
fn peer(name: &str) -> String {
    format!("../peers/{name}.json")
}

fn session() -> Vec<String> {
    let systems = [
        "lapidary",
        "onnxruntime-genai",
        "lapidary-int4",
        "onnxruntime-genai-int4",
    ];
    systems.map(|name| peer(&format!("llama-1b-peer-{name}"))).to_vec()
}

fn median(file: &str, at: usize) -> f64 {
    let value: Value = serde_json::from_str(&std::fs::read_to_string(results().join(file)).unwrap()).unwrap();
    value["decode"][at]["ms"]["median"].as_f64().unwrap()
}

/// A session has its own table, comes first on the first page, and compares weights of one format.
#[test]
fn peers_stand_in_one_table() {
    let mut files = names();
    files.extend(session());
    let markdown = made(&files, &["conversion.json"]).markdown;
    let section = markdown.split("### One session, NVIDIA H200").nth(1).unwrap();
    let section = section.split("\n## ").next().unwrap();
    assert!(
        section.contains("| model | measurement | Lapidary ms | ONNX Runtime GenAI ms |  |"),
        "{section}"
    );
    let pairs = [
        ("fp16", "lapidary", "onnxruntime-genai"),
        ("int4", "lapidary-int4", "onnxruntime-genai-int4"),
    ];
    for (format, ours, theirs) in pairs {
        let [ours, theirs] = [ours, theirs].map(|name| median(&peer(&format!("llama-1b-peer-{name}")), 0));
        let cells = format!("{ours:.3} | {theirs:.3} ({:.2} ×) |", theirs / ours);
        let row = format!("| llama-1b {format} | ms/token at context 300 | {cells}");
        assert!(section.contains(&row), "{row}: {section}");
        let (first_page, _) = markdown.split_once("## Beside the peers").unwrap();
        let row = format!("| llama-1b {format}, NVIDIA H200 | ms/token at context 300 | **{ours:.3}** | {theirs:.3} (");
        assert!(first_page.contains(&row), "{row}: {first_page}");
    }
    // Outputs of quantized weights differ from the reference: compared is how often both rank the same token first.
    assert!(
        section.contains("| llama-1b fp16 | answers | equal (4 rows) | equal (4 rows) |"),
        "{section}"
    );
    assert!(section.contains("| llama-1b int4 | answers | top-1 "), "{section}");
    assert!(section.contains("; of Lapidary's: "), "{section}");
    assert!(
        section.contains("Runs: Lapidary (2026-11-24, 0123456789ab, "),
        "{section}"
    );
    let slower = section.split("### Where Lapidary is slower").nth(1).unwrap();
    assert!(slower.contains("- fp16, TTFT ms, prompt 512: "), "{slower}");
    assert!(!markdown.contains("no session with ONNX Runtime GenAI"));

    // The rules of every comparison apply: the same prompts, and the same weights unless they are quantized.
    let refused = |name: &str, change: &dyn Fn(&mut Value)| {
        let (_folder, path) = changed(&peer(&format!("llama-1b-peer-{name}")), |v| change(v));
        Reported::of(&[session()[0].clone(), path], &[]).run.refused().0
    };
    let weights = |v: &mut Value| v["model"]["weights_hash"] = json!("ef");
    assert!(refused("onnxruntime-genai", &weights).contains("not of the same weights"));
    let prompts = |v: &mut Value| v["workload"]["prompts"][1]["sha256"] = json!("00");
    assert!(refused("onnxruntime-genai-int4", &prompts).contains("not of the same prompts"));
    // Files of quantized weights may have different weights.
    let (_folder, path) = changed(&session()[3], |v| v["model"]["weights_hash"] = json!("ef"));
    made(&[session()[0].clone(), path], &[]);
}

#[test]
fn a_server_is_shown_by_clients() {
    let report = made(&["lapidary.json".into(), peer("serve")], &[]);
    assert!(report.svg("serving-throughput").contains("llama-1b: 1800"));
    let markdown = report.markdown;
    assert!(
        markdown.contains("| llama-1b | 16 | 1800 | 9.00 × | 14.4 | "),
        "{markdown}"
    );
    assert!(!markdown.contains("no result of `lapidary bench --serve`"));
    let refused = |change: &dyn Fn(&mut Value)| {
        let (_folder, path) = changed(&peer("serve"), |v| change(v));
        Reported::of(&[path], &[]).run.refused().0
    };
    let message = refused(&|v| v["levels"][1]["tokens_per_s"] = json!(900.0));
    assert!(
        message.contains("levels[1].tokens_per_s is 900, and its samples give 700"),
        "{message}"
    );
    assert!(
        refused(&|v| drop(v["levels"][0].as_object_mut().unwrap().remove("clients")))
            .contains("levels[0]: missing field")
    );
    assert!(refused(&|v| v["levels"] = json!([])).contains("levels: there are none"));
}

#[test]
fn quantized_forms_have_a_column_for_each_system() {
    let value: Value =
        serde_json::from_str(&std::fs::read_to_string(results().join(peer("side-by-side"))).unwrap()).unwrap();
    let of = |system: &str| value["forms"]["int4"][system]["tpot_ms"].as_f64().unwrap();
    let markdown = made(&[peer("side-by-side")], &[]).markdown;
    let (ours, llama) = (of("lapidary"), of("llama.cpp"));
    let head = "| model | form | threads | Lapidary | llama.cpp | ONNX Runtime level 4 |  |";
    assert!(markdown.contains(head), "{markdown}");
    let row = format!(
        "| SmolLM2-135M | int4 | 2 | {ours:.3} | {llama:.3} ({:.2} ×) | ",
        llama / ours
    );
    assert!(markdown.contains(&row), "{row}: {markdown}");
    assert!(
        markdown.contains("| 116 MB | 334 MB, 64 tokens equal | 324 MB, 56 tokens equal |"),
        "{markdown}"
    );
    let (_folder, path) = changed(&peer("side-by-side"), |v| {
        v["forms"]["int4"]["llama.cpp"]["tpot_ms"] = json!(1.0)
    });
    let message = Reported::of(&[path], &[]).run.refused().0;
    assert!(
        message.contains("forms.int4.llama.cpp.tpot_ms is 1, and its samples give "),
        "{message}"
    );
}
