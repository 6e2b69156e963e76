//! The operations that a session needs from a device.

use super::instruments::Instruments;
use crate::help::{Fault, Help};

/// One call of a lowered network.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Chunk {
    /// Number of waiting tokens that the call takes.
    pub tokens: usize,
    /// Rows of the network: `tokens`, or more if only fixed lengths exist; the rest is padding.
    pub rows: usize,
    /// The position after the last token of the run that contains this chunk.
    pub end: usize,
}

/// The operations of a machine that runs one sequence. Capacities are slots of the cache, positions count from 0.
///
/// The device owns one cache at a time. It writes the keys and values of the token at position `p` to slot `p`, and a
/// query at `p` sees slots `0..=p`: slots beyond may hold anything finite, so padding needs no cleaning up.
pub trait Device {
    /// Readable: `cpu`, or a GPU's name.
    fn name(&self) -> &str;

    /// Name of what ran last, for example the profile `b1-t1-c256`, or an engine's file.
    fn engine(&self) -> String;

    /// How to cut the next call, with `waiting` (at least 1) tokens to feed at `position` into `capacity` slots: the
    /// rest of a run. `tokens <= waiting` and `position + rows <= capacity` must hold; the caller ensures that one
    /// token fits.
    fn chunk(&self, waiting: usize, position: usize, capacity: usize) -> Chunk;

    /// Moves to a cache of `capacity` slots, keeping the first `used` slots of the current one: allocate, copy, switch.
    /// Also the first call, with `used` 0.
    fn reserve(&mut self, capacity: usize, used: usize) -> Result<(), DeviceError>;

    /// Runs one chunk: `tokens` at `position..`, padded to `chunk.rows`. Writes the logits of the last token,
    /// `[vocabulary]`, to `logits`, replacing what was there.
    fn forward(
        &mut self,
        chunk: Chunk,
        tokens: &[u32],
        position: usize,
        logits: &mut Vec<f32>,
    ) -> Result<(), DeviceError>;

    /// As [`Device::forward`], for callers who need only the id of the largest logit, the lowest among equals. A device
    /// that finds it on the device leaves `logits` empty. `None` means that there is none: a logit is NaN or infinite,
    /// or all are minus infinity; `logits` then has them all.
    fn forward_best(
        &mut self,
        chunk: Chunk,
        tokens: &[u32],
        position: usize,
        logits: &mut Vec<f32>,
    ) -> Result<Option<u32>, DeviceError> {
        self.forward(chunk, tokens, position, logits)?;
        Ok(best(logits))
    }

    /// As [`Device::chunk`], for a call of [`Device::forward_all`]. One token unless the device has networks with
    /// logits of every row.
    fn chunk_all(&self, waiting: usize, position: usize, _capacity: usize) -> Chunk {
        let end = position + waiting;
        Chunk {
            tokens: 1,
            rows: 1,
            end,
        }
    }

    /// As [`Device::forward`] over a chunk of [`Device::chunk_all`]: appends the logits of every token to `logits`,
    /// `[tokens, vocabulary]`.
    fn forward_all(
        &mut self,
        chunk: Chunk,
        tokens: &[u32],
        position: usize,
        logits: &mut Vec<f32>,
    ) -> Result<(), DeviceError> {
        debug_assert_eq!(tokens.len(), 1, "the device computes logits of the last token only");
        let mut row = Vec::new();
        self.forward(chunk, tokens, position, &mut row)?;
        logits.append(&mut row);
        Ok(())
    }

    /// As [`Device::forward`], for a model that takes embeddings: those of the tokens, `[tokens, hidden]`.
    fn forward_rows(
        &mut self,
        _chunk: Chunk,
        _rows: &[f32],
        _position: usize,
        _logits: &mut Vec<f32>,
    ) -> Result<(), DeviceError> {
        Err(DeviceError {
            device: self.name().to_string(),
            message: "it does not support models that take embeddings".to_string(),
            help: None,
        })
    }

    /// Instruments for benchmarks, if it has any.
    fn instruments(&mut self) -> Option<&mut dyn Instruments> {
        None
    }
}

/// The id of the largest logit, the lowest among equals; `None` as in [`Device::forward_best`].
pub fn best(logits: &[f32]) -> Option<u32> {
    let mut found: Option<usize> = None;
    for (id, logit) in logits.iter().enumerate() {
        if logit.is_nan() || *logit == f32::INFINITY {
            return None;
        }
        if *logit > found.map_or(f32::NEG_INFINITY, |best| logits[best]) {
            found = Some(id);
        }
    }
    found.map(|id| id as u32)
}

/// A failure of a device.
#[derive(Clone, Debug, thiserror::Error)]
#[error("{device}: {message}")]
pub struct DeviceError {
    /// Its [`Device::name`].
    pub device: String,
    /// What went wrong.
    pub message: String,
    /// What to do about it, if anything.
    pub help: Option<String>,
}

impl Help for DeviceError {
    fn fault(&self) -> Fault {
        Fault::Machine
    }

    fn help(&self) -> Option<String> {
        self.help.clone()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn there_is_no_best_among_what_is_not_finite() {
        assert_eq!(best(&[1.0, 3.0, 3.0, 2.0]), Some(1));
        assert_eq!(best(&[f32::NEG_INFINITY, -5.0]), Some(1));
        assert_eq!(best(&[-0.0, 0.0]), Some(0));
        for none in [
            &[][..],
            &[f32::NEG_INFINITY; 2],
            &[1.0, f32::NAN],
            &[f32::INFINITY, 1.0],
        ] {
            assert_eq!(best(none), None, "{none:?}");
        }
    }
}
