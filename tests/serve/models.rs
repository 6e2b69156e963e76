//! A tiny model of 97 tokens and a tokenizer that fits it: three special tokens and the characters of ASCII.

use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use crate::support::{fixture, package, text};

pub const TEMPLATE: &str = "{% for m in messages %}<|im_start|>{{ m['role'][0] }}{{ m['content'] }}<|im_end|>{% endfor %}\
    {% if add_generation_prompt %}<|im_start|>a{% endif %}";

/// Its tokenizer's files with a chat template, in a new folder.
pub fn tokenizer_files(folder: &Path, template: &str) -> PathBuf {
    let files = folder.join("tokenizer");
    std::fs::create_dir(&files).unwrap();
    let path = fixture("smollm2/tokenizer.json");
    let mut tokenizer: Value = serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap();
    let special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"].map(String::from);
    // Byte-level tokenizers write a space as U+0120.
    let letters = std::iter::once("\u{120}".to_string()).chain(('!'..='}').map(String::from));
    let vocabulary = special
        .into_iter()
        .chain(letters)
        .enumerate()
        .map(|(id, token)| (token, json!(id)));
    tokenizer["model"]["vocab"] = Value::Object(vocabulary.collect());
    tokenizer["model"]["merges"] = json!([]);
    tokenizer["added_tokens"].as_array_mut().unwrap().truncate(3);
    std::fs::write(files.join("tokenizer.json"), tokenizer.to_string()).unwrap();
    let config = json!({"chat_template": template, "eos_token": "<|im_end|>"});
    std::fs::write(files.join("tokenizer_config.json"), config.to_string()).unwrap();
    files
}

/// Converts it into `folder/pkg`.
pub fn talker(folder: &Path, capacity: &str) -> PathBuf {
    let files = tokenizer_files(folder, TEMPLATE);
    let model = fixture("exports/llama-optimum/model.onnx");
    package(folder, &model, &["--capacity", capacity, "--tokenizer", text(&files)])
}
