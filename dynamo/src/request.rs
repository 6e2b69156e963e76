//! Translates Dynamo's requests to Lapidary's types. The frontend checks neither the context length nor a worker's
//! features: [`read`] refuses by name every unsupported field that would change the tokens.

use std::collections::BTreeSet;

use dynamo_backend_common::{DynamoError, GuidedDecodingOptions, PreprocessedRequest, SamplingOptions, StopConditions};
use lapidary::decode::Limits;
use lapidary::sample::{Constraint, ConstraintError, Settings};
use lapidary::serve::{Form, FormError, Grammars};
use lapidary::text::Tokenizer;

use crate::errors::invalid;

/// Maximum log-probabilities besides the chosen token's, as in OpenAI's protocol.
const MOST_LOGPROBS: u32 = 20;

/// A package's defaults for requests.
pub struct Model {
    /// The default sampling.
    pub defaults: Settings,
    /// Tokens that end a text.
    pub eos_ids: BTreeSet<u32>,
    /// Slots of the longest sequence.
    pub capacity: usize,
    /// For structured output.
    pub grammars: Result<Grammars, String>,
}

impl Model {
    /// The defaults of a package, for a decoder with this vocabulary and maximum of slots.
    pub fn new(
        tokenizer: &Tokenizer,
        eos_ids: BTreeSet<u32>,
        vocabulary: usize,
        capacity: usize,
    ) -> Result<Model, DynamoError> {
        let mut defaults = Settings::default();
        let errors = defaults.take_generation_config(&tokenizer.generation);
        if let Some(error) = errors.into_iter().find(|error| defaults.uses(error.parameter)) {
            let (name, value, wanted) = (error.parameter, error.value, error.wanted);
            return Err(invalid(format!(
                "generation_config.json: {name} is {value}, not {wanted}"
            )));
        }
        // After a move to another worker, a text continues with the random numbers that it would have drawn.
        defaults.by_position = true;
        Ok(Model {
            defaults,
            grammars: Grammars::new(tokenizer, vocabulary, &eos_ids),
            eos_ids,
            capacity,
        })
    }
}

/// What a request asks for.
pub struct Asked {
    /// Token ids of the prompt.
    pub prompt: Vec<u32>,
    /// Sampling.
    pub sampling: Settings,
    /// Conditions to stop.
    pub limits: Limits,
    /// Constraint on the text.
    pub constraint: Option<Box<dyn Constraint>>,
}

/// Reads a request.
pub fn read(request: &PreprocessedRequest, model: &Model) -> Result<Asked, DynamoError> {
    refuse_unsupported(request)?;
    let prompt = request.token_ids.to_vec();
    let room = match model.capacity.checked_sub(prompt.len()) {
        Some(room) if room > 0 => room,
        _ => {
            return Err(invalid(format!(
                "the prompt has {} tokens, and the longest text {}, the answer included",
                prompt.len(),
                model.capacity
            )));
        }
    };
    let stops = &request.stop_conditions;
    let eos_ids = end_tokens(stops, model);
    let limits = Limits {
        max_new_tokens: stops.max_tokens.map_or(room, |n| (n as usize).min(room)),
        // The frontend handles stop strings.
        stop: Vec::new(),
        logprobs: logprobs(request.output_options.logprobs)?,
        eos_ids,
    };
    if limits.max_new_tokens == 0 {
        return Err(invalid("max_tokens: 0 is not a number of at least 1"));
    }
    Ok(Asked {
        constraint: constraint(request, model, &limits.eos_ids)?,
        sampling: sampling(&request.sampling_options, model)?,
        prompt,
        limits,
    })
}

/// Refuses everything that would otherwise be ignored silently.
fn refuse_unsupported(request: &PreprocessedRequest) -> Result<(), DynamoError> {
    let (sampling, stops) = (&request.sampling_options, &request.stop_conditions);
    let refused = [
        (
            "n",
            sampling.n.is_some_and(|n| n != 1),
            "a worker gives one choice; send the request several times",
        ),
        (
            "best_of",
            sampling.best_of.is_some_and(|n| n != 1),
            "a worker gives one choice",
        ),
        (
            "use_beam_search",
            sampling.use_beam_search == Some(true),
            "there is no beam search",
        ),
        (
            "length_penalty",
            sampling.length_penalty.is_some_and(|penalty| penalty != 1.0),
            "there is no beam search",
        ),
        (
            "max_thinking_tokens",
            stops.max_thinking_tokens.is_some(),
            "a limit on thinking is not supported",
        ),
        (
            "prompt_logprobs",
            request.output_options.prompt_logprobs.is_some(),
            "log-probabilities of the prompt are not supported",
        ),
        (
            "prompt_embeds",
            request.prompt_embeds.is_some(),
            "prompts are token ids",
        ),
        (
            "multi_modal_data",
            request.multi_modal_data.as_ref().is_some_and(|data| !data.is_empty()),
            "the model takes only text",
        ),
        (
            "encoder_result",
            request.encoder_result.is_some(),
            "the model takes only text",
        ),
        (
            "prefill_result",
            request.prefill_result.is_some() || request.bootstrap_info.is_some(),
            "prompts are computed where tokens are",
        ),
    ];
    match refused.into_iter().find(|(_, is_asked, _)| *is_asked) {
        Some((name, _, why)) => Err(invalid(format!("{name}: {why}"))),
        None => Ok(()),
    }
}

/// Tokens that end the text: the model's, unless the request ignores them, and the request's own.
fn end_tokens(stops: &StopConditions, model: &Model) -> BTreeSet<u32> {
    let mut end = match stops.ignore_eos.unwrap_or(false) {
        true => BTreeSet::new(),
        false => model.eos_ids.clone(),
    };
    let lists = [
        &stops.stop_token_ids,
        &stops.stop_token_ids_visible,
        &stops.stop_token_ids_hidden,
    ];
    if !stops.ignore_eos.unwrap_or(false) {
        end.extend(lists.into_iter().flatten().flatten());
    }
    end
}

fn logprobs(asked: Option<u32>) -> Result<Option<usize>, DynamoError> {
    match asked {
        Some(n) if n > MOST_LOGPROBS => Err(invalid(format!(
            "top_logprobs: {n} is not a number from 0 to {MOST_LOGPROBS}"
        ))),
        asked => Ok(asked.map(|n| n as usize)),
    }
}

/// The model's defaults, overridden by the request.
fn sampling(asked: &SamplingOptions, model: &Model) -> Result<Settings, DynamoError> {
    let mut s = model.defaults.clone();
    for (value, place) in [
        (asked.temperature, &mut s.temperature),
        (asked.top_p, &mut s.top_p),
        (asked.min_p, &mut s.min_p),
        (asked.repetition_penalty, &mut s.repetition_penalty),
        (asked.frequency_penalty, &mut s.frequency_penalty),
        (asked.presence_penalty, &mut s.presence_penalty),
    ] {
        *place = value.unwrap_or(*place);
    }
    // Values of at most 0 mean off.
    s.top_k = asked.top_k.map_or(s.top_k, |k| usize::try_from(k).unwrap_or(0));
    s.seed = match asked.seed.filter(|seed| *seed != -1) {
        Some(seed) => seed as u64,
        None => fresh_seed(),
    };
    s.check().map_err(|error| {
        let (name, value, wanted) = (error.parameter, error.value, error.wanted);
        invalid(format!("{name}: {value} is not {wanted}"))
    })?;
    Ok(s)
}

/// The form of the text, and its minimum length.
fn constraint(
    request: &PreprocessedRequest,
    model: &Model,
    end: &BTreeSet<u32>,
) -> Result<Option<Box<dyn Constraint>>, DynamoError> {
    let form = request
        .sampling_options
        .guided_decoding
        .as_ref()
        .map(form)
        .transpose()?
        .flatten();
    let least = request.stop_conditions.min_tokens.unwrap_or(0) as usize;
    let Some((name, form)) = form else {
        let least = (least > 0 && !end.is_empty()).then(|| AtLeast {
            left: least,
            end: end.clone(),
        });
        return Ok(least.map(|constraint| Box::new(constraint) as Box<dyn Constraint>));
    };
    if least > 0 {
        return Err(invalid(format!(
            "min_tokens: a text of a certain form ({name}) ends where it is complete"
        )));
    }
    let grammars = model.grammars.as_ref().map_err(|why| {
        invalid(format!(
            "{name}: the model's tokens cannot be used for a grammar: {why}"
        ))
    })?;
    let limited = grammars
        .follow(form)
        .map_err(|error: FormError| invalid(format!("{name}: {error}")))?;
    Ok(Some(Box::new(limited)))
}

/// The one requested form, with its field.
fn form(asked: &GuidedDecodingOptions) -> Result<Option<(&'static str, Form)>, DynamoError> {
    if asked.structural_tag.is_some() {
        return Err(invalid(
            "structural_tag: not supported; use guided_json or guided_grammar",
        ));
    }
    if asked.whitespace_pattern.is_some() {
        return Err(invalid(
            "guided_whitespace_pattern: not supported; use the schema's x-guidance key",
        ));
    }
    let json = asked.json.clone().map(|schema| match schema {
        // A schema may also be given as a string.
        serde_json::Value::String(text) => serde_json::from_str(&text)
            .map_err(|error| invalid(format!("guided_json: the schema is not JSON: {error}"))),
        schema => Ok(schema),
    });
    let json = json.transpose()?;
    let choice = asked.choice.clone().filter(|texts| !texts.is_empty());
    let forms = [
        json.map(|schema| ("guided_json", Form::Schema(schema))),
        asked
            .regex
            .clone()
            .map(|pattern| ("guided_regex", Form::Regex(pattern))),
        choice.map(|texts| ("guided_choice", Form::Choice(texts))),
        asked
            .grammar
            .clone()
            .map(|text| ("guided_grammar", Form::grammar(text))),
    ];
    let mut forms = forms.into_iter().flatten();
    let first = forms.next();
    match (&first, forms.next()) {
        (Some((one, _)), Some((other, _))) => Err(invalid(format!("{other}: there is {one} already"))),
        _ => Ok(first),
    }
}

/// No end token before this many others.
struct AtLeast {
    left: usize,
    end: BTreeSet<u32>,
}

impl Constraint for AtLeast {
    fn limit(&mut self, logits: &mut [f32]) -> Result<(), ConstraintError> {
        if self.left > 0 {
            for id in &self.end {
                if let Some(logit) = logits.get_mut(*id as usize) {
                    *logit = f32::NEG_INFINITY;
                }
            }
        }
        Ok(())
    }

    fn accept(&mut self, _token: u32) -> Result<bool, ConstraintError> {
        self.left = self.left.saturating_sub(1);
        Ok(false)
    }
}

/// Different for every request.
fn fresh_seed() -> u64 {
    use std::hash::{BuildHasher, RandomState};
    RandomState::new().hash_one(std::process::id()) >> 11
}
