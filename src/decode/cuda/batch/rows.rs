//! Memory of a step of several sequences, on host and device: small inputs, tables of caches, logits.

use std::ops::Range;
use std::rc::Rc;

use crate::backend::tensorrt::run::{Argmax, Buffer, CachePlace, Cuda, Pinned, RunError, Stream};
use crate::decode::cuda::aligned;
use crate::decode::cuda::kv_cache::KvCache;
use crate::interface::{CacheId, Role, Signature};

/// Inputs of one i32 for each sequence, in memory order.
const INPUTS: [Role; 5] = [
    Role::WriteIndices,
    Role::TotalLengths,
    Role::LogitRows,
    Role::TokenIds,
    Role::PositionIds,
];

/// Offsets for `most` sequences. Inputs first, then a table for each cache with an entry for each sequence. Programs
/// for fewer sequences use the first elements of each.
#[derive(Clone, Debug)]
struct Layout {
    most: usize,
    caches: Vec<CacheId>,
}

impl Layout {
    fn input(&self, at: usize) -> usize {
        at * aligned(self.most * size_of::<i32>())
    }

    fn table(&self, at: usize) -> usize {
        self.input(INPUTS.len()) + at * aligned(self.most * size_of::<CachePlace>())
    }

    fn bytes(&self) -> usize {
        self.table(self.caches.len())
    }

    /// Offset of the input of that role; for a cache, of its table.
    fn of(&self, role: Role) -> Option<usize> {
        match role {
            Role::Cache(id) => Some(self.table(self.caches.iter().position(|known| *known == id)?)),
            role => Some(self.input(INPUTS.iter().position(|known| *known == role)?)),
        }
    }
}

pub(super) struct RowMemory {
    layout: Layout,
    host: Pinned,
    device: Buffer,
    /// `[most, vocabulary]` on host and device.
    logits: Buffer,
    pinned_logits: Pinned,
    argmax: Argmax,
    vocabulary: usize,
}

/// One sequence of a step: its token, the token's position, its cache.
pub(super) type Step<'c> = (u32, usize, &'c KvCache);

impl RowMemory {
    /// For up to `most` sequences of a model of this interface. `stream` is the one that steps run in.
    pub fn new(
        cuda: &Rc<Cuda>,
        stream: &Stream,
        most: usize,
        vocabulary: usize,
        interface: &Signature,
    ) -> Result<Self, RunError> {
        let caches = interface.caches.iter().map(|shape| shape.cache).collect();
        let layout = Layout { most, caches };
        let logits = most * vocabulary * size_of::<f32>();
        Ok(RowMemory {
            host: Pinned::new(cuda, layout.bytes())?,
            device: Buffer::new(cuda, layout.bytes(), "the inputs of a step")?,
            logits: Buffer::new(cuda, logits, "the logits of a step")?,
            pinned_logits: Pinned::new(cuda, logits)?,
            argmax: Argmax::new(cuda, stream, most)?,
            layout,
            vocabulary,
        })
    }

    /// The device address of the tensor of a role; `None` if there is none, or if its memory is smaller than `bytes`.
    pub fn address(&self, role: Role, bytes: Option<usize>) -> Option<u64> {
        match role {
            Role::Logits => (bytes? <= self.logits.bytes()).then(|| self.logits.address()),
            role => Some(self.device.address() + self.layout.of(role)? as u64),
        }
    }

    /// Writes the inputs of a step of `rows` sequences. These are the first ones; the others compute token 0 at
    /// position 0 over a cache without slots, which is never written.
    pub fn write<'c>(&mut self, steps: impl Iterator<Item = Step<'c>>, rows: usize) -> Result<(), RunError> {
        let int = |n: usize| i32::try_from(n).expect("positions fit 31 bits");
        let steps: Vec<Step<'c>> = steps.collect();
        let of_row = |row: usize| {
            steps
                .get(row)
                .map_or((0, 0), |(token, position, _)| (*token, *position))
        };
        for (at, role) in INPUTS.into_iter().enumerate() {
            let to = self.host.slice_mut::<i32>(self.layout.input(at), rows)?;
            for (row, to) in to.iter_mut().enumerate() {
                let (token, position) = of_row(row);
                *to = match role {
                    Role::TokenIds => token as i32,
                    Role::TotalLengths => int(position + 1),
                    Role::LogitRows => 0,
                    _ => int(position),
                };
            }
        }
        // A cache without slots is never read or written, but its address is used in arithmetic.
        let nowhere = CachePlace {
            address: self.device.address(),
            capacity: 0,
        };
        for table in 0..self.layout.caches.len() {
            let to = self.host.slice_mut::<CachePlace>(self.layout.table(table), rows)?;
            to.fill(nowhere);
        }
        for (row, (.., cache)) in steps.iter().enumerate() {
            let capacity = cache.capacity() as u64;
            for (table, address) in cache.addresses().enumerate() {
                let to = self.host.slice_mut::<CachePlace>(self.layout.table(table), rows)?;
                to[row] = CachePlace { address, capacity };
            }
        }
        Ok(())
    }

    /// Queues the copy of the inputs.
    pub fn upload(&self, stream: &Stream) -> Result<(), RunError> {
        stream.upload(&self.host, 0..self.layout.bytes(), &self.device, 0)
    }

    /// Queues the search for the largest logit of each of the first rows.
    pub fn find_best(&mut self, stream: &Stream, rows: usize) -> Result<(), RunError> {
        self.argmax.enqueue(stream, &self.logits, rows, self.vocabulary)
    }

    /// What the search found in a row, see [`Argmax::result`].
    pub fn best(&self, row: usize) -> Result<Option<u32>, RunError> {
        self.argmax.result(row)
    }

    /// Queues the copy of the logits of these rows.
    pub fn download(&mut self, stream: &Stream, rows: Range<usize>) -> Result<(), RunError> {
        let bytes = self.row_bytes(rows.start)..self.row_bytes(rows.end);
        match bytes.is_empty() {
            true => Ok(()),
            false => stream.download(&self.logits, bytes.clone(), &mut self.pinned_logits, bytes.start),
        }
    }

    /// The logits of a row that was copied, `[vocabulary]`.
    pub fn logits(&self, row: usize) -> Result<&[f32], RunError> {
        self.pinned_logits.slice::<f32>(self.row_bytes(row), self.vocabulary)
    }

    /// Bytes of so many rows of logits.
    fn row_bytes(&self, rows: usize) -> usize {
        rows * self.vocabulary * size_of::<f32>()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::interface::CachePart;

    #[test]
    fn inputs_and_tables_lie_apart_and_aligned() {
        for most in [1, 16, 64, 65] {
            let cache = |layer, part| CacheId { layer, part };
            let caches = vec![
                cache(0, CachePart::Key),
                cache(0, CachePart::Value),
                cache(1, CachePart::Key),
            ];
            let layout = Layout {
                most,
                caches: caches.clone(),
            };
            let mut end = 0;
            let roles = INPUTS.into_iter().chain(caches.into_iter().map(Role::Cache));
            for role in roles {
                let at = layout.of(role).unwrap();
                assert!(at.is_multiple_of(aligned(1)) && at >= end, "{role} of {most}");
                let element = if role.cache().is_some() { 16 } else { 4 };
                end = at + most * element;
            }
            assert!(layout.bytes() >= end);
            assert_eq!(layout.of(Role::Logits), None);
            assert_eq!(layout.of(Role::Cache(cache(7, CachePart::Key))), None);
        }
    }
}
