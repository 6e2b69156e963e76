//! Makes a package of a model with 97 tokens, for tests: `tiny_package FOLDER`.

use std::path::{Path, PathBuf};

use lapidary::{ConvertOptions, Spec, convert};
use serde_json::{Value, json};

/// Each message between two marks, and the beginning of an answer.
const TEMPLATE: &str = "{% for m in messages %}<|im_start|>{{ m['role'][0] }}{{ m['content'] }}<|im_end|>{% endfor %}\
    {% if add_generation_prompt %}<|im_start|>a{% endif %}";

/// A tokenizer of three special tokens and the characters of ASCII, as a folder of Hugging Face's form.
fn tokenizer(folder: &Path, fixtures: &Path) -> Result<PathBuf, Box<dyn std::error::Error>> {
    let files = folder.join("files");
    std::fs::create_dir_all(&files)?;
    let mut tokenizer: Value =
        serde_json::from_str(&std::fs::read_to_string(fixtures.join("smollm2/tokenizer.json"))?)?;
    let special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"].map(String::from);
    // Byte-level tokenizers write a space as U+0120.
    let letters = std::iter::once("\u{120}".to_string()).chain(('!'..='}').map(String::from));
    let vocabulary = special.into_iter().chain(letters).enumerate();
    tokenizer["model"]["vocab"] = Value::Object(vocabulary.map(|(id, token)| (token, json!(id))).collect());
    tokenizer["model"]["merges"] = json!([]);
    tokenizer["added_tokens"]
        .as_array_mut()
        .ok_or("added_tokens")?
        .truncate(3);
    let config = json!({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 97, "eos_token_id": 2,
        "bos_token_id": 1, "max_position_embeddings": 16384,
    });
    for (name, document) in [
        ("tokenizer.json", tokenizer),
        (
            "tokenizer_config.json",
            json!({"chat_template": TEMPLATE, "eos_token": "<|im_end|>", "bos_token": "<|im_start|>"}),
        ),
        ("config.json", config),
        ("generation_config.json", json!({"eos_token_id": 2})),
    ] {
        std::fs::write(files.join(name), document.to_string())?;
    }
    Ok(files)
}

/// The package `FOLDER/tiny`, with these capacities.
pub fn tiny_package(folder: &Path, capacities: &[usize]) -> Result<PathBuf, Box<dyn std::error::Error>> {
    package_without("", folder, capacities)
}

/// The same without a file of its tokenizer.
pub fn package_without(file: &str, folder: &Path, capacities: &[usize]) -> Result<PathBuf, Box<dyn std::error::Error>> {
    let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("../fixtures");
    let files = tokenizer(folder, &fixtures)?;
    if !file.is_empty() {
        std::fs::remove_file(files.join(file))?;
    }
    let spec = Spec {
        tokenizer: Some(files),
        capacity: Some(capacities.to_vec()),
        ..Spec::default()
    };
    let package = folder.join("tiny");
    let export = fixtures.join("exports/llama-optimum/model.onnx");
    convert(&export, &package, spec.resolve()?, &ConvertOptions::default())?;
    Ok(package)
}

#[allow(dead_code, reason = "tests use the functions alone")]
fn main() -> Result<(), Box<dyn std::error::Error>> {
    let folder = std::env::args().nth(1).ok_or("usage: tiny_package FOLDER")?;
    println!("{}", tiny_package(Path::new(&folder), &[256, 16384])?.display());
    Ok(())
}
