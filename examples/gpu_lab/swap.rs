//! Replaces the weights of a loaded package: measures the time and checks the results.

use std::path::Path;
use std::time::Instant;

use lapidary::package::Package;
use serde_json::{Value, json};

use crate::Outcome;
use crate::drive::{Driver, ids, open};

/// Tokens of the prompt, and of the steps after it.
const PROMPT: usize = 100;
const STEPS: usize = 8;

/// Logits after the prompt and each step, from an empty cache.
fn rows(driver: &mut Driver, vocabulary: usize) -> Outcome<Vec<f32>> {
    driver.begin();
    driver.feed(&ids(PROMPT, vocabulary))?;
    let mut all = driver.logits().to_vec();
    for token in ids(STEPS, vocabulary) {
        driver.feed(&[token])?;
        all.extend_from_slice(driver.logits());
    }
    Ok(all)
}

fn farthest(left: &[f32], right: &[f32]) -> f32 {
    assert_eq!(left.len(), right.len());
    let pairs = left.iter().zip(right);
    // NaN counts as infinitely far.
    pairs.fold(
        0.0,
        |most, (l, r)| if (l - r).abs() <= most { most } else { (l - r).abs() },
    )
}

/// Swaps to the weights of `other` and back, `times` times. `equal`: after every swap the logits are bit-identical to
/// those of a fresh session with the other package, and after every swap back to those before. `ok`: the same within a
/// thousandth of the difference between the two sets, in case a kernel adds in no fixed order.
pub fn swap(path: &Path, other: &Path, times: usize) -> Outcome<Value> {
    let start = Instant::now();
    let (package, mut device) = open(path)?;
    let vocabulary = package.vocabulary()?;
    device.prepare(PROMPT, PROMPT + STEPS)?;
    let load = start.elapsed();
    let mut driver = Driver::new(&package, device);
    let before = rows(&mut driver, vocabulary)?;

    let theirs = Package::open(other)?;
    let same = package.manifest.weights.set_hash == theirs.manifest.weights.set_hash;
    let (mut there, mut back) = (Vec::new(), Vec::new());
    let (mut swapped, mut returned) = (Vec::new(), Vec::new());
    for _ in 0..times {
        for (package, times, logits) in [
            (&theirs, &mut there, &mut swapped),
            (&package, &mut back, &mut returned),
        ] {
            let start = Instant::now();
            let done = driver.device().swap(package)?;
            times.push(json!({"seconds": start.elapsed().as_secs_f64(), "of": done}));
            logits.push(rows(&mut driver, vocabulary)?);
        }
    }
    let memory = driver.device().memory();
    drop(driver);

    let start = Instant::now();
    let (package, mut device) = open(other)?;
    device.prepare(PROMPT, PROMPT + STEPS)?;
    let fresh_load = start.elapsed();
    let fresh = rows(&mut Driver::new(&package, device), vocabulary)?;
    let worst =
        |found: &[Vec<f32>], wanted: &[f32]| found.iter().map(|rows| farthest(rows, wanted)).fold(0.0, f32::max);
    let (to_fresh, to_before) = (worst(&swapped, &fresh), worst(&returned, &before));
    let between = farthest(&before, &fresh);
    Ok(json!({
        "same_set": same,
        "ok": same == (between == 0.0) && to_fresh.max(to_before) <= between / 1000.0,
        "equal": to_fresh == 0.0 && to_before == 0.0,
        "largest_difference": {"swapped_to_fresh": to_fresh, "returned_to_before": to_before, "between_the_sets": between},
        "load_s": load.as_secs_f64(), "fresh_load_s": fresh_load.as_secs_f64(),
        "there": there, "back": back, "memory": memory,
    }))
}
