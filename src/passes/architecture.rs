//! Facts about the model, from the canonical graph and its analysis, for the package's manifest.

use std::fmt;

use serde::{Deserialize, Serialize};

use super::attention::Analysis;
use super::roles::Roles;
use crate::dim::Dim;
use crate::graph::op::Op;
use crate::graph::{Graph, NodeId, ValueId};
use crate::tensor::DType;

/// Sizes of a decoder-only model. Optional facts are `None` if the graph does not show them.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Architecture {
    /// Attention layers.
    pub layers: usize,
    /// Pairs of a key and a value cache; fewer than layers where layers share caches.
    pub caches: usize,
    /// Width of the residual stream.
    pub hidden: Option<usize>,
    /// Query heads of the first layer.
    pub heads: usize,
    /// Key and value heads of the first layer.
    pub kv_heads: usize,
    /// Head dim of keys and queries.
    pub head_dim: usize,
    /// Head dim of values, if it differs from `head_dim`.
    pub value_dim: usize,
    /// Width of the feed-forward block: the widest weight of a layer that is neither hidden nor heads wide.
    pub intermediate: Option<usize>,
    /// Row length of the logits.
    pub vocabulary: Option<usize>,
    /// Positions beyond this one have no rotary or position-embedding row, or were not proved: no capacity may be
    /// larger.
    pub max_positions: Option<usize>,
    /// Sliding window of each layer: how many positions a query attends to, itself included; `None` for all.
    pub windows: Vec<Option<usize>>,
    /// Soft cap of the first layer's scores.
    pub attention_softcap: Option<f32>,
    /// `None` if no layer is rotated.
    pub rotary: Option<Rotary>,
    /// `rms_norm` or `layer_norm`.
    pub norm: Option<String>,
    /// Batch size that the export fixed.
    pub batch: Option<usize>,
    /// Token count of one call that the export fixed: only in packages made before such exports were refused.
    pub tokens: Option<usize>,
    /// The language-model head multiplies the embedding.
    pub tied_embeddings: Option<bool>,
    /// Element type of the caches.
    pub cache_dtype: DType,
    /// Experts of the first mixture-of-experts layer.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub experts: Option<ExpertCounts>,
}

/// Number of experts of a layer, and per token.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExpertCounts {
    /// All experts.
    pub experts: usize,
    /// Experts per token.
    pub top_k: usize,
}

/// `30 layers, 9 query heads over 3 KV heads of 64, hidden 576, vocabulary 49152`
impl fmt::Display for Architecture {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} layers, ", self.layers)?;
        match self.heads == self.kv_heads {
            true => write!(f, "{} heads of {}", self.heads, self.head_dim)?,
            false => write!(
                f,
                "{} query heads over {} KV heads of {}",
                self.heads, self.kv_heads, self.head_dim
            )?,
        }
        for (name, value) in [("hidden", self.hidden), ("vocabulary", self.vocabulary)] {
            if let Some(value) = value {
                write!(f, ", {name} {value}")?;
            }
        }
        if let Some(ExpertCounts { experts, top_k }) = self.experts {
            write!(f, ", {top_k} of {experts} experts a token")?;
        }
        let windows: Vec<usize> = self.windows.iter().flatten().copied().collect();
        if let Some(window) = windows.first() {
            write!(f, ", sliding window {window} in {} of the layers", windows.len())?;
        }
        Ok(())
    }
}

/// Rotary position embedding of the first rotated layer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Rotary {
    /// Pairs are neighbors; otherwise an element is paired with the one half the rotary width away.
    pub interleaved: bool,
    /// Leading elements of a head that are rotated.
    pub rotary_dim: usize,
    /// Distinct tables in the model.
    pub tables: usize,
    /// The longest run, in positions, with the tables for short runs; longer runs have their own tables (LongRoPE).
    /// `None` if all runs have the same.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub longest_short_run: Option<usize>,
}

/// The first mixture of experts.
fn experts(graph: &Graph) -> Option<ExpertCounts> {
    graph.node_ids().find_map(|id| {
        let node = graph.node(id);
        let Op::Experts(how) = &node.op else { return None };
        let chosen = graph.shape(node.input(2)?)?.last()?.as_const()?;
        Some(ExpertCounts {
            experts: how.experts,
            top_k: usize::try_from(chosen).ok()?,
        })
    })
}

/// Reads the facts. `limit` is the bound from a table of position embeddings.
pub fn describe(graph: &Graph, roles: &Roles, analysis: &Analysis, limit: Option<usize>) -> Option<Architecture> {
    let first = analysis.layers.first()?;
    let (key, value) = (&analysis.caches[&first.key_cache], &analysis.caches[&first.value_cache]);
    let embedding = embedding(graph);
    let hidden = embedding.and_then(|(_, c)| c.1);
    let hidden = hidden.or(graph.embedding_width()).or_else(|| self::hidden(graph));
    let vocabulary = graph
        .outputs
        .first()
        .and_then(|id| graph.shape(*id))
        .and_then(|s| s.last())
        .and_then(Dim::as_const)
        .map(|n| n as usize);
    let rotated = analysis
        .layers
        .iter()
        .find_map(|l| l.query.rotated().map(|(_, rope)| rope));
    let tables = analysis.tables.tables.iter().map(|t| t.positions()).min();
    Some(Architecture {
        experts: experts(graph),
        layers: analysis.layers.len(),
        caches: analysis.caches.len() / 2,
        hidden,
        heads: first.query.heads,
        kv_heads: key.heads,
        head_dim: key.dim,
        value_dim: value.dim,
        intermediate: intermediate(graph, hidden, first.query.heads * key.dim, vocabulary),
        vocabulary,
        max_positions: limit
            .into_iter()
            .chain(tables)
            .chain(analysis.position_limit)
            .chain([analysis.tables.positions])
            .min(),
        windows: analysis.layers.iter().map(|l| l.scores.window).collect(),
        attention_softcap: first.scores.softcap,
        rotary: rotated.map(|rope| Rotary {
            interleaved: rope.interleaved,
            rotary_dim: rope.rotary_dim,
            tables: analysis.tables.tables.len(),
            longest_short_run: analysis.tables.longest_short_run(),
        }),
        norm: norm(graph),
        batch: roles.batch,
        tokens: None,
        tied_embeddings: embedding.and_then(|(id, _)| tied(graph, id)),
        cache_dtype: graph.value(first.key_cache).dtype.unwrap_or(DType::F32),
    })
}

/// The table that token ids index, with its shape `[vocabulary, hidden]`.
fn embedding(graph: &Graph) -> Option<(ValueId, (usize, Option<usize>))> {
    let ids = *graph.inputs.first()?;
    let uses = graph.uses();
    let mut stack = vec![ids];
    while let Some(value) = stack.pop() {
        for (node, input) in uses.get(&value).into_iter().flatten() {
            let node = graph.node(*node);
            match node.op {
                Op::Gather { .. } if *input == 1 => {
                    let table = node.input(0)?;
                    let shape = graph.shape(table)?;
                    let dim = |i: usize| shape.get(i).and_then(Dim::as_const).map(|n| n as usize);
                    return Some((table, (dim(0)?, dim(1))));
                }
                Op::Cast { .. } | Op::Identity | Op::Reshape { .. } => stack.extend(node.output(0)),
                _ => {}
            }
        }
    }
    None
}

fn hidden(graph: &Graph) -> Option<usize> {
    let norms = graph.node_ids().map(|id| graph.node(id));
    let mut norms = norms.filter(|n| matches!(n.op, Op::RmsNormalization { .. } | Op::LayerNormalization { .. }));
    norms.find_map(|n| graph.shape(n.input(0)?)?.last()?.as_const().map(|n| n as usize))
}

/// Weights that a matrix product reads, `(columns in, columns out)`.
fn product(graph: &Graph, id: NodeId) -> Option<(usize, usize)> {
    let node = graph.node(id);
    let shape = match node.op {
        Op::MatMul | Op::Gemm { .. } => graph.shape(node.input(1)?)?,
        _ => return None,
    };
    match shape[..] {
        [ref a, ref b] => Some((a.as_const()? as usize, b.as_const()? as usize)),
        _ => None,
    }
}

fn intermediate(graph: &Graph, hidden: Option<usize>, heads: usize, vocabulary: Option<usize>) -> Option<usize> {
    let hidden = hidden?;
    // The product back to the residual stream that does not come from the heads.
    let widths = graph.node_ids().filter_map(|id| product(graph, id));
    let down: Vec<usize> = widths
        .filter(|(_, out)| *out == hidden)
        .map(|(width, _)| width)
        .collect();
    let others = down.iter().copied().filter(|w| *w != heads && Some(*w) != vocabulary);
    // The first one, but keys and values can be as wide as the residual stream, so readers of the stream come last.
    others.min_by_key(|w| *w == hidden).or(down.first().copied())
}

fn norm(graph: &Graph) -> Option<String> {
    graph.node_ids().find_map(|id| match graph.node(id).op {
        Op::RmsNormalization { .. } => Some("rms_norm".to_string()),
        Op::LayerNormalization { .. } => Some("layer_norm".to_string()),
        _ => None,
    })
}

/// Whether the head's weight is the embedding, possibly transposed.
fn tied(graph: &Graph, table: ValueId) -> Option<bool> {
    let embedding = graph.constant(table)?;
    let mut at = *graph.outputs.first()?;
    loop {
        let (_, node) = graph.def(at)?;
        if matches!(node.op, Op::MatMul | Op::Gemm { .. }) {
            break;
        }
        at = node.input(0)?;
    }
    let mut weight = graph.def(at)?.1.input(1)?;
    while let Some((_, node)) = graph.def(weight) {
        weight = node.input(0)?;
    }
    let head = graph.constant(weight)?;
    Some(weight == table || (head.origin().is_some() && head.origin() == embedding.origin()))
}
