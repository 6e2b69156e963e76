//! Converts floats to codes such that each code compensates for the errors of the codes before it.
//!
//! Let `H = mean(x xᵀ)` `[in, in]` be the second moments of the inputs of a matrix `W` `[out, in]`. Codes with the values `Q`
//! then give the products a mean squared error of `tr((W − Q) H (W − Q)ᵀ)`. Rounding to nearest ignores correlations between
//! channels. Here the columns of a row are rounded in order, and each is first moved to the value that best compensates for
//! the errors before it. This is GPTQ (<https://arxiv.org/abs/2210.17323>) in the form of Babai's nearest plane algorithm: with
//! `H = R Rᵀ`, `R` upper triangular, and errors `e = w − q`, the error of a row is `Σ_k (Σ_{i≤k} e_i R_ik)²`, and
//!
//! ```text
//! q_k = nearest(w_k + Σ_{i<k} e_i R_ik / R_kk)
//! ```
//!
//! minimizes each term, given the errors before it. No inverse is needed. The scale of a block is searched just before its
//! columns are rounded, for the values that would compensate for all errors so far (`e R = 0` within the block), with `R_kk²` as
//! the weight of each error: its contribution after later columns have compensated for it. [`PASSES`] more passes
//! minimize the error over one code or one scale at a time.
//!
//! The codes of a row depend only on that row and `H`. Rows are computed in parallel.

mod factor;

use rayon::prelude::*;

use super::Tensor;
use super::quantize::{Code, Format, NotFinite, Scales, best_scale, packed, stored};
use super::quantized::Granularity;

pub use factor::Factor;

/// Maximum number of columns that compensate for each other: memory grows with its square.
pub const SPAN: usize = 4096;
/// Passes over all codes and scales after the first.
const PASSES: usize = 2;
/// Rows per task, so that each row of `R` is read once for all of them.
const TILE: usize = 8;

/// Lengths of the spans of a row of `depth` columns with blocks of `block` columns: columns of one span compensate for each other. Spans
/// end where blocks end, if blocks are not longer than a span.
pub fn spans(depth: usize, block: usize) -> Vec<usize> {
    let most = match block {
        0 => depth,
        // A block longer than a span is divided, and still has one scale.
        _ if block > SPAN => SPAN,
        _ => SPAN / block * block,
    };
    let count = depth.div_ceil(most.max(1)).max(1);
    (0..count).map(|i| most.min(depth - i * most)).collect()
}

/// Codes of a matrix `[out, in]` of f32, f16 or bf16, and their scales. `factors`: one for each of the [`spans`] of a row. An error if a
/// value is not finite. Panics if factors have other widths, or if the format's blocks are not contiguous within rows.
pub fn compensate(values: &Tensor, factors: &[Factor], format: Format) -> Result<(Tensor, Scales), NotFinite> {
    let [_, depth] = values.shape() else {
        panic!("a matrix has two axes");
    };
    let depth = *depth;
    assert_eq!(
        factors.iter().map(|f| f.width).sum::<usize>(),
        depth,
        "factors of other rows"
    );
    let block = match format.granularity {
        Granularity::Block { axis: 1, size } => size,
        Granularity::Channel { axis: 0 } => depth,
        other => panic!("{other} has no runs within rows"),
    };
    let wide = values.to_f32();
    let count = wide.iter().filter(|v| !v.is_finite()).count();
    if count > 0 {
        return Err(NotFinite { count });
    }
    let rounding = Rounding {
        factors,
        block,
        depth,
        format,
        code: Code::of(format),
        values,
    };
    let tiles: Vec<Tile> = wide
        .par_chunks(TILE * depth)
        .map(|rows| rounding.tile(rows))
        .collect::<Result<_, _>>()?;
    let found = tiles
        .iter()
        .flat_map(|tile| tile.scales.iter().copied().zip(tile.zeros.iter().copied()));
    let scales = Scales::of(found, values, format);
    let codes = tiles.into_iter().flat_map(|tile| tile.codes).collect();
    Ok((packed(codes, values, format), scales))
}

/// Arguments that all rows share.
struct Rounding<'a> {
    factors: &'a [Factor],
    block: usize,
    depth: usize,
    format: Format,
    code: Code,
    values: &'a Tensor,
}

/// Eight partial sums, which compile to one vector.
fn dot(a: &[f32], b: &[f32]) -> f32 {
    let (a, rest_a) = a.as_chunks::<8>();
    let (b, rest_b) = b.as_chunks::<8>();
    let mut sums = [0f32; 8];
    for (a, b) in a.iter().zip(b) {
        for ((sum, a), b) in sums.iter_mut().zip(a).zip(b) {
            *sum += a * b;
        }
    }
    sums.iter().sum::<f32>() + rest_a.iter().zip(rest_b).map(|(a, b)| a * b).sum::<f32>()
}

fn add(to: &mut [f32], from: &[f32], factor: f32) {
    to.iter_mut().zip(from).for_each(|(to, from)| *to += factor * from);
}

/// Codes, scales and zero points of some rows.
struct Tile {
    codes: Vec<u8>,
    scales: Vec<f32>,
    zeros: Vec<f32>,
}

impl Rounding<'_> {
    fn tile(&self, rows: &[f32]) -> Result<Tile, NotFinite> {
        let (depth, count) = (self.depth, rows.len() / self.depth);
        let blocks = depth.div_ceil(self.block);
        let mut tile = Tile {
            codes: vec![0; rows.len()],
            scales: vec![1.0; count * blocks],
            zeros: vec![0.0; count * blocks],
        };
        let mut start = 0;
        for factor in self.factors {
            self.span(rows, start, factor, &mut tile)?;
            start += factor.width;
        }
        Ok(tile)
    }

    /// Rounds the columns of one factor, from column `start` on.
    fn span(&self, rows: &[f32], start: usize, factor: &Factor, tile: &mut Tile) -> Result<(), NotFinite> {
        let (depth, width) = (self.depth, factor.width);
        let count = rows.len() / depth;
        let step = self.block.min(width);
        // For each row, Σ e_i R_ik over the columns rounded so far.
        let mut sums = vec![0f32; count * width];
        let mut errors = vec![0f32; count * width];
        let mut from = 0;
        while from < width {
            let end = (from + step).min(width);
            for row in 0..count {
                let values = &rows[row * depth + start + from..row * depth + start + end];
                let sums = &mut sums[row * width..(row + 1) * width];
                let at = row * depth.div_ceil(self.block) + (start + from) / self.block;
                // A block that began in an earlier span has its scale already.
                if (start + from).is_multiple_of(self.block) {
                    let whole = self.block == depth;
                    let found = match whole {
                        true => self.scale_of_row(&rows[row * depth..(row + 1) * depth]),
                        false => self.scale_of_block(values, from, factor, sums),
                    };
                    (tile.scales[at], tile.zeros[at]) = found?;
                }
                let (scale, zero) = (tile.scales[at], tile.zeros[at]);
                let codes = &mut tile.codes[row * depth + start + from..row * depth + start + end];
                let errors = &mut errors[row * width + from..row * width + end];
                for (j, value) in values.iter().enumerate() {
                    let k = from + j;
                    let upper = &factor.upper[k * width..(k + 1) * width];
                    let target = value + sums[k] / upper[k];
                    let code = self.code.nearest(target, scale, zero);
                    let error = value - (code - zero) * scale;
                    (codes[j], errors[j]) = (self.code.bits(code), error);
                    add(&mut sums[k + 1..end], &upper[k + 1..end], error);
                }
            }
            // Later blocks, for all rows while these rows of R are in the cache.
            for row in 0..count {
                let sums = &mut sums[row * width + end..(row + 1) * width];
                for (j, error) in errors[row * width + from..row * width + end].iter().enumerate() {
                    let upper = &factor.upper[(from + j) * width + end..(from + j + 1) * width];
                    add(sums, upper, *error);
                }
            }
            from = end;
        }
        for (k, upper) in factor.upper.chunks(width).enumerate() {
            (0..count).for_each(|row| sums[row * width + k] += errors[row * width + k] * upper[k]);
        }
        for _ in 0..PASSES {
            self.refine(rows, start, factor, &mut errors, &mut sums, tile);
        }
        Ok(())
    }

    /// One pass over all codes and scales of a span: each becomes the best one, given all others, so the error only decreases. `sums`:
    /// `e R` of each row.
    fn refine(
        &self,
        rows: &[f32],
        start: usize,
        factor: &Factor,
        errors: &mut [f32],
        sums: &mut [f32],
        tile: &mut Tile,
    ) {
        let (depth, width) = (self.depth, factor.width);
        let count = rows.len() / depth;
        let step = self.block.min(width);
        let mut image = vec![0f32; width];
        for from in (0..width).step_by(step) {
            let end = (from + step).min(width);
            for row in 0..count {
                let values = &rows[row * depth + start..row * depth + start + width];
                let codes = &mut tile.codes[row * depth + start..row * depth + start + width];
                let (errors, sums) = (&mut errors[row * width..][..width], &mut sums[row * width..][..width]);
                let at = row * depth.div_ceil(self.block) + (start + from) / self.block;
                let (scale, zero) = (tile.scales[at], tile.zeros[at]);
                for k in from..end {
                    let upper = &factor.upper[k * width + k..(k + 1) * width];
                    let through = dot(&sums[k..], upper);
                    let target = values[k] - errors[k] + through / factor.squares[k];
                    let code = self.code.nearest(target, scale, zero);
                    let error = values[k] - (code - zero) * scale;
                    if error != errors[k] {
                        let change = error - errors[k];
                        (codes[k], errors[k]) = (self.code.bits(code), error);
                        add(&mut sums[k..], upper, change);
                    }
                }
                // A scale that several spans share is not changed.
                if self.block > width {
                    continue;
                }
                image[from..].fill(0.0);
                for k in from..end {
                    let number = (values[k] - errors[k]) / scale;
                    add(&mut image[k..], &factor.upper[k * width + k..(k + 1) * width], number);
                }
                let square = dot(&image[from..], &image[from..]);
                let better = stored(scale + dot(&sums[from..], &image[from..]) / square, self.values.dtype());
                let change = better - scale;
                // Of the change after rounding to the scales' dtype.
                let gain = change * (2.0 * dot(&sums[from..], &image[from..]) - change * square);
                if better > 0.0 && better.is_finite() && gain > 0.0 {
                    tile.scales[at] = better;
                    add(&mut sums[from..], &image[from..], -change);
                    for k in from..end {
                        let number = (values[k] - errors[k]) / scale;
                        errors[k] = values[k] - number * better;
                    }
                }
            }
        }
    }

    /// Scale and zero point of a whole row, before anything is rounded. The columns of each span are weighted by its own factor.
    fn scale_of_row(&self, row: &[f32]) -> Result<(f32, f32), NotFinite> {
        let diagonal = |f: &Factor| {
            (0..f.width)
                .map(|k| f.upper[k * f.width + k].powi(2))
                .collect::<Vec<f32>>()
        };
        let weights: Vec<f32> = self.factors.iter().flat_map(diagonal).collect();
        best_scale(self.format, row, Some(&weights), self.values.dtype())
    }

    /// Scale and zero point of a block that begins at column `from` of a span, for the values that make the sums within the block
    /// zero: `Σ_{i≤k} e_i R_ik = 0` for each of its columns.
    fn scale_of_block(
        &self,
        block: &[f32],
        from: usize,
        factor: &Factor,
        sums: &[f32],
    ) -> Result<(f32, f32), NotFinite> {
        let (width, end) = (factor.width, from + block.len());
        let mut sums = sums[from..end].to_vec();
        let (mut moved, mut weights) = (block.to_vec(), Vec::with_capacity(block.len()));
        for j in 0..block.len() {
            let upper = &factor.upper[(from + j) * width + from..(from + j) * width + end];
            let error = -sums[j] / upper[j];
            moved[j] -= error;
            weights.push(upper[j].powi(2));
            add(&mut sums[j + 1..], &upper[j + 1..], error);
        }
        best_scale(self.format, &moved, Some(&weights), self.values.dtype())
    }
}

#[cfg(test)]
mod tests;
