//! The KV cache in device memory: every layer's keys and values in one allocation.

use std::rc::Rc;

use super::aligned;
use crate::backend::tensorrt::run::{Buffer, Cuda, Rows, RunError, Stream};
use crate::interface::{CacheRows, Role, Signature};

/// The largest of the capacities below `wanted` whose cache fits. `needed` is the bytes of `wanted`; a cache's bytes
/// are proportional to its slots.
pub(super) fn fitting(capacities: &[usize], wanted: usize, needed: u64, free: u64) -> Option<usize> {
    let room = |capacity: usize| u128::from(needed) * capacity as u128 <= u128::from(free) * wanted as u128;
    let smaller = capacities.iter().copied().filter(|capacity| *capacity < wanted);
    smaller.filter(|capacity| room(*capacity)).max()
}

/// One cache tensor `[batch, kv_heads, capacity, head_dim]` in device memory.
#[derive(Clone, Debug, PartialEq)]
struct CacheTensor {
    /// The engine's names for the cache and its update.
    input: String,
    output: String,
    rows: CacheRows,
}

/// The caches of a model for `batch` sequences, in their order.
fn tensors(interface: &Signature, batch: usize) -> Vec<CacheTensor> {
    let caches = interface.caches.iter().map(|shape| CacheTensor {
        input: Role::Cache(shape.cache).name(),
        output: Role::UpdatedCache(shape.cache).name(),
        rows: CacheRows::new(shape, batch),
    });
    caches.collect()
}

pub(super) struct KvCache {
    tensors: Vec<CacheTensor>,
    buffer: Buffer,
    capacity: usize,
}

impl KvCache {
    /// Zeros, for the caches of a model of this interface and `batch` sequences.
    pub fn new(
        cuda: &Rc<Cuda>,
        stream: &Stream,
        interface: &Signature,
        batch: usize,
        capacity: usize,
    ) -> Result<Self, RunError> {
        KvCache::allocated(cuda, stream, tensors(interface, batch), capacity)
    }

    fn allocated(
        cuda: &Rc<Cuda>,
        stream: &Stream,
        tensors: Vec<CacheTensor>,
        capacity: usize,
    ) -> Result<Self, RunError> {
        let bytes = offset(&tensors, tensors.len(), capacity);
        let buffer = Buffer::new(cuda, bytes, "the cache")?;
        // Slots beyond the context are masked, but masked slots must be finite.
        buffer.clear(stream)?;
        Ok(KvCache {
            tensors,
            buffer,
            capacity,
        })
    }

    /// Queues zeroing of the whole cache.
    pub fn clear(&self, stream: &Stream) -> Result<(), RunError> {
        self.buffer.clear(stream)
    }

    /// A cache of another capacity with the first `used` slots of this one. The copy is queued.
    pub fn grown(&self, cuda: &Rc<Cuda>, stream: &Stream, capacity: usize, used: usize) -> Result<Self, RunError> {
        let grown = KvCache::allocated(cuda, stream, self.tensors.clone(), capacity)?;
        for (first, count) in runs(&self.tensors, [self.capacity, capacity]) {
            let copy = self.tensors[first].rows.resize(self.capacity, capacity, used);
            let from = Rows {
                buffer: &self.buffer,
                at: offset(&self.tensors, first, self.capacity),
                pitch: copy.from_pitch,
            };
            let to = Rows {
                buffer: &grown.buffer,
                at: offset(&self.tensors, first, capacity),
                pitch: copy.to_pitch,
            };
            stream.copy_rows(from, to, copy.bytes, copy.rows * count)?;
        }
        Ok(grown)
    }

    /// Bytes of the caches of a model with this interface for `batch` sequences.
    pub fn bytes_of(interface: &Signature, batch: usize, capacity: usize) -> usize {
        let tensors = tensors(interface, batch);
        offset(&tensors, tensors.len(), capacity)
    }

    /// Slots.
    pub fn capacity(&self) -> usize {
        self.capacity
    }

    /// Address of each cache, in the interface's order.
    pub fn addresses(&self) -> impl Iterator<Item = u64> {
        let mut address = self.buffer.address();
        self.tensors.iter().map(move |tensor| {
            let here = address;
            address += aligned(tensor.rows.bytes(self.capacity)) as u64;
            here
        })
    }

    /// Changes when the cache moves.
    pub fn address(&self) -> u64 {
        self.buffer.address()
    }
    pub fn bytes(&self) -> usize {
        self.buffer.bytes()
    }

    /// Every input and output of an engine that is a cache, with its address; an update has the address of its input.
    pub fn ports(&self) -> impl Iterator<Item = (&str, u64)> {
        let named = self.tensors.iter().zip(self.addresses());
        named.flat_map(|(tensor, here)| [(tensor.input.as_str(), here), (tensor.output.as_str(), here)])
    }
}

/// Offset of a tensor among all of them, in bytes.
fn offset(tensors: &[CacheTensor], at: usize, capacity: usize) -> usize {
    tensors[..at].iter().map(|t| aligned(t.rows.bytes(capacity))).sum()
}

/// Tensors that one copy moves from one capacity to the other, as (first, count): of equal shape and without gaps in
/// either. Usually all.
fn runs(tensors: &[CacheTensor], capacities: [usize; 2]) -> Vec<(usize, usize)> {
    let gapless = |rows: &CacheRows| capacities.iter().all(|c| aligned(rows.bytes(*c)) == rows.bytes(*c));
    let mut runs: Vec<(usize, usize)> = Vec::new();
    for (i, tensor) in tensors.iter().enumerate() {
        match runs.last_mut() {
            Some((first, count)) if tensors[*first].rows == tensor.rows && gapless(&tensor.rows) => *count += 1,
            _ => runs.push((i, 1)),
        }
    }
    runs
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::interface::Interface;
    use crate::lower::synthetic::Decoder;
    use crate::lower::{LowerOptions, lower};
    use crate::network::Profile;

    /// Names and bytes of every cache equal those of the network that an engine is built from.
    #[test]
    fn the_caches_are_those_of_the_network() {
        let graph = Decoder::tiny().graph();
        let signature = graph.interface.as_ref().map(Interface::signature).unwrap();
        for (batch, capacity) in [(1, 16), (3, 8)] {
            let profile = Profile {
                batch,
                ..Profile::decode(capacity)
            };
            let network = lower(&graph, &profile, &LowerOptions::default()).unwrap();
            let tensors = tensors(&signature, batch);
            let aliases: Vec<_> = network.aliases().collect();
            assert_eq!(tensors.len(), aliases.len());
            for (tensor, (input, output)) in tensors.iter().zip(aliases) {
                let (input, output) = (network.tensor(input), network.tensor(output));
                assert_eq!((&tensor.input, &tensor.output), (&input.name, &output.name));
                let elements: i64 = input.shape.iter().map(|dim| dim.as_const().unwrap()).product();
                assert_eq!(tensor.rows.bytes(capacity), input.dtype.byte_len(elements as usize));
            }
        }
    }

    fn tensor(rows: usize, slot_bytes: usize) -> CacheTensor {
        CacheTensor {
            input: String::new(),
            output: String::new(),
            rows: CacheRows { rows, slot_bytes },
        }
    }

    /// The bytes that `grown` moves, computed on the host: all tensors, whether one copy moves several or not.
    #[test]
    fn every_live_slot_moves_to_its_place() {
        for tensors in [
            // One copy.
            vec![tensor(2, 128); 3],
            // Gaps behind tensors in the smaller capacity, and one of another shape.
            vec![tensor(2, 16), tensor(2, 16), tensor(1, 16), tensor(2, 16)],
        ] {
            let (small, large, used) = (3, 8, 2);
            let bytes = |capacity| offset(&tensors, tensors.len(), capacity);
            let from: Vec<u8> = (0..bytes(small)).map(|i| (i % 251) as u8 + 1).collect();
            let mut to = vec![0u8; bytes(large)];
            for (first, count) in runs(&tensors, [small, large]) {
                let mut copy = tensors[first].rows.resize(small, large, used);
                copy.rows *= count;
                let (a, b) = (offset(&tensors, first, small), offset(&tensors, first, large));
                copy.run(&from[a..], &mut to[b..]);
            }
            let mut expected = vec![0u8; bytes(large)];
            for (i, tensor) in tensors.iter().enumerate() {
                for row in 0..tensor.rows.rows {
                    let slot = tensor.rows.slot_bytes;
                    let a = offset(&tensors, i, small) + row * small * slot;
                    let b = offset(&tensors, i, large) + row * large * slot;
                    expected[b..b + used * slot].copy_from_slice(&from[a..a + used * slot]);
                }
            }
            assert!(to == expected, "{tensors:?}");
        }
        assert_eq!(runs(&vec![tensor(2, 128); 3], [2, 8]), [(0, 3)]);
        assert_eq!(runs(&vec![tensor(2, 16); 3], [3, 8]), [(0, 1), (1, 1), (2, 1)]);
    }

    #[test]
    fn the_largest_capacity_that_has_room() {
        let capacities = [256, 1024, 4096, 131_072];
        let of_slot = 131_072; // 8 B Llama dims, fp16
        let fits = |wanted: usize, free: u64| fitting(&capacities, wanted, wanted as u64 * of_slot, free);
        assert_eq!(fits(131_072, 900_000_000), Some(4096));
        assert_eq!(fits(131_072, 4096 * of_slot), Some(4096), "to the last byte");
        assert_eq!(fits(131_072, 4096 * of_slot - 1), Some(1024));
        assert_eq!(fits(131_072, 1_000_000), None);
        assert_eq!(fits(1024, u64::MAX), Some(256), "what did not fit is not advised");
        assert_eq!(fits(256, u64::MAX), None);
        // A cache of odd sizes, smaller than a byte a slot.
        assert_eq!(fitting(&[3, 5, 7], 7, 6, 4), Some(3));
    }
}
