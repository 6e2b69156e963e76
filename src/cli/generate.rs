//! `lapidary generate`: a prompt in, text out, as it comes.

use std::collections::BTreeSet;
use std::io::{IsTerminal, Read, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde::Serialize;

use super::sampler::SamplerArgs;
use super::{Failure, print_json};
use crate::decode::chat::{self, Message};
use crate::decode::cpu::CpuDevice;
use crate::decode::tokenizer::Tokenizer;
use crate::decode::{self, Generation, Limits, Session};
use crate::package::Package;
use crate::sample::{Chain, Settings};

#[derive(clap::Args)]
#[command(group = clap::ArgGroup::new("prompts").required(true).multiple(false))]
pub struct Args {
    /// A package
    #[arg(value_name = "PKG")]
    package: PathBuf,
    /// Continue this text
    #[arg(long, value_name = "TEXT", group = "prompts")]
    prompt: Option<String>,
    /// Answer this, by the model's chat template
    #[arg(long, value_name = "TEXT", group = "prompts")]
    chat: Option<String>,
    /// Continue these token ids
    #[arg(
        long,
        value_name = "IDS",
        group = "prompts",
        value_delimiter = ',',
        allow_hyphen_values = true
    )]
    prompt_ids: Option<Vec<u32>>,
    /// Continue the text of a file (`-`: standard input)
    #[arg(long, value_name = "FILE", group = "prompts")]
    prompt_file: Option<PathBuf>,
    /// A system message before --chat
    #[arg(long, value_name = "TEXT", requires = "chat")]
    system: Option<String>,

    /// Tokens to generate at most
    #[arg(long, value_name = "N", default_value_t = 256)]
    max_new_tokens: usize,
    /// End before this text (repeatable)
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true)]
    stop: Vec<String>,
    /// Do not end at the model's end tokens
    #[arg(long)]
    ignore_eos: bool,

    /// Where to run; auto: the CPU
    #[arg(long, value_enum, default_value_t = Device::Auto)]
    device: Device,
    /// Threads of the CPU executor [default: one a core]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..))]
    threads: Option<u16>,

    /// Report the N most probable tokens of each step (with --json)
    #[arg(long, value_name = "N", requires = "json")]
    logprobs: Option<usize>,
    /// Print one JSON document at the end instead of text
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    sampler: SamplerArgs,
}

#[derive(Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Device {
    Auto,
    Cpu,
    Cuda,
}

pub fn run(args: Args, started: Instant) -> Result<(), Failure> {
    if args.device == Device::Cuda {
        return Err(
            Failure::input("this version of Lapidary builds TensorRT engines but does not run them yet")
                .help("use --device cpu"),
        );
    }
    let package = Package::open(&args.package)?;
    let tokenizer = package.tokenizer()?;
    let prompt = prompt_ids(&args, tokenizer.as_ref())?;
    if !args.stop.is_empty() {
        need(tokenizer.as_ref(), &args.package, "--stop")?;
    }
    let settings = args
        .sampler
        .settings(&args.package, tokenizer.as_ref(), package.vocabulary()?)?;
    let mut chain = Chain::new(&settings)?;
    let limits = Limits {
        max_new_tokens: args.max_new_tokens,
        eos_ids: match args.ignore_eos {
            true => BTreeSet::new(),
            false => package.manifest.eos_token_ids.clone(),
        },
        stop: args.stop.clone(),
        logprobs: args.json.then(|| args.logprobs.unwrap_or(0)),
    };

    let mut session = open_cpu(&package, args.threads.map(usize::from))?;
    session.check(&prompt)?;
    let load = started.elapsed();

    let mut stdout = std::io::stdout().lock();
    let stream = !args.json;
    let generation = decode::generate(&mut session, tokenizer.as_ref(), &prompt, &mut chain, &limits, |text| {
        if stream {
            stdout.write_all(text.as_bytes())?;
            stdout.flush()?;
        }
        Ok(())
    })?;
    if args.json {
        drop(stdout);
        return print_json(&document(&prompt, &generation, &session, &settings, load));
    }
    if tokenizer.is_none() {
        let ids: Vec<String> = generation.tokens.iter().map(u32::to_string).collect();
        stdout.write_all(ids.join(",").as_bytes())?;
    }
    writeln!(stdout)?;
    stdout.flush()?;
    if std::io::stderr().is_terminal() {
        eprintln!("{}", summary(&prompt, &generation));
    }
    Ok(())
}

/// A session on the CPU for a package.
pub fn open_cpu(package: &Package, threads: Option<usize>) -> Result<Session, Failure> {
    let graph = package.graph()?;
    let vocabulary = package.vocabulary()?;
    let device = CpuDevice::new(graph, vocabulary, threads);
    Ok(Session::new(Box::new(device), &package.manifest.capacities, vocabulary))
}

fn need<'a>(tokenizer: Option<&'a Tokenizer>, package: &Path, flag: &str) -> Result<&'a Tokenizer, Failure> {
    tokenizer.ok_or_else(|| {
        Failure::input(format!(
            "{}: {flag} needs a tokenizer, and the package has none",
            package.display()
        ))
        .help("convert again with --tokenizer FILE_OR_DIR, or give token ids with --prompt-ids")
    })
}

fn prompt_ids(args: &Args, tokenizer: Option<&Tokenizer>) -> Result<Vec<u32>, Failure> {
    if let Some(ids) = &args.prompt_ids {
        return Ok(ids.clone());
    }
    if let Some(text) = &args.chat {
        let tokenizer = need(tokenizer, &args.package, "--chat")?;
        let system = args.system.as_ref().map(Message::system);
        let messages: Vec<Message> = system.into_iter().chain([Message::user(text)]).collect();
        let text = chat::render(tokenizer, &messages)?;
        return Ok(tokenizer.encode(&text, false)?);
    }
    let (text, flag) = match (&args.prompt, &args.prompt_file) {
        (Some(text), _) => (text.clone(), "--prompt"),
        (None, Some(path)) => (read_text(path)?, "--prompt-file"),
        (None, None) => unreachable!("clap asks for one of the group"),
    };
    Ok(need(tokenizer, &args.package, flag)?.encode(&text, true)?)
}

fn read_text(path: &Path) -> Result<String, Failure> {
    let read = if path == Path::new("-") {
        let mut text = String::new();
        std::io::stdin().read_to_string(&mut text).map(|_| text)
    } else {
        std::fs::read_to_string(path)
    };
    read.map_err(|e| {
        Failure::input(format!("{}: {e}", path.display())).help("--prompt-file wants a text file in UTF-8")
    })
}

#[derive(Serialize)]
struct Document<'a> {
    prompt_ids: &'a [u32],
    tokens: &'a [u32],
    text: &'a str,
    finish_reason: &'static str,
    steps: Vec<StepDocument<'a>>,
    device: &'a str,
    engine: String,
    seed: u64,
    timing: TimingDocument,
}

#[derive(Serialize)]
struct StepDocument<'a> {
    token: u32,
    logprob: f64,
    #[serde(skip_serializing_if = "<[_]>::is_empty")]
    top_logprobs: &'a [(u32, f64)],
}

/// Milliseconds. `ttft_ms` counts from the first prompt token fed, `tpot_ms` is the mean of all tokens but the first.
#[derive(Serialize)]
struct TimingDocument {
    load_ms: f64,
    ttft_ms: f64,
    tpot_ms: f64,
    tokens_per_s: f64,
}

fn document<'a>(
    prompt: &'a [u32],
    generation: &'a Generation,
    session: &'a Session,
    settings: &Settings,
    load: Duration,
) -> Document<'a> {
    let ms = |d: Duration| (d.as_secs_f64() * 1e6).round() / 1e3;
    let tpot = generation.timing.tpot();
    Document {
        prompt_ids: prompt,
        tokens: &generation.tokens,
        text: &generation.text,
        finish_reason: generation.finish_reason.name(),
        steps: generation
            .steps
            .iter()
            .map(|s| StepDocument {
                token: s.token,
                logprob: s.logprob,
                top_logprobs: &s.top_logprobs,
            })
            .collect(),
        device: session.device().name(),
        engine: session.device().engine(),
        seed: settings.seed,
        timing: TimingDocument {
            load_ms: ms(load),
            ttft_ms: ms(generation.timing.ttft),
            tpot_ms: tpot.map(ms).unwrap_or(0.0),
            tokens_per_s: tpot.map_or(0.0, |t| (1e3 / t.as_secs_f64()).round() / 1e3),
        },
    }
}

fn summary(prompt: &[u32], generation: &Generation) -> String {
    let t = &generation.timing;
    let rate = t.tpot().map(|tpot| {
        let seconds = tpot.as_secs_f64();
        format!(", {:.1} ms a token ({:.1} a second)", seconds * 1e3, 1.0 / seconds)
    });
    format!(
        "{} prompt tokens, first token after {:.0} ms; {} tokens{}; finished by {}",
        prompt.len(),
        t.ttft.as_secs_f64() * 1e3,
        generation.tokens.len(),
        rate.unwrap_or_default(),
        generation.finish_reason.name()
    )
}
