//! The model's own tokenizer: `tokenizer.json` for the ids, and from the files beside it the special tokens, the chat
//! template and the end tokens.
//!
//! Works on a folder in Hugging Face's layout; only `tokenizer.json` is required. `chat` renders the chat template,
//! `detokenizer` turns a stream of tokens into text. Training settings in `tokenizer.json` (truncation, padding,
//! dropout of merges) are not used: a prompt is encoded completely and deterministically.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use serde_json::Value;
use tokenizers::models::ModelWrapper;

use super::decoding::Decoding;
use super::detokenizer::Detokenizer;
use super::end_tokens::EndTokens;
use super::guarded::guarded;
use super::special_tokens::SpecialTokens;
use super::token_bytes::token_bytes;
use crate::help::Help;
use crate::sample::{Breakers, Settings};

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

/// Errors in a tokenizer's files, or in a text.
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
    /// The decoder at the start of a text.
    decoding: Decoding,
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
    /// Entries of the files that are ignored or changed, one line each with the file and the field.
    pub warnings: Vec<String>,
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
        let unusable = |e: tokenizers::Error| TokenizerError::Tokenizer {
            path: main.clone(),
            message: e.to_string(),
        };
        let mut inner = guarded(|| tokenizers::Tokenizer::from_bytes(&bytes)).map_err(unusable)?;
        guarded(|| without_training_settings(&mut inner)).map_err(unusable)?;
        let mut files = vec![main.clone()];
        let mut json = |name: &str| -> Result<Value, TokenizerError> {
            let path = folder.join(name);
            let value = json_file(&path)?;
            if path.is_file() {
                files.push(path);
            }
            Ok(value)
        };
        let config = json("tokenizer_config.json")?;
        let special_map = json("special_tokens_map.json")?;
        let template_json = json("chat_template.json")?;
        let generation = json("generation_config.json")?;
        let model = json("config.json")?;

        let names = SpecialTokens {
            config: &config,
            map: &special_map,
        };
        let mut warnings = guarded(|| Ok(names.add_to(&mut inner))).map_err(unusable)?;
        warnings.extend(names.check_text_marks(&inner));
        let bos_token = names.text("bos_token");
        let eos_token = names.text("eos_token");
        let special = ["pad_token", "unk_token", "sep_token", "cls_token", "mask_token"]
            .into_iter()
            .filter_map(|name| Some((name.to_string(), names.text(name)?)))
            .collect();

        let mut end = EndTokens::of_configs(&generation, &model);
        for (name, token) in [("bos_token", &bos_token), ("eos_token", &eos_token)] {
            let Some(token) = token else { continue };
            // An id that no other token has is as valid as one of tokenizer.json.
            let free = names.declared_id(token).filter(|id| inner.id_to_token(*id).is_none());
            match inner.token_to_id(token).or(free) {
                Some(id) if name == "eos_token" => drop(end.ids.insert(id)),
                Some(_) => {}
                None => warnings.push(format!(
                    "{name} is {token:?}, and tokenizer.json has no such token; {}",
                    match name {
                        "eos_token" => "it is ignored",
                        _ => "text that holds it is cut into other tokens",
                    }
                )),
            }
        }
        let mut warnings: Vec<String> = warnings.iter().map(|w| format!("tokenizer_config.json: {w}")).collect();
        let generation_warnings = Settings::generation_config_warnings(&generation);
        warnings.extend(
            generation_warnings
                .iter()
                .map(|w| format!("generation_config.json: {w}")),
        );
        warnings.append(&mut end.warnings);

        let jinja = folder.join("chat_template.jinja");
        let chat_template = if jinja.is_file() {
            let text = read(&jinja)?;
            files.push(jinja);
            Some(text)
        } else {
            template_text(&template_json["chat_template"]).or_else(|| template_text(&config["chat_template"]))
        };
        Ok(Tokenizer {
            decoding: Decoding::new(inner.get_decoder()),
            inner,
            token_bytes: OnceLock::new(),
            files,
            bos_token,
            eos_token,
            eos_ids: end.ids,
            chat_template,
            special,
            generation,
            warnings,
        })
    }

    /// Ids of a text. `add_special_tokens` lets the tokenizer's post-processor add its own (usually a first token);
    /// text from a chat template already has them.
    pub fn encode(&self, text: &str, add_special_tokens: bool) -> Result<Vec<u32>, TokenizerError> {
        let encoding = guarded(|| self.inner.encode_fast(text, add_special_tokens));
        let encoding = encoding.map_err(|e| TokenizerError::Encode(e.to_string()))?;
        Ok(encoding.get_ids().to_vec())
    }

    /// Text of tokens, without special ones and unknown ids.
    pub fn decode(&self, tokens: &[u32]) -> Result<String, TokenizerError> {
        let mut detokenizer = Detokenizer::new(self);
        let mut text = String::new();
        for token in tokens {
            text.push_str(&detokenizer.push(*token)?);
        }
        Ok(text + &detokenizer.finish()?)
    }

    pub(super) fn decoding(&self) -> Decoding {
        self.decoding.clone()
    }

    /// Whether a token is left out of text.
    pub fn is_special(&self, id: u32) -> bool {
        let token = self.inner.id_to_token(id);
        token.is_some_and(|token| self.inner.get_added_vocabulary().is_special_token(&token))
    }

    /// The token's form in the vocabulary, unless it is special or unknown.
    pub(super) fn visible(&self, id: u32) -> Option<String> {
        let token = self.inner.id_to_token(id)?;
        (!self.inner.get_added_vocabulary().is_special_token(&token)).then_some(token)
    }

    /// Every special token.
    pub(super) fn special_tokens(&self) -> Vec<(u32, String)> {
        let vocabulary = self.inner.get_added_vocabulary();
        let added = vocabulary.get_added_tokens_decoder().iter();
        let special = added.filter(|(_, token)| vocabulary.is_special_token(&token.content));
        special.map(|(id, token)| (*id, token.content.clone())).collect()
    }

    /// The bytes of every token by id, read from the vocabulary once.
    pub fn token_bytes(&self) -> &[Vec<u8>] {
        self.token_bytes.get_or_init(|| token_bytes(&self.inner))
    }

    /// Sequence breakers for DRY, from strings, over the whole vocabulary; and strings without effect, because they are
    /// empty or no token contains or begins them.
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

    /// Tokens of the end of a text, which may begin inside a character: partial characters get single-byte tokens.
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

    /// Leaves out end tokens that a model of `vocabulary` tokens cannot generate, with a warning each.
    pub fn limit_end_tokens(&mut self, vocabulary: usize) {
        let mut end = EndTokens {
            ids: std::mem::take(&mut self.eos_ids),
            warnings: Vec::new(),
        };
        end.limit(vocabulary);
        self.eos_ids = end.ids;
        self.warnings.append(&mut end.warnings);
    }

    /// Ids are below this, if the vocabulary has no gaps at its end.
    pub fn vocabulary(&self) -> usize {
        let ids = self.inner.get_vocab(true).into_values();
        ids.max().map_or(0, |id| id as usize + 1)
    }
}

/// Removes training settings from the file. transformers resets truncation and padding at every call
/// (`set_truncation_and_padding`), and dropout of merges would encode the same text differently each time.
fn without_training_settings(tokenizer: &mut tokenizers::Tokenizer) -> Result<(), tokenizers::Error> {
    tokenizer.with_truncation(None)?;
    tokenizer.with_padding(None);
    if let ModelWrapper::BPE(model) = tokenizer.get_model()
        && model.dropout.is_some()
    {
        let mut model = model.clone();
        model.dropout = None;
        tokenizer.with_model(model);
    }
    Ok(())
}

/// Null if the file does not exist.
pub(super) fn json_file(path: &Path) -> Result<Value, TokenizerError> {
    if !path.is_file() {
        return Ok(Value::Null);
    }
    let path = path.to_path_buf();
    serde_json::from_str(&read(&path)?).map_err(|source| TokenizerError::Json { path, source })
}

fn read(path: &Path) -> Result<String, TokenizerError> {
    std::fs::read_to_string(path).map_err(|source| TokenizerError::Read {
        path: path.to_path_buf(),
        source,
    })
}

/// One template, or a list of named ones, of which `default` is used.
fn template_text(value: &Value) -> Option<String> {
    if let Some(text) = value.as_str() {
        return Some(text.to_string());
    }
    let named = value.as_array()?;
    let default = named.iter().find(|t| t["name"] == "default").or(named.first())?;
    default["template"].as_str().map(str::to_string)
}
