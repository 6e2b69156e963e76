//! The weights of all experts in the canonical form.

use super::body::Instance;
use super::gating::Layout;
use super::products::Weight;
use crate::graph::Constant;

/// The concatenated matrices gate, up and down of all experts, and their biases.
#[allow(clippy::type_complexity, reason = "matrices and biases, each of three")]
pub(super) fn collect(
    instances: &[Instance],
    order: &[usize],
    layout: &Layout,
) -> Result<([Option<Constant>; 3], [Option<Constant>; 3]), String> {
    // Instances by expert.
    let mut by_expert: Vec<&Instance> = instances.iter().collect();
    if instances.len() > 1 {
        let mut sorted = order.to_vec();
        sorted.sort_unstable();
        if sorted.iter().enumerate().any(|(i, expert)| i != *expert) {
            return Err("it is not clear which expert is which".to_string());
        }
        for (instance, expert) in instances.iter().zip(order) {
            by_expert[*expert] = instance;
        }
    }
    let matrices = |part: &dyn Fn(&Instance) -> Option<Weight>, vector: bool| -> Option<Constant> {
        let all = by_expert
            .iter()
            .map(|instance| part(instance).map(|weight| weight.constant));
        let all = all.collect::<Option<Vec<_>>>()?;
        let rows = |constant: &Constant| match (vector, constant.shape()) {
            (true, _) => constant.reshaped(vec![constant.len()]),
            (false, [count, rows, columns]) => constant.reshaped(vec![count * rows, *columns]),
            _ => constant.clone(),
        };
        let all: Vec<Constant> = all.iter().map(rows).collect();
        Some(match &all[..] {
            [only] => only.clone(),
            several => Constant::concat(several, 0),
        })
    };
    let experts = match instances.len() {
        1 => instances[0].down.stacked().unwrap_or(1),
        n => n,
    };
    let down = matrices(&|i| Some(i.down.weight.clone()), false);
    let of_down = matrices(&|i| i.down.bias.clone(), true);
    let first = |at: usize, vector: bool| {
        matrices(
            &|i: &Instance| {
                let product = &i.first[at];
                match vector {
                    true => product.bias.clone(),
                    false => Some(product.weight.clone()),
                }
            },
            vector,
        )
    };
    let named = |constant: Option<Constant>| constant.map(super::named);
    let ([gate, up], [of_gate, of_up]) = match layout {
        Layout::Alone => ([first(0, false), None], [first(0, true), None]),
        Layout::Apart { gate } => (
            [first(*gate, false), first(1 - gate, false)],
            [first(*gate, true), first(1 - gate, true)],
        ),
        Layout::Joined { interleaved, gate } => {
            let parts = |constant: Option<Constant>| {
                let half = |constant: &Constant, which| constant.half_of_rows(experts, *interleaved, which);
                let of = |which| constant.as_ref().map(|constant| half(constant, which));
                [of(*gate), of(1 - gate)]
            };
            (parts(first(0, false)), parts(first(0, true)))
        }
    };
    Ok((
        [named(gate), named(up), named(down)],
        [named(of_gate), named(of_up), named(of_down)],
    ))
}
