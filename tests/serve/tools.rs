//! Tool calls, with a device that writes a text given by the test.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use lapidary::decode::DeviceError;
use lapidary::decode::batch::{BatchDecoder, BatchDevice, BatchOptions, BatchRow, RowOutput};
use lapidary::sample::Settings;
use lapidary::serve::http::{self, Keys, Limits, Model};
use lapidary::serve::{Scheduler, SchedulerOptions};
use lapidary::text::Tokenizer;
use serde_json::{Value, json};

use crate::client::Server;
use crate::models::tokenizer_files;

/// Writes these tokens after any prompt.
struct Script {
    tokens: Vec<u32>,
    /// Length of the prompt at each slot.
    prompts: Vec<usize>,
}

impl Script {
    fn logits(&self, slot: usize, fed: usize) -> Vec<f32> {
        let mut logits = vec![0.0; 97];
        // 2 ends a text.
        let next = self.tokens.get(fed - self.prompts[slot]).copied().unwrap_or(2);
        logits[next as usize] = 50.0;
        logits
    }
}

impl BatchDevice for Script {
    fn name(&self) -> &str {
        "script"
    }
    fn engine(&self) -> String {
        "script".into()
    }
    fn most_rows(&self) -> usize {
        4
    }
    fn largest_chunk(&self) -> usize {
        2048
    }
    fn cache_bytes(&mut self, capacity: usize) -> Result<usize, DeviceError> {
        Ok(capacity)
    }
    fn open(&mut self, slot: usize, _: usize, _: Option<(usize, usize)>) -> Result<(), DeviceError> {
        self.prompts.resize(self.prompts.len().max(slot + 1), 0);
        Ok(())
    }
    fn resize(&mut self, _: usize, _: usize, _: usize) -> Result<(), DeviceError> {
        Ok(())
    }
    fn close(&mut self, _: usize) {}
    fn prefill(
        &mut self,
        slot: usize,
        _: &[u32],
        _: usize,
        end: usize,
        logits: &mut Vec<f32>,
    ) -> Result<(), DeviceError> {
        self.prompts[slot] = end;
        *logits = self.logits(slot, end);
        Ok(())
    }
    fn decode(&mut self, rows: &mut [BatchRow<'_>]) -> Vec<Result<(), DeviceError>> {
        for row in rows.iter_mut() {
            *row.output = RowOutput::Logits(self.logits(row.slot, row.position + 1));
        }
        rows.iter().map(|_| Ok(())).collect()
    }
}

/// A server in this process whose model has that template and writes that text.
fn server(template: &str, text: &str) -> Server {
    limited(template, text, Limits::default())
}

/// The same with other limits.
pub fn limited(template: &str, text: &str, limits: Limits) -> Server {
    let folder = tempfile::tempdir().unwrap();
    let tokenizer = Tokenizer::open(&tokenizer_files(folder.path(), template)).unwrap();
    let tokens = tokenizer.encode(text, false).unwrap();
    let tokenizer = Arc::new(tokenizer);
    let open = move || -> Result<BatchDecoder, DeviceError> {
        let script = Script {
            tokens,
            prompts: Vec::new(),
        };
        Ok(BatchDecoder::new(
            Box::new(script),
            &[2048],
            97,
            BatchOptions::default(),
        ))
    };
    let scheduler = Scheduler::start(open, Some(tokenizer.clone()), SchedulerOptions::default()).unwrap();
    let eos_ids = BTreeSet::from([2]);
    let model = Model::new(
        "script".into(),
        scheduler,
        Some(tokenizer),
        Settings::greedy(),
        None,
        eos_ids,
    );
    let (sender, address) = std::sync::mpsc::channel();
    // Ends with the test's process.
    std::thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        runtime.block_on(async {
            let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
            sender.send(listener.local_addr().unwrap().to_string()).unwrap();
            let server = http::Server::new(vec![model], limits, Keys::default(), false);
            server.run(listener, std::future::pending(), Duration::ZERO).await;
        });
    });
    Server::at(address.recv().unwrap())
}

/// Like Qwen's, much shortened: tools before the conversation, calls and results in it.
const TEMPLATE: &str = "{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}<|im_start|>{{ m.role }}:\
    {{ m.content }}{% for call in m.tool_calls or [] %}<tool_call>{{ call.function.name }} {{ call.function.arguments.b }}\
    </tool_call>{% endfor %}{% if m.tool_call_id %}[{{ m.tool_call_id }}]{% endif %}<|im_end|>{% endfor %}";

fn body(more: Value) -> Value {
    let tool = |name: &str| json!({"type": "function", "function": {"name": name, "parameters": {"type": "object"}}});
    let mut body = json!({
        "messages": [{"role": "user", "content": "1+2?"}], "tools": [tool("add"), tool("now")], "tool_choice": "auto",
    });
    body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    body
}

#[test]
fn calls_are_read_out_of_text() {
    let written = "Well. <tool_call>{\"name\":\"add\",\"arguments\":{\"a\":1,\"b\":2}}</tool_call><tool_call>\
        {\"name\":\"now\"}</tool_call>";
    let server = server(TEMPLATE, written);
    let answer = server.post("/v1/chat/completions", &body(json!({}))).ok();
    let choice = &answer["choices"][0];
    assert_eq!(
        (&choice["finish_reason"], &choice["message"]["content"]),
        (&json!("tool_calls"), &json!("Well. "))
    );
    let calls = choice["message"]["tool_calls"].as_array().unwrap();
    assert_eq!(calls.len(), 2);
    assert_eq!(
        calls[0]["function"],
        json!({"name": "add", "arguments": "{\"a\":1,\"b\":2}"})
    );
    assert_eq!(calls[1]["function"], json!({"name": "now", "arguments": "{}"}));
    assert_eq!((&calls[0]["type"], calls[0].get("index")), (&json!("function"), None));
    assert_ne!(calls[0]["id"], calls[1]["id"]);

    let events = server
        .post("/v1/chat/completions", &body(json!({"stream": true})))
        .events();
    let deltas: Vec<&Value> = events.iter().map(|event| &event["choices"][0]["delta"]).collect();
    let text: String = deltas.iter().filter_map(|delta| delta["content"].as_str()).collect();
    assert_eq!(text, "Well. ");
    let streamed: Vec<&Value> = deltas
        .iter()
        .filter_map(|delta| delta["tool_calls"].as_array())
        .flatten()
        .collect();
    assert_eq!(streamed.len(), 2);
    for (number, (call, whole)) in streamed.iter().zip(calls).enumerate() {
        assert_eq!(
            (&call["index"], &call["function"]),
            (&json!(number), &whole["function"])
        );
    }
    assert_eq!(events.last().unwrap()["choices"][0]["finish_reason"], "tool_calls");

    // At most one, if the request says so.
    let one = json!({"parallel_tool_calls": false});
    let answer = server.post("/v1/chat/completions", &body(one)).ok();
    let found = &answer["choices"][0]["message"]["tool_calls"];
    assert_eq!(
        (found.as_array().unwrap().len(), &found[0]["function"]),
        (1, &calls[0]["function"])
    );
    let streamed = server.post(
        "/v1/chat/completions",
        &body(json!({"stream": true, "parallel_tool_calls": false})),
    );
    let events = streamed.events();
    let streamed = events
        .iter()
        .filter_map(|event| event["choices"][0]["delta"]["tool_calls"].as_array());
    assert_eq!(streamed.flatten().count(), 1);

    // Without tools, or with the choice `none`, it is text.
    for more in [json!({"tools": []}), json!({"tool_choice": "none"})] {
        let answer = server.post("/v1/chat/completions", &body(more)).ok();
        let choice = &answer["choices"][0];
        assert_eq!(
            (&choice["finish_reason"], &choice["message"]["content"]),
            (&json!("stop"), &json!(written))
        );
        assert!(choice["message"].get("tool_calls").is_none());
    }
    // A truncated call is text, and the finish reason is the length.
    let answer = server
        .post("/v1/chat/completions", &body(json!({"max_tokens": 30})))
        .ok();
    assert_eq!(answer["choices"][0]["finish_reason"], "length");
    assert_eq!(answer["choices"][0]["message"]["content"], written[..30]);
}

#[test]
fn the_template_sees_tools_calls_and_results() {
    let server = server(TEMPLATE, "3");
    let messages = json!([
        {"role": "user", "content": "1+2?"},
        {"role": "assistant", "content": null, "tool_calls": [
            {"id": "call-1", "type": "function", "function": {"name": "add", "arguments": "{\"a\": 1, \"b\": 2}"}}]},
        {"role": "tool", "tool_call_id": "call-1", "content": "3"},
    ]);
    let count = |text: &str| {
        server
            .post("/tokenize", &json!({"content": text, "add_special": false}))
            .ok()["count"]
            .clone()
    };
    let conversation = "<|im_start|>user:1+2?<|im_end|><|im_start|>assistant:<tool_call>add 2</tool_call><|im_end|>\
        <|im_start|>tool:3[call-1]<|im_end|>";
    let prompt_tokens = |body: Value| server.post("/v1/chat/completions", &body).ok()["usage"]["prompt_tokens"].clone();
    let without = prompt_tokens(json!({"messages": messages}));
    assert_eq!(without, count(conversation));
    let tools = body(json!({}))["tools"]
        .to_string()
        .replace("\":", "\": ")
        .replace(",\"", ", \"")
        .replace("},{", "}, {");
    assert_eq!(
        prompt_tokens(body(json!({"messages": messages}))),
        count(&format!("{tools}{conversation}"))
    );
}

#[test]
fn tools_that_cannot_be_called_are_refused() {
    let plain = server(crate::models::TEMPLATE, "x");
    let refused = |server: &Server, more: Value| server.post("/v1/chat/completions", &body(more)).error();
    let (status, code, message) = refused(&plain, json!({}));
    assert_eq!((status, code), (400, json!("unsupported")));
    assert!(message.contains("takes no tools"), "{message}");
    let server = server(TEMPLATE, "x");
    for choice in [
        json!("always"),
        json!({"type": "function", "function": {"name": "rm"}}),
        json!({"type": "function"}),
    ] {
        let message = refused(&server, json!({"tool_choice": choice})).2;
        assert!(
            message.starts_with("tool_choice: it is neither none, auto, required nor"),
            "{message}"
        );
    }
    let both = json!({"tool_choice": "required", "response_format": {"type": "json_object"}});
    assert!(refused(&server, both).2.contains("cannot have another form"));
    for tools in [
        json!([{"type": "function"}]),
        json!([{"type": "web_search", "function": {"name": "x"}}]),
    ] {
        assert!(
            refused(&server, json!({"tools": tools}))
                .2
                .starts_with("tools[0]: it is no")
        );
    }
}

#[test]
fn calls_can_be_forced() {
    // Whatever the model predicts.
    let server = server(TEMPLATE, "No, I will not.");
    let tool = |name: &str, parameters: Value| json!({"type": "function", "function": {"name": name, "parameters": parameters}});
    let parameters = json!({
        "type": "object", "properties": {"a": {"$ref": "#/$defs/digit"}}, "required": ["a"], "additionalProperties": false,
        "$defs": {"digit": {"enum": [1, 2]}},
    });
    let tools = json!([tool("add", parameters), tool("now", Value::Null)]);
    let called = |choice: Value| {
        let answer = server
            .post(
                "/v1/chat/completions",
                &body(json!({"tools": tools, "tool_choice": choice})),
            )
            .ok();
        let choice = &answer["choices"][0];
        assert_eq!(
            (&choice["finish_reason"], &choice["message"]["content"]),
            (&json!("tool_calls"), &Value::Null)
        );
        let calls = choice["message"]["tool_calls"].as_array().unwrap().clone();
        assert_eq!(calls.len(), 1, "{calls:?}");
        let arguments = calls[0]["function"]["arguments"].as_str().unwrap();
        let arguments: Value = serde_json::from_str(arguments).unwrap();
        (calls[0]["function"]["name"].clone(), arguments)
    };
    let named = |name: &str| json!({"type": "function", "function": {"name": name}});
    let (name, arguments) = called(named("add"));
    assert_eq!(name, "add");
    assert!(
        arguments == json!({"a": 1}) || arguments == json!({"a": 2}),
        "{arguments}"
    );
    assert_eq!(called(named("now")), (json!("now"), json!({})));
    assert!(["add", "now"].contains(&called(json!("required")).0.as_str().unwrap()));
}
