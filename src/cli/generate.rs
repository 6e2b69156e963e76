//! `lapidary generate`: streams text for one prompt.

use std::collections::BTreeSet;
use std::io::{IsTerminal, Read, Write};
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::time::Instant;

use super::device::Place;
use super::events::{self, Document, Event, Summary};
use super::sampler::SamplerArgs;
use super::{Failure, JsonForm, print_json};
use crate::decode::{self, Limits, Prompt};
use crate::package::Package;
use crate::sample::Chain;
use crate::tensor::npy;
use crate::text::{Message, Tokenizer, chat};

#[derive(clap::Args)]
#[command(group = clap::ArgGroup::new("prompts").required(true).multiple(false))]
pub struct Args {
    /// The package
    #[arg(value_name = "PKG")]
    package: PathBuf,
    /// Continue this text
    #[arg(long, value_name = "TEXT", group = "prompts", allow_hyphen_values = true)]
    prompt: Option<String>,
    /// Answer this message, with the model's chat template
    #[arg(long, value_name = "TEXT", group = "prompts", allow_hyphen_values = true)]
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
    /// Continue embeddings: floats of [tokens, hidden] or [1, tokens, hidden], for a model that takes embeddings
    #[arg(long, value_name = "FILE.npy", group = "prompts")]
    prompt_embeds: Option<PathBuf>,
    /// System message for --chat
    #[arg(long, value_name = "TEXT", requires = "chat", allow_hyphen_values = true)]
    system: Option<String>,

    /// Maximum number of tokens to generate
    #[arg(long, value_name = "N", default_value_t = 256)]
    max_new_tokens: usize,
    /// Stop before this text; escapes such as \n and special tokens are allowed (repeatable)
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true)]
    stop: Vec<String>,
    /// Do not stop at the model's end tokens
    #[arg(long)]
    ignore_eos: bool,

    #[command(flatten)]
    place: Place,

    /// Report the N most probable tokens of each step (with --json or --json-lines)
    #[arg(long, value_name = "N", requires = "machine")]
    logprobs: Option<usize>,
    /// Print one JSON document at the end instead of text
    #[arg(long, group = "machine", value_enum, value_name = "FORM", num_args = 0..=1, require_equals = true, default_missing_value = "pretty")]
    json: Option<JsonForm>,
    /// Print one JSON object per line: the prompt, each token as it is generated, the end
    #[arg(long, group = "machine")]
    json_lines: bool,
    #[command(flatten)]
    sampler: SamplerArgs,
}

pub fn run(args: Args, started: Instant) -> Result<(), Failure> {
    let package = Package::open(&args.package)?;
    let tokenizer = package.tokenizer()?;
    let rows = match &args.prompt_embeds {
        Some(path) => embeddings(path, &package)?,
        None => Vec::new(),
    };
    let ids = match &args.prompt_embeds {
        Some(_) => Vec::new(),
        None => prompt_ids(&args, tokenizer.as_ref(), package.vocabulary()?)?,
    };
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
        stop: args.sampler.texts("--stop", &args.stop)?,
        logprobs: (args.json.is_some() || args.json_lines).then(|| args.logprobs.unwrap_or(0)),
    };

    let (prompt, length) = match &args.prompt_embeds {
        Some(_) => {
            let width = package.manifest.architecture.hidden.unwrap_or(1);
            (Prompt::Embeddings(&rows), rows.len() / width.max(1))
        }
        None => (Prompt::Tokens(&ids), ids.len()),
    };
    let total = length.saturating_add(args.max_new_tokens);
    let mut session = args.place.open(&package, length, total)?;
    // Its manifest takes memory.
    drop(package);
    match prompt {
        Prompt::Tokens(ids) => session.check(ids)?,
        Prompt::Embeddings(rows) => session.check_embeddings(rows)?,
    }
    let load = started.elapsed();

    let mut stdout = std::io::stdout().lock();
    if args.json_lines {
        let (prompt_ids, seed) = (&ids[..], settings.seed);
        Event::Prompt { prompt_ids, seed }.write(&mut stdout)?;
    }
    let generation = decode::stream_prompt(&mut session, tokenizer.as_ref(), prompt, &mut chain, &limits, |piece| {
        if args.json_lines {
            Event::from(piece).write(&mut stdout)?;
        } else if args.json.is_none() {
            stdout.write_all(piece.text.as_bytes())?;
            stdout.flush()?;
        }
        Ok(ControlFlow::Continue(()))
    })?;
    let summary = Summary::new(&generation, &session, settings.seed, Some(load));
    // Frees the model before the code that prints is read: its pages would add to the peak of memory.
    drop(session);
    let tokens = &generation.tokens[..];
    if args.json_lines {
        return Ok(Event::Done { tokens, summary }.write(&mut stdout)?);
    }
    if let Some(form) = args.json {
        drop(stdout);
        return print_json(
            &Document {
                prompt_ids: &ids,
                tokens,
                steps: &generation.steps,
                summary,
            },
            form,
        );
    }
    if tokenizer.is_none() {
        let ids: Vec<String> = tokens.iter().map(u32::to_string).collect();
        stdout.write_all(ids.join(",").as_bytes())?;
    }
    writeln!(stdout)?;
    stdout.flush()?;
    if std::io::stderr().is_terminal() && !super::output::is_quiet() {
        eprintln!("{}", events::summary_line(length, &generation));
    }
    Ok(())
}

pub fn need<'a>(tokenizer: Option<&'a Tokenizer>, package: &Path, flag: &str) -> Result<&'a Tokenizer, Failure> {
    tokenizer.ok_or_else(|| {
        Failure::input(format!(
            "{}: {flag} needs a tokenizer, and the package has none",
            package.display()
        ))
        .help("convert again with --tokenizer FILE_OR_DIR, or give token ids with --prompt-ids")
    })
}

/// The embeddings of a prompt, row by row.
fn embeddings(path: &Path, package: &Package) -> Result<Vec<f32>, Failure> {
    if !package.takes_embeddings() {
        return Err(Failure::input(format!(
            "{}: the model takes token ids, not embeddings (--prompt-embeds)",
            package.folder.display()
        ))
        .help("give --prompt-ids or text"));
    }
    let tensor = npy::read(path)?;
    let width = package.manifest.architecture.hidden;
    match *tensor.shape() {
        [_, columns] | [1, _, columns] if Some(columns) == width => {}
        ref shape => {
            let width = width.map_or_else(|| "hidden".to_string(), |width| width.to_string());
            return Err(Failure::input(format!(
                "{}: the array is {shape:?}, and the model takes [tokens, {width}] or [1, tokens, {width}]",
                path.display()
            )));
        }
    }
    let values = tensor.to_f32();
    match values.iter().position(|value| !value.is_finite()) {
        Some(at) => {
            let (value, row) = (values[at], at / width.unwrap_or(1).max(1));
            Err(Failure::input(format!("{}: row {row} holds {value}", path.display())))
        }
        None => Ok(values),
    }
}

fn prompt_ids(args: &Args, tokenizer: Option<&Tokenizer>, vocabulary: usize) -> Result<Vec<u32>, Failure> {
    if let Some(ids) = &args.prompt_ids {
        return Ok(ids.clone());
    }
    if let Some(text) = &args.chat {
        let tokenizer = need(tokenizer, &args.package, "--chat")?;
        let system = args.system.as_ref().map(Message::system);
        let messages: Vec<Message> = system.into_iter().chain([Message::user(text)]).collect();
        let text = chat::render(tokenizer, &messages)?;
        return fitting(tokenizer.encode(&text, false)?, vocabulary, &args.package);
    }
    let (text, flag) = match (&args.prompt, &args.prompt_file) {
        (Some(text), _) => (text.clone(), "--prompt"),
        (None, Some(path)) => (read_text(path)?, "--prompt-file"),
        (None, None) => unreachable!("clap asks for one of the group"),
    };
    let tokenizer = need(tokenizer, &args.package, flag)?;
    fitting(tokenizer.encode(&text, true)?, vocabulary, &args.package)
}

/// The ids, if all are in the model's vocabulary: this detects the tokenizer of another model.
pub fn fitting(ids: Vec<u32>, vocabulary: usize, package: &Path) -> Result<Vec<u32>, Failure> {
    match ids.iter().find(|id| **id as usize >= vocabulary) {
        None => Ok(ids),
        Some(id) => Err(Failure::input(format!(
            "{}: the tokenizer gives token {id} for this text, and the model's vocabulary is {vocabulary}: they do not belong \
             together",
            package.display()
        ))
        .help("convert again with the --tokenizer of this model")),
    }
}

fn read_text(path: &Path) -> Result<String, Failure> {
    let is_stdin = path == Path::new("-");
    let read = match is_stdin {
        true => {
            let mut text = String::new();
            std::io::stdin().read_to_string(&mut text).map(|_| text)
        }
        false => std::fs::read_to_string(path),
    };
    read.map_err(|e| {
        let name = if is_stdin {
            "standard input".into()
        } else {
            path.display().to_string()
        };
        Failure::input(format!("{name}: {e}")).help("--prompt-file takes UTF-8 text")
    })
}
