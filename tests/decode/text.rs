use std::path::{Path, PathBuf};

use lapidary::text::{Detokenizer, Message, Tokenizer, chat};

fn smollm2() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/smollm2")
}

fn reference() -> serde_json::Value {
    serde_json::from_str(&std::fs::read_to_string(smollm2().join("reference.json")).unwrap()).unwrap()
}

#[test]
fn the_chat_template_gives_the_reference_prompt() {
    let tokenizer = Tokenizer::open(&smollm2()).unwrap();
    let reference = reference();
    let prompt = chat::render(&tokenizer, &[Message::user(reference["question"].as_str().unwrap())]).unwrap();
    assert_eq!(prompt, reference["prompt_text"].as_str().unwrap());
    let ids = tokenizer.encode(&prompt, false).unwrap();
    assert_eq!(serde_json::json!(ids), reference["prompt"]);
    assert_eq!(ids.len(), 37);
}

#[test]
fn special_tokens_and_ends_are_the_models_own() {
    let tokenizer = Tokenizer::open(&smollm2().join("tokenizer.json")).unwrap();
    assert_eq!(tokenizer.eos_ids.iter().copied().collect::<Vec<_>>(), [2]);
    assert_eq!(tokenizer.bos_token.as_deref(), Some("<|im_start|>"));
    assert_eq!(tokenizer.vocabulary(), 49152);
    assert_eq!(tokenizer.decode(&[504, 3575, 2]).unwrap(), "The capital");
}

#[test]
fn streamed_text_is_the_whole_text_and_never_half_a_character() {
    let tokenizer = Tokenizer::open(&smollm2()).unwrap();
    let text = "Zażółć gęślą jaźń. 你好，世界! 👩‍👩‍👧 🦀🦀\n\n  fn main() {}\t\"é\" — done";
    let ids = tokenizer.encode(text, false).unwrap();
    let mut detokenizer = Detokenizer::new(&tokenizer);
    let mut pieces = Vec::new();
    for id in &ids {
        pieces.push(detokenizer.push(*id).unwrap());
    }
    assert_eq!(detokenizer.finish().unwrap(), "");
    assert!(pieces.iter().all(|p| !p.contains('\u{FFFD}')), "{pieces:?}");
    assert!(
        pieces.iter().any(|p| p.is_empty()),
        "some character should take several tokens"
    );
    assert_eq!(pieces.concat(), text);
    // Text is emitted at once, not only at the end.
    assert!(pieces.iter().filter(|p| !p.is_empty()).count() > ids.len() / 3);
}

#[test]
fn bytes_that_never_become_a_character_are_given_out_in_the_end() {
    let tokenizer = Tokenizer::open(&smollm2()).unwrap();
    let crab = tokenizer.encode("🦀", false).unwrap();
    assert!(crab.len() > 1);
    let mut detokenizer = Detokenizer::new(&tokenizer);
    assert_eq!(detokenizer.push(crab[0]).unwrap(), "");
    assert!(detokenizer.finish().unwrap().contains('\u{FFFD}'));

    // Output of a model that repeats half a character is not held back forever.
    let mut detokenizer = Detokenizer::new(&tokenizer);
    let shown: String = (0..64).map(|_| detokenizer.push(crab[0]).unwrap()).collect();
    assert!(shown.chars().count() > 32, "{shown:?}");
}

#[test]
fn a_folder_without_a_tokenizer_and_a_broken_one_are_named() {
    let folder = tempfile::tempdir().unwrap();
    let open = || Tokenizer::open(folder.path()).err().unwrap().to_string();
    assert!(open().contains("tokenizer.json"), "{}", open());
    std::fs::write(folder.path().join("tokenizer.json"), "{}").unwrap();
    assert!(open().contains("not a tokenizer"), "{}", open());
}

#[test]
fn pieces_are_the_bytes_of_the_tokens() {
    let tokenizer = Tokenizer::open(&smollm2()).unwrap();
    let pieces = tokenizer.token_bytes();
    assert_eq!(pieces.len(), 49152);
    for text in ["Zażółć 🦀 你好\n\t\"x\": *y*", "<|im_start|>user\nhi"] {
        let ids = tokenizer.encode(text, false).unwrap();
        let bytes: Vec<u8> = ids.iter().flat_map(|id| pieces[*id as usize].clone()).collect();
        assert_eq!(String::from_utf8(bytes).unwrap(), text);
    }
}

#[test]
fn breakers_are_found_however_the_text_is_cut() {
    let tokenizer = Tokenizer::open(&smollm2()).unwrap();
    let (breakers, without) = tokenizer.breakers(&["\nUser:", "🦀", "", "\n"]).unwrap();
    assert_eq!(without, [""]);
    let after = |text: &str| {
        let ids = tokenizer.encode(text, false).unwrap();
        (breakers.free_suffix(&ids), ids.len())
    };
    // Tokens after a breaker are not penalized, however the breaker is tokenized.
    for before in ["hello", "hello.", "hello \n\n", "x"] {
        let (free, _) = after(&format!("{before}\nUser: yes"));
        assert_eq!(free, tokenizer.encode(" yes", false).unwrap().len(), "{before:?}");
        let (free, _) = after(&format!("{before}🦀 yes"));
        assert_eq!(free, tokenizer.encode(" yes", false).unwrap().len(), "{before:?}");
    }
    let (free, all) = after("User likes crabs");
    assert_eq!(free, all);
    let newline = tokenizer.encode("\n", false).unwrap()[0];
    assert!(breakers.is_single(newline));
}

/// The library of tokenizers panics on these: a surrogate alone in the decoder, and a template that names a special token
/// which is not declared. The second file can be used without special tokens.
#[test]
fn a_file_that_the_library_fails_on_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let open = |decoder: &str, template: &str| {
        let text = format!(
            r#"{{"version": "1.0", "truncation": null, "padding": null, "added_tokens": [], "normalizer": null,
            "pre_tokenizer": null, "post_processor": {template}, "decoder": {decoder},
            "model": {{"type": "WordLevel", "vocab": {{"a": 0}}, "unk_token": "a"}}}}"#
        );
        std::fs::write(folder.path().join("tokenizer.json"), text).unwrap();
        Tokenizer::open(folder.path())
    };
    let refused = open(r#"{"type": "Replace", "x": "\ud800"}"#, "null")
        .map(drop)
        .unwrap_err()
        .to_string();
    assert!(refused.contains("tokenizer.json"), "{refused}");
    let template = r#"{"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}},
        {"Sequence": {"id": "A", "type_id": 0}}], "pair": [{"Sequence": {"id": "A", "type_id": 0}},
        {"Sequence": {"id": "B", "type_id": 1}}], "special_tokens": {}}"#;
    let tokenizer = open("null", template).unwrap();
    assert!(tokenizer.encode("a", true).is_err());
    assert_eq!(tokenizer.encode("a", false).unwrap(), [0]);
}
