//! The chain as a whole and each sampler in it, against llama.cpp's `tests/test-sampling.cpp` where it has a case.

use super::*;

const FOUR: [f64; 4] = [0.1, 0.2, 0.3, 0.4];

/// Probabilities after the chain, by id, from probabilities.
fn after(probabilities: &[f64], history: &[u32], settings: &Settings) -> Vec<f64> {
    let logits: Vec<f32> = probabilities.iter().map(|p| p.ln() as f32).collect();
    Chain::new(settings).unwrap().probabilities(&logits, history).unwrap()
}

fn assert_after(settings: Settings, history: &[u32], before: &[f64], expected: &[f64]) {
    let found = after(before, history, &settings);
    let near = found.iter().zip(expected).all(|(f, e)| (f - e).abs() < 1e-5);
    assert!(near && found.len() == expected.len(), "{found:?} is not {expected:?}");
}

fn neutral() -> Settings {
    Settings::neutral()
}

fn draws(settings: Settings, logits: &[f32], n: usize) -> Vec<u32> {
    let mut chain = Chain::new(&settings).unwrap();
    (0..n).map(|_| chain.sample(logits, &[]).unwrap()).collect()
}

#[test]
fn temperature() {
    let with = |temperature| Settings {
        temperature,
        ..neutral()
    };
    assert_after(with(1.0), &[], &FOUR, &FOUR);
    assert_after(with(0.0), &[], &FOUR, &[0.0, 0.0, 0.0, 1.0]);
    assert_after(with(1e-30), &[], &FOUR, &[0.0, 0.0, 0.0, 1.0]);
    assert_after(with(0.5), &[], &[0.2, 0.8], &[0.04 / 0.68, 0.64 / 0.68]);
}

#[test]
fn top_k() {
    let with = |top_k| Settings { top_k, ..neutral() };
    assert_after(with(1), &[], &FOUR, &[0.0, 0.0, 0.0, 1.0]);
    assert_after(with(3), &[], &FOUR, &[0.0, 0.22222, 0.33333, 0.44444]);
    assert_after(with(4), &[], &FOUR, &FOUR);
    assert_after(with(0), &[], &FOUR, &FOUR);
    // Among equals the lower ids stay.
    assert_after(with(2), &[], &[0.25; 4], &[0.5, 0.5, 0.0, 0.0]);
}

#[test]
fn top_p() {
    let with = |top_p| Settings { top_p, ..neutral() };
    assert_after(with(0.0), &[], &FOUR, &[0.0, 0.0, 0.0, 1.0]);
    assert_after(with(0.7), &[], &FOUR, &[0.0, 0.0, 0.428571, 0.571429]);
    assert_after(with(0.8), &[], &FOUR, &[0.0, 0.22222, 0.33333, 0.44444]);
    assert_after(with(1.0), &[], &FOUR, &FOUR);
}

#[test]
fn top_p_of_a_flat_vocabulary_needs_more_than_the_first_look() {
    for n in [1000, 5000] {
        let kept = |p: f32| {
            let logits = vec![0.0; n];
            let mut chain = Chain::new(&Settings { top_p: p, ..neutral() }).unwrap();
            let left = chain.probabilities(&logits, &[]).unwrap();
            left.iter().filter(|p| **p > 0.0).count()
        };
        assert_eq!((kept(0.1), kept(0.5), kept(0.9)), (n / 10, n / 2, n * 9 / 10));
        assert_eq!(kept(0.9999999), n);
    }
}

#[test]
fn min_p() {
    let with = |min_p| Settings { min_p, ..neutral() };
    let three = [0.0, 0.2 / 0.9, 0.3 / 0.9, 0.4 / 0.9];
    let two = [0.0, 0.0, 0.3 / 0.7, 0.4 / 0.7];
    assert_after(with(0.0), &[], &FOUR, &FOUR);
    assert_after(with(0.24), &[], &FOUR, &FOUR);
    assert_after(with(0.26), &[], &FOUR, &three);
    assert_after(with(0.49), &[], &FOUR, &three);
    assert_after(with(0.51), &[], &FOUR, &two);
    assert_after(with(0.74), &[], &FOUR, &two);
    assert_after(with(0.76), &[], &FOUR, &[0.0, 0.0, 0.0, 1.0]);
    assert_after(with(1.0), &[], &FOUR, &[0.0, 0.0, 0.0, 1.0]);
}

#[test]
fn typical() {
    let with = |typical_p| Settings { typical_p, ..neutral() };
    assert_after(with(0.5), &[], &[0.97, 0.01, 0.01, 0.01], &[1.0, 0.0, 0.0, 0.0]);
    let third = 1.0 / 3.0;
    assert_after(with(0.5), &[], &[0.4, 0.2, 0.2, 0.2], &[0.0, third, third, third]);
    assert_after(with(1.0), &[], &FOUR, &FOUR);
}

#[test]
fn top_n_sigma() {
    let with = |top_n_sigma| Settings {
        top_n_sigma,
        ..neutral()
    };
    assert_after(with(1.0), &[], &FOUR, &[0.0, 0.0, 0.428571, 0.571429]);
    assert_after(with(0.0), &[], &FOUR, &FOUR);
    assert_after(with(3.0), &[], &FOUR, &FOUR);
    assert_after(with(1.0), &[], &[1.0], &[1.0]);
    // With a top-k after it, whichever is stricter decides.
    let both = |top_n_sigma, top_k| Settings {
        top_k,
        ..with(top_n_sigma)
    };
    assert_after(both(1.0, 3), &[], &FOUR, &[0.0, 0.0, 0.428571, 0.571429]);
    assert_after(both(1.0, 1), &[], &FOUR, &[0.0, 0.0, 0.0, 1.0]);
    assert_after(both(3.0, 3), &[], &FOUR, &[0.0, 0.222222, 0.333333, 0.444444]);
    assert_after(both(1.0, 9), &[], &FOUR, &[0.0, 0.0, 0.428571, 0.571429]);
    // Penalties whose square exceeds f32 stretch the deviation, but drop no other token.
    let mut chain = Chain::new(&with(1.0)).unwrap();
    let mut logits = vec![1.0; 200];
    logits[3..40].fill(-2e38);
    let left = chain.probabilities(&logits, &[]).unwrap();
    assert!(left.iter().filter(|p| **p > 0.0).count() >= 163);
}

#[test]
fn xtc() {
    let falling = [0.4, 0.3, 0.2, 0.1];
    let with = |xtc_threshold| Settings {
        // Certain, for the test.
        xtc_probability: 1.0,
        xtc_threshold,
        ..neutral()
    };
    assert_after(with(0.09), &[], &falling, &[0.0, 0.0, 0.0, 1.0]);
    assert_after(with(0.19), &[], &falling, &[0.0, 0.0, 0.2 / 0.3, 0.1 / 0.3]);
    assert_after(with(0.29), &[], &falling, &[0.0, 0.3 / 0.6, 0.2 / 0.6, 0.1 / 0.6]);
    assert_after(with(0.39), &[], &falling, &falling);
    assert_after(with(0.51), &[], &falling, &falling);
    assert_after(with(0.01), &[], &[1.0], &[1.0]);
    assert_after(with(0.2), &[], &[0.25; 4], &[0.0, 0.0, 0.0, 1.0]);
    // The probability is that of a step being changed.
    let half = Settings {
        xtc_probability: 0.5,
        xtc_threshold: 0.1,
        top_k: 2,
        ..neutral()
    };
    let tokens = draws(half, &[9.0, 8.9, 0.0], 4000);
    let zeros = tokens.iter().filter(|t| **t == 0).count();
    let expected = 4000.0 * 0.5 / (1.0 + (-0.1f64).exp());
    assert!((zeros as f64 - expected).abs() < 120.0, "{zeros} {expected}");
}

#[test]
fn penalties() {
    let fifth = [0.2; 5];
    let repetition = Settings {
        repetition_penalty: 50.0,
        ..neutral()
    };
    assert_after(repetition.clone(), &[0], &fifth, &[0.0, 0.25, 0.25, 0.25, 0.25]);
    assert_after(repetition.clone(), &[0, 1, 2], &fifth, &[0.0, 0.0, 0.0, 0.5, 0.5]);
    assert_after(repetition, &[0, 1, 2, 0, 0], &fifth, &[0.0, 0.0, 0.0, 0.5, 0.5]);
    let both = Settings {
        frequency_penalty: 5.0,
        presence_penalty: 5.0,
        ..neutral()
    };
    assert_after(
        both.clone(),
        &[0],
        &fifth,
        &[0.000011, 0.249997, 0.249997, 0.249997, 0.249997],
    );
    let three = [0.000023, 0.000023, 0.000023, 0.499966, 0.499966];
    assert_after(both.clone(), &[0, 1, 2], &fifth, &three);
    let counted = [0.0, 0.000023, 0.000023, 0.499977, 0.499977];
    assert_after(both.clone(), &[0, 1, 2, 0, 0], &fifth, &counted);
    // The window: the first 0 is out of sight, and ids beyond the vocabulary do no harm.
    let short = Settings {
        penalty_last_n: Some(3),
        ..both.clone()
    };
    assert_after(
        short,
        &[0, 1, 2, 77],
        &fifth,
        &[0.333323, 0.000015, 0.000015, 0.333323, 0.333323],
    );
    let off = Settings {
        penalty_last_n: Some(0),
        ..both
    };
    assert_after(off, &[0, 1], &fifth, &fifth);
}

#[test]
fn repetition_divides_what_is_positive_and_multiplies_the_rest() {
    let settings = Settings {
        repetition_penalty: 2.0,
        ..neutral()
    };
    let found = Chain::new(&settings)
        .unwrap()
        .probabilities(&[2.0, -2.0, 0.0, 1.0], &[0, 1, 2])
        .unwrap();
    let weights = [1f64, -4.0, 0.0, 1.0].map(f64::exp);
    let total: f64 = weights.iter().sum();
    for (f, w) in found.iter().zip(weights) {
        assert!((f - w / total).abs() < 1e-6, "{found:?}");
    }
}

#[test]
fn logit_bias_comes_first_and_can_ban() {
    let with = |bias: &[(u32, f32)]| Settings {
        logit_bias: bias.to_vec(),
        ..neutral()
    };
    let half = [0.5, 0.5];
    assert_after(with(&[(1, 3f32.ln())]), &[], &half, &[0.25, 0.75]);
    assert_after(with(&[(1, f32::NEG_INFINITY), (0, 2.0)]), &[], &half, &[1.0, 0.0]);
    assert_after(with(&[(1, 1.0), (1, 0.0), (7, 5.0)]), &[], &half, &half);
    // Everything banned: the most probable token by the model's own logits.
    let all = [(0, f32::NEG_INFINITY), (1, f32::NEG_INFINITY)];
    assert_after(with(&all), &[], &[0.4, 0.6], &[0.0, 1.0]);
    assert_after(
        Settings {
            temperature: 0.0,
            ..with(&[(0, 9.0)])
        },
        &[],
        &FOUR,
        &[1.0, 0.0, 0.0, 0.0],
    );
}

#[test]
fn mirostat_truncates_by_surprise_and_follows_it() {
    let settings = |tau| Settings {
        mirostat: Some(MirostatSettings { tau, eta: 0.1 }),
        top_k: 1,
        ..neutral()
    };
    // mu begins at 2: a quarter is two bits, so 0.4 and 0.3 stay. Top-k is ignored.
    assert_after(settings(1.0), &[], &FOUR, &[0.0, 0.0, 0.3 / 0.7, 0.4 / 0.7]);
    assert_after(settings(0.01), &[], &FOUR, &[0.0, 0.0, 0.0, 1.0]);
    // Over many draws from a wide distribution the mean surprise comes near the target.
    let logits: Vec<f32> = (0..2000).map(|i| -(i as f32 + 1.0).ln()).collect();
    let total: f64 = logits.iter().map(|l| f64::from(*l).exp()).sum();
    let mut chain = Chain::new(&settings(3.0)).unwrap();
    let mut bits = 0.0;
    for _ in 0..3000 {
        let id = chain.sample(&logits, &[]).unwrap();
        bits += -(f64::from(logits[id as usize]).exp() / total).log2();
    }
    // Surprise is measured among those kept, so over the whole it comes out somewhat higher.
    let mean = bits / 3000.0;
    assert!((2.5..5.0).contains(&mean), "{mean}");
    chain.reset();
    let again = chain.probabilities(&logits, &[]).unwrap();
    assert_eq!(
        again,
        Chain::new(&settings(3.0)).unwrap().probabilities(&logits, &[]).unwrap()
    );
}

#[test]
fn the_order_can_be_chosen() {
    let settings = |order: &[Stage]| Settings {
        order: order.to_vec(),
        temperature: 4.0,
        min_p: 0.6,
        ..neutral()
    };
    // By themselves 0.3 and 0.4 stay; flattened first, all four do.
    let sharp = after(&FOUR, &[], &settings(&[Stage::MinP, Stage::Temperature]));
    assert_eq!(sharp.iter().filter(|p| **p > 0.0).count(), 2);
    let flat = after(&FOUR, &[], &settings(&[Stage::Temperature, Stage::MinP]));
    assert_eq!(flat.iter().filter(|p| **p > 0.0).count(), 4);
    // Omitted samplers are off.
    assert_eq!(after(&FOUR, &[], &settings(&[Stage::Temperature])), flat);
    // Penalties after a filter see the remaining candidates.
    let late = Settings {
        order: vec![Stage::TopK, Stage::Penalties],
        top_k: 2,
        presence_penalty: 100.0,
        ..neutral()
    };
    assert_after(late, &[3, 0], &FOUR, &[0.0, 0.0, 1.0, 0.0]);
}

#[test]
fn greedy_takes_the_first_of_the_largest_and_obeys_dry() {
    let mut chain = Chain::new(&Settings::greedy()).unwrap();
    assert_eq!(chain.sample(&[0.5, f32::NEG_INFINITY, 2.0, 2.0], &[]), Ok(2));
    let mut dry = Settings::greedy();
    dry.dry.multiplier = 0.8;
    let mut chain = Chain::new(&dry).unwrap();
    assert_eq!(chain.sample(&[0.5, 0.0, 1.0], &[0, 1, 2, 0, 1]), Ok(0));
}

#[test]
fn logits_that_are_no_numbers_are_refused() {
    let mut chain = Chain::new(&Settings::default()).unwrap();
    let bad = |chain: &mut Chain, logits: &[f32]| chain.sample(logits, &[]).unwrap_err().to_string();
    assert_eq!(bad(&mut chain, &[0.0, f32::NAN]), "the logit of token 1 is NaN");
    assert_eq!(bad(&mut chain, &[f32::INFINITY, 0.0]), "the logit of token 0 is inf");
    let nothing = "no token has a probability above zero";
    assert_eq!(bad(&mut chain, &[f32::NEG_INFINITY; 3]), nothing);
    assert_eq!(bad(&mut chain, &[]), nothing);
}

#[test]
fn everything_at_once_leaves_something() {
    let mut settings = Settings {
        repetition_penalty: 1e30,
        frequency_penalty: 1e38,
        presence_penalty: 1e38,
        top_n_sigma: 1e-9,
        top_k: 1,
        typical_p: 0.0,
        top_p: 0.0,
        min_p: 1.0,
        xtc_probability: 1.0,
        xtc_threshold: 0.0,
        temperature: 1e-5,
        ..neutral()
    };
    settings.dry.multiplier = 1e38;
    let mut chain = Chain::new(&settings).unwrap();
    for logits in [
        vec![0.0; 9],
        (0..9).map(|i| i as f32).collect(),
        vec![f32::MIN; 9],
        vec![f32::MAX; 9],
    ] {
        assert!(chain.sample(&logits, &[0, 1, 2, 3, 4, 5, 6, 7, 8].repeat(9)).is_ok());
    }
}

#[test]
fn frequencies_follow_the_tempered_softmax() {
    // At temperature 2, logits 0 and 2 ln 3 are as 1 to 3.
    let settings = Settings {
        temperature: 2.0,
        seed: 7,
        ..neutral()
    };
    let tokens = draws(settings, &[0.0, 2.0 * 3f32.ln()], 20_000);
    let ones = tokens.iter().filter(|t| **t == 1).count() as f64 / 20_000.0;
    assert!((ones - 0.75).abs() < 0.01, "{ones}");
}

#[test]
fn a_seed_decides_everything() {
    let logits: Vec<f32> = (0..100).map(|i| (i * 37 % 100) as f32 * 0.03).collect();
    let with = |seed| {
        let settings = Settings {
            temperature: 0.8,
            seed,
            xtc_probability: 0.5,
            xtc_threshold: 0.01,
            ..neutral()
        };
        draws(settings, &logits, 50)
    };
    assert_eq!(with(1), with(1));
    assert_ne!(with(1), with(2));
    // Exactly these tokens, on every machine and in every version.
    let plain = draws(Settings { seed: 42, ..neutral() }, &logits, 8);
    assert_eq!(plain, [67, 94, 43, 62, 28, 16, 31, 81]);
}

#[test]
fn a_chain_knows_when_it_is_only_an_argmax() {
    let greedy = || Settings {
        temperature: 0.0,
        ..neutral()
    };
    let truncating = Settings {
        top_k: 40,
        top_p: 0.9,
        min_p: 0.05,
        top_n_sigma: 1.0,
        ..greedy()
    };
    let mut dry = greedy();
    dry.dry.multiplier = 0.8;
    let mut biased = greedy();
    biased.logit_bias.push((3, 1.0));
    let cases = [
        (greedy(), true),
        (truncating, true),
        (neutral(), false),
        (dry, false),
        (biased, false),
        (
            Settings {
                repetition_penalty: 1.1,
                ..greedy()
            },
            false,
        ),
        (
            Settings {
                typical_p: 0.5,
                ..greedy()
            },
            false,
        ),
        (
            Settings {
                xtc_probability: 0.5,
                xtc_threshold: 0.1,
                ..greedy()
            },
            false,
        ),
    ];
    let mut state = 1u32;
    for (settings, expected) in cases {
        let mut chain = Chain::new(&settings).unwrap();
        assert_eq!(chain.is_argmax(), expected, "{settings:?}");
        // Then it equals a device's result, including ties.
        for _ in 0..if expected { 50 } else { 0 } {
            let mut bits = || {
                state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                state >> 29
            };
            let logits: Vec<f32> = (0..60).map(|_| bits() as f32 - 3.0).collect();
            assert_eq!(chain.sample(&logits, &[1, 2]).ok(), crate::decode::best(&logits));
        }
    }
}

/// A penalty so small that a logit divided by it is infinite, and another that takes infinity from it.
#[test]
fn penalties_beyond_the_range_of_f32_make_no_nan() {
    for temperature in [0.0, 1.0] {
        let settings = Settings {
            repetition_penalty: f32::MIN_POSITIVE,
            frequency_penalty: f32::MAX,
            presence_penalty: f32::MAX,
            min_p: 0.1,
            top_n_sigma: f32::MAX,
            temperature,
            ..Settings::neutral()
        };
        let mut chain = Chain::new(&settings).unwrap();
        let logits = [1e9, 2.0, -1e9, 1.0];
        let history = [0, 0, 2];
        assert!(
            [1, 3].contains(&chain.sample(&logits, &history).unwrap()),
            "{temperature}"
        );
        // Every token is penalized: the answer is any of them.
        let all = [0, 1, 2, 3];
        assert!(chain.sample(&logits, &all).unwrap() < 4);
        let sum: f64 = chain.probabilities(&logits, &all).unwrap().iter().sum();
        assert!((sum - 1.0).abs() < 1e-6, "{sum}");
    }
}

#[test]
fn draws_by_position_go_on_where_another_run_ended() {
    let settings = Settings {
        seed: 11,
        by_position: true,
        xtc_probability: 0.5,
        xtc_threshold: 0.05,
        ..neutral()
    };
    let logits: Vec<f32> = (0..50).map(|i| (i as f32 * 0.7).sin()).collect();
    let mut whole = Chain::new(&settings).unwrap();
    let mut history = vec![1, 2, 3];
    for _ in 0..40 {
        let token = whole.sample(&logits, &history).unwrap();
        history.push(token);
    }
    let mut continued = history[..23].to_vec();
    let mut second = Chain::new(&settings).unwrap();
    while continued.len() < history.len() {
        let token = second.sample(&logits, &continued).unwrap();
        continued.push(token);
    }
    assert_eq!(continued, history);
    // By draws, the second run begins with the first random number.
    let by_draws = Settings {
        by_position: false,
        ..settings
    };
    let mut third = Chain::new(&by_draws).unwrap();
    let mut other = history[..23].to_vec();
    while other.len() < history.len() {
        let token = third.sample(&logits, &other).unwrap();
        other.push(token);
    }
    assert_ne!(other, history);
}
