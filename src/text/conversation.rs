//! A conversation of several turns, as the prompt of its next one.
//!
//! Keeps the messages; the model's own chat template renders the prompt from all of them each time. A template repeats
//! earlier turns unchanged, so a [`super::Session`] finds most of the new prompt in its cache. When the conversation
//! outgrows the cache, its oldest exchanges are left out, but never the system message.

use super::chat::{self, ChatError, Message};
use super::tokenizer::{Tokenizer, TokenizerError};
use crate::help::Help;

/// Why a conversation has no next prompt.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs, reason = "the message says what the fields are")]
pub enum ConversationError {
    /// The template does not render the messages.
    #[error(transparent)]
    Chat(#[from] ChatError),
    /// The prompt cannot be encoded.
    #[error(transparent)]
    Tokenizer(#[from] TokenizerError),
    /// The last message alone does not fit the cache.
    #[error("this message makes a prompt of {tokens} tokens, and the largest cache of this package has {capacity}")]
    TooLong { tokens: usize, capacity: usize },
}

impl Help for ConversationError {
    fn help(&self) -> Option<String> {
        match self {
            ConversationError::Chat(error) => error.help(),
            ConversationError::Tokenizer(error) => error.help(),
            ConversationError::TooLong { .. } => {
                Some("say less at once, or convert the model again with a larger --capacity".to_string())
            }
        }
    }
}

/// See the module's head.
#[derive(Clone, Debug, Default)]
pub struct Conversation {
    system: Option<Message>,
    /// User and assistant alternating; the last is the user's while an answer is pending.
    turns: Vec<Message>,
    /// Turns at the beginning that no longer fit.
    left_out: usize,
}

/// A prompt for the next answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Prompt {
    /// Token ids.
    pub ids: Vec<u32>,
    /// Total number of exchanges left out.
    pub left_out: usize,
}

impl Conversation {
    /// An empty conversation, with a system message or none.
    pub fn new(system: Option<&str>) -> Self {
        Conversation {
            system: system.map(Message::system),
            ..Conversation::default()
        }
    }

    /// Every message, including those left out of the prompt.
    pub fn messages(&self) -> impl Iterator<Item = &Message> {
        self.system.iter().chain(&self.turns)
    }

    /// Adds the user's message and returns the prompt for an answer: at most `capacity - room` tokens, if leaving out
    /// old turns achieves that, and always less than `capacity`. On an error the message is not added.
    pub fn ask(
        &mut self,
        tokenizer: &Tokenizer,
        text: &str,
        capacity: usize,
        room: usize,
    ) -> Result<Prompt, ConversationError> {
        self.turns.push(Message::user(text));
        let prompt = self.prompt(tokenizer, capacity, room);
        if prompt.is_err() {
            self.turns.pop();
        }
        prompt
    }

    fn prompt(&mut self, tokenizer: &Tokenizer, capacity: usize, room: usize) -> Result<Prompt, ConversationError> {
        let mut left_out = self.left_out;
        loop {
            let messages: Vec<Message> = self.system.iter().chain(&self.turns[left_out..]).cloned().collect();
            let ids = tokenizer.encode(&chat::render(tokenizer, &messages)?, false)?;
            let last = left_out + 1 >= self.turns.len();
            if ids.len() + room <= capacity || last && ids.len() < capacity {
                self.left_out = left_out;
                return Ok(Prompt {
                    ids,
                    left_out: left_out / 2,
                });
            }
            if last {
                let tokens = ids.len();
                return Err(ConversationError::TooLong { tokens, capacity });
            }
            left_out += 2;
        }
    }

    /// Adds the model's answer, complete or partial.
    pub fn answer(&mut self, text: &str) {
        debug_assert_eq!(self.turns.len() % 2, 1, "after a question");
        self.turns.push(Message::assistant(text));
    }

    /// Removes the last exchange, or the question without an answer, and returns the user's message.
    pub fn take_back(&mut self) -> Option<String> {
        if self.turns.len().is_multiple_of(2) {
            self.turns.pop();
        }
        let question = self.turns.pop()?;
        self.left_out = self.left_out.min(self.turns.len());
        Some(question.content)
    }

    /// Removes everything except the system message.
    pub fn clear(&mut self) {
        self.turns.clear();
        self.left_out = 0;
    }
}
