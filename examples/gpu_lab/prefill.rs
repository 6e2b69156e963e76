//! Times of chunks of a prompt by their rows: layers of real dims with synthetic weights.

use std::sync::Mutex;

use lapidary::backend::tensorrt::{self, BuildOptions, Library};
use lapidary::lower::synthetic::Decoder;
use lapidary::lower::{LowerOptions, lower};
use lapidary::network::Profile;

use crate::Outcome;
use crate::choices::{each, measure, quantized};

const LAYERS: usize = 4;
/// Rows of a chunk, and slots of the cache.
const CHUNKS: [(usize, usize); 24] = [
    (16, 256),
    (32, 256),
    (64, 256),
    (96, 256),
    (128, 256),
    (192, 256),
    (256, 256),
    (64, 1024),
    (128, 1024),
    (192, 1024),
    (256, 1024),
    (288, 1024),
    (320, 1024),
    (384, 1024),
    (448, 1024),
    (512, 1024),
    (640, 1024),
    (768, 1024),
    (896, 1024),
    (1024, 1024),
    (128, 4096),
    (512, 4096),
    (1024, 4096),
    (2048, 4096),
];

/// One line per chunk: ms of a layer (a model of a few layers minus one without layers), and of the rest.
pub fn prefill(large: bool) -> Outcome<()> {
    let library = Library::load(None)?;
    let base = if large {
        Decoder::llama_8b()
    } else {
        Decoder::llama_1b()
    };
    let gpu = Mutex::new(());
    each(12, CHUNKS.to_vec(), |(rows, capacity)| {
        let time = |layers: usize| -> Outcome<f64> {
            let decoder = Decoder {
                layers,
                positions: capacity,
                ..base.clone()
            };
            let graph = quantized(&decoder, None, false);
            let network = lower(&graph, &Profile::prefill(rows, capacity), &LowerOptions::for_engines())?;
            let plans = tensorrt::build_all(&library, &network, &BuildOptions::default())?;
            let plans: Vec<&[u8]> = plans.iter().map(|plan| plan.bytes()).collect();
            measure(&library, &network, &plans, &gpu, ((capacity - rows) as i32, 30))
        };
        let run = || -> Outcome<(f64, f64)> {
            let (few, more) = (time(LAYERS / 2)?, time(LAYERS)?);
            let layer = (more - few) / (LAYERS - LAYERS / 2) as f64;
            Ok((layer, few - layer * (LAYERS / 2) as f64))
        };
        match run() {
            Ok((layer, rest)) => {
                let whole = layer * base.layers as f64 + rest;
                format!(
                    "{rows:>5} rows, capacity {capacity:>5}: {:.4} ms a layer, {:.4} ms the rest, {:.2} ms the model",
                    layer * 1e3,
                    rest * 1e3,
                    whole * 1e3
                )
            }
            Err(error) => format!("{rows:>5} rows, capacity {capacity:>5}: {error}"),
        }
    });
    Ok(())
}
