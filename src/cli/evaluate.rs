//! `lapidary evaluate`: answers of a package to a task's prompts, scored against references.

use std::collections::BTreeSet;
use std::path::PathBuf;

use serde_json::{Map, json};

use super::device::Place;
use super::generate::{fitting, need};
use super::perplexity::{described, now, read};
use super::progress::Progress;
use super::sampler::SamplerArgs;
use super::table::Table;
use super::{Failure, JsonForm, print, print_json};
use crate::bench::quality::result::{Line, Model, TASK, Task, Threshold};
use crate::bench::quality::task::{self, Example, Metric, Scores};
use crate::decode::{self, Limits, Session};
use crate::package::Package;
use crate::sample::Chain;
use crate::text::{Message, Tokenizer, chat};

#[derive(clap::Args)]
pub struct Args {
    /// The package
    #[arg(value_name = "PKG")]
    package: PathBuf,
    /// Task, one JSON object per line: `{"prompt": TEXT, "reference": TEXT}`, optionally `"max_new_tokens": N` and `"id"`
    #[arg(long, value_name = "FILE")]
    task: PathBuf,
    /// Fail (exit status 1) if a metric is below VALUE: rouge1, rouge2, rougeL (mean F1) or exact_match, 0 to 1
    /// (repeatable)
    #[arg(long, value_name = "METRIC=VALUE", value_parser = threshold)]
    threshold: Vec<(Metric, f64)>,
    /// Apply the model's chat template to each prompt
    #[arg(long)]
    chat: bool,
    /// System message for each prompt
    #[arg(long, value_name = "TEXT", requires = "chat", allow_hyphen_values = true)]
    system: Option<String>,
    /// Maximum number of tokens to generate, for lines without `max_new_tokens`
    #[arg(long, value_name = "N", default_value_t = 128, value_parser = clap::value_parser!(u32).range(1..))]
    max_new_tokens: u32,
    /// Stop before this text; escapes such as \n and special tokens are allowed (repeatable)
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true)]
    stop: Vec<String>,
    /// Do not stop at the model's end tokens
    #[arg(long)]
    ignore_eos: bool,
    /// Use only the first N lines of the task
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    lines: Option<u32>,
    #[command(flatten)]
    place: Place,
    /// Print one JSON document with every answer
    #[arg(long, value_enum, value_name = "FORM", num_args = 0..=1, require_equals = true, default_missing_value = "pretty")]
    json: Option<JsonForm>,
    #[command(flatten)]
    sampler: SamplerArgs,
}

fn threshold(text: &str) -> Result<(Metric, f64), String> {
    let names = || Metric::ALL.map(Metric::name).join(", ");
    let (name, value) = text
        .split_once('=')
        .ok_or_else(|| format!("{text:?} is not METRIC=VALUE, such as rougeL=0.3"))?;
    let metric = Metric::ALL.into_iter().find(|metric| metric.name() == name.trim());
    let metric = metric.ok_or_else(|| format!("unknown metric {name:?}; the metrics are {}", names()))?;
    let value: Option<f64> = value.trim().parse().ok().filter(|v| (0.0..=1.0).contains(v));
    Ok((
        metric,
        value.ok_or_else(|| "a threshold is a number from 0 to 1".to_string())?,
    ))
}

/// An encoded line.
struct Prompt {
    example: Example,
    ids: Vec<u32>,
    max_new_tokens: usize,
}

pub fn run(args: Args) -> Result<(), Failure> {
    let date = now();
    let package = Package::open(&args.package)?;
    package.check_present()?;
    let (file, text) = read(&args.task)?;
    let mut examples = task::parse(&args.task, &text)?;
    examples.truncate(args.lines.map_or(usize::MAX, |n| n as usize));
    let tokenizer = package.tokenizer()?;
    let tokenizer = need(tokenizer.as_ref(), &args.package, "evaluate")
        .map_err(|failure| failure.help("convert again with --tokenizer FILE_OR_DIR"))?;
    let settings = args.sampler.measuring(&package)?;
    let stop = args.sampler.texts("--stop", &args.stop)?;
    let prompts = prompts(&args, &package, tokenizer, examples)?;

    let progress = Progress::new();
    progress.step("loading");
    let longest = prompts.iter().map(|p| p.ids.len()).max().unwrap_or(1);
    let total = prompts
        .iter()
        .map(|p| p.ids.len() + p.max_new_tokens)
        .max()
        .unwrap_or(1);
    let mut session = args.place.open(&package, longest, total)?;
    let mut lines = Vec::new();
    for (i, prompt) in prompts.iter().enumerate() {
        let what = format!("line {} of {}", i + 1, prompts.len());
        progress.fraction(&what, i as f32 / prompts.len() as f32);
        let limits = Limits {
            max_new_tokens: prompt.max_new_tokens,
            eos_ids: match args.ignore_eos {
                true => BTreeSet::new(),
                false => package.manifest.eos_token_ids.clone(),
            },
            stop: stop.clone(),
            logprobs: None,
        };
        // Lines are independent: earlier ones must have no effect.
        session.clear();
        let mut chain = Chain::new(&settings)?;
        lines.push(answer(&mut session, tokenizer, prompt, &mut chain, &limits)?);
    }
    progress.step("hashing the weights");
    let all: Vec<Scores> = lines.iter().map(|line| line.scores).collect();
    let scores = Scores::mean(&all);
    let thresholds: Vec<Threshold> = args
        .threshold
        .iter()
        .map(|(metric, at_least)| Threshold {
            metric: *metric,
            at_least: *at_least,
            found: scores.get(*metric),
            passed: scores.get(*metric) >= *at_least,
        })
        .collect();
    let mut said = Map::new();
    said.insert("temperature".into(), json!(settings.temperature));
    said.insert("seed".into(), json!(settings.seed));
    said.insert("max_new_tokens".into(), json!(args.max_new_tokens));
    said.insert("chat".into(), json!(args.chat));
    said.insert("system".into(), json!(args.system));
    said.insert("stop".into(), json!(stop));
    said.insert("ignore_eos".into(), json!(args.ignore_eos));
    let document = Task {
        schema: TASK.to_string(),
        run: described(date, &session),
        model: Model::of(&package)?,
        task: file,
        settings: said,
        scores,
        errors: Metric::ALL.into_iter().map(|m| (m, Scores::error(&all, m))).collect(),
        passed: thresholds.iter().all(|t| t.passed),
        thresholds,
        lines,
    };
    drop(progress);
    match args.json {
        Some(form) => print_json(&document, form)?,
        None => print(&summary(&document))?,
    }
    let failed = document.thresholds.iter().filter(|t| !t.passed);
    let failed: Vec<String> = failed
        .map(|t| format!("{} is {:.4}, below {}", t.metric.name(), t.found, t.at_least))
        .collect();
    match failed.is_empty() {
        true => Ok(()),
        false => Err(
            Failure::other(format!("{}: {}", args.package.display(), failed.join("; ")))
                .help("compare with the package of the original weights, with the same task and flags"),
        ),
    }
}

/// Encodes all lines, so that an invalid one is refused before any is run.
fn prompts(
    args: &Args,
    package: &Package,
    tokenizer: &Tokenizer,
    examples: Vec<Example>,
) -> Result<Vec<Prompt>, Failure> {
    let vocabulary = package.vocabulary()?;
    let capacity = *package.manifest.capacities.last().expect("a package has one");
    let mut prompts = Vec::new();
    for example in examples {
        let refuse = |why: String| Failure::input(format!("{}: line {}: {why}", args.task.display(), example.line));
        let ids = match args.chat {
            true => {
                let system = args.system.as_ref().map(Message::system);
                let messages: Vec<Message> = system.into_iter().chain([Message::user(&example.prompt)]).collect();
                tokenizer.encode(&chat::render(tokenizer, &messages)?, false)?
            }
            false => tokenizer.encode(&example.prompt, true)?,
        };
        let ids = fitting(ids, vocabulary, &args.package)?;
        if ids.is_empty() {
            return Err(refuse("the prompt has no tokens".into()).help("add text to the prompt"));
        }
        if ids.len() > capacity {
            let why = format!(
                "the prompt has {} tokens, and the largest cache capacity is {capacity}",
                ids.len()
            );
            return Err(refuse(why).help("shorten it, or convert the model again with a larger --capacity"));
        }
        let max_new_tokens = example.max_new_tokens.unwrap_or(args.max_new_tokens as usize);
        prompts.push(Prompt {
            example,
            ids,
            max_new_tokens,
        });
    }
    Ok(prompts)
}

fn answer(
    session: &mut Session,
    tokenizer: &Tokenizer,
    prompt: &Prompt,
    chain: &mut Chain,
    limits: &Limits,
) -> Result<Line, Failure> {
    let generation = decode::generate(session, Some(tokenizer), &prompt.ids, chain, limits, |_| Ok(()))?;
    let reference = &prompt.example.reference;
    Ok(Line {
        line: prompt.example.line,
        id: prompt.example.id.clone(),
        prompt_tokens: prompt.ids.len(),
        tokens: generation.tokens.len(),
        finish_reason: generation.finish_reason.name().to_string(),
        scores: Scores::of(&generation.text, reference),
        text: generation.text,
        reference: reference.clone(),
    })
}

fn summary(d: &Task) -> String {
    let mut table = Table::new(["metric", "F1", "±", "precision", "recall", "at least", ""]);
    for metric in Metric::ALL {
        let score = match metric {
            Metric::Rouge1 => Some(d.scores.rouge1),
            Metric::Rouge2 => Some(d.scores.rouge2),
            Metric::RougeL => Some(d.scores.rouge_l),
            Metric::ExactMatch => None,
        };
        let digits = |value: Option<f64>| value.map(|v| format!("{v:.4}")).unwrap_or_default();
        let threshold = d.thresholds.iter().find(|t| t.metric == metric);
        table.row([
            metric.name().to_string(),
            digits(Some(d.scores.get(metric))),
            digits(d.errors.get(&metric).copied()),
            digits(score.map(|s| s.precision)),
            digits(score.map(|s| s.recall)),
            digits(threshold.map(|t| t.at_least)),
            match threshold {
                None => String::new(),
                Some(t) => if t.passed { "ok" } else { "FAILED" }.to_string(),
            },
        ]);
    }
    let full = d.lines.iter().filter(|line| line.finish_reason == "capacity").count();
    let cut = match full {
        0 => String::new(),
        n => format!("{n} answers were cut off because the cache was full\n"),
    };
    format!(
        "{} on {}, {} lines\n{}{cut}",
        d.model.name,
        d.task.file,
        d.lines.len(),
        table.render()
    )
}
