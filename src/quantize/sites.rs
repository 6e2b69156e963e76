//! Places at which the channels between two operators can be scaled without changing the model.
//!
//! A *site* is the input `x` of linear layers. If its channels are divided by factors `s` and the columns of every matrix
//! that reads `x` are multiplied by them, products do not change: `(x / s) · (W · s)ᵀ = x · Wᵀ`. The division has to
//! be folded into constants. That is exact up to rounding in these cases:
//!
//! - `x` is a norm's result, or that times a vector: the norm's weight and bias, or the vector, are divided;
//! - `x` is another linear layer's result, possibly times a value that is not constant (`act(gate) * up`), or through a
//!   `Relu` (which keeps positive factors): the rows of that layer's matrix and its bias are divided.
//!
//! Any other reader of `x` or of a matrix excludes a site.

use std::collections::HashMap;

use crate::graph::op::{Binary, Op, Unary};
use crate::graph::{Constant, Graph, NodeId, ValueId};
use crate::tensor::Tensor;

use super::matrices::weight_of;

/// An input of linear layers, with the matrices that read it.
#[derive(Clone, Debug)]
pub struct Site {
    /// `[batch, tokens, channels]`.
    pub input: ValueId,
    /// Matrices `[out, channels]` whose products read it.
    pub weights: Vec<ValueId>,
    /// The constants that absorb a division of its channels; `None` if there are none.
    pub fold: Option<Fold>,
}

/// Constants that absorb a division of channels.
#[derive(Clone, Debug, PartialEq)]
pub enum Fold {
    /// Vectors, each an operand of a node; the last axis has the channels.
    Vectors(Vec<(NodeId, usize)>),
    /// The rows of a matrix `[channels, in]`, and optionally a bias, as above.
    Rows {
        /// The matrix.
        weight: ValueId,
        /// The operand with its bias.
        bias: Option<(NodeId, usize)>,
    },
}

/// All inputs of linear layers, in the graph's order.
pub fn sites(graph: &Graph) -> Vec<Site> {
    let finder = Finder {
        graph,
        uses: graph.uses(),
    };
    let mut sites: Vec<Site> = Vec::new();
    let mut at: HashMap<ValueId, usize> = HashMap::new();
    for id in graph.node_ids() {
        let (Some(weight), Some(input)) = (weight_of(graph, id), graph.node(id).input(0)) else {
            continue;
        };
        let index = *at.entry(input).or_insert_with(|| {
            sites.push(Site {
                input,
                weights: Vec::new(),
                fold: None,
            });
            sites.len() - 1
        });
        if !sites[index].weights.contains(&weight) {
            sites[index].weights.push(weight);
        }
    }
    for site in &mut sites {
        site.fold = finder.fold(site);
    }
    sites
}

struct Finder<'g> {
    graph: &'g Graph,
    uses: HashMap<ValueId, Vec<(NodeId, usize)>>,
}

impl Finder<'_> {
    fn readers(&self, value: ValueId) -> &[(NodeId, usize)] {
        self.uses.get(&value).map_or(&[], Vec::as_slice)
    }

    /// The only node that reads a value, which is not an output of the graph.
    fn only_reader(&self, value: ValueId) -> Option<NodeId> {
        match self.readers(value) {
            [(reader, _)] if !self.graph.outputs.contains(&value) => Some(*reader),
            _ => None,
        }
    }

    fn fold(&self, site: &Site) -> Option<Fold> {
        let graph = self.graph;
        let channels = channels(graph, site.input)?;
        if graph.outputs.contains(&site.input) {
            return None;
        }
        // All readers are products with matrices that nothing else reads.
        let is_product = |(reader, operand): &(NodeId, usize)| *operand == 0 && weight_of(graph, *reader).is_some();
        if !self.readers(site.input).iter().all(is_product) {
            return None;
        }
        let own = |weight: &ValueId| {
            let fits = graph
                .constant(*weight)
                .is_some_and(|c| c.shape().len() == 2 && c.shape()[1] == channels);
            fits && self.is_read_at(*weight, site.input)
        };
        if !site.weights.iter().all(own) {
            return None;
        }
        let (id, node) = graph.def(site.input)?;
        match &node.op {
            Op::RmsNormalization { .. } | Op::LayerNormalization { .. } => {
                let rank = graph.shape(node.input(0)?)?.len() as i64;
                if !node.op.axis().is_some_and(|axis| axis == -1 || axis == rank - 1) {
                    return None;
                }
                let mut vectors = vec![(id, 1)];
                vectors.extend(node.input(2).map(|_| (id, 2)));
                let all = vectors.iter().all(|at| self.is_vector(*at, channels));
                all.then_some(Fold::Vectors(vectors))
            }
            Op::Binary(Binary::Mul) => {
                let vector = [(id, 0), (id, 1)].into_iter().find(|at| self.is_vector(*at, channels));
                match vector {
                    Some(vector) => Some(Fold::Vectors(vec![vector])),
                    // The result is linear in its matrix; the other factor can be anything.
                    None => [1, 0]
                        .into_iter()
                        .find_map(|operand| self.rows(node.input(operand)?, id, channels)),
                }
            }
            Op::Unary(Unary::Relu) => self.rows(node.input(0)?, id, channels),
            _ => None,
        }
    }

    /// Whether all readers of a matrix are products with one input.
    fn is_read_at(&self, weight: ValueId, input: ValueId) -> bool {
        let graph = self.graph;
        self.readers(weight).iter().all(|(turn, _)| {
            let Some(turned) = graph.node(*turn).output(0) else {
                return false;
            };
            let reads = |(reader, operand): &(NodeId, usize)| {
                *operand == 1
                    && weight_of(graph, *reader) == Some(weight)
                    && graph.node(*reader).input(0) == Some(input)
            };
            !graph.outputs.contains(&turned) && self.readers(turned).iter().all(reads)
        })
    }

    /// The rows of the linear layer that computes a value, if `reader` is its only reader.
    fn rows(&self, value: ValueId, reader: NodeId, channels: usize) -> Option<Fold> {
        let graph = self.graph;
        if self.only_reader(value)? != reader {
            return None;
        }
        let (mut id, mut node) = graph.def(value)?;
        let mut bias = None;
        if node.op == Op::Binary(Binary::Add) {
            let operand = [0, 1]
                .into_iter()
                .find(|operand| self.is_vector((id, *operand), channels))?;
            bias = Some((id, operand));
            let product = node.input(1 - operand)?;
            if self.only_reader(product)? != id {
                return None;
            }
            (id, node) = graph.def(product)?;
        }
        let weight = weight_of(graph, id)?;
        let fits = graph.constant(weight)?.shape().first() == Some(&channels);
        (fits && self.is_read_at(weight, node.input(0)?)).then_some(Fold::Rows { weight, bias })
    }

    /// Whether a node reads a constant with one number per channel, all other axes 1.
    fn is_vector(&self, (node, operand): (NodeId, usize), channels: usize) -> bool {
        let constant = self
            .graph
            .node(node)
            .input(operand)
            .and_then(|v| self.graph.constant(v));
        constant.is_some_and(|c| c.dtype().is_float() && c.len() == channels && c.shape().last() == Some(&channels))
    }
}

fn channels(graph: &Graph, value: ValueId) -> Option<usize> {
    let last = graph.shape(value)?.last()?.as_const()?;
    usize::try_from(last).ok()
}

/// Divides the channels of a site by `factors`, which must be positive, and multiplies the columns of its matrices by
/// them. Panics if the site has no fold, or a different number of channels.
pub fn scale(graph: &mut Graph, site: &Site, factors: &[f32]) {
    let vector = |values: &[f32]| Constant::tensor(Tensor::from_f32(vec![values.len()], values));
    let inverse: Vec<f32> = factors.iter().map(|s| 1.0 / s).collect();
    let (factors, inverse) = (vector(factors), vector(&inverse));
    match site.fold.as_ref().expect("the site takes factors") {
        Fold::Vectors(vectors) => {
            for at in vectors {
                rescaled(graph, *at, &inverse);
            }
        }
        Fold::Rows { weight, bias } => {
            let made = graph.constant(*weight).expect("a weight").with_factors(0, &inverse);
            graph.set_constant(*weight, made);
            if let Some(at) = bias {
                rescaled(graph, *at, &inverse);
            }
        }
    }
    for weight in &site.weights {
        let made = graph.constant(*weight).expect("a weight").with_factors(1, &factors);
        graph.set_constant(*weight, made);
    }
}

/// A vector times factors, for one reader, since equal vectors may be one constant of the graph.
fn rescaled(graph: &mut Graph, (node, operand): (NodeId, usize), factors: &Constant) {
    let value = graph.node(node).input(operand).expect("it was looked at");
    let constant = graph.constant(value).expect("a vector");
    let made = constant.with_factors(constant.shape().len() - 1, factors);
    let readers: usize = graph.uses().get(&value).map_or(0, Vec::len);
    if readers <= 1 && !graph.outputs.contains(&value) {
        graph.set_constant(value, made);
        return;
    }
    let name = graph.fresh_name(&format!("{}.scaled", graph.value(value).name));
    let own = graph.add_constant(&name, made);
    graph.node_mut(node).inputs[operand] = Some(own);
}
