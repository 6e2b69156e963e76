//! The KV caches that a session owns: created for a network, bound to each run, grown when they are full.

use super::aligned_bytes::AlignedBytes;
use super::error::CpuError;
use crate::interface::CacheRows;
use crate::network::Network;
use crate::tensor::element::widened;
use crate::tensor::{DType, Tensor};

/// One cache: `[batch, heads, capacity, head_dim]`, row-major, in the network's cache dtype.
pub struct KvCache {
    name: String,
    dtype: DType,
    shape: [usize; 4],
    memory: AlignedBytes,
}

impl KvCache {
    /// The network input it is bound to, for example `key_cache.0`.
    pub fn name(&self) -> &str {
        &self.name
    }
    /// As in the network.
    pub fn dtype(&self) -> DType {
        self.dtype
    }
    /// `[batch, heads, capacity, head_dim]`
    pub fn shape(&self) -> [usize; 4] {
        self.shape
    }
    /// The elements, little-endian.
    pub fn bytes(&self) -> &[u8] {
        self.memory.as_bytes()
    }
    /// The elements, mutable. Masked elements must stay finite.
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        self.memory.as_bytes_mut()
    }
    /// The elements as f32.
    pub fn to_f32(&self) -> Vec<f32> {
        widened(self.dtype, self.bytes()).expect("caches hold floats of at most 32 bits")
    }
    /// Replaces the contents by a tensor of the same dtype and shape.
    pub fn set(&mut self, tensor: &Tensor) -> Result<(), CpuError> {
        if tensor.dtype() != self.dtype || tensor.shape() != self.shape {
            return Err(CpuError::Binding {
                name: self.name.clone(),
                reason: format!("holds {} {:?}, given {tensor:?}", self.dtype, self.shape),
            });
        }
        self.bytes_mut().copy_from_slice(tensor.data());
        Ok(())
    }
}

/// Every KV cache of a model, owned by the session and bound to each run.
///
/// All programs compiled for one batch size and capacity share one `KvCaches`. When the capacity is used up, the session
/// [grows](KvCaches::grow) it and runs programs compiled for the larger capacity.
pub struct KvCaches {
    pub(super) entries: Vec<KvCache>,
}

impl KvCaches {
    /// Zeroed caches for a network, in the order of its updates. The shapes must be static, `tokens` aside.
    pub fn new(network: &Network) -> Result<KvCaches, CpuError> {
        let entries = network.aliases().map(|(input, _)| {
            let tensor = network.tensor(input);
            let shape = tensor
                .shape
                .iter()
                .map(|d| d.as_const().and_then(|v| usize::try_from(v).ok()));
            let shape: Option<Vec<usize>> = shape.collect();
            let Some(Ok(shape)) = shape.map(|s| <[usize; 4]>::try_from(s.as_slice())) else {
                return Err(CpuError::Dynamic {
                    tensor: tensor.name.clone(),
                    shape: format!("{:?}", tensor.shape),
                });
            };
            Ok(KvCache::zeroed(tensor.name.clone(), tensor.dtype, shape))
        });
        Ok(KvCaches {
            entries: entries.collect::<Result<_, _>>()?,
        })
    }

    /// In the order of the network's updates.
    pub fn iter(&self) -> impl Iterator<Item = &KvCache> {
        self.entries.iter()
    }
    /// The same, mutable.
    pub fn iter_mut(&mut self) -> impl Iterator<Item = &mut KvCache> {
        self.entries.iter_mut()
    }
    /// The cache of that network input.
    pub fn get_mut(&mut self, name: &str) -> Option<&mut KvCache> {
        self.entries.iter_mut().find(|c| c.name == name)
    }
    /// Slots of the first cache; 0 if the network has none.
    pub fn capacity(&self) -> usize {
        self.entries.first().map_or(0, |c| c.shape[2])
    }
    /// Bytes that one more slot takes.
    pub fn slot_bytes(&self) -> usize {
        let of = |c: &KvCache| c.shape[0] * c.shape[1] * c.dtype.byte_len(c.shape[3]);
        self.entries.iter().map(of).sum()
    }
    /// Bytes of all caches.
    pub fn byte_len(&self) -> usize {
        self.entries.iter().map(|c| c.memory.len()).sum()
    }

    /// More slots, keeping the first `used` slots of every cache; the others are zero. Caches are moved one at a time,
    /// so at most one exists twice. `capacity` may also be smaller, if it still holds `used`.
    pub fn grow(&mut self, capacity: usize, used: usize) {
        for cache in &mut self.entries {
            *cache = cache.copy(capacity, used);
        }
    }

    /// New caches of `capacity` slots, of which the first `used` are copies of these; the others are zero.
    pub fn copy(&self, capacity: usize, used: usize) -> KvCaches {
        let copies = self.entries.iter().map(|cache| cache.copy(capacity, used));
        KvCaches {
            entries: copies.collect(),
        }
    }

    /// Zeroes every cache, as for a new conversation.
    pub fn clear(&mut self) {
        for cache in &mut self.entries {
            cache.bytes_mut().fill(0);
        }
    }
}

impl KvCache {
    fn copy(&self, capacity: usize, used: usize) -> KvCache {
        let [batch, heads, old, dim] = self.shape;
        let rows = CacheRows {
            rows: batch * heads,
            slot_bytes: self.dtype.byte_len(dim),
        };
        let mut next = KvCache::zeroed(self.name.clone(), self.dtype, [batch, heads, capacity, dim]);
        if used > 0 {
            rows.resize(old, capacity, used).run(self.bytes(), next.bytes_mut());
        }
        next
    }

    fn zeroed(name: String, dtype: DType, shape: [usize; 4]) -> KvCache {
        let bytes = dtype.byte_len(shape.iter().product());
        KvCache {
            name,
            dtype,
            shape,
            memory: AlignedBytes::zeroed(bytes),
        }
    }
}
