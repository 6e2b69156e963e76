//! Operations on single elements: arithmetic, activations, selections and casts.

use super::super::math;
use super::frame::Frame;
use super::integers::{float_to_int, floor_quotient, power, quotient, wrapped};
use super::loops::{map, maximum, minimum, zip};
use super::{Class, Register};
use crate::backend::cpu::simd::Simd;
use crate::network::{Activation, Elementwise, UnaryOp};
use crate::tensor::DType;

impl Frame<'_> {
    /// # Safety
    /// See [`Frame`].
    #[inline(always)]
    pub(super) unsafe fn binary_float(&self, op: Elementwise, a: Register, b: Register, to: Register) {
        let (n, a, b) = (self.count(to), self.arg::<f32>(a), self.arg::<f32>(b));
        let (y, t) = (self.at::<f32>(to), self.at::<u8>(to));
        // SAFETY: `to` has `n` elements, `a` and `b` as many or one; `b` is read where it has one.
        unsafe {
            match op {
                Elementwise::Sum => zip(n, a, b, y, |a, b| a + b),
                Elementwise::Sub => zip(n, a, b, y, |a, b| a - b),
                Elementwise::Prod => zip(n, a, b, y, |a, b| a * b),
                Elementwise::Div => zip(n, a, b, y, |a, b| a / b),
                // Normalization and GELU write squares and cubes as powers.
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

    /// # Safety
    /// See [`Frame`].
    #[inline(never)]
    pub(super) unsafe fn binary_int(&self, op: Elementwise, wrap: DType, a: Register, b: Register, to: Register) {
        let (n, a, b) = (self.count(to), self.arg::<i64>(a), self.arg::<i64>(b));
        let (y, t) = (self.at::<i64>(to), self.at::<u8>(to));
        // SAFETY: all registers have `n` elements, or are one value as their flag says.
        unsafe {
            match op {
                Elementwise::Sum => zip(n, a, b, y, |a: i64, b| wrapped(a.wrapping_add(b), wrap)),
                Elementwise::Sub => zip(n, a, b, y, |a: i64, b| wrapped(a.wrapping_sub(b), wrap)),
                Elementwise::Prod => zip(n, a, b, y, |a: i64, b| wrapped(a.wrapping_mul(b), wrap)),
                // A quotient by 0 is 0: there is no exception.
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

    /// # Safety
    /// See [`Frame`].
    #[inline(never)]
    pub(super) unsafe fn binary_bool(&self, op: Elementwise, a: Register, b: Register, to: Register) {
        let (n, a, b, to) = (self.count(to), self.arg::<u8>(a), self.arg::<u8>(b), self.at::<u8>(to));
        // SAFETY: all registers have `n` elements, or are one value as their flag says.
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

    /// # Safety
    /// See [`Frame`].
    #[inline(always)]
    pub(super) unsafe fn unary_float<S: Simd>(&self, op: UnaryOp, a: Register, to: Register) {
        let (n, a, y) = (self.count(to), self.at::<f32>(a).cast_const(), self.at::<f32>(to));
        // SAFETY: both registers have `n` elements.
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
                UnaryOp::RoundE4M3 => map(n, a, y, math::round_e4m3),
                UnaryOp::RoundE5M2 => map(n, a, y, math::round_e5m2),
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

    /// # Safety
    /// See [`Frame`].
    #[inline(never)]
    pub(super) unsafe fn unary_int(&self, op: UnaryOp, wrap: DType, a: Register, to: Register) {
        let (n, a, to) = (self.count(to), self.at::<i64>(a).cast_const(), self.at::<i64>(to));
        // SAFETY: both registers have `n` elements.
        unsafe {
            match op {
                UnaryOp::Abs => map(n, a, to, |x: i64| wrapped(x.wrapping_abs(), wrap)),
                UnaryOp::Neg => map(n, a, to, |x: i64| wrapped(x.wrapping_neg(), wrap)),
                UnaryOp::Sign => map(n, a, to, i64::signum),
                other => unreachable!("{other:?} of integers"),
            }
        }
    }

    /// # Safety
    /// See [`Frame`].
    #[inline(always)]
    pub(super) unsafe fn activation<S: Simd>(&self, op: Activation, a: Register, to: Register) {
        let (n, a, y) = (self.count(to), self.at::<f32>(a).cast_const(), self.at::<f32>(to));
        // SAFETY: both registers have `n` elements.
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

    /// # Safety
    /// See [`Frame`].
    #[inline(always)]
    pub(super) unsafe fn select<T: Copy>(&self, condition: Register, a: Register, b: Register, to: Register) {
        let (n, y) = (self.count(to), self.at::<T>(to));
        let (c, c_step) = (self.at::<u8>(condition), usize::from(!condition.scalar));
        let (a, a_step) = (self.at::<T>(a), usize::from(!a.scalar));
        let (b, b_step) = (self.at::<T>(b), usize::from(!b.scalar));
        // SAFETY: `to` has `n` elements, the others as many or one, which a step of 0 repeats.
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

    /// # Safety
    /// See [`Frame`].
    #[inline(always)]
    pub(super) unsafe fn cast(&self, from: Class, a: Register, class: Class, wrap: DType, to: Register) {
        let n = self.count(to);
        // SAFETY: both registers have `n` elements.
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
}
