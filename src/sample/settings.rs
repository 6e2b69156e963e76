//! Sampling settings: from the command line, a model's `generation_config.json`, or a caller.

use super::dry::DrySettings;
use crate::help::Help;

/// A sampler whose position in the chain can be chosen. Logit bias always comes first, mirostat and the draw last.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Stage {
    /// Repetition, frequency and presence.
    Penalties,
    /// DRY, against repeated sequences.
    Dry,
    /// Logits within some standard deviations of the largest.
    TopNSigma,
    /// The `k` largest logits.
    TopK,
    /// Locally typical sampling.
    Typical,
    /// The most probable tokens up to a total probability.
    TopP,
    /// Tokens of at least a share of the largest probability.
    MinP,
    /// XTC: with some probability, drops all but the least probable of the likely tokens.
    Xtc,
    /// Divides logits.
    Temperature,
}

impl Stage {
    /// The documented order, which is llama.cpp's.
    pub const ORDER: [Stage; 9] = [
        Stage::Penalties,
        Stage::Dry,
        Stage::TopNSigma,
        Stage::TopK,
        Stage::Typical,
        Stage::TopP,
        Stage::MinP,
        Stage::Xtc,
        Stage::Temperature,
    ];

    /// Its name in `--samplers` and reports.
    pub fn name(self) -> &'static str {
        match self {
            Stage::Penalties => "penalties",
            Stage::Dry => "dry",
            Stage::TopNSigma => "top-n-sigma",
            Stage::TopK => "top-k",
            Stage::Typical => "typical",
            Stage::TopP => "top-p",
            Stage::MinP => "min-p",
            Stage::Xtc => "xtc",
            Stage::Temperature => "temperature",
        }
    }

    /// The stage with this [`Stage::name`].
    pub fn from_name(name: &str) -> Option<Stage> {
        Stage::ORDER.into_iter().find(|stage| stage.name() == name)
    }

    /// Whether it drops candidates by their probability, which mirostat does instead.
    pub(super) fn truncates(self) -> bool {
        !matches!(self, Stage::Penalties | Stage::Dry | Stage::Temperature)
    }
}

/// Mirostat 2.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct MirostatSettings {
    /// Target surprise, in bits.
    pub tau: f32,
    /// Learning rate.
    pub eta: f32,
}

impl Default for MirostatSettings {
    fn default() -> Self {
        MirostatSettings { tau: 5.0, eta: 0.1 }
    }
}

/// See the module's head. Numbers have llama.cpp's meaning.
#[derive(Clone, Debug, PartialEq)]
pub struct Settings {
    /// Samplers in order; those left out are off.
    pub order: Vec<Stage>,
    /// Added to the logits of these tokens; minus infinity bans one.
    pub logit_bias: Vec<(u32, f32)>,
    /// 1 is off.
    pub repetition_penalty: f32,
    /// 0 is off.
    pub frequency_penalty: f32,
    /// 0 is off.
    pub presence_penalty: f32,
    /// Number of last tokens for the three penalties; `None`: all.
    pub penalty_last_n: Option<usize>,
    /// See [`DrySettings`].
    pub dry: DrySettings,
    /// 0 is off.
    pub top_n_sigma: f32,
    /// 0 is off.
    pub top_k: usize,
    /// 1 is off.
    pub typical_p: f32,
    /// 1 is off.
    pub top_p: f32,
    /// 0 is off.
    pub min_p: f32,
    /// 0 is off.
    pub xtc_probability: f32,
    /// Above 0.5 is off.
    pub xtc_threshold: f32,
    /// Logits are divided by it. 0 is greedy.
    pub temperature: f32,
    /// Replaces the truncating samplers.
    pub mirostat: Option<MirostatSettings>,
    /// Seed of the draw and of XTC.
    pub seed: u64,
    /// The random numbers of a token follow from the seed and the token's position, not from how many were drawn:
    /// another run that continues a text, with its tokens so far as a prompt, gives the same result.
    pub by_position: bool,
}

/// Below this a temperature counts as 0: logits divided by it could leave the range of f32.
const COLDEST: f32 = 1e-6;

impl Default for Settings {
    /// Usual defaults without settings from model or user: top-k 40, top-p 0.95, min-p 0.05, temperature 0.8.
    fn default() -> Self {
        Settings {
            top_k: 40,
            top_p: 0.95,
            min_p: 0.05,
            temperature: 0.8,
            ..Settings::neutral()
        }
    }
}

impl Settings {
    /// Everything off: draws from the model's own distribution.
    pub fn neutral() -> Self {
        Settings {
            order: Stage::ORDER.to_vec(),
            logit_bias: Vec::new(),
            repetition_penalty: 1.0,
            frequency_penalty: 0.0,
            presence_penalty: 0.0,
            penalty_last_n: Some(64),
            dry: DrySettings::default(),
            top_n_sigma: 0.0,
            top_k: 0,
            typical_p: 1.0,
            top_p: 1.0,
            min_p: 0.0,
            xtc_probability: 0.0,
            xtc_threshold: 0.1,
            temperature: 1.0,
            mirostat: None,
            seed: 0,
            by_position: false,
        }
    }

    /// The most probable token, always.
    pub fn greedy() -> Self {
        Settings {
            temperature: 0.0,
            ..Settings::neutral()
        }
    }

    /// Whether decoding is greedy.
    pub fn is_greedy(&self) -> bool {
        self.temperature < COLDEST
    }

    /// Refuses invalid settings, naming the parameter.
    pub fn check(&self) -> Result<(), SettingsError> {
        let check = |parameter: &'static str, value: f32, good: bool, wanted: &'static str| match good {
            true => Ok(()),
            false => Err(SettingsError {
                parameter,
                value: value.to_string(),
                wanted,
            }),
        };
        let not_negative =
            |name, value: f32| check(name, value, value >= 0.0 && value.is_finite(), "a number of 0 or more");
        let above_zero = |name, value: f32| check(name, value, value > 0.0 && value.is_finite(), "a number above 0");
        let share = |name, value: f32| check(name, value, (0.0..=1.0).contains(&value), "a number from 0 to 1");
        above_zero("repetition_penalty", self.repetition_penalty)?;
        not_negative("frequency_penalty", self.frequency_penalty)?;
        not_negative("presence_penalty", self.presence_penalty)?;
        not_negative("dry_multiplier", self.dry.multiplier)?;
        not_negative("dry_base", self.dry.base)?;
        not_negative("top_n_sigma", self.top_n_sigma)?;
        share("typical_p", self.typical_p)?;
        share("top_p", self.top_p)?;
        share("min_p", self.min_p)?;
        share("xtc_probability", self.xtc_probability)?;
        share("xtc_threshold", self.xtc_threshold)?;
        not_negative("temperature", self.temperature)?;
        if let Some(mirostat) = &self.mirostat {
            above_zero("mirostat_tau", mirostat.tau)?;
            above_zero("mirostat_eta", mirostat.eta)?;
        }
        for (_, bias) in &self.logit_bias {
            let good = bias.is_finite() || *bias == f32::NEG_INFINITY;
            check("logit_bias", *bias, good, "a number, or -inf to ban the token")?;
        }
        let twice = (1..self.order.len()).find(|i| self.order[..*i].contains(&self.order[*i]));
        match twice {
            None => Ok(()),
            Some(i) => Err(SettingsError {
                parameter: "samplers",
                value: format!("{}, named twice,", self.order[i].name()),
                wanted: "a list of samplers, each once at most",
            }),
        }
    }

    /// Whether a sampler is in the chain.
    pub(super) fn has(&self, stage: Stage) -> bool {
        if self.mirostat.is_some() && stage.truncates() {
            return false;
        }
        match stage {
            Stage::Penalties => {
                let on = (self.repetition_penalty, self.frequency_penalty, self.presence_penalty) != (1.0, 0.0, 0.0);
                on && self.penalty_last_n != Some(0)
            }
            Stage::Dry => self.dry.is_on(),
            Stage::TopNSigma => self.top_n_sigma > 0.0,
            Stage::TopK => self.top_k > 0,
            Stage::Typical => self.typical_p < 1.0,
            Stage::TopP => self.top_p < 1.0,
            Stage::MinP => self.min_p > 0.0,
            Stage::Xtc => self.xtc_probability > 0.0 && self.xtc_threshold <= 0.5,
            Stage::Temperature => !self.is_greedy() && self.temperature != 1.0,
        }
    }
}

/// Invalid settings.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[error("--{}: {value} is not {wanted}", self.flag())]
pub struct SettingsError {
    /// As in `generation_config.json`, for example `top_p`.
    pub parameter: &'static str,
    /// The given value.
    pub value: String,
    /// The requirement.
    pub wanted: &'static str,
}

impl Help for SettingsError {}

impl SettingsError {
    /// The parameter's flag, without dashes before it.
    pub fn flag(&self) -> String {
        self.parameter.replace('_', "-")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_parameter_is_checked_and_named() {
        type Change = fn(&mut Settings, f32);
        let parameters: [(&str, &[f32], Change); 14] = [
            ("repetition-penalty", &[0.0, -1.0], |s, v| s.repetition_penalty = v),
            ("frequency-penalty", &[-0.5], |s, v| s.frequency_penalty = v),
            ("presence-penalty", &[-0.5], |s, v| s.presence_penalty = v),
            ("dry-multiplier", &[-0.8], |s, v| s.dry.multiplier = v),
            ("dry-base", &[-1.0], |s, v| s.dry.base = v),
            ("top-n-sigma", &[-1.0], |s, v| s.top_n_sigma = v),
            ("typical-p", &[-0.1, 1.1], |s, v| s.typical_p = v),
            ("top-p", &[-0.1, 1.1], |s, v| s.top_p = v),
            ("min-p", &[-0.1, 1.1], |s, v| s.min_p = v),
            ("xtc-probability", &[-0.1, 1.1], |s, v| s.xtc_probability = v),
            ("xtc-threshold", &[-0.1, 1.1], |s, v| s.xtc_threshold = v),
            ("temperature", &[-1.0], |s, v| s.temperature = v),
            ("mirostat-tau", &[0.0, -1.0], |s, v| {
                s.mirostat = Some(MirostatSettings { tau: v, eta: 0.1 })
            }),
            ("mirostat-eta", &[0.0, -1.0], |s, v| {
                s.mirostat = Some(MirostatSettings { tau: 5.0, eta: v })
            }),
        ];
        for (flag, bad, change) in parameters {
            for value in bad.iter().chain(&[f32::NAN, f32::INFINITY]) {
                let mut settings = Settings::default();
                change(&mut settings, *value);
                let error = settings.check().unwrap_err().to_string();
                assert!(
                    error.starts_with(&format!("--{flag}: {value} is not a number")),
                    "{error}"
                );
            }
        }
        let biased = |bias| Settings {
            logit_bias: vec![(0, bias)],
            ..Settings::default()
        };
        assert!(
            biased(f32::NAN)
                .check()
                .unwrap_err()
                .to_string()
                .starts_with("--logit-bias")
        );
        assert_eq!(biased(f32::NEG_INFINITY).check(), Ok(()));
        let twice = Settings {
            order: vec![Stage::TopK, Stage::Dry, Stage::TopK],
            ..Settings::default()
        };
        let error = twice.check().unwrap_err().to_string();
        assert_eq!(
            error,
            "--samplers: top-k, named twice, is not a list of samplers, each once at most"
        );
    }

    #[test]
    fn every_stage_has_a_name_and_mirostat_replaces_those_that_truncate() {
        for stage in Stage::ORDER {
            assert_eq!(Stage::from_name(stage.name()), Some(stage));
        }
        let mut settings = Settings::default();
        let on = |settings: &Settings| {
            Stage::ORDER
                .into_iter()
                .filter(|s| settings.has(*s))
                .collect::<Vec<_>>()
        };
        assert_eq!(
            on(&settings),
            [Stage::TopK, Stage::TopP, Stage::MinP, Stage::Temperature]
        );
        settings.mirostat = Some(MirostatSettings::default());
        assert_eq!(on(&settings), [Stage::Temperature]);
        assert_eq!(on(&Settings::neutral()), []);
    }
}
