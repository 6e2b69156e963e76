//! Values of a mixture of experts at concrete sizes, with substitutes for some values.

use std::collections::{BTreeMap, HashMap};

use crate::dim::{Dim, Sym};
use crate::graph::eval::eval_node;
use crate::graph::op::Op;
use crate::graph::{Definition, Graph, ValueId};
use crate::passes::roles::Roles;
use crate::tensor::{DType, Tensor};

/// Sizes, and values known so far.
#[derive(Clone)]
pub struct Trial<'g> {
    graph: &'g Graph,
    symbols: BTreeMap<Sym, i64>,
    known: HashMap<ValueId, Tensor>,
}

impl<'g> Trial<'g> {
    /// For this many tokens of one sequence, unless the export fixes more sequences.
    pub fn new(graph: &'g Graph, roles: &Roles, tokens: usize) -> Self {
        let batch = roles.batch.unwrap_or(1);
        let symbols = BTreeMap::from([
            (Sym::batch(), batch as i64),
            (Sym::past(), 0),
            (Sym::tokens(), tokens as i64),
            (Sym::capacity(), roles.capacity.unwrap_or(tokens) as i64),
        ]);
        Trial {
            graph,
            symbols,
            known: HashMap::new(),
        }
    }

    /// A tensor for a value.
    pub fn bind(&mut self, value: ValueId, tensor: Tensor) {
        self.known.insert(value, tensor);
    }

    /// The dims of a value, as far as they follow from inference and the sizes.
    pub fn dims(&self, value: ValueId) -> Option<Vec<usize>> {
        let size = |dim: &Dim| usize::try_from(dim.eval(&self.symbols)?).ok();
        self.graph.shape(value)?.iter().map(size).collect()
    }

    /// The tensor of a value; `None` if it depends on a value without a substitute.
    pub fn value(&mut self, value: ValueId) -> Option<Tensor> {
        if let Some(tensor) = self.known.get(&value) {
            return Some(tensor.clone());
        }
        let tensor = match &self.graph.value(value).definition {
            Definition::Constant(constant) => constant.materialize().ok()?,
            Definition::Input | Definition::Dead => return None,
            Definition::Node { node, output } => {
                let node = self.graph.node(*node);
                if let (Op::Shape { start, end }, Some(of)) = (&node.op, node.input(0)) {
                    let dims = match self.dims(of) {
                        Some(dims) => dims,
                        None => self.value(of)?.shape().to_vec(),
                    };
                    shape_of(&dims, *start, *end)
                } else if let (Op::Size, Some(of)) = (&node.op, node.input(0)) {
                    let dims = match self.dims(of) {
                        Some(dims) => dims,
                        None => self.value(of)?.shape().to_vec(),
                    };
                    Tensor::from_i64(vec![], &[dims.iter().product::<usize>() as i64])
                } else {
                    let mut inputs = Vec::with_capacity(node.inputs.len());
                    for input in &node.inputs {
                        inputs.push(match input {
                            Some(input) => Some(self.value(*input)?),
                            None => None,
                        });
                    }
                    let results = eval_node(&node.op, &inputs, node.outputs.len()).ok()?;
                    let tensor = results.get(*output).cloned().flatten()?;
                    for (to, result) in node.outputs.iter().zip(results) {
                        if let (Some(to), Some(result)) = (to, result) {
                            self.known.entry(*to).or_insert(result);
                        }
                    }
                    tensor
                }
            }
        };
        self.known.insert(value, tensor.clone());
        Some(tensor)
    }
}

fn shape_of(dims: &[usize], start: i64, end: Option<i64>) -> Tensor {
    let rank = dims.len() as i64;
    let clamp = |i: i64| (if i < 0 { i.saturating_add(rank) } else { i }).clamp(0, rank) as usize;
    let (start, end) = (clamp(start), clamp(end.unwrap_or(rank)));
    let part: Vec<i64> = dims[start..end.max(start)].iter().map(|d| *d as i64).collect();
    Tensor::from_i64(vec![part.len()], &part)
}

/// Pseudorandom numbers, the same for the same seed.
pub struct Random(u64);

impl Random {
    pub fn new(seed: u64) -> Self {
        Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    /// From -1 to 1.
    pub fn next(&mut self) -> f64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 11) as f64 / (1u64 << 52) as f64 - 1.0
    }

    /// A tensor of a float type, from `-scale` to `scale`.
    pub fn tensor(&mut self, dtype: DType, shape: Vec<usize>, scale: f64) -> Tensor {
        let count = shape.iter().product::<usize>();
        let values: Vec<f64> = (0..count).map(|_| self.next() * scale).collect();
        Tensor::from_f64_as(dtype, shape, &values)
    }
}

/// Tolerance for results of operators of this type, for numbers around 1.
pub fn tolerance(dtype: DType) -> f64 {
    match dtype {
        DType::F16 => 1e-2,
        DType::Bf16 => 6e-2,
        _ => 1e-4,
    }
}

/// Whether numbers are equal up to rounding.
pub fn agree(found: &[f64], wanted: &[f64], tolerance: f64) -> bool {
    found.len() == wanted.len()
        && found
            .iter()
            .zip(wanted)
            .all(|(f, w)| (f - w).abs() <= tolerance * (1.0 + w.abs()))
}
