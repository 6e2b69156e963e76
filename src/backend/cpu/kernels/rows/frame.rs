//! One chunk of one row: its registers, and the loop of each operation.
//!
//! Arithmetic of integers and bools (masks, positions) is out of line: it is compiled once, for the compile target's
//! baseline, instead of for each instruction set. Its share of the run time is negligible, but it was a quarter of the
//! code.

use super::integers::wrapped;
use super::loops::map;
use super::{Class, MAX_OPERANDS, Op, Place, Register, RowProgram};
use crate::backend::cpu::simd::Simd;

/// The execution of one chunk of a row.
///
/// Its methods are unsafe because they trust the frame's pointers. For all of them, `rows` holds the address of element
/// `first` of the row for each operand, with `n` elements from there on by the operand's stride, and `scratch` has
/// `slot_bytes` bytes for each register of the program, enough for `n` elements of any class. The registers are the
/// program's own, of the classes that the operation requires.
pub(super) struct Frame<'a> {
    pub(super) program: &'a RowProgram,
    pub(super) rows: &'a [*mut u8; MAX_OPERANDS],
    pub(super) scratch: *mut u8,
    pub(super) slot_bytes: usize,
    pub(super) first: usize,
    pub(super) n: usize,
}

impl Frame<'_> {
    #[inline(always)]
    pub(super) fn at<T>(&self, register: Register) -> *mut T {
        match register.place {
            Place::Scratch(slot) => self.scratch.wrapping_add(slot as usize * self.slot_bytes).cast(),
            Place::Operand(operand) => self.rows[operand as usize].cast(),
        }
    }
    /// Elements that an operation with this result computes.
    #[inline(always)]
    pub(super) fn count(&self, to: Register) -> usize {
        if to.scalar { 1 } else { self.n }
    }
    #[inline(always)]
    pub(super) fn arg<T>(&self, register: Register) -> (*const T, bool) {
        (self.at::<T>(register).cast_const(), register.scalar)
    }

    /// One operation over the chunk.
    ///
    /// # Safety
    /// See [`Frame`]; `S` is available.
    #[inline(always)]
    pub(super) unsafe fn step<S: Simd>(&self, op: &Op) {
        // SAFETY: every operation's registers and operands are those that the compiler gave it, of its classes; a register
        // has `n` elements, or one if it is scalar, which `count` and `arg` respect. `Iota`'s result is never scalar.
        unsafe {
            match op {
                Op::Load { operand, class, to } => self.load(*operand, *class, *to),
                Op::Store { from, class, operand } => self.store(*from, *class, *operand),
                Op::Binary {
                    op,
                    class,
                    wrap,
                    a,
                    b,
                    to,
                } => match class {
                    Class::Float => self.binary_float(*op, *a, *b, *to),
                    Class::Int => self.binary_int(*op, *wrap, *a, *b, *to),
                    Class::Bool => self.binary_bool(*op, *a, *b, *to),
                },
                Op::Unary { op, class, wrap, a, to } => match class {
                    Class::Float => self.unary_float::<S>(*op, *a, *to),
                    Class::Int => self.unary_int(*op, *wrap, *a, *to),
                    Class::Bool => map(self.count(*to), self.at::<u8>(*a), self.at::<u8>(*to), |x| {
                        u8::from(x == 0)
                    }),
                },
                Op::Activation { op, a, to } => self.activation::<S>(*op, *a, *to),
                Op::Select {
                    class,
                    condition,
                    a,
                    b,
                    to,
                } => match class {
                    Class::Float => self.select::<f32>(*condition, *a, *b, *to),
                    Class::Int => self.select::<i64>(*condition, *a, *b, *to),
                    Class::Bool => self.select::<u8>(*condition, *a, *b, *to),
                },
                Op::Cast {
                    from,
                    a,
                    class,
                    wrap,
                    to,
                } => self.cast(*from, *a, *class, *wrap, *to),
                Op::Reduce { op, class, wrap, a, to } => match class {
                    Class::Float => self.reduce_float(*op, *a, *to),
                    _ => self.reduce_int(*op, *wrap, *a, *to),
                },
                Op::Softmax { a, to } => self.softmax::<S>(*a, *to),
                Op::Normalize {
                    epsilon,
                    a,
                    scale,
                    bias,
                    to,
                } => self.normalize(*epsilon, *a, *scale, *bias, *to),
                Op::Iota {
                    class,
                    wrap,
                    start,
                    step,
                    to,
                } => match class {
                    Class::Float => {
                        let to = self.at::<f32>(*to);
                        for i in 0..self.n {
                            let value = start + step * (self.first + i) as f64;
                            to.add(i).write_unaligned(value as f32);
                        }
                    }
                    _ => {
                        let to = self.at::<i64>(*to);
                        for i in 0..self.n {
                            let value = start + step * (self.first + i) as f64;
                            to.add(i).write_unaligned(wrapped(value as i64, *wrap));
                        }
                    }
                },
            }
        }
    }
}
