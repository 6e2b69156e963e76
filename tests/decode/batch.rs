//! Several sequences on the CPU: each gets bit-identical results to a run alone, whatever the others do.

use std::path::{Path, PathBuf};

use lapidary::decode::batch::{
    BatchDecoder, BatchDevice, BatchError, BatchOptions, BatchRow, CpuBatchDevice, SequenceId,
};
use lapidary::decode::cpu::CpuDevice;
use lapidary::decode::{DeviceError, Session, SessionError};
use lapidary::graph::Graph;
use lapidary::sample::{Chain, Settings};
use lapidary::{onnx, passes};

struct Model {
    name: String,
    graph: Graph,
    vocabulary: usize,
    switch: Option<usize>,
}

const CAPACITIES: [usize; 3] = [16, 32, 96];

fn model(folder: &Path) -> Model {
    let options = passes::CanonicalizeOptions {
        max_positions: 96,
        ..passes::CanonicalizeOptions::default()
    };
    let name = folder.display().to_string();
    let canonical = passes::canonicalize(onnx::read(folder.join("model.onnx")).unwrap(), &options);
    let canonical = canonical.unwrap_or_else(|error| panic!("{name}: {error}"));
    let rotary = canonical.architecture.rotary;
    Model {
        vocabulary: canonical.architecture.vocabulary.unwrap(),
        switch: rotary.and_then(|rotary| rotary.longest_short_run),
        graph: canonical.graph,
        name,
    }
}

fn export(name: &str) -> Model {
    model(
        &Path::new(env!("CARGO_MANIFEST_DIR"))
            .join("fixtures/exports")
            .join(name),
    )
}

impl Model {
    fn batch(&self, options: BatchOptions) -> BatchDecoder {
        // The effect of threads is tested below.
        self.batch_on(options, 1)
    }

    fn batch_on(&self, options: BatchOptions, threads: usize) -> BatchDecoder {
        let device = CpuBatchDevice::new(self.graph.clone(), self.vocabulary, Some(threads), None);
        BatchDecoder::new(Box::new(device), &CAPACITIES, self.vocabulary, options).with_switch(self.switch)
    }

    fn session(&self) -> Session {
        let device = CpuDevice::new(self.graph.clone(), self.vocabulary, Some(1));
        Session::new(Box::new(device), &CAPACITIES, self.vocabulary).with_switch(self.switch)
    }

    fn prompt(&self, seed: u32, n: usize) -> Vec<u32> {
        let token = |i: u32| (i * i * 31 + i * (7 + seed) + 3 * seed) % self.vocabulary as u32;
        (0..n as u32).map(token).collect()
    }
}

fn options(sequences: usize, chunk: usize, kept: usize) -> BatchOptions {
    BatchOptions {
        sequences,
        chunk,
        kept,
        cache_bytes: None,
    }
}

/// A prompt, and the sampling after it.
struct Request {
    prompt: Vec<u32>,
    settings: Settings,
    tokens: usize,
}

impl Request {
    fn new(prompt: Vec<u32>, seed: Option<u64>, tokens: usize) -> Self {
        let settings = match seed {
            None => Settings::greedy(),
            Some(seed) => Settings {
                seed,
                repetition_penalty: 1.1,
                ..Settings::neutral()
            },
        };
        Request {
            prompt,
            settings,
            tokens,
        }
    }
}

/// The result of a request: tokens, and the bits of the logits that each was drawn from.
#[derive(PartialEq, Default)]
struct Given {
    tokens: Vec<u32>,
    logits: Vec<Vec<u32>>,
}

fn bits(logits: &[f32]) -> Vec<u32> {
    logits.iter().map(|x| x.to_bits()).collect()
}

/// A running request.
struct Going {
    request: usize,
    id: SequenceId,
    chain: Chain,
    is_fed: bool,
}

/// Runs requests in a batch. Request `i` joins before round `i * apart`; a round is a chunk of one prompt and a step of
/// all sequences whose prompts are fed.
fn run(batch: &mut BatchDecoder, requests: &[Request], apart: usize) -> Vec<Given> {
    let mut given: Vec<Given> = requests.iter().map(|_| Given::default()).collect();
    let mut going: Vec<Going> = Vec::new();
    let mut next = 0;
    for round in 0.. {
        while next < requests.len() && batch.has_place() && round >= next * apart {
            going.push(Going {
                request: next,
                id: batch.join(requests[next].prompt.clone()).unwrap(),
                chain: Chain::new(&requests[next].settings).unwrap(),
                is_fed: false,
            });
            next += 1;
        }
        if going.is_empty() && next == requests.len() {
            return given;
        }
        if let Some(waiting) = going.iter_mut().find(|one| !one.is_fed) {
            waiting.is_fed = batch.prefill(waiting.id).unwrap().left == 0;
        }
        let mut tokens = Vec::new();
        going.retain_mut(|one| {
            if !one.is_fed {
                return true;
            }
            let logits = batch.logits(one.id);
            let token = one.chain.sample(logits, batch.tokens(one.id)).unwrap();
            given[one.request].logits.push(bits(logits));
            given[one.request].tokens.push(token);
            let done = given[one.request].tokens.len() == requests[one.request].tokens;
            match done {
                true => batch.leave(one.id),
                false => tokens.push((one.id, token)),
            }
            !done
        });
        for result in batch.step(&tokens) {
            result.unwrap();
        }
    }
    unreachable!()
}

/// Prompts shorter and longer than a chunk of 16, which grow beyond 16 and 32 slots at different times.
fn requests(model: &Model) -> Vec<Request> {
    vec![
        Request::new(model.prompt(1, 5), None, 14),
        Request::new(model.prompt(2, 23), Some(7), 12),
        Request::new(model.prompt(3, 1), Some(8), 18),
        Request::new(model.prompt(4, 38), None, 6),
        Request::new(model.prompt(2, 23), Some(9), 10),
    ]
}

fn compare(model: &Model, count: usize) {
    let requests: Vec<Request> = requests(model).into_iter().take(count).collect();
    let lone: Vec<Given> = requests
        .iter()
        .map(|request| run(&mut model.batch(options(1, 16, 0)), std::slice::from_ref(request), 0).remove(0))
        .collect();
    for apart in [0, 2].into_iter().skip(usize::from(count < 5)) {
        let together = run(&mut model.batch(options(5, 16, 4)), &requests, apart);
        for (i, (lone, together)) in lone.iter().zip(together).enumerate() {
            assert_eq!(
                lone.tokens, together.tokens,
                "{}, {apart} rounds apart: request {i}",
                model.name
            );
            assert!(
                *lone == together,
                "{}, {apart} rounds apart: other logits of request {i}",
                model.name
            );
        }
    }
    // For prompts of one chunk a session gives the same bits.
    for i in [0, 2] {
        let mut session = model.session();
        let mut logits = bits(session.feed(&requests[i].prompt).unwrap());
        for (token, expected) in lone[i].tokens.iter().zip(&lone[i].logits) {
            assert!(
                logits == *expected,
                "{}: a session has other logits, request {i}",
                model.name
            );
            logits = bits(session.feed(&[*token]).unwrap());
        }
    }
}

fn folders(of: &str, file: &str) -> Vec<PathBuf> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures").join(of);
    let all = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    let mut all: Vec<PathBuf> = all.filter(|folder| folder.join(file).exists()).collect();
    all.sort();
    all
}

#[test]
fn every_family_gives_the_same_bits_alone_and_among_others() {
    let folders = folders("families", "reference.json");
    assert!(folders.len() >= 20, "{folders:?}");
    for folder in folders {
        compare(&model(&folder), 3);
    }
}

#[test]
fn experts_give_the_same_bits_alone_and_among_others() {
    let folders = folders("experts", "model.onnx");
    assert!(folders.len() >= 5, "{folders:?}");
    for folder in folders {
        compare(&model(&folder), 4);
    }
}

#[test]
fn exports_give_the_same_bits_alone_and_among_others() {
    // Mistral has a window, GPT-2 no rotation; half types are widened in registers.
    for name in [
        "llama-optimum",
        "mistral-optimum",
        "gpt2-optimum",
        "qwen3-optimum",
        "llama-optimum-fp16",
    ] {
        compare(&export(name), 5);
    }
}

#[test]
fn the_number_of_threads_changes_nothing() {
    let model = export("qwen2-optimum");
    let requests = requests(&model);
    let [one, three] = [1, 3].map(|threads| run(&mut model.batch_on(options(5, 16, 2), threads), &requests, 1));
    for (a, b) in one.iter().zip(&three) {
        assert!(a == b);
    }
}

#[test]
fn more_sequences_than_one_pass_takes() {
    let model = export("llama-optimum");
    let requests: Vec<Request> = (0..19u32)
        .map(|i| Request::new(model.prompt(i, 1 + i as usize), Some(i.into()), 5))
        .collect();
    let together = run(&mut model.batch(options(19, 16, 0)), &requests, 0);
    for (i, request) in requests.iter().enumerate().step_by(6) {
        let alone = run(&mut model.batch(options(1, 16, 0)), std::slice::from_ref(request), 0);
        assert!(alone[0] == together[i], "request {i}");
    }
}

/// Feeds a prompt; returns the number of reused tokens and the logits' bits.
fn fed(batch: &mut BatchDecoder, id: SequenceId) -> (usize, Vec<u32>) {
    loop {
        let progress = batch.prefill(id).unwrap();
        if progress.left == 0 {
            return (progress.reused, bits(batch.logits(id)));
        }
    }
}

#[test]
fn prefixes_of_running_and_finished_sequences_are_reused_in_whole_chunks() {
    let model = export("mistral-optimum");
    let fresh = |prompt: &[u32]| {
        let mut batch = model.batch(options(1, 8, 0));
        let id = batch.join(prompt.to_vec()).unwrap();
        fed(&mut batch, id).1
    };
    let long = model.prompt(1, 40);
    let mut batch = model.batch(options(3, 8, 2));
    let first = batch.join(long.clone()).unwrap();
    assert_eq!(fed(&mut batch, first), (0, fresh(&long)));
    // From a running sequence: of 27 common tokens, 24 are in whole chunks. The last token is always computed.
    let branch = [&long[..27], &model.prompt(2, 9)].concat();
    let second = batch.join(branch.clone()).unwrap();
    assert_eq!(fed(&mut batch, second), (24, fresh(&branch)));
    let third = batch.join(long[..24].to_vec()).unwrap();
    assert_eq!(fed(&mut batch, third), (16, fresh(&long[..24])));
    // Generated tokens are fed again as part of the next prompt: only whole chunks of the prompt are reused.
    for token in [5, 6, 7] {
        batch.step(&[(second, token)]).remove(0).unwrap();
    }
    for id in [third, second, first] {
        batch.leave(id);
    }
    let kept = batch.cache_use();
    assert_eq!((batch.len(), kept.running, kept.kept_count), (0, 0, 2), "{kept:?}");
    let next = [&branch[..], &[5, 6, 7, 1, 2]].concat();
    let id = batch.join(next.clone()).unwrap();
    assert_eq!(fed(&mut batch, id), (32, fresh(&next)));
    // The whole cache was reusable, so it moved to the new sequence.
    assert_eq!(batch.cache_use().kept_count, 1);
    let id = batch.join(long.clone()).unwrap();
    assert_eq!(fed(&mut batch, id), (32, fresh(&long)));
    batch.forget_kept();
    assert_eq!(batch.cache_use().kept_count, 0);
}

#[test]
fn prefixes_are_shared_on_one_side_of_a_switch_of_rotary_tables() {
    let model = model(&Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/families/dynamo18-phi3-longrope"));
    let tokens = model.prompt(3, 50);
    let mut batch = model.batch(options(1, 4, 3));
    let mut reused = Vec::new();
    // The switch is at 32 tokens.
    for count in [10, 20, 40, 50, 25, 30, 45, 12] {
        let id = batch.join(tokens[..count].to_vec()).unwrap();
        let (shared, logits) = fed(&mut batch, id);
        reused.push(shared);
        let mut fresh = model.batch(options(1, 4, 0));
        let alone = fresh.join(tokens[..count].to_vec()).unwrap();
        assert!(fed(&mut fresh, alone).1 == logits, "{count} tokens");
        batch.leave(id);
    }
    assert_eq!(reused, [0, 8, 0, 40, 20, 24, 44, 8]);
}

#[test]
fn the_least_recently_used_prefix_goes_first_and_memory_has_a_limit() {
    let model = export("llama-optimum");
    let prompts: Vec<Vec<u32>> = (0..4).map(|seed| model.prompt(seed + 10, 12)).collect();
    let reused = |batch: &mut BatchDecoder, prompt: &[u32]| {
        let id = batch.join(prompt.to_vec()).unwrap();
        let shared = fed(batch, id).0;
        batch.leave(id);
        shared
    };
    let mut batch = model.batch(options(2, 4, 2));
    for (prompt, shared) in [(0, 0), (1, 0), (0, 8), (2, 0), (0, 8), (1, 0)] {
        assert_eq!(reused(&mut batch, &prompts[prompt]), shared, "prompt {prompt}");
    }
    let one = {
        let id = batch.join(prompts[3].clone()).unwrap();
        batch.prefill(id).unwrap();
        let bytes = batch.cache_use().running;
        batch.leave(id);
        bytes
    };
    // Room for two small caches, or one of 32 slots.
    let limited = BatchOptions {
        cache_bytes: Some(2 * one),
        ..options(3, 4, 8)
    };
    let mut batch = model.batch(limited);
    assert_eq!(reused(&mut batch, &prompts[0]), 0);
    assert_eq!(reused(&mut batch, &prompts[1]), 0);
    let [a, b, c] = [0, 2, 3].map(|i| batch.join(prompts[i].clone()).unwrap());
    // The kept cache of the other prompt is dropped to make room.
    assert_eq!(fed(&mut batch, a).0, 8);
    fed(&mut batch, b);
    assert_eq!(batch.cache_use().kept_count, 0);
    let error = batch.prefill(c).unwrap_err();
    assert!(matches!(error, BatchError::Memory { capacity: 16, .. }), "{error}");
    batch.leave(c);
    // A growth without room ends only that sequence.
    for token in 0..4 {
        let results = batch.step(&[(a, token), (b, token)]);
        assert!(results.iter().all(Result::is_ok));
    }
    let mut results = batch.step(&[(a, 9)]);
    let error = results.remove(0).unwrap_err().to_string();
    assert!(error.starts_with("a cache of 32 tokens needs"), "{error}");
    batch.leave(a);
    batch.forget_kept();
    batch.step(&[(b, 9)]).remove(0).unwrap();
    let full = batch.join(prompts[1].clone()).unwrap();
    assert!(batch.prefill(full).is_err());
}

#[test]
fn what_cannot_be_fed_is_refused_and_the_others_go_on() {
    let model = export("llama-optimum");
    let mut batch = model.batch(options(2, 64, 0));
    let refused = |batch: &mut BatchDecoder, prompt: &[u32]| batch.join(prompt.to_vec()).unwrap_err().to_string();
    assert!(refused(&mut batch, &[]).starts_with("the prompt is empty"));
    assert!(refused(&mut batch, &[1, 97]).starts_with("token id 97 at position 1"));
    assert!(refused(&mut batch, &[1; 97]).starts_with("97 tokens do not fit"));
    let (a, b) = (batch.join(vec![1; 96]).unwrap(), batch.join(vec![2, 3]).unwrap());
    assert!(refused(&mut batch, &[1]).starts_with("2 sequences are running"));
    fed(&mut batch, a);
    fed(&mut batch, b);
    assert_eq!((batch.remaining(a), batch.remaining(b)), (0, 94));
    let results = batch.step(&[(a, 1), (b, 4)]);
    assert!(matches!(
        &results[0],
        Err(BatchError::Session(SessionError::Capacity { .. }))
    ));
    assert!(results[1].is_ok());
    assert!(matches!(
        &batch.step(&[(b, 97)])[0],
        Err(BatchError::Session(SessionError::OutsideVocabulary { position: 3, .. }))
    ));
}

/// The CPU with behavior of other devices.
struct Altered {
    device: CpuBatchDevice,
    /// A slot whose steps fail.
    failing: Option<usize>,
    /// As if each capacity had its own engines.
    prompt_depends_on_capacity: bool,
}

impl BatchDevice for Altered {
    fn name(&self) -> &str {
        self.device.name()
    }
    fn engine(&self) -> String {
        self.device.engine()
    }
    fn most_rows(&self) -> usize {
        self.device.most_rows()
    }
    fn largest_chunk(&self) -> usize {
        self.device.largest_chunk()
    }
    fn prompt_depends_on_capacity(&self) -> bool {
        self.prompt_depends_on_capacity
    }
    fn cache_bytes(&mut self, capacity: usize) -> Result<usize, DeviceError> {
        self.device.cache_bytes(capacity)
    }
    fn open(&mut self, slot: usize, capacity: usize, prefix: Option<(usize, usize)>) -> Result<(), DeviceError> {
        self.device.open(slot, capacity, prefix)
    }
    fn resize(&mut self, slot: usize, capacity: usize, live: usize) -> Result<(), DeviceError> {
        self.device.resize(slot, capacity, live)
    }
    fn close(&mut self, slot: usize) {
        self.device.close(slot);
    }
    fn prefill(
        &mut self,
        slot: usize,
        tokens: &[u32],
        position: usize,
        end: usize,
        logits: &mut Vec<f32>,
    ) -> Result<(), DeviceError> {
        self.device.prefill(slot, tokens, position, end, logits)
    }
    fn decode(&mut self, rows: &mut [BatchRow<'_>]) -> Vec<Result<(), DeviceError>> {
        let mut results = self.device.decode(rows);
        for (row, result) in rows.iter().zip(&mut results) {
            if Some(row.slot) == self.failing && row.position >= 14 {
                *result = Err(DeviceError {
                    device: "cpu".into(),
                    message: "a fault".into(),
                    help: None,
                });
            }
        }
        results
    }
}

#[test]
fn a_sequence_that_fails_leaves_the_others_running() {
    let model = export("llama-optimum");
    let device = Altered {
        device: CpuBatchDevice::new(model.graph.clone(), model.vocabulary, Some(2), None),
        failing: Some(0),
        prompt_depends_on_capacity: false,
    };
    let mut batch = BatchDecoder::new(Box::new(device), &CAPACITIES, model.vocabulary, options(3, 4, 4));
    let prompts = [model.prompt(1, 12), model.prompt(2, 12)];
    let ids = prompts.clone().map(|prompt| batch.join(prompt).unwrap());
    for id in ids {
        fed(&mut batch, id);
    }
    let mut lone = model.batch(options(1, 4, 0));
    let alone = lone.join(prompts[1].clone()).unwrap();
    fed(&mut lone, alone);
    for step in 0..8 {
        let feeds: Vec<(SequenceId, u32)> = match step {
            0..3 => ids.iter().map(|id| (*id, step)).collect(),
            _ => vec![(ids[1], step)],
        };
        let results = batch.step(&feeds);
        assert_eq!(results[0].is_err(), step == 2);
        assert!(results.last().unwrap().is_ok());
        if step == 2 {
            batch.leave(ids[0]);
        }
        lone.step(&[(alone, step)]).remove(0).unwrap();
        assert!(batch.logits(ids[1]) == lone.logits(alone));
    }
    // Its cache is not kept.
    assert_eq!(batch.cache_use().kept_count, 0);
    let again = batch.join(prompts[0].clone()).unwrap();
    assert_eq!(fed(&mut batch, again).0, 0);
}

#[test]
fn prefixes_are_shared_at_one_capacity_where_that_matters() {
    let model = export("llama-optimum");
    let tokens = model.prompt(3, 40);
    for (depends, expected) in [(false, [0, 8, 24, 28, 8]), (true, [0, 0, 24, 0, 8])] {
        let device = Altered {
            device: CpuBatchDevice::new(model.graph.clone(), model.vocabulary, Some(1), None),
            failing: None,
            prompt_depends_on_capacity: depends,
        };
        let mut batch = BatchDecoder::new(Box::new(device), &CAPACITIES, model.vocabulary, options(1, 4, 5));
        let mut reused = Vec::new();
        // Capacities are 16, 32 and 96. The second is still one of 32 when it has grown.
        for (count, steps) in [(9, 0), (25, 10), (30, 0), (40, 0), (10, 0)] {
            let id = batch.join(tokens[..count].to_vec()).unwrap();
            reused.push(fed(&mut batch, id).0);
            for _ in 0..steps {
                batch.step(&[(id, 5)]).remove(0).unwrap();
            }
            batch.leave(id);
        }
        assert_eq!(reused, expected, "{depends}");
    }
}
