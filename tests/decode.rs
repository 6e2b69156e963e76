//! Sessions on the CPU executor with a real (tiny) model; tokenizer, chat template and streaming text with a real
//! tokenizer and with small ones.

#[path = "decode/batch.rs"]
mod batch;
#[path = "decode/decoders.rs"]
mod decoders;
#[path = "decode/embeddings.rs"]
mod embeddings;
#[path = "decode/experts.rs"]
mod experts;
#[path = "decode/families.rs"]
mod families;
#[path = "decode/files.rs"]
mod files;
#[path = "decode/jinja.rs"]
mod jinja;
#[path = "decode/session.rs"]
mod session;
#[path = "decode/text.rs"]
mod text;
#[path = "decode/tiny.rs"]
mod tiny;
