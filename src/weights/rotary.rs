//! The base of rotary position embeddings, derived from the tables of a canonical graph.

use crate::graph::op::Op;
use crate::graph::{Constant, Graph};
use crate::tensor::DType;

/// The kind of rotary tables in a graph.
#[derive(Clone, Debug, PartialEq)]
pub enum RotaryBase {
    /// Pair `i` of `n` turns by `base^(-i/n)` radians from one position to the next, in every table.
    Plain(f64),
    /// Anything else, with a description.
    Other(String),
}

/// The base of a graph whose tables are `cos` and `sin` of `position * base^(-i/n)`, in every row (RoFormer,
/// <https://arxiv.org/abs/2104.09864>, section 3.2.2). Bases are found to six digits, or two for half-precision tables.
pub fn base(graph: &Graph) -> RotaryBase {
    let mut found: Option<f64> = None;
    for node in graph.node_ids().map(|id| graph.node(id)) {
        let Op::RotaryEmbedding { .. } = node.op else { continue };
        let tables = [1, 2].map(|i| node.input(i).and_then(|table| graph.constant(table)));
        let [Some(cos), Some(sin)] = tables else {
            return RotaryBase::Other(format!("{:?} reads rotary tables that the graph computes", node.name));
        };
        match of_tables(cos, sin) {
            Err(why) => return RotaryBase::Other(format!("{:?}: {why}", node.name)),
            Ok(base) if found.is_none_or(|found| found == base) => found = Some(base),
            Ok(base) => {
                let other = found.unwrap_or(base);
                return RotaryBase::Other(format!("layers have the rotary bases {other} and {base}"));
            }
        }
    }
    found.map_or_else(
        || RotaryBase::Other("nothing is rotated".to_string()),
        RotaryBase::Plain,
    )
}

fn of_tables(cos: &Constant, sin: &Constant) -> Result<f64, String> {
    let unreadable = |e: crate::graph::ConstantError| format!("its rotary tables cannot be read: {e}");
    let (c, s) = (
        cos.materialize().map_err(unreadable)?,
        sin.materialize().map_err(unreadable)?,
    );
    let [rows, pairs] = c.shape()[..] else {
        return Err(format!("its rotary tables have the shape {:?}", c.shape()));
    };
    if rows < 2 || pairs < 2 || s.shape() != c.shape() {
        return Err(format!(
            "its rotary tables of shape {:?} are too small to know their base",
            c.shape()
        ));
    }
    // A half-precision table may have been rounded by the exporter and widened since, so the numbers decide.
    let (c, s) = (c.to_f64(), s.to_f64());
    let is_half = cos.dtype().is_half()
        || c.iter().all(|v| f64::from(half::f16::from_f64(*v)) == *v) && cos.dtype() == DType::F32;
    let (tolerance, digits) = if is_half { (4e-3, 2) } else { (2e-5, 6) };
    // The slowest pair is the base's power with the largest exponent; a later row makes its angle larger than rounding.
    let last = pairs - 1;
    let turns_once = |row: usize| s[row * pairs + last].abs() < 0.5 && c[row * pairs + last] > 0.5;
    let row = (1..rows).take_while(|row| turns_once(*row)).last().unwrap_or(1);
    let angle = s[row * pairs + last].atan2(c[row * pairs + last]) / row as f64;
    if angle <= 0.0 {
        return Err("its rotary tables do not turn".to_string());
    }
    let estimate = angle.powf(-(pairs as f64) / last as f64);
    let base = rounded(estimate, digits);
    for position in 0..rows {
        for pair in 0..pairs {
            let angle = position as f64 * base.powf(-(pair as f64) / pairs as f64);
            // Angles were computed in fp32: their error grows with them.
            let allowed = tolerance + angle * 1e-6;
            let at = position * pairs + pair;
            if (c[at] - angle.cos()).abs() > allowed || (s[at] - angle.sin()).abs() > allowed {
                return Err(format!(
                    "its rotary tables are not those of the base {base}: at position {position}, pair {pair}, they hold \
                     ({}, {}) for ({}, {})",
                    c[at],
                    s[at],
                    angle.cos(),
                    angle.sin()
                ));
            }
        }
    }
    Ok(base)
}

/// Rounds to this many significant digits.
fn rounded(value: f64, digits: i32) -> f64 {
    let unit = 10f64.powi(value.log10().floor() as i32 + 1 - digits);
    (value / unit).round() * unit
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tensor::Tensor;

    fn tables(pairs: usize, rows: usize, dtype: DType, frequency: impl Fn(usize) -> f64) -> [Constant; 2] {
        [f64::cos, f64::sin].map(|f| {
            let value = |i: usize| f(((i / pairs) as f32 * frequency(i % pairs) as f32).into());
            let values: Vec<f64> = (0..rows * pairs).map(value).collect();
            Constant::tensor(Tensor::from_f64_as(dtype, vec![rows, pairs], &values))
        })
    }

    #[test]
    fn bases_are_read_off_tables() {
        for (base, dtype) in [
            (1e4, DType::F32),
            (5e5, DType::F32),
            (1e6, DType::F32),
            (123456.0, DType::F32),
            (1e4, DType::F16),
            (1e6, DType::F16),
            (1e4, DType::Bf16),
        ] {
            for (pairs, rows) in [(8, 64), (64, 4096)] {
                let [cos, sin] = tables(pairs, rows, dtype, |i| base_power(base, i, pairs));
                let tolerance = if dtype == DType::F32 { 1e-5 } else { 0.0 };
                match of_tables(&cos, &sin) {
                    Ok(found) => assert!(
                        (found / base - 1.0).abs() <= tolerance,
                        "{base} {dtype} {pairs}: {found}"
                    ),
                    Err(why) => panic!("{base} {dtype} {pairs}: {why}"),
                }
            }
        }
    }

    fn base_power(base: f64, i: usize, pairs: usize) -> f64 {
        base.powf(-(i as f64) / pairs as f64)
    }

    #[test]
    fn scaled_tables_have_no_base() {
        let linear = tables(8, 64, DType::F32, |i| base_power(1e4, i, 8) / 8.0);
        assert!(of_tables(&linear[0], &linear[1]).is_err());
        let slow_pairs = tables(8, 64, DType::F32, |i| {
            base_power(1e4, i, 8) / if i > 4 { 8.0 } else { 1.0 }
        });
        assert!(of_tables(&slow_pairs[0], &slow_pairs[1]).is_err());
    }
}
