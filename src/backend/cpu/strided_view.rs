//! Strided views of buffers: transposes, slices, broadcasts and reshapes without copies.

use crate::tensor::DType;

/// A buffer of the program: a piece of the arena, or memory of a weight, a cache or the caller.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub struct BufferId(pub u32);

/// Elements of a buffer, under a shape. Element `[i, j, ..]` is at `offset + i*strides[0] + j*strides[1] + ..`.
#[derive(Clone, Debug, PartialEq)]
pub struct View {
    pub buffer: BufferId,
    /// How the elements are stored: floats that the executor computed are f32 whatever the network's dtype; weights and
    /// caches keep their own dtype.
    pub storage: DType,
    /// In elements.
    pub offset: isize,
    pub shape: Vec<usize>,
    /// In elements; 0 on a broadcast axis.
    pub strides: Vec<isize>,
}

/// Row-major strides of a dense tensor.
pub fn dense_strides(shape: &[usize]) -> Vec<isize> {
    let mut strides = vec![0; shape.len()];
    let mut stride = 1;
    for (axis, dim) in shape.iter().enumerate().rev() {
        strides[axis] = stride;
        stride *= (*dim).max(1) as isize;
    }
    strides
}

impl View {
    pub fn dense(buffer: BufferId, storage: DType, shape: Vec<usize>) -> View {
        let strides = dense_strides(&shape);
        View {
            buffer,
            storage,
            offset: 0,
            shape,
            strides,
        }
    }

    pub fn len(&self) -> usize {
        self.shape.iter().product()
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Whether the elements lie in row-major order without gaps.
    pub fn is_dense(&self) -> bool {
        let mut expected = 1;
        for (dim, stride) in self.shape.iter().zip(&self.strides).rev() {
            if *dim != 1 && *stride != expected {
                return self.is_empty();
            }
            expected *= *dim as isize;
        }
        true
    }

    /// `result.shape[i] = shape[perm[i]]`.
    pub fn permuted(&self, perm: &[usize]) -> View {
        View {
            shape: perm.iter().map(|p| self.shape[*p]).collect(),
            strides: perm.iter().map(|p| self.strides[*p]).collect(),
            ..self.clone()
        }
    }

    /// The same elements in the same order under another shape, if strides can express it.
    pub fn reshaped(&self, shape: &[usize]) -> Option<View> {
        if shape.iter().product::<usize>() != self.len() {
            return None;
        }
        if self.is_empty() || self.is_dense() {
            return Some(View {
                shape: shape.to_vec(),
                strides: dense_strides(shape),
                ..self.clone()
            });
        }
        // Axes of size 1 are dropped. The rest is matched in runs of equal volume: a run of old axes must be
        // contiguous, and then any split of it is as well.
        let old: Vec<(usize, isize)> = self
            .shape
            .iter()
            .zip(&self.strides)
            .filter(|(d, _)| **d != 1)
            .map(|(d, s)| (*d, *s))
            .collect();
        let mut strides = vec![0; shape.len()];
        let (mut i, mut j) = (0, 0);
        while i < old.len() {
            let (first, new_first) = (i, j);
            let (mut old_volume, mut new_volume) = (old[i].0, 1);
            i += 1;
            while old_volume != new_volume {
                if new_volume < old_volume {
                    new_volume *= shape[j];
                    j += 1;
                } else {
                    old_volume *= old[i].0;
                    i += 1;
                }
            }
            for k in first..i - 1 {
                if old[k].1 != old[k + 1].1 * old[k + 1].0 as isize {
                    return None;
                }
            }
            let mut stride = old[i - 1].1;
            for k in (new_first..j).rev() {
                strides[k] = stride;
                stride *= shape[k] as isize;
            }
        }
        Some(View {
            shape: shape.to_vec(),
            strides,
            ..self.clone()
        })
    }

    /// Broadcast to a shape of equal rank; axes of size 1 are repeated.
    pub fn broadcast(&self, shape: &[usize]) -> View {
        let strides = (0..shape.len())
            .map(|i| if self.shape[i] == shape[i] { self.strides[i] } else { 0 })
            .collect();
        View {
            shape: shape.to_vec(),
            strides,
            ..self.clone()
        }
    }

    /// Elements `start + i*stride` of each axis. The caller has checked that they are inside.
    pub fn sliced(&self, start: &[i64], size: &[usize], stride: &[i64]) -> View {
        let offset: isize = (0..size.len())
            .filter(|i| size[*i] != 0)
            .map(|i| start[i] as isize * self.strides[i])
            .sum();
        View {
            offset: self.offset + offset,
            shape: size.to_vec(),
            strides: (0..size.len()).map(|i| self.strides[i] * stride[i] as isize).collect(),
            ..self.clone()
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// The offsets of every element in order.
    fn offsets(view: &View) -> Vec<isize> {
        let mut all = vec![view.offset];
        for (dim, stride) in view.shape.iter().zip(&view.strides) {
            all = all
                .iter()
                .flat_map(|base| (0..*dim as isize).map(move |i| base + i * stride))
                .collect();
        }
        all
    }

    #[test]
    fn head_split_is_a_view_and_its_merge_is_not() {
        let x = View::dense(BufferId(0), DType::F32, vec![1, 5, 12]);
        let heads = x.reshaped(&[1, 5, 3, 4]).unwrap().permuted(&[0, 2, 1, 3]);
        assert_eq!(heads.strides, [60, 4, 12, 1]);
        assert!(heads.reshaped(&[1, 15, 4]).is_none());
        assert!(heads.permuted(&[0, 2, 1, 3]).reshaped(&[1, 5, 12]).unwrap().is_dense());
    }

    #[test]
    fn with_one_token_head_split_and_merge_are_dense() {
        let x = View::dense(BufferId(0), DType::F32, vec![1, 1, 12]);
        let heads = x.reshaped(&[1, 1, 3, 4]).unwrap().permuted(&[0, 2, 1, 3]);
        assert!(heads.is_dense());
    }

    proptest! {
        #[test]
        fn a_reshaped_view_has_the_same_elements(
            dims in prop::collection::vec(1usize..5, 1..5),
            seed in any::<u64>(),
            cut in 0usize..4,
        ) {
            let base = View::dense(BufferId(0), DType::F32, dims.clone());
            let mut perm: Vec<usize> = (0..dims.len()).collect();
            let rank = perm.len();
            perm.swap(seed as usize % rank, (seed >> 8) as usize % rank);
            let view = base.permuted(&perm);
            // A few target shapes of the same volume: merged at `cut`, with an axis of 1 inserted.
            let cut = cut.min(rank - 1);
            let mut shape: Vec<usize> = view.shape[..cut].to_vec();
            shape.push(1);
            shape.push(view.shape[cut..].iter().product());
            if let Some(reshaped) = view.reshaped(&shape) {
                prop_assert_eq!(offsets(&reshaped), offsets(&view));
            } else {
                prop_assert!(!view.is_dense());
            }
        }
    }
}
