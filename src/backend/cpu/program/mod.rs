//! A compiled network: its ports, and its execution. [`steps`] is the program as data, [`run`] the work of each
//! thread.

mod batch;
mod experts;
mod run;
mod steps;

use std::sync::{Arc, Mutex};

pub use batch::{Batch, Member};
pub(super) use experts::{ExpertMatrix, ExpertShape, ExpertWork, TopKWork};
use run::Run;
pub(super) use steps::{AttentionStep, Buffer, MatrixView, Memory, Phase, Step, Work};

use super::aligned_bytes::AlignedBytes;
use super::bindings::Bindings;
use super::error::CpuError;
use super::pool::{Pieces, Pool};
use super::simd::Isa;
use crate::interface::Role;
use crate::tensor::DType;

/// A tensor of the program's interface.
#[derive(Clone, Debug, PartialEq)]
pub struct Port {
    /// As in the network.
    pub name: String,
    /// Its role, if the network is a model's.
    pub role: Option<Role>,
    /// As in the network. Float inputs and outputs that are not caches are bound as f32 regardless.
    pub dtype: DType,
    /// Row-major.
    pub shape: Vec<usize>,
}

/// Time of a run, by layer kind or by layer.
#[derive(Clone, Debug, Default)]
pub struct StepTimes {
    /// Layer name, kind of step, nanoseconds on the first thread.
    pub steps: Vec<(String, &'static str, u64)>,
}

/// A network compiled for one static shape. References its weights in place (mapped files stay mapped) and owns an
/// arena for activations; a run allocates nothing.
pub struct Program {
    pub(super) isa: Isa,
    pub(super) pool: Arc<Pool>,
    pub(super) steps: Vec<Step>,
    pub(super) phases: Vec<Phase>,
    pub(super) buffers: Vec<Buffer>,
    pub(super) inputs: Vec<Port>,
    pub(super) outputs: Vec<Port>,
    pub(super) caches: Vec<Port>,
    pub(super) arena: AlignedBytes,
    pub(super) scratch: Vec<AlignedBytes>,
    /// Scratch of each thread that is kept between items.
    pub(super) kept: Vec<AlignedBytes>,
    /// Number of runs so far.
    pub(super) runs: u64,
    /// Pieces of each phase.
    pub(super) pieces: Vec<Pieces>,
}

impl Program {
    /// Inputs to bind, without caches, in the network's order.
    pub fn inputs(&self) -> &[Port] {
        &self.inputs
    }
    /// Outputs to bind, without caches, in the network's order.
    pub fn outputs(&self) -> &[Port] {
        &self.outputs
    }
    /// The cache inputs, in the order of their updates in the network: what [`KvCaches`](super::KvCaches) must contain.
    pub fn caches(&self) -> &[Port] {
        &self.caches
    }
    /// Bytes of the program's activations and scratch.
    pub fn arena_bytes(&self) -> usize {
        let scratch = self.scratch.iter().chain(&self.kept);
        self.arena.len() + scratch.map(AlignedBytes::len).sum::<usize>()
    }
    /// The instruction set for which it is compiled.
    pub fn isa(&self) -> Isa {
        self.isa
    }
    /// Threads that share its work.
    pub fn threads(&self) -> usize {
        self.pool.threads()
    }

    /// Runs the network once. Caches are updated in place; outputs are written to the bound memory.
    ///
    /// Fails before doing anything if a binding is missing, unknown, duplicated or of the wrong type or size. An index
    /// outside its axis (a token id outside the vocabulary, a position outside the rotary tables, a write beyond the
    /// capacity) is reported after the run; the outputs are then meaningless and the caches may hold the tokens'
    /// entries.
    pub fn run(&mut self, bindings: &mut Bindings<'_>) -> Result<(), CpuError> {
        let addresses = self.addresses(bindings, self.arena.address())?;
        self.pieces.iter_mut().for_each(Pieces::reset);
        let failure = Mutex::new(None);
        self.runs += 1;
        let each = |of: &[AlignedBytes]| of.iter().map(AlignedBytes::address).collect();
        let scratch = [each(&self.scratch), each(&self.kept)];
        // SAFETY: the addresses are of this program's own arena and tensors, which nothing else uses while it is borrowed
        // mutably, and of memory that `bindings` borrows until this function returns, with dtypes and sizes compared with
        // the ports; outputs and caches are borrowed mutably and have one port each. There is scratch for every thread.
        let run = unsafe { Run::new(self, self.runs, addresses, scratch, &failure) };
        self.pool.run(|team| run.thread(team));
        match failure.into_inner().unwrap_or_else(|poisoned| poisoned.into_inner()) {
            None => Ok(()),
            Some(error) => Err(error),
        }
    }

    /// Runs the network once, one step after the other, and measures each on the calling thread.
    pub fn profile(&mut self, bindings: &mut Bindings<'_>) -> Result<StepTimes, CpuError> {
        let order: Vec<usize> = self.phases.iter().flat_map(|p| p.steps.iter().copied()).collect();
        let phases = std::mem::take(&mut self.phases);
        let mut profile = StepTimes::default();
        let result = order.into_iter().try_for_each(|step| {
            let serial = phases.iter().any(|p| p.serial && p.steps.contains(&step));
            self.phases = vec![Phase {
                steps: vec![step],
                serial,
            }];
            let start = std::time::Instant::now();
            let result = self.run(bindings);
            let time = start.elapsed().as_nanos() as u64;
            let step = &self.steps[step];
            profile.steps.push((step.layer.clone(), step.work.name(), time));
            result
        });
        self.phases = phases;
        result.map(|()| profile)
    }

    /// The address of each buffer, with activations in that arena.
    fn addresses(&self, bindings: &mut Bindings<'_>, arena: *mut u8) -> Result<Vec<*mut u8>, CpuError> {
        bindings.check(&self.inputs, &self.outputs)?;
        let inputs = self
            .inputs
            .iter()
            .map(|port| bindings.input_address(port))
            .collect::<Result<Vec<_>, _>>()?;
        let outputs = self
            .outputs
            .iter()
            .map(|port| bindings.output_address(port))
            .collect::<Result<Vec<_>, _>>()?;
        let caches = bindings.cache_addresses(&self.caches)?;
        let addresses = self.buffers.iter().map(|buffer| match &buffer.memory {
            Memory::Arena { offset } => arena.wrapping_add(*offset),
            Memory::Tensor(tensor) => tensor.data().as_ptr().cast_mut(),
            Memory::Input(i) => inputs[*i],
            Memory::Output(i) => outputs[*i],
            Memory::Cache(i) => caches[*i],
        });
        Ok(addresses.collect())
    }
}

impl std::fmt::Debug for Program {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let (steps, phases) = (self.steps.len(), self.phases.len());
        write!(
            f,
            "Program({steps} steps in {phases} phases, {:?}, {:?})",
            self.isa, self.pool
        )
    }
}
