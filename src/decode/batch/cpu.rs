//! The executor as a [`BatchDevice`]: prompts one at a time, decode steps of all sequences in one pass over the weights
//! ([`Batch`]).

use super::device::{BatchDevice, BatchRow};
use crate::backend::cpu::{Batch, Bindings, CompileOptions, KvCaches, Member, Program};
use crate::decode::cpu::{HostInputs, LARGEST_CHUNK, failed};
use crate::decode::step::{Fed, StepInputs};
use crate::decode::{DeviceError, Embeddings};
use crate::graph::Graph;
use crate::interface::Role;
use crate::lower;
use crate::network::{Network, Profile};

/// Prefill programs in the cache: for the full chunk and for some lengths of last chunks, each at some capacities.
const KEPT_PREFILLS: usize = 12;

/// Maximum of sequences in one pass: beyond it, products take longer than reading their weights.
const MOST_ROWS: usize = 16;

/// See the module's head.
pub struct CpuBatchDevice {
    graph: Graph,
    lowering: lower::LowerOptions,
    /// For programs of prompts.
    compiling: CompileOptions,
    vocabulary: usize,
    embeddings: Option<Embeddings>,
    /// The most recently used is last.
    prefills: Vec<(Profile, Program)>,
    /// For each capacity so far.
    decodes: Vec<(usize, Program)>,
    /// The same for steps of one sequence, as in a session: threads split the work that is otherwise split by
    /// sequences.
    lone_decodes: Vec<(usize, Program)>,
    batch: Batch,
    /// Without slots; others are copies of it.
    empty: Option<KvCaches>,
    caches: Vec<Option<KvCaches>>,
    /// Logits of the last call's rows.
    inputs: Vec<HostInputs>,
    rows: Vec<f32>,
}

impl CpuBatchDevice {
    /// `graph` is canonical. `vocabulary` is the row length of its logits, `threads` defaults to one per core. A model
    /// that takes embeddings has a table of them.
    pub fn new(graph: Graph, vocabulary: usize, threads: Option<usize>, embeddings: Option<Embeddings>) -> Self {
        let compiling = threads.map_or_else(CompileOptions::default, CompileOptions::with_threads);
        CpuBatchDevice {
            batch: Batch::new(compiling.pool().clone()),
            graph,
            lowering: lower::LowerOptions::default(),
            compiling,
            vocabulary,
            embeddings,
            prefills: Vec::new(),
            decodes: Vec::new(),
            lone_decodes: Vec::new(),
            empty: None,
            caches: Vec::new(),
            inputs: Vec::new(),
            rows: Vec::new(),
        }
    }

    fn network(&self, profile: Profile) -> Result<Network, DeviceError> {
        lower::lower(&self.graph, &profile, &self.lowering).map_err(failed)
    }

    /// Compiles the decode program of a capacity if it is missing.
    fn prepare_decode(&mut self, capacity: usize) -> Result<(), DeviceError> {
        if self.decodes.iter().any(|(c, _)| *c == capacity) {
            return Ok(());
        }
        let network = self.network(Profile::decode(capacity))?;
        if self.empty.is_none() {
            self.empty = Some(KvCaches::new(&network).map_err(failed)?.copy(0, 0));
        }
        let program = self.compiling.clone().in_batches().compile(network).map_err(failed)?;
        self.decodes.push((capacity, program));
        Ok(())
    }

    /// Moves the program for `profile` to the end of the list; compiles it if it is missing.
    fn prepare_prefill(&mut self, profile: Profile) -> Result<(), DeviceError> {
        let entry = match self.prefills.iter().position(|(p, _)| *p == profile) {
            Some(at) => self.prefills.remove(at),
            None => {
                if self.prefills.len() >= KEPT_PREFILLS {
                    self.prefills.remove(0);
                }
                let network = self.network(profile)?;
                (profile, self.compiling.compile(network).map_err(failed)?)
            }
        };
        self.prefills.push(entry);
        Ok(())
    }

    /// A step of one sequence.
    fn decode_one(&mut self, row: &mut BatchRow<'_>) -> Result<(), DeviceError> {
        let capacity = self.caches(row.slot).capacity();
        let at = match self.lone_decodes.iter().position(|(c, _)| *c == capacity) {
            Some(at) => at,
            None => {
                let network = self.network(Profile::decode(capacity))?;
                let program = Program::compile(&network, &self.compiling).map_err(failed)?;
                self.lone_decodes.push((capacity, program));
                self.lone_decodes.len() - 1
            }
        };
        let step = StepInputs {
            fed: fed(
                self.embeddings.as_ref(),
                std::slice::from_ref(&row.token),
                &mut self.rows,
            ),
            position: row.position,
            end: row.position + 1,
            rows: 1,
        };
        let caches = self.caches[row.slot].as_mut().expect("an open slot");
        let logits = row.output.logits_mut();
        logits.resize(self.vocabulary, 0.0);
        run(&mut self.lone_decodes[at].1, step, caches, logits)
    }

    fn caches(&self, slot: usize) -> &KvCaches {
        self.caches[slot].as_ref().expect("an open slot")
    }
}

impl BatchDevice for CpuBatchDevice {
    fn name(&self) -> &str {
        "cpu"
    }

    fn engine(&self) -> String {
        format!("cpu, {} threads", self.compiling.pool().threads())
    }

    fn most_rows(&self) -> usize {
        MOST_ROWS
    }

    fn largest_chunk(&self) -> usize {
        LARGEST_CHUNK
    }

    fn cache_bytes(&mut self, capacity: usize) -> Result<usize, DeviceError> {
        self.prepare_decode(capacity)?;
        let empty = self.empty.as_ref().expect("made with the first program");
        Ok(empty.slot_bytes() * capacity)
    }

    fn open(&mut self, slot: usize, capacity: usize, prefix: Option<(usize, usize)>) -> Result<(), DeviceError> {
        self.prepare_decode(capacity)?;
        let caches = match prefix {
            Some((from, used)) => self.caches(from).copy(capacity, used),
            None => self
                .empty
                .as_ref()
                .expect("made with the first program")
                .copy(capacity, 0),
        };
        if self.caches.len() <= slot {
            self.caches.resize_with(slot + 1, || None);
        }
        self.caches[slot] = Some(caches);
        Ok(())
    }

    fn resize(&mut self, slot: usize, capacity: usize, used: usize) -> Result<(), DeviceError> {
        self.prepare_decode(capacity)?;
        let caches = self.caches[slot].as_mut().expect("an open slot");
        caches.grow(capacity, used);
        Ok(())
    }

    fn close(&mut self, slot: usize) {
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
        let profile = Profile::prefill(tokens.len(), self.caches(slot).capacity());
        self.prepare_prefill(profile)?;
        let (_, program) = self.prefills.last_mut().expect("just prepared");
        let step = StepInputs {
            fed: fed(self.embeddings.as_ref(), tokens, &mut self.rows),
            position,
            end,
            rows: tokens.len(),
        };
        let caches = self.caches[slot].as_mut().expect("an open slot");
        logits.resize(self.vocabulary, 0.0);
        run(program, step, caches, logits)
    }

    fn decode(&mut self, rows: &mut [BatchRow<'_>]) -> Vec<Result<(), DeviceError>> {
        if let [row] = rows {
            return vec![self.decode_one(row)];
        }
        let mut results: Vec<Result<(), DeviceError>> = Vec::with_capacity(rows.len());
        self.inputs.resize_with(rows.len(), HostInputs::default);
        for (row, inputs) in rows.iter().zip(&mut self.inputs) {
            let capacity = self.caches[row.slot].as_ref().expect("an open slot").capacity();
            let program = program(&self.decodes, capacity);
            let step = StepInputs {
                fed: fed(
                    self.embeddings.as_ref(),
                    std::slice::from_ref(&row.token),
                    &mut self.rows,
                ),
                position: row.position,
                end: row.position + 1,
                rows: 1,
            };
            results.push(inputs.fill(program.inputs(), step).map_err(failed));
        }
        // Taken out, so that each row has its own.
        let mut caches: Vec<KvCaches> = rows
            .iter()
            .map(|row| self.caches[row.slot].take().expect("an open slot of one row"))
            .collect();
        let mut members: Vec<Member<'_, '_>> = Vec::with_capacity(rows.len());
        let mut of_row = Vec::with_capacity(rows.len());
        for (i, (row, caches)) in rows.iter_mut().zip(&mut caches).enumerate() {
            if results[i].is_err() {
                continue;
            }
            let logits = row.output.logits_mut();
            logits.resize(self.vocabulary, 0.0);
            let program = program(&self.decodes, caches.capacity());
            let mut bindings = Bindings::new();
            self.inputs[i].bind(&mut bindings);
            bindings.output(Role::Logits, &mut logits[..]).caches(caches);
            members.push(Member { program, bindings });
            of_row.push(i);
        }
        for (i, result) in of_row.into_iter().zip(self.batch.run(&mut members)) {
            results[i] = result.map_err(failed);
        }
        drop(members);
        for (row, caches) in rows.iter().zip(caches) {
            self.caches[row.slot] = Some(caches);
        }
        results
    }
}

/// Runs a single sequence.
fn run(
    program: &mut Program,
    step: StepInputs<'_>,
    caches: &mut KvCaches,
    logits: &mut [f32],
) -> Result<(), DeviceError> {
    let mut inputs = HostInputs::default();
    inputs.fill(program.inputs(), step).map_err(failed)?;
    let mut bindings = Bindings::new();
    inputs.bind(&mut bindings);
    bindings.output(Role::Logits, logits).caches(caches);
    program.run(&mut bindings).map_err(failed)
}

/// The decode program of a capacity, compiled when a cache with this capacity was made.
fn program(decodes: &[(usize, Program)], capacity: usize) -> &Program {
    let found = decodes.iter().find(|(c, _)| *c == capacity);
    &found.expect("prepared when the slot got this capacity").1
}

/// Tokens in the form of the model's input; `rows` is memory for their embeddings.
fn fed<'t>(embeddings: Option<&Embeddings>, tokens: &'t [u32], rows: &'t mut Vec<f32>) -> Fed<'t> {
    match embeddings {
        None => Fed::Ids(tokens),
        Some(embeddings) => {
            embeddings.rows(tokens, rows);
            Fed::Rows {
                values: rows,
                width: embeddings.width(),
            }
        }
    }
}
