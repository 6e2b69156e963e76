//! Settings of conversions and packages: target, precision, prefill, refit.
//!
//! Plain data with serde, shared by specs, manifests and the back ends. The names are part of the spec and package formats.

mod quantization;

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

pub use quantization::{CodeType, Group, Quantization};

use crate::network::Tokens;
use crate::tensor::DType;

/// Where a package runs.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug, Serialize, Deserialize)]
#[cfg_attr(feature = "cli", derive(clap::ValueEnum))]
#[serde(rename_all = "kebab-case")]
pub enum Target {
    /// Lapidary's own executor. Needs no engines; every package runs on it.
    Cpu,
    /// Engines for TensorRT-RTX.
    TensorrtRtx,
    /// Engines for full TensorRT.
    Tensorrt,
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Target::Cpu => "cpu",
            Target::TensorrtRtx => "tensorrt-rtx",
            Target::Tensorrt => "tensorrt",
        })
    }
}

/// Which weights of an engine can be replaced after it is built.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Refit {
    /// None, or for stripped weights (which must be restored to run) the same as [`Refit::Identical`].
    #[default]
    None,
    /// Every embedded and stripped weight, with any values.
    General,
    /// The same, but only by the values of the build: TensorRT may have optimized for them.
    Identical,
}

/// Element type of weights and caches.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Serialize, Deserialize)]
#[cfg_attr(feature = "cli", derive(clap::ValueEnum))]
#[serde(rename_all = "lowercase")]
pub enum Precision {
    /// 32-bit floats
    Fp32,
    /// 16-bit floats, with the range of half precision
    Fp16,
    /// 16-bit floats, with the range of fp32
    Bf16,
}

impl Precision {
    /// The element type.
    pub fn dtype(self) -> DType {
        match self {
            Precision::Fp32 => DType::F32,
            Precision::Fp16 => DType::F16,
            Precision::Bf16 => DType::Bf16,
        }
    }
}

/// How a prompt is cut for engines: fixed lengths, or one dynamic range.
///
/// In YAML and JSON a list of lengths, or a map of `min`, `opt` and `max`.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
#[serde(untagged)]
pub enum Prefill {
    /// Chunk lengths; the last chunk of a prompt is padded to the smallest that holds it.
    Chunks(Vec<usize>),
    /// Any length of a range, in one engine with a dynamic dim.
    Range(PrefillRange),
}

/// Token counts of a dynamic engine: `1 <= min <= opt <= max`.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PrefillRange {
    /// The shortest chunk.
    pub min: usize,
    /// What the engine is optimized for.
    pub opt: usize,
    /// The longest chunk.
    pub max: usize,
}

impl Prefill {
    /// The token counts of the networks, ascending.
    pub fn tokens(&self) -> Vec<Tokens> {
        match self {
            Prefill::Chunks(chunks) => chunks.iter().map(|n| Tokens::Static(*n)).collect(),
            Prefill::Range(PrefillRange { min, opt, max }) => vec![Tokens::Dynamic {
                min: *min,
                opt: *opt,
                max: *max,
            }],
        }
    }
}

// By hand and not as an untagged enum, whose only error is that nothing fits.
impl<'de> Deserialize<'de> for Prefill {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Form;
        impl<'de> serde::de::Visitor<'de> for Form {
            type Value = Prefill;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a list of chunk lengths, or min, opt and max")
            }
            fn visit_seq<A: serde::de::SeqAccess<'de>>(self, seq: A) -> Result<Prefill, A::Error> {
                Deserialize::deserialize(serde::de::value::SeqAccessDeserializer::new(seq)).map(Prefill::Chunks)
            }
            fn visit_map<A: serde::de::MapAccess<'de>>(self, map: A) -> Result<Prefill, A::Error> {
                Deserialize::deserialize(serde::de::value::MapAccessDeserializer::new(map)).map(Prefill::Range)
            }
        }
        deserializer.deserialize_any(Form)
    }
}

/// `128,512` or `1:128:512`.
impl FromStr for Prefill {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let number = |part: &str| -> Result<usize, String> {
            let part = part.trim();
            part.parse().map_err(|_| format!("{part:?} is not a number of tokens"))
        };
        if !text.contains(':') {
            let chunks = text.split(',').map(number).collect::<Result<_, _>>()?;
            return Ok(Prefill::Chunks(chunks));
        }
        match text.split(':').map(number).collect::<Result<Vec<_>, _>>()?[..] {
            [min, opt, max] => Ok(Prefill::Range(PrefillRange { min, opt, max })),
            _ => Err("a range is written min:opt:max".into()),
        }
    }
}
