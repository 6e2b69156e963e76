//! Row programs: any chain of elementwise layers, casts and reductions over the last axis, run row by row in cache.
//!
//! The iteration space is `outer` rows of `length` elements. A register holds one value per element of a row, or one
//! scalar per row (the result of a reduction, or an operand broadcast along the row). Registers have one of three
//! classes: f32 for every float dtype, i64 for every integer dtype, u8 for bool. Results do not depend on how rows are
//! shared among threads: sums have a fixed number of partial sums.
//!
//! This module owns the program as data and the loop over its rows; [`frame`] applies the operations to one chunk of a
//! row, which are in [`memory`], [`elementwise`] and [`reductions`].

mod elementwise;
mod frame;
mod integers;
mod loops;
mod memory;
mod reductions;

use frame::Frame;

use super::super::simd::{Isa, Kernel, Simd};
use super::super::strided_view::BufferId;
use crate::network::{Activation, Elementwise, ReduceOp, UnaryOp};
use crate::tensor::DType;

/// Elements of a row processed at once if no operation needs the whole row: registers then stay in the first-level
/// cache.
pub const CHUNK: usize = 1024;

/// Bytes of one element of a scratch register, whatever its class.
pub const SLOT: usize = 8;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Class {
    Float,
    Int,
    Bool,
}

impl Class {
    pub fn of(dtype: DType) -> Class {
        match dtype {
            DType::Bool => Class::Bool,
            dtype if dtype.is_float() => Class::Float,
            _ => Class::Int,
        }
    }
    /// The storage that a register of this class can read and write in place.
    pub fn native(self) -> DType {
        match self {
            Class::Float => DType::F32,
            Class::Int => DType::I64,
            Class::Bool => DType::Bool,
        }
    }
}

/// Memory that a row program reads or writes.
#[derive(Clone, Debug)]
pub struct Operand {
    pub buffer: BufferId,
    pub storage: DType,
    pub offset: isize,
    /// Per axis of [`RowProgram::outer`], in elements.
    pub outer: Vec<isize>,
    /// Along the row; 0 for one value per row.
    pub stride: isize,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Place {
    Scratch(u16),
    /// In the operand's memory: its storage is native to the class and its stride 1 (or 0 for a scalar).
    Operand(u16),
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Register {
    pub place: Place,
    /// One value for the whole row.
    pub scalar: bool,
}

#[derive(Clone, Debug)]
pub enum Op {
    Load {
        operand: u16,
        class: Class,
        to: Register,
    },
    Store {
        from: Register,
        class: Class,
        operand: u16,
    },
    /// `wrap` is the dtype integers wrap around in.
    Binary {
        op: Elementwise,
        class: Class,
        wrap: DType,
        a: Register,
        b: Register,
        to: Register,
    },
    Unary {
        op: UnaryOp,
        class: Class,
        wrap: DType,
        a: Register,
        to: Register,
    },
    Activation {
        op: Activation,
        a: Register,
        to: Register,
    },
    Select {
        class: Class,
        condition: Register,
        a: Register,
        b: Register,
        to: Register,
    },
    /// Between classes, or between integer widths; float to float needs no operation.
    Cast {
        from: Class,
        a: Register,
        class: Class,
        wrap: DType,
        to: Register,
    },
    Reduce {
        op: ReduceOp,
        class: Class,
        wrap: DType,
        a: Register,
        to: Register,
    },
    Softmax {
        a: Register,
        to: Register,
    },
    Normalize {
        epsilon: f32,
        a: Register,
        scale: Register,
        bias: Register,
        to: Register,
    },
    /// `start + step * i`
    Iota {
        class: Class,
        wrap: DType,
        start: f64,
        step: f64,
        to: Register,
    },
}

#[derive(Clone, Debug)]
pub struct RowProgram {
    pub outer: Vec<usize>,
    pub length: usize,
    /// Elements processed at once: `length` if an operation needs the whole row.
    pub chunk: usize,
    pub operands: Vec<Operand>,
    pub ops: Vec<Op>,
    /// Scratch registers in use.
    pub slots: usize,
}

impl RowProgram {
    pub fn rows(&self) -> usize {
        self.outer.iter().product()
    }
    pub fn chunks(&self) -> usize {
        self.length.div_ceil(self.chunk.max(1))
    }
    /// Pieces of work: a chunk of a row each.
    pub fn units(&self) -> usize {
        self.rows() * self.chunks()
    }
    pub fn scratch_bytes(&self) -> usize {
        self.slots * self.slot_bytes()
    }
    fn slot_bytes(&self) -> usize {
        (self.chunk.max(1) * SLOT).next_multiple_of(64)
    }

    /// Runs the program over these units.
    ///
    /// # Safety
    /// `bases` holds the address of every operand's buffer, the operands lie inside, no other thread reads what these units
    /// write or writes what they read, `scratch` has [`RowProgram::scratch_bytes`] bytes of this thread's own, `units` are
    /// below [`RowProgram::units`], and `isa` is available.
    pub unsafe fn run(&self, isa: Isa, bases: &[*mut u8], scratch: *mut u8, units: std::ops::Range<usize>) {
        let kernel = Run {
            program: self,
            bases,
            scratch,
            units,
        };
        // SAFETY: this function's own contract, which is the kernel's.
        unsafe { isa.run(kernel) }
    }
}

struct Run<'a> {
    program: &'a RowProgram,
    bases: &'a [*mut u8],
    scratch: *mut u8,
    units: std::ops::Range<usize>,
}

/// Operands a program may have; the compiler splits longer chains.
pub const MAX_OPERANDS: usize = 64;

impl Kernel for Run<'_> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let program = self.program;
        let chunks = program.chunks();
        let mut rows = [std::ptr::null_mut::<u8>(); MAX_OPERANDS];
        for unit in self.units {
            let (row, chunk) = (unit / chunks, unit % chunks);
            let first = chunk * program.chunk;
            let n = program.chunk.min(program.length - first);
            for (pointer, operand) in rows.iter_mut().zip(&program.operands) {
                let mut index = row;
                let mut at = operand.offset + first as isize * operand.stride;
                for (dim, stride) in program.outer.iter().zip(&operand.outer).rev() {
                    at += (index % dim) as isize * stride;
                    index /= dim;
                }
                let base = self.bases[operand.buffer.0 as usize];
                *pointer = base.wrapping_offset(at * operand.storage.element_bytes() as isize);
            }
            let frame = Frame {
                program,
                rows: &rows,
                scratch: self.scratch,
                slot_bytes: program.slot_bytes(),
                first,
                n,
            };
            for op in &program.ops {
                // SAFETY: `rows` are the addresses of elements `first..first + n` of this row of every operand, by the
                // contract of `RowProgram::run`; `scratch` has `slots` registers of `chunk >= n` elements.
                unsafe { frame.step::<S>(op) }
            }
        }
    }
}
