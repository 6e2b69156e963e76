//! `lapidary chat` and `generate --json-lines`, driven as by a script.

use std::io::Write;
use std::path::Path;
use std::process::Stdio;

use serde_json::{Value, json};

use crate::support::{Run, command, fixture, lapidary, package, text};

/// A tiny model of 97 tokens and a tokenizer that fits it: three special tokens and the letters of ASCII.
fn talker(folder: &Path, template: &str, capacity: &str) -> std::path::PathBuf {
    let files = folder.join("tokenizer");
    std::fs::create_dir(&files).unwrap();
    let path = fixture("smollm2/tokenizer.json");
    let mut tokenizer: Value = serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap();
    let special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"].map(String::from);
    // Byte-level tokenizers write a space as U+0120.
    let letters = std::iter::once("\u{120}".to_string()).chain(('!'..='}').map(String::from));
    let vocabulary = special
        .into_iter()
        .chain(letters)
        .enumerate()
        .map(|(id, token)| (token, json!(id)));
    tokenizer["model"]["vocab"] = Value::Object(vocabulary.collect());
    tokenizer["model"]["merges"] = json!([]);
    tokenizer["added_tokens"].as_array_mut().unwrap().truncate(3);
    std::fs::write(files.join("tokenizer.json"), tokenizer.to_string()).unwrap();
    let config = json!({"chat_template": template, "eos_token": "<|im_end|>"});
    std::fs::write(files.join("tokenizer_config.json"), config.to_string()).unwrap();
    let model = fixture("exports/llama-optimum/model.onnx");
    package(folder, &model, &["--capacity", capacity, "--tokenizer", text(&files)])
}

const TEMPLATE: &str = "{% for m in messages %}<|im_start|>{{ m['role'][0] }}{{ m['content'] }}<|im_end|>{% endfor %}\
    {% if add_generation_prompt %}<|im_start|>a{% endif %}";

fn with_input(args: &[&str], input: &[u8]) -> Run {
    let mut child = command()
        .args(args)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    // A refused run may end before it has read anything.
    let _ = child.stdin.take().unwrap().write_all(input);
    Run::of(child.wait_with_output().unwrap())
}

fn events(run: &Run) -> Vec<Value> {
    run.stdout
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect()
}

fn turns(pkg: &Path, flags: &[&str], input: &str) -> (Vec<Value>, Vec<Value>, String) {
    let common = [
        "chat",
        text(pkg),
        "--json-lines",
        "--seed",
        "5",
        "--max-new-tokens",
        "6",
    ];
    let run = with_input(&[&common[..], flags].concat(), input.as_bytes());
    assert_eq!(run.status, 0, "{}", run.stderr);
    let of = |kind: &str| events(&run).into_iter().filter(|e| e["event"] == kind).collect();
    (of("prompt"), of("done"), run.stderr.clone())
}

#[test]
fn each_turn_computes_only_what_it_adds() {
    let folder = tempfile::tempdir().unwrap();
    let pkg = talker(folder.path(), TEMPLATE, "256");
    let (prompts, done, _) = turns(&pkg, &["--system", "S"], "hello\nand now?\n/clear\nhello\n");
    assert_eq!((prompts.len(), done.len()), (3, 3));
    let prompt = |i: usize| prompts[i]["prompt_ids"].as_array().unwrap().clone();
    let cached = |i: usize| done[i]["cached_tokens"].as_u64().unwrap() as usize;
    assert_eq!(cached(0), 0);
    // The whole first prompt, and most of the answer.
    assert_eq!(prompt(1)[..prompt(0).len()], prompt(0)[..]);
    assert!(cached(1) >= prompt(0).len(), "{} {}", cached(1), prompt(0).len());
    // The same prompt again is cached except for its last token, whose logits are needed.
    assert_eq!((prompt(2), cached(2)), (prompt(0), prompt(0).len() - 1));

    // The cache does not change answers: the last turn alone, with the same random numbers, is the same.
    let greedy = ["--temperature", "0"];
    let (prompts, done, _) = turns(&pkg, &greedy, "one\ntwo\nthree\n");
    let ids: Vec<String> = prompts[2]["prompt_ids"]
        .as_array()
        .unwrap()
        .iter()
        .map(Value::to_string)
        .collect();
    let ids = ids.join(",");
    let args = [
        "generate",
        text(&pkg),
        "--prompt-ids",
        &ids,
        "--max-new-tokens",
        "6",
        "--json",
    ];
    let alone = lapidary([&args[..], &greedy].concat()).ok().json();
    assert_eq!(alone["tokens"], done[2]["tokens"]);
    assert_eq!(alone["cached_tokens"], 0);
    assert!(done[2]["cached_tokens"].as_u64().unwrap() > 0);
}

#[test]
fn commands_change_the_conversation() {
    let folder = tempfile::tempdir().unwrap();
    let pkg = talker(folder.path(), TEMPLATE, "256");
    let (prompts, _, stderr) = turns(
        &pkg,
        &[],
        "one\n/retry\n/undo\n/undo\n\ntwo\n/system X\nthree\n/what\n//x\n/quit\nfour\n",
    );
    let prompt = |i: usize| &prompts[i]["prompt_ids"];
    assert_eq!(prompts.len(), 5);
    assert_eq!(prompt(0), prompt(1));
    let length = |i: usize| prompt(i).as_array().unwrap().len();
    // After the undo the conversation is "two" alone, as "one" was; then a system message of three more tokens.
    assert_eq!(length(2), length(0));
    assert_eq!(length(3), length(0) + 2 + 4);
    assert!(length(4) > length(3));
    let lines: Vec<&str> = stderr.lines().collect();
    assert_eq!(
        lines,
        [
            "removed: one",
            "there is no message yet",
            "/what: unknown command; /help lists the commands"
        ]
    );
}

#[test]
fn a_full_cache_forgets_the_oldest_turns_and_says_so() {
    let folder = tempfile::tempdir().unwrap();
    let pkg = talker(folder.path(), TEMPLATE, "64");
    let (prompts, done, stderr) = turns(&pkg, &["--system", "S"], &"a message of words\n".repeat(6));
    assert_eq!(done.len(), 6);
    let system = &prompts[0]["prompt_ids"].as_array().unwrap()[..4];
    for prompt in &prompts {
        let ids = prompt["prompt_ids"].as_array().unwrap();
        assert!(ids.len() + 6 <= 64, "{}", ids.len());
        assert_eq!(&ids[..4], system);
    }
    assert!(stderr.contains("the first 1 exchanges were dropped"), "{stderr}");

    let run = with_input(&["chat", text(&pkg)], "too long ".repeat(9).as_bytes());
    let (message, help) = run.refused();
    assert!(
        message.contains("tokens, and the largest cache of this package has 64"),
        "{message}"
    );
    assert!(help.contains("--capacity"), "{help}");
}

#[test]
fn text_is_printed_a_turn_a_line() {
    let folder = tempfile::tempdir().unwrap();
    let pkg = talker(folder.path(), TEMPLATE, "256");
    let flags = ["--seed", "5", "--max-new-tokens", "6"];
    let run = with_input(&[&["chat", text(&pkg)], &flags[..]].concat(), b"hello\nagain\n").ok();
    let (_, done, _) = turns(&pkg, &[], "hello\nagain\n");
    let expected: String = done
        .iter()
        .map(|d| d["text"].as_str().unwrap().to_string() + "\n")
        .collect();
    assert_eq!(run.stdout, expected);
}

#[test]
fn json_lines_are_the_document_as_it_comes() {
    let folder = tempfile::tempdir().unwrap();
    let pkg = talker(folder.path(), TEMPLATE, "256");
    let common = [
        "generate",
        text(&pkg),
        "--chat",
        "hello",
        "--seed",
        "3",
        "--max-new-tokens",
        "20",
        "--ignore-eos",
    ];
    let run = |flags: &[&str]| lapidary([&common[..], flags].concat()).ok();
    let lines = events(&run(&["--json-lines", "--logprobs", "2", "--stop", "~~never~~"]));
    let document = run(&["--json", "--logprobs", "2"]).json();
    let (first, rest) = lines.split_first().unwrap();
    let (last, middle) = rest.split_last().unwrap();
    assert_eq!(
        *first,
        json!({"event": "prompt", "prompt_ids": document["prompt_ids"], "seed": 3})
    );
    let of = |field: &str| {
        middle
            .iter()
            .filter_map(|e| e.get(field))
            .cloned()
            .collect::<Vec<Value>>()
    };
    assert_eq!(json!(of("token")), document["tokens"]);
    let text: String = of("text").iter().map(|t| t.as_str().unwrap()).collect();
    assert_eq!(text, document["text"].as_str().unwrap());
    for (line, step) in middle.iter().zip(document["steps"].as_array().unwrap()) {
        assert_eq!(line["event"], "token");
        assert_eq!(
            (&line["logprob"], &line["top_logprobs"]),
            (&step["logprob"], &step["top_logprobs"])
        );
        assert_eq!(step["top_logprobs"].as_array().unwrap().len(), 2);
    }
    for field in ["text", "tokens", "finish_reason", "device", "cached_tokens"] {
        assert_eq!(last[field], document[field], "{field}");
    }
    assert_eq!(last["event"], "done");
    assert!(last["timing"]["sampling_ms"].as_f64().unwrap() > 0.0);
}

#[test]
fn what_cannot_be_talked_with_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let pkg = talker(folder.path(), "{% for %}", "64");
    let (message, help) = with_input(&["chat", text(&pkg)], b"hi\n").refused();
    assert!(
        message.starts_with("the model's chat template does not render: line 1: unexpected"),
        "{message}"
    );
    assert!(help.contains("--prompt"), "{help}");
    assert_eq!(lapidary(["generate", text(&pkg), "--chat", "hi"]).refused().0, message);

    let folder = tempfile::tempdir().unwrap();
    let template = "{{ raise_exception('only the user may speak') if messages[0]['role'] == 'system' else 'x' }}";
    let pkg = talker(folder.path(), template, "64");
    let (message, _) = with_input(&["chat", text(&pkg), "--system", "S"], b"hi\n").refused();
    assert!(message.ends_with("only the user may speak"), "{message}");

    let (message, help) = with_input(&["chat", text(&pkg)], b"\xFF\xFE\n").refused();
    assert!(message.starts_with("standard input, line 1:"), "{message}");
    assert!(help.contains("UTF-8"), "{help}");
    let prompt_from_stdin = ["generate", text(&pkg), "--prompt-file", "-"];
    let (message, help) = with_input(&prompt_from_stdin, b"caf\xE9").refused();
    assert!(
        message.starts_with("standard input: ") && message.contains("UTF-8"),
        "{message}"
    );
    assert!(help.contains("--prompt-file"), "{help}");

    let folder = tempfile::tempdir().unwrap();
    let model = fixture("exports/llama-optimum/model.onnx");
    let bare = package(folder.path(), &model, &[]);
    let (message, _) = with_input(&["chat", text(&bare)], b"hi\n").refused();
    assert!(message.contains("chat needs a tokenizer"), "{message}");
}

#[test]
fn a_prompt_comes_from_standard_input_or_a_file() {
    let folder = tempfile::tempdir().unwrap();
    let pkg = talker(folder.path(), TEMPLATE, "64");
    let flags = ["--json", "--temperature", "0", "--max-new-tokens", "3"];
    let prompt = |more: &[&str], input: &str| {
        let run = with_input(&[&["generate", text(&pkg)], more, &flags].concat(), input.as_bytes());
        run.ok().json()["prompt_ids"].clone()
    };
    let file = folder.path().join("prompt.txt");
    std::fs::write(&file, "some words").unwrap();
    let expected = prompt(&["--prompt", "some words"], "");
    assert_eq!(prompt(&["--prompt-file", "-"], "some words"), expected);
    assert_eq!(prompt(&["--prompt-file", text(&file)], ""), expected);
}

/// Every flag that takes text takes text that begins with a hyphen.
#[test]
fn text_may_begin_with_a_hyphen() {
    let folder = tempfile::tempdir().unwrap();
    let pkg = talker(folder.path(), TEMPLATE, "64");
    let flags = ["--json", "--temperature", "0", "--max-new-tokens", "1"];
    let prompt = |more: &[&str]| {
        let run = lapidary([&["generate", text(&pkg)], more, &flags].concat());
        run.ok().json()["prompt_ids"].clone()
    };
    for said in ["- first", "-1 + 3 =", "-5", "--help me", "-h", "--json"] {
        let file = folder.path().join("prompt.txt");
        std::fs::write(&file, said).unwrap();
        assert_eq!(
            prompt(&["--prompt", said]),
            prompt(&["--prompt-file", text(&file)]),
            "{said}"
        );
        let with_system = prompt(&["--chat", said, "--system", said]);
        let (prompts, _, _) = turns(
            &pkg,
            &["--system", said, "--stop", said, "--dry-sequence-breaker", "-"],
            said,
        );
        assert_eq!(with_system, prompts[0]["prompt_ids"], "{said}");
    }
}

/// `--stop` reads escapes as llama.cpp does, and prompts are taken as they are.
#[test]
fn escapes_are_read_in_stop_strings_alone() {
    let folder = tempfile::tempdir().unwrap();
    let pkg = talker(folder.path(), TEMPLATE, "64");
    let run = |flags: &[&str]| {
        let common = ["--json", "--temperature", "0", "--max-new-tokens", "12", "--ignore-eos"];
        lapidary([&["generate", text(&pkg), "--prompt", "ab"], &common[..], flags].concat())
            .ok()
            .json()
    };
    let whole = run(&[]);
    let last = whole["text"].as_str().unwrap().chars().next().unwrap();
    let escaped = format!("\\x{:02x}", last as u32);
    assert_eq!(run(&["--stop", &escaped])["text"], "");
    assert_eq!(run(&["--stop", &escaped])["finish_reason"], "stop");
    assert_eq!(run(&["--stop", &escaped, "--no-escape"])["finish_reason"], "length");
    let prompt = |said: &str| {
        let flags = ["--json", "--max-new-tokens", "1", "--prompt", said];
        lapidary([&["generate", text(&pkg)], &flags[..]].concat()).ok().json()["prompt_ids"].clone()
    };
    assert_eq!(prompt("\\n").as_array().unwrap().len(), 2);
}

/// A stop string that is a special token ends at that token.
#[test]
fn stop_strings_may_be_special_tokens() {
    let folder = tempfile::tempdir().unwrap();
    let pkg = talker(folder.path(), TEMPLATE, "64");
    // Only the turn marker, which is not an end token here, can be generated.
    let bans: Vec<String> = (0..97).filter(|id| *id != 1).map(|id| format!("{id}=-inf")).collect();
    let bans: Vec<&str> = bans.iter().flat_map(|ban| ["--logit-bias", ban]).collect();
    let flags = [
        "--chat",
        "hi",
        "--json",
        "--max-new-tokens",
        "4",
        "--stop",
        "<|im_start|>",
    ];
    let found = lapidary([&["generate", text(&pkg)], &flags[..], &bans].concat())
        .ok()
        .json();
    assert_eq!(
        (&found["finish_reason"], &found["tokens"]),
        (&json!("stop"), &json!([1]))
    );
}

#[test]
fn a_tokenizer_of_another_model_is_noticed() {
    let folder = tempfile::tempdir().unwrap();
    let model = fixture("exports/llama-optimum/model.onnx");
    let (pkg, tokenizer) = (folder.path().join("pkg"), fixture("smollm2"));
    let convert = [
        "convert",
        text(&model),
        "-o",
        text(&pkg),
        "--capacity",
        "64",
        "--tokenizer",
        text(&tokenizer),
    ];
    let printed = lapidary(convert).ok().stdout;
    assert!(
        printed.contains("the tokenizer has 49152 tokens, the model's vocabulary 97"),
        "{printed}"
    );
    for prompt in ["--prompt", "--chat"] {
        let (message, help) = lapidary(["generate", text(&pkg), prompt, "The capital"]).refused();
        assert!(
            message.contains("and the model's vocabulary is 97: they do not belong together"),
            "{message}"
        );
        assert!(help.contains("--tokenizer"), "{help}");
    }
    let (message, _) = with_input(&["chat", text(&pkg)], b"The capital\n").refused();
    assert!(message.contains("they do not belong together"), "{message}");
}

/// Ctrl-C during an answer ends the answer, not the conversation.
#[cfg(unix)]
#[test]
fn an_interrupt_stops_the_answer_only() {
    use std::io::{BufRead, BufReader};
    let folder = tempfile::tempdir().unwrap();
    let pkg = talker(folder.path(), TEMPLATE, "4096");
    // The end token is banned: without an interrupt the answer would fill the cache.
    let flags = ["--json-lines", "--max-new-tokens", "4000", "--logit-bias", "2=-inf"];
    let mut child = command()
        .args([&["chat", text(&pkg)], &flags[..]].concat())
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut stdin = child.stdin.take().unwrap();
    stdin.write_all(b"hello\n").unwrap();
    let mut events = BufReader::new(child.stdout.take().unwrap())
        .lines()
        .map(|line| serde_json::from_str::<Value>(&line.unwrap()).unwrap());
    let mut next = |kind: &str| events.find(|e| e["event"] == kind).unwrap();
    let interrupt = || {
        let kill = std::process::Command::new("kill")
            .args(["-INT", &child.id().to_string()])
            .status();
        assert!(kill.unwrap().success());
    };
    next("token");
    interrupt();
    let done = next("done");
    assert_eq!(done["finish_reason"], "interrupted");
    let answered = done["tokens"].as_array().unwrap().len();
    assert!((1..4000).contains(&answered), "{answered}");
    // The next turn has the stopped answer in its cache.
    stdin.write_all(b"again\n").unwrap();
    next("token");
    interrupt();
    assert!(next("done")["cached_tokens"].as_u64().unwrap() as usize > answered);
    // Without a running answer Ctrl-C ends the program.
    interrupt();
    assert_eq!(child.wait().unwrap().code(), Some(130));
}
