//! Heads that are concatenated from parts: from several projections, or from an unrotated and a rotated part.
//!
//! Multi-head latent attention has such keys: a part of each head from the latent projection, and a rotated part that
//! all heads share.

use super::projection::{Projection, Rows, Seen, Tables, noise};

/// Maximum number of parts of a head.
const MOST: usize = 8;

impl Rows<'_, '_> {
    /// The parts, each found like whole rows. `None`: there is only one part.
    pub(super) fn in_parts(&self, seen: &Seen, tables: &mut Tables) -> Result<Option<Projection>, String> {
        let starts = self.starts(seen)?;
        if starts.len() < 2 || starts.len() > MOST {
            return Ok(None);
        }
        let ends = starts[1..].iter().copied().chain([self.dim]);
        let mut parts = Vec::with_capacity(starts.len());
        for (start, end) in starts.iter().copied().zip(ends) {
            let part = self.part(start..end);
            parts.push(part.projection(&seen.part(self.dim, start..end), tables)?);
        }
        let join = |rest: Option<Projection>, part: Projection| {
            let rest = rest.map(Box::new);
            Some(Projection { rest, ..part })
        };
        Ok(parts.into_iter().rev().fold(None, join))
    }

    /// Where parts of a head begin: at the start of another source, and at the first rotated element of a source.
    fn starts(&self, seen: &Seen) -> Result<Vec<usize>, String> {
        let text = |stuck: crate::passes::partial_eval::Stuck| stuck.to_string();
        let sizes = self.columns_of_sources().map_err(text)?;
        let source = |d: usize| {
            let column = seen.columns[d];
            let ends = sizes.iter().scan(0, |end, size| {
                *end += size;
                Some(*end)
            });
            ends.take_while(|end| *end <= column).count()
        };
        let rotated = self.rotated(seen, tables_end(self))?;
        let mut starts = vec![0];
        let mut found = rotated[0];
        for d in 1..self.dim {
            let new = source(d) != source(d - 1);
            if new || (rotated[d] && !found) {
                starts.push(d);
                found = rotated[d];
            }
        }
        Ok(starts)
    }

    /// Which elements of the heads depend on the position.
    fn rotated(&self, seen: &Seen, far: usize) -> Result<Vec<bool>, String> {
        let text = |stuck: crate::passes::partial_eval::Stuck| stuck.to_string();
        let x = noise(self.columns().map_err(text)?, 7);
        let mut rotated = vec![false; self.dim];
        for past in [3, far] {
            let trial = self.evaluator.trial(1, past, 1);
            let tokens = trial.sizes.tokens;
            let fed = self.feed(&trial, |_, _, c| x[c]).map_err(text)?;
            let rows = self.run(&trial, fed).map_err(text)?;
            for (i, (column, factor)) in seen.columns.iter().zip(&seen.factors).enumerate() {
                let (h, d) = (i / self.dim, i % self.dim);
                let expected = factor * x[*column] as f32;
                let still = (rows[h * tokens * self.dim + d] - expected).abs() <= self.tolerance() * factor.abs();
                rotated[d] |= !still;
            }
        }
        Ok(rotated)
    }
}

/// A position that is large enough for slow rotations to be visible.
fn tables_end(rows: &Rows<'_, '_>) -> usize {
    rows.evaluator
        .roles
        .capacity
        .map_or(61, |capacity| capacity.saturating_sub(1).min(61))
}
