//! The function between the matrices of an expert, identified by its values.

use super::trial::agree;
use crate::graph::eval::gated;
use crate::graph::op::{ExpertActivation, Gating, Op};
use crate::graph::{Graph, NodeId};

/// The places of gate and up in the results of the first products.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Layout {
    /// There is no up.
    Alone,
    /// Two products; the gate is this one.
    Apart { gate: usize },
    /// One product of both, as halves or `interleaved`; the gate is this one of them.
    Joined { interleaved: bool, gate: usize },
}

/// Constants and attributes of nodes: possible factors, addends and bounds of the function.
pub fn scalars(graph: &Graph, nodes: &[NodeId]) -> Vec<f64> {
    let mut found = Vec::new();
    for id in nodes {
        let node = graph.node(*id);
        if let Op::Swish { alpha } = node.op {
            found.push(f64::from(alpha));
        }
        for constant in node.inputs.iter().flatten().filter_map(|v| graph.constant(*v)) {
            if constant.len() == 1
                && constant.dtype().is_float()
                && let Some(number) = constant.materialize().ok().and_then(|t| t.scalar())
            {
                found.push(number);
            }
        }
    }
    found.sort_by(f64::total_cmp);
    found.dedup();
    found
}

/// The function and layout by which `hidden` follows from the results of the first products, all with this many rows.
/// The `known` one is tested first.
pub fn recognize(
    known: Option<&(Gating, Layout)>,
    ends: &[Vec<f64>],
    hidden: &[f64],
    scalars: &[f64],
    tolerance: f64,
    rows: usize,
) -> Option<(Gating, Layout)> {
    let columns = hidden.len().checked_div(rows).filter(|n| *n > 0)?;
    let fits = |(gating, layout): &(Gating, Layout)| {
        let Some((gate, up)) = operands(ends, layout, rows, columns) else {
            return false;
        };
        let wanted: Vec<f64> = (0..hidden.len())
            .map(|i| gated(gating, gate[i], up.as_ref().map(|up| up[i])))
            .collect();
        agree(hidden, &wanted, tolerance)
    };
    if let Some(known) = known.filter(|known| fits(known)) {
        return Some(known.clone());
    }
    let wide = ends[0].len() / rows;
    let layouts: Vec<Layout> = match ends {
        [_] if wide == columns => vec![Layout::Alone],
        [_] if wide == 2 * columns => [false, true]
            .into_iter()
            .flat_map(|interleaved| [0, 1].map(|gate| Layout::Joined { interleaved, gate }))
            .collect(),
        [_, _] => vec![Layout::Apart { gate: 0 }, Layout::Apart { gate: 1 }],
        _ => return None,
    };
    let with = |first: f64| std::iter::once(first).chain(scalars.iter().copied());
    for layout in layouts {
        for activation in [
            ExpertActivation::Swish,
            ExpertActivation::Gelu,
            ExpertActivation::GeluTanh,
            ExpertActivation::Relu,
            ExpertActivation::ReluSquared,
        ] {
            let alphas: Vec<f64> = match activation {
                ExpertActivation::Swish => with(1.0).collect(),
                _ => vec![1.0],
            };
            let betas: Vec<f64> = match layout {
                Layout::Alone => vec![0.0],
                _ => with(0.0).collect(),
            };
            for limit in with(0.0).filter(|limit| *limit >= 0.0) {
                for alpha in &alphas {
                    for beta in &betas {
                        let gating = Gating {
                            activation,
                            alpha: *alpha as f32,
                            beta: *beta as f32,
                            limit: limit as f32,
                        };
                        let candidate = (gating, layout.clone());
                        if fits(&candidate) {
                            return Some(candidate);
                        }
                    }
                }
            }
        }
    }
    None
}

/// Gate and up, `[rows, columns]` each.
fn operands(ends: &[Vec<f64>], layout: &Layout, rows: usize, columns: usize) -> Option<(Vec<f64>, Option<Vec<f64>>)> {
    let whole = rows * columns;
    match layout {
        Layout::Alone => (ends[0].len() == whole).then(|| (ends[0].clone(), None)),
        Layout::Apart { gate } => {
            let fits = ends.len() == 2 && ends.iter().all(|end| end.len() == whole);
            fits.then(|| (ends[*gate].clone(), Some(ends[1 - gate].clone())))
        }
        Layout::Joined { interleaved, gate } => {
            let part = |which: usize| -> Vec<f64> {
                let element = |i: usize| {
                    let (row, column) = (i / columns, i % columns);
                    let at = match interleaved {
                        true => 2 * column + which,
                        false => which * columns + column,
                    };
                    ends[0][row * 2 * columns + at]
                };
                (0..whole).map(element).collect()
            };
            (ends[0].len() == 2 * whole).then(|| (part(*gate), Some(part(1 - gate))))
        }
    }
}
