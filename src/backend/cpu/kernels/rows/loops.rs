//! Loops over a row: element by element, and folds in a fixed order.
//!
//! Pointers need not be aligned. Everything is inlined into the kernel of each instruction set, which vectorizes it.
//!
//! Safety of all: each pointer has `n` elements, or one if it is a single value. `a`, `b` and `to` may be the same
//! register: element `i` is read before it is written.

/// `to[i] = f(a[i])`
///
/// # Safety
/// See the module's head.
#[inline(always)]
pub(super) unsafe fn map<A: Copy, T>(n: usize, a: *const A, to: *mut T, f: impl Fn(A) -> T) {
    for i in 0..n {
        // SAFETY: `i < n`.
        unsafe { to.add(i).write_unaligned(f(a.add(i).read_unaligned())) }
    }
}

/// `to[i] = f(a[i], b[i])`, where either may be a single value.
///
/// # Safety
/// See the module's head.
#[inline(always)]
pub(super) unsafe fn zip<A: Copy, T>(
    n: usize,
    a: (*const A, bool),
    b: (*const A, bool),
    to: *mut T,
    f: impl Fn(A, A) -> T,
) {
    // SAFETY: `i < n`; one value is read at its address alone.
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
///
/// # Safety
/// See the module's head.
#[inline(always)]
pub(super) unsafe fn fold(n: usize, a: *const f32, start: f32, f: impl Fn(f32, f32) -> f32) -> f32 {
    // SAFETY: the same contract.
    unsafe { fold_map(n, a, start, f, |x| x) }
}

/// [`fold`] of `g(a[i])`.
///
/// # Safety
/// See the module's head.
#[inline(always)]
pub(super) unsafe fn fold_map(
    n: usize,
    a: *const f32,
    start: f32,
    f: impl Fn(f32, f32) -> f32,
    g: impl Fn(f32) -> f32,
) -> f32 {
    const PARTS: usize = 32;
    let mut parts = [start; PARTS];
    let whole = n / PARTS;
    for i in 0..whole {
        for (j, part) in parts.iter_mut().enumerate() {
            // SAFETY: `i * PARTS + j < whole * PARTS <= n`.
            *part = f(*part, g(unsafe { a.add(i * PARTS + j).read_unaligned() }));
        }
    }
    for (j, part) in parts.iter_mut().enumerate().take(n % PARTS) {
        // SAFETY: `whole * PARTS + j < n`, since `j < n % PARTS`.
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
pub(super) fn maximum(a: f32, b: f32) -> f32 {
    if a > b || a.is_nan() { a } else { b }
}

#[inline(always)]
pub(super) fn minimum(a: f32, b: f32) -> f32 {
    if a < b || a.is_nan() { a } else { b }
}
