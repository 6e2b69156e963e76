//! Steps of a mixture of experts, and how their items run.

use std::sync::Arc;

use super::super::error::Indexed;
use super::super::kernels::experts::{ExpertGate, ExpertRows, ExpertSum, Plan, TopK};
use super::super::kernels::gemm::{self, Gemm, Matrix, PackLeft};
use super::super::kernels::gemv::{self, Gemv};
use super::super::kernels::moves::BadIndex;
use super::super::kernels::quantized_gemm::QuantizedGemm;
use super::super::kernels::quantized_gemv::{self, QuantizedGemv, Scope};
use super::super::quantized::QuantizedMatrix;
use super::super::simd::Isa;
use super::super::strided_view::{BufferId, View};
use super::run::Run;
use crate::graph::op::Gating;

/// The assignment of tokens to experts, with the counts.
#[derive(Clone, Copy, Debug)]
pub struct ExpertShape {
    pub plan: BufferId,
    pub tokens: usize,
    pub top_k: usize,
    pub experts: usize,
}

impl ExpertShape {
    pub fn pairs(&self) -> usize {
        self.tokens * self.top_k
    }
}

/// The matrices of all experts, `[experts * columns, depth]`.
#[derive(Clone, Debug)]
pub enum ExpertMatrix {
    /// Dense.
    Floats(View),
    Codes(Arc<QuantizedMatrix>),
}

/// The work of an experts step; see the kernels.
#[derive(Clone, Debug)]
pub enum ExpertWork {
    Plan {
        indices: View,
    },
    Rows {
        x: View,
        width: usize,
        to: BufferId,
        per_item: usize,
    },
    /// Rows of each active expert, packed as the left side of a product of many rows.
    Pack {
        from: BufferId,
        depth: usize,
        to: BufferId,
    },
    /// For each active expert, the product of its rows with its matrix.
    Product {
        rows: BufferId,
        packed: Option<BufferId>,
        matrix: ExpertMatrix,
        depth: usize,
        columns: usize,
        out: BufferId,
        per_item: usize,
    },
    Gate {
        gate: BufferId,
        up: Option<BufferId>,
        biases: [Option<View>; 2],
        gating: Gating,
        columns: usize,
        per_item: usize,
    },
    Sum {
        results: BufferId,
        weights: View,
        bias: Option<View>,
        indices: View,
        columns: usize,
        out: BufferId,
        per_item: usize,
    },
}

/// The greatest elements of rows.
#[derive(Clone, Debug)]
pub struct TopKWork {
    pub x: View,
    pub n: usize,
    pub k: usize,
    pub values: Option<BufferId>,
    pub indices: Option<BufferId>,
    pub per_item: usize,
}

impl ExpertWork {
    pub fn name(&self) -> &'static str {
        match self {
            ExpertWork::Plan { .. } => "expert plan",
            ExpertWork::Rows { .. } => "expert rows",
            ExpertWork::Pack { .. } => "expert pack",
            ExpertWork::Product { .. } => "expert product",
            ExpertWork::Gate { .. } => "expert gate",
            ExpertWork::Sum { .. } => "expert sum",
        }
    }

    pub fn kept_bytes(&self, isa: Isa) -> usize {
        match self {
            ExpertWork::Product {
                matrix: ExpertMatrix::Codes(matrix),
                ..
            } => quantized_gemv::scratch_len(isa.lanes(), matrix.format(), gemv::MAX_ROWS, matrix.depth()) * 4,
            _ => 0,
        }
    }

    pub fn scratch_bytes(&self, isa: Isa) -> usize {
        match self {
            ExpertWork::Product { .. } => gemm::scratch_len(isa) * 4,
            _ => 0,
        }
    }
}

impl Run<'_> {
    /// # Safety
    /// As [`Run::item`].
    pub(super) unsafe fn top_k(&self, work: &TopKWork, rows: std::ops::Range<usize>) {
        let top_k = TopK {
            x: self.at(&work.x).cast_const().cast(),
            n: work.n,
            k: work.k,
            values: work.values.map_or(std::ptr::null_mut(), |to| self.base(to).cast()),
            indices: work.indices.map_or(std::ptr::null_mut(), |to| self.base(to).cast()),
            items: rows,
        };
        // SAFETY: this function's contract.
        unsafe { self.isa().run(top_k) };
    }

    /// # Safety
    /// As [`Run::item`].
    pub(super) unsafe fn experts(
        &self,
        shape: &ExpertShape,
        work: &ExpertWork,
        item: usize,
        [scratch, kept]: [*mut u8; 2],
        scope: Scope,
    ) -> Result<(), (Indexed, BadIndex)> {
        let isa = self.isa();
        let plan = Plan {
            base: self.base(shape.plan).cast(),
            pairs: shape.pairs(),
            experts: shape.experts,
        };
        let range = |per_item: usize, total: usize| item * per_item..((item + 1) * per_item).min(total);
        let floats = |view: &Option<View>| {
            view.as_ref()
                .map_or(std::ptr::null(), |v| self.at(v).cast_const().cast())
        };
        // SAFETY: buffers have the sizes that `compile::experts` states, and the plan was made in an earlier phase.
        unsafe {
            match work {
                ExpertWork::Plan { indices } => {
                    let made = plan.make(self.at(indices), indices.storage);
                    return made.map_err(|bad| (Indexed::Index, bad));
                }
                ExpertWork::Rows { x, width, to, per_item } => isa.run(ExpertRows {
                    plan,
                    top_k: shape.top_k,
                    x: self.at(x).cast_const().cast(),
                    width: *width,
                    to: self.base(*to).cast(),
                    items: range(*per_item, shape.pairs()),
                }),
                ExpertWork::Pack { from, depth, to } => {
                    let Some((_, first, count)) = plan.active(item).filter(|(.., count)| *count > gemv::MAX_ROWS)
                    else {
                        return Ok(());
                    };
                    for tile in 0..count.div_ceil(isa.tile_rows()) {
                        isa.run(PackLeft {
                            rows: count,
                            depth: *depth,
                            matrix: Matrix {
                                base: self.base(*from).cast::<f32>().add(first * depth).cast(),
                                storage: crate::tensor::DType::F32,
                                row_stride: *depth as isize,
                                column_stride: 1,
                            },
                            packed: self.base(*to).cast::<f32>().add(first * depth),
                            tile,
                        });
                    }
                }
                ExpertWork::Product {
                    rows,
                    packed,
                    matrix,
                    depth,
                    columns,
                    out,
                    per_item,
                } => {
                    let (depth, columns) = (*depth, *columns);
                    let pieces = columns.div_ceil(*per_item);
                    let Some((expert, first, count)) = plan.active(item / pieces) else {
                        return Ok(());
                    };
                    let piece = item % pieces * per_item..((item % pieces + 1) * per_item).min(columns);
                    let x = self.base(*rows).cast::<f32>().add(first * depth);
                    let y = self.base(*out).cast::<f32>().add(first * columns);
                    let places = gemv::Rows::Even {
                        x,
                        x_stride: depth,
                        y,
                        y_stride: columns,
                    };
                    let panels = || piece.start / isa.tile_columns()..piece.end.div_ceil(isa.tile_columns());
                    let left = packed.map(|packed| self.base(packed).cast::<f32>().add(first * depth));
                    match (matrix, left.filter(|_| count > gemv::MAX_ROWS)) {
                        (ExpertMatrix::Floats(view), None) => {
                            let bytes = view.storage.element_bytes();
                            isa.run(Gemv {
                                rows: count,
                                places,
                                depth,
                                w: self.at(view).add(expert * columns * depth * bytes),
                                w_stride: depth,
                                storage: view.storage,
                                columns: piece,
                            });
                        }
                        (ExpertMatrix::Codes(matrix), None) => isa.run(QuantizedGemv {
                            rows: count,
                            places,
                            w: matrix.kernel_from(expert * columns),
                            columns: piece,
                            scratch: kept.cast(),
                            scope,
                        }),
                        (ExpertMatrix::Floats(view), Some(left)) => {
                            let bytes = view.storage.element_bytes();
                            for panel in panels() {
                                isa.run(Gemm {
                                    rows: count,
                                    columns,
                                    depth,
                                    left,
                                    right: Matrix {
                                        base: self.at(view).add(expert * columns * depth * bytes),
                                        storage: view.storage,
                                        row_stride: 1,
                                        column_stride: depth as isize,
                                    },
                                    out: y,
                                    out_stride: columns,
                                    scratch: scratch.cast(),
                                    panel,
                                });
                            }
                        }
                        (ExpertMatrix::Codes(matrix), Some(left)) => {
                            for panel in panels() {
                                isa.run(QuantizedGemm {
                                    rows: count,
                                    columns,
                                    left,
                                    right: matrix.kernel_from(expert * columns),
                                    out: y,
                                    out_stride: columns,
                                    scratch: scratch.cast(),
                                    panel,
                                });
                            }
                        }
                    }
                }
                ExpertWork::Gate {
                    gate,
                    up,
                    biases,
                    gating,
                    columns,
                    per_item,
                } => isa.run(ExpertGate {
                    plan,
                    gating: *gating,
                    gate: self.base(*gate).cast(),
                    up: up.map_or(std::ptr::null(), |up| self.base(up).cast_const().cast()),
                    biases: [floats(&biases[0]), floats(&biases[1])],
                    columns: *columns,
                    items: range(*per_item, shape.pairs()),
                }),
                ExpertWork::Sum {
                    results,
                    weights,
                    bias,
                    indices,
                    columns,
                    out,
                    per_item,
                } => isa.run(ExpertSum {
                    plan,
                    top_k: shape.top_k,
                    results: self.base(*results).cast_const().cast(),
                    weights: self.at(weights).cast_const().cast(),
                    bias: floats(bias),
                    indices: self.at(indices),
                    index_storage: indices.storage,
                    columns: *columns,
                    out: self.base(*out).cast(),
                    items: range(*per_item, shape.tokens),
                }),
            }
        }
        Ok(())
    }
}
