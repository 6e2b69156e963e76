//! Attentions over the cache, with the rotation, the norms and the cache updates before them.

use super::Finder;
use crate::graph::op::{Attention, Op};
use crate::graph::{Node, NodeId, ValueId};
use crate::interface::Role;
use crate::network::{DecodeAttention, Rotation};

/// Nodes that become one [`DecodeAttention`].
#[derive(Clone, Debug)]
pub(super) struct AttentionGroup {
    pub layer: DecodeAttention,
    /// `[batch, tokens, heads * head_dim]`, or `[batch, heads, tokens, head_dim]`, which is the same for one token.
    pub qkv: [ValueId; 3],
    /// The group that computes query, key and value concatenated.
    pub packed: Option<usize>,
    pub caches: [ValueId; 2],
    pub write_indices: ValueId,
    /// Positions, cosines and sines.
    pub rotation: Option<[ValueId; 3]>,
    pub query_norm: Option<ValueId>,
    pub key_norm: Option<ValueId>,
    pub sinks: Option<ValueId>,
    /// The result `[batch, tokens, heads * head_dim]`, and the updated caches.
    pub outputs: [ValueId; 3],
    pub nodes: Vec<NodeId>,
}

impl AttentionGroup {
    pub fn inputs(&self) -> Vec<ValueId> {
        let mut inputs = match self.packed {
            Some(_) => Vec::new(),
            None => self.qkv.to_vec(),
        };
        inputs.extend(self.caches);
        inputs.push(self.write_indices);
        inputs.extend(self.rotation.map(|[positions, ..]| positions));
        inputs
    }
}

/// The rows of a query or key before they are normalized and rotated.
#[derive(Clone, Debug)]
struct Rows {
    source: ValueId,
    norm: Option<(ValueId, f32)>,
    rotation: Option<(Rotation, [ValueId; 3])>,
    nodes: Vec<NodeId>,
}

impl Finder<'_> {
    pub(super) fn attentions(&self) -> Vec<AttentionGroup> {
        let nodes = self.graph.node_ids().filter(|id| self.demand.nodes.contains(id));
        nodes.filter_map(|id| self.attention(id)).collect()
    }

    fn attention(&self, id: NodeId) -> Option<AttentionGroup> {
        let node = self.graph.node(id);
        let (scores, sinks) = self.scores(node)?;
        let (q, k, v) = (node.input(0)?, node.input(1)?, node.input(2)?);
        let window = self.window(node.input(3)?)?;
        let dtype = self.half(q)?;
        let [heads, head_dim] = self.heads(q)?;
        let [kv_heads, width] = self.heads(k)?;
        let fits = DecodeAttention::HEAD_SIZES.contains(&head_dim)
            && width == head_dim
            && self.heads(v)? == [kv_heads, head_dim]
            && kv_heads > 0
            && heads.is_multiple_of(kv_heads);
        let sinks_fit = sinks.is_none_or(|sinks| self.is_numbers_of_heads(sinks, heads));
        if !fits || !sinks_fit || scores.is_causal || scores.q_num_heads.is_some() {
            return None;
        }
        let mut nodes = vec![id];
        let [(keys, key_cache, key_output), (values, value_cache, value_output)] =
            [self.updated(k, id, &mut nodes)?, self.updated(v, id, &mut nodes)?];
        let [keys_node, values_node] = [nodes[1], nodes[2]];
        let query = self.rows(q, id, head_dim);
        let key = self.rows(keys, keys_node, head_dim);
        let value = self.heads_of(values, values_node);
        let (query, key) = self.alike(query, key, [(q, id), (keys, keys_node)])?;
        let scores_of = scores.scores(head_dim);
        let epsilon = match (query.norm, key.norm) {
            (Some((_, a)), Some((_, b))) if a != b => return None,
            (Some((_, epsilon)), _) | (None, Some((_, epsilon))) => epsilon,
            (None, None) => 0.0,
        };
        nodes.extend(query.nodes.iter().chain(&key.nodes).chain(&value.nodes));
        let result = self.joined(node.output(0)?, id, heads * head_dim, &mut nodes)?;
        if self.graph.value(result).dtype != Some(dtype) || self.half(key_cache) != Some(dtype) {
            return None;
        }
        let rotation = query.rotation;
        Some(AttentionGroup {
            layer: DecodeAttention {
                heads,
                kv_heads,
                packed: false,
                rotation: rotation.map(|(rotation, _)| rotation),
                query_norm: query.norm.is_some(),
                key_norm: key.norm.is_some(),
                epsilon,
                window,
                scale: scores_of.scale,
                soft_cap: scores_of.softcap,
                sinks: sinks.is_some(),
            },
            qkv: [query.source, key.source, value.source],
            packed: None,
            caches: [key_cache, value_cache],
            write_indices: self.graph.interface.as_ref()?.input(Role::WriteIndices)?,
            rotation: rotation.map(|(_, inputs)| inputs),
            query_norm: query.norm.map(|(weight, _)| weight),
            key_norm: key.norm.map(|(weight, _)| weight),
            sinks,
            outputs: [result, key_output, value_output],
            nodes,
        })
    }

    /// The attributes of an attention, and its sinks. There is no kernel for slopes and roundings.
    fn scores(&self, node: &Node) -> Option<(Attention, Option<ValueId>)> {
        match &node.op {
            Op::Attention(attention) if (4..7).all(|i| node.input(i).is_none()) => Some((attention.clone(), None)),
            Op::BiasedAttention(biased) => {
                let all = |i: usize, number: f32| {
                    let constant = node.input(i).and_then(|v| self.graph.constant(v))?;
                    let numbers = constant.materialize().ok()?;
                    Some(numbers.to_f32().iter().all(|n| *n == number))
                };
                if !all(4, 0.0)? {
                    return None;
                }
                let sinks = node.input(5).filter(|_| all(5, f32::NEG_INFINITY) == Some(false));
                Some((biased.unbiased(), sinks))
            }
            _ => None,
        }
    }

    fn is_numbers_of_heads(&self, value: ValueId, heads: usize) -> bool {
        let constant = self.graph.constant(value);
        constant.is_some_and(|c| c.dtype().is_float() && c.shape() == [heads])
    }

    /// Heads and their size, from `[batch, heads, tokens or slots, head_dim]`.
    fn heads(&self, value: ValueId) -> Option<[usize; 2]> {
        let number = |dim: &crate::dim::Dim| usize::try_from(dim.as_const()?).ok();
        match self.graph.shape(value).map(Vec::as_slice) {
            Some([_, heads, _, width]) => Some([number(heads)?, number(width)?]),
            _ => None,
        }
    }

    /// The rows that an update writes to a cache, the cache, and the updated cache, which only this attention reads.
    fn updated(
        &self,
        value: ValueId,
        attention: NodeId,
        nodes: &mut Vec<NodeId>,
    ) -> Option<(ValueId, ValueId, ValueId)> {
        let (id, node) = self.graph.def(value)?;
        let Op::TensorScatter { axis, circular: false } = node.op else {
            return None;
        };
        let (cache, rows, indices) = (node.input(0)?, node.input(1)?, node.input(2)?);
        let readers = self.readers.get(&value)?;
        let outputs = self.graph.outputs.iter().filter(|output| **output == value).count();
        let read_by_others = self
            .readers
            .get(&cache)
            .is_some_and(|readers| readers.iter().any(|r| *r != id));
        let fits = matches!(axis, 2 | -2)
            && readers[..] == [attention]
            && outputs == 1
            && !read_by_others
            && self.graph.inputs.contains(&cache)
            && self.is_input(indices, Role::WriteIndices);
        nodes.push(id);
        fits.then_some((rows, cache, value))
    }

    /// The rows of a query or key: the value before rotation, normalization and splitting into heads, as far as each
    /// result has a single reader.
    fn rows(&self, value: ValueId, reader: NodeId, head_dim: usize) -> Rows {
        let mut rows = Rows {
            source: value,
            norm: None,
            rotation: None,
            nodes: Vec::new(),
        };
        let mut reader = reader;
        if let Some((id, x, rotation)) = self.rotated(value, reader, head_dim) {
            rows.rotation = Some(rotation);
            rows.nodes.push(id);
            rows.source = x;
            reader = id;
        }
        if let Some((id, _)) = self.private(rows.source, reader)
            && let Some((x, weight, epsilon)) = self.norm(rows.source)
        {
            rows.norm = Some((weight, epsilon));
            rows.nodes.push(id);
            rows.source = x;
            reader = id;
        }
        let heads = self.heads_of(rows.source, reader);
        rows.nodes.extend(heads.nodes.iter());
        (rows.source, rows.norm) = match (rows.norm, heads.norm) {
            (None, norm) => (heads.source, norm),
            // Two norms: the first stays outside.
            (norm, None) => (heads.source, norm),
            (Some(_), Some(_)) => return rows,
        };
        rows
    }

    /// The inputs of a rotation by position, if only `reader` reads its result.
    #[allow(clippy::type_complexity, reason = "one use")]
    fn rotated(
        &self,
        value: ValueId,
        reader: NodeId,
        head_dim: usize,
    ) -> Option<(NodeId, ValueId, (Rotation, [ValueId; 3]))> {
        let (id, node) = self.private(value, reader)?;
        let Op::RotaryEmbedding {
            interleaved,
            num_heads: None,
            rotary_dim,
        } = node.op
        else {
            return None;
        };
        let rotary_dim = if rotary_dim == 0 { head_dim } else { rotary_dim };
        let (x, cosines, sines, positions) = (node.input(0)?, node.input(1)?, node.input(2)?, node.input(3)?);
        let table = |value: ValueId| {
            let shape = self.graph.constant(value).map(|c| (c.dtype().is_float(), c.shape()));
            matches!(shape, Some((true, [_, half])) if half * 2 == rotary_dim)
        };
        let fits =
            table(cosines) && table(sines) && self.is_input(positions, Role::PositionIds) && self.heads(x).is_some();
        let rotation = Rotation {
            rotary_dim,
            interleaved,
        };
        fits.then_some((id, x, (rotation, [positions, cosines, sines])))
    }

    /// The value that becomes `[batch, heads, tokens, head_dim]` by a reshape and a transpose, with an optional
    /// per-head norm between them.
    fn heads_of(&self, value: ValueId, reader: NodeId) -> Rows {
        let as_it_is = Rows {
            source: value,
            norm: None,
            rotation: None,
            nodes: Vec::new(),
        };
        let found = || -> Option<Rows> {
            let (transpose, node) = self.private(value, reader)?;
            if node.op
                != (Op::Transpose {
                    perm: Some(vec![0, 2, 1, 3]),
                })
            {
                return None;
            }
            let mut nodes = vec![transpose];
            let mut source = node.input(0)?;
            let mut reader = transpose;
            let mut norm = None;
            if let Some((id, _)) = self.private(source, reader)
                && let Some((x, weight, epsilon)) = self.norm(source)
            {
                norm = Some((weight, epsilon));
                nodes.push(id);
                (source, reader) = (x, id);
            }
            let (reshape, node) = self.private(source, reader)?;
            let x = node.input(0)?;
            if !matches!(node.op, Op::Reshape { .. }) || self.width(x)? != self.volume_of_heads(source)? {
                return None;
            }
            nodes.push(reshape);
            Some(Rows {
                source: x,
                norm,
                rotation: None,
                nodes,
            })
        };
        found().unwrap_or(as_it_is)
    }

    /// `heads * head_dim`, from `[batch, tokens, heads, head_dim]`.
    fn volume_of_heads(&self, value: ValueId) -> Option<usize> {
        match self.graph.shape(value).map(Vec::as_slice) {
            Some([_, _, heads, width]) => usize::try_from(heads.as_const()? * width.as_const()?).ok(),
            _ => None,
        }
    }

    /// Query and key as one kernel treats both: both rotated the same way, or unchanged if only one would be.
    fn alike(&self, query: Rows, key: Rows, [q, k]: [(ValueId, NodeId); 2]) -> Option<(Rows, Rows)> {
        if query.rotation == key.rotation {
            return Some((query, key));
        }
        let whole = |(value, _): (ValueId, NodeId)| Rows {
            source: value,
            norm: None,
            rotation: None,
            nodes: Vec::new(),
        };
        Some((whole(q), whole(k)))
    }

    /// The result with its heads concatenated.
    fn joined(&self, value: ValueId, attention: NodeId, width: usize, nodes: &mut Vec<NodeId>) -> Option<ValueId> {
        let (transpose, node) = self.reader(value)?;
        if node.op
            != (Op::Transpose {
                perm: Some(vec![0, 2, 1, 3]),
            })
        {
            return None;
        }
        debug_assert_ne!(transpose, attention);
        let (reshape, node) = self.reader(node.output(0)?)?;
        let result = node.output(0)?;
        let flat = matches!(node.op, Op::Reshape { .. }) && self.width(result) == Some(width);
        nodes.extend([transpose, reshape]);
        flat.then_some(result)
    }
}
