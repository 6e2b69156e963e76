//! Streamed text equals the text of all tokens at once, for every decoder of the `tokenizers` library.

use lapidary::text::{Detokenizer, Tokenizer};
use proptest::prelude::*;
use serde_json::{Value, json};

use crate::tiny::{self, WORDS, ids};

/// Every kind, alone and in the sequences used by models.
fn decoders() -> Vec<Value> {
    let replace = |pattern: Value, content: &str| json!({"type": "Replace", "pattern": pattern, "content": content});
    let spaces = || replace(json!({"String": "▁"}), " ");
    let strip = |start: usize, stop: usize| json!({"type": "Strip", "content": " ", "start": start, "stop": stop});
    let sequence = |decoders: &[Value]| json!({"type": "Sequence", "decoders": decoders});
    let metaspace =
        |scheme: &str| json!({"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": false});
    let word_piece = |cleanup: bool| json!({"type": "WordPiece", "prefix": "##", "cleanup": cleanup});
    let ctc =
        |cleanup: bool| json!({"type": "CTC", "pad_token": "<pad>", "word_delimiter_token": "|", "cleanup": cleanup});
    let bpe = || json!({"type": "BPEDecoder", "suffix": "</w>"});
    let byte_level = || json!({"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true});
    let (bytes, fuse) = (json!({"type": "ByteFallback"}), json!({"type": "Fuse"}));
    vec![
        Value::Null,
        tiny::llama_decoder(),
        sequence(&[spaces(), bytes.clone(), fuse.clone()]),
        metaspace("first"),
        metaspace("always"),
        metaspace("never"),
        sequence(&[bytes.clone(), metaspace("first")]),
        word_piece(true),
        word_piece(false),
        ctc(true),
        ctc(false),
        bpe(),
        byte_level(),
        fuse.clone(),
        bytes.clone(),
        strip(1, 0),
        sequence(&[byte_level(), strip(2, 0)]),
        sequence(&[bpe(), spaces(), fuse.clone(), strip(3, 0)]),
        sequence(&[fuse.clone(), metaspace("first")]),
        sequence(&[
            fuse.clone(),
            spaces(),
            replace(json!({"String": "  "}), "_"),
            replace(json!({"String": "er"}), ""),
        ]),
        sequence(&[fuse.clone(), bpe()]),
        sequence(&[ctc(true), metaspace("first")]),
        // These may rewrite text at any distance: it comes at the end.
        sequence(&[fuse.clone(), replace(json!({"Regex": "▁+Hi"}), "-")]),
        sequence(&[fuse.clone(), word_piece(true)]),
        sequence(&[fuse.clone(), ctc(true)]),
        sequence(&[fuse, byte_level()]),
    ]
}

fn open(decoder: &Value) -> (Tokenizer, tokenizers::Tokenizer) {
    let mut json = tiny::tokenizer();
    json["decoder"] = decoder.clone();
    let reference = tokenizers::Tokenizer::from_bytes(json.to_string()).unwrap();
    (tiny::open(&json, &[]), reference)
}

fn streamed(tokenizer: &Tokenizer, ids: &[u32]) -> Vec<String> {
    let mut detokenizer = Detokenizer::new(tokenizer);
    let mut pieces: Vec<String> = ids.iter().map(|id| detokenizer.push(*id).unwrap()).collect();
    pieces.push(detokenizer.finish().unwrap());
    pieces
}

#[test]
fn streamed_text_is_that_of_all_tokens_at_once() {
    // Ids beyond the vocabulary have no token, as in models with padded tables.
    let sequences = proptest::collection::vec(0..WORDS.len() as u32 + 2, 0..16);
    for decoder in decoders() {
        let (tokenizer, reference) = open(&decoder);
        let mut runner = proptest::test_runner::TestRunner::deterministic();
        let result = runner.run(&sequences, |ids| {
            // The library panics at texts without tokens.
            let is_text = ids
                .iter()
                .any(|id| reference.id_to_token(*id).is_some() && !tokenizer.is_special(*id));
            let expected = if is_text {
                reference.decode(&ids, true).unwrap()
            } else {
                String::new()
            };
            prop_assert_eq!(streamed(&tokenizer, &ids).concat(), &expected[..], "{}", decoder);
            prop_assert_eq!(tokenizer.decode(&ids).unwrap(), expected);
            Ok(())
        });
        result.unwrap_or_else(|e| panic!("{decoder}: {e}"));
    }
}

/// The library panics on texts shorter than what it strips from their end.
#[test]
fn spaces_at_the_end_are_held_back() {
    let decoders = json!([{"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {"type": "Fuse"},
        {"type": "Strip", "content": " ", "start": 0, "stop": 2}]);
    let (tokenizer, reference) = open(&json!({"type": "Sequence", "decoders": decoders}));
    for words in [
        &["▁Hi", "▁▁", "▁", "▁there"][..],
        &["▁Hi", "▁", "▁▁"],
        &["▁Hi", "▁", "<s>", "!"],
        &["▁x▁"],
    ] {
        let ids = ids(words);
        assert_eq!(
            streamed(&tokenizer, &ids).concat(),
            reference.decode(&ids, true).unwrap(),
            "{words:?}"
        );
    }
    assert_eq!(tokenizer.decode(&ids(&["▁"])).unwrap(), "");
    assert_eq!(tokenizer.decode(&[]).unwrap(), "");
    let (tokenizer, _) = open(&json!({"type": "Strip", "content": " ", "start": 1, "stop": 3}));
    assert_eq!(tokenizer.decode(&ids(&[" ", "!", " "])).unwrap(), "!");
}

#[test]
fn text_comes_as_soon_as_it_is_certain() {
    let (tokenizer, _) = open(&tiny::llama_decoder());
    let words = ["▁Hi", "<|im_start|>", "▁there", "<0xE4>", "<0xB8>", "<0x96>", "!"];
    assert_eq!(
        streamed(&tokenizer, &ids(&words)),
        ["Hi", "", " there", "", "", "", "世!", ""]
    );
    // Bytes that can no longer become a character are not held back.
    let words = ["<0xE4>", "!", "<0xF0>", "<0xF0>", "<0x41>", "!"];
    assert_eq!(
        streamed(&tokenizer, &ids(&words)),
        ["", "\u{FFFD}!", "", "\u{FFFD}\u{FFFD}", "\u{FFFD}", "!", ""]
    );
}

/// One invalid byte invalidates a whole run of byte tokens, so a run is final only at its end. A long one is emitted
/// anyway, and stays.
#[test]
fn a_long_run_of_byte_tokens_is_not_waited_for() {
    let (tokenizer, reference) = open(&tiny::llama_decoder());
    let run: Vec<u32> = ids(&["<0xE4>", "<0xB8>", "<0x96>"]).repeat(40);
    let pieces = streamed(&tokenizer, &run);
    assert_eq!(pieces.concat(), "世".repeat(40));
    assert!(pieces[..70].concat().len() > 60, "{pieces:?}");
    let spoilt = [&run[..], &ids(&["<0xB8>", "!"])].concat();
    assert_eq!(reference.decode(&spoilt, true).unwrap(), "\u{FFFD}".repeat(121) + "!");
    let text = streamed(&tokenizer, &spoilt).concat();
    let kept = text.trim_end_matches(['\u{FFFD}', '!']);
    assert!(kept.chars().all(|c| c == '世') && text.ends_with("\u{FFFD}!"), "{text}");
}
