//! Bad requests, too many requests, clients that disconnect, and shutdown.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::time::{Duration, Instant};

use lapidary::serve::http::Limits;
use serde_json::{Value, json};

use crate::client::{Server, read};
use crate::models::talker;
use crate::support::{lapidary, text};
use crate::tools::limited;

#[test]
fn bad_requests_are_refused_by_name() {
    let server = Server::start("64", &["--max-body", "2k", "--max-prompt", "50"]);
    let chat = |field: &str, value: Value| {
        let mut body = json!({"messages": [{"role": "user", "content": "x"}], "max_tokens": 1});
        body[field] = value;
        ("/v1/chat/completions", body)
    };
    let completion = |field: &str, value: Value| {
        let mut body = json!({"prompt": [5, 6], "max_tokens": 1});
        body[field] = value;
        ("/v1/completions", body)
    };
    let cases = [
        (chat("bogus", json!(1)), 400, "bogus: unknown field"),
        (chat("messages", json!([])), 400, "messages: there is none"),
        (chat("messages", json!("hi")), 400, "messages: invalid type: string"),
        (
            chat("messages", json!([{"content": "x"}])),
            400,
            "messages[0]: missing field `role`",
        ),
        (
            chat("messages", json!([{"role": "wizard", "content": "x"}])),
            400,
            "messages[0]: unknown role \"wizard\"",
        ),
        (
            chat("messages", json!([{"role": "user"}])),
            400,
            "messages[0]: the message has no content",
        ),
        (
            chat(
                "messages",
                json!([{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "file:///etc"}}]}]),
            ),
            400,
            "messages[0]: content of the type \"image_url\" is not supported",
        ),
        (chat("tools", json!([{"type": "function"}])), 400, "tools[0]: it is no"),
        (
            chat("tool_choice", json!("required")),
            400,
            "tool_choice: the request has no tools",
        ),
        (
            chat("top_logprobs", json!(3)),
            400,
            "top_logprobs: logprobs has to be true",
        ),
        (chat("n", json!(0)), 400, "n: 0 is not a number from 1 to 128"),
        (
            chat("max_completion_tokens", json!(0)),
            400,
            "max_completion_tokens: 0 is not",
        ),
        (
            chat("max_completion_tokens", json!(-1)),
            400,
            "max_completion_tokens: invalid value: integer `-1`",
        ),
        (
            chat("model", json!("other")),
            404,
            "unknown model \"other\"; the models are pkg",
        ),
        (
            completion("temperature", json!(-1)),
            400,
            "temperature: -1 is not a number of 0 or more",
        ),
        (
            completion("temperature", json!("hot")),
            400,
            "temperature: invalid type: string \"hot\"",
        ),
        (
            completion("top_p", json!(2)),
            400,
            "top_p: 2 is not a number from 0 to 1",
        ),
        (completion("mirostat", json!(1)), 400, "mirostat: 1 is neither 0 nor 2"),
        (
            completion("samplers", json!(["top_x"])),
            400,
            "samplers: unknown sampler \"top_x\"",
        ),
        (
            completion("samplers", json!(["top_k", "top_k"])),
            400,
            "samplers: top-k, named twice,",
        ),
        (
            completion("logit_bias", json!({"97": 1})),
            400,
            "logit_bias: 97: the model has the token ids 0 to 96",
        ),
        (
            completion("logit_bias", json!({"x": 1})),
            400,
            "logit_bias: \"x\": 1 is not a number for a token id",
        ),
        (
            completion("logit_bias", json!(3)),
            400,
            "logit_bias: 3 is not an object",
        ),
        (
            completion("logprobs", json!(21)),
            400,
            "logprobs: 21 is not a number from 0 to 20",
        ),
        (
            completion("stream_options", json!({"continuous_usage_stats": true})),
            400,
            "stream_options.continuous_usage_stats: unknown field",
        ),
        (
            completion("stop", json!(vec!["x"; 65])),
            400,
            "stop: more than 64 strings",
        ),
        // The queue of 64 and the 8 sequences never have that many places.
        (
            completion("n", json!(73)),
            400,
            "n: 73 choices of all prompts; this server takes 72 at a time",
        ),
        (completion("best_of", json!(2)), 400, "best_of: only as many as n"),
        (completion("suffix", json!("x")), 400, "suffix: text is continued"),
        (completion("dry_sequence_breakers", json!(["é"])), 0, ""),
        (completion("prompt", json!([])), 400, "prompt: it is empty"),
        (completion("prompt", json!("")), 400, "the prompt is empty"),
        (completion("prompt", json!(null)), 400, "prompt: there is none"),
        (
            completion("prompt", json!([5, 97])),
            400,
            "token id 97 at position 1 is outside the vocabulary of 97",
        ),
        (
            completion("prompt", json!(vec![5; 51])),
            400,
            "the prompt has 51 tokens, and this server takes 50",
        ),
        (
            completion("prompt", json!({"text": 1})),
            400,
            "prompt: data did not match",
        ),
    ];
    for ((path, body), status, message) in cases {
        let reply = server.post(path, &body);
        // DRY is off, so its strings are not looked at.
        if status == 0 {
            assert_eq!(reply.status, 200, "{body}");
            continue;
        }
        let (found, _, text) = reply.error();
        assert_eq!(found, status, "{body}: {text}");
        assert!(text.contains(message), "{body}: {text}");
    }
    let unusable = json!({"prompt": [5], "dry_multiplier": 1, "dry_sequence_breakers": ["é"]});
    assert!(
        server
            .post("/v1/completions", &unusable)
            .error()
            .2
            .contains("no token of this tokenizer")
    );
    for (body, message) in [
        ("{", "the body is not JSON"),
        ("[1]", "the body is JSON, but no object"),
        ("", "not JSON"),
    ] {
        let (status, _, text) = server.request("POST", "/v1/completions", &[], body).error();
        assert_eq!(status, 400);
        assert!(text.contains(message), "{text}");
    }
    let large = json!({"prompt": "x".repeat(3000)});
    assert_eq!(server.post("/v1/completions", &large).error().0, 413);
    let long = json!({"prompt": [5], "stop": "x".repeat(1900)});
    server.post("/v1/completions", &long).ok();
    let (status, code, message) = server.post("/v1/embeddings", &json!({"input": "x"})).error();
    assert_eq!((status, code), (501, json!("unsupported")));
    assert!(message.contains("embeddings"), "{message}");
    assert_eq!(server.get("/v1/nothing").error().0, 404);
    assert_eq!(server.get("/v1/completions").error().0, 405);
    assert_eq!(server.get("/v1/models/x").error().0, 404);
    for (path, body) in [
        ("/tokenize", json!({})),
        ("/tokenize", json!({"content": "x", "messages": []})),
        ("/detokenize", json!({"tokens": "x"})),
        ("/detokenize", json!({"tokens": [1], "file": "/etc/passwd"})),
    ] {
        assert_eq!(server.post(path, &body).error().0, 400, "{body}");
    }
    // After all of that the server still works.
    let (path, body) = completion("temperature", json!(0));
    server.post(path, &body).ok();
    assert_eq!(server.metric("vllm:num_requests_running", ""), 0.0);
}

#[test]
fn texts_become_tokens_and_tokens_text() {
    let server = Server::start("64", &[]);
    let tokens = server.post("/tokenize", &json!({"prompt": "Hello <|im_end|>"})).ok();
    let ids = tokens["tokens"].clone();
    assert_eq!((&tokens["count"], &tokens["max_model_len"]), (&json!(7), &json!(64)));
    assert_eq!(ids[6], 2);
    let text = server.post("/detokenize", &json!({"tokens": ids})).ok();
    assert_eq!(text["content"], "Hello ");
    assert_eq!(server.get("/health").ok(), json!({"status": "ok"}));
}

#[test]
fn a_connection_goes_on_after_a_refusal() {
    let folder = tempfile::tempdir().unwrap();
    let keys = folder.path().join("keys");
    std::fs::write(&keys, "secret").unwrap();
    let server = Server::start("64", &["--api-key-file", text(&keys)]);
    let mut connection = server.connect();
    let mut ask = |method: &str, path: &str, key: &str, body: &str| -> u16 {
        let length = body.len();
        let head = format!(
            "{method} {path} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {key}\r\nContent-Length: {length}\r\n\r\n"
        );
        connection.write_all(head.as_bytes()).unwrap();
        // The body comes later, when the request may already be refused.
        std::thread::sleep(Duration::from_millis(60));
        connection.write_all(body.as_bytes()).unwrap();
        let mut reader = BufReader::new(&mut connection);
        let mut lines = Vec::new();
        while lines.last().is_none_or(|line: &String| !line.is_empty()) {
            let mut line = String::new();
            assert!(
                reader.read_line(&mut line).unwrap() > 0,
                "{method} {path}: the connection ends after {lines:?}"
            );
            lines.push(line.trim_end().to_ascii_lowercase());
        }
        let length = lines.iter().find_map(|line| line.strip_prefix("content-length: "));
        let mut rest = vec![0; length.unwrap().parse().unwrap()];
        reader.read_exact(&mut rest).unwrap();
        lines[0].split(' ').nth(1).unwrap().parse().unwrap()
    };
    for _ in 0..2 {
        assert_eq!(ask("POST", "/v1/embeddings", "secret", "{\"input\": \"x\"}"), 501);
        assert_eq!(ask("POST", "/v1/completions", "wrong", "{\"prompt\": [5]}"), 401);
        assert_eq!(ask("POST", "/nowhere", "secret", "{}"), 404);
        assert_eq!(ask("DELETE", "/v1/models", "secret", "{}"), 405);
        assert_eq!(ask("POST", "/v1/completions", "secret", "{"), 400);
        assert_eq!(ask("POST", "/v1/completions", "secret", "{\"prompt\": [5]}"), 200);
        assert_eq!(ask("GET", "/v1/models", "secret", ""), 200);
    }
}

#[test]
fn keys_are_asked_for() {
    let folder = tempfile::tempdir().unwrap();
    let keys = folder.path().join("keys");
    std::fs::write(&keys, "# mine\nsecret-1\n\n secret-2 \n").unwrap();
    let server = Server::start("64", &["--api-key-file", text(&keys)]);
    let status = |header: &str| server.request("GET", "/v1/models", &[header], "").status;
    for header in [
        "X: y",
        "Authorization: Bearer wrong",
        "Authorization: secret-1",
        "Authorization: Bearer # mine",
    ] {
        assert_eq!(status(header), 401, "{header}");
    }
    for header in ["Authorization: Bearer secret-1", "authorization: bearer  secret-2"] {
        assert_eq!(status(header), 200, "{header}");
    }
    let refused = server.post("/v1/completions", &json!({"prompt": [5]}));
    assert_eq!(refused.header("www-authenticate"), Some("Bearer"));
    assert_eq!(refused.error().1, "invalid_api_key");
    // The answer to a large body can be read after the body was written.
    let large = json!({"prompt": "x".repeat(20 << 20)}).to_string();
    assert_eq!(server.request("POST", "/v1/completions", &[], &large).error().0, 401);
    let key = ["Authorization: Bearer secret-1"];
    assert_eq!(server.request("POST", "/v1/completions", &key, &large).error().0, 413);
    // Probes need no key.
    assert_eq!(
        (server.get("/health").status, server.get("/metrics").status),
        (200, 200)
    );
}

#[test]
fn names_and_keys_of_the_command_line() {
    let flags = [
        "--served-model-name",
        "org/tiny",
        "--api-key",
        "one",
        "--api-key",
        " two ",
        "--max-num-seqs",
        "2",
    ];
    let server = Server::start("64", &flags);
    let get = |path: &str, key: &str| server.request("GET", path, &[&format!("Authorization: Bearer {key}")], "");
    let models = get("/v1/models", "one").ok();
    assert_eq!(models["data"][0]["id"], "org/tiny");
    assert_eq!(get("/v1/models/org/tiny", "two").ok()["id"], "org/tiny");
    assert_eq!(get("/v1/models/tiny", "two").status, 404);
    assert_eq!(get("/v1/models", "three").status, 401);
    let body = json!({"model": "org/tiny", "prompt": [5], "max_tokens": 2}).to_string();
    let reply = server.request("POST", "/v1/completions", &["Authorization: Bearer one"], &body);
    assert_eq!(reply.ok()["model"], "org/tiny");
    for path in ["/health", "/v1/health", "/ping"] {
        assert_eq!(server.get(path).ok(), json!({"status": "ok"}), "{path}");
    }
    assert_eq!(
        server.get("/version").ok(),
        json!({"version": env!("CARGO_PKG_VERSION")})
    );
}

#[test]
fn a_page_to_chat_is_there_and_loads_nothing_else() {
    let server = Server::start("64", &[]);
    let page = server.get("/");
    assert_eq!(page.status, 200);
    assert_eq!(page.header("content-type"), Some("text/html; charset=utf-8"));
    let policy = page.header("content-security-policy").unwrap();
    assert!(
        policy.starts_with("default-src 'none'; connect-src 'self';"),
        "{policy}"
    );
    for outside in ["http://", "https://", "src=", "<link", "@import", "innerHTML"] {
        assert!(!page.body.contains(outside), "the page has {outside}");
    }
    assert!(page.body.contains("/v1/chat/completions") && page.body.contains("/v1/models"));
}

/// A request that runs until its client disconnects: the headers and the first event are read.
fn endless(server: &Server) -> BufReader<TcpStream> {
    let body = json!({"prompt": [5, 6], "max_tokens": 100000, "ignore_eos": true, "stream": true});
    let stream = server.send("POST", "/v1/completions", &[], &body.to_string());
    let mut reader = BufReader::new(stream);
    let mut line = String::new();
    while !line.starts_with("data: ") {
        line.clear();
        assert!(reader.read_line(&mut line).unwrap() > 0, "the stream has events");
    }
    reader
}

#[test]
fn a_full_queue_is_said_with_a_time_to_come_back() {
    let server = Server::start("64,8192", &["--max-sequences", "1", "--queue", "1"]);
    let running = endless(&server);
    let waiting = server.send(
        "POST",
        "/v1/completions",
        &[],
        &json!({"prompt": [7], "max_tokens": 2}).to_string(),
    );
    server.wait_for_metric("vllm:num_requests_waiting", "", 1.0);
    let refused = server.post("/v1/completions", &json!({"prompt": [8]}));
    let seconds: u64 = refused.header("retry-after").unwrap().parse().unwrap();
    assert!((1..=60).contains(&seconds));
    assert_eq!(refused.error().0, 429);
    assert_eq!(refused.error().1, "queue_full");
    assert_eq!(server.metric("lapidary:requests_rejected_total", ""), 1.0);
    drop(running);
    assert_eq!(read(waiting).ok()["usage"]["completion_tokens"], 2);
}

#[test]
fn a_request_beyond_all_memory_for_caches_is_not_told_to_come_back() {
    let server = Server::start("64,8192", &["--cache-memory", "200k"]);
    let body = |tokens: usize| json!({"prompt": vec![5; tokens], "max_tokens": 1});
    server.post("/v1/completions", &body(40)).ok();
    let refused = server.post("/v1/completions", &body(100));
    assert_eq!(refused.header("retry-after"), None);
    let (status, code, message) = refused.error();
    assert_eq!((status, code), (400, json!("context_length_exceeded")), "{message}");
    assert!(message.contains("a cache of 8192 tokens needs"), "{message}");
    server.post("/v1/completions", &body(40)).ok();
}

#[test]
fn a_client_that_goes_ends_its_requests() {
    let server = Server::start("64,8192", &["--max-sequences", "4"]);
    let cancelled = ",finished_reason=\"cancelled\"";
    let streaming = endless(&server);
    let body = json!({"prompt": [5, 6], "max_tokens": 100000, "ignore_eos": true, "n": 2});
    let whole = server.send("POST", "/v1/completions", &[], &body.to_string());
    server.wait_for_metric("vllm:num_requests_running", "", 3.0);
    drop(streaming);
    server.wait_for_metric("vllm:request_success_total", cancelled, 1.0);
    drop(whole);
    server.wait_for_metric("vllm:request_success_total", cancelled, 3.0);
    server.wait_for_metric("vllm:num_requests_running", "", 0.0);
    assert_eq!(server.metric("vllm:kv_cache_usage_perc", ""), 0.0);
    server.post("/v1/completions", &json!({"prompt": [5]})).ok();
}

#[test]
fn slow_and_idle_clients_hold_nobody_up() {
    let limits = Limits {
        header_timeout: Duration::from_millis(300),
        body_timeout: Duration::from_millis(300),
        ..Limits::default()
    };
    let server = limited(crate::models::TEMPLATE, "Hello", limits);
    let raw = |text: &str| {
        let mut stream = server.connect();
        stream.write_all(text.as_bytes()).unwrap();
        stream
    };
    // A request head and a body that never end.
    let start = Instant::now();
    let mut rest = Vec::new();
    let _ = raw("POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-").read_to_end(&mut rest);
    let answer = String::from_utf8_lossy(&rest).into_owned();
    assert!(answer.is_empty() || answer.starts_with("HTTP/1.1 408"), "{answer}");
    let unfinished = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: 100\r\n\r\n{";
    assert_eq!(read(raw(unfinished)).error().0, 408);
    assert!(start.elapsed() < Duration::from_secs(20));
}

#[test]
fn a_request_has_its_time() {
    let server = Server::start("64,8192", &["--timeout", "1"]);
    let body = json!({"prompt": [5, 6], "max_tokens": 100000, "ignore_eos": true});
    let (status, code, message) = server.post("/v1/completions", &body).error();
    assert_eq!((status, code), (504, json!("timeout")), "{message}");
    // In a stream the status is already sent.
    let mut body = body;
    body["stream"] = json!(true);
    let reply = server.post("/v1/completions", &body);
    assert_eq!(reply.status, 200);
    let last = reply.body.trim_end().rsplit("data: ").next().unwrap();
    let last: Value = serde_json::from_str(last).unwrap();
    assert_eq!(last["error"]["code"], "timeout");
}

#[test]
fn a_signal_lets_requests_finish() {
    let mut server = Server::start("64,1024", &[]);
    let body = json!({"prompt": [5, 6], "max_tokens": 60, "ignore_eos": true, "stream": true, "temperature": 0});
    let whole = server.post("/v1/completions", &body);
    let stream = server.send("POST", "/v1/completions", &[], &body.to_string());
    let idle = TcpStream::connect(stream.peer_addr().unwrap()).unwrap();
    server.wait_for_metric("vllm:num_requests_running", "", 1.0);
    server.signal("-TERM");
    let text = |events: Vec<Value>| -> String {
        events
            .iter()
            .filter_map(|event| event["choices"][0]["text"].as_str())
            .collect()
    };
    assert_eq!(text(read(stream).events()), text(whole.events()));
    // A connection without a request does not delay the shutdown.
    assert_eq!(server.end(), Some(0));
    let mut rest = Vec::new();
    let _ = (&idle).read_to_end(&mut rest);
    assert!(rest.is_empty());

    // Requests that do not finish in time are ended.
    let mut server = Server::start("64,8192", &["--grace", "0"]);
    let mut running = endless(&server);
    let start = Instant::now();
    server.signal("-INT");
    let mut rest = String::new();
    let _ = running.read_to_string(&mut rest);
    assert!(rest.contains("the server is stopping"), "{rest}");
    assert_eq!(server.end(), Some(0));
    assert!(start.elapsed() < Duration::from_secs(20));
}

#[test]
fn requests_are_logged_without_their_texts() {
    let mut server = Server::start("64,8192", &["--log-requests"]);
    let body = json!({"prompt": "secret", "max_tokens": 3, "ignore_eos": true, "n": 2});
    server.post("/v1/completions", &body).ok();
    let running = endless(&server);
    drop(running);
    server.wait_for_metric("vllm:num_requests_running", "", 0.0);
    server.post("/v1/completions", &json!({"prompt": "secret", "bogus": 1}));
    server.get("/nowhere");
    server.signal("-TERM");
    assert_eq!(server.end(), Some(0));
    let lines = server.log();
    assert!(
        lines
            .iter()
            .all(|line| line["time"].is_string() && !line.to_string().contains("secret")),
        "{lines:?}"
    );
    let of = |event: &str| -> Vec<&Value> { lines.iter().filter(|line| line["event"] == event).collect() };
    let requests = of("request");
    assert_eq!(requests.len(), 2);
    let first = requests[0];
    for (field, value) in [
        ("outcome", json!("finished")),
        ("model", json!("pkg")),
        ("choices", json!(2)),
        ("stream", json!(false)),
        ("prompt_tokens", json!(6)),
        ("completion_tokens", json!(6)),
    ] {
        assert_eq!(first[field], value, "{first}");
    }
    assert!(first["ttft_ms"].as_f64() <= first["total_ms"].as_f64());
    assert_eq!(
        (&requests[1]["outcome"], &requests[1]["stream"]),
        (&json!("cancelled"), &json!(true))
    );
    let refused: Vec<(&Value, &Value)> = of("refused")
        .iter()
        .map(|line| (&line["path"], &line["status"]))
        .collect();
    assert_eq!(
        refused,
        [
            (&json!("/v1/completions"), &json!(400)),
            (&json!("/nowhere"), &json!(404))
        ]
    );
}

#[test]
fn what_cannot_be_served_is_refused_at_the_start() {
    let folder = tempfile::tempdir().unwrap();
    let package = talker(folder.path(), "64");
    let refused = |args: &[&str]| {
        let args = [&["serve", "--port", "0"], args].concat();
        lapidary(args).refused()
    };
    let (message, _) = refused(&[text(&folder.path().join("none"))]);
    assert!(message.contains("none"), "{message}");
    let (message, help) = refused(&[text(&package), text(&package)]);
    assert!(
        message.contains("two packages are named \"pkg\"") && help.contains("rename"),
        "{message}"
    );
    let (message, help) = refused(&[text(&package), "--served-model-name", "a", "--alias", "b"]);
    assert!(
        message == "--served-model-name a,b: names: 2, packages: 1" && help.contains("one name for each"),
        "{message}"
    );
    let (message, _) = refused(&[text(&package), text(&package), "--served-model-name", "a,a"]);
    assert!(message.contains("two names are equal"), "{message}");
    let (message, _) = refused(&[text(&package), "--api-key", " "]);
    assert!(message.starts_with("--api-key: "), "{message}");
    let empty = folder.path().join("keys");
    std::fs::write(&empty, "# no key\n").unwrap();
    let (message, _) = refused(&[text(&package), "--api-key-file", text(&empty)]);
    assert!(message.ends_with("the file contains no key"), "{message}");
    let (message, _) = refused(&[text(&package), "--api-key-file", "/nowhere/keys"]);
    assert!(message.starts_with("/nowhere/keys: "), "{message}");
    let (message, help) = refused(&[text(&package), "--device", "cuda"]);
    assert!(
        message.contains("has no TensorRT-RTX engines") && help.contains("--device cpu"),
        "{message}"
    );
    let (message, _) = refused(&[text(&package), "--top-p", "3"]);
    assert!(message.starts_with("--top-p"), "{message}");
    for wrong in [
        ["--max-sequences", "0"],
        ["--max-body", "4MB"],
        ["--prefill-chunk", "513"],
        ["--host", "here"],
    ] {
        let run = lapidary([&["serve", text(&package)], &wrong[..]].concat());
        assert_eq!(run.status, 2, "{}", run.stderr);
    }
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port().to_string();
    let run = lapidary(["serve", text(&package), "--port", &port, "--device", "cpu"]);
    assert_eq!(run.status, 1);
    assert!(run.stderr.contains("cannot listen on 127.0.0.1:"), "{}", run.stderr);
}
