//! Whole decode steps of real dims with synthetic weights: with Lapidary's kernels and with only TensorRT's layers.

use std::sync::Mutex;

use lapidary::backend::tensorrt::{self, BuildOptions, Library};
use lapidary::lower::synthetic::Decoder;
use lapidary::lower::{LowerOptions, lower};
use lapidary::network::{Network, Profile};
use lapidary::tensor::DType;

use crate::Outcome;
use crate::choices::{Codes, Quantized, each, measure, quantized};

const CAPACITY: usize = 4096;
/// Tokens in the cache when a step is timed.
const CONTEXTS: [i32; 2] = [300, 4080];

fn decoders() -> [(&'static str, Decoder); 3] {
    let smollm2 = Decoder {
        layers: 30,
        hidden: 576,
        heads: 9,
        kv_heads: 3,
        head_dim: 64,
        ffn: 1536,
        vocabulary: 49152,
        tied: true,
        ..Decoder::llama_1b()
    };
    [
        ("smollm2", smollm2),
        ("1b", Decoder::llama_1b()),
        ("8b", Decoder::llama_8b()),
    ]
}

fn forms() -> [(&'static str, Option<Codes>); 6] {
    [
        ("fp16", None),
        ("int8 by row", Some(Codes(DType::I8, 0, false))),
        ("int8 by 32", Some(Codes(DType::I8, 32, false))),
        ("int4 by 128", Some(Codes(DType::I4, 128, false))),
        ("int4 by 32", Some(Codes(DType::I4, 32, false))),
        ("int4 by 32 with zero points", Some(Codes(DType::U4, 32, true))),
    ]
}

/// One line per case: ms of a step at each context, and the bytes of weights that it reads over its time. `only`
/// selects the cases whose name contains it. `rows`: numbers of sequences of a step, with a case for each; all have the
/// same context.
pub fn kernels(only: &str, rows: &[usize]) -> Outcome<()> {
    let library = Library::load(None)?;
    let mut cases = Vec::new();
    for (model, decoder) in decoders() {
        let decoder = Decoder {
            positions: CAPACITY,
            ..decoder
        };
        // A group must divide a row.
        let divides = |codes: &Option<Codes>| {
            codes.is_none_or(|Codes(_, size, _)| size == 0 || decoder.hidden.is_multiple_of(size))
        };
        for (form, codes) in forms().into_iter().filter(|(_, codes)| divides(codes)) {
            for (kernels, rows) in [true, false]
                .into_iter()
                .flat_map(|k| rows.iter().map(move |rows| (k, *rows)))
            {
                let layers = if kernels { "kernels" } else { "TensorRT" };
                let name = format!("{model}, {form}, {rows} rows, {layers}");
                cases.push((name, decoder.clone(), codes, kernels, rows));
            }
        }
    }
    cases.retain(|(name, ..)| name.contains(only));
    let gpu = Mutex::new(());
    each(8, cases, |(name, decoder, codes, kernels, rows)| {
        let run = || -> Outcome<String> {
            let options = LowerOptions {
                kernels,
                ..LowerOptions::for_engines()
            };
            let profile = Profile {
                batch: rows,
                ..Profile::decode(CAPACITY)
            };
            let layers = codes.map(|codes| (codes, Quantized::Layers));
            let network = lower(&quantized(&decoder, layers, false), &profile, &options)?;
            let plans = tensorrt::build_all(&library, &network, &BuildOptions::default())?;
            let built: f64 = plans.iter().map(|plan| plan.elapsed().as_secs_f64()).sum();
            let plans: Vec<&[u8]> = plans.iter().map(|plan| plan.bytes()).collect();
            let mut line = String::new();
            for context in CONTEXTS {
                let seconds = measure(&library, &network, &plans, &gpu, (context, 60))?;
                let rate = bytes_of_weights(&network) / seconds / 1e12;
                line.push_str(&format!(" {context}: {:.4} ms ({rate:.2} TB/s);", seconds * 1e3));
            }
            Ok(format!("{line} built in {built:.1} s, {} plans", plans.len()))
        };
        match run() {
            Ok(line) => format!("{name:<52}{line}"),
            Err(error) => format!("{name:<52} {error}"),
        }
    });
    Ok(())
}

/// Bytes of all weights that a step reads completely: without tables of rotations, and without the embedding table
/// unless it is also the output matrix.
fn bytes_of_weights(network: &Network) -> f64 {
    let tied = !network.weights.iter().any(|weight| weight.name.starts_with("lm_head"));
    let read = network.weights.iter().filter(|weight| {
        let table = weight.name.starts_with("model.embed_tokens") && !tied;
        !table && !weight.name.starts_with("rope.")
    });
    read.map(|weight| weight.constant.byte_len() as f64).sum()
}
