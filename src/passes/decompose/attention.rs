//! Decomposes attention operators with additional features into plain operators.
//!
//! `GroupQueryAttention` packs projections, rotates and keeps a cache; ONNX `Attention` may take three-dimensional
//! operands, append to a past and be causal. Here each becomes reshapes, `RotaryEmbedding`, `Concat` or
//! `TensorScatter`, a mask computed from positions, and an `Attention` on four dimensions. The recognition that follows
//! sees one dialect, and proves it like any other.

use crate::dim::Dim;
use crate::graph::op::{self, BiasedAttention, Binary, Op};
use crate::graph::{Graph, NodeId, ValueId};
use crate::tensor::{DType, Tensor};

/// Expands what it can; the contract reports the rest. Returns the number of rewrites.
pub fn run(graph: &mut Graph) -> usize {
    let ids: Vec<NodeId> = graph.node_ids().collect();
    let mut rewrites = 0;
    for id in ids {
        let done = match graph.node(id).op.clone() {
            Op::GroupQueryAttention(how) => group_query(graph, id, &how),
            Op::Attention(how) => attention(graph, id, &how),
            _ => continue,
        };
        rewrites += usize::from(done.is_some());
    }
    rewrites
}

/// Adds nodes that share a name.
struct Writer<'g> {
    graph: &'g mut Graph,
    name: String,
}

impl Writer<'_> {
    fn op(&mut self, suffix: &str, op: Op, inputs: &[ValueId]) -> ValueId {
        self.graph.add_node(&format!("{}.{suffix}", self.name), op, inputs)
    }
    fn ints(&mut self, values: &[i64]) -> ValueId {
        let name = format!("{}.const", self.name);
        self.graph.add_i64(&name, values)
    }
    fn scalar(&mut self, value: i64) -> ValueId {
        let name = format!("{}.const", self.name);
        self.graph.add_constant(&name, Tensor::from_i64(vec![], &[value]))
    }
    fn binary(&mut self, suffix: &str, op: Binary, a: ValueId, b: ValueId) -> ValueId {
        self.op(suffix, Op::Binary(op), &[a, b])
    }
    fn unsqueeze(&mut self, x: ValueId, axes: &[i64]) -> ValueId {
        let axes = self.ints(axes);
        self.op("unsqueeze", Op::Unsqueeze, &[x, axes])
    }
    fn reshape(&mut self, suffix: &str, x: ValueId, to: &[i64]) -> ValueId {
        let to = self.ints(to);
        self.op(suffix, Op::Reshape { allowzero: false }, &[x, to])
    }
    fn swap(&mut self, suffix: &str, x: ValueId) -> ValueId {
        self.op(
            suffix,
            Op::Transpose {
                perm: Some(vec![0, 2, 1, 3]),
            },
            &[x],
        )
    }
    /// `[batch, tokens, heads*dim]` as `[batch, heads, tokens, dim]`.
    fn heads(&mut self, suffix: &str, x: ValueId, heads: usize) -> ValueId {
        let split = self.reshape(suffix, x, &[0, 0, heads as i64, -1]);
        self.swap(suffix, split)
    }
    /// The same with an RMS normalization of every head.
    fn normalized_heads(&mut self, suffix: &str, x: ValueId, heads: usize, weight: ValueId, epsilon: f32) -> ValueId {
        let split = self.reshape(suffix, x, &[0, 0, heads as i64, -1]);
        let norm = Op::RmsNormalization { axis: -1, epsilon };
        let normalized = self.op("norm", norm, &[split, weight]);
        self.swap(suffix, normalized)
    }
    /// The inverse.
    fn flat(&mut self, x: ValueId, width: usize) -> ValueId {
        let rows = self.swap("rows", x);
        self.reshape("flat", rows, &[0, 0, width as i64])
    }
    fn columns(&mut self, suffix: &str, x: ValueId, start: usize, end: usize) -> ValueId {
        let (start, end, axis) = (self.ints(&[start as i64]), self.ints(&[end as i64]), self.ints(&[2]));
        self.op(suffix, Op::Slice, &[x, start, end, axis])
    }
    /// One dim as a scalar.
    fn dim(&mut self, x: ValueId, axis: i64) -> ValueId {
        let op = Op::Shape {
            start: axis,
            end: Some(axis + 1),
        };
        let dim = self.op("shape", op, &[x]);
        let axes = self.ints(&[0]);
        self.op("dim", Op::Squeeze, &[dim, axes])
    }
    fn range(&mut self, end: ValueId) -> ValueId {
        let (start, step) = (self.scalar(0), self.scalar(1));
        self.op("range", Op::Range, &[start, end, step])
    }
    fn cast(&mut self, x: ValueId, to: DType) -> ValueId {
        self.op("cast", Op::Cast { to }, &[x])
    }
    /// `allowed` as a mask, joined with the export's own.
    fn join(&mut self, allowed: Option<ValueId>, own: Option<ValueId>) -> Option<ValueId> {
        let (Some(allowed), Some(own)) = (allowed, own) else {
            return allowed.or(own);
        };
        let dtype = self.graph.value(own).dtype.unwrap_or(DType::F32);
        if dtype == DType::Bool {
            return Some(self.binary("mask", Binary::And, allowed, own));
        }
        let name = format!("{}.masked", self.name);
        let masked = self
            .graph
            .add_constant(&name, Tensor::from_f64_as(dtype, vec![], &[f64::NEG_INFINITY]));
        Some(self.op("mask", Op::Where, &[allowed, own, masked]))
    }
}

/// Replaces the outputs of a node by `new` and removes the node. Outputs of the model keep their names.
fn replace(graph: &mut Graph, id: NodeId, new: &[(usize, ValueId)]) {
    for (output, value) in new {
        if let Some(old) = graph.node(id).output(*output) {
            graph.replace_uses(old, *value);
        }
    }
    graph.remove_node(id);
}

fn width(graph: &Graph, id: ValueId, axis_from_end: usize) -> Option<usize> {
    let shape = graph.shape(id)?;
    shape
        .get(shape.len().checked_sub(axis_from_end)?)?
        .as_const()
        .map(|n| n as usize)
}

/// A mask is boolean, or added to scores.
fn is_mask(graph: &Graph, mask: Option<ValueId>) -> bool {
    let dtype = mask.and_then(|mask| graph.value(mask).dtype);
    dtype.is_none_or(|dtype| dtype == DType::Bool || dtype.is_float())
}

/// Attributes come unchecked from the file.
fn is_no_count(heads: usize) -> bool {
    !(1..1 << 16).contains(&heads)
}

fn group_query(graph: &mut Graph, id: NodeId, how: &op::GroupQueryAttention) -> Option<()> {
    let node = graph.node(id).clone();
    let (query, past_key, past_value, last) = (node.input(0)?, node.input(3)?, node.input(4)?, node.input(5)?);
    // Scales of quantized caches.
    if (12..14).any(|i| node.input(i).is_some()) || (3..node.outputs.len()).any(|i| node.output(i).is_some()) {
        return None;
    }
    let (heads, kv_heads) = (how.num_heads, how.kv_num_heads);
    if node.input(14).is_some() != node.input(15).is_some() {
        return None;
    }
    let sinks = match (node.input(11), how.smooth_softmax) {
        (Some(sinks), _) => Some(graph.constant(sinks).filter(|c| c.shape() == [heads])?.cast(DType::F32)),
        // The softmax's denominator has an additional term exp(0).
        (None, 1) => Some(Tensor::from_f32(vec![heads], &vec![0.0; heads]).into()),
        (None, _) => None,
    };
    if !is_mask(graph, node.input(10)) || [heads, kv_heads].into_iter().any(is_no_count) {
        return None;
    }
    let packed = node.input(1).is_none();
    let dim = width(graph, query, 1)? / if packed { heads + 2 * kv_heads } else { heads };
    let cache_shape = graph.shape(past_key)?.clone();
    let is_static = cache_shape.len() == 4 && cache_shape[2].as_const().is_some();
    // The head_dim of the cache is symbolic in the builder's models.
    for past in [past_key, past_value] {
        if let Some(size) = graph.value_mut(past).shape.as_mut().and_then(|s| s.last_mut()) {
            *size = Dim::from(dim);
        }
    }
    let mut w = Writer {
        graph,
        name: node.name.clone(),
    };
    let (q, k, v) = if packed {
        let (kv, end) = (heads * dim, (heads + kv_heads) * dim);
        (
            w.columns("q", query, 0, kv),
            w.columns("k", query, kv, end),
            w.columns("v", query, end, end + kv_heads * dim),
        )
    } else {
        (query, node.input(1)?, node.input(2)?)
    };
    let (mut q, mut k, v) = match (node.input(14), node.input(15)) {
        (Some(of_queries), Some(of_keys)) => (
            w.normalized_heads("q", q, heads, of_queries, how.qk_norm_epsilon),
            w.normalized_heads("k", k, kv_heads, of_keys, how.qk_norm_epsilon),
            w.heads("v", v, kv_heads),
        ),
        _ => (
            w.heads("q", q, heads),
            w.heads("k", k, kv_heads),
            w.heads("v", v, kv_heads),
        ),
    };

    let tokens = w.dim(query, 1);
    let last = w.cast(last, DType::I64);
    let last = w.reshape("last", last, &[-1, 1]);
    let one = w.scalar(1);
    let total = w.binary("total", Binary::Add, last, one);
    let first = w.binary("first", Binary::Sub, total, tokens);
    let steps = w.range(tokens);
    let positions = w.binary("positions", Binary::Add, first, steps);
    if how.do_rotary {
        let (cos, sin) = (node.input(7)?, node.input(8)?);
        let half = width(w.graph, cos, 1)?;
        let op = Op::RotaryEmbedding {
            interleaved: how.rotary_interleaved,
            num_heads: None,
            rotary_dim: if 2 * half == dim { 0 } else { 2 * half },
        };
        let at = node.input(9).unwrap_or(positions);
        q = w.op("rotary", op.clone(), &[q, cos, sin, at]);
        k = w.op("rotary", op, &[k, cos, sin, at]);
    }
    let mut append = |past: ValueId, new: ValueId| {
        if is_static {
            let start = w.reshape("start", first, &[-1]);
            let op = Op::TensorScatter {
                axis: 2,
                circular: false,
            };
            w.op("cache", op, &[past, new, start])
        } else {
            w.op("cache", Op::Concat { axis: 2 }, &[past, new])
        }
    };
    let (k, v) = (append(past_key, k), append(past_value, v));

    let slots = w.dim(k, 2);
    let slots = w.range(slots);
    let rows = w.unsqueeze(positions, &[1, 3]);
    let mut allowed = w.binary("causal", Binary::LessOrEqual, slots, rows);
    let scores = how.scores(dim);
    if let Some(window) = scores.window {
        let window = w.scalar(window as i64);
        let before = w.binary("before", Binary::Sub, rows, window);
        let recent = w.binary("recent", Binary::Greater, slots, before);
        allowed = w.binary("window", Binary::And, allowed, recent);
    }
    let mask = w.join(Some(allowed), node.input(10))?;
    let name = w.name.clone();
    let y = match sinks {
        None => {
            let attention = Op::Attention(scores.operator(None));
            w.graph.add_node(&name, attention, &[q, k, v, mask])
        }
        Some(sinks) => {
            let slopes = Tensor::from_f32(vec![heads], &vec![0.0; heads]);
            let slopes = w.graph.add_constant(&format!("{name}.slopes"), slopes);
            let sinks = w.graph.add_constant(&format!("{name}.sinks"), sinks);
            let attention = Op::BiasedAttention(BiasedAttention {
                scale: scores.scale,
                softcap: scores.softcap.unwrap_or(0.0),
            });
            w.graph.add_node(&name, attention, &[q, k, v, mask, slopes, sinks])
        }
    };
    let y = w.flat(y, heads * dim);
    replace(graph, id, &[(0, y), (1, k), (2, v)]);
    Some(())
}

fn attention(graph: &mut Graph, id: NodeId, how: &op::Attention) -> Option<()> {
    let node = graph.node(id).clone();
    let (query, key, value) = (node.input(0)?, node.input(1)?, node.input(2)?);
    let rank = |graph: &Graph, id| graph.shape(id).map(Vec::len);
    let (past, lengths) = (node.input(4), node.input(6));
    if !is_mask(graph, node.input(3))
        || [how.q_num_heads, how.kv_num_heads]
            .into_iter()
            .flatten()
            .any(is_no_count)
    {
        return None;
    }
    if !how.is_causal && past.is_none() && lengths.is_none() && rank(graph, query) == Some(4) {
        return None;
    }
    let flat = rank(graph, query)? == 3;
    let mut w = Writer {
        graph,
        name: node.name.clone(),
    };
    let (mut q, mut k, mut v) = (query, key, value);
    let mut output_width = 0;
    if flat {
        let (heads, kv_heads) = (how.q_num_heads?, how.kv_num_heads?);
        output_width = width(w.graph, value, 1)? / kv_heads * heads;
        (q, k, v) = (
            w.heads("q", q, heads),
            w.heads("k", k, kv_heads),
            w.heads("v", v, kv_heads),
        );
    }
    if let (Some(past_key), Some(past_value)) = (past, node.input(5)) {
        k = w.op("cache", Op::Concat { axis: 2 }, &[past_key, k]);
        v = w.op("cache", Op::Concat { axis: 2 }, &[past_value, v]);
    }
    let mut allowed = None;
    if how.is_causal || lengths.is_some() {
        let slots = w.dim(k, 2);
        let slots = w.range(slots);
        let ends = match lengths {
            Some(lengths) => {
                let lengths = w.cast(lengths, DType::I64);
                Some(w.reshape("lengths", lengths, &[-1, 1, 1, 1]))
            }
            None => None,
        };
        if how.is_causal {
            let tokens = w.dim(query, if flat { 1 } else { 2 });
            let steps = w.range(tokens);
            let steps = w.unsqueeze(steps, &[1]);
            // As the operator defines it: aligned with the end of the stored slots.
            let rows = match (ends, past) {
                (Some(ends), _) => {
                    let first = w.binary("first", Binary::Sub, ends, tokens);
                    w.binary("positions", Binary::Add, first, steps)
                }
                (None, Some(past)) => {
                    let first = w.dim(past, 2);
                    w.binary("positions", Binary::Add, steps, first)
                }
                (None, None) => steps,
            };
            allowed = Some(w.binary("causal", Binary::LessOrEqual, slots, rows));
        } else if let Some(ends) = ends {
            allowed = Some(w.binary("live", Binary::Less, slots, ends));
        }
    }
    let mask = w.join(allowed, node.input(3));
    let op = Op::Attention(op::Attention {
        is_causal: false,
        q_num_heads: None,
        kv_num_heads: None,
        ..how.clone()
    });
    let name = w.name.clone();
    let inputs: Vec<ValueId> = [q, k, v].into_iter().chain(mask).collect();
    let mut y = w.graph.add_node(&name, op, &inputs);
    if flat {
        y = w.flat(y, output_width);
    }
    replace(graph, id, &[(0, y), (1, k), (2, v)]);
    Some(())
}
