//! `lapidary sample`, and effects and refusals of the sampler flags.

use serde_json::Value;

use crate::support::{fixture, lapidary, package, text};

fn sample(flags: &[&str]) -> Value {
    lapidary([&["sample", "--json"], flags].concat()).ok().json()
}

fn assert_probs(flags: &[&str], expected: &[f64]) {
    let probs: Vec<f64> = serde_json::from_value(sample(flags)["probs"].clone()).unwrap();
    let near = probs.iter().zip(expected).all(|(p, e)| (p - e).abs() < 1e-5);
    assert!(
        near && probs.len() == expected.len(),
        "{flags:?}: {probs:?} is not {expected:?}"
    );
}

/// llama.cpp's `tests/test-sampling.cpp`.
#[test]
fn dry_gives_the_published_vectors() {
    let check = |probs: &str, history: &str, parameters: [&str; 4], breakers: &[&str], expected: &[f64]| {
        let [multiplier, base, allowed, last_n] = parameters;
        let mut flags = vec!["--probs", probs, "--history", history];
        flags.extend(["--dry-multiplier", multiplier, "--dry-base", base]);
        flags.extend(["--dry-allowed-length", allowed, "--dry-penalty-last-n", last_n]);
        flags.extend(breakers.iter().flat_map(|b| ["--dry-breaker-ids", b]));
        assert_probs(&flags, expected);
    };
    let (four, five) = (".25,.25,.25,.25", "0.2,0.2,0.2,0.2,0.2");
    check(four, "0,1", ["1", "1.1", "2", "4"], &[], &[0.25; 4]);
    let expected = [0.296923, 0.296923, 0.109232, 0.296923];
    check(four, "0,1,2,0,1", ["1", "1.1", "2", "5"], &[], &expected);
    check(five, "0,1,3,4,0,1", ["1", "1.1", "2", "6"], &["3"], &[0.2; 5]);
    let expected = [0.241818, 0.241818, 0.032727, 0.241818, 0.241818];
    check(five, "0,1,2,0,1", ["2", "1.1", "2", "5"], &[], &expected);
    check(five, "0,1,2,3,4,0,1", ["1", "1.1", "4", "7"], &[], &[0.2; 5]);
    // A breaker of two tokens leaves too little; -1 is the whole history.
    check(four, "3,0,1,2,3,0,1", ["1", "1.1", "2", "-1"], &["3,0"], &[0.25; 4]);
    let penalty = 1.1;
    let rest = 1.0 / (3.0 + f64::exp(-penalty));
    let expected = [rest, rest, rest * f64::exp(-penalty), rest];
    check(four, "3,0,1,2,3,0,1", ["1", "1.1", "2", "-1"], &[], &expected);
}

#[test]
fn every_sampler_has_its_flag() {
    let four = ["--probs", ".1,.2,.3,.4"];
    let check = |flags: &[&str], expected: &[f64]| assert_probs(&[&four, flags].concat(), expected);
    check(&[], &[0.1, 0.2, 0.3, 0.4]);
    check(&["--temperature", "0"], &[0.0, 0.0, 0.0, 1.0]);
    check(&["--temperature", "0.5"], &[0.033333, 0.133333, 0.3, 0.533333]);
    check(&["--top-k", "3"], &[0.0, 0.222222, 0.333333, 0.444444]);
    check(&["--top-k", "-1"], &[0.1, 0.2, 0.3, 0.4]);
    check(&["--top-p", "0.7"], &[0.0, 0.0, 0.428571, 0.571429]);
    check(&["--min-p", "0.51"], &[0.0, 0.0, 0.428571, 0.571429]);
    check(&["--top-n-sigma", "1"], &[0.0, 0.0, 0.428571, 0.571429]);
    check(&["--typical-p", "0.2"], &[0.0, 0.0, 1.0, 0.0]);
    check(
        &["--xtc-probability", "1", "--xtc-threshold", "0.15"],
        &[1.0 / 3.0, 2.0 / 3.0, 0.0, 0.0],
    );
    check(
        &["--mirostat", "2", "--mirostat-tau", "1"],
        &[0.0, 0.0, 0.428571, 0.571429],
    );
    check(
        &["--logit-bias", "3=-inf", "--logit-bias", "2=-inf"],
        &[1.0 / 3.0, 2.0 / 3.0, 0.0, 0.0],
    );
    let half_seen = ["--history", "3,3", "--frequency-penalty", "0.34657359"];
    check(&half_seen, &[0.125, 0.25, 0.375, 0.25]);
    let half_seen = ["--history", "3,3", "--presence-penalty", "0.69314718"];
    check(&half_seen, &[0.125, 0.25, 0.375, 0.25]);
    let out_of_sight = ["--history", "3,0", "--presence-penalty", "9", "--penalty-last-n", "0"];
    check(&out_of_sight, &[0.1, 0.2, 0.3, 0.4]);
    check(
        &["--history", "3", "--repetition-penalty", "2"],
        &[0.131579, 0.263158, 0.394737, 0.210526],
    );
    // The order matters, and omitted samplers are off.
    let both = ["--temperature", "4", "--min-p", "0.6"];
    let in_order = |order: &str| {
        let found = sample(&[&four[..], &both, &["--samplers", order]].concat());
        found["candidates"].as_array().unwrap().len()
    };
    assert_eq!((in_order("min-p,temperature"), in_order("temperature,min_p")), (2, 4));
    assert_eq!(in_order("temperature"), 4);
}

#[test]
fn a_draw_is_shown_and_the_text_form_reads_well() {
    let flags = ["--logits", "-1,2.5,0", "--top-k", "2", "--seed", "5"];
    let document = sample(&flags);
    assert_eq!(document["seed"], 5);
    assert!([1, 2].contains(&document["token"].as_u64().unwrap()));
    assert_eq!(document["candidates"][0][0], 1);
    let printed = lapidary([&["sample"], &flags[..]].concat()).ok().stdout;
    let token = &document["token"];
    assert_eq!(
        printed,
        format!("token  probability\n    1     0.924142\n    2     0.075858\ndrawn with seed 5: {token}\n")
    );
}

#[test]
fn breaker_strings_go_over_the_tokenizers_vocabulary() {
    let tokenizer = fixture("smollm2");
    let history = "198,50,51,52,198,50,51";
    let flags = [
        "--logits",
        &["0"; 60].join(","),
        "--history",
        history,
        "--dry-multiplier",
        "1",
    ];
    let lowest = |more: &[&str]| {
        let document = sample(&[&flags[..], &["--tokenizer", text(&tokenizer)], more].concat());
        document["candidates"].as_array().unwrap().last().unwrap()[1]
            .as_f64()
            .unwrap()
    };
    // Token 198 is a newline, so by default the match ends after it, at two tokens; without breakers it has three.
    let of = |length: i32| f64::exp(-1.75f64.powi(length - 2));
    let share = |length| of(length) / (59.0 + of(length));
    assert!((lowest(&[]) - share(2)).abs() < 1e-6);
    assert!((lowest(&["--dry-sequence-breaker", "none"]) - share(3)).abs() < 1e-6);
    assert!((lowest(&["--dry-sequence-breaker", "\n"]) - share(2)).abs() < 1e-6);
    // As llama.cpp reads it, without --no-escape: token 76 is a backslash, which is not in the history.
    assert!((lowest(&["--dry-sequence-breaker", "\\n"]) - share(2)).abs() < 1e-6);
    assert!((lowest(&["--dry-sequence-breaker", "\\x0A"]) - share(2)).abs() < 1e-6);
    assert!((lowest(&["--no-escape", "--dry-sequence-breaker", "\\n"]) - share(3)).abs() < 1e-6);
    let cleared = ["--dry-sequence-breaker", "\n", "--dry-sequence-breaker", "none"];
    assert!((lowest(&cleared) - share(3)).abs() < 1e-6);
    assert!((lowest(&["--dry-breaker-ids", "51"]) - 1.0 / 60.0).abs() < 1e-6);
}

#[test]
fn what_makes_no_sense_is_refused_by_the_name_of_its_flag() {
    let message = |flags: &[&str]| lapidary([&["sample", "--probs", ".5,.5"], flags].concat()).refused().0;
    for (flag, value) in [
        ("temperature", "-1"),
        ("temperature", "nan"),
        ("top-k", "-5"),
        ("top-p", "1.5"),
        ("min-p", "-0.1"),
        ("typical-p", "2"),
        ("top-n-sigma", "-1"),
        ("xtc-probability", "1.1"),
        ("xtc-threshold", "-1"),
        ("repetition-penalty", "0"),
        ("repetition-penalty", "-1.1"),
        ("frequency-penalty", "-2"),
        ("presence-penalty", "-2"),
        ("penalty-last-n", "-2"),
        ("dry-multiplier", "-0.8"),
        ("dry-base", "inf"),
        ("dry-penalty-last-n", "-7"),
        ("mirostat-tau", "0"),
        ("mirostat-eta", "-0.1"),
        ("samplers", "dry,top-q"),
        ("logit-bias", "a=b"),
        ("logit-bias", "1=nan"),
        ("logit-bias", "7=1"),
        ("mirostat", "1"),
        ("dry-breaker-ids", ""),
        ("dry-breaker-ids", "1,x"),
    ] {
        let message = message(&[&format!("--{flag}"), value]);
        assert!(message.contains(&format!("--{flag}")), "{flag} {value}: {message}");
    }
    assert!(message(&["--samplers", "dry,dry"]).contains("dry, named twice"));
    assert!(message(&["--dry-sequence-breaker", "x"]).contains("needs a tokenizer"));
    // The better of two possible errors for an invalid number.
    let (message, _) = lapidary(["sample", "--probs", "0.5,-0.5"]).refused();
    assert_eq!(message, "--probs: -0.5 is not a probability");
    let (message, _) = lapidary(["sample", "--probs", "0,0"]).refused();
    assert_eq!(message, "--probs: no token has a probability above zero");
    let (message, _) = lapidary(["sample", "--logits", "0,nan"]).refused();
    assert_eq!(message, "--logits: the logit of token 1 is NaN");
    let (message, _) = lapidary(["sample", "--logits", "inf,0"]).refused();
    assert_eq!(message, "--logits: the logit of token 0 is inf");
}

#[test]
fn breakers_without_tokens_are_refused() {
    let tokenizer = fixture("smollm2");
    let refused = |breaker: &str| {
        let flags = [
            "sample",
            "--probs",
            "1",
            "--tokenizer",
            text(&tokenizer),
            "--dry-sequence-breaker",
        ];
        lapidary([&flags[..], &[breaker]].concat()).refused()
    };
    let (message, help) = refused("");
    assert_eq!(
        message,
        "--dry-sequence-breaker \"\": no token of this tokenizer contains or begins it"
    );
    assert!(help.contains("none"), "{help}");
    let (message, help) = refused("\\xff");
    assert!(
        message.starts_with("--dry-sequence-breaker: the bytes that \\x gives"),
        "{message}"
    );
    assert!(help.contains("--no-escape"), "{help}");
}

/// Invalid values in a model's `generation_config.json` are named at conversion, and refused when they would be used.
#[test]
fn a_models_wishes_that_make_no_sense_are_named_and_overridden() {
    let folder = tempfile::tempdir().unwrap();
    let files = folder.path().join("files");
    std::fs::create_dir(&files).unwrap();
    for file in ["tokenizer.json", "tokenizer_config.json"] {
        std::fs::copy(fixture("smollm2").join(file), files.join(file)).unwrap();
    }
    let (model, pkg) = (fixture("exports/llama-optimum/model.onnx"), folder.path().join("pkg"));
    let convert = |config: &str| {
        std::fs::write(files.join("generation_config.json"), config).unwrap();
        let flags = ["--capacity", "64", "--force", "--json", "--tokenizer", text(&files)];
        lapidary([&["convert", text(&model), "-o", text(&pkg)], &flags[..]].concat())
    };
    let run = |flags: &[&str]| {
        let common = ["generate", text(&pkg), "--prompt-ids", "1,2", "--max-new-tokens", "2"];
        lapidary([&common[..], flags].concat())
    };
    for (config, flag, field) in [
        (
            r#"{"top_p": 1.5}"#,
            ["--top-p", "0.5"],
            "top_p is 1.5, not a number from 0 to 1",
        ),
        (
            r#"{"top_k": "50"}"#,
            ["--top-k", "-1"],
            "top_k is \"50\", not a whole number of 0 or more, or -1 for off",
        ),
        (
            r#"{"temperature": "0.7"}"#,
            ["--temperature", "1"],
            "temperature is \"0.7\", not a number",
        ),
    ] {
        let converted = convert(config);
        assert_eq!(converted.status, 0);
        let warning = format!("warning: generation_config.json: {field}");
        assert!(converted.stderr.starts_with(&warning), "{}", converted.stderr);
        converted.json();
        let (message, help) = run(&[]).refused();
        assert!(
            message.ends_with(&format!("generation_config.json: {field}")),
            "{message}"
        );
        assert!(help.contains(flag[0]), "{help}");
        run(&flag).ok();
        if flag[0] != "--temperature" {
            run(&["--temperature", "0"]).ok();
        }
    }
    for good in [r#"{"top_k": -1}"#, r#"{"top_k": 50.0, "temperature": null}"#, "{}"] {
        convert(good).ok();
        run(&[]).ok();
    }
    // Unknown end tokens, and unsupported generation methods.
    std::fs::write(files.join("tokenizer_config.json"), r#"{"eos_token": "<|nope|>"}"#).unwrap();
    let converted = convert(r#"{"eos_token_id": [5000, "x"], "num_beams": 4}"#);
    assert_eq!(converted.json()["eos_token_ids"], serde_json::json!([]));
    let lines: Vec<&str> = converted.stderr.lines().collect();
    assert_eq!(lines.len(), 4, "{lines:?}");
    for (line, part) in lines.iter().zip([
        "\"<|nope|>\"",
        "num_beams is 4",
        "eos_token_id is \"x\"",
        "the end token 5000",
    ]) {
        assert!(line.starts_with("warning: ") && line.contains(part), "{line}");
    }
}

/// llama.cpp takes -1 for a random seed.
#[test]
fn a_seed_of_minus_one_is_another_one_each_time() {
    let flags = ["sample", "--logits", "1,2", "--json", "--seed"];
    let seed = |seed: &str| {
        lapidary([&flags[..], &[seed]].concat()).ok().json()["seed"]
            .as_u64()
            .unwrap()
    };
    assert_eq!(seed("7"), 7);
    assert_ne!(seed("-1"), seed("-1"));
    let (message, _) = lapidary([&flags[..], &["-2"]].concat()).refused();
    assert!(
        message.contains("'--seed <N>'") && message.contains("-1 for a random seed"),
        "{message}"
    );
}

#[test]
fn generate_takes_the_models_wishes_and_flags_over_them() {
    let folder = tempfile::tempdir().unwrap();
    let model_folder = folder.path().join("model");
    std::fs::create_dir(&model_folder).unwrap();
    for file in ["tokenizer.json", "tokenizer_config.json"] {
        std::fs::copy(fixture("smollm2").join(file), model_folder.join(file)).unwrap();
    }
    let model = fixture("exports/llama-optimum/model.onnx");
    let generation_config = |json: &str| {
        std::fs::write(model_folder.join("generation_config.json"), json).unwrap();
        let flags = ["--capacity", "64", "--force", "--tokenizer", text(&model_folder)];
        package(folder.path(), &model, &flags)
    };
    let run = |pkg: &std::path::Path, flags: &[&str]| {
        let common = [
            "generate",
            text(pkg),
            "--prompt-ids",
            "1,2,3",
            "--max-new-tokens",
            "40",
            "--ignore-eos",
            "--json",
        ];
        lapidary([&common[..], flags].concat())
    };
    let tokens = |pkg: &std::path::Path, flags: &[&str]| run(pkg, flags).ok().json()["tokens"].clone();

    let pkg = generation_config(r#"{"do_sample": false}"#);
    let greedy = tokens(&pkg, &["--temperature", "0"]);
    assert_eq!(tokens(&pkg, &["--seed", "1"]), greedy);
    let hot = [
        "--temperature",
        "3",
        "--top-k",
        "0",
        "--top-p",
        "1",
        "--min-p",
        "0",
        "--seed",
        "1",
    ];
    assert_ne!(tokens(&pkg, &hot), greedy);
    // A top-k of 1 is greedy at any temperature.
    let pkg = generation_config(r#"{"top_k": 1, "temperature": 3.0}"#);
    assert_eq!(tokens(&pkg, &["--seed", "1"]), greedy);
    assert_ne!(
        tokens(&pkg, &["--top-k", "0", "--top-p", "1", "--min-p", "0", "--seed", "1"]),
        greedy
    );
    // DRY works with greedy decoding too: no three tokens repeat within forty.
    let dry = tokens(&pkg, &["--dry-multiplier", "50"]);
    let dry: Vec<u64> = serde_json::from_value(dry).unwrap();
    let plain = tokens(&pkg, &[]);
    let plain: Vec<u64> = serde_json::from_value(plain).unwrap();
    let repeats = |t: &[u64]| {
        (3..t.len() - 2)
            .filter(|i| t[..*i].windows(3).any(|w| w == &t[*i..*i + 3]))
            .count()
    };
    assert!(repeats(&dry) < repeats(&plain), "{dry:?} {plain:?}");

    let pkg = generation_config("{}");
    let (message, _) = run(&pkg, &["--logit-bias", "97=1"]).refused();
    assert_eq!(message, "--logit-bias 97=1: the model's token ids are 0 to 96");
}
