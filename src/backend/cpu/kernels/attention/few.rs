//! Attention of few query rows, as in decode: chunks of slots by themselves, then joined.

use super::super::math;
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

/// Rows of a partial result of [`Few`]: those it computes, some perhaps twice.
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
        unsafe {
            match self.attention.k.storage {
                DType::F32 => self.rows::<S, F32>(),
                DType::F16 => self.rows::<S, F16>(),
                DType::Bf16 => self.rows::<S, Bf16>(),
                other => unreachable!("a cache of {other}"),
            }
        }
    }
}

impl Few {
    #[inline(always)]
    unsafe fn rows<S: Simd, E: Element>(self) {
        unsafe {
            // Few numbers of rows, so that the code stays small: what is in between computes some rows twice.
            match self.attention.group_rows() {
                1 => self.chunk::<S, E, 1>(),
                2 => self.chunk::<S, E, 2>(),
                3 => self.chunk::<S, E, 3>(),
                4 => self.chunk::<S, E, 4>(),
                _ => self.chunk::<S, E, 8>(),
            }
        }
    }

    #[inline(always)]
    unsafe fn chunk<S: Simd, E: Element, const R: usize>(self) {
        let a = &self.attention;
        let chunks = few_chunks(a.slots);
        let (pair, chunk) = (self.item / chunks, self.item % chunks);
        let (b, g) = (pair / a.kv_heads, pair % a.kv_heads);
        // With fewer rows than R, the last one stands in for those that are missing.
        let rows = a.group_rows();
        let places: [(usize, usize); R] = std::array::from_fn(|r| a.place(g, r.min(rows - 1)));
        let q: [*const f32; R] = std::array::from_fn(|r| a.q.row(b, places[r].0, places[r].1).cast_const().cast());
        let whole = a.dim / S::LANES * S::LANES;
        unsafe {
            let out: [*mut f32; R] = std::array::from_fn(|r| self.partial.add((self.item * R + r) * (2 + a.dim)));
            for row in out {
                *row = f32::NEG_INFINITY;
                for i in 0..=a.dim {
                    *row.add(1 + i) = 0.0;
                }
            }
            let last = ((chunk + 1) * CHUNK_BLOCKS).min(a.blocks());
            for block in chunk * CHUNK_BLOCKS..last {
                let states: [u8; R] = std::array::from_fn(|r| match &a.mask {
                    Some(mask) => mask.state(b, places[r].0, places[r].1, block),
                    None => ALL,
                });
                if states.iter().all(|s| *s == NONE) {
                    continue;
                }
                let first = block * BLOCK;
                let count = BLOCK.min(a.slots - first);
                let mut p = [[f32::NEG_INFINITY; BLOCK]; R];
                for s in 0..count {
                    let k = a.k.row(b, g, first + s).cast_const();
                    let mut acc = [S::splat(0.0); R];
                    for i in (0..whole).step_by(S::LANES) {
                        let key = E::load::<S>(k, i);
                        for r in 0..R {
                            acc[r] = S::fma(key, S::load(q[r].add(i)), acc[r]);
                        }
                    }
                    for r in 0..R {
                        let mut sum = S::sum(acc[r]);
                        for i in whole..a.dim {
                            sum = S::mul_add(E::get(k, i), *q[r].add(i), sum);
                        }
                        p[r][s] = sum;
                    }
                }
                let mut scales = [1f32; R];
                for r in 0..R {
                    let (h, t) = places[r];
                    if let Some(mask) = &a.mask
                        && states[r] != ALL
                    {
                        for s in 0..count {
                            let bias = mask.bias(b, h, t, first + s);
                            // -∞ replaces the score, so that a key that is not a number stays masked.
                            p[r][s] = if bias == f32::NEG_INFINITY {
                                bias
                            } else {
                                p[r][s] + bias
                            };
                        }
                    }
                    let (old, sum) = (*out[r], *out[r].add(1));
                    let max = p[r].iter().fold(old, |m, x| if *x > m { *x } else { m });
                    let base = if max == f32::NEG_INFINITY { 0.0 } else { max };
                    for x in &mut p[r] {
                        *x = math::exp::<S>(*x - base);
                    }
                    let mut parts = [0f32; 16];
                    for (i, x) in p[r].iter().enumerate() {
                        parts[i % 16] += x;
                    }
                    scales[r] = if old == f32::NEG_INFINITY {
                        0.0
                    } else {
                        math::exp::<S>(old - base)
                    };
                    *out[r] = max;
                    *out[r].add(1) = sum * scales[r] + parts.iter().sum::<f32>();
                }
                let v = a.v.row(b, g, first).cast_const();
                let step = a.v.strides[2] as usize * E::SIZE;
                for i in (0..whole).step_by(S::LANES) {
                    let mut acc: [S::V; R] =
                        std::array::from_fn(|r| S::mul(S::load(out[r].add(2 + i)), S::splat(scales[r])));
                    for s in 0..count {
                        let value = E::load::<S>(v.wrapping_add(s * step), i);
                        for r in 0..R {
                            acc[r] = S::fma(S::splat(p[r][s]), value, acc[r]);
                        }
                    }
                    for r in 0..R {
                        S::store(out[r].add(2 + i), acc[r]);
                    }
                }
                for i in whole..a.dim {
                    for r in 0..R {
                        let mut acc = *out[r].add(2 + i) * scales[r];
                        for s in 0..count {
                            acc = S::mul_add(p[r][s], E::get(v.wrapping_add(s * step), i), acc);
                        }
                        *out[r].add(2 + i) = acc;
                    }
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
