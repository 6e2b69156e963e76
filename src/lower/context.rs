//! What is lowered so far, and the small steps every family needs.

use std::collections::{BTreeMap, HashMap, HashSet};

use super::Options;
use super::error::{LowerError, Reason};
use super::rows::{LOGIT_ROWS, logits};
use super::weights::Table;
use crate::dim::{Dim, Sym};
use crate::graph::infer::Facts;
use crate::graph::{Graph, Node, NodeId, Op, ValueId};
use crate::network::{BuildError, Builder, LayerKind, Logits, Network, Profile, Shape, TensorId, Tokens};
use crate::tensor::{DType, Tensor};

pub(super) type Lowered<T = TensorId> = Result<T, Reason>;

pub(super) struct Lowering<'a> {
    pub graph: &'a Graph,
    pub facts: &'a Facts,
    pub profile: Profile,
    pub options: &'a Options,
    pub b: Builder,
    table: &'a Table,
    /// Nodes that compute on chosen rows only.
    rows: HashSet<NodeId>,
    /// Whether the node being lowered is one of them.
    in_rows: bool,
    pub logit_rows: Option<TensorId>,
    pub chosen: HashMap<TensorId, TensorId>,
    values: HashMap<ValueId, TensorId>,
    /// Constants in the rank a reader wanted.
    raised: HashMap<(ValueId, usize), TensorId>,
    numbers: HashMap<(DType, usize, u64), TensorId>,
    /// Activations as matrices.
    pub flat: HashMap<TensorId, TensorId>,
    /// Masks repeated for folded query rows: by mask and number of rows.
    pub repeated_masks: HashMap<(TensorId, usize), TensorId>,
    symbols: BTreeMap<Sym, Dim>,
}

/// The dtype that a graph's dtype has in a network.
pub(super) fn network_dtype(dtype: DType) -> DType {
    match dtype {
        DType::I64 => DType::I32,
        other => other,
    }
}

pub(super) fn one() -> Dim {
    Dim::from(1usize)
}

impl<'a> Lowering<'a> {
    pub fn new(
        graph: &'a Graph,
        facts: &'a Facts,
        profile: Profile,
        options: &'a Options,
        table: &'a Table,
        rows: HashSet<NodeId>,
    ) -> Self {
        let mut symbols = BTreeMap::from([
            (Sym::batch(), Dim::from(profile.batch)),
            (Sym::capacity(), Dim::from(profile.capacity)),
        ]);
        if let Tokens::Static(n) = profile.tokens {
            symbols.insert(Sym::tokens(), Dim::from(n));
        }
        Lowering {
            graph,
            facts,
            profile,
            options,
            b: Builder::new(graph.name.clone(), profile),
            table,
            rows,
            in_rows: false,
            logit_rows: None,
            chosen: HashMap::new(),
            values: HashMap::new(),
            raised: HashMap::new(),
            numbers: HashMap::new(),
            flat: HashMap::new(),
            repeated_masks: HashMap::new(),
            symbols,
        }
    }

    /// The network's inputs: the graph's in their order, `logit_rows` before the caches.
    pub fn interface(&mut self) -> Result<(), LowerError> {
        let is_cache = |v: &ValueId| self.graph.value(*v).name.contains("_cache.");
        let (caches, plain): (Vec<ValueId>, Vec<ValueId>) = self.graph.inputs.iter().copied().partition(is_cache);
        for value in plain {
            self.graph_input(value)?;
        }
        if self.profile.logits == Logits::Rows {
            let batch = Dim::from(self.profile.batch);
            let input = self.b.input(LOGIT_ROWS, DType::I32, &[batch]);
            let id = input.map_err(|e| input_error(LOGIT_ROWS, &e.to_string()))?;
            self.logit_rows = Some(id);
        }
        for value in caches {
            self.graph_input(value)?;
        }
        Ok(())
    }

    fn graph_input(&mut self, id: ValueId) -> Result<(), LowerError> {
        let value = self.graph.value(id);
        let (Some(dtype), Some(shape)) = (value.dtype, &value.shape) else {
            return Err(input_error(&value.name, "it has no dtype or shape"));
        };
        let shape = self.substituted(shape);
        let added = self.b.input(&value.name, network_dtype(dtype), &shape);
        let tensor = added.map_err(|e| input_error(&value.name, &e.to_string()))?;
        self.values.insert(id, tensor);
        Ok(())
    }

    /// Lowers one node; its outputs are known afterwards.
    pub fn node(&mut self, id: NodeId) -> Lowered<()> {
        self.in_rows = self.rows.contains(&id);
        let node = self.graph.node(id);
        let name = self.base_name(node);
        if let Op::Split { axis } = node.op {
            return self.split(node, &name, axis);
        }
        let tensor = self.first_output(node, &name)?;
        if node.outputs.iter().skip(1).any(Option::is_some) && !matches!(node.op, Op::TensorScatter { .. }) {
            return Reason::unsupported("it has more than one output in use");
        }
        if let Some(output) = node.output(0) {
            self.define(output, tensor);
        }
        Ok(())
    }

    fn first_output(&mut self, node: &Node, name: &str) -> Lowered {
        match &node.op {
            Op::Unary(op) => self.unary(node, name, *op),
            Op::Binary(op) => self.binary(node, name, *op),
            Op::Gelu { tanh } => self.gelu(node, name, *tanh),
            Op::Swish { alpha } => self.swish(node, name, *alpha),
            Op::Clip => self.clip(node, name),
            Op::Cast { to } => self.cast(node, name, *to),
            Op::CastLike => self.cast_like(node, name),
            Op::Where => self.select(node, name),
            Op::Softmax { axis } => self.softmax(node, name, *axis, false),
            Op::LogSoftmax { axis } => self.softmax(node, name, *axis, true),
            Op::Reduce {
                reduction,
                keepdims,
                noop_with_empty_axes,
            } => self.reduce(node, name, *reduction, *keepdims, *noop_with_empty_axes),
            Op::MatMul => self.matmul(node, name),
            Op::Gemm {
                alpha,
                beta,
                trans_a,
                trans_b,
            } => self.gemm(node, name, [*alpha, *beta], [*trans_a, *trans_b]),
            Op::FusedMatMul {
                alpha,
                trans_a,
                trans_b,
            } => self.fused_matmul(node, name, *alpha, [*trans_a, *trans_b]),
            Op::LayerNormalization { axis, epsilon } => self.layer_norm(node, name, *axis, *epsilon),
            Op::RmsNormalization { axis, epsilon } => self.rms_norm(node, name, *axis, *epsilon),
            Op::RotaryEmbedding {
                interleaved,
                num_heads,
                rotary_dim,
            } => self.rotary(node, name, *interleaved, *num_heads, *rotary_dim),
            Op::Attention(attributes) => self.attention(node, name, attributes),
            Op::TensorScatter { axis, circular } => self.cache_update(node, name, *axis, *circular),
            Op::Identity => self.data(node, 0),
            Op::Reshape { allowzero } => self.reshape_node(node, name, *allowzero),
            Op::Flatten { axis } => self.flatten(node, name, *axis),
            Op::Squeeze => self.squeeze(node, name),
            Op::Unsqueeze => self.unsqueeze(node, name),
            Op::Transpose { perm } => self.transpose_node(node, name, perm.as_deref()),
            Op::Expand => self.expand_node(node, name),
            Op::Tile => self.tile(node, name),
            Op::Concat { axis } => self.concat(node, name, *axis),
            Op::Slice => self.slice(node, name),
            Op::Gather { axis } => self.gather(node, name, *axis),
            Op::Range => self.range(node, name),
            Op::ConstantOfShape { value } => self.constant_of_shape(node, name, value),
            Op::Shape { .. } | Op::Size => self.known_contents(node, name),
            Op::Split { .. } => unreachable!("split has several outputs and is lowered above"),
            Op::GroupQueryAttention(_)
            | Op::ContribRotaryEmbedding { .. }
            | Op::SkipRmsNormalization { .. }
            | Op::SkipLayerNormalization { .. } => {
                Reason::unsupported("the passes rewrite this contrib operator, so the graph is not canonical")
            }
            Op::CumSum { .. }
            | Op::GatherElements { .. }
            | Op::GatherNd { .. }
            | Op::Trilu { .. }
            | Op::ScatterNd { .. }
            | Op::ScatterElements { .. } => Reason::unsupported(
                "this operator is lowered only as part of a mask, a rotary table or a cache that the passes recognise",
            ),
            Op::Unknown { .. } => Reason::unsupported("Lapidary does not know this operator"),
        }
    }

    pub fn define(&mut self, value: ValueId, tensor: TensorId) {
        self.values.insert(value, tensor);
    }

    /// The node's name, or its output's where it has none.
    pub fn base_name(&self, node: &Node) -> String {
        match (&node.name, node.outputs.iter().flatten().next()) {
            (name, Some(output)) if name.is_empty() => self.graph.value(*output).name.clone(),
            (name, _) => name.clone(),
        }
    }

    // Values

    pub fn input_id(&self, node: &Node, i: usize) -> Lowered<ValueId> {
        node.input(i)
            .ok_or_else(|| Reason::Unsupported(format!("input {i} is missing")))
    }

    /// Input `i` as a tensor.
    pub fn data(&mut self, node: &Node, i: usize) -> Lowered {
        let id = self.input_id(node, i)?;
        self.value(id)
    }

    /// Input `i` as a tensor of at least this rank.
    pub fn operand(&mut self, node: &Node, i: usize, rank: usize) -> Lowered {
        let id = self.input_id(node, i)?;
        self.value_of_rank(id, rank)
    }

    pub fn value(&mut self, id: ValueId) -> Lowered {
        let tensor = match self.values.get(&id) {
            Some(tensor) => *tensor,
            None if self.graph.constant(id).is_some() => {
                let tensor = self.constant(id)?;
                self.values.insert(id, tensor);
                tensor
            }
            None => return Err(Reason::Upstream),
        };
        // A row-wise node reads all tokens' values through the gather, and those of other row-wise nodes as they are.
        let of_rows = |id| {
            self.graph
                .producer_of(id)
                .is_some_and(|(node, _)| self.rows.contains(&node))
        };
        if self.in_rows && self.graph.constant(id).is_none() && !of_rows(id) {
            return self.chosen_rows(tensor);
        }
        Ok(tensor)
    }

    fn constant(&mut self, id: ValueId) -> Lowered {
        if let Some(index) = self.table.by_value.get(&id) {
            let weight = &self.table.list[*index];
            let mode = self.options.weight_mode;
            return Ok(self.b.weight(&weight.name, weight.constant.clone(), mode)?);
        }
        let literal = self.literal(id)?;
        Ok(self.b.constant(&self.graph.value(id).name, literal)?)
    }

    /// The bytes of a constant that is part of the plan.
    fn literal(&self, id: ValueId) -> Lowered<Tensor> {
        let constant = self.graph.constant(id).expect("the caller saw a constant");
        let tensor = constant.materialize()?;
        if tensor.dtype() != DType::I64 {
            return Ok(tensor);
        }
        let values = tensor.to_i64();
        let narrow: Result<Vec<i32>, _> = values.iter().map(|v| i32::try_from(*v)).collect();
        match narrow {
            Ok(narrow) => Ok(Tensor::from_i32(tensor.shape().to_vec(), &narrow)),
            Err(_) => Reason::unsupported(format!(
                "the constant {:?} holds integers beyond 32 bits",
                self.graph.value(id).name
            )),
        }
    }

    /// The value with leading 1s up to `rank`. Small constants get their rank where they are made.
    pub fn value_of_rank(&mut self, id: ValueId, rank: usize) -> Lowered {
        let literal = self.graph.constant(id).is_some() && !self.table.by_value.contains_key(&id);
        if let Some(tensor) = self.raised.get(&(id, rank)) {
            return Ok(*tensor);
        }
        let tensor = if literal {
            let literal = self.literal(id)?;
            let mut shape = vec![1; rank.saturating_sub(literal.shape().len())];
            shape.extend(literal.shape());
            let literal = literal.reshaped(shape).expect("ones keep the volume");
            self.b.constant(&self.graph.value(id).name, literal)?
        } else {
            let tensor = self.value(id)?;
            if self.graph.constant(id).is_none() {
                return self.raise(tensor, rank);
            }
            self.raise(tensor, rank)?
        };
        self.raised.insert((id, rank), tensor);
        Ok(tensor)
    }

    pub fn raise(&mut self, x: TensorId, rank: usize) -> Lowered {
        let name = format!("{}/rank{rank}", self.b.network().tensor(x).name);
        let shape = self.b.shape(x);
        if shape.len() >= rank {
            return Ok(x);
        }
        let mut to = vec![one(); rank - shape.len()];
        to.extend(shape.iter().cloned());
        self.reshape(&name, x, to)
    }

    /// Inputs `indices` in their common rank.
    pub fn aligned<const N: usize>(&mut self, node: &Node, indices: [usize; N]) -> Lowered<[TensorId; N]> {
        let mut rank = 0;
        for i in indices {
            let id = self.input_id(node, i)?;
            rank = rank.max(self.rank_of(id)?);
        }
        let mut tensors = [TensorId(0); N];
        for (slot, i) in tensors.iter_mut().zip(indices) {
            *slot = self.operand(node, i, rank)?;
        }
        Ok(tensors)
    }

    pub fn rank_of(&mut self, id: ValueId) -> Lowered<usize> {
        match self.graph.constant(id) {
            Some(constant) => Ok(constant.shape().len()),
            None => {
                let tensor = self.value(id)?;
                Ok(self.b.rank(tensor))
            }
        }
    }

    /// One number in the given rank; made once.
    pub fn number(&mut self, dtype: DType, rank: usize, value: f64) -> Lowered {
        let key = (dtype, rank, value.to_bits());
        if let Some(tensor) = self.numbers.get(&key) {
            return Ok(*tensor);
        }
        // The shortest decimal that reads back as the same f32.
        let tensor = self
            .b
            .number(&format!("const/{dtype}/{}", value as f32), dtype, rank, value)?;
        self.numbers.insert(key, tensor);
        Ok(tensor)
    }

    // Shapes and parameters

    pub fn tokens(&self) -> Dim {
        match self.profile.tokens {
            Tokens::Static(n) => Dim::from(n),
            Tokens::Dynamic { .. } => Dim::sym(Sym::tokens()),
        }
    }

    pub fn substituted(&self, shape: &[Dim]) -> Shape {
        shape.iter().map(|d| d.substitute(&self.symbols)).collect()
    }

    /// The shape inference gave a value, for this profile.
    pub fn inferred_shape(&self, id: ValueId) -> Option<Shape> {
        self.graph.shape(id).map(|shape| self.substituted(shape))
    }

    /// The scalar constant in input `i`.
    pub fn scalar(&self, node: &Node, i: usize) -> Option<f64> {
        let constant = self.graph.constant(node.input(i)?)?;
        (constant.len() == 1)
            .then(|| constant.materialize().ok()?.scalar())
            .flatten()
    }

    /// The elements of a parameter (a shape, axes, ends), as dims of this profile; `None` if it is left out.
    pub fn parameter(&self, node: &Node, i: usize) -> Lowered<Option<Vec<Dim>>> {
        let Some(id) = node.input(i) else {
            return Ok(None);
        };
        if let Some(constant) = self.graph.constant(id) {
            let values = constant.materialize()?.to_i64();
            return Ok(Some(values.into_iter().map(Dim::from).collect()));
        }
        match self.facts.contents(id) {
            Some(contents) => Ok(Some(self.substituted(&contents.elements))),
            None => Reason::unsupported(format!(
                "its parameter {:?} is computed from data; only constants and shapes can be lowered",
                self.graph.value(id).name
            )),
        }
    }

    /// A parameter whose elements are numbers.
    pub fn integers(&self, node: &Node, i: usize) -> Lowered<Option<Vec<i64>>> {
        let Some(dims) = self.parameter(node, i)? else {
            return Ok(None);
        };
        let numbers: Option<Vec<i64>> = dims.iter().map(Dim::as_const).collect();
        match numbers {
            Some(numbers) => Ok(Some(numbers)),
            None => Reason::unsupported(format!("its parameter {i} is {dims:?}, which must be numbers")),
        }
    }

    // Shuffles

    /// Reshapes, joined with the shuffle that gave `x` where there is one.
    pub fn reshape(&mut self, name: &str, x: TensorId, to: Shape) -> Lowered {
        self.shuffle(name, x, None, Some(to), None)
    }

    pub fn transpose(&mut self, name: &str, x: TensorId, order: &[usize]) -> Lowered {
        // Moving only dims of 1 moves no element: a reshape, which joins with others and costs nothing.
        let shape = self.b.shape(x);
        let valid = order.len() == shape.len() && order.iter().all(|a| *a < shape.len());
        if valid && order.iter().filter(|a| !shape[**a].is_one()).is_sorted() {
            let to = order.iter().map(|a| shape[*a].clone()).collect();
            return self.reshape(name, x, to);
        }
        self.shuffle(name, x, Some(order.to_vec()), None, None)
    }

    /// One Shuffle for this one and the one before it, if TensorRT's transpose-reshape-transpose has room for both.
    fn shuffle(
        &mut self,
        name: &str,
        x: TensorId,
        first: Option<Vec<usize>>,
        reshape: Option<Shape>,
        second: Option<Vec<usize>>,
    ) -> Lowered {
        let before = self
            .b
            .producer(x)
            .map(|layer| (layer.kind.clone(), layer.inputs.clone()));
        let (kind, source) = match before {
            Some((
                LayerKind::Shuffle {
                    first: earlier,
                    reshape: shape,
                    second: None,
                },
                inputs,
            )) if first.is_none() || (shape.is_some() && reshape.is_none()) => {
                let (reshape, second) = match first {
                    None => (reshape.or(shape), second),
                    Some(order) => (shape, Some(order)),
                };
                let kind = LayerKind::Shuffle {
                    first: earlier,
                    reshape,
                    second,
                };
                (kind, inputs[0])
            }
            _ => (LayerKind::Shuffle { first, reshape, second }, x),
        };
        if let LayerKind::Shuffle {
            first: None,
            reshape: Some(to),
            second: None,
        } = &kind
            && to == self.b.shape(source)
        {
            return Ok(source);
        }
        Ok(self.b.add(name, kind, &[source])?)
    }

    /// The network with its outputs.
    pub fn finish(mut self) -> Result<Network, LowerError> {
        self.in_rows = false;
        let logits = logits(self.graph);
        for id in self.graph.outputs.clone() {
            let name = self.graph.value(id).name.clone();
            let fail = |reason: String| LowerError::Output {
                name: name.clone(),
                reason,
            };
            let tensor = self.output(id, logits).map_err(|e| fail(e.to_string()))?;
            let named = self.b.output(&name, tensor).or_else(|error| match error {
                // An input, a weight or another output: the copy is an empty shuffle.
                BuildError::Output { .. } => {
                    let kind = LayerKind::Shuffle {
                        first: None,
                        reshape: None,
                        second: None,
                    };
                    let copy = self.b.add(&format!("{name}/copy"), kind, &[tensor])?;
                    self.b.output(&name, copy)
                }
                other => Err(other),
            });
            named.map_err(|e| fail(e.to_string()))?;
        }
        Ok(self.b.finish_pruned().map_err(Box::new)?)
    }

    fn output(&mut self, id: ValueId, logits: Option<ValueId>) -> Lowered {
        let mut tensor = self.value(id)?;
        if Some(id) != logits {
            return Ok(tensor);
        }
        let in_rows = self
            .graph
            .producer_of(id)
            .is_some_and(|(node, _)| self.rows.contains(&node));
        if self.profile.logits == Logits::Rows && !in_rows {
            tensor = self.chosen_rows(tensor)?;
        }
        Ok(self.b.cast("logits/f32", DType::F32, tensor)?)
    }
}

fn input_error(name: &str, reason: &str) -> LowerError {
    LowerError::Input {
        name: name.to_string(),
        reason: reason.to_string(),
    }
}
