//! From tokens to visible text: [`TextStream`] is a [`Detokenizer`] and a [`StopMatcher`] together.

use super::detokenizer::Detokenizer;
use super::stop::{Shown, StopMatcher};
use super::tokenizer::{Tokenizer, TokenizerError};

/// Text of tokens as they come, up to a stop string.
///
/// Special tokens have no text, but a stop string may contain them. The position of such a token in the text is known
/// at once, unless the detokenizer holds back text of earlier tokens; then the token waits for that text.
pub struct TextStream<'a> {
    detokenizer: Detokenizer<'a>,
    stops: StopMatcher,
    tokenizer: &'a Tokenizer,
    waiting: Option<Waiting>,
}

/// Special tokens after text that is not final yet.
struct Waiting {
    /// That text, if no token followed.
    before: String,
    ids: Vec<u32>,
}

impl<'a> TextStream<'a> {
    /// For one text. Empty stop strings are ignored.
    pub fn new(tokenizer: &'a Tokenizer, stops: impl IntoIterator<Item = String>) -> Self {
        TextStream {
            detokenizer: Detokenizer::new(tokenizer),
            stops: StopMatcher::with_special(stops, tokenizer),
            tokenizer,
            waiting: None,
        }
    }

    /// The text that this token makes final. Nothing may be pushed after a stop.
    pub fn push(&mut self, token: u32) -> Result<Shown, TokenizerError> {
        if self.tokenizer.is_special(token) {
            return self.push_special(token);
        }
        let piece = self.detokenizer.push(token)?;
        Ok(self.show(&piece))
    }

    fn push_special(&mut self, id: u32) -> Result<Shown, TokenizerError> {
        if !self.stops.watches_special() {
            return Ok(Shown::default());
        }
        let waiting = match &mut self.waiting {
            Some(waiting) => waiting,
            None => {
                let before = self.detokenizer.clone().finish()?;
                if before.is_empty() {
                    return Ok(self.stops.push_special(id));
                }
                let ids = Vec::new();
                self.waiting.insert(Waiting { before, ids })
            }
        };
        waiting.ids.push(id);
        // If this completes a stop string, no token follows, and the text before it is final.
        let mut stops = self.stops.clone();
        let shown = with_waiting(&mut stops, waiting, "");
        match shown.stopped {
            true => Ok(shown),
            false => Ok(Shown::default()),
        }
    }

    /// Everything held back. The last bytes may complete a stop string, too.
    pub fn finish(&mut self) -> Result<Shown, TokenizerError> {
        let piece = self.detokenizer.finish()?;
        let mut shown = self.show(&piece);
        if !shown.stopped {
            shown.text.push_str(&self.stops.finish());
        }
        Ok(shown)
    }

    fn show(&mut self, piece: &str) -> Shown {
        if piece.is_empty() {
            return Shown::default();
        }
        match self.waiting.take() {
            None => self.stops.push(piece),
            Some(waiting) => with_waiting(&mut self.stops, &waiting, piece),
        }
    }
}

/// The text that special tokens waited for, these tokens, and the rest of the piece. A piece that does not begin with
/// that text has rewritten it (a character that continues after the special token), and goes after the tokens.
fn with_waiting(stops: &mut StopMatcher, waiting: &Waiting, piece: &str) -> Shown {
    let (before, after) = match piece.strip_prefix(waiting.before.as_str()) {
        Some(after) => (waiting.before.as_str(), after),
        None if piece.is_empty() => (waiting.before.as_str(), ""),
        None => ("", piece),
    };
    let mut all = stops.push(before);
    for step in 0..=waiting.ids.len() {
        if all.stopped {
            break;
        }
        let shown = match waiting.ids.get(step) {
            Some(id) => stops.push_special(*id),
            None => stops.push(after),
        };
        all.text.push_str(&shown.text);
        all.stopped = shown.stopped;
    }
    all
}
