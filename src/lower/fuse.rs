//! Linear layers that read the same activation, as one product: q, k and v; gate and up.
//!
//! One product of many rows of weights uses the memory bandwidth better than several of few rows, and needs fewer kernels. The
//! weights are stacked in one weight, named by its parts: `q_proj.weight+k_proj.weight`. A caller that
//! binds it can place the parts next to each other instead of copying them ([`parts`]).

use std::collections::HashMap;

use super::context::{Lowered, Lowering};
use super::demand::{Demand, through_transpose};
use super::linear::volume;
use super::quantized_weights::stacks;
use super::weights::Table;
use super::{LinearForm, LowerOptions, QuantizedForm};
use crate::dim::Dim;
use crate::graph::{Constant, Graph, NodeId, Op, ValueId};
use crate::network::{LayerKind, MatrixOp, Shape};

pub(super) const SEPARATOR: char = '+';

/// The weights that a fused weight of a network consists of, in order; itself if it is not fused.
pub fn parts(name: &str) -> impl Iterator<Item = &str> {
    name.split(SEPARATOR)
}

/// A linear layer: `output = x · weightᵀ`.
#[derive(Clone, Copy, Debug)]
pub(super) struct Member {
    node: NodeId,
    pub output: ValueId,
    pub weight: ValueId,
}

/// Products of one activation.
#[derive(Clone, Debug)]
struct Group {
    x: ValueId,
    members: Vec<Member>,
}

/// Which nodes are lowered together.
#[derive(Default)]
pub(super) struct Fusions {
    groups: Vec<Group>,
    by_node: HashMap<NodeId, usize>,
}

impl Fusions {
    /// `rows` are the nodes that compute only on chosen rows, which cannot be joined with others.
    pub fn find(
        graph: &Graph,
        demand: &Demand,
        table: &Table,
        options: &LowerOptions,
        rows: impl Fn(NodeId) -> bool,
    ) -> Self {
        let pairs = options.fuse_pairs;
        let by_codes = options.quantized != QuantizedForm::Whole;
        let mut by_input: HashMap<(ValueId, bool), usize> = HashMap::new();
        let mut groups: Vec<Group> = Vec::new();
        for node in graph.node_ids().filter(|id| demand.nodes.contains(id)) {
            let Some((x, member)) = member(graph, table, node) else {
                continue;
            };
            let at = *by_input.entry((x, rows(node))).or_insert_with(|| {
                groups.push(Group { x, members: Vec::new() });
                groups.len() - 1
            });
            let group = &mut groups[at].members;
            let width = |m: &Member| graph.constant(m.weight).map(|c| (c.dtype(), c.shape()[1]));
            let format = |m: &Member| {
                graph.constant(m.weight).and_then(|c| {
                    let parts = c.as_quantized()?;
                    Some((parts.format(), stacks(c)))
                })
            };
            let alike = |first: &Member| {
                let formats = (format(first), format(&member));
                let joins = match formats.0 {
                    Some((format, stacks)) => format.is_some() && stacks && formats.0 == formats.1,
                    None => formats.1.is_none(),
                };
                width(first) == width(&member) && (joins || !by_codes)
            };
            if group.first().is_none_or(alike) {
                group.push(member);
            }
        }
        groups.retain(|group| group.members.len() > if pairs { 1 } else { 2 });
        let mut by_node = HashMap::new();
        for (i, group) in groups.iter().enumerate() {
            by_node.extend(group.members.iter().map(|m| (m.node, i)));
        }
        Fusions { groups, by_node }
    }
}

/// The operands of a node, if it is a linear layer with a weight `[out, in]` over tokens.
pub(super) fn member(graph: &Graph, table: &Table, id: NodeId) -> Option<(ValueId, Member)> {
    let node = graph.node(id);
    let (Op::MatMul, Some(x), [Some(output)]) = (&node.op, node.input(0), &node.outputs[..]) else {
        return None;
    };
    let (weight, transposed) = through_transpose(graph, node.input(1)?);
    let constant = graph.constant(weight)?;
    let fits = transposed && constant.shape().len() == 2 && table.by_value.contains_key(&weight);
    let plain = graph.constant(x).is_none() && !through_transpose(graph, x).1;
    let deep = graph.shape(*output).is_some_and(|shape| shape.len() > 2);
    let output = *output;
    (fits && plain && deep).then_some((
        x,
        Member {
            node: id,
            output,
            weight,
        },
    ))
}

impl Lowering<'_> {
    /// Lowers the whole group of a node, if it has one; true if the node's output is known then.
    pub(super) fn fused(&mut self, id: NodeId) -> Lowered<bool> {
        let Some(at) = self.fusions.by_node.get(&id) else {
            return Ok(false);
        };
        let Group { x, members } = self.fusions.groups[*at].clone();
        if self.is_known(members[0].output) {
            return Ok(true);
        }
        let weights: Vec<(String, Constant)> = members.iter().map(|m| self.weight_of(m.weight)).collect();
        let widths: Vec<usize> = weights.iter().map(|(_, constant)| constant.shape()[0]).collect();
        let weight = self.weights(&weights, false)?;
        let x = self.value(x)?;
        let shape = self.b.shape(x).clone();
        let leading = shape[..shape.len() - 1].to_vec();
        let base = self.base_name(self.graph.node(members[0].node));
        let name = format!("{base}/fused");
        let quantized = self.quantized_linear(&name, x, weight)?;
        let product = match self.options.form(&volume(&leading)) {
            _ if let Some(product) = quantized => product,
            LinearForm::RaiseWeight => {
                let raised = self.raise(weight, shape.len())?;
                let kind = LayerKind::MatrixMultiply {
                    op_a: MatrixOp::None,
                    op_b: MatrixOp::Transpose,
                };
                self.b.add(&name, kind, &[x, raised])?
            }
            _ => {
                let flat = self.flattened(x)?;
                self.matrix_product(&name, flat, weight, true)?
            }
        };
        let rows = self.b.shape(product).clone();
        let (rows, axes) = (rows[..rows.len() - 1].to_vec(), rows.len());
        let mut start = 0;
        for (member, width) in members.iter().zip(widths) {
            let name = self.base_name(self.graph.node(member.node));
            let with = |rest: Vec<i64>, last: i64| -> Vec<i64> { rest.into_iter().chain([last]).collect() };
            let part = LayerKind::Slice {
                start: with(vec![0; axes - 1], start),
                size: rows.iter().cloned().chain([Dim::from(width)]).collect(),
                stride: vec![1; axes],
            };
            let part = self.b.add(&format!("{name}/part"), part, &[product])?;
            let mut to: Shape = leading.clone();
            to.push(width.into());
            let output = match self.b.shape(part) == &to {
                true => part,
                false => self.reshape(&format!("{name}/unflat"), part, to)?,
            };
            self.define(member.output, output);
            start += width as i64;
        }
        Ok(true)
    }
}
