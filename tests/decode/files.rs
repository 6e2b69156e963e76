//! Contents of a model's tokenizer files, and which are used.

use lapidary::text::{TextStream, end_tokens_of_configs};
use serde_json::{Value, json};

use crate::tiny::{self, id, ids};

/// Training settings left in the file do not change prompts.
#[test]
fn prompts_are_neither_cut_nor_padded_nor_cut_differently_each_time() {
    let plain = tiny::tokenizer();
    let text = "Hi there Hi there Hi there";
    let words = ["▁", "▁", "▁", "▁", "▁", "▁"];
    let expected = |json: &Value, special| tiny::open(json, &[]).encode(text, special).unwrap();
    let ids = expected(&plain, true);
    assert!(ids.len() > words.len(), "{ids:?}");
    let truncation =
        |direction: &str| json!({"direction": direction, "max_length": 3, "strategy": "LongestFirst", "stride": 0});
    let padding = |strategy: Value, direction: &str, multiple: Value| {
        json!({"strategy": strategy, "direction": direction, "pad_to_multiple_of": multiple, "pad_id": 0, "pad_type_id": 0,
            "pad_token": "<unk>"})
    };
    for (field, value) in [
        ("truncation", truncation("Right")),
        ("truncation", truncation("Left")),
        ("padding", padding(json!({"Fixed": 60}), "Left", Value::Null)),
        ("padding", padding(json!("BatchLongest"), "Right", json!(16))),
    ] {
        let mut left = plain.clone();
        left[field] = value;
        assert_eq!(expected(&left, true), ids, "{field}");
        assert_eq!(expected(&left, false), ids[1..], "{field}");
    }
    // Without merges a text is cut into single letters; here one merge is dropped at random.
    let mut merged = plain.clone();
    merged["model"]["vocab"]["H"] = json!(40);
    merged["model"]["vocab"]["i"] = json!(41);
    merged["model"]["vocab"]["Hi"] = json!(42);
    merged["model"]["merges"] = json!([["H", "i"]]);
    let whole = tiny::open(&merged, &[]).encode("HiHiHiHi", false).unwrap();
    assert_eq!(whole.iter().filter(|id| **id == 42).count(), 4);
    merged["model"]["dropout"] = json!(0.5);
    let tokenizer = tiny::open(&merged, &[]);
    for _ in 0..20 {
        assert_eq!(tokenizer.encode("HiHiHiHi", false).unwrap(), whole);
    }
}

fn shown(tokenizer: &lapidary::text::Tokenizer, stop: &str, ids: &[u32]) -> (String, bool) {
    let mut stream = TextStream::new(tokenizer, [stop.to_string()]);
    let mut text = String::new();
    for id in ids {
        let shown = stream.push(*id).unwrap();
        text.push_str(&shown.text);
        if shown.stopped {
            return (text, true);
        }
    }
    let shown = stream.finish().unwrap();
    (text + &shown.text, shown.stopped)
}

#[test]
fn stop_strings_may_hold_special_tokens() {
    let tokenizer = tiny::open(&tiny::tokenizer(), &[]);
    let turn = ["▁Hi", "<|im_end|>", "\n", "<|im_start|>", "user", "▁there"];
    let crab = ["▁Hi", "<0xE4>", "<0xB8>", "<0x96>", "<|im_end|>", "!"];
    for (words, stop, text, stopped) in [
        (&turn[..], "<|im_end|>", "Hi", true),
        (&turn, "<|im_start|>user", "Hi\n", true),
        (&turn, "\n<|im_start|>", "Hi", true),
        (&turn, "<|im_end|>\n<|im_start|>user there", "Hi", true),
        (&turn, "<|im_end|><|im_start|>", "Hi\nuser there", false),
        (&turn, "<|im_start|>there", "Hi\nuser there", false),
        // A part of a special token is ordinary text, which has no token here.
        (&turn, "<|im_", "Hi\nuser there", false),
        (&turn, "user", "Hi\n", true),
        (&["▁Hi", "<think>", "▁there"], "<think>", "Hi", true),
        (&["▁Hi", "<think>", "▁there"], "<think> there", "Hi", true),
        // Bytes before the special token are already text.
        (&crab, "<|im_end|>", "Hi世", true),
        (&crab, "世<|im_end|>", "Hi", true),
        (&crab, "世<|im_end|>!", "Hi", true),
        (&crab, "<|im_end|>!", "Hi世", true),
        (&crab, "<|im_end|>?", "Hi世!", false),
        (&crab[..5], "<|im_end|>?", "Hi世", false),
        (
            &["<0xE4>", "<0xB8>", "<|im_end|>", "<0x96>", "!"],
            "<|im_end|>",
            "\u{FFFD}\u{FFFD}",
            true,
        ),
        (
            &["<0xE4>", "<0xB8>", "<|im_end|>", "<0x96>", "!"],
            "<|im_end|>?",
            "世!",
            false,
        ),
        (
            &["<0xE4>", "<0xB8>", "<|im_end|>", "<0x96>", "!"],
            "<|im_end|>世",
            "",
            true,
        ),
        (&["<|im_end|>", "▁Hi"], "<|im_end|>", "", true),
        (&["▁Hi", "<s>", "<|im_end|>"], "<s><|im_end|>", "Hi", true),
    ] {
        assert_eq!(
            shown(&tokenizer, stop, &ids(words)),
            (text.to_string(), stopped),
            "{stop:?} in {words:?}"
        );
    }
    // The decoder that keeps back a suffix.
    let mut json = tiny::tokenizer();
    json["decoder"] = json!({"type": "BPEDecoder", "suffix": "</w>"});
    let tokenizer = tiny::open(&json, &[]);
    let words = ["a</w>", "<|im_end|>", "a</w>"];
    assert_eq!(shown(&tokenizer, "<|im_end|>", &ids(&words)), ("a".to_string(), true));
    assert_eq!(shown(&tokenizer, "!", &ids(&words)), ("a a".to_string(), false));
}

fn end(config: Value, generation: Value) -> (Vec<u32>, Vec<String>) {
    let files = [
        ("tokenizer_config.json", config),
        ("generation_config.json", generation),
    ];
    let mut tokenizer = tiny::open(&tiny::tokenizer(), &files);
    tokenizer.limit_end_tokens(40);
    (tokenizer.eos_ids.into_iter().collect(), tokenizer.warnings)
}

#[test]
fn end_tokens_are_found_or_named() {
    let named = |token: &str| json!({ "eos_token": token });
    assert_eq!(end(named("</s>"), Value::Null), (vec![2], vec![]));
    assert_eq!(
        end(named("</s>"), json!({"eos_token_id": [28, 2.0]})),
        (vec![2, 28], vec![])
    );
    let (found, warnings) = end(named("<|nope|>"), Value::Null);
    assert_eq!(found, [0; 0]);
    assert_eq!(
        warnings,
        ["tokenizer_config.json: eos_token is \"<|nope|>\", and tokenizer.json has no such token; it is ignored"]
    );
    let (found, warnings) = end(json!({}), json!({"eos_token_id": ["2", 41]}));
    assert_eq!(found, [2]);
    assert_eq!(warnings.len(), 2, "{warnings:?}");
    assert!(
        warnings[0].starts_with("generation_config.json: eos_token_id is the string \"2\""),
        "{warnings:?}"
    );
    assert!(
        warnings[1].contains("the end token 41") && warnings[1].contains("40 tokens"),
        "{warnings:?}"
    );
}

#[test]
fn tokens_that_only_the_configuration_defines_are_added() {
    let decoder = |list: Value| json!({"bos_token": "<s>", "eos_token": "<|eot|>", "added_tokens_decoder": list});
    let eot = json!({"content": "<|eot|>", "special": true});
    let config = decoder(
        json!({"2": {"content": "</s>", "special": true, "normalized": false}, "30": eot,
        "31": {"content": "<tool>", "special": false}}),
    );
    let tokenizer = tiny::open(&tiny::tokenizer(), &[("tokenizer_config.json", config)]);
    assert_eq!(tokenizer.warnings, [""; 0]);
    assert_eq!(tokenizer.eos_ids.iter().copied().collect::<Vec<_>>(), [30]);
    assert_eq!(tokenizer.vocabulary(), 32);
    let text = tokenizer.encode("Hi<|eot|><tool>", false).unwrap();
    assert_eq!(text[text.len() - 2..], [30, 31]);
    assert!(tokenizer.is_special(30) && !tokenizer.is_special(31));
    assert_eq!(tokenizer.decode(&[id("▁Hi"), 30, 31]).unwrap(), "Hi<tool>");
    assert_eq!(
        shown(&tokenizer, "<|eot|>", &[id("▁Hi"), 30, 31]),
        ("Hi".to_string(), true)
    );

    // An id that another token has, or that is not the next.
    let (found, warnings) = end(decoder(json!({ "29": eot })), Value::Null);
    assert_eq!(found, [0; 0]);
    assert_eq!(warnings.len(), 2, "{warnings:?}");
    assert!(
        warnings[0]
            .starts_with("tokenizer_config.json: added_tokens_decoder: \"<|eot|>\" is token 29, which is \"<think>\""),
        "{warnings:?}"
    );
    assert!(warnings[1].contains("eos_token is \"<|eot|>\""), "{warnings:?}");
    let (found, warnings) = end(decoder(json!({ "35": eot })), Value::Null);
    assert_eq!(found, [35]);
    assert!(
        warnings[0].contains("is token 35, and the next free token"),
        "{warnings:?}"
    );
    let (_, warnings) = end(
        json!({"added_tokens_decoder": {"x": eot, "30": 5}, "eos_token": "</s>"}),
        Value::Null,
    );
    assert_eq!(warnings.len(), 2, "{warnings:?}");
    let (_, warnings) = end(
        json!({"added_tokens_decoder": {"7": {"content": "</s>"}}, "eos_token": "</s>"}),
        Value::Null,
    );
    assert!(
        warnings[0].contains("is token 7, and token 2 of tokenizer.json, which is used"),
        "{warnings:?}"
    );

    // Tokens of the vocabulary that are special by their name alone.
    let config = json!({"eos_token": "</s>", "additional_special_tokens": ["STOP"], "pad_token": "nope"});
    let tokenizer = tiny::open(&tiny::tokenizer(), &[("tokenizer_config.json", config)]);
    assert_eq!(tokenizer.warnings, [""; 0]);
    assert!(tokenizer.is_special(id("STOP")));
    assert_eq!(tokenizer.decode(&ids(&["▁Hi", "STOP"])).unwrap(), "Hi");
}

#[test]
fn a_configuration_that_contradicts_the_post_processor_is_named() {
    let warnings =
        |tokenizer: &Value, config: Value| tiny::open(tokenizer, &[("tokenizer_config.json", config)]).warnings;
    let plain = tiny::tokenizer();
    let marks = |bos: Value, eos: Value| json!({"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": bos, "add_eos_token": eos});
    assert_eq!(warnings(&plain, marks(json!(true), json!(false))), [""; 0]);
    assert_eq!(warnings(&plain, marks(Value::Null, Value::Null)), [""; 0]);
    let found = warnings(&plain, marks(json!(false), json!(true)));
    assert_eq!(found.len(), 2, "{found:?}");
    assert!(
        found[0].starts_with(
            "tokenizer_config.json: add_bos_token is false, and the post-processor of tokenizer.json adds it"
        ),
        "{found:?}"
    );
    assert!(
        found[1].contains("add_eos_token is true") && found[1].contains("does not add it"),
        "{found:?}"
    );
    let mut bare = plain.clone();
    bare["post_processor"] = Value::Null;
    assert_eq!(warnings(&bare, marks(json!(false), json!(false))), [""; 0]);
    assert!(warnings(&bare, marks(json!(true), json!(false)))[0].contains("add_bos_token is true"));
}

#[test]
fn without_a_tokenizer_the_configurations_say_what_ends_a_text() {
    let folder = tempfile::tempdir().unwrap();
    let write = |name: &str, text: &str| std::fs::write(folder.path().join(name), text).unwrap();
    let found = || end_tokens_of_configs(folder.path()).unwrap();
    assert_eq!(found(), Default::default());
    write("config.json", r#"{"eos_token_id": 7}"#);
    assert_eq!(found().ids.into_iter().collect::<Vec<_>>(), [7]);
    write("generation_config.json", r#"{"eos_token_id": [1, "x"]}"#);
    assert_eq!(found().ids.into_iter().collect::<Vec<_>>(), [1]);
    assert_eq!(found().warnings.len(), 1);
    write("generation_config.json", "{");
    let error = end_tokens_of_configs(folder.path()).unwrap_err().to_string();
    assert!(error.contains("generation_config.json: not valid JSON"), "{error}");
}
