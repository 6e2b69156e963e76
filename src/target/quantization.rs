//! How weights in floating point are to be quantized, as a text: `int4,group=32,symmetric,keep=lm_head`.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::tensor::DType;
use crate::tensor::quantize::Format;
use crate::tensor::quantized::Granularity;

/// What codes are.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum CodeType {
    /// Integers of 4 bits.
    Int4,
    /// Integers of 8 bits.
    Int8,
    /// Floats of 8 bits with 4 of exponent.
    Fp8,
}

/// Which codes of a matrix `[out, in]` share a scale.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Group {
    /// Those of an output channel, which is a row.
    Channel,
    /// This many of a row, one after the other.
    Depth(usize),
    /// 32 of a row, or where that does not divide it, the largest number from 16 on below that does, or the smallest above.
    Auto,
}

/// How weights are quantized, and which are not. Its text is that of the command line, specs and manifests.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Quantization {
    /// What codes are.
    pub codes: CodeType,
    /// Which share a scale.
    pub group: Group,
    /// Codes have zero points.
    pub asymmetric: bool,
    /// What stays in floating point: [`Quantization::HEAD`], [`Quantization::EMBEDDINGS`], names and patterns.
    pub keep: Vec<String>,
}

impl Quantization {
    /// The last matrix, which makes logits.
    pub const HEAD: &'static str = "lm_head";
    /// Tables of tokens.
    pub const EMBEDDINGS: &'static str = "embeddings";

    /// With the defaults of a type: groups of 32 for int4 where that divides rows, one scale a channel for the others, symmetric; head and embeddings
    /// stay in floating point.
    pub fn new(codes: CodeType) -> Self {
        Quantization {
            codes,
            group: match codes {
                CodeType::Int4 | CodeType::Int8 => Group::Auto,
                CodeType::Fp8 => Group::Channel,
            },
            asymmetric: false,
            keep: vec![Self::HEAD.to_string(), Self::EMBEDDINGS.to_string()],
        }
    }

    /// Of a matrix `[out, in]` whose rows have so many elements.
    pub fn format(&self, depth: usize) -> Format {
        Format {
            codes: match (self.codes, self.asymmetric) {
                (CodeType::Int4, false) => DType::I4,
                (CodeType::Int4, true) => DType::U4,
                (CodeType::Int8, false) => DType::I8,
                (CodeType::Int8, true) => DType::U8,
                (CodeType::Fp8, _) => DType::F8E4M3Fn,
            },
            granularity: match self.group {
                Group::Channel => Granularity::Channel { axis: 0 },
                Group::Depth(size) => Granularity::Block { axis: 1, size },
                Group::Auto => Granularity::Block {
                    axis: 1,
                    size: usual_group(depth),
                },
            },
            zero_points: self.asymmetric,
        }
    }
}

/// See [`Group::Auto`].
fn usual_group(depth: usize) -> usize {
    const USUAL: usize = 32;
    let divides = |size: &usize| depth.is_multiple_of(*size);
    let below = (16..=USUAL).rev().find(divides);
    below.or_else(|| (USUAL..=depth).find(divides)).unwrap_or(depth.max(1))
}

impl fmt::Display for CodeType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            CodeType::Int4 => "int4",
            CodeType::Int8 => "int8",
            CodeType::Fp8 => "fp8",
        })
    }
}

/// In full: no default is left out.
impl fmt::Display for Quantization {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.codes)?;
        match self.group {
            Group::Channel => write!(f, ",group=channel")?,
            Group::Auto => write!(f, ",group=auto")?,
            Group::Depth(size) => write!(f, ",group={size}")?,
        }
        write!(f, ",{}", if self.asymmetric { "asymmetric" } else { "symmetric" })?;
        let defaults = [Self::HEAD, Self::EMBEDDINGS];
        // Names are added to the defaults, so what lacks one of them begins with none.
        if !defaults.iter().all(|name| self.keep.iter().any(|kept| kept == name)) {
            write!(f, ",keep=none")?;
        }
        self.keep.iter().try_for_each(|name| write!(f, ",keep={name}"))
    }
}

impl FromStr for Quantization {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let mut words = text.split(',').map(str::trim);
        let codes = match words.next().unwrap_or_default() {
            "int4" => CodeType::Int4,
            "int8" => CodeType::Int8,
            "fp8" => CodeType::Fp8,
            other => return Err(format!("{other:?} is not a format: use int4, int8 or fp8")),
        };
        let mut made = Quantization::new(codes);
        for word in words {
            match word
                .split_once('=')
                .map_or((word, ""), |(key, value)| (key.trim(), value.trim()))
            {
                ("symmetric", "") => made.asymmetric = false,
                ("asymmetric", "") => made.asymmetric = true,
                ("group", "channel") => made.group = Group::Channel,
                ("group", "auto") => made.group = Group::Auto,
                ("group", size) => match size.parse() {
                    Ok(size) if size > 1 => made.group = Group::Depth(size),
                    _ => {
                        return Err(format!(
                            "group={size} is not a group: use a number above 1, channel or auto"
                        ));
                    }
                },
                ("keep", "") => return Err("keep= needs a name, a pattern, or none".to_string()),
                ("keep", "none") => made.keep.clear(),
                ("keep", name) if made.keep.iter().any(|kept| kept == name) => {}
                ("keep", name) => made.keep.push(name.to_string()),
                _ => {
                    return Err(format!(
                        "{word:?} is not an option: use group=N, group=channel, group=auto, symmetric, asymmetric, keep=NAME, keep=none"
                    ));
                }
            }
        }
        if codes == CodeType::Fp8 && made.asymmetric {
            return Err("fp8 is symmetric: floats have no zero points".to_string());
        }
        Ok(made)
    }
}

impl Serialize for Quantization {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Quantization {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        text.parse().map_err(serde::de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts_go_there_and_back() {
        for (text, full) in [
            ("int4", "int4,group=auto,symmetric,keep=lm_head,keep=embeddings"),
            ("int8", "int8,group=auto,symmetric,keep=lm_head,keep=embeddings"),
            ("fp8,group=128", "fp8,group=128,symmetric,keep=lm_head,keep=embeddings"),
            (
                "int4, group=64, asymmetric, keep=none",
                "int4,group=64,asymmetric,keep=none",
            ),
            (
                "int8,keep=lm_head,keep=layers.0.*",
                "int8,group=auto,symmetric,keep=lm_head,keep=embeddings,keep=layers.0.*",
            ),
            (
                "int4,keep=none,keep=lm_head",
                "int4,group=auto,symmetric,keep=none,keep=lm_head",
            ),
            (
                "int4,group=channel,symmetric",
                "int4,group=channel,symmetric,keep=lm_head,keep=embeddings",
            ),
        ] {
            let parsed: Quantization = text.parse().unwrap();
            assert_eq!(parsed.to_string(), full);
            assert_eq!(full.parse::<Quantization>().unwrap(), parsed, "{full}");
        }
    }

    #[test]
    fn usual_groups_divide_what_they_can() {
        let sizes = [4096, 576, 48, 40, 74, 67, 8, 1].map(usual_group);
        assert_eq!(sizes, [32, 32, 24, 20, 37, 67, 8, 1]);
    }

    #[test]
    fn mistakes_are_named() {
        let error = |text: &str| text.parse::<Quantization>().unwrap_err();
        assert_eq!(error("int5"), "\"int5\" is not a format: use int4, int8 or fp8");
        assert!(error("").contains("int4, int8 or fp8"));
        assert!(error("int4,group=0").contains("group=0"));
        assert!(error("int4,group=many").contains("above 1"));
        assert!(error("int4,sym").contains("\"sym\" is not an option"));
        assert!(error("int4,symmetric=no").contains("is not an option"));
        assert!(error("fp8,asymmetric").contains("fp8 is symmetric"));
        assert!(error("int4,keep=").contains("needs a name"));
    }
}
