//! `lapidary perplexity`: how well a package predicts a text, and how far its distributions are from another package's.

use std::fmt::Write;
use std::path::{Path, PathBuf};
use std::time::Instant;

use super::device::Place;
use super::generate::{fitting, need};
use super::progress::Progress;
use super::{Failure, JsonForm, bytes, print, print_json};
use crate::bench::machine;
use crate::bench::quality::perplexity::{self, Windows};
use crate::bench::quality::result::{self, Against, File, Model, PERPLEXITY, Perplexity, Run, Surprise};
use crate::decode::Session;
use crate::package::Package;
use crate::text::Tokenizer;

#[derive(clap::Args)]
#[command(group = clap::ArgGroup::new("texts").required(true).multiple(false))]
pub struct Args {
    /// The package
    #[arg(value_name = "PKG")]
    package: PathBuf,
    /// The text, in UTF-8
    #[arg(long, value_name = "FILE", group = "texts")]
    text: Option<PathBuf>,
    /// Token ids instead of a text, separated by spaces, lines or commas; no first token is added
    #[arg(long, value_name = "FILE", group = "texts")]
    ids: Option<PathBuf>,
    /// Another package with the same vocabulary: its perplexity, the KL divergence from it, and top-1 agreement
    #[arg(long, value_name = "PKG")]
    against: Option<PathBuf>,
    /// Window length, in tokens [default: the largest cache capacity, the smaller one of two packages]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    window: Option<u32>,
    /// Distance between the starts of two windows; smaller values give each token more context and take longer
    /// [default: the window length]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    stride: Option<u32>,
    /// Use only the first N tokens of the text
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(2..))]
    tokens: Option<u32>,
    #[command(flatten)]
    place: Place,
    /// Print one JSON document, which `lapidary report` reads
    #[arg(long, value_enum, value_name = "FORM", num_args = 0..=1, require_equals = true, default_missing_value = "pretty")]
    json: Option<JsonForm>,
}

pub fn run(args: Args) -> Result<(), Failure> {
    let date = now();
    let package = Package::open(&args.package)?;
    package.check_present()?;
    let against = args.against.as_deref().map(Package::open).transpose()?;
    if let Some(other) = &against {
        other.check_present()?;
        same_vocabulary(&package, other)?;
    }
    let (file, mut text) = match (&args.text, &args.ids) {
        (Some(path), _) => read_text(path, &package, against.as_ref())?,
        (_, Some(path)) => read_ids(path, &package)?,
        (None, None) => unreachable!("clap asks for one of the group"),
    };
    text.ids.truncate(args.tokens.map_or(usize::MAX, |n| n as usize));
    let windows = windows(&args, &package, against.as_ref(), text.prefix)?;
    if windows.scored(text.ids.len()) == 0 {
        let path = args.text.as_ref().or(args.ids.as_ref()).expect("one of them");
        let error = perplexity::PerplexityError::TooShort { tokens: text.ids.len() };
        return Err(Failure::from(error).at(path));
    }

    let progress = Progress::new();
    progress.step("loading");
    let open = |package| args.place.open(package, windows.window, windows.window);
    let mut session = open(&package)?;
    let mut other = against.as_ref().map(open).transpose()?;
    let start = Instant::now();
    let bar = progress.handle();
    let measured = perplexity::perplexity(
        &mut session,
        other.as_mut(),
        &text.ids,
        &windows,
        &mut |found, share| {
            bar.fraction(&format!("perplexity {:.3}", found.nll.mean.exp()), share);
        },
    )?;
    let elapsed = start.elapsed();
    progress.step("hashing the weights");
    let document = Perplexity {
        schema: PERPLEXITY.to_string(),
        run: described(date, &session),
        model: Model::of(&package)?,
        text: file,
        tokens: text.ids.len(),
        scored: measured.nll.count,
        prefix: windows.prefix,
        window: windows.window,
        stride: windows.stride,
        surprise: measured.nll.into(),
        ms_per_token: elapsed.as_secs_f64() * 1e3 / measured.nll.count as f64,
        against: match &against {
            Some(other) => Against::of(Model::of(other)?, &measured),
            None => None,
        },
    };
    drop(progress);
    if !document.surprise.perplexity.is_finite() {
        return Err(Failure::other(format!(
            "{}: the mean log-likelihood is -{} nats per token: too small for a perplexity",
            args.package.display(),
            document.surprise.nll.mean
        ))
        .help("check the package with `lapidary verify`"));
    }
    match args.json {
        Some(form) => print_json(&document, form),
        None => print(&summary(&document)),
    }
}

pub fn now() -> String {
    chrono::Local::now().to_rfc3339_opts(chrono::SecondsFormat::Secs, false)
}

/// The metadata of a run that began at `date`.
pub fn described(date: String, session: &Session) -> Run {
    Run {
        date,
        command: std::env::args().collect::<Vec<_>>().join(" "),
        commit: machine::commit(),
        lapidary: env!("CARGO_PKG_VERSION").to_string(),
        device: match session.device().name() {
            "cpu" => machine::cpu_model().unwrap_or_else(|| "cpu".to_string()),
            gpu => gpu.to_string(),
        },
    }
}

/// Probabilities are compared token by token, so the vocabularies must be equal.
fn same_vocabulary(package: &Package, other: &Package) -> Result<(), Failure> {
    let (ours, theirs) = (package.vocabulary()?, other.vocabulary()?);
    match ours == theirs {
        true => Ok(()),
        false => Err(Failure::input(format!(
            "{} has {ours} tokens and {} has {theirs}: their distributions cannot be compared",
            package.folder.display(),
            other.folder.display()
        ))
        .help("give --against a package of the same model")),
    }
}

/// Tokens to score, without those that begin every window.
struct Text {
    prefix: Vec<u32>,
    ids: Vec<u32>,
}

fn read_text(path: &Path, package: &Package, against: Option<&Package>) -> Result<(File, Text), Failure> {
    let (file, text) = read(path)?;
    let tokenizer = package.tokenizer()?;
    let tokenizer = need(tokenizer.as_ref(), &package.folder, "--text")
        .map_err(|failure| failure.help("convert again with --tokenizer FILE_OR_DIR, or give token ids with --ids"))?;
    let ids = tokenizer.encode(&text, false)?;
    let prefix = prefix(tokenizer)?;
    if let Some(other) = against
        && let Some(theirs) = other.tokenizer()?
        && (theirs.encode(&text, false)? != ids || self::prefix(&theirs)? != prefix)
    {
        return Err(Failure::input(format!(
            "{}: the tokenizer of {} splits this text into different tokens than that of {}",
            path.display(),
            other.folder.display(),
            package.folder.display()
        ))
        .help("give --against a package of the same model"));
    }
    let vocabulary = package.vocabulary()?;
    let prefix = fitting(prefix, vocabulary, &package.folder)?;
    let ids = fitting(ids, vocabulary, &package.folder)?;
    Ok((file, Text { prefix, ids }))
}

/// The tokens that the tokenizer puts before every text, determined with a short one.
fn prefix(tokenizer: &Tokenizer) -> Result<Vec<u32>, Failure> {
    let (bare, whole) = (tokenizer.encode("a", false)?, tokenizer.encode("a", true)?);
    let begin = whole.windows(bare.len().max(1)).position(|part| part == bare);
    Ok(whole[..begin.unwrap_or(0)].to_vec())
}

fn read_ids(path: &Path, package: &Package) -> Result<(File, Text), Failure> {
    let (file, text) = read(path)?;
    let words = text
        .split(|c: char| c.is_whitespace() || c == ',')
        .filter(|word| !word.is_empty());
    let vocabulary = package.vocabulary()?;
    let id = |word: &str| match word.parse::<u32>() {
        Ok(id) if (id as usize) < vocabulary => Ok(id),
        Ok(id) => Err(Failure::input(format!(
            "{}: the token id {id} is outside the vocabulary of {vocabulary} (ids 0 to {})",
            path.display(),
            vocabulary - 1
        ))
        .help("check that the ids come from this model's tokenizer")),
        Err(_) => Err(
            Failure::input(format!("{}: {word:?} is not a token id", path.display()))
                .help("--ids takes whole numbers separated by spaces, lines or commas"),
        ),
    };
    let ids = words.map(id).collect::<Result<_, _>>()?;
    Ok((
        file,
        Text {
            prefix: Vec::new(),
            ids,
        },
    ))
}

/// A nonempty text file.
pub fn read(path: &Path) -> Result<(File, String), Failure> {
    let refuse = |why: String| Failure::input(format!("{}: {why}", path.display()));
    let contents = std::fs::read(path).map_err(|e| refuse(e.to_string()))?;
    let file = File::of(path, &contents);
    let text = String::from_utf8(contents).map_err(|_| refuse("it is not text in UTF-8".into()))?;
    match text.trim().is_empty() {
        true => Err(refuse("it is empty".into())),
        false => Ok((file, text)),
    }
}

fn windows(args: &Args, package: &Package, against: Option<&Package>, prefix: Vec<u32>) -> Result<Windows, Failure> {
    let largest = |package: &Package| *package.manifest.capacities.last().expect("a package has one");
    let smaller = std::iter::once(package).chain(against).min_by_key(|p| largest(p));
    let smaller = smaller.expect("there is one");
    let capacity = largest(smaller);
    let window = args.window.map_or(capacity, |n| n as usize);
    if window > capacity {
        return Err(Failure::input(format!(
            "--window {window}: the largest cache capacity of {} is {capacity}",
            smaller.folder.display()
        ))
        .help("use a smaller --window, or convert the model again with a larger --capacity"));
    }
    let mut windows = Windows {
        prefix,
        window,
        stride: args.stride.unwrap_or(1) as usize,
    };
    let most = windows.targets()?;
    windows.stride = args.stride.map_or(most, |n| n as usize);
    Ok(windows)
}

fn summary(d: &Perplexity) -> String {
    let mut out = String::new();
    let mut line = |name: &str, text: String| {
        let _ = writeln!(out, "{name:<12} {text}");
    };
    let model = |m: &result::Model| format!("{}, {}, {}", m.name, m.format, bytes(m.weight_bytes));
    let surprise = |s: &Surprise| format!("{:.4} ± {:.4}", s.perplexity, s.perplexity_error);
    line("model", model(&d.model));
    let begin = match d.prefix.len() {
        0 => "no first token added".to_string(),
        n => format!("{n} first token{} added to each", if n == 1 { "" } else { "s" }),
    };
    line(
        "text",
        format!(
            "{}, {} tokens, {} scored, windows of {} with stride {}, {begin}",
            d.text.file, d.tokens, d.scored, d.window, d.stride
        ),
    );
    line("perplexity", surprise(&d.surprise));
    if let Some(other) = &d.against {
        line("against", model(&other.model));
        line("", format!("perplexity {}", surprise(&other.surprise)));
        line(
            "divergence",
            format!(
                "{:.6} ± {:.6} nats/token, KL({} || {}); largest {:.4}",
                other.kl.mean, other.kl.error, other.model.name, d.model.name, other.kl_largest
            ),
        );
        line("top-1", format!("{:.2} % of tokens", other.same_best * 100.0));
    }
    line("time", format!("{:.3} ms/token on {}", d.ms_per_token, d.run.device));
    out
}
