//! Attention over the used slots: online softmax by blocks of slots, in fp32.
//!
//! Only the mask's content decides which slots are read. [`MaskScan`] scans each mask once per run and records for
//! every block of [`BLOCK`] slots whether a query attends to none, some or all of it. Blocks without an attending query
//! in an item are never read, so the cost depends on the context length, not on the capacity. A query that attends to
//! nothing gives zeros. Values in masked slots must be finite; keys can be anything.
//!
//! Query heads that share a KV head are processed together. [`DecodeChunk`] is for few query rows (decode): items are
//! chunks of slots, merged by [`MergeChunks`]. [`PrefillPanel`] processes as many query rows as a GEMM tile has columns
//! and computes scores and outputs transposed, so that the softmax runs across lanes.

mod decode;
mod mask;
mod prefill;

pub use decode::{DecodeChunk, MAX_DECODE_ROWS, MergeChunks, decode_chunks, decode_rows};
pub use mask::{Mask, MaskScan};
pub use prefill::{PrefillPanel, prefill_panels, prefill_scratch};

use super::moves::Heads;

/// Slots that are checked and computed together.
pub const BLOCK: usize = 32;

// How much of a block a query attends to.
const NONE: u8 = 0;
const SOME: u8 = 1;
const ALL: u8 = 2;

/// The operands of one attention layer.
#[derive(Clone, Copy, Debug)]
pub struct Attention {
    /// `[batch, heads, tokens, dim]`, f32.
    pub q: Heads,
    /// `[batch, kv_heads, slots, dim]`.
    pub k: Heads,
    pub v: Heads,
    pub mask: Option<Mask>,
    /// Like q.
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
