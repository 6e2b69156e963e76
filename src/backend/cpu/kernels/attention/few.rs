//! Attention of few query rows, as in decode: chunks of slots by themselves, then joined.

use super::super::math;
use super::super::moves::Heads;
use super::{ALL, Attention, BLOCK, NONE};
use crate::backend::cpu::simd::{Bf16, Element, F16, F32, Kernel, Simd};
use crate::tensor::DType;

/// Blocks in one item of [`Few`].
pub const CHUNK_BLOCKS: usize = 8;

/// Most query rows of a KV head for [`Few`].
pub const FEW: usize = 8;

/// A chunk of slots for all query rows of one KV head; `group_rows() <= FEW`.
pub struct Few {
    pub attention: Attention,
    /// `(batch * kv_heads + kv_head) * chunks + chunk`
    pub item: usize,
    /// Of each item: `[few_rows, 2 + dim]`: the maximum, the sum of exponentials, the weighted values.
    pub partial: *mut f32,
}

/// Rows of a partial result of [`Few`]: those it computes, some perhaps twice. There are few such numbers, so that the
/// code stays small.
pub fn few_rows(group_rows: usize) -> usize {
    if group_rows <= 4 { group_rows } else { FEW }
}

/// Items of [`Few`] for each batch row and KV head.
pub fn few_chunks(slots: usize) -> usize {
    slots.div_ceil(BLOCK * CHUNK_BLOCKS).max(1)
}

impl Kernel for Few {
    type Output = ();
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let a = &self.attention;
        let chunks = few_chunks(a.slots);
        let (pair, chunk) = (self.item / chunks, self.item % chunks);
        let (b, g) = (pair / a.kv_heads, pair % a.kv_heads);
        let rows = few_rows(a.group_rows());
        // Of rows that are computed and not there, the last one's.
        let places: [(usize, usize); FEW] = std::array::from_fn(|r| a.place(g, r.min(a.group_rows() - 1)));
        let q: [*const f32; FEW] = places.map(|(h, t)| a.q.row(b, h, t).cast_const().cast());
        let width = 2 + a.dim;
        let partial = self.partial.wrapping_add(self.item * rows * width);
        let out: [*mut f32; FEW] = std::array::from_fn(|r| partial.wrapping_add(r.min(rows - 1) * width));
        let mut p = [[0f32; BLOCK]; FEW];
        let mut scales = [0f32; FEW];
        unsafe {
            partial.write_bytes(0, rows * width);
            for row in &out[..rows] {
                **row = f32::NEG_INFINITY;
            }
            let last = ((chunk + 1) * CHUNK_BLOCKS).min(a.blocks());
            for block in chunk * CHUNK_BLOCKS..last {
                let states = places.map(|(h, t)| match &a.mask {
                    Some(mask) => mask.state(b, h, t, block),
                    None => ALL,
                });
                if states.iter().all(|s| *s == NONE) {
                    continue;
                }
                let first = block * BLOCK;
                let count = BLOCK.min(a.slots - first);
                let stream = |heads: &Heads| Stream {
                    base: heads.row(b, g, first),
                    stride: heads.strides[2],
                    count,
                    dim: a.dim,
                };
                let (keys, values) = (stream(&a.k), stream(&a.v));
                pass::<S, _>(Scores { q: &q, keys, p: &mut p }, a.k.storage, rows);
                for r in 0..rows {
                    let p = &mut p[r];
                    p[count..].fill(f32::NEG_INFINITY);
                    if let Some(mask) = &a.mask
                        && states[r] != ALL
                    {
                        let (h, t) = places[r];
                        for s in 0..count {
                            let bias = mask.bias(b, h, t, first + s);
                            // -∞ replaces the score, so that a key that is not a number stays masked.
                            p[s] = if bias == f32::NEG_INFINITY { bias } else { p[s] + bias };
                        }
                    }
                    scales[r] = exponentials::<S>(p, out[r]);
                }
                let outputs = Outputs {
                    p: &p,
                    scales: &scales,
                    values,
                    out: &out,
                };
                pass::<S, _>(outputs, a.v.storage, rows);
            }
        }
    }
}

/// Scores become exponentials; the row's running maximum and sum (`out[0]`, `out[1]`) are brought to the new base. Gives
/// the factor that does so for what was summed before.
#[inline(always)]
unsafe fn exponentials<S: Simd>(p: &mut [f32; BLOCK], out: *mut f32) -> f32 {
    let (old, sum) = unsafe { (*out, *out.add(1)) };
    let max = p.iter().fold(old, |m, x| if *x > m { *x } else { m });
    let base = if max == f32::NEG_INFINITY { 0.0 } else { max };
    for x in p.iter_mut() {
        *x = math::exp::<S>(*x - base);
    }
    let mut parts = [0f32; 16];
    for (i, x) in p.iter().enumerate() {
        parts[i % 16] += x;
    }
    let scale = if old == f32::NEG_INFINITY {
        0.0
    } else {
        math::exp::<S>(old - base)
    };
    unsafe {
        *out = max;
        *out.add(1) = sum * scale + parts.iter().sum::<f32>();
    }
    scale
}

/// Keys or values of a block.
#[derive(Clone, Copy)]
struct Stream {
    base: *const u8,
    /// From slot to slot, in elements.
    stride: isize,
    count: usize,
    dim: usize,
}

impl Stream {
    #[inline(always)]
    fn slot<E: Element>(&self, slot: usize) -> *const u8 {
        self.base
            .wrapping_offset(slot as isize * self.stride * E::SIZE as isize)
    }
}

/// A walk over keys or values with a number of rows known at compile time, so that the rows' sums live in registers.
/// Only this much is compiled for every dtype and number of rows.
trait Pass {
    unsafe fn run<S: Simd, E: Element, const R: usize>(self);
}

#[inline(always)]
unsafe fn pass<S: Simd, P: Pass>(pass: P, storage: DType, rows: usize) {
    unsafe {
        match storage {
            DType::F32 => pass_of::<S, F32, P>(pass, rows),
            DType::F16 => pass_of::<S, F16, P>(pass, rows),
            DType::Bf16 => pass_of::<S, Bf16, P>(pass, rows),
            other => unreachable!("a cache of {other}"),
        }
    }
}

#[inline(always)]
unsafe fn pass_of<S: Simd, E: Element, P: Pass>(pass: P, rows: usize) {
    unsafe {
        match rows {
            1 => pass.run::<S, E, 1>(),
            2 => pass.run::<S, E, 2>(),
            3 => pass.run::<S, E, 3>(),
            4 => pass.run::<S, E, 4>(),
            _ => pass.run::<S, E, FEW>(),
        }
    }
}

/// `p[r][s] = q[r] · keys[s]`
struct Scores<'a> {
    q: &'a [*const f32; FEW],
    keys: Stream,
    p: &'a mut [[f32; BLOCK]; FEW],
}

impl Pass for Scores<'_> {
    #[inline(always)]
    unsafe fn run<S: Simd, E: Element, const R: usize>(self) {
        let q: [*const f32; R] = std::array::from_fn(|r| self.q[r]);
        let dim = self.keys.dim;
        let whole = dim / S::LANES * S::LANES;
        for s in 0..self.keys.count {
            let k = self.keys.slot::<E>(s);
            unsafe {
                let mut acc = [S::splat(0.0); R];
                for i in (0..whole).step_by(S::LANES) {
                    let key = E::load::<S>(k, i);
                    for r in 0..R {
                        acc[r] = S::fma(key, S::load(q[r].add(i)), acc[r]);
                    }
                }
                for r in 0..R {
                    let mut sum = S::sum(acc[r]);
                    for i in whole..dim {
                        sum = S::mul_add(E::get(k, i), *q[r].add(i), sum);
                    }
                    self.p[r][s] = sum;
                }
            }
        }
    }
}

/// `out[r][2..] = out[r][2..] * scales[r] + sum over s of p[r][s] * values[s]`
struct Outputs<'a> {
    p: &'a [[f32; BLOCK]; FEW],
    scales: &'a [f32; FEW],
    values: Stream,
    out: &'a [*mut f32; FEW],
}

impl Pass for Outputs<'_> {
    #[inline(always)]
    unsafe fn run<S: Simd, E: Element, const R: usize>(self) {
        let out: [*mut f32; R] = std::array::from_fn(|r| self.out[r].wrapping_add(2));
        let Stream { count, dim, .. } = self.values;
        let whole = dim / S::LANES * S::LANES;
        unsafe {
            for i in (0..whole).step_by(S::LANES) {
                let mut acc: [S::V; R] =
                    std::array::from_fn(|r| S::mul(S::load(out[r].add(i)), S::splat(self.scales[r])));
                for s in 0..count {
                    let value = E::load::<S>(self.values.slot::<E>(s), i);
                    for r in 0..R {
                        acc[r] = S::fma(S::splat(self.p[r][s]), value, acc[r]);
                    }
                }
                for r in 0..R {
                    S::store(out[r].add(i), acc[r]);
                }
            }
            for i in whole..dim {
                for r in 0..R {
                    let mut acc = *out[r].add(i) * self.scales[r];
                    for s in 0..count {
                        acc = S::mul_add(self.p[r][s], E::get(self.values.slot::<E>(s), i), acc);
                    }
                    *out[r].add(i) = acc;
                }
            }
        }
    }
}

/// Joins the chunks of [`Few`] for the query rows `(batch * kv_heads + kv_head) * group_rows + row` in `items`.
pub struct Merge {
    pub attention: Attention,
    pub partial: *const f32,
    pub items: std::ops::Range<usize>,
}

impl Kernel for Merge {
    type Output = ();
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let a = &self.attention;
        let (rows, chunks, width) = (a.group_rows(), few_chunks(a.slots), 2 + a.dim);
        for item in self.items.clone() {
            let (pair, r) = (item / rows, item % rows);
            let (b, g) = (pair / a.kv_heads, pair % a.kv_heads);
            let (h, t) = a.place(g, r);
            let out: *mut f32 = a.out.row(b, h, t).cast();
            let stored = few_rows(rows);
            let part = |chunk: usize| {
                self.partial
                    .wrapping_add(((pair * chunks + chunk) * stored + r) * width)
            };
            unsafe {
                let max = (0..chunks).fold(f32::NEG_INFINITY, |m, c| if *part(c) > m { *part(c) } else { m });
                let base = if max == f32::NEG_INFINITY { 0.0 } else { max };
                let mut sum = 0.0;
                for i in 0..a.dim {
                    *out.add(i) = 0.0;
                }
                for chunk in 0..chunks {
                    let part = part(chunk);
                    if *part.add(1) == 0.0 {
                        continue;
                    }
                    // A chunk whose scores are not numbers never raised its maximum; its sum is not a number.
                    let weight = if *part == f32::NEG_INFINITY {
                        1.0
                    } else {
                        math::exp::<S>(*part - base)
                    };
                    sum += *part.add(1) * weight;
                    for i in 0..a.dim {
                        *out.add(i) = S::mul_add(*part.add(2 + i), weight, *out.add(i));
                    }
                }
                let scale = if sum == 0.0 { 0.0 } else { 1.0 / sum };
                for i in 0..a.dim {
                    *out.add(i) *= scale;
                }
            }
        }
    }
}
