//! Feed-forward blocks: one matrix up and one down, with a gate as a separate matrix or fused with the first.

use super::walk::is_rounding;
use super::{Linear, Reader, Recipe};
use crate::graph::op::Op;
use crate::graph::{NodeId, ValueId};

impl Reader<'_> {
    /// Names the matrices of the block that begins with these products, and returns its result.
    pub(super) fn feed_forward(&mut self, prefix: &str, products: Vec<(NodeId, bool)>) -> Option<ValueId> {
        self.layers(&format!("{prefix}.feed_forward"), products)
    }

    /// Like [`Reader::feed_forward`], for matrices whose modules begin with `prefix`.
    fn layers(&mut self, prefix: &str, products: Vec<(NodeId, bool)>) -> Option<ValueId> {
        let down = match products[..] {
            [(product, _)] => {
                let (linear, end) = self.linear_at(product)?;
                match self.columns_after(end) {
                    Some(parts) => self.gate_and_up(prefix, &linear, &parts)?,
                    None => {
                        self.name_linear(&format!("{prefix}.up"), &linear);
                        self.products_after(end).into_iter().next()?.0
                    }
                }
            }
            _ => {
                let gated = products.len() == 2;
                let mut down = None;
                for (product, _) in products {
                    let (linear, end) = self.linear_at(product)?;
                    let (next, is_active) = self.products_after(end).into_iter().next()?;
                    let name = match gated && is_active {
                        true => "gate",
                        false => "up",
                    };
                    self.name_linear(&format!("{prefix}.{name}"), &linear);
                    down = Some(next);
                }
                down?
            }
        };
        let (down, end) = self.linear_at(down)?;
        self.name_linear(&format!("{prefix}.down"), &down);
        Some(end)
    }

    /// Names a mixture of experts that reads this value, with its router and a shared expert, and returns its result;
    /// `None` if there is none.
    pub(super) fn mixture(&mut self, prefix: &str, block: ValueId) -> Option<ValueId> {
        let prefix = format!("{prefix}.feed_forward");
        let id = self.only(block, |op| matches!(op, Op::Experts(_)))?;
        let graph = self.graph;
        let node = graph.node(id);
        let Op::Experts(how) = &node.op else { return None };
        let parts = [
            (3, "gate.weight"),
            (4, "up.weight"),
            (5, "down.weight"),
            (6, "gate.bias"),
            (7, "up.bias"),
            (8, "down.bias"),
        ];
        for (input, part) in parts {
            let Some((value, constant)) = node.input(input).and_then(|v| Some((v, graph.constant(v)?))) else {
                continue;
            };
            let mut shape = constant.shape().to_vec();
            shape[0] /= how.experts;
            let of = |expert: usize| Recipe::Tensor {
                name: format!("{prefix}.experts.{expert}.{part}"),
                dtype: constant.dtype(),
                shape: shape.clone(),
            };
            let all = Recipe::Concat {
                axis: 0,
                of: (0..how.experts).map(of).collect(),
            };
            self.found.entry(value).or_insert(all);
        }
        let (_, routing) = graph.def(node.input(1)?)?;
        let router = routing.input(0).and_then(|logits| self.linear_before(logits));
        if let Some(router) = &router {
            self.name_linear(&format!("{prefix}.router"), router);
        }
        if let Some(correction) = routing.input(1) {
            self.name(correction, &format!("{prefix}.router.correction"));
        }
        let mut shared = self.products_after(block);
        shared.retain(|(product, _)| router.as_ref().is_none_or(|router| router.product != *product));
        // A gate of one number per token.
        shared.retain(|(product, _)| match self.linear_at(*product) {
            Some((linear, _)) if graph.constant(linear.weight).is_some_and(|c| c.shape()[0] == 1) => {
                self.name_linear(&format!("{prefix}.shared_gate"), &linear);
                false
            }
            _ => true,
        });
        if !shared.is_empty() {
            let _ = self.layers(&format!("{prefix}.shared"), shared);
        }
        node.output(0)
    }

    /// Gate and up in one matrix: the activation follows the gate. Returns the product down.
    fn gate_and_up(&mut self, prefix: &str, linear: &Linear, parts: &[((usize, usize), ValueId)]) -> Option<NodeId> {
        let [first, second] = parts else {
            return None;
        };
        let mut down = None;
        let mut active = Vec::new();
        for (_, value) in [first, second] {
            let (product, is_active) = self.products_after(*value).into_iter().next()?;
            if down.is_some_and(|down| down != product) {
                return None;
            }
            down = Some(product);
            active.push(is_active);
        }
        let names = match active[..] {
            [true, false] => ["gate", "up"],
            [false, true] => ["up", "gate"],
            _ => return None,
        };
        self.fused(prefix, linear, vec![(first.0, names[0]), (second.0, names[1])]);
        down
    }

    /// The parts into which the last axis of a value is cut, with their columns; `None` if it is read as a whole.
    fn columns_after(&self, value: ValueId) -> Option<Vec<((usize, usize), ValueId)>> {
        let mut parts = Vec::new();
        for (user, input) in self.uses.get(&value)? {
            let node = self.graph.node(*user);
            match &node.op {
                op if is_rounding(op) => return self.columns_after(node.output(0)?),
                Op::Cast { .. } | Op::Identity | Op::Reshape { .. } if *input == 0 => {
                    return self.columns_after(node.output(0)?);
                }
                Op::Split { .. } if *input == 0 => {
                    for (i, output) in node.outputs.iter().enumerate() {
                        parts.push((self.part(*user, i)?, (*output)?));
                    }
                }
                Op::Slice if *input == 0 => parts.push((self.columns(*user)?, node.output(0)?)),
                _ => return None,
            }
        }
        Some(parts)
    }
}
