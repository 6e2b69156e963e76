//! Feed-forward blocks: one matrix up and one down, with a gate beside the first or in one matrix with it.

use super::walk::is_rounding;
use super::{Linear, Reader};
use crate::graph::op::Op;
use crate::graph::{NodeId, ValueId};

impl Reader<'_> {
    /// Names the matrices of the block that begins with these products, and gives its result.
    pub(super) fn feed_forward(&mut self, prefix: &str, products: Vec<(NodeId, bool)>) -> Option<ValueId> {
        let prefix = format!("{prefix}.feed_forward");
        let down = match products[..] {
            [(product, _)] => {
                let (linear, end) = self.linear_at(product)?;
                match self.columns_after(end) {
                    Some(parts) => self.gate_and_up(&prefix, &linear, &parts)?,
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

    /// Gate and up of one matrix: the activation follows the gate. Gives the product down.
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

    /// The parts that the last axis of a value is cut into, with their columns; `None` if it is read whole.
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
