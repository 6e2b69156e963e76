//! Row programs: any chain of elementwise layers, casts and reductions over the last axis, run row by row in cache.
//!
//! The iteration space is `outer` rows of `length` elements. A register holds one value per element of a row, or one
//! scalar per row (the result of a reduction, or an operand broadcast along the row). Registers have one of three
//! classes: f32 for every float dtype, i64 for every integer dtype, u8 for bool. Results do not depend on how rows are
//! shared among threads: sums have a fixed number of partial sums.

use super::super::simd::{Isa, Kernel, Simd};
use super::super::view::BufferId;
use super::math;
use crate::network::{Activation, Elementwise, ReduceOp, UnaryOp};
use crate::tensor::DType;

/// Elements of a row handled at once where no operation needs the whole row: registers then stay in the first-level
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
            DType::F16 | DType::Bf16 | DType::F32 | DType::F64 => Class::Float,
            DType::I8 | DType::U8 | DType::I32 | DType::I64 => Class::Int,
            DType::Bool => Class::Bool,
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
    /// In the operand's own memory: its storage is native to the class and its stride 1 (or 0 for a scalar).
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
    /// Elements handled at once: `length` if an operation needs the whole row.
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

    /// # Safety
    /// `bases` holds the address of every operand's buffer, the operands lie inside, no other thread writes what is
    /// read, and `scratch` has [`RowProgram::scratch_bytes`] bytes.
    pub unsafe fn run(&self, isa: Isa, bases: &[*mut u8], scratch: *mut u8, units: std::ops::Range<usize>) {
        let kernel = Run {
            program: self,
            bases,
            scratch,
            units,
        };
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
                *pointer = base.wrapping_offset(at * operand.storage.size() as isize);
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
                unsafe { frame.step::<S>(op) }
            }
        }
    }
}

struct Frame<'a> {
    program: &'a RowProgram,
    rows: &'a [*mut u8; MAX_OPERANDS],
    scratch: *mut u8,
    slot_bytes: usize,
    first: usize,
    n: usize,
}

/// `to[i] = f(a[i])`
#[inline(always)]
unsafe fn map<A: Copy, T>(n: usize, a: *const A, to: *mut T, f: impl Fn(A) -> T) {
    for i in 0..n {
        unsafe { to.add(i).write_unaligned(f(a.add(i).read_unaligned())) }
    }
}

/// `to[i] = f(a[i], b[i])`, where either may be one value.
#[inline(always)]
unsafe fn zip<A: Copy, T>(n: usize, a: (*const A, bool), b: (*const A, bool), to: *mut T, f: impl Fn(A, A) -> T) {
    unsafe {
        match (a.1, b.1) {
            (false, false) => {
                for i in 0..n {
                    to.add(i)
                        .write_unaligned(f(a.0.add(i).read_unaligned(), b.0.add(i).read_unaligned()));
                }
            }
            (false, true) => {
                let y = b.0.read_unaligned();
                map(n, a.0, to, |x| f(x, y));
            }
            (true, _) => {
                let x = a.0.read_unaligned();
                // Both scalar: the result is one value too, and n is 1.
                map(n, b.0, to, |y| f(x, y));
            }
        }
    }
}

/// Folds a row with a fixed number of partial results, combined in a fixed order.
#[inline(always)]
unsafe fn fold(n: usize, a: *const f32, start: f32, f: impl Fn(f32, f32) -> f32) -> f32 {
    unsafe { fold_map(n, a, start, f, |x| x) }
}

/// [`fold`] of `g(a[i])`.
#[inline(always)]
unsafe fn fold_map(n: usize, a: *const f32, start: f32, f: impl Fn(f32, f32) -> f32, g: impl Fn(f32) -> f32) -> f32 {
    const PARTS: usize = 32;
    let mut parts = [start; PARTS];
    let whole = n / PARTS;
    for i in 0..whole {
        for (j, part) in parts.iter_mut().enumerate() {
            *part = f(*part, g(unsafe { a.add(i * PARTS + j).read_unaligned() }));
        }
    }
    for (j, part) in parts.iter_mut().enumerate().take(n % PARTS) {
        *part = f(*part, g(unsafe { a.add(whole * PARTS + j).read_unaligned() }));
    }
    let mut width = PARTS;
    while width > 1 {
        width /= 2;
        for j in 0..width {
            parts[j] = f(parts[j], parts[j + width]);
        }
    }
    parts[0]
}

/// The larger; NaN if either is, as IEEE 754-2019 `maximum`.
#[inline(always)]
fn maximum(a: f32, b: f32) -> f32 {
    if a > b || a.is_nan() { a } else { b }
}
#[inline(always)]
fn minimum(a: f32, b: f32) -> f32 {
    if a < b || a.is_nan() { a } else { b }
}

/// The integer as `dtype` would hold it.
#[inline(always)]
fn wrapped(x: i64, dtype: DType) -> i64 {
    match dtype {
        DType::I32 => i64::from(x as i32),
        DType::I8 => i64::from(x as i8),
        DType::U8 => i64::from(x as u8),
        _ => x,
    }
}

impl Frame<'_> {
    #[inline(always)]
    fn at<T>(&self, register: Register) -> *mut T {
        match register.place {
            Place::Scratch(slot) => self.scratch.wrapping_add(slot as usize * self.slot_bytes).cast(),
            Place::Operand(operand) => self.rows[operand as usize].cast(),
        }
    }
    /// Elements that an operation with this result computes.
    #[inline(always)]
    fn count(&self, to: Register) -> usize {
        if to.scalar { 1 } else { self.n }
    }
    #[inline(always)]
    fn arg<T>(&self, register: Register) -> (*const T, bool) {
        (self.at::<T>(register).cast_const(), register.scalar)
    }

    #[inline(always)]
    unsafe fn step<S: Simd>(&self, op: &Op) {
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

    #[inline(always)]
    unsafe fn load(&self, operand: u16, class: Class, to: Register) {
        let stride = self.program.operands[operand as usize].stride;
        let storage = self.program.operands[operand as usize].storage;
        let from = self.rows[operand as usize].cast_const();
        let n = self.count(to);
        macro_rules! gather {
            ($stored:ty, $register:ty, $convert:expr) => {{
                let (from, to) = (from.cast::<$stored>(), self.at::<$register>(to));
                if stride == 1 {
                    unsafe { map(n, from, to, $convert) }
                } else {
                    for i in 0..n {
                        let value = unsafe { from.wrapping_offset(i as isize * stride).read_unaligned() };
                        unsafe { to.add(i).write_unaligned($convert(value)) };
                    }
                }
            }};
        }
        match (class, storage) {
            (Class::Float, DType::F32) => gather!(f32, f32, |x| x),
            (Class::Float, DType::F16) => gather!(u16, f32, |x| half::f16::from_bits(x).to_f32()),
            (Class::Float, DType::Bf16) => gather!(u16, f32, |x: u16| f32::from_bits(u32::from(x) << 16)),
            (Class::Int, DType::I64) => gather!(i64, i64, |x| x),
            (Class::Int, DType::I32) => gather!(i32, i64, |x: i32| i64::from(x)),
            (Class::Int, DType::I8) => gather!(i8, i64, |x: i8| i64::from(x)),
            (Class::Int, DType::U8) => gather!(u8, i64, |x: u8| i64::from(x)),
            (Class::Bool, DType::Bool) => gather!(u8, u8, |x: u8| u8::from(x != 0)),
            (class, storage) => unreachable!("{storage} loaded as {class:?}"),
        }
    }

    #[inline(always)]
    unsafe fn store(&self, from: Register, class: Class, operand: u16) {
        let stride = self.program.operands[operand as usize].stride;
        let storage = self.program.operands[operand as usize].storage;
        let to = self.rows[operand as usize];
        // A value per row is written once, unless the operand wants it along the whole row.
        let n = if stride == 0 { 1 } else { self.n };
        macro_rules! scatter {
            ($register:ty, $stored:ty, $convert:expr) => {{
                let (from, to) = (self.at::<$register>(from).cast_const(), to.cast::<$stored>());
                let step = |i: usize| {
                    if stride == 1 {
                        to.wrapping_add(i)
                    } else {
                        to.wrapping_offset(i as isize * stride)
                    }
                };
                for i in 0..n {
                    unsafe { step(i).write_unaligned($convert(from.add(i).read_unaligned())) };
                }
            }};
        }
        macro_rules! spread {
            ($register:ty, $stored:ty, $convert:expr) => {{
                if from.scalar {
                    let value = $convert(unsafe { self.at::<$register>(from).read_unaligned() });
                    let to = to.cast::<$stored>();
                    for i in 0..n {
                        unsafe { to.wrapping_offset(i as isize * stride).write_unaligned(value) };
                    }
                } else {
                    scatter!($register, $stored, $convert)
                }
            }};
        }
        match (class, storage) {
            (Class::Float, DType::F32) => spread!(f32, f32, |x| x),
            (Class::Float, DType::F16) => spread!(f32, u16, |x| half::f16::from_f32(x).to_bits()),
            (Class::Float, DType::Bf16) => spread!(f32, u16, |x| half::bf16::from_f32(x).to_bits()),
            (Class::Int, DType::I64) => spread!(i64, i64, |x| x),
            (Class::Int, DType::I32) => spread!(i64, i32, |x| x as i32),
            (Class::Int, DType::I8) => spread!(i64, i8, |x| x as i8),
            (Class::Int, DType::U8) => spread!(i64, u8, |x| x as u8),
            (Class::Bool, DType::Bool) => spread!(u8, u8, |x| x),
            (class, storage) => unreachable!("{class:?} stored as {storage}"),
        }
    }

    #[inline(always)]
    unsafe fn binary_float(&self, op: Elementwise, a: Register, b: Register, to: Register) {
        let (n, a, b) = (self.count(to), self.arg::<f32>(a), self.arg::<f32>(b));
        let (y, t) = (self.at::<f32>(to), self.at::<u8>(to));
        unsafe {
            match op {
                Elementwise::Sum => zip(n, a, b, y, |a, b| a + b),
                Elementwise::Sub => zip(n, a, b, y, |a, b| a - b),
                Elementwise::Prod => zip(n, a, b, y, |a, b| a * b),
                Elementwise::Div => zip(n, a, b, y, |a, b| a / b),
                // Squares and cubes are what normalisation and GELU spell as powers.
                Elementwise::Pow if b.1 && b.0.read_unaligned() == 2.0 => zip(n, a, b, y, |a, _| a * a),
                Elementwise::Pow if b.1 && b.0.read_unaligned() == 3.0 => zip(n, a, b, y, |a, _| a * a * a),
                Elementwise::Pow => zip(n, a, b, y, f32::powf),
                Elementwise::Max => zip(n, a, b, y, maximum),
                Elementwise::Min => zip(n, a, b, y, minimum),
                Elementwise::FloorDiv => zip(n, a, b, y, |a: f32, b| (a / b).floor()),
                Elementwise::Equal => zip(n, a, b, t, |a, b| u8::from(a == b)),
                Elementwise::Greater => zip(n, a, b, t, |a, b| u8::from(a > b)),
                Elementwise::Less => zip(n, a, b, t, |a, b| u8::from(a < b)),
                Elementwise::And | Elementwise::Or | Elementwise::Xor => unreachable!("logic on floats"),
            }
        }
    }

    #[inline(always)]
    unsafe fn binary_int(&self, op: Elementwise, wrap: DType, a: Register, b: Register, to: Register) {
        let (n, a, b) = (self.count(to), self.arg::<i64>(a), self.arg::<i64>(b));
        let (y, t) = (self.at::<i64>(to), self.at::<u8>(to));
        unsafe {
            match op {
                Elementwise::Sum => zip(n, a, b, y, |a: i64, b| wrapped(a.wrapping_add(b), wrap)),
                Elementwise::Sub => zip(n, a, b, y, |a: i64, b| wrapped(a.wrapping_sub(b), wrap)),
                Elementwise::Prod => zip(n, a, b, y, |a: i64, b| wrapped(a.wrapping_mul(b), wrap)),
                // A quotient by 0 is 0: no exception reaches the model's user.
                Elementwise::Div => zip(n, a, b, y, |a: i64, b| wrapped(quotient(a, b), wrap)),
                Elementwise::FloorDiv => zip(n, a, b, y, |a: i64, b| wrapped(floor_quotient(a, b), wrap)),
                Elementwise::Pow => zip(n, a, b, y, |a: i64, b| wrapped(power(a, b), wrap)),
                Elementwise::Max => zip(n, a, b, y, |a: i64, b| a.max(b)),
                Elementwise::Min => zip(n, a, b, y, |a: i64, b| a.min(b)),
                Elementwise::Equal => zip(n, a, b, t, |a, b| u8::from(a == b)),
                Elementwise::Greater => zip(n, a, b, t, |a, b| u8::from(a > b)),
                Elementwise::Less => zip(n, a, b, t, |a, b| u8::from(a < b)),
                Elementwise::And | Elementwise::Or | Elementwise::Xor => unreachable!("logic on integers"),
            }
        }
    }

    #[inline(always)]
    unsafe fn binary_bool(&self, op: Elementwise, a: Register, b: Register, to: Register) {
        let (n, a, b, to) = (self.count(to), self.arg::<u8>(a), self.arg::<u8>(b), self.at::<u8>(to));
        unsafe {
            match op {
                Elementwise::And => zip(n, a, b, to, |a, b| a & b),
                Elementwise::Or => zip(n, a, b, to, |a, b| a | b),
                Elementwise::Xor => zip(n, a, b, to, |a, b| a ^ b),
                Elementwise::Equal => zip(n, a, b, to, |a, b| u8::from(a == b)),
                other => unreachable!("{other:?} on bools"),
            }
        }
    }

    #[inline(always)]
    unsafe fn unary_float<S: Simd>(&self, op: UnaryOp, a: Register, to: Register) {
        let (n, a, y) = (self.count(to), self.at::<f32>(a).cast_const(), self.at::<f32>(to));
        unsafe {
            match op {
                UnaryOp::Abs => map(n, a, y, f32::abs),
                UnaryOp::Ceil => map(n, a, y, f32::ceil),
                UnaryOp::Cos => map(n, a, y, f32::cos),
                UnaryOp::Erf => map(n, a, y, math::erf::<S>),
                UnaryOp::Exp => map(n, a, y, math::exp::<S>),
                UnaryOp::Floor => map(n, a, y, f32::floor),
                UnaryOp::IsNan => map(n, a, self.at::<u8>(to), |x: f32| u8::from(x.is_nan())),
                UnaryOp::Log => map(n, a, y, f32::ln),
                UnaryOp::Neg => map(n, a, y, |x: f32| -x),
                UnaryOp::Not => unreachable!("not of a float"),
                UnaryOp::Recip => map(n, a, y, |x: f32| 1.0 / x),
                UnaryOp::Round => map(n, a, y, f32::round_ties_even),
                UnaryOp::Sign => map(
                    n,
                    a,
                    y,
                    |x: f32| if x == 0.0 || x.is_nan() { x } else { 1f32.copysign(x) },
                ),
                UnaryOp::Sin => map(n, a, y, f32::sin),
                UnaryOp::Sqrt => map(n, a, y, f32::sqrt),
            }
        }
    }

    #[inline(always)]
    unsafe fn unary_int(&self, op: UnaryOp, wrap: DType, a: Register, to: Register) {
        let (n, a, to) = (self.count(to), self.at::<i64>(a).cast_const(), self.at::<i64>(to));
        unsafe {
            match op {
                UnaryOp::Abs => map(n, a, to, |x: i64| wrapped(x.wrapping_abs(), wrap)),
                UnaryOp::Neg => map(n, a, to, |x: i64| wrapped(x.wrapping_neg(), wrap)),
                UnaryOp::Sign => map(n, a, to, i64::signum),
                other => unreachable!("{other:?} of integers"),
            }
        }
    }

    #[inline(always)]
    unsafe fn activation<S: Simd>(&self, op: Activation, a: Register, to: Register) {
        let (n, a, y) = (self.count(to), self.at::<f32>(a).cast_const(), self.at::<f32>(to));
        unsafe {
            match op {
                Activation::Relu => map(n, a, y, |x: f32| if x < 0.0 { 0.0 } else { x }),
                Activation::Sigmoid => map(n, a, y, math::sigmoid::<S>),
                Activation::Tanh => map(n, a, y, math::tanh::<S>),
                Activation::GeluErf => map(n, a, y, math::gelu_erf::<S>),
                Activation::GeluTanh => map(n, a, y, math::gelu_tanh::<S>),
                Activation::Softplus => map(n, a, y, math::softplus),
            }
        }
    }

    #[inline(always)]
    unsafe fn select<T: Copy>(&self, condition: Register, a: Register, b: Register, to: Register) {
        let (n, y) = (self.count(to), self.at::<T>(to));
        let (c, c_step) = (self.at::<u8>(condition), usize::from(!condition.scalar));
        let (a, a_step) = (self.at::<T>(a), usize::from(!a.scalar));
        let (b, b_step) = (self.at::<T>(b), usize::from(!b.scalar));
        unsafe {
            if c_step == 1 && a_step == 1 && b_step == 0 {
                let b = b.read_unaligned();
                for i in 0..n {
                    let x = a.add(i).read_unaligned();
                    y.add(i).write_unaligned(if *c.add(i) != 0 { x } else { b });
                }
                return;
            }
            for i in 0..n {
                let chosen = if *c.add(i * c_step) != 0 {
                    a.add(i * a_step)
                } else {
                    b.add(i * b_step)
                };
                y.add(i).write_unaligned(chosen.read_unaligned());
            }
        }
    }

    #[inline(always)]
    unsafe fn cast(&self, from: Class, a: Register, class: Class, wrap: DType, to: Register) {
        let n = self.count(to);
        unsafe {
            match (from, class) {
                (Class::Float, Class::Float) => map(n, self.at::<f32>(a), self.at::<f32>(to), |x| x),
                // Rust's conversion saturates, and NaN becomes 0; then the narrower type wraps.
                (Class::Float, Class::Int) => map(n, self.at::<f32>(a), self.at::<i64>(to), |x| float_to_int(x, wrap)),
                (Class::Float, Class::Bool) => map(n, self.at::<f32>(a), self.at::<u8>(to), |x| u8::from(x != 0.0)),
                (Class::Int, Class::Float) => map(n, self.at::<i64>(a), self.at::<f32>(to), |x| x as f32),
                (Class::Int, Class::Int) => map(n, self.at::<i64>(a), self.at::<i64>(to), |x| wrapped(x, wrap)),
                (Class::Int, Class::Bool) => map(n, self.at::<i64>(a), self.at::<u8>(to), |x| u8::from(x != 0)),
                (Class::Bool, Class::Float) => map(n, self.at::<u8>(a), self.at::<f32>(to), f32::from),
                (Class::Bool, Class::Int) => map(n, self.at::<u8>(a), self.at::<i64>(to), i64::from),
                (Class::Bool, Class::Bool) => map(n, self.at::<u8>(a), self.at::<u8>(to), |x| x),
            }
        }
    }

    #[inline(always)]
    unsafe fn reduce_float(&self, op: ReduceOp, a: Register, to: Register) {
        let a_pointer = self.at::<f32>(a).cast_const();
        let n = if a.scalar { 1 } else { self.n };
        let value = unsafe {
            match op {
                ReduceOp::Sum => fold(n, a_pointer, 0.0, |a, b| a + b),
                ReduceOp::Avg => fold(n, a_pointer, 0.0, |a, b| a + b) / n as f32,
                ReduceOp::Prod => fold(n, a_pointer, 1.0, |a, b| a * b),
                ReduceOp::Max => fold(n, a_pointer, f32::NEG_INFINITY, maximum),
                ReduceOp::Min => fold(n, a_pointer, f32::INFINITY, minimum),
            }
        };
        unsafe { self.at::<f32>(to).write_unaligned(value) }
    }

    #[inline(always)]
    unsafe fn reduce_int(&self, op: ReduceOp, wrap: DType, a: Register, to: Register) {
        let n = if a.scalar { 1 } else { self.n };
        let values = (0..n).map(|i| unsafe { self.at::<i64>(a).add(i).read_unaligned() });
        let value = match op {
            ReduceOp::Sum => values.fold(0, i64::wrapping_add),
            ReduceOp::Avg => quotient(values.fold(0, i64::wrapping_add), n as i64),
            ReduceOp::Prod => values.fold(1, i64::wrapping_mul),
            ReduceOp::Max => values.max().unwrap_or(i64::MIN),
            ReduceOp::Min => values.min().unwrap_or(i64::MAX),
        };
        unsafe { self.at::<i64>(to).write_unaligned(wrapped(value, wrap)) }
    }

    #[inline(always)]
    unsafe fn softmax<S: Simd>(&self, a: Register, to: Register) {
        let (n, a, to) = (self.count(to), self.at::<f32>(a).cast_const(), self.at::<f32>(to));
        unsafe {
            let max = fold(n, a, f32::NEG_INFINITY, maximum);
            map(n, a, to, |x| math::exp::<S>(x - max));
            let scale = 1.0 / fold(n, to, 0.0, |a, b| a + b);
            map(n, to.cast_const(), to, |x| x * scale);
        }
    }

    #[inline(always)]
    unsafe fn normalize(&self, epsilon: f32, a: Register, scale: Register, bias: Register, to: Register) {
        let (n, x, y) = (self.count(to), self.at::<f32>(a).cast_const(), self.at::<f32>(to));
        let (scale, bias) = (self.arg::<f32>(scale), self.arg::<f32>(bias));
        unsafe {
            let mean = fold(n, x, 0.0, |a, b| a + b) / n as f32;
            map(n, x, y, |x| x - mean);
            let variance = fold_map(n, y, 0.0, |sum, d| sum + d, |d| d * d) / n as f32;
            let factor = 1.0 / (variance + epsilon).sqrt();
            map(n, y.cast_const(), y, |d| d * factor);
            zip(n, (y.cast_const(), false), scale, y, |d, s| d * s);
            zip(n, (y.cast_const(), false), bias, y, |d, b| d + b);
        }
    }
}

/// Truncating; saturating at what `dtype` holds; NaN gives 0.
#[inline(always)]
fn float_to_int(x: f32, dtype: DType) -> i64 {
    match dtype {
        DType::I32 => i64::from(x as i32),
        DType::I8 => i64::from(x as i8),
        DType::U8 => i64::from(x as u8),
        _ => x as i64,
    }
}

#[inline(always)]
fn quotient(a: i64, b: i64) -> i64 {
    if b == 0 { 0 } else { a.wrapping_div(b) }
}

#[inline(always)]
fn floor_quotient(a: i64, b: i64) -> i64 {
    let q = quotient(a, b);
    if b != 0 && a.wrapping_rem(b) != 0 && (a < 0) != (b < 0) {
        q - 1
    } else {
        q
    }
}

#[inline(always)]
fn power(a: i64, b: i64) -> i64 {
    match u32::try_from(b) {
        Ok(b) => a.wrapping_pow(b),
        // 1/a^|b| truncated toward zero.
        Err(_) if b < 0 => match a {
            1 => 1,
            -1 => 1 - 2 * (b & 1),
            _ => 0,
        },
        Err(_) => (a as f64).powf(b as f64) as i64,
    }
}
