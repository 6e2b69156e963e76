//! Structured output: JSON schemas and grammars, followed by llguidance.

use std::collections::BTreeSet;
use std::sync::Arc;

use llguidance::api::TopLevelGrammar;
use llguidance::toktrie::{ApproximateTokEnv, TokEnv, TokRxInfo, TokTrie};
use llguidance::{Matcher, ParserFactory};
use serde_json::{Value, json};

use super::error::ApiError;
use super::fields::Common;
use super::model::Model;
use crate::sample::{Constraint, ConstraintError};
use crate::text::Tokenizer;
use crate::text::tools::{CallPart, ToolFormat};

/// What a model's tokens are, for grammars; made once a model, when first asked for.
pub struct Grammars {
    factory: ParserFactory,
    end: BTreeSet<u32>,
}

/// White space between the parts of JSON: some, and not so much that a model goes on with it to its end.
const WHITE_SPACE: &str = r"[\x20\x0A\x0D\x09]{1,24}";

impl Grammars {
    /// Of a model with so many tokens, which these end.
    pub fn new(tokenizer: &Tokenizer, vocabulary: usize, end: &BTreeSet<u32>) -> Result<Self, String> {
        let bytes = tokenizer.token_bytes();
        let word = |id: usize| {
            let bytes = bytes.get(id).map_or(&[][..], Vec::as_slice);
            // Special tokens are none of the text.
            match !bytes.is_empty() && tokenizer.is_special(id as u32) {
                true => [&[TokTrie::SPECIAL_TOKEN_MARKER], bytes].concat(),
                false => bytes.to_vec(),
            }
        };
        let mut words: Vec<Vec<u8>> = (0..vocabulary).map(word).collect();
        let first = end.iter().copied().find(|id| (*id as usize) < vocabulary);
        // A model that no token ends gets one that it cannot draw.
        let first = first.unwrap_or_else(|| {
            words.push([&[TokTrie::SPECIAL_TOKEN_MARKER], &b"<end>"[..]].concat());
            vocabulary as u32
        });
        let trie = TokTrie::from(&TokRxInfo::new(words.len() as u32, first), &words);
        let tokens: TokEnv = Arc::new(ApproximateTokEnv::new(trie));
        let mut factory = ParserFactory::new_simple(&tokens).map_err(|error| error.to_string())?;
        factory.quiet();
        factory.limits_mut().verbose_errors = false;
        let mut end = end.clone();
        end.insert(first);
        Ok(Grammars { factory, end })
    }

    fn follow(&self, grammar: TopLevelGrammar) -> Result<Limited, String> {
        let parser = self
            .factory
            .create_parser(grammar)
            .map_err(|error| format!("{error:#}"))?;
        let matcher = Matcher::new(Ok(parser));
        match matcher.get_error() {
            Some(error) => Err(error),
            None => Ok(Limited {
                matcher,
                end: self.end.clone(),
            }),
        }
    }
}

/// A text of a certain form, as far as it is written.
pub struct Limited {
    matcher: Matcher,
    /// Tokens that end a text: allowed where the form is complete.
    end: BTreeSet<u32>,
}

impl Limited {
    /// The same for another text.
    pub fn again(&self) -> Self {
        Limited {
            matcher: self.matcher.deep_clone(),
            end: self.end.clone(),
        }
    }
}

impl Constraint for Limited {
    fn limit(&mut self, logits: &mut [f32]) -> Result<(), ConstraintError> {
        let mask = self.matcher.compute_mask_or_eos();
        let mask = mask.map_err(|error| ConstraintError(error.to_string()))?;
        let may_end = self.end.iter().any(|id| mask.is_allowed(*id));
        for (id, logit) in logits.iter_mut().enumerate() {
            let id = id as u32;
            let allowed = match self.end.contains(&id) {
                true => may_end,
                false => (id as usize) < mask.len() && mask.is_allowed(id),
            };
            if !allowed {
                *logit = f32::NEG_INFINITY;
            }
        }
        Ok(())
    }

    fn accept(&mut self, token: u32) -> Result<bool, ConstraintError> {
        if self.end.contains(&token) {
            return Ok(true);
        }
        let taken = self.matcher.consume_token(token);
        taken.map_err(|error| ConstraintError(error.to_string()))?;
        Ok(self.matcher.is_stopped())
    }
}

/// The form that a request asks for, if any.
pub fn of(common: &mut Common, model: &Model) -> Result<Option<Limited>, ApiError> {
    let format = common.response_format.take();
    let from_format = match &format {
        None => None,
        Some(format) => match format["type"].as_str() {
            Some("text") => None,
            Some("json_object") => Some(json!({"type": "object"})),
            Some("json_schema") => match format["json_schema"].get("schema") {
                Some(schema) => Some(schema.clone()),
                None => return Err(ApiError::field("response_format", "json_schema has no schema")),
            },
            _ => {
                let message = format!("its type is {}, not text, json_object or json_schema", format["type"]);
                return Err(ApiError::field("response_format", message));
            }
        },
    };
    let asked: Vec<(&str, TopLevelGrammar)> = [
        from_format.map(|schema| ("response_format", of_schema(schema))),
        common
            .json_schema
            .take()
            .map(|schema| ("json_schema", of_schema(schema))),
        common
            .grammar
            .take()
            .map(|text| ("grammar", TopLevelGrammar::from_lark(text))),
    ]
    .into_iter()
    .flatten()
    .collect();
    let Some((name, grammar)) = asked.first() else {
        return Ok(None);
    };
    if let Some((other, _)) = asked.get(1) {
        return Err(ApiError::field(other, format!("there is {name} already")));
    }
    if let Some(text) = &grammar.grammars[0].lark_grammar
        && text.contains("::=")
    {
        let message = "GBNF is not read; write the grammar in Lark's form, as llguidance takes it";
        return Err(ApiError::field(name, message).code("unsupported"));
    }
    let grammars = model.grammars().map_err(|message| {
        let message = format!("the model's tokens cannot be used for a grammar: {message}");
        ApiError::new(axum::http::StatusCode::INTERNAL_SERVER_ERROR, message)
    })?;
    let limited = grammars.follow(grammar.clone());
    limited
        .map(Some)
        .map_err(|message| ApiError::field(name, format!("it cannot be followed: {message}")).code("invalid_schema"))
}

/// The form of one call of one of these tools, which are descriptions of functions.
pub fn call(model: &Model, format: ToolFormat, tools: &[&Value]) -> Result<Limited, ApiError> {
    let failed = |message: String| {
        let message = format!("the call cannot be followed: {message}");
        ApiError::field("tool_choice", message).code("invalid_schema")
    };
    let tokenizer = super::chat::tokenizer(model)?;
    let mut parts = Vec::new();
    for part in format.one_call(tokenizer) {
        parts.push(match part {
            CallPart::Token(id) => format!("<[{id}]>"),
            CallPart::Text(text) => Value::from(text).to_string(),
            CallPart::Line => "/\\n?/".to_string(),
            CallPart::Object(arguments) => format!("%json {}", call_schema(arguments, tools).map_err(failed)?),
        });
    }
    let grammar = TopLevelGrammar::from_lark(format!("start: {}", parts.join(" ")));
    let grammars = model.grammars().map_err(failed)?;
    grammars.follow(grammar).map_err(failed)
}

/// Any of these calls. Definitions of parameters move to the top, where references to them look.
fn call_schema(arguments: &str, tools: &[&Value]) -> Result<Value, String> {
    let mut calls = Vec::new();
    let mut definitions = serde_json::Map::new();
    for tool in tools {
        let function = &tool["function"];
        let mut parameters = match &function["parameters"] {
            Value::Null => json!({"type": "object", "additionalProperties": false}),
            given => given.clone(),
        };
        let own = parameters.as_object_mut().and_then(|object| object.remove("$defs"));
        for (name, definition) in own.as_ref().and_then(Value::as_object).into_iter().flatten() {
            match definitions.insert(name.clone(), definition.clone()) {
                Some(other) if other != *definition => return Err(format!("two tools define {name:?} in their $defs")),
                _ => {}
            }
        }
        calls.push(json!({
            "type": "object",
            "properties": {"name": {"const": function["name"]}, arguments: parameters},
            "required": ["name", arguments],
            "additionalProperties": false,
        }));
    }
    Ok(json!({"anyOf": calls, "$defs": definitions, "x-guidance": {"whitespace_pattern": WHITE_SPACE}}))
}

fn of_schema(mut schema: Value) -> TopLevelGrammar {
    if let Some(object) = schema.as_object_mut() {
        let own = || json!({"whitespace_pattern": WHITE_SPACE});
        object.entry("x-guidance").or_insert_with(own);
    }
    TopLevelGrammar::from_json_schema(schema)
}
