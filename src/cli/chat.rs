//! `lapidary chat`: a conversation, with line editing and a history on a terminal. Otherwise every line of standard input
//! is a message, for scripts.
//!
//! One session serves all turns, so each turn computes only what its prompt adds to the cache.

use std::io::{self, BufRead, IsTerminal, Write};
use std::ops::ControlFlow;
use std::path::PathBuf;

use rustyline::DefaultEditor;
use rustyline::error::ReadlineError;

use super::Failure;
use super::device::Place;
use super::events::{self, Event, Summary};
use super::generate::{fitting, need};
use super::interrupt::Listener;
use super::sampler::SamplerArgs;
use crate::decode::{self, FinishReason, Limits, Session};
use crate::package::Package;
use crate::sample::Chain;
use crate::text::{ChatError, Conversation, Tokenizer};

#[derive(clap::Args)]
pub struct Args {
    /// The package
    #[arg(value_name = "PKG")]
    package: PathBuf,
    /// System message
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true)]
    system: Option<String>,
    /// Maximum number of tokens of an answer
    #[arg(long, value_name = "N", default_value_t = 1024)]
    max_new_tokens: usize,
    /// Stop an answer before this text; escapes such as \n and special tokens are allowed (repeatable)
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true)]
    stop: Vec<String>,
    #[command(flatten)]
    place: Place,
    /// Input history file [default: lapidary/history in $XDG_STATE_HOME or ~/.local/state]
    #[arg(long, value_name = "FILE")]
    history_file: Option<PathBuf>,
    /// Keep no input history
    #[arg(long, conflicts_with = "history_file")]
    no_history: bool,
    /// Print token counts and times after each answer
    #[arg(long)]
    stats: bool,
    /// Print one JSON object per line, as `generate --json-lines`, for each turn
    #[arg(long)]
    json_lines: bool,
    #[command(flatten)]
    sampler: SamplerArgs,
}

const HELP: &str = "\
/retry         generate the last answer again
/undo          remove the last message and its answer
/clear         start again with the same system message
/system TEXT   start again with this system message
/quit          leave (also Ctrl-D)
A line that ends with \\ continues in the next one. //x sends /x. Ctrl-C stops an answer.";

pub fn run(args: Args) -> Result<(), Failure> {
    let package = Package::open(&args.package)?;
    let tokenizer = package.tokenizer()?;
    let tokenizer = need(tokenizer.as_ref(), &args.package, "chat")?;
    if tokenizer.chat_template.is_none() {
        return Err(ChatError::NoTemplate.into());
    }
    let settings = args
        .sampler
        .settings(&args.package, Some(tokenizer), package.vocabulary()?)?;
    let mut talk = Talk {
        tokenizer,
        vocabulary: package.vocabulary()?,
        chain: Chain::new(&settings)?,
        limits: Limits {
            max_new_tokens: args.max_new_tokens,
            eos_ids: package.manifest.eos_token_ids.clone(),
            stop: args.sampler.texts("--stop", &args.stop)?,
            logprobs: None,
        },
        conversation: Conversation::new(args.system.as_deref()),
        session: args.place.open(&package, 1, args.max_new_tokens)?,
        left_out: 0,
        seed: settings.seed,
        args: &args,
    };
    let is_person = io::stdin().is_terminal() && io::stdout().is_terminal() && !args.json_lines;
    match is_person {
        true => talk.with_person(),
        false => talk.with_script(),
    }
}

/// The command of one line.
#[derive(Debug, PartialEq, Eq)]
enum Input<'a> {
    Say(&'a str),
    Retry,
    Undo,
    Clear,
    System(&'a str),
    Help,
    Quit,
    Unknown(&'a str),
}

impl<'a> Input<'a> {
    fn read(line: &'a str) -> Self {
        let line = line.trim();
        if let Some(said) = line.strip_prefix("//") {
            return Input::Say(&line[line.len() - said.len() - 1..]);
        }
        if !line.starts_with('/') {
            return Input::Say(line);
        }
        let (command, rest) = line.split_once(char::is_whitespace).unwrap_or((line, ""));
        match (command, rest.trim()) {
            ("/retry", "") => Input::Retry,
            ("/undo", "") => Input::Undo,
            ("/clear", "") => Input::Clear,
            ("/system", text) if !text.is_empty() => Input::System(text),
            ("/help", "") => Input::Help,
            ("/quit" | "/exit", "") => Input::Quit,
            _ => Input::Unknown(line),
        }
    }
}

struct Talk<'a> {
    args: &'a Args,
    tokenizer: &'a Tokenizer,
    vocabulary: usize,
    session: Session,
    chain: Chain,
    limits: Limits,
    conversation: Conversation,
    /// Number of dropped exchanges that the user was informed about.
    left_out: usize,
    seed: u64,
}

impl Talk<'_> {
    fn with_person(&mut self) -> Result<(), Failure> {
        let terminal = |e: ReadlineError| Failure::other(format!("cannot read from the terminal: {e}"));
        let mut editor = DefaultEditor::new().map_err(terminal)?;
        let history = self.history_file();
        if let Some(path) = &history {
            // A missing file is not an error.
            let _ = editor.load_history(path);
        }
        println!("Ctrl-C stops an answer, Ctrl-D ends the conversation, /help lists the commands.");
        loop {
            let mut line = match editor.readline("> ") {
                Ok(line) => line,
                Err(ReadlineError::Interrupted) => continue,
                Err(ReadlineError::Eof) => return Ok(()),
                Err(e) => return Err(terminal(e)),
            };
            while line.ends_with('\\') {
                line.pop();
                match editor.readline(". ") {
                    Ok(more) => line = line + "\n" + &more,
                    Err(_) => break,
                }
            }
            if line.trim().is_empty() {
                continue;
            }
            let _ = editor.add_history_entry(line.as_str());
            if let Some(path) = &history {
                // A history that cannot be saved must not end the conversation.
                let _ = path.parent().map(std::fs::create_dir_all);
                let _ = editor.save_history(path);
            }
            match self.obey(&line) {
                Ok(ControlFlow::Continue(())) => {}
                Ok(ControlFlow::Break(())) => return Ok(()),
                // An invalid message does not affect the next.
                Err(failure) if failure.status == 2 => drop(failure.report()),
                Err(failure) => return Err(failure),
            }
        }
    }

    fn with_script(&mut self) -> Result<(), Failure> {
        for (i, line) in io::stdin().lock().lines().enumerate() {
            let line = line.map_err(|e| {
                Failure::input(format!("standard input, line {}: {e}", i + 1)).help("messages are lines of UTF-8")
            })?;
            if !line.trim().is_empty() && self.obey(&line)?.is_break() {
                break;
            }
        }
        Ok(())
    }

    fn history_file(&self) -> Option<PathBuf> {
        if self.args.no_history || self.args.history_file.is_some() {
            return self.args.history_file.clone();
        }
        let of = |name: &str| std::env::var_os(name).filter(|v| !v.is_empty()).map(PathBuf::from);
        let state = of("XDG_STATE_HOME").or_else(|| Some(of("HOME")?.join(".local/state")))?;
        Some(state.join("lapidary/history"))
    }

    fn obey(&mut self, line: &str) -> Result<ControlFlow<()>, Failure> {
        match Input::read(line) {
            Input::Say(text) => self.turn(text)?,
            Input::Retry => match self.conversation.take_back() {
                Some(text) => self.turn(&text)?,
                None => eprintln!("there is no message yet"),
            },
            Input::Undo => match self.conversation.take_back() {
                Some(text) => eprintln!("removed: {text}"),
                None => eprintln!("there is no message yet"),
            },
            Input::Clear => self.conversation.clear(),
            Input::System(text) => self.conversation = Conversation::new(Some(text)),
            Input::Help => eprintln!("{HELP}"),
            Input::Quit => return Ok(ControlFlow::Break(())),
            Input::Unknown(line) => eprintln!("{line}: unknown command; /help lists the commands"),
        }
        Ok(ControlFlow::Continue(()))
    }

    /// A message and its answer.
    fn turn(&mut self, text: &str) -> Result<(), Failure> {
        let capacity = self.session.largest_capacity();
        // Old turns are dropped to make room for a typical answer, not for the longest allowed one.
        let room = self.limits.max_new_tokens.min(capacity / 4);
        let prompt = self.conversation.ask(self.tokenizer, text, capacity, room)?;
        let ids = match fitting(prompt.ids, self.vocabulary, &self.args.package) {
            Ok(ids) => ids,
            Err(failure) => {
                self.conversation.take_back();
                return Err(failure);
            }
        };
        if prompt.left_out > self.left_out {
            eprintln!(
                "(the cache is full: the first {} exchanges were dropped)",
                prompt.left_out
            );
        }
        self.left_out = prompt.left_out;

        let mut stdout = io::stdout().lock();
        let (json, seed) = (self.args.json_lines, self.seed);
        if json {
            Event::Prompt { prompt_ids: &ids, seed }.write(&mut stdout)?;
        }
        let listener = Listener::new();
        let tokenizer = Some(self.tokenizer);
        let generation = decode::stream(
            &mut self.session,
            tokenizer,
            &ids,
            &mut self.chain,
            &self.limits,
            |piece| {
                if json {
                    Event::from(piece).write(&mut stdout)?;
                } else {
                    stdout.write_all(piece.text.as_bytes())?;
                    stdout.flush()?;
                }
                Ok(match listener.interrupted() {
                    true => ControlFlow::Break(()),
                    false => ControlFlow::Continue(()),
                })
            },
        );
        drop(listener);
        let generation = match generation {
            Ok(generation) => generation,
            Err(error) => {
                self.conversation.take_back();
                return Err(error.into());
            }
        };
        self.conversation.answer(&generation.text);
        if json {
            let summary = Summary::new(&generation, &self.session, seed, None);
            let tokens = &generation.tokens[..];
            return Ok(Event::Done { tokens, summary }.write(&mut stdout)?);
        }
        let end = match generation.finish_reason {
            FinishReason::Stop => "",
            FinishReason::Interrupted => " [stopped]",
            FinishReason::Length => " [--max-new-tokens]",
            FinishReason::Capacity => " [the cache is full]",
        };
        // Lapidary's marks are for terminals; a script gets only the model's text.
        let is_person = stdout.is_terminal();
        writeln!(stdout, "{}", if is_person { end } else { "" })?;
        stdout.flush()?;
        if self.args.stats {
            eprintln!("{}", events::summary_line(ids.len(), &generation));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::Input;

    #[test]
    fn lines_are_messages_or_commands() {
        for (line, input) in [
            (" hello ", Input::Say("hello")),
            ("//etc is a folder", Input::Say("/etc is a folder")),
            ("/retry", Input::Retry),
            ("/undo ", Input::Undo),
            ("/clear", Input::Clear),
            ("/system  Be brief.", Input::System("Be brief.")),
            ("/system", Input::Unknown("/system")),
            ("/help", Input::Help),
            ("/exit", Input::Quit),
            ("/quit now", Input::Unknown("/quit now")),
            ("/etc", Input::Unknown("/etc")),
        ] {
            assert_eq!(Input::read(line), input, "{line}");
        }
    }
}
