//! The layout of tensors of rows: which axes are batch, tokens, heads and head_dim.
//!
//! Canonical row order is `[batch, heads, tokens, head_dim]`. Exports use others; the types here convert between flat
//! element lists, and map columns of a projection to heads.

use crate::dim::{Dim, Sym};
use crate::passes::roles::Roles;

/// Where the tokens of a data value are: any order of axes, with batch and tokens possibly merged.
#[derive(Clone, Debug)]
pub struct TokenLayout {
    batch: Option<usize>,
    tokens: usize,
    /// One axis counts `batch * tokens`.
    merged: bool,
    /// The token axis also counts this many columns of each token.
    inner: usize,
}

impl TokenLayout {
    /// Finds the axes by their dims.
    pub fn of(shape: &[Dim], roles: &Roles) -> Option<Self> {
        Self::find(shape, roles.batch)
    }

    /// [`TokenLayout::of`] for a batch that is fixed or symbolic.
    pub fn find(shape: &[Dim], fixed_batch: Option<usize>) -> Option<Self> {
        let batch = fixed_batch.map_or_else(|| Dim::sym(Sym::batch()), Dim::from);
        let tokens = Dim::sym(Sym::tokens());
        let both = &batch * &tokens;
        let times = |dim: &Dim, of: &Dim| {
            let factor = dim.div_exact(of)?.as_const()?;
            usize::try_from(factor).ok().filter(|n| *n > 0)
        };
        // A single sequence needs no axis; with several, tokens and sequences can share only the first axis.
        let merged = match fixed_batch {
            None => true,
            Some(1) => false,
            Some(_) => !shape.contains(&tokens) && shape.first().is_some_and(|dim| times(dim, &both).is_some()),
        };
        if merged && let Some((axis, inner)) = shape.iter().enumerate().find_map(|(i, d)| Some((i, times(d, &both)?))) {
            return Some(TokenLayout {
                batch: None,
                tokens: axis,
                merged: true,
                inner,
            });
        }
        let exact = (0..shape.len()).find(|i| shape[*i] == tokens).map(|axis| (axis, 1));
        let (axis, inner) = exact.or_else(|| {
            // `[batch, tokens * heads, head_dim]`, for example when a per-head norm runs on three axes.
            let mut found = shape.iter().enumerate().take(2);
            found.find_map(|(i, d)| Some((i, times(d, &tokens)?)))
        })?;
        Some(TokenLayout {
            batch: (0..shape.len()).find(|i| *i != axis && shape[*i] == batch),
            tokens: axis,
            merged: false,
            inner,
        })
    }

    /// Whether the axes are `[batch, tokens, ..]`.
    pub fn is_batch_first(&self) -> bool {
        self.batch == Some(0) && self.tokens == 1 && self.inner == 1
    }

    /// Whether the axes are `[batch, heads, tokens, head_dim]`.
    pub fn is_canonical(&self, rank: usize) -> bool {
        rank == 4 && self.batch == Some(0) && self.tokens == 2 && self.inner == 1
    }

    pub fn token_axis(&self) -> usize {
        self.tokens
    }

    /// For each (sequence, token, column), in this order, the index of the element in a tensor of these dims.
    pub fn places(&self, dims: &[usize], batch: usize, tokens: usize) -> Vec<usize> {
        let mut strides = vec![1usize; dims.len()];
        for i in (0..dims.len().saturating_sub(1)).rev() {
            strides[i] = strides[i + 1] * dims[i + 1];
        }
        let rest: Vec<usize> = (0..dims.len())
            .filter(|i| *i != self.tokens && Some(*i) != self.batch)
            .collect();
        let outside: usize = rest.iter().map(|i| dims[*i]).product();
        let columns = outside * self.inner;
        let mut places = Vec::with_capacity(batch * tokens * columns);
        for b in 0..batch {
            for t in 0..tokens {
                let stride = strides[self.tokens];
                let row = if self.merged {
                    (b * tokens + t) * self.inner * stride
                } else {
                    self.batch.map_or(0, |axis| b * strides[axis]) + t * self.inner * stride
                };
                for column in 0..columns {
                    let mut left = column % outside;
                    let mut at = row + column / outside * stride;
                    for axis in rest.iter().rev() {
                        at += (left % dims[*axis]) * strides[*axis];
                        left /= dims[*axis];
                    }
                    places.push(at);
                }
            }
        }
        places
    }
}

/// The axes of a cache.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum CacheLayout {
    /// `[batch, kv_heads, slots, head_dim]`
    HeadsFirst,
    /// `[batch, slots, kv_heads, head_dim]`
    SlotsFirst,
    /// `[batch, slots, kv_heads * head_dim]`
    Flat,
}

impl CacheLayout {
    pub fn candidates(rank: usize) -> &'static [CacheLayout] {
        match rank {
            4 => &[CacheLayout::HeadsFirst, CacheLayout::SlotsFirst],
            3 => &[CacheLayout::Flat],
            _ => &[],
        }
    }

    /// `(kv_heads, slots, head_dim)` of a cache of these dims; a flat one uses `heads` unchecked.
    pub fn split(self, dims: &[usize], heads: Option<usize>, dim: Option<usize>) -> Option<(usize, usize, usize)> {
        match (self, dims) {
            (CacheLayout::HeadsFirst, [_, h, s, d]) => Some((*h, *s, *d)),
            (CacheLayout::SlotsFirst, [_, s, h, d]) => Some((*h, *s, *d)),
            (CacheLayout::Flat, [_, s, width]) => {
                let heads = heads.or_else(|| dim.filter(|d| *d > 0).map(|d| width / d))?;
                (heads > 0 && width % heads == 0).then(|| (heads, *s, width / heads))
            }
            _ => None,
        }
    }

    /// For each element of this layout, in order, its index in a canonical `[batch, heads, slots, dim]` list.
    pub fn places(self, batch: usize, heads: usize, slots: usize, dim: usize) -> Vec<usize> {
        let mut places = Vec::with_capacity(batch * heads * slots * dim);
        let at = |b: usize, h: usize, s: usize, d: usize| ((b * heads + h) * slots + s) * dim + d;
        for b in 0..batch {
            match self {
                CacheLayout::HeadsFirst => places.extend((0..heads * slots * dim).map(|i| b * heads * slots * dim + i)),
                CacheLayout::SlotsFirst | CacheLayout::Flat => {
                    for s in 0..slots {
                        for h in 0..heads {
                            places.extend((0..dim).map(|d| at(b, h, s, d)));
                        }
                    }
                }
            }
        }
        places
    }
}

/// Which columns of a projection are the heads: from each of `groups` groups of `stride` columns, the `per_group *
/// head_dim` columns from `offset` on. Separate projections have one group and offset 0; a projection of queries, keys
/// and values together has one group and three offsets, or as many groups as heads if it is interleaved by head.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Pick {
    pub offset: usize,
    pub groups: usize,
    pub per_group: usize,
    pub stride: usize,
}

impl Pick {
    /// From the column found for each (head, element), among `columns`.
    pub fn from_columns(found: &[usize], heads: usize, dim: usize, columns: usize) -> Option<Pick> {
        let start = |h: usize| found[h * dim];
        let contiguous = |h: usize| (0..dim).all(|d| found[h * dim + d] == start(h) + d);
        // Columns derived from numbers in the file can have any value; sums of valid ones do not overflow.
        if heads * dim == 0 || found.iter().any(|column| *column >= columns) || !(0..heads).all(contiguous) {
            return None;
        }
        let per_group = 1 + (1..heads).take_while(|h| start(*h) == start(0) + h * dim).count();
        let groups = heads / per_group;
        if groups == 1 {
            return (per_group == heads).then_some(Pick {
                offset: start(0),
                groups,
                per_group,
                stride: columns,
            });
        }
        let stride = start(per_group).checked_sub(start(0))?;
        let fits = heads.is_multiple_of(per_group)
            && stride.checked_mul(groups) == Some(columns)
            && start(0) + per_group * dim <= stride;
        let regular = || (0..heads).all(|h| start(h) == start(0) + (h / per_group) * stride + (h % per_group) * dim);
        (fits && regular()).then_some(Pick {
            offset: start(0),
            groups,
            per_group,
            stride,
        })
    }

    /// The column of an element of a head.
    pub fn column(&self, head: usize, element: usize, dim: usize) -> usize {
        self.offset + (head / self.per_group) * self.stride + (head % self.per_group) * dim + element
    }
}

/// The columns of a projection for the elements of heads.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Columns {
    /// Evenly spaced.
    Even(Pick),
    /// Individually, `[heads, dim]`: heads that share columns, or have them in another order.
    Listed(Vec<usize>),
}

impl Columns {
    /// From the column found for each (head, element), among `columns`.
    pub fn of(found: Vec<usize>, heads: usize, dim: usize, columns: usize) -> Columns {
        match Pick::from_columns(&found, heads, dim, columns) {
            Some(pick) => Columns::Even(pick),
            None => Columns::Listed(found),
        }
    }

    /// The column of an element of a head.
    pub fn column(&self, head: usize, element: usize, dim: usize) -> usize {
        match self {
            Columns::Even(pick) => pick.column(head, element, dim),
            Columns::Listed(columns) => columns[head * dim + element],
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn columns(pick: Pick, heads: usize, dim: usize) -> Vec<usize> {
        (0..heads * dim).map(|i| pick.column(i / dim, i % dim, dim)).collect()
    }

    #[test]
    fn picks_of_packed_and_interleaved_projections_are_found_again() {
        for pick in [
            Pick {
                offset: 0,
                groups: 1,
                per_group: 4,
                stride: 32,
            },
            Pick {
                offset: 40,
                groups: 1,
                per_group: 2,
                stride: 64,
            },
            // GPT-NeoX: [heads, 3 * head_dim], the keys of each head second.
            Pick {
                offset: 8,
                groups: 4,
                per_group: 1,
                stride: 24,
            },
            // Falcon: groups of two queries, one key, one value.
            Pick {
                offset: 0,
                groups: 3,
                per_group: 2,
                stride: 32,
            },
        ] {
            let heads = pick.groups * pick.per_group;
            let found = Pick::from_columns(&columns(pick, heads, 8), heads, 8, pick.groups * pick.stride);
            assert_eq!(found, Some(pick));
        }
        let shuffled: Vec<usize> = (0..16).map(|i| i ^ 1).collect();
        assert_eq!(Pick::from_columns(&shuffled, 2, 8, 16), None);
        // A damaged file, and heads without elements.
        assert_eq!(Pick::from_columns(&[usize::MAX; 16], 2, 8, 16), None);
        assert_eq!(Pick::from_columns(&[], 2, 0, 16), None);
        assert_eq!(Pick::from_columns(&[0, 1 << 62], 2, 1, usize::MAX), None);
    }
}
