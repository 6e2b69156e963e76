//! The common fields of chat and completions, with OpenAI's names, and llama.cpp's for the rest of the chain.

use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use serde::de::DeserializeOwned;
use serde_json::{Map, Value};

use super::error::ApiError;
use super::model::Model;
use crate::decode::Limits;
use crate::sample::{MirostatSettings, Settings, Stage};

/// A struct of optional fields, with the list of their names.
macro_rules! fields {
    ($(#[$meta:meta])* $name:ident { $( $field:ident: $type:ty, )* }) => {
        $(#[$meta])*
        #[derive(serde::Deserialize)]
        pub struct $name {
            $( #[serde(default)] pub $field: Option<$type>, )*
        }
        impl $name {
            pub const NAMES: &'static [&'static str] = &[$( stringify!($field) ),*];
        }
    };
}
pub(super) use fields;

/// One value or several.
#[derive(serde::Deserialize)]
#[serde(untagged)]
pub enum OneOrMore<T> {
    One(T),
    More(Vec<T>),
}

impl<T> OneOrMore<T> {
    pub fn into_vec(self) -> Vec<T> {
        match self {
            OneOrMore::One(one) => vec![one],
            OneOrMore::More(more) => more,
        }
    }
}

#[derive(serde::Deserialize, Default)]
#[serde(default, deny_unknown_fields)]
pub struct StreamOptions {
    pub include_usage: bool,
    /// Random padding against eavesdropping; ignored.
    #[serde(rename = "include_obfuscation")]
    _include_obfuscation: bool,
}

fields! {
    /// See the module's head.
    Common {
        model: String,
        n: usize,
        stream: bool,
        stream_options: StreamOptions,
        max_tokens: usize,
        n_predict: i64,
        stop: OneOrMore<String>,
        ignore_eos: bool,
        return_token_ids: bool,
        seed: i64,
        temperature: f32,
        top_k: i64,
        top_p: f32,
        min_p: f32,
        typical_p: f32,
        top_n_sigma: f32,
        xtc_probability: f32,
        xtc_threshold: f32,
        repeat_penalty: f32,
        repetition_penalty: f32,
        repeat_last_n: i64,
        frequency_penalty: f32,
        presence_penalty: f32,
        dry_multiplier: f32,
        dry_base: f32,
        dry_allowed_length: usize,
        dry_penalty_last_n: i64,
        dry_sequence_breakers: Vec<String>,
        mirostat: u32,
        mirostat_tau: f32,
        mirostat_eta: f32,
        samplers: Vec<String>,
        logit_bias: Value,
        response_format: Value,
        json_schema: Value,
        grammar: String,
    }
}

/// Fields that clients send but that have no effect here.
const IGNORED: [&str; 7] = [
    "cache_prompt",
    "metadata",
    "prompt_cache_key",
    "safety_identifier",
    "service_tier",
    "store",
    "user",
];

/// Maximum number of DRY breakers: each needs a pass over the vocabulary.
const MOST_BREAKERS: usize = 64;

/// Maximum number of stop strings and of their bytes: every character of an answer is compared with each.
const MOST_STOPS: (usize, usize) = (64, 8192);

/// Maximum number of most probable tokens with log-probabilities.
const MOST_LOGPROBS: usize = 20;

/// The object of a body.
pub fn object(body: &[u8]) -> Result<Map<String, Value>, ApiError> {
    match serde_json::from_slice(body) {
        Ok(Value::Object(object)) => Ok(object),
        Ok(_) => Err(ApiError::bad("the body is JSON, but no object")),
        Err(error) => Err(ApiError::bad(format!("the body is not JSON: {error}"))),
    }
}

/// The fields of a body: the common ones, and others. Unknown fields are refused by name.
pub fn read<T: DeserializeOwned>(body: &[u8], names: &[&str]) -> Result<(Common, T), ApiError> {
    let (mut common, mut own) = (Map::new(), Map::new());
    for (name, value) in object(body)? {
        match &name[..] {
            known if Common::NAMES.contains(&known) => drop(common.insert(name, value)),
            known if names.contains(&known) => drop(own.insert(name, value)),
            known if IGNORED.contains(&known) => {}
            _ => return Err(ApiError::field(&name, "unknown field").code("unknown_field")),
        }
    }
    Ok((of_object(common)?, of_object(own)?))
}

/// Parses an object; errors name the invalid field.
pub fn of_object<T: DeserializeOwned>(object: Map<String, Value>) -> Result<T, ApiError> {
    serde_path_to_error::deserialize(Value::Object(object)).map_err(|error| {
        let path = error.path().to_string();
        ApiError::field(&path, error.into_inner())
    })
}

impl Common {
    /// Number of choices per prompt.
    pub fn choices(&self, most: usize) -> Result<usize, ApiError> {
        match self.n.unwrap_or(1) {
            n if (1..=most).contains(&n) => Ok(n),
            n => Err(ApiError::field("n", format!("{n} is not a number from 1 to {most}"))),
        }
    }

    pub fn streams(&self) -> bool {
        self.stream.unwrap_or(false)
    }

    pub fn includes_usage(&self) -> bool {
        self.stream_options
            .as_ref()
            .is_some_and(|options| options.include_usage)
    }

    /// When to end. `max_tokens` and `logprobs` are the endpoint's own fields with their names; `default` applies if no field
    /// limits the tokens.
    pub fn limits(
        &mut self,
        model: &Model,
        max_tokens: (&str, Option<usize>),
        default: usize,
        logprobs: (&str, Option<usize>),
    ) -> Result<Limits, ApiError> {
        let predicted = match self.n_predict {
            None => None,
            // No limit except the context.
            Some(-1) => Some(usize::MAX),
            Some(n) => Some(usize::try_from(n).map_err(|_| ApiError::field("n_predict", format!("{n} is below 0")))?),
        };
        let asked = [max_tokens, ("max_tokens", self.max_tokens), ("n_predict", predicted)];
        let asked = asked.into_iter().find_map(|(name, tokens)| Some((name, tokens?)));
        if let Some((name, 0)) = asked {
            return Err(ApiError::field(name, "0 is not a number of at least 1"));
        }
        if let (name, Some(n)) = logprobs
            && n > MOST_LOGPROBS
        {
            let why = format!("{n} is not a number from 0 to {MOST_LOGPROBS}");
            return Err(ApiError::field(name, why));
        }
        let stop: Vec<String> = self.stop.take().map_or(Vec::new(), OneOrMore::into_vec);
        let (most, bytes) = MOST_STOPS;
        if stop.len() > most || stop.iter().map(String::len).sum::<usize>() > bytes {
            let why = format!("more than {most} strings, or more than {bytes} bytes of them");
            return Err(ApiError::field("stop", why));
        }
        Ok(Limits {
            max_new_tokens: asked.map_or(default, |(_, tokens)| tokens),
            eos_ids: match self.ignore_eos.unwrap_or(false) {
                true => Default::default(),
                false => model.eos_ids.clone(),
            },
            stop: stop.into_iter().filter(|text| !text.is_empty()).collect(),
            logprobs: logprobs.1,
        })
    }

    /// How tokens are drawn: the model's defaults, then the request's settings.
    pub fn settings(&mut self, model: &Model) -> Result<Settings, ApiError> {
        let mut s = model.defaults.clone();
        for (field, place) in [
            (self.temperature, &mut s.temperature),
            (self.top_p, &mut s.top_p),
            (self.min_p, &mut s.min_p),
            (self.typical_p, &mut s.typical_p),
            (self.top_n_sigma, &mut s.top_n_sigma),
            (self.xtc_probability, &mut s.xtc_probability),
            (self.xtc_threshold, &mut s.xtc_threshold),
            (
                self.repetition_penalty.or(self.repeat_penalty),
                &mut s.repetition_penalty,
            ),
            (self.frequency_penalty, &mut s.frequency_penalty),
            (self.presence_penalty, &mut s.presence_penalty),
            (self.dry_multiplier, &mut s.dry.multiplier),
            (self.dry_base, &mut s.dry.base),
        ] {
            *place = field.unwrap_or(*place);
        }
        // As in llama.cpp and vLLM, values not above 0 mean off.
        s.top_k = self.top_k.map_or(s.top_k, |k| usize::try_from(k).unwrap_or(0));
        if let Some(n) = self.repeat_last_n {
            s.penalty_last_n = last_n("repeat_last_n", n)?;
        }
        if let Some(n) = self.dry_penalty_last_n {
            s.dry.penalty_last_n = last_n("dry_penalty_last_n", n)?;
        }
        s.dry.allowed_length = self.dry_allowed_length.unwrap_or(s.dry.allowed_length);
        let (tau, eta) = (self.mirostat_tau, self.mirostat_eta);
        match self.mirostat {
            None => {}
            Some(0) => s.mirostat = None,
            Some(2) => drop(s.mirostat.get_or_insert_with(MirostatSettings::default)),
            Some(n) => return Err(ApiError::field("mirostat", format!("{n} is neither 0 nor 2"))),
        }
        if let Some(mirostat) = &mut s.mirostat {
            mirostat.tau = tau.unwrap_or(mirostat.tau);
            mirostat.eta = eta.unwrap_or(mirostat.eta);
        }
        if let Some(names) = &self.samplers {
            s.order = names.iter().map(|name| stage(name)).collect::<Result<_, _>>()?;
        }
        if let Some(bias) = &self.logit_bias {
            s.logit_bias = logit_bias(bias, model.scheduler.facts().vocabulary)?;
        }
        // As in llama.cpp, -1 is a random seed.
        s.seed = match self.seed.filter(|seed| *seed != -1) {
            Some(seed) => seed as u64,
            None => model.seed.unwrap_or_else(fresh_seed),
        };
        s.check().map_err(|error| ApiError::from(&error))?;
        if s.dry.is_on() {
            self.set_breakers(model, &mut s)?;
        }
        Ok(s)
    }

    fn set_breakers(&self, model: &Model, s: &mut Settings) -> Result<(), ApiError> {
        let name = "dry_sequence_breakers";
        match (&self.dry_sequence_breakers, &model.tokenizer) {
            // Those of a flag are already set.
            (None, _) if model.defaults.dry.is_on() => {}
            (None, _) => s.dry.breakers = model.default_breakers().map_err(|error| ApiError::of(&error))?,
            (Some(_), None) => return Err(ApiError::field(name, "the package has no tokenizer")),
            (Some(own), _) if own.len() > MOST_BREAKERS => {
                return Err(ApiError::field(name, format!("more than {MOST_BREAKERS} strings")));
            }
            (Some(own), Some(tokenizer)) => {
                let (breakers, without_tokens) = tokenizer.breakers(own).map_err(|error| ApiError::of(&error))?;
                if let Some(text) = without_tokens.first() {
                    let why = format!("no token of this tokenizer contains or begins {text:?}");
                    return Err(ApiError::field(name, why));
                }
                s.dry.breakers = Arc::new(breakers);
            }
        }
        Ok(())
    }
}

/// -1: everything.
fn last_n(name: &str, n: i64) -> Result<Option<usize>, ApiError> {
    match n {
        -1 => Ok(None),
        n => usize::try_from(n)
            .map(Some)
            .map_err(|_| ApiError::field(name, format!("{n} is neither -1 nor a number of 0 or more"))),
    }
}

/// By Lapidary's name or llama.cpp's.
fn stage(name: &str) -> Result<Stage, ApiError> {
    let ours = match name {
        "typ_p" | "typical_p" => "typical".to_string(),
        name => name.replace('_', "-"),
    };
    Stage::from_name(&ours).ok_or_else(|| {
        let names: Vec<&str> = Stage::ORDER.iter().map(|s| s.name()).collect();
        ApiError::field(
            "samplers",
            format!("unknown sampler {name:?}; the samplers are {}", names.join(", ")),
        )
    })
}

/// OpenAI's object of ids, or llama.cpp's list of pairs, in which `false` bans a token.
fn logit_bias(value: &Value, vocabulary: usize) -> Result<Vec<(u32, f32)>, ApiError> {
    let wrong = |what: &dyn std::fmt::Display| ApiError::field("logit_bias", what);
    let bias = |bias: &Value| match bias {
        Value::Bool(false) => Some(f32::NEG_INFINITY),
        bias => bias.as_f64().map(|bias| bias as f32),
    };
    let id = |id: &Value| match id {
        Value::String(text) => text.trim().parse().ok(),
        id => id.as_u64().and_then(|id| u32::try_from(id).ok()),
    };
    let pairs: Vec<(Value, &Value)> = match value {
        Value::Object(object) => object.iter().map(|(id, bias)| (id.as_str().into(), bias)).collect(),
        Value::Array(list) => {
            let pair = |pair: &'_ Value| match pair.as_array().map(Vec::as_slice) {
                Some([_, _]) => Ok(()),
                _ => Err(wrong(&format!("{pair} is not a pair of a token id and a number"))),
            };
            list.iter().try_for_each(pair)?;
            list.iter().map(|pair| (pair[0].clone(), &pair[1])).collect()
        }
        other => return Err(wrong(&format!("{other} is not an object of token ids and numbers"))),
    };
    let mut found = Vec::with_capacity(pairs.len());
    for (token, value) in pairs {
        match (id(&token), bias(value)) {
            (Some(id), Some(bias)) if (id as usize) < vocabulary => found.push((id, bias)),
            (Some(id), Some(_)) => {
                return Err(wrong(&format!(
                    "{id}: the model has the token ids 0 to {}",
                    vocabulary - 1
                )));
            }
            _ => return Err(wrong(&format!("{token}: {value} is not a number for a token id"))),
        }
    }
    Ok(found)
}

/// Different for every request.
fn fresh_seed() -> u64 {
    use std::hash::{BuildHasher, RandomState};
    RandomState::new().hash_one(std::process::id()) >> 11
}

/// A unique id of a reply.
pub fn fresh_id(prefix: &str) -> String {
    use std::hash::{BuildHasher, RandomState};
    let [a, b] = [0, 1].map(|i| RandomState::new().hash_one(i));
    format!("{prefix}-{a:016x}{:08x}", b as u32)
}

/// Seconds since 1970.
pub fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs())
}
