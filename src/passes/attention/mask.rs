//! Finds the slots that a mask lets each token attend to, and what it adds to their scores, by executing it.
//!
//! Exporters build masks from ranges, comparisons, gathers, padding, sentinels and tables in many ways; only the masked
//! slots of each row matter. A mask is accepted if it is causal, optionally with a sliding window, at every size
//! tested: below, at and beyond each length in its own arithmetic ([`lengths`]), at the last position that a package
//! can have, and over whole tables. Beyond the end of its tables a mask is unknown, so the tables limit the positions.

use std::cell::RefCell;
use std::collections::{BTreeMap, HashMap};

use super::bias::{self, Bias};
use super::find::{FoundAttention, MaskEffect, MaskTerm};
use crate::graph::ValueId;
use crate::passes::dependence::Dependence;
use crate::passes::lengths::{last_where, lengths, positions, reads_matrix};
use crate::passes::partial_eval::{PartialEvaluator, Stuck, Trial};
use crate::tensor::DType;

/// A score with this value added, or replaced by it, has no weight after the softmax. Sentinels in exports: -inf, the
/// smallest f32 and f16 numbers, -1e9, -1e4.
pub const MASKED: f64 = -9000.0;

/// Elements of the largest value that a proof may compute: a few hundred megabytes.
const LARGEST: usize = 1 << 26;

/// Rows of a table that are executed at once.
const BLOCK: usize = 256;

/// Which slots may be attended to: `[batch, tokens, slots]`.
struct Allowed {
    slots: usize,
    bits: Vec<bool>,
    /// Added to the scores of those slots.
    bias: Option<Bias>,
}

impl Allowed {
    /// Whether one of several tokens after a past may attend to a later one.
    fn looks_ahead(&self, past: usize, tokens: usize) -> bool {
        let later = |i: usize| i % self.slots > past + i / self.slots % tokens;
        self.bits.iter().enumerate().any(|(i, open)| *open && later(i))
    }
}

/// What a mask was proven to be.
#[derive(Clone, Debug)]
pub struct ProvenMask {
    /// How many positions a query attends to, itself included; `None` is plain causal.
    pub window: Option<usize>,
    /// Positions for which its tables have rows, if fewer than tested.
    pub limit: Option<usize>,
    /// Slope per head: what is added to a score per slot, up to a constant for the whole row; empty for none.
    pub slopes: Vec<f32>,
}

/// A mask that is invalid at some size.
enum Fault {
    /// It cannot be computed, for example beyond the end of a table.
    Stuck(Stuck),
    /// It can be computed, but is not a valid mask.
    NoMask(String),
}

impl From<Stuck> for Fault {
    fn from(stuck: Stuck) -> Self {
        Fault::Stuck(stuck)
    }
}

impl From<Fault> for String {
    fn from(fault: Fault) -> Self {
        match fault {
            Fault::Stuck(stuck) => stuck.to_string(),
            Fault::NoMask(reason) => reason,
        }
    }
}

/// Recognizes masks, each distinct mask once.
#[derive(Default)]
pub struct Masks {
    known: RefCell<HashMap<Vec<MaskTerm>, Result<ProvenMask, String>>>,
}

impl Masks {
    /// The mask of an attention, for a package of at most `last` positions. An error gives the reason.
    pub fn prove(
        &self,
        evaluator: &PartialEvaluator<'_>,
        attention: &FoundAttention,
        last: usize,
    ) -> Result<ProvenMask, String> {
        if let Some(known) = self.known.borrow().get(&attention.mask) {
            return known.clone();
        }
        let mask = Mask { evaluator, attention };
        let found = mask.prove(last);
        self.known.borrow_mut().insert(attention.mask.clone(), found.clone());
        found
    }
}

struct Mask<'a, 'g> {
    evaluator: &'a PartialEvaluator<'g>,
    attention: &'a FoundAttention,
}

/// How many new tokens a mask supports after a past one.
const SEVERAL: usize = 3;

impl Mask<'_, '_> {
    fn terms(&self) -> impl Iterator<Item = ValueId> + use<'_> {
        self.attention.mask.iter().map(|term| term.value)
    }

    fn prove(&self, last: usize) -> Result<ProvenMask, String> {
        let evaluator = self.evaluator;
        let name = |id: ValueId| evaluator.graph.value(id).name.clone();
        if let Some(id) = self.terms().find(|id| evaluator.dependence(*id) == Dependence::Data) {
            return Err(format!("the mask {} is not a function of positions", name(id)));
        }
        let lengths = lengths(evaluator.graph, self.terms(), |_| false);
        let longest = lengths.keys().next_back().copied().unwrap_or(0).max(8);
        let capacity = evaluator.roles.capacity.unwrap_or(usize::MAX);
        let mut end = ((longest + 2).max(last) + SEVERAL).min(capacity).max(SEVERAL);

        // Some exports can take a prompt or one token after it, but no second part of a prompt: their mask is undefined
        // for several tokens after a past, and using the causal one loses nothing.
        let mut step = SEVERAL;
        let past = 2.min(end - SEVERAL);
        // The branch of a merged decoder that reads a past may do so for one token alone: traced with one, it hides nothing from
        // several. The other branch takes prompts, and is compared with this one, token after token (`convert::branches`).
        let merged = evaluator.graph.producer.switch.is_some();
        let mut prompts = true;
        let near = match self.at(1, past, SEVERAL) {
            Ok(near) if merged && near.looks_ahead(past, SEVERAL) => {
                (step, prompts) = (1, false);
                self.at(1, past, 1)?
            }
            Ok(near) => near,
            Err(Fault::Stuck(_)) => {
                step = 1;
                self.at(1, past, 1)?
            }
            Err(fault) => return Err(fault.into()),
        };
        let near_slopes = near.bias.as_ref().map(|bias| bias.slopes(&near.bits));
        end = self.affordable(end, last, step)?;
        // A static cache does not show a window that is longer than the cache.
        let mut limit = (longest > capacity).then_some(capacity);
        // Beyond the end of a table of biases, a single remaining one may be broadcast.
        let computed = |total: usize| match (self.at(1, total - step, step), &near_slopes) {
            (Err(Fault::Stuck(_)), _) => false,
            (Ok(seen), Some(slopes)) => seen.bias.is_some_and(|bias| bias.is_about(&seen.bits, slopes)),
            _ => true,
        };
        if evaluator.roles.capacity.is_none() && !computed(end) {
            end = last_where(past + step, end, computed);
            limit = Some(end);
        }
        let far = self.at(1, end - step, step)?;
        let row = &far.bits[(step - 1) * far.slots..step * far.slots];
        let count = row.iter().filter(|a| **a).count();
        let window = (count < end).then_some(count);
        if window == Some(0) {
            return Err("its mask hides every slot".into());
        }
        check(&far, &evaluator.trial(1, end - step, step), window)?;
        let slopes = far.bias.as_ref().map_or(Vec::new(), |bias| bias.slopes(&far.bits));
        bias::check(&far.bias, &far.bits, far.slots, &slopes)?;
        let mut sizes = self.sizes(&lengths, window, end, last, step);
        sizes.retain(|(_, _, tokens)| prompts || *tokens == 1);
        for (batch, past, tokens) in sizes {
            let seen = self.at(batch, past, tokens)?;
            check(&seen, &evaluator.trial(batch, past, tokens), window)?;
            bias::check(&seen.bias, &seen.bits, seen.slots, &slopes)?;
        }
        Ok(ProvenMask { window, limit, slopes })
    }

    /// The longest total length up to `end` at which the mask fits in memory. Some exporters compute it for all
    /// positions by all positions.
    fn affordable(&self, end: usize, last: usize, step: usize) -> Result<usize, String> {
        let fits = |total: usize| {
            let trial = self.evaluator.trial(1, total - step, step);
            self.evaluator.largest(&trial, self.terms()) <= LARGEST
        };
        if fits(end) {
            return Ok(end);
        }
        let most = last_where(SEVERAL, end, fits);
        match most >= last {
            true => Ok(most),
            false => Err(format!(
                "its mask is too large to be computed for {last} positions; up to {most} can be had (--capacity)"
            )),
        }
    }

    /// `(batch, past, tokens)` to compare, besides the end itself.
    fn sizes(
        &self,
        lengths: &BTreeMap<usize, String>,
        window: Option<usize>,
        end: usize,
        last: usize,
        step: usize,
    ) -> Vec<(usize, usize, usize)> {
        let mut sizes = vec![(1, 0, 5), (2, 3, 1), (2, 2, 4), (1, 0, 1), (1, 0, end.min(80))];
        if let Some(window) = window {
            sizes.extend([
                (1, window - 1, 3),
                (1, window, 1),
                (1, window + 1, 1),
                (1, 0, window.min(64) + 2),
            ]);
        }
        sizes.extend(positions(lengths, end).into_iter().map(|past| (1, past, 1)));
        let rows = end.min(last.max(BLOCK));
        let largest = |past: usize, tokens: usize| {
            let trial = self.evaluator.trial(1, past, tokens);
            self.evaluator.largest(&trial, self.terms())
        };
        if largest(rows - 1, 1) > 3 * largest(rows / 2, 1) {
            // One row costs as much as all rows: compare all at once.
            sizes.retain(|(_, past, tokens)| past + tokens <= 1024);
            let affordable = |rows: usize| largest(0, rows) <= LARGEST;
            let rows = if affordable(rows) {
                rows
            } else {
                last_where(1, rows, affordable)
            };
            sizes.push((1, 0, rows));
        } else if reads_matrix(self.evaluator.graph, self.terms()) {
            match step {
                1 => sizes.push((1, 0, rows)),
                _ => sizes.extend((0..rows).step_by(BLOCK).map(|past| (1, past, BLOCK.min(rows - past)))),
            }
        }
        sizes.retain(|(_, past, tokens)| past + tokens <= end && (*past == 0 || *tokens == 1 || step > 1));
        sizes
    }

    fn at(&self, batch: usize, past: usize, tokens: usize) -> Result<Allowed, Fault> {
        let trial = self.evaluator.trial(batch, past, tokens);
        let seen = allowed(self.evaluator, self.attention, &trial);
        // Masks of long sequences are large, and few sizes are needed twice.
        if past + tokens > 64 {
            self.evaluator.forget(&trial);
        }
        seen
    }
}

/// Compares with the definition: slot `s` is attended to from position `p` if `s <= p` and `s > p - window`.
fn check(seen: &Allowed, trial: &Trial, window: Option<usize>) -> Result<(), String> {
    let sizes = trial.sizes;
    for (i, bit) in seen.bits.iter().enumerate() {
        let (s, t) = (i % seen.slots, i / seen.slots % sizes.tokens);
        let p = sizes.past + t;
        let expected = s <= p && window.is_none_or(|w| s + w > p);
        if *bit != expected {
            let verb = if *bit { "may" } else { "may not" };
            let kind = match window {
                Some(w) => format!("a causal mask with a window of {w}"),
                None => "a causal mask".into(),
            };
            return Err(format!(
                "its mask is not {kind}: with {} past and {} new tokens, position {p} {verb} attend to slot {s}",
                sizes.past, sizes.tokens
            ));
        }
    }
    Ok(())
}

fn allowed(evaluator: &PartialEvaluator<'_>, attention: &FoundAttention, trial: &Trial) -> Result<Allowed, Fault> {
    let sizes = trial.sizes;
    let slots = match attention.scores {
        Some(scores) => evaluator.dims(trial, scores)?.last().copied().unwrap_or(0),
        None => {
            let dims = evaluator.dims(trial, attention.key)?;
            dims[dims.len().saturating_sub(2)]
        }
    };
    let mut bits = vec![true; sizes.batch * sizes.tokens * slots];
    let mut bias: Option<Bias> = None;
    for term in &attention.mask {
        let tensor = evaluator.eval(trial, term.value)?;
        let stuck = |reason: String| Stuck {
            at: evaluator.graph.value(term.value).name.clone(),
            reason,
        };
        let no_mask = |reason: String| Fault::NoMask(stuck(reason).to_string());
        let shape = tensor.shape();
        let fits = |have: usize, want: usize| have == 1 || have == want;
        // With the axes that the scores have at this place: with three axes, batch and heads are merged.
        let mut aligned = vec![1; term.rank.saturating_sub(shape.len())];
        aligned.extend(shape);
        let (batches, heads, rows, columns) = match aligned[..] {
            [lead, rows, columns] if lead.is_multiple_of(sizes.batch) => {
                (sizes.batch, lead / sizes.batch, rows, columns)
            }
            [1, rows, columns] => (1, 1, rows, columns),
            [batches, ref heads @ .., rows, columns] => (batches, heads.iter().product(), rows, columns),
            _ => (0, 0, 0, 0),
        };
        if !fits(columns, slots) || !fits(rows, sizes.tokens) || !fits(batches, sizes.batch) {
            return Err(Fault::Stuck(stuck(format!(
                "the mask has the shape {shape:?} where {} sequences, {} tokens and {slots} slots were expected",
                sizes.batch, sizes.tokens
            ))));
        }
        let values = tensor.to_f64();
        let is_bool = tensor.dtype() == DType::Bool;
        let mut is_bias = false;
        let place = |h: usize, [b, t, s]: [usize; 3]| {
            let row = ((b.min(batches - 1) * heads + h) * rows + t.min(rows - 1)) * columns;
            row + s.min(columns - 1)
        };
        for b in 0..sizes.batch {
            for t in 0..sizes.tokens {
                for s in 0..slots {
                    let cell = |h: usize| values[place(h, [b, t, s])];
                    let open = |value: f64| match term.effect {
                        MaskEffect::Keep => Some(value != 0.0),
                        MaskEffect::Drop => Some(value == 0.0),
                        MaskEffect::Add(_) if is_bool || value.is_nan() => None,
                        MaskEffect::Add(factor) => Some(value * factor.get() > MASKED),
                    };
                    let first = open(cell(0));
                    if (1..heads).any(|h| open(cell(h)) != first) {
                        return Err(no_mask("the mask differs between heads".into()));
                    }
                    match first {
                        Some(open) => bits[(b * sizes.tokens + t) * slots + s] &= open,
                        None => return Err(no_mask(format!("adds {} to a score", cell(0)))),
                    }
                    is_bias |= matches!(term.effect, MaskEffect::Add(_))
                        && first == Some(true)
                        && (0..heads).any(|h| cell(h) != 0.0);
                }
            }
        }
        if let (true, MaskEffect::Add(factor)) = (is_bias, term.effect) {
            let own = Bias::new(heads, [sizes.batch, sizes.tokens, slots], |h, at| {
                (values[place(h, at)] * factor.get()) as f32
            });
            let dtype = tensor.dtype();
            bias = Some(match bias.take() {
                Some(other) => other.plus(own, dtype).map_err(no_mask)?,
                None => own.in_type(dtype),
            });
        }
    }
    Ok(Allowed { slots, bits, bias })
}
