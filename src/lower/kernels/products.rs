//! Linear layers with the operators before and after them.

use std::collections::{HashMap, HashSet};

use super::attention::AttentionGroup;
use super::{Finder, codes};
use crate::graph::op::{Binary, Op, Unary};
use crate::graph::{NodeId, ValueId};
use crate::lower::fuse::member;
use crate::network::{ProductPart, RowActivation};
use crate::tensor::DType;

/// A matrix and its bias.
#[derive(Clone, Copy, Debug)]
pub(super) struct Matrix {
    pub weight: ValueId,
    pub bias: Option<ValueId>,
    pub part: ProductPart,
    /// Element type of its codes; of its elements if it has none.
    pub dtype: DType,
}

/// Nodes that become one [`RowProduct`](crate::network::RowProduct).
#[derive(Clone, Debug)]
pub(super) struct ProductGroup {
    pub x: ValueId,
    /// The norm's weight and epsilon.
    pub norm: Option<(ValueId, f32)>,
    pub matrices: Vec<Matrix>,
    pub activation: RowActivation,
    pub gated: bool,
    pub residual: Option<ValueId>,
    /// `None`: an attention reads it, as concatenated query, key and value.
    pub output: Option<ValueId>,
    pub to_f32: bool,
    pub nodes: Vec<NodeId>,
}

impl ProductGroup {
    pub fn inputs(&self) -> Vec<ValueId> {
        let mut inputs = vec![self.x];
        inputs.extend(self.residual);
        inputs
    }
}

/// A linear layer with its bias and activation.
#[derive(Clone, Debug)]
struct Chain {
    x: ValueId,
    matrix: Matrix,
    activation: RowActivation,
    output: ValueId,
    nodes: Vec<NodeId>,
}

impl Chain {
    fn is_plain(&self) -> bool {
        self.activation == RowActivation::None
    }

    /// Whether one kernel can multiply with both.
    fn joins(&self, other: &Chain) -> bool {
        let form = |chain: &Chain| (chain.x, chain.matrix.part.codes, chain.matrix.dtype);
        form(self) == form(other)
    }
}

impl Finder<'_> {
    /// All products, and by the number of an attention, the one that computes its query, key and value.
    pub(super) fn products(&self, attentions: &[AttentionGroup]) -> (Vec<ProductGroup>, HashMap<usize, usize>) {
        let nodes = self.graph.node_ids().filter(|id| self.demand.nodes.contains(id));
        let chains: Vec<Chain> = nodes.filter_map(|node| self.chain(node)).collect();
        let by_output: HashMap<ValueId, usize> = chains.iter().enumerate().map(|(i, c)| (c.output, i)).collect();
        let mut taken: HashSet<usize> = HashSet::new();
        let mut claimed: HashSet<NodeId> = HashSet::new();
        let mut groups = Vec::new();
        let mut packed = HashMap::new();
        for (i, attention) in attentions.iter().enumerate() {
            let members: Option<Vec<usize>> = attention.qkv.iter().map(|v| by_output.get(v).copied()).collect();
            let Some(members) = members else { continue };
            let of = |m: usize| &chains[members[m]];
            let inside = |m: usize| {
                let reader = self.reader(of(m).output);
                of(m).is_plain() && reader.is_some_and(|(reader, _)| attention.nodes.contains(&reader))
            };
            let distinct = members.iter().collect::<HashSet<_>>().len() == 3;
            if distinct && (0..3).all(inside) && of(0).joins(of(1)) && of(0).joins(of(2)) {
                taken.extend(members.iter().copied());
                packed.insert(i, groups.len());
                let all: Vec<&Chain> = members.iter().map(|m| &chains[*m]).collect();
                groups.push(ProductGroup {
                    output: None,
                    ..self.group(&all, false)
                });
            }
        }
        for (gate, up, product) in self.gates(&chains, &by_output) {
            if taken.contains(&gate) || taken.contains(&up) || claimed.contains(&product) {
                continue;
            }
            taken.extend([gate, up]);
            claimed.insert(product);
            let mut group = self.group(&[&chains[gate], &chains[up]], true);
            group.output = self.graph.node(product).output(0);
            group.nodes.push(product);
            groups.push(group);
        }
        for (i, chain) in chains.iter().enumerate().filter(|(i, _)| !taken.contains(i)) {
            debug_assert!(!taken.contains(&i));
            groups.push(self.group(&[chain], false));
        }
        for group in &mut groups {
            self.add_residual(group, &mut claimed);
            group.to_f32 = group.output.is_some() && group.output == self.logits().filter(|v| self.is_result(*v));
        }
        (groups, packed)
    }

    /// Whether the value is an output of the graph, once, and nothing reads it.
    fn is_result(&self, value: ValueId) -> bool {
        let times = self.graph.outputs.iter().filter(|output| **output == value).count();
        times == 1 && !self.readers.contains_key(&value)
    }

    fn group(&self, chains: &[&Chain], gated: bool) -> ProductGroup {
        let (x, norm) = self.before_norm(chains[0].x);
        ProductGroup {
            x,
            norm,
            matrices: chains.iter().map(|chain| chain.matrix).collect(),
            activation: chains[0].activation,
            gated,
            residual: None,
            output: Some(chains[0].output),
            to_f32: false,
            nodes: chains.iter().flat_map(|chain| chain.nodes.clone()).collect(),
        }
    }

    /// The linear layer of a node, if a kernel supports it, extended as long as each result has a single reader.
    fn chain(&self, node: NodeId) -> Option<Chain> {
        let (x, member) = member(self.graph, self.table, node)?;
        let dtype = self.half(x)?;
        let constant = self.graph.constant(member.weight)?;
        let (n, k) = (constant.shape()[0], constant.shape()[1]);
        if self.width(x) != Some(k) || self.graph.value(member.output).dtype != Some(dtype) {
            return None;
        }
        let (layout, codes) = match constant.as_quantized() {
            Some(parts) => (Some(codes::layout(constant, dtype)?), parts.codes.dtype().bits()),
            None if constant.dtype() == dtype && k.is_multiple_of(8) => (None, 16),
            None => return None,
        };
        let mut chain = Chain {
            x,
            matrix: Matrix {
                weight: member.weight,
                bias: None,
                part: ProductPart {
                    codes: layout,
                    bias: false,
                },
                dtype: match codes {
                    4 => DType::I4,
                    8 => DType::I8,
                    _ => dtype,
                },
            },
            activation: RowActivation::None,
            output: member.output,
            nodes: vec![node],
        };
        if let Some((id, node)) = self.reader(chain.output)
            && node.op == Op::Binary(Binary::Add)
            && let Some(bias) = other(node.input(0)?, node.input(1)?, chain.output)
            && self.is_weight(bias, dtype, &[n])
        {
            chain.matrix.bias = Some(bias);
            chain.matrix.part.bias = true;
            chain.nodes.push(id);
            chain.output = node.output(0)?;
        }
        if let Some((id, node)) = self.reader(chain.output)
            && let Some(activation) = activation(&node.op)
        {
            chain.activation = activation;
            chain.nodes.push(id);
            chain.output = node.output(0)?;
            if activation == RowActivation::Relu
                && let Some(id) = self.square(chain.output)
            {
                chain.activation = RowActivation::ReluSquared;
                chain.nodes.push(id);
                chain.output = self.graph.node(id).output(0)?;
            }
        }
        Some(chain)
    }

    /// The node that multiplies a value with itself, if nothing else reads it.
    fn square(&self, value: ValueId) -> Option<NodeId> {
        let readers = self.readers.get(&value)?;
        let [first, second] = readers[..] else { return None };
        let product = self.graph.node(first).op == Op::Binary(Binary::Mul);
        (first == second && product && !self.graph.outputs.contains(&value)).then_some(first)
    }

    /// Gated products: gate, up, and the node that multiplies them.
    fn gates(&self, chains: &[Chain], by_output: &HashMap<ValueId, usize>) -> Vec<(usize, usize, NodeId)> {
        let products = self
            .graph
            .node_ids()
            .filter(|id| self.demand.nodes.contains(id) && self.graph.node(*id).op == Op::Binary(Binary::Mul));
        let pairs = products.filter_map(|id| {
            let node = self.graph.node(id);
            let sides = [node.input(0)?, node.input(1)?];
            let private = sides
                .iter()
                .all(|v| self.reader(*v).is_some_and(|(reader, _)| reader == id));
            let [a, b] = [*by_output.get(&sides[0])?, *by_output.get(&sides[1])?];
            let (gate, up) = if chains[b].is_plain() { (a, b) } else { (b, a) };
            let fits = private && a != b && chains[up].is_plain() && chains[gate].joins(&chains[up]);
            let alike = self.graph.shape(sides[0]) == self.graph.shape(sides[1]);
            (fits && alike).then_some((gate, up, id))
        });
        pairs.collect()
    }

    /// Includes the sum with a value of the same shape.
    fn add_residual(&self, group: &mut ProductGroup, claimed: &mut HashSet<NodeId>) {
        let Some(output) = group.output else { return };
        let Some((id, node)) = self.reader(output) else {
            return;
        };
        let residual = match (&node.op, node.input(0), node.input(1)) {
            (Op::Binary(Binary::Add), Some(a), Some(b)) => other(a, b, output),
            _ => None,
        };
        let Some(residual) = residual else { return };
        let alike = |value: ValueId| (self.graph.value(value).dtype, self.graph.shape(value));
        let fits = self.graph.constant(residual).is_none() && alike(residual) == alike(output);
        if fits && claimed.insert(id) {
            group.residual = Some(residual);
            group.output = node.output(0);
            group.nodes.push(id);
        }
    }

    /// The input of a norm of the last axis, with its weight and epsilon; the value itself if there is no norm.
    fn before_norm(&self, value: ValueId) -> (ValueId, Option<(ValueId, f32)>) {
        self.norm(value)
            .map_or((value, None), |(x, weight, epsilon)| (x, Some((weight, epsilon))))
    }

    /// Input, weight and epsilon of the norm of the last axis that computes a value.
    pub(super) fn norm(&self, value: ValueId) -> Option<(ValueId, ValueId, f32)> {
        let (_, node) = self.graph.def(value)?;
        let Op::RmsNormalization { axis, epsilon } = node.op else {
            return None;
        };
        let (x, weight) = (node.input(0)?, node.input(1)?);
        let shape = self.graph.shape(x)?;
        let width = usize::try_from(shape.last()?.as_const()?).ok()?;
        let last = axis == -1 || axis == shape.len() as i64 - 1;
        let dtype = self.half(x)?;
        let alike = self.graph.value(value).dtype == Some(dtype) && self.is_weight(weight, dtype, &[width]);
        (last && alike).then_some((x, weight, epsilon))
    }
}

/// The operand that is not `this`; `None` if neither or both are.
fn other(a: ValueId, b: ValueId, this: ValueId) -> Option<ValueId> {
    match (a == this, b == this) {
        (true, false) => Some(b),
        (false, true) => Some(a),
        _ => None,
    }
}

fn activation(op: &Op) -> Option<RowActivation> {
    match op {
        Op::Swish { alpha } if *alpha == 1.0 => Some(RowActivation::Silu),
        Op::Gelu { tanh: true } => Some(RowActivation::GeluTanh),
        Op::Gelu { tanh: false } => Some(RowActivation::GeluErf),
        Op::Unary(Unary::Relu) => Some(RowActivation::Relu),
        _ => None,
    }
}
