//! Loads and stores between an operand's storage and the registers' classes.

use super::frame::Frame;
use super::loops::map;
use super::{Class, Register};
use crate::tensor::DType;

impl Frame<'_> {
    /// Loads the operand's elements into a register.
    ///
    /// # Safety
    /// See [`Frame`].
    #[inline(always)]
    pub(super) unsafe fn load(&self, operand: u16, class: Class, to: Register) {
        let stride = self.program.operands[operand as usize].stride;
        let storage = self.program.operands[operand as usize].storage;
        let from = self.rows[operand as usize].cast_const();
        let n = self.count(to);
        macro_rules! gather {
            ($stored:ty, $register:ty, $convert:expr) => {{
                let (from, to) = (from.cast::<$stored>(), self.at::<$register>(to));
                if stride == 1 {
                    // SAFETY: `n` elements of the operand and of the register.
                    unsafe { map(n, from, to, $convert) }
                } else {
                    for i in 0..n {
                        // SAFETY: `i < n`, as above.
                        let value = unsafe { from.wrapping_offset(i as isize * stride).read_unaligned() };
                        // SAFETY: as above.
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

    /// Stores a register's values into the operand's elements.
    ///
    /// # Safety
    /// See [`Frame`].
    #[inline(always)]
    pub(super) unsafe fn store(&self, from: Register, class: Class, operand: u16) {
        let stride = self.program.operands[operand as usize].stride;
        let storage = self.program.operands[operand as usize].storage;
        let to = self.rows[operand as usize];
        // A value per row is written once, unless the operand has it along the whole row.
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
                    // SAFETY: `i < n`: an element of the register and one of the operand.
                    unsafe { step(i).write_unaligned($convert(from.add(i).read_unaligned())) };
                }
            }};
        }
        macro_rules! spread {
            ($register:ty, $stored:ty, $convert:expr) => {{
                if from.scalar {
                    // SAFETY: a scalar register has one element.
                    let value = $convert(unsafe { self.at::<$register>(from).read_unaligned() });
                    let to = to.cast::<$stored>();
                    for i in 0..n {
                        // SAFETY: `i < n`: an element of the operand.
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
}
