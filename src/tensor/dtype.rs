//! Element types, and the table of their properties.
//!
//! A new element type is one variant and one row of [`TABLE`]; conversions come with the row where the type is an integer
//! or one of the narrow floats of [`super::narrow`]. Nothing else in the crate lists all types, except where a library has
//! its own names for some of them (TensorRT, tract).
//!
//! # Types that are only stored
//!
//! Integers below a byte and floats of 8 bits and less hold quantized weights. ONNX gives them to `DequantizeLinear`,
//! `QuantizeLinear`, `Cast` and operators that move elements, and not to arithmetic
//! (<https://onnx.ai/onnx/technical/float8.html>, [int4](https://onnx.ai/onnx/technical/int4.html),
//! [int2](https://onnx.ai/onnx/technical/int2.html), [float4](https://onnx.ai/onnx/technical/float4.html)).
//! [`DType::is_storage_only`] is true for them, and [`DType::is_float`] and [`DType::is_int`], which mean arithmetic
//! types, are false: code that computes with floats or integers refuses them without listing them.
//!
//! # Packing
//!
//! Types below a byte are packed as ONNX packs them: the first element is in the lowest bits of the first byte, the
//! last byte is padded with zeros, and rows are not padded: a tensor of n elements of b bits takes ⌈n·b/8⌉ bytes
//! (`TensorProto.raw_data` in <https://github.com/onnx/onnx/blob/main/onnx/onnx.proto>).

use std::fmt;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// The element types Lapidary reads and stores.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub enum DType {
    /// One byte, 0 or 1.
    Bool,
    /// Unsigned, 8 bits.
    U8,
    /// Two's complement, 8 bits.
    I8,
    /// Two's complement, 32 bits.
    I32,
    /// Two's complement, 64 bits.
    I64,
    /// IEEE half precision.
    F16,
    /// The upper half of an f32.
    Bf16,
    /// IEEE single precision.
    F32,
    /// IEEE double precision. Appears only in constant arithmetic of some exporters; never lowered.
    F64,
    /// Unsigned, 4 bits; only stored.
    U4,
    /// Two's complement, 4 bits; only stored.
    I4,
    /// Unsigned, 2 bits; only stored.
    U2,
    /// Two's complement, 2 bits; only stored.
    I2,
    /// 8 bits with 4 of exponent, finite except NaN, up to 448; only stored.
    F8E4M3Fn,
    /// 8 bits with 5 of exponent, infinities and NaN as IEEE has them, up to 57344; only stored.
    F8E5M2,
    /// 4 bits with 2 of exponent, all finite, up to 6; only stored.
    F4E2M1,
    /// A power of two, 2^-127 to 2^127, or NaN: the scale of a block of the microscaling formats; only stored.
    F8E8M0,
    /// 4 bits that choose one of the 16 numbers of bitsandbytes' `nf4`, from -1 to 1; only stored.
    Nf4,
    /// 4 bits that choose one of the 16 numbers of bitsandbytes' `fp4`, from -1 to 1; only stored. Not `F4E2M1`: its smallest
    /// magnitude differs, and its largest is 1.
    Fp4,
}

/// The numbers of `nf4`, ascending: quantiles of the normal distribution (QLoRA, arXiv 2305.14314, appendix E; the digits
/// are those of bitsandbytes' and ONNX Runtime's tables, which are equal).
const NF4: [f32; 16] = [
    -1.0,
    -0.696_192_8,
    -0.525_073_05,
    -0.394_917_5,
    -0.284_441_38,
    -0.184_773_43,
    -0.091_050_036,
    0.0,
    0.079_580_3,
    0.160_930_2,
    0.246_112_3,
    0.337_915_24,
    0.440_709_83,
    0.562_617,
    0.722_956_84,
    1.0,
];

/// The numbers of bitsandbytes' `fp4`; the sign is the highest bit.
const FP4: [f32; 16] = [
    0.0,
    0.005_208_333_5,
    0.666_666_7,
    1.0,
    0.333_333_34,
    0.5,
    0.166_666_67,
    0.25,
    -0.0,
    -0.005_208_333_5,
    -0.666_666_7,
    -1.0,
    -0.333_333_34,
    -0.5,
    -0.166_666_67,
    -0.25,
];

/// How the bits of an element are read.
#[derive(Clone, Copy, PartialEq, Debug)]
pub(crate) enum Numbers {
    Bool,
    Unsigned,
    /// Two's complement.
    Signed,
    Float(FloatFormat),
    /// The number of every code.
    Table(&'static [f32; 16]),
}

/// A binary float: sign, exponent and mantissa from the top, the exponent's bias `2^(exponent - 1) - 1`. `F8E8M0` has no
/// sign, and its exponent field 0 is a number like the others.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct FloatFormat {
    /// Bits of the exponent.
    pub exponent: u32,
    /// Bits of the mantissa, without the implied one.
    pub mantissa: u32,
    pub specials: Specials,
}

/// Which codes of a float are not numbers.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Specials {
    /// An exponent of all ones: infinity if the mantissa is 0, else NaN.
    Ieee,
    /// All ones, in exponent and mantissa: NaN.
    NanOnly,
    /// None: every code is a finite number.
    Finite,
}

impl FloatFormat {
    pub fn bias(self) -> i32 {
        (1 << (self.exponent - 1)) - 1
    }

    /// The largest finite number.
    pub fn max(self) -> f64 {
        let ulp = 0.5f64.powi(self.mantissa as i32);
        match self.specials {
            Specials::Ieee => (2.0 - ulp) * 2f64.powi(self.bias()),
            // Of the highest exponent only the highest mantissa is special; without a mantissa, all of it.
            Specials::NanOnly if self.mantissa == 0 => 2f64.powi(self.bias()),
            Specials::NanOnly => (2.0 - 2.0 * ulp) * 2f64.powi(self.bias() + 1),
            Specials::Finite => (2.0 - ulp) * 2f64.powi(self.bias() + 1),
        }
    }
}

/// Properties of an element type.
struct Row {
    dtype: DType,
    /// In dumps, manifests and messages.
    name: &'static str,
    bits: usize,
    numbers: Numbers,
    /// `TensorProto.DataType`, and ONNX's own name in lower case; `None` if ONNX has no such type.
    onnx: Option<(i32, &'static str)>,
    /// In the header of a safetensors file; `None` if the format has no such type.
    safetensors: Option<&'static str>,
    /// Not for arithmetic: see the module's head.
    storage_only: bool,
}

const fn float(exponent: u32, mantissa: u32, specials: Specials) -> Numbers {
    Numbers::Float(FloatFormat {
        exponent,
        mantissa,
        specials,
    })
}

/// One row per type, in the order of the variants.
#[rustfmt::skip]
const TABLE: [Row; 19] = {
    use Numbers::{Bool, Signed, Table, Unsigned};
    use Specials::{Finite, Ieee, NanOnly};
    const fn row(
        dtype: DType, name: &'static str, bits: usize, numbers: Numbers,
        onnx: Option<(i32, &'static str)>, safetensors: Option<&'static str>, storage_only: bool,
    ) -> Row {
        Row { dtype, name, bits, numbers, onnx, safetensors, storage_only }
    }
    [
        row(DType::Bool,     "bool",     8,  Bool,                  Some((9, "bool")),          Some("BOOL"),    false),
        row(DType::U8,       "u8",       8,  Unsigned,              Some((2, "uint8")),         Some("U8"),      false),
        row(DType::I8,       "i8",       8,  Signed,                Some((3, "int8")),          Some("I8"),      false),
        row(DType::I32,      "i32",      32, Signed,                Some((6, "int32")),         Some("I32"),     false),
        row(DType::I64,      "i64",      64, Signed,                Some((7, "int64")),         Some("I64"),     false),
        row(DType::F16,      "f16",      16, float(5, 10, Ieee),    Some((10, "float16")),      Some("F16"),     false),
        row(DType::Bf16,     "bf16",     16, float(8, 7, Ieee),     Some((16, "bfloat16")),     Some("BF16"),    false),
        row(DType::F32,      "f32",      32, float(8, 23, Ieee),    Some((1, "float32")),       Some("F32"),     false),
        row(DType::F64,      "f64",      64, float(11, 52, Ieee),   Some((11, "float64")),      Some("F64"),     false),
        row(DType::U4,       "u4",       4,  Unsigned,              Some((21, "uint4")),        None,            true),
        row(DType::I4,       "i4",       4,  Signed,                Some((22, "int4")),         None,            true),
        row(DType::U2,       "u2",       2,  Unsigned,              Some((25, "uint2")),        None,            true),
        row(DType::I2,       "i2",       2,  Signed,                Some((26, "int2")),         None,            true),
        row(DType::F8E4M3Fn, "f8e4m3fn", 8,  float(4, 3, NanOnly),  Some((17, "float8e4m3fn")), Some("F8_E4M3"), true),
        row(DType::F8E5M2,   "f8e5m2",   8,  float(5, 2, Ieee),     Some((19, "float8e5m2")),   Some("F8_E5M2"), true),
        row(DType::F4E2M1,   "f4e2m1",   4,  float(2, 1, Finite),   Some((23, "float4e2m1")),   Some("F4"),      true),
        row(DType::F8E8M0,   "f8e8m0",   8,  float(8, 0, NanOnly),  Some((24, "float8e8m0")),   Some("F8_E8M0"), true),
        row(DType::Nf4,      "nf4",      4,  Table(&NF4),           None,                       None,            true),
        row(DType::Fp4,      "fp4",      4,  Table(&FP4),           None,                       None,            true),
    ]
};

impl DType {
    /// Every element type.
    pub fn all() -> impl Iterator<Item = DType> {
        TABLE.iter().map(|row| row.dtype)
    }

    #[inline]
    fn row(self) -> &'static Row {
        &TABLE[self as usize]
    }

    /// In dumps, manifests and messages: `f16`.
    pub fn name(self) -> &'static str {
        self.row().name
    }

    /// Bits of one element.
    #[inline]
    pub fn bits(self) -> usize {
        self.row().bits
    }

    /// Whether several elements share a byte.
    pub fn is_packed(self) -> bool {
        self.bits() < 8
    }

    /// Bytes of this many elements, packed (see the module's head). Saturates.
    pub fn byte_len(self, elements: usize) -> usize {
        self.checked_byte_len(elements).unwrap_or(usize::MAX)
    }

    /// [`DType::byte_len`]; `None` if that is more than a `usize` holds.
    pub fn checked_byte_len(self, elements: usize) -> Option<usize> {
        let bits = elements as u128 * self.bits() as u128;
        usize::try_from(bits.div_ceil(8)).ok()
    }

    /// Bytes of a dense tensor of a shape that comes from a file; `None` if that is more than a `usize` holds.
    pub fn byte_len_of(self, shape: &[usize]) -> Option<usize> {
        let elements = shape.iter().try_fold(1usize, |n, d| n.checked_mul(*d))?;
        self.checked_byte_len(elements)
    }

    /// Bytes of one element, for code that addresses elements; not for packed types. Panics if the type is packed,
    /// which is a bug: callers refuse such types first.
    #[inline]
    pub fn element_bytes(self) -> usize {
        let bits = self.bits();
        assert!(bits >= 8, "bug: elements of {self} have no addresses of their own");
        bits / 8
    }

    /// Whether it is an arithmetic float: f16, bf16, f32 or f64, not a narrow float, which is only stored.
    #[inline]
    pub fn is_float(self) -> bool {
        matches!(self.numbers(), Numbers::Float(_)) && !self.is_storage_only()
    }

    /// Whether its codes are floats of any width or from a table, including storage-only types.
    pub fn is_float_format(self) -> bool {
        matches!(self.numbers(), Numbers::Float(_) | Numbers::Table(_))
    }

    /// Whether it is an arithmetic integer; false for bool.
    pub fn is_int(self) -> bool {
        matches!(self.numbers(), Numbers::Signed | Numbers::Unsigned) && !self.is_storage_only()
    }

    /// Whether it is f16 or bf16, which are computed in f32 and rounded.
    pub fn is_half(self) -> bool {
        self.is_float() && self.bits() == 16
    }

    /// Whether no arithmetic is defined on it: quantized weights and their scales.
    #[inline]
    pub fn is_storage_only(self) -> bool {
        self.row().storage_only
    }

    /// The largest finite number, also for integers.
    pub fn max(self) -> f64 {
        match self.numbers() {
            Numbers::Bool => 1.0,
            Numbers::Float(format) => format.max(),
            Numbers::Table(_) => 1.0,
            Numbers::Signed | Numbers::Unsigned => self.int_range().1 as f64,
        }
    }

    /// The smallest and the largest integer of an integer type or bool; for a float, the range in which every integer
    /// is exact (as far as an i64 goes).
    pub fn int_range(self) -> (i64, i64) {
        match self.numbers() {
            Numbers::Bool => (0, 1),
            Numbers::Table(_) => (-1, 1),
            Numbers::Unsigned => (0, (1 << self.bits()) - 1),
            Numbers::Signed => (i64::MIN >> (64 - self.bits()), i64::MAX >> (64 - self.bits())),
            // All integers up to 2^(mantissa + 1), unless the exponent ends before.
            Numbers::Float(format) => {
                let exact = 2f64.powi(format.mantissa as i32 + 1).min(format.max()) as i64;
                (if self == DType::F8E8M0 { 1 } else { -exact }, exact)
            }
        }
    }

    #[inline]
    pub(crate) fn numbers(self) -> Numbers {
        self.row().numbers
    }

    /// `TensorProto.DataType`; `None` if ONNX has no such type.
    pub(crate) fn onnx_code(self) -> Option<i32> {
        self.row().onnx.map(|(code, _)| code)
    }

    /// ONNX's name, `float16`; Lapidary's if ONNX has no such type.
    pub(crate) fn onnx_name(self) -> &'static str {
        self.row().onnx.map_or(self.name(), |(_, name)| name)
    }

    pub(crate) fn of_onnx_code(code: i32) -> Option<DType> {
        let is_it = |row: &&Row| row.onnx.is_some_and(|(known, _)| known == code);
        TABLE.iter().find(is_it).map(|row| row.dtype)
    }

    /// The name in a safetensors header; `None` if the format has no such type.
    pub(crate) fn safetensors_name(self) -> Option<&'static str> {
        self.row().safetensors
    }

    pub(crate) fn of_safetensors_name(name: &str) -> Option<DType> {
        TABLE
            .iter()
            .find(|row| row.safetensors == Some(name))
            .map(|row| row.dtype)
    }
}

impl fmt::Display for DType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// A name that is not a [`DType::name`].
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{name:?} is not an element type; there are {}", DType::all().map(DType::name).collect::<Vec<_>>().join(", "))]
pub struct UnknownDType {
    /// The name found.
    pub name: String,
}

impl std::str::FromStr for DType {
    type Err = UnknownDType;
    fn from_str(name: &str) -> Result<Self, UnknownDType> {
        let row = TABLE.iter().find(|row| row.name == name);
        row.map(|row| row.dtype)
            .ok_or_else(|| UnknownDType { name: name.to_string() })
    }
}

impl Serialize for DType {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(self.name())
    }
}

impl<'de> Deserialize<'de> for DType {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let name = std::borrow::Cow::<str>::deserialize(deserializer)?;
        name.parse().map_err(serde::de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_is_in_the_order_of_the_variants_and_names_nothing_twice() {
        for (i, row) in TABLE.iter().enumerate() {
            assert_eq!(row.dtype as usize, i, "{}", row.name);
            assert_eq!(row.name.parse(), Ok(row.dtype));
            if let Some((code, _)) = row.onnx {
                assert_eq!(DType::of_onnx_code(code), Some(row.dtype));
            }
            assert_eq!(
                DType::of_safetensors_name(row.safetensors.unwrap_or("-")).is_some(),
                row.safetensors.is_some()
            );
            let text = serde_json::to_string(&row.dtype).unwrap();
            assert_eq!(text, format!("{:?}", row.name));
            assert_eq!(serde_json::from_str::<DType>(&text).unwrap(), row.dtype);
        }
        assert_eq!(DType::of_onnx_code(18), None, "float8e4m3fnuz");
        assert!(
            serde_json::from_str::<DType>("\"f8e4m3\"")
                .unwrap_err()
                .to_string()
                .contains("f8e4m3fn")
        );
    }

    #[test]
    fn sizes() {
        assert_eq!(DType::F16.byte_len(3), 6);
        assert_eq!([0, 1, 2, 3, 8].map(|n| DType::I4.byte_len(n)), [0, 1, 1, 2, 4]);
        assert_eq!([0, 1, 4, 5].map(|n| DType::U2.byte_len(n)), [0, 1, 1, 2]);
        assert_eq!(DType::U2.byte_len(usize::MAX), usize::MAX / 4 + 1);
        assert_eq!(DType::U8.byte_len_of(&[usize::MAX, 2]), None);
        assert_eq!(DType::I64.checked_byte_len(usize::MAX), None);
    }

    #[test]
    fn limits_are_those_of_the_specifications() {
        for (dtype, max) in [
            (DType::F16, 65504.0),
            (DType::Bf16, f64::from(half::bf16::MAX)),
            (DType::F32, f64::from(f32::MAX)),
            (DType::F64, f64::MAX),
            (DType::F8E4M3Fn, 448.0),
            (DType::F8E5M2, 57344.0),
            (DType::F4E2M1, 6.0),
            (DType::F8E8M0, 2f64.powi(127)),
            (DType::I4, 7.0),
            (DType::U2, 3.0),
        ] {
            assert_eq!(dtype.max(), max, "{dtype}");
        }
        assert_eq!(DType::I4.int_range(), (-8, 7));
        assert_eq!(DType::U4.int_range(), (0, 15));
        assert_eq!(DType::I2.int_range(), (-2, 1));
        assert_eq!(DType::I64.int_range(), (i64::MIN, i64::MAX));
        assert_eq!(DType::F16.int_range(), (-2048, 2048));
        assert_eq!(DType::Bf16.int_range(), (-256, 256));
    }
}
