//! What a mask lets each token attend to, found by executing it.
//!
//! Exporters build masks from ranges, comparisons, gathers, padding and sentinels in many ways; all that counts is which
//! slots of which rows end up masked. A mask is accepted if it is causal, perhaps with a sliding window, at every size
//! tried, one of which is longer than any number in the mask's own arithmetic could be as a window.

use std::cell::RefCell;
use std::collections::{HashMap, HashSet};

use super::find::{FoundAttention, MaskTerm};
use crate::graph::ValueId;
use crate::passes::dependence::Dependence;
use crate::passes::partial_eval::{PartialEvaluator, Stuck, Trial};
use crate::tensor::DType;

/// An added value, or one put in place of a score, from which on nothing is left after the softmax. Sentinels seen:
/// -inf, the smallest f32 and f16 numbers, -1e9, -1e4.
pub const MASKED: f64 = -9000.0;

/// Windows longer than this are taken for none.
const LONGEST_WINDOW: i64 = 1 << 20;

/// Which slots may be attended to: `[batch, tokens, slots]`.
struct Allowed {
    slots: usize,
    bits: Vec<bool>,
}

/// Recognises masks, each distinct one once.
#[derive(Default)]
pub struct Masks {
    known: RefCell<HashMap<Vec<MaskTerm>, Found>>,
}

/// The window of a mask, or what is wrong with it.
type Found = Result<Option<usize>, String>;

impl Masks {
    /// The window of a attention's mask: `None` is plain causal. An error says what is wrong with it.
    pub fn window(
        &self,
        evaluator: &PartialEvaluator<'_>,
        attention: &FoundAttention,
    ) -> Result<Option<usize>, String> {
        if let Some(known) = self.known.borrow().get(&attention.mask) {
            return known.clone();
        }
        let found = window(evaluator, attention);
        self.known.borrow_mut().insert(attention.mask.clone(), found.clone());
        found
    }
}

fn window(evaluator: &PartialEvaluator<'_>, attention: &FoundAttention) -> Result<Option<usize>, String> {
    let name = |id: ValueId| evaluator.graph.value(id).name.clone();
    if let Some(term) = attention
        .mask
        .iter()
        .find(|t| evaluator.dependence(t.value()) == Dependence::Data)
    {
        return Err(format!(
            "the mask {} is not a function of positions",
            name(term.value())
        ));
    }
    let tokens = evaluator.roles.tokens.unwrap_or(3);
    let longest = longest_constant(evaluator, attention) as usize + 2;
    let past = match evaluator.roles.capacity {
        Some(capacity) => longest.min(capacity.saturating_sub(tokens)),
        None => longest,
    };
    let mut far = evaluator.trial(1, past, tokens);
    let mut seen = allowed(evaluator, attention, &far);
    // Some exports can take a prompt or one token after it, but no second part of a prompt: their mask has no meaning
    // for several tokens after a past, and nothing is lost by giving it the causal one.
    let one_by_one = seen.is_err() && tokens > 1;
    if one_by_one {
        far = evaluator.trial(1, past, 1);
        seen = allowed(evaluator, attention, &far);
    }
    let seen = seen.map_err(|stuck| stuck.to_string())?;
    let last = far.sizes.past + far.sizes.tokens - 1;
    let row = &seen.bits[(far.sizes.tokens - 1) * seen.slots..far.sizes.tokens * seen.slots];
    let count = row.iter().filter(|a| **a).count();
    let window = (count <= last).then_some(count);
    if window == Some(0) {
        return Err("its mask hides every slot".into());
    }
    check(&seen, &far, window)?;
    evaluator.forget(&far);
    let mut sizes = vec![(1, 0, 5), (2, 3, 1), (2, 2, 4), (1, 0, 1)];
    if let Some(window) = window {
        sizes.extend([(1, window - 1, 3), (1, 0, window.min(64) + 2)]);
    }
    let fits = |past: usize, tokens: usize| evaluator.roles.capacity.is_none_or(|c| past + tokens <= c);
    for (batch, past, tokens) in sizes {
        if fits(past, evaluator.roles.tokens.unwrap_or(tokens)) && (past == 0 || tokens == 1 || !one_by_one) {
            let trial = evaluator.trial(batch, past, tokens);
            let seen = allowed(evaluator, attention, &trial).map_err(|stuck| stuck.to_string())?;
            check(&seen, &trial, window)?;
        }
    }
    Ok(window)
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

fn allowed(evaluator: &PartialEvaluator<'_>, attention: &FoundAttention, trial: &Trial) -> Result<Allowed, Stuck> {
    let sizes = trial.sizes;
    let slots = match attention.scores {
        Some(scores) => evaluator.dims(trial, scores)?.last().copied().unwrap_or(0),
        None => {
            let dims = evaluator.dims(trial, attention.key)?;
            dims[dims.len().saturating_sub(2)]
        }
    };
    let mut bits = vec![true; sizes.batch * sizes.tokens * slots];
    for term in &attention.mask {
        let tensor = evaluator.eval(trial, term.value())?;
        let stuck = |reason: String| Stuck {
            at: evaluator.graph.value(term.value()).name.clone(),
            reason,
        };
        let shape = tensor.shape();
        let rank = shape.len();
        let axis = |from_end: usize| if from_end <= rank { shape[rank - from_end] } else { 1 };
        let (columns, rows) = (axis(1), axis(2));
        let heads: usize = if rank > 3 {
            shape[1..rank - 2].iter().product()
        } else {
            1
        };
        let batches = if rank > 2 { shape[0] } else { 1 };
        let fits = |have: usize, want: usize| have == 1 || have == want;
        if !fits(columns, slots) || !fits(rows, sizes.tokens) || !(fits(batches, sizes.batch) || rank == 3) {
            return Err(stuck(format!(
                "the mask has the shape {shape:?} where {} sequences, {} tokens and {slots} slots were expected",
                sizes.batch, sizes.tokens
            )));
        }
        let values = tensor.to_f64();
        let is_bool = tensor.dtype() == DType::Bool;
        for b in 0..sizes.batch {
            for t in 0..sizes.tokens {
                for s in 0..slots {
                    let cell = |h: usize| {
                        let at = ((b.min(batches - 1) * heads + h) * rows + t.min(rows - 1)) * columns;
                        values[at + s.min(columns - 1)]
                    };
                    let open = |value: f64| match term {
                        MaskTerm::Keep(_) => Some(value != 0.0),
                        MaskTerm::Drop(_) => Some(value == 0.0),
                        MaskTerm::Add(_) if is_bool => None,
                        MaskTerm::Add(_) if value == 0.0 => Some(true),
                        MaskTerm::Add(_) if value <= MASKED => Some(false),
                        MaskTerm::Add(_) => None,
                    };
                    let first = open(cell(0));
                    if (1..heads).any(|h| open(cell(h)) != first) {
                        return Err(stuck("the mask differs between heads".into()));
                    }
                    match first {
                        Some(open) => bits[(b * sizes.tokens + t) * slots + s] &= open,
                        None => {
                            return Err(stuck(format!(
                                "adds {} to a score; only masks are understood, not biases such as ALiBi",
                                cell(0)
                            )));
                        }
                    }
                }
            }
        }
    }
    Ok(Allowed { slots, bits })
}

/// The largest integer in the arithmetic of the masks: no window can be longer.
fn longest_constant(evaluator: &PartialEvaluator<'_>, attention: &FoundAttention) -> i64 {
    let graph = evaluator.graph;
    let mut stack: Vec<ValueId> = attention.mask.iter().map(|t| t.value()).collect();
    let mut seen: HashSet<ValueId> = stack.iter().copied().collect();
    let mut longest = 8;
    while let Some(id) = stack.pop() {
        if let Some(constant) = graph.constant(id)
            && constant.len() <= 16
            && constant.dtype() != DType::Bool
            && let Ok(tensor) = constant.materialize()
        {
            let windows = tensor.to_f64().into_iter().map(f64::abs);
            let windows = windows.filter(|v| v.fract() == 0.0 && *v <= LONGEST_WINDOW as f64);
            longest = windows.fold(longest, |longest, v| longest.max(v as i64));
        }
        if let Some((_, node)) = graph.def(id) {
            // Lengths come from shapes: what the shapes are of has no part in the mask's arithmetic.
            if matches!(node.op, crate::graph::Op::Shape { .. } | crate::graph::Op::Size) {
                continue;
            }
            stack.extend(node.inputs.iter().flatten().filter(|v| seen.insert(**v)));
        }
    }
    longest
}
