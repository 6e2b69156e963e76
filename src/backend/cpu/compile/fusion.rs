//! Which layers run together as one row program, and the operation that each becomes.
//!
//! A group is grown backwards from the layer whose result is needed: a producer joins if it was not computed yet and
//! iterates over the same rows. Results with other readers are stored. The layers of an RMSNorm, SiLU times the up
//! projection, a residual sum with the norm that follows, a mask from comparisons: each becomes one step.

use std::collections::BTreeSet;

use super::super::error::CpuError;
use super::super::kernels::rows::{Class, Op};
use super::super::program::Work;
use super::super::strided_view::View;
use super::row_builder::{NOWHERE, RowProgramBuilder, Virtual};
use super::{Compiler, per_item};
use crate::network::{LayerKind, RowLayer, UnaryOp};

/// Nanoseconds per element of a simple operation, of one with an exponential, and per operation of a row.
const SIMPLE: f64 = 0.04;
const HEAVY: f64 = 0.5;
const PER_OP: f64 = 8.0;

/// Maximum number of layers in a group, to limit operands and registers.
const MAX_LAYERS: usize = 16;

impl Compiler<'_> {
    /// Whether a layer's work waits until its output is needed.
    pub(super) fn is_lazy(&self, index: usize) -> bool {
        self.is_row_layer(index)
            || matches!(
                self.network.layers[index].kind,
                LayerKind::Weight(_) | LayerKind::Constant(_) | LayerKind::Shuffle { .. } | LayerKind::Slice { .. }
            )
    }

    /// Whether a layer can be part of a row program.
    pub(super) fn is_row_layer(&self, index: usize) -> bool {
        let layer = &self.network.layers[index];
        let last = |axis: usize| axis + 1 == self.shapes[layer.inputs[0].0 as usize].len();
        match layer.kind.row_layer() {
            RowLayer::Elements => true,
            RowLayer::Along(axis) => last(axis),
            RowLayer::No => false,
        }
    }

    fn needs_whole_row(kind: &LayerKind) -> bool {
        matches!(
            kind,
            LayerKind::Reduce { .. } | LayerKind::Softmax { .. } | LayerKind::Normalization { .. }
        )
    }

    /// The shape a row layer iterates over.
    fn iterates(&self, index: usize) -> &[usize] {
        let layer = &self.network.layers[index];
        let id = match layer.kind {
            LayerKind::Reduce { .. } => layer.inputs[0],
            _ => layer.outputs[0],
        };
        &self.shapes[id.0 as usize]
    }

    /// Whether a layer of this iteration shape may join a group over `space`: the same rows, or one value for each.
    fn joins(space: &[usize], shape: &[usize]) -> bool {
        if shape == space {
            return true;
        }
        match (space.split_last(), shape.split_last()) {
            (Some((_, rows)), Some((last, own))) => *last == 1 && rows == own,
            _ => false,
        }
    }

    fn collect(&self, root: usize) -> BTreeSet<usize> {
        let space = self.iterates(root).to_vec();
        let mut group = BTreeSet::from([root]);
        let mut frontier = vec![root];
        while let Some(layer) = frontier.pop() {
            for input in &self.network.layers[layer].inputs {
                if self.views[input.0 as usize].is_some() || group.len() == MAX_LAYERS {
                    continue;
                }
                if let Some(producer) = self.producer[input.0 as usize]
                    && self.is_row_layer(producer)
                    && Self::joins(&space, self.iterates(producer))
                    && group.insert(producer)
                {
                    frontier.push(producer);
                }
            }
        }
        group
    }

    /// Emits a row layer together with those it can be fused with.
    pub(super) fn emit_group(&mut self, root: usize) -> Result<(), CpuError> {
        let network = self.network;
        // A cast between floats changes nothing in memory: if its input is available, its output is too.
        if let LayerKind::Cast { to } = &network.layers[root].kind {
            let (input, output) = (network.layers[root].inputs[0], network.layers[root].outputs[0]);
            let floats = to.is_float() && network.tensor(input).dtype.is_float();
            if let (true, Some(view)) = (floats, &self.views[input.0 as usize]) {
                let view = view.clone();
                self.set(output, view);
                return Ok(());
            }
        }
        // Computing the group's inputs may compute some of the group: grow it again until nothing is missing.
        let group = loop {
            let group = self.collect(root);
            let missing = group
                .iter()
                .flat_map(|layer| &network.layers[*layer].inputs)
                .find(|input| {
                    let inside = self.producer[input.0 as usize].is_some_and(|p| group.contains(&p));
                    !inside && self.views[input.0 as usize].is_none()
                })
                .copied();
            match missing {
                Some(input) => {
                    self.demand(input)?;
                }
                None => break group,
            }
        };
        if self.views[network.layers[root].outputs[0].0 as usize].is_some() {
            return Ok(());
        }
        let space = self.iterates(root).to_vec();
        let whole = group.iter().any(|layer| {
            Self::needs_whole_row(&network.layers[*layer].kind) || self.iterates(*layer) != space.as_slice()
        });
        let mut builder = RowProgramBuilder::new(space, whole);
        for index in &group {
            let layer = &network.layers[*index];
            let mut arguments = Vec::with_capacity(layer.inputs.len());
            for input in &layer.inputs {
                let register = match builder.registers.get(input) {
                    Some(register) => *register,
                    None => {
                        let view = self.views[input.0 as usize].clone().expect("demanded above");
                        let register = builder.read(&view, self.class(*input));
                        builder.registers.insert(*input, register);
                        register
                    }
                };
                arguments.push(register);
            }
            let output = layer.outputs[0];
            let needed = *index == root
                || self.output_of.contains_key(&output)
                || self.consumers[output.0 as usize].iter().any(|c| !group.contains(c));
            let to = needed.then(|| self.allocate(output));
            self.translate(&mut builder, *index, &arguments, to);
        }
        let name = network.layers[root].name.clone();
        self.push_rows(builder, &name);
        Ok(())
    }

    /// Adds one layer's operation to a row program; stores its result in `to` if given.
    fn translate(&self, builder: &mut RowProgramBuilder, index: usize, arguments: &[Virtual], to: Option<View>) {
        let network = self.network;
        let layer = &network.layers[index];
        let output = layer.outputs[0];
        let dtype = network.tensor(output).dtype;
        let class = self.class(output);
        let scalar = match &layer.kind {
            LayerKind::Reduce { .. } => true,
            LayerKind::Fill { .. } => false,
            // A row of one element next to longer ones is one value per row.
            LayerKind::Softmax { .. } | LayerKind::Normalization { .. } => builder.is_scalar(arguments[0]),
            _ => arguments.iter().all(|a| builder.is_scalar(*a)),
        };
        if let LayerKind::Cast { .. } = &layer.kind
            && class == Class::Float
            && self.class(layer.inputs[0]) == Class::Float
        {
            builder.registers.insert(output, arguments[0]);
            if let Some(view) = &to {
                builder.store(arguments[0], class, view);
            }
            return;
        }
        let result = builder.result(class, scalar, to.as_ref());
        let op = match &layer.kind {
            LayerKind::Elementwise(op) => Op::Binary {
                op: *op,
                class: self.class(layer.inputs[0]),
                wrap: network.tensor(layer.inputs[0]).dtype,
                a: NOWHERE,
                b: NOWHERE,
                to: NOWHERE,
            },
            LayerKind::Unary(op) => Op::Unary {
                op: *op,
                class: match op {
                    UnaryOp::IsNan => Class::Float,
                    _ => class,
                },
                wrap: dtype,
                a: NOWHERE,
                to: NOWHERE,
            },
            LayerKind::Activation(op) => Op::Activation {
                op: *op,
                a: NOWHERE,
                to: NOWHERE,
            },
            LayerKind::Select => Op::Select {
                class,
                condition: NOWHERE,
                a: NOWHERE,
                b: NOWHERE,
                to: NOWHERE,
            },
            LayerKind::Cast { to } => Op::Cast {
                from: self.class(layer.inputs[0]),
                a: NOWHERE,
                class,
                wrap: *to,
                to: NOWHERE,
            },
            LayerKind::Reduce { op, .. } => Op::Reduce {
                op: *op,
                class,
                wrap: dtype,
                a: NOWHERE,
                to: NOWHERE,
            },
            LayerKind::Softmax { .. } => Op::Softmax {
                a: NOWHERE,
                to: NOWHERE,
            },
            LayerKind::Normalization { epsilon, .. } => Op::Normalize {
                epsilon: *epsilon,
                a: NOWHERE,
                scale: NOWHERE,
                bias: NOWHERE,
                to: NOWHERE,
            },
            LayerKind::Fill { start, step, .. } => Op::Iota {
                class,
                wrap: dtype,
                start: *start,
                step: *step,
                to: NOWHERE,
            },
            other => unreachable!("{other:?} is not a row layer"),
        };
        builder.ops.push((op, arguments.to_vec(), Some(result)));
        builder.registers.insert(output, result);
        builder.finish_result(result, class, to.as_ref());
    }

    /// A reduction, softmax or normalization over axes other than the last: the same program over permuted views.
    pub(super) fn across_axes(&mut self, index: usize) -> Result<(), CpuError> {
        let network = self.network;
        let layer = &network.layers[index];
        let name = layer.name.clone();
        let output = layer.outputs[0];
        let axes = match &layer.kind {
            LayerKind::Reduce { axes, .. } | LayerKind::Normalization { axes, .. } => axes.clone(),
            LayerKind::Softmax { axis } => vec![*axis],
            other => unreachable!("{other:?} has no axes"),
        };
        let views = layer
            .inputs
            .iter()
            .map(|i| self.demand(*i))
            .collect::<Result<Vec<_>, _>>()?;
        let rank = views[0].shape.len();
        let kept: Vec<usize> = (0..rank).filter(|a| !axes.contains(a)).collect();
        let perm: Vec<usize> = kept
            .iter()
            .copied()
            .chain((0..rank).filter(|a| axes.contains(a)))
            .collect();
        // Kept axes first, then all the others as one.
        let mut joined = Vec::new();
        for view in views {
            let view = view.permuted(&perm);
            let mut shape: Vec<usize> = view.shape[..kept.len()].to_vec();
            shape.push(view.shape[kept.len()..].iter().product());
            joined.push(match view.reshaped(&shape) {
                Some(view) => view,
                None => self.densify(&view, false, &name).reshaped(&shape).expect("dense"),
            });
        }
        let space = joined[0].shape.clone();
        let class = self.class(output);
        let mut builder = RowProgramBuilder::new(space.clone(), true);
        let arguments: Vec<Virtual> = joined.iter().map(|view| builder.read(view, class)).collect();
        let target = if matches!(layer.kind, LayerKind::Reduce { .. }) {
            let mut shape = space.clone();
            *shape.last_mut().expect("at least one axis") = 1;
            self.allocate(output).reshaped(&shape).expect("dense")
        } else {
            let storage = super::super::bindings::bound_dtype(network.tensor(output).dtype);
            let target = self.arena(storage, space);
            let permuted: Vec<usize> = perm.iter().map(|p| self.shapes[output.0 as usize][*p]).collect();
            let view = target
                .reshaped(&permuted)
                .expect("dense")
                .permuted(&super::inverse(&perm));
            self.set(output, view);
            target
        };
        self.translate(&mut builder, index, &arguments, Some(target));
        self.push_rows(builder, &name);
        Ok(())
    }

    /// A step that copies `from` to `to`, of equal shapes, converting storage.
    pub(super) fn copy(&mut self, from: &View, to: &View, layer: &str) {
        let class = Class::of(from.storage);
        let mut builder = RowProgramBuilder::new(to.shape.clone(), false);
        let register = builder.read(from, class);
        builder.store(register, class, to);
        self.push_rows(builder, layer);
    }

    fn push_rows(&mut self, builder: RowProgramBuilder, layer: &str) {
        let (reads, writes) = builder.buffers();
        let (program, heavy) = builder.build();
        let units = program.units();
        if units == 0 || program.length == 0 {
            return;
        }
        let ops = program.ops.len() as f64;
        let elements = program.chunk.min(program.length) as f64;
        let one = ops * (PER_OP + elements * SIMPLE) + heavy as f64 * elements * HEAVY;
        let per_item = per_item(units, one);
        self.push(
            layer,
            Work::Rows { program, per_item },
            units.div_ceil(per_item),
            one * units as f64,
            reads,
            writes,
        );
    }
}
