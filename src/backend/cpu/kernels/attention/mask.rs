//! The mask of an attention, and the scan that finds the blocks of slots that are attended to.

use super::{ALL, BLOCK, NONE, SOME};
use crate::backend::cpu::simd::{Kernel, Simd};
use crate::tensor::DType;

/// A mask `[batch, heads, tokens, slots]`, broadcast where a stride is 0.
#[derive(Clone, Copy, Debug)]
pub struct Mask {
    pub base: *const u8,
    /// Bool (true = attend) or f32 (added to the scores).
    pub storage: DType,
    pub strides: [isize; 4],
    /// From [`MaskScan`]: `[batch, heads, tokens, blocks]`, broadcast likewise.
    pub live: *const u8,
    pub live_strides: [isize; 3],
}

impl Mask {
    /// Which slots query `t` of head `h` attends to in a block.
    ///
    /// # Safety
    /// The indices are inside `[batch, heads, tokens, blocks]`, and [`MaskScan`] has filled the table.
    #[inline(always)]
    pub(super) unsafe fn state(&self, b: usize, h: usize, t: usize, block: usize) -> u8 {
        let [sb, sh, st] = self.live_strides;
        let at = b as isize * sb + h as isize * sh + t as isize * st + block as isize;
        // SAFETY: an element of the table, by this function's contract; bytes have no alignment.
        unsafe { *self.live.wrapping_offset(at) }
    }
    /// What to add to the score: 0, the mask's value, or -∞ where a bool is false.
    ///
    /// # Safety
    /// The indices are inside `[batch, heads, tokens, slots]`.
    #[inline(always)]
    pub(super) unsafe fn bias(&self, b: usize, h: usize, t: usize, slot: usize) -> f32 {
        let [sb, sh, st, ss] = self.strides;
        let at = b as isize * sb + h as isize * sh + t as isize * st + slot as isize * ss;
        // SAFETY: an element of the mask, by this function's contract. Bools are read as bytes and floats unaligned: a mask
        // may be a constant in a mapped file.
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
pub struct MaskScan {
    pub base: *const u8,
    pub storage: DType,
    /// The mask's dims and strides; the last axis is the slots (or 1).
    pub dims: [usize; 4],
    pub strides: [isize; 4],
    /// Slots of the cache; the mask's last axis may be 1 and is then broadcast.
    pub slots: usize,
    /// `[dims[0], dims[1], dims[2], blocks]`, dense.
    pub live: *mut u8,
    pub items: std::ops::Range<usize>,
}

impl Kernel for MaskScan {
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
                    // SAFETY: `b`, `h`, `t` are inside the mask's own dims because `item` is, and `slot` is 0 or less than
                    // `slots`, which the last dim then is. Unaligned, as in `Mask::bias`.
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
                // SAFETY: the table has `blocks` bytes for each mask row; this row is this item's alone.
                unsafe { *self.live.add(item * blocks + block) = state };
            }
        }
    }
}
