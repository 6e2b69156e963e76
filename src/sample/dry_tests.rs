//! DRY: the published vectors, the cases they miss, and a quadratic version that follows the definition.

use proptest::prelude::*;

use super::*;
use crate::sample::{Chain, Settings, Stage};

fn settings(multiplier: f32, base: f32, allowed: usize, last_n: Option<usize>, breakers: &[Vec<u32>]) -> DrySettings {
    DrySettings {
        multiplier,
        base,
        allowed_length: allowed,
        penalty_last_n: last_n,
        breakers: Arc::new(Breakers::from_ids(breakers)),
    }
}

/// Probabilities after DRY, from equal ones.
fn probabilities(vocabulary: usize, history: &[u32], dry: DrySettings) -> Vec<f64> {
    let mut chain = Chain::new(&Settings {
        order: vec![Stage::Dry],
        dry,
        ..Settings::neutral()
    })
    .unwrap();
    let logits = vec![(1.0 / vocabulary as f32).ln(); vocabulary];
    chain.probabilities(&logits, history).unwrap()
}

/// The penalty of each token's logit.
fn losses(vocabulary: usize, history: &[u32], dry: &DrySettings) -> Vec<f32> {
    let mut candidates = Candidates::default();
    candidates.fill(&vec![0.0; vocabulary]).unwrap();
    Dry::new(dry.clone()).apply(&mut candidates, history);
    candidates.logits().iter().map(|l| -l).collect()
}

fn assert_near(found: &[f64], expected: &[f64]) {
    assert_eq!(found.len(), expected.len());
    let near = found.iter().zip(expected).all(|(f, e)| (f - e).abs() < 1e-5);
    assert!(near, "{found:?} is not {expected:?}");
}

/// llama.cpp's `tests/test-sampling.cpp`.
#[test]
fn the_published_vectors() {
    let check = |expected: &[f64], history: &[u32], dry| {
        assert_near(&probabilities(expected.len(), history, dry), expected);
    };
    check(&[0.25; 4], &[0, 1], settings(1.0, 1.1, 2, Some(4), &[]));
    check(
        &[0.296923, 0.296923, 0.109232, 0.296923],
        &[0, 1, 2, 0, 1],
        settings(1.0, 1.1, 2, Some(5), &[]),
    );
    check(
        &[0.2; 5],
        &[0, 1, 3, 4, 0, 1],
        settings(1.0, 1.1, 2, Some(6), &[vec![3]]),
    );
    check(
        &[0.241818, 0.241818, 0.032727, 0.241818, 0.241818],
        &[0, 1, 2, 0, 1],
        settings(2.0, 1.1, 2, Some(5), &[]),
    );
    check(&[0.2; 5], &[0, 1, 2, 3, 4, 0, 1], settings(1.0, 1.1, 4, Some(7), &[]));
}

#[test]
fn the_exponent_counts_from_the_allowed_length_and_the_longest_match_wins() {
    // "1 2 3" came before, followed by 4; "3" alone also by 5, "2 3" also by 6.
    let history = [1, 2, 3, 4, 9, 2, 3, 6, 3, 5, 1, 2, 3];
    let lost = losses(10, &history, &settings(0.8, 1.75, 1, None, &[]));
    let expected = [(4, 0.8 * 1.75f32.powi(2)), (6, 0.8 * 1.75), (5, 0.8)];
    for id in 0..10 {
        let e = expected.iter().find(|(i, _)| *i == id).map_or(0.0, |(_, e)| *e);
        assert!((lost[id] - e).abs() < 1e-6, "{id}: {} {e}", lost[id]);
    }
    // Nested repeats: after "a b a b a b" an "a" continues four tokens, and two, and counts once.
    let lost = losses(3, &[0, 1, 0, 1, 0, 1], &settings(1.0, 2.0, 2, None, &[]));
    assert_eq!(lost, [4.0, 0.0, 0.0]);
}

#[test]
fn breakers_end_a_match_and_are_never_penalised() {
    let history = [7, 1, 2, 3, 7, 1, 2];
    let lost = |breakers: &[Vec<u32>]| losses(8, &history, &settings(1.0, 2.0, 2, None, breakers))[3];
    assert_eq!(lost(&[]), 2.0);
    // 7 ends the match after "1 2"; after a breaker at 1 too little is left.
    assert_eq!(lost(&[vec![7]]), 1.0);
    assert_eq!(lost(&[vec![1]]), 0.0);
    // A breaker of several tokens: "7 1" leaves one token; "7 2" is not there. 3 is exempt alone, not as a head.
    assert_eq!(lost(&[vec![7, 1]]), 0.0);
    assert_eq!(lost(&[vec![7, 2]]), 2.0);
    assert_eq!(lost(&[vec![3]]), 0.0);
    assert_eq!(lost(&[vec![3, 4]]), 2.0);
}

#[test]
fn the_exponent_is_clamped() {
    let long = vec![0; 5000];
    let dry = settings(1.0, 1.75, 2, None, &[]);
    assert_eq!(dry.largest_exponent(), Some(158));
    let lost = losses(2, &long, &dry);
    assert_eq!(lost, [1.75f32.powf(158.0), 0.0]);
    assert!(lost[0].is_finite());
    // A multiplier can still push it over: the logit stays a number, and the token a candidate.
    assert_eq!(losses(2, &long, &settings(1e9, 1.75, 2, None, &[]))[0], f32::MAX);
    let p = probabilities(1, &long, settings(1e9, 1.75, 2, None, &[]));
    assert_eq!(p, [1.0]);
    // Up to 1.000001 nothing is clamped, since nothing can overflow.
    assert_eq!(settings(1.0, 1.0, 2, None, &[]).largest_exponent(), None);
    assert_eq!(losses(2, &long, &settings(3.0, 1.0, 2, None, &[]))[0], 3.0);
}

#[test]
fn the_window_ends_what_is_seen() {
    let history = [1, 2, 3, 5, 1, 2];
    let lost = |last_n| losses(6, &history, &settings(1.0, 2.0, 2, last_n, &[]))[3];
    assert_eq!(lost(None), 1.0);
    assert_eq!(lost(Some(6)), 1.0);
    assert_eq!(lost(Some(100)), 1.0);
    // Without the first token only "2" repeats.
    assert_eq!(lost(Some(5)), 0.0);
    assert_eq!(lost(Some(0)), 0.0);
}

#[test]
fn off_is_off_and_what_is_unknown_does_no_harm() {
    let history = [0, 1, 2, 0, 1];
    for (multiplier, base, allowed) in [(0.0, 2.0, 2), (1.0, 0.99, 2), (1.0, 2.0, 5), (1.0, 2.0, 99)] {
        let lost = losses(4, &history, &settings(multiplier, base, allowed, None, &[]));
        assert_eq!(lost, [0.0; 4], "{multiplier} {base} {allowed}");
    }
    // Ids beyond the vocabulary take part in matches, but are never penalized.
    let history = [900, u32::MAX, 1, 900, u32::MAX];
    assert_eq!(losses(2, &history, &settings(1.0, 2.0, 2, None, &[])), [0.0, 1.0]);
    let history = [0, 1, 900, 0, 1];
    assert_eq!(losses(2, &history, &settings(1.0, 2.0, 2, None, &[])), [0.0; 2]);
    assert_eq!(losses(2, &[], &settings(1.0, 2.0, 0, None, &[])), [0.0; 2]);
}

#[test]
fn dropped_candidates_change_nothing_for_the_others() {
    let history = [0, 1, 2, 0, 1];
    let mut candidates = Candidates::default();
    candidates.fill(&[0.0; 5]).unwrap();
    candidates.retain(|c| c.id >= 2);
    Dry::new(settings(1.0, 2.0, 2, None, &[])).apply(&mut candidates, &history);
    assert_eq!(candidates.logits(), [-1.0, 0.0, 0.0]);
}

/// The definition, in quadratic time.
fn naive(vocabulary: usize, history: &[u32], dry: &DrySettings, breakers: &[Vec<u32>]) -> Vec<f32> {
    let mut lost = vec![0.0; vocabulary];
    let last_n = dry.penalty_last_n.unwrap_or(history.len()).min(history.len());
    let window = &history[history.len() - last_n..];
    if dry.multiplier == 0.0 || dry.base < 1.0 || window.len() <= dry.allowed_length {
        return lost;
    }
    // Walking back from the end, the nearest breaker limits the suffix.
    let at = |i: usize| {
        breakers
            .iter()
            .filter(move |b| window[i..].starts_with(b))
            .map(Vec::len)
            .max()
    };
    let free = (0..window.len()).rev().find_map(|i| Some(window.len() - i - at(i)?));
    let free = free.unwrap_or(window.len());
    if free < dry.allowed_length {
        return lost;
    }
    for token in 0..vocabulary as u32 {
        if breakers.contains(&vec![token]) {
            continue;
        }
        // At least one token stands before what follows it.
        let ends = (1..window.len()).filter(|end| window[*end] == token);
        let same = |end: usize| {
            (0..free.min(end))
                .take_while(|i| window[end - 1 - i] == window[window.len() - 1 - i])
                .count()
        };
        let longest = ends.map(same).filter(|n| *n >= dry.allowed_length).max();
        if let Some(n) = longest {
            let largest = if dry.base > 1.000_001 {
                (88.722_84 / dry.base.ln()) as usize
            } else {
                usize::MAX
            };
            let exponent = (n - dry.allowed_length).min(largest);
            lost[token as usize] = dry.multiplier * dry.base.powf(exponent as f32);
        }
    }
    lost
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2000, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn as_the_definition_says(
        period in proptest::collection::vec(0u32..5, 1..12),
        noise in proptest::collection::vec(0u32..6, 0..60),
        repeats in 0usize..8,
        breakers in proptest::collection::vec(proptest::collection::vec(0u32..5, 1..4), 0..3),
        allowed in 0usize..5,
        last_n in proptest::option::of(0usize..90),
        base in prop_oneof![Just(1.0f32), Just(1.1), Just(1.75), Just(60.0)],
    ) {
        let history: Vec<u32> = noise.iter().copied().chain(period.repeat(repeats)).chain(noise.iter().copied().take(9)).collect();
        let dry = settings(0.8, base, allowed, last_n, &breakers);
        let (fast, slow) = (losses(5, &history, &dry), naive(5, &history, &dry, &breakers));
        for (f, s) in fast.iter().zip(&slow) {
            prop_assert!((f - s).abs() <= 1e-5 * s.abs(), "{fast:?} {slow:?}");
        }
    }
}

#[test]
fn time_is_linear_in_the_worst_cases() {
    // Counts of comparisons cannot be seen from outside; a quadratic version would take minutes here.
    for period in [1, 2, 3] {
        let history: Vec<u32> = (0..1_000_000).map(|i| i % period).collect();
        let mut matches = Vec::new();
        suffix_matches(&history, history.len(), &mut matches);
        assert_eq!(matches[period as usize] as usize, history.len() - period as usize);
        suffix_matches(&history, 1000, &mut matches);
        assert_eq!(matches[period as usize], 1000);
    }
}
