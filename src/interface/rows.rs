//! The layout of a cache in memory, and how slots move when it grows.

use super::CacheShape;

/// A cache `[batch, kv_heads, capacity, head_dim]` as rows of slots: one row per head of each batch row, with
/// `capacity` slots, one per position. Only the number of slots differs between capacities.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct CacheRows {
    /// `batch * kv_heads`.
    pub rows: usize,
    /// Bytes of one slot: one head of one token.
    pub slot_bytes: usize,
}

/// A copy of the front of many rows from one pitch to another, all in bytes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct RowCopy {
    /// From the start of one row to the start of the next, in the source.
    pub from_pitch: usize,
    /// The same, in the destination.
    pub to_pitch: usize,
    /// Bytes copied per row.
    pub bytes: usize,
    /// How many rows.
    pub rows: usize,
}

impl CacheRows {
    /// The rows of a cache for `batch` sequences.
    pub fn new(shape: &CacheShape, batch: usize) -> Self {
        CacheRows {
            rows: batch * shape.kv_heads,
            slot_bytes: shape.dtype.byte_len(shape.head_dim),
        }
    }

    /// Bytes from one row to the next.
    pub fn pitch(&self, capacity: usize) -> usize {
        capacity * self.slot_bytes
    }

    /// Bytes of the whole cache.
    pub fn bytes(&self, capacity: usize) -> usize {
        self.rows * self.pitch(capacity)
    }

    /// The copy when a cache of `from` slots becomes one of `to`: the first `used` slots of every row, as many as both
    /// have.
    pub fn resize(&self, from: usize, to: usize, used: usize) -> RowCopy {
        RowCopy {
            from_pitch: self.pitch(from),
            to_pitch: self.pitch(to),
            bytes: self.pitch(used.min(from).min(to)),
            rows: self.rows,
        }
    }
}

impl RowCopy {
    /// Copies between host buffers that begin with the first row.
    pub fn run(&self, from: &[u8], to: &mut [u8]) {
        if self.bytes == 0 {
            return;
        }
        let rows = to
            .chunks_exact_mut(self.to_pitch)
            .zip(from.chunks_exact(self.from_pitch));
        for (to, from) in rows.take(self.rows) {
            to[..self.bytes].copy_from_slice(&from[..self.bytes]);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Two rows of slots of two bytes each.
    const ROWS: CacheRows = CacheRows { rows: 2, slot_bytes: 2 };

    #[test]
    fn the_live_slots_of_every_row_move() {
        let from: Vec<u8> = (1..=12).collect();
        let mut to = vec![0; ROWS.bytes(4)];
        ROWS.resize(3, 4, 2).run(&from, &mut to);
        assert_eq!(to, [1, 2, 3, 4, 0, 0, 0, 0, 7, 8, 9, 10, 0, 0, 0, 0]);
    }

    #[test]
    fn a_smaller_cache_keeps_what_it_has_room_for() {
        let from: Vec<u8> = (1..=12).collect();
        let mut to = vec![0; ROWS.bytes(1)];
        ROWS.resize(3, 1, 3).run(&from, &mut to);
        assert_eq!(to, [1, 2, 7, 8]);
    }

    #[test]
    fn nothing_live_moves_nothing() {
        let copy = ROWS.resize(0, 4, 3);
        assert_eq!(copy.bytes, 0);
        copy.run(&[], &mut []);
    }
}
