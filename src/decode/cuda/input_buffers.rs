//! Memory of the small inputs of a call, on host and device: written together, sent in one copy.

use std::rc::Rc;

use super::aligned;
use crate::backend::tensorrt::run::{Buffer, Cuda, Pinned, RunError, Stream};
use crate::decode::step::StepInputs;
use crate::interface::Role;
use crate::tensor::DType;
use crate::tensor::element::{FloatElement, with_float};

/// Inputs in memory order, the short ones first so that a decode step copies little. The embeddings of a model that
/// takes them instead of token ids come after these.
const ORDER: [Role; 5] = [
    Role::WriteIndices,
    Role::TotalLengths,
    Role::LogitRows,
    Role::TokenIds,
    Role::PositionIds,
];

/// Offset of each of [`ORDER`] for calls of up to `rows` tokens, and the total bytes.
fn layout(rows: usize) -> ([usize; 5], usize) {
    let mut end = 0;
    let offsets = ORDER.map(|role| {
        let at = end;
        end += aligned(len(role, rows) * size_of::<i32>());
        at
    });
    (offsets, end)
}

/// The embeddings of a model that takes them.
#[derive(Clone, Copy, Debug)]
pub(super) struct Embedded {
    /// Elements of one embedding.
    pub width: usize,
    /// Element type of the engine's input: a float of at most 32 bits.
    pub dtype: DType,
}

fn len(role: Role, rows: usize) -> usize {
    StepInputs::len_of(role, rows).expect("ORDER holds step inputs")
}

pub(super) struct InputBuffers {
    host: Pinned,
    device: Buffer,
    offsets: [usize; 5],
    /// Properties of the embeddings, and their offset.
    embedded: Option<(Embedded, usize)>,
    /// Bytes from the start that the current call uses.
    used: usize,
}

impl InputBuffers {
    /// For calls of up to `rows` tokens.
    pub fn new(cuda: &Rc<Cuda>, rows: usize, embedded: Option<Embedded>) -> Result<Self, RunError> {
        let (offsets, ints) = layout(rows);
        let floats = embedded.map_or(0, |e| e.dtype.byte_len(rows * e.width));
        let bytes = ints + aligned(floats);
        Ok(InputBuffers {
            embedded: embedded.map(|embedded| (embedded, ints)),
            host: Pinned::new(cuda, bytes)?,
            device: Buffer::new(cuda, bytes, "the inputs of a call")?,
            offsets,
            used: bytes,
        })
    }

    /// The device address of an input; `None` for a role that is no step input.
    pub fn address(&self, role: Role) -> Option<u64> {
        if role == Role::Embeddings {
            return self.embedded.map(|(_, at)| self.device.address() + at as u64);
        }
        let at = ORDER.iter().position(|known| *known == role)?;
        Some(self.device.address() + self.offsets[at] as u64)
    }

    /// Writes the inputs of a call, once the copy of the last one is over.
    pub fn write(&mut self, step: &StepInputs<'_>) -> Result<(), RunError> {
        for (role, at) in ORDER.into_iter().zip(self.offsets) {
            // Ids are not read if there are embeddings.
            if role == Role::TokenIds && self.embedded.is_some() {
                continue;
            }
            let to = self.host.slice_mut::<i32>(at, len(role, step.rows))?;
            step.write(role, to).expect("ORDER holds step inputs");
            self.used = at + size_of_val(to);
        }
        if let Some((Embedded { width, dtype }, at)) = self.embedded {
            let bytes = dtype.byte_len(step.rows * width);
            let to = self.host.slice_mut::<u8>(at, bytes)?;
            with_float!(dtype, F => {
                let elements = to.chunks_exact_mut(size_of::<F>()).zip(step.embeddings());
                elements.for_each(|(to, value)| F::from_f32(value).write(to));
            }, else unreachable!("checked when the device was opened"));
            self.used = at + bytes;
        }
        Ok(())
    }

    /// Queues the copy.
    pub fn upload(&self, stream: &Stream) -> Result<(), RunError> {
        stream.upload(&self.host, 0..self.used, &self.device, 0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lower::synthetic::Decoder;
    use crate::lower::{LowerOptions, lower};
    use crate::network::Profile;

    #[test]
    fn inputs_lie_apart_and_aligned() {
        for rows in [1, 63, 64, 65, 512] {
            let (offsets, bytes) = layout(rows);
            let mut end = 0;
            for (role, at) in ORDER.into_iter().zip(offsets) {
                assert!(at.is_multiple_of(aligned(1)) && at >= end, "{role} of {rows} rows");
                end = at + len(role, rows) * size_of::<i32>();
            }
            assert!(bytes >= end);
        }
    }

    /// Every input of a network besides caches and weights is written for each call.
    #[test]
    fn every_input_of_a_network_has_a_place() {
        let graph = Decoder::tiny().graph();
        let network = lower(&graph, &Profile::decode(16), &LowerOptions::default()).unwrap();
        let interface = network.interface.as_ref().unwrap();
        for port in interface.inputs() {
            assert_eq!(ORDER.contains(&port.role), port.role.cache().is_none(), "{}", port.role);
        }
        // Few models depend on the length of a run.
        for role in ORDER.into_iter().filter(|role| *role != Role::TotalLengths) {
            let tensor = network.tensor(interface.input(role).unwrap());
            let elements: i64 = tensor.shape.iter().map(|dim| dim.as_const().unwrap()).product();
            assert_eq!(elements as usize, len(role, 1), "{role}");
        }
    }
}
