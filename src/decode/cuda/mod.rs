//! TensorRT engines as a [`Device`]: fixed chunk lengths, one engine for each (tokens, capacity) of the package.
//!
//! Needs a package with engines and a TensorRT library. All engines share one copy of the bound weights in device
//! memory, one scratch buffer (only the running engine uses it), and the small inputs. The cache moves to a larger
//! capacity by one copy on the device. Logits come back through pinned memory; if only the best token is needed, it is
//! found on the device. Engines are loaded when first needed, or ahead by [`CudaDevice::prepare`].

use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::time::{Duration, Instant};

use crate::backend::tensorrt::run::{Argmax, Buffer, Pinned, Program, RunError, Runtime, Stream, timing};
use crate::backend::tensorrt::{FLAVOUR, Library};
use crate::decode::device::{Chunk, Device, DeviceError};
use crate::decode::instruments::Instruments;
use crate::decode::step::{Fed, StepInputs};
use crate::graph::Graph;
use crate::interface::{Interface, Role, Signature};
use crate::network::{Profile, Tokens};
use crate::package::manifest;
use crate::package::{ENGINES, KERNELS, Package};

mod batch;
mod chunks;
mod error;
mod input_buffers;
mod instruments;
mod kv_cache;
mod load;
mod prepare;
mod scratch;
mod swap;
mod weights;

pub use batch::CudaBatchDevice;
use chunks::{choose, covers, largest};
pub use error::OpenError;
use error::device_error;
use input_buffers::{Embedded, InputBuffers};
use kv_cache::KvCache;
use swap::Identity;
pub use swap::{SwapError, Swapped};
use weights::Weights;

/// The alignment that TensorRT requires and that makes copies fast.
const ALIGNMENT: usize = 256;

fn aligned(bytes: usize) -> usize {
    bytes.next_multiple_of(ALIGNMENT)
}

/// One engine of the package, loaded or not.
struct EngineSlot {
    profile: Profile,
    /// Its entry in the manifest.
    entry: manifest::EngineEntry,
    loaded: Option<Loaded>,
}

struct Loaded {
    program: Program,
    /// Address of the cache that it is bound to; 0 for none.
    cache: u64,
    /// Tokens that a dynamic engine is set to.
    tokens: usize,
}

/// Times by task, for `doctor` and benchmarks.
#[derive(Clone, Copy, Debug, Default)]
pub struct Times {
    /// Engines: reading, deserialising, refitting, compiling.
    pub engines: Duration,
    /// Weights to the device.
    pub weights: Duration,
    /// Calls of `forward`.
    pub calls: usize,
    /// In `forward` but not waiting for the GPU.
    pub host: Duration,
}

/// Device memory by purpose, in bytes: the maximum so far.
#[derive(Clone, Copy, Debug, Default, serde::Serialize)]
pub struct MemoryUse {
    /// Bound weights.
    pub weights: u64,
    /// Both caches of a move.
    pub cache: u64,
    /// Working memory of engines.
    pub scratch: u64,
    /// In use before the session allocated any: the CUDA context, and other processes.
    pub context: u64,
    /// Allocated since then, including TensorRT's own memory.
    pub total: u64,
}

/// How a package runs on the GPU.
#[derive(Clone, Debug)]
pub struct CudaOptions {
    /// The cache folder of kernels that TensorRT compiles at first load; see [`kernels_folder`].
    pub kernels: Option<PathBuf>,
    /// Launch engines of static shapes as CUDA graphs. Off only for measurements.
    pub graphs: bool,
}

impl CudaOptions {
    /// The default.
    pub fn of(package: &Package) -> Self {
        CudaOptions {
            kernels: kernels_folder(package),
            graphs: true,
        }
    }
}

/// See the module's head. Fields are dropped in the order of their declaration: engines before the memory that they are
/// bound to.
pub struct CudaDevice {
    slots: Vec<EngineSlot>,
    graph: Graph,
    /// Inputs and outputs of every engine, without weights.
    interface: Signature,
    /// The source of the current weights.
    identity: Identity,
    folder: PathBuf,
    options: CudaOptions,
    /// Whether engines for several tokens are launched as CUDA graphs too: if the cache is the same in every run.
    captures_prompts: bool,
    weights: Option<Weights>,
    cache: Option<KvCache>,
    scratch: Option<Buffer>,
    inputs: InputBuffers,
    logits: Buffer,
    pinned_logits: Pinned,
    argmax: Argmax,
    stream: Stream,
    runtime: Rc<Runtime>,
    capacities: Vec<usize>,
    vocabulary: usize,
    capacity: usize,
    last: Option<Profile>,
    times: Times,
    /// Free and total memory of the GPU when only the context existed.
    at_start: (u64, u64),
    /// Bytes of the cache; of both during a move.
    most_cache: usize,
}

impl CudaDevice {
    /// A session's device for the engines of a package. Loads nothing yet. Errors: the package has no engines for this
    /// build's target, or engines for other weights; the GPU or driver does not support the library.
    pub fn open(package: &Package, library: &Library, options: CudaOptions) -> Result<Self, OpenError> {
        // Engines for several sequences are for batches.
        let engines = package.manifest.engines.iter();
        let engines = engines.filter(|e| e.target == FLAVOUR.target && e.profile.batch == 1);
        let slots: Vec<EngineSlot> = engines
            .map(|entry| EngineSlot {
                profile: entry.profile,
                entry: entry.clone(),
                loaded: None,
            })
            .collect();
        if slots.is_empty() {
            return Err(OpenError::NoEngines {
                package: package.folder.clone(),
            });
        }
        if let Some(slot) = slots
            .iter()
            .find(|s| !s.entry.takes(&package.manifest.weights.set_hash))
        {
            return Err(OpenError::OtherWeights {
                package: package.folder.clone(),
                profile: slot.profile,
            });
        }
        let runtime = Runtime::new(library)?;
        let graph = package.graph()?;
        let interface = graph.interface.as_ref().map(Interface::signature);
        let vocabulary = package.vocabulary()?;
        let cuda = runtime.cuda();
        let at_start = cuda.memory()?;
        let rows = slots.iter().map(|slot| largest(slot.profile.tokens)).max().unwrap_or(1);
        let stream = Stream::new(cuda)?;
        let embeddings = graph.interface.as_ref().and_then(|i| i.input(Role::Embeddings));
        let dtype = embeddings.and_then(|id| graph.value(id).dtype);
        let embedded = graph
            .embedding_width()
            .zip(dtype)
            .map(|(width, dtype)| Embedded { width, dtype });
        Ok(CudaDevice {
            graph,
            interface: interface.expect("a package gives its graph the interface"),
            identity: Identity::of(&package.manifest),
            folder: package.folder.clone(),
            options,
            captures_prompts: true,
            weights: None,
            cache: None,
            scratch: None,
            inputs: InputBuffers::new(cuda, rows, embedded)?,
            logits: Buffer::new(cuda, vocabulary * size_of::<f32>(), "one row of logits")?,
            pinned_logits: Pinned::new(cuda, vocabulary * size_of::<f32>())?,
            argmax: Argmax::new(cuda, &stream, 1)?,
            stream,
            capacities: package.manifest.capacities.clone(),
            vocabulary,
            capacity: 0,
            last: None,
            times: Times::default(),
            at_start,
            most_cache: 0,
            slots,
            runtime,
        })
    }

    /// Times so far.
    pub fn times(&self) -> Times {
        self.times
    }

    /// Device memory used so far.
    pub fn memory(&self) -> MemoryUse {
        let bytes = |buffer: Option<usize>| buffer.unwrap_or(0) as u64;
        let cuda = self.runtime.cuda();
        let (free_at_start, all) = self.at_start;
        let free = cuda.memory().map_or(free_at_start, |(free, _)| free);
        // Memory outside of buffers is TensorRT's, which frees none while engines are loaded.
        let (now, most) = cuda.buffers();
        MemoryUse {
            weights: bytes(self.weights.as_ref().map(Weights::bytes)),
            cache: self.most_cache as u64,
            scratch: bytes(self.scratch.as_ref().map(Buffer::bytes)),
            context: all - free_at_start,
            total: free_at_start.saturating_sub(free) + (most - now),
        }
    }

    /// The slot of the engine that ran last. There is none before the first run and after that engine was unloaded.
    fn last_slot(&self) -> Result<usize, DeviceError> {
        let ran = |slot: &EngineSlot| slot.loaded.is_some() && Some(slot.profile) == self.last;
        let found = self.slots.iter().position(ran);
        found.ok_or_else(|| DeviceError {
            device: self.runtime.gpu().to_string(),
            message: "no engine is loaded that has run".to_string(),
            help: Some("feed a token first".to_string()),
        })
    }

    /// GPU time of the engine that ran last: the mean of `times` more runs with the same inputs and nothing in between.
    pub fn time_again(&mut self, times: usize) -> Result<Duration, DeviceError> {
        let at = self.last_slot()?;
        let program = &mut self.slots[at].loaded.as_mut().expect("found loaded").program;
        let timed = timing::time(program, &self.stream, times as u32);
        timed.map_err(|error| device_error(self.runtime.gpu(), error))
    }

    fn failed(&self, error: RunError) -> DeviceError {
        device_error(self.runtime.gpu(), error)
    }

    /// The slot that runs `rows` rows at `capacity`.
    fn slot(&self, rows: usize, capacity: usize) -> Option<usize> {
        let matches = |slot: &&EngineSlot| slot.profile.capacity == capacity && covers(slot.profile.tokens, rows);
        let exact = |slot: &&EngineSlot| matches(slot) && matches!(slot.profile.tokens, Tokens::Static(_));
        // An engine for exactly this many is faster than one for any number.
        let found = self
            .slots
            .iter()
            .find(exact)
            .or_else(|| self.slots.iter().find(matches))?;
        self.slots.iter().position(|slot| slot.profile == found.profile)
    }

    /// Loads the engine for `rows` rows at `capacity`, if not loaded yet, and returns its slot.
    fn ready(&mut self, rows: usize, capacity: usize) -> Result<usize, DeviceError> {
        let at = self.slot(rows, capacity).ok_or_else(|| DeviceError {
            device: self.runtime.gpu().to_string(),
            message: format!("the package has no engine for {rows} tokens at capacity {capacity}"),
            help: Some("convert the model again".to_string()),
        })?;
        if self.slots[at].loaded.is_none() {
            let start = Instant::now();
            let loaded = self.load(at)?;
            self.slots[at].loaded = Some(loaded);
            self.times.engines += start.elapsed();
        }
        Ok(at)
    }

    fn run(&mut self, at: usize, rows: usize) -> Result<(), RunError> {
        let loaded = self.slots[at].loaded.as_mut().expect("made ready before");
        if loaded.tokens != rows {
            loaded.program.set_tokens(rows)?;
            loaded.tokens = rows;
            // The size for the maximum number of tokens; fewer could still need more.
            let bytes = loaded.program.scratch_bytes();
            self.provide_scratch(bytes)?;
        }
        let cache = self.cache.as_ref().expect("reserved before");
        let loaded = self.slots[at].loaded.as_mut().expect("made ready before");
        if loaded.cache != cache.address() {
            // SAFETY: the cache holds every one of its ports, and updates lie where their inputs do. Only `reserve`
            // replaces it, after all work is done, and the new one is bound here before the engine runs again.
            unsafe { loaded.program.bind(cache.ports())? };
            loaded.cache = cache.address();
        }
        self.inputs.upload(&self.stream)?;
        loaded.program.enqueue(&self.stream)
    }

    /// Queues a chunk: its inputs and its engine.
    fn start(&mut self, chunk: Chunk, fed: Fed<'_>, position: usize) -> Result<(), DeviceError> {
        let at = self.ready(chunk.rows, self.capacity)?;
        let written = self.inputs.write(&StepInputs {
            fed,
            position,
            end: chunk.end,
            rows: chunk.rows,
        });
        written.map_err(|error| self.failed(error))?;
        self.last = Some(self.slots[at].profile);
        self.run(at, chunk.rows).map_err(|error| self.failed(error))
    }

    /// One chunk, with the logits of its last token.
    fn forward_fed(
        &mut self,
        chunk: Chunk,
        fed: Fed<'_>,
        position: usize,
        logits: &mut Vec<f32>,
    ) -> Result<(), DeviceError> {
        let start = Instant::now();
        let queued = self.start(chunk, fed, position);
        let queued = queued.and_then(|()| self.download());
        self.settled(queued)?;
        self.wait(start)?;
        self.downloaded(logits)
    }

    /// Work queued before an error still reads the inputs, which the next call writes.
    fn settled<T>(&self, result: Result<T, DeviceError>) -> Result<T, DeviceError> {
        if result.is_err() {
            // The first error is reported.
            let _ = self.stream.wait();
        }
        result
    }

    /// Waits for what is queued; `start` is when the call began.
    fn wait(&mut self, start: Instant) -> Result<(), DeviceError> {
        let queued = start.elapsed();
        self.stream.wait().map_err(|error| self.failed(error))?;
        self.times.calls += 1;
        self.times.host += queued;
        Ok(())
    }

    fn download(&mut self) -> Result<(), DeviceError> {
        let bytes = self.vocabulary * size_of::<f32>();
        let queued = self.stream.download(&self.logits, 0..bytes, &mut self.pinned_logits, 0);
        queued.map_err(|error| self.failed(error))
    }

    fn downloaded(&mut self, logits: &mut Vec<f32>) -> Result<(), DeviceError> {
        let start = Instant::now();
        logits.clear();
        let row = self.pinned_logits.slice::<f32>(0, self.vocabulary);
        logits.extend_from_slice(row.map_err(|error| self.failed(error))?);
        self.times.host += start.elapsed();
        Ok(())
    }
}

impl Device for CudaDevice {
    fn name(&self) -> &str {
        self.runtime.gpu()
    }

    fn engine(&self) -> String {
        match &self.last {
            Some(profile) => format!("{} {} {profile}", FLAVOUR.target, self.runtime.version()),
            None => format!("{} {}", FLAVOUR.target, self.runtime.version()),
        }
    }

    fn chunk(&self, waiting: usize, position: usize, capacity: usize) -> Chunk {
        let here = self.slots.iter().filter(|slot| slot.profile.capacity == capacity);
        let (tokens, rows) = choose(here.map(|slot| slot.profile.tokens), waiting, capacity - position);
        let end = position + waiting;
        Chunk { tokens, rows, end }
    }

    fn reserve(&mut self, capacity: usize, used: usize) -> Result<(), DeviceError> {
        let known = self.slot(1, capacity).is_some_and(|at| self.slots[at].loaded.is_some());
        let at = self.ready(1, capacity)?;
        if used == 0 && self.cache.is_some() && self.capacity == capacity {
            return Ok(());
        }
        if used == 0 && self.cache.is_some() {
            // No contents to keep: two caches at once could need more memory than is free.
            self.stream.wait().map_err(|error| self.failed(error))?;
            (self.cache, self.capacity) = (None, 0);
        }
        let batch = self.slots[at].profile.batch;
        let cuda = self.runtime.cuda();
        let moved = match &self.cache {
            None => KvCache::new(cuda, &self.stream, &self.interface, batch, capacity),
            Some(cache) => cache.grown(cuda, &self.stream, capacity, used),
        };
        let moved = moved.and_then(|cache| {
            self.stream.wait()?;
            Ok(cache)
        });
        let error = match moved {
            Ok(cache) => {
                let left = self.cache.as_ref().map_or(0, KvCache::bytes);
                self.most_cache = self.most_cache.max(left + cache.bytes());
                self.cache = Some(cache);
                self.capacity = capacity;
                return Ok(());
            }
            Err(error) => error,
        };
        if !known {
            // Unusable without its cache.
            self.slots[at].loaded = None;
            self.trim_scratch().map_err(|error| self.failed(error))?;
        }
        Err(self.failed(match error {
            RunError::Memory { needed, free, .. } => RunError::Memory {
                what: format!("a cache of {capacity} tokens"),
                needed,
                free,
                // The current one alone fits.
                fits: kv_cache::fitting(&self.capacities, capacity, needed, free)
                    .max(self.cache.as_ref().map(|_| self.capacity)),
            },
            other => other,
        }))
    }

    fn forward(
        &mut self,
        chunk: Chunk,
        tokens: &[u32],
        position: usize,
        logits: &mut Vec<f32>,
    ) -> Result<(), DeviceError> {
        self.forward_fed(chunk, Fed::Ids(tokens), position, logits)
    }

    fn forward_rows(
        &mut self,
        chunk: Chunk,
        rows: &[f32],
        position: usize,
        logits: &mut Vec<f32>,
    ) -> Result<(), DeviceError> {
        let width = self.graph.embedding_width().unwrap_or(1);
        self.forward_fed(chunk, Fed::Rows { values: rows, width }, position, logits)
    }

    fn forward_best(
        &mut self,
        chunk: Chunk,
        tokens: &[u32],
        position: usize,
        logits: &mut Vec<f32>,
    ) -> Result<Option<u32>, DeviceError> {
        let start = Instant::now();
        let queued = self.start(chunk, Fed::Ids(tokens), position).and_then(|()| {
            let queued = self.argmax.enqueue(&self.stream, &self.logits, 1, self.vocabulary);
            queued.map_err(|error| self.failed(error))
        });
        self.settled(queued)?;
        self.wait(start)?;
        logits.clear();
        let best = self.argmax.result(0).map_err(|error| self.failed(error))?;
        if best.is_none() {
            self.download()?;
            self.stream.wait().map_err(|error| self.failed(error))?;
            self.downloaded(logits)?;
        }
        Ok(best)
    }

    fn instruments(&mut self) -> Option<&mut dyn Instruments> {
        Some(self)
    }
}

impl Drop for CudaDevice {
    fn drop(&mut self) {
        // Kernels compiled while running are stored for the next process too.
        for loaded in self.slots.iter_mut().filter_map(|slot| slot.loaded.as_mut()) {
            loaded.program.keep_kernels();
        }
    }
}

/// The cache folder of compiled kernels: `LAPIDARY_CACHE`, else the package's own folder if it is writable, else the
/// user's cache folder.
pub fn kernels_folder(package: &Package) -> Option<PathBuf> {
    if let Some(folder) = std::env::var_os("LAPIDARY_CACHE") {
        return (!folder.is_empty()).then(|| PathBuf::from(folder).join(KERNELS));
    }
    let engines = package.folder.join(ENGINES);
    let inside = engines.join(KERNELS);
    // It is created when there is something to store.
    if can_write(if inside.is_dir() { &inside } else { &engines }) {
        return Some(inside);
    }
    let home = std::env::var_os("XDG_CACHE_HOME").map(PathBuf::from);
    let home = home.or_else(|| Some(PathBuf::from(std::env::var_os("HOME")?).join(".cache")));
    Some(home?.join("lapidary").join(KERNELS))
}

/// On a read-only disk the folder may already exist.
fn can_write(folder: &Path) -> bool {
    #[cfg(unix)]
    return rustix::fs::access(folder, rustix::fs::Access::WRITE_OK).is_ok();
    #[cfg(not(unix))]
    return std::fs::metadata(folder).is_ok_and(|facts| !facts.permissions().readonly());
}
