//! Bound weights: one copy on the device for all engines of a package.

use std::collections::{HashMap, HashSet};
use std::rc::Rc;

use super::aligned;
use crate::backend::tensorrt::run::{Buffer, Cuda, Pinned, RunError, Stream};
use crate::graph::{Source, Transform};
use crate::lower;
use crate::network::{Network, Weight, WeightMode};

/// Bytes that are on their way at once.
const STAGE: usize = 64 << 20;

pub(super) struct Weights {
    offsets: HashMap<String, usize>,
    buffer: Buffer,
}

impl Weights {
    /// Every bound weight of the networks, once: those that fuse several first, so that a network that reads the parts by
    /// themselves finds them there. Refuses if one has no bytes.
    pub fn upload(cuda: &Rc<Cuda>, stream: &Stream, networks: &[Network]) -> Result<Self, RunError> {
        let mut offsets = HashMap::new();
        let mut end = 0;
        for weight in in_order(networks) {
            if offsets.contains_key(&weight.name) {
                continue;
            }
            for (part, at) in parts_of(weight, end) {
                offsets.insert(part, at);
            }
            offsets.insert(weight.name.clone(), end);
            end += aligned(weight.constant.byte_len());
        }
        let weights = Weights {
            offsets,
            buffer: Buffer::new(cuda, end, "the model's weights")?,
        };
        weights.fill(cuda, stream, networks)?;
        Ok(weights)
    }

    /// Writes the weights of networks that differ in nothing else from those that these places were made for.
    pub fn fill(&self, cuda: &Rc<Cuda>, stream: &Stream, networks: &[Network]) -> Result<(), RunError> {
        let mut stage = Stage::new(cuda)?;
        let mut missing = Vec::new();
        let mut written = HashSet::new();
        for weight in in_order(networks) {
            let Some(mut at) = self.offsets.get(&weight.name).copied() else {
                return Err(RunError::Mismatch {
                    engine: networks[0].profile.to_string(),
                    reason: format!("no place was made for the weight {:?}", weight.name),
                });
            };
            // Else a part of what was written as a whole, or the same weight in another network.
            if !written.insert(at) {
                continue;
            }
            written.extend(parts_of(weight, at).into_iter().map(|(_, at)| at));
            // Rows of a fused weight lie one after the other, as the parts do: no need to join them here first.
            let parts = match weight.constant.source() {
                Source::Derived(derived) if matches!(derived.transform, Transform::Concat { axis: 0 }) => {
                    &derived.inputs
                }
                _ => std::slice::from_ref(&weight.constant),
            };
            for part in parts {
                match part.materialize() {
                    Ok(tensor) => stage.copy(stream, tensor.data(), &self.buffer, at)?,
                    Err(_) => missing.push(weight.name.clone()),
                }
                at += part.byte_len();
            }
        }
        stream.wait()?;
        match missing.is_empty() {
            true => Ok(()),
            false => Err(RunError::Weights {
                engine: networks.first().map(|n| n.profile.to_string()).unwrap_or_default(),
                names: missing,
            }),
        }
    }

    pub fn address(&self, name: &str) -> Option<u64> {
        Some(self.buffer.address() + *self.offsets.get(name)? as u64)
    }
    pub fn bytes(&self) -> usize {
        self.buffer.bytes()
    }
}

/// Bound weights, those that fuse most first.
fn in_order(networks: &[Network]) -> Vec<&Weight> {
    let mut all: Vec<&Weight> = networks
        .iter()
        .flat_map(|network| &network.weights)
        .filter(|weight| weight.mode == WeightMode::Bind)
        .collect();
    all.sort_by_key(|weight| std::cmp::Reverse(lower::parts(&weight.name).count()));
    all
}

/// The parts of a fused weight that lies at `start`, with their own offsets: rows of one come after rows of the other, so
/// each can be bound by itself where that keeps TensorRT's alignment.
fn parts_of(weight: &Weight, start: usize) -> Vec<(String, usize)> {
    let Source::Derived(derived) = weight.constant.source() else {
        return Vec::new();
    };
    let names: Vec<&str> = lower::parts(&weight.name).collect();
    if !matches!(derived.transform, Transform::Concat { axis: 0 }) || names.len() != derived.inputs.len() {
        return Vec::new();
    }
    let mut at = start;
    let mut parts = Vec::new();
    for (name, part) in names.into_iter().zip(&derived.inputs) {
        if at.is_multiple_of(aligned(1)) {
            parts.push((name.to_string(), at));
        }
        at += part.byte_len();
    }
    parts
}

/// Two pieces of pinned memory in turns: one is filled from the file while the other is on its way.
struct Stage {
    pieces: [Pinned; 2],
    now: usize,
}

impl Stage {
    fn new(cuda: &Rc<Cuda>) -> Result<Self, RunError> {
        Ok(Stage {
            pieces: [Pinned::new(cuda, STAGE)?, Pinned::new(cuda, STAGE)?],
            now: 0,
        })
    }

    fn copy(&mut self, stream: &Stream, bytes: &[u8], to: &Buffer, at: usize) -> Result<(), RunError> {
        for (i, piece) in bytes.chunks(STAGE).enumerate() {
            let host = self.pieces[self.now].slice_mut::<u8>(0, piece.len());
            fill(host, piece);
            // The other piece's copy is over before it is written again; this one goes on while that is filled.
            stream.wait()?;
            stream.upload_at(host, to, at + i * STAGE)?;
            self.now ^= 1;
        }
        Ok(())
    }
}

/// A copy by several threads: one alone reads a mapped file at a fraction of the bus.
fn fill(to: &mut [u8], from: &[u8]) {
    const SHARE: usize = 4 << 20;
    if to.len() <= SHARE {
        return to.copy_from_slice(from);
    }
    let threads = std::thread::available_parallelism().map_or(1, |n| n.get()).min(8);
    let share = to.len().div_ceil(threads);
    std::thread::scope(|scope| {
        for (to, from) in to.chunks_mut(share).zip(from.chunks(share)) {
            scope.spawn(|| to.copy_from_slice(from));
        }
    });
}
