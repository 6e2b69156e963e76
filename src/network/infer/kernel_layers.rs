//! The rules of Lapidary's own layers.

use super::checks::{check_dtype, check_extent};
use super::{LayerFault, Typed};
use crate::dim::Dim;
use crate::network::Tensor;
use crate::network::kernel_layers::{AttentionInputs, CodeLayout, DecodeAttention, ProductInputs, RowProduct};
use crate::tensor::DType;

/// More than any model has; a text can contain any number.
const MOST_HEADS: usize = 1 << 16;

fn is_half(dtype: DType) -> bool {
    matches!(dtype, DType::F16 | DType::Bf16)
}

fn wrong(reason: impl Into<String>) -> LayerFault {
    LayerFault::Parameter(reason.into())
}

/// Checks that input `at` has this dtype and shape.
fn check_input(inputs: &[&Tensor], at: usize, dtype: DType, shape: &[Dim]) -> Result<(), LayerFault> {
    let input = inputs[at];
    if input.dtype != dtype || input.shape != shape {
        let found = format!("{}{:?}", input.dtype, input.shape);
        return Err(wrong(format!("input {at} is {found}, but must be {dtype}{shape:?}")));
    }
    Ok(())
}

fn fixed(tensor: &Tensor, at: usize) -> Result<usize, LayerFault> {
    let dim = tensor.shape.get(at).and_then(Dim::as_const);
    let number = dim.and_then(|n| usize::try_from(n).ok());
    number.ok_or_else(|| wrong(format!("axis {at} of {:?} must be a number", tensor.name)))
}

pub(super) fn row_product(product: &RowProduct, inputs: &[&Tensor]) -> Result<Typed, LayerFault> {
    let places: Vec<usize> = (0..inputs.len()).collect();
    let at = ProductInputs::of(product, &places).ok_or(LayerFault::Arity {
        expected: "as many as its parts, norm and residual say",
        found: inputs.len(),
    })?;
    let x = inputs[at.x];
    check_dtype(at.x, x.dtype, is_half, "f16 or bf16")?;
    let Some((last, leading)) = x.shape.split_last().filter(|(_, leading)| !leading.is_empty()) else {
        return Err(wrong("x must have rows: two axes or more"));
    };
    let k = fixed(x, leading.len())?;
    let axes = (0..leading.len()).map(|axis| fixed(x, axis));
    let rows = axes
        .collect::<Result<Vec<_>, _>>()?
        .into_iter()
        .fold(1usize, usize::saturating_mul);
    if !(1..=RowProduct::MOST_ROWS).contains(&rows) {
        return Err(wrong(format!(
            "x has {rows} rows; kernels take 1 to {}",
            RowProduct::MOST_ROWS
        )));
    }
    let row = |n: usize| vec![Dim::from(n)];
    if let Some(norm) = at.norm {
        check_input(inputs, norm, x.dtype, &row(k))?;
    }
    if product.gated && product.parts.len() != 2 || product.parts.is_empty() || product.parts.len() > 3 {
        return Err(wrong(format!(
            "{} matrices; it takes two if gated, up to three otherwise",
            product.parts.len()
        )));
    }
    let mut outputs = Vec::new();
    for (part, of_part) in product.parts.iter().zip(&at.parts) {
        let weights = inputs[of_part.weights];
        let [_, depth] = &weights.shape[..] else {
            return Err(wrong(format!("input {} must be a matrix", of_part.weights)));
        };
        let n = fixed(weights, 0)?;
        check_extent(|| format!("the depth of input {}", of_part.weights), last, depth)?;
        match part.codes {
            None => check_input(inputs, of_part.weights, x.dtype, &weights.shape)?,
            Some(layout) => check_codes(
                layout,
                [n, k],
                x.dtype,
                inputs,
                (of_part.weights, of_part.scales, of_part.zero_points),
            )?,
        }
        if let Some(bias) = of_part.bias {
            check_input(inputs, bias, x.dtype, &row(n))?;
        }
        outputs.push(n);
    }
    let width = match product.gated {
        true if outputs[0] != outputs[1] => return Err(wrong(format!("gate and up have {outputs:?} rows"))),
        true => outputs[0],
        false => outputs.iter().fold(0, |sum: usize, n| sum.saturating_add(*n)),
    };
    let shape: Vec<Dim> = leading.iter().cloned().chain([Dim::from(width)]).collect();
    if let Some(residual) = at.residual {
        check_input(inputs, residual, x.dtype, &shape)?;
    }
    let dtype = if product.to_f32 { DType::F32 } else { x.dtype };
    Ok((dtype, shape))
}

/// `parts`: where codes, scales and zero points are among the inputs.
fn check_codes(
    layout: CodeLayout,
    [n, k]: [usize; 2],
    float: DType,
    inputs: &[&Tensor],
    (codes, scales, zero_points): (usize, Option<usize>, Option<usize>),
) -> Result<(), LayerFault> {
    let dtype = inputs[codes].dtype;
    if !matches!(dtype, DType::I4 | DType::I8) {
        return Err(LayerFault::DType {
            input: codes,
            found: dtype,
            wanted: "i4 or i8",
        });
    }
    if !layout.fits(dtype.bits(), k) {
        return Err(wrong(format!(
            "no kernel reads codes of {dtype} {layout:?} in rows of {k}"
        )));
    }
    let shape: Vec<Dim> = layout
        .scale_shape(dtype.bits(), n, k)
        .into_iter()
        .map(Dim::from)
        .collect();
    if let Some(scales) = scales {
        check_input(inputs, scales, float, &shape)?;
    }
    match zero_points {
        Some(points) => check_input(inputs, points, DType::U8, &shape),
        None => Ok(()),
    }
}

pub(super) fn decode_attention(attention: &DecodeAttention, inputs: &[&Tensor]) -> Result<Vec<Typed>, LayerFault> {
    let places: Vec<usize> = (0..inputs.len()).collect();
    let at = AttentionInputs::of(attention, &places).ok_or(LayerFault::Arity {
        expected: "as many as its rotation, norms and sinks say",
        found: inputs.len(),
    })?;
    let DecodeAttention { heads, kv_heads, .. } = *attention;
    let [keys, values] = at.caches.map(|i| inputs[i]);
    let [batch, cache_heads, _, width] = &keys.shape[..] else {
        return Err(wrong("the cache of keys must have four axes"));
    };
    let dtype = keys.dtype;
    check_dtype(at.caches[0], dtype, is_half, "f16 or bf16")?;
    check_input(inputs, at.caches[1], dtype, &keys.shape)?;
    check_extent(|| "the heads of the caches".to_string(), &kv_heads.into(), cache_heads)?;
    if kv_heads == 0 || heads == 0 || heads > MOST_HEADS || !heads.is_multiple_of(kv_heads) {
        return Err(wrong(format!("{heads} query heads over {kv_heads}")));
    }
    let head_dim = fixed(keys, 3)?;
    if !DecodeAttention::HEAD_SIZES.contains(&head_dim) {
        return Err(wrong(format!("no kernel attends with heads of {head_dim}")));
    }
    let row = |heads: usize| vec![batch.clone(), Dim::from(1usize), Dim::from(heads * head_dim)];
    match attention.packed {
        true => check_input(inputs, at.qkv[0], dtype, &row(heads + 2 * kv_heads))?,
        false => {
            for (input, heads) in at.qkv.into_iter().zip([heads, kv_heads, kv_heads]) {
                check_input(inputs, input, dtype, &row(heads))?;
            }
        }
    }
    check_input(inputs, at.write_indices, DType::I32, std::slice::from_ref(batch))?;
    if let (Some(rotation), Some([positions, cosines, sines])) = (attention.rotation, at.rotation) {
        let dim = rotation.rotary_dim;
        if dim == 0 || !dim.is_multiple_of(2) || dim > head_dim {
            return Err(wrong(format!(
                "rotary_dim {dim} must be even, above 0 and within the head's {head_dim}"
            )));
        }
        check_input(inputs, positions, DType::I32, &[batch.clone(), Dim::from(1usize)])?;
        let rows = inputs[cosines].shape.first().cloned().unwrap_or_default();
        for table in [cosines, sines] {
            check_input(inputs, table, DType::F32, &[rows.clone(), Dim::from(dim / 2)])?;
        }
    }
    for norm in [at.query_norm, at.key_norm].into_iter().flatten() {
        check_input(inputs, norm, dtype, std::slice::from_ref(width))?;
    }
    if let Some(sinks) = at.sinks {
        check_input(inputs, sinks, DType::F32, &[Dim::from(heads)])?;
    }
    if attention.window == Some(0) {
        return Err(wrong("a window of no slots"));
    }
    let cache = (dtype, keys.shape.clone());
    debug_assert_eq!(values.shape, keys.shape);
    Ok(vec![(dtype, row(heads)), cache.clone(), cache])
}
