//! From an attention operand back to its sources.
//!
//! Between a projection and the attention that uses it lies only movement (reshapes, transposes, slices, head
//! repetition), rotation and the cache: operators that are linear in the data. [`Trace`] walks back through them and
//! stops at their *sources*: projections (or a norm or bias after one) and cache inputs. `projection` finds out what
//! the operators in between compute, by executing them.

use std::cell::RefCell;
use std::collections::{BTreeSet, HashMap};
use std::rc::Rc;

use crate::graph::op::{Binary, Op, Unary};
use crate::graph::{Node, ValueId};
use crate::passes::dependence::Dependence;
use crate::passes::partial_eval::PartialEvaluator;
use crate::passes::roles::InputRole;

pub type Sources = Rc<BTreeSet<ValueId>>;

/// Sources of values, cached.
pub struct Trace<'b, 'g> {
    evaluator: &'b PartialEvaluator<'g>,
    memo: RefCell<HashMap<ValueId, Sources>>,
}

impl<'b, 'g> Trace<'b, 'g> {
    pub fn new(evaluator: &'b PartialEvaluator<'g>) -> Self {
        Trace {
            evaluator,
            memo: RefCell::default(),
        }
    }

    pub fn is_cache(&self, id: ValueId) -> bool {
        self.evaluator.roles.of.get(&id) == Some(&InputRole::Cache)
    }

    /// The data values from which `id` is computed by movement and rotation alone.
    pub fn sources(&self, id: ValueId) -> Sources {
        if let Some(sources) = self.memo.borrow().get(&id) {
            return sources.clone();
        }
        let itself = || Rc::new(BTreeSet::from([id]));
        let sources = match self.evaluator.graph.def(id) {
            Some((_, node)) => self.through(node).unwrap_or_else(itself),
            None => itself(),
        };
        self.memo.borrow_mut().insert(id, sources.clone());
        sources
    }

    /// The cache among the sources, and the other sources.
    pub fn cache_and_new(&self, id: ValueId) -> (Vec<ValueId>, Vec<ValueId>) {
        self.sources(id).iter().copied().partition(|v| self.is_cache(*v))
    }

    /// The first value from `id` back that is computed from these sources alone: the rows to be written to a cache.
    pub fn rows_before_cache(&self, id: ValueId, of: &[ValueId]) -> Option<ValueId> {
        let sources = self.sources(id);
        if !of.iter().all(|source| sources.contains(source)) {
            return None;
        }
        if sources.len() == of.len() {
            return Some(id);
        }
        let (_, node) = self.evaluator.graph.def(id)?;
        self.data(node).into_iter().find_map(|v| self.rows_before_cache(v, of))
    }

    fn data(&self, node: &Node) -> Vec<ValueId> {
        let inputs = node.inputs.iter().flatten().copied();
        inputs
            .filter(|v| self.evaluator.dependence(*v) == Dependence::Data)
            .collect()
    }

    /// Sources of a node, or `None` if the walk stops there.
    fn through(&self, node: &Node) -> Option<Sources> {
        let data = self.data(node);
        match &node.op {
            // Heads may be concatenated from parts.
            Op::Concat { .. } | Op::ScatterNd { .. } | Op::ScatterElements { .. } => Some(self.union(&data)),
            op if moves_elements(op) => self.merged(&data),
            Op::RotaryEmbedding { .. } | Op::ContribRotaryEmbedding { .. } | Op::Unary(Unary::Neg) => {
                self.merged(&data)
            }
            // Rows of a table selected by token ids are an embedding, not movement.
            Op::Gather { .. } if node.input(0).is_some_and(|x| data == [x]) => self.merged(&data),
            Op::Binary(Binary::Add | Binary::Sub) if data.len() == 2 => self.merged(&data),
            Op::Binary(Binary::Add | Binary::Sub | Binary::Mul) if data.len() == 1 => {
                let other = node.inputs.iter().flatten().find(|v| !data.contains(v))?;
                self.is_factor(*other).then(|| self.sources(data[0]))
            }
            Op::Binary(Binary::Div) if node.input(0).is_some_and(|x| data == [x]) => {
                self.is_factor(node.input(1)?).then(|| self.sources(data[0]))
            }
            _ => None,
        }
    }

    /// A scalar, or a value that varies with the position such as a cosine. A constant vector is a bias or a norm's
    /// weight, which belongs to the projection.
    fn is_factor(&self, id: ValueId) -> bool {
        match self.evaluator.dependence(id) {
            Dependence::Positional => true,
            Dependence::Constant => self
                .evaluator
                .graph
                .shape(id)
                .is_some_and(|s| s.iter().all(|d| d.is_one())),
            Dependence::Data => false,
        }
    }

    fn union(&self, data: &[ValueId]) -> Sources {
        let each = data.iter().map(|v| self.sources(*v));
        Rc::new(each.flat_map(|s| s.iter().copied().collect::<Vec<_>>()).collect())
    }

    /// Operands may be combined where a cache is written or where they have the same sources; a sum of two projections,
    /// such as an adapter's, is itself a source.
    fn merged(&self, data: &[ValueId]) -> Option<Sources> {
        let each: Vec<Sources> = data.iter().map(|v| self.sources(*v)).collect();
        let (first, rest) = each.split_first()?;
        if rest.iter().all(|s| s == first) {
            return Some(first.clone());
        }
        let union: BTreeSet<ValueId> = each.iter().flat_map(|s| s.iter().copied()).collect();
        union.iter().any(|v| self.is_cache(*v)).then(|| Rc::new(union))
    }
}

/// Whether an operator returns elements of its operands unchanged. `Gather` does not count: rows of a table selected by
/// token ids are an embedding.
pub(super) fn moves_elements(op: &Op) -> bool {
    matches!(
        op,
        Op::Identity
            | Op::Cast { .. }
            | Op::CastLike
            | Op::Reshape { .. }
            | Op::Transpose { .. }
            | Op::Squeeze
            | Op::Unsqueeze
            | Op::Flatten { .. }
            | Op::Expand
            | Op::Tile
            | Op::Concat { .. }
            | Op::Split { .. }
            | Op::Slice
            | Op::GatherElements { .. }
            | Op::GatherNd { .. }
            | Op::Where
            | Op::ScatterNd { .. }
            | Op::ScatterElements { .. }
            | Op::TensorScatter { .. }
    )
}
