//! Streams text of a package, on the GPU if there is one.
//!
//! `cargo run --example generate -- llama.lapidary 1,20,5` (see `examples/convert.rs`); a package with a tokenizer takes text.

use std::error::Error;
use std::io::Write;
use std::path::Path;

use lapidary::decode::{Limits, Session, SessionOptions, generate};
use lapidary::package::Package;
use lapidary::sample::{Chain, Settings};

fn main() -> Result<(), Box<dyn Error>> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [folder, prompt] = &args[..] else {
        return Err("usage: generate PACKAGE PROMPT".into());
    };
    let package = Package::open(Path::new(folder))?;
    let tokenizer = package.tokenizer()?;
    let prompt: Vec<u32> = match &tokenizer {
        Some(tokenizer) => tokenizer.encode(prompt, true)?,
        None => prompt.split(',').map(str::parse).collect::<Result<_, _>>()?,
    };
    let limits = Limits {
        max_new_tokens: 16,
        eos_ids: package.manifest.eos_token_ids.clone(),
        ..Limits::default()
    };
    let options = SessionOptions {
        prompt: prompt.len(),
        total: prompt.len() + limits.max_new_tokens,
        ..SessionOptions::default()
    };
    let mut session = Session::open(&package, &options)?;
    let mut chain = Chain::new(&Settings::default())?;
    let mut stdout = std::io::stdout().lock();
    let generation = generate(&mut session, tokenizer.as_ref(), &prompt, &mut chain, &limits, |text| {
        stdout.write_all(text.as_bytes())?;
        stdout.flush()
    })?;
    writeln!(
        stdout,
        "\ntokens {:?} on {}",
        generation.tokens,
        session.device().name()
    )?;
    Ok(())
}
