//! The executor as a [`Device`]: exact chunk lengths, programs compiled on first use.
//!
//! Input is a package's graph, whose weights stay in their mapped file. A program is compiled for each (tokens,
//! capacity) that is used. Programs share the weights and are small otherwise, so decode programs are kept permanently
//! and prefill programs for the last few lengths.

use super::device::{Chunk, Device, DeviceError};
use super::step::{Fed, NoStepInput, StepInputs};
use crate::backend::cpu::{Bindings, CompileOptions, KvCaches, Port, Program};
use crate::graph::Graph;
use crate::help::Help;
use crate::interface::Role;
use crate::lower;
use crate::network::{Logits, Profile};

/// Longer chunks save little and need more memory for activations.
pub const LARGEST_CHUNK: usize = 512;

/// Maximum logits of one call of [`Device::forward_all`]: 64 MiB.
const MOST_LOGITS: usize = 1 << 24;

/// Prefill programs in the cache. A long prompt needs two, for its full chunks and for the rest.
const KEPT_PREFILLS: usize = 4;

/// See the module's head. The caches are dropped first: dropping a graph reads code, which would add to the peak of memory.
pub struct CpuDevice {
    caches: Option<KvCaches>,
    /// The most recently used is last.
    programs: Vec<(Profile, Program)>,
    graph: Graph,
    lowering: lower::LowerOptions,
    compiling: CompileOptions,
    vocabulary: usize,
    capacity: usize,
    last: Option<Profile>,
    /// Logits of the last call.
    inputs: HostInputs,
    /// Elements of an embedding, if the model takes embeddings.
    width: usize,
}

/// The inputs of one call besides caches, in their own memory.
#[derive(Default)]
pub(super) struct HostInputs {
    values: Vec<(Role, Vec<i32>)>,
    /// For a model that takes embeddings.
    embeddings: Option<Vec<f32>>,
}

impl HostInputs {
    /// Writes the inputs of a program for this chunk.
    pub fn fill(&mut self, ports: &[Port], step: StepInputs<'_>) -> Result<(), NoStepInput> {
        self.values.clear();
        self.embeddings = None;
        for port in ports {
            let role = port.role.ok_or_else(|| NoStepInput(port.name.clone()))?;
            if role == Role::Embeddings {
                self.embeddings = Some(step.embeddings().collect());
                continue;
            }
            let mut values = vec![0; step.len(role)?];
            step.write(role, &mut values)?;
            self.values.push((role, values));
        }
        Ok(())
    }

    pub fn bind<'a>(&'a self, bindings: &mut Bindings<'a>) {
        for (role, values) in &self.values {
            bindings.input(*role, &values[..]);
        }
        if let Some(embeddings) = &self.embeddings {
            bindings.input(Role::Embeddings, &embeddings[..]);
        }
    }
}

impl CpuDevice {
    /// `graph` is canonical. `vocabulary` is the row length of its logits, `threads` defaults to one per core.
    pub fn new(graph: Graph, vocabulary: usize, threads: Option<usize>) -> Self {
        CpuDevice {
            width: graph.embedding_width().unwrap_or(0),
            graph,
            lowering: lower::LowerOptions::default(),
            compiling: threads.map_or_else(CompileOptions::default, CompileOptions::with_threads),
            vocabulary,
            programs: Vec::new(),
            caches: None,
            capacity: 0,
            last: None,
            inputs: HostInputs::default(),
        }
    }

    /// Moves the program for `profile` to the end of the list; compiles it if it is missing.
    fn prepare(&mut self, profile: Profile) -> Result<(), DeviceError> {
        if let Some(at) = self.programs.iter().position(|(p, _)| *p == profile) {
            let program = self.programs.remove(at);
            self.programs.push(program);
            return Ok(());
        }
        let is_prefill = |p: &Profile| p.tokens != Profile::decode(p.capacity).tokens;
        if is_prefill(&profile) && self.programs.iter().filter(|(p, _)| is_prefill(p)).count() >= KEPT_PREFILLS {
            let oldest = self.programs.iter().position(|(p, _)| is_prefill(p));
            self.programs.remove(oldest.expect("there are several"));
        }
        let network = lower::lower(&self.graph, &profile, &self.lowering).map_err(failed)?;
        if self.caches.is_none() {
            self.caches = Some(KvCaches::new(&network).map_err(failed)?);
        }
        let program = self.compiling.compile(network).map_err(failed)?;
        self.programs.push((profile, program));
        Ok(())
    }

    /// One chunk, with the logits of its last token.
    fn forward_fed(
        &mut self,
        chunk: Chunk,
        fed: Fed<'_>,
        position: usize,
        logits: &mut Vec<f32>,
    ) -> Result<(), DeviceError> {
        logits.resize(self.vocabulary, 0.0);
        let profile = Profile::prefill(chunk.rows, self.capacity);
        self.run(profile, chunk, fed, position, logits)
    }

    /// Runs the program for `profile`; `logits` has as many rows as its output.
    fn run(
        &mut self,
        profile: Profile,
        chunk: Chunk,
        fed: Fed<'_>,
        position: usize,
        logits: &mut [f32],
    ) -> Result<(), DeviceError> {
        self.prepare(profile)?;
        self.last = Some(profile);
        let (_, program) = self.programs.last_mut().expect("just prepared");
        // Chunks here are never padded.
        let step = StepInputs {
            fed,
            position,
            end: chunk.end,
            rows: fed.len(),
        };
        self.inputs.fill(program.inputs(), step).map_err(failed)?;
        let mut bindings = Bindings::new();
        self.inputs.bind(&mut bindings);
        bindings
            .output(Role::Logits, logits)
            .caches(self.caches.as_mut().expect("reserved before"));
        program.run(&mut bindings).map_err(failed)
    }
}

impl Device for CpuDevice {
    fn name(&self) -> &str {
        "cpu"
    }

    fn engine(&self) -> String {
        let threads = self.compiling.pool().threads();
        match &self.last {
            Some(profile) => format!("cpu {profile}, {threads} threads"),
            None => format!("cpu, {threads} threads"),
        }
    }

    fn chunk(&self, waiting: usize, position: usize, _capacity: usize) -> Chunk {
        let tokens = waiting.min(LARGEST_CHUNK);
        Chunk {
            tokens,
            rows: tokens,
            end: position + waiting,
        }
    }

    fn reserve(&mut self, capacity: usize, used: usize) -> Result<(), DeviceError> {
        match &mut self.caches {
            Some(caches) => caches.grow(capacity, used),
            // The first program makes caches of its capacity.
            None => self.prepare(Profile::decode(capacity))?,
        }
        self.capacity = capacity;
        Ok(())
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
        let fed = Fed::Rows {
            values: rows,
            width: self.width,
        };
        self.forward_fed(chunk, fed, position, logits)
    }

    fn chunk_all(&self, waiting: usize, position: usize, capacity: usize) -> Chunk {
        let most = (MOST_LOGITS / self.vocabulary.max(1)).max(1);
        Chunk {
            end: position + waiting,
            ..self.chunk(waiting.min(most), position, capacity)
        }
    }

    fn forward_all(
        &mut self,
        chunk: Chunk,
        tokens: &[u32],
        position: usize,
        logits: &mut Vec<f32>,
    ) -> Result<(), DeviceError> {
        let profile = Profile {
            logits: Logits::All,
            ..Profile::prefill(chunk.rows, self.capacity)
        };
        let before = logits.len();
        logits.resize(before + chunk.rows * self.vocabulary, 0.0);
        self.run(profile, chunk, Fed::Ids(tokens), position, &mut logits[before..])
    }
}

/// An error of the executor or of a lowering.
pub(super) fn failed(error: impl Help) -> DeviceError {
    DeviceError {
        device: "cpu".into(),
        message: error.to_string(),
        help: error.help(),
    }
}
