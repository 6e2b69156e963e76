//! Times of sampling: DRY by length and kind of history, and the whole chain by vocabulary.
//!
//! `cargo bench --no-default-features --bench sampling [-- FILTER]`. Targets: DRY under 30 µs at 4096 tokens and linear
//! beyond, the whole chain under 150 µs at a vocabulary of 128256 and at most 3 % of SmolLM2's decode step (vocabulary
//! 49152). Items are tokens of history or logits.

use std::fmt;
use std::sync::Arc;

use divan::Bencher;
use divan::counter::ItemsCount;
use lapidary::sample::{Breakers, Candidates, Chain, Dry, DrySettings, MirostatSettings, Sampler, Settings, Stage};

fn main() {
    divan::main();
}

/// A reproducible stream of numbers.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self
            .0
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        self.0 >> 33
    }
    fn uniform(&mut self) -> f64 {
        self.next() as f64 / (1u64 << 31) as f64
    }
}

/// Logits with the bell shape and the few outliers of a language model.
fn logits(vocabulary: usize) -> Vec<f32> {
    let mut random = Random(1);
    let mut logits: Vec<f32> = (0..vocabulary)
        .map(|_| ((0..6).map(|_| random.uniform()).sum::<f64>() * 4.0 - 14.0) as f32)
        .collect();
    for i in 0..60 {
        logits[random.next() as usize % vocabulary] = 18.0 - i as f32 * 0.2;
    }
    logits
}

#[derive(Clone, Copy, Debug)]
enum History {
    /// The usual case: token frequencies by Zipf's law.
    Text,
    /// One token, always.
    One,
    /// Two alternating tokens.
    Two,
    /// A hundred tokens over and over.
    Hundred,
    /// A bigram with a different next token each time: the maximum of tokens to penalize.
    Followers,
}

impl fmt::Display for History {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self:?}")
    }
}

impl History {
    fn tokens(self, n: usize, vocabulary: usize) -> Vec<u32> {
        let mut random = Random(7);
        let token = |i: usize| match self {
            // The first few are sequence breakers.
            History::Text => (10.0 + (vocabulary as f64 - 10.0).powf(random.uniform())) as usize,
            History::One => 5,
            History::Two => 5 + i % 2,
            History::Hundred => 100 + i % 100 * 13,
            // Ends with the bigram.
            History::Followers => match (n - 1 - i) % 3 {
                0 => 6,
                1 => 5,
                _ => 1000 + i,
            },
        };
        (0..n).map(token).map(|id| id as u32).collect()
    }
}

const KINDS: [History; 5] = [
    History::Text,
    History::One,
    History::Two,
    History::Hundred,
    History::Followers,
];
const LENGTHS: [usize; 4] = [1024, 4096, 32768, 131_072];

/// With breakers that never occur, so that the whole window is searched for them.
fn dry() -> DrySettings {
    DrySettings {
        multiplier: 0.8,
        breakers: Arc::new(Breakers::from_ids([vec![1], vec![2, 3], vec![4]])),
        ..DrySettings::default()
    }
}

/// DRY alone. The candidates are those of the previous run, lowered by a penalty, which takes the same time.
#[divan::bench(args = KINDS, consts = LENGTHS)]
fn dry_alone<const N: usize>(bencher: Bencher, kind: History) {
    let vocabulary = 200_000;
    let history = kind.tokens(N, vocabulary);
    let mut sampler = Dry::new(dry());
    let mut candidates = Candidates::default();
    candidates.fill(&logits(vocabulary)).unwrap();
    bencher
        .counter(ItemsCount::new(N))
        .bench_local(|| sampler.apply(&mut candidates, divan::black_box(&history)));
}

/// All samplers that can be active at once.
fn everything() -> Settings {
    Settings {
        order: Stage::ORDER.to_vec(),
        logit_bias: vec![(17, 0.5), (99, -1.0)],
        repetition_penalty: 1.1,
        frequency_penalty: 0.1,
        presence_penalty: 0.1,
        penalty_last_n: None,
        dry: dry(),
        top_n_sigma: 5.0,
        top_k: 40,
        typical_p: 0.98,
        top_p: 0.95,
        min_p: 0.05,
        xtc_probability: 0.5,
        xtc_threshold: 0.1,
        temperature: 0.8,
        mirostat: None,
        seed: 1,
        by_position: false,
    }
}

const VOCABULARIES: [usize; 2] = [49_152, 128_256];

fn chain(bencher: Bencher, settings: &Settings, vocabulary: usize, history: &[u32]) {
    let mut chain = Chain::new(settings).unwrap();
    let logits = logits(vocabulary);
    bencher
        .counter(ItemsCount::new(vocabulary))
        .bench_local(|| chain.sample(divan::black_box(&logits), history).unwrap());
}

/// The whole chain over 4096 tokens of history.
#[divan::bench(args = KINDS, consts = VOCABULARIES)]
fn whole_chain<const V: usize>(bencher: Bencher, kind: History) {
    chain(bencher, &everything(), V, &kind.tokens(4096, V));
}

/// The default of `generate`: top-k 40, top-p 0.95, min-p 0.05, temperature 0.8.
#[divan::bench(args = VOCABULARIES)]
fn usual(bencher: Bencher, vocabulary: usize) {
    chain(
        bencher,
        &Settings::default(),
        vocabulary,
        &History::Text.tokens(4096, vocabulary),
    );
}

/// Samplers that see the whole vocabulary because nothing before them dropped anything.
#[divan::bench(args = ["greedy", "draw", "top-k", "top-p", "min-p", "top-n-sigma", "typical", "xtc", "mirostat"])]
fn alone_on_128256(bencher: Bencher, name: &str) {
    let mut settings = Settings::neutral();
    match name {
        "greedy" => settings.temperature = 0.0,
        "top-k" => settings.top_k = 40,
        "top-p" => settings.top_p = 0.95,
        "min-p" => settings.min_p = 0.05,
        "top-n-sigma" => settings.top_n_sigma = 1.0,
        "typical" => settings.typical_p = 0.9,
        "xtc" => (settings.xtc_probability, settings.xtc_threshold) = (1.0, 0.1),
        "mirostat" => settings.mirostat = Some(MirostatSettings::default()),
        _ => {}
    }
    chain(bencher, &settings, 128_256, &[]);
}
