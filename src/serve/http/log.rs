//! One JSON object per line on standard error, for each request that ran and each that was refused. Texts are not logged.

use std::time::{Duration, Instant};

use serde_json::{Map, Value, json};

use super::reply::{Asked, Usage};
use super::shapes::Head;

fn write(event: &str, fields: Map<String, Value>) {
    let time = chrono::Utc::now().to_rfc3339_opts(chrono::SecondsFormat::Millis, true);
    let mut line = Map::from_iter([("time".to_string(), json!(time)), ("event".to_string(), json!(event))]);
    line.extend(fields);
    eprintln!("{}", Value::Object(line));
}

/// A request that was refused, or that failed before an answer.
pub fn refused(method: &str, path: &str, status: u16) {
    let fields = [
        ("method", json!(method)),
        ("path", json!(path)),
        ("status", json!(status)),
    ];
    write(
        "refused",
        fields
            .map(|(name, value)| (name.to_string(), value))
            .into_iter()
            .collect(),
    );
}

/// The outcome of a request, written when this is dropped.
pub struct Record {
    /// `None`: nothing is written.
    fields: Option<Map<String, Value>>,
    started: Instant,
    first: Option<Duration>,
    pub usage: Usage,
    /// The default outcome: the client disconnected.
    pub outcome: &'static str,
}

impl Record {
    pub fn new(asked: &Asked, head: &Head) -> Self {
        let fields = asked.logs.then(|| {
            let fields = [
                ("id", json!(head.id)),
                ("model", json!(head.model)),
                ("stream", json!(asked.streams)),
                ("choices", json!(asked.prompts.len() * asked.n)),
            ];
            fields
                .map(|(name, value)| (name.to_string(), value))
                .into_iter()
                .collect()
        });
        Record {
            fields,
            started: Instant::now(),
            first: None,
            usage: Usage::default(),
            outcome: "cancelled",
        }
    }

    /// A token came.
    pub fn token(&mut self) {
        self.first.get_or_insert_with(|| self.started.elapsed());
    }
}

impl Drop for Record {
    fn drop(&mut self) {
        let Some(mut fields) = self.fields.take() else {
            return;
        };
        let ms = |duration: Duration| json!((duration.as_secs_f64() * 1e4).round() / 10.0);
        let more = [
            ("outcome", json!(self.outcome)),
            ("prompt_tokens", json!(self.usage.prompt)),
            ("cached_tokens", json!(self.usage.cached)),
            ("completion_tokens", json!(self.usage.generated)),
            ("ttft_ms", self.first.map_or(Value::Null, ms)),
            ("total_ms", ms(self.started.elapsed())),
        ];
        fields.extend(more.map(|(name, value)| (name.to_string(), value)));
        write("request", fields);
    }
}
