//! Passes over a whole vocabulary, compiled for the machine's widest vectors.
//!
//! The results do not depend on the width: nothing is fused or reordered, and every lane computes the same as scalar code.

/// Floats processed together.
pub const BLOCK: usize = 32;

/// Runs `pass`, which must be a closure around `#[inline(always)]` code, compiled for AVX2 if the machine has it.
#[inline(always)]
pub fn vectors<R>(pass: impl FnOnce() -> R) -> R {
    #[cfg(target_arch = "x86_64")]
    {
        #[target_feature(enable = "avx2")]
        fn avx2<R>(pass: impl FnOnce() -> R) -> R {
            pass()
        }
        if std::arch::is_x86_feature_detected!("avx2") {
            // SAFETY: the machine has AVX2.
            return unsafe { avx2(pass) };
        }
    }
    pass()
}

/// Whether there is no NaN and no infinity.
#[inline(always)]
pub fn all_finite(logits: &[f32]) -> bool {
    // Zero times a finite number is zero, times anything else it is NaN, which stays in every sum.
    let mut lanes = [0.0; BLOCK];
    let blocks = logits.chunks_exact(BLOCK);
    let rest = blocks.remainder();
    for block in blocks {
        for i in 0..BLOCK {
            lanes[i] += block[i] * 0.0;
        }
    }
    lanes.iter().all(|l| *l == 0.0) && rest.iter().all(|l| l.is_finite())
}

/// The largest; the least f32 of none.
#[inline(always)]
pub fn max(logits: &[f32]) -> f32 {
    let mut lanes = [f32::MIN; BLOCK];
    let blocks = logits.chunks_exact(BLOCK);
    let rest = blocks.remainder();
    for block in blocks {
        for i in 0..BLOCK {
            lanes[i] = if block[i] > lanes[i] { block[i] } else { lanes[i] };
        }
    }
    lanes.iter().chain(rest).copied().fold(f32::MIN, f32::max)
}

/// Whether one is at least `floor`.
#[inline(always)]
fn has(logits: &[f32], floor: f32) -> bool {
    // No early exit, which would keep this from being a few vector operations.
    let mut any = false;
    for logit in logits {
        any |= *logit >= floor;
    }
    any
}

/// The first block from `block` on that has a logit of at least `floor`.
#[inline(always)]
pub fn block_with(logits: &[f32], block: usize, floor: f32) -> Option<usize> {
    let rest = logits.get(block * BLOCK..)?;
    let blocks = rest.chunks_exact(BLOCK);
    let (tail, whole) = (blocks.remainder(), blocks.len());
    for (i, b) in blocks.enumerate() {
        if has(b, floor) {
            return Some(block + i);
        }
    }
    has(tail, floor).then_some(block + whole)
}

/// Keeps those that are at least `floor`, and stores their indices in `ids`, which must be empty.
#[inline(always)]
pub fn compress_from(logits: &mut Vec<f32>, ids: &mut Vec<u32>, floor: f32) {
    // Nothing is below it: padding of the last step would be kept as well.
    if floor == f32::NEG_INFINITY {
        ids.extend(0..logits.len() as u32);
        return;
    }
    // Small enough that one kept logit does not force many others to be checked individually.
    const STEP: usize = 8;
    let mut kept = 0;
    let mut from = 0;
    while let Some(block) = block_with(logits, from, floor) {
        from = block + 1;
        let end = (from * BLOCK).min(logits.len());
        for start in (block * BLOCK..end).step_by(STEP) {
            let mut step = [f32::NEG_INFINITY; STEP];
            match logits.get(start..start + STEP) {
                Some(whole) => step.copy_from_slice(whole),
                None => step[..end - start].copy_from_slice(&logits[start..end]),
            }
            let mut any = false;
            for i in 0..STEP {
                any |= step[i] >= floor;
            }
            if !any {
                continue;
            }
            // Every logit is written and the position advances only for kept ones: no branch misprediction.
            let mut places = [0; STEP];
            let mut n = 0;
            for i in 0..STEP {
                let logit = step[i];
                step[n] = logit;
                places[n] = (start + i) as u32;
                n += usize::from(logit >= floor);
            }
            logits[kept..kept + n].copy_from_slice(&step[..n]);
            ids.extend_from_slice(&places[..n]);
            kept += n;
        }
    }
    logits.truncate(kept);
}

/// Results of one pass over all logits.
#[derive(Clone, Copy, Debug)]
pub struct Spread {
    pub min: f32,
    pub max: f32,
    /// Not a number, or infinite, if a square leaves the range of f32.
    pub variance: f64,
}

/// Extremes and variance of at least one logit.
#[inline(always)]
pub fn spread(logits: &[f32]) -> Spread {
    // Distances from a middling logit, so that squares do not cancel.
    let (a, b, c) = (logits[0], logits[logits.len() / 2], logits[logits.len() - 1]);
    let around = a.max(b).min(c).max(a.min(b));
    // Short runs in f32, summed in f64: precise enough, and as fast as f32.
    const RUN: usize = 16 * BLOCK;
    let (mut sum, mut squares) = (0.0, 0.0);
    let (mut low, mut high) = ([f32::MAX; LANES], [f32::MIN; LANES]);
    for run in logits.chunks(RUN) {
        let (mut s, mut q) = ([0.0f32; LANES], [0.0f32; LANES]);
        let blocks = run.chunks_exact(LANES);
        let rest = blocks.remainder();
        for block in blocks {
            for i in 0..LANES {
                let d = block[i] - around;
                s[i] += d;
                q[i] += d * d;
                low[i] = if block[i] < low[i] { block[i] } else { low[i] };
                high[i] = if block[i] > high[i] { block[i] } else { high[i] };
            }
        }
        for (i, logit) in rest.iter().enumerate() {
            let d = logit - around;
            s[i] += d;
            q[i] += d * d;
            low[i] = low[i].min(*logit);
            high[i] = high[i].max(*logit);
        }
        sum += s.iter().map(|x| f64::from(*x)).sum::<f64>();
        squares += q.iter().map(|x| f64::from(*x)).sum::<f64>();
    }
    let n = logits.len() as f64;
    Spread {
        min: low.into_iter().fold(f32::MAX, f32::min),
        max: high.into_iter().fold(f32::MIN, f32::max),
        variance: squares / n - (sum / n) * (sum / n),
    }
}

/// Accumulators of a pass that needs several of them: as many as stay in registers.
const LANES: usize = 16;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_floor_below_everything_keeps_what_there_is() {
        for n in [1, 7, 8, 249] {
            let mut logits: Vec<f32> = (0..n).map(|i| i as f32).collect();
            let mut ids = Vec::new();
            vectors(|| compress_from(&mut logits, &mut ids, f32::NEG_INFINITY));
            assert_eq!((logits.len(), ids.len()), (n, n));
            assert_eq!(ids.last(), Some(&(n as u32 - 1)));
        }
    }

    #[test]
    fn passes_look_at_every_logit() {
        for n in [1, 31, 32, 33, 64, 513, 1000] {
            let logits: Vec<f32> = (0..n).map(|i| (i * 37 % 101) as f32 - 50.0).collect();
            let largest = logits.iter().copied().fold(f32::MIN, f32::max);
            assert_eq!(vectors(|| max(&logits)), largest);
            assert!(vectors(|| all_finite(&logits)));
            let spread = vectors(|| spread(&logits));
            let least = logits.iter().copied().fold(f32::MAX, f32::min);
            assert_eq!((spread.min, spread.max), (least, largest));
            let mean = logits.iter().map(|l| f64::from(*l)).sum::<f64>() / n as f64;
            let variance = logits.iter().map(|l| (f64::from(*l) - mean).powi(2)).sum::<f64>() / n as f64;
            assert!(
                (spread.variance - variance).abs() <= 1e-5 * variance,
                "{spread:?} {variance}"
            );
            for floor in [-50.0, 0.0, 49.5, 51.0] {
                let expected: Vec<u32> = (0..n as u32).filter(|i| logits[*i as usize] >= floor).collect();
                let (mut kept, mut ids) = (logits.clone(), Vec::new());
                vectors(|| compress_from(&mut kept, &mut ids, floor));
                assert_eq!(ids, expected);
                assert!(kept.iter().zip(&ids).all(|(l, id)| *l == logits[*id as usize]) && kept.len() == ids.len());
            }
            for at in [0, n / 2, n - 1] {
                for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
                    let mut logits = logits.clone();
                    logits[at] = bad;
                    assert!(!vectors(|| all_finite(&logits)), "{n} {at}");
                }
                let mut logits = logits.clone();
                logits[at] = 1000.0;
                for from in 0..=n / BLOCK + 1 {
                    let found = vectors(|| block_with(&logits, from, 999.0));
                    assert_eq!(found, (from <= at / BLOCK).then_some(at / BLOCK), "{n} {at} {from}");
                }
            }
        }
    }
}
