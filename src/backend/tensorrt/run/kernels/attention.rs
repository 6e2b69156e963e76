//! The launch of decode attention: `AttentionArguments` of `../device/decode/attention.cu`.

use super::arguments::Arguments;
use super::launch::Launch;
use super::module::Modules;
use crate::backend::tensorrt::run::{Buffer, Caches, RunError};
use crate::network::{AttentionInputs, DecodeAttention, Layer, Network, TensorId};
use crate::tensor::DType;

/// Size of the struct, and offsets of its fields.
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

/// Number of parts into which the slots of a head are divided, one block each: blocks of a cluster, or blocks that
/// combine results in a workspace.
const SPLITS: usize = 8;
/// Query heads per block.
const HEADS: usize = 8;

/// A kernel of `compile_kernels.py`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Variant {
    head_dim: usize,
    target: u32,
    caches: Caches,
}

impl Variant {
    /// Warps per block, and tiles in flight for each.
    fn shape(self) -> (usize, usize) {
        match self.head_dim {
            129.. => (4, 1),
            // Small enough for every GPU of that target.
            81.. if self.target == 80 => (8, 1),
            _ if self.is_many() => (8, 1),
            _ => (8, 2),
        }
    }

    /// Whether one block can do the work of several.
    fn is_many(self) -> bool {
        self.caches == Caches::Tables && self.is_clustered()
    }

    /// Whether the blocks of a head are a cluster.
    fn is_clustered(self) -> bool {
        self.target == 90
    }

    fn name(self, dtype: DType) -> String {
        let rows = if self.caches == Caches::Tables { "-rows" } else { "" };
        format!("attention-{dtype}-d{}{rows}", self.head_dim)
    }

    /// Number of blocks per head for this many heads (at most eight per KV head): chosen so that no multiprocessor has
    /// two blocks while another has none.
    fn blocks(self, heads: usize, multiprocessors: u32) -> usize {
        if !self.is_many() {
            return SPLITS;
        }
        let fit = (multiprocessors as usize / heads.max(1)).clamp(1, SPLITS);
        1 << fit.ilog2()
    }

    /// Dynamic shared memory per block, in bytes: tiles of every warp, queries, the new key and value; outputs of
    /// warps, unless they reuse the tiles; and in a cluster the block's share of the results of every split.
    fn shared_bytes(self, blocks: usize) -> usize {
        let (warps, stages) = self.shape();
        let row = 2 * self.head_dim + 16;
        let tiles = warps * 2 * 16 * row * stages;
        let rows = 2 * HEADS * (self.head_dim + 8) + 2 * 2 * self.head_dim;
        let outputs = if self.is_many() {
            warps * HEADS * self.head_dim * size_of::<f32>()
        } else {
            0
        };
        let share = (HEADS * self.head_dim).div_ceil(32).div_ceil(blocks) * 32;
        let results = if self.is_clustered() {
            SPLITS * share * size_of::<f32>()
        } else {
            0
        };
        tiles + rows + outputs + results
    }
}

pub(super) fn launch(
    modules: &Modules,
    network: &Network,
    layer: &Layer,
    attention: &DecodeAttention,
    caches: Caches,
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
        // Without a rotation kernels ignore it, but still read it.
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
    let places = kv_heads * group.div_ceil(HEADS);
    // A GPU with clusters may have little shared memory.
    let variants = [90, 80].into_iter().filter(|target| *target <= limits.target);
    let mut variants = variants.map(|target| {
        let variant = Variant {
            head_dim,
            target,
            caches,
        };
        let blocks = variant.blocks(sequences * places, limits.multiprocessors);
        (variant, blocks, variant.shared_bytes(blocks))
    });
    let fitting = variants.find(|(.., shared)| *shared <= limits.shared);
    let (variant, blocks, shared) = fitting.ok_or_else(|| RunError::SharedMemory {
        layer: layer.name.clone(),
        available: limits.shared,
    })?;
    let clustered = variant.is_clustered();
    let memory = match clustered {
        true => None,
        false => {
            // Counters follow the workspace. They must be zero, and are zero again after each run.
            let workspace = sequences * places * SPLITS * (HEADS * head_dim + 16) * size_of::<f32>();
            let counters = sequences * places * size_of::<u32>();
            let memory = Buffer::new(modules.cuda(), workspace + counters, "the workspace of attention")?;
            memory.write(workspace, &vec![0; counters])?;
            arguments.address(WORKSPACE, memory.address());
            arguments.address(COUNTERS, memory.address() + workspace as u64);
            Some(memory)
        }
    };
    let (warps, _) = variant.shape();
    let archive = format!("attention-{}", cache.dtype);
    let module = modules.get(&archive, &variant.name(cache.dtype), variant.target)?;
    let grid = [blocks as u32, places as u32, sequences as u32];
    let launch = Launch::new(&layer.name, module, grid, 32 * warps as u32, shared, arguments, memory)?;
    Ok(launch.with(if clustered { blocks as u32 } else { 0 }, clustered))
}

#[cfg(test)]
mod tests {
    use super::super::archive;
    use super::*;

    fn all() -> impl Iterator<Item = Variant> {
        let sizes = DecodeAttention::HEAD_SIZES.into_iter();
        let with_targets = sizes.flat_map(|head_dim| [(head_dim, 80), (head_dim, 90)]);
        with_targets.flat_map(|(head_dim, target)| {
            [Caches::Tensors, Caches::Tables].map(|caches| Variant {
                head_dim,
                target,
                caches,
            })
        })
    }

    #[test]
    fn there_is_a_kernel_for_every_head_size() {
        for dtype in [DType::F16, DType::Bf16] {
            let variants = archive::variants(&format!("attention-{dtype}"));
            for variant in all() {
                let name = format!("{}-sm{}", variant.name(dtype), variant.target);
                assert!(variants.contains_key(&name), "{name}");
            }
            assert_eq!(variants.len(), all().count());
        }
    }

    /// The least shared memory of a block from SM 8.0 on is 99 KiB.
    #[test]
    fn every_head_fits_small_gpus() {
        for variant in all().filter(|variant| variant.target == 80) {
            assert!(variant.shared_bytes(SPLITS) <= 99 << 10, "{variant:?}");
        }
    }

    /// Values from `harness/kernels.py`.
    #[test]
    fn shared_memory_is_that_of_the_harness() {
        let variant = |head_dim, caches| Variant {
            head_dim,
            target: 90,
            caches,
        };
        assert_eq!(variant(128, Caches::Tensors).shared_bytes(8), 146_048);
        assert_eq!(variant(128, Caches::Tables).shared_bytes(8), 109_184);
        assert_eq!(variant(128, Caches::Tables).shared_bytes(1), 137_856);
        assert_eq!(variant(256, Caches::Tables).shared_bytes(2), 138_368);
    }

    /// 8 B on an H200: 4, 2 and 1 blocks for 4, 8 and 16 sequences were fastest.
    #[test]
    fn many_sequences_need_fewer_blocks_each() {
        let variant = Variant {
            head_dim: 128,
            target: 90,
            caches: Caches::Tables,
        };
        let blocks = |sequences: usize| variant.blocks(8 * sequences, 132);
        assert_eq!([1, 2, 3, 4, 8, 16, 64].map(blocks), [8, 8, 4, 4, 2, 1, 1]);
        let one = Variant {
            caches: Caches::Tensors,
            ..variant
        };
        assert_eq!(one.blocks(8 * 64, 132), SPLITS);
    }
}
