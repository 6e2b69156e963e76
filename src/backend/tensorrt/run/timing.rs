//! Times a program with synthetic values in every input: for tuners and experiments, which have engines but no session.
//! The time of matrix products and attention does not depend on the values as long as they are finite.

use std::collections::BTreeMap;
use std::rc::Rc;
use std::time::Duration;

use super::{Buffer, CachePlace, Caches, Cuda, Event, Program, Rows, RunError, Stream};
use crate::interface::Role;
use crate::network::{Network, TensorId, WeightMode};
use crate::tensor::{DType, Tensor};

/// A program with its own memory for everything that it reads and writes. Weights and caches contain numbers of
/// magnitude 0.03, so that long chains neither vanish nor overflow; integers are 0.
pub struct SyntheticProgram {
    /// Dropped before the memory to which it is bound, and never exposed.
    program: Program,
    buffers: BTreeMap<String, Buffer>,
    /// Names of the inputs that are not weights.
    roles: BTreeMap<Role, String>,
    scratch: Buffer,
}

impl SyntheticProgram {
    /// `network` is the program's network, which defines the memory of updated caches; `caches_are` is the form for
    /// which the program was loaded.
    pub fn new(mut program: Program, network: &Network, caches_are: Caches) -> Result<Self, RunError> {
        let cuda = program.runtime().cuda().clone();
        let stream = Stream::new(&cuda)?;
        let name = |id| network.tensor(id).name.clone();
        let interface = network.interface.iter();
        let roles: BTreeMap<String, Role> = interface
            .flat_map(|interface| interface.inputs().iter().chain(interface.outputs()))
            .map(|port| (name(port.id), port.role))
            .collect();
        let caches: BTreeMap<String, String> = network.aliases().map(|(from, to)| (name(to), name(from))).collect();
        let mut buffers: BTreeMap<String, Buffer> = BTreeMap::new();
        for (port, dtype, bytes) in ports(network, program.tokens()) {
            let cache = caches.get(&port).and_then(|cache| buffers.get(cache));
            let address = match cache.filter(|cache| cache.bytes() >= bytes) {
                Some(cache) => cache.address(),
                None => {
                    let buffer = Buffer::new(&cuda, bytes, &port)?;
                    fill(&stream, &buffer, dtype)?;
                    let address = buffer.address();
                    buffers.insert(port.clone(), buffer);
                    address
                }
            };
            let address = match roles.get(&port) {
                Some(Role::Cache(_)) if caches_are == Caches::Tables => {
                    let table = places(&cuda, network, &port, address)?;
                    let address = table.address();
                    buffers.insert(format!("{port}, table"), table);
                    address
                }
                // Written through the table.
                Some(Role::UpdatedCache(_)) if caches_are == Caches::Tables => continue,
                _ => address,
            };
            // SAFETY: of the tensor's size for the tokens that are set, which stay: the program ends up in the struct below,
            // which keeps the memory until the program is dropped and sets no others. If a later line fails, the program is
            // dropped without a run.
            unsafe { program.bind([(port.as_str(), address)])? };
        }
        let scratch = Buffer::new(&cuda, program.scratch_bytes(), "scratch memory")?;
        // SAFETY: as above; nothing else is given this memory.
        unsafe { program.set_scratch(&scratch) };
        let ports = network.interface.iter().flat_map(|interface| interface.inputs());
        let roles = ports.map(|port| (port.role, name(port.id))).collect();
        Ok(SyntheticProgram {
            program,
            buffers,
            roles,
            scratch,
        })
    }

    /// Sets every element of an i32 input, for example all positions to the last live slot. Does nothing if the engine
    /// does not have it.
    pub fn set(&self, input: Role, value: i32) -> Result<(), RunError> {
        match self.roles.get(&input).and_then(|name| self.buffers.get(name)) {
            Some(buffer) => buffer.write(0, bytemuck::cast_slice(&vec![value; buffer.bytes() / size_of::<i32>()])),
            None => Ok(()),
        }
    }

    /// Bytes of device memory.
    pub fn bytes(&self) -> u64 {
        let ports: usize = self.buffers.values().map(Buffer::bytes).sum();
        (ports + self.scratch.bytes() + self.program.bytes()) as u64
    }

    /// GPU time of one run: see [`time`].
    pub fn time(&mut self, stream: &Stream, runs: u32) -> Result<Duration, RunError> {
        time(&mut self.program, stream, runs)
    }
}

/// Name, dtype and bytes of everything that is bound to a program: inputs, bound weights, then outputs, so that a cache
/// precedes its update. Dims that depend on the call are `tokens`.
pub(super) fn ports(network: &Network, tokens: usize) -> Vec<(String, DType, usize)> {
    let tensor = |id: &TensorId| {
        let tensor = network.tensor(*id);
        let dims = tensor
            .shape
            .iter()
            .map(|dim| dim.as_const().map_or(tokens, |n| n as usize));
        (tensor.name.clone(), tensor.dtype, tensor.dtype.byte_len(dims.product()))
    };
    let bound = network.weights.iter().filter(|weight| weight.mode == WeightMode::Bind);
    let weights = bound.map(|weight| {
        let constant = &weight.constant;
        (weight.name.clone(), constant.dtype(), constant.byte_len())
    });
    let inputs = network.inputs.iter().map(tensor);
    inputs
        .chain(weights)
        .chain(network.outputs.iter().map(tensor))
        .collect()
}

/// The table of a cache `[sequences, kv_heads, capacity, head_dim]` at this address.
fn places(cuda: &Rc<Cuda>, network: &Network, cache: &str, address: u64) -> Result<Buffer, RunError> {
    let tensor = network.inputs.iter().map(|id| network.tensor(*id));
    let tensor = tensor
        .into_iter()
        .find(|tensor| tensor.name == cache)
        .expect("an input");
    let dims = tensor.shape.iter().filter_map(|dim| Some(dim.as_const()? as usize));
    let dims: Vec<usize> = dims.collect();
    let bytes = tensor.dtype.byte_len(dims[1..].iter().product());
    let places: Vec<CachePlace> = (0..dims[0])
        .map(|sequence| CachePlace {
            address: address + (sequence * bytes) as u64,
            capacity: dims[2] as u64,
        })
        .collect();
    let table = Buffer::new(cuda, size_of_val(places.as_slice()), cache)?;
    table.write(0, bytemuck::cast_slice(&places))?;
    Ok(table)
}

/// GPU time of one run: the mean of `runs` in a row, after warm-up runs.
pub fn time(program: &mut Program, stream: &Stream, runs: u32) -> Result<Duration, RunError> {
    let cuda = program.runtime().cuda().clone();
    let (start, end) = (Event::new(&cuda)?, Event::new(&cuda)?);
    for _ in 0..4 {
        program.enqueue(stream)?;
    }
    start.record(stream)?;
    for _ in 0..runs {
        program.enqueue(stream)?;
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
