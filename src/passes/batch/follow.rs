//! The axis of each value that counts the sequences, and the changes needed for another number of sequences.

use std::collections::HashMap;

use crate::dim::Dim;
use crate::graph::op::{Moves, Op, RowWise};
use crate::graph::{Graph, Node, NodeId, ValueId};
use crate::passes::attention::Obstacle;

/// The result of [`follow`].
#[derive(Default)]
pub struct Followed {
    /// The axis of each value that has one. Each sequence has an equal, contiguous part of it.
    pub axes: HashMap<ValueId, usize>,
    /// Inputs of nodes that repeat one row per sequence along an axis.
    pub cut: Vec<(NodeId, usize, usize)>,
    /// Reshapes of values that have the axis.
    pub reshapes: Vec<NodeId>,
    /// `Expand`s of values that have it, with the index of the axis in the result.
    pub expands: Vec<(NodeId, usize)>,
}

/// Follows `number` sequences, more than one, through a typed and sorted graph with a canonical interface.
pub fn follow(graph: &Graph, number: usize) -> Result<Followed, Vec<Obstacle>> {
    let interface = graph.interface.as_ref().expect("emit gave the graph its interface");
    let mut followed = Follower {
        graph,
        number: Dim::from(number),
        found: Followed::default(),
    };
    let axes = &mut followed.found.axes;
    axes.extend(interface.inputs().iter().map(|port| (port.id, 0)));
    let mut obstacles = Vec::new();
    let obstacle = |at: &str, reason: String| Obstacle {
        layer: None,
        at: at.to_string(),
        reason,
    };
    for id in graph.node_ids() {
        let node = graph.node(id);
        match followed.behind(id, node) {
            Ok(None) => {}
            Ok(Some(axis)) => {
                for output in node.outputs.iter().flatten() {
                    let axes = &mut followed.found.axes;
                    axes.insert(*output, axis);
                    if !followed.is_divided(*output) {
                        let reason = format!("its result has no equal parts for {number} sequences on axis {axis}");
                        obstacles.push(obstacle(&node.name, reason));
                    }
                }
            }
            Err(reason) => obstacles.push(obstacle(
                &node.name,
                format!(
                    "the export fixes a batch of {number}, and here ({}) {reason}",
                    node.op.name()
                ),
            )),
        }
        // Values after an obstacle are not checked.
        if !obstacles.is_empty() {
            return Err(obstacles);
        }
    }
    for port in interface.outputs() {
        let whole = graph.shape(port.id).and_then(|shape| shape.first()) == Some(&followed.number);
        if followed.axis(port.id) != Some(0) || !whole {
            let name = &graph.value(port.id).name;
            let reason = format!("the export fixes a batch of {number}, and this output has no row for each sequence");
            obstacles.push(obstacle(name, reason));
        }
    }
    match obstacles.is_empty() {
        true => Ok(followed.found),
        false => Err(obstacles),
    }
}

/// The axis of a result, if it has one.
type Axis = Result<Option<usize>, String>;

struct Follower<'g> {
    graph: &'g Graph,
    number: Dim,
    found: Followed,
}

impl Follower<'_> {
    fn axis(&self, value: ValueId) -> Option<usize> {
        self.found.axes.get(&value).copied()
    }

    fn shape(&self, value: ValueId) -> Result<&[Dim], String> {
        let shape = self.graph.shape(value).map(Vec::as_slice);
        shape.ok_or_else(|| format!("the shape of {} is not known", self.graph.value(value).name))
    }

    /// Whether the axis of a value can be divided among the sequences.
    fn is_divided(&self, value: ValueId) -> bool {
        let dim = self.axis(value).and_then(|axis| self.graph.shape(value)?.get(axis));
        dim.is_some_and(|dim| dim.div_exact(&self.number).is_some())
    }

    fn ints(&self, value: Option<ValueId>) -> Result<Vec<i64>, String> {
        let constant = value.and_then(|v| self.graph.constant(v));
        let tensor = constant.and_then(|constant| constant.materialize().ok());
        tensor
            .map(|tensor| tensor.to_i64())
            .ok_or_else(|| "its axes are not constant".to_string())
    }

    /// The axis of a node's results. The error is the reason why there is none.
    fn behind(&mut self, id: NodeId, node: &Node) -> Axis {
        let info = node.op.info();
        // Shapes and axes are not data; the batch in them is rewritten.
        let data = |i: usize| {
            let declared = info.inputs.get(i).or(info.inputs.last());
            node.input(i).filter(|_| !declared.is_some_and(|input| input.parameter))
        };
        let inputs: Vec<Option<ValueId>> = (0..node.inputs.len()).map(data).collect();
        let axes: Vec<Option<usize>> = inputs.iter().map(|input| self.axis((*input)?)).collect();
        let axis_of = |i: usize| axes.get(i).copied().flatten();
        if !(0..inputs.len()).any(|i| axis_of(i).is_some()) {
            return Ok(None);
        }
        let (x, out) = (
            inputs[0].ok_or("its first operand is missing")?,
            node.output(0).ok_or("its result is not used")?,
        );
        let rank = self.shape(x)?.len();
        let first = axis_of(0);
        let others_common = (1..inputs.len()).all(|i| axis_of(i).is_none());
        let absolute = |axis: i64| if axis < 0 { axis + rank as i64 } else { axis } as usize;
        // The rule of an operator with the sequences along the first axis.
        let rows_apart = |apart: bool| match apart {
            true => Ok(Some(0)),
            false => Err("not every operand has a row for each sequence".to_string()),
        };
        // The rule of an operator that works along one axis of its first operand.
        let beside = |axis: usize| match first {
            Some(first) if others_common && first != axis => Ok(Some(first)),
            _ => Err("sequences meet".to_string()),
        };
        match &node.op {
            op if op.info().moves == Moves::InOrder && !matches!(op, Op::Identity) => {
                if matches!(op, Op::Reshape { .. }) {
                    self.found.reshapes.push(id);
                }
                self.reshaped(x, out).map(Some)
            }
            Op::MatMul => self.product(id, x, inputs[1].ok_or("its second operand is missing")?),
            Op::Gemm { trans_a, .. } => {
                beside(usize::from(!trans_a))?;
                if let Some(bias) = inputs.get(2).copied().flatten() {
                    self.common_along(id, 2, bias, 0, 2)?;
                }
                Ok(Some(0))
            }
            Op::Softmax { axis } | Op::LogSoftmax { axis } | Op::Split { axis } => beside(absolute(*axis)),
            Op::LayerNormalization { axis, .. } | Op::RmsNormalization { axis, .. } => {
                let from = absolute(*axis);
                beside(from)?;
                first
                    .filter(|first| *first < from)
                    .map(Some)
                    .ok_or_else(|| "sequences meet".into())
            }
            Op::Reduce { keepdims, .. } => {
                let axes: Vec<usize> = self.ints(node.input(1))?.into_iter().map(absolute).collect();
                let kept = first.filter(|first| !axes.contains(first) && !axes.is_empty());
                let kept = kept.ok_or("sequences meet")?;
                let gone = axes.iter().filter(|axis| **axis < kept && !keepdims).count();
                Ok(Some(kept - gone))
            }
            Op::CumSum { .. } => beside(absolute(
                self.ints(node.input(1))?.first().copied().ok_or("it has no axis")?,
            )),
            Op::Transpose { perm } => {
                let reversed: Vec<usize> = (0..rank).rev().collect();
                let perm = perm.as_ref().unwrap_or(&reversed);
                Ok(perm.iter().position(|from| Some(*from) == first))
            }
            Op::Expand => {
                let at = first.ok_or("its target depends on the sequences")? + self.shape(out)?.len() - rank;
                self.found.expands.push((id, at));
                Ok(Some(at))
            }
            Op::Slice => {
                let axes: Vec<usize> = match node.input(3) {
                    Some(_) => self.ints(node.input(3))?.into_iter().map(absolute).collect(),
                    None => (0..self.ints(node.input(1))?.len()).collect(),
                };
                match first.filter(|first| !axes.contains(first)) {
                    Some(first) => Ok(Some(first)),
                    None => Err("sequences are taken out".into()),
                }
            }
            Op::Concat { axis } => {
                let axis = absolute(*axis);
                let same = (0..inputs.len()).all(|i| axis_of(i) == first);
                match first.filter(|first| same && *first != axis) {
                    Some(first) => Ok(Some(first)),
                    None => Err("a sequence is joined with what is not its own".into()),
                }
            }
            Op::Gather { axis } => {
                let (axis, indices) = (absolute(*axis), inputs[1].ok_or("its indices are missing")?);
                match (first, axis_of(1)) {
                    (None, Some(at)) => Ok(Some(axis + at)),
                    (Some(first), None) if first < axis => Ok(Some(first)),
                    (Some(first), None) if first > axis => Ok(Some(first + self.shape(indices)?.len() - 1)),
                    _ => Err("sequences are chosen by an index".into()),
                }
            }
            Op::GatherElements { axis } => match first {
                Some(first) if axis_of(1) == Some(first) && first != absolute(*axis) => Ok(Some(first)),
                _ => Err("sequences are chosen by an index".into()),
            },
            Op::Trilu { .. } => beside(rank - 1).and(beside(rank.saturating_sub(2))),
            Op::TensorScatter { axis, .. } => {
                rows_apart(absolute(*axis) != 0 && (0..inputs.len()).all(|i| axis_of(i) == Some(0)))
            }
            Op::RotaryEmbedding { .. } => {
                let tables_common = axis_of(1).is_none() && axis_of(2).is_none();
                rows_apart(first == Some(0) && axis_of(3) == Some(0) && tables_common)
            }
            op if op.is_attention() => {
                let own = (0..3).all(|i| axis_of(i) == Some(0));
                // The mask may be shared by all.
                if let (Some(mask), None) = (inputs.get(3).copied().flatten(), axis_of(3)) {
                    self.common_along(id, 3, mask, 0, 4)?;
                }
                rows_apart(own && matches!(axis_of(3), None | Some(0)))
            }
            Op::Experts(_) => match first {
                Some(first) if first + 1 < rank && (1..3).all(|i| axis_of(i) == Some(first)) => Ok(Some(first)),
                _ => Err("not every operand has a row for each sequence".into()),
            },
            Op::Routing(_) => beside(rank - 1),
            op if op.info().row_wise == RowWise::Always => self.broadcast(id, &inputs, out),
            _ => Err("it is not known whether sequences meet".into()),
        }
    }

    /// After an operator that changes the shape but not the order of elements. The sequences are outermost after the
    /// axes before theirs, and stay so.
    fn reshaped(&self, x: ValueId, out: ValueId) -> Result<usize, String> {
        let axis = self.axis(x).ok_or("its target depends on the sequences")?;
        let one = Dim::from(1usize);
        let product = |dims: &[Dim]| dims.iter().fold(one.clone(), |product, dim| &product * dim);
        let (from, to) = (self.shape(x)?, self.shape(out)?);
        let before = product(&from[..axis]);
        let at = (0..to.len()).find(|i| product(&to[..*i]) == before && !to[*i].is_one());
        at.filter(|at| to[*at].div_exact(&self.number).is_some())
            .ok_or_else(|| format!("{from:?} becomes {to:?}, in which no axis counts the sequences"))
    }

    /// Rows of the first operand, columns of the second, or axes before both; the sum is over neither.
    fn product(&mut self, id: NodeId, a: ValueId, b: ValueId) -> Axis {
        let ranks = [self.shape(a)?.len(), self.shape(b)?.len()];
        let rank = ranks[0].max(ranks[1]);
        if ranks.contains(&1) {
            return Err("an operand has one axis alone".into());
        }
        let in_result = |value: ValueId, rank_of: usize, summed: usize| match self.axis(value) {
            Some(axis) if axis == summed => Err("the sum is over the sequences".to_string()),
            axis => Ok(axis.map(|axis| axis + rank - rank_of)),
        };
        let of_a = in_result(a, ranks[0], ranks[0] - 1)?;
        let of_b = in_result(b, ranks[1], ranks[1] - 2)?;
        let axis = match (of_a, of_b) {
            (Some(one), Some(other)) if one != other => return Err("sequences meet".into()),
            (one, other) => one.or(other),
        };
        let Some(axis) = axis else { return Ok(None) };
        if axis + 2 < rank {
            for (input, value, own) in [(0, a, of_a), (1, b, of_b)] {
                if own.is_none() {
                    self.common_along(id, input, value, axis, rank)?;
                }
            }
        }
        Ok(Some(axis))
    }

    /// Operands aligned from the last axis on.
    fn broadcast(&mut self, id: NodeId, inputs: &[Option<ValueId>], out: ValueId) -> Axis {
        let rank = self.shape(out)?.len();
        let mut axis = None;
        for value in inputs.iter().flatten() {
            let Some(own) = self.axis(*value) else { continue };
            let at = own + rank - self.shape(*value)?.len();
            if axis.is_some_and(|axis| axis != at) {
                return Err("sequences meet".into());
            }
            axis = Some(at);
        }
        let Some(axis) = axis else { return Ok(None) };
        for (input, value) in inputs.iter().enumerate() {
            if let Some(value) = value.filter(|v| self.axis(*v).is_none()) {
                self.common_along(id, input, value, axis, rank)?;
            }
        }
        Ok(Some(axis))
    }

    /// An operand that is the same for all sequences, combined with one of this rank that has them on this axis: its
    /// dim is 1, or it repeats and is cut.
    fn common_along(
        &mut self,
        id: NodeId,
        input: usize,
        value: ValueId,
        axis: usize,
        rank: usize,
    ) -> Result<(), String> {
        let shape = self.shape(value)?;
        let Some(at) = (axis + shape.len()).checked_sub(rank) else {
            return Ok(());
        };
        if shape[at].is_one() {
            return Ok(());
        }
        let name = &self.graph.value(value).name;
        if shape[at] != self.number || !self.repeats(value, at) {
            return Err(format!("{name} is not the same for all sequences"));
        }
        self.found.cut.push((id, input, at));
        Ok(())
    }

    /// Whether a value that depends on no input is constant along an axis.
    fn repeats(&self, value: ValueId, axis: usize) -> bool {
        if let Some(constant) = self.graph.constant(value) {
            let rows = constant.shape()[axis];
            let row = |i: usize| {
                constant
                    .sliced(axis, i, i + 1)
                    .materialize()
                    .ok()
                    .map(|t| t.data().to_vec())
            };
            let first = row(0);
            return first.is_some() && (1..rows).all(|i| row(i) == first);
        }
        let Some((_, node)) = self.graph.def(value) else {
            return false;
        };
        match node.op {
            Op::ConstantOfShape { .. } => true,
            Op::Expand => {
                let from = node.input(0).and_then(|x| self.graph.shape(x));
                let rank = self.graph.shape(value).map_or(0, Vec::len);
                from.is_some_and(|from| match (axis + from.len()).checked_sub(rank) {
                    Some(at) => from[at].is_one(),
                    None => true,
                })
            }
            _ => false,
        }
    }
}
