//! `/tokenize` and `/detokenize`, with the fields of llama.cpp's server and of vLLM's.

use std::sync::Arc;

use serde_json::{Value, json};

use super::chat;
use super::error::ApiError;
use super::fields;
use super::model::Model;

#[derive(serde::Deserialize)]
#[serde(deny_unknown_fields)]
struct Tokenize {
    model: Option<String>,
    #[serde(alias = "prompt")]
    content: Option<String>,
    messages: Option<Value>,
    #[serde(alias = "add_special")]
    add_special_tokens: Option<bool>,
}

/// Ids of a text or of messages.
pub fn tokenize(find: impl Fn(Option<&str>) -> Result<Arc<Model>, ApiError>, body: &[u8]) -> Result<Value, ApiError> {
    let asked: Tokenize = fields::of_object(fields::object(body)?)?;
    let model = find(asked.model.as_deref())?;
    let tokens = match (asked.content, asked.messages) {
        (Some(text), None) => {
            let special = asked.add_special_tokens.unwrap_or(true);
            let tokens = chat::tokenizer(&model)?.encode(&text, special);
            tokens.map_err(|error| ApiError::of(&error))?
        }
        (None, Some(messages)) => chat::prompt_of(&model, messages)?,
        _ => {
            return Err(ApiError::field(
                "content",
                "give either content (or prompt) or messages",
            ));
        }
    };
    Ok(json!({"tokens": tokens, "count": tokens.len(), "max_model_len": model.capacity()}))
}

#[derive(serde::Deserialize)]
#[serde(deny_unknown_fields)]
struct Detokenize {
    model: Option<String>,
    tokens: Vec<u32>,
}

/// Text of ids.
pub fn detokenize(find: impl Fn(Option<&str>) -> Result<Arc<Model>, ApiError>, body: &[u8]) -> Result<Value, ApiError> {
    let asked: Detokenize = fields::of_object(fields::object(body)?)?;
    let model = find(asked.model.as_deref())?;
    let text = chat::tokenizer(&model)?.decode(&asked.tokens);
    let text = text.map_err(|error| ApiError::of(&error))?;
    Ok(json!({"content": text, "prompt": text}))
}
