//! Input that `bench` refuses before measuring, and results that are refused when read.

use std::path::Path;

use lapidary::bench::{self, ResultError};
use proptest::prelude::*;
use serde_json::{Value, json};

use crate::measured::{llama, quick};
use crate::support::{lapidary, text};

#[test]
fn what_cannot_be_measured_is_refused_first() {
    let folder = tempfile::tempdir().unwrap();
    let refused = |flags: &[&str]| {
        let mut args = vec!["bench", text(llama())];
        args.extend(flags);
        lapidary(args).refused()
    };
    let (message, help) = refused(&["--prefill", "65"]);
    assert_eq!(
        message,
        "a prefill of 65 tokens needs a cache of 65 tokens, and the largest of this package has 64"
    );
    assert!(help.contains("--capacity"));
    assert!(refused(&["--decode", "64"]).0.contains("needs a cache of 65"));
    assert!(refused(&["--end-to-end", "60:6"]).0.contains("needs a cache of 65"));
    assert!(refused(&["--end-to-end", "0:6"]).0.contains("nothing to measure"));
    assert!(refused(&["--decode", "0"]).0.contains("nothing to measure"));
    assert!(
        refused(&["-o", "/nowhere/at/all.json"])
            .0
            .contains("the folder does not exist")
    );
    assert!(refused(&["--csv", text(folder.path())]).0.contains("is a folder"));
    assert!(refused(&["--dry-multiplier", "-1"]).0.contains("dry"));

    let prompts = |value: Value| {
        let file = folder.path().join("p.json");
        std::fs::write(&file, value.to_string()).unwrap();
        refused(&["--prompts", text(&file), "--prefill", "5"])
    };
    assert!(
        prompts(json!({"seed": 1, "timed": [4, 5], "prompts": []}))
            .0
            .contains("has 2 tokens, but 5 are required")
    );
    assert!(
        prompts(json!({"seed": 1, "timed": [97], "prompts": []}))
            .0
            .contains("the token 97, and the model's vocabulary is 97")
    );
    assert!(
        prompts(json!({"seed": 1, "timed": [9], "prompts": [[]]}))
            .0
            .contains("a prompt without tokens")
    );
    assert!(
        prompts(json!({"seed": 1, "timed": [9], "prompts": [[1]], "forced": []}))
            .0
            .contains("not as many")
    );
    let (message, help) = prompts(json!({"seed": 1, "timed": [9], "prompts": [["a"]]}));
    assert!(
        message.contains("p.json: prompts[0][0]: invalid type: string \"a\""),
        "{message}"
    );
    assert!(help.contains("\"timed\""), "{help}");
    let long = json!({"seed": 1, "timed": [9, 9, 9, 9, 9], "prompts": [vec![5; 40]]});
    assert!(
        prompts(long)
            .0
            .contains("the output of prompt 0, 40 tokens, needs a cache of 71")
    );
}

#[test]
fn wrong_usage_is_refused() {
    for (flags, expected) in [
        (["--end-to-end", "128"], "not PROMPT:NEW"),
        (["--repetitions", "0"], "1 or more"),
        (["--setting", "nothing"], "KEY=VALUE"),
        (["--peak-flops", "-1"], "above 0"),
    ] {
        let run = lapidary(["bench", text(llama()), flags[0], flags[1]]);
        assert_eq!(run.status, 2);
        assert!(run.stderr.contains(expected), "{}", run.stderr);
    }
}

fn measured() -> Value {
    quick(
        llama(),
        &[
            "--prefill",
            "5",
            "--decode",
            "4",
            "--end-to-end",
            "3:6",
            "--peak-flops",
            "1e9",
        ],
    )
}

fn parse(value: &Value) -> Result<bench::Document, ResultError> {
    bench::parse(Path::new("r.json"), &value.to_string())
}

/// Every number of every summary, every rate and share, each verdict and sample, changed one at a time.
#[test]
fn an_edited_result_is_refused_and_the_field_named() {
    let value = measured();
    parse(&value).unwrap();
    let summaries = [
        "/prefill/0/ms",
        "/decode/0/ms",
        "/end_to_end/0/ttft_ms",
        "/end_to_end/0/tpot_ms",
        "/end_to_end/0/itl_ms",
        "/end_to_end/0/latency_ms",
    ];
    let numbers = ["mean", "median", "stddev", "p50", "p90", "p99", "min", "max", "count"];
    let mut fields: Vec<String> = summaries
        .iter()
        .flat_map(|s| numbers.map(|n| format!("{s}/{n}")))
        .collect();
    fields.extend(
        [
            "/prefill/0/prefill_tokens_per_s",
            "/prefill/0/mfu",
            "/decode/0/output_tokens_per_s",
            "/decode/0/mbu",
            "/end_to_end/0/output_tokens_per_s",
        ]
        .map(str::to_string),
    );
    for field in fields {
        let mut edited = value.clone();
        let place = edited.pointer_mut(&field).unwrap();
        *place = match place.as_u64().filter(|_| field.ends_with("count")) {
            Some(n) => json!(n + 1),
            None => json!(place.as_f64().unwrap() * 0.9999),
        };
        let error = parse(&edited).unwrap_err();
        let ResultError::Edited { field: named, .. } = &error else {
            panic!("{field}: {error}")
        };
        let path = named.replace('[', "/").replace(['.'], "/").replace(']', "");
        assert_eq!(format!("/{path}"), field);
        assert!(error.to_string().starts_with("r.json: "), "{error}");
    }
    for field in ["/prefill/0/stable", "/decode/0/stable", "/end_to_end/0/stable"] {
        let mut edited = value.clone();
        let place = edited.pointer_mut(field).unwrap();
        *place = json!(!place.as_bool().unwrap());
        assert!(matches!(parse(&edited), Err(ResultError::Edited { .. })), "{field}");
    }
    for samples in [
        "/prefill/0/samples_ms/2",
        "/decode/0/samples_ms/7",
        "/end_to_end/0/runs/1/itl_samples_ms/0",
        "/end_to_end/0/runs/0/ttft_ms",
        "/end_to_end/0/runs/0/latency_ms",
    ] {
        let mut edited = value.clone();
        let place = edited.pointer_mut(samples).unwrap();
        *place = json!(place.as_f64().unwrap() * 0.5);
        assert!(matches!(parse(&edited), Err(ResultError::Edited { .. })), "{samples}");
    }
}

#[test]
fn a_missing_field_is_named() {
    let value = measured();
    let without = |pointer: &str, key: &str| {
        let mut cut = value.clone();
        let object = cut.pointer_mut(pointer).unwrap().as_object_mut().unwrap();
        object.remove(key).unwrap();
        parse(&cut).unwrap_err().to_string()
    };
    for key in [
        "system",
        "date",
        "command",
        "commit",
        "machine",
        "model",
        "workload",
        "prefill",
        "decode",
        "end_to_end",
        "memory",
        "versions",
    ] {
        let message = without("", key);
        assert!(message.starts_with("r.json: ") && message.contains(key), "{message}");
    }
    assert_eq!(
        without("/decode/0/ms", "p99"),
        "r.json: decode[0].ms: missing field `p99`"
    );
    assert_eq!(
        without("/model", "weights_hash"),
        "r.json: model: missing field `weights_hash`"
    );
    assert!(without("", "schema").contains("has no `schema`"));
    assert!(without("/machine", "peak_flops").contains("prefill[0].mfu: is given, but machine.peak_flops"));
    // Optional fields can be missing.
    for key in ["load", "build", "sizes", "outputs"] {
        let mut cut = value.clone();
        cut.as_object_mut().unwrap().remove(key);
        parse(&cut).unwrap();
    }
}

#[test]
fn other_schemas_and_broken_files_are_refused() {
    let mut newer = measured();
    newer["schema"] = json!("lapidary-bench/2");
    let message = parse(&newer).unwrap_err().to_string();
    assert_eq!(
        message,
        "r.json: the schema is \"lapidary-bench/2\", and this version reads \"lapidary-bench/1\""
    );
    newer["schema"] = json!(7);
    assert!(matches!(parse(&newer), Err(ResultError::Schema { found, .. }) if found == "7"));
    assert!(matches!(
        bench::parse(Path::new("r"), "{"),
        Err(ResultError::Json { .. })
    ));
    assert!(matches!(
        bench::parse(Path::new("r"), "[]"),
        Err(ResultError::NoSchema { .. })
    ));
    assert!(matches!(
        bench::read(Path::new("/nowhere.json")),
        Err(ResultError::Io { .. })
    ));
}

#[test]
fn runs_and_outputs_must_fit_together() {
    let value = measured();
    let with = |pointer: &str, new: Value| {
        let mut edited = value.clone();
        *edited.pointer_mut(pointer).unwrap() = new;
        parse(&edited).unwrap_err().to_string()
    };
    assert!(with("/end_to_end/0/runs/0/tokens", json!(9)).contains("has 5 times between 9 tokens"));
    assert!(with("/end_to_end/0/runs", json!([])).contains("end_to_end[0].runs: is empty"));
    assert!(with("/prefill/0/samples_ms", json!([])).contains("prefill[0].ms: has no samples"));
    assert!(with("/outputs/greedy_tokens", json!([])).contains("has 0 answers to"));
    assert!(with("/outputs/logits/0/prompt", json!(99)).contains("outputs.logits[0]"));
}

/// Fields that are checked against other fields, not samples.
#[test]
fn what_follows_from_other_fields_must_follow() {
    let mut value = measured();
    value["decode"][0]["gpu_ms"] = json!(value["decode"][0]["ms"]["median"].as_f64().unwrap() * 0.98);
    // From an older file, where scores were products: groups are accepted if they cover all layers.
    value["profile"] = json!({"decode": {
        "live": 5,
        "total_ms": 2.0,
        "groups": {"attention": 0.25, "matrix products": 1.25, "rest": 0.5},
        "layers": [["_gemm_mha_v2", 0.25], ["__myl_MulSum", 1.25], ["__myl_MulMean", 0.5]],
    }});
    parse(&value).unwrap();
    let with = |pointer: &str, change: &dyn Fn(f64) -> f64| {
        let mut edited = value.clone();
        let place = edited.pointer_mut(pointer).unwrap();
        *place = json!(change(place.as_f64().unwrap()));
        parse(&edited).unwrap_err()
    };
    let edited = |pointer: &str, change: &dyn Fn(f64) -> f64, field: &str| {
        let error = with(pointer, change);
        assert!(
            matches!(&error, ResultError::Edited { field: named, .. } if named == field),
            "{error}"
        );
    };
    edited("/outputs/logits/1/margin", &|m| m + 0.01, "outputs.logits[1].margin");
    edited(
        "/outputs/logits/0/top/0/1",
        &|logit| logit + 0.5,
        "outputs.logits[0].margin",
    );
    edited("/profile/decode/total_ms", &|ms| ms * 0.9, "profile.decode.total_ms");
    edited("/profile/decode/layers/1/1", &|ms| ms * 0.9, "profile.decode.total_ms");
    edited("/profile/decode/groups/rest", &|ms| ms * 0.9, "profile.decode.groups");
    let message = with("/outputs/logits/0/top/4/1", &|logit| logit + 100.0).to_string();
    assert!(message.contains("outputs.logits[0].top: rises from"), "{message}");
    let message = with("/profile/decode/layers/0/1", &|_| -1.0).to_string();
    assert!(message.contains("_gemm_mha_v2 took a time that is none"), "{message}");

    for (change, why) in [
        (1.2, "a part of it cannot take longer"),
        (0.0, "a step takes some time"),
        (-1.0, "a step takes some time"),
    ] {
        let error = with("/decode/0/gpu_ms", &|ms| ms * change);
        assert!(matches!(error, ResultError::DeviceTime { .. }), "{error}");
        let message = error.to_string();
        assert!(
            message.contains("decode[0].gpu_ms is") && message.ends_with(why),
            "{message}"
        );
    }
    let mut renamed = value.clone();
    let groups = renamed
        .pointer_mut("/profile/decode/groups")
        .unwrap()
        .as_object_mut()
        .unwrap();
    let rest = groups.remove("rest").unwrap();
    groups.insert("other".to_string(), rest);
    let error = parse(&renamed).unwrap_err();
    assert!(
        matches!(&error, ResultError::LayerGroup { group, .. } if group == "other"),
        "{error}"
    );
}

#[test]
fn an_error_stands_beside_no_measurement() {
    let whole = measured();
    for kept in ["prefill", "decode", "end_to_end", "outputs"] {
        let mut value = whole.clone();
        for key in ["prefill", "decode", "end_to_end", "outputs"] {
            if key != kept {
                value.as_object_mut().unwrap().remove(key);
            }
        }
        value["error"] = json!("out of memory");
        let error = parse(&value).unwrap_err();
        assert!(
            matches!(&error, ResultError::MeasuredBesideError { field, .. } if *field == kept),
            "{error}"
        );
    }
}

/// A system that could not run has a reason and no measurements.
#[test]
fn a_system_that_could_not_run_is_read() {
    let mut value = measured();
    for key in ["prefill", "decode", "end_to_end", "memory", "outputs", "load"] {
        value.as_object_mut().unwrap().remove(key);
    }
    assert!(parse(&value).is_err());
    value["error"] = json!("no kernel for this GPU");
    assert_eq!(parse(&value).unwrap().error.as_deref(), Some("no kernel for this GPU"));
}

proptest! {
    /// For any samples, the written statistics equal those that a reader computes.
    #[test]
    fn summaries_survive_a_round_trip(samples in prop::collection::vec(0.001f64..1e6, 1..40)) {
        let summary = bench::Summary::of(&samples).unwrap();
        let text = serde_json::to_string(&(&samples, summary)).unwrap();
        let (again, read): (Vec<f64>, bench::Summary) = serde_json::from_str(&text).unwrap();
        let computed = bench::Summary::of(&again).unwrap();
        for ((_, a), (_, b)) in computed.numbers().into_iter().zip(read.numbers()) {
            prop_assert!((a - b).abs() <= 1e-9 * b.abs() + 1e-12, "{} {}", a, b);
        }
        prop_assert!(summary.min <= summary.p50 && summary.p50 <= summary.p90);
        prop_assert!(summary.p90 <= summary.p99 && summary.p99 <= summary.max);
        prop_assert!(summary.min <= summary.mean * (1.0 + 1e-12) && summary.mean <= summary.max * (1.0 + 1e-12));
        prop_assert!(summary.stddev >= 0.0 && summary.stddev <= (summary.max - summary.min) * 1.0001 + 1e-9);
    }

    /// Scaling all samples scales the summary and changes no verdict.
    #[test]
    fn units_do_not_matter(samples in prop::collection::vec(0.5f64..2.0, 4..40)) {
        let doubled: Vec<f64> = samples.iter().map(|s| s * 2.0).collect();
        prop_assert_eq!(bench::summary::stable(&samples), bench::summary::stable(&doubled));
        let (a, b) = (bench::Summary::of(&samples).unwrap(), bench::Summary::of(&doubled).unwrap());
        prop_assert!((a.p90 * 2.0 - b.p90).abs() < 1e-9 && (a.stddev * 2.0 - b.stddev).abs() < 1e-9);
    }
}
