//! Operators that move elements: shapes of tensors, and elements of small tensors that hold shapes.

use super::elements;
use super::elementwise::spread;
use super::node::{NodeInference, Outputs, one};
use super::{Elements, Fact, InferError, MAX_CONTENTS};
use crate::dim::Dim;
use crate::graph::{Op, Shape};
use crate::tensor::{DType, Tensor};

/// Ends of a slice from here on mean "to the end": no axis is that long.
const FAR: i64 = i32::MAX as i64;

impl NodeInference<'_> {
    /// The rules of [`Family::Movement`](crate::graph::op::Family).
    pub(super) fn movement_rule(&mut self) -> Result<Outputs, InferError> {
        match &self.node.op {
            Op::Shape { start, end } => self.shape(*start, *end),
            Op::Size => self.size(),
            Op::Reshape { allowzero } => self.reshape(*allowzero),
            Op::Transpose { perm } => self.transpose(perm.as_deref()),
            Op::Squeeze => self.squeeze(),
            Op::Unsqueeze => self.unsqueeze(),
            Op::Flatten { axis } => self.flatten(*axis),
            Op::Expand => self.expand(),
            Op::Tile => self.tile(),
            Op::Concat { axis } => self.concat(*axis),
            Op::Split { axis } => self.split(*axis),
            Op::Slice => self.slice(),
            Op::Range => self.range(),
            Op::ConstantOfShape { value } => self.constant_of_shape(value),
            _ => self.no_rule(),
        }
    }

    pub(super) fn shape(&mut self, start: i64, end: Option<i64>) -> Result<Outputs, InferError> {
        let x = self.input(0)?;
        let rank = x.shape.len() as i64;
        let clamp = |i: i64| (if i < 0 { i.saturating_add(rank) } else { i }).clamp(0, rank) as usize;
        let (start, end) = (clamp(start), clamp(end.unwrap_or(rank)));
        let dims = x.shape.get(start..end).unwrap_or_default();
        let elements = dims.iter().cloned().map(Some).collect();
        one(Fact::new(DType::I64, vec![Dim::from(dims.len())]).with(Some(elements)))
    }

    pub(super) fn size(&mut self) -> Result<Outputs, InferError> {
        let size = product(&self.input(0)?.shape);
        one(Fact::new(DType::I64, vec![]).with(Some(vec![Some(size)])))
    }

    /// The content of a shape input: one entry per dim. The number of dims must be known, the dims may be unknown.
    fn target(&self, i: usize) -> Result<Elements, InferError> {
        let target = self.input(i)?;
        let rank = match target.shape.as_slice() {
            [rank] => rank.as_const().and_then(|r| usize::try_from(r).ok()),
            _ => None,
        };
        let rank = rank.filter(|r| *r <= MAX_CONTENTS);
        let rank = rank.ok_or_else(|| self.error(format!("the shape {} has no known length", self.operand(i))))?;
        let known = target.elements.clone().filter(|e| e.len() == rank);
        Ok(known.unwrap_or_else(|| vec![None; rank]))
    }

    pub(super) fn reshape(&mut self, allowzero: bool) -> Result<Outputs, InferError> {
        let x = self.input(0)?.clone();
        let target = self.target(1)?;
        let mut open = None;
        let mut unknown = Vec::new();
        let mut shape = Shape::with_capacity(target.len());
        for (i, element) in target.iter().enumerate() {
            shape.push(match element.as_ref().map(|d| (d, d.as_const())) {
                None => {
                    unknown.push(i);
                    self.fresh(0, i)
                }
                Some((_, Some(-1))) if open.is_none() => {
                    open = Some(i);
                    Dim::constant(1)
                }
                Some((_, Some(0))) if !allowzero => match x.shape.get(i) {
                    Some(dim) => dim.clone(),
                    None => return Err(self.error(format!("its shape copies dimension {i} of {}", self.operand(0)))),
                },
                Some((dim, Some(size))) if size < 0 => {
                    return Err(self.error(format!("it reshapes to {target:?}, where {dim} is not a size")));
                }
                Some((dim, _)) => dim.clone(),
            });
        }
        let volume = product(&x.shape);
        // One unknown dim follows from the volume, whether it is -1 or computed.
        let solve = match (open, unknown.as_slice()) {
            (Some(axis), []) => Some(axis),
            (None, [axis]) => Some(*axis),
            _ => None,
        };
        if let Some(axis) = solve {
            shape[axis] = Dim::constant(1);
            let rest = product(&shape);
            let zero = rest.as_const() == Some(0);
            shape[axis] = match volume.div_exact(&rest) {
                Some(dim) => dim,
                None if !zero && volume.as_const().is_some() && rest.as_const().is_some() => {
                    return Err(self.error(format!("{} does not fit into {target:?}", self.operand(0))));
                }
                None => self.fresh(0, axis),
            };
        } else if unknown.is_empty() {
            let wanted = product(&shape);
            let constant = volume.as_const().is_some() && wanted.as_const().is_some();
            // An equation of products may hold without a unique solution.
            if self.unifier.unify(&volume, &wanted).is_err() && constant {
                return Err(self.error(format!("{} does not fit into {shape:?}", self.operand(0))));
            }
        } else if let Some(axis) = open {
            shape[axis] = self.fresh(0, axis);
        }
        one(Fact::new(x.dtype, shape).with(x.elements))
    }

    pub(super) fn transpose(&mut self, perm: Option<&[usize]>) -> Result<Outputs, InferError> {
        let x = self.input(0)?;
        let rank = x.shape.len();
        let reversed: Vec<usize> = (0..rank).rev().collect();
        let perm = perm.unwrap_or(&reversed);
        if perm.len() != rank || perm.iter().any(|p| *p >= rank) {
            return Err(self.error(format!("perm {perm:?} is not a permutation of {}", self.operand(0))));
        }
        let shape = perm.iter().map(|p| x.shape[*p].clone()).collect();
        // If at most one dim is longer than 1, no element moves.
        let long = x.shape.iter().filter(|d| !d.is_one()).count();
        let elements = x.elements.clone().filter(|_| long <= 1);
        one(Fact::new(x.dtype, shape).with(elements))
    }

    pub(super) fn squeeze(&mut self) -> Result<Outputs, InferError> {
        let x = self.input(0)?.clone();
        let axes = match self.optional(1) {
            Some(_) => {
                let axes = self.required_consts(1, "axes")?;
                self.axes_in(&axes, x.shape.len())?
            }
            None => (0..x.shape.len()).filter(|i| x.shape[*i].is_one()).collect(),
        };
        for axis in &axes {
            let one = Dim::constant(1);
            self.unify(&x.shape[*axis], &one, 0, 0)?;
        }
        let kept = x.shape.iter().enumerate().filter(|(i, _)| !axes.contains(i));
        let shape = kept.map(|(_, d)| d.clone()).collect();
        one(Fact::new(x.dtype, shape).with(x.elements))
    }

    pub(super) fn unsqueeze(&mut self) -> Result<Outputs, InferError> {
        let x = self.input(0)?.clone();
        let axes = self.required_consts(1, "axes")?;
        let axes = self.axes_in(&axes, x.shape.len() + axes.len())?;
        let mut shape = x.shape;
        for axis in axes {
            shape.insert(axis, Dim::constant(1));
        }
        one(Fact::new(x.dtype, shape).with(x.elements))
    }

    pub(super) fn flatten(&mut self, axis: i64) -> Result<Outputs, InferError> {
        let x = self.input(0)?;
        let rank = x.shape.len();
        // The axis may be the rank itself.
        let axis = if axis == rank as i64 {
            rank
        } else {
            self.axis_of(0, axis)?
        };
        let shape = vec![product(&x.shape[..axis]), product(&x.shape[axis..])];
        one(Fact::new(x.dtype, shape).with(x.elements.clone()))
    }

    pub(super) fn expand(&mut self) -> Result<Outputs, InferError> {
        let x = self.input(0)?.clone();
        let target = self.target(1)?;
        let rank = x.shape.len().max(target.len());
        let mut shape = Shape::with_capacity(rank);
        for i in 0..rank {
            let from = (i + x.shape.len()).checked_sub(rank).map(|i| x.shape[i].clone());
            let to = (i + target.len()).checked_sub(rank).map(|i| target[i].clone());
            shape.push(match (from, to) {
                (Some(dim), None) => dim,
                (Some(dim), Some(Some(wanted))) => self.broadcast_dim(&dim, &wanted, 0, 1)?,
                (None, Some(Some(wanted))) => wanted,
                // An unknown target can only be 1 or the dim, unless the dim is 1.
                (Some(dim), Some(None)) if dim.as_const().is_some_and(|d| d != 1) => dim,
                (_, Some(None)) => self.fresh(0, i),
                (None, None) => unreachable!("rank is the greater of the two"),
            });
        }
        let elements = spread(&x, &shape);
        one(Fact::new(x.dtype, shape).with(elements))
    }

    pub(super) fn tile(&mut self) -> Result<Outputs, InferError> {
        let x = self.input(0)?.clone();
        let repeats = self.target(1)?;
        if repeats.len() != x.shape.len() {
            return Err(self.error(format!("{} repeats for {}", repeats.len(), self.operand(0))));
        }
        let dims = x.shape.iter().zip(&repeats).enumerate();
        let shape: Shape = dims
            .map(|(i, (dim, repeat))| match repeat {
                Some(repeat) => dim * repeat,
                None => self.fresh(0, i),
            })
            .collect();
        let elements = match (&x.elements, elements::volume(&shape)) {
            (Some(e), Some(volume)) if x.shape.len() == 1 && !e.is_empty() => {
                Some(elements::pick(e, (0..volume).map(|i| i % e.len())))
            }
            _ => None,
        };
        one(Fact::new(x.dtype, shape).with(elements))
    }

    pub(super) fn concat(&mut self, axis: i64) -> Result<Outputs, InferError> {
        let first = self.input(0)?.clone();
        let axis = self.axis_of(0, axis)?;
        let mut shape = first.shape.clone();
        let mut elements = Some(Elements::new());
        for i in 0..self.inputs.len() {
            let part = self.input(i)?.clone();
            if part.shape.len() != shape.len() {
                let (left, right) = (self.operand(0), self.operand(i));
                return Err(self.error(format!("{left} and {right} have different ranks")));
            }
            for (k, dim) in part.shape.iter().enumerate().filter(|(k, _)| *k != axis) {
                shape[k] = self.unify(&shape[k].clone(), dim, 0, i)?;
            }
            if i > 0 {
                shape[axis] = &shape[axis] + &part.shape[axis];
            }
            // Along axis 0 the elements of the parts are concatenated.
            elements = match (elements, elements::volume(&part.shape)) {
                (Some(mut all), Some(volume)) if axis == 0 && all.len() + volume <= MAX_CONTENTS => {
                    all.extend(part.elements.unwrap_or_else(|| vec![None; volume]));
                    Some(all)
                }
                _ => None,
            };
        }
        one(Fact::new(first.dtype, shape).with(elements))
    }

    pub(super) fn split(&mut self, axis: i64) -> Result<Outputs, InferError> {
        let x = self.input(0)?.clone();
        let axis = self.axis_of(0, axis)?;
        let count = self.node.outputs.len();
        let sizes: Vec<Dim> = match self.optional(1) {
            Some(_) => {
                let sizes = self.target(1)?;
                if sizes.len() != count {
                    return Err(self.error(format!("{} sizes for {count} outputs", sizes.len())));
                }
                let size = |(i, size): (usize, Option<Dim>)| size.unwrap_or_else(|| self.fresh(i, axis));
                sizes.into_iter().enumerate().map(size).collect()
            }
            None => self.equal_parts(&x.shape[axis], count, axis),
        };
        if self.optional(1).is_some() {
            let total = sizes.iter().fold(Dim::default(), |sum, d| &sum + d);
            self.unify(&x.shape[axis], &total, 0, 1)?;
        }
        let mut start = Some(0usize);
        let mut outputs = Outputs::new();
        for size in sizes {
            let mut shape = x.shape.clone();
            let length = size.as_const().and_then(|s| usize::try_from(s).ok());
            shape[axis] = size;
            let elements = match (&x.elements, start, length) {
                (Some(e), Some(start), Some(length)) if x.shape.len() == 1 && length <= MAX_CONTENTS => {
                    Some(elements::pick(e, start..start.saturating_add(length)))
                }
                _ => None,
            };
            start = start.and_then(|s| s.checked_add(length?));
            outputs.push(Some(Fact::new(x.dtype, shape).with(elements)));
        }
        Ok(outputs)
    }

    /// Equal parts; the last one is smaller if the number does not divide the length.
    fn equal_parts(&self, dim: &Dim, count: usize, axis: usize) -> Vec<Dim> {
        if let Some(part) = dim.div_exact(&Dim::from(count)) {
            return vec![part; count];
        }
        match dim.as_const() {
            Some(length) if count > 0 => {
                let part = (length as u64).div_ceil(count as u64) as i64;
                let size = |i: usize| (length - part * i as i64).clamp(0, part);
                (0..count).map(|i| Dim::constant(size(i))).collect()
            }
            _ => (0..count).map(|i| self.fresh(i, axis)).collect(),
        }
    }

    pub(super) fn slice(&mut self) -> Result<Outputs, InferError> {
        let x = self.input(0)?.clone();
        let rank = x.shape.len();
        let (starts, ends) = (self.target(1)?, self.target(2)?);
        let axes = match self.optional(3) {
            Some(_) => self.required_consts(3, "axes")?,
            None => (0..starts.len() as i64).collect(),
        };
        let steps = match self.optional(4) {
            Some(_) => self.required_consts(4, "steps")?,
            None => vec![1; axes.len()],
        };
        let count = axes.len();
        if starts.len() != count || ends.len() != count || steps.len() != count || steps.contains(&0) {
            return Err(self.error("its starts, ends, axes and steps do not match"));
        }
        self.axes_in(&axes, rank)?;
        let mut shape = x.shape.clone();
        for (k, axis) in axes.iter().enumerate() {
            let axis = self.axis_in(*axis, rank)?;
            let length = match (&starts[k], &ends[k]) {
                (Some(start), Some(end)) => slice_length(&x.shape[axis], start, end, steps[k]),
                _ => None,
            };
            shape[axis] = length.unwrap_or_else(|| self.fresh(0, axis));
        }
        let elements = || -> Option<Elements> {
            let e = x.elements.as_ref().filter(|_| rank == 1)?;
            let length = shape[0].as_const()?;
            let first = starts[0].as_ref()?.as_const()?;
            let size = e.len() as i64;
            let first = if first < 0 { first.saturating_add(size) } else { first };
            let first = if steps[0] < 0 {
                first.clamp(0, size - 1)
            } else {
                first.clamp(0, size)
            };
            let at = |i: i64| usize::try_from(first + i * steps[0]).unwrap_or(usize::MAX);
            Some(elements::pick(e, (0..length).map(at)))
        };
        let elements = if axes.is_empty() {
            x.elements.clone()
        } else {
            elements()
        };
        one(Fact::new(x.dtype, shape).with(elements))
    }

    pub(super) fn range(&mut self) -> Result<Outputs, InferError> {
        let start = self.input(0)?;
        let (limit, step) = (self.input(1)?, self.input(2)?);
        let length = || -> Option<Dim> {
            let (limit, step) = (limit.single()?, step.single()?);
            let span = limit - start.single()?;
            match (span.as_const(), step.as_const()) {
                (_, Some(0)) => None,
                (Some(span), Some(step)) => {
                    let steps = (i128::from(span) + i128::from(step) - i128::from(step.signum())) / i128::from(step);
                    Some(Dim::constant(i64::try_from(steps.max(0)).ok()?))
                }
                _ => span.div_exact(step),
            }
        };
        let length = length();
        let elements = || -> Option<Elements> {
            let n = length.as_ref()?.as_const().filter(|n| *n <= MAX_CONTENTS as i64)?;
            let (start, step) = (start.single()?, step.single()?);
            Some((0..n).map(|i| Some(start + &(step * &Dim::constant(i)))).collect())
        };
        let elements = elements();
        let dtype = start.dtype;
        let length = length.unwrap_or_else(|| self.fresh(0, 0));
        one(Fact::new(dtype, vec![length]).with(elements))
    }

    pub(super) fn constant_of_shape(&mut self, value: &Tensor) -> Result<Outputs, InferError> {
        let target = self.target(0)?;
        let dim = |(i, d): (usize, Option<Dim>)| d.unwrap_or_else(|| self.fresh(0, i));
        let shape: Shape = target.into_iter().enumerate().map(dim).collect();
        let element = elements::of_constant(&value.clone().into()).and_then(|e| e.into_iter().next());
        let elements = elements::volume(&shape).zip(element).map(|(n, e)| vec![e; n]);
        one(Fact::new(value.dtype(), shape).with(elements))
    }
}

fn product(dims: &[Dim]) -> Dim {
    dims.iter().fold(Dim::constant(1), |product, d| &product * d)
}

/// The length of `start..end` by `step` on an axis of length `dim`, with ONNX's clamping. A symbolic bound that cannot
/// be compared with the length is assumed to be within it: exporters that slice tables by a length rely on that.
fn slice_length(dim: &Dim, start: &Dim, end: &Dim, step: i64) -> Option<Dim> {
    if step < 0 {
        return reversed_length(dim, start, end, step);
    }
    let span = &clamp(dim, end)? - &clamp(dim, start)?;
    if let Some(span) = span.as_const() {
        let span = u64::try_from(span).unwrap_or(0);
        return Some(Dim::constant(span.div_ceil(step as u64) as i64));
    }
    if step == 1 {
        Some(span)
    } else {
        span.div_exact(&Dim::constant(step))
    }
}

fn reversed_length(dim: &Dim, start: &Dim, end: &Dim, step: i64) -> Option<Dim> {
    let (start, end) = (start.as_const()?, end.as_const()?);
    if step == -1 && (start == -1 || start >= FAR) && end <= -FAR {
        return Some(dim.clone());
    }
    let size = dim.as_const()?;
    let from_front = |i: i64| if i < 0 { i.saturating_add(size) } else { i };
    let (first, last) = (
        from_front(start).clamp(-1, size - 1),
        from_front(end).clamp(-1, size - 1),
    );
    let span = u64::try_from(first - last).unwrap_or(0);
    Some(Dim::constant(span.div_ceil(step.unsigned_abs()) as i64))
}

/// A bound of a slice, counted from the front and within the axis.
fn clamp(dim: &Dim, bound: &Dim) -> Option<Dim> {
    match (bound.as_const(), dim.as_const()) {
        (Some(b), _) if b >= FAR => Some(dim.clone()),
        (Some(b), _) if b <= -FAR => Some(Dim::default()),
        (Some(b), Some(d)) => Some(Dim::constant((if b < 0 { b + d } else { b }).clamp(0, d))),
        (Some(0), None) => Some(Dim::default()),
        (Some(b), None) if b < 0 => Some(dim + bound),
        // The minimum of a number and a length.
        (Some(b), None) => dim.lower_bound().filter(|low| *low >= b).map(|_| bound.clone()),
        (None, _) => Some(match (bound.upper_bound(), (bound - dim).lower_bound()) {
            (Some(high), _) if high < 0 => dim + bound,
            (_, Some(low)) if low >= 0 => dim.clone(),
            _ => bound.clone(),
        }),
    }
}
