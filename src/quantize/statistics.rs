//! Statistics of the inputs of linear layers while a model reads a text, by channel, measured with the CPU executor.
//!
//! The graph is lowered with the inputs as outputs, and run on windows of the text, each starting at the first position
//! with an empty cache. Only sums are stored, so memory is that of one window.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use crate::backend::cpu::{Bindings, CompileOptions, KvCaches, Program};
use crate::graph::{Graph, ValueId};
use crate::interface::Role;
use crate::lower::{self, LowerOptions};
use crate::network::{Network, Profile};
use crate::package::hash_file;
use crate::text::Tokenizer;

use super::error::{QuantizeError, TextError};

/// Tokens per window.
const WINDOW: usize = 256;
/// Maximum number of windows: more change the figures little, and take time on large models.
const WINDOWS: usize = 16;
/// Fewer tokens do not show the differences between channels.
const FEWEST: usize = 16;

/// A calibration text.
#[derive(Clone, Debug)]
pub struct Text {
    /// File name, without its folder.
    pub file: String,
    /// BLAKE3 of the file, in hexadecimal.
    pub blake3: String,
    /// Its first tokens, up to the limit.
    pub tokens: Vec<u32>,
}

impl Text {
    /// Reads a file of UTF-8.
    pub fn read(path: &Path, tokenizer: &Tokenizer) -> Result<Text, TextError> {
        let failed = |message: String| TextError {
            path: PathBuf::from(path),
            message,
        };
        let bytes = std::fs::read(path).map_err(|e| failed(e.to_string()))?;
        let text = String::from_utf8(bytes).map_err(|_| failed("it is not UTF-8".to_string()))?;
        // A token rarely has more than a dozen bytes: the rest would not be read.
        let most = WINDOW * WINDOWS;
        let end = (most * 64).min(text.len());
        let end = (end..=text.len())
            .find(|at| text.is_char_boundary(*at))
            .unwrap_or(text.len());
        let mut tokens = tokenizer
            .encode(&text[..end], true)
            .map_err(|e| failed(e.to_string()))?;
        tokens.truncate(most);
        if tokens.len() < FEWEST {
            return Err(failed(format!(
                "it has {} tokens, and calibrating needs {FEWEST} at least, better a few thousand",
                tokens.len()
            )));
        }
        Ok(Text {
            file: path.file_name().unwrap_or_default().to_string_lossy().into_owned(),
            blake3: hash_file(path).map_err(|e| failed(e.to_string()))?,
            tokens,
        })
    }

    /// Refuses tokens beyond the model's `vocabulary`.
    pub fn check_ids(&self, vocabulary: usize) -> Result<(), TextError> {
        match self.tokens.iter().max() {
            Some(id) if *id as usize >= vocabulary => Err(TextError {
                path: PathBuf::from(&self.file),
                message: format!(
                    "the tokenizer makes the token {id} of it, and the model's vocabulary is {vocabulary}: check that it is this model's tokenizer"
                ),
            }),
            _ => Ok(()),
        }
    }
}

/// The channels of a linear layer's input.
#[derive(Clone, Debug, PartialEq)]
pub struct Channels {
    /// Mean magnitude of each.
    pub magnitude: Vec<f32>,
    /// Mean square of each.
    pub square: Vec<f32>,
}

/// Sums on the way to [`Channels`].
struct Sums {
    magnitude: Vec<f64>,
    square: Vec<f64>,
    rows: usize,
}

impl Sums {
    fn add(&mut self, values: &[f32]) {
        let width = self.magnitude.len();
        for row in values.chunks_exact(width) {
            for ((value, magnitude), square) in row.iter().zip(&mut self.magnitude).zip(&mut self.square) {
                let value = f64::from(*value);
                *magnitude += value.abs();
                *square += value * value;
            }
            self.rows += 1;
        }
    }

    fn channels(&self) -> Channels {
        let mean = |sums: &[f64]| sums.iter().map(|sum| (sum / self.rows.max(1) as f64) as f32).collect();
        Channels {
            magnitude: mean(&self.magnitude),
            square: mean(&self.square),
        }
    }
}

/// Runs a canonical graph over a text and measures the channels of `inputs`, `[batch, tokens, width]` each. `longest`:
/// maximum positions of the model. `progress` gets the completed share.
pub fn measure(
    graph: &Graph,
    inputs: &[ValueId],
    text: &Text,
    longest: Option<usize>,
    mut progress: impl FnMut(f32),
) -> Result<HashMap<ValueId, Channels>, QuantizeError> {
    let window = longest.map_or(WINDOW, |longest| longest.min(WINDOW));
    let mut graph = graph.clone();
    for value in inputs {
        if !graph.outputs.contains(value) {
            graph.outputs.push(*value);
        }
    }
    let width = |value: ValueId| {
        let last = graph.shape(value).and_then(|shape| shape.last()?.as_const());
        last.and_then(|n| usize::try_from(n).ok()).filter(|n| *n > 0)
    };
    let mut sums: HashMap<ValueId, Sums> = HashMap::new();
    for value in inputs {
        let width = width(*value).ok_or_else(|| QuantizeError::Measure {
            reason: format!("the width of {:?} is not known", graph.value(*value).name),
        })?;
        let zeros = || vec![0.0; width];
        let none = Sums {
            magnitude: zeros(),
            square: zeros(),
            rows: 0,
        };
        sums.insert(*value, none);
    }
    let mut made: Option<(usize, Network, Program)> = None;
    let compiling = CompileOptions::default();
    let pieces = text.tokens.chunks(window);
    let count = pieces.len();
    for (i, tokens) in pieces.enumerate() {
        // All windows but the last have one length, and share a program.
        if made.as_ref().is_none_or(|(length, ..)| *length != tokens.len()) {
            let profile = Profile::prefill(tokens.len(), tokens.len());
            let network = lower::lower_graph(&graph, &profile, &LowerOptions::default()).map_err(failed)?;
            let program = Program::compile(&network, &compiling).map_err(failed)?;
            made = Some((tokens.len(), network, program));
        }
        let (_, network, program) = made.as_mut().expect("just made");
        let values = run(network, program, tokens)?;
        for (value, sums) in &mut sums {
            sums.add(&values[&graph.value(*value).name]);
        }
        progress((i + 1) as f32 / count as f32);
    }
    Ok(sums.into_iter().map(|(value, sums)| (value, sums.channels())).collect())
}

/// One window, starting at the first position: every output except the caches, by name.
fn run(network: &Network, program: &mut Program, tokens: &[u32]) -> Result<HashMap<String, Vec<f32>>, QuantizeError> {
    let mut caches = KvCaches::new(network).map_err(failed)?;
    let count = i32::try_from(tokens.len()).expect("windows are short");
    let inputs: Vec<(String, Vec<i32>)> = program
        .inputs()
        .iter()
        .map(|port| {
            let values = match port.role {
                Some(Role::TokenIds) => tokens.iter().map(|id| *id as i32).collect(),
                Some(Role::PositionIds) => (0..count).collect(),
                Some(Role::WriteIndices) => vec![0],
                Some(Role::TotalLengths) => vec![count],
                Some(Role::LogitRows) => vec![count - 1],
                _ => {
                    return Err(QuantizeError::Measure {
                        reason: format!("there is nothing to give to the input {:?}", port.name),
                    });
                }
            };
            Ok((port.name.clone(), values))
        })
        .collect::<Result<_, _>>()?;
    let mut outputs: Vec<(String, Vec<f32>)> = program
        .outputs()
        .iter()
        .map(|port| (port.name.clone(), vec![0.0; port.shape.iter().product()]))
        .collect();
    let mut bindings = Bindings::new();
    for (name, values) in &inputs {
        bindings.input(name, &values[..]);
    }
    for (name, values) in &mut outputs {
        bindings.output(&*name, &mut values[..]);
    }
    bindings.caches(&mut caches);
    program.run(&mut bindings).map_err(failed)?;
    drop(bindings);
    Ok(outputs.into_iter().collect())
}

fn failed(error: impl std::error::Error) -> QuantizeError {
    QuantizeError::Measure {
        reason: error.to_string(),
    }
}
