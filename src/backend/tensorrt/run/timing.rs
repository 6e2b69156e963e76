//! How long an engine takes, with synthetic numbers in every input: for tuners and experiments, which have engines but no
//! session. Times of matrix products and attention do not depend on the numbers as long as they are finite.

use std::collections::BTreeMap;
use std::time::Duration;

use super::{Buffer, Engine, Event, Rows, RunError, Stream};
use crate::interface::Role;
use crate::network::Network;
use crate::tensor::{DType, Tensor};

/// An engine with memory of its own for every port. Weights and caches hold numbers about 0.03 in size, so that long chains
/// neither vanish nor overflow; integers are 0.
pub struct SyntheticEngine {
    /// Dropped before the memory that it is bound to, and never lent to be run by others.
    engine: Engine,
    buffers: BTreeMap<String, Buffer>,
    /// Names of the inputs that are no weights.
    roles: BTreeMap<Role, String>,
    scratch: Buffer,
}

impl SyntheticEngine {
    /// `network` is the one that the engine was built from, which knows whose memory an updated cache is in.
    pub fn new(mut engine: Engine, network: &Network) -> Result<Self, RunError> {
        let cuda = engine.plan().runtime.cuda().clone();
        let stream = Stream::new(&cuda)?;
        let name = |id| network.tensor(id).name.clone();
        let caches: BTreeMap<String, String> = network.aliases().map(|(from, to)| (name(to), name(from))).collect();
        let mut buffers: BTreeMap<String, Buffer> = BTreeMap::new();
        let mut ports = engine.ports().to_vec();
        ports.sort_by_key(|port| !port.is_input);
        for port in ports {
            let bytes = port.bytes(engine.tokens());
            let cache = caches.get(&port.name).and_then(|cache| buffers.get(cache));
            let address = match cache.filter(|cache| cache.bytes() >= bytes) {
                Some(cache) => cache.address(),
                None => {
                    let buffer = Buffer::new(&cuda, bytes, &port.name)?;
                    fill(&stream, &buffer, port.dtype)?;
                    let address = buffer.address();
                    buffers.insert(port.name.clone(), buffer);
                    address
                }
            };
            // SAFETY: of the port's size for the tokens that are set, which stay: the engine ends up in the struct below,
            // which keeps the memory until the engine is dropped and sets no others. If a later line fails, the engine is
            // dropped without a run.
            unsafe { engine.bind([(port.name.as_str(), address)])? };
        }
        let scratch = Buffer::new(&cuda, engine.scratch_bytes(), "working memory")?;
        // SAFETY: as above; nothing else is given this memory.
        unsafe { engine.set_scratch(&scratch) };
        let ports = network.interface.iter().flat_map(|interface| interface.inputs());
        let roles = ports.map(|port| (port.role, name(port.id))).collect();
        Ok(SyntheticEngine {
            engine,
            buffers,
            roles,
            scratch,
        })
    }

    /// Sets every element of an i32 input, for example all positions to the last live slot. Nothing, where the engine does
    /// not have it.
    pub fn set(&self, input: Role, value: i32) -> Result<(), RunError> {
        match self.roles.get(&input).and_then(|name| self.buffers.get(name)) {
            Some(buffer) => buffer.write(0, bytemuck::cast_slice(&vec![value; buffer.bytes() / size_of::<i32>()])),
            None => Ok(()),
        }
    }

    /// Device memory held.
    pub fn bytes(&self) -> u64 {
        let ports: usize = self.buffers.values().map(Buffer::bytes).sum();
        (ports + self.scratch.bytes()) as u64
    }

    /// GPU time of one run: see [`time`].
    pub fn time(&mut self, stream: &Stream, runs: u32) -> Result<Duration, RunError> {
        time(&mut self.engine, stream, runs)
    }
}

/// GPU time of one run: the mean of `runs` in a row, after some to warm up.
pub fn time(engine: &mut Engine, stream: &Stream, runs: u32) -> Result<Duration, RunError> {
    let cuda = engine.plan().runtime.cuda().clone();
    let (start, end) = (Event::new(&cuda)?, Event::new(&cuda)?);
    for _ in 0..4 {
        engine.enqueue(stream)?;
    }
    start.record(stream)?;
    for _ in 0..runs {
        engine.enqueue(stream)?;
    }
    end.record(stream)?;
    end.wait()?;
    Ok(end.since(&start)? / runs)
}

fn fill(stream: &Stream, buffer: &Buffer, dtype: DType) -> Result<(), RunError> {
    const BLOCK: usize = 128 << 10;
    if !dtype.is_float() {
        buffer.clear(stream)?;
        return stream.wait();
    }
    let mut state = 0x9e37_79b9_u32;
    let values: Vec<f64> = (0..BLOCK.min(buffer.bytes()) / dtype.element_bytes())
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 17;
            state ^= state << 5;
            (f64::from(state) / f64::from(u32::MAX) - 0.5) * 0.06
        })
        .collect();
    let block = Tensor::from_f64_as(dtype, vec![values.len()], &values);
    buffer.write(0, block.data())?;
    // Twice as much with every copy on the device.
    let mut done = block.data().len();
    while done < buffer.bytes() {
        let now = done.min(buffer.bytes() - done);
        let rows = now / BLOCK;
        let at = |at: usize| Rows {
            buffer,
            at,
            pitch: BLOCK,
        };
        stream.copy_rows(at(0), at(done), BLOCK, rows)?;
        let behind = rows * BLOCK;
        stream.copy_rows(at(behind), at(done + behind), now % BLOCK, 1)?;
        done += now;
    }
    stream.wait()
}
