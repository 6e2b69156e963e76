//! Operations that need a whole row: reductions, softmax and normalization. Sums have a fixed number of partial sums.

use super::super::math;
use super::Register;
use super::frame::Frame;
use super::integers::{quotient, wrapped};
use super::loops::{fold, fold_map, map, maximum, minimum, zip};
use crate::backend::cpu::simd::Simd;
use crate::network::ReduceOp;
use crate::tensor::DType;

impl Frame<'_> {
    /// # Safety
    /// See [`Frame`].
    #[inline(always)]
    pub(super) unsafe fn reduce_float(&self, op: ReduceOp, a: Register, to: Register) {
        let a_pointer = self.at::<f32>(a).cast_const();
        let n = if a.scalar { 1 } else { self.n };
        // SAFETY: register `a` has `n` elements.
        let value = unsafe {
            match op {
                ReduceOp::Sum => fold(n, a_pointer, 0.0, |a, b| a + b),
                ReduceOp::Avg => fold(n, a_pointer, 0.0, |a, b| a + b) / n as f32,
                ReduceOp::Prod => fold(n, a_pointer, 1.0, |a, b| a * b),
                ReduceOp::Max => fold(n, a_pointer, f32::NEG_INFINITY, maximum),
                ReduceOp::Min => fold(n, a_pointer, f32::INFINITY, minimum),
            }
        };
        // SAFETY: every register has room for one element.
        unsafe { self.at::<f32>(to).write_unaligned(value) }
    }

    /// # Safety
    /// See [`Frame`].
    #[inline(never)]
    pub(super) unsafe fn reduce_int(&self, op: ReduceOp, wrap: DType, a: Register, to: Register) {
        let n = if a.scalar { 1 } else { self.n };
        // SAFETY: register `a` has `n` elements.
        let values = (0..n).map(|i| unsafe { self.at::<i64>(a).add(i).read_unaligned() });
        let value = match op {
            ReduceOp::Sum => values.fold(0, i64::wrapping_add),
            ReduceOp::Avg => quotient(values.fold(0, i64::wrapping_add), n as i64),
            ReduceOp::Prod => values.fold(1, i64::wrapping_mul),
            ReduceOp::Max => values.max().unwrap_or(i64::MIN),
            ReduceOp::Min => values.min().unwrap_or(i64::MAX),
        };
        // SAFETY: every register has room for one element.
        unsafe { self.at::<i64>(to).write_unaligned(wrapped(value, wrap)) }
    }

    /// # Safety
    /// See [`Frame`].
    #[inline(always)]
    pub(super) unsafe fn softmax<S: Simd>(&self, a: Register, to: Register) {
        let (n, a, to) = (self.count(to), self.at::<f32>(a).cast_const(), self.at::<f32>(to));
        // SAFETY: both registers have `n` elements.
        unsafe {
            let max = fold(n, a, f32::NEG_INFINITY, maximum);
            map(n, a, to, |x| math::exp::<S>(x - max));
            let scale = 1.0 / fold(n, to, 0.0, |a, b| a + b);
            map(n, to.cast_const(), to, |x| x * scale);
        }
    }

    /// # Safety
    /// See [`Frame`].
    #[inline(always)]
    pub(super) unsafe fn normalize(&self, epsilon: f32, a: Register, scale: Register, bias: Register, to: Register) {
        let (n, x, y) = (self.count(to), self.at::<f32>(a).cast_const(), self.at::<f32>(to));
        let (scale, bias) = (self.arg::<f32>(scale), self.arg::<f32>(bias));
        // SAFETY: `x` and `y` have `n` elements, scale and bias as many or one.
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
