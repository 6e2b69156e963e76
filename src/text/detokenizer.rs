//! Tokens to text as they come: [`Detokenizer`] never gives half a character.
//!
//! It gives pieces of valid UTF-8 and keeps back what may still change. It only ever appends, so what it gave can be printed
//! at once.

use super::tokenizer::{Tokenizer, TokenizerError};

/// What a decoder writes where the bytes are no character, or not one yet.
const REPLACEMENT: char = '\u{FFFD}';

/// A character has at most four bytes, hence at most four byte tokens; an undecodable tail longer than this will stay so.
const LONGEST_PENDING: usize = 8;

/// Text of a growing list of tokens.
///
/// A token's text can depend on those before it (a leading space that only the first word loses, bytes of one character
/// in several tokens), so each step decodes a short window twice, without and with the new token, and gives the
/// difference.
pub struct Detokenizer<'a> {
    tokenizer: &'a Tokenizer,
    window: Vec<u32>,
    /// Tokens of the window whose text was given out.
    settled: usize,
    /// Decoded text of the settled part.
    prefix: String,
}

impl<'a> Detokenizer<'a> {
    /// For one text.
    pub fn new(tokenizer: &'a Tokenizer) -> Self {
        Detokenizer {
            tokenizer,
            window: Vec::new(),
            settled: 0,
            prefix: String::new(),
        }
    }

    /// The text that became certain with this token; often one word, empty inside a character.
    pub fn push(&mut self, token: u32) -> Result<String, TokenizerError> {
        self.window.push(token);
        let text = self.tokenizer.decode(&self.window)?;
        let pending = self.window.len() - self.settled;
        if text.ends_with(REPLACEMENT) && pending < LONGEST_PENDING {
            return Ok(String::new());
        }
        self.settle(&text)
    }

    /// The rest, with replacement characters for bytes that never became one.
    pub fn finish(&mut self) -> Result<String, TokenizerError> {
        if self.settled == self.window.len() {
            return Ok(String::new());
        }
        let text = self.tokenizer.decode(&self.window)?;
        self.settle(&text)
    }

    fn settle(&mut self, text: &str) -> Result<String, TokenizerError> {
        // Decoders append; if one ever rewrites earlier text, what was printed stays and the rest follows it.
        let piece = match text.strip_prefix(self.prefix.as_str()) {
            Some(piece) => piece.to_string(),
            None => text.chars().skip(self.prefix.chars().count()).collect(),
        };
        // Next time only the tokens since the last settling are context: a window of a few tokens, whatever the length.
        self.window.drain(..self.settled);
        self.prefix = self.tokenizer.decode(&self.window)?;
        self.settled = self.window.len();
        Ok(piece)
    }
}
