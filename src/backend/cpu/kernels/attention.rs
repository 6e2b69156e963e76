//! Attention over the live slots: online softmax by blocks of slots, in fp32.
//!
//! What is attended to is decided by the mask's content alone. [`Scan`] looks at each mask once a run and says of every
//! block of [`BLOCK`] slots whether a query attends to none, some or all of it; blocks attended to by no query of an
//! item are never touched, so cost follows the live length and not the capacity. A query that attends to nothing gives
//! zeros. Values in slots that are masked out must be finite; keys may be anything.
//!
//! Query heads that share a KV head are taken together. [`Few`] is for few query rows (decode): items are chunks of
//! slots, merged by [`Merge`]. [`Many`] takes as many query rows as a GEMM tile has columns and computes scores and
//! outputs transposed, so that the softmax runs across lanes.

use super::super::simd::{Bf16, Element, F16, F32, Isa, Kernel, Simd, TileArgs};
use super::gemm::{Matrix, pack_panel};
use super::math;
use super::moves::Heads;
use crate::tensor::DType;

/// Slots that are judged and computed together.
pub const BLOCK: usize = 32;
/// Blocks in one item of [`Few`].
pub const CHUNK_BLOCKS: usize = 8;
/// Most query rows of a KV head for [`Few`].
pub const FEW: usize = 8;

const NONE: u8 = 0;
const SOME: u8 = 1;
const ALL: u8 = 2;

/// A mask `[batch, heads, tokens, slots]`, broadcast where a stride is 0.
#[derive(Clone, Copy, Debug)]
pub struct Mask {
    pub base: *const u8,
    /// Bool (true = attend) or f32 (added to the scores).
    pub storage: DType,
    pub strides: [isize; 4],
    /// From [`Scan`]: `[batch, heads, tokens, blocks]`, broadcast likewise.
    pub live: *const u8,
    pub live_strides: [isize; 3],
}

impl Mask {
    #[inline(always)]
    fn state(&self, b: usize, h: usize, t: usize, block: usize) -> u8 {
        let [sb, sh, st] = self.live_strides;
        let at = b as isize * sb + h as isize * sh + t as isize * st + block as isize;
        unsafe { *self.live.wrapping_offset(at) }
    }
    /// What to add to the score: 0, the mask's value, or -∞ where a bool is false.
    #[inline(always)]
    fn bias(&self, b: usize, h: usize, t: usize, slot: usize) -> f32 {
        let [sb, sh, st, ss] = self.strides;
        let at = b as isize * sb + h as isize * sh + t as isize * st + slot as isize * ss;
        unsafe {
            match self.storage {
                DType::Bool if *self.base.wrapping_offset(at) != 0 => 0.0,
                DType::Bool => f32::NEG_INFINITY,
                _ => self.base.cast::<f32>().wrapping_offset(at).read_unaligned(),
            }
        }
    }
}

/// Fills the table of [`Mask::live`] for the mask rows in `items`.
pub struct Scan {
    pub base: *const u8,
    pub storage: DType,
    /// The mask's own dims and strides; the last axis is the slots (or 1).
    pub dims: [usize; 4],
    pub strides: [isize; 4],
    /// Slots of the cache; the mask's last axis may be 1 and is then broadcast.
    pub slots: usize,
    /// `[dims[0], dims[1], dims[2], blocks]`, dense.
    pub live: *mut u8,
    pub items: std::ops::Range<usize>,
}

impl Scan {
    /// # Safety
    /// The pointers are valid for the shapes given; nobody else writes these rows.
    pub unsafe fn run(self, isa: Isa) {
        unsafe { isa.run(self) }
    }
}

impl Kernel for Scan {
    type Output = ();
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let blocks = self.slots.div_ceil(BLOCK);
        let [_, heads, tokens, own] = self.dims;
        for item in self.items.clone() {
            let (rest, t) = (item / tokens, item % tokens);
            let (b, h) = (rest / heads, rest % heads);
            let at = b as isize * self.strides[0] + h as isize * self.strides[1] + t as isize * self.strides[2];
            for block in 0..blocks {
                let first = block * BLOCK;
                let count = BLOCK.min(self.slots - first);
                let (mut any, mut all) = (false, true);
                for slot in first..first + count {
                    let slot = if own == 1 { 0 } else { slot as isize };
                    let at = at + slot * self.strides[3];
                    let (attends, plain) = unsafe {
                        if self.storage == DType::Bool {
                            let value = *self.base.wrapping_offset(at) != 0;
                            (value, value)
                        } else {
                            let value = self.base.cast::<f32>().wrapping_offset(at).read_unaligned();
                            (value != f32::NEG_INFINITY, value == 0.0)
                        }
                    };
                    any |= attends;
                    all &= plain;
                }
                let state = if all {
                    ALL
                } else if any {
                    SOME
                } else {
                    NONE
                };
                unsafe { *self.live.add(item * blocks + block) = state };
            }
        }
    }
}

/// The operands of one attention layer.
#[derive(Clone, Copy, Debug)]
pub struct Attention {
    /// `[batch, heads, tokens, dim]`, f32.
    pub q: Heads,
    /// `[batch, kv_heads, slots, dim]`.
    pub k: Heads,
    pub v: Heads,
    pub mask: Option<Mask>,
    /// As q.
    pub out: Heads,
    pub heads: usize,
    pub kv_heads: usize,
    pub tokens: usize,
    pub slots: usize,
    pub dim: usize,
}

impl Attention {
    /// Query rows that share a KV head.
    #[inline(always)]
    pub fn group_rows(&self) -> usize {
        self.heads / self.kv_heads * self.tokens
    }
    /// Head and token of query row `r` of KV head `g`.
    #[inline(always)]
    fn place(&self, g: usize, r: usize) -> (usize, usize) {
        (g * (self.heads / self.kv_heads) + r / self.tokens, r % self.tokens)
    }
    #[inline(always)]
    fn blocks(&self) -> usize {
        self.slots.div_ceil(BLOCK)
    }
}

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

impl Few {
    /// # Safety
    /// The pointers are valid for the shapes given; nobody else touches this item's partial result.
    pub unsafe fn run(self, isa: Isa) {
        unsafe { isa.run(self) }
    }
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

impl Merge {
    /// # Safety
    /// The pointers are valid for the shapes given; nobody else writes these rows of the output.
    pub unsafe fn run(self, isa: Isa) {
        unsafe { isa.run(self) }
    }
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

/// One panel of query rows (as many as a GEMM tile has columns) of one KV head, all slots.
pub struct Many {
    pub attention: Attention,
    /// `(batch * kv_heads + kv_head) * panels + panel`
    pub item: usize,
    /// [`many_scratch`] elements.
    pub scratch: *mut f32,
}

/// Items of [`Many`] for each batch row and KV head.
pub fn many_panels(isa: Isa, group_rows: usize) -> usize {
    group_rows.div_ceil(isa.tile_columns())
}

/// Elements of scratch that [`Many`] needs.
pub fn many_scratch(isa: Isa, dim: usize) -> usize {
    let width = isa.tile_columns();
    // Queries and outputs `[dim, width]`, keys `[dim, BLOCK]`, values `[BLOCK, dim]`, scores `[BLOCK, width]`.
    2 * dim * width + 2 * dim * BLOCK + BLOCK * width
}

/// The widest tile of any instruction set.
const WIDEST: usize = 32;

impl Many {
    /// # Safety
    /// The pointers are valid for the shapes given; nobody else writes these rows of the output.
    pub unsafe fn run(self, isa: Isa) {
        unsafe { isa.run(self) }
    }
}

impl Kernel for Many {
    type Output = ();
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let a = &self.attention;
        let width = 2 * S::LANES;
        let panels = a.group_rows().div_ceil(width);
        let (pair, panel) = (self.item / panels, self.item % panels);
        let (b, g) = (pair / a.kv_heads, pair % a.kv_heads);
        let first_row = panel * width;
        let rows = width.min(a.group_rows() - first_row);
        unsafe {
            let queries = self.scratch;
            let outputs = queries.add(a.dim * width);
            let keys = outputs.add(a.dim * width);
            let values = keys.add(a.dim * BLOCK);
            let scores = values.add(BLOCK * a.dim);
            for j in 0..width {
                if j >= rows {
                    for i in 0..a.dim {
                        *queries.add(i * width + j) = 0.0;
                    }
                    continue;
                }
                let (h, t) = a.place(g, first_row + j);
                let q: *const f32 = a.q.row(b, h, t).cast_const().cast();
                for i in 0..a.dim {
                    *queries.add(i * width + j) = *q.add(i);
                }
            }
            for i in 0..a.dim * width {
                *outputs.add(i) = 0.0;
            }
            let mut max = [f32::NEG_INFINITY; WIDEST];
            let mut sum = [0f32; WIDEST];
            for block in 0..a.blocks() {
                let mut states = [NONE; WIDEST];
                let mut seen = (false, true);
                for (j, state) in states[..rows].iter_mut().enumerate() {
                    let (h, t) = a.place(g, first_row + j);
                    *state = a.mask.as_ref().map_or(ALL, |mask| mask.state(b, h, t, block));
                    seen = (seen.0 || *state != NONE, seen.1 && *state == ALL);
                }
                if !seen.0 {
                    continue;
                }
                let first = block * BLOCK;
                let count = BLOCK.min(a.slots - first);
                let matrix = Matrix {
                    base: a.k.row(b, g, first),
                    storage: a.k.storage,
                    row_stride: 1,
                    column_stride: a.k.strides[2],
                };
                pack_panel::<S>(matrix, 0, count, 0, a.dim, keys, BLOCK);
                let mut s = 0;
                while s < count {
                    let m = S::TILE_ROWS.min(count - s).min(8);
                    let args = TileArgs {
                        depth: a.dim,
                        a: keys.add(s),
                        a_stride: BLOCK,
                        b: queries,
                        b_stride: width,
                        c: scores.add(s * width),
                        c_stride: width,
                        accumulate: false,
                    };
                    S::tile(m, args);
                    s += m;
                }
                if !seen.1
                    && let Some(mask) = &a.mask
                {
                    for (j, state) in states[..rows].iter().enumerate() {
                        if *state == ALL {
                            continue;
                        }
                        let (h, t) = a.place(g, first_row + j);
                        for s in 0..count {
                            let bias = mask.bias(b, h, t, first + s);
                            let score = scores.add(s * width + j);
                            *score = if bias == f32::NEG_INFINITY { bias } else { *score + bias };
                        }
                    }
                }
                softmax_block::<S>(scores, count, &mut max, &mut sum, outputs, a.dim);
                let (values, stride) = if a.v.storage == DType::F32 {
                    (a.v.row(b, g, first).cast_const().cast::<f32>(), a.v.strides[2] as usize)
                } else {
                    let matrix = Matrix {
                        base: a.v.row(b, g, first),
                        storage: a.v.storage,
                        row_stride: a.v.strides[2],
                        column_stride: 1,
                    };
                    pack_panel::<S>(matrix, 0, a.dim, 0, count, values, a.dim);
                    (values.cast_const(), a.dim)
                };
                let mut i = 0;
                while i < a.dim {
                    let m = S::TILE_ROWS.min(a.dim - i).min(8);
                    let args = TileArgs {
                        depth: count,
                        a: values.add(i),
                        a_stride: stride,
                        b: scores,
                        b_stride: width,
                        c: outputs.add(i * width),
                        c_stride: width,
                        accumulate: true,
                    };
                    S::tile(m, args);
                    i += m;
                }
            }
            for j in 0..rows {
                let (h, t) = a.place(g, first_row + j);
                let out: *mut f32 = a.out.row(b, h, t).cast();
                let scale = if sum[j] == 0.0 { 0.0 } else { 1.0 / sum[j] };
                for i in 0..a.dim {
                    *out.add(i) = *outputs.add(i * width + j) * scale;
                }
            }
        }
    }
}

/// Scores `[count, width]` become exponentials; the running maximum, sum and outputs are brought to the new base.
#[inline(always)]
unsafe fn softmax_block<S: Simd>(
    scores: *mut f32,
    count: usize,
    max: &mut [f32; WIDEST],
    sum: &mut [f32; WIDEST],
    outputs: *mut f32,
    dim: usize,
) {
    let width = 2 * S::LANES;
    unsafe {
        let mut new = *max;
        for s in 0..count {
            for (j, new) in new[..width].iter_mut().enumerate() {
                let x = *scores.add(s * width + j);
                *new = if x > *new { x } else { *new };
            }
        }
        let mut scale = [0f32; WIDEST];
        let mut base = [0f32; WIDEST];
        for j in 0..width {
            base[j] = if new[j] == f32::NEG_INFINITY { 0.0 } else { new[j] };
            scale[j] = math::exp::<S>(max[j] - base[j]);
            sum[j] *= scale[j];
        }
        for s in 0..count {
            for j in 0..width {
                let score = scores.add(s * width + j);
                *score = math::exp::<S>(*score - base[j]);
                sum[j] += *score;
            }
        }
        if new != *max {
            for i in 0..dim {
                for (j, scale) in scale[..width].iter().enumerate() {
                    *outputs.add(i * width + j) *= scale;
                }
            }
        }
        *max = new;
    }
}
