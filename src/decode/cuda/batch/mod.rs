//! Several sequences on the GPU: prompts one after the other, decode steps of all at once.
//!
//! Implements [`BatchDevice`] for a package with engines. Each sequence has its own cache, of any of the package's
//! capacities. A chunk of a prompt runs in the engines of a session ([`CudaDevice`]), over the cache of its sequence. A
//! decode step runs in a program for 1, 2, 4, 8 or 16 sequences (`convert --batch`), whose attention kernels find the
//! caches through a table: any cache can be in any row, and sequences of different capacities share a step.
//!
//! A program for several sequences computes each one independently, bit for bit
//! ([`Network::layer_across_sequences`](crate::network::Network::layer_across_sequences)); other networks are not used
//! here. Without such a program, sequences take turns in the decode engines of their capacities.

mod rows;

use rayon::prelude::*;

use super::chunks::largest;
use super::error::OpenError;
use super::kv_cache::KvCache;
use super::load::{Is, check_ports, nothing_to_bind};
use super::{CudaDevice, CudaOptions, EngineSlot};
use crate::backend::tensorrt::run::{Buffer, Caches, LoadOptions, Program, RunError, Stream};
use crate::backend::tensorrt::{FLAVOUR, Library};
use crate::decode::Embeddings;
use crate::decode::batch::{BatchDevice, BatchRow, RowOutput};
use crate::decode::device::{Chunk, Device, DeviceError};
use crate::decode::step::Fed;
use crate::interface::Role;
use crate::network::{Network, Tokens, WeightMode};
use crate::package::Package;
use rows::RowMemory;

/// See the module's head. Fields are dropped in this order: programs before the memory that they are bound to.
pub struct CudaBatchDevice {
    /// Ascending by rows.
    programs: Vec<RowProgram>,
    /// Working memory of the programs' engines, which run one at a time.
    _scratch: Option<Buffer>,
    /// If there are programs.
    memory: Option<RowMemory>,
    /// By slot.
    caches: Vec<Option<KvCache>>,
    device: CudaDevice,
    embeddings: Option<Embeddings>,
    /// Embeddings of a call's tokens.
    fed: Vec<f32>,
}

/// A decode step of this many sequences.
struct RowProgram {
    rows: usize,
    program: Program,
}

impl CudaBatchDevice {
    /// Loads the programs for steps and for prompts in chunks of up to `chunk` tokens, and runs them once.
    /// `embeddings`: the table of a model that takes embeddings.
    pub fn open(
        package: &Package,
        library: &Library,
        options: CudaOptions,
        chunk: usize,
        embeddings: Option<Embeddings>,
    ) -> Result<Self, OpenError> {
        let mut device = CudaDevice::open(package, library, options)?;
        // Consecutive prompts use different caches: each would be captured again.
        device.captures_prompts = false;
        let mut opened = CudaBatchDevice {
            programs: Vec::new(),
            _scratch: None,
            memory: None,
            caches: Vec::new(),
            device,
            embeddings,
            fed: Vec::new(),
        };
        opened.prepare_prompts(chunk)?;
        opened.load_programs(package)?;
        Ok(opened)
    }

    /// Loads the engines for chunks of up to `chunk` tokens, at every capacity, and runs them once.
    fn prepare_prompts(&mut self, chunk: usize) -> Result<(), DeviceError> {
        let device = &mut self.device;
        for capacity in device.capacities.clone() {
            let here = device.slots.iter().filter(|slot| slot.profile.capacity == capacity);
            let mut rows: Vec<usize> = here
                .map(|slot| match slot.profile.tokens {
                    Tokens::Static(rows) => rows,
                    Tokens::Dynamic { min, max, .. } => chunk.clamp(min, max),
                })
                .collect();
            rows.sort_unstable();
            rows.dedup();
            let needed = rows.partition_point(|rows| *rows < chunk) + 1;
            rows.truncate(needed);
            device.warm(capacity, &rows)?;
        }
        // Sequences have their own.
        (device.cache, device.capacity) = (None, 0);
        Ok(())
    }

    /// Loads every program for steps that this GPU can run, and runs it twice: the second run is captured.
    fn load_programs(&mut self, package: &Package) -> Result<(), OpenError> {
        if self.device.graph.embedding_width().is_some() {
            return Ok(());
        }
        let slots = self.step_slots(package);
        let most = slots.iter().map(|slot| slot.profile.batch).max().unwrap_or(0);
        let mut loaded = Vec::new();
        for slot in &slots {
            let network = self.device.lowered(slot)?;
            if network.layer_across_sequences().is_some() {
                continue;
            }
            self.device.provide_weights()?;
            let memory = match &self.memory {
                Some(memory) => memory,
                None => {
                    let device = &self.device;
                    let made = RowMemory::new(
                        device.runtime.cuda(),
                        &device.stream,
                        most,
                        device.vocabulary,
                        &device.interface,
                    );
                    self.memory.insert(made.map_err(|error| self.device.failed(error))?)
                }
            };
            match program(&self.device, memory, slot, &network) {
                Ok(program) => loaded.push(RowProgram {
                    rows: slot.profile.batch,
                    program,
                }),
                // A GPU with less shared memory supports fewer rows.
                Err(RunError::SharedMemory { .. }) => {}
                Err(error) => return Err(self.device.failed(error).into()),
            }
        }
        loaded.sort_by_key(|program| program.rows);
        loaded.dedup_by_key(|program| program.rows);
        self.programs = loaded;
        self.provide_scratch().map_err(|error| self.device.failed(error))?;
        for at in (0..self.programs.len()).flat_map(|at| [at; 2]) {
            self.run(at, &[]).map_err(|error| self.device.failed(error))?;
        }
        Ok(())
    }

    /// The package's engines for decode steps with bound weights: for one sequence at the largest capacity, and for
    /// several.
    fn step_slots(&self, package: &Package) -> Vec<EngineSlot> {
        let largest = self.device.capacities.iter().max().copied();
        let entries = package.manifest.engines.iter().filter(|entry| {
            let profile = &entry.profile;
            entry.target == FLAVOUR.target
                && entry.weight_mode == WeightMode::Bind
                && profile.tokens == Tokens::Static(1)
                && entry.built_as.is_none()
                && (profile.batch > 1 || Some(profile.capacity) == largest)
        });
        let slots = entries.map(|entry| EngineSlot {
            profile: entry.profile,
            entry: entry.clone(),
            loaded: None,
        });
        slots.collect()
    }

    fn provide_scratch(&mut self) -> Result<(), RunError> {
        let bytes = self.programs.iter().map(|p| p.program.scratch_bytes()).max();
        let Some(bytes) = bytes else { return Ok(()) };
        let scratch = Buffer::new(self.device.runtime.cuda(), bytes, "the engines' scratch memory")?;
        for RowProgram { program, .. } in &mut self.programs {
            // SAFETY: kept in self, which drops programs first; they run one at a time.
            unsafe { program.set_scratch(&scratch) };
        }
        self._scratch = Some(scratch);
        Ok(())
    }

    /// Runs one step of these sequences in the program `at`, and waits. Afterwards the memory of rows has the best
    /// token of each row that needs only that, and the logits of the rows that need them.
    fn run(&mut self, at: usize, rows: &[BatchRow<'_>]) -> Result<(), RunError> {
        let RowProgram { rows: all, program } = &mut self.programs[at];
        let memory = self.memory.as_mut().expect("made with the programs");
        let stream = &self.device.stream;
        let steps = rows.iter().map(|row| {
            let cache = self.caches[row.slot].as_ref().expect("an open slot");
            (row.token, row.position, cache)
        });
        memory.write(steps, *all)?;
        let queued = memory.upload(stream).and_then(|()| program.enqueue(stream));
        let queued = queued.and_then(|()| queue_outputs(memory, stream, rows));
        // What was queued before an error still reads the inputs.
        let waited = stream.wait();
        queued.and(waited)
    }

    /// A step of at most as many sequences as the largest program has.
    fn step(&mut self, rows: &mut [BatchRow<'_>]) -> Result<(), DeviceError> {
        let at = self.programs.partition_point(|program| program.rows < rows.len());
        let run = self.run(at, rows).and_then(|()| self.collect(rows));
        run.map_err(|error| self.device.failed(error))
    }

    /// Gives each row what the step before computed for it.
    fn collect(&mut self, rows: &mut [BatchRow<'_>]) -> Result<(), RunError> {
        let memory = self.memory.as_mut().expect("made with the programs");
        let mut copies = Vec::new();
        for (at, row) in rows.iter_mut().enumerate() {
            if row.only_best {
                if let Some(best) = memory.best(at)? {
                    *row.output = RowOutput::Best(best);
                    continue;
                }
                // Its logits tell why there is none.
                memory.download(&self.device.stream, at..at + 1)?;
            }
            copies.push((at, row.output.logits_mut()));
        }
        let copies: Vec<(&[f32], &mut Vec<f32>)> = copies
            .into_iter()
            .map(|(at, to)| memory.logits(at).map(|from| (from, to)))
            .collect::<Result<_, _>>()?;
        // 16 rows of a large vocabulary are 8 MB: copying them with one thread would take a fifth of a step's time.
        copies.into_par_iter().for_each(|(from, to)| to.extend_from_slice(from));
        Ok(())
    }

    /// Lets the session's device use the cache of a sequence while `call` runs.
    fn over<T>(
        &mut self,
        slot: usize,
        call: impl FnOnce(&mut CudaDevice) -> Result<T, DeviceError>,
    ) -> Result<T, DeviceError> {
        let cache = self.caches[slot].take().expect("an open slot");
        self.device.capacity = cache.capacity();
        self.device.cache = Some(cache);
        let result = call(&mut self.device);
        self.caches[slot] = self.device.cache.take();
        result
    }

    /// Feeds tokens in chunks of the engines' sizes; returns the logits of the last.
    fn feed(
        &mut self,
        slot: usize,
        tokens: &[u32],
        position: usize,
        end: usize,
        logits: &mut Vec<f32>,
    ) -> Result<(), DeviceError> {
        let mut rows = std::mem::take(&mut self.fed);
        let embeddings = self.embeddings.as_ref();
        let width = embeddings.map(|embeddings| {
            embeddings.rows(tokens, &mut rows);
            embeddings.width()
        });
        let result = self.over(slot, |device| {
            let mut done = 0;
            while done < tokens.len() {
                let chunk = device.chunk(tokens.len() - done, position + done, device.capacity);
                let here = done..done + chunk.tokens;
                let fed = match width {
                    None => Fed::Ids(&tokens[here.clone()]),
                    Some(width) => Fed::Rows {
                        values: &rows[here.start * width..here.end * width],
                        width,
                    },
                };
                device.forward_fed(Chunk { end, ..chunk }, fed, position + done, logits)?;
                done = here.end;
            }
            Ok(())
        });
        self.fed = rows;
        result
    }

    /// A cache for a sequence: zeros, or the result of `from` on another.
    fn allocated(&self, capacity: usize, from: Option<(&KvCache, usize)>) -> Result<KvCache, DeviceError> {
        let device = &self.device;
        let cuda = device.runtime.cuda();
        let made = match from {
            Some((cache, kept)) => cache.grown(cuda, &device.stream, capacity, kept),
            None => KvCache::new(cuda, &device.stream, &device.interface, 1, capacity),
        };
        // The other may be dropped once it is copied.
        let made = made.and_then(|cache| device.stream.wait().map(|()| cache));
        made.map_err(|error| {
            device.failed(match error {
                RunError::Memory { needed, free, .. } => RunError::Memory {
                    what: format!("a cache of {capacity} tokens"),
                    needed,
                    free,
                    fits: None,
                },
                other => other,
            })
        })
    }

    /// Free bytes of device memory.
    pub fn free_memory(&self) -> Result<u64, DeviceError> {
        let memory = self.device.runtime.cuda().memory();
        memory.map(|(free, _)| free).map_err(|error| self.device.failed(error))
    }
}

/// Queues what these rows need of the logits: the search for their best tokens, and copies.
fn queue_outputs(memory: &mut RowMemory, stream: &Stream, rows: &[BatchRow<'_>]) -> Result<(), RunError> {
    if rows.iter().any(|row| row.only_best) {
        memory.find_best(stream, rows.len())?;
    }
    let mut start = 0;
    // Adjacent rows in one copy.
    for same in rows.chunk_by(|a, b| a.only_best == b.only_best) {
        let end = start + same.len();
        if !same[0].only_best {
            memory.download(stream, start..end)?;
        }
        start = end;
    }
    Ok(())
}

/// The program of a step for several sequences, bound to everything except scratch memory.
fn program(device: &CudaDevice, memory: &RowMemory, slot: &EngineSlot, network: &Network) -> Result<Program, RunError> {
    let options = LoadOptions {
        graphs: device.options.graphs,
        kernels: device.options.kernels.as_deref(),
        caches: Caches::Tables,
    };
    let mut program = device.program(slot, network, options)?;
    for (name, port) in check_ports(program.name(), &program.ports(), network)? {
        let address = match port.is {
            Is::Between | Is::Port(Role::UpdatedCache(_)) => continue,
            Is::Weight => device.weights.as_ref().and_then(|weights| weights.address(name)),
            Is::Port(role) => memory.address(role, port.bytes()),
        };
        let address = address.ok_or_else(|| nothing_to_bind(program.name(), name))?;
        // SAFETY: weights are in a buffer of the device, each at its own location, which holds its constant; inputs,
        // logits and tables are in memory for the largest program. Both are dropped after the programs. The targets of
        // tables are alive whenever a program runs (`run`), and hold a cache of the capacity in the table.
        unsafe { program.bind([(name, address)])? };
    }
    Ok(program)
}

impl BatchDevice for CudaBatchDevice {
    fn name(&self) -> &str {
        self.device.runtime.gpu()
    }

    fn engine(&self) -> String {
        let version = self.device.runtime.version();
        format!(
            "{} {version}, steps of up to {} sequences",
            FLAVOUR.target,
            self.most_rows()
        )
    }

    fn most_rows(&self) -> usize {
        self.programs.last().map_or(1, |program| program.rows)
    }

    fn largest_chunk(&self) -> usize {
        let tokens = self.device.slots.iter().map(|slot| largest(slot.profile.tokens));
        tokens.max().unwrap_or(1)
    }

    fn prompt_depends_on_capacity(&self) -> bool {
        // Each capacity has its own engines, which may order sums differently.
        true
    }

    fn cache_bytes(&mut self, capacity: usize) -> Result<usize, DeviceError> {
        Ok(KvCache::bytes_of(&self.device.interface, 1, capacity))
    }

    fn open(&mut self, slot: usize, capacity: usize, prefix: Option<(usize, usize)>) -> Result<(), DeviceError> {
        let from = prefix.map(|(from, kept)| (self.caches[from].as_ref().expect("an open slot"), kept));
        let cache = self.allocated(capacity, from)?;
        if self.caches.len() <= slot {
            self.caches.resize_with(slot + 1, || None);
        }
        self.caches[slot] = Some(cache);
        Ok(())
    }

    fn resize(&mut self, slot: usize, capacity: usize, used: usize) -> Result<(), DeviceError> {
        let cache = self.caches[slot].as_ref().expect("an open slot");
        let moved = self.allocated(capacity, Some((cache, used)))?;
        self.caches[slot] = Some(moved);
        Ok(())
    }

    fn close(&mut self, slot: usize) {
        // Every call waits for what it queued.
        self.caches[slot] = None;
    }

    fn prefill(
        &mut self,
        slot: usize,
        tokens: &[u32],
        position: usize,
        end: usize,
        logits: &mut Vec<f32>,
    ) -> Result<(), DeviceError> {
        self.feed(slot, tokens, position, end, logits)
    }

    fn decode(&mut self, rows: &mut [BatchRow<'_>]) -> Vec<Result<(), DeviceError>> {
        if self.programs.is_empty() {
            let steps = rows.iter_mut().map(|row| {
                let (token, end) = ([row.token], row.position + 1);
                self.feed(row.slot, &token, row.position, end, row.output.logits_mut())
            });
            return steps.collect();
        }
        let mut results = Vec::with_capacity(rows.len());
        for rows in rows.chunks_mut(self.most_rows()) {
            let step = self.step(rows);
            // One program computes all rows, and fails for all.
            results.extend(rows.iter().map(|_| match &step {
                Ok(()) => Ok(()),
                Err(error) => Err(error.clone()),
            }));
        }
        results
    }
}
