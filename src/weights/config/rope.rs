//! Rotary tables: whether a package's table agrees with a configuration.
//!
//! A table has rows of `cos(p · f_i)` and `sin(p · f_i)`, both times a factor for some scalings. The frequencies are
//! those of the papers, as transformers computes them (`modeling_rope_utils.py`): linear, YaRN
//! (<https://arxiv.org/abs/2309.00071>), Llama 3's, LongRoPE (<https://arxiv.org/abs/2402.13753>). Exporters computed
//! the tables in fp32 or half precision, some with rounded frequencies, so frequencies are compared, not bits.

use std::f64::consts::PI;

use serde_json::{Map, Value};

use crate::tensor::{DType, Tensor};

/// The frequencies of a package's tables.
pub struct Table {
    dtype: DType,
    rows: usize,
    cos: Vec<f64>,
    sin: Vec<f64>,
    half: usize,
}

/// The configuration of one kind of layer.
#[derive(Clone, Debug)]
pub struct Rope {
    /// The base of the frequencies.
    pub theta: f64,
    /// `None` for none.
    pub scaling: Option<Map<String, Value>>,
    /// `max_position_embeddings`.
    pub positions: Option<f64>,
    /// Positions of the original training before the extension, if given outside the scaling.
    pub original: Option<f64>,
}

/// Frequencies, and the factor of cos and sin.
type Frequencies = (Vec<f64>, f64);

impl Table {
    /// From `cos` and `sin` `[positions, rotary_dim / 2]`.
    pub fn new(cos: &Tensor, sin: &Tensor) -> Option<Table> {
        let [rows, half] = cos.shape()[..] else { return None };
        (cos.shape() == sin.shape() && rows >= 2 && half > 0).then(|| Table {
            dtype: cos.dtype(),
            rows,
            cos: cos.to_f64(),
            sin: sin.to_f64(),
            half,
        })
    }

    /// Only the first rows.
    pub fn first(mut self, rows: usize) -> Option<Table> {
        self.rows = rows.min(self.rows);
        self.cos.truncate(self.rows * self.half);
        self.sin.truncate(self.rows * self.half);
        (self.rows >= 2).then_some(self)
    }

    /// Elements of a head that are rotated.
    pub fn rotary_dim(&self) -> usize {
        2 * self.half
    }

    /// Whether the table is one of those that a configuration may mean; true if that is unknown.
    pub fn is(&self, rope: &Rope) -> bool {
        let candidates = rope.frequencies(self.rotary_dim(), self.rows);
        match candidates {
            Some(candidates) => candidates.iter().any(|c| self.has(c)),
            // An unknown scaling at least means that there is one.
            None => !self.has(&(default(rope.theta, self.rotary_dim()), 1.0)),
        }
    }

    /// Whether another graph's table has the same rotation, compared in the first radians, where rounded frequencies
    /// differ little.
    pub fn agrees(&self, other: &Table) -> bool {
        let tolerance = self.tolerance().max(other.tolerance());
        let end = self.rows.min(other.rows).min(8) * self.half;
        let same = |a: &[f64], b: &[f64]| a.iter().zip(b).all(|(a, b)| (a - b).abs() <= tolerance);
        self.half == other.half
            && same(&self.cos[..end], &other.cos[..end])
            && same(&self.sin[..end], &other.sin[..end])
    }

    /// Half precision has 11 and 8 bits.
    fn tolerance(&self) -> f64 {
        match self.dtype {
            DType::F16 => 4e-3,
            DType::Bf16 => 3e-2,
            _ => 2e-3,
        }
    }

    fn has(&self, (frequencies, factor): &Frequencies) -> bool {
        let tolerance = self.tolerance();
        frequencies.iter().enumerate().all(|(i, f)| {
            let (found, length) = self.frequency(i, *f);
            let rounded = [*f, half::f16::from_f64(*f).to_f64(), half::bf16::from_f64(*f).to_f64()];
            let same = rounded.iter().any(|r| (found - r).abs() <= tolerance * r.abs());
            same && (length - factor).abs() <= tolerance * factor.abs()
        })
    }

    /// The frequency of a column and the factor of its cos and sin, near `expected`: from the row at about one radian,
    /// which is the most precise.
    fn frequency(&self, column: usize, expected: f64) -> (f64, f64) {
        let row = match expected > 0.0 {
            true => (1.0 / expected).clamp(1.0, (self.rows - 1) as f64) as usize,
            false => 1,
        };
        let at = row * self.half + column;
        let (cos, sin) = (self.cos[at], self.sin[at]);
        (sin.atan2(cos) / row as f64, cos.hypot(sin))
    }

    /// For messages: the base, if it is a table without scaling.
    pub fn describe(&self) -> String {
        // The last column depends on it most; use the row that is most precise.
        let column = self.half - 1;
        let frequency = self.frequency(column, self.frequency(column, 1.0).0).0;
        let theta = frequency.powf(-(self.half as f64) / column as f64);
        match column > 0 && self.has(&(default(theta, self.rotary_dim()), 1.0)) {
            true => {
                let rounded: f64 = format!("{theta:.2e}").parse().unwrap_or(theta);
                format!("{rounded} without scaling")
            }
            false => "another rotary table".to_string(),
        }
    }
}

fn default(theta: f64, dim: usize) -> Vec<f64> {
    (0..dim / 2).map(|i| theta.powf(-2.0 * i as f64 / dim as f64)).collect()
}

impl Rope {
    /// The kind of scaling: `rope_type`, or `type` in older files.
    fn kind(&self) -> &str {
        let scaling = self.scaling.as_ref();
        let kind = scaling.and_then(|s| s.get("rope_type").or_else(|| s.get("type")));
        kind.and_then(Value::as_str).unwrap_or("default")
    }

    /// Whether the file has a scaling.
    pub fn is_scaled(&self) -> bool {
        self.kind() != "default" && self.kind() != "mrope"
    }

    fn number(&self, name: &str) -> Option<f64> {
        self.scaling.as_ref()?.get(name)?.as_f64()
    }

    /// The possible tables for `rows` positions: versions of transformers differ. `None`: unknown.
    fn frequencies(&self, dim: usize, rows: usize) -> Option<Vec<Frequencies>> {
        let plain = default(self.theta, dim);
        let divided = |factor: f64| plain.iter().map(|f| f / factor).collect::<Vec<_>>();
        Some(match self.kind() {
            "default" | "mrope" => vec![(plain, 1.0)],
            "linear" => vec![(divided(self.number("factor")?), 1.0)],
            // Scaled only beyond the positions of the model, which no stored table reaches.
            "dynamic" => match self.positions {
                Some(positions) if rows as f64 > positions => return None,
                _ => vec![(plain, 1.0)],
            },
            "llama3" => vec![(self.llama3(&plain)?, 1.0)],
            "yarn" => self.yarn(&plain, dim)?,
            "longrope" | "su" => self.longrope(&plain, rows)?,
            _ => return None,
        })
    }

    fn original(&self) -> Option<f64> {
        self.number("original_max_position_embeddings").or(self.original)
    }

    fn llama3(&self, plain: &[f64]) -> Option<Vec<f64>> {
        let (factor, original) = (self.number("factor")?, self.original()?);
        let (low, high) = (self.number("low_freq_factor")?, self.number("high_freq_factor")?);
        let scaled = plain.iter().map(|f| {
            let turns = original * f / (2.0 * PI);
            if turns > high {
                *f
            } else if turns < low {
                f / factor
            } else {
                let smooth = (turns - low) / (high - low);
                (1.0 - smooth) * f / factor + smooth * f
            }
        });
        Some(scaled.collect())
    }

    fn yarn(&self, plain: &[f64], dim: usize) -> Option<Vec<Frequencies>> {
        let named = self.number("factor")?;
        let original = self.original().or(self.positions)?;
        // Some versions derive the factor from the lengths if both are given.
        let of_lengths = self.original().and_then(|original| Some(self.positions? / original));
        let factors = [Some(named), of_lengths.filter(|factor| *factor != named)];
        let (fast, slow) = (
            self.number("beta_fast").unwrap_or(32.0),
            self.number("beta_slow").unwrap_or(1.0),
        );
        let dim_of = |turns: f64| dim as f64 * (original / (turns * 2.0 * PI)).ln() / (2.0 * self.theta.ln());
        let (mut from, mut to) = (dim_of(fast), dim_of(slow));
        let truncated = self
            .scaling
            .as_ref()
            .and_then(|s| s.get("truncate"))
            .and_then(Value::as_bool);
        if truncated != Some(false) {
            (from, to) = (from.floor(), to.ceil());
        }
        (from, to) = (from.max(0.0), to.min(dim as f64 - 1.0));
        if from == to {
            to += 0.001;
        }
        let made = factors.into_iter().flatten().map(|factor| {
            let blended = plain.iter().enumerate().map(|(i, f)| {
                let interpolated = ((i as f64 - from) / (to - from)).clamp(0.0, 1.0);
                f / factor * interpolated + f * (1.0 - interpolated)
            });
            (blended.collect(), self.yarn_factor(factor))
        });
        Some(made.collect())
    }

    fn yarn_factor(&self, factor: f64) -> f64 {
        let scale = |by: f64| {
            if factor <= 1.0 {
                1.0
            } else {
                0.1 * by * factor.ln() + 1.0
            }
        };
        let [mscale, all] = ["mscale", "mscale_all_dim"].map(|name| self.number(name).filter(|by| *by != 0.0));
        match (self.number("attention_factor"), mscale, all) {
            (Some(given), _, _) => given,
            (None, Some(mscale), Some(all)) => scale(mscale) / scale(all),
            _ => scale(1.0),
        }
    }

    fn longrope(&self, plain: &[f64], rows: usize) -> Option<Vec<Frequencies>> {
        let original = self.original().or(self.positions)?;
        let factor = match self.positions {
            Some(positions) if self.original().is_some() => positions / original,
            _ => self.number("factor")?,
        };
        let given = self.number("attention_factor");
        let attention = given.unwrap_or_else(|| match factor <= 1.0 {
            true => 1.0,
            false => (1.0 + factor.ln() / original.ln()).sqrt(),
        });
        let by = |name: &str| {
            let factors = self.scaling.as_ref()?.get(name)?.as_array()?;
            let factors: Vec<f64> = factors.iter().map(Value::as_f64).collect::<Option<_>>()?;
            (factors.len() == plain.len())
                .then(|| (plain.iter().zip(factors).map(|(f, by)| f / by).collect(), attention))
        };
        let mut made = vec![by("short_factor")?];
        if rows as f64 > original {
            made.push(by("long_factor")?);
        }
        Some(made)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rope(theta: f64, scaling: &str) -> Rope {
        let scaling: Value = serde_json::from_str(scaling).unwrap();
        Rope {
            theta,
            scaling: scaling.as_object().cloned(),
            positions: Some(4096.0),
            original: None,
        }
    }

    fn table(rope: &Rope, dim: usize, rows: usize, dtype: DType) -> Table {
        let (frequencies, factor) = rope.frequencies(dim, rows).unwrap().swap_remove(0);
        let values = |f: fn(f64) -> f64| {
            let angles = (0..rows).flat_map(|p| frequencies.iter().map(move |f| p as f64 * f));
            let values: Vec<f64> = angles.map(|a| factor * f(a)).collect();
            Tensor::from_f64_as(dtype, vec![rows, dim / 2], &values)
        };
        Table::new(&values(f64::cos), &values(f64::sin)).unwrap()
    }

    const SCALINGS: [&str; 7] = [
        "null",
        r#"{"rope_type": "linear", "factor": 8.0}"#,
        r#"{"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192}"#,
        r#"{"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024}"#,
        r#"{"type": "yarn", "factor": 8.0, "attention_factor": 1.0, "truncate": false}"#,
        r#"{"type": "longrope", "short_factor": [1, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 1.7],
            "long_factor": [1, 2, 3, 4, 5, 6, 7, 8], "factor": 8.0}"#,
        r#"{"type": "linear", "factor": 2.0}"#,
    ];

    #[test]
    fn a_table_is_that_of_its_own_description_and_of_no_other() {
        let ropes: Vec<Rope> = [1e4, 1e6]
            .iter()
            .flat_map(|theta| SCALINGS.iter().map(|s| rope(*theta, s)))
            .collect();
        for dtype in [DType::F32, DType::F16, DType::Bf16] {
            for (i, made) in ropes.iter().enumerate() {
                let table = table(made, 16, 256, dtype);
                for (k, asked) in ropes.iter().enumerate() {
                    assert_eq!(table.is(asked), i == k, "{dtype} {made:?} {asked:?}");
                }
            }
        }
    }

    #[test]
    fn a_base_is_read_back() {
        for theta in [1e4, 5e5, 1e6, 8e6] {
            for dim in [4, 16, 128] {
                let table = table(&rope(theta, "null"), dim, 256, DType::F32);
                assert_eq!(table.describe(), format!("{theta} without scaling"));
            }
        }
        assert_eq!(
            table(&rope(1e4, SCALINGS[3]), 16, 256, DType::F32).describe(),
            "another rotary table"
        );
    }

    /// A model that was cast to half precision as a whole has rounded frequencies, in fp32 tables.
    #[test]
    fn rounded_frequencies_are_accepted() {
        let made = rope(1e6, "null");
        let frequencies = default(1e6, 64).into_iter().map(|f| half::f16::from_f64(f).to_f64());
        let frequencies: Vec<f64> = frequencies.collect();
        let values = |f: fn(f64) -> f64| {
            let angles = (0..512).flat_map(|p| frequencies.iter().map(move |f| f64::from(p) * f));
            Tensor::from_f64_as(DType::F32, vec![512, 32], &angles.map(f).collect::<Vec<_>>())
        };
        let table = Table::new(&values(f64::cos), &values(f64::sin)).unwrap();
        assert!(table.is(&made));
        assert!(!table.is(&rope(5e5, "null")));
    }

    /// transformers 4.57: `ROPE_INIT_FUNCTIONS["yarn"]` and `["llama3"]` for head_dim 8, theta 10000.
    #[test]
    fn frequencies_of_the_library() {
        let yarn = rope(
            1e4,
            r#"{"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}"#,
        );
        // dims 8 · ln(64 / (32 · 2π)) / (2 ln 10000) < 0 and 1.007, which are 0 and 2.
        let (frequencies, factor) = yarn.frequencies(8, 64).unwrap().swap_remove(0);
        let expected = [1.0, 0.1 * (0.25 * 0.5 + 0.5), 0.01 / 4.0, 0.001 / 4.0];
        for (found, expected) in frequencies.iter().zip(expected) {
            assert!((found - expected).abs() < 1e-12, "{frequencies:?}");
        }
        assert!((factor - (0.1 * 4f64.ln() + 1.0)).abs() < 1e-12);
        let llama3 = rope(
            1e4,
            r#"{"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                "original_max_position_embeddings": 128}"#,
        );
        let (frequencies, _) = llama3.frequencies(8, 64).unwrap().swap_remove(0);
        // Turns over 128 positions: 20.37, 2.037, 0.2037, 0.02037.
        let smooth = (128.0 * 0.1 / (2.0 * PI) - 1.0) / 3.0;
        let expected = [1.0, 0.1 * ((1.0 - smooth) / 8.0 + smooth), 0.01 / 8.0, 0.001 / 8.0];
        for (found, expected) in frequencies.iter().zip(expected) {
            assert!((found - expected).abs() < 1e-12, "{frequencies:?}");
        }
    }
}
