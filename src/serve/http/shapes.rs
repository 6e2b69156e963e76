//! The JSON of answers: chat and completions, complete and in pieces.

use serde_json::{Value, json};

use super::fields::fresh_id;
use crate::decode::{FinishReason, Step};
use crate::text::Tokenizer;
use crate::text::tools::{ToolCall, ToolFormat, ToolPart, ToolReader};

/// The kind of an answer.
pub enum Shape {
    /// `/v1/chat/completions`
    Chat {
        /// Whether log-probabilities were requested.
        logprobs: bool,
        /// Tools that may be called.
        tools: Option<Tools>,
    },
    /// `/v1/completions`
    Completion {
        /// For each prompt, the text before its choices.
        echo: Vec<String>,
        /// Whether log-probabilities were requested.
        logprobs: bool,
    },
}

/// Tools of a request.
pub struct Tools {
    /// How the model writes calls.
    pub format: ToolFormat,
    pub names: Vec<String>,
    /// Whether an answer may have several calls; otherwise those after the first are left out.
    pub many: bool,
}

/// The first fields of every document of an answer.
pub struct Head {
    pub id: String,
    pub created: u64,
    pub model: String,
}

impl Head {
    pub fn document(&self, object: &str, choices: Vec<Value>) -> Value {
        json!({
            "id": self.id,
            "object": object,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": concat!("lapidary-", env!("CARGO_PKG_VERSION")),
            "choices": choices,
        })
    }
}

/// A choice, or a piece of one.
#[derive(Default)]
pub struct Choice {
    pub text: String,
    pub tokens: Vec<u32>,
    pub steps: Vec<Step>,
    pub reason: Option<FinishReason>,
    /// Characters of the text up to the end of this.
    pub characters: usize,
    /// Calls of tools.
    pub calls: Vec<Value>,
    /// For each step, the offset of its token's text, in characters.
    pub offsets: Vec<usize>,
}

impl Choice {
    /// A call in choices and pieces.
    pub fn add_call(&mut self, call: ToolCall, number: usize) {
        self.calls.push(json!({
            "index": number,
            "id": fresh_id("call"),
            "type": "function",
            "function": {"name": call.name, "arguments": call.arguments},
        }));
    }

    /// A token with its log-probabilities.
    pub fn add_token(&mut self, token: Option<u32>, step: Option<Step>) {
        self.tokens.extend(token);
        self.offsets.extend(step.iter().map(|_| self.characters));
        self.steps.extend(step);
    }

    pub fn add_text(&mut self, text: &str) {
        self.text.push_str(text);
        self.characters += text.chars().count();
    }
}

/// The parser of calls in a choice, if there are tools; otherwise pieces are text.
pub struct Reader {
    calls: Option<ToolReader>,
    /// Calls that may still come.
    left: usize,
}

impl Reader {
    pub fn push(&mut self, token: Option<u32>, text: &str) -> Vec<ToolPart> {
        let parts = match &mut self.calls {
            Some(reader) => reader.push(token, text),
            None if text.is_empty() => Vec::new(),
            None => vec![ToolPart::Text(text.to_string())],
        };
        self.allowed(parts)
    }

    pub fn finish(&mut self) -> Vec<ToolPart> {
        let parts = self.calls.as_mut().map_or(Vec::new(), ToolReader::finish);
        self.allowed(parts)
    }

    fn allowed(&mut self, mut parts: Vec<ToolPart>) -> Vec<ToolPart> {
        parts.retain(|part| match part {
            ToolPart::Text(_) => true,
            ToolPart::Call(_) => {
                let may_come = self.left > 0;
                self.left = self.left.saturating_sub(1);
                may_come
            }
        });
        parts
    }
}

impl Shape {
    /// For one choice.
    pub fn reader(&self, tokenizer: Option<&Tokenizer>) -> Reader {
        match (self, tokenizer) {
            (Shape::Chat { tools: Some(tools), .. }, Some(tokenizer)) => Reader {
                calls: Some(ToolReader::new(tools.format, tools.names.clone(), tokenizer)),
                left: if tools.many { usize::MAX } else { 1 },
            },
            _ => Reader { calls: None, left: 0 },
        }
    }

    /// The prefix of ids.
    pub fn prefix(&self) -> &'static str {
        match self {
            Shape::Chat { .. } => "chatcmpl",
            Shape::Completion { .. } => "cmpl",
        }
    }

    pub fn object(&self) -> &'static str {
        match self {
            Shape::Chat { .. } => "chat.completion",
            Shape::Completion { .. } => "text_completion",
        }
    }

    pub fn chunk_object(&self) -> &'static str {
        match self {
            Shape::Chat { .. } => "chat.completion.chunk",
            Shape::Completion { .. } => "text_completion",
        }
    }

    /// A whole choice; `n` choices belong to each prompt.
    pub fn choice(&self, tokenizer: Option<&Tokenizer>, index: usize, n: usize, choice: &Choice) -> Value {
        let reason = choice.reason.map(|why| reason(why, !choice.calls.is_empty()));
        let logprobs = self.logprobs(tokenizer, choice);
        match self {
            Shape::Chat { .. } => {
                let mut message = json!({"role": "assistant", "content": choice.text, "refusal": null});
                if !choice.calls.is_empty() {
                    if choice.text.is_empty() {
                        message["content"] = Value::Null;
                    }
                    let mut calls = choice.calls.clone();
                    for call in &mut calls {
                        // Only pieces have numbers.
                        call.as_object_mut().expect("an object").remove("index");
                    }
                    message["tool_calls"] = Value::Array(calls);
                }
                json!({"index": index, "message": message, "logprobs": logprobs, "finish_reason": reason})
            }
            Shape::Completion { echo, .. } => {
                let echo = echo.get(index / n).map_or("", String::as_str);
                json!({
                    "index": index,
                    "text": format!("{echo}{}", choice.text),
                    "logprobs": logprobs,
                    "finish_reason": reason,
                })
            }
        }
    }

    /// The event before the first piece of a choice.
    pub fn opening(&self, index: usize, n: usize) -> Option<Value> {
        match self {
            Shape::Chat { .. } => {
                let delta = json!({"role": "assistant", "content": ""});
                Some(json!({"index": index, "delta": delta, "logprobs": null, "finish_reason": null}))
            }
            Shape::Completion { echo, .. } => {
                let echo = echo.get(index / n)?;
                Some(json!({"index": index, "text": echo, "logprobs": null, "finish_reason": null}))
            }
        }
    }

    pub fn piece(&self, tokenizer: Option<&Tokenizer>, index: usize, piece: &Choice) -> Value {
        let logprobs = self.logprobs(tokenizer, piece);
        match self {
            Shape::Chat { .. } => {
                let mut delta = json!({});
                if !piece.text.is_empty() || piece.calls.is_empty() {
                    delta["content"] = json!(piece.text);
                }
                if !piece.calls.is_empty() {
                    delta["tool_calls"] = json!(piece.calls);
                }
                json!({"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": null})
            }
            Shape::Completion { .. } => {
                json!({"index": index, "text": piece.text, "logprobs": logprobs, "finish_reason": null})
            }
        }
    }

    /// The event after the last piece of a choice.
    pub fn closing(&self, index: usize, why: FinishReason, has_calls: bool) -> Value {
        let why = reason(why, has_calls);
        match self {
            Shape::Chat { .. } => json!({"index": index, "delta": {}, "logprobs": null, "finish_reason": why}),
            Shape::Completion { .. } => json!({"index": index, "text": "", "logprobs": null, "finish_reason": why}),
        }
    }

    fn logprobs(&self, tokenizer: Option<&Tokenizer>, choice: &Choice) -> Value {
        let spelled = |id: u32| Spelled::new(tokenizer, id);
        match self {
            Shape::Chat { logprobs: true, .. } => {
                let entry = |id: u32, logprob: f64| {
                    let spelled = spelled(id);
                    json!({"token": spelled.text, "logprob": finite(logprob), "bytes": spelled.bytes})
                };
                let steps = choice.steps.iter().map(|step| {
                    let mut document = entry(step.token, step.logprob);
                    let top = step.top_logprobs.iter().map(|(id, logprob)| entry(*id, *logprob));
                    document["top_logprobs"] = top.collect();
                    document
                });
                json!({"content": steps.collect::<Vec<Value>>(), "refusal": null})
            }
            Shape::Completion { logprobs: true, .. } => {
                let steps = choice.steps.iter();
                let top = steps.clone().map(|step| -> Value {
                    let pairs = step.top_logprobs.iter();
                    let pairs = pairs.map(|(id, logprob)| (spelled(*id).text, json!(finite(*logprob))));
                    Value::Object(pairs.collect())
                });
                json!({
                    "tokens": steps.clone().map(|step| spelled(step.token).text).collect::<Vec<_>>(),
                    "token_logprobs": steps.map(|step| finite(step.logprob)).collect::<Vec<_>>(),
                    "top_logprobs": top.collect::<Vec<Value>>(),
                    "text_offset": choice.offsets,
                })
            }
            Shape::Chat { .. } | Shape::Completion { .. } => Value::Null,
        }
    }
}

/// A single token.
struct Spelled {
    text: String,
    bytes: Option<Vec<u8>>,
}

impl Spelled {
    fn new(tokenizer: Option<&Tokenizer>, id: u32) -> Self {
        let bytes = tokenizer.and_then(|tokenizer| tokenizer.token_bytes().get(id as usize));
        match bytes {
            Some(bytes) => Spelled {
                text: String::from_utf8_lossy(bytes).into_owned(),
                bytes: Some(bytes.clone()),
            },
            None => Spelled {
                text: format!("token_id:{id}"),
                bytes: None,
            },
        }
    }
}

/// JSON has no infinity: impossible tokens get the same value as in other servers.
fn finite(logprob: f64) -> f64 {
    logprob.max(-9999.0)
}

fn reason(reason: FinishReason, has_calls: bool) -> &'static str {
    match reason {
        FinishReason::Stop if has_calls => "tool_calls",
        FinishReason::Stop => "stop",
        FinishReason::Length | FinishReason::Capacity | FinishReason::Interrupted => "length",
    }
}
