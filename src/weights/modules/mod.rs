//! The role of each weight in the model: `layers.3.attention.query.weight`, whatever name the exporter used.
//!
//! Exporters lose names (`onnx::MatMul_733`, `val_84`) and fuse matrices, but a canonical graph shows what every matrix
//! does: which one feeds an attention's keys, which one follows the activation. [`modules`] derives this from the graph
//! and gives each weight a [`Recipe`] over module names. Matrices of modules are `[out, in]`, embeddings `[vocabulary,
//! hidden]`, norms and biases vectors. A fused weight is a concatenation of modules.
//!
//! ```text
//! embedding.weight  positions.weight  norm.{weight,bias}  head.weight
//! layers.N.attention_norm.{weight,bias}      layers.N.attention.{query,key,value,output}.{weight,bias}
//! layers.N.attention.{query_norm,key_norm}.{weight,bias}
//! layers.N.feed_forward_norm.{weight,bias}   layers.N.feed_forward.{gate,up,down}.{weight,bias}
//! layers.N.feed_forward.router.{weight,bias,correction}  layers.N.feed_forward.experts.M.{gate,up,down}.{weight,bias}
//! layers.N.feed_forward.shared.{gate,up,down}.{weight,bias}  layers.N.feed_forward.shared_gate.weight
//! layers.N.{attention,feed_forward}_output_norm.{weight,bias}
//! ```
//!
//! An output norm is between a block's last matrix and the residual addition, as in Gemma 2 and 3 and OLMo 2. A norm's
//! weight is the vector that normalized values are multiplied by; its recipe shows an addend only if the graph does
//! ([`super::norm_parameter`] determines what checkpoints store).
//!
//! A quantized weight is a module like any other: the recipe does not contain the form of its codes, which a package
//! stores separately ([`super::form`]).
//!
//! Other weights have no module, and are identified only by their name in the export.

mod feed_forward;
mod walk;

use std::collections::HashMap;

use super::recipe::Recipe;
use crate::graph::op::{Binary, Op};
use crate::graph::{Graph, NodeId, ValueId};
use crate::interface::Role;

/// Weights of a canonical graph as recipes over modules, by the value that holds them. The graph must have been typed
/// (`graph::infer`): shapes determine the columns in a fused matrix.
pub fn modules(graph: &Graph) -> HashMap<ValueId, Recipe> {
    read(graph).found
}

/// Modules whose layers reorder the elements of their input, with that order, in which the columns of their matrices
/// are.
pub fn orders(graph: &Graph) -> HashMap<String, Vec<i64>> {
    let gathers = |id: NodeId| matches!(graph.node(id).op, Op::Gather { .. });
    let reads_order = |id: NodeId| {
        let indices = graph.node(id).input(1).and_then(|v| graph.constant(v));
        indices.is_some_and(|c| c.shape().len() == 1 && c.len() > 1)
    };
    match graph.node_ids().any(|id| gathers(id) && reads_order(id)) {
        true => read(graph).orders,
        false => HashMap::new(),
    }
}

fn read(graph: &Graph) -> Reader<'_> {
    let mut reader = Reader {
        graph,
        uses: graph.uses(),
        found: HashMap::new(),
        orders: HashMap::new(),
    };
    reader.embeddings();
    let attentions = graph.node_ids().filter(|id| graph.node(*id).op.is_attention());
    for (layer, attention) in attentions.enumerate() {
        // A missing part is not named; the rest of the layer still may be.
        let _ = reader.inputs_of_attention(layer, attention);
        let _ = reader.rest_of_layer(layer, attention);
    }
    let _ = reader.head();
    reader
}

struct Reader<'g> {
    graph: &'g Graph,
    uses: HashMap<ValueId, Vec<(NodeId, usize)>>,
    found: HashMap<ValueId, Recipe>,
    orders: HashMap<String, Vec<i64>>,
}

/// A linear layer, found from its product.
struct Linear {
    product: NodeId,
    /// Its input.
    input: ValueId,
    weight: ValueId,
    bias: Option<ValueId>,
    /// The relevant columns of its output, if not all.
    columns: Option<(usize, usize)>,
    /// A norm over the heads of its output.
    norm: Option<NodeId>,
    /// The order of its input's elements, if they are reordered.
    order: Option<Vec<i64>>,
}

impl Reader<'_> {
    fn embeddings(&mut self) {
        let graph = self.graph;
        if let Some(table) = graph.embedding {
            self.name(table, "embedding.weight");
        }
        for id in graph.node_ids() {
            let node = graph.node(id);
            let (Op::Gather { .. }, Some(table), Some(rows)) = (&node.op, node.input(0), node.input(1)) else {
                continue;
            };
            let matrix = graph
                .constant(table)
                .is_some_and(|c| c.shape().len() == 2 && c.dtype().is_float());
            let interface = graph.interface.as_ref();
            match interface.and_then(|interface| interface.role_of(self.plain(rows))) {
                Some(Role::TokenIds) if matrix => self.name(table, "embedding.weight"),
                Some(Role::PositionIds) if matrix => self.name(table, "positions.weight"),
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
        // Neutral sinks come from the conversion, not from a file.
        if let (Op::BiasedAttention(_), Some(sinks)) = (&node.op, node.input(5))
            && self.graph.constant(sinks).is_some_and(|c| c.origin().is_some())
        {
            self.name(sinks, &format!("{prefix}.sinks"));
        }
        let fused = linears.iter().all(|(_, l)| l.weight == linears[0].1.weight);
        if fused {
            let parts: Vec<_> = linears
                .iter()
                .filter_map(|(name, l)| Some((l.columns?, *name)))
                .collect();
            if parts.len() == linears.len() {
                self.fused(&prefix, &linears[0].1, parts);
            }
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

        if let Some(()) = self.block_after(&prefix, end) {
            return Some(());
        }
        self.block_beside(&prefix, attention)
    }

    /// A feed-forward block after the attention: the residual addition, possibly of a normed result, then possibly a
    /// norm.
    fn block_after(&mut self, prefix: &str, end: ValueId) -> Option<()> {
        let (end, is_normed) = self.output_norm(end, &format!("{prefix}.attention_output_norm"));
        let residual = self.only(end, |op| matches!(op, Op::Binary(Binary::Add)))?;
        let stream = self.graph.node(residual).output(0)?;
        let block = match self.only(stream, is_norm) {
            Some(norm) => {
                self.name_norm(&format!("{prefix}.feed_forward_norm"), norm);
                self.graph.node(norm).output(0)?
            }
            // Models that normalize a block's output may not normalize its input.
            None if is_normed => stream,
            None => return None,
        };
        let end = match self.mixture(prefix, block) {
            Some(end) => end,
            None => self.feed_forward(prefix, self.products_after(block))?,
        };
        self.output_norm(end, &format!("{prefix}.feed_forward_output_norm"));
        Some(())
    }

    /// A feed-forward block parallel to the attention: after the same norm (GPT-J), or its own norm (GPT-NeoX).
    fn block_beside(&mut self, prefix: &str, attention: NodeId) -> Option<()> {
        let node = self.graph.node(attention);
        let operands = [node.input(0)?, node.input(1)?, node.input(2)?];
        let linears: Vec<Linear> = operands
            .iter()
            .filter_map(|operand| self.linear_before(*operand))
            .collect();
        let norm = self.norm_before(linears.first()?.input)?;
        let of_attention = |product: NodeId| linears.iter().any(|linear| linear.product == product);
        let mut products = self.products_after(self.graph.node(norm).output(0)?);
        products.retain(|(product, _)| !of_attention(*product));
        if products.is_empty() {
            let stream = self.graph.node(norm).input(0)?;
            let readers = self.uses.get(&stream)?.iter().map(|(user, _)| *user);
            let mut others = readers.filter(|user| *user != norm && is_norm(&self.graph.node(*user).op));
            let own = others.next().filter(|_| others.next().is_none())?;
            self.name_norm(&format!("{prefix}.feed_forward_norm"), own);
            products = self.products_after(self.graph.node(own).output(0)?);
        }
        self.feed_forward(prefix, products).map(|_| ())
    }

    /// The result of a block, and whether it is normalized before it is added to the residual stream.
    fn output_norm(&mut self, end: ValueId, module: &str) -> (ValueId, bool) {
        let Some(norm) = self.only(end, is_norm) else {
            return (end, false);
        };
        self.name_norm(module, norm);
        let node = self.graph.node(norm);
        let Some(normed) = node.output(0) else {
            return (end, false);
        };
        let scaled = self
            .scale_after(normed)
            .map(|(product, _)| self.graph.node(product).output(0));
        (scaled.flatten().unwrap_or(normed), true)
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

    /// Modules of one matrix, in the order of their columns, which must be complete. `parts`: columns and module.
    fn fused(&mut self, prefix: &str, linear: &Linear, mut parts: Vec<((usize, usize), &str)>) {
        parts.sort_unstable();
        let mut end = 0;
        for ((from, to), _) in &parts {
            if *from != end {
                return;
            }
            end = *to;
        }
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
            let whole = constant.shape().first() == Some(&end);
            whole.then(|| Recipe::Concat {
                axis: 0,
                of: parts.iter().map(part).collect(),
            })
        };
        if let Some(order) = &linear.order {
            let ordered = parts
                .iter()
                .map(|(_, name)| (format!("{prefix}.{name}.weight"), order.clone()));
            self.orders.extend(ordered);
        }
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
        if let Some(order) = &linear.order {
            self.orders.insert(format!("{module}.weight"), order.clone());
        }
        self.name(linear.weight, &format!("{module}.weight"));
        if let Some(bias) = linear.bias {
            self.name(bias, &format!("{module}.bias"));
        }
    }

    fn name_norm(&mut self, module: &str, norm: NodeId) {
        let node = self.graph.node(norm);
        let own = node.input(1).filter(|v| self.is_named(*v));
        // In half precision some exporters scale after rounding, so the norm's own scale is ones.
        let after = || Some(self.scale_after(node.output(0)?)?.1);
        let weight = match own {
            Some(ones) if self.is_ones(ones) => after().or(own),
            Some(_) => own,
            None => after(),
        };
        for (value, what) in [(weight, "weight"), (node.input(2), "bias")] {
            if let Some(value) = value {
                self.name(value, &format!("{module}.{what}"));
            }
        }
    }

    fn is_ones(&self, value: ValueId) -> bool {
        let tensor = self.graph.constant(value).and_then(|c| c.materialize().ok());
        tensor.is_some_and(|tensor| tensor.to_f32().iter().all(|v| *v == 1.0))
    }

    /// The multiplication of a norm's result by a vector, and the vector.
    fn scale_after(&self, normed: ValueId) -> Option<(NodeId, ValueId)> {
        let product = self.only(normed, |op| matches!(op, Op::Binary(Binary::Mul)))?;
        let node = self.graph.node(product);
        let vector = |v: &ValueId| self.graph.constant(*v).is_some_and(|c| c.shape().len() == 1);
        let scale = node.inputs.iter().flatten().copied().find(vector)?;
        Some((product, scale))
    }

    /// A constant that comes from the export.
    fn is_named(&self, value: ValueId) -> bool {
        self.graph.constant(value).is_some_and(|c| Recipe::of(c).is_some())
    }

    /// Names a weight that has no name yet: a tied head stays the embedding. Factors and addends that passes folded
    /// into the weight stay in its recipe; a weight that is part of another has no module.
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
                Recipe::Transpose { of, .. }
                | Recipe::Reshape { of, .. }
                | Recipe::Cast { of, .. }
                | Recipe::RoundToNearest { of, .. }
                | Recipe::Calibrated { of } => Some(*of),
                Recipe::Scale { factor, of } => {
                    arithmetic.push((factor, 0.0));
                    Some(*of)
                }
                Recipe::Offset { addend, of } => {
                    arithmetic.push((1.0, addend));
                    Some(*of)
                }
                // A module is quantized as a whole: its codes, scales and zero points are those of one weight.
                Recipe::Dequantize { codes, .. } if is_whole(&codes) => None,
                Recipe::Slice { .. }
                | Recipe::Concat { .. }
                | Recipe::Dequantize { .. }
                | Recipe::Quantize { .. }
                | Recipe::HalfRange { .. }
                | Recipe::SwapHalves { .. }
                | Recipe::Take { .. }
                | Recipe::Order { .. } => return,
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
}

/// Whether codes are all those of one tensor: possibly with reordered columns, and without padding of the last block.
fn is_whole(codes: &Recipe) -> bool {
    const LARGEST_BLOCK: usize = 256;
    match codes {
        Recipe::Tensor { .. } => true,
        Recipe::Slice {
            axis,
            start: 0,
            end,
            of,
        } => {
            let shape = of.shape();
            *axis + 1 == shape.len() && shape[*axis] - end < LARGEST_BLOCK && is_whole(of)
        }
        Recipe::Transpose { of, .. }
        | Recipe::Reshape { of, .. }
        | Recipe::HalfRange { of, .. }
        | Recipe::SwapHalves { of }
        | Recipe::Take { of, .. }
        | Recipe::Quantize { of, .. }
        | Recipe::Cast { of, .. } => is_whole(of),
        _ => false,
    }
}

/// Whether a recipe is only a norm's weight: one module, possibly with an addend or a factor.
pub(super) fn is_norm_factor(recipe: &Recipe) -> bool {
    match recipe {
        Recipe::Tensor { name, shape, .. } => is_norm_weight(name) && shape.len() == 1,
        Recipe::Scale { of, .. } | Recipe::Offset { of, .. } | Recipe::Cast { of, .. } => is_norm_factor(of),
        _ => false,
    }
}

/// Whether a module is the weight of a norm.
pub(super) fn is_norm_weight(module: &str) -> bool {
    module.ends_with("norm.weight")
}

fn is_norm(op: &Op) -> bool {
    matches!(op, Op::RmsNormalization { .. } | Op::LayerNormalization { .. })
}
