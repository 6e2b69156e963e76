//! What a command ends with when it does not end well: an exit status, one message, and what to do.
//!
//! Errors of the rooms are typed and say what is wrong; this is the one place that decides whose fault each is (2: the
//! input's or the usage's, 1: anything else) and how it is shown.

use std::fmt;
use std::io::{self, Write};
use std::path::Path;
use std::process::ExitCode;

use super::interrupt;
use crate::backend::tensorrt;
use crate::decode::chat::ChatError;
use crate::decode::conversation::ConversationError;
use crate::decode::tokenizer::TokenizerError;
use crate::decode::{DeviceError, GenerateError, SessionError};
use crate::package::PackageError;
use crate::passes::PassError;
use crate::sample::SettingsError;
use crate::spec::SpecError;
use crate::{onnx, weights};

#[derive(Debug)]
pub struct Failure {
    pub status: u8,
    pub message: String,
    pub help: Option<String>,
}

impl Failure {
    /// Wrong usage or unusable input.
    pub fn input(message: impl fmt::Display) -> Self {
        Failure {
            status: 2,
            message: message.to_string(),
            help: None,
        }
    }

    /// Anything else.
    pub fn other(message: impl fmt::Display) -> Self {
        Failure {
            status: 1,
            ..Failure::input(message)
        }
    }

    pub fn help(mut self, help: impl Into<String>) -> Self {
        self.help = Some(help.into());
        self
    }

    /// For errors that know themselves what to do, or that nothing can be done.
    pub fn helped(message: impl fmt::Display, help: Option<String>) -> Self {
        Failure {
            help,
            ..Failure::input(message)
        }
    }

    /// The same of the file at `path`, for errors that do not know it.
    pub fn at(self, path: &Path) -> Self {
        Failure {
            message: format!("{}: {}", path.display(), self.message),
            ..self
        }
    }

    /// For errors whose message has the form `what is wrong; what to do`.
    pub fn with_remedy(message: impl fmt::Display) -> Self {
        let message = message.to_string();
        match message.rsplit_once("; ") {
            Some((what, remedy)) => Failure::input(what).help(remedy),
            None => Failure::input(message),
        }
    }

    /// The export at `path` cannot be made canonical.
    pub fn pass(path: &Path, error: PassError) -> Self {
        let failure = Failure::input(&error).at(path);
        match error {
            PassError::Broken { .. } => Failure { status: 1, ..failure },
            PassError::Range { .. } => Failure::with_remedy(error).at(path),
            _ => failure.help(format!(
                "`lapidary inspect {}` shows what was understood",
                path.display()
            )),
        }
    }

    /// The user stopped it, and nothing is left of what was begun; [`interrupt::say`] has the words.
    pub fn interrupted() -> Self {
        Failure {
            status: interrupt::STATUS,
            ..Failure::input("")
        }
    }

    /// Something that no input should be able to cause.
    pub fn bug(error: impl fmt::Display) -> Self {
        Failure::other(error).help("this is a bug in Lapidary; please report it with the export")
    }

    /// Prints to stderr. A reader of our output that went away is no error worth a message.
    pub fn report(&self) -> ExitCode {
        if self.status == interrupt::STATUS {
            // To do what one was told is no error.
            interrupt::say("");
        } else if !self.message.is_empty() {
            let mut stderr = io::stderr().lock();
            let _ = writeln!(stderr, "error: {}", self.message);
            if let Some(help) = &self.help {
                let _ = writeln!(stderr, "help: {help}");
            }
        }
        ExitCode::from(self.status)
    }
}

/// Our own output could not be written.
impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Self {
        if error.kind() == io::ErrorKind::BrokenPipe {
            return Failure::other("");
        }
        Failure::other(format!("cannot write the output: {error}"))
    }
}

impl From<onnx::ReadError> for Failure {
    fn from(error: onnx::ReadError) -> Self {
        Failure::with_remedy(error)
    }
}

impl From<PackageError> for Failure {
    fn from(error: PackageError) -> Self {
        use weights::WriteError;
        let failure = match &error {
            PackageError::Weights(WriteError::Constant { .. }) | PackageError::Read(_) => Failure::with_remedy(&error),
            PackageError::Weights(WriteError::Numbers { .. }) => {
                Failure::input(&error).help("take them anyway with --allow-nonfinite or --allow-overflow")
            }
            _ => Failure::input(&error),
        };
        Failure {
            help: error.help().or(failure.help),
            ..failure
        }
    }
}

impl From<weights::source::SourceError> for Failure {
    fn from(error: weights::source::SourceError) -> Self {
        match error {
            weights::source::SourceError::Onnx(error) => error.into(),
            other => Failure::with_remedy(other),
        }
    }
}

impl From<SpecError> for Failure {
    fn from(error: SpecError) -> Self {
        Failure::input(error)
    }
}

impl From<TokenizerError> for Failure {
    fn from(error: TokenizerError) -> Self {
        Failure::input(error)
    }
}

impl From<ChatError> for Failure {
    fn from(error: ChatError) -> Self {
        let help = match &error {
            ChatError::NoTemplate => {
                Some("use --prompt, or convert with a --tokenizer folder that has a chat template")
            }
            ChatError::Refused(_) => Some("say it in another form; many models take no system message"),
            ChatError::Template(_) => {
                Some("correct the template in the package's tokenizer files, or use --prompt, which needs none")
            }
        };
        Failure {
            help: help.map(str::to_string),
            ..Failure::input(error)
        }
    }
}

impl From<ConversationError> for Failure {
    fn from(error: ConversationError) -> Self {
        match error {
            ConversationError::Chat(error) => error.into(),
            ConversationError::Tokenizer(error) => error.into(),
            error @ ConversationError::TooLong { .. } => {
                Failure::input(error).help("say less at once, or convert the model again with a larger --capacity")
            }
        }
    }
}

impl From<SettingsError> for Failure {
    fn from(error: SettingsError) -> Self {
        Failure::input(error)
    }
}

impl From<DeviceError> for Failure {
    fn from(error: DeviceError) -> Self {
        let help = error.help.clone();
        Failure {
            help,
            ..Failure::other(error)
        }
    }
}

impl From<SessionError> for Failure {
    fn from(error: SessionError) -> Self {
        let failure = Failure::input(&error);
        match error {
            SessionError::Device(device) => device.into(),
            SessionError::Empty => failure.help("give at least one token"),
            SessionError::OutsideVocabulary { .. } => failure.help("check that the ids are of this model's tokenizer"),
            SessionError::Capacity { .. } => {
                failure.help("shorten the prompt, or convert the model again with a larger --capacity")
            }
        }
    }
}

impl From<GenerateError> for Failure {
    fn from(error: GenerateError) -> Self {
        match error {
            GenerateError::Session(error) => error.into(),
            GenerateError::Tokenizer(error) => error.into(),
            GenerateError::Output(error) => error.into(),
            GenerateError::Draw { .. } => Failure::other(&error).help(
                "the model's numbers overflowed; convert it with --dtype fp32 or bf16, and try `lapidary verify`",
            ),
        }
    }
}

impl From<tensorrt::LibraryError> for Failure {
    fn from(error: tensorrt::LibraryError) -> Self {
        Failure::helped(&error, error.help())
    }
}

impl From<tensorrt::Error> for Failure {
    fn from(error: tensorrt::Error) -> Self {
        use tensorrt::Error;
        let status = match error {
            Error::Library(_) | Error::NeedsGpu { .. } | Error::Weight { .. } | Error::Profile { .. } => 2,
            _ => 1,
        };
        Failure {
            status,
            ..Failure::helped(&error, error.help())
        }
    }
}
