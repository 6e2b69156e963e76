//! From choices to answers: submits prompts, and turns events into one document or a stream of documents.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::body::{Body, Bytes};
use axum::http::header;
use axum::response::Response;
use serde_json::{Value, json};
use tokio::sync::mpsc::{UnboundedReceiver, unbounded_channel};

use super::error::ApiError;
use super::fields::{fresh_id, now};
use super::log::Record;
use super::model::Model;
use super::shapes::{Choice, Head, Reader, Shape};
use crate::decode::Limits;
use crate::sample::{Constraint, Settings};
use crate::serve::{Event, Finished, Limited, Request, SubmitError, Ticket};
use crate::text::tools::ToolPart;

/// A complete request.
pub struct Asked {
    pub model: Arc<Model>,
    /// Token ids of each prompt, which gets `n` choices.
    pub prompts: Vec<Vec<u32>>,
    pub n: usize,
    /// Choice `i` overall is drawn with the seed plus `i`.
    pub sampling: Settings,
    pub limits: Limits,
    /// The form of each choice's text.
    pub constraint: Option<Limited>,
    pub streams: bool,
    pub includes_usage: bool,
    /// Whether choices have the ids of their tokens.
    pub token_ids: bool,
    pub shape: Shape,
    /// Whether it is logged.
    pub logs: bool,
    pub timeout: Option<Duration>,
}

impl Asked {
    fn reader(&self) -> Reader {
        self.shape.reader(self.model.tokenizer.as_deref())
    }
}

/// Tokens read and written.
#[derive(Clone, Copy, Default)]
pub struct Usage {
    pub prompt: usize,
    pub cached: usize,
    pub generated: usize,
}

impl Usage {
    /// A prompt counts once, however many choices it has.
    fn add(&mut self, finished: &Finished, is_first_choice: bool) {
        self.generated += finished.generated;
        if is_first_choice {
            self.prompt += finished.prompt;
            self.cached += finished.reused;
        }
    }

    fn document(self) -> Value {
        json!({
            "prompt_tokens": self.prompt,
            "completion_tokens": self.generated,
            "total_tokens": self.prompt + self.generated,
            "prompt_tokens_details": {"cached_tokens": self.cached},
        })
    }
}

type Events = UnboundedReceiver<(usize, Event)>;

/// Submits every choice. Dropping the tickets cancels them.
fn submit(asked: &Asked) -> Result<(Events, Vec<Ticket>), ApiError> {
    let (choices, most) = (asked.prompts.len() * asked.n, asked.model.scheduler.most_requests());
    if choices > most {
        // Waiting would not help.
        let why = format!("{choices} choices of all prompts; this server takes {most} at a time");
        return Err(ApiError::field("n", why));
    }
    let (sender, events) = unbounded_channel();
    let mut tickets = Vec::new();
    let deadline = asked.timeout.map(|timeout| Instant::now() + timeout);
    for index in 0..asked.prompts.len() * asked.n {
        let sender = sender.clone();
        let request = Request {
            prompt: asked.prompts[index / asked.n].clone(),
            sampling: Settings {
                seed: asked.sampling.seed.wrapping_add(index as u64),
                ..asked.sampling.clone()
            },
            limits: asked.limits.clone(),
            constraint: asked
                .constraint
                .as_ref()
                .map(|form| Box::new(form.again()) as Box<dyn Constraint>),
            deadline,
            events: Box::new(move |event| sender.send((index, event)).is_ok()),
        };
        match asked.model.scheduler.submit(request) {
            Ok(ticket) => tickets.push(ticket),
            Err(error) => {
                let mut found = ApiError::from(&error);
                if let SubmitError::Full { waiting } = error {
                    found.retry_after = Some(wait(&asked.model, waiting));
                }
                return Err(found);
            }
        }
    }
    Ok((events, tickets))
}

/// Seconds until a place in the queue is likely, estimated from the duration of earlier requests and the queue length.
fn wait(model: &Model, waiting: usize) -> u64 {
    let counts = model.scheduler.metrics().snapshot();
    let mean = counts.whole.sum / counts.whole.count().max(1) as f64;
    let turns = waiting as f64 / model.scheduler.facts().sequences as f64;
    (mean * turns.min(1.0)).ceil().clamp(1.0, 60.0) as u64
}

/// The device's thread ended without an error.
fn broken() -> ApiError {
    ApiError::new(
        axum::http::StatusCode::INTERNAL_SERVER_ERROR,
        "the device failed; see the server's log",
    )
}

/// Runs all of it and answers.
pub async fn respond(asked: Asked) -> Result<Response, ApiError> {
    let (mut events, tickets) = submit(&asked)?;
    let head = Head {
        id: fresh_id(asked.shape.prefix()),
        created: now(),
        model: asked.model.name.clone(),
    };
    let mut record = Record::new(&asked, &head);
    let failed = |record: &mut Record, error: ApiError| {
        record.outcome = "failed";
        Err(error)
    };
    if asked.streams {
        // A failure before the first token still gets its own status.
        let first = match events.recv().await {
            None => return failed(&mut record, broken()),
            Some((_, Event::Failed(error))) => return failed(&mut record, ApiError::from(&error)),
            Some(first) => first,
        };
        let streaming = Streaming::new(asked, head, events, tickets, record, first);
        let stream = futures_util::stream::unfold(streaming, Streaming::next);
        let response = Response::builder()
            .header(header::CONTENT_TYPE, "text/event-stream")
            .header(header::CACHE_CONTROL, "no-cache")
            // Makes proxies forward each event at once.
            .header("x-accel-buffering", "no");
        return Ok(response
            .body(Body::from_stream(stream))
            .expect("headers are well formed"));
    }
    let mut choices: Vec<Choice> = (0..tickets.len()).map(|_| Choice::default()).collect();
    let mut readers: Vec<Reader> = choices.iter().map(|_| asked.reader()).collect();
    let mut left = choices.len();
    while left > 0 {
        let Some((index, event)) = events.recv().await else {
            return failed(&mut record, broken());
        };
        match event {
            Event::Piece { token, step, text } => {
                record.token();
                choices[index].add_token(token, step);
                add(&mut choices[index], readers[index].push(token, &text));
            }
            Event::Failed(error) => return failed(&mut record, ApiError::from(&error)),
            Event::Finished(finished) => {
                record.usage.add(&finished, index.is_multiple_of(asked.n));
                add(&mut choices[index], readers[index].finish());
                choices[index].reason = Some(finished.reason);
                left -= 1;
            }
        }
    }
    drop(tickets);
    record.outcome = "finished";
    let tokenizer = asked.model.tokenizer.as_deref();
    let choices = choices.iter().enumerate().map(|(index, choice)| {
        let mut document = asked.shape.choice(tokenizer, index, asked.n, choice);
        if asked.token_ids {
            document["token_ids"] = json!(choice.tokens);
        }
        document
    });
    let mut document = head.document(asked.shape.object(), choices.collect());
    document["usage"] = record.usage.document();
    Ok(json_response(&document))
}

/// Adds a model's output to a choice.
fn add(choice: &mut Choice, parts: Vec<ToolPart>) {
    for part in parts {
        match part {
            ToolPart::Text(text) => choice.add_text(&text),
            ToolPart::Call(call) => choice.add_call(call, choice.calls.len()),
        }
    }
}

/// A document as an answer.
pub fn json_response(document: &Value) -> Response {
    let response = Response::builder().header(header::CONTENT_TYPE, "application/json");
    let body = Body::from(document.to_string());
    response.body(body).expect("headers are well formed")
}

/// An answer that is being written.
struct Streaming {
    asked: Asked,
    head: Head,
    events: Events,
    /// Runs until the client disconnects or the answer is complete.
    _tickets: Vec<Ticket>,
    readers: Vec<Reader>,
    /// Characters and calls written, for each choice.
    written: Vec<(usize, usize)>,
    begun: Vec<bool>,
    left: usize,
    record: Record,
    /// Pending events of the stream.
    ready: VecDeque<String>,
    is_over: bool,
}

impl Streaming {
    fn new(
        asked: Asked,
        head: Head,
        events: Events,
        tickets: Vec<Ticket>,
        record: Record,
        first: (usize, Event),
    ) -> Self {
        let count = tickets.len();
        let readers = (0..count).map(|_| asked.reader()).collect();
        let mut streaming = Streaming {
            asked,
            head,
            events,
            _tickets: tickets,
            readers,
            written: vec![(0, 0); count],
            begun: vec![false; count],
            left: count,
            record,
            ready: VecDeque::new(),
            is_over: false,
        };
        streaming.take(first.0, first.1);
        streaming
    }

    /// The next event of the stream, as text.
    async fn next(mut self) -> Option<(Result<Bytes, std::convert::Infallible>, Self)> {
        loop {
            if let Some(event) = self.ready.pop_front() {
                return Some((Ok(Bytes::from(event)), self));
            }
            if self.is_over {
                return None;
            }
            match self.events.recv().await {
                Some((index, event)) => self.take(index, event),
                None => self.fail(&broken()),
            }
        }
    }

    fn say(&mut self, document: &Value) {
        self.ready.push_back(format!("data: {document}\n\n"));
    }

    fn say_choice(&mut self, choice: Value) {
        let mut document = self.head.document(self.asked.shape.chunk_object(), vec![choice]);
        if self.asked.includes_usage {
            document["usage"] = Value::Null;
        }
        self.say(&document);
    }

    /// A piece of a choice, unless it is empty.
    fn say_piece(&mut self, index: usize, mut piece: Choice, parts: Vec<ToolPart>) {
        let written = &mut self.written[index];
        for part in parts {
            match part {
                ToolPart::Text(text) => piece.add_text(&text),
                ToolPart::Call(call) => {
                    piece.add_call(call, written.1);
                    written.1 += 1;
                }
            }
        }
        written.0 = written.0.max(piece.characters);
        let has_ids = self.asked.token_ids && !piece.tokens.is_empty();
        if piece.text.is_empty() && piece.steps.is_empty() && piece.calls.is_empty() && !has_ids {
            return;
        }
        let tokenizer = self.asked.model.tokenizer.as_deref();
        let mut document = self.asked.shape.piece(tokenizer, index, &piece);
        if has_ids {
            document["token_ids"] = json!(piece.tokens);
        }
        self.say_choice(document);
    }

    fn fail(&mut self, error: &ApiError) {
        self.say(&error.document());
        self.record.outcome = "failed";
        self.is_over = true;
    }

    fn take(&mut self, index: usize, event: Event) {
        if !std::mem::replace(&mut self.begun[index], true)
            && let Some(opening) = self.asked.shape.opening(index, self.asked.n)
        {
            self.say_choice(opening);
        }
        match event {
            Event::Failed(error) => self.fail(&ApiError::from(&error)),
            Event::Piece { token, step, text } => {
                let mut piece = Choice {
                    characters: self.written[index].0,
                    ..Choice::default()
                };
                piece.add_token(token, step);
                self.record.token();
                let parts = self.readers[index].push(token, &text);
                self.say_piece(index, piece, parts);
            }
            Event::Finished(finished) => {
                self.record.usage.add(&finished, index.is_multiple_of(self.asked.n));
                let rest = self.readers[index].finish();
                self.say_piece(index, Choice::default(), rest);
                let has_calls = self.written[index].1 > 0;
                let closing = self.asked.shape.closing(index, finished.reason, has_calls);
                self.say_choice(closing);
                self.left -= 1;
                if self.left == 0 {
                    self.record.outcome = "finished";
                    if self.asked.includes_usage {
                        let mut document = self.head.document(self.asked.shape.chunk_object(), Vec::new());
                        document["usage"] = self.record.usage.document();
                        self.say(&document);
                    }
                    self.ready.push_back("data: [DONE]\n\n".to_string());
                    self.is_over = true;
                }
            }
        }
    }
}
