//! The bytes of each token of a tokenizer.
//!
//! Vocabularies encode bytes as letters: byte-level BPE has a letter for every byte (GPT-2's table), sentence pieces
//! write a space as `▁` and lone bytes as `<0x0A>`, word pieces mark a continuation with `##`. Decoding a single token
//! would lose partial characters, so this reads the vocabulary instead.

use std::collections::HashMap;

/// By id; empty where there is no token. Special tokens are their own text.
pub(super) fn token_bytes(tokenizer: &tokenizers::Tokenizer) -> Vec<Vec<u8>> {
    let vocabulary = tokenizer.get_vocab(true);
    let added = tokenizer.get_added_tokens_decoder();
    let spelling = Spelling::of(tokenizer);
    let len = vocabulary.values().max().map_or(0, |id| *id as usize + 1);
    let mut all = vec![Vec::new(); len];
    for (token, id) in vocabulary {
        all[id as usize] = match added.contains_key(&id) {
            true => token.into_bytes(),
            false => spelling.bytes(&token),
        };
    }
    all
}

/// How a vocabulary writes bytes.
enum Spelling {
    ByteLevel(HashMap<char, u8>),
    SentencePiece,
    WordPiece,
}

impl Spelling {
    /// Determined from the decoder, which reverses it.
    fn of(tokenizer: &tokenizers::Tokenizer) -> Self {
        let decoder = tokenizer.get_decoder().and_then(|d| serde_json::to_string(d).ok());
        let decoder = decoder.unwrap_or_default();
        if decoder.contains("\"ByteLevel\"") {
            Spelling::ByteLevel(byte_letters())
        } else if decoder.contains("\"WordPiece\"") {
            Spelling::WordPiece
        } else {
            Spelling::SentencePiece
        }
    }

    fn bytes(&self, token: &str) -> Vec<u8> {
        match self {
            Spelling::ByteLevel(letters) => {
                let bytes: Option<Vec<u8>> = token.chars().map(|c| letters.get(&c).copied()).collect();
                bytes.unwrap_or_else(|| token.as_bytes().to_vec())
            }
            Spelling::WordPiece => token.strip_prefix("##").unwrap_or(token).as_bytes().to_vec(),
            Spelling::SentencePiece => {
                let hex = token.strip_prefix("<0x").and_then(|t| t.strip_suffix('>'));
                match hex.and_then(|hex| u8::from_str_radix(hex, 16).ok()) {
                    Some(byte) => vec![byte],
                    None => token.replace('▁', " ").into_bytes(),
                }
            }
        }
    }
}

/// GPT-2's letters: printable bytes are themselves, the others follow from U+0100 on.
pub(super) fn byte_letters() -> HashMap<char, u8> {
    let printable = |b: u8| matches!(b, b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF);
    let mut next = 0x100;
    let mut letter = |b: u8| {
        if printable(b) {
            return char::from(b);
        }
        next += 1;
        char::from_u32(next - 1).expect("far below the surrogates")
    };
    (0..=255).map(|b| (letter(b), b)).collect()
}
