//! Text to token ids and back: the tokenizer of the model, its chat template, text from a stream of tokens.
//!
//! Input: a tokenizer folder in Hugging Face's layout, and text, messages or token ids. Output: ids or text. [`chat`]
//! renders the model's chat template with [`jinja`], [`conversation`] builds the prompt of each turn, [`TextStream`]
//! ([`Detokenizer`] and [`StopMatcher`]) turns tokens into text as they come, [`tools`] finds tool calls in it,
//! [`escapes`] handles those of the command line. `decode` computes tokens; `package` owns the files.

pub mod chat;
pub mod conversation;
mod decoding;
mod detokenizer;
mod end_tokens;
pub mod escapes;
mod guarded;
pub mod jinja;
mod special_tokens;
mod stop;
mod stream;
mod token_bytes;
mod tokenizer;
pub mod tools;

pub use chat::{ChatError, Message};
pub use conversation::{Conversation, ConversationError};
pub use detokenizer::Detokenizer;
pub use end_tokens::{EndTokens, end_tokens_of_configs};
pub use stop::{Shown, StopMatcher};
pub use stream::TextStream;
pub use tokenizer::{FILES, Tokenizer, TokenizerError};
