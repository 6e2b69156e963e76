//! Which slots a mask of the canonical graph makes visible to a token.

use super::Finder;
use crate::dim::{Dim, Sym};
use crate::graph::op::{Binary, Op};
use crate::graph::{Node, ValueId};
use crate::interface::Role;

impl Finder<'_> {
    /// The window of a mask that the passes wrote (head of [`graph`](crate::graph)): `Some(None)` if all slots up to
    /// the token are visible, `None` for any other mask.
    pub(super) fn window(&self, mask: ValueId) -> Option<Option<usize>> {
        let (_, node) = self.graph.def(mask)?;
        match node.op {
            Op::Binary(Binary::LessOrEqual) => {
                let (slots, positions) = (node.input(0)?, node.input(1)?);
                (self.is_slots(slots) && self.is_positions(positions)).then_some(None)
            }
            Op::Binary(Binary::And) => {
                let (causal, recent) = (node.input(0)?, node.input(1)?);
                let window = self.recent(recent)?;
                self.window(causal)?.is_none().then_some(Some(window))
            }
            _ => None,
        }
    }

    /// `slots > positions - window`.
    fn recent(&self, value: ValueId) -> Option<usize> {
        let node = self.node(value, &Op::Binary(Binary::Greater))?;
        let before = self.node(node.input(1)?, &Op::Binary(Binary::Sub))?;
        let window = self.graph.constant(before.input(1)?)?.materialize().ok()?;
        let window = usize::try_from(*window.to_i64().first().filter(|_| window.len() == 1)?).ok()?;
        let holds = self.is_slots(node.input(0)?) && self.is_positions(before.input(0)?) && window > 0;
        holds.then_some(window)
    }

    fn node(&self, value: ValueId, op: &Op) -> Option<&Node> {
        self.graph
            .def(value)
            .map(|(_, node)| node)
            .filter(|node| node.op == *op)
    }

    /// 0, 1, … up to the capacity, along the last axis.
    fn is_slots(&self, value: ValueId) -> bool {
        let Some(node) = self.node(value, &Op::Range) else {
            return false;
        };
        let number = |i: usize| -> Option<i64> {
            let tensor = self.graph.constant(node.input(i)?)?.materialize().ok()?;
            tensor.to_i64().first().copied()
        };
        let capacity = self
            .graph
            .shape(value)
            .is_some_and(|shape| *shape == [Dim::sym(Sym::capacity())]);
        capacity && number(0) == Some(0) && number(2) == Some(1)
    }

    /// The positions as `[batch, 1, tokens, 1]`.
    fn is_positions(&self, value: ValueId) -> bool {
        let source = self.node(value, &Op::Unsqueeze).and_then(|node| node.input(0));
        let column = self.graph.shape(value).is_some_and(|shape| match &shape[..] {
            [_, heads, _, slots] => heads.is_one() && slots.is_one(),
            _ => false,
        });
        column && source.is_some_and(|source| self.is_input(source, Role::PositionIds))
    }
}
