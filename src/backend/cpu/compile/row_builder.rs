//! A row program under construction: virtual registers over broadcast views, then with merged axes and assigned
//! scratch.

use std::collections::{BTreeSet, HashMap};

use super::super::kernels::rows::{CHUNK, Class, MAX_OPERANDS, Op, Operand, Place, Register, RowProgram};
use super::super::strided_view::{BufferId, View};
use crate::network::{Elementwise, TensorId, UnaryOp};

/// A register before scratch is assigned.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Virtual(usize);

/// A placeholder in an operation until [`RowProgramBuilder::build`] assigns registers.
pub(super) const NOWHERE: Register = Register {
    place: Place::Scratch(u16::MAX),
    scalar: false,
};

/// A row program under construction.
pub(super) struct RowProgramBuilder {
    space: Vec<usize>,
    /// Whether some operation needs whole rows, or some register is one value per row.
    whole: bool,
    /// An operand, its strides for each axis of `space`, and whether the program writes it.
    operands: Vec<(View, bool)>,
    /// The location of a register if not in scratch, and whether it is scalar.
    virtuals: Vec<(Option<u16>, bool)>,
    pub(super) ops: Vec<(Op, Vec<Virtual>, Option<Virtual>)>,
    pub(super) registers: HashMap<TensorId, Virtual>,
}

impl RowProgramBuilder {
    /// Axes of size 1 are dropped if rows can be rearranged, so that the last axis is significant.
    pub(super) fn new(space: Vec<usize>, whole: bool) -> RowProgramBuilder {
        RowProgramBuilder {
            space,
            whole,
            operands: Vec::new(),
            virtuals: Vec::new(),
            ops: Vec::new(),
            registers: HashMap::new(),
        }
    }

    /// The stride along the row: that of the last significant axis.
    fn row_stride(&self, view: &View) -> isize {
        let strides = self.strides(view);
        match self.row_axis() {
            Some(axis) => strides[axis],
            None => 1,
        }
    }

    fn row_axis(&self) -> Option<usize> {
        if self.whole {
            self.space.len().checked_sub(1)
        } else {
            (0..self.space.len()).rev().find(|axis| self.space[*axis] != 1)
        }
    }

    /// Strides of a view broadcast to the space. An axis of size 1 at the end of a row counts as contiguous.
    fn strides(&self, view: &View) -> Vec<isize> {
        let mut strides = view.broadcast(&self.space).strides;
        if let Some(axis) = self.row_axis()
            && self.space[axis] == 1
        {
            strides[axis] = 1;
        }
        strides
    }

    fn operand(&mut self, view: &View, written: bool) -> u16 {
        self.operands.push((view.clone(), written));
        (self.operands.len() - 1) as u16
    }

    fn register(&mut self, operand: Option<u16>, scalar: bool) -> Virtual {
        self.virtuals.push((operand, scalar));
        Virtual(self.virtuals.len() - 1)
    }

    pub(super) fn is_scalar(&self, register: Virtual) -> bool {
        self.virtuals[register.0].1
    }

    /// A register for a view: the view's memory if the kernel can read it in place.
    pub(super) fn read(&mut self, view: &View, class: Class) -> Virtual {
        let stride = self.row_stride(view);
        let operand = self.operand(view, false);
        // An element repeated along a whole row, as by an expanding slice, counts as a row for reductions.
        let repeated = match self.row_axis() {
            Some(axis) => self.whole && stride == 0 && view.shape[axis] != 1,
            None => false,
        };
        let scalar = stride == 0 && !repeated;
        let direct = view.storage == class.native() && (stride == 1 || scalar);
        if direct {
            return self.register(Some(operand), scalar);
        }
        let register = self.register(None, scalar);
        let load = Op::Load {
            operand,
            class,
            to: NOWHERE,
        };
        self.ops.push((load, Vec::new(), Some(register)));
        register
    }

    fn writes_in_place(&self, view: &View, class: Class, scalar: bool) -> bool {
        let stride = self.row_stride(view);
        // One value per row is stored where the operand has one value per row; a row of length 1 is both.
        let length_one = self.row_axis().is_none_or(|axis| self.space[axis] == 1);
        view.storage == class.native() && (stride == isize::from(!scalar) || (length_one && stride.abs() <= 1))
    }

    /// The register for a result, in the operand's memory if it is stored and the kernel can write it in place.
    pub(super) fn result(&mut self, class: Class, scalar: bool, to: Option<&View>) -> Virtual {
        match to {
            Some(view) if self.writes_in_place(view, class, scalar) => {
                let operand = self.operand(view, true);
                self.register(Some(operand), scalar)
            }
            _ => self.register(None, scalar),
        }
    }

    pub(super) fn finish_result(&mut self, result: Virtual, class: Class, to: Option<&View>) {
        if let (Some(view), None) = (to, self.virtuals[result.0].0) {
            self.store(result, class, view);
        }
    }

    pub(super) fn store(&mut self, from: Virtual, class: Class, to: &View) {
        let operand = self.operand(to, true);
        let store = Op::Store {
            from: NOWHERE,
            class,
            operand,
        };
        self.ops.push((store, vec![from], None));
    }

    pub(super) fn buffers(&self) -> (Vec<BufferId>, Vec<BufferId>) {
        let of = |written: bool| {
            let buffers = self.operands.iter().filter(|o| o.1 == written).map(|o| o.0.buffer);
            buffers.collect::<BTreeSet<_>>().into_iter().collect()
        };
        (of(false), of(true))
    }

    /// Merges axes and assigns scratch. Also returns the number of operations with an exponential or similar cost.
    pub(super) fn build(self) -> (RowProgram, usize) {
        debug_assert!(self.operands.len() <= MAX_OPERANDS);
        let strides: Vec<Vec<isize>> = self.operands.iter().map(|(view, _)| self.strides(view)).collect();
        let row_axis = self.row_axis();
        // Axes from the innermost: (size, stride of each operand).
        let mut axes: Vec<(usize, Vec<isize>)> = Vec::new();
        for axis in (0..self.space.len()).rev() {
            let own: Vec<isize> = strides.iter().map(|s| s[axis]).collect();
            let is_row = Some(axis) == row_axis;
            if self.space[axis] == 1 && !is_row {
                continue;
            }
            let may_merge = axes.len() > usize::from(self.whole);
            if let Some((size, inner)) = axes.last_mut()
                && may_merge
                && inner.iter().zip(&own).all(|(i, o)| *o == *i * *size as isize)
            {
                *size *= self.space[axis];
                continue;
            }
            axes.push((self.space[axis], own));
        }
        if axes.is_empty() {
            axes.push((1, vec![1; strides.len()]));
        }
        let (length, row) = axes.remove(0);
        axes.reverse();
        let operands = self.operands.iter().enumerate().map(|(i, (view, _))| Operand {
            buffer: view.buffer,
            storage: view.storage,
            offset: view.offset,
            outer: axes.iter().map(|(_, strides)| strides[i]).collect(),
            stride: row[i],
        });
        let operands = operands.collect();

        // Scratch registers are reused after their last reader.
        let mut last_use = vec![0; self.virtuals.len()];
        for (at, (_, arguments, result)) in self.ops.iter().enumerate() {
            for register in arguments.iter().chain(result) {
                last_use[register.0] = at;
            }
        }
        let mut places: Vec<Option<u16>> = vec![None; self.virtuals.len()];
        let mut free: Vec<u16> = Vec::new();
        let mut slots = 0u16;
        let mut ops = Vec::with_capacity(self.ops.len());
        let mut heavy = 0;
        for (at, (op, arguments, result)) in self.ops.iter().enumerate() {
            if let Some(result) = result
                && self.virtuals[result.0].0.is_none()
                && places[result.0].is_none()
            {
                places[result.0] = Some(free.pop().unwrap_or_else(|| {
                    slots += 1;
                    slots - 1
                }));
            }
            let register = |v: &Virtual| {
                let (operand, scalar) = self.virtuals[v.0];
                let place = match (operand, places[v.0]) {
                    (Some(operand), _) => Place::Operand(operand),
                    (None, Some(slot)) => Place::Scratch(slot),
                    (None, None) => unreachable!("a register read before it is written"),
                };
                Register { place, scalar }
            };
            let arguments_placed: Vec<Register> = arguments.iter().map(register).collect();
            ops.push(placed(op, &arguments_placed, result.as_ref().map(register)));
            heavy += usize::from(is_heavy(op));
            let mut used: Vec<usize> = arguments.iter().chain(result).map(|v| v.0).collect();
            used.sort_unstable();
            used.dedup();
            for v in used {
                if last_use[v] == at
                    && let Some(slot) = places[v]
                {
                    free.push(slot);
                }
            }
        }
        let program = RowProgram {
            outer: axes.iter().map(|(size, _)| *size).collect(),
            length,
            chunk: if self.whole { length } else { length.min(CHUNK) },
            operands,
            ops,
            slots: slots as usize,
        };
        (program, heavy)
    }
}

fn is_heavy(op: &Op) -> bool {
    match op {
        Op::Unary { op, .. } => matches!(
            op,
            UnaryOp::Cos | UnaryOp::Sin | UnaryOp::Erf | UnaryOp::Exp | UnaryOp::Log
        ),
        Op::Activation { .. } | Op::Softmax { .. } => true,
        Op::Binary { op, class, .. } => *op == Elementwise::Pow && *class == Class::Float,
        _ => false,
    }
}

/// The operation with its registers.
fn placed(op: &Op, args: &[Register], result: Option<Register>) -> Op {
    let mut op = op.clone();
    let out = result.unwrap_or(NOWHERE);
    match &mut op {
        Op::Load { to, .. } | Op::Iota { to, .. } => *to = out,
        Op::Store { from, .. } => *from = args[0],
        Op::Binary { a, b, to, .. } => (*a, *b, *to) = (args[0], args[1], out),
        Op::Unary { a, to, .. }
        | Op::Activation { a, to, .. }
        | Op::Cast { a, to, .. }
        | Op::Reduce { a, to, .. }
        | Op::Softmax { a, to } => (*a, *to) = (args[0], out),
        Op::Select {
            condition, a, b, to, ..
        } => (*condition, *a, *b, *to) = (args[0], args[1], args[2], out),
        Op::Normalize { a, scale, bias, to, .. } => (*a, *scale, *bias, *to) = (args[0], args[1], args[2], out),
    }
    op
}
