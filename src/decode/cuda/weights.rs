//! Bound weights: one copy on the device for all engines of a package.

use std::collections::{HashMap, HashSet};
use std::rc::Rc;

use super::aligned;
use crate::backend::tensorrt::run::{Buffer, Cuda, Pinned, RunError, Stream};
use crate::graph::{Constant, ConstantSource, Transform};
use crate::lower;
use crate::network::{Network, Weight, WeightMode};

/// Bytes in flight.
const STAGE: usize = 64 << 20;

pub(super) struct Weights {
    places: Places,
    buffer: Buffer,
}

impl Weights {
    /// Every bound weight of the networks, once. An error if one has no bytes.
    pub fn upload(cuda: &Rc<Cuda>, stream: &Stream, networks: &[Network]) -> Result<Self, RunError> {
        let places = Places::of(networks);
        let buffer = Buffer::new(cuda, places.bytes, "the model's weights")?;
        let weights = Weights { places, buffer };
        weights.fill(cuda, stream, networks)?;
        Ok(weights)
    }

    /// Writes the weights of networks that otherwise equal those that these locations were made for.
    pub fn fill(&self, cuda: &Rc<Cuda>, stream: &Stream, networks: &[Network]) -> Result<(), RunError> {
        let engine = || networks.first().map(|n| n.profile.to_string()).unwrap_or_default();
        let pieces = self.places.pieces(networks).map_err(|weight| RunError::Mismatch {
            engine: engine(),
            reason: format!("there is no memory for the weight {weight:?}"),
        })?;
        let mut stage = Stage::new(cuda)?;
        let mut missing = Vec::new();
        for piece in pieces {
            match piece.constant.materialize() {
                Ok(tensor) => stage.copy(stream, tensor.data(), &self.buffer, piece.at)?,
                Err(_) => missing.push(piece.weight.to_string()),
            }
        }
        stream.wait()?;
        missing.dedup();
        match missing.is_empty() {
            true => Ok(()),
            false => Err(RunError::Weights {
                engine: engine(),
                names: missing,
            }),
        }
    }

    pub fn address(&self, name: &str) -> Option<u64> {
        Some(self.buffer.address() + *self.places.offsets.get(name)? as u64)
    }
    pub fn bytes(&self) -> usize {
        self.buffer.bytes()
    }
}

/// Offset of each bound weight. Fused ones come first, so that a network that reads the parts separately finds them
/// inside. Packed codes and their bytes, which layers read under two names, have one offset.
#[derive(Debug, PartialEq)]
struct Places {
    offsets: HashMap<String, usize>,
    bytes: usize,
}

/// A part of a weight to be copied.
struct Piece<'n> {
    at: usize,
    constant: &'n Constant,
    weight: &'n str,
}

impl Places {
    fn of(networks: &[Network]) -> Self {
        let mut offsets = HashMap::new();
        let mut of_bytes = HashMap::new();
        let mut end = 0;
        for weight in in_order(networks) {
            if offsets.contains_key(&weight.name) {
                continue;
            }
            let at = *of_bytes.entry(packed(&weight.constant).identity()).or_insert(end);
            for (part, at) in parts_of(weight, at) {
                offsets.insert(part, at);
            }
            offsets.insert(weight.name.clone(), at);
            if at < end {
                continue;
            }
            end += aligned(weight.constant.byte_len());
        }
        Places { offsets, bytes: end }
    }

    /// The copies to make; the error is the name of a weight without a location.
    fn pieces<'n>(&self, networks: &'n [Network]) -> Result<Vec<Piece<'n>>, &'n str> {
        let mut pieces = Vec::new();
        let mut written = HashSet::new();
        for weight in in_order(networks) {
            let mut at = *self.offsets.get(&weight.name).ok_or(weight.name.as_str())?;
            // Otherwise a part of a fused weight that was written, or the same weight in another network.
            if !written.insert(at) {
                continue;
            }
            written.extend(parts_of(weight, at).into_iter().map(|(_, at)| at));
            // Rows of a fused weight are contiguous, like the parts: no need to join them here first.
            let parts = match weight.constant.source() {
                ConstantSource::Derived(derived) if matches!(derived.transform, Transform::Concat { axis: 0 }) => {
                    &derived.inputs
                }
                _ => std::slice::from_ref(&weight.constant),
            };
            for constant in parts {
                let weight = weight.name.as_str();
                pieces.push(Piece { at, constant, weight });
                at += constant.byte_len();
            }
        }
        Ok(pieces)
    }
}

/// The constant whose bytes these are: packed codes, if a layer reads them as bytes.
fn packed(constant: &Constant) -> &Constant {
    match constant.source() {
        ConstantSource::Derived(derived) if matches!(derived.transform, Transform::Bytes) => &derived.inputs[0],
        _ => constant,
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

/// The parts of a fused weight at `start`, with their own offsets: the parts are consecutive rows, so each can be bound
/// separately if that keeps TensorRT's alignment.
fn parts_of(weight: &Weight, start: usize) -> Vec<(String, usize)> {
    let ConstantSource::Derived(derived) = weight.constant.source() else {
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

/// Two pieces of pinned memory alternate: one is filled from the file while the other is copied to the device.
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
            let host = &mut self.pieces[self.now];
            fill(host.slice_mut::<u8>(0, piece.len())?, piece);
            // The other piece's copy is complete before it is written again; this copy continues while the other piece
            // is filled.
            stream.wait()?;
            stream.upload(host, 0..piece.len(), to, at + i * STAGE)?;
            self.now ^= 1;
        }
        Ok(())
    }
}

/// A copy by several threads: a single one reads a mapped file at a fraction of the bus bandwidth.
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lower::synthetic::Decoder;
    use crate::lower::{LowerOptions, lower};
    use crate::network::Profile;
    use crate::tensor::{DType, Tensor};

    /// A small model with these values, lowered with its products fused and one by one.
    fn networks(seed: usize) -> Vec<Network> {
        let mut count = seed;
        let decoder = Decoder {
            qkv_bias: true,
            ..Decoder::tiny()
        };
        let graph = decoder.graph_with(|_, dtype, shape| {
            let numbers = (0..shape.iter().product()).map(|i: usize| ((i * 31 + count * 17) % 101) as f64);
            let numbers: Vec<f64> = numbers.collect();
            count += 1;
            Constant::tensor(Tensor::from_f64_as(dtype, shape, &numbers))
        });
        let of = |fuse_linear| {
            let options = LowerOptions {
                weight_mode: WeightMode::Bind,
                fuse_linear,
                ..LowerOptions::default()
            };
            lower(&graph, &Profile::decode(16), &options).unwrap()
        };
        vec![of(false), of(true)]
    }

    fn written(places: &Places, networks: &[Network]) -> Vec<u8> {
        let mut memory = vec![0xff; places.bytes];
        for piece in places.pieces(networks).unwrap() {
            let tensor = piece.constant.materialize().unwrap();
            memory[piece.at..piece.at + tensor.data().len()].copy_from_slice(tensor.data());
        }
        memory
    }

    /// Every weight of every network is at its bound location, however it is lowered; other values go to the same
    /// locations.
    #[test]
    fn every_weight_is_where_it_is_bound() {
        let (first, second) = (networks(1), networks(2));
        let places = Places::of(&first);
        assert_eq!(Places::of(&second), places);
        for networks in [&first, &second] {
            let memory = written(&places, networks);
            let all = networks.iter().flat_map(|n| &n.weights);
            for weight in all.filter(|w| w.mode == WeightMode::Bind) {
                let at = places.offsets[&weight.name];
                assert!(at.is_multiple_of(aligned(1)), "{}", weight.name);
                let tensor = weight.constant.materialize().unwrap();
                assert!(memory[at..].starts_with(tensor.data()), "{}", weight.name);
            }
        }
        assert_ne!(written(&places, &first), written(&places, &second));
        let fused = first[1].weights.iter().filter(|w| w.name.contains('+')).count();
        assert!(fused > 0, "the second lowering fuses");
        // Parts are not stored beside the whole.
        let bytes =
            |network: &Network| -> usize { network.weights.iter().map(|w| aligned(w.constant.byte_len())).sum() };
        assert!(places.bytes < bytes(&first[0]) + bytes(&first[1]));
    }

    /// A kernel reads codes of which a gather reads the bytes: one copy.
    #[test]
    fn codes_and_their_bytes_have_one_place() {
        let codes = Tensor::new(
            DType::I4,
            vec![4, 256],
            (0..=255).chain(0..=255).collect::<Vec<u8>>().into(),
        );
        let codes = Constant::tensor(codes.unwrap());
        let weight = |name: &str, constant: Constant| Weight {
            name: name.to_string(),
            constant,
            mode: WeightMode::Bind,
        };
        let mut network = Network::new("codes", Profile::decode(16));
        network.weights = vec![
            weight("table.codes", codes.bytes_as_i8().unwrap()),
            weight("other", Constant::tensor(Tensor::from_f32(vec![2], &[1.0, 2.0]))),
            weight("table.kernel_codes", codes.clone()),
        ];
        let networks = [network];
        let places = Places::of(&networks);
        assert_eq!(places.offsets["table.codes"], places.offsets["table.kernel_codes"]);
        assert_eq!(places.bytes, aligned(512) + aligned(8));
        assert!(written(&places, &networks).starts_with(codes.materialize().unwrap().data()));
    }

    #[test]
    fn a_weight_without_a_place_is_named() {
        let networks = networks(1);
        let mut places = Places::of(&networks);
        let name = networks[0].weights[0].name.clone();
        places.offsets.remove(&name);
        assert_eq!(places.pieces(&networks).err(), Some(name.as_str()));
    }
}
