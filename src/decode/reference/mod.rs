//! The original export, run by an engine that shares no code with Lapidary's: the reference of `lapidary verify`.
//!
//! Input is the `.onnx` file that a package was made from and whole sequences of tokens, output the logits of every
//! position. Each sequence runs in one call from an empty cache, so that the comparison checks not only the arithmetic
//! but also the cache, chunks and masks. Engines: `tract` (cargo feature of that name), and `eval`, the evaluator of
//! `graph::eval`. The latter is slow and part of Lapidary, but interprets the unchanged export, without passes,
//! lowering or executor. `passes::roles` gives the roles of an export's inputs.

mod eval;
#[cfg(feature = "tract")]
mod tract;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use super::embeddings::Embeddings;
use crate::dim::Sym;
use crate::graph::{self, Graph, ValueId};
use crate::help::Help;
use crate::interface::Role;
use crate::onnx;
use crate::passes::roles::{self, InputRole, Roles};
use crate::tensor::{DType, Tensor};

/// The engine that runs the export.
#[derive(Clone, Copy, PartialEq, Eq, Debug, serde::Serialize)]
#[cfg_attr(feature = "cli", derive(clap::ValueEnum))]
#[serde(rename_all = "lowercase")]
pub enum EngineKind {
    /// tract, by Sonos
    Tract,
    /// Lapidary's evaluator on the unchanged export; slow
    Eval,
}

#[derive(Debug, thiserror::Error)]
pub enum ReferenceError {
    #[error("this lapidary was compiled without tract")]
    NoTract,
    #[error(transparent)]
    Read(#[from] onnx::ReadError),
    #[error("{}: {message}", path.display())]
    Inputs { path: PathBuf, message: String },
    #[error("{engine} cannot run {}: {message}", path.display())]
    Engine {
        engine: &'static str,
        path: PathBuf,
        message: String,
    },
    #[error("{}: the sequence of {tokens} tokens does not fit the cache of the export, which has {capacity} slots", path.display())]
    TooLong {
        path: PathBuf,
        tokens: usize,
        capacity: usize,
    },
}

impl Help for ReferenceError {
    fn help(&self) -> Option<String> {
        let help = match self {
            ReferenceError::NoTract => {
                "compile with `cargo build --features tract`, or use --engine eval, which is slower"
            }
            ReferenceError::Read(error) => return error.help(),
            ReferenceError::Engine { engine: "tract", .. } => {
                "use --engine eval, which is slower and runs every export that converts"
            }
            ReferenceError::TooLong { .. } => "use fewer --tokens or shorter --prompt-ids",
            ReferenceError::Inputs { .. } | ReferenceError::Engine { .. } => return None,
        };
        Some(help.to_string())
    }
}

/// An engine with an export loaded.
trait Engine {
    /// Runs the export. `inputs` are in the order of the graph's inputs, by name; returns the output named `logits`.
    fn run(&mut self, inputs: &[(String, Tensor)], logits: &str) -> Result<Tensor, String>;
}

/// See the module's head.
pub struct Reference {
    path: PathBuf,
    kind: EngineKind,
    graph: Graph,
    roles: Roles,
    logits: ValueId,
    /// The package's embeddings, if the export takes embeddings.
    embeddings: Option<Embeddings>,
    engine: Box<dyn Engine>,
}

impl Reference {
    /// `embeddings` are the rows of tokens for an export that takes embeddings. `mask_windows`: the windows of masks
    /// that are inputs, from the package's manifest.
    pub fn open(
        path: &Path,
        kind: EngineKind,
        embeddings: Option<Embeddings>,
        mask_windows: &BTreeMap<String, usize>,
    ) -> Result<Self, ReferenceError> {
        if kind == EngineKind::Tract && !cfg!(feature = "tract") {
            return Err(ReferenceError::NoTract);
        }
        let mut graph = onnx::read(path)?;
        let bad = |message: String| ReferenceError::Inputs {
            path: path.to_path_buf(),
            message,
        };
        graph::infer::infer(&mut graph).map_err(|e| bad(e.to_string()))?;
        let windows = mask_windows.iter();
        let windows = windows.map(|(name, window)| (name.clone(), Some(*window).filter(|w| *w > 0)));
        let roles = roles::assign(&mut graph, &windows.collect()).map_err(|e| bad(e.to_string()))?;
        let embedded = roles.of.get(&roles.token_input) == Some(&InputRole::Embeddings);
        if embedded && embeddings.as_ref().is_none_or(|e| e.tokens().is_none()) {
            return Err(bad(
                "it takes embeddings, and the package has no table that gives them for tokens".into(),
            ));
        }
        let name = Role::Logits.name();
        let named = graph.outputs.iter().find(|id| graph.value(**id).name == name);
        let logits = *named
            .or(graph.outputs.first())
            .ok_or_else(|| bad("it has no outputs".into()))?;
        let engine: Box<dyn Engine> = match kind {
            EngineKind::Eval => Box::new(eval::Eval::new(graph.clone())),
            #[cfg(feature = "tract")]
            EngineKind::Tract => Box::new(tract::Tract::new(path).map_err(|message| ReferenceError::Engine {
                engine: kind.name(),
                path: path.to_path_buf(),
                message,
            })?),
            #[cfg(not(feature = "tract"))]
            EngineKind::Tract => unreachable!("refused above"),
        };
        Ok(Reference {
            path: path.to_path_buf(),
            kind,
            graph,
            roles,
            logits,
            embeddings,
            engine,
        })
    }

    /// Number of tokens of a run, if fixed by the export.
    pub fn longest(&self) -> Option<usize> {
        self.roles.capacity
    }

    /// Logits of every position, `[tokens][vocabulary]`.
    pub fn logits(&mut self, tokens: &[u32]) -> Result<Vec<Vec<f32>>, ReferenceError> {
        if let Some(capacity) = self.roles.capacity
            && tokens.len() > capacity
        {
            return Err(ReferenceError::TooLong {
                path: self.path.clone(),
                tokens: tokens.len(),
                capacity,
            });
        }
        let mut inputs = self.inputs(tokens)?;
        // Lapidary's evaluator gets one branch of a merged decoder; other engines read the file.
        if let (EngineKind::Tract, Some(switch)) = (self.kind, &self.graph.producer.switch) {
            let flag = Tensor::from_bool(vec![1; switch.rank], &[switch.value]);
            inputs.push((switch.name.clone(), flag));
        }
        let name = self.graph.value(self.logits).name.clone();
        let engine = self.kind.name();
        let failed = |path: &Path, message: String| ReferenceError::Engine {
            engine,
            path: path.to_path_buf(),
            message,
        };
        let logits = self.engine.run(&inputs, &name).map_err(|m| failed(&self.path, m))?;
        match logits.shape() {
            [1, rows, vocabulary] if *rows == tokens.len() => {
                Ok(logits.to_f32().chunks(*vocabulary).map(<[f32]>::to_vec).collect())
            }
            other => Err(failed(
                &self.path,
                format!(
                    "its output {name:?} is {other:?}, not [1, {}, vocabulary]",
                    tokens.len()
                ),
            )),
        }
    }

    fn inputs(&self, tokens: &[u32]) -> Result<Vec<(String, Tensor)>, ReferenceError> {
        let n = tokens.len() as i64;
        let capacity = self.roles.capacity.map_or(n, |c| c as i64);
        let sizes = BTreeMap::from([
            (Sym::batch(), 1),
            (Sym::tokens(), n),
            (Sym::past(), 0),
            (Sym::capacity(), capacity),
        ]);
        let mut inputs = Vec::new();
        for id in &self.graph.inputs {
            let value = self.graph.value(*id);
            let shape: Option<Vec<usize>> = value.shape.as_ref().and_then(|shape| {
                let sizes = shape
                    .iter()
                    .map(|dim| dim.eval(&sizes).and_then(|n| usize::try_from(n).ok()));
                sizes.collect()
            });
            let role = self.roles.of.get(id).copied().unwrap_or(InputRole::Unread);
            let listed = matches!(value.shape.as_deref(), Some([dim]) if dim.as_const().is_none());
            if let (InputRole::ChosenRows, true) = (role, listed) {
                let all: Vec<i64> = (0..n).collect();
                inputs.push((value.name.clone(), Tensor::from_i64(vec![tokens.len()], &all)));
                continue;
            }
            let (Some(shape), Some(dtype)) = (shape, value.dtype) else {
                return Err(ReferenceError::Inputs {
                    path: self.path.clone(),
                    message: format!("the shape of the input {:?} is not known", value.name),
                });
            };
            let tensor = match (role, &self.embeddings) {
                (InputRole::Embeddings, Some(embeddings)) => {
                    let mut rows = Vec::new();
                    embeddings.rows(tokens, &mut rows);
                    let rows: Vec<f64> = rows.into_iter().map(f64::from).collect();
                    Tensor::from_f64_as(dtype, vec![1, tokens.len(), embeddings.width()], &rows)
                }
                _ => {
                    let window = self.roles.windows.get(id).copied().flatten();
                    input(role, dtype, shape, tokens, window)
                }
            };
            inputs.push((value.name.clone(), tensor));
        }
        Ok(inputs)
    }
}

impl EngineKind {
    pub fn name(self) -> &'static str {
        match self {
            EngineKind::Tract => "tract",
            EngineKind::Eval => "eval",
        }
    }
}

/// An input for one sequence from an empty cache; a mask with a window.
fn input(role: InputRole, dtype: DType, shape: Vec<usize>, tokens: &[u32], window: Option<usize>) -> Tensor {
    let n = tokens.len();
    let columns = shape.last().copied().unwrap_or(1).max(1);
    let rows = match shape[..] {
        [.., rows, _] => rows.max(1),
        _ => 1,
    };
    let (kept, masked) = match dtype.is_float() {
        true => (0.0, f64::from(f32::MIN)),
        false => (1.0, 0.0),
    };
    let masked = if dtype == DType::F16 { -65504.0 } else { masked };
    let element = |i: usize| -> f64 {
        let (row, column) = (i / columns % rows, i % columns);
        match role {
            InputRole::InputIds => f64::from(tokens[column]),
            InputRole::PaddingMask => f64::from(u8::from(column < n)),
            InputRole::FullMask if column <= row && window.is_none_or(|w| column + w > row) => kept,
            InputRole::FullMask => masked,
            InputRole::Positions => column as f64,
            InputRole::TotalLength => n as f64,
            InputRole::LastPosition => n as f64 - 1.0,
            // All of them.
            InputRole::ChosenRows => n as f64,
            InputRole::PastLength | InputRole::Cache | InputRole::Embeddings | InputRole::Unread => 0.0,
        }
    };
    let volume = shape.iter().product();
    let values: Vec<f64> = (0..volume).map(element).collect();
    if dtype.is_float() {
        return Tensor::from_f64_as(dtype, shape, &values);
    }
    let integers: Vec<i64> = values.iter().map(|v| *v as i64).collect();
    let wide = Tensor::from_i64(shape, &integers);
    let narrow = graph::Constant::tensor(wide).cast(dtype).materialize();
    narrow.expect("a plain tensor casts to any dtype")
}
