//! The launch of decode attention: `AttentionArguments` of `../device/decode/attention.cu`.

use super::arguments::Arguments;
use super::launch::Launch;
use super::module::Modules;
use crate::backend::tensorrt::run::{Buffer, RunError};
use crate::network::{AttentionInputs, DecodeAttention, Layer, Network, TensorId};

/// Bytes of the struct, and where its fields are.
const BYTES: usize = 176;
const QUERY: usize = 0;
const KEY: usize = 8;
const VALUE: usize = 16;
const OUT: usize = 24;
const KEYS: usize = 32;
const VALUES: usize = 40;
const LENGTHS: usize = 48;
const POSITIONS: usize = 56;
const COSINES: usize = 64;
const SINES: usize = 72;
const QUERY_NORM: usize = 80;
const KEY_NORM: usize = 88;
const SINKS: usize = 96;
const WORKSPACE: usize = 104;
const COUNTERS: usize = 112;
const CACHE_STRIDE: usize = 120;
const STRIDES: [usize; 3] = [128, 132, 136];
const OUT_STRIDE: usize = 140;
const GROUP: usize = 144;
const CAPACITY: usize = 148;
const ROTATED: usize = 152;
const INTERLEAVED: usize = 156;
const WINDOW: usize = 160;
const SCALE: usize = 164;
const SOFT_CAP: usize = 168;
const EPSILON: usize = 172;

/// Parts that the slots of a head are divided among, each by a block: of a cluster, or of blocks that meet in a workspace.
const SPLITS: usize = 8;
/// Query heads of a block.
const HEADS: usize = 8;

/// Warps of a block and tiles in flight for each, as `compile_kernels.py` has them.
fn shape(head_dim: usize, target: u32) -> (usize, usize) {
    match head_dim {
        129.. => (4, 1),
        // So that it fits every GPU of that target.
        81.. if target == 80 => (8, 1),
        _ => (8, 2),
    }
}

pub(super) fn launch(
    modules: &Modules,
    network: &Network,
    layer: &Layer,
    attention: &DecodeAttention,
) -> Result<Launch, RunError> {
    let limits = modules.limits()?;
    let inputs = AttentionInputs::of(attention, &layer.inputs).expect("verified");
    let name = |id: TensorId| network.tensor(id).name.as_str();
    let cache = network.tensor(inputs.caches[0]);
    let extent = |axis: usize| cache.shape[axis].as_const().expect("networks of kernels have numbers") as usize;
    let [sequences, capacity, head_dim] = [0, 2, 3].map(extent);
    let (heads, kv_heads) = (attention.heads, attention.kv_heads);
    let element = cache.dtype.byte_len(1);
    let widths = [heads, kv_heads, kv_heads].map(|heads| heads * head_dim);
    let mut arguments = Arguments::new(BYTES);
    let mut first = 0;
    for (((field, stride), id), width) in [QUERY, KEY, VALUE].into_iter().zip(STRIDES).zip(inputs.qkv).zip(widths) {
        arguments.operand_from(field, name(id), first * element);
        match attention.packed {
            true => {
                arguments.int(stride, widths.iter().sum());
                first += width;
            }
            false => arguments.int(stride, width),
        }
    }
    for (field, id) in [
        (OUT, Some(layer.outputs[0])),
        (KEYS, Some(inputs.caches[0])),
        (VALUES, Some(inputs.caches[1])),
        (LENGTHS, Some(inputs.write_indices)),
        // Without a rotation no kernel looks at it, but it is read.
        (
            POSITIONS,
            Some(
                inputs
                    .rotation
                    .map_or(inputs.write_indices, |[positions, ..]| positions),
            ),
        ),
        (COSINES, inputs.rotation.map(|[_, cosines, _]| cosines)),
        (SINES, inputs.rotation.map(|[.., sines]| sines)),
        (QUERY_NORM, inputs.query_norm),
        (KEY_NORM, inputs.key_norm),
        (SINKS, inputs.sinks),
    ] {
        if let Some(id) = id {
            arguments.operand(field, name(id));
        }
    }
    let group = heads / kv_heads;
    arguments.long(CACHE_STRIDE, kv_heads * capacity * head_dim);
    for (field, value) in [
        (OUT_STRIDE, widths[0]),
        (GROUP, group),
        (CAPACITY, capacity),
        (ROTATED, attention.rotation.map_or(0, |rotation| rotation.rotary_dim)),
        (
            INTERLEAVED,
            usize::from(attention.rotation.is_some_and(|rotation| rotation.interleaved)),
        ),
        (WINDOW, attention.window.unwrap_or(0).min(i32::MAX as usize)),
    ] {
        arguments.int(field, value);
    }
    arguments.float(SCALE, attention.scale);
    arguments.float(SOFT_CAP, attention.soft_cap.unwrap_or(0.0));
    arguments.float(EPSILON, attention.epsilon);
    // A GPU may have clusters and little shared memory.
    let fits = |target: &u32| *target <= limits.target && shared_bytes(head_dim, *target) <= limits.shared;
    let target = [90, 80].into_iter().find(fits).ok_or_else(|| RunError::SharedMemory {
        layer: layer.name.clone(),
        available: limits.shared,
    })?;
    let clustered = target == 90;
    let places = kv_heads * group.div_ceil(HEADS);
    let memory = match clustered {
        true => None,
        false => {
            // Counters after the workspace. They must be zero, and are zero again after each run.
            let workspace = sequences * places * SPLITS * (HEADS * head_dim + 16) * size_of::<f32>();
            let counters = sequences * places * size_of::<u32>();
            let memory = Buffer::new(modules.cuda(), workspace + counters, "the workspace of attention")?;
            memory.write(workspace, &vec![0; counters])?;
            arguments.address(WORKSPACE, memory.address());
            arguments.address(COUNTERS, memory.address() + workspace as u64);
            Some(memory)
        }
    };
    let (warps, _) = shape(head_dim, target);
    let archive = format!("attention-{}", cache.dtype);
    let module = modules.get(&archive, &format!("{archive}-d{head_dim}"), target)?;
    let grid = [SPLITS as u32, places as u32, sequences as u32];
    let shared = shared_bytes(head_dim, target);
    let launch = Launch::new(&layer.name, module, grid, 32 * warps as u32, shared, arguments, memory)?;
    Ok(launch.with(if clustered { SPLITS as u32 } else { 0 }, clustered))
}

/// Dynamic shared memory of a block, bytes: tiles of every warp, queries, the new key and value, and in a cluster the block's
/// share of the results of every split.
fn shared_bytes(head_dim: usize, target: u32) -> usize {
    let (warps, stages) = shape(head_dim, target);
    let row = 2 * head_dim + 16;
    let tiles = warps * 2 * 16 * row * stages;
    let rows = 2 * HEADS * (head_dim + 8) + 2 * 2 * head_dim;
    let share = (HEADS * head_dim).div_ceil(32).div_ceil(SPLITS) * 32;
    let results = if target == 90 {
        SPLITS * share * size_of::<f32>()
    } else {
        0
    };
    tiles + rows + results
}

#[cfg(test)]
mod tests {
    use super::super::archive;
    use super::*;

    #[test]
    fn there_is_a_kernel_for_every_head_size() {
        for dtype in ["f16", "bf16"] {
            let archive = format!("attention-{dtype}");
            let variants = archive::variants(&archive);
            for (size, target) in DecodeAttention::HEAD_SIZES.into_iter().flat_map(|d| [(d, 80), (d, 90)]) {
                let name = format!("{archive}-d{size}-sm{target}");
                assert!(variants.contains_key(&name), "{name}");
            }
            assert_eq!(variants.len(), 2 * DecodeAttention::HEAD_SIZES.len());
        }
    }

    /// The least shared memory of a block from SM 8.0 on is 99 KiB.
    #[test]
    fn every_head_fits_small_gpus() {
        for head_dim in DecodeAttention::HEAD_SIZES {
            assert!(shared_bytes(head_dim, 80) <= 99 << 10, "{head_dim}");
        }
    }
}
