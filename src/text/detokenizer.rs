//! Streams tokens to text: [`Detokenizer`] never returns half a character.
//!
//! It returns pieces of valid UTF-8 and holds back text that may still change. It only appends, so a piece can be
//! printed immediately, and all pieces together are the text of all tokens decoded at once. How long a piece is held
//! back depends on the tokenizer's decoder: always inside a character, until the next token if only the last one loses
//! its suffix or if bytes have their own tokens, and until the end for a decoder that may rewrite text at any distance.

use super::decoding::Decoding;
use super::guarded::guarded;
use super::tokenizer::{Tokenizer, TokenizerError};

/// Text of a growing list of tokens.
#[derive(Clone)]
pub struct Detokenizer<'a> {
    tokenizer: &'a Tokenizer,
    decoding: Decoding,
}

impl<'a> Detokenizer<'a> {
    /// For one text.
    pub fn new(tokenizer: &'a Tokenizer) -> Self {
        Detokenizer {
            tokenizer,
            decoding: tokenizer.decoding(),
        }
    }

    /// The text that this token makes final: often one word, empty inside a character. Special tokens and unknown ids
    /// have none, and do not affect those after them.
    pub fn push(&mut self, token: u32) -> Result<String, TokenizerError> {
        match self.tokenizer.visible(token) {
            Some(token) => guarded(|| self.decoding.push(token)).map_err(decode),
            None => Ok(String::new()),
        }
    }

    /// The rest, with replacement characters for bytes that never became one.
    pub fn finish(&mut self) -> Result<String, TokenizerError> {
        guarded(|| self.decoding.finish()).map_err(decode)
    }
}

fn decode(error: tokenizers::Error) -> TokenizerError {
    TokenizerError::Decode(error.to_string())
}
