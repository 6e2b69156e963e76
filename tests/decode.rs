//! Sessions on the CPU executor with a real (tiny) model; tokenizer, chat template and streaming text with a real
//! tokenizer.

#[path = "decode/session.rs"]
mod session;
#[path = "decode/text.rs"]
mod text;
