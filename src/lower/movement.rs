//! Operators that move elements: Shuffle, Slice and Concatenation layers.
//!
//! Adjacent reshapes and transposes are merged into one Shuffle where possible (`context`), and a transpose that only
//! moves dims of 1, such as every head split in decode, is a reshape.

use super::context::{Lowered, Lowering, one};
use super::dispatch::no_lowering;
use super::error::Reason;
use super::linear::volume;
use crate::dim::Dim;
use crate::graph::eval::slice_range;
use crate::graph::{Node, Op};
use crate::network::{LayerKind, Shape, TensorId};
use crate::tensor::{DType, Tensor};

impl Lowering<'_> {
    /// The operators of [`Family::Movement`](crate::graph::op::Family::Movement).
    pub(super) fn movement_node(&mut self, node: &Node, name: &str) -> Lowered {
        match &node.op {
            Op::Reshape { allowzero } => self.reshape_node(node, name, *allowzero),
            Op::Flatten { axis } => self.flatten(node, name, *axis),
            Op::Squeeze => self.squeeze(node, name),
            Op::Unsqueeze => self.unsqueeze(node, name),
            Op::Transpose { perm } => self.transpose_node(node, name, perm.as_deref()),
            Op::Expand => self.expand_node(node, name),
            Op::Tile => self.tile(node, name),
            Op::Concat { axis } => self.concat(node, name, *axis),
            Op::Split { .. } => unreachable!("split has several outputs and is lowered by `node`"),
            Op::Slice => self.slice(node, name),
            Op::Range => self.range(node, name),
            Op::ConstantOfShape { value } => self.constant_of_shape(node, name, value),
            Op::Shape { .. } | Op::Size => self.known_contents(node, name),
            _ => no_lowering(node),
        }
    }

    pub(super) fn reshape_node(&mut self, node: &Node, name: &str, allow_zero: bool) -> Lowered {
        let x = self.data(node, 0)?;
        let from = self.b.shape(x).clone();
        // Inference resolves computed shapes; a constant needs no inference.
        let wanted = match self.parameter(node, 1) {
            Ok(wanted) => wanted,
            Err(reason) => match node.output(0).and_then(|v| self.inferred_shape(v)) {
                Some(shape) => Some(shape),
                None => return Err(reason),
            },
        };
        let Some(mut to) = wanted else {
            return Reason::unsupported("its shape is missing");
        };
        let mut open = None;
        for (i, dim) in to.iter_mut().enumerate() {
            match dim.as_const() {
                Some(0) if !allow_zero => match from.get(i) {
                    Some(same) => dim.clone_from(same),
                    None => return Reason::unsupported(format!("dim {i} to keep does not exist in {from:?}")),
                },
                Some(-1) => open = Some(i),
                _ => {}
            }
        }
        if let Some(open) = open {
            to[open] = one();
            match volume(&from).div_exact(&volume(&to)) {
                Some(dim) => to[open] = dim,
                None => return Reason::unsupported(format!("{from:?} does not divide by {to:?}")),
            }
        }
        self.reshape(name, x, to)
    }

    pub(super) fn transpose_node(&mut self, node: &Node, name: &str, perm: Option<&[usize]>) -> Lowered {
        let x = self.data(node, 0)?;
        let order: Vec<usize> = match perm {
            Some(perm) => perm.to_vec(),
            None => (0..self.b.rank(x)).rev().collect(),
        };
        self.transpose(name, x, &order)
    }

    pub(super) fn flatten(&mut self, node: &Node, name: &str, axis: i64) -> Lowered {
        let x = self.data(node, 0)?;
        let shape = self.b.shape(x).clone();
        // The axis may be one past the last.
        let axis = match usize::try_from(axis) {
            Ok(axis) if axis == shape.len() => axis,
            _ => self.axis(axis, shape.len())?,
        };
        self.reshape(name, x, vec![volume(&shape[..axis]), volume(&shape[axis..])])
    }

    pub(super) fn squeeze(&mut self, node: &Node, name: &str) -> Lowered {
        let x = self.data(node, 0)?;
        let shape = self.b.shape(x).clone();
        let axes = match self.integers(node, 1)? {
            Some(axes) => axes
                .iter()
                .map(|a| self.axis(*a, shape.len()))
                .collect::<Lowered<Vec<usize>>>()?,
            None => (0..shape.len()).filter(|a| shape[*a].is_one()).collect(),
        };
        let kept = shape.iter().enumerate().filter(|(i, _)| !axes.contains(i));
        let to = kept.map(|(_, dim)| dim.clone()).collect();
        self.reshape(name, x, to)
    }

    pub(super) fn unsqueeze(&mut self, node: &Node, name: &str) -> Lowered {
        let x = self.data(node, 0)?;
        let axes = self.integers(node, 1)?.unwrap_or_default();
        let shape = self.b.shape(x).clone();
        let rank = shape.len() + axes.len();
        let axes = axes
            .iter()
            .map(|a| self.axis(*a, rank))
            .collect::<Lowered<Vec<usize>>>()?;
        let mut dims = shape.into_iter();
        let to: Option<Shape> = (0..rank)
            .map(|i| if axes.contains(&i) { Some(one()) } else { dims.next() })
            .collect();
        match to {
            Some(to) => self.reshape(name, x, to),
            None => Reason::unsupported(format!("the axes {axes:?} repeat")),
        }
    }

    pub(super) fn expand_node(&mut self, node: &Node, name: &str) -> Lowered {
        let x = self.data(node, 0)?;
        let wanted = match self.parameter(node, 1) {
            Ok(Some(wanted)) => wanted,
            Ok(None) => return Reason::unsupported("its shape is missing"),
            Err(reason) => match node.output(0).and_then(|v| self.inferred_shape(v)) {
                Some(shape) => shape,
                None => return Err(reason),
            },
        };
        let rank = wanted.len().max(self.b.rank(x));
        let x = self.raise(x, rank)?;
        let mut to = self.b.shape(x).clone();
        let skip = rank - wanted.len();
        for (dim, wanted) in to.iter_mut().skip(skip).zip(wanted) {
            // Expand broadcasts both ways: a 1 in the target shape keeps the dim.
            if dim.is_one() {
                *dim = wanted;
            }
        }
        self.expanded(name, x, &to)
    }

    pub(super) fn tile(&mut self, node: &Node, name: &str) -> Lowered {
        let mut x = self.data(node, 0)?;
        let repeats = self.integers(node, 1)?.unwrap_or_default();
        for (axis, n) in repeats.into_iter().enumerate() {
            if n < 1 {
                return Reason::unsupported(format!("{n} repeats of axis {axis}"));
            }
            if n > 1 {
                let parts = vec![x; n as usize];
                x = self
                    .b
                    .add(&format!("{name}/axis{axis}"), LayerKind::Concatenation { axis }, &parts)?;
            }
        }
        Ok(x)
    }

    pub(super) fn concat(&mut self, node: &Node, name: &str, axis: i64) -> Lowered {
        let mut parts = Vec::with_capacity(node.inputs.len());
        for i in 0..node.inputs.len() {
            parts.push(self.data(node, i)?);
        }
        match parts[..] {
            [] => Reason::unsupported("it has no inputs"),
            [only] => Ok(only),
            [first, ..] => {
                let axis = self.axis(axis, self.b.rank(first))?;
                Ok(self.b.add(name, LayerKind::Concatenation { axis }, &parts)?)
            }
        }
    }

    pub(super) fn split(&mut self, node: &Node, name: &str, axis: i64) -> Lowered<()> {
        let x = self.data(node, 0)?;
        let shape = self.b.shape(x).clone();
        let axis = self.axis(axis, shape.len())?;
        let parts = node.outputs.len() as i64;
        let sizes = match (self.integers(node, 1)?, shape[axis].as_const()) {
            (Some(sizes), _) => sizes,
            (None, Some(length)) => {
                // Equal parts, the last one smaller if they do not divide.
                let each = (length + parts - 1) / parts;
                (0..parts).map(|i| each.min(length - i * each)).collect()
            }
            (None, None) => return Reason::unsupported(format!("equal parts of {} are not fixed", shape[axis])),
        };
        let mut start = 0;
        for (i, (size, output)) in sizes.into_iter().zip(&node.outputs).enumerate() {
            if let Some(output) = output {
                let part = self.slice_axis(&format!("{name}/{i}"), x, axis, start, Dim::from(size))?;
                self.define(*output, part);
            }
            start += size;
        }
        Ok(())
    }

    /// `size` elements of one axis.
    pub(super) fn slice_axis(&mut self, name: &str, x: TensorId, axis: usize, from: i64, length: Dim) -> Lowered {
        let mut size = self.b.shape(x).clone();
        if size[axis] == length && from == 0 {
            return Ok(x);
        }
        let mut start = vec![0; size.len()];
        (start[axis], size[axis]) = (from, length);
        let stride = vec![1; size.len()];
        Ok(self.b.add(name, LayerKind::Slice { start, size, stride }, &[x])?)
    }

    pub(super) fn slice(&mut self, node: &Node, name: &str) -> Lowered {
        let x = self.data(node, 0)?;
        let shape = self.b.shape(x).clone();
        let (Some(starts), Some(ends)) = (self.parameter(node, 1)?, self.parameter(node, 2)?) else {
            return Reason::unsupported("its starts or ends are missing");
        };
        let axes = match self.integers(node, 3)? {
            Some(axes) => axes
                .iter()
                .map(|a| self.axis(*a, shape.len()))
                .collect::<Lowered<Vec<usize>>>()?,
            None => (0..starts.len()).collect(),
        };
        let steps = self.integers(node, 4)?.unwrap_or_else(|| vec![1; starts.len()]);
        let (mut start, mut size, mut stride) = (vec![0; shape.len()], shape.clone(), vec![1; shape.len()]);
        for (i, axis) in axes.into_iter().enumerate() {
            let (Some(from), Some(to), Some(step)) = (starts.get(i), ends.get(i), steps.get(i)) else {
                return Reason::unsupported("its starts, ends, axes and steps differ in number");
            };
            let ends = (from.as_const(), to.as_const(), shape[axis].as_const());
            (start[axis], size[axis]) = match ends {
                (Some(from), Some(to), Some(length)) => match slice_range(length as usize, from, to, *step) {
                    Some((first, _, count)) if count > 0 => (first as i64, Dim::from(count)),
                    _ => return Reason::unsupported(format!("nothing is left of axis {axis}")),
                },
                _ => self.symbolic_range(&shape[axis], from, to, *step)?,
            };
            stride[axis] = *step;
        }
        if size == shape && start.iter().all(|s| *s == 0) && stride.iter().all(|s| *s == 1) {
            return Ok(x);
        }
        Ok(self.b.add(name, LayerKind::Slice { start, size, stride }, &[x])?)
    }

    /// Start and count if the dim or the ends contain `tokens`.
    fn symbolic_range(&self, length: &Dim, from: &Dim, to: &Dim, step: i64) -> Lowered<(i64, Dim)> {
        let refuse = || Reason::unsupported(format!("{from}..{to} by {step} of {length} depends on the tokens"));
        let (Some(from), 1) = (from.as_const().filter(|f| *f >= 0), step) else {
            return refuse();
        };
        // Past any length: to the end. Otherwise the end must be the dim itself or below it for every token count.
        let end = match to.as_const() {
            Some(to) if to >= i64::from(i32::MAX) => length.clone(),
            Some(to) if to < 0 => length + &Dim::from(to),
            _ => to.clone(),
        };
        let slack = length - &end;
        let symbols: std::collections::BTreeMap<_, _> = slack.symbols().into_iter().map(|s| (s, 1)).collect();
        match slack.eval(&symbols) {
            Some(slack) if slack >= 0 => Ok((from, &end - &Dim::from(from))),
            _ => refuse(),
        }
    }

    pub(super) fn constant_of_shape(&mut self, node: &Node, name: &str, value: &Tensor) -> Lowered {
        let to = match self.parameter(node, 0) {
            Ok(Some(to)) => to,
            Ok(None) => return Reason::unsupported("its shape is missing"),
            Err(reason) => match node.output(0).and_then(|v| self.inferred_shape(v)) {
                Some(to) => to,
                None => return Err(reason),
            },
        };
        let Some(number) = value.scalar() else {
            return Reason::unsupported("its value is not one number");
        };
        let dtype = super::context::network_dtype(value.dtype());
        let scalar = self.number(dtype, to.len(), number)?;
        match dtype {
            DType::F64 => Reason::unsupported("TensorRT has no f64"),
            _ => self.expanded(name, scalar, &to),
        }
    }
}
