//! What a batch of sequences asks of a machine.

use crate::decode::DeviceError;

/// The next token of one sequence of a batch.
#[derive(Debug)]
pub struct BatchRow<'l> {
    /// Where its cache is.
    pub slot: usize,
    /// What is fed.
    pub token: u32,
    /// Its position, and the slot of the cache that its key goes to.
    pub position: usize,
    /// Only the id of the largest logit is needed.
    pub only_best: bool,
    /// What comes after it replaces what is there.
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

/// What a machine must offer to run several sequences. Each has a cache of its own, at a *slot*: a small number that the
/// caller chooses. Capacities are slots of the cache, positions count from 0.
///
/// As with [`Device`](crate::decode::Device), keys and values of the token at position `p` go to place `p` of the cache, and
/// a query at `p` sees `0..=p`.
///
/// **What a sequence gets does not depend on the others**: logits of [`BatchDevice::decode`] are the same bits whichever rows
/// there are, and those of [`BatchDevice::prefill`] follow from the chunk and the cache alone. A device that pads a call to
/// the rows of an engine keeps to kernels for which this holds.
pub trait BatchDevice {
    /// For people: `cpu`, or a GPU's name.
    fn name(&self) -> &str;

    /// What runs it, for people.
    fn engine(&self) -> String;

    /// Rows of one call of [`BatchDevice::decode`] at most.
    fn most_rows(&self) -> usize;

    /// Tokens of one call of [`BatchDevice::prefill`] at most.
    fn largest_chunk(&self) -> usize;

    /// Whether [`BatchDevice::prefill`] may round otherwise at another capacity. A prefix is then shared between sequences
    /// whose prompts have the same one.
    fn prompt_depends_on_capacity(&self) -> bool {
        false
    }

    /// Bytes that a cache of so many slots takes.
    fn cache_bytes(&mut self, capacity: usize) -> Result<usize, DeviceError>;

    /// Makes a cache of `capacity` at a slot that has none. `prefix`: another slot, and how many of its first places are
    /// copied.
    fn open(&mut self, slot: usize, capacity: usize, prefix: Option<(usize, usize)>) -> Result<(), DeviceError>;

    /// Gives a slot another capacity and keeps the first `used` places. On an error the cache is what it was.
    fn resize(&mut self, slot: usize, capacity: usize, used: usize) -> Result<(), DeviceError>;

    /// Forgets the cache of a slot.
    fn close(&mut self, slot: usize);

    /// Feeds a chunk of a prompt at `position..` and writes the logits after its last token, `[vocabulary]`, in place of what
    /// is there. `end` is the position after the whole prompt, of which this may be a part.
    fn prefill(
        &mut self,
        slot: usize,
        tokens: &[u32],
        position: usize,
        end: usize,
        logits: &mut Vec<f32>,
    ) -> Result<(), DeviceError>;

    /// Feeds one token to each of these sequences, which are different ones. Gives what became of each row; the failure of
    /// one changes nothing for the others.
    fn decode(&mut self, rows: &mut [BatchRow<'_>]) -> Vec<Result<(), DeviceError>>;
}
