//! Tokenizer, chat template and streaming text, on the tokenizer of a real model.

#[path = "decode/text.rs"]
mod text;
