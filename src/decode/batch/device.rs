//! The operations that a batch of sequences needs from a device.

use crate::decode::DeviceError;

/// The next token of one sequence of a batch.
#[derive(Debug)]
pub struct BatchRow<'l> {
    /// The slot of its cache.
    pub slot: usize,
    /// The token to feed.
    pub token: u32,
    /// Its position, and the slot of the cache that its key goes to.
    pub position: usize,
    /// Only the id of the largest logit is needed.
    pub only_best: bool,
    /// Receives the result, replacing the contents.
    pub output: &'l mut RowOutput,
}

/// What a step gives for a row.
#[derive(Clone, PartialEq, Debug)]
pub enum RowOutput {
    /// `[vocabulary]`.
    Logits(Vec<f32>),
    /// The id of the largest logit, the lowest of equals; the logits stayed on the device. Only where a row asks for
    /// [`BatchRow::only_best`], every logit is below infinity, and one is above minus infinity.
    Best(u32),
}

impl RowOutput {
    /// Memory for logits, empty: that of earlier logits if there is any.
    pub fn logits_mut(&mut self) -> &mut Vec<f32> {
        if let RowOutput::Best(_) = self {
            *self = RowOutput::Logits(Vec::new());
        }
        let RowOutput::Logits(logits) = self else {
            unreachable!("set above");
        };
        logits.clear();
        logits
    }

    /// The logits; empty if they stayed on the device.
    pub fn logits(&self) -> &[f32] {
        match self {
            RowOutput::Logits(logits) => logits,
            RowOutput::Best(_) => &[],
        }
    }
}

/// The operations of a device that runs several sequences. Each has its own cache, at a *slot*: a small number that the
/// caller chooses. Capacities are slots of the cache, positions count from 0.
///
/// As with [`Device`](crate::decode::Device), keys and values of the token at position `p` go to slot `p` of the cache,
/// and a query at `p` sees `0..=p`.
///
/// **The results of a sequence do not depend on the others**: logits of [`BatchDevice::decode`] are bit-identical for
/// any set of rows, and those of [`BatchDevice::prefill`] depend only on the chunk and the cache. A device that pads a
/// call to the rows of an engine must use only kernels for which this holds.
pub trait BatchDevice {
    /// Display name: `cpu`, or a GPU's name.
    fn name(&self) -> &str;

    /// Display name of what runs it.
    fn engine(&self) -> String;

    /// Maximum rows of one call of [`BatchDevice::decode`].
    fn most_rows(&self) -> usize;

    /// Maximum tokens of one call of [`BatchDevice::prefill`].
    fn largest_chunk(&self) -> usize;

    /// Whether [`BatchDevice::prefill`] may round differently at another capacity. A prefix is then shared only between
    /// sequences whose prompts have the same capacity.
    fn prompt_depends_on_capacity(&self) -> bool {
        false
    }

    /// Bytes of a cache with this many slots.
    fn cache_bytes(&mut self, capacity: usize) -> Result<usize, DeviceError>;

    /// Makes a cache of `capacity` at a slot that has none. `prefix`: another slot, and the number of its first
    /// positions to copy.
    fn open(&mut self, slot: usize, capacity: usize, prefix: Option<(usize, usize)>) -> Result<(), DeviceError>;

    /// Changes the capacity of a slot and keeps the first `used` positions. On an error the cache is unchanged.
    fn resize(&mut self, slot: usize, capacity: usize, used: usize) -> Result<(), DeviceError>;

    /// Drops the cache of a slot.
    fn close(&mut self, slot: usize);

    /// Feeds a chunk of a prompt at `position..` and writes the logits after its last token, `[vocabulary]`, replacing
    /// the contents. `end` is the position after the whole prompt; this chunk may be a part of it.
    fn prefill(
        &mut self,
        slot: usize,
        tokens: &[u32],
        position: usize,
        end: usize,
        logits: &mut Vec<f32>,
    ) -> Result<(), DeviceError>;

    /// Feeds one token to each of these sequences, which must be distinct. Returns the result of each row; the failure
    /// of one does not affect the others.
    fn decode(&mut self, rows: &mut [BatchRow<'_>]) -> Vec<Result<(), DeviceError>>;
}
