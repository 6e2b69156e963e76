//! Attention of few query rows, as in decode: chunks of slots separately, then merged.

use super::super::math;
use super::super::moves::Heads;
use super::{ALL, Attention, BLOCK, NONE};
use crate::backend::cpu::simd::{Bf16, Element, F16, F32, Kernel, Simd};
use crate::tensor::DType;

/// Blocks in one item of [`DecodeChunk`].
pub const CHUNK_BLOCKS: usize = 8;

/// Maximum query rows of a KV head for [`DecodeChunk`].
pub const MAX_DECODE_ROWS: usize = 8;

/// A chunk of slots for all query rows of one KV head; `group_rows() <= MAX_DECODE_ROWS`.
pub struct DecodeChunk {
    pub attention: Attention,
    /// `(batch * kv_heads + kv_head) * chunks + chunk`
    pub item: usize,
    /// For each item, `[decode_rows, 2 + dim]`: the maximum, the sum of exponentials, the weighted values.
    pub partial: *mut f32,
}

/// Rows of a partial result of [`DecodeChunk`]: the rows that it computes, some possibly twice. There are few such
/// numbers, which keeps the code small.
pub fn decode_rows(group_rows: usize) -> usize {
    if group_rows <= 4 { group_rows } else { MAX_DECODE_ROWS }
}

/// Items of [`DecodeChunk`] for each batch row and KV head.
pub fn decode_chunks(slots: usize) -> usize {
    slots.div_ceil(BLOCK * CHUNK_BLOCKS).max(1)
}

impl Kernel for DecodeChunk {
    type Output = ();
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let a = &self.attention;
        let chunks = decode_chunks(a.slots);
        let (pair, chunk) = (self.item / chunks, self.item % chunks);
        let (b, g) = (pair / a.kv_heads, pair % a.kv_heads);
        let rows = decode_rows(a.group_rows());
        // Rows beyond the last repeat the last one.
        let places: [(usize, usize); MAX_DECODE_ROWS] = std::array::from_fn(|r| a.place(g, r.min(a.group_rows() - 1)));
        let q: [*const f32; MAX_DECODE_ROWS] = places.map(|(h, t)| a.q.row(b, h, t).cast_const().cast());
        let width = 2 + a.dim;
        let partial = self.partial.wrapping_add(self.item * rows * width);
        let out: [*mut f32; MAX_DECODE_ROWS] = std::array::from_fn(|r| partial.wrapping_add(r.min(rows - 1) * width));
        let mut p = [[0f32; BLOCK]; MAX_DECODE_ROWS];
        let mut scales = [0f32; MAX_DECODE_ROWS];
        // SAFETY: `partial` has `rows` rows of `width` for every item, and this item writes its own; rows beyond `rows` are
        // places of the last. `places` are heads and tokens of this KV head (those beyond its rows repeat the last), blocks
        // end at `blocks()` and slots of a block at `a.slots`, so q, keys, values and mask are read inside their views.
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

/// Scores become exponentials; the row's running maximum and sum (`out[0]`, `out[1]`) are rescaled to the new base.
/// Returns the factor that rescales earlier sums.
///
/// # Safety
/// `out` has two elements, which nothing else uses at the same time.
#[inline(always)]
unsafe fn exponentials<S: Simd>(p: &mut [f32; BLOCK], out: *mut f32) -> f32 {
    // SAFETY: this function's contract.
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
    // SAFETY: this function's contract.
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

/// A pass over keys or values with a number of rows known at compile time, so that the rows' sums stay in registers.
/// Only this code is compiled for every dtype and number of rows.
trait Pass {
    /// # Safety
    /// The pointers are valid for `R` rows and for the stream's slots, which are stored as `E`; `S` is available.
    unsafe fn run<S: Simd, E: Element, const R: usize>(self);
}

/// # Safety
/// As [`Pass::run`], for `rows` rows of `storage`.
#[inline(always)]
unsafe fn pass<S: Simd, P: Pass>(pass: P, storage: DType, rows: usize) {
    // SAFETY: the storage is the stream's own; the rest is this function's contract.
    unsafe {
        match storage {
            DType::F32 => pass_of::<S, F32, P>(pass, rows),
            DType::F16 => pass_of::<S, F16, P>(pass, rows),
            DType::Bf16 => pass_of::<S, Bf16, P>(pass, rows),
            other => unreachable!("a cache of {other}"),
        }
    }
}

/// # Safety
/// As [`Pass::run`], for `rows` rows. More than four are computed as [`MAX_DECODE_ROWS`], which all arrays have.
#[inline(always)]
unsafe fn pass_of<S: Simd, E: Element, P: Pass>(pass: P, rows: usize) {
    // SAFETY: this function's contract.
    unsafe {
        match rows {
            1 => pass.run::<S, E, 1>(),
            2 => pass.run::<S, E, 2>(),
            3 => pass.run::<S, E, 3>(),
            4 => pass.run::<S, E, 4>(),
            _ => pass.run::<S, E, MAX_DECODE_ROWS>(),
        }
    }
}

/// `p[r][s] = q[r] · keys[s]`
struct Scores<'a> {
    q: &'a [*const f32; MAX_DECODE_ROWS],
    keys: Stream,
    p: &'a mut [[f32; BLOCK]; MAX_DECODE_ROWS],
}

impl Pass for Scores<'_> {
    #[inline(always)]
    unsafe fn run<S: Simd, E: Element, const R: usize>(self) {
        let q: [*const f32; R] = std::array::from_fn(|r| self.q[r]);
        let dim = self.keys.dim;
        let whole = dim / S::LANES * S::LANES;
        for s in 0..self.keys.count {
            let k = self.keys.slot::<E>(s);
            // SAFETY: slot `s` is below the stream's count, and each of its rows and of q has `dim` elements, of which
            // vectors end at `whole <= dim`. Both are read unaligned: q may be a constant in a mapped file.
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
                        sum = S::mul_add(E::get(k, i), q[r].add(i).read_unaligned(), sum);
                    }
                    self.p[r][s] = sum;
                }
            }
        }
    }
}

/// `out[r][2..] = out[r][2..] * scales[r] + sum over s of p[r][s] * values[s]`
struct Outputs<'a> {
    p: &'a [[f32; BLOCK]; MAX_DECODE_ROWS],
    scales: &'a [f32; MAX_DECODE_ROWS],
    values: Stream,
    out: &'a [*mut f32; MAX_DECODE_ROWS],
}

impl Pass for Outputs<'_> {
    #[inline(always)]
    unsafe fn run<S: Simd, E: Element, const R: usize>(self) {
        let out: [*mut f32; R] = std::array::from_fn(|r| self.out[r].wrapping_add(2));
        let Stream { count, dim, .. } = self.values;
        let whole = dim / S::LANES * S::LANES;
        // SAFETY: each row of `out` has `dim` elements behind its two first, each slot below `count` has `dim` elements, and
        // vectors end at `whole <= dim`. `out` is in the arena and aligned.
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

/// Merges the chunks of [`DecodeChunk`] for the query rows `(batch * kv_heads + kv_head) * group_rows + row` in
/// `items`.
pub struct MergeChunks {
    pub attention: Attention,
    pub partial: *const f32,
    pub items: std::ops::Range<usize>,
}

impl Kernel for MergeChunks {
    type Output = ();
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let a = &self.attention;
        let (rows, chunks, width) = (a.group_rows(), decode_chunks(a.slots), 2 + a.dim);
        for item in self.items.clone() {
            let (pair, r) = (item / rows, item % rows);
            let (b, g) = (pair / a.kv_heads, pair % a.kv_heads);
            let (h, t) = a.place(g, r);
            let out: *mut f32 = a.out.row(b, h, t).cast();
            let stored = decode_rows(rows);
            let part = |chunk: usize| {
                self.partial
                    .wrapping_add(((pair * chunks + chunk) * stored + r) * width)
            };
            // SAFETY: the partial results have `chunks * stored` rows of `width` for each pair of batch row and KV head, and
            // `r < rows <= stored`. They and `out`, which has `dim` elements in this row, are in the arena or the caller's
            // output and aligned; the row is this item's alone.
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
                    // A chunk with NaN scores never raised its maximum; its sum is NaN.
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
