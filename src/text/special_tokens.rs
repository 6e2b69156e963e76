//! Special and added tokens in `tokenizer_config.json`, in addition to those of `tokenizer.json`.
//!
//! transformers adds them when it opens a tokenizer; this module does the same if each keeps the id in the file.
//! Warnings name omitted tokens and contradictions between the two files.

use serde_json::Value;
use tokenizers::{AddedToken, Model};

use super::guarded::guarded;

/// Names of `tokenizer_config.json` and `special_tokens_map.json` that hold one special token each.
const NAMES: [&str; 7] = [
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
];

/// The two files, null if missing.
pub(super) struct SpecialTokens<'a> {
    pub config: &'a Value,
    pub map: &'a Value,
}

impl SpecialTokens<'_> {
    /// The token of one name.
    pub fn text(&self, name: &str) -> Option<String> {
        token_text(&self.config[name]).or_else(|| token_text(&self.map[name]))
    }

    /// The id that `added_tokens_decoder` gives a token.
    pub fn declared_id(&self, token: &str) -> Option<u32> {
        let declared = self.config["added_tokens_decoder"].as_object()?;
        let of_token = |(id, value): (&String, &Value)| {
            let id = id.parse().ok()?;
            (token_text(value).as_deref() == Some(token)).then_some(id)
        };
        declared.iter().find_map(of_token)
    }

    /// Every token that is special by its field.
    fn named(&self) -> Vec<Value> {
        let mut all: Vec<Value> = Vec::new();
        for name in NAMES {
            let found = [self.config, self.map].map(|file| &file[name]);
            all.extend(found.into_iter().find(|value| !value.is_null()).cloned());
        }
        for file in [self.config, self.map] {
            for name in ["additional_special_tokens", "extra_special_tokens"] {
                match &file[name] {
                    Value::Array(list) => all.extend(list.iter().cloned()),
                    Value::Object(named) => all.extend(named.values().cloned()),
                    _ => {}
                }
            }
        }
        all
    }

    /// Adds what the files define to the tokenizer; returns warnings without the file's name, which is
    /// `tokenizer_config.json`.
    pub fn add_to(&self, tokenizer: &mut tokenizers::Tokenizer) -> Vec<String> {
        let mut warnings = Vec::new();
        let mut to_add = self.declared(tokenizer, &mut warnings);
        let added = tokenizer.get_added_tokens_decoder();
        for value in self.named() {
            let Some(token) = added_token(&value, true) else {
                continue;
            };
            let is_added = added
                .values()
                .chain(&to_add)
                .any(|other| other.content == token.content);
            if !is_added && tokenizer.token_to_id(&token.content).is_some() {
                to_add.push(token.special(true));
            }
        }
        if !to_add.is_empty() {
            tokenizer.add_tokens(&to_add);
        }
        warnings
    }

    /// Tokens of `added_tokens_decoder` that get the same id.
    fn declared(&self, tokenizer: &tokenizers::Tokenizer, warnings: &mut Vec<String>) -> Vec<AddedToken> {
        let field = &self.config["added_tokens_decoder"];
        let Some(declared) = field.as_object() else {
            if !field.is_null() {
                warnings.push("added_tokens_decoder is not an object of tokens by id; it is not used".to_string());
            }
            return Vec::new();
        };
        let mut tokens = Vec::new();
        for (id, value) in declared {
            match (id.parse::<u32>(), added_token(value, false)) {
                (Ok(id), Some(token)) => tokens.push((id, token)),
                _ => warnings.push(format!(
                    "added_tokens_decoder: {id:?}: {value} is not a token with its id; it is not used"
                )),
            }
        }
        tokens.sort_by_key(|(id, _)| *id);
        let added = tokenizer.get_added_tokens_decoder();
        let mut next = next_id(tokenizer);
        let mut to_add = Vec::new();
        for (id, token) in tokens {
            let content = &token.content;
            let not_added = "it is not added, and text that holds it is cut into other tokens";
            match (tokenizer.token_to_id(content), tokenizer.id_to_token(id)) {
                (Some(known), _) if known == id => {
                    if added.get(&id) != Some(&token) {
                        to_add.push(token);
                    }
                }
                (Some(known), _) => warnings.push(format!(
                    "added_tokens_decoder: {content:?} is token {id}, and token {known} of tokenizer.json, which is used"
                )),
                (None, Some(other)) => warnings.push(format!(
                    "added_tokens_decoder: {content:?} is token {id}, which is {other:?} in tokenizer.json; {not_added}"
                )),
                (None, None) if id != next => warnings.push(format!(
                    "added_tokens_decoder: {content:?} is token {id}, and the next free token of tokenizer.json is {next}; \
                     {not_added}"
                )),
                (None, None) => {
                    next += 1;
                    to_add.push(token);
                }
            }
        }
        to_add
    }

    /// Warnings where `add_bos_token` or `add_eos_token` contradicts `tokenizer.json`, which takes precedence.
    pub fn check_text_marks(&self, tokenizer: &tokenizers::Tokenizer) -> Vec<String> {
        let ids = |special| guarded(|| tokenizer.encode_fast("a", special)).map(|e| e.get_ids().to_vec());
        let (Ok(with), Ok(without)) = (ids(true), ids(false)) else {
            return Vec::new();
        };
        let mut warnings = Vec::new();
        let ends = [
            ("bos_token", "before", with.first(), without.first()),
            ("eos_token", "behind", with.last(), without.last()),
        ];
        for (name, place, with, without) in ends {
            let Some(asked) = self.config[format!("add_{name}")].as_bool() else {
                continue;
            };
            let Some(text) = self.text(name) else { continue };
            let id = tokenizer.token_to_id(&text);
            let does = with == id.as_ref() && without != id.as_ref() && id.is_some();
            if asked != does {
                let adds = if does { "adds it" } else { "does not add it" };
                warnings.push(format!(
                    "add_{name} is {asked}, and the post-processor of tokenizer.json {adds} ({text:?}) {place} a text; \
                     tokenizer.json is followed"
                ));
            }
        }
        warnings
    }
}

/// The id that the library assigns to the next unknown token.
fn next_id(tokenizer: &tokenizers::Tokenizer) -> u32 {
    let model = tokenizer.get_model().get_vocab_size() as u32;
    let added = tokenizer.get_added_tokens_decoder();
    added.keys().max().map_or(model, |max| model.max(max + 1))
}

/// A special token is written as a string or as an object with its settings.
pub(super) fn token_text(value: &Value) -> Option<String> {
    let text = value.as_str().or_else(|| value["content"].as_str());
    text.map(str::to_string)
}

/// As in transformers; `special` if the object has no such field.
fn added_token(value: &Value, special: bool) -> Option<AddedToken> {
    let content = token_text(value).filter(|content| !content.is_empty())?;
    let setting = |name: &str| value[name].as_bool();
    let mut token = AddedToken::from(content, setting("special").unwrap_or(special));
    token.single_word = setting("single_word").unwrap_or(token.single_word);
    token.lstrip = setting("lstrip").unwrap_or(token.lstrip);
    token.rstrip = setting("rstrip").unwrap_or(token.rstrip);
    token.normalized = setting("normalized").unwrap_or(token.normalized);
    Some(token)
}
