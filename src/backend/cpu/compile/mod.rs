//! From a static network to a [`Program`].
//!
//! Layers are visited in order. Transposes, slices, broadcasts and most reshapes become views of the buffers they read;
//! elementwise layers, casts and reductions over the last axis wait until their result is needed and are then emitted
//! together as one row program (`fusion`); everything else becomes steps immediately. At the end, steps are grouped
//! into phases and activations are placed in one arena (`schedule`). The kernels use raw pointers and trust shapes, so
//! every network is verified first.

mod experts;
mod fusion;
mod layers;
mod products;
mod quantized;
mod row_builder;
mod schedule;

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use super::aligned_bytes::AlignedBytes;
use super::error::CpuError;
use super::kernels::rows::Class;
use super::mapped_pages;
use super::pool::Pool;
use super::program::{Buffer, Memory, Port, Program, Step, Work};
use super::quantized::QuantizedWeights;
use super::simd::Isa;
use super::strided_view::{BufferId, View};
use crate::graph::Constant;
use crate::network::{LayerKind, Network, TensorId, verify};
use crate::tensor::{DType, Tensor};

/// Minimum number of steps of a program for which [`CompileOptions::compile`] releases memory: smaller ones take little.
const WORTH_RELEASING: usize = 128;

/// Number of programs after which [`CompileOptions::compile`] releases memory: the first prompt's and that for one token. Later ones
/// are compiled between tokens, where the time would be noticed.
const FIRST_PROGRAMS: usize = 2;

/// What a program runs on: its threads and its instruction set. Only instruction sets of this machine are accepted, so
/// every program compiled with these options can run here.
#[derive(Clone, Debug)]
pub struct CompileOptions {
    pool: Arc<Pool>,
    isa: Isa,
    /// Quantized weights in the kernels' form, shared by programs compiled with clones of these options.
    weights: Arc<QuantizedWeights>,
    /// Number of programs after which memory was released.
    settled: Arc<AtomicUsize>,
    in_batches: bool,
}

impl Default for CompileOptions {
    /// One thread per core, and the best instruction set of this machine.
    fn default() -> Self {
        CompileOptions::on(Pool::global())
    }
}

impl CompileOptions {
    /// The threads of this pool, and the best instruction set of this machine. Programs of one session share a pool.
    pub fn on(pool: Arc<Pool>) -> Self {
        CompileOptions {
            pool,
            isa: Isa::detect(),
            weights: Arc::default(),
            settled: Arc::default(),
            in_batches: false,
        }
    }

    /// A new pool of `threads` threads, including the calling one, and the best instruction set of this machine.
    pub fn with_threads(threads: usize) -> Self {
        CompileOptions::on(Arc::new(Pool::new(threads)))
    }

    /// The same with another instruction set; [`CpuError::Isa`] if this machine does not have it.
    pub fn with_isa(self, isa: Isa) -> Result<Self, CpuError> {
        match isa.is_available() {
            true => Ok(CompileOptions { isa, ..self }),
            false => Err(CpuError::Isa { isa }),
        }
    }

    /// The same for programs that run in a [`Batch`](super::Batch).
    pub fn in_batches(self) -> Self {
        CompileOptions {
            in_batches: true,
            ..self
        }
    }

    /// Compiles a network that nothing else needs. After the first programs of clones of these options, releases memory that only
    /// reading and compiling a model needs: pages of this executable's code, and free heap.
    pub fn compile(&self, network: Network) -> Result<Program, CpuError> {
        let program = Program::compile(&network, self)?;
        drop(network);
        if program.steps.len() >= WORTH_RELEASING && self.settled.fetch_add(1, Ordering::Relaxed) < FIRST_PROGRAMS {
            mapped_pages::release_code();
            mapped_pages::release_heap();
        }
        Ok(program)
    }

    /// The threads.
    pub fn pool(&self) -> &Arc<Pool> {
        &self.pool
    }

    /// The instruction set.
    pub fn isa(&self) -> Isa {
        self.isa
    }
}

impl Program {
    /// Compiles a network of static shapes (see [`bind_tokens`](super::bind_tokens) for the others). Weights are not
    /// copied; compiling takes a few milliseconds.
    pub fn compile(network: &Network, options: &CompileOptions) -> Result<Program, CpuError> {
        if network.has_kernel_layers() {
            verify(network)?;
            return Program::compile(&network.expanded()?, options);
        }
        let mut compiler = Compiler::new(network, options)?;
        for i in 0..network.layers.len() {
            if compiler.live[i] && !compiler.is_lazy(i) {
                compiler.emit(i)?;
            }
        }
        compiler.finish_outputs()?;
        options.weights.settle();
        let Compiler {
            steps,
            mut buffers,
            inputs,
            outputs,
            caches,
            ..
        } = compiler;
        let schedule = schedule::schedule(&steps, &mut buffers, options.pool.threads(), options.in_batches);
        let schedule = schedule.ok_or(CpuError::TooLarge)?;
        let scratch = |bytes: fn(&Work, Isa) -> usize| -> Vec<AlignedBytes> {
            let most = steps.iter().map(|s| bytes(&s.work, options.isa)).max().unwrap_or(0);
            let threads = 0..options.pool.threads();
            threads.map(|_| AlignedBytes::zeroed(most)).collect()
        };
        Ok(Program {
            isa: options.isa,
            pool: options.pool.clone(),
            pieces: schedule.phases.iter().map(|_| Default::default()).collect(),
            phases: schedule.phases,
            scratch: scratch(Work::scratch_bytes),
            kept: scratch(Work::kept_bytes),
            steps,
            buffers,
            inputs,
            outputs,
            caches,
            arena: AlignedBytes::zeroed(schedule.arena_bytes),
            runs: 0,
        })
    }
}

pub(super) struct Compiler<'n> {
    network: &'n Network,
    isa: Isa,
    weights: &'n QuantizedWeights,
    shapes: Vec<Vec<usize>>,
    /// The layer that computes a tensor.
    producer: Vec<Option<usize>>,
    /// The live layers that read a tensor.
    consumers: Vec<Vec<usize>>,
    /// Whether a layer contributes to an output or a cache.
    live: Vec<bool>,
    /// The location of a computed tensor.
    views: Vec<Option<View>>,
    /// Quantized weights, and movements of their codes: no memory until a layer other than a product or a gather reads
    /// them.
    quantized: HashMap<TensorId, Constant>,
    /// Index in [`Program::outputs`] of a network output.
    output_of: HashMap<TensorId, usize>,
    steps: Vec<Step>,
    buffers: Vec<Buffer>,
    inputs: Vec<Port>,
    outputs: Vec<Port>,
    caches: Vec<Port>,
    /// Dense copies, packed left matrices and mask tables so far.
    dense: Vec<(View, View)>,
    packed: Vec<(View, BufferId)>,
    scanned: Vec<(View, usize, BufferId)>,
}

impl<'n> Compiler<'n> {
    fn new(network: &'n Network, options: &'n CompileOptions) -> Result<Self, CpuError> {
        // Only the Dequantize layer reads the codes of a weight, and no kernel.
        let codes: HashSet<TensorId> = network
            .layers
            .iter()
            .filter(|layer| matches!(layer.kind, LayerKind::Weight(_)))
            .flat_map(|layer| layer.outputs.iter().copied())
            .collect();
        let mut shapes = Vec::with_capacity(network.tensors.len());
        for (i, tensor) in network.tensors.iter().enumerate() {
            let Some(shape) = static_shape(tensor) else {
                let dims: Vec<String> = tensor.shape.iter().map(|d| d.to_string()).collect();
                return Err(CpuError::Dynamic {
                    tensor: tensor.name.clone(),
                    shape: format!("[{}]", dims.join(", ")),
                });
            };
            let bytes = shape.iter().try_fold(8usize, |n, d| n.checked_mul((*d).max(1)));
            let fits = bytes.is_some_and(|n| n < isize::MAX as usize);
            let held = !tensor.dtype.is_storage_only() || codes.contains(&TensorId(i as u32));
            if !fits || tensor.dtype == DType::F64 || !held {
                return Err(CpuError::Binding {
                    name: tensor.name.clone(),
                    reason: format!("{} {shape:?} is more than the executor holds", tensor.dtype),
                });
            }
            shapes.push(shape);
        }
        verify(network)?;
        let count = network.tensors.len();
        let mut producer: Vec<Option<usize>> = vec![None; count];
        for (i, layer) in network.layers.iter().enumerate() {
            producer[layer.outputs[0].0 as usize] = Some(i);
        }

        let mut live = vec![false; network.layers.len()];
        let mut needed: Vec<TensorId> = network.outputs.clone();
        for (i, layer) in network.layers.iter().enumerate() {
            if matches!(layer.kind, LayerKind::KvCacheUpdate) {
                live[i] = true;
                needed.extend(&layer.inputs);
            }
        }
        while let Some(tensor) = needed.pop() {
            if let Some(i) = producer[tensor.0 as usize]
                && (!live[i] || network.outputs.contains(&tensor))
            {
                live[i] = true;
                needed.extend(
                    network.layers[i]
                        .inputs
                        .iter()
                        .filter(|t| producer[t.0 as usize].is_some_and(|p| !live[p])),
                );
            }
        }
        let mut consumers = vec![Vec::new(); count];
        for (i, layer) in network.layers.iter().enumerate().filter(|(i, _)| live[*i]) {
            for input in &layer.inputs {
                if consumers[input.0 as usize].last() != Some(&i) {
                    consumers[input.0 as usize].push(i);
                }
            }
        }

        let mut compiler = Compiler {
            network,
            isa: options.isa,
            weights: &options.weights,
            shapes,
            producer,
            consumers,
            live,
            views: vec![None; count],
            quantized: HashMap::new(),
            output_of: HashMap::new(),
            steps: Vec::new(),
            buffers: Vec::new(),
            inputs: Vec::new(),
            outputs: Vec::new(),
            caches: Vec::new(),
            dense: Vec::new(),
            packed: Vec::new(),
            scanned: Vec::new(),
        };
        compiler.declare_ports();
        Ok(compiler)
    }

    fn port(&self, id: TensorId) -> Port {
        let tensor = self.network.tensor(id);
        Port {
            name: tensor.name.clone(),
            role: self
                .network
                .interface
                .as_ref()
                .and_then(|interface| interface.role_of(id)),
            dtype: tensor.dtype,
            shape: self.shapes[id.0 as usize].clone(),
        }
    }

    fn declare_ports(&mut self) {
        let aliases: Vec<(TensorId, TensorId)> = self.network.aliases().collect();
        for (input, _) in &aliases {
            if self.views[input.0 as usize].is_some() {
                continue;
            }
            let port = self.port(*input);
            let memory = Memory::Cache(self.caches.len());
            self.views[input.0 as usize] = Some(self.new_buffer(memory, port.dtype, port.shape.clone()));
            self.caches.push(port);
        }
        for input in &self.network.inputs {
            if self.views[input.0 as usize].is_some() {
                continue;
            }
            let port = self.port(*input);
            let memory = Memory::Input(self.inputs.len());
            let storage = super::bindings::bound_dtype(port.dtype);
            self.views[input.0 as usize] = Some(self.new_buffer(memory, storage, port.shape.clone()));
            self.inputs.push(port);
        }
        for output in &self.network.outputs {
            if aliases.iter().any(|(_, updated)| updated == output) || self.output_of.contains_key(output) {
                continue;
            }
            self.output_of.insert(*output, self.outputs.len());
            let port = self.port(*output);
            self.outputs.push(port);
        }
    }

    // Buffers and views

    fn new_buffer(&mut self, memory: Memory, storage: DType, shape: Vec<usize>) -> View {
        let id = BufferId(self.buffers.len() as u32);
        // Kernels trust this number; an overflow exceeds all memory and is refused when the arena is planned.
        let bytes = storage.byte_len(shape.iter().fold(1, |n: usize, dim| n.saturating_mul(*dim)));
        let view = View::dense(id, storage, shape);
        self.buffers.push(Buffer { memory, bytes });
        view
    }

    fn arena(&mut self, storage: DType, shape: Vec<usize>) -> View {
        self.new_buffer(Memory::Arena { offset: 0 }, storage, shape)
    }

    /// A weight or constant, in place. Bools are 0 or 1 everywhere in a program, so that kernels can copy them to the
    /// caller's `bool`s; a file may contain other bytes for true.
    fn constant(&mut self, tensor: Tensor) -> View {
        let other = |byte: &u8| *byte > 1;
        let tensor = match tensor.dtype() {
            DType::Bool if tensor.data().iter().any(other) => {
                let bytes: Vec<u8> = tensor.data().iter().map(|byte| u8::from(*byte != 0)).collect();
                Tensor::new(DType::Bool, tensor.shape().to_vec(), bytes.into()).expect("as many bytes as before")
            }
            _ => tensor,
        };
        let (dtype, shape) = (tensor.dtype(), tensor.shape().to_vec());
        self.new_buffer(Memory::Tensor(tensor), dtype, shape)
    }

    /// Dense memory for a tensor about to be computed, and its view; the caller's memory if it is an output.
    fn allocate(&mut self, id: TensorId) -> View {
        let storage = super::bindings::bound_dtype(self.network.tensor(id).dtype);
        let shape = self.shapes[id.0 as usize].clone();
        let memory = match self.output_of.get(&id) {
            Some(output) => Memory::Output(*output),
            None => Memory::Arena { offset: 0 },
        };
        let view = self.new_buffer(memory, storage, shape);
        self.views[id.0 as usize] = Some(view.clone());
        view
    }

    /// Like [`Compiler::allocate`], but laid out so that the transpose of the only reader is dense.
    fn allocate_for_reader(&mut self, id: TensorId) -> View {
        let readers = &self.consumers[id.0 as usize];
        if let ([reader], false) = (readers.as_slice(), self.output_of.contains_key(&id))
            && let LayerKind::Shuffle { first: Some(perm), .. } = &self.network.layers[*reader].kind
            // The kernel needs a contiguous last axis.
            && perm.last() == Some(&(perm.len() - 1))
        {
            let permuted: Vec<usize> = perm.iter().map(|p| self.shapes[id.0 as usize][*p]).collect();
            let storage = super::bindings::bound_dtype(self.network.tensor(id).dtype);
            let memory = self.arena(storage, permuted);
            let view = memory.permuted(&inverse(perm));
            self.views[id.0 as usize] = Some(view.clone());
            return view;
        }
        self.allocate(id)
    }

    /// The view of a tensor, computed now if it was pending.
    fn demand(&mut self, id: TensorId) -> Result<View, CpuError> {
        if let Some(view) = &self.views[id.0 as usize] {
            return Ok(view.clone());
        }
        let layer = self.producer[id.0 as usize].expect("checked: every tensor read has a producer");
        if !self.quantized.contains_key(&id) {
            self.emit(layer)?;
        }
        if let Some(constant) = self.quantized.get(&id) {
            let values = constant.materialize()?;
            let view = self.constant(values);
            self.views[id.0 as usize] = Some(view);
        }
        Ok(self.views[id.0 as usize]
            .clone()
            .expect("emitting a layer sets its output"))
    }

    /// The elements of a view in row-major order, copied if necessary; floats become f32 if `widen`.
    fn densify(&mut self, view: &View, widen: bool, layer: &str) -> View {
        let storage = if widen {
            super::bindings::bound_dtype(view.storage)
        } else {
            view.storage
        };
        if view.is_dense() && view.storage == storage {
            return View {
                strides: super::strided_view::dense_strides(&view.shape),
                ..view.clone()
            };
        }
        let known = self
            .dense
            .iter()
            .find(|(from, to)| from == view && to.storage == storage);
        if let Some((_, to)) = known {
            return to.clone();
        }
        let to = self.arena(storage, view.shape.clone());
        self.copy(view, &to, layer);
        self.dense.push((view.clone(), to.clone()));
        to
    }

    fn push(
        &mut self,
        layer: &str,
        work: Work,
        items: usize,
        nanoseconds: f64,
        reads: Vec<BufferId>,
        writes: Vec<BufferId>,
    ) {
        if items == 0 {
            return;
        }
        self.steps.push(Step {
            layer: layer.to_string(),
            work,
            items,
            nanoseconds,
            reads,
            writes,
        });
    }

    /// Computes pending network outputs, and copies those that are views of other buffers.
    fn finish_outputs(&mut self) -> Result<(), CpuError> {
        for id in self.network.outputs.clone() {
            let view = self.demand(id)?;
            let Some(output) = self.output_of.get(&id).copied() else {
                continue;
            };
            let there = matches!(self.buffers[view.buffer.0 as usize].memory, Memory::Output(o) if o == output);
            if there {
                continue;
            }
            let port = self.outputs[output].clone();
            let storage = super::bindings::bound_dtype(port.dtype);
            let to = self.new_buffer(Memory::Output(output), storage, port.shape);
            self.copy(&view, &to, &port.name);
        }
        Ok(())
    }

    fn class(&self, id: TensorId) -> Class {
        Class::of(self.network.tensor(id).dtype)
    }
}

fn static_shape(tensor: &crate::network::Tensor) -> Option<Vec<usize>> {
    let dims = tensor.shape.iter().map(|d| usize::try_from(d.as_const()?).ok());
    dims.collect()
}

fn inverse(perm: &[usize]) -> Vec<usize> {
    let mut inverse = vec![0; perm.len()];
    for (i, p) in perm.iter().enumerate() {
        inverse[*p] = i;
    }
    inverse
}

/// Items of `unit` nanoseconds each, grouped so that scheduling one is worthwhile.
fn per_item(total: usize, nanoseconds: f64) -> usize {
    const WORTH: f64 = 4_000.0;
    ((WORTH / nanoseconds.max(0.1)) as usize).clamp(1, total.max(1))
}
