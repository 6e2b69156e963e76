//! The KV cache in device memory: every layer's keys and values in one allocation.

use std::rc::Rc;

use super::aligned;
use crate::backend::tensorrt::run::{Buffer, Cuda, Engine, Rows, RunError, Stream};

/// The largest of the capacities below `wanted` whose cache has room: `needed` bytes are what `wanted` takes, and a cache
/// takes as many for each slot.
pub(super) fn fitting(capacities: &[usize], wanted: usize, needed: u64, free: u64) -> Option<usize> {
    let room = |capacity: usize| u128::from(needed) * capacity as u128 <= u128::from(free) * wanted as u128;
    let smaller = capacities.iter().copied().filter(|capacity| *capacity < wanted);
    smaller.filter(|capacity| room(*capacity)).max()
}

/// One cache tensor `[batch, kv_heads, capacity, head_dim]`.
#[derive(Clone, Debug, PartialEq)]
struct CacheTensor {
    input: String,
    output: String,
    /// `batch * kv_heads`.
    rows: usize,
    /// Bytes of one slot of one row: a head of a token.
    slot_bytes: usize,
}

impl CacheTensor {
    fn bytes(&self, capacity: usize) -> usize {
        self.rows * capacity * self.slot_bytes
    }
}

pub(super) struct KvCache {
    layers: Vec<CacheTensor>,
    buffer: Buffer,
    capacity: usize,
}

impl KvCache {
    /// Zeros, for the caches that this engine has.
    pub fn new(cuda: &Rc<Cuda>, stream: &Stream, engine: &Engine, capacity: usize) -> Result<Self, RunError> {
        let inputs = engine.ports().iter().filter(|p| p.is_input);
        let layers: Vec<CacheTensor> = inputs
            .filter_map(|port| {
                let output = format!("updated_{}", port.name);
                let [batch, heads, slots, width] = port.shape[..] else {
                    return None;
                };
                (engine.port(&output).is_some() && slots == capacity as i64).then(|| CacheTensor {
                    input: port.name.clone(),
                    output,
                    rows: (batch * heads) as usize,
                    slot_bytes: port.dtype.byte_len(width as usize),
                })
            })
            .collect();
        KvCache::allocated(cuda, stream, layers, capacity)
    }

    fn allocated(
        cuda: &Rc<Cuda>,
        stream: &Stream,
        layers: Vec<CacheTensor>,
        capacity: usize,
    ) -> Result<Self, RunError> {
        let bytes = layers.iter().map(|layer| aligned(layer.bytes(capacity))).sum();
        let buffer = Buffer::new(cuda, bytes, "the cache")?;
        // Slots beyond the live ones are masked, but what is masked must be finite.
        buffer.clear(stream)?;
        Ok(KvCache {
            layers,
            buffer,
            capacity,
        })
    }

    /// A cache of another capacity with the first `live` slots of this one. Queued.
    pub fn grown(&self, cuda: &Rc<Cuda>, stream: &Stream, capacity: usize, live: usize) -> Result<Self, RunError> {
        let live = live.min(capacity);
        let grown = KvCache::allocated(cuda, stream, self.layers.clone(), capacity)?;
        for (first, count) in self.runs(capacity) {
            let layer = &self.layers[first];
            let (from, to) = (self.rows(first), grown.rows(first));
            stream.copy_rows(from, to, live * layer.slot_bytes, layer.rows * count)?;
        }
        Ok(grown)
    }

    /// The rows of a layer and of those behind it.
    fn rows(&self, layer: usize) -> Rows<'_> {
        Rows {
            buffer: &self.buffer,
            at: self.offset(layer),
            pitch: self.capacity * self.layers[layer].slot_bytes,
        }
    }

    /// Layers that one copy moves, as (first, count): of equal shape and without gaps in either capacity. Mostly all.
    fn runs(&self, capacity: usize) -> Vec<(usize, usize)> {
        let gapless = |layer: &CacheTensor| {
            [self.capacity, capacity]
                .iter()
                .all(|c| aligned(layer.bytes(*c)) == layer.bytes(*c))
        };
        let mut runs: Vec<(usize, usize)> = Vec::new();
        for (i, layer) in self.layers.iter().enumerate() {
            match runs.last_mut() {
                Some((first, count)) => {
                    let before = &self.layers[*first];
                    let alike = (before.rows, before.slot_bytes) == (layer.rows, layer.slot_bytes);
                    if alike && gapless(layer) {
                        *count += 1;
                    } else {
                        runs.push((i, 1));
                    }
                }
                None => runs.push((i, 1)),
            }
        }
        runs
    }

    fn offset(&self, layer: usize) -> usize {
        self.layers[..layer]
            .iter()
            .map(|l| aligned(l.bytes(self.capacity)))
            .sum()
    }

    /// Changes when the cache moves.
    pub fn address(&self) -> u64 {
        self.buffer.address()
    }
    pub fn bytes(&self) -> usize {
        self.buffer.bytes()
    }

    /// Every input and output of an engine that is a cache, with its address; an update is where its input is.
    pub fn ports(&self) -> impl Iterator<Item = (&str, u64)> {
        let mut address = self.buffer.address();
        self.layers.iter().flat_map(move |layer| {
            let here = address;
            address += aligned(layer.bytes(self.capacity)) as u64;
            [(layer.input.as_str(), here), (layer.output.as_str(), here)]
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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
