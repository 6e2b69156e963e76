//! Facts about a package's computation, from its canonical graph.

use std::collections::BTreeSet;

use super::rope::Table;
use crate::graph::op::{Binary, Op, Unary};
use crate::graph::{Graph, Node, NodeId, ValueId};
use crate::passes::Architecture;

/// The facts that a configuration may contradict.
pub struct Facts {
    /// Architecture from the manifest.
    pub architecture: Architecture,
    /// In the order of the model.
    pub layers: Vec<Layer>,
    /// Distinct epsilons of the norms over the residual stream.
    pub rms_epsilons: Vec<f64>,
    /// Epsilons of those that also subtract the mean.
    pub layer_epsilons: Vec<f64>,
    /// Distinct activation functions.
    pub activations: BTreeSet<Activation>,
    /// Soft cap of the logits.
    pub logits_softcap: Option<f64>,
    /// Factor of the embeddings.
    pub embedding_factor: f64,
    /// Two norms of a layer read the same residual stream.
    pub parallel_blocks: bool,
    /// Extents of matrices.
    pub extents: BTreeSet<usize>,
    /// Maximum positions.
    pub capacity: Option<usize>,
}

/// One attention.
pub struct Layer {
    /// Factor of the scores.
    pub scale: f64,
    /// Soft cap of the scores.
    pub softcap: Option<f64>,
    /// Positions that a query attends to, itself included, if fewer than the package's capacity.
    pub window: Option<usize>,
    /// Rows of the rotary tables; `None` if queries are not rotated.
    pub rotary: Option<Table>,
}

/// A function between two matrices of a feed-forward block.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Activation {
    /// `x · sigmoid(x)`.
    Silu,
    /// `x · sigmoid(1.702 x)`.
    QuickGelu,
    /// By the error function.
    Gelu,
    /// Approximated by tanh.
    GeluTanh,
    /// `max(x, 0)`.
    Relu,
}

impl Activation {
    /// Hugging Face's name.
    pub fn name(self) -> &'static str {
        match self {
            Activation::Silu => "silu",
            Activation::QuickGelu => "quick_gelu",
            Activation::Gelu => "gelu",
            Activation::GeluTanh => "gelu_pytorch_tanh",
            Activation::Relu => "relu",
        }
    }

    fn of(op: &Op) -> Option<Activation> {
        match op {
            Op::Swish { alpha } if *alpha == 1.0 => Some(Activation::Silu),
            Op::Swish { alpha } if (*alpha - 1.702).abs() < 1e-3 => Some(Activation::QuickGelu),
            Op::Gelu { tanh: false } => Some(Activation::Gelu),
            Op::Gelu { tanh: true } => Some(Activation::GeluTanh),
            Op::Unary(Unary::Relu) => Some(Activation::Relu),
            _ => None,
        }
    }
}

impl Facts {
    /// Reads a typed canonical graph. `capacity`: maximum positions of the package.
    pub fn of(graph: &Graph, architecture: &Architecture, capacity: Option<usize>) -> Facts {
        let nodes = || graph.node_ids().map(|id| graph.node(id));
        let attentions: Vec<NodeId> = graph
            .node_ids()
            .filter(|id| graph.node(*id).op.is_attention())
            .collect();
        let layers = attentions.iter().enumerate().map(|(i, id)| {
            let window = architecture.windows.get(i).copied().flatten();
            layer(graph, graph.node(*id), architecture, capacity, window)
        });
        let norms: Vec<&Node> = nodes()
            .filter(|node| is_over_stream(graph, node, architecture.hidden))
            .collect();
        let epsilons = |rms: bool| {
            let found = norms.iter().filter_map(|node| match node.op {
                Op::RmsNormalization { epsilon, .. } if rms => Some(f64::from(epsilon)),
                Op::LayerNormalization { epsilon, .. } if !rms => Some(f64::from(epsilon)),
                _ => None,
            });
            let mut found: Vec<f64> = found.collect();
            found.sort_by(f64::total_cmp);
            found.dedup();
            found
        };
        let mut streams: Vec<Option<ValueId>> = norms.iter().map(|node| node.input(0)).collect();
        streams.sort_unstable();
        let matrices = graph.value_ids().filter_map(|id| graph.constant(id));
        Facts {
            architecture: architecture.clone(),
            layers: layers.collect(),
            rms_epsilons: epsilons(true),
            layer_epsilons: epsilons(false),
            activations: nodes().filter_map(|node| Activation::of(&node.op)).collect(),
            logits_softcap: logits_softcap(graph),
            embedding_factor: embedding_factor(graph),
            parallel_blocks: streams.windows(2).any(|pair| pair[0] == pair[1]),
            extents: matrices
                .filter(|c| c.shape().len() == 2)
                .flat_map(|c| c.shape().to_vec())
                .collect(),
            capacity,
        }
    }

    /// Whether a window of this length is shorter than the package's capacity.
    pub fn counts(&self, window: usize) -> bool {
        self.capacity.is_none_or(|capacity| window < capacity)
    }
}

fn layer(
    graph: &Graph,
    node: &Node,
    architecture: &Architecture,
    capacity: Option<usize>,
    window: Option<usize>,
) -> Layer {
    let head_dim = architecture.head_dim;
    let short = architecture.rotary.as_ref().and_then(|rotary| rotary.longest_short_run);
    let attention = node.op.attention().expect("an attention");
    let scale = attention.scale.map_or(1.0 / (head_dim as f64).sqrt(), f64::from);
    Layer {
        scale,
        softcap: Some(f64::from(attention.softcap)).filter(|cap| *cap != 0.0),
        window: window.filter(|window| capacity.is_none_or(|capacity| *window < capacity)),
        rotary: node.input(0).and_then(|query| rotary(graph, query, short)),
    }
}

/// The tables that rotate the query of an attention; if there are two, the first `short` rows, for short runs.
fn rotary(graph: &Graph, mut at: ValueId, short: Option<usize>) -> Option<Table> {
    loop {
        let (_, node) = graph.def(at)?;
        match &node.op {
            Op::RotaryEmbedding { .. } => {
                let constant = |i: usize| graph.constant(node.input(i)?)?.materialize().ok();
                let table = Table::new(&constant(1)?, &constant(2)?)?;
                return match short {
                    Some(rows) => table.first(rows),
                    None => Some(table),
                };
            }
            Op::Transpose { .. } | Op::Reshape { .. } | Op::Cast { .. } | Op::Identity | Op::RoundToCodes { .. } => {
                at = node.input(0)?;
            }
            // A rotation in parts, whose products with cosines and with sines are rounded.
            Op::Binary(Binary::Add) => {
                let part = |i: usize, table: usize| {
                    let (_, mut part) = graph.def(node.input(i)?)?;
                    while let Op::RoundToCodes { .. } = part.op {
                        (_, part) = graph.def(part.input(0)?)?;
                    }
                    matches!(part.op, Op::RotaryEmbedding { .. }).then_some(())?;
                    graph.constant(part.input(table)?)?.materialize().ok()
                };
                return Table::new(&part(0, 1)?, &part(1, 2)?);
            }
            _ => return None,
        }
    }
}

fn is_over_stream(graph: &Graph, node: &Node, hidden: Option<usize>) -> bool {
    let is_norm = matches!(node.op, Op::RmsNormalization { .. } | Op::LayerNormalization { .. });
    let width = || graph.shape(node.input(0)?)?.last()?.as_const();
    is_norm && hidden.is_some() && width().map(|n| n as usize) == hidden
}

/// A constant of one element.
fn scalar(graph: &Graph, value: ValueId) -> Option<f64> {
    let constant = graph.constant(value).filter(|c| c.len() == 1 && c.dtype().is_float())?;
    constant.materialize().ok()?.to_f64().first().copied()
}

/// `cap · tanh(x / cap)` before the logits.
fn logits_softcap(graph: &Graph) -> Option<f64> {
    let mut at = *graph.outputs.first()?;
    let mut cap = None;
    loop {
        let (_, node) = graph.def(at)?;
        match &node.op {
            Op::Unary(Unary::Tanh) => return cap,
            Op::Binary(Binary::Mul) => {
                let [a, b] = [node.input(0)?, node.input(1)?];
                let (value, factor) = match scalar(graph, b) {
                    Some(factor) => (a, factor),
                    None => (b, scalar(graph, a)?),
                };
                cap = Some(factor);
                at = value;
            }
            Op::Cast { .. } | Op::Identity | Op::Reshape { .. } => at = node.input(0)?,
            _ => return None,
        }
    }
}

/// The factor of the rows of the token embedding; 1 if there is none.
fn embedding_factor(graph: &Graph) -> f64 {
    let uses = graph.uses();
    let gathers = graph.node_ids().map(|id| graph.node(id)).find(|node| {
        let table = node.input(0).and_then(|table| graph.constant(table));
        matches!(node.op, Op::Gather { .. }) && table.is_some_and(|c| c.shape().len() == 2 && c.dtype().is_float())
    });
    let mut at = gathers.and_then(|node| node.output(0));
    let mut total = 1.0;
    while let Some(value) = at {
        at = None;
        let [(user, _)] = uses.get(&value).map(Vec::as_slice).unwrap_or_default() else {
            break;
        };
        let node = graph.node(*user);
        match node.op {
            Op::Cast { .. } | Op::Identity => at = node.output(0),
            Op::Binary(Binary::Mul) => {
                let factor = node.inputs.iter().flatten().find_map(|input| scalar(graph, *input));
                if let Some(factor) = factor {
                    total *= factor;
                    at = node.output(0);
                }
            }
            Op::Binary(Binary::Div) => {
                if let Some(divisor) = node.input(1).and_then(|input| scalar(graph, input)) {
                    total /= divisor;
                    at = node.output(0);
                }
            }
            _ => {}
        }
    }
    total
}
