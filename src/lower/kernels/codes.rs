//! Quantized matrices in the form of the kernels: codes as stored, scales and zero points in the order of
//! [`CodeLayout`].

use crate::graph::Constant;
use crate::graph::quantized::Quantized;
use crate::network::CodeLayout;
use crate::tensor::quantized::Granularity;
use crate::tensor::{DType, Tensor};

/// The layout of a matrix `[n, k]` for activations of this dtype; `None` if no kernel reads it.
pub(super) fn layout(matrix: &Constant, activations: DType) -> Option<CodeLayout> {
    let Quantized {
        codes,
        scales,
        zero_points,
        granularity,
    } = matrix.as_quantized()?;
    let [_, k] = *codes.shape() else {
        return None;
    };
    let signed = matches!(codes.dtype(), DType::I4 | DType::I8);
    if scales.as_quantized().is_some() || scales.dtype() != activations {
        return None;
    }
    // Unsigned codes without zero points start at 0; there is no kernel for them.
    if !signed && (zero_points.is_none() || !matches!(codes.dtype(), DType::U4 | DType::U8)) {
        return None;
    }
    let layout = CodeLayout {
        group: match granularity {
            Granularity::Channel { axis: 0 } => None,
            Granularity::Block { axis: 1, size } => Some(size),
            _ => return None,
        },
        zero_points: zero_points.is_some(),
    };
    layout.fits(codes.dtype().bits(), k).then_some(layout)
}

/// The constants of a matrix that has a layout.
pub(super) struct Codes {
    /// `[n, k]`, two's complement.
    pub codes: Constant,
    pub scales: Constant,
    pub zero_points: Option<Constant>,
}

/// The parts of a matrix for which [`layout`] returned this one.
pub(super) fn codes(matrix: &Constant, layout: CodeLayout) -> Option<Codes> {
    let parts = matrix.as_quantized()?;
    let [n, k] = *parts.codes.shape() else {
        return None;
    };
    let bits = parts.codes.dtype().bits();
    let signed = matches!(parts.codes.dtype(), DType::I4 | DType::I8);
    let shape = layout.scale_shape(bits, n, k);
    let points = parts.zero_points.map(|points| match signed {
        true => points.half_range_moved(),
        false => points.clone(),
    });
    Some(Codes {
        codes: match signed {
            true => parts.codes.clone(),
            false => parts.codes.half_range_moved(),
        },
        scales: in_columns(parts.scales, &shape),
        zero_points: points.map(|points| in_columns(&points.cast(DType::U8), &shape)),
    })
}

/// `[n, groups]` as `[n / 8, columns, 8, groups of a column]`, padded with zeros to full columns; `[n]` unchanged.
fn in_columns(part: &Constant, shape: &[usize]) -> Constant {
    let (&[eighths, columns, eight, groups], &[n, all]) = (shape, part.shape()) else {
        return part.clone();
    };
    let padded = |part: Constant, axis: usize, to: usize| {
        let missing = to - part.shape()[axis];
        if missing == 0 {
            return part;
        }
        let mut shape = part.shape().to_vec();
        shape[axis] = missing;
        let bytes = part.dtype().byte_len(shape.iter().product());
        let zeros = Tensor::new(part.dtype(), shape, vec![0; bytes].into()).expect("as many bytes as elements need");
        Constant::concat(&[part, Constant::tensor(zeros)], axis)
    };
    debug_assert!(n <= eighths * eight && all <= columns * groups);
    let part = padded(part.clone(), 1, columns * groups);
    let part = padded(part, 0, eighths * eight);
    part.reshaped(vec![eighths, eight, columns, groups])
        .transposed(&[0, 2, 1, 3])
}
