//! From a row of logits to the next token: a chain of samplers, one per file, and a draw at its end.
//!
//! Input: the model's logits and the tokens so far. Output: a token id. Each [`Sampler`] rewrites the list of
//! [`Candidates`] (changes logits, drops candidates) and is independent of the others. [`Settings`] select samplers and
//! their order; [`Chain::new`] builds the chain. Samplers have llama.cpp's semantics, and its order is the default:
//! logit bias, penalties, DRY, top-n-sigma, top-k, typical, top-p, min-p, XTC, temperature, mirostat, draw. `logprobs`
//! reports the model's own distribution, before any sampler. A [`Constraint`] limits the tokens that may come. Text,
//! stop conditions and the generation loop belong to `decode`.

mod bias;
mod breakers;
mod candidates;
mod constraint;
mod draw;
mod dry;
mod generation_config;
pub mod logprobs;
mod min_p;
mod mirostat;
mod penalties;
mod settings;
pub(crate) mod softmax;
mod tally;
mod temperature;
mod top_k;
mod top_n_sigma;
mod top_p;
mod typical;
mod vectors;
mod xtc;

pub use breakers::Breakers;
pub use candidates::{Candidate, Candidates};
pub use constraint::{Constraint, ConstraintError};
pub use draw::{Draw, Drawn};
pub use dry::{Dry, DrySettings};
pub use settings::{MirostatSettings, Settings, SettingsError, Stage};

use crate::help::{Fault, Help};

/// Default strings at which DRY stops matching.
pub const DEFAULT_BREAKERS: [&str; 4] = ["\n", ":", "\"", "*"];

/// Sums of probabilities are compared with a limit that may be one of them: smaller differences count as equal.
const ROUNDING: f64 = 1e-6;

/// One stage of the chain.
pub trait Sampler: Send {
    /// Rewrites the candidates; at least one remains. `history` is the prompt and every token generated so far.
    fn apply(&mut self, candidates: &mut Candidates, history: &[u32]);

    /// Called after a draw with the probability that the drawn token had among the candidates.
    fn drawn(&mut self, _probability: f64) {}

    /// Resets state learned from draws.
    fn reset(&mut self) {}

    /// Moves to the random numbers of a position, if it has any.
    fn move_to(&mut self, _position: usize) {}
}

/// Logits from which nothing can be drawn.
#[derive(Clone, Copy, Debug, PartialEq, thiserror::Error)]
#[allow(missing_docs, reason = "the message says what the fields are")]
pub enum BadLogits {
    /// NaN or infinity.
    #[error("the logit of token {id} is {value}")]
    NotFinite { id: u32, value: f32 },
    /// Every logit is minus infinity.
    #[error("no token has a probability above zero")]
    Nothing,
}

impl Help for BadLogits {
    fn fault(&self) -> Fault {
        Fault::Machine
    }

    fn help(&self) -> Option<String> {
        Some(
            "the model's numbers overflowed; convert it with --dtype fp32 or bf16, and try `lapidary verify`"
                .to_string(),
        )
    }
}

/// A chain: samplers in order, then a draw. The same settings and logits give the same tokens on every machine.
pub struct Chain {
    stages: Vec<Box<dyn Sampler>>,
    draw: Draw,
    candidates: Candidates,
    weights: Vec<f32>,
    is_argmax: bool,
    by_position: bool,
}

impl Chain {
    /// The chain of these settings.
    pub fn new(settings: &Settings) -> Result<Self, SettingsError> {
        settings.check()?;
        let mut stages: Vec<Box<dyn Sampler>> = Vec::new();
        if !settings.logit_bias.is_empty() {
            stages.push(Box::new(bias::LogitBias::new(&settings.logit_bias)));
        }
        let on: Vec<Stage> = settings.order.iter().copied().filter(|s| settings.has(*s)).collect();
        let next = on.iter().copied().skip(1).map(Some).chain([None]);
        stages.extend(on.iter().zip(next).map(|(stage, next)| sampler(*stage, next, settings)));
        if let Some(m) = &settings.mirostat {
            stages.push(Box::new(mirostat::Mirostat::new(m.tau, m.eta)));
        }
        // These do not change the most probable token.
        let harmless = [Stage::TopNSigma, Stage::TopK, Stage::TopP, Stage::MinP];
        let is_argmax = settings.is_greedy()
            && settings.logit_bias.is_empty()
            && settings.mirostat.is_none()
            && on.iter().all(|stage| harmless.contains(stage));
        Ok(Chain {
            is_argmax,
            by_position: settings.by_position,
            stages,
            draw: match settings.is_greedy() {
                true => Draw::greedy(),
                false => Draw::seeded(settings.seed),
            },
            candidates: Candidates::default(),
            weights: Vec::new(),
        })
    }

    /// Whether the next token is always the one with the largest logit (the lowest id among equals), whatever the
    /// history: then a device can find it.
    pub fn is_argmax(&self) -> bool {
        self.is_argmax
    }

    /// The next token, from `logits` `[vocabulary]` and the tokens so far, prompt included.
    pub fn sample(&mut self, logits: &[f32], history: &[u32]) -> Result<u32, BadLogits> {
        if self.is_argmax {
            return candidates::best_of(logits);
        }
        self.apply(logits, history)?;
        let drawn = self.draw.pick(&self.candidates, &mut self.weights);
        for stage in &mut self.stages {
            stage.drawn(drawn.probability);
        }
        Ok(drawn.id)
    }

    /// The distribution of the draw: the probability of every token, `[vocabulary]`, 0 for dropped ones. Greedy gives
    /// the most probable token probability 1.
    pub fn probabilities(&mut self, logits: &[f32], history: &[u32]) -> Result<Vec<f64>, BadLogits> {
        self.apply(logits, history)?;
        let mut probabilities = vec![0.0; logits.len()];
        if let Draw::Greedy = self.draw {
            probabilities[self.candidates.best().id as usize] = 1.0;
            return Ok(probabilities);
        }
        let max = self.candidates.max();
        let weight = |c: &Candidate| f64::from(c.logit - max).exp();
        let total: f64 = self.candidates.iter().map(|c| weight(&c)).sum();
        for candidate in self.candidates.iter() {
            probabilities[candidate.id as usize] = weight(&candidate) / total;
        }
        Ok(probabilities)
    }

    /// Resets state that stages learned from draws, as before the first token. Random numbers continue.
    pub fn reset(&mut self) {
        for stage in &mut self.stages {
            stage.reset();
        }
    }

    fn apply(&mut self, logits: &[f32], history: &[u32]) -> Result<(), BadLogits> {
        self.candidates.fill(logits)?;
        if self.by_position {
            self.draw.move_to(history.len());
            self.stages.iter_mut().for_each(|stage| stage.move_to(history.len()));
        }
        for stage in &mut self.stages {
            stage.apply(&mut self.candidates, history);
        }
        Ok(())
    }
}

/// A stage of the chain; `next` comes right after it.
fn sampler(stage: Stage, next: Option<Stage>, s: &Settings) -> Box<dyn Sampler> {
    match stage {
        Stage::Penalties => Box::new(penalties::Penalties::new(
            s.repetition_penalty,
            s.frequency_penalty,
            s.presence_penalty,
            s.penalty_last_n,
        )),
        Stage::Dry => Box::new(Dry::new(s.dry.clone())),
        Stage::TopNSigma => {
            let at_most = (next == Some(Stage::TopK)).then_some(s.top_k);
            Box::new(top_n_sigma::TopNSigma::new(s.top_n_sigma, at_most))
        }
        Stage::TopK => Box::new(top_k::TopK::new(s.top_k)),
        Stage::Typical => Box::new(typical::Typical::new(s.typical_p)),
        Stage::TopP => Box::new(top_p::TopP::new(s.top_p)),
        Stage::MinP => Box::new(min_p::MinP::new(s.min_p)),
        Stage::Xtc => Box::new(xtc::Xtc::new(
            s.xtc_probability,
            s.xtc_threshold,
            draw::rng(s.seed, draw::XTC_STREAM),
        )),
        Stage::Temperature => Box::new(temperature::Temperature::new(s.temperature)),
    }
}

/// The last `last_n` tokens, or all.
fn window(history: &[u32], last_n: Option<usize>) -> &[u32] {
    let n = last_n.unwrap_or(history.len()).min(history.len());
    &history[history.len() - n..]
}

#[cfg(test)]
mod tests;
