//! The parts of a quantized weight as they enter a network.

use crate::graph::Constant;
use crate::graph::quantized::Quantized;
use crate::lower::QuantizedForm;
use crate::network::WeightMode;
use crate::tensor::quantized::Granularity;
use crate::tensor::{DType, Tensor};

/// The encoding of `codes`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Coding {
    /// Codes that a Dequantize layer reads together with their scales.
    Scaled,
    /// Integers of 8 bits.
    Integers,
    /// Bytes with this many integers each.
    Bytes(usize),
    /// f8e4m3fn.
    Floats,
}

/// What is subtracted from codes before they are scaled.
#[derive(Clone, Copy, PartialEq, Debug)]
pub(super) enum Zero<T> {
    Number(i64),
    /// In the scales' shape, integers of 8 bits.
    Points(T),
    /// Zero points times scales, in the scales' shape and dtype: subtracted from values.
    Scaled(T),
}

/// The parts of a quantized weight: constants, or tensors of the network.
#[derive(Clone, Copy, Debug)]
pub(super) struct Parts<T> {
    pub granularity: Granularity,
    pub codes: T,
    pub coding: Coding,
    pub scales: T,
    pub zero: Zero<T>,
}

/// The parts as they enter the network; `None` if no layers can read them.
pub(super) fn parts(
    constant: &Constant,
    form: QuantizedForm,
    mode: WeightMode,
    is_table: bool,
) -> Option<Parts<Constant>> {
    let quantized = constant.as_quantized()?;
    if quantized.scales.as_quantized().is_some() || quantized.codes.shape().is_empty() {
        return None;
    }
    let bound = mode == WeightMode::Bind;
    let four_bits = matches!(quantized.codes.dtype(), DType::I4 | DType::U4);
    match form {
        QuantizedForm::Whole => None,
        // Rows of a table are gathered, which is not possible behind a Dequantize layer.
        _ if bound && is_table => for_elementwise(quantized),
        QuantizedForm::Elementwise if bound => for_elementwise(quantized),
        _ if bound => for_dequantize(quantized).or_else(|| for_elementwise(quantized)),
        // Constants of 8 bits are slower than floats (docs/explanation/gpu.md), and stripping them fails.
        _ if is_table || !four_bits => None,
        _ => for_dequantize(quantized),
    }
}

/// Integer codes in two's complement.
fn signed(codes: &Constant) -> Constant {
    match codes.dtype() {
        DType::U8 | DType::U4 | DType::U2 => codes.half_range_moved(),
        _ => codes.clone(),
    }
}

/// The two's complement of an unsigned code of 0.
fn lowest(codes: DType) -> i64 {
    match codes {
        DType::U8 | DType::U4 | DType::U2 => -(1 << (codes.bits() - 1)),
        _ => 0,
    }
}

/// Codes that elementwise layers read.
fn for_elementwise(quantized: Quantized<'_>) -> Option<Parts<Constant>> {
    let dtype = quantized.codes.dtype();
    let zero = match quantized.zero_points {
        Some(points) => Zero::Points(signed(points).cast(DType::I8)),
        None => Zero::Number(lowest(dtype)),
    };
    let (codes, coding, zero) = match dtype {
        DType::F8E4M3Fn => (quantized.codes.clone(), Coding::Floats, Zero::Number(0)),
        DType::I8 | DType::U8 => (signed(quantized.codes), Coding::Integers, zero),
        DType::I4 | DType::U4 | DType::I2 | DType::U2 => {
            let bytes = signed(quantized.codes).bytes_as_i8()?;
            (bytes, Coding::Bytes(8 / dtype.bits()), zero)
        }
        _ => return None,
    };
    Some(Parts {
        granularity: quantized.granularity,
        codes,
        coding,
        scales: quantized.scales.clone(),
        zero,
    })
}

/// Codes that a Dequantize layer reads with their scales. It has no zero points.
fn for_dequantize(quantized: Quantized<'_>) -> Option<Parts<Constant>> {
    let Quantized {
        codes,
        scales,
        zero_points,
        granularity,
    } = quantized;
    let dtype = codes.dtype();
    let pairs = codes.shape().last().is_some_and(|n| n.is_multiple_of(2));
    let (granularity, by_block) = in_blocks(codes.shape(), granularity)?;
    let zero = match (dtype, zero_points) {
        (DType::I4 | DType::U4, _) if !pairs => return None,
        (DType::I8 | DType::U8 | DType::I4 | DType::U4, Some(points)) => {
            let Granularity::Block { axis, .. } = granularity else {
                return None;
            };
            let each = Granularity::Block { axis, size: 1 };
            Zero::Scaled(Constant::quantized(signed(&by_block(points)), by_block(scales), None, each).ok()?)
        }
        (DType::U8 | DType::U4, None) => Zero::Scaled(by_block(scales).scaled(lowest(dtype) as f64)),
        (DType::I8 | DType::I4 | DType::F8E4M3Fn, None) => Zero::Number(0),
        _ => return None,
    };
    Some(Parts {
        granularity,
        codes: signed(codes),
        coding: Coding::Scaled,
        scales: by_block(scales),
        zero,
    })
}

/// A granularity as blocks, and the conversion of scales or zero points to blocks. With a scale per channel, TensorRT's
/// Dequantize of an input gives wrong values; constants of f8 are widened, or become part of an f8 product whose other
/// side must have the same type of scale. `None` for columns that share a scale.
fn in_blocks(shape: &[usize], granularity: Granularity) -> Option<(Granularity, impl Fn(&Constant) -> Constant)> {
    let (rows, depth) = match (granularity, shape) {
        (Granularity::Block { .. }, _) => (0, 0),
        (Granularity::Tensor | Granularity::Channel { axis: 0 }, [rows, depth]) => (*rows, *depth),
        _ => return None,
    };
    let blocks = match granularity {
        Granularity::Block { .. } => granularity,
        _ => Granularity::Block { axis: 1, size: depth },
    };
    let of_blocks = move |part: &Constant| match granularity {
        Granularity::Block { .. } => part.clone(),
        Granularity::Channel { .. } => part.reshaped(vec![rows, 1]),
        Granularity::Tensor => {
            let first = Constant::tensor(Tensor::from_i64(vec![rows], &vec![0; rows]));
            part.reshaped(vec![1, 1]).taken(0, &first)
        }
    };
    Some((blocks, of_blocks))
}

impl<T> Parts<T> {
    /// Each part with the suffix of its name.
    pub fn map<U, E>(self, mut with: impl FnMut(&str, T) -> Result<U, E>) -> Result<Parts<U>, E> {
        Ok(Parts {
            granularity: self.granularity,
            codes: with("codes", self.codes)?,
            coding: self.coding,
            scales: with("scales", self.scales)?,
            zero: match self.zero {
                Zero::Number(number) => Zero::Number(number),
                Zero::Points(points) => Zero::Points(with("zero_points", points)?),
                Zero::Scaled(offsets) => Zero::Scaled(with("offsets", offsets)?),
            },
        })
    }
}

/// The same part of each weight; all weights have the same parts.
pub(super) fn columns(all: Vec<Parts<Constant>>) -> Parts<Vec<Constant>> {
    let first = all[0].clone();
    let zero_of = |parts: &Parts<Constant>| match &parts.zero {
        Zero::Points(part) | Zero::Scaled(part) => part.clone(),
        Zero::Number(_) => unreachable!("weights that stand one below the other have the same parts"),
    };
    Parts {
        granularity: first.granularity,
        coding: first.coding,
        zero: match first.zero {
            Zero::Number(number) => Zero::Number(number),
            Zero::Points(_) => Zero::Points(all.iter().map(zero_of).collect()),
            Zero::Scaled(_) => Zero::Scaled(all.iter().map(zero_of).collect()),
        },
        codes: all.iter().map(|parts| parts.codes.clone()).collect(),
        scales: all.into_iter().map(|parts| parts.scales).collect(),
    }
}
