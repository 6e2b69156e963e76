//! How long an engine takes, with made-up numbers in every input: for tuners and experiments, which have engines but no
//! session. Times of matrix products and attention do not depend on the numbers as long as they are finite.

use std::collections::BTreeMap;
use std::rc::Rc;
use std::time::Duration;

use super::{Buffer, Engine, Event, RunError, Runtime, Stream};
use crate::network::Network;
use crate::tensor::{DType, Tensor};

/// Memory for every port of an engine, bound to it. Weights and caches hold numbers about 0.03 in size, so that long chains
/// neither vanish nor overflow; integers are 0.
pub struct MadeUp {
    buffers: BTreeMap<String, Buffer>,
    scratch: Buffer,
}

impl MadeUp {
    /// `network` is the one that the engine was built from, which knows whose memory an updated cache is in. The engine
    /// must not run after this is dropped.
    pub fn bind(runtime: &Rc<Runtime>, engine: &mut Engine, network: &Network) -> Result<Self, RunError> {
        let cuda = runtime.cuda();
        let stream = Stream::new(cuda)?;
        let name = |id| network.tensor(id).name.clone();
        let caches: BTreeMap<String, String> = network.aliases().map(|(from, to)| (name(to), name(from))).collect();
        let mut buffers: BTreeMap<String, Buffer> = BTreeMap::new();
        let mut ports = engine.ports().to_vec();
        ports.sort_by_key(|port| !port.is_input);
        for port in ports {
            let address = match caches.get(&port.name).and_then(|cache| buffers.get(cache)) {
                Some(cache) => cache.address(),
                None => {
                    let buffer = Buffer::new(cuda, port.bytes(engine.tokens()), &port.name)?;
                    fill(&stream, &buffer, port.dtype)?;
                    let address = buffer.address();
                    buffers.insert(port.name.clone(), buffer);
                    address
                }
            };
            // SAFETY: of the port's size, and held by this struct, which outlives the engine's runs by contract.
            unsafe { engine.bind([(port.name.as_str(), address)])? };
        }
        let scratch = Buffer::new(cuda, engine.scratch_bytes(), "working memory")?;
        // SAFETY: as above.
        unsafe { engine.set_scratch(&scratch) };
        Ok(MadeUp { buffers, scratch })
    }

    /// Sets every element of an i32 input, for example all positions to the last live slot.
    pub fn set(&self, input: &str, value: i32) -> Result<(), RunError> {
        match self.buffers.get(input) {
            Some(buffer) => buffer.write(0, bytemuck::cast_slice(&vec![value; buffer.bytes() / size_of::<i32>()])),
            None => Ok(()),
        }
    }

    /// Device memory held.
    pub fn bytes(&self) -> u64 {
        let ports: usize = self.buffers.values().map(Buffer::bytes).sum();
        (ports + self.scratch.bytes()) as u64
    }
}

/// GPU time of one run: the mean of `runs` in a row, after some to warm up.
pub fn time(runtime: &Rc<Runtime>, engine: &mut Engine, stream: &Stream, runs: u32) -> Result<Duration, RunError> {
    let (start, end) = (Event::new(runtime.cuda())?, Event::new(runtime.cuda())?);
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
    let values: Vec<f64> = (0..BLOCK.min(buffer.bytes()) / dtype.size())
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
        let (from, to) = (buffer.address(), buffer.address() + done as u64);
        let rows = now / BLOCK;
        stream.copy_rows((from, BLOCK), (to, BLOCK), BLOCK, rows)?;
        let behind = (rows * BLOCK) as u64;
        stream.copy_rows((from + behind, BLOCK), (to + behind, BLOCK), now % BLOCK, 1)?;
        done += now;
    }
    stream.wait()
}
