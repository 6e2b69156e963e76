//! Structured output: the text has the requested form, whatever the model predicts.

use serde_json::{Value, json};

use crate::client::Server;

fn completion(server: &Server, more: Value) -> Value {
    let mut body =
        json!({"prompt": [5, 6, 7], "max_tokens": 400, "temperature": 1.5, "top_k": 0, "min_p": 0, "top_p": 1});
    body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    server.post("/v1/completions", &body).ok()["choices"].take()
}

fn schema() -> Value {
    json!({
        "type": "object",
        "properties": {
            "count": {"type": "integer", "minimum": 0, "maximum": 99},
            "kind": {"enum": ["one", "other"]},
            "more": {"$ref": "#/$defs/more"},
        },
        "required": ["count", "kind", "more"],
        "additionalProperties": false,
        "$defs": {"more": {"type": "array", "items": {"type": "boolean"}, "minItems": 1, "maxItems": 3}},
    })
}

fn check(text: &str) {
    let value: Value = serde_json::from_str(text).unwrap_or_else(|e| panic!("{e}: {text}"));
    let object = value.as_object().unwrap();
    assert_eq!(object.keys().collect::<Vec<_>>(), ["count", "kind", "more"], "{text}");
    assert!(object["count"].as_u64().unwrap() < 100, "{text}");
    assert!(object["kind"] == "one" || object["kind"] == "other", "{text}");
    let more = object["more"].as_array().unwrap();
    assert!(
        (1..=3).contains(&more.len()) && more.iter().all(Value::is_boolean),
        "{text}"
    );
}

#[test]
fn texts_have_the_form_that_is_asked_for() {
    let server = Server::start("64,512", &["--max-sequences", "4"]);
    let format = json!({"type": "json_schema", "json_schema": {"name": "x", "strict": true, "schema": schema()}});
    let choices = completion(
        &server,
        json!({"response_format": format, "n": 6, "seed": 1, "return_token_ids": true}),
    );
    let choices = choices.as_array().unwrap();
    for choice in choices {
        check(choice["text"].as_str().unwrap());
        assert_eq!(choice["finish_reason"], "stop");
    }
    assert!(choices.iter().any(|choice| choice["text"] != choices[0]["text"]));
    // The same alone, and with ignored end tokens.
    let alone = completion(&server, json!({"json_schema": schema(), "seed": 4}));
    assert_eq!(alone[0]["text"], choices[3]["text"]);
    let ignoring = completion(&server, json!({"json_schema": schema(), "seed": 9, "ignore_eos": true}));
    check(ignoring[0]["text"].as_str().unwrap());
    assert_eq!(ignoring[0]["finish_reason"], "stop");

    // As llama.cpp's server takes it.
    let other = json!({"type": "json_object", "schema": schema()});
    let same = completion(&server, json!({"response_format": other, "seed": 4}));
    assert_eq!(same[0]["text"], choices[3]["text"]);

    let choices = completion(
        &server,
        json!({"grammar": "start: \"<\" /[a-c]{3}/ (\"x\" | \"yz\") \">\"", "n": 4, "seed": 2}),
    );
    for choice in choices.as_array().unwrap() {
        let text = choice["text"].as_str().unwrap();
        let inside = text
            .strip_prefix('<')
            .and_then(|text| text.strip_suffix('>'))
            .unwrap_or_else(|| panic!("{text}"));
        assert!(inside[..3].chars().all(|c| ('a'..='c').contains(&c)), "{text}");
        assert!(["x", "yz"].contains(&&inside[3..]), "{text}");
    }
    // In a streamed chat.
    let body = json!({
        "messages": [{"role": "user", "content": "x"}], "response_format": {"type": "json_object"}, "stream": true,
        "temperature": 1, "seed": 3, "max_tokens": 400, "logit_bias": {"96": 100},
    });
    let events = server.post("/v1/chat/completions", &body).events();
    let text: String = events
        .iter()
        .filter_map(|event| event["choices"][0]["delta"]["content"].as_str())
        .collect();
    assert!(serde_json::from_str::<Value>(&text).unwrap().is_object(), "{text}");
    // Other requests are not affected.
    let plain = |server: &Server| completion(server, json!({"seed": 5, "max_tokens": 8}))[0]["text"].clone();
    assert_eq!(plain(&server), plain(&server));
}

#[test]
fn forms_that_cannot_be_followed_are_refused() {
    let server = Server::start("64", &[]);
    let refused = |field: &str, value: Value| {
        let mut body = json!({"prompt": [5]});
        body[field] = value;
        let (status, code, message) = server.post("/v1/completions", &body).error();
        assert_eq!(status, 400, "{message}");
        (code, message)
    };
    for (field, value) in [
        ("json_schema", json!({"type": "wizard"})),
        ("json_schema", json!({"$ref": "file:///etc/passwd"})),
        ("json_schema", json!({"$ref": "http://127.0.0.1:1/schema"})),
        ("json_schema", json!({"type": "string", "pattern": "("})),
        // Only itself, without an end.
        ("json_schema", json!({"$ref": "#"})),
        (
            "json_schema",
            json!({"allOf": [{"type": "string"}, {"type": "number"}]}),
        ),
        ("grammar", json!("start: nowhere")),
        ("grammar", json!("start: \"a")),
        ("grammar", json!("")),
    ] {
        let (code, message) = refused(field, value.clone());
        assert_eq!(code, "invalid_schema", "{value}: {message}");
        assert!(
            message.starts_with(&format!("{field}: it cannot be followed: ")),
            "{message}"
        );
        assert!(!message.contains("root:"), "no file is read: {message}");
    }
    assert!(
        refused("response_format", json!({"type": "xml"}))
            .1
            .contains("not text, json_object or json_schema")
    );
    assert!(
        refused("response_format", json!({"type": "json_schema"}))
            .1
            .contains("has no schema")
    );
    let both = json!({"prompt": [5], "grammar": "start: \"a\"", "json_schema": {}});
    assert!(
        server
            .post("/v1/completions", &both)
            .error()
            .2
            .starts_with("grammar: there is json_schema already")
    );
    // The maximum depth of JSON, and deeper.
    for (depth, status) in [(60, 200), (124, 200), (5000, 400)] {
        let (before, after) = ("{\"type\": \"array\", \"items\": ".repeat(depth), "}".repeat(depth));
        let body = format!("{{\"prompt\": [5], \"json_schema\": {before}{{}}{after}}}");
        assert_eq!(
            server.request("POST", "/v1/completions", &[], &body).status,
            status,
            "{depth}"
        );
    }
    server.post("/v1/completions", &json!({"prompt": [5]})).ok();
}
