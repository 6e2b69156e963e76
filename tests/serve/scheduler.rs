//! The scheduler without a network: results of requests, queueing, and how requests end.

use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::{Duration, Instant};

use lapidary::decode::batch::{BatchDecoder, BatchDevice, BatchError, BatchOptions, BatchRow, RowOutput};
use lapidary::decode::{self, DeviceChoice, DeviceError, FinishReason, Limits, Session, SessionOptions, Step};
use lapidary::package::Package;
use lapidary::sample::{Chain, Constraint, ConstraintError, Settings};
use lapidary::serve::{Event, Finished, Request, RequestError, Scheduler, SchedulerOptions, SubmitError, Ticket};
use lapidary::text::Tokenizer;

use crate::models::talker;

/// A package, in a folder that it needs until it is loaded.
fn package() -> (tempfile::TempDir, Package) {
    let folder = tempfile::tempdir().unwrap();
    let package = Package::open(&talker(folder.path(), "32,128")).unwrap();
    (folder, package)
}

const ON_CPU: SessionOptions<'static> = SessionOptions {
    device: DeviceChoice::Cpu,
    threads: Some(2),
    tensorrt_lib: None,
    prompt: 1,
    total: 1,
    kernels: None,
    no_graphs: false,
    note: &|_| (),
};

fn batch(sequences: usize) -> BatchOptions {
    BatchOptions {
        sequences,
        chunk: 16,
        kept: 4,
        cache_bytes: None,
    }
}

fn scheduler(sequences: usize, queue: usize) -> Scheduler {
    let (_folder, package) = package();
    let tokenizer = Arc::new(package.tokenizer().unwrap().unwrap());
    let options = SchedulerOptions {
        queue,
        ..SchedulerOptions::default()
    };
    let open = move || BatchDecoder::open(&package, &ON_CPU, batch(sequences));
    Scheduler::start(open, Some(tokenizer), options).unwrap()
}

/// The result of a request.
#[derive(Debug, Default)]
struct Given {
    tokens: Vec<u32>,
    steps: Vec<Step>,
    text: String,
    end: Option<Result<Finished, RequestError>>,
}

impl Given {
    /// The complete result.
    fn all(events: &Receiver<Event>) -> Given {
        let mut given = Given::default();
        while let Ok(event) = events.recv_timeout(Duration::from_secs(60)) {
            match event {
                Event::Piece { token, step, text } => {
                    given.tokens.extend(token);
                    given.steps.extend(step);
                    given.text.push_str(&text);
                }
                Event::Finished(finished) => given.end = Some(Ok(finished)),
                Event::Failed(error) => given.end = Some(Err(error)),
            }
        }
        given
    }

    fn finished(&self) -> Finished {
        *self.end.as_ref().expect("it ended").as_ref().expect("it went well")
    }

    fn error(self) -> RequestError {
        self.end.expect("it ended").expect_err("it failed")
    }
}

fn request(prompt: &[u32], max_new_tokens: usize) -> (Request, Receiver<Event>) {
    let (events, receiver) = channel();
    let limits = Limits {
        max_new_tokens,
        ..Limits::default()
    };
    let request = Request {
        prompt: prompt.to_vec(),
        sampling: Settings::greedy(),
        constraint: None,
        limits,
        deadline: None,
        events: Box::new(move |event| events.send(event).is_ok()),
    };
    (request, receiver)
}

/// A request that stays at its first token until it is released.
fn holding(prompt: &[u32], tokens: usize) -> (Request, Receiver<Event>, Receiver<()>, Sender<()>) {
    let (mut request, receiver) = request(prompt, tokens);
    let (holds, is_held) = channel();
    let (let_go, go) = channel::<()>();
    let mut inner = request.events;
    let mut waits = true;
    request.events = Box::new(move |event| {
        if std::mem::take(&mut waits) {
            let _ = holds.send(());
            let _ = go.recv_timeout(Duration::from_secs(60));
        }
        inner(event)
    });
    (request, receiver, is_held, let_go)
}

fn prompt(seed: u32, n: usize) -> Vec<u32> {
    (0..n as u32)
        .map(|i| 3 + (i * i * 31 + i * (7 + seed) + seed) % 90)
        .collect()
}

#[test]
fn requests_get_what_generate_gives_however_many_there_are() {
    let (_folder, package) = package();
    let tokenizer = package.tokenizer().unwrap().unwrap();
    let scheduler = scheduler(3, 16);
    let mut expected = Vec::new();
    let mut requests = Vec::new();
    for i in 0..8u32 {
        let (mut request, events) = request(&prompt(i, 3 + i as usize), 20 + i as usize);
        request.sampling = match i % 2 {
            0 => Settings::greedy(),
            _ => Settings {
                seed: i.into(),
                temperature: 1.3,
                repetition_penalty: 1.2,
                ..Settings::neutral()
            },
        };
        request.limits.logprobs = (i % 3 == 0).then_some(2);
        request.limits.eos_ids = package.manifest.eos_token_ids.clone();
        let mut session = Session::open(&package, &ON_CPU).unwrap();
        let mut chain = Chain::new(&request.sampling).unwrap();
        let alone = |session: &mut Session, chain: &mut Chain, limits: &Limits| {
            decode::generate(session, Some(&tokenizer), &request.prompt, chain, limits, |_| Ok(())).unwrap()
        };
        // For some, a stop string within the text.
        if i % 4 == 1 {
            let without = alone(&mut session, &mut chain, &request.limits).text;
            let middle = without.chars().skip(9).take(2).collect::<String>();
            request.limits.stop = vec![middle];
            chain = Chain::new(&request.sampling).unwrap();
        }
        expected.push(alone(&mut session, &mut chain, &request.limits));
        requests.push((request, events));
    }
    let submit = |(request, events)| (scheduler.submit(request).unwrap(), events);
    let given: Vec<(Ticket, Receiver<Event>)> = requests.into_iter().map(submit).collect();
    let mut reasons = Vec::new();
    for (expected, (_ticket, events)) in expected.iter().zip(&given) {
        let given = Given::all(events);
        let finished = given.finished();
        assert_eq!(given.tokens, expected.tokens);
        assert_eq!(
            (given.text, given.steps),
            (expected.text.clone(), expected.steps.clone())
        );
        assert_eq!(finished.reason, expected.finish_reason);
        assert_eq!(finished.generated, expected.tokens.len());
        reasons.push(finished.reason);
    }
    assert!(
        reasons.contains(&FinishReason::Stop) && reasons.contains(&FinishReason::Length),
        "{reasons:?}"
    );
    let counts = scheduler.metrics().snapshot();
    let generated: usize = expected.iter().map(|e| e.tokens.len()).sum();
    assert_eq!(counts.generated_tokens, generated as u64);
    assert_eq!(counts.prompt_tokens, (3..11).sum::<u64>());
    assert_eq!(counts.ended_by("stop") + counts.ended_by("length"), 8);
    assert_eq!((counts.to_first_token.count(), counts.whole.count()), (8, 8));
    assert_eq!(counts.between_tokens.count(), counts.generated_tokens - 8);
    // Steps of several sequences at a time: fewer than tokens.
    assert!(counts.steps < counts.generated_tokens * 2 / 3, "{} steps", counts.steps);
}

#[test]
fn without_a_queue_a_request_is_taken_where_a_place_is_free() {
    let scheduler = scheduler(1, 0);
    let (first, first_events, is_held, let_go) = holding(&prompt(1, 4), 3);
    let _first = scheduler.submit(first).unwrap();
    is_held.recv_timeout(Duration::from_secs(60)).unwrap();
    let refused = scheduler.submit(request(&prompt(2, 4), 3).0).unwrap_err();
    assert!(matches!(refused, SubmitError::Full { waiting: 0 }), "{refused}");
    let_go.send(()).unwrap();
    assert_eq!(Given::all(&first_events).tokens.len(), 3);
}

#[test]
fn a_full_queue_refuses_and_the_first_to_come_is_served_first() {
    let scheduler = scheduler(1, 2);
    let (first, first_events, is_held, let_go) = holding(&prompt(1, 4), 3);
    let first = scheduler.submit(first).unwrap();
    is_held.recv_timeout(Duration::from_secs(60)).unwrap();
    let (second, second_events) = request(&prompt(2, 4), 3);
    let (third, third_events) = request(&prompt(3, 4), 3);
    let tickets = [scheduler.submit(second).unwrap(), scheduler.submit(third).unwrap()];
    let refused = scheduler.submit(request(&prompt(4, 4), 3).0).unwrap_err();
    assert!(matches!(refused, SubmitError::Full { waiting: 2 }), "{refused}");
    let counts = scheduler.metrics().snapshot();
    assert_eq!((counts.waiting, counts.rejected), (2, 1));
    let_go.send(()).unwrap();
    let [first, second, third] = [
        (&first_events, &first),
        (&second_events, &tickets[0]),
        (&third_events, &tickets[1]),
    ]
    .map(|(e, _)| Given::all(e));
    for given in [&first, &second, &third] {
        assert_eq!((given.tokens.len(), given.finished().reason), (3, FinishReason::Length));
    }
    assert!(second.finished().queued < third.finished().queued);
    let counts = scheduler.metrics().snapshot();
    assert_eq!((counts.waiting, counts.ended_by("length")), (0, 3));
}

#[test]
fn requests_are_cancelled_wherever_they_are() {
    let scheduler = scheduler(2, 8);
    let (first, first_events, is_held, let_go) = holding(&prompt(1, 4), 10);
    let _first = scheduler.submit(first).unwrap();
    is_held.recv_timeout(Duration::from_secs(60)).unwrap();
    // Now one is running, one waits, and one has a reader that disconnects at once.
    let (running, running_events) = request(&prompt(2, 40), 80);
    let (waiting, waiting_events) = request(&prompt(3, 4), 10);
    let (unread, unread_events) = request(&prompt(4, 4), 10);
    let running = scheduler.submit(running).unwrap();
    let waiting = scheduler.submit(waiting).unwrap();
    let _unread = scheduler.submit(unread).unwrap();
    drop(unread_events);
    waiting.cancel();
    let_go.send(()).unwrap();
    assert!(matches!(
        Given::all(&waiting_events).error(),
        RequestError::Cancelled { generated: 0 }
    ));
    let event = running_events.recv_timeout(Duration::from_secs(60)).unwrap();
    assert!(matches!(event, Event::Piece { token: Some(_), .. }));
    drop(running);
    let error = Given::all(&running_events).error();
    assert!(matches!(error, RequestError::Cancelled { generated: 1.. }), "{error}");
    assert_eq!(Given::all(&first_events).tokens.len(), 10);
    // Their slots are free again.
    let (last, last_events) = request(&prompt(5, 4), 4);
    let _last = scheduler.submit(last).unwrap();
    assert_eq!(Given::all(&last_events).tokens.len(), 4);
    let counts = scheduler.metrics().snapshot();
    assert_eq!((counts.ended_by("cancelled"), counts.ended_by("length")), (3, 2));
}

#[test]
fn deadlines_end_requests_that_wait_and_that_run() {
    let scheduler = scheduler(1, 8);
    let (mut first, first_events, is_held, let_go) = holding(&prompt(1, 4), 90);
    let soon = Instant::now() + Duration::from_millis(1500);
    first.deadline = Some(soon);
    let _first = scheduler.submit(first).unwrap();
    is_held.recv_timeout(Duration::from_secs(60)).unwrap();
    let (mut second, second_events) = request(&prompt(2, 4), 3);
    second.deadline = Some(soon);
    let (mut third, third_events) = request(&prompt(3, 4), 3);
    third.deadline = Some(soon + Duration::from_secs(600));
    let _others = [scheduler.submit(second).unwrap(), scheduler.submit(third).unwrap()];
    std::thread::sleep(soon.saturating_duration_since(Instant::now()) + Duration::from_millis(20));
    let_go.send(()).unwrap();
    let error = Given::all(&first_events).error();
    assert!(matches!(error, RequestError::Deadline { generated: 1.. }), "{error}");
    assert!(matches!(
        Given::all(&second_events).error(),
        RequestError::Deadline { generated: 0 }
    ));
    assert_eq!(Given::all(&third_events).tokens.len(), 3);
    assert_eq!(scheduler.metrics().snapshot().ended_by("deadline"), 2);
}

#[test]
fn a_sequence_ends_where_the_largest_cache_is_full() {
    let scheduler = scheduler(2, 8);
    let (full, events) = request(&prompt(1, 120), 100);
    let _full = scheduler.submit(full).unwrap();
    let (exact, exact_events) = request(&prompt(1, 128), 100);
    let _exact = scheduler.submit(exact).unwrap();
    let (none, none_events) = request(&prompt(1, 5), 0);
    let _none = scheduler.submit(none).unwrap();
    let given = Given::all(&events);
    assert_eq!(
        (given.tokens.len(), given.finished().reason),
        (9, FinishReason::Capacity)
    );
    let given = Given::all(&exact_events);
    assert_eq!(
        (given.tokens.len(), given.finished().reason),
        (1, FinishReason::Capacity)
    );
    // The prefix of the first was reused: 120 tokens are seven whole chunks and a part.
    assert_eq!(given.finished().reused, 112);
    let given = Given::all(&none_events);
    assert_eq!((given.tokens.len(), given.finished().reason), (0, FinishReason::Length));
}

#[test]
fn what_cannot_run_is_refused_before_it_waits() {
    let scheduler = scheduler(1, 4);
    let facts = scheduler.facts();
    assert_eq!(
        (facts.device.as_str(), facts.vocabulary, facts.capacity, facts.sequences),
        ("cpu", 97, 128, 1)
    );
    let refused = |request: Request| scheduler.submit(request).unwrap_err().to_string();
    assert!(refused(request(&[], 3).0).starts_with("the prompt is empty"));
    assert!(refused(request(&[5, 97], 3).0).starts_with("token id 97 at position 1"));
    assert!(refused(request(&[5; 129], 3).0).starts_with("129 tokens do not fit"));
    let (mut bad, _events) = request(&[5], 3);
    bad.sampling.top_p = 7.0;
    assert_eq!(refused(bad), "--top-p: 7 is not a number from 0 to 1");
    let (_folder, package) = package();
    let open = move || BatchDecoder::open(&package, &ON_CPU, batch(1));
    let bare = Scheduler::start(open, None, SchedulerOptions::default()).unwrap();
    let (mut stops, _events) = request(&[5], 3);
    stops.limits.stop = vec!["x".into()];
    assert!(matches!(bare.submit(stops), Err(SubmitError::NoTokenizer)));
    let (plain, events) = request(&[5], 3);
    let _plain = bare.submit(plain).unwrap();
    let given = Given::all(&events);
    assert_eq!((given.tokens.len(), given.text.as_str()), (3, ""));
}

#[test]
fn draining_finishes_and_stopping_does_not() {
    let scheduler = scheduler(1, 8);
    let (first, first_events, is_held, let_go) = holding(&prompt(1, 4), 5);
    let _first = scheduler.submit(first).unwrap();
    is_held.recv_timeout(Duration::from_secs(60)).unwrap();
    let (second, second_events) = request(&prompt(2, 4), 5);
    let _second = scheduler.submit(second).unwrap();
    scheduler.drain();
    assert!(matches!(
        scheduler.submit(request(&prompt(3, 4), 5).0),
        Err(SubmitError::Stopping)
    ));
    assert!(!scheduler.is_over());
    let_go.send(()).unwrap();
    assert_eq!(Given::all(&first_events).tokens.len(), 5);
    assert_eq!(Given::all(&second_events).tokens.len(), 5);
    let start = Instant::now();
    while !scheduler.is_over() {
        assert!(start.elapsed() < Duration::from_secs(60));
        std::thread::sleep(Duration::from_millis(5));
    }

    let scheduler = self::scheduler(1, 8);
    let (first, first_events, is_held, let_go) = holding(&prompt(1, 4), 90);
    let _first = scheduler.submit(first).unwrap();
    is_held.recv_timeout(Duration::from_secs(60)).unwrap();
    let (second, second_events) = request(&prompt(2, 4), 5);
    let _second = scheduler.submit(second).unwrap();
    scheduler.stop();
    let_go.send(()).unwrap();
    for events in [&first_events, &second_events] {
        let error = Given::all(events).error();
        assert!(matches!(error, RequestError::Stopping), "{error}");
    }
}

/// A device whose model always gives token 5, and fails or panics at a sequence of this many tokens.
struct Faulty {
    at: usize,
    panics: bool,
    /// The best token as it finds it: another one, so that it is seen.
    finds: Option<u32>,
}

impl Faulty {
    fn fault(&self) -> DeviceError {
        DeviceError {
            device: "faulty".into(),
            message: "out of order".into(),
            help: None,
        }
    }
}

impl BatchDevice for Faulty {
    fn name(&self) -> &str {
        "faulty"
    }
    fn engine(&self) -> String {
        "none".into()
    }
    fn most_rows(&self) -> usize {
        2
    }
    fn largest_chunk(&self) -> usize {
        64
    }
    fn cache_bytes(&mut self, capacity: usize) -> Result<usize, DeviceError> {
        Ok(capacity)
    }
    fn open(&mut self, _: usize, _: usize, _: Option<(usize, usize)>) -> Result<(), DeviceError> {
        Ok(())
    }
    fn resize(&mut self, _: usize, _: usize, _: usize) -> Result<(), DeviceError> {
        Ok(())
    }
    fn close(&mut self, _: usize) {}
    fn prefill(
        &mut self,
        _: usize,
        tokens: &[u32],
        _: usize,
        _: usize,
        logits: &mut Vec<f32>,
    ) -> Result<(), DeviceError> {
        *logits = vec![0.0, 0.0, 0.0, 0.0, 0.0, 9.0];
        match tokens[0] {
            1 => Err(self.fault()),
            // Nothing can be drawn.
            2 => {
                logits[0] = f32::NAN;
                Ok(())
            }
            _ => Ok(()),
        }
    }
    fn decode(&mut self, rows: &mut [BatchRow<'_>]) -> Vec<Result<(), DeviceError>> {
        assert!(rows.len() <= 2);
        let decode = |row: &mut BatchRow<'_>| {
            *row.output = match self.finds {
                Some(best) if row.only_best => RowOutput::Best(best),
                _ => RowOutput::Logits(vec![0.0, 0.0, 0.0, 0.0, 0.0, 9.0]),
            };
            assert!(!self.panics || row.position < self.at, "the device panics");
            match row.position >= self.at {
                true => Err(self.fault()),
                false => Ok(()),
            }
        };
        rows.iter_mut().map(decode).collect()
    }
}

fn on_faulty(at: usize, panics: bool) -> Scheduler {
    let open = move || -> Result<BatchDecoder, DeviceError> {
        Ok(BatchDecoder::new(
            Box::new(Faulty {
                at,
                panics,
                finds: None,
            }),
            &[64],
            6,
            batch(4),
        ))
    };
    Scheduler::start(open, None::<Arc<Tokenizer>>, SchedulerOptions::default()).unwrap()
}

#[test]
fn a_request_that_fails_on_the_device_is_the_only_one() {
    let scheduler = on_faulty(20, false);
    let prompts: [&[u32]; 5] = [&[1, 3], &[2, 3], &[3; 15], &[3, 4], &[4, 4, 4]];
    let all: Vec<(Ticket, Receiver<Event>)> = prompts
        .iter()
        .map(|prompt| {
            let (request, events) = request(prompt, 10);
            (scheduler.submit(request).unwrap(), events)
        })
        .collect();
    let mut given = all.iter().map(|(_, events)| Given::all(events));
    let error = given.next().unwrap().error();
    assert!(matches!(&error, RequestError::Batch(BatchError::Session(_))), "{error}");
    assert_eq!(error.to_string(), "faulty: out of order");
    let error = given.next().unwrap().error().to_string();
    assert!(
        error.starts_with("step 1, the token at position 2: the logit of token 0"),
        "{error}"
    );
    let third = given.next().unwrap();
    // Positions 15 to 19 succeeded.
    assert_eq!(third.tokens, [5; 6]);
    assert!(third.end.unwrap().is_err());
    for given in given {
        assert_eq!(given.tokens, [5; 10]);
    }
    assert_eq!(scheduler.metrics().snapshot().ended_by("error"), 3);
}

/// Logits stay on a device that finds the best token, unless the request needs them.
#[test]
fn the_device_finds_the_best_token_for_requests_that_need_no_logits() {
    let open = move || -> Result<BatchDecoder, DeviceError> {
        let device = Faulty {
            at: 1000,
            panics: false,
            finds: Some(4),
        };
        Ok(BatchDecoder::new(Box::new(device), &[64], 6, batch(4)))
    };
    let scheduler = Scheduler::start(open, None::<Arc<Tokenizer>>, SchedulerOptions::default()).unwrap();
    let with = |change: fn(&mut Request)| {
        let (mut request, events) = request(&[3, 3], 4);
        change(&mut request);
        let _ticket = scheduler.submit(request).unwrap();
        Given::all(&events).tokens
    };
    assert_eq!(with(|_| ()), [5, 4, 4, 4]);
    assert_eq!(with(|request| request.limits.logprobs = Some(2)), [5; 4]);
    assert_eq!(with(|request| request.sampling.repetition_penalty = 1.01), [5; 4]);
    assert_eq!(with(|request| request.sampling.temperature = 0.1), [5; 4]);
    struct Any;
    impl Constraint for Any {
        fn limit(&mut self, _: &mut [f32]) -> Result<(), ConstraintError> {
            Ok(())
        }
        fn accept(&mut self, _: u32) -> Result<bool, ConstraintError> {
            Ok(false)
        }
    }
    assert_eq!(with(|request| request.constraint = Some(Box::new(Any))), [5; 4]);
}

#[test]
fn requests_wait_for_memory_and_end_where_there_is_none() {
    let open = move || -> Result<BatchDecoder, DeviceError> {
        let device = Faulty {
            at: 1000,
            panics: false,
            finds: None,
        };
        let options = BatchOptions {
            cache_bytes: Some(20),
            kept: 0,
            ..batch(3)
        };
        // A slot takes a byte.
        Ok(BatchDecoder::new(Box::new(device), &[16, 64], 6, options))
    };
    let scheduler = Scheduler::start(open, None::<Arc<Tokenizer>>, SchedulerOptions::default()).unwrap();
    let prompts: [&[u32]; 5] = [&[3; 4], &[4; 4], &[3; 20], &[5; 14], &[4; 5]];
    let all: Vec<(Ticket, Receiver<Event>)> = prompts
        .iter()
        .map(|prompt| {
            let (request, events) = request(prompt, 8);
            (scheduler.submit(request).unwrap(), events)
        })
        .collect();
    let [a, b, too_long, grows, c] = [0, 1, 2, 3, 4].map(|i: usize| Given::all(&all[i].1));
    // There is room for one at a time.
    for given in [a, b, c] {
        assert_eq!(given.tokens, [5; 8]);
    }
    for (given, tokens) in [(too_long, 0), (grows, 3)] {
        assert_eq!(given.tokens.len(), tokens);
        let error = given.error();
        assert!(
            matches!(&error, RequestError::Batch(BatchError::Memory { capacity: 64, .. })),
            "{error}"
        );
    }
}

#[test]
fn a_panic_of_the_device_ends_what_is_there_and_refuses_the_rest() {
    let scheduler = on_faulty(8, true);
    let (bad, events) = request(&[3, 3], 10);
    let _bad = scheduler.submit(bad).unwrap();
    // The events end without a final one.
    let given = Given::all(&events);
    assert!(given.end.is_none() && given.tokens.len() == 7, "{given:?}");
    let start = Instant::now();
    while !scheduler.is_over() {
        assert!(start.elapsed() < Duration::from_secs(60));
        std::thread::sleep(Duration::from_millis(5));
    }
    assert!(matches!(
        scheduler.submit(request(&[3], 1).0),
        Err(SubmitError::Stopping)
    ));
}

#[test]
fn a_decoder_that_does_not_open_is_an_error() {
    let (_folder, package) = package();
    let open = move || {
        let gpu = SessionOptions {
            device: DeviceChoice::Cuda,
            ..ON_CPU
        };
        BatchDecoder::open(&package, &gpu, batch(1))
    };
    let error = Scheduler::start(open, None, SchedulerOptions::default()).err().unwrap();
    assert!(error.to_string().contains("has no TensorRT-RTX engines"), "{error}");
}
