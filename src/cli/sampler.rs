//! The sampler flags, the same for every command that draws tokens.

use std::path::Path;
use std::sync::Arc;

use super::Failure;
use crate::package::Package;
use crate::sample::{Breakers, DEFAULT_BREAKERS, MirostatSettings, Settings, SettingsError, Stage};
use crate::text::{FILES, Tokenizer, escapes};

/// Overrides of [`Settings`]. Ranges are checked by [`Settings::check`], once everything is together.
#[derive(clap::Args, Default)]
#[command(next_help_heading = "Sampling (a flag overrides generation_config.json, which overrides the default)")]
pub struct SamplerArgs {
    /// Temperature; 0: greedy [default: 0.8]
    #[arg(long, value_name = "T", allow_hyphen_values = true)]
    pub temperature: Option<f32>,
    /// Keep the K most probable tokens; 0: off [default: 40]
    #[arg(long, value_name = "K", allow_hyphen_values = true)]
    pub top_k: Option<i64>,
    /// Keep the most probable tokens whose probabilities sum to P; 1: off [default: 0.95]
    #[arg(long, value_name = "P", allow_hyphen_values = true)]
    pub top_p: Option<f32>,
    /// Keep tokens at least P times as probable as the most probable; 0: off [default: 0.05]
    #[arg(long, value_name = "P", allow_hyphen_values = true)]
    pub min_p: Option<f32>,
    /// Keep the most typical tokens whose probabilities sum to P; 1: off [default: 1]
    #[arg(long, value_name = "P", allow_hyphen_values = true)]
    pub typical_p: Option<f32>,
    /// Keep logits within N standard deviations of the largest; 0: off [default: 0]
    #[arg(long, value_name = "N", allow_hyphen_values = true)]
    pub top_n_sigma: Option<f32>,
    /// Probability that XTC removes the top choices; 0: off [default: 0]
    #[arg(long, value_name = "P", allow_hyphen_values = true)]
    pub xtc_probability: Option<f32>,
    /// Probability from which a token is a top choice for XTC; above 0.5: off [default: 0.1]
    #[arg(long, value_name = "P", allow_hyphen_values = true)]
    pub xtc_threshold: Option<f32>,
    /// Divide positive logits of seen tokens by R, multiply negative ones; 1: off [default: 1]
    #[arg(long, value_name = "R", allow_hyphen_values = true)]
    pub repetition_penalty: Option<f32>,
    /// Subtract F from a logit for each time the token was seen [default: 0]
    #[arg(long, value_name = "F", allow_hyphen_values = true)]
    pub frequency_penalty: Option<f32>,
    /// Subtract F from the logit of each seen token [default: 0]
    #[arg(long, value_name = "F", allow_hyphen_values = true)]
    pub presence_penalty: Option<f32>,
    /// Number of last tokens that the penalties consider; 0: off, -1: all [default: 64]
    #[arg(long, value_name = "N", allow_hyphen_values = true)]
    pub penalty_last_n: Option<i64>,
    /// Strength of DRY, which penalizes repeating earlier text; 0: off, 0.8 is common [default: 0]
    #[arg(long, value_name = "M", allow_hyphen_values = true)]
    pub dry_multiplier: Option<f32>,
    /// Factor by which the DRY penalty grows per repeated token [default: 1.75]
    #[arg(long, value_name = "B", allow_hyphen_values = true)]
    pub dry_base: Option<f32>,
    /// Shortest repetition that DRY penalizes, in tokens [default: 2]
    #[arg(long, value_name = "N")]
    pub dry_allowed_length: Option<u32>,
    /// Number of last tokens that DRY considers; 0: off, -1: all [default: -1]
    #[arg(long, value_name = "N", allow_hyphen_values = true)]
    pub dry_penalty_last_n: Option<i64>,
    /// Text that breaks a repetition for DRY, with escapes such as \\n; repeatable, `none` clears
    /// [default: newline, colon, double quote and asterisk]
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true)]
    pub dry_sequence_breaker: Vec<String>,
    /// Add B to the logit of a token; repeatable, -inf bans it
    #[arg(long, value_name = "ID=B", value_parser = logit_bias)]
    pub logit_bias: Vec<(u32, f32)>,
    /// 2: use Mirostat 2 instead of the truncating samplers
    #[arg(long, value_name = "0|2", value_parser = clap::builder::PossibleValuesParser::new(["0", "2"]))]
    pub mirostat: Option<String>,
    /// Target surprise of Mirostat, in bits [default: 5]
    #[arg(long, value_name = "BITS", allow_hyphen_values = true)]
    pub mirostat_tau: Option<f32>,
    /// Learning rate of Mirostat [default: 0.1]
    #[arg(long, value_name = "R", allow_hyphen_values = true)]
    pub mirostat_eta: Option<f32>,
    /// Samplers in order; those not listed are off
    /// [default: penalties,dry,top-n-sigma,top-k,typical,top-p,min-p,xtc,temperature]
    #[arg(long, value_name = "NAME,NAME", value_delimiter = ',', value_parser = stage)]
    pub samplers: Option<Vec<Stage>>,
    /// Seed; the same seed, settings and package give the same tokens; -1: random [default: -1]
    #[arg(long, value_name = "N", allow_hyphen_values = true, value_parser = seed)]
    pub seed: Option<u64>,
    /// Do not interpret escapes in --stop and --dry-sequence-breaker
    #[arg(long)]
    pub no_escape: bool,
}

/// As in llama.cpp, -1 is a random seed.
fn seed(text: &str) -> Result<u64, String> {
    match text.trim() {
        "-1" => Ok(fresh_seed()),
        number => number
            .parse()
            .map_err(|_| "not a whole number of 0 or more, or -1 for a random seed".to_string()),
    }
}

fn logit_bias(text: &str) -> Result<(u32, f32), String> {
    let wanted = || format!("{text:?} is not ID=B, a token id and a number, such as 42=-1.5");
    let (id, bias) = text.split_once('=').ok_or_else(wanted)?;
    let id = id.trim().parse().map_err(|_| wanted())?;
    Ok((id, bias.trim().parse().map_err(|_| wanted())?))
}

fn stage(name: &str) -> Result<Stage, String> {
    Stage::from_name(&name.trim().replace('_', "-")).ok_or_else(|| {
        let names: Vec<&str> = Stage::ORDER.iter().map(|s| s.name()).collect();
        format!("unknown sampler {name:?}; the samplers are {}", names.join(", "))
    })
}

/// -1: all tokens.
fn last_n(flag: &str, n: i64) -> Result<Option<usize>, Failure> {
    match n {
        -1 => Ok(None),
        n => usize::try_from(n).map(Some).map_err(|_| {
            Failure::input(format!("--{flag}: {n} is not a number of tokens")).help("use 0 for off, -1 for all tokens")
        }),
    }
}

impl SamplerArgs {
    /// The usual defaults, then the model's settings, then the flags; a new seed if none is given.
    pub fn settings(
        &self,
        package: &Path,
        tokenizer: Option<&Tokenizer>,
        vocabulary: usize,
    ) -> Result<Settings, Failure> {
        let mut settings = Settings {
            seed: fresh_seed(),
            ..Settings::default()
        };
        let errors = tokenizer.map(|tokenizer| settings.take_generation_config(&tokenizer.generation));
        self.apply(&mut settings)?;
        // Values that a flag overrides or that have no effect may be invalid.
        let matters = |e: &SettingsError| !self.overrides(e.parameter) && settings.uses(e.parameter);
        if let Some(e) = errors.into_iter().flatten().find(matters) {
            let file = package.join(crate::package::TOKENIZER).join(FILES[5]);
            let (name, value, wanted) = (e.parameter, &e.value, e.wanted);
            let flag = match name {
                "do_sample" => "temperature".to_string(),
                _ => e.flag(),
            };
            return Err(
                Failure::input(format!("{}: {name} is {value}, not {wanted}", file.display())).help(format!(
                    "override it with --{flag}, or correct the model's file and convert again"
                )),
            );
        }
        if settings.dry.is_on() {
            settings.dry.breakers = Arc::new(self.breakers(tokenizer)?);
        }
        if let Some((id, bias)) = settings.logit_bias.iter().find(|(id, _)| *id as usize >= vocabulary) {
            return Err(Failure::input(format!(
                "--logit-bias {id}={bias}: the model's token ids are 0 to {}",
                vocabulary - 1
            )));
        }
        Ok(settings)
    }

    /// For measurements: greedy unless flags say otherwise, and the same seed each time. The model's
    /// `generation_config.json` is ignored.
    pub fn measuring(&self, package: &Package) -> Result<Settings, Failure> {
        let mut settings = Settings {
            temperature: 0.0,
            ..Settings::neutral()
        };
        self.apply(&mut settings)?;
        if settings.dry.is_on() {
            settings.dry.breakers = Arc::new(self.breakers(package.tokenizer()?.as_ref())?);
        }
        if self.seed.is_none() {
            settings.seed = 0;
        }
        Ok(settings)
    }

    /// Whether a flag overrides the field of `generation_config.json`.
    fn overrides(&self, parameter: &str) -> bool {
        match parameter {
            "temperature" | "do_sample" => self.temperature.is_some(),
            "top_k" => self.top_k.is_some(),
            "top_p" => self.top_p.is_some(),
            "min_p" => self.min_p.is_some(),
            "typical_p" => self.typical_p.is_some(),
            "repetition_penalty" => self.repetition_penalty.is_some(),
            _ => false,
        }
    }

    /// Only the flags, without breakers, which need a tokenizer. Everything is checked.
    pub fn apply(&self, settings: &mut Settings) -> Result<(), Failure> {
        let s = settings;
        for (flag, place) in [
            (self.temperature, &mut s.temperature),
            (self.top_p, &mut s.top_p),
            (self.min_p, &mut s.min_p),
            (self.typical_p, &mut s.typical_p),
            (self.top_n_sigma, &mut s.top_n_sigma),
            (self.xtc_probability, &mut s.xtc_probability),
            (self.xtc_threshold, &mut s.xtc_threshold),
            (self.repetition_penalty, &mut s.repetition_penalty),
            (self.frequency_penalty, &mut s.frequency_penalty),
            (self.presence_penalty, &mut s.presence_penalty),
            (self.dry_multiplier, &mut s.dry.multiplier),
            (self.dry_base, &mut s.dry.base),
        ] {
            *place = flag.unwrap_or(*place);
        }
        match self.top_k {
            None => {}
            Some(k @ -1..) => s.top_k = usize::try_from(k).unwrap_or(0),
            Some(k) => return Err(Failure::input(format!("--top-k: {k} is not a number of 0 or more"))),
        }
        if let Some(n) = self.penalty_last_n {
            s.penalty_last_n = last_n("penalty-last-n", n)?;
        }
        if let Some(n) = self.dry_penalty_last_n {
            s.dry.penalty_last_n = last_n("dry-penalty-last-n", n)?;
        }
        if let Some(n) = self.dry_allowed_length {
            s.dry.allowed_length = n as usize;
        }
        let mirostat = MirostatSettings::default();
        let mirostat = MirostatSettings {
            tau: self.mirostat_tau.unwrap_or(mirostat.tau),
            eta: self.mirostat_eta.unwrap_or(mirostat.eta),
        };
        // Checked even if unused, so that mistakes are reported.
        s.mirostat = Some(mirostat);
        s.logit_bias.clone_from(&self.logit_bias);
        if let Some(order) = &self.samplers {
            s.order.clone_from(order);
        }
        s.seed = self.seed.unwrap_or(s.seed);
        s.check()?;
        if self.mirostat.as_deref() != Some("2") {
            s.mirostat = None;
        }
        Ok(())
    }

    /// Texts of a flag with their escapes replaced, unless `--no-escape` is given.
    pub fn texts(&self, flag: &str, given: &[String]) -> Result<Vec<String>, Failure> {
        if self.no_escape {
            return Ok(given.to_vec());
        }
        let unescaped = given.iter().map(|text| escapes::unescape(text));
        unescaped.collect::<Result<_, _>>().map_err(|error| {
            Failure::input(format!("{flag}: {error}")).help("give the bytes of whole characters, or use --no-escape")
        })
    }

    /// The requested breaker strings, or the default ones, over the tokenizer's vocabulary.
    pub fn breakers(&self, tokenizer: Option<&Tokenizer>) -> Result<Breakers, Failure> {
        let asked = &self.dry_sequence_breaker;
        let after_none = asked.iter().rposition(|b| b == "none").map_or(0, |at| at + 1);
        let own = &self.texts("--dry-sequence-breaker", &asked[after_none..])?[..];
        let Some(tokenizer) = tokenizer else {
            return match own {
                // With token ids only, the default strings have no meaning.
                [] => Ok(Breakers::default()),
                [first, ..] => Err(Failure::input(format!(
                    "--dry-sequence-breaker {first:?} needs a tokenizer, and the package has none"
                ))
                .help("convert the model again with --tokenizer FILE_OR_DIR")),
            };
        };
        if asked.is_empty() {
            // A default that the tokenizer cannot produce is skipped.
            return Ok(tokenizer.breakers(&DEFAULT_BREAKERS)?.0);
        }
        let (breakers, without_tokens) = tokenizer.breakers(own)?;
        match without_tokens.first() {
            None => Ok(breakers),
            Some(text) => Err(Failure::input(format!(
                "--dry-sequence-breaker {text:?}: no token of this tokenizer contains or begins it"
            ))
            .help("remove it, or use `none` for no breakers")),
        }
    }
}

/// Different in every run. Small enough to be exact in JSON readers that use doubles.
fn fresh_seed() -> u64 {
    use std::hash::{BuildHasher, RandomState};
    RandomState::new().hash_one(std::process::id()) >> 11
}
