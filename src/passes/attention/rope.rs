//! Rotary position embedding, recognized by its effect.
//!
//! Rotation is linear in the row: for a row that is 1 in one element, it returns that pair's cosine and sine. So an
//! execution shows the kind (rotate-half or interleaved), the rotated width and the table itself, whatever form the
//! export uses. The table must be a function of the position alone, or one of two such tables, between which LongRoPE
//! chooses by the length of the run; other dynamic scalings are refused. Returns [`Rope`] uses and the distinct
//! [`Table`]s; `emit` writes `RotaryEmbedding`.

/// Cosines and sines per position, `[positions, half]` each, in fp32.
#[derive(Clone, PartialEq, Debug)]
pub struct Table {
    pub half: usize,
    pub cos: Vec<f32>,
    pub sin: Vec<f32>,
    /// The table for long runs, if it differs.
    pub long: Option<LongTable>,
}

/// The table for runs that are too long for the first table.
#[derive(Clone, PartialEq, Debug)]
pub struct LongTable {
    /// The longest run of the first table, in positions from the start of the sequence to the end of the run.
    pub after: usize,
    /// The table, with rows for all positions.
    pub table: Box<Table>,
}

impl Table {
    /// A table that is the same for all runs.
    pub fn new(half: usize, cos: Vec<f32>, sin: Vec<f32>) -> Self {
        let long = None;
        Table { half, cos, sin, long }
    }

    /// Number of positions.
    pub fn positions(&self) -> usize {
        let table = self.long.as_ref().map_or(self, |long| &long.table);
        table.cos.len() / self.half.max(1)
    }

    /// The table for a run that ends before position `end`.
    pub fn of_run(&self, end: usize) -> &Table {
        match &self.long {
            Some(long) if end > long.after => &long.table,
            _ => self,
        }
    }

    /// Whether the rows from `start` on equal those of `other`, up to rounding in their computation.
    pub fn agrees(&self, start: usize, other: &Table, tolerance: f32) -> bool {
        let near = |mine: &[f32], theirs: &[f32]| {
            let at = start * self.half;
            mine.get(at..at + theirs.len())
                .is_some_and(|mine| mine.iter().zip(theirs).all(|(a, b)| (a - b).abs() <= tolerance))
        };
        self.half == other.half && near(&self.cos, &other.cos) && near(&self.sin, &other.sin)
    }
}

/// The rotation of rows.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Rope {
    /// Index of the model's table.
    pub table: usize,
    /// Pairs are neighbors; otherwise element `i` pairs with `i + rotary_dim / 2`.
    pub interleaved: bool,
    /// Leading elements of a head that are rotated.
    pub rotary_dim: usize,
}

impl Rope {
    /// The elements of pair `i`.
    pub fn pair(interleaved: bool, rotary_dim: usize, i: usize) -> (usize, usize) {
        if interleaved {
            (2 * i, 2 * i + 1)
        } else {
            (i, i + rotary_dim / 2)
        }
    }

    /// Rotates one head's row in place, by the definition of ONNX `RotaryEmbedding`; the run ends before position `end`.
    pub fn rotate(&self, row: &mut [f32], table: &Table, position: usize, end: usize) {
        let table = table.of_run(end);
        for i in 0..self.rotary_dim / 2 {
            let (a, b) = Rope::pair(self.interleaved, self.rotary_dim, i);
            let (cos, sin) = (
                table.cos[position * table.half + i],
                table.sin[position * table.half + i],
            );
            let (x, y) = (row[a], row[b]);
            row[a] = cos * x - sin * y;
            row[b] = sin * x + cos * y;
        }
    }
}
