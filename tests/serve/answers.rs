//! The server's responses: the tokens of `lapidary generate` in OpenAI's format, complete and streamed.

use serde_json::{Value, json};

use crate::client::{Reply, Server, generate};

fn completion(server: &Server, body: Value) -> Value {
    server.post("/v1/completions", &body).ok()
}

#[test]
fn many_clients_get_what_generate_gives() {
    let server = Server::start("128", &["--max-sequences", "4", "--temperature", "1.5"]);
    let prompts = [
        "5,6,7",
        "40,41,42,43,44,45,46",
        "9",
        "70,3,70,3,70,3",
        "12,13",
        "80,20,30",
    ];
    let answers: Vec<Value> = std::thread::scope(|scope| {
        let clients: Vec<_> = prompts
            .iter()
            .enumerate()
            .map(|(i, prompt)| {
                let server = &server;
                scope.spawn(move || {
                    let ids: Vec<u32> = prompt.split(',').map(|id| id.parse().unwrap()).collect();
                    let body = json!({
                        "model": "pkg", "prompt": ids, "max_tokens": 20 + i, "seed": i, "return_token_ids": true,
                        "repeat_penalty": 1.1, "logprobs": 2,
                    });
                    completion(server, body)
                })
            })
            .collect();
        clients.into_iter().map(|client| client.join().unwrap()).collect()
    });
    for (i, (prompt, answer)) in prompts.iter().zip(&answers).enumerate() {
        let (seed, tokens) = (i.to_string(), (20 + i).to_string());
        let flags = [
            "--prompt-ids",
            prompt,
            "--seed",
            &seed,
            "--max-new-tokens",
            &tokens,
            "--temperature",
            "1.5",
            "--repetition-penalty",
            "1.1",
            "--logprobs",
            "2",
        ];
        let alone = generate(&server, &flags);
        let choice = &answer["choices"][0];
        assert_eq!(choice["token_ids"], alone["tokens"], "prompt {i}");
        assert_eq!(choice["text"], alone["text"]);
        assert_eq!(choice["finish_reason"], alone["finish_reason"]);
        let logprobs: Vec<&Value> = alone["steps"]
            .as_array()
            .unwrap()
            .iter()
            .map(|step| &step["logprob"])
            .collect();
        assert_eq!(choice["logprobs"]["token_logprobs"], json!(logprobs));
        let (read, written) = (prompt.split(',').count(), alone["tokens"].as_array().unwrap().len());
        let usage = &answer["usage"];
        assert_eq!(usage["prompt_tokens"], read);
        assert_eq!(usage["completion_tokens"], written);
        assert_eq!(usage["total_tokens"], read + written);
        assert!(answer["id"].as_str().unwrap().starts_with("cmpl-"));
        assert_eq!(
            (&answer["object"], &answer["model"]),
            (&json!("text_completion"), &json!("pkg"))
        );
    }
}

/// Text, log-probabilities and finish reason of a streamed choice.
fn joined(events: &[Value], index: usize, is_chat: bool) -> (String, Vec<Value>, Value) {
    let mut text = String::new();
    let mut logprobs = Vec::new();
    let mut reason = Value::Null;
    for event in events {
        for choice in event["choices"]
            .as_array()
            .unwrap()
            .iter()
            .filter(|c| c["index"] == index)
        {
            assert_eq!(reason, Value::Null, "nothing comes after the end");
            let piece = if is_chat {
                &choice["delta"]["content"]
            } else {
                &choice["text"]
            };
            text.push_str(piece.as_str().unwrap_or(""));
            logprobs.extend(choice["logprobs"]["content"].as_array().into_iter().flatten().cloned());
            reason = choice["finish_reason"].clone();
        }
    }
    (text, logprobs, reason)
}

#[test]
fn a_chat_streams_what_it_answers_as_a_whole() {
    let server = Server::start("256", &[]);
    let body = |more: Value| {
        let mut body = json!({
            "model": "pkg",
            "messages": [{"role": "developer", "content": "Be brief."},
                {"role": "user", "content": [{"type": "text", "text": "He"}, {"type": "text", "text": "llo"}]}],
            "temperature": 1.0, "seed": 11, "max_completion_tokens": 12, "ignore_eos": true, "n": 2,
            "logprobs": true, "top_logprobs": 3,
        });
        body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        body
    };
    let whole = server.post("/v1/chat/completions", &body(json!({}))).ok();
    assert_eq!(whole["object"], "chat.completion");
    let choices = whole["choices"].as_array().unwrap();
    assert_eq!(choices.len(), 2);
    assert_ne!(choices[0]["message"]["content"], choices[1]["message"]["content"]);
    // The prompt is the template's, and counts once; the second choice reused it except for its last chunk.
    let prompt = "<|im_start|>sBe brief.<|im_end|><|im_start|>uHello<|im_end|><|im_start|>a";
    let tokens = server
        .post("/tokenize", &json!({"content": prompt, "add_special": false}))
        .ok();
    assert_eq!(whole["usage"]["prompt_tokens"], tokens["count"]);
    assert_eq!(whole["usage"]["completion_tokens"], 24);
    let messages = json!([{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]);
    assert_eq!(server.post("/tokenize", &json!({"messages": messages})).ok(), tokens);

    let streamed = json!({"stream": true, "stream_options": {"include_usage": true}});
    let reply = server.post("/v1/chat/completions", &body(streamed));
    let mut events = reply.events();
    let last = events.pop().unwrap();
    assert_eq!(
        (&last["choices"], &last["usage"]["completion_tokens"]),
        (&json!([]), &json!(24))
    );
    assert!(
        events
            .iter()
            .all(|event| event["usage"].is_null() && event["object"] == "chat.completion.chunk")
    );
    assert!(events.iter().all(|event| event["id"] == events[0]["id"]));
    for (index, choice) in choices.iter().enumerate() {
        let (text, logprobs, reason) = joined(&events, index, true);
        assert_eq!(
            (&json!(text), &reason),
            (&choice["message"]["content"], &json!("length"))
        );
        assert_eq!(json!(logprobs), choice["logprobs"]["content"]);
        assert_eq!(logprobs.len(), 12);
        let first = events
            .iter()
            .find(|event| event["choices"][0]["index"] == index)
            .unwrap();
        assert_eq!(first["choices"][0]["delta"]["role"], "assistant");
    }
    let entry = &choices[0]["logprobs"]["content"][0];
    let top = entry["top_logprobs"].as_array().unwrap();
    assert_eq!(top.len(), 3);
    assert!(top[0]["logprob"].as_f64() >= top[1]["logprob"].as_f64());
    let bytes: Vec<u8> = serde_json::from_value(entry["bytes"].clone()).unwrap();
    assert_eq!(String::from_utf8_lossy(&bytes), entry["token"].as_str().unwrap());

    // A choice equals a request with its seed.
    let second = server
        .post("/v1/chat/completions", &body(json!({"n": 1, "seed": 12})))
        .ok();
    assert_eq!(second["choices"][0]["message"], choices[1]["message"]);
    // Without usage and log-probabilities.
    let plain = json!({"stream": true, "n": 1, "logprobs": false, "top_logprobs": null});
    let events = server.post("/v1/chat/completions", &body(plain)).events();
    assert!(events.iter().all(|event| event.get("usage").is_none()));
    assert_eq!(joined(&events, 0, true).0, choices[0]["message"]["content"]);
}

#[test]
fn prompts_may_be_several_and_be_repeated() {
    let server = Server::start("128", &["--temperature", "0"]);
    let body = json!({"prompt": ["Hello", "what?"], "n": 2, "max_tokens": 5, "echo": true, "ignore_eos": true});
    let answer = completion(&server, body);
    let choices = answer["choices"].as_array().unwrap();
    let texts: Vec<&str> = choices.iter().map(|choice| choice["text"].as_str().unwrap()).collect();
    assert_eq!(texts.len(), 4);
    assert!(
        texts[0].starts_with("Hello") && texts[2].starts_with("what?"),
        "{texts:?}"
    );
    assert_eq!((texts[0], texts[2]), (texts[1], texts[3]));
    assert_eq!(answer["usage"]["prompt_tokens"], 10);
    let alone = generate(
        &server,
        &[
            "--prompt",
            "what?",
            "--temperature",
            "0",
            "--max-new-tokens",
            "5",
            "--ignore-eos",
        ],
    );
    assert_eq!(texts[2], format!("what?{}", alone["text"].as_str().unwrap()));
    let body = json!({"prompt": "Hello", "max_tokens": 5, "echo": true, "ignore_eos": true, "stream": true});
    let events = server.post("/v1/completions", &body).events();
    assert_eq!(joined(&events, 0, false).0, texts[0]);
    // As with OpenAI, a completion without a limit is short.
    let short = completion(&server, json!({"prompt": [5, 6], "ignore_eos": true}));
    assert_eq!(short["usage"]["completion_tokens"], 16);
}

#[test]
fn what_a_request_says_of_sampling_counts() {
    let server = Server::start("128", &[]);
    let tokens = |more: Value| {
        let mut body =
            json!({"prompt": [5, 6, 7, 8], "max_tokens": 12, "ignore_eos": true, "return_token_ids": true, "seed": 3});
        body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        completion(&server, body)["choices"][0]["token_ids"].clone()
    };
    let flags = |more: &[&str]| {
        let common = [
            "--prompt-ids",
            "5,6,7,8",
            "--max-new-tokens",
            "12",
            "--ignore-eos",
            "--seed",
            "3",
        ];
        generate(&server, &[&common[..], more].concat())["tokens"].clone()
    };
    let cases: [(Value, &[&str]); 11] = [
        (json!({}), &[]),
        (json!({"temperature": 0}), &["--temperature", "0"]),
        (
            json!({"temperature": 2.5, "top_k": 0, "top_p": 1, "min_p": 0}),
            &["--temperature", "2.5", "--top-k", "0", "--top-p", "1", "--min-p", "0"],
        ),
        (
            json!({"temperature": 2, "frequency_penalty": 1.5, "presence_penalty": 0.5, "repeat_last_n": -1}),
            &[
                "--temperature",
                "2",
                "--frequency-penalty",
                "1.5",
                "--presence-penalty",
                "0.5",
                "--penalty-last-n",
                "-1",
            ],
        ),
        (
            json!({"temperature": 2, "typical_p": 0.5, "top_n_sigma": 1.5}),
            &["--temperature", "2", "--typical-p", "0.5", "--top-n-sigma", "1.5"],
        ),
        (
            json!({"temperature": 2, "xtc_probability": 0.9, "xtc_threshold": 0.02}),
            &[
                "--temperature",
                "2",
                "--xtc-probability",
                "0.9",
                "--xtc-threshold",
                "0.02",
            ],
        ),
        (
            json!({"temperature": 0, "dry_multiplier": 5, "dry_base": 2, "dry_allowed_length": 1, "dry_penalty_last_n": 64}),
            &[
                "--temperature",
                "0",
                "--dry-multiplier",
                "5",
                "--dry-base",
                "2",
                "--dry-allowed-length",
                "1",
                "--dry-penalty-last-n",
                "64",
            ],
        ),
        (
            json!({"temperature": 0, "dry_multiplier": 5, "dry_allowed_length": 1, "dry_sequence_breakers": ["a", "b"]}),
            &[
                "--temperature",
                "0",
                "--dry-multiplier",
                "5",
                "--dry-allowed-length",
                "1",
                "--dry-sequence-breaker",
                "a",
                "--dry-sequence-breaker",
                "b",
            ],
        ),
        (
            json!({"mirostat": 2, "mirostat_tau": 3, "mirostat_eta": 0.2}),
            &["--mirostat", "2", "--mirostat-tau", "3", "--mirostat-eta", "0.2"],
        ),
        (
            json!({"temperature": 2, "samplers": ["temperature", "top_k"], "top_k": 5}),
            &["--temperature", "2", "--samplers", "temperature,top-k", "--top-k", "5"],
        ),
        (
            json!({"temperature": 0, "logit_bias": {"9": 100, "10": -100}}),
            &["--temperature", "0", "--logit-bias", "9=100", "--logit-bias", "10=-100"],
        ),
    ];
    let mut different = Vec::new();
    for (fields, arguments) in cases {
        let found = tokens(fields.clone());
        assert_eq!(found, flags(arguments), "{fields}");
        different.push(found.to_string());
    }
    different.sort();
    different.dedup();
    assert!(different.len() >= 8, "{different:?}");
    assert_eq!(
        tokens(json!({"logit_bias": [[9, 100]], "temperature": 0})),
        json!(vec![9; 12])
    );
    let banned = tokens(json!({"logit_bias": [[9, 100], ["9", false]], "temperature": 0}));
    assert!(!banned.as_array().unwrap().contains(&json!(9)), "{banned}");

    // Without a seed answers differ, and a stop string ends the text before it.
    let body = json!({"prompt": [5], "max_tokens": 30, "temperature": 3, "ignore_eos": true, "top_k": 0, "min_p": 0});
    let texts: Vec<Value> = (0..2)
        .map(|_| completion(&server, body.clone())["choices"][0]["text"].clone())
        .collect();
    assert_ne!(texts[0], texts[1]);
    let mut body = json!({"prompt": [5], "max_tokens": 30, "temperature": 2, "ignore_eos": true, "seed": 4});
    let text = completion(&server, body.clone())["choices"][0]["text"]
        .as_str()
        .unwrap()
        .to_string();
    let stop: String = text.chars().skip(7).take(3).collect();
    let before = &text[..text.find(&stop).unwrap()];
    body["stop"] = json!(["never there", stop]);
    let stopped = completion(&server, body.clone());
    assert_eq!(
        (&stopped["choices"][0]["text"], &stopped["choices"][0]["finish_reason"]),
        (&json!(before), &json!("stop"))
    );
    body["stop"] = json!(stop);
    body["stream"] = json!(true);
    let events = server.post("/v1/completions", &body).events();
    let (text, _, reason) = joined(&events, 0, false);
    assert_eq!((&text[..], reason), (before, json!("stop")));
}

#[test]
fn packages_are_served_by_name() {
    let folder = tempfile::tempdir().unwrap();
    let one = crate::models::talker(folder.path(), "64");
    let other = folder.path().join("bare");
    let model = crate::support::fixture("exports/mistral-optimum/model.onnx");
    crate::support::package(&folder.path().join("bare"), &model, &["--capacity", "32"]);
    let other = other.join("pkg");
    let renamed = folder.path().join("mistral");
    std::fs::rename(&other, &renamed).unwrap();
    let server = Server::of(folder, &[&one, &renamed], &[]);
    let list = server.get("/v1/models").ok();
    let names: Vec<&Value> = list["data"]
        .as_array()
        .unwrap()
        .iter()
        .map(|model| &model["id"])
        .collect();
    assert_eq!(json!(names), json!(["pkg", "mistral"]));
    assert_eq!(server.get("/v1/models/mistral").ok()["max_model_len"], 32);
    let ask = |model: Value| {
        let body =
            json!({"model": model, "prompt": [5, 6], "max_tokens": 3, "temperature": 0, "return_token_ids": true});
        server.post("/v1/completions", &body)
    };
    let (a, b) = (ask(json!("pkg")).ok(), ask(json!("mistral")).ok());
    assert_ne!(a["choices"][0]["token_ids"], b["choices"][0]["token_ids"]);
    assert_eq!(b["choices"][0]["text"], "");
    let missing = |reply: Reply| reply.error();
    assert_eq!(missing(ask(json!("gpt-4"))).0, 404);
    assert_eq!(missing(ask(json!("gpt-4"))).1, "model_not_found");
    assert_eq!(missing(ask(Value::Null)).2, "model: there are several; name one");
    // Without a tokenizer there are only token ids.
    let text = json!({"model": "mistral", "prompt": "Hello"});
    let (status, _, message) = server.post("/v1/completions", &text).error();
    assert_eq!(status, 400);
    assert!(message.contains("has no tokenizer"), "{message}");
    let stop = json!({"model": "mistral", "prompt": [5], "stop": "x"});
    assert!(
        server
            .post("/v1/completions", &stop)
            .error()
            .2
            .contains("need a tokenizer")
    );
}
