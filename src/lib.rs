//! Lapidary compiles ONNX exports of language models to TensorRT engines, layer by layer, and runs them.
//!
//! An export becomes a package: the canonical graph, the weights, the engines and the tokenizer in one folder. A session of
//! a package computes logits, on the CPU or on a GPU, and a sampler chain draws tokens from them:
//!
//! ```
//! use std::path::Path;
//!
//! use lapidary::{Chain, ConvertOptions, Limits, Package, SamplerSettings, Session, SessionOptions, Spec, convert, generate};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! # let folder = std::env::temp_dir().join(format!("lapidary-quick-start-{}", std::process::id()));
//! # let output = folder.as_path();
//! # /*
//! let output = Path::new("llama.lapidary");
//! # */
//! let export = Path::new("fixtures/exports/llama-optimum/model.onnx");
//! convert(export, output, Spec::default().resolve()?, &ConvertOptions::default())?;
//!
//! let package = Package::open(output)?;
//! let mut session = Session::open(&package, &SessionOptions::default())?;
//! let mut chain = Chain::new(&SamplerSettings::greedy())?;
//! let limits = Limits { max_new_tokens: 4, ..Limits::default() };
//! let generation = generate(&mut session, None, &[1, 20, 5], &mut chain, &limits, |_text| Ok(()))?;
//! assert_eq!(generation.tokens.len(), 4);
//! # std::fs::remove_dir_all(output)?;
//! # Ok(())
//! # }
//! ```
//!
//! With a tokenizer ([`Package::tokenizer`]), prompts and results are text. `examples/convert.rs` and `examples/generate.rs` show
//! the two halves as programs; the command line (`lapidary --help`) has every option.
//!
//! # From an export to a token
//!
//! Data flows one way:
//!
//! 1. [`onnx`] reads an export into a [`graph::Graph`]: typed ONNX operators over symbolic dims.
//! 2. [`passes`] rewrite it into the canonical graph: static KV cache, fused normalization, rotary embedding, attention.
//! 3. [`lower`] turns the canonical graph into a [`network::Network`]: TensorRT layers as plain data, for one profile.
//! 4. [`backend`] builds TensorRT engines from a network, or executes it on the CPU.
//! 5. [`package`] keeps graph, weights, engines and tokenizer on disk; [`decode`] generates from it.
//! 6. `bench` measures that, and `report` makes tables, plots and text of the measurements.
//!
//! # Levels
//!
//! A module uses only modules of lower levels. `tests/levels.rs` reads this table and checks the sources against it.
//!
//! | level | modules | what they own |
//! |---|---|---|
//! | 1 | `dim`, `help`, `terms`, `units` | symbolic sizes; advice of errors; names in tables and plots; readable quantities |
//! | 2 | `tensor` | element types, bytes with a shape |
//! | 3 | `interface`, `ir_text` | inputs and outputs of a model, by role; names, dims and numbers in the text forms of graphs and networks |
//! | 4 | `graph` | typed ONNX, inference, evaluation |
//! | 5 | `onnx` | ONNX files |
//! | 6 | `passes` | from an export's graph to the canonical graph |
//! | 7 | `network` | TensorRT layers as data |
//! | 8 | `target` | settings of a conversion: target, precision, prefill, refit |
//! | 9 | `lower` | from the canonical graph to a network |
//! | 10 | `spec` | conversion specs |
//! | 11 | `backend::cpu`, `backend::tensorrt` | executor, engines |
//! | 12 | `weights` | weights on disk, by name, from checkpoints |
//! | 13 | `sample` | from logits to a token |
//! | 14 | `text` | tokenizer, chat template, text from tokens |
//! | 15 | `tune` | which lowering is fastest on a GPU |
//! | 16 | `package` | packages on disk |
//! | 17 | `quantize` | quantization of floating-point weights |
//! | 18 | `convert` | from an export to a package |
//! | 19 | `decode` | sessions, generation, reference engines |
//! | 20 | `bench` | measurements |
//! | 21 | `report` | tables, plots and text of measurements |
//! | 22 | `serve` | many requests on one device |
//! | 23 | `cli` | the command line |
//!
//! # Features
//!
//! - `tensorrt-rtx` (default) or `tensorrt`: build and run engines of TensorRT-RTX or of full TensorRT.
//! - `tract`: run exports in tract, for `lapidary verify`.
//! - `cli` (default): the command line with benchmarks and their report. Without it the library alone is compiled.
//! - `serve` (default): `lapidary serve`, the OpenAI-compatible server.
//! - `structured`: texts that follow a JSON schema or a grammar, for other servers; `serve` includes it.

#![deny(missing_docs)]

pub mod backend;
// For the command line; public only for the binary and the tests.
#[cfg(feature = "cli")]
#[doc(hidden)]
pub mod bench;
#[cfg(feature = "cli")]
#[doc(hidden)]
pub mod cli;
pub mod convert;
pub mod decode;
pub mod dim;
pub mod graph;
pub mod help;
pub mod interface;
mod ir_text;
pub mod lower;
pub mod network;
pub mod onnx;
pub mod package;
pub mod passes;
pub mod quantize;
#[cfg(feature = "cli")]
#[doc(hidden)]
pub mod report;
pub mod sample;
pub mod serve;
pub mod spec;
pub mod target;
pub mod tensor;
pub mod terms;
pub mod text;
pub mod tune;
pub mod units;
pub mod weights;

pub use convert::{ConvertOptions, convert};
pub use decode::{DeviceChoice, Limits, Session, SessionOptions, generate};
pub use package::Package;
pub use sample::{Chain, Settings as SamplerSettings};
pub use spec::Spec;
