//! Drops tokens without logits.
//!
//! With [`Logits::Rows`], one token per sequence gets logits. Everything between the last operator that mixes tokens
//! (the last attention) and the logits works on each token independently, so one token is gathered there and the rest
//! computes on it: the output weight (a quarter of a small model) and the last layer's feed-forward run on one row
//! instead of a whole prefill chunk. If there is only one token, the gather exists only for the interface, and is
//! placed at the output weight's activation.

use std::collections::{HashMap, HashSet};

use super::LinearForm;
use super::context::{Lowered, Lowering};
use super::demand::{Demand, data_inputs, through_transpose};
use super::error::Reason;
use crate::dim::{Dim, Sym};
use crate::graph::op::RowWise;
use crate::graph::{Graph, Node, NodeId, Op, ValueId};
use crate::interface::Interface;
use crate::network::{Elementwise, LayerKind, Logits, MatrixOp, Profile, TensorId, Tokens};
use crate::tensor::DType;

/// The graph's logits; none in a graph without interface.
pub(super) fn logits(graph: &Graph) -> Option<ValueId> {
    graph.interface.as_ref().map(Interface::logits)
}

/// The nodes that compute only on the chosen rows. Empty unless the profile has chosen rows.
pub(super) fn row_wise(graph: &Graph, demand: &Demand, profile: &Profile) -> HashSet<NodeId> {
    let mut rows = HashSet::new();
    let Some(logits) = logits(graph).filter(|_| profile.logits == Logits::Rows) else {
        return rows;
    };
    // Reads of data by used nodes: reading a shape does not need all tokens of a value.
    let mut readers: HashMap<ValueId, Vec<NodeId>> = HashMap::new();
    for id in graph.node_ids().filter(|id| demand.nodes.contains(id)) {
        for value in data_inputs(graph, graph.node(id)) {
            readers.entry(value).or_default().push(id);
        }
    }
    let one_token = profile.tokens == Tokens::Static(1);
    for id in graph.node_ids().rev().filter(|id| demand.nodes.contains(id)) {
        let node = graph.node(id);
        let only_rows = |output: ValueId| match readers.get(&output) {
            _ if output == logits => {
                graph.outputs.iter().filter(|v| **v == logits).count() == 1 && !readers.contains_key(&output)
            }
            None => false,
            Some(readers) => {
                let inside = readers.iter().all(|r| rows.contains(r));
                let before_product = one_token && readers.iter().any(|r| matches!(graph.node(*r).op, Op::MatMul));
                inside && !before_product && !graph.outputs.contains(&output)
            }
        };
        let mut outputs = node.outputs.iter().flatten();
        if outputs.all(|output| only_rows(*output)) && is_row_wise(graph, node) {
            rows.insert(id);
        }
    }
    rows
}

/// Whether row `[b, t, :]` of the output is computed from rows `[b, t, :]` of the inputs.
fn is_row_wise(graph: &Graph, node: &Node) -> bool {
    let last_axis = |axis: i64| axis == -1 || axis == 2;
    if node.op == Op::MatMul {
        let weight = node.input(1).map(|v| through_transpose(graph, v).0);
        let matrix = weight
            .and_then(|v| graph.constant(v))
            .is_some_and(|c| c.shape().len() == 2);
        return matrix && node.input(0).is_some_and(|v| has_token_axis(graph, v));
    }
    // Matrices of experts are the same for all tokens.
    if let Op::Experts(_) = node.op {
        let mut tokens = node.inputs.iter().take(3).flatten();
        return tokens.all(|v| has_token_axis(graph, *v));
    }
    if node.outputs.len() > 1 && !matches!(node.op, Op::Routing(_)) {
        return false;
    }
    let last_only = match node.op.info().row_wise {
        RowWise::Always => true,
        RowWise::OverLastAxis => node.op.axis().is_some_and(last_axis),
        RowWise::Never => false,
    };
    let mut inputs = node.inputs.iter().flatten();
    last_only && inputs.all(|v| has_token_axis(graph, *v) || is_constant_row(graph, *v))
}

/// `[batch, tokens, n]`.
fn has_token_axis(graph: &Graph, value: ValueId) -> bool {
    graph.constant(value).is_none()
        && graph
            .shape(value)
            .is_some_and(|s| s.len() == 3 && s[1] == Dim::sym(Sym::tokens()))
}

fn is_constant_row(graph: &Graph, value: ValueId) -> bool {
    let Some(constant) = graph.constant(value) else {
        return false;
    };
    let leading = constant.shape().split_last().map_or(&[][..], |(_, leading)| leading);
    constant.shape().len() <= 3 && leading.iter().all(|d| *d == 1)
}

impl Lowering<'_> {
    /// The chosen row per sequence: `[batch, tokens, n]` → `[batch, 1, n]`.
    pub(super) fn chosen_rows(&mut self, x: TensorId) -> Lowered {
        if let Some(chosen) = self.chosen.get(&x) {
            return Ok(*chosen);
        }
        let Some(rows) = self.logit_rows else {
            return Reason::unsupported("the profile has no input that chooses rows");
        };
        // With one token there is no choice, and a gather would be recomputed for every row of a reduced product.
        let one_token = self.profile.tokens == Tokens::Static(1);
        if one_token && (self.options.linear == LinearForm::ReduceRow || !self.kernels.is_empty()) {
            return Ok(x);
        }
        let name = format!("{}/chosen", self.b.network().tensor(x).name);
        let batch = self.profile.batch;
        let chosen = if batch == 1 {
            self.b.add(&name, LayerKind::Gather { axis: 1 }, &[x, rows])?
        } else {
            // One product with a one-hot row per sequence; Gather would select the same tokens of every sequence.
            let one_hot = self.one_hot_rows(rows, self.b.dtype(x))?;
            let kind = LayerKind::MatrixMultiply {
                op_a: MatrixOp::None,
                op_b: MatrixOp::None,
            };
            self.b.add(&name, kind, &[one_hot, x])?
        };
        self.chosen.insert(x, chosen);
        Ok(chosen)
    }

    /// `[batch, 1, tokens]`, 1 at the chosen token and 0 elsewhere.
    fn one_hot_rows(&mut self, rows: TensorId, dtype: DType) -> Lowered {
        let (batch, tokens) = (Dim::from(self.profile.batch), self.tokens());
        let one = || Dim::from(1usize);
        let iota = self.b.fill("logit_rows/iota", DType::I32, tokens, 0.0, 1.0)?;
        let iota = self.b.raise("logit_rows/iota_row", iota, 3)?;
        let rows = self.b.reshape("logit_rows/column", rows, vec![batch, one(), one()])?;
        let hit = self.b.elementwise("logit_rows/hit", Elementwise::Equal, iota, rows)?;
        Ok(self.b.cast("logit_rows/one_hot", dtype, hit)?)
    }
}
