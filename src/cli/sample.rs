//! `lapidary sample`: shows the effect of a sampler chain on one distribution.

use std::path::PathBuf;
use std::sync::Arc;

use serde::Serialize;

use super::sampler::SamplerArgs;
use super::table::Table;
use super::{Failure, JsonForm, print, print_json};
use crate::sample::{Breakers, Chain, Settings};
use crate::text::Tokenizer;

/// Everything is off unless a flag enables it; the temperature is 1 and the seed 0.
#[derive(clap::Args)]
#[command(group = clap::ArgGroup::new("distribution").required(true).multiple(false))]
pub struct Args {
    /// Probabilities by token id; they need not sum to 1
    #[arg(
        long,
        value_name = "CSV",
        group = "distribution",
        value_delimiter = ',',
        allow_hyphen_values = true
    )]
    probs: Option<Vec<f64>>,
    /// Logits by token id
    #[arg(
        long,
        value_name = "CSV",
        group = "distribution",
        value_delimiter = ',',
        allow_hyphen_values = true
    )]
    logits: Option<Vec<f32>>,
    /// Previous token ids, prompt included
    #[arg(long, value_name = "CSV", value_delimiter = ',')]
    history: Vec<u32>,
    /// Token ids of one DRY sequence breaker (repeatable)
    #[arg(long, value_name = "CSV")]
    dry_breaker_ids: Vec<String>,
    /// tokenizer.json or its folder, for --dry-sequence-breaker
    #[arg(long, value_name = "FILE_OR_DIR")]
    tokenizer: Option<PathBuf>,
    /// Print one JSON document
    #[arg(long, value_enum, value_name = "FORM", num_args = 0..=1, require_equals = true, default_missing_value = "pretty")]
    json: Option<JsonForm>,
    #[command(flatten)]
    sampler: SamplerArgs,
}

#[derive(Serialize)]
struct Document {
    /// By token id, after the chain; 0 for dropped tokens.
    probs: Vec<f64>,
    /// Ids and probabilities of the remaining tokens, most probable first.
    candidates: Vec<(usize, f64)>,
    /// A draw from them.
    token: u32,
    seed: u64,
}

pub fn run(args: Args) -> Result<(), Failure> {
    let mut settings = Settings::neutral();
    args.sampler.apply(&mut settings)?;
    settings.dry.breakers = Arc::new(breakers(&args)?);
    let logits = logits(&args)?;
    // A mistyped token id would have no effect, without an error.
    if let Some((id, bias)) = settings.logit_bias.iter().find(|(id, _)| *id as usize >= logits.len()) {
        return Err(Failure::input(format!(
            "--logit-bias {id}={bias}: the distribution has the token ids 0 to {}",
            logits.len() - 1
        )));
    }
    let bad = |e| {
        Failure::input(format!(
            "{}: {e}",
            if args.probs.is_some() { "--probs" } else { "--logits" }
        ))
    };
    let probs = Chain::new(&settings)?
        .probabilities(&logits, &args.history)
        .map_err(bad)?;
    let token = Chain::new(&settings)?.sample(&logits, &args.history).map_err(bad)?;
    let mut candidates: Vec<(usize, f64)> = probs.iter().copied().enumerate().filter(|(_, p)| *p > 0.0).collect();
    candidates.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
    if let Some(form) = args.json {
        let seed = settings.seed;
        return print_json(
            &Document {
                probs,
                candidates,
                token,
                seed,
            },
            form,
        );
    }
    let mut table = Table::new(["token", "probability"]);
    for (id, p) in candidates {
        table.row([id.to_string(), format!("{p:.6}")]);
    }
    print(&format!(
        "{}drawn with seed {}: {token}\n",
        table.render(),
        settings.seed
    ))
}

fn logits(args: &Args) -> Result<Vec<f32>, Failure> {
    let Some(probs) = &args.probs else {
        return Ok(args.logits.clone().expect("clap asks for one of the group"));
    };
    match probs.iter().find(|p| !(p.is_finite() && **p >= 0.0)) {
        Some(bad) => Err(Failure::input(format!("--probs: {bad} is not a probability"))),
        None => Ok(probs.iter().map(|p| p.ln() as f32).collect()),
    }
}

fn breakers(args: &Args) -> Result<Breakers, Failure> {
    let sequences: Vec<Vec<u32>> = args
        .dry_breaker_ids
        .iter()
        .map(|csv| ids(csv))
        .collect::<Result<_, _>>()?;
    let Some(path) = &args.tokenizer else {
        args.sampler
            .breakers(None)
            .map_err(|e| e.help("give one with --tokenizer, or ids with --dry-breaker-ids"))?;
        return Ok(Breakers::from_ids(sequences));
    };
    let mut breakers = args.sampler.breakers(Some(&Tokenizer::open(path)?))?;
    for sequence in sequences {
        breakers.add_ids(&sequence);
    }
    Ok(breakers)
}

fn ids(csv: &str) -> Result<Vec<u32>, Failure> {
    let bad = || {
        Failure::input(format!("--dry-breaker-ids: {csv:?} is not a list of token ids"))
            .help("give the ids of one breaker, for example --dry-breaker-ids 3 or --dry-breaker-ids 12,7")
    };
    csv.split(',').map(|id| id.trim().parse().map_err(|_| bad())).collect()
}
