//! Very many clients, and clients that do not read their responses.

use std::io::Read;
use std::net::TcpStream;
use std::time::{Duration, Instant};

use lapidary::serve::http::Limits;
use rustix::process::{Resource, getrlimit, setrlimit};
use serde_json::{Value, json};

use crate::client::{Server, read};
use crate::models::TEMPLATE;
use crate::tools::limited;

/// Connections at a time. Each is an open file of the test, too, and some systems allow 1024 unless asked.
const CONNECTIONS: usize = 1000;

fn allow_connections() {
    let mut limit = getrlimit(Resource::Nofile);
    limit.current = limit.maximum;
    setrlimit(Resource::Nofile, limit).unwrap();
}

#[test]
fn a_thousand_connections_delay_no_request() {
    allow_connections();
    let server = Server::start("64", &["--queue", "1000"]);
    // Connections without requests, and requests between them.
    let idle: Vec<TcpStream> = (0..CONNECTIONS).map(|_| server.connect()).collect();
    for _ in 0..5 {
        server.post("/v1/completions", &json!({"prompt": [5]})).ok();
    }
    drop(idle);
    // All of them with a request at once.
    let ask = |i: usize| {
        let body = json!({"prompt": [3 + i % 90, 7], "max_tokens": 3, "temperature": 0, "ignore_eos": true, "return_token_ids": true});
        server.send("POST", "/v1/completions", &[], &body.to_string())
    };
    let alone: Vec<Value> = (0..3)
        .map(|i| read(ask(i)).ok()["choices"][0]["token_ids"].clone())
        .collect();
    let all: Vec<TcpStream> = (0..CONNECTIONS).map(ask).collect();
    for (i, stream) in all.into_iter().enumerate() {
        let document = read(stream).ok();
        let tokens = &document["choices"][0]["token_ids"];
        assert_eq!(tokens.as_array().unwrap().len(), 3);
        if i % 90 < alone.len() {
            assert_eq!(*tokens, alone[i % 90]);
        }
    }
    assert_eq!(server.metric("vllm:num_requests_running", ""), 0.0);
    assert_eq!(server.metric("vllm:num_requests_waiting", ""), 0.0);
}

#[test]
fn a_client_that_stops_reading_is_disconnected() {
    let limits = Limits {
        write_timeout: Duration::from_secs(1),
        ..Limits::default()
    };
    let server = limited(TEMPLATE, "Hello", limits);
    // About 9 MB: more than the system buffers for a client that does not read (a little over 4 MB).
    let body = |most: usize| {
        json!({
            "prompt": [5, 6], "max_tokens": most, "ignore_eos": true, "n": 8, "logprobs": 20, "stream": true,
            "return_token_ids": true,
        })
        .to_string()
    };
    let mut unread = server.send("POST", "/v1/completions", &[], &body(2000));
    // Everything is generated, or the server has disconnected the client. A few seconds later all output is written or
    // buffered.
    let start = Instant::now();
    let is_running = || {
        !server
            .get("/metrics")
            .body
            .contains("vllm:num_requests_running{model_name=\"script\"} 0\n")
    };
    std::thread::sleep(Duration::from_secs(1));
    while is_running() {
        assert!(start.elapsed() < Duration::from_secs(60), "it runs for ever");
        std::thread::sleep(Duration::from_millis(100));
    }
    std::thread::sleep(Duration::from_secs(5));
    // Other clients are served.
    server
        .post("/v1/completions", &json!({"prompt": [5], "max_tokens": 3}))
        .ok();
    let mut text = Vec::new();
    // Reset or closed, but never complete.
    let _ = unread.read_to_end(&mut text);
    assert!(!text.is_empty());
    assert!(
        !text.windows(6).any(|bytes| bytes == b"[DONE]"),
        "it was written to its end: {} bytes",
        text.len()
    );
    // A client that reads slowly, but reads, gets all of it.
    let mut slow = server.send("POST", "/v1/completions", &[], &body(600));
    let mut text = Vec::new();
    let mut part = vec![0; 1 << 20];
    loop {
        let n = slow.read(&mut part).unwrap();
        if n == 0 {
            break;
        }
        text.extend_from_slice(&part[..n]);
        std::thread::sleep(Duration::from_millis(5));
    }
    assert!(text.windows(6).any(|bytes| bytes == b"[DONE]"), "{} bytes", text.len());
}

#[test]
fn a_prompt_that_the_model_cannot_hold_is_refused() {
    let server = Server::start("64", &[]);
    let (status, code, message) = server.post("/v1/completions", &json!({"prompt": vec![5; 65]})).error();
    assert_eq!((status, code), (400, json!("context_length_exceeded")), "{message}");
    // One token fewer than the capacity leaves room for one.
    let whole = json!({"prompt": vec![5; 63], "max_tokens": 50, "ignore_eos": true});
    let document = server.post("/v1/completions", &whole).ok();
    assert_eq!(document["usage"]["prompt_tokens"], 63);
    assert_eq!(document["choices"][0]["finish_reason"], "length");
}
