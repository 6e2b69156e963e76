//! A tokenizer of a few dozen tokens in its own folder, modified by tests.

use serde_json::{Value, json};
use tempfile::TempDir;

/// Words of the vocabulary by id. 0 to 2 and the two marks are special tokens, `<think>` is an added one that is not.
pub const WORDS: [&str; 30] = [
    "<unk>",
    "<s>",
    "</s>",
    "▁",
    "▁Hi",
    "▁there",
    "!",
    "\n",
    "user",
    "##er",
    "STOP",
    "a</w>",
    "</w>",
    "▁▁",
    " ",
    "▁x▁",
    "|",
    "<pad>",
    "<0xF0>",
    "<0x9F>",
    "<0x98>",
    "<0x80>",
    "<0xE4>",
    "<0xB8>",
    "<0x96>",
    "<0x41>",
    "Ġé",
    "<|im_start|>",
    "<|im_end|>",
    "<think>",
];

pub fn id(word: &str) -> u32 {
    WORDS
        .iter()
        .position(|w| *w == word)
        .unwrap_or_else(|| panic!("no {word:?}")) as u32
}

pub fn ids(words: &[&str]) -> Vec<u32> {
    words.iter().map(|word| id(word)).collect()
}

/// As Llama 2's: byte fallback, a decoder that takes one space off the beginning, `<s>` before a text.
pub fn tokenizer() -> Value {
    let vocabulary: serde_json::Map<String, Value> = WORDS[..27]
        .iter()
        .enumerate()
        .map(|(id, word)| (word.to_string(), json!(id)))
        .collect();
    let added = |word: &str, special: bool| {
        json!({"id": id(word), "content": word, "single_word": false, "lstrip": false, "rstrip": false, "normalized": false,
            "special": special})
    };
    json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "added_tokens": [added("<unk>", true), added("<s>", true), added("</s>", true), added("<|im_start|>", true),
            added("<|im_end|>", true), added("<think>", false)],
        "normalizer": {"type": "Sequence", "normalizers": [
            {"type": "Prepend", "prepend": "▁"}, {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]},
        "pre_tokenizer": null,
        "post_processor": {"type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}}},
        "decoder": llama_decoder(),
        "model": {"type": "BPE", "dropout": null, "unk_token": "<unk>", "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": true, "byte_fallback": true, "ignore_merges": false, "vocab": vocabulary,
            "merges": []},
    })
}

pub fn llama_decoder() -> Value {
    json!({"type": "Sequence", "decoders": [
        {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {"type": "ByteFallback"}, {"type": "Fuse"},
        {"type": "Strip", "content": " ", "start": 1, "stop": 0}]})
}

/// A folder with `tokenizer.json` and other files.
pub fn folder(tokenizer: &Value, files: &[(&str, Value)]) -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("tokenizer.json"), tokenizer.to_string()).unwrap();
    for (name, content) in files {
        std::fs::write(folder.path().join(name), content.to_string()).unwrap();
    }
    folder
}

pub fn open(tokenizer: &Value, files: &[(&str, Value)]) -> lapidary::text::Tokenizer {
    lapidary::text::Tokenizer::open(folder(tokenizer, files).path()).unwrap()
}
