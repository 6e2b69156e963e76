//! Loads and runs the engines of a session before the first request.

use super::CudaDevice;
use crate::decode::device::{Chunk, Device, DeviceError};
use crate::decode::step::Fed;

impl CudaDevice {
    /// Loads the engines for a prompt of `prompt` tokens and a text of `total` tokens, so that nothing stalls later.
    pub fn prepare(&mut self, prompt: usize, total: usize) -> Result<(), DeviceError> {
        let fits = |n: usize| move |c: &&usize| **c >= n;
        let largest = *self.capacities.last().expect("a package has one");
        let first = self
            .capacities
            .iter()
            .find(fits(prompt.max(1)))
            .copied()
            .unwrap_or(largest);
        let last = self.capacities.iter().find(fits(total)).copied().unwrap_or(largest);
        let mut position = 0;
        let mut rows = vec![1];
        while position < prompt.min(first) {
            let chunk = self.chunk(prompt - position, position, first);
            self.ready(chunk.rows, first)?;
            rows.push(chunk.rows);
            position += chunk.tokens;
        }
        let later: Vec<usize> = self
            .capacities
            .iter()
            .copied()
            .filter(|c| (first..=last).contains(c))
            .collect();
        for capacity in later {
            self.ready(1, capacity)?;
        }
        rows.sort_unstable();
        rows.dedup();
        self.warm(first, &rows)
    }

    /// Runs the engines for these numbers of rows twice over an empty cache: TensorRT initializes itself in an engine's
    /// first run, and the second is captured, so neither happens in the first request.
    pub(super) fn warm(&mut self, capacity: usize, rows: &[usize]) -> Result<(), DeviceError> {
        self.reserve(capacity, 0)?;
        let width = self.graph.embedding_width();
        let values = vec![0.0; width.unwrap_or(0)];
        for rows in rows.iter().copied().flat_map(|rows| [rows; 2]) {
            let fed = match width {
                Some(width) => Fed::Rows { values: &values, width },
                None => Fed::Ids(&[0]),
            };
            let chunk = Chunk {
                tokens: 1,
                rows,
                end: 1,
            };
            let queued = self.start(chunk, fed, 0);
            self.settled(queued)?;
            self.stream.wait().map_err(|error| self.failed(error))?;
        }
        self.last = None;
        // Cleared again: the values left by this dummy token are finite only if the model is sound.
        let cleared = self.cache.as_ref().map(|cache| cache.clear(&self.stream));
        cleared.transpose().map_err(|error| self.failed(error))?;
        Ok(())
    }
}
