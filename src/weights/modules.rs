//! What each weight is in the model: `layers.3.attention.query.weight`, whatever the exporter called it.
//!
//! Exporters lose names (`onnx::MatMul_733`, `val_84`) and fuse matrices, but a canonical graph shows what every matrix
//! does: which one feeds an attention's keys, which one comes after the activation. [`modules`] reads that off the graph
//! and gives each weight a [`Recipe`] over module names. Matrices of modules are `[out, in]`, embeddings
//! `[vocabulary, hidden]`, norms and biases vectors. A fused weight is a concatenation of modules.
//!
//! ```text
//! embedding.weight  positions.weight  norm.{weight,bias}  head.weight
//! layers.N.attention_norm.{weight,bias}      layers.N.attention.{query,key,value,output}.{weight,bias}
//! layers.N.attention.{query_norm,key_norm}.{weight,bias}
//! layers.N.feed_forward_norm.{weight,bias}   layers.N.feed_forward.{gate,up,down}.{weight,bias}
//! ```
//!
//! What does not look like this has no module, and is then known by its name in the export only.

use std::collections::HashMap;

use super::recipe::Recipe;
use crate::dim::Dim;
use crate::graph::op::{Binary, Op, Unary};
use crate::graph::{Graph, NodeId, ValueId};

/// Weights of a canonical graph as recipes over modules, by the value that holds them. The graph must have been typed
/// (`graph::infer`): which columns of a fused matrix are meant is told by shapes.
pub fn modules(graph: &Graph) -> HashMap<ValueId, Recipe> {
    let mut reader = Reader {
        graph,
        uses: graph.uses(),
        found: HashMap::new(),
    };
    reader.embeddings();
    let attentions = graph
        .node_ids()
        .filter(|id| matches!(graph.node(*id).op, Op::Attention(_)));
    for (layer, attention) in attentions.enumerate() {
        // What is not there is not named; the rest of the layer may still be.
        let _ = reader.inputs_of_attention(layer, attention);
        let _ = reader.rest_of_layer(layer, attention);
    }
    let _ = reader.head();
    reader.found
}

struct Reader<'g> {
    graph: &'g Graph,
    uses: HashMap<ValueId, Vec<(NodeId, usize)>>,
    found: HashMap<ValueId, Recipe>,
}

/// A linear layer, found from its product.
struct Linear {
    /// What it multiplies.
    input: ValueId,
    weight: ValueId,
    bias: Option<ValueId>,
    /// Columns of its output that are meant, if not all.
    columns: Option<(usize, usize)>,
    /// A norm over the heads of its output.
    norm: Option<NodeId>,
}

impl Reader<'_> {
    fn embeddings(&mut self) {
        let graph = self.graph;
        for id in graph.node_ids() {
            let node = graph.node(id);
            let (Op::Gather { .. }, Some(table), Some(rows)) = (&node.op, node.input(0), node.input(1)) else {
                continue;
            };
            let matrix = graph
                .constant(table)
                .is_some_and(|c| c.shape().len() == 2 && c.dtype().is_float());
            match graph.value(self.plain(rows)).name.as_str() {
                "input_ids" if matrix => self.name(table, "embedding.weight"),
                "position_ids" if matrix => self.name(table, "positions.weight"),
                _ => {}
            }
        }
    }

    fn inputs_of_attention(&mut self, layer: usize, attention: NodeId) -> Option<()> {
        let node = self.graph.node(attention);
        let operands = [
            ("query", node.input(0)?),
            ("key", node.input(1)?),
            ("value", node.input(2)?),
        ];
        let mut linears = Vec::new();
        for (name, operand) in operands {
            linears.push((name, self.linear_before(operand)?));
        }
        let prefix = format!("layers.{layer}.attention");
        let fused = linears.iter().all(|(_, l)| l.weight == linears[0].1.weight);
        if fused {
            self.fused(&prefix, &linears);
        } else {
            for (name, linear) in linears.iter().filter(|(_, l)| l.columns.is_none()) {
                self.name_linear(&format!("{prefix}.{name}"), linear);
            }
        }
        for (name, linear) in &linears {
            if let Some(norm) = linear.norm {
                self.name_norm(&format!("{prefix}.{name}_norm"), norm);
            }
        }
        let norm = self.norm_before(linears[0].1.input)?;
        self.name_norm(&format!("layers.{layer}.attention_norm"), norm);
        Some(())
    }

    fn rest_of_layer(&mut self, layer: usize, attention: NodeId) -> Option<()> {
        let prefix = format!("layers.{layer}");
        let heads = self.graph.node(attention).output(0)?;
        let (product, _) = self.products_after(heads).into_iter().next()?;
        let (output, end) = self.linear_at(product)?;
        self.name_linear(&format!("{prefix}.attention.output"), &output);

        // The residual addition, then the norm before the feed-forward block.
        let residual = self.only(end, |op| matches!(op, Op::Binary(Binary::Add)))?;
        let stream = self.graph.node(residual).output(0)?;
        let norm = self.only(stream, is_norm)?;
        self.name_norm(&format!("{prefix}.feed_forward_norm"), norm);
        let normed = self.graph.node(norm).output(0)?;
        let mut down = None;
        let products = self.products_after(normed);
        let gated = products.len() == 2;
        for (product, _) in &products {
            let (linear, end) = self.linear_at(*product)?;
            let (next, active) = self.products_after(end).into_iter().next()?;
            let name = match (gated, active) {
                (true, true) => "gate",
                (_, _) => "up",
            };
            self.name_linear(&format!("{prefix}.feed_forward.{name}"), &linear);
            down = Some(next);
        }
        let (down, _) = self.linear_at(down?)?;
        self.name_linear(&format!("{prefix}.feed_forward.down"), &down);
        Some(())
    }

    fn head(&mut self) -> Option<()> {
        let mut at = *self.graph.outputs.first()?;
        // A soft cap and casts may come after the product.
        loop {
            let (id, node) = self.graph.def(at)?;
            if matches!(node.op, Op::MatMul) {
                let (linear, _) = self.linear_at(id)?;
                self.name_linear("head", &linear);
                let norm = self.norm_before(linear.input)?;
                self.name_norm("norm", norm);
                return Some(());
            }
            at = node
                .inputs
                .iter()
                .flatten()
                .copied()
                .find(|v| self.graph.constant(*v).is_none())?;
        }
    }

    /// Query, key and value of one matrix, in the order of their columns, which must be all there are.
    fn fused(&mut self, prefix: &str, linears: &[(&str, Linear)]) {
        let mut parts: Vec<_> = linears
            .iter()
            .filter_map(|(name, l)| Some((l.columns?, *name)))
            .collect();
        parts.sort_unstable();
        let mut end = 0;
        for ((from, to), _) in &parts {
            if *from != end {
                return;
            }
            end = *to;
        }
        let linear = &linears[0].1;
        let modules = |value: ValueId, what: &str| {
            let constant = self.graph.constant(value)?;
            let part = |((from, to), name): &((usize, usize), &str)| {
                let mut shape = constant.shape().to_vec();
                shape[0] = to - from;
                Recipe::Tensor {
                    name: format!("{prefix}.{name}.{what}"),
                    dtype: constant.dtype(),
                    shape,
                }
            };
            let whole = constant.shape().first() == Some(&end) && parts.len() == linears.len();
            whole.then(|| Recipe::Concat {
                axis: 0,
                of: parts.iter().map(part).collect(),
            })
        };
        let weight = modules(linear.weight, "weight");
        let bias = linear.bias.and_then(|b| Some((b, modules(b, "bias")?)));
        if let Some(weight) = weight {
            self.found.entry(linear.weight).or_insert(weight);
        }
        if let Some((value, bias)) = bias {
            self.found.entry(value).or_insert(bias);
        }
    }

    fn name_linear(&mut self, module: &str, linear: &Linear) {
        self.name(linear.weight, &format!("{module}.weight"));
        if let Some(bias) = linear.bias {
            self.name(bias, &format!("{module}.bias"));
        }
    }

    fn name_norm(&mut self, module: &str, norm: NodeId) {
        let node = self.graph.node(norm);
        let weight = node.input(1).filter(|v| self.is_named(*v));
        // In half precision some exporters scale after rounding, so the norm itself scales by ones.
        let weight = weight.or_else(|| self.scale_after(node.output(0)?));
        for (value, what) in [(weight, "weight"), (node.input(2), "bias")] {
            if let Some(value) = value {
                self.name(value, &format!("{module}.{what}"));
            }
        }
    }

    /// The vector that a norm's result is multiplied by.
    fn scale_after(&self, normed: ValueId) -> Option<ValueId> {
        let product = self.only(normed, |op| matches!(op, Op::Binary(Binary::Mul)))?;
        let node = self.graph.node(product);
        let vector = |v: &ValueId| self.graph.constant(*v).is_some_and(|c| c.shape().len() == 1);
        node.inputs.iter().flatten().copied().find(vector)
    }

    /// A constant that comes from the export.
    fn is_named(&self, value: ValueId) -> bool {
        self.graph.constant(value).is_some_and(|c| Recipe::of(c).is_some())
    }

    /// Names a weight, unless it has a name: a tied head stays the embedding. Factors and addends that passes put into
    /// the weight stay in its recipe; a weight that is part of another has no module.
    fn name(&mut self, value: ValueId, module: &str) {
        let Some(constant) = self.graph.constant(value) else {
            return;
        };
        let mut recipe = Recipe::Tensor {
            name: module.to_string(),
            dtype: constant.dtype(),
            shape: constant.shape().to_vec(),
        };
        let mut arithmetic = Vec::new();
        let mut made = Recipe::of(constant);
        while let Some(step) = made {
            made = match step {
                Recipe::Tensor { .. } => None,
                Recipe::Transpose { of, .. } | Recipe::Reshape { of, .. } | Recipe::Cast { of, .. } => Some(*of),
                Recipe::Scale { factor, of } => {
                    arithmetic.push((factor, 0.0));
                    Some(*of)
                }
                Recipe::Offset { addend, of } => {
                    arithmetic.push((1.0, addend));
                    Some(*of)
                }
                Recipe::Slice { .. } | Recipe::Concat { .. } => return,
            };
        }
        for (factor, addend) in arithmetic.into_iter().rev() {
            let of = Box::new(recipe);
            recipe = match addend {
                0.0 => Recipe::Scale { factor, of },
                _ => Recipe::Offset { addend, of },
            };
        }
        self.found.entry(value).or_insert(recipe);
    }

    /// Back over what changes neither elements nor their order.
    fn plain(&self, mut value: ValueId) -> ValueId {
        while let Some((_, node)) = self.graph.def(value) {
            match (&node.op, node.input(0)) {
                (Op::Reshape { .. } | Op::Cast { .. } | Op::Identity | Op::Squeeze | Op::Unsqueeze, Some(input)) => {
                    value = input;
                }
                _ => break,
            }
        }
        value
    }

    fn norm_before(&self, value: ValueId) -> Option<NodeId> {
        let (id, node) = self.graph.def(self.plain(value))?;
        match node.op {
            // The rows whose logits are wanted may be picked behind the norm.
            Op::Gather { .. } => self.norm_before(node.input(0)?),
            Op::Binary(Binary::Mul) => self.norm_before(self.scaled(id)?),
            _ => is_norm(&node.op).then_some(id),
        }
    }

    /// The linear layer that an operand of an attention comes from.
    fn linear_before(&self, operand: ValueId) -> Option<Linear> {
        let (mut at, mut columns, mut norm) = (operand, None, None);
        loop {
            let (id, output) = self.graph.producer_of(at)?;
            let node = self.graph.node(id);
            match &node.op {
                Op::Split { .. } if columns.is_none() => {
                    columns = Some(self.part(id, output)?);
                    at = node.input(0)?;
                }
                Op::Transpose { .. }
                | Op::Reshape { .. }
                | Op::Cast { .. }
                | Op::Squeeze
                | Op::Unsqueeze
                | Op::RotaryEmbedding { .. } => at = node.input(0)?,
                Op::TensorScatter { .. } => at = node.input(1)?,
                Op::Slice if columns.is_none() => {
                    columns = Some(self.columns(id)?);
                    at = node.input(0)?;
                }
                op if is_norm(op) && norm.is_none() => {
                    norm = Some(id);
                    at = node.input(0)?;
                }
                Op::Binary(Binary::Mul) => at = self.scaled(id)?,
                Op::Binary(Binary::Add) | Op::MatMul => {
                    let (linear, _) = self.linear_at(self.product_of(at)?)?;
                    return Some(Linear {
                        columns,
                        norm,
                        ..linear
                    });
                }
                _ => return None,
            }
        }
    }

    /// The operand of a product with a constant number or vector.
    fn scaled(&self, node: NodeId) -> Option<ValueId> {
        let node = self.graph.node(node);
        let scale = |v: ValueId| {
            self.graph
                .constant(v)
                .is_some_and(|c| c.shape().len() <= 1 || c.len() == 1)
        };
        match (node.input(0)?, node.input(1)?) {
            (x, factor) | (factor, x) if scale(factor) && self.graph.constant(x).is_none() => Some(x),
            _ => None,
        }
    }

    /// Columns of a matrix product that an output of a split takes.
    fn part(&self, split: NodeId, output: usize) -> Option<(usize, usize)> {
        let node = self.graph.node(split);
        let width = |i: usize| {
            self.graph
                .shape(node.output(i)?)?
                .last()?
                .as_const()
                .map(|w| w as usize)
        };
        let rank = self.graph.shape(node.input(0)?)?.len() as i64;
        let last = matches!(node.op, Op::Split { axis } if axis == -1 || axis == rank - 1);
        let start = (0..output).map(width).sum::<Option<usize>>()?;
        last.then_some((start, start + width(output)?))
    }

    /// Columns of a matrix product that a slice takes: one slice of the last axis, all columns in one group.
    fn columns(&self, slice: NodeId) -> Option<(usize, usize)> {
        let node = self.graph.node(slice);
        let shape = self.graph.shape(node.input(0)?)?;
        let number = |i: usize| match node.input(i) {
            Some(value) => {
                let tensor = self.graph.constant(value)?.materialize().ok()?;
                tensor.scalar().map(|v| v as i64)
            }
            None => Some(1),
        };
        let (start, end, axis, step) = (number(1)?, number(2)?, number(3)?, number(4)?);
        let rank = shape.len() as i64;
        let axis = if axis < 0 { axis + rank } else { axis };
        let groups = shape.iter().rev().nth(1).filter(|_| rank == 4);
        let in_one = groups.is_none_or(|d| d.as_const() == Some(1));
        let width = shape.last().and_then(Dim::as_const)?;
        let valid = axis == rank - 1 && step == 1 && in_one && 0 <= start && start < end;
        valid.then(|| (start as usize, end.min(width) as usize))
    }

    /// The product that a value is, perhaps with a bias.
    fn product_of(&self, value: ValueId) -> Option<NodeId> {
        let (id, node) = self.graph.def(self.plain(value))?;
        match node.op {
            Op::MatMul => Some(id),
            Op::Binary(Binary::Add) => {
                let constant = |v: ValueId| self.graph.constant(v).is_some();
                match (node.input(0)?, node.input(1)?) {
                    (x, bias) | (bias, x) if constant(bias) => self.product_of(x),
                    _ => None,
                }
            }
            _ => None,
        }
    }

    /// The linear layer of a product, and its result with the bias.
    fn linear_at(&self, product: NodeId) -> Option<(Linear, ValueId)> {
        let node = self.graph.node(product);
        let weight = self.matrix(node.input(1)?)?;
        let mut end = node.output(0)?;
        let mut bias = None;
        // A bias may come behind the unflattening of the result.
        let mut at = end;
        while bias.is_none() {
            let Some([(user, input)]) = self.uses.get(&at).map(Vec::as_slice) else {
                break;
            };
            let user = self.graph.node(*user);
            match user.op {
                Op::Reshape { .. } | Op::Cast { .. } if *input == 0 => at = user.output(0)?,
                Op::Binary(Binary::Add) => {
                    let other = user.input(1 - input)?;
                    if self.graph.constant(other).is_none_or(|c| c.shape().len() != 1) {
                        break;
                    }
                    (bias, end) = (Some(other), user.output(0)?);
                }
                _ => break,
            }
        }
        let linear = Linear {
            input: node.input(0)?,
            weight,
            bias,
            columns: None,
            norm: None,
        };
        Some((linear, end))
    }

    /// The constant `[out, in]` that a product reads transposed.
    fn matrix(&self, operand: ValueId) -> Option<ValueId> {
        let (_, node) = self.graph.def(operand)?;
        let value = node.input(0)?;
        let is_matrix = self.graph.constant(value).is_some_and(|c| c.shape().len() == 2);
        (matches!(node.op, Op::Transpose { .. }) && is_matrix).then_some(value)
    }

    /// The products that a value reaches over element-wise operators, in the graph's order, and whether an activation
    /// comes on the way.
    fn products_after(&self, value: ValueId) -> Vec<(NodeId, bool)> {
        let mut found: Vec<(NodeId, bool)> = Vec::new();
        let mut stack = vec![(value, false)];
        while let Some((value, active)) = stack.pop() {
            for (user, input) in self.uses.get(&value).into_iter().flatten() {
                let node = self.graph.node(*user);
                let next = match &node.op {
                    Op::MatMul if *input == 0 => {
                        if !found.iter().any(|(id, _)| id == user) {
                            found.push((*user, active));
                        }
                        continue;
                    }
                    Op::Swish { .. } | Op::Gelu { .. } => true,
                    Op::Unary(Unary::Relu | Unary::Sigmoid | Unary::Tanh | Unary::Erf | Unary::Softplus) => true,
                    Op::Reshape { .. } | Op::Transpose { .. } if *input == 0 => active,
                    Op::Cast { .. } | Op::Identity | Op::Binary(Binary::Mul) => active,
                    // A bias; not the residual stream.
                    Op::Binary(Binary::Add)
                        if node.input(1 - input).is_some_and(|v| self.graph.constant(v).is_some()) =>
                    {
                        active
                    }
                    _ => continue,
                };
                stack.extend(node.output(0).map(|output| (output, next)));
            }
        }
        let place: HashMap<NodeId, usize> = self.graph.node_ids().enumerate().map(|(i, id)| (id, i)).collect();
        found.sort_by_key(|(id, _)| place[id]);
        found
    }

    /// The only reader of a value that `wanted` holds for, over reshapes and casts.
    fn only(&self, value: ValueId, wanted: impl Fn(&Op) -> bool + Copy) -> Option<NodeId> {
        let mut found = None;
        for (user, _) in self.uses.get(&value)? {
            let node = self.graph.node(*user);
            let hit = match &node.op {
                op if wanted(op) => Some(*user),
                Op::Reshape { .. } | Op::Cast { .. } => self.only(node.output(0)?, wanted),
                _ => None,
            };
            if hit.is_some() && found.is_some() && hit != found {
                return None;
            }
            found = found.or(hit);
        }
        found
    }
}

fn is_norm(op: &Op) -> bool {
    matches!(op, Op::RmsNormalization { .. } | Op::LayerNormalization { .. })
}
