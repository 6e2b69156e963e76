//! Text to token ids and back: the tokenizer of the model, its chat template, text from a stream of tokens.
//!
//! Takes a tokenizer folder as Hugging Face lays it out, and text, messages or token ids; gives ids or text. [`chat`]
//! renders the model's chat template, [`conversation`] makes the prompt of each turn, [`Detokenizer`] and [`StopMatcher`]
//! turn tokens into text as they come. Computing tokens belongs to `decode`, files of a package to `package`.

pub mod chat;
pub mod conversation;
mod detokenizer;
mod stop;
mod token_bytes;
mod tokenizer;

pub use chat::{ChatError, Message};
pub use conversation::{Conversation, ConversationError};
pub use detokenizer::Detokenizer;
pub use stop::{Shown, StopMatcher};
pub use tokenizer::{FILES, Tokenizer, TokenizerError, eos_ids_of_configs};
