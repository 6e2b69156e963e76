//! Statistics of the inputs of linear layers while a model reads a text, by channel, measured with the CPU executor.
//!
//! The graph is lowered with the inputs as outputs, and run on windows of the text ([`read`]), each starting at the first position
//! with an empty cache. Only sums are stored, so memory is that of one window. [`super::moments`] measures second moments in
//! the same way.

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
pub(super) const WINDOW: usize = 512;
/// Maximum number of windows: with fewer, second moments of wide inputs are inaccurate; more take time and change little.
const WINDOWS: usize = 64;
/// Windows for the statistics by channel, which need fewer tokens.
const CHANNEL_WINDOWS: usize = 8;
/// Fewer tokens do not show the differences between channels.
const FEWEST: usize = 16;
/// Maximum length of text that is tokenized, in bytes: more takes time.
const BYTES: usize = 4 << 20;

/// A calibration text.
#[derive(Clone, Debug)]
pub struct Text {
    /// File name, without its folder.
    pub file: String,
    /// BLAKE3 of the file, in hexadecimal.
    pub blake3: String,
    /// The tokens that are read: all of a short text, evenly spaced windows of a long one.
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
        let end = BYTES.min(text.len());
        let end = (end..=text.len())
            .find(|at| text.is_char_boundary(*at))
            .unwrap_or(text.len());
        let tokens = tokenizer
            .encode(&text[..end], true)
            .map_err(|e| failed(e.to_string()))?;
        if tokens.len() < FEWEST {
            return Err(failed(format!(
                "it has {} tokens, and calibrating needs {FEWEST} at least, better a few thousand",
                tokens.len()
            )));
        }
        Ok(Text {
            file: path.file_name().unwrap_or_default().to_string_lossy().into_owned(),
            blake3: hash_file(path).map_err(|e| failed(e.to_string()))?,
            tokens: spread(tokens),
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

/// Evenly spaced windows of a text, the first at its beginning and the last at its end, concatenated; all tokens of a text that is no
/// longer than these.
fn spread(tokens: Vec<u32>) -> Vec<u32> {
    if tokens.len() <= WINDOWS * WINDOW {
        return tokens;
    }
    let last = tokens.len() - WINDOW;
    let starts = (0..WINDOWS).map(|i| i * last / (WINDOWS - 1));
    starts
        .flat_map(|start| tokens[start..start + WINDOW].iter().copied())
        .collect()
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

/// Runs a canonical graph over a sample of a text and measures the channels of `inputs`, `[batch, tokens, width]` each. `longest`:
/// maximum positions of the model. `progress` gets the completed share.
pub fn measure(
    graph: &Graph,
    inputs: &[ValueId],
    text: &Text,
    longest: Option<usize>,
    progress: impl FnMut(f32),
) -> Result<HashMap<ValueId, Channels>, QuantizeError> {
    let mut graph = graph.clone();
    for value in inputs {
        if !graph.outputs.contains(value) {
            graph.outputs.push(*value);
        }
    }
    let mut sums: HashMap<ValueId, Sums> = HashMap::new();
    for value in inputs {
        let width = width(&graph, *value)?;
        let zeros = || vec![0.0; width];
        let none = Sums {
            magnitude: zeros(),
            square: zeros(),
            rows: 0,
        };
        sums.insert(*value, none);
    }
    // All of a short text, evenly spaced windows of a long one.
    let every = text.tokens.len().div_ceil(WINDOW).div_ceil(CHANNEL_WINDOWS);
    let windows: Vec<&[u32]> = text.tokens.chunks(WINDOW).step_by(every.max(1)).collect();
    read(&graph, &windows, longest, progress, |values| {
        for (value, sums) in &mut sums {
            sums.add(&values[&graph.value(*value).name]);
        }
    })?;
    Ok(sums.into_iter().map(|(value, sums)| (value, sums.channels())).collect())
}

/// Number of channels of a value `[batch, tokens, width]`.
pub(super) fn width(graph: &Graph, value: ValueId) -> Result<usize, QuantizeError> {
    let last = graph.shape(value).and_then(|shape| shape.last()?.as_const());
    let width = last.and_then(|n| usize::try_from(n).ok()).filter(|n| *n > 0);
    width.ok_or_else(|| QuantizeError::Measure {
        reason: format!("the width of {:?} is not known", graph.value(value).name),
    })
}

/// Runs a graph over windows of tokens, each starting at the first position with an empty cache, and passes the outputs of each
/// window to `each`, by name. `longest`: maximum positions of the model. `progress` gets the completed share.
pub(super) fn read(
    graph: &Graph,
    windows: &[&[u32]],
    longest: Option<usize>,
    mut progress: impl FnMut(f32),
    mut each: impl FnMut(&HashMap<String, Vec<f32>>),
) -> Result<(), QuantizeError> {
    let most = longest.map_or(WINDOW, |longest| longest.clamp(1, WINDOW));
    let pieces: Vec<&[u32]> = windows.iter().flat_map(|window| window.chunks(most)).collect();
    let compiling = CompileOptions::default();
    let mut made: Option<Reader> = None;
    for (i, tokens) in pieces.iter().enumerate() {
        // All windows but the last have one length, and share a program.
        let reader = match made.take() {
            Some(reader) if reader.tokens == tokens.len() => made.insert(reader),
            // Dropped before the next one is made: its outputs can be large.
            other => {
                drop(other);
                made.insert(Reader::new(graph, tokens.len(), &compiling)?)
            }
        };
        reader.run(tokens)?;
        each(&reader.outputs);
        progress((i + 1) as f32 / pieces.len() as f32);
    }
    Ok(())
}

/// A program for windows of one length.
struct Reader {
    tokens: usize,
    network: Network,
    program: Program,
    outputs: HashMap<String, Vec<f32>>,
}

impl Reader {
    fn new(graph: &Graph, tokens: usize, compiling: &CompileOptions) -> Result<Reader, QuantizeError> {
        let profile = Profile::prefill(tokens, tokens);
        let network = lower::lower_graph(graph, &profile, &LowerOptions::default()).map_err(failed)?;
        let program = Program::compile(&network, compiling).map_err(failed)?;
        let outputs = program.outputs().iter();
        let outputs = outputs
            .map(|port| (port.name.clone(), vec![0.0; port.shape.iter().product()]))
            .collect();
        Ok(Reader {
            tokens,
            network,
            program,
            outputs,
        })
    }

    /// One window, starting at the first position: every output except the caches.
    fn run(&mut self, tokens: &[u32]) -> Result<(), QuantizeError> {
        let mut caches = KvCaches::new(&self.network).map_err(failed)?;
        let count = i32::try_from(tokens.len()).expect("windows are short");
        let inputs: Vec<(String, Vec<i32>)> = self
            .program
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
        let mut bindings = Bindings::new();
        for (name, values) in &inputs {
            bindings.input(name, &values[..]);
        }
        for (name, values) in &mut self.outputs {
            bindings.output(&**name, &mut values[..]);
        }
        bindings.caches(&mut caches);
        self.program.run(&mut bindings).map_err(failed)
    }
}

pub(super) fn failed(error: impl std::error::Error) -> QuantizeError {
    QuantizeError::Measure {
        reason: error.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn windows_are_spread_over_a_long_text() {
        let most = WINDOW * WINDOWS;
        let text = |len: usize| (0..len as u32).collect::<Vec<u32>>();
        assert_eq!(spread(text(most)), text(most));
        for len in [most + 1, 3 * most + 17] {
            let found = spread(text(len));
            assert_eq!((found.len(), found[0], found[most - 1] as usize), (most, 0, len - 1));
            let starts: Vec<u32> = found.chunks(WINDOW).map(|window| window[0]).collect();
            let steps: Vec<u32> = starts.windows(2).map(|pair| pair[1] - pair[0]).collect();
            let (least, largest) = (steps.iter().min().unwrap(), steps.iter().max().unwrap());
            assert!(largest - least <= 1, "{steps:?}");
            assert!(
                found
                    .chunks(WINDOW)
                    .all(|window| window[WINDOW - 1] - window[0] == WINDOW as u32 - 1)
            );
        }
    }
}
