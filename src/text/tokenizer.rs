//! The model's own tokenizer: `tokenizer.json` for the ids, and from the files beside it the special tokens, the chat
//! template and which tokens end a text.
//!
//! Works on a folder as Hugging Face lays it out; only `tokenizer.json` must be there. `chat` renders the chat template,
//! `detokenizer` turns a stream of tokens into text.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use serde_json::Value;

use super::token_bytes::token_bytes;
use crate::help::Help;
use crate::sample::Breakers;

/// Files that a tokenizer folder may hold, in the order the package lists them. The first is required.
pub const FILES: [&str; 7] = [
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
    "config.json",
];

/// What is wrong with a tokenizer's files, or with a text.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs, reason = "the message says what the fields are")]
pub enum TokenizerError {
    /// A file cannot be read.
    #[error("{}: {source}", path.display())]
    Read { path: PathBuf, source: std::io::Error },
    /// A file is not JSON.
    #[error("{}: not valid JSON: {source}", path.display())]
    Json { path: PathBuf, source: serde_json::Error },
    /// `tokenizer.json` describes no tokenizer.
    #[error("{}: not a tokenizer that can be used: {message}", path.display())]
    Tokenizer { path: PathBuf, message: String },
    /// A text has no tokens.
    #[error("the tokenizer cannot encode this text: {0}")]
    Encode(String),
    /// Tokens have no text.
    #[error("the tokenizer cannot decode these tokens: {0}")]
    Decode(String),
}

impl Help for TokenizerError {}

/// See the module's head.
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    token_bytes: OnceLock<Vec<Vec<u8>>>,
    /// The files it was read from, all of them of [`FILES`].
    pub files: Vec<PathBuf>,
    /// The token that begins a text, if the model has one.
    pub bos_token: Option<String>,
    /// The token that ends a text, if the model has one.
    pub eos_token: Option<String>,
    /// Tokens that end a text: of `generation_config.json`, else `config.json`, and the tokenizer's own end token.
    pub eos_ids: BTreeSet<u32>,
    /// The chat template's source, if the model has one.
    pub chat_template: Option<String>,
    /// Other special tokens that templates may refer to, such as `pad_token`.
    pub special: Vec<(String, String)>,
    /// `generation_config.json`, or null.
    pub generation: Value,
}

impl Tokenizer {
    /// Reads a folder, or `tokenizer.json` itself with the files beside it.
    pub fn open(path: &Path) -> Result<Self, TokenizerError> {
        let (folder, main) = if path.is_dir() {
            (path.to_path_buf(), path.join(FILES[0]))
        } else {
            (
                path.parent().unwrap_or(Path::new(".")).to_path_buf(),
                path.to_path_buf(),
            )
        };
        let bytes = std::fs::read(&main).map_err(|source| TokenizerError::Read {
            path: main.clone(),
            source,
        })?;
        let inner = tokenizers::Tokenizer::from_bytes(&bytes).map_err(|e| TokenizerError::Tokenizer {
            path: main.clone(),
            message: e.to_string(),
        })?;
        let mut files = vec![main];
        let mut json = |name: &str| -> Result<Value, TokenizerError> {
            let path = folder.join(name);
            if !path.is_file() {
                return Ok(Value::Null);
            }
            let text = read(&path)?;
            files.push(path.clone());
            serde_json::from_str(&text).map_err(|source| TokenizerError::Json { path, source })
        };
        let config = json("tokenizer_config.json")?;
        let special_map = json("special_tokens_map.json")?;
        let template_json = json("chat_template.json")?;
        let generation = json("generation_config.json")?;
        let model = json("config.json")?;

        let special_token = |name: &str| token_text(&config[name]).or_else(|| token_text(&special_map[name]));
        let bos_token = special_token("bos_token");
        let eos_token = special_token("eos_token");
        let special = ["pad_token", "unk_token", "sep_token", "cls_token", "mask_token"]
            .into_iter()
            .filter_map(|name| Some((name.to_string(), special_token(name)?)))
            .collect();

        let mut eos_ids = ids(&generation["eos_token_id"]);
        if eos_ids.is_empty() {
            eos_ids = ids(&model["eos_token_id"]);
        }
        eos_ids.extend(eos_token.as_deref().and_then(|token| inner.token_to_id(token)));

        let jinja = folder.join("chat_template.jinja");
        let chat_template = if jinja.is_file() {
            let text = read(&jinja)?;
            files.push(jinja);
            Some(text)
        } else {
            template_text(&template_json["chat_template"]).or_else(|| template_text(&config["chat_template"]))
        };
        Ok(Tokenizer {
            inner,
            token_bytes: OnceLock::new(),
            files,
            bos_token,
            eos_token,
            eos_ids,
            chat_template,
            special,
            generation,
        })
    }

    /// Ids of a text. `add_special_tokens` lets the tokenizer's post-processor add its own (usually a first token);
    /// text that came out of a chat template has them already.
    pub fn encode(&self, text: &str, add_special_tokens: bool) -> Result<Vec<u32>, TokenizerError> {
        let encoding = self.inner.encode_fast(text, add_special_tokens);
        let encoding = encoding.map_err(|e| TokenizerError::Encode(e.to_string()))?;
        Ok(encoding.get_ids().to_vec())
    }

    /// Text of tokens, without special ones. Ids that the tokenizer does not know are left out.
    pub fn decode(&self, tokens: &[u32]) -> Result<String, TokenizerError> {
        let text = self.inner.decode(tokens, true);
        text.map_err(|e| TokenizerError::Decode(e.to_string()))
    }

    /// The bytes of every token by id, read out of the vocabulary once.
    pub fn token_bytes(&self) -> &[Vec<u8>] {
        self.token_bytes.get_or_init(|| token_bytes(&self.inner))
    }

    /// Sequence breakers for DRY, from strings, over the whole vocabulary; and those strings that no token contains or
    /// begins, or that are empty, so that they could never break anything.
    pub fn breakers<S: AsRef<str>>(&self, strings: &[S]) -> Result<(Breakers, Vec<String>), TokenizerError> {
        let mut breakers = Breakers::default();
        let mut without_tokens = Vec::new();
        for string in strings.iter().map(AsRef::as_ref) {
            if breakers.add_string(string, self.token_bytes(), |tail| self.encode_bytes(tail))? == 0 {
                without_tokens.push(string.to_string());
            }
        }
        Ok((breakers, without_tokens))
    }

    /// Tokens of the end of a text, which may begin inside a character: such bytes get the tokens of single bytes.
    fn encode_bytes(&self, bytes: &[u8]) -> Result<Vec<u32>, TokenizerError> {
        let is_inside = |b: &u8| b & 0xC0 == 0x80;
        let inside = bytes.iter().take_while(|b| is_inside(b)).count();
        let (lone, text) = bytes.split_at(inside);
        let single = |b: &u8| {
            self.token_bytes()
                .iter()
                .position(|bytes| bytes == std::slice::from_ref(b))
        };
        let mut ids: Vec<u32> = lone.iter().filter_map(single).map(|id| id as u32).collect();
        ids.extend(self.encode(&String::from_utf8_lossy(text), false)?);
        Ok(ids)
    }

    /// Ids are below this, if the vocabulary has no gaps at its end.
    pub fn vocabulary(&self) -> usize {
        let ids = self.inner.get_vocab(true).into_values();
        ids.max().map_or(0, |id| id as usize + 1)
    }
}

fn read(path: &Path) -> Result<String, TokenizerError> {
    std::fs::read_to_string(path).map_err(|source| TokenizerError::Read {
        path: path.to_path_buf(),
        source,
    })
}

/// A special token is written as a string or as an object with its settings.
fn token_text(value: &Value) -> Option<String> {
    let text = value.as_str().or_else(|| value["content"].as_str());
    text.map(str::to_string)
}

/// One template, or a list of named ones of which `default` is meant.
fn template_text(value: &Value) -> Option<String> {
    if let Some(text) = value.as_str() {
        return Some(text.to_string());
    }
    let named = value.as_array()?;
    let default = named.iter().find(|t| t["name"] == "default").or(named.first())?;
    default["template"].as_str().map(str::to_string)
}

/// One id or a list of them.
fn ids(value: &Value) -> BTreeSet<u32> {
    let one = |v: &Value| v.as_u64().and_then(|id| u32::try_from(id).ok());
    match value {
        Value::Array(list) => list.iter().filter_map(one).collect(),
        other => one(other).into_iter().collect(),
    }
}

/// Tokens that end a text, for a package without a tokenizer: from `generation_config.json`, else `config.json`.
pub fn eos_ids_of_configs(folder: &Path) -> BTreeSet<u32> {
    let of = |name: &str| -> BTreeSet<u32> {
        let text = std::fs::read_to_string(folder.join(name)).unwrap_or_default();
        let value: Value = serde_json::from_str(&text).unwrap_or(Value::Null);
        ids(&value["eos_token_id"])
    };
    let generation = of("generation_config.json");
    if generation.is_empty() {
        of("config.json")
    } else {
        generation
    }
}
