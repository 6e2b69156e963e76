//! The forms that requests specify in their fields, and the form of a tool call.

use serde_json::{Value, json};

use super::error::ApiError;
use super::fields::Common;
use super::model::Model;
use crate::serve::grammar::WHITE_SPACE;
use crate::serve::{Form, Limited};
use crate::text::tools::{CallPart, ToolFormat};

/// The requested form, if any.
pub fn of(common: &mut Common, model: &Model) -> Result<Option<Limited>, ApiError> {
    let format = common.response_format.take();
    let from_format = match &format {
        None => None,
        Some(format) => match format["type"].as_str() {
            Some("text") => None,
            // With a schema it is llama.cpp's way to ask for that schema.
            Some("json_object") => Some(format.get("schema").map_or(json!({"type": "object"}), Value::clone)),
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
    let asked: Vec<(&str, Form)> = [
        from_format.map(|schema| ("response_format", Form::Schema(schema))),
        common
            .json_schema
            .take()
            .map(|schema| ("json_schema", Form::Schema(schema))),
        common.grammar.take().map(|text| ("grammar", Form::grammar(text))),
    ]
    .into_iter()
    .flatten()
    .collect();
    let mut asked = asked.into_iter();
    let Some((name, form)) = asked.next() else {
        return Ok(None);
    };
    if let Some((other, _)) = asked.next() {
        return Err(ApiError::field(other, format!("there is {name} already")));
    }
    let grammars = model.grammars().map_err(|message| {
        let message = format!("the model's tokens cannot be used for a grammar: {message}");
        ApiError::new(axum::http::StatusCode::INTERNAL_SERVER_ERROR, message)
    })?;
    let limited = grammars.follow(form);
    limited
        .map(Some)
        .map_err(|error| ApiError::field(name, error).code("invalid_schema"))
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
    let form = Form::Lark(format!("start: {}", parts.join(" ")));
    let grammars = model.grammars().map_err(failed)?;
    grammars.follow(form).map_err(|error| failed(error.to_string()))
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
