//! The launch of a product of few rows: `ProductArguments` of `../device/decode/product.cu`.

use super::arguments::Arguments;
use super::launch::Launch;
use super::module::Modules;
use super::variant::{Form, RowsOfX, Shape, choose, choose_for_rows};
use crate::backend::tensorrt::run::RunError;
use crate::network::{CodeLayout, Layer, Network, ProductInputs, RowActivation, RowProduct, TensorId};
use crate::tensor::DType;

/// Size of the struct, and offsets of its fields. A part has 40 bytes.
const BYTES: usize = 200;
const PART: usize = 40;
const X: usize = 120;
const NORM: usize = 128;
const Y: usize = 136;
const RESIDUAL: usize = 144;
const DEPTH: usize = 152;
const ROWS: usize = 156;
const X_STRIDE: usize = 160;
const Y_STRIDE: usize = 164;
const RESIDUAL_STRIDE: usize = 168;
const TILES: usize = 172;
const SECOND: usize = 176;
const THIRD: usize = 180;
const GATED: usize = 184;
const ACTIVATION: usize = 188;
const Y_FLOAT: usize = 192;
const EPSILON: usize = 196;

/// More than any tile, for parts that do not exist.
const NO_TILE: usize = 1 << 30;

/// What determines the launch of a product.
struct Sizes {
    /// Rows of each matrix.
    rows: Vec<usize>,
    depth: usize,
    norm: bool,
}

pub(super) fn launch(
    modules: &Modules,
    network: &Network,
    layer: &Layer,
    product: &RowProduct,
) -> Result<Launch, RunError> {
    let limits = modules.limits()?;
    let inputs = ProductInputs::of(product, &layer.inputs).expect("verified");
    let extent = |id: TensorId, axis: usize| {
        let dim = network.tensor(id).shape[axis].as_const();
        dim.expect("networks of kernels have numbers") as usize
    };
    let matrix = inputs.parts[0].weights;
    let form = Form {
        dtype: network.tensor(inputs.x).dtype,
        weights: network.tensor(matrix).dtype,
        layout: product.parts[0].codes,
    };
    let sizes = Sizes {
        rows: inputs.parts.iter().map(|part| extent(part.weights, 0)).collect(),
        depth: extent(matrix, 1),
        norm: product.norm.is_some(),
    };
    let x_rows = (0..network.tensor(inputs.x).shape.len() - 1)
        .map(|axis| extent(inputs.x, axis))
        .product();
    let all_rows = sizes.rows.iter().sum();
    let too_large = || RunError::SharedMemory {
        layer: layer.name.clone(),
        available: limits.shared,
    };
    let bytes = |shape: Shape, taken: RowsOfX| shared_bytes(form, shape, (x_rows, taken), &sizes);
    let of_one = |shape: Shape| shared_bytes(form, shape, (1, RowsOfX::ONE), &sizes);
    let chosen = choose(form, (all_rows, sizes.depth), product.gated, limits, of_one);
    let (one, blocks) = chosen.ok_or_else(too_large)?;
    let (shape, taken) = match x_rows {
        1 => (one, RowsOfX::ONE),
        rows => choose_for_rows(form, one, rows, sizes.norm, limits, bytes).ok_or_else(too_large)?,
    };
    let shared = bytes(shape, taken);
    let blocks = match x_rows {
        1 => blocks,
        _ => blocks.min((limits.shared / shared) as u32).max(1),
    };
    let tile = 8 * shape.tiles;
    let tiles: Vec<usize> = match product.gated {
        // Half of a block's rows are gate's, half up's.
        true => vec![sizes.rows[0].div_ceil(tile / 2)],
        false => sizes.rows.iter().map(|rows| rows.div_ceil(tile)).collect(),
    };
    let count: usize = tiles.iter().sum();
    let name = |id: TensorId| network.tensor(id).name.as_str();
    let width = if product.gated { sizes.rows[0] } else { all_rows };
    let mut arguments = Arguments::new(BYTES);
    let mut first = 0;
    for (i, (part, rows)) in inputs.parts.iter().zip(&sizes.rows).enumerate() {
        let at = i * PART;
        arguments.operand(at, name(part.weights));
        let others = [(8, part.scales), (16, part.zero_points), (24, part.bias)];
        for (field, id) in others.into_iter().filter_map(|(field, id)| Some((field, id?))) {
            arguments.operand(at + field, name(id));
        }
        arguments.int(at + 32, *rows);
        arguments.int(at + 36, first);
        first += if product.gated { 0 } else { *rows };
    }
    arguments.operand(X, name(inputs.x));
    arguments.operand(Y, name(layer.outputs[0]));
    for (field, id) in [(NORM, inputs.norm), (RESIDUAL, inputs.residual)] {
        if let Some(id) = id {
            arguments.operand(field, name(id));
        }
    }
    for (field, value) in [
        (DEPTH, sizes.depth),
        (ROWS, x_rows),
        (X_STRIDE, sizes.depth),
        (Y_STRIDE, width),
        (RESIDUAL_STRIDE, width),
        (TILES, count),
        (SECOND, if tiles.len() > 1 { tiles[0] } else { NO_TILE }),
        (THIRD, if tiles.len() > 2 { tiles[0] + tiles[1] } else { NO_TILE }),
        (GATED, usize::from(product.gated)),
        (ACTIVATION, activation(product.activation)),
        (Y_FLOAT, usize::from(product.to_f32)),
    ] {
        arguments.int(field, value);
    }
    arguments.float(EPSILON, product.norm.unwrap_or(0.0));
    let module = modules.get(&form.archive(), &form.variant(shape, taken), limits.target)?;
    let grid = (count as u32).min(limits.multiprocessors * blocks).max(1);
    let threads = 32 * shape.warps as u32;
    let launch = Launch::new(&layer.name, module, [grid, 1, 1], threads, shared, arguments, None)?;
    Ok(launch.with(0, limits.target >= 90))
}

/// The numbers in the kernel's `activate`.
fn activation(activation: RowActivation) -> usize {
    match activation {
        RowActivation::None => 0,
        RowActivation::Silu => 1,
        RowActivation::GeluErf => 2,
        RowActivation::GeluTanh => 3,
        RowActivation::Relu => 4,
        RowActivation::ReluSquared => 5,
    }
}

/// Dynamic shared memory per block for this many rows of x, in bytes: weights (and streamed x) in flight, sums of
/// warps, offsets of codes, the norm's sums and weights, and x if it is not streamed.
fn shared_bytes(form: Form, shape: Shape, (rows, taken): (usize, RowsOfX), sizes: &Sizes) -> usize {
    let (bits, Shape { warps, tiles, stages }) = (form.bits(), shape);
    let depth = CodeLayout::depth(bits);
    let layout = form.layout.filter(|layout| layout.group.is_some());
    let zeros = layout.is_some_and(|layout| layout.zero_points);
    let groups = layout
        .and_then(|layout| layout.group)
        .map_or(0, |group| (depth / group).max(1));
    let scales = tiles * 8 * groups * size_of::<u16>();
    let points = if zeros { tiles * 8 * groups } else { 0 };
    let x_in_flight = if taken.streamed {
        taken.most * depth * size_of::<u16>()
    } else {
        0
    };
    let stage = (tiles * 512 + scales + points).next_multiple_of(16) + x_in_flight;
    let columns = (sizes.depth * bits).div_ceil(512);
    let padded = columns * depth;
    let mut bytes = warps * stages * stage + 64 * warps * tiles * rows;
    let offsets = bits == 4 || bits == 8 && form.dtype == DType::F16 || zeros;
    if groups > 0 && offsets && !taken.streamed {
        let kinds = if zeros { 2 } else { 1 };
        bytes += 4 * warps * columns.div_ceil(warps) * groups * kinds * taken.most;
        bytes = bytes.next_multiple_of(16);
    }
    if sizes.norm {
        bytes += 16 * (rows * warps).div_ceil(4) + 2 * padded;
    }
    let x = (2 * padded).next_multiple_of(128) + if bits == 16 { 16 } else { 64 };
    bytes + if taken.streamed { 0 } else { rows * x }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// q, k and v at 8 B: values from `harness/kernels.py`.
    #[test]
    fn shared_memory_is_that_of_the_harness() {
        let form = |weights, group| Form {
            dtype: DType::F16,
            weights,
            layout: (weights != DType::F16).then_some(CodeLayout {
                group,
                zero_points: false,
            }),
        };
        let sizes = Sizes {
            rows: vec![4096, 1024, 1024],
            depth: 4096,
            norm: true,
        };
        let shape = |warps, tiles, stages| Shape { warps, tiles, stages };
        let of_one = |form, shape| shared_bytes(form, shape, (1, RowsOfX::ONE), &sizes);
        assert_eq!(of_one(form(DType::F16, None), shape(16, 2, 6)), 116_816);
        assert_eq!(of_one(form(DType::I8, None), shape(8, 4, 3)), 67_680);
        assert_eq!(of_one(form(DType::I4, Some(32)), shape(8, 4, 2)), 55_904);
        let without_norm = Sizes {
            rows: sizes.rows.clone(),
            norm: false,
            ..sizes
        };
        let whole = RowsOfX {
            most: 16,
            streamed: false,
        };
        let streamed = RowsOfX {
            most: 8,
            streamed: true,
        };
        assert_eq!(
            shared_bytes(form(DType::F16, None), shape(16, 2, 3), (16, whole), &sizes),
            222_464
        );
        assert_eq!(
            shared_bytes(form(DType::I4, Some(32)), shape(8, 4, 2), (9, whole), &sizes),
            146_272
        );
        assert_eq!(
            shared_bytes(form(DType::F16, None), shape(8, 2, 6), (4, streamed), &without_norm),
            77_824
        );
        assert_eq!(
            shared_bytes(form(DType::I4, Some(32)), shape(8, 4, 2), (8, streamed), &without_norm),
            86_016
        );
    }
}
