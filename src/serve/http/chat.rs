//! `/v1/chat/completions`: messages become a prompt by the model's own template.

use std::sync::Arc;

use serde_json::Value;

use super::Limits as ServerLimits;
use super::error::ApiError;
use super::fields::{self, fields};
use super::model::Model;
use super::reply::Asked;
use super::shapes::Shape;
use crate::text::{Message, Tokenizer, chat};

/// A message as clients write it.
#[derive(serde::Deserialize)]
pub struct Turn {
    role: String,
    #[serde(default)]
    content: Content,
}

#[derive(serde::Deserialize, Default)]
#[serde(untagged)]
enum Content {
    Text(String),
    Parts(Vec<Part>),
    #[default]
    Nothing,
}

#[derive(serde::Deserialize)]
struct Part {
    #[serde(rename = "type")]
    kind: String,
    text: Option<String>,
}

fields! {
    Own {
        messages: Vec<Turn>,
        max_completion_tokens: usize,
        logprobs: bool,
        top_logprobs: usize,
        tools: Vec<Value>,
        tool_choice: Value,
        response_format: Value,
    }
}

/// What a body asks for.
pub fn parse(
    find: impl Fn(Option<&str>) -> Result<Arc<Model>, ApiError>,
    limits: &ServerLimits,
    body: &[u8],
) -> Result<Asked, ApiError> {
    let (mut common, own) = fields::read::<Own>(body, Own::NAMES)?;
    let model = find(common.model.as_deref())?;
    refuse_what_is_not_there(&own)?;
    let messages = own.messages.unwrap_or_default();
    if messages.is_empty() {
        return Err(ApiError::field("messages", "there is none"));
    }
    let logprobs = match (own.logprobs.unwrap_or(false), own.top_logprobs) {
        (true, top) => Some(top.unwrap_or(0)),
        (false, None | Some(0)) => None,
        (false, Some(_)) => return Err(ApiError::field("top_logprobs", "logprobs has to be true with it")),
    };
    let prompt = prompt(&model, messages)?;
    limits.check_prompt(&prompt)?;
    let most = model.capacity();
    Ok(Asked {
        n: common.choices(limits.choices)?,
        limits: common.limits(&model, own.max_completion_tokens, most, logprobs)?,
        sampling: common.settings(&model)?,
        streams: common.streams(),
        includes_usage: common.includes_usage(),
        token_ids: common.return_token_ids.unwrap_or(false),
        prompts: vec![prompt],
        shape: Shape::Chat {
            logprobs: logprobs.is_some(),
        },
        timeout: limits.timeout,
        model,
    })
}

fn refuse_what_is_not_there(own: &Own) -> Result<(), ApiError> {
    let unsupported = |name: &str, what: &str| {
        let refused = ApiError::field(name, format!("{what} are not supported yet"));
        Err(refused.code("unsupported"))
    };
    let chooses = own
        .tool_choice
        .as_ref()
        .is_some_and(|choice| choice != "none" && choice != "auto");
    if own.tools.as_ref().is_some_and(|tools| !tools.is_empty()) {
        return unsupported("tools", "tool calls");
    }
    if chooses {
        return unsupported("tool_choice", "tool calls");
    }
    match &own.response_format {
        Some(format) if format["type"] != "text" => unsupported("response_format", "other formats than text"),
        _ => Ok(()),
    }
}

/// Token ids of a conversation.
pub fn prompt_of(model: &Model, messages: Value) -> Result<Vec<u32>, ApiError> {
    let messages: Vec<Turn> = serde_path_to_error::deserialize(messages).map_err(|error| {
        let path = format!("messages{}", error.path());
        ApiError::field(&path, error.into_inner())
    })?;
    prompt(model, messages)
}

fn prompt(model: &Model, messages: Vec<Turn>) -> Result<Vec<u32>, ApiError> {
    let tokenizer = tokenizer(model)?;
    let messages: Vec<Message> = messages
        .into_iter()
        .enumerate()
        .map(|(i, turn)| turn.message(i))
        .collect::<Result<_, _>>()?;
    let text = chat::render(tokenizer, &messages).map_err(|error| ApiError::field("messages", error))?;
    tokenizer.encode(&text, false).map_err(|error| ApiError::of(&error))
}

/// The tokenizer, where there is no way without.
pub fn tokenizer(model: &Model) -> Result<&Tokenizer, ApiError> {
    model.tokenizer.as_deref().ok_or_else(|| {
        ApiError::bad(format!(
            "the package of {:?} has no tokenizer: only /v1/completions with token ids is possible",
            model.name
        ))
    })
}

impl Turn {
    fn message(self, number: usize) -> Result<Message, ApiError> {
        let wrong = |what: String| ApiError::field(&format!("messages[{number}]"), what);
        let role = match &self.role[..] {
            "system" | "user" | "assistant" => self.role,
            // OpenAI's later name of it.
            "developer" => "system".to_string(),
            role => {
                return Err(wrong(format!(
                    "there is no role {role:?}; there are system, user and assistant"
                )));
            }
        };
        let content = match self.content {
            Content::Text(text) => text,
            Content::Parts(parts) => parts
                .into_iter()
                .map(|part| match (&part.kind[..], part.text) {
                    ("text", Some(text)) => Ok(text),
                    (kind, _) => Err(wrong(format!(
                        "content of the type {kind:?} is not supported, only text is"
                    ))),
                })
                .collect::<Result<String, _>>()?,
            Content::Nothing => return Err(wrong("there is no content".to_string())),
        };
        Ok(Message { role, content })
    }
}
