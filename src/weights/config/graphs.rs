//! Compares the properties of two graphs for which weights are trained: two exports of one model agree on them,
//! whatever the exporter.

use super::facts::{Facts, Layer};
use super::{Difference, shown};

/// The differences between a source's graph and a package's. Sizes are not compared: weights with other shapes do not
/// fit.
pub fn compare(theirs: &Facts, ours: &Facts) -> Vec<Difference> {
    let mut differences = Vec::new();
    let mut differs = |field: &str, file: String, package: String| {
        let field = field.to_string();
        differences.push(Difference { field, file, package });
    };
    for (file, package) in [
        (&theirs.rms_epsilons, &ours.rms_epsilons),
        (&theirs.layer_epsilons, &ours.layer_epsilons),
    ] {
        // A graph whose norms were not recognized is not compared.
        let known = !file.is_empty() && !package.is_empty();
        let same = |a: &f64| package.iter().any(|b| is_close(*a, *b));
        if known && !file.iter().all(same) {
            let list = |values: &[f64]| values.iter().map(|v| shown(*v)).collect::<Vec<_>>().join(", ");
            differs("epsilon of the norms", list(file), list(package));
        }
    }
    let names = |facts: &Facts| {
        facts
            .activations
            .iter()
            .map(|a| a.name())
            .collect::<Vec<_>>()
            .join(", ")
    };
    let known = !theirs.activations.is_empty() && !ours.activations.is_empty();
    if known && theirs.activations != ours.activations {
        differs("activation", names(theirs), names(ours));
    }
    let cap = |cap: Option<f64>| cap.map_or("none".to_string(), shown);
    if !is_close_option(theirs.logits_softcap, ours.logits_softcap) {
        differs(
            "soft cap of the logits",
            cap(theirs.logits_softcap),
            cap(ours.logits_softcap),
        );
    }
    for (i, (file, package)) in theirs.layers.iter().zip(&ours.layers).enumerate() {
        if !is_close_option(file.softcap, package.softcap) {
            differs(
                &format!("soft cap of layer {i}"),
                cap(file.softcap),
                cap(package.softcap),
            );
        }
        if !rotate_alike(file, package) {
            let table = |layer: &Layer| {
                layer
                    .rotary
                    .as_ref()
                    .map_or("none".to_string(), |table| table.describe())
            };
            differs(&format!("rotary base of layer {i}"), table(file), table(package));
            // One layer is enough.
            break;
        }
    }
    differences
}

fn rotate_alike(a: &Layer, b: &Layer) -> bool {
    match (&a.rotary, &b.rotary) {
        (Some(a), Some(b)) => a.agrees(b),
        // Rotation that was not recognized is not compared.
        _ => true,
    }
}

/// Half precision rounds.
fn is_close(a: f64, b: f64) -> bool {
    (a - b).abs() <= 1e-2 * a.abs().max(b.abs())
}

fn is_close_option(a: Option<f64>, b: Option<f64>) -> bool {
    match (a, b) {
        (Some(a), Some(b)) => is_close(a, b),
        (a, b) => a.is_none() == b.is_none(),
    }
}
