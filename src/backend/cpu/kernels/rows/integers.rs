//! Integer arithmetic of row programs: computed in i64, then wrapped to the dtype.

use crate::tensor::DType;

/// The integer wrapped to `dtype`.
#[inline(always)]
pub(super) fn wrapped(x: i64, dtype: DType) -> i64 {
    match dtype {
        DType::I32 => i64::from(x as i32),
        DType::I8 => i64::from(x as i8),
        DType::U8 => i64::from(x as u8),
        _ => x,
    }
}

/// Truncates, saturates at the range of `dtype`; NaN gives 0.
#[inline(always)]
pub(super) fn float_to_int(x: f32, dtype: DType) -> i64 {
    match dtype {
        DType::I32 => i64::from(x as i32),
        DType::I8 => i64::from(x as i8),
        DType::U8 => i64::from(x as u8),
        _ => x as i64,
    }
}

#[inline(always)]
pub(super) fn quotient(a: i64, b: i64) -> i64 {
    if b == 0 { 0 } else { a.wrapping_div(b) }
}

#[inline(always)]
pub(super) fn floor_quotient(a: i64, b: i64) -> i64 {
    let q = quotient(a, b);
    if b != 0 && a.wrapping_rem(b) != 0 && (a < 0) != (b < 0) {
        q - 1
    } else {
        q
    }
}

#[inline(always)]
pub(super) fn power(a: i64, b: i64) -> i64 {
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
