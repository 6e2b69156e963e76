//! A compiled network: phases of steps, and the run over them.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use super::bindings::Bindings;
use super::buffer::Aligned;
use super::error::{CpuError, Indexed};
use super::kernels::attention::{self, Attention, Few, Many, Mask, Merge, Scan};
use super::kernels::gemm::{self, Gemm, Matrix, PackLeft};
use super::kernels::gemv::Gemv;
use super::kernels::moves::{BadIndex, CacheUpdate, Gather, Heads, Rotate};
use super::kernels::rows::RowProgram;
use super::pool::{Pool, Team};
use super::simd::Isa;
use super::view::{BufferId, View};
use crate::tensor::{DType, Tensor};

/// Where a buffer's memory is.
#[derive(Clone, Debug)]
pub(super) enum Memory {
    /// In the program's arena. The offset, in bytes, is planned last.
    Arena {
        offset: usize,
    },
    /// A weight or constant, used where it lies.
    Tensor(Tensor),
    /// Network input, by its place in [`Program::inputs`].
    Input(usize),
    Output(usize),
    /// By its place in [`Program::caches`].
    Cache(usize),
}

#[derive(Clone, Debug)]
pub(super) struct Buffer {
    pub memory: Memory,
    pub bytes: usize,
}

/// Two-dimensional strides over a batch of matrices.
#[derive(Clone, Debug)]
pub(super) struct MatrixView {
    pub buffer: BufferId,
    pub storage: DType,
    /// Of each matrix of the batch, in elements.
    pub offsets: Vec<isize>,
    pub row_stride: isize,
    pub column_stride: isize,
}

#[derive(Clone, Debug)]
pub(super) struct AttentionStep {
    pub q: View,
    pub k: View,
    pub v: View,
    /// The mask broadcast to `[batch, heads, tokens, slots]`, and the table of its live blocks broadcast to
    /// `[batch, heads, tokens, blocks]`.
    pub mask: Option<(View, View)>,
    pub out: View,
    pub partial: Option<BufferId>,
}

/// What a step does; see the kernels.
#[derive(Clone, Debug)]
pub(super) enum Work {
    Rows {
        program: RowProgram,
        per_item: usize,
    },
    PackLeft {
        from: MatrixView,
        to: BufferId,
        rows: usize,
        depth: usize,
    },
    Gemm {
        packed: BufferId,
        /// For each matrix of the batch, which packed one is its left side.
        left: Vec<usize>,
        right: MatrixView,
        out: BufferId,
        rows: usize,
        columns: usize,
        depth: usize,
    },
    Gemv {
        left: MatrixView,
        right: MatrixView,
        out: BufferId,
        rows: usize,
        columns: usize,
        depth: usize,
        per_item: usize,
    },
    Gather {
        data: View,
        /// Dense dims `[outer, axis, inner]` of the data.
        dims: [usize; 3],
        indices: View,
        out: BufferId,
        per_item: usize,
    },
    Rotate {
        x: View,
        cos: View,
        sin: View,
        positions: View,
        out: View,
        rotary_dim: usize,
        interleaved: bool,
        per_item: usize,
    },
    CacheUpdate {
        cache: View,
        update: View,
        indices: View,
        per_item: usize,
    },
    Scan {
        /// Rank 4, with its own dims.
        mask: View,
        slots: usize,
        live: BufferId,
        per_item: usize,
    },
    Few(AttentionStep),
    Merge(AttentionStep),
    Many(AttentionStep),
}

#[derive(Clone, Debug)]
pub(super) struct Step {
    /// Name of the layer whose output it computes.
    pub layer: String,
    pub work: Work,
    /// Pieces that threads may take.
    pub items: usize,
    /// Estimate of one thread's time.
    pub nanoseconds: f64,
    pub reads: Vec<BufferId>,
    pub writes: Vec<BufferId>,
}

/// Steps between two barriers.
#[derive(Clone, Debug)]
pub(super) struct Phase {
    pub steps: Vec<usize>,
    /// Too little work to share: the first thread does all of it, in order. Otherwise steps are independent.
    pub serial: bool,
}

/// A tensor of the program's interface.
#[derive(Clone, Debug, PartialEq)]
pub struct Port {
    pub name: String,
    /// As in the network. Float inputs and outputs that are not caches are bound as f32 whatever is said here.
    pub dtype: DType,
    pub shape: Vec<usize>,
}

/// What a run took, by layer kind or by layer.
#[derive(Clone, Debug, Default)]
pub struct Profile {
    /// Layer name, kind of step, nanoseconds on the first thread.
    pub steps: Vec<(String, &'static str, u64)>,
}

/// A network compiled for one static shape. Holds its weights where they lie (mapped files stay mapped) and an arena
/// for activations; a run allocates nothing.
pub struct Program {
    pub(super) isa: Isa,
    pub(super) pool: Arc<Pool>,
    pub(super) steps: Vec<Step>,
    pub(super) phases: Vec<Phase>,
    pub(super) buffers: Vec<Buffer>,
    pub(super) inputs: Vec<Port>,
    pub(super) outputs: Vec<Port>,
    pub(super) caches: Vec<Port>,
    pub(super) arena: Aligned,
    pub(super) scratch: Vec<Aligned>,
    pub(super) counters: Vec<AtomicUsize>,
}

// SAFETY: a program owns its arena and scratch; the addresses it uses during a run are those of its own memory and of
// what the bindings borrow.
struct Addresses(Vec<*mut u8>);
unsafe impl Sync for Addresses {}

impl Program {
    /// Inputs to bind, caches left out, in the network's order.
    pub fn inputs(&self) -> &[Port] {
        &self.inputs
    }
    /// Outputs to bind, caches left out, in the network's order.
    pub fn outputs(&self) -> &[Port] {
        &self.outputs
    }
    /// The cache inputs, in the order of their updates in the network: what [`Caches`](super::Caches) must hold.
    pub fn caches(&self) -> &[Port] {
        &self.caches
    }
    /// Bytes of activations and scratch that the program holds.
    pub fn arena_bytes(&self) -> usize {
        self.arena.len() + self.scratch.iter().map(Aligned::len).sum::<usize>()
    }
    pub fn isa(&self) -> Isa {
        self.isa
    }
    pub fn threads(&self) -> usize {
        self.pool.threads()
    }

    /// Runs the network once. Caches are updated in place; outputs are written to the memory bound.
    ///
    /// Fails before doing anything if a binding is missing or of the wrong type or size. An index outside its axis
    /// (a token id outside the vocabulary, a position outside the rotary tables, a write beyond the capacity) is
    /// reported after the run; the outputs are then meaningless and the caches may hold the tokens' entries.
    pub fn run(&mut self, bindings: &mut Bindings<'_>) -> Result<(), CpuError> {
        let addresses = self.addresses(bindings)?;
        for counter in &mut self.counters {
            *counter.get_mut() = 0;
        }
        let failure = Mutex::new(None);
        let run = Run {
            program: self,
            addresses: &addresses,
            scratch: self.scratch.iter().map(Aligned::address).collect(),
            failure: &failure,
        };
        self.pool.run(|team| run.thread(team));
        match failure.into_inner().unwrap_or_else(|poisoned| poisoned.into_inner()) {
            None => Ok(()),
            Some(error) => Err(error),
        }
    }

    /// Runs the network once on the calling thread's team and measures each step on the first thread.
    pub fn profile(&mut self, bindings: &mut Bindings<'_>) -> Result<Profile, CpuError> {
        let order: Vec<usize> = self.phases.iter().flat_map(|p| p.steps.iter().copied()).collect();
        let phases = std::mem::take(&mut self.phases);
        let mut profile = Profile::default();
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

    fn addresses(&self, bindings: &mut Bindings<'_>) -> Result<Addresses, CpuError> {
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
        let arena = self.arena.address();
        let addresses = self.buffers.iter().map(|buffer| match &buffer.memory {
            Memory::Arena { offset } => arena.wrapping_add(*offset),
            Memory::Tensor(tensor) => tensor.data().as_ptr().cast_mut(),
            Memory::Input(i) => inputs[*i],
            Memory::Output(i) => outputs[*i],
            Memory::Cache(i) => caches[*i],
        });
        Ok(Addresses(addresses.collect()))
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

struct Run<'a> {
    program: &'a Program,
    addresses: &'a Addresses,
    scratch: Vec<*mut u8>,
    failure: &'a Mutex<Option<CpuError>>,
}
// SAFETY: each thread uses its own scratch, and phases give items to one thread each.
unsafe impl Sync for Run<'_> {}

impl Run<'_> {
    fn thread(&self, team: Team<'_>) {
        let program = self.program;
        let alone = team.threads() == 1;
        for (i, phase) in program.phases.iter().enumerate() {
            if phase.serial || alone {
                if team.thread == 0 {
                    for step in &phase.steps {
                        for item in 0..program.steps[*step].items {
                            self.item(&program.steps[*step], item, team.thread);
                        }
                    }
                }
            } else {
                let total: usize = phase.steps.iter().map(|s| program.steps[*s].items).sum();
                loop {
                    let mut item = program.counters[i].fetch_add(1, Ordering::Relaxed);
                    if item >= total {
                        break;
                    }
                    for step in &phase.steps {
                        let step = &program.steps[*step];
                        if item < step.items {
                            self.item(step, item, team.thread);
                            break;
                        }
                        item -= step.items;
                    }
                }
            }
            team.barrier();
        }
    }

    fn base(&self, buffer: BufferId) -> *mut u8 {
        self.addresses.0[buffer.0 as usize]
    }

    /// The address of a view's first element.
    fn at(&self, view: &View) -> *mut u8 {
        self.base(view.buffer)
            .wrapping_offset(view.offset * view.storage.size() as isize)
    }

    fn heads(&self, view: &View) -> Heads {
        Heads {
            base: self.at(view),
            storage: view.storage,
            strides: [view.strides[0], view.strides[1], view.strides[2]],
        }
    }

    fn matrix(&self, view: &MatrixView, batch: usize) -> Matrix {
        let at = view.offsets[batch] * view.storage.size() as isize;
        Matrix {
            base: self.base(view.buffer).wrapping_offset(at),
            storage: view.storage,
            row_stride: view.row_stride,
            column_stride: view.column_stride,
        }
    }

    fn attention(&self, step: &AttentionStep) -> Attention {
        let mask = step.mask.as_ref().map(|(mask, live)| Mask {
            base: self.at(mask),
            storage: mask.storage,
            strides: [mask.strides[0], mask.strides[1], mask.strides[2], mask.strides[3]],
            live: self.at(live),
            live_strides: [live.strides[0], live.strides[1], live.strides[2]],
        });
        Attention {
            q: self.heads(&step.q),
            k: self.heads(&step.k),
            v: self.heads(&step.v),
            mask,
            out: self.heads(&step.out),
            heads: step.q.shape[1],
            kv_heads: step.k.shape[1],
            tokens: step.q.shape[2],
            slots: step.k.shape[2],
            dim: step.q.shape[3],
        }
    }

    fn item(&self, step: &Step, item: usize, thread: usize) {
        let isa = self.program.isa;
        let scratch = self.scratch[thread];
        let range = |per_item: usize, total: usize| item * per_item..((item + 1) * per_item).min(total);
        // SAFETY: the compiler checked shapes and made the views; phases keep writers and readers apart; the bindings
        // were checked against the ports.
        let result = unsafe {
            match &step.work {
                Work::Rows { program, per_item } => {
                    program.run(isa, &self.addresses.0, scratch, range(*per_item, program.units()));
                    Ok(())
                }
                Work::PackLeft { from, to, rows, depth } => {
                    let tiles = rows.div_ceil(isa.tile_rows());
                    let (batch, tile) = (item / tiles, item % tiles);
                    let pack = PackLeft {
                        rows: *rows,
                        depth: *depth,
                        matrix: self.matrix(from, batch),
                        packed: self.base(*to).cast::<f32>().add(batch * rows * depth),
                        tile,
                    };
                    pack.run(isa);
                    Ok(())
                }
                Work::Gemm {
                    packed,
                    left,
                    right,
                    out,
                    rows,
                    columns,
                    depth,
                } => {
                    let panels = columns.div_ceil(isa.tile_columns());
                    let (batch, panel) = (item / panels, item % panels);
                    let gemm = Gemm {
                        rows: *rows,
                        columns: *columns,
                        depth: *depth,
                        left: self.base(*packed).cast::<f32>().add(left[batch] * rows * depth),
                        right: self.matrix(right, batch),
                        out: self.base(*out).cast::<f32>().add(batch * rows * columns),
                        out_stride: *columns,
                        scratch: scratch.cast(),
                        panel,
                    };
                    gemm.run(isa);
                    Ok(())
                }
                Work::Gemv {
                    left,
                    right,
                    out,
                    rows,
                    columns,
                    depth,
                    per_item,
                } => {
                    let pieces = columns.div_ceil(*per_item);
                    let (batch, piece) = (item / pieces, item % pieces);
                    let (x, w) = (self.matrix(left, batch), self.matrix(right, batch));
                    let gemv = Gemv {
                        rows: *rows,
                        depth: *depth,
                        x: x.base.cast(),
                        x_stride: x.row_stride as usize,
                        w: w.base,
                        w_stride: w.column_stride as usize,
                        storage: w.storage,
                        y: self.base(*out).cast::<f32>().add(batch * rows * columns),
                        y_stride: *columns,
                        columns: piece * per_item..((piece + 1) * per_item).min(*columns),
                    };
                    gemv.run(isa);
                    Ok(())
                }
                Work::Gather {
                    data,
                    dims,
                    indices,
                    out,
                    per_item,
                } => {
                    let gather = Gather {
                        data: self.at(data),
                        storage: data.storage,
                        axis: dims[1],
                        inner: dims[2],
                        indices: self.at(indices),
                        index_storage: indices.storage,
                        count: indices.len(),
                        out: self.base(*out),
                        items: range(*per_item, dims[0] * indices.len()),
                    };
                    gather.run(isa).map_err(|bad| (Indexed::Index, bad))
                }
                Work::Rotate {
                    x,
                    cos,
                    sin,
                    positions,
                    out,
                    rotary_dim,
                    interleaved,
                    per_item,
                } => {
                    let rotate = Rotate {
                        x: self.heads(x),
                        out: self.heads(out),
                        heads: x.shape[1],
                        tokens: x.shape[2],
                        dim: x.shape[3],
                        rotary_dim: *rotary_dim,
                        interleaved: *interleaved,
                        cos: self.at(cos),
                        sin: self.at(sin),
                        table_storage: cos.storage,
                        max_position: cos.shape[0],
                        positions: self.at(positions),
                        position_storage: positions.storage,
                        position_strides: [positions.strides[0], positions.strides[1]],
                        items: range(*per_item, x.shape[0] * x.shape[1] * x.shape[2]),
                    };
                    rotate.run(isa).map_err(|bad| (Indexed::Position, bad))
                }
                Work::CacheUpdate {
                    cache,
                    update,
                    indices,
                    per_item,
                } => {
                    let write = CacheUpdate {
                        cache: self.heads(cache),
                        capacity: cache.shape[2],
                        update: self.heads(update),
                        heads: cache.shape[1],
                        tokens: update.shape[2],
                        dim: cache.shape[3],
                        indices: self.at(indices),
                        index_storage: indices.storage,
                        index_stride: indices.strides[0],
                        items: range(*per_item, update.shape[0] * update.shape[1] * update.shape[2]),
                    };
                    write.run(isa).map_err(|bad| (Indexed::Slot, bad))
                }
                Work::Scan {
                    mask,
                    slots,
                    live,
                    per_item,
                } => {
                    let dims: [usize; 4] = std::array::from_fn(|i| mask.shape[i]);
                    let scan = Scan {
                        base: self.at(mask),
                        storage: mask.storage,
                        dims,
                        strides: std::array::from_fn(|i| mask.strides[i]),
                        slots: *slots,
                        live: self.base(*live),
                        items: range(*per_item, dims[0] * dims[1] * dims[2]),
                    };
                    scan.run(isa);
                    Ok(())
                }
                Work::Few(step) => {
                    let partial = step.partial.expect("planned with it");
                    let few = Few {
                        attention: self.attention(step),
                        item,
                        partial: self.base(partial).cast(),
                    };
                    few.run(isa);
                    Ok(())
                }
                Work::Merge(step) => {
                    let attention = self.attention(step);
                    let partial = step.partial.expect("planned with it");
                    let total = step.k.shape[0] * attention.kv_heads * attention.group_rows();
                    let merge = Merge {
                        attention,
                        partial: self.base(partial).cast_const().cast(),
                        items: range(total, total),
                    };
                    merge.run(isa);
                    Ok(())
                }
                Work::Many(step) => {
                    let many = Many {
                        attention: self.attention(step),
                        item,
                        scratch: scratch.cast(),
                    };
                    many.run(isa);
                    Ok(())
                }
            }
        };
        if let Err((what, bad)) = result {
            self.report(step, what, bad);
        }
    }

    fn report(&self, step: &Step, what: Indexed, bad: BadIndex) {
        let mut failure = self.failure.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        failure.get_or_insert(CpuError::Index {
            layer: step.layer.clone(),
            what,
            index: bad.index,
            bound: bad.bound,
        });
    }
}

impl Work {
    fn name(&self) -> &'static str {
        match self {
            Work::Rows { .. } => "rows",
            Work::PackLeft { .. } => "pack",
            Work::Gemm { .. } => "gemm",
            Work::Gemv { .. } => "gemv",
            Work::Gather { .. } => "gather",
            Work::Rotate { .. } => "rotary",
            Work::CacheUpdate { .. } => "cache update",
            Work::Scan { .. } => "mask scan",
            Work::Few(_) => "attention (few rows)",
            Work::Merge(_) => "attention merge",
            Work::Many(_) => "attention",
        }
    }

    /// Bytes of scratch that each thread needs.
    pub(super) fn scratch_bytes(&self, isa: Isa) -> usize {
        match self {
            Work::Rows { program, .. } => program.scratch_bytes(),
            Work::Gemm { .. } => gemm::scratch_len(isa) * 4,
            Work::Many(step) => attention::many_scratch(isa, step.q.shape[3]) * 4,
            _ => 0,
        }
    }
}
