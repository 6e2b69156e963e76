//! The parts of a mixture of experts other than products: sorting rows by expert, the function between the matrices,
//! the weighted sum.
//!
//! A *pair* is a token and one of its experts, numbered `token * top_k + i`. A [`plan`] lists the experts that have
//! pairs (the *active* ones) and groups the pairs of each, so that products operate on matrices of rows.

use super::super::simd::{Kernel, Simd};
use super::math;
use super::moves::{BadIndex, index_at};
use crate::graph::op::{ExpertActivation, Gating};
use crate::tensor::DType;

/// The location and sizes of a plan.
#[derive(Clone, Copy, Debug)]
pub struct Plan {
    /// [`plan_len`] i32: the number of active experts; the active experts; the start of each expert's rows, and the end
    /// of all; the row of every pair.
    pub base: *mut i32,
    pub pairs: usize,
    pub experts: usize,
}

/// Maximum number of active experts.
pub fn most_active(pairs: usize, experts: usize) -> usize {
    pairs.min(experts)
}

/// Number of i32 in a plan.
pub fn plan_len(pairs: usize, experts: usize) -> usize {
    2 + 2 * most_active(pairs, experts) + pairs
}

impl Plan {
    fn active_at(&self) -> usize {
        1
    }
    fn starts_at(&self) -> usize {
        1 + most_active(self.pairs, self.experts)
    }
    fn rows_at(&self) -> usize {
        2 + 2 * most_active(self.pairs, self.experts)
    }

    /// # Safety
    /// The plan was made.
    unsafe fn get(&self, at: usize) -> usize {
        // SAFETY: `at` is within the plan, by the layout above.
        unsafe { *self.base.add(at) as usize }
    }

    /// Active expert number `i` with its first row and the number of them; `None` beyond the last.
    ///
    /// # Safety
    /// The plan was made, and `i < most_active`.
    pub unsafe fn active(&self, i: usize) -> Option<(usize, usize, usize)> {
        // SAFETY: this function's contract.
        unsafe {
            if i >= self.get(0) {
                return None;
            }
            let first = self.get(self.starts_at() + i);
            let end = self.get(self.starts_at() + i + 1);
            Some((self.get(self.active_at() + i), first, end - first))
        }
    }

    /// The row of a pair.
    ///
    /// # Safety
    /// The plan was made, and there is such a pair.
    pub unsafe fn row(&self, pair: usize) -> usize {
        // SAFETY: this function's contract.
        unsafe { self.get(self.rows_at() + pair) }
    }

    /// Builds the plan of these experts, one per pair, dense. An invalid index counts as the first expert and is
    /// reported; the plan stays usable.
    ///
    /// # Safety
    /// There are this many indices, and [`plan_len`] i32 behind `base` that nothing else uses.
    pub unsafe fn make(&self, indices: *const u8, storage: DType) -> Result<(), BadIndex> {
        let mut result = Ok(());
        // SAFETY: pairs number the indices; places in the plan are within `plan_len`. Until the end the list of rows holds
        // the expert of each pair.
        unsafe {
            let rows = self.base.add(self.rows_at());
            for pair in 0..self.pairs {
                let index = index_at(indices, storage, pair as isize);
                let inside = index >= 0 && index < self.experts as i64;
                if !inside {
                    let bound = self.experts;
                    result = Err(BadIndex { index, bound });
                }
                *rows.add(pair) = if inside { index as i32 } else { 0 };
            }
            // Experts in order of their first pair: there are few of them, or few pairs.
            let mut active = 0;
            let listed = self.base.add(self.active_at());
            let counts = self.base.add(self.starts_at());
            for pair in 0..self.pairs {
                let expert = *rows.add(pair);
                let mut at = 0;
                while at < active && *listed.add(at) != expert {
                    at += 1;
                }
                if at == active {
                    *listed.add(at) = expert;
                    *counts.add(at) = 0;
                    active += 1;
                }
                *counts.add(at) += 1;
                // From here on, the index in the list.
                *rows.add(pair) = at as i32;
            }
            let mut next = 0;
            for at in 0..active {
                next += std::mem::replace(&mut *counts.add(at), next);
            }
            for pair in 0..self.pairs {
                let start = counts.add(*rows.add(pair) as usize);
                *rows.add(pair) = *start;
                *start += 1;
            }
            // Every start is now the end of its rows.
            for at in (0..active).rev() {
                *counts.add(at + 1) = *counts.add(at);
            }
            *counts = 0;
            *self.base = active as i32;
        }
        result
    }
}

/// Copies rows of tokens to the places of the pairs in `items`.
pub struct ExpertRows {
    pub plan: Plan,
    pub top_k: usize,
    /// `[tokens, width]`, no alignment.
    pub x: *const f32,
    pub width: usize,
    /// `[pairs, width]`.
    pub to: *mut f32,
    pub items: std::ops::Range<usize>,
}

impl Kernel for ExpertRows {
    type Output = ();
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        for pair in self.items.clone() {
            // SAFETY: the pair's token is a row of x, its place a row of `to` that no other pair has.
            unsafe {
                let from = self.x.add(pair / self.top_k * self.width).cast::<u8>();
                let to = self.to.add(self.plan.row(pair) * self.width).cast::<u8>();
                to.copy_from_nonoverlapping(from, self.width * 4);
            }
        }
    }
}

/// The input of the second matrix for the rows in `items`, in place of the products with the first.
pub struct ExpertGate {
    pub plan: Plan,
    pub gating: Gating,
    /// `[pairs, columns]`.
    pub gate: *mut f32,
    /// Like `gate`; null if there is none.
    pub up: *const f32,
    /// `[experts, columns]` for gate and up, no alignment; null if there are none.
    pub biases: [*const f32; 2],
    pub columns: usize,
    pub items: std::ops::Range<usize>,
}

impl Kernel for ExpertGate {
    type Output = ();
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let alpha = self.gating.alpha;
        // SAFETY: this function's contract.
        unsafe {
            match self.gating.activation {
                ExpertActivation::Swish => self.rows(|x| x * math::sigmoid::<S>(alpha * x)),
                ExpertActivation::Gelu => self.rows(math::gelu_erf::<S>),
                ExpertActivation::GeluTanh => self.rows(math::gelu_tanh::<S>),
                ExpertActivation::Relu => self.rows(positive),
                ExpertActivation::ReluSquared => self.rows(|x| positive(x) * positive(x)),
            }
        }
    }
}

/// `max(x, 0)`, which keeps NaN.
#[inline(always)]
fn positive(x: f32) -> f32 {
    if x < 0.0 { 0.0 } else { x }
}

/// The smaller, which keeps NaN.
#[inline(always)]
fn at_most(x: f32, most: f32) -> f32 {
    if x > most { most } else { x }
}

#[inline(always)]
fn at_least(x: f32, least: f32) -> f32 {
    if x < least { least } else { x }
}

impl ExpertGate {
    /// # Safety
    /// As [`Kernel::run`].
    #[inline(always)]
    unsafe fn rows(&self, active: impl Fn(f32) -> f32) {
        let n = self.columns;
        let most = if self.gating.limit > 0.0 {
            self.gating.limit
        } else {
            f32::INFINITY
        };
        let beta = self.gating.beta;
        let mut at = 0;
        for row in self.items.clone() {
            // SAFETY: the row lies among those of some active expert, whose biases have `n` elements; each row is one item's.
            unsafe {
                let expert = loop {
                    match self.plan.active(at) {
                        Some((expert, first, count)) if row < first + count => break expert,
                        Some(_) => at += 1,
                        None => return,
                    }
                };
                let gate = self.gate.add(row * n);
                let bias = |which: usize, i: usize| match self.biases[which].is_null() {
                    true => 0.0,
                    false => self.biases[which].add(expert * n + i).read_unaligned(),
                };
                if self.up.is_null() {
                    for i in 0..n {
                        *gate.add(i) = active(at_most(*gate.add(i) + bias(0, i), most));
                    }
                    continue;
                }
                let up = self.up.add(row * n);
                for i in 0..n {
                    let x = active(at_most(*gate.add(i) + bias(0, i), most));
                    let up = at_least(at_most(*up.add(i) + bias(1, i), most), -most);
                    *gate.add(i) = x * (up + beta);
                }
            }
        }
    }
}

/// The weighted sums of the tokens in `items`.
pub struct ExpertSum {
    pub plan: Plan,
    pub top_k: usize,
    /// `[pairs, columns]`.
    pub results: *const f32,
    /// `[tokens, top_k]`, no alignment.
    pub weights: *const f32,
    /// `[experts, columns]`, no alignment; null if there is none.
    pub bias: *const f32,
    /// The experts of the pairs, for their biases.
    pub indices: *const u8,
    pub index_storage: DType,
    pub columns: usize,
    /// `[tokens, columns]`.
    pub out: *mut f32,
    pub items: std::ops::Range<usize>,
}

impl Kernel for ExpertSum {
    type Output = ();
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let n = self.columns;
        for token in self.items.clone() {
            // SAFETY: the token has `top_k` pairs, each with a row of results; an index that is not an expert was reported when
            // the plan was made, and has no bias here. Each token is one item's.
            unsafe {
                let out = self.out.add(token * n);
                for i in 0..self.top_k {
                    let pair = token * self.top_k + i;
                    let weight = self.weights.add(pair).read_unaligned();
                    let result = self.results.add(self.plan.row(pair) * n);
                    let first = i == 0;
                    let expert = index_at(self.indices, self.index_storage, pair as isize);
                    let biased = !self.bias.is_null() && (0..self.plan.experts as i64).contains(&expert);
                    for c in 0..n {
                        let bias = match biased {
                            true => self.bias.add(expert as usize * n + c).read_unaligned(),
                            false => 0.0,
                        };
                        let before = if first { 0.0 } else { *out.add(c) };
                        *out.add(c) = S::mul_add(weight, *result.add(c) + bias, before);
                    }
                }
            }
        }
    }
}

/// The `k` greatest elements of each row in `items`, the first of equal ones first.
pub struct TopK {
    /// `[rows, n]`, dense, no alignment.
    pub x: *const f32,
    pub n: usize,
    pub k: usize,
    /// `[rows, k]` of f32, or null.
    pub values: *mut f32,
    /// `[rows, k]` of i32, or null.
    pub indices: *mut i32,
    pub items: std::ops::Range<usize>,
}

impl Kernel for TopK {
    type Output = ();
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        for row in self.items.clone() {
            // SAFETY: the row has `n` elements and `k` results, and is one item's.
            unsafe {
                let x = self.x.add(row * self.n);
                // The last result: the next one is smaller, or equal with a larger index.
                let mut last: Option<(f32, usize)> = None;
                for i in 0..self.k {
                    let mut best: Option<(f32, usize)> = None;
                    for j in 0..self.n {
                        let value = x.add(j).read_unaligned();
                        // NaN comes last.
                        let value = if value.is_nan() { f32::NEG_INFINITY } else { value };
                        let open = last.is_none_or(|(v, at)| value < v || value == v && j > at);
                        if open && best.is_none_or(|(v, _)| value > v) {
                            best = Some((value, j));
                        }
                    }
                    let (_, at) = best.unwrap_or((0.0, 0));
                    last = best.or(last);
                    let to = row * self.k + i;
                    if !self.values.is_null() {
                        *self.values.add(to) = x.add(at).read_unaligned();
                    }
                    if !self.indices.is_null() {
                        *self.indices.add(to) = at as i32;
                    }
                }
            }
        }
    }
}
