//! `/v1/completions`: continues text or token ids.

use std::sync::Arc;

use super::Limits as ServerLimits;
use super::error::ApiError;
use super::fields::{self, fields};
use super::forms;
use super::model::Model;
use super::reply::Asked;
use super::shapes::Shape;

/// OpenAI's default number of tokens.
const DEFAULT_TOKENS: usize = 16;

#[derive(serde::Deserialize)]
#[serde(untagged)]
pub enum Prompt {
    Text(String),
    Texts(Vec<String>),
    Ids(Vec<u32>),
    ManyIds(Vec<Vec<u32>>),
}

fields! {
    Own {
        prompt: Prompt,
        logprobs: usize,
        echo: bool,
        best_of: usize,
        suffix: String,
    }
}

/// The fields of a body.
pub fn parse(
    find: impl Fn(Option<&str>) -> Result<Arc<Model>, ApiError>,
    limits: &ServerLimits,
    body: &[u8],
) -> Result<Asked, ApiError> {
    let (mut common, own) = fields::read::<Own>(body, Own::NAMES)?;
    let model = find(common.model.as_deref())?;
    let n = common.choices(limits.choices)?;
    if own.best_of.is_some_and(|best| best != n) {
        return Err(ApiError::field("best_of", "only as many as n are possible").code("unsupported"));
    }
    if own.suffix.is_some_and(|suffix| !suffix.is_empty()) {
        return Err(ApiError::field("suffix", "text is continued, and not filled in").code("unsupported"));
    }
    let echoes = own.echo.unwrap_or(false);
    if echoes && own.logprobs.is_some() {
        let why = "with logprobs it would take those of the prompt, which are not computed";
        return Err(ApiError::field("echo", why).code("unsupported"));
    }
    let Some(prompt) = own.prompt else {
        return Err(ApiError::field("prompt", "there is none"));
    };
    let (prompts, texts) = prompts(&model, prompt)?;
    if prompts.is_empty() {
        return Err(ApiError::field("prompt", "it is empty"));
    }
    if prompts.len() * n > limits.choices {
        let (count, most) = (prompts.len(), limits.choices);
        return Err(ApiError::field(
            "prompt",
            format!("{count} prompts of {n} choices; {most} together are possible"),
        ));
    }
    prompts.iter().try_for_each(|prompt| limits.check_prompt(prompt))?;
    let echo = match echoes {
        true => texts,
        false => Vec::new(),
    };
    Ok(Asked {
        n,
        limits: common.limits(&model, ("max_tokens", None), DEFAULT_TOKENS, ("logprobs", own.logprobs))?,
        sampling: common.settings(&model)?,
        constraint: forms::of(&mut common, &model)?,
        streams: common.streams(),
        includes_usage: common.includes_usage(),
        token_ids: common.return_token_ids.unwrap_or(false),
        prompts,
        shape: Shape::Completion {
            echo,
            logprobs: own.logprobs.is_some(),
        },
        logs: false,
        timeout: limits.timeout,
        model,
    })
}

/// Token ids of each prompt, and its text.
fn prompts(model: &Model, prompt: Prompt) -> Result<(Vec<Vec<u32>>, Vec<String>), ApiError> {
    let decoded = |ids: &Vec<u32>| match &model.tokenizer {
        None => Ok(String::new()),
        Some(tokenizer) => tokenizer.decode(ids).map_err(|error| ApiError::of(&error)),
    };
    let all = match prompt {
        Prompt::Ids(ids) => vec![ids],
        Prompt::ManyIds(all) => all,
        Prompt::Text(text) => return encoded(model, vec![text]),
        Prompt::Texts(texts) => return encoded(model, texts),
    };
    let texts = all.iter().map(decoded).collect::<Result<_, _>>()?;
    Ok((all, texts))
}

fn encoded(model: &Model, texts: Vec<String>) -> Result<(Vec<Vec<u32>>, Vec<String>), ApiError> {
    let tokenizer = super::chat::tokenizer(model)?;
    let encode = |text: &String| tokenizer.encode(text, true).map_err(|error| ApiError::of(&error));
    let all = texts.iter().map(encode).collect::<Result<_, _>>()?;
    Ok((all, texts))
}
