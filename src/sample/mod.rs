//! From a row of logits to the next token: a chain of samplers, one a file, and a draw at its end.
//!
//! Takes the model's logits and the tokens so far, gives a token id. Each [`Sampler`] rewrites the candidate list
//! (changes logits, drops candidates) and knows nothing of the others; [`Chain::new`] is the one place that decides on
//! their order. `logprobs` reports the model's own distribution, before any sampler. Text, stop conditions and the
//! generation loop belong to `decode`.

mod draw;
pub mod logprobs;
mod temperature;

pub use draw::Draw;
pub use temperature::Temperature;

/// A token that may still be drawn, with its present logit (natural-log scale, not normalised).
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Candidate {
    pub id: u32,
    pub logit: f32,
}

/// One stage of the chain.
pub trait Sampler: Send {
    /// Rewrites the candidates, which come in the order of their ids or sorted by an earlier stage, and are never empty.
    /// At least one must be left. `history` is the prompt and every token generated so far.
    fn apply(&mut self, candidates: &mut Vec<Candidate>, history: &[u32]);
}

/// What the command line and `generation_config.json` can say about sampling.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Settings {
    /// Logits are divided by it. 0 is greedy.
    pub temperature: f32,
    pub seed: u64,
}

impl Settings {
    pub fn greedy() -> Self {
        Settings {
            temperature: 0.0,
            seed: 0,
        }
    }
}

/// Settings that make no sense.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum SettingsError {
    #[error("temperature {0} is not a number of 0 or more")]
    Temperature(f32),
}

/// The model gave no finite logit to draw from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("every logit is NaN or infinite")]
pub struct NothingToDraw;

/// Samplers in order, then a draw. The same settings and logits give the same tokens on every machine.
pub struct Chain {
    stages: Vec<Box<dyn Sampler>>,
    draw: Draw,
    candidates: Vec<Candidate>,
}

impl Chain {
    pub fn new(settings: &Settings) -> Result<Self, SettingsError> {
        let t = settings.temperature;
        if !(t.is_finite() && t >= 0.0) {
            return Err(SettingsError::Temperature(t));
        }
        let mut stages: Vec<Box<dyn Sampler>> = Vec::new();
        let draw = if t == 0.0 {
            Draw::greedy()
        } else {
            stages.push(Box::new(Temperature::new(t)));
            Draw::seeded(settings.seed)
        };
        Ok(Chain {
            stages,
            draw,
            candidates: Vec::new(),
        })
    }

    /// The next token, from `logits` `[vocabulary]` and the tokens so far.
    pub fn sample(&mut self, logits: &[f32], history: &[u32]) -> Result<u32, NothingToDraw> {
        self.candidates.clear();
        let finite = logits.iter().enumerate().filter(|(_, logit)| logit.is_finite());
        self.candidates.extend(finite.map(|(id, logit)| Candidate {
            id: id as u32,
            logit: *logit,
        }));
        if self.candidates.is_empty() {
            return Err(NothingToDraw);
        }
        for stage in &mut self.stages {
            stage.apply(&mut self.candidates, history);
        }
        Ok(self.draw.pick(&self.candidates))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn draws(settings: Settings, logits: &[f32], n: usize) -> Vec<u32> {
        let mut chain = Chain::new(&settings).unwrap();
        (0..n).map(|_| chain.sample(logits, &[]).unwrap()).collect()
    }

    #[test]
    fn greedy_takes_the_first_of_the_largest_and_passes_over_nan() {
        let mut chain = Chain::new(&Settings::greedy()).unwrap();
        assert_eq!(chain.sample(&[0.5, f32::NAN, 2.0, 2.0], &[]), Ok(2));
        assert_eq!(chain.sample(&[f32::NAN, f32::NEG_INFINITY], &[]), Err(NothingToDraw));
    }

    #[test]
    fn frequencies_follow_the_tempered_softmax() {
        // At temperature 2, logits 0 and 2 ln 3 are as 1 to 3.
        let settings = Settings {
            temperature: 2.0,
            seed: 7,
        };
        let tokens = draws(settings, &[0.0, 2.0 * 3f32.ln()], 20_000);
        let ones = tokens.iter().filter(|t| **t == 1).count() as f64 / 20_000.0;
        assert!((ones - 0.75).abs() < 0.01, "{ones}");
    }

    #[test]
    fn a_seed_decides_everything() {
        let logits: Vec<f32> = (0..100).map(|i| (i as f32 * 0.37).sin()).collect();
        let with = |seed| {
            let settings = Settings { temperature: 0.8, seed };
            draws(settings, &logits, 50)
        };
        assert_eq!(with(1), with(1));
        assert_ne!(with(1), with(2));
    }

    #[test]
    fn nonsense_is_refused() {
        for temperature in [-1.0, f32::NAN, f32::INFINITY] {
            assert!(Chain::new(&Settings { temperature, seed: 0 }).is_err());
        }
    }
}
