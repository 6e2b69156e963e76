//! Converts an export to a package for the CPU, or with engines too.
//!
//! `cargo run --example convert -- fixtures/exports/llama-optimum/model.onnx llama.lapidary [tensorrt-rtx]`

use std::path::PathBuf;
use std::process::ExitCode;

use lapidary::convert::{ConvertError, ConvertOptions, convert};
use lapidary::help::Help;
use lapidary::spec::{Conversion, Spec, SpecError};
use lapidary::target::Target;

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [model, output, engines @ ..] = &args[..] else {
        eprintln!("usage: convert MODEL.onnx PACKAGE [tensorrt-rtx]");
        return ExitCode::from(2);
    };
    let conversion = conversion(!engines.is_empty()).expect("these settings go together");
    match run(model.into(), output.into(), conversion) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            if let Some(help) = error.help() {
                eprintln!("help: {help}");
            }
            ExitCode::FAILURE
        }
    }
}

fn conversion(engines: bool) -> Result<Conversion, SpecError> {
    let spec = Spec {
        targets: engines.then(|| vec![Target::Cpu, Target::TensorrtRtx]),
        capacity: Some(vec![64]),
        ..Spec::default()
    };
    spec.resolve()
}

fn run(model: PathBuf, output: PathBuf, conversion: Conversion) -> Result<(), ConvertError> {
    let options = ConvertOptions {
        force: true,
        ..ConvertOptions::default()
    };
    let manifest = convert(&model, &output, conversion, &options)?.manifest;
    println!("{}: {}", output.display(), manifest.architecture);
    println!(
        "{} weights, {} engines",
        manifest.weights.tensors.len(),
        manifest.engines.len()
    );
    Ok(())
}
