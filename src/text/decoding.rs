//! The decoder of a tokenizer as a stream: it takes one token after another, and returns text as soon as no later token can
//! change it.
//!
//! A decoder of the `tokenizers` library takes all tokens of a text and rewrites them in steps. [`Decoding`] has a
//! stage for each step, with that step's state: whether a token was the first, bytes that are not a character yet, a
//! suffix that only the last token loses. All pieces together are exactly the library's result for all tokens at once,
//! with one exception ([`LONGEST_RUN`]). A step that could change text at any distance holds everything until the end.

use std::collections::HashMap;
use std::sync::Arc;

use tokenizers::Decoder;
use tokenizers::decoders::DecoderWrapper;

use super::token_bytes::byte_letters;

type Result<T> = std::result::Result<T, tokenizers::Error>;

/// The replacement for bytes that are not a character.
const REPLACEMENT: &str = "\u{FFFD}";

/// Maximum number of single-byte tokens (`<0xE4>`) that are held back. The library rewrites every byte of a run of such
/// tokens if one of them is invalid, so a run is final only at its end; but a text of such tokens alone must not wait
/// forever. Characters of a longer run are output, and stay even if an invalid byte follows.
const LONGEST_RUN: usize = 64;

/// See the module's head.
#[derive(Clone)]
pub(super) struct Decoding {
    stages: Vec<Stage>,
}

impl Decoding {
    /// The steps of a tokenizer's decoder, at the start of a text.
    pub fn new(decoder: Option<&DecoderWrapper>) -> Self {
        let mut stages = Vec::new();
        match decoder {
            None => stages.push(Stage::Spaced { first: true }),
            Some(decoder) => add_stages(decoder, &mut stages, &mut false),
        }
        Decoding { stages }
    }

    /// The text that this token makes final.
    pub fn push(&mut self, token: String) -> Result<String> {
        let mut pieces = vec![token];
        for stage in &mut self.stages {
            let mut out = Vec::new();
            for piece in pieces {
                stage.push(piece, &mut out)?;
            }
            pieces = out;
        }
        Ok(pieces.concat())
    }

    /// The rest of the text, after the last token.
    pub fn finish(&mut self) -> Result<String> {
        let mut pieces = Vec::new();
        for stage in &mut self.stages {
            let mut out = Vec::new();
            for piece in pieces {
                stage.push(piece, &mut out)?;
            }
            stage.finish(&mut out)?;
            pieces = out;
        }
        Ok(pieces.concat())
    }
}

/// One step. Before tokens are joined into one (`Fuse`, `ByteLevel`) a piece is a token; afterwards it is a part of the
/// single token.
#[derive(Clone)]
enum Stage {
    /// No decoder: a space between tokens.
    Spaced { first: bool },
    /// Each token separately, the first differently.
    Indexed { decoder: Arc<DecoderWrapper>, first: bool },
    /// Each token or character separately.
    Each(Arc<DecoderWrapper>),
    /// The last one differently: one is held back.
    Last {
        decoder: Arc<DecoderWrapper>,
        held: Option<String>,
    },
    /// Repeated tokens are merged.
    Ctc {
        decoder: Arc<DecoderWrapper>,
        last: Option<String>,
    },
    /// Characters at both ends of each token.
    StripEach { content: char, start: usize, stop: usize },
    /// Tokens of single bytes.
    ByteRun(ByteRun),
    /// Bytes encoded as GPT-2's letters.
    Letters {
        letters: Arc<HashMap<char, u8>>,
        bytes: Vec<u8>,
    },
    /// Characters at both ends of the text.
    StripEnds {
        content: char,
        /// Number still to remove; 0 after the first other character.
        start: usize,
        stop: usize,
        /// At the end so far; possibly to be removed.
        held: usize,
    },
    /// A string, anywhere in the text.
    Replace {
        pattern: String,
        content: String,
        held: String,
    },
    /// Anything else over the whole text.
    Whole {
        decoder: Arc<DecoderWrapper>,
        fused: bool,
        held: Vec<String>,
    },
}

/// `fused`: whether there is a single token.
fn add_stages(decoder: &DecoderWrapper, stages: &mut Vec<Stage>, fused: &mut bool) {
    let shared = || Arc::new(decoder.clone());
    let stage = match decoder {
        DecoderWrapper::Sequence(sequence) => {
            for decoder in sequence.get_decoders() {
                add_stages(decoder, stages, fused);
            }
            return;
        }
        DecoderWrapper::Fuse(_) => {
            *fused = true;
            return;
        }
        DecoderWrapper::ByteLevel(_) if !*fused => {
            *fused = true;
            Stage::Letters {
                letters: Arc::new(byte_letters()),
                bytes: Vec::new(),
            }
        }
        DecoderWrapper::ByteFallback(_) if !*fused => Stage::ByteRun(ByteRun::default()),
        DecoderWrapper::WordPiece(_) if !*fused => Stage::Indexed {
            decoder: shared(),
            first: true,
        },
        DecoderWrapper::Metaspace(_) if !*fused => Stage::Indexed {
            decoder: shared(),
            first: true,
        },
        // There is only the first token, and each of its characters is rewritten separately.
        DecoderWrapper::Metaspace(_) => Stage::Each(shared()),
        DecoderWrapper::BPE(_) if !*fused => Stage::Last {
            decoder: shared(),
            held: None,
        },
        DecoderWrapper::CTC(_) if !*fused => Stage::Ctc {
            decoder: shared(),
            last: None,
        },
        DecoderWrapper::Replace(_) if !*fused => Stage::Each(shared()),
        DecoderWrapper::Strip(strip) if !*fused => Stage::StripEach {
            content: strip.content,
            start: strip.start,
            stop: strip.stop,
        },
        DecoderWrapper::Strip(strip) => Stage::StripEnds {
            content: strip.content,
            start: strip.start,
            stop: strip.stop,
            held: 0,
        },
        DecoderWrapper::Replace(replace) => match string_pattern(decoder) {
            Some(pattern) => Stage::Replace {
                pattern,
                content: replace.content.clone(),
                held: String::new(),
            },
            None => Stage::whole(shared(), true),
        },
        DecoderWrapper::BPE(bpe) if !bpe.suffix.is_empty() => Stage::Replace {
            pattern: bpe.suffix.clone(),
            content: String::new(),
            held: String::new(),
        },
        _ => Stage::whole(shared(), *fused),
    };
    stages.push(stage);
}

/// The pattern of a `Replace` that is a string, not a regular expression. The library does not expose it otherwise.
fn string_pattern(decoder: &DecoderWrapper) -> Option<String> {
    let written = serde_json::to_value(decoder).ok()?;
    let pattern = written["pattern"]["String"].as_str()?;
    (!pattern.is_empty()).then(|| pattern.to_string())
}

/// A decoder's result for one token among others. Only for decoders that return as many tokens as they take.
fn one_of(decoder: &DecoderWrapper, tokens: Vec<String>, at: usize) -> Result<String> {
    Ok(decoder.decode_chain(tokens)?.into_iter().nth(at).unwrap_or_default())
}

impl Stage {
    fn whole(decoder: Arc<DecoderWrapper>, fused: bool) -> Self {
        Stage::Whole {
            decoder,
            fused,
            held: Vec::new(),
        }
    }

    fn push(&mut self, piece: String, out: &mut Vec<String>) -> Result<()> {
        match self {
            Stage::Spaced { first } => {
                if !std::mem::take(first) {
                    out.push(" ".to_string());
                }
                out.push(piece);
            }
            Stage::Indexed { decoder, first } => out.push(match std::mem::take(first) {
                true => one_of(decoder, vec![piece], 0)?,
                false => one_of(decoder, vec![String::new(), piece], 1)?,
            }),
            Stage::Each(decoder) => out.push(one_of(decoder, vec![piece], 0)?),
            Stage::Last { decoder, held } => {
                if let Some(held) = held.replace(piece) {
                    out.push(one_of(decoder, vec![held, String::new()], 0)?);
                }
            }
            Stage::Ctc { decoder, last } => {
                if last.as_ref() != Some(&piece) {
                    out.extend(decoder.decode_chain(vec![piece.clone()])?);
                    *last = Some(piece);
                }
            }
            Stage::StripEach { content, start, stop } => out.push(strip_token(&piece, *content, *start, *stop)),
            Stage::ByteRun(run) => run.push(piece, out),
            Stage::Letters { letters, bytes } => {
                let of_letters: Option<Vec<u8>> = piece.chars().map(|c| letters.get(&c).copied()).collect();
                bytes.extend(of_letters.unwrap_or_else(|| piece.into_bytes()));
                out.push(take_characters(bytes));
            }
            Stage::StripEnds {
                content,
                start,
                stop,
                held,
            } => {
                let mut text = String::new();
                for c in piece.chars() {
                    if c != *content {
                        *start = 0;
                        text.extend(std::iter::repeat_n(*content, std::mem::take(held)));
                        text.push(c);
                    } else if *start > 0 {
                        *start -= 1;
                    } else if *held < *stop {
                        *held += 1;
                    } else {
                        text.push(c);
                    }
                }
                out.push(text);
            }
            Stage::Replace { pattern, content, held } => {
                held.push_str(&piece);
                let mut text = String::new();
                while let Some((before, after)) = held.split_once(pattern.as_str()) {
                    text.push_str(before);
                    text.push_str(content);
                    *held = after.to_string();
                }
                let keep = overlap(held, pattern);
                let rest = held.split_off(held.len() - keep);
                text.push_str(held);
                *held = rest;
                out.push(text);
            }
            Stage::Whole { fused, held, .. } => match held.last_mut().filter(|_| *fused) {
                Some(text) => text.push_str(&piece),
                None => held.push(piece),
            },
        }
        Ok(())
    }

    fn finish(&mut self, out: &mut Vec<String>) -> Result<()> {
        match self {
            Stage::Last { decoder, held } => {
                if let Some(held) = held.take() {
                    out.push(one_of(decoder, vec![held], 0)?);
                }
            }
            Stage::ByteRun(run) => run.end(out),
            Stage::Letters { bytes, .. } => {
                out.push(String::from_utf8_lossy(bytes).into_owned());
                bytes.clear();
            }
            Stage::StripEnds { held, .. } => *held = 0,
            Stage::Replace { held, .. } => out.push(std::mem::take(held)),
            // The library's decoders may fail on a text without tokens.
            Stage::Whole { held, .. } if held.is_empty() => {}
            Stage::Whole { decoder, held, .. } => out.extend(decoder.decode_chain(std::mem::take(held))?),
            Stage::Spaced { .. }
            | Stage::Indexed { .. }
            | Stage::Each(_)
            | Stage::Ctc { .. }
            | Stage::StripEach { .. } => {}
        }
        Ok(())
    }
}

/// Removes complete parts from the front: characters, and a replacement for bytes that cannot become one.
fn take_characters(bytes: &mut Vec<u8>) -> String {
    let mut text = String::new();
    let mut taken = 0;
    for chunk in bytes.utf8_chunks() {
        text.push_str(chunk.valid());
        taken += chunk.valid().len();
        let invalid = chunk.invalid();
        let is_cut = taken + invalid.len() == bytes.len()
            && std::str::from_utf8(invalid).is_err_and(|e| e.error_len().is_none());
        if !invalid.is_empty() && !is_cut {
            text.push_str(REPLACEMENT);
            taken += invalid.len();
        }
    }
    bytes.drain(..taken);
    text
}

fn strip_token(token: &str, content: char, start: usize, stop: usize) -> String {
    let leading = token.chars().take(start).take_while(|c| *c == content).count();
    let rest: Vec<char> = token.chars().skip(leading).collect();
    let trailing = rest.iter().rev().take(stop).take_while(|c| **c == content).count();
    rest[..rest.len() - trailing].iter().collect()
}

/// Bytes of the longest beginning of `pattern`, without all of it, that `text` ends with. Always on a character border of
/// both.
pub(super) fn overlap(text: &str, pattern: &str) -> usize {
    let borders = pattern.char_indices().map(|(i, _)| i).skip(1);
    borders.filter(|i| text.ends_with(&pattern[..*i])).max().unwrap_or(0)
}

/// A run of single-byte tokens: text if they are valid together, else a replacement for each.
#[derive(Clone, Default)]
struct ByteRun {
    bytes: Vec<u8>,
    /// One of them was invalid, so all are replaced.
    is_broken: bool,
}

impl ByteRun {
    fn push(&mut self, token: String, out: &mut Vec<String>) {
        let Some(byte) = byte_of(&token) else {
            self.end(out);
            out.push(token);
            return;
        };
        if self.is_broken {
            return out.push(REPLACEMENT.to_string());
        }
        self.bytes.push(byte);
        let complete = match std::str::from_utf8(&self.bytes) {
            Ok(text) => text.len(),
            Err(error) if error.error_len().is_none() => error.valid_up_to(),
            Err(_) => {
                self.is_broken = true;
                return self.give_up(out);
            }
        };
        if self.bytes.len() >= LONGEST_RUN {
            let text: Vec<u8> = self.bytes.drain(..complete).collect();
            out.push(String::from_utf8(text).expect("checked"));
        }
    }

    fn end(&mut self, out: &mut Vec<String>) {
        self.is_broken = false;
        match std::str::from_utf8(&self.bytes) {
            Ok("") => {}
            Ok(text) => {
                out.push(text.to_string());
                self.bytes.clear();
            }
            Err(_) => self.give_up(out),
        }
    }

    fn give_up(&mut self, out: &mut Vec<String>) {
        out.extend(std::iter::repeat_n(REPLACEMENT.to_string(), self.bytes.len()));
        self.bytes.clear();
    }
}

/// The byte of `<0xE4>`; a token of this form without a number is not a byte.
fn byte_of(token: &str) -> Option<u8> {
    let hex = token.strip_prefix("<0x")?.strip_suffix('>')?;
    (token.len() == 6).then(|| u8::from_str_radix(hex, 16).ok()).flatten()
}
