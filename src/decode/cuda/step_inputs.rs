//! The small inputs of a call: token ids, positions, where to write, which row gets logits. One copy to the device.

use std::rc::Rc;

use super::aligned;
use crate::backend::tensorrt::run::{Buffer, Cuda, Pinned, RunError, Stream};

/// Inputs in the order in which they lie, the short ones first so that a decode step copies little.
const NAMES: [&str; 4] = ["write_indices", "logit_rows", "input_ids", "position_ids"];

pub(super) struct StepInputs {
    host: Pinned,
    device: Buffer,
    offsets: [usize; 4],
    used: usize,
}

impl StepInputs {
    /// For calls of up to `rows` tokens.
    pub fn new(cuda: &Rc<Cuda>, rows: usize) -> Result<Self, RunError> {
        let one = aligned(size_of::<i32>());
        let row = aligned(rows * size_of::<i32>());
        let offsets = [0, one, 2 * one, 2 * one + row];
        let bytes = 2 * one + 2 * row;
        Ok(StepInputs {
            host: Pinned::new(cuda, bytes)?,
            device: Buffer::new(cuda, bytes, "the inputs of a call")?,
            offsets,
            used: bytes,
        })
    }

    pub fn address(&self, name: &str) -> Option<u64> {
        let at = NAMES.iter().position(|n| *n == name)?;
        Some(self.device.address() + self.offsets[at] as u64)
    }

    /// The inputs for `tokens` at `position`, padded to `rows`.
    pub fn write(&mut self, tokens: &[u32], position: usize, rows: usize) -> Result<(), RunError> {
        let int = |n: usize| i32::try_from(n).expect("positions fit 31 bits");
        let [write, row, ids, positions] = self.offsets;
        self.host.slice_mut::<i32>(write, 1)?[0] = int(position);
        self.host.slice_mut::<i32>(row, 1)?[0] = int(tokens.len() - 1);
        let padded = tokens.iter().map(|id| *id as i32).chain(std::iter::repeat(0));
        for (slot, id) in self.host.slice_mut::<i32>(ids, rows)?.iter_mut().zip(padded) {
            *slot = id;
        }
        for (i, slot) in self.host.slice_mut::<i32>(positions, rows)?.iter_mut().enumerate() {
            *slot = int(position + i);
        }
        self.used = positions + rows * size_of::<i32>();
        Ok(())
    }

    /// Queues the copy.
    pub fn upload(&self, stream: &Stream) -> Result<(), RunError> {
        stream.upload(&self.host, 0..self.used, &self.device, 0)
    }
}
