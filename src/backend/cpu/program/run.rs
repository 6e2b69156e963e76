//! One run: every thread goes through the phases, takes items and passes each to its kernel.

use std::sync::Mutex;

use super::super::error::{CpuError, Indexed};
use super::super::kernels::attention::{Attention, DecodeChunk, Mask, MaskScan, MergeChunks, PrefillPanel};
use super::super::kernels::gemm::{Gemm, Matrix, PackLeft};
use super::super::kernels::gemv::{Gemv, Rows};
use super::super::kernels::moves::{BadIndex, CacheUpdate, Gather, Heads, Rotate};
use super::super::kernels::quantized::QuantizedGather;
use super::super::kernels::quantized_gemm::QuantizedGemm;
use super::super::kernels::quantized_gemv::{QuantizedGemv, Scope};
use super::super::pool::Team;
use super::super::simd::Isa;
use super::super::strided_view::{BufferId, View};
use super::Program;
use super::steps::{AttentionStep, MatrixView, Step, Work};

/// The execution of a program on the memory of one call.
pub(super) struct Run<'a> {
    program: &'a Program,
    /// Number of the run, to validate data that threads keep.
    number: u64,
    /// Address of each of the program's buffers.
    addresses: Vec<*mut u8>,
    /// Of each thread: for one item, and what it keeps between items.
    scratch: [Vec<*mut u8>; 2],
    failure: &'a Mutex<Option<CpuError>>,
}
// SAFETY: shared by the threads of a run. Each uses the scratch of its own number alone; items are taken by one thread
// each, and those of one phase write different memory and read none that another writes (`compile::schedule`).
unsafe impl Sync for Run<'_> {}

impl<'a> Run<'a> {
    /// `failure` receives the first index found outside its axis. No other run that uses this scratch has the same
    /// `number`.
    ///
    /// # Safety
    /// During the lifetime of the run: `addresses` holds, for each of the program's buffers, the address of this many
    /// bytes, which nothing else uses (or writes, if the program only reads them), aligned for its elements if it
    /// writes them; addresses of buffers that it writes are of different memory. `scratch` holds, for each thread of
    /// the pool, the address of the scratch that the program's steps need, which nothing else uses; and the same for
    /// kept scratch.
    pub(super) unsafe fn new(
        program: &'a Program,
        number: u64,
        addresses: Vec<*mut u8>,
        scratch: [Vec<*mut u8>; 2],
        failure: &'a Mutex<Option<CpuError>>,
    ) -> Self {
        Run {
            program,
            number,
            addresses,
            scratch,
            failure,
        }
    }

    /// One thread's share: every thread of the team calls this once.
    pub(super) fn thread(&self, team: Team<'_>) {
        let program = self.program;
        let alone = team.threads() == 1;
        for (i, phase) in program.phases.iter().enumerate() {
            if phase.serial || alone {
                if team.thread() == 0 {
                    for step in &phase.steps {
                        let scope = self.scope(program.phases.len() + step);
                        for item in 0..program.steps[*step].items {
                            // SAFETY: an item of the step, and the first thread takes all of them.
                            unsafe { self.item(&program.steps[*step], item, 0, scope) };
                        }
                    }
                }
            } else {
                let total: usize = phase.steps.iter().map(|s| program.steps[*s].items).sum();
                while let Some(mut item) = program.pieces[i].take(total) {
                    for step in &phase.steps {
                        let step = &program.steps[*step];
                        if item < step.items {
                            let scope = self.scope(i);
                            // SAFETY: an item of the step, which `Pieces` gave to this thread alone.
                            unsafe { self.item(step, item, team.thread(), scope) };
                            break;
                        }
                        item -= step.items;
                    }
                }
            }
            team.barrier();
        }
    }

    fn scope(&self, part: usize) -> Scope {
        Scope {
            run: self.number,
            part: part as u64,
        }
    }

    pub(super) fn isa(&self) -> Isa {
        self.program.isa
    }

    pub(super) fn base(&self, buffer: BufferId) -> *mut u8 {
        self.addresses[buffer.0 as usize]
    }

    /// The address of a view's first element.
    pub(super) fn at(&self, view: &View) -> *mut u8 {
        self.base(view.buffer)
            .wrapping_offset(view.offset * view.storage.element_bytes() as isize)
    }

    fn heads(&self, view: &View) -> Heads {
        Heads {
            base: self.at(view),
            storage: view.storage,
            strides: [view.strides[0], view.strides[1], view.strides[2]],
        }
    }

    pub(super) fn matrix(&self, view: &MatrixView, batch: usize) -> Matrix {
        let at = view.offsets[batch] * view.storage.element_bytes() as isize;
        Matrix {
            base: self.base(view.buffer).wrapping_offset(at),
            storage: view.storage,
            row_stride: view.row_stride,
            column_stride: view.column_stride,
        }
    }

    pub(super) fn step(&self, step: usize) -> &Step {
        &self.program.steps[step]
    }

    /// Locations of the rows of x and y in a product of a few rows, for one matrix of its batch.
    pub(super) fn product_rows(&self, step: usize, matrix: usize) -> Vec<(*const f32, *mut f32)> {
        let (left, out, rows, columns, result) = match &self.program.steps[step].work {
            Work::Gemv {
                left,
                out,
                rows,
                columns,
                ..
            } => (left, out, rows, *columns, matrix),
            Work::QuantizedGemv {
                left,
                right,
                out,
                place,
                rows,
                ..
            } => (left, out, rows, right.rows(), *place),
            other => unreachable!("{} is not a product of a few rows", other.name()),
        };
        let x = self.matrix(left, matrix);
        let y = self.base(*out).cast::<f32>().wrapping_add(result * rows * columns);
        let row = |row: usize| {
            let x = x.base.cast::<f32>().wrapping_offset(row as isize * x.row_stride);
            (x, y.wrapping_add(row * columns))
        };
        (0..*rows).map(row).collect()
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

    /// Runs one item of a step of the current phase.
    ///
    /// # Safety
    /// `item < step.items`, and no other thread runs it; `thread` is the calling thread's own number. Nothing that the
    /// step reads is written while `scope` is the same.
    pub(super) unsafe fn item(&self, step: &Step, item: usize, thread: usize, scope: Scope) {
        let isa = self.program.isa;
        let [scratch, kept] = [self.scratch[0][thread], self.scratch[1][thread]];
        let range = |per_item: usize, total: usize| item * per_item..((item + 1) * per_item).min(total);
        // SAFETY: the pointers are those of the step's views in buffers whose addresses `Run::new` vouches for, and the
        // shapes are the views' own: `kernels` says why that is enough. `CompileOptions` lets available instruction sets in
        // alone.
        let result = unsafe {
            match &step.work {
                Work::Rows { program, per_item } => {
                    program.run(isa, &self.addresses, scratch, range(*per_item, program.units()));
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
                    isa.run(pack);
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
                    isa.run(gemm);
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
                        places: Rows::Even {
                            x: x.base.cast(),
                            x_stride: x.row_stride as usize,
                            y: self.base(*out).cast::<f32>().add(batch * rows * columns),
                            y_stride: *columns,
                        },
                        depth: *depth,
                        w: w.base,
                        w_stride: w.column_stride as usize,
                        storage: w.storage,
                        columns: piece * per_item..((piece + 1) * per_item).min(*columns),
                    };
                    isa.run(gemv);
                    Ok(())
                }
                Work::QuantizedGemm {
                    packed,
                    left,
                    right,
                    out,
                    place,
                    rows,
                } => {
                    let (columns, depth) = (right.rows(), right.depth());
                    let gemm = QuantizedGemm {
                        rows: *rows,
                        columns,
                        left: self.base(*packed).cast::<f32>().add(left * rows * depth),
                        right: right.kernel(),
                        out: self.base(*out).cast::<f32>().add(place * rows * columns),
                        out_stride: columns,
                        scratch: scratch.cast(),
                        panel: item,
                    };
                    isa.run(gemm);
                    Ok(())
                }
                Work::QuantizedGemv {
                    left,
                    right,
                    out,
                    place,
                    rows,
                    per_item,
                } => {
                    let (x, columns) = (self.matrix(left, 0), right.rows());
                    let gemv = QuantizedGemv {
                        rows: *rows,
                        places: Rows::Even {
                            x: x.base.cast(),
                            x_stride: x.row_stride as usize,
                            y: self.base(*out).cast::<f32>().add(place * rows * columns),
                            y_stride: columns,
                        },
                        w: right.kernel(),
                        columns: range(*per_item, columns),
                        scratch: kept.cast(),
                        scope,
                    };
                    isa.run(gemv);
                    Ok(())
                }
                Work::QuantizedGather {
                    data,
                    indices,
                    out,
                    per_item,
                } => {
                    let gather = QuantizedGather {
                        rows: data.kernel(),
                        count: data.rows(),
                        indices: self.at(indices),
                        index_storage: indices.storage,
                        out: self.base(*out).cast(),
                        items: range(*per_item, indices.len()),
                    };
                    isa.run(gather).map_err(|bad| (Indexed::Index, bad))
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
                    isa.run(gather).map_err(|bad| (Indexed::Index, bad))
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
                    isa.run(rotate).map_err(|bad| (Indexed::Position, bad))
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
                    isa.run(write).map_err(|bad| (Indexed::Slot, bad))
                }
                Work::MaskScan {
                    mask,
                    slots,
                    live,
                    per_item,
                } => {
                    let dims: [usize; 4] = std::array::from_fn(|i| mask.shape[i]);
                    let scan = MaskScan {
                        base: self.at(mask),
                        storage: mask.storage,
                        dims,
                        strides: std::array::from_fn(|i| mask.strides[i]),
                        slots: *slots,
                        live: self.base(*live),
                        items: range(*per_item, dims[0] * dims[1] * dims[2]),
                    };
                    isa.run(scan);
                    Ok(())
                }
                Work::TopK(work) => {
                    let rows = work.x.len() / work.n;
                    self.top_k(work, range(work.per_item, rows));
                    Ok(())
                }
                Work::Experts(shape, work) => self.experts(shape, work, item, [scratch, kept], scope),
                Work::DecodeChunk(step) => {
                    let partial = step.partial.expect("planned with it");
                    let few = DecodeChunk {
                        attention: self.attention(step),
                        item,
                        partial: self.base(partial).cast(),
                    };
                    isa.run(few);
                    Ok(())
                }
                Work::MergeChunks(step) => {
                    let attention = self.attention(step);
                    let partial = step.partial.expect("planned with it");
                    let total = step.k.shape[0] * attention.kv_heads * attention.group_rows();
                    let merge = MergeChunks {
                        attention,
                        partial: self.base(partial).cast_const().cast(),
                        items: range(total, total),
                    };
                    isa.run(merge);
                    Ok(())
                }
                Work::PrefillPanel(step) => {
                    let many = PrefillPanel {
                        attention: self.attention(step),
                        item,
                        scratch: scratch.cast(),
                    };
                    isa.run(many);
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
