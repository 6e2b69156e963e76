//! `/v1/chat/completions`: renders messages to a prompt with the model's template.

use std::sync::Arc;

use serde_json::Value;

use super::Limits as ServerLimits;
use super::error::ApiError;
use super::fields::{self, fields};
use super::forms;
use super::model::Model;
use super::reply::Asked;
use super::shapes::{Shape, Tools};
use crate::serve::Limited;
use crate::text::jinja::Variable;
use crate::text::tools::ToolFormat;
use crate::text::{Tokenizer, chat};

/// A message in a request.
#[derive(serde::Deserialize)]
pub struct Turn {
    role: String,
    #[serde(default)]
    content: Content,
    tool_calls: Option<Vec<Value>>,
    tool_call_id: Option<String>,
    name: Option<String>,
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
        parallel_tool_calls: bool,
    }
}

/// The fields of a body.
pub fn parse(
    find: impl Fn(Option<&str>) -> Result<Arc<Model>, ApiError>,
    limits: &ServerLimits,
    body: &[u8],
) -> Result<Asked, ApiError> {
    let (mut common, mut own) = fields::read::<Own>(body, Own::NAMES)?;
    let model = find(common.model.as_deref())?;
    let messages = own.messages.take().unwrap_or_default();
    if messages.is_empty() {
        return Err(ApiError::field("messages", "there is none"));
    }
    let logprobs = match (own.logprobs.unwrap_or(false), own.top_logprobs) {
        (true, top) => Some(top.unwrap_or(0)),
        (false, None | Some(0)) => None,
        (false, Some(_)) => return Err(ApiError::field("top_logprobs", "logprobs has to be true with it")),
    };
    let offered = tools(&model, &own)?;
    let prompt = prompt(&model, messages, offered.descriptions.unwrap_or(Variable::None))?;
    limits.check_prompt(&prompt)?;
    Ok(Asked {
        n: common.choices(limits.choices)?,
        limits: common.limits(
            &model,
            ("max_completion_tokens", own.max_completion_tokens),
            model.capacity(),
            ("top_logprobs", logprobs),
        )?,
        sampling: common.settings(&model)?,
        constraint: match (forms::of(&mut common, &model)?, offered.forced) {
            (Some(_), Some(_)) => return Err(ApiError::field("tool_choice", "the text cannot have another form, too")),
            (form, forced) => form.or(forced),
        },
        streams: common.streams(),
        includes_usage: common.includes_usage(),
        token_ids: common.return_token_ids.unwrap_or(false),
        prompts: vec![prompt],
        shape: Shape::Chat {
            logprobs: logprobs.is_some(),
            tools: offered.tools,
        },
        logs: false,
        timeout: limits.timeout,
        model,
    })
}

/// The tool fields of a request.
#[derive(Default)]
struct Offered {
    tools: Option<Tools>,
    /// For the template.
    descriptions: Option<Variable>,
    /// The form of a required call.
    forced: Option<Limited>,
}

fn tools(model: &Model, own: &Own) -> Result<Offered, ApiError> {
    let choice = own.tool_choice.as_ref();
    let is = |word: &str| choice.is_some_and(|choice| choice == word);
    let descriptions = match &own.tools {
        Some(tools) if !tools.is_empty() => tools,
        _ if choice.is_none() || is("auto") || is("none") => return Ok(Offered::default()),
        _ => return Err(ApiError::field("tool_choice", "the request has no tools")),
    };
    if is("none") {
        return Ok(Offered::default());
    }
    let mut names = Vec::new();
    for (i, tool) in descriptions.iter().enumerate() {
        match (tool["type"].as_str(), tool["function"]["name"].as_str()) {
            (Some("function"), Some(name)) => names.push(name.to_string()),
            _ => {
                let message = "it is no {\"type\": \"function\", \"function\": {\"name\": …}}";
                return Err(ApiError::field(&format!("tools[{i}]"), message));
            }
        }
    }
    let template = tokenizer(model)?.chat_template.as_deref().unwrap_or("");
    let Some(format) = ToolFormat::of_template(template) else {
        let message = "the model's chat template takes no tools, or writes calls in a way that is not known";
        return Err(ApiError::field("tools", message).code("unsupported"));
    };
    let forced: Option<Vec<&Value>> = match choice {
        None => None,
        Some(_) if is("auto") => None,
        Some(_) if is("required") => Some(descriptions.iter().collect()),
        Some(choice) => {
            let name = &choice["function"]["name"];
            let one = descriptions
                .iter()
                .find(|tool| tool["function"]["name"] == *name && name.is_string());
            let message = "it is neither none, auto, required nor {\"type\": \"function\", \"function\": {\"name\": …}} \
                of one of the tools";
            Some(vec![one.ok_or_else(|| ApiError::field("tool_choice", message))?])
        }
    };
    Ok(Offered {
        forced: forced.map(|tools| forms::call(model, format, &tools)).transpose()?,
        descriptions: Some(Variable::List(descriptions.iter().map(Variable::from).collect())),
        tools: Some(Tools {
            format,
            names,
            many: own.parallel_tool_calls.unwrap_or(true),
        }),
    })
}

/// Token ids of a conversation.
pub fn prompt_of(model: &Model, messages: Value) -> Result<Vec<u32>, ApiError> {
    let messages: Vec<Turn> = serde_path_to_error::deserialize(messages).map_err(|error| {
        let path = format!("messages{}", error.path());
        ApiError::field(&path, error.into_inner())
    })?;
    prompt(model, messages, Variable::None)
}

fn prompt(model: &Model, messages: Vec<Turn>, tools: Variable) -> Result<Vec<u32>, ApiError> {
    let tokenizer = tokenizer(model)?;
    let messages: Vec<Variable> = messages
        .into_iter()
        .enumerate()
        .map(|(i, turn)| turn.message(i))
        .collect::<Result<_, _>>()?;
    let text = chat::render_turns(tokenizer, messages, tools);
    let text = text.map_err(|error| ApiError::field("messages", error))?;
    tokenizer.encode(&text, false).map_err(|error| ApiError::of(&error))
}

/// The tokenizer, if required.
pub fn tokenizer(model: &Model) -> Result<&Tokenizer, ApiError> {
    model.tokenizer.as_deref().ok_or_else(|| {
        ApiError::bad(format!(
            "the package of {:?} has no tokenizer: only /v1/completions with token ids is possible",
            model.name
        ))
    })
}

impl Turn {
    /// In the templates' form.
    fn message(self, number: usize) -> Result<Variable, ApiError> {
        let wrong = |what: String| ApiError::field(&format!("messages[{number}]"), what);
        let role = match &self.role[..] {
            "system" | "user" | "assistant" | "tool" => self.role,
            // OpenAI's later name of it.
            "developer" => "system".to_string(),
            role => {
                return Err(wrong(format!(
                    "unknown role {role:?}; the roles are system, user, assistant and tool"
                )));
            }
        };
        let calls = self.tool_calls.unwrap_or_default();
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
            Content::Nothing if !calls.is_empty() => String::new(),
            Content::Nothing => return Err(wrong("the message has no content".to_string())),
        };
        let text = |text: String| Variable::Text(text);
        let mut message = vec![("role".to_string(), text(role)), ("content".to_string(), text(content))];
        if !calls.is_empty() {
            let calls = calls.iter().map(|call| Variable::from(&with_arguments(call)));
            message.push(("tool_calls".to_string(), Variable::List(calls.collect())));
        }
        let names = [("tool_call_id", self.tool_call_id), ("name", self.name)];
        for (name, value) in names {
            message.extend(value.map(|value| (name.to_string(), text(value))));
        }
        Ok(Variable::Dict(message))
    }
}

/// A call of an earlier turn, with its arguments in the templates' form: an object, not its text.
fn with_arguments(call: &Value) -> Value {
    let mut call = call.clone();
    let arguments = &call["function"]["arguments"];
    let parsed = arguments
        .as_str()
        .and_then(|text| serde_json::from_str::<Value>(text).ok());
    if let Some(parsed) = parsed.filter(Value::is_object) {
        call["function"]["arguments"] = parsed;
    }
    call
}
