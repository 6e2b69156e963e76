//! Steps of matrix products: with few rows the right side is streamed, with more it is packed.

use super::super::kernels::gemv;
use super::super::program::{MatrixView, Work};
use super::super::strided_view::{BufferId, View, dense_strides};
use super::Compiler;
use super::layers::MOVE;
use crate::network::{MatrixOp, TensorId};
use crate::tensor::DType;

/// Nanoseconds per byte read from memory, and per multiply-add of a GEMM, on one thread.
pub(super) const READ: f64 = 0.06;
pub(super) const MULTIPLY: f64 = 0.02;

impl Compiler<'_> {
    /// A product of floats.
    pub(super) fn matrix_multiply(
        &mut self,
        name: &str,
        a: View,
        op_a: MatrixOp,
        b: View,
        op_b: MatrixOp,
        output: TensorId,
    ) {
        let rank = a.shape.len();
        let (mut a, mut b) = (oriented(a, op_a), oriented(b, op_b));
        let out = self.allocate(output);
        let depth = a.shape[rank - 1];
        let columns = b.shape[rank - 1];
        // One right matrix for the whole batch, like a weight: the batch's rows are rows of one left matrix.
        let one_right = b.shape[..rank - 2].iter().all(|d| *d == 1);
        if one_right {
            let rows: usize = a.shape[..rank - 1].iter().product();
            a = self.flat_rows(&a, rows, depth, name);
            b = b.reshaped(&[depth, columns]).unwrap_or_else(|| View {
                shape: vec![depth, columns],
                strides: b.strides[rank - 2..].to_vec(),
                ..b.clone()
            });
        }
        let split = a.shape.len() - 2;
        let rows = a.shape[split];
        let batch: Vec<usize> = if one_right {
            Vec::new()
        } else {
            out.shape[..split].to_vec()
        };
        let count: usize = batch.iter().product();
        if count * rows * columns == 0 {
            return;
        }
        let streams = (depth <= 1 || b.strides[split] == 1) && b.strides[split + 1] >= 0;
        if rows <= gemv::MAX_ROWS && streams {
            let plain = a.storage == DType::F32 && (depth <= 1 || a.strides[split + 1] == 1) && a.strides[split] >= 0;
            if !plain {
                a = self.densify(&a, true, name);
            }
            let (left, right) = (matrix_view(&a, &batch), matrix_view(&b, &batch));
            let bytes = b.storage.byte_len(depth);
            let per_item = (48 * 1024 / bytes.max(1)).max(4).next_multiple_of(4).min(columns);
            let one = (bytes as f64 * READ).max((depth * rows) as f64 * MULTIPLY);
            let (reads, writes) = (vec![a.buffer, b.buffer], vec![out.buffer]);
            let work = Work::Gemv {
                left,
                right,
                out: out.buffer,
                rows,
                columns,
                depth,
                per_item,
            };
            let items = count * columns.div_ceil(per_item);
            self.push(name, work, items, one * (count * columns) as f64, reads, writes);
            return;
        }
        let packed = self.packed_left(&a, name);
        let numbers = View {
            offset: 0,
            shape: a.shape[..split].to_vec(),
            strides: dense_strides(&a.shape[..split]),
            ..a.clone()
        };
        let left = offsets(&numbers, &batch).into_iter().map(|i| i as usize).collect();
        let right = matrix_view(&b, &batch);
        let panels = columns.div_ceil(self.isa.tile_columns());
        let time = (count * rows * columns * depth) as f64 * MULTIPLY + (count * columns * depth) as f64 * MOVE;
        let (reads, writes) = (vec![packed, b.buffer], vec![out.buffer]);
        let work = Work::Gemm {
            packed,
            left,
            right,
            out: out.buffer,
            rows,
            columns,
            depth,
        };
        self.push(name, work, count * panels, time, reads, writes);
    }

    /// The matrices of a left side as one matrix of `rows` rows.
    pub(super) fn flat_rows(&mut self, a: &View, rows: usize, depth: usize, name: &str) -> View {
        a.reshaped(&[rows, depth]).unwrap_or_else(|| {
            let dense = self.densify(a, rows <= gemv::MAX_ROWS, name);
            dense.reshaped(&[rows, depth]).expect("dense")
        })
    }

    /// The packed matrices of a left side: each distinct matrix is packed once; a batch may repeat them.
    pub(super) fn packed_left(&mut self, a: &View, name: &str) -> BufferId {
        if let Some((_, packed)) = self.packed.iter().find(|(view, _)| view == a) {
            return *packed;
        }
        let split = a.shape.len() - 2;
        let (rows, depth) = (a.shape[split], a.shape[split + 1]);
        let own: usize = a.shape[..split].iter().product();
        let to = self.arena(DType::F32, vec![own, rows, depth]).buffer;
        let tiles = rows.div_ceil(self.isa.tile_rows());
        let work = Work::PackLeft {
            from: matrix_view(a, &a.shape[..split]),
            to,
            rows,
            depth,
        };
        let time = (own * rows * depth) as f64 * MOVE;
        self.push(name, work, own * tiles, time, vec![a.buffer], vec![to]);
        self.packed.push((a.clone(), to));
        to
    }
}

/// A matrix in the form of its product.
pub(super) fn oriented(view: View, op: MatrixOp) -> View {
    match op {
        MatrixOp::None => view,
        MatrixOp::Transpose => {
            let rank = view.shape.len();
            let mut perm: Vec<usize> = (0..rank).collect();
            perm.swap(rank - 2, rank - 1);
            view.permuted(&perm)
        }
    }
}

/// The matrices of a view (its last two axes) for every index of a batch that broadcasts its leading axes.
pub(super) fn matrix_view(view: &View, batch: &[usize]) -> MatrixView {
    let split = view.shape.len() - 2;
    let leading = View {
        shape: view.shape[..split].to_vec(),
        strides: view.strides[..split].to_vec(),
        ..view.clone()
    };
    MatrixView {
        buffer: view.buffer,
        storage: view.storage,
        offsets: offsets(&leading, batch),
        row_stride: view.strides[split],
        column_stride: view.strides[split + 1],
    }
}

/// The offset of every element of a view broadcast to `batch`, in row-major order.
pub(super) fn offsets(view: &View, batch: &[usize]) -> Vec<isize> {
    let mut all = vec![view.offset];
    for (axis, dim) in batch.iter().enumerate() {
        let stride = if view.shape[axis] == 1 { 0 } else { view.strides[axis] };
        all = all
            .iter()
            .flat_map(|base| (0..*dim as isize).map(move |i| base + i * stride))
            .collect();
    }
    all
}
