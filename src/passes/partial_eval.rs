//! Execution of parts of an export at concrete sizes.
//!
//! A [`Trial`] fixes (batch, past, tokens) and computes values on demand: positional values from the definition of the
//! inputs' [`InputRole`]s, data values from tensors that the caller feeds in place of projections and caches. All
//! proofs of the passes use it. Operator semantics are those of `graph::eval`.

use std::cell::RefCell;
use std::collections::{BTreeMap, HashMap, HashSet};
use std::fmt;
use std::rc::Rc;

use super::dependence::Dependence;
use super::roles::{InputRole, Roles};
use crate::dim::{Dim, Sym};
use crate::graph::eval::eval_node;
use crate::graph::op::{Op, Rounding};
use crate::graph::{Definition, Graph, Node, ValueId};
use crate::tensor::{DType, Tensor};

/// A graph with the roles of its inputs; the basis of trials.
pub struct PartialEvaluator<'g> {
    pub graph: &'g Graph,
    pub roles: &'g Roles,
    pub dependences: HashMap<ValueId, Dependence>,
    /// Roundings removed from the graph, by their results.
    roundings: HashMap<ValueId, Rounding>,
    trials: RefCell<HashMap<Sizes, Rc<Trial>>>,
}

/// Sizes of one call.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Sizes {
    pub batch: usize,
    pub past: usize,
    pub tokens: usize,
}

/// `2 sequences, 3 past and 4 new tokens`
impl fmt::Display for Sizes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let noun = if self.batch == 1 { "sequence" } else { "sequences" };
        write!(
            f,
            "{} {noun}, {} past and {} new tokens",
            self.batch, self.past, self.tokens
        )
    }
}

/// Values computed so far at one set of sizes.
pub struct Trial {
    pub sizes: Sizes,
    symbols: BTreeMap<Sym, i64>,
    memo: RefCell<HashMap<ValueId, Tensor>>,
}

/// A value that could not be computed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{at}: {reason}")]
pub struct Stuck {
    /// Name of the node or value.
    pub at: String,
    pub reason: String,
}

/// Unused slots in trials of static caches whose capacity is symbolic.
const SPARE_SLOTS: usize = 3;

impl<'g> PartialEvaluator<'g> {
    pub fn new(graph: &'g Graph, roles: &'g Roles) -> Self {
        PartialEvaluator {
            graph,
            roles,
            dependences: super::dependence::classify(graph, roles),
            roundings: HashMap::new(),
            trials: RefCell::default(),
        }
    }

    /// For a graph from which these roundings were removed.
    pub fn without(roundings: HashMap<ValueId, Rounding>, graph: &'g Graph, roles: &'g Roles) -> Self {
        PartialEvaluator {
            roundings,
            ..PartialEvaluator::new(graph, roles)
        }
    }

    /// The rounding with this result, if it was removed from the graph.
    pub fn rounding(&self, id: ValueId) -> Option<Rounding> {
        self.roundings.get(&id).copied()
    }

    pub fn dependence(&self, id: ValueId) -> Dependence {
        self.dependences.get(&id).copied().unwrap_or(Dependence::Data)
    }

    /// The trial at these sizes; a batch fixed by the export takes precedence.
    pub fn trial(&self, batch: usize, past: usize, tokens: usize) -> Rc<Trial> {
        let sizes = Sizes {
            batch: self.roles.batch.unwrap_or(batch),
            past,
            tokens,
        };
        let mut trials = self.trials.borrow_mut();
        let trial = trials
            .entry(sizes)
            .or_insert_with(|| Rc::new(Trial::new(self.roles, sizes)));
        trial.clone()
    }

    /// Drops a trial's values; for large ones.
    pub fn forget(&self, trial: &Trial) {
        self.trials.borrow_mut().remove(&trial.sizes);
    }

    /// Concrete dims of a value.
    pub fn dims(&self, trial: &Trial, id: ValueId) -> Result<Vec<usize>, Stuck> {
        let value = self.graph.value(id);
        let stuck = |reason: String| Stuck {
            at: value.name.clone(),
            reason,
        };
        let shape = value
            .shape
            .as_ref()
            .ok_or_else(|| stuck("its shape is not known".into()))?;
        let size = |dim: &Dim| {
            let size = trial.size(dim).filter(|n| *n >= 0);
            let size = size.ok_or_else(|| stuck(format!("its dim {dim} is not tied to batch, tokens or past")))?;
            Ok(size as usize)
        };
        let sizes: Vec<usize> = shape.iter().map(size).collect::<Result<_, Stuck>>()?;
        // So that every partial product can be computed.
        let volume = sizes.iter().try_fold(1usize, |n, size| n.checked_mul((*size).max(1)));
        match volume {
            Some(_) => Ok(sizes),
            None => Err(stuck(format!(
                "its shape {shape:?} has more elements than can be counted"
            ))),
        }
    }

    /// Elements of the largest value that is computed for `ids`, as far as shapes are known.
    pub fn largest(&self, trial: &Trial, ids: impl IntoIterator<Item = ValueId>) -> usize {
        let mut stack: Vec<ValueId> = ids.into_iter().collect();
        let mut seen: HashSet<ValueId> = stack.iter().copied().collect();
        let mut largest = 0;
        while let Some(id) = stack.pop() {
            let dims = self.dims(trial, id).unwrap_or_default();
            let volume = dims.iter().try_fold(1usize, |volume, dim| volume.checked_mul(*dim));
            largest = largest.max(volume.unwrap_or(usize::MAX));
            match self.graph.def(id) {
                Some((_, node)) if !matches!(node.op, Op::Shape { .. } | Op::Size) => {
                    stack.extend(node.inputs.iter().flatten().filter(|v| seen.insert(**v)));
                }
                _ => {}
            }
        }
        largest
    }

    /// A positional or constant value.
    pub fn eval(&self, trial: &Trial, id: ValueId) -> Result<Tensor, Stuck> {
        if let Some(tensor) = trial.memo.borrow().get(&id) {
            return Ok(tensor.clone());
        }
        let value = self.graph.value(id);
        let tensor = match &value.definition {
            Definition::Constant(constant) => constant.materialize().map_err(|e| Stuck {
                at: value.name.clone(),
                reason: e.to_string(),
            })?,
            Definition::Input => self.input(trial, id)?,
            Definition::Dead => {
                return Err(Stuck {
                    at: value.name.clone(),
                    reason: "nothing computes it".into(),
                });
            }
            Definition::Node { node, output } => {
                let node = self.graph.node(*node);
                let results = match (&node.op, node.input(0)) {
                    (Op::Shape { start, end }, Some(of)) => vec![Some(shape_of(&self.dims(trial, of)?, *start, *end))],
                    (Op::Size, Some(of)) => {
                        let volume: usize = self.dims(trial, of)?.iter().product();
                        vec![Some(Tensor::from_i64(vec![], &[volume as i64]))]
                    }
                    _ => {
                        let inputs = node.inputs.iter().map(|v| v.map(|v| self.eval(trial, v)).transpose());
                        apply(node, &inputs.collect::<Result<Vec<_>, _>>()?)?
                    }
                };
                pick(&node.name, results, *output)?
            }
        };
        trial.memo.borrow_mut().insert(id, tensor.clone());
        Ok(tensor)
    }

    /// Values computed from `feeds`, which replace data values. Every path back from a target must end in a feed or in
    /// a positional value.
    pub fn run(
        &self,
        trial: &Trial,
        feeds: &HashMap<ValueId, Tensor>,
        targets: &[ValueId],
    ) -> Result<Vec<Tensor>, Stuck> {
        let mut local = feeds.clone();
        targets.iter().map(|id| self.run_one(trial, &mut local, *id)).collect()
    }

    fn run_one(&self, trial: &Trial, local: &mut HashMap<ValueId, Tensor>, id: ValueId) -> Result<Tensor, Stuck> {
        if let Some(tensor) = local.get(&id) {
            return Ok(tensor.clone());
        }
        if self.dependence(id) != Dependence::Data {
            return self.eval(trial, id);
        }
        let Some((node, output)) = self.graph.producer_of(id) else {
            return Err(Stuck {
                at: self.graph.value(id).name.clone(),
                reason: "an input that nothing stands in for".into(),
            });
        };
        let node = self.graph.node(node);
        let mut inputs = Vec::with_capacity(node.inputs.len());
        for input in &node.inputs {
            inputs.push(input.map(|v| self.run_one(trial, local, v)).transpose()?);
        }
        let results = apply(node, &inputs)?;
        let tensor = pick(&node.name, results.clone(), output)?;
        for (value, result) in node.outputs.iter().zip(results) {
            if let (Some(value), Some(result)) = (value, result) {
                local.insert(*value, result);
            }
        }
        Ok(tensor)
    }

    /// The value that a caller would pass for this input.
    fn input(&self, trial: &Trial, id: ValueId) -> Result<Tensor, Stuck> {
        let value = self.graph.value(id);
        let dims = self.dims(trial, id)?;
        let dtype = value.dtype.unwrap_or(DType::I64);
        let (past, total) = (trial.sizes.past as f64, (trial.sizes.past + trial.sizes.tokens) as f64);
        let volume: usize = dims.iter().product();
        let last = dims.last().copied().unwrap_or(1).max(1);
        let masked = match dtype {
            DType::F16 => -65504.0,
            t if t.is_float() => f64::from(f32::MIN),
            _ => 0.0,
        };
        let kept = if dtype.is_float() { 0.0 } else { 1.0 };
        let window = self.roles.windows.get(&id).copied().flatten();
        let open = |position: usize, slot: usize| slot <= position && window.is_none_or(|w| slot + w > position);
        let element = |i: usize| {
            let (row, column) = ((i / last) % trial.sizes.tokens.max(1), i % last);
            match self.roles.of.get(&id)? {
                InputRole::Positions => Some(past + column as f64),
                InputRole::PastLength => Some(past),
                InputRole::TotalLength => Some(total),
                InputRole::LastPosition => Some(total - 1.0),
                InputRole::PaddingMask => Some(if (column as f64) < total { 1.0 } else { 0.0 }),
                InputRole::FullMask => Some(if open(past as usize + row, column) {
                    kept
                } else {
                    masked
                }),
                InputRole::InputIds
                | InputRole::Embeddings
                | InputRole::Cache
                | InputRole::ChosenRows
                | InputRole::Unread => None,
            }
        };
        let values: Option<Vec<f64>> = (0..volume).map(element).collect();
        let values = values.ok_or_else(|| Stuck {
            at: value.name.clone(),
            reason: "depends on token ids or cache contents".into(),
        })?;
        Ok(tensor_of(dtype, dims, &values))
    }
}

impl Trial {
    fn new(roles: &Roles, sizes: Sizes) -> Self {
        let capacity = roles.capacity.unwrap_or(sizes.past + sizes.tokens + SPARE_SLOTS);
        let symbols = BTreeMap::from([
            (Sym::batch(), sizes.batch as i64),
            (Sym::past(), sizes.past as i64),
            (Sym::tokens(), sizes.tokens as i64),
            (Sym::capacity(), capacity as i64),
        ]);
        Trial {
            sizes,
            symbols,
            memo: RefCell::default(),
        }
    }

    pub fn size(&self, dim: &Dim) -> Option<i64> {
        dim.eval(&self.symbols)
    }
}

/// Numbers stored as `dtype`.
pub fn tensor_of(dtype: DType, shape: Vec<usize>, values: &[f64]) -> Tensor {
    let ints = || values.iter().map(|v| *v as i64).collect::<Vec<_>>();
    match dtype {
        DType::I64 => Tensor::from_i64(shape, &ints()),
        DType::I32 => Tensor::from_i32(shape, &values.iter().map(|v| *v as i32).collect::<Vec<_>>()),
        DType::Bool => Tensor::from_bool(shape, &values.iter().map(|v| *v != 0.0).collect::<Vec<_>>()),
        DType::U8 | DType::I8 => {
            let bytes: Vec<u8> = ints().into_iter().map(|v| v as u8).collect();
            Tensor::new(dtype, shape, bytes.into()).expect("one byte per element")
        }
        float => Tensor::from_f64_as(float, shape, values),
    }
}

fn shape_of(dims: &[usize], start: i64, end: Option<i64>) -> Tensor {
    let rank = dims.len() as i64;
    let clamp = |i: i64| (if i < 0 { i + rank } else { i }).clamp(0, rank) as usize;
    let (start, end) = (clamp(start), clamp(end.unwrap_or(rank)));
    let part: Vec<i64> = dims[start..end.max(start)].iter().map(|d| *d as i64).collect();
    Tensor::from_i64(vec![part.len()], &part)
}

fn apply(node: &Node, inputs: &[Option<Tensor>]) -> Result<Vec<Option<Tensor>>, Stuck> {
    eval_node(&node.op, inputs, node.outputs.len()).map_err(|error| Stuck {
        at: node.name.clone(),
        reason: error.to_string(),
    })
}

fn pick(node: &str, results: Vec<Option<Tensor>>, output: usize) -> Result<Tensor, Stuck> {
    results.into_iter().nth(output).flatten().ok_or_else(|| Stuck {
        at: node.to_string(),
        reason: format!("its output {output} is not computed"),
    })
}
