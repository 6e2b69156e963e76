//! `lapidary verify`: compares a package with its export, which another engine runs.
//!
//! The package generates greedily, with its cache, chunks and precision. The reference then runs each whole sequence at
//! once, and both must agree on the logits of every step and on the tokens. The longest prompt exceeds every window and
//! table that could matter ([`reach`]); the command prints what it does not cover.

mod reach;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde::Serialize;

use super::progress::Progress;
use super::table::Table;
use super::{Failure, JsonForm, print, print_json};
use crate::convert::find_model;
use crate::decode::reference::{EngineKind, Reference};
use crate::decode::{DeviceChoice, Session, SessionOptions};
use crate::package::Package;
use crate::tensor::DType;
use crate::{onnx, passes};
use reach::{Bounds, Mark};

#[derive(clap::Args)]
pub struct Args {
    /// The package
    #[arg(value_name = "PKG")]
    package: PathBuf,
    /// The export it was made from, or its folder
    #[arg(long, value_name = "MODEL")]
    against: PathBuf,
    /// Which export of the folder, as in `convert`
    #[arg(long, value_name = "NAME")]
    variant: Option<String>,
    /// Engine that runs the export [default: tract if compiled in, else eval]
    #[arg(long, value_enum)]
    engine: Option<EngineKind>,
    /// Tokens to generate for each prompt
    #[arg(long, value_name = "N", default_value_t = 8, value_parser = clap::value_parser!(u16).range(1..))]
    tokens: u16,
    /// Tolerance: difference of a logit, relative to the largest logit [default: 1e-4 fp32, 2e-2 fp16, 1e-1 bf16]
    #[arg(long, value_name = "X")]
    tolerance: Option<f64>,
    /// Longest sequence to compare where windows and tables require it, in tokens [default: as many as the engine runs in
    /// about 30 s]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    longest: Option<u32>,
    /// Token ids of a prompt to use instead of the built-in ones (repeatable)
    #[arg(long, value_name = "IDS", value_parser = parse_ids)]
    prompt_ids: Vec<Ids>,
    /// Print one JSON document
    #[arg(long, value_enum, value_name = "FORM", num_args = 0..=1, require_equals = true, default_missing_value = "pretty")]
    json: Option<JsonForm>,
}

#[derive(Clone)]
struct Ids(Vec<u32>);

fn parse_ids(text: &str) -> Result<Ids, String> {
    let id = |part: &str| part.trim().parse().map_err(|_| format!("{part:?} is not a token id"));
    text.split(',').map(id).collect::<Result<_, _>>().map(Ids)
}

#[derive(Serialize)]
struct Report {
    package: PathBuf,
    against: PathBuf,
    engine: EngineKind,
    dtype: DType,
    tolerance: f64,
    passed: bool,
    /// Tokens of the longest sequence.
    compared_tokens: usize,
    /// Lengths at which the two could begin to differ.
    lengths: Vec<Mark>,
    prompts: Vec<Comparison>,
}

/// One prompt and the tokens after it.
#[derive(Serialize)]
struct Comparison {
    prompt: String,
    prompt_tokens: usize,
    /// The package's tokens.
    tokens: Vec<u32>,
    /// The reference's choice at each step, after the same tokens.
    reference_tokens: Vec<u32>,
    /// Largest difference of a logit, over all steps and the whole vocabulary.
    max_difference: f64,
    /// Largest magnitude of a reference logit.
    largest_logit: f64,
    /// Steps whose tokens differ although the reference's two best logits differ by more than the tolerance.
    wrong_tokens: usize,
    passed: bool,
}

pub fn run(args: Args) -> Result<(), Failure> {
    let package = Package::open(&args.package)?;
    let against = find_model(&args.against, args.variant.as_deref())?.model;
    let kind = args.engine.unwrap_or(match cfg!(feature = "tract") {
        true => EngineKind::Tract,
        false => EngineKind::Eval,
    });
    let dtype = package.manifest.dtype;
    let tolerance = args.tolerance.unwrap_or(match dtype {
        DType::F16 => 2e-2,
        DType::Bf16 => 1e-1,
        _ => 1e-4,
    });
    let progress = Progress::new();
    progress.step(format!("loading the export into {}", kind.name()));
    let on_cpu = SessionOptions {
        device: DeviceChoice::Cpu,
        ..SessionOptions::default()
    };
    let mut session = Session::open(&package, &on_cpu)?;
    let mut reference = Reference::open(
        &against,
        kind,
        session.embeddings().cloned(),
        &package.manifest.mask_windows,
    )?;
    let new = usize::from(args.tokens);
    let bounds = Bounds::new(
        &package.manifest,
        session.largest_capacity(),
        reference.longest(),
        kind,
        args.longest.map(|n| n as usize),
    );
    let lengths = critical_lengths(&against, session.largest_capacity());
    let windows = &package.manifest.architecture.windows;
    let (_, wanted) = reach::marks(windows, &lengths, &bounds);
    // The last token drawn is not fed.
    let before = |tokens: usize| (tokens + 1).saturating_sub(new);
    let prompts = match args.prompt_ids.is_empty() {
        false => args
            .prompt_ids
            .into_iter()
            .map(|ids| ("given".to_string(), ids.0))
            .collect(),
        true => prompts(&package, before(wanted), before(bounds.most()))?,
    };
    if prompts.is_empty() {
        return Err(Failure::input(format!("no prompt plus {new} tokens fits")).help("use fewer --tokens"));
    }
    let mut comparisons = Vec::new();
    for (i, (name, prompt)) in prompts.iter().enumerate() {
        progress.step(format!("prompt {}/{}: {name}", i + 1, prompts.len()));
        comparisons.push(compare(&mut session, &mut reference, name, prompt, new, tolerance)?);
    }
    drop(progress);
    let compared = comparisons.iter().map(|c| c.prompt_tokens + c.tokens.len() - 1).max();
    let compared = compared.unwrap_or_default();
    let reached = Bounds {
        affordable: compared,
        ..bounds
    };
    let report = Report {
        package: args.package,
        against,
        engine: kind,
        dtype,
        tolerance,
        passed: comparisons.iter().all(|c| c.passed),
        compared_tokens: compared,
        lengths: reach::marks(windows, &lengths, &reached).0,
        prompts: comparisons,
    };
    match args.json {
        Some(form) => print_json(&report, form)?,
        None => print(&summary(&report))?,
    }
    if report.passed {
        return Ok(());
    }
    let failed = report.prompts.iter().filter(|p| !p.passed).count();
    Err(Failure::other(format!(
        "{} differs from {} on {failed} of {} prompts",
        report.package.display(),
        report.against.display(),
        report.prompts.len()
    ))
    .help("check that the package was made from this export; if it was, please report a bug"))
}

/// The lengths in the export's masks and tables of positions; none for an unrecognized export.
fn critical_lengths(export: &Path, capacity: usize) -> BTreeMap<usize, String> {
    let lengths = onnx::read(export).ok().map(|graph| passes::lengths_of(graph, capacity));
    lengths.and_then(Result::ok).unwrap_or_default()
}

/// Texts if there is a tokenizer, and ids spread over the vocabulary in several lengths: the longest has `wanted` tokens.
/// None is longer than `room`.
fn prompts(package: &Package, wanted: usize, room: usize) -> Result<Vec<(String, Vec<u32>)>, Failure> {
    let vocabulary = package.vocabulary()? as u64;
    let spread = |n: u64| -> Vec<u32> {
        // A multiplicative walk visits the whole vocabulary without a pattern related to positions.
        (0..n)
            .map(|i| ((i * i * 7919 + i * 104_729 + 3 * n) % vocabulary) as u32)
            .collect()
    };
    let mut prompts = Vec::new();
    if let Some(tokenizer) = package.tokenizer()? {
        for text in [
            "The capital of France is",
            "def fibonacci(n):\n    \"\"\"",
            "Zwölf Boxkämpfer jagen Viktor 12 × 34",
        ] {
            let ids = tokenizer.encode(text, true)?;
            if ids.iter().all(|id| u64::from(*id) < vocabulary) {
                prompts.push((format!("{text:?}"), ids));
            }
        }
    }
    let mut counts = vec![1, 7, 19, reach::USUAL.min(wanted), wanted];
    counts.dedup();
    prompts.extend(counts.iter().map(|n| (format!("{n} spread ids"), spread(*n as u64))));
    prompts.retain(|(_, ids)| !ids.is_empty() && ids.len() <= room);
    Ok(prompts)
}

fn compare(
    session: &mut Session,
    reference: &mut Reference,
    name: &str,
    prompt: &[u32],
    new: usize,
    tolerance: f64,
) -> Result<Comparison, Failure> {
    session.clear();
    session.feed(prompt)?;
    let mut ours = vec![session.logits().to_vec()];
    let mut tokens = Vec::new();
    while tokens.len() < new {
        let token = largest(ours.last().expect("one a token"));
        tokens.push(token);
        if tokens.len() < new {
            ours.push(session.feed(&[token])?.to_vec());
        }
    }
    let sequence: Vec<u32> = prompt.iter().chain(&tokens[..new - 1]).copied().collect();
    let theirs = reference.logits(&sequence)?;
    let theirs = &theirs[prompt.len() - 1..];

    let pairs = || ours.iter().zip(theirs);
    let magnitudes = theirs.iter().flatten().map(|v| f64::from(v.abs()));
    let largest_logit = magnitudes.filter(|v| v.is_finite()).fold(0.0, f64::max);
    let difference = |(a, b): (&Vec<f32>, &Vec<f32>)| -> f64 {
        if a.len() != b.len() {
            return f64::INFINITY;
        }
        // NaN must not pass, but max would drop it.
        let each = a.iter().zip(b).map(|(x, y)| f64::from((x - y).abs()));
        each.map(|d| if d.is_nan() { f64::INFINITY } else { d })
            .fold(0.0, f64::max)
    };
    let max_difference = pairs().map(difference).fold(0.0, f64::max);
    let limit = tolerance * largest_logit.max(1.0);
    let reference_tokens: Vec<u32> = theirs.iter().map(|row| largest(row)).collect();
    let wrong = |(step, (mine, right)): (usize, (&u32, &u32))| {
        let row = &theirs[step];
        mine != right && f64::from(row[*right as usize] - row[*mine as usize]) > limit
    };
    let wrong_tokens = tokens
        .iter()
        .zip(&reference_tokens)
        .enumerate()
        .filter(|x| wrong(*x))
        .count();
    Ok(Comparison {
        prompt: name.to_string(),
        prompt_tokens: prompt.len(),
        passed: wrong_tokens == 0 && max_difference <= limit,
        tokens,
        reference_tokens,
        max_difference,
        largest_logit,
        wrong_tokens,
    })
}

fn largest(row: &[f32]) -> u32 {
    let mut best = 0;
    for (i, value) in row.iter().enumerate() {
        if *value > row[best] {
            best = i;
        }
    }
    best as u32
}

fn summary(report: &Report) -> String {
    let mut table = Table::new([
        "prompt",
        "tokens",
        "same",
        "largest logit",
        "difference",
        "relative",
        "",
    ]);
    for c in &report.prompts {
        let same = c.tokens.iter().zip(&c.reference_tokens).filter(|(a, b)| a == b).count();
        table.row([
            c.prompt.clone(),
            c.prompt_tokens.to_string(),
            format!("{same}/{}", c.tokens.len()),
            format!("{:.3}", c.largest_logit),
            format!("{:.2e}", c.max_difference),
            format!("{:.2e}", c.max_difference / c.largest_logit.max(1.0)),
            if c.passed { "ok" } else { "FAILED" }.to_string(),
        ]);
    }
    format!(
        "{} ({}) against {} in {}, tolerance {:.0e}\n{}{}{}\n",
        report.package.display(),
        report.dtype,
        report.against.display(),
        report.engine.name(),
        report.tolerance,
        table.render(),
        reach::describe(&report.lengths, report.compared_tokens),
        if report.passed {
            "the package agrees with its export"
        } else {
            "the package differs from its export"
        }
    )
}
