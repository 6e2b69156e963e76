//! A program as data: its buffers, and the steps over them in phases.

use super::super::kernels::rows::RowProgram;
use super::super::kernels::{attention, gemm, quantized_gemv};
use super::super::quantized::QuantizedMatrix;
use super::super::simd::Isa;
use super::super::strided_view::{BufferId, View};
use super::experts::{ExpertShape, ExpertWork, TopKWork};
use crate::tensor::{DType, Tensor};
use std::sync::Arc;

/// The location of a buffer's memory.
#[derive(Clone, Debug)]
pub enum Memory {
    /// In the program's arena. The offset, in bytes, is planned last.
    Arena {
        offset: usize,
    },
    /// A weight or constant, used in place.
    Tensor(Tensor),
    /// Network input, by its index in [`Program::inputs`].
    Input(usize),
    Output(usize),
    /// By its index in [`Program::caches`].
    Cache(usize),
}

#[derive(Clone, Debug)]
pub struct Buffer {
    pub memory: Memory,
    pub bytes: usize,
}

/// Two-dimensional strides over a batch of matrices.
#[derive(Clone, Debug)]
pub struct MatrixView {
    pub buffer: BufferId,
    pub storage: DType,
    /// Offset of each matrix of the batch, in elements.
    pub offsets: Vec<isize>,
    pub row_stride: isize,
    pub column_stride: isize,
}

#[derive(Clone, Debug)]
pub struct AttentionStep {
    pub q: View,
    pub k: View,
    pub v: View,
    /// The mask broadcast to `[batch, heads, tokens, slots]`, and the table of its live blocks broadcast to
    /// `[batch, heads, tokens, blocks]`.
    pub mask: Option<(View, View)>,
    pub out: View,
    pub partial: Option<BufferId>,
}

/// The work of a step; see the kernels.
#[derive(Clone, Debug)]
pub enum Work {
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
        /// For each matrix of the batch, the index of its packed left side.
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
    /// A product with one quantized matrix, for many rows.
    QuantizedGemm {
        packed: BufferId,
        /// Which of the packed matrices is the left side.
        left: usize,
        right: Arc<QuantizedMatrix>,
        out: BufferId,
        /// Which of the output's matrices is the result.
        place: usize,
        rows: usize,
    },
    /// A product with one quantized matrix, for a few rows.
    QuantizedGemv {
        left: MatrixView,
        right: Arc<QuantizedMatrix>,
        out: BufferId,
        /// Which of the output's matrices is the result.
        place: usize,
        rows: usize,
        per_item: usize,
    },
    /// Rows of a quantized matrix.
    QuantizedGather {
        data: Arc<QuantizedMatrix>,
        indices: View,
        out: BufferId,
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
    MaskScan {
        /// Rank 4, with the mask's dims.
        mask: View,
        slots: usize,
        live: BufferId,
        per_item: usize,
    },
    TopK(TopKWork),
    Experts(ExpertShape, ExpertWork),
    DecodeChunk(AttentionStep),
    MergeChunks(AttentionStep),
    PrefillPanel(AttentionStep),
}

#[derive(Clone, Debug)]
pub struct Step {
    /// Name of the layer whose output it computes.
    pub layer: String,
    pub work: Work,
    /// Pieces for threads.
    pub items: usize,
    /// Estimate of one thread's time.
    pub nanoseconds: f64,
    pub reads: Vec<BufferId>,
    pub writes: Vec<BufferId>,
}

/// Steps between two barriers.
#[derive(Clone, Debug, PartialEq)]
pub struct Phase {
    pub steps: Vec<usize>,
    /// Too little work to share: the first thread does it all, in order. Otherwise steps are independent.
    pub serial: bool,
}

impl Work {
    pub fn name(&self) -> &'static str {
        match self {
            Work::Rows { .. } => "rows",
            Work::PackLeft { .. } => "pack",
            Work::Gemm { .. } => "gemm",
            Work::Gemv { .. } => "gemv",
            Work::QuantizedGemm { .. } => "quantized gemm",
            Work::QuantizedGemv { .. } => "quantized gemv",
            Work::QuantizedGather { .. } => "quantized gather",
            Work::Gather { .. } => "gather",
            Work::Rotate { .. } => "rotary",
            Work::CacheUpdate { .. } => "cache update",
            Work::MaskScan { .. } => "mask scan",
            Work::TopK(_) => "top-k",
            Work::Experts(_, work) => work.name(),
            Work::DecodeChunk(_) => "attention (few rows)",
            Work::MergeChunks(_) => "attention merge",
            Work::PrefillPanel(_) => "attention",
        }
    }

    /// Whether it is worth sharing among threads in a batch of sequences, for any shapes. The rest is little work,
    /// which each thread does for a different sequence.
    pub fn is_large(&self) -> bool {
        match self {
            Work::PackLeft { .. }
            | Work::Gemm { .. }
            | Work::Gemv { .. }
            | Work::QuantizedGemm { .. }
            | Work::QuantizedGemv { .. }
            | Work::Experts(..)
            | Work::DecodeChunk(_)
            | Work::PrefillPanel(_) => true,
            Work::Rows { .. }
            | Work::QuantizedGather { .. }
            | Work::Gather { .. }
            | Work::Rotate { .. }
            | Work::CacheUpdate { .. }
            | Work::MaskScan { .. }
            | Work::TopK(_)
            | Work::MergeChunks(_) => false,
        }
    }

    /// Bytes of scratch that each thread needs and keeps between items of the same kind of work.
    pub fn kept_bytes(&self, isa: Isa) -> usize {
        match self {
            Work::QuantizedGemv { right, rows, .. } => {
                quantized_gemv::scratch_len(isa.lanes(), right.format(), *rows, right.depth()) * 4
            }
            Work::Experts(_, work) => work.kept_bytes(isa),
            _ => 0,
        }
    }

    /// Bytes of scratch that each thread needs.
    pub fn scratch_bytes(&self, isa: Isa) -> usize {
        match self {
            Work::Rows { program, .. } => program.scratch_bytes(),
            Work::Gemm { .. } | Work::QuantizedGemm { .. } => gemm::scratch_len(isa) * 4,
            Work::Experts(_, work) => work.scratch_bytes(isa),
            Work::PrefillPanel(step) => attention::prefill_scratch(isa, step.q.shape[3]) * 4,
            _ => 0,
        }
    }
}
