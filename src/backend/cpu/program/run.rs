//! One run: every thread walks the phases, takes items and hands each to its kernel.

use std::sync::Mutex;
use std::sync::atomic::Ordering;

use super::super::error::{CpuError, Indexed};
use super::super::kernels::attention::{Attention, Few, Many, Mask, Merge, Scan};
use super::super::kernels::gemm::{Gemm, Matrix, PackLeft};
use super::super::kernels::gemv::Gemv;
use super::super::kernels::moves::{BadIndex, CacheUpdate, Gather, Heads, Rotate};
use super::super::pool::Team;
use super::super::view::{BufferId, View};
use super::Program;
use super::steps::{AttentionStep, MatrixView, Step, Work};

// SAFETY: a program owns its arena and scratch; the addresses it uses during a run are those of its own memory and of
// what the bindings borrow.
pub(super) struct Addresses(pub(super) Vec<*mut u8>);
unsafe impl Sync for Addresses {}

pub(super) struct Run<'a> {
    pub(super) program: &'a Program,
    pub(super) addresses: &'a Addresses,
    pub(super) scratch: Vec<*mut u8>,
    pub(super) failure: &'a Mutex<Option<CpuError>>,
}
// SAFETY: each thread uses its own scratch, and phases give items to one thread each.
unsafe impl Sync for Run<'_> {}

impl Run<'_> {
    pub(super) fn thread(&self, team: Team<'_>) {
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
                    isa.run(gemv);
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
                    isa.run(scan);
                    Ok(())
                }
                Work::Few(step) => {
                    let partial = step.partial.expect("planned with it");
                    let few = Few {
                        attention: self.attention(step),
                        item,
                        partial: self.base(partial).cast(),
                    };
                    isa.run(few);
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
                    isa.run(merge);
                    Ok(())
                }
                Work::Many(step) => {
                    let many = Many {
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
