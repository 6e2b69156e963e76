//! Tool calls in a model's output: the forms of template families, and parsing them from streamed text.
//!
//! Input: pieces of text and the tokens between them. Output: text outside of calls, and calls. A call that cannot be
//! parsed stays text, so no output of the model is lost.

use serde_json::Value;

use super::tokenizer::Tokenizer;

/// How a family of models writes calls.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum ToolFormat {
    /// `<tool_call>{"name": …, "arguments": {…}}</tool_call>`, any number of them: Hermes, Qwen 2.5 and 3, SmolLM3.
    Tagged,
    /// `[TOOL_CALLS][{"name": …, "arguments": {…}}, …]`, or `[TOOL_CALLS]name[ARGS]{…}` for each: Mistral.
    List,
    /// `{"name": …, "parameters": {…}}` and nothing else, perhaps after `<|python_tag|>`, with `;` between several: Llama 3.1
    /// and later.
    Bare,
}

const OPEN: &str = "<tool_call>";
const CLOSE: &str = "</tool_call>";
const CALLS: &str = "[TOOL_CALLS]";
const ARGS: &str = "[ARGS]";
const PYTHON: &str = "<|python_tag|>";

impl ToolFormat {
    /// How the models of this chat template write calls; `None` if it has no tools or an unknown format.
    pub fn of_template(source: &str) -> Option<ToolFormat> {
        if !source.contains("tools") {
            return None;
        }
        let bare = source.contains(PYTHON) || (source.contains("\"parameters\"") && source.contains("ipython"));
        match () {
            // Some write XML elements in the tags.
            () if source.contains(OPEN) && !source.contains("<function=") => Some(ToolFormat::Tagged),
            () if source.contains(CALLS) => Some(ToolFormat::List),
            () if bare => Some(ToolFormat::Bare),
            () => None,
        }
    }
}

/// The parts of a call's syntax.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum CallPart {
    /// A special token.
    Token(u32),
    /// This text.
    Text(&'static str),
    /// A line end, or none.
    Line,
    /// The object: `name`, and the arguments under this key.
    Object(&'static str),
}

impl ToolFormat {
    /// The syntax of one call.
    pub fn one_call(self, tokenizer: &Tokenizer) -> Vec<CallPart> {
        let special = tokenizer.special_tokens();
        let mark = |mark: &'static str| match special.iter().find(|(_, text)| text == mark) {
            Some((id, _)) => CallPart::Token(*id),
            None => CallPart::Text(mark),
        };
        let object = CallPart::Object("arguments");
        match self {
            ToolFormat::Tagged => vec![mark(OPEN), CallPart::Line, object, CallPart::Line, mark(CLOSE)],
            ToolFormat::List => vec![mark(CALLS), CallPart::Text("["), object, CallPart::Text("]")],
            ToolFormat::Bare => vec![CallPart::Object("parameters")],
        }
    }
}

/// A call.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ToolCall {
    /// Name of the tool.
    pub name: String,
    /// JSON, as written by the model.
    pub arguments: String,
}

/// A part of a model's output.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ToolPart {
    /// Never empty.
    Text(String),
    /// A whole call.
    Call(ToolCall),
}

/// Reads calls out of one text.
pub struct ToolReader {
    format: ToolFormat,
    /// Tools that may be called: an object with another name is not a call.
    names: Vec<String>,
    /// Special tokens of the format, which have no text.
    marks: Vec<(u32, &'static str)>,
    /// Text that is not final yet.
    held: String,
    state: State,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum State {
    /// Nothing but white space came so far.
    Start,
    /// Text.
    Text,
    /// In a call, whose start is not in `held`.
    Call,
    /// After a call: white space before another one does not count as text.
    After,
}

impl ToolReader {
    /// For one text of a model with these tools.
    pub fn new(format: ToolFormat, names: Vec<String>, tokenizer: &Tokenizer) -> Self {
        let special = tokenizer.special_tokens();
        let of = |mark: &'static str| special.iter().find(|(_, text)| text == mark).map(|(id, _)| (*id, mark));
        ToolReader {
            format,
            names,
            marks: [OPEN, CLOSE, CALLS, ARGS, PYTHON].into_iter().filter_map(of).collect(),
            held: String::new(),
            state: State::Start,
        }
    }

    /// Adds a token, if one was drawn, and the text that it made final.
    pub fn push(&mut self, token: Option<u32>, text: &str) -> Vec<ToolPart> {
        self.held.push_str(text);
        if let Some((_, mark)) = self.marks.iter().find(|(id, _)| Some(*id) == token) {
            self.held.push_str(mark);
        }
        let mut parts = Vec::new();
        while let Some(part) = self.advance() {
            parts.extend(part);
        }
        parts
    }

    /// The rest at the end of the text. A call without its end mark is a call.
    pub fn finish(&mut self) -> Vec<ToolPart> {
        let held = std::mem::take(&mut self.held);
        let calls = match (self.state, self.format) {
            (State::Call, ToolFormat::Tagged) => self.call(&held).map(|call| vec![call]),
            (State::Call, ToolFormat::List) => self.list(&held),
            (State::Call, ToolFormat::Bare) => self.bare(&held),
            (State::After, _) if held.trim().is_empty() => return Vec::new(),
            _ => None,
        };
        match calls {
            Some(calls) => calls.into_iter().map(ToolPart::Call).collect(),
            None => {
                let mark = self.begun().filter(|_| self.state == State::Call);
                let text = format!("{}{held}", mark.unwrap_or(""));
                (!text.is_empty()).then_some(ToolPart::Text(text)).into_iter().collect()
            }
        }
    }

    /// The mark that begins calls, which is removed.
    fn begun(&self) -> Option<&'static str> {
        match self.format {
            ToolFormat::Tagged => Some(OPEN),
            ToolFormat::List => Some(CALLS),
            ToolFormat::Bare => None,
        }
    }

    /// One step over the held text; `None` if more text is needed.
    fn advance(&mut self) -> Option<Option<ToolPart>> {
        match (self.state, self.format) {
            (State::Call, ToolFormat::Tagged) => {
                let end = self.held.find(CLOSE)?;
                let inside: String = self.held.drain(..end + CLOSE.len()).collect();
                let inside = &inside[..end];
                self.state = State::After;
                Some(Some(match self.call(inside) {
                    Some(call) => ToolPart::Call(call),
                    None => ToolPart::Text(format!("{OPEN}{inside}{CLOSE}")),
                }))
            }
            // Parsed as a whole at the end.
            (State::Call, ToolFormat::List | ToolFormat::Bare) => None,
            (State::Start, ToolFormat::Bare) => {
                let text = self.held.trim_start();
                let may_be = PYTHON.starts_with(text) || text.starts_with(PYTHON) || text.starts_with('{');
                self.state = match (text.is_empty(), may_be) {
                    (true, _) => return None,
                    (false, true) if text.len() < PYTHON.len() && !text.starts_with('{') => return None,
                    (false, true) => State::Call,
                    (false, false) => State::Text,
                };
                Some(None)
            }
            (_, ToolFormat::Bare) => {
                let text = std::mem::take(&mut self.held);
                (!text.is_empty()).then_some(Some(ToolPart::Text(text)))
            }
            (state, ToolFormat::Tagged | ToolFormat::List) => {
                let mark = self.begun().expect("these have one");
                let Some(at) = self.held.find(mark) else {
                    return self.certain(mark, state).map(Some);
                };
                let before: String = self.held.drain(..at + mark.len()).collect();
                let before = &before[..at];
                // White space between the parts of an answer does not count as text.
                let is_blank = state != State::Text && before.trim().is_empty();
                self.state = State::Call;
                Some((!before.is_empty() && !is_blank).then(|| ToolPart::Text(before.to_string())))
            }
        }
    }

    /// Text that cannot be a part of a mark any more.
    fn certain(&mut self, mark: &str, state: State) -> Option<ToolPart> {
        if state != State::Text && self.held.trim().is_empty() {
            return None;
        }
        let longest = mark.len().min(self.held.len());
        let tail = |n: &usize| {
            let at = self.held.len() - n;
            self.held.is_char_boundary(at) && mark.starts_with(&self.held[at..])
        };
        let kept = (1..=longest).rev().find(tail).unwrap_or(0);
        let mut end = self.held.len() - kept;
        if kept > 0 && state != State::Text && self.held[..end].trim().is_empty() {
            end = 0;
        }
        let text: String = self.held.drain(..end).collect();
        if text.is_empty() {
            return None;
        }
        self.state = State::Text;
        Some(ToolPart::Text(text))
    }

    /// A JSON object as a call.
    fn call(&self, text: &str) -> Option<ToolCall> {
        self.of_value(&serde_json::from_str(text.trim()).ok()?)
    }

    fn of_value(&self, value: &Value) -> Option<ToolCall> {
        let name = value.get("name")?.as_str()?;
        let arguments = value.get("arguments").or_else(|| value.get("parameters"));
        self.named(name, arguments.unwrap_or(&Value::Object(Default::default())))
    }

    fn named(&self, name: &str, arguments: &Value) -> Option<ToolCall> {
        if !self.names.iter().any(|known| known == name) {
            return None;
        }
        Some(ToolCall {
            name: name.to_string(),
            arguments: match arguments {
                // Some write the JSON as a string.
                Value::String(text) => text.clone(),
                other => other.to_string(),
            },
        })
    }

    /// Mistral's list, or its later form.
    fn list(&self, text: &str) -> Option<Vec<ToolCall>> {
        if let Ok(Value::Array(calls)) = serde_json::from_str(text.trim()) {
            return calls.iter().map(|call| self.of_value(call)).collect();
        }
        let calls = text.split(CALLS).map(str::trim).filter(|call| !call.is_empty());
        let call = |call: &str| {
            let (name, arguments) = match call.split_once(ARGS) {
                Some(parts) => parts,
                None => call.split_at(call.find('{')?),
            };
            self.named(name.trim(), &serde_json::from_str(arguments.trim()).ok()?)
        };
        calls.map(call).collect()
    }

    /// Objects with nothing but `;` and white space around them.
    fn bare(&self, text: &str) -> Option<Vec<ToolCall>> {
        let text = text.trim();
        let mut rest = text.strip_prefix(PYTHON).unwrap_or(text);
        let mut calls = Vec::new();
        loop {
            rest = rest.trim_start_matches(|c: char| c.is_whitespace() || c == ';');
            if rest.is_empty() {
                return (!calls.is_empty()).then_some(calls);
            }
            let mut values = serde_json::Deserializer::from_str(rest).into_iter::<Value>();
            calls.push(self.of_value(&values.next()?.ok()?)?);
            rest = &rest[values.byte_offset()..];
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn reader(format: ToolFormat) -> ToolReader {
        ToolReader {
            format,
            names: vec!["add".into(), "now".into()],
            marks: vec![(1, CALLS), (2, PYTHON), (3, ARGS)],
            held: String::new(),
            state: State::Start,
        }
    }

    /// Parts, with adjacent text merged.
    fn joined(parts: impl IntoIterator<Item = ToolPart>) -> Vec<ToolPart> {
        let mut all: Vec<ToolPart> = Vec::new();
        for part in parts {
            match (all.last_mut(), part) {
                (Some(ToolPart::Text(text)), ToolPart::Text(more)) => text.push_str(&more),
                (_, part) => all.push(part),
            }
        }
        all
    }

    /// Parses a text; the result must not depend on how it is cut.
    fn read(format: ToolFormat, text: &str) -> Vec<ToolPart> {
        let pieces = |size: usize| {
            let mut reader = reader(format);
            let letters: Vec<char> = text.chars().collect();
            let mut parts = Vec::new();
            for piece in letters.chunks(size) {
                parts.extend(reader.push(None, &piece.iter().collect::<String>()));
            }
            parts.extend(reader.finish());
            joined(parts)
        };
        let whole = pieces(usize::MAX);
        for size in [1, 2, 3, 7] {
            assert_eq!(pieces(size), whole, "{text:?} in pieces of {size}");
        }
        whole
    }

    fn says(text: &str) -> ToolPart {
        ToolPart::Text(text.into())
    }

    fn calls(name: &str, arguments: &str) -> ToolPart {
        ToolPart::Call(ToolCall {
            name: name.into(),
            arguments: arguments.into(),
        })
    }

    #[test]
    fn tagged_calls() {
        let read = |text: &str| read(ToolFormat::Tagged, text);
        let add = r#"{"name": "add", "arguments": {"b": 1, "a": [2, "é"]}}"#;
        let added = || calls("add", r#"{"b":1,"a":[2,"é"]}"#);
        assert_eq!(read(&format!("<tool_call>\n{add}\n</tool_call>")), [added()]);
        assert_eq!(
            read(&format!(
                "\n<tool_call>{add}</tool_call>\n<tool_call>{{\"name\": \"now\"}}</tool_call>\n"
            )),
            [added(), calls("now", "{}")]
        );
        assert_eq!(
            read(&format!("Let me see. <tool_call>{add}</tool_call> done <")),
            [says("Let me see. "), added(), says(" done <")]
        );
        // The end mark may be missing; what cannot be read, or names another tool, is text.
        assert_eq!(read(&format!("<tool_call>{add}")), [added()]);
        for text in [
            "plain < text <tool",
            "<tool_call>{\"name\": \"add\"</tool_call>",
            "<tool_call>{\"name\": \"rm\", \"arguments\": {}}</tool_call>",
            "<tool_call>not JSON",
            "  spaces",
        ] {
            assert_eq!(read(text), [says(text)]);
        }
        assert_eq!(read(""), []);
    }

    #[test]
    fn lists_of_calls() {
        let read = |text: &str| read(ToolFormat::List, text);
        let two =
            r#"[TOOL_CALLS] [{"name": "add", "arguments": {"a": 1}, "id": "abc"}, {"name": "now", "arguments": {}}]"#;
        assert_eq!(read(two), [calls("add", r#"{"a":1}"#), calls("now", "{}")]);
        let later = "Yes.[TOOL_CALLS]add[ARGS]{\"a\": 1}[TOOL_CALLS]now{}";
        assert_eq!(
            read(later),
            [says("Yes."), calls("add", r#"{"a":1}"#), calls("now", "{}")]
        );
        for text in ["[TOOL", "[TOOL_CALLS] add 1", "text"] {
            assert_eq!(read(text), [says(text)]);
        }
        // The mark is a special token, which has no text.
        let mut reader = reader(ToolFormat::List);
        assert_eq!(reader.push(Some(1), ""), []);
        assert_eq!(reader.push(Some(9), "[{\"name\": \"now\"}]"), []);
        assert_eq!(reader.finish(), [calls("now", "{}")]);
    }

    #[test]
    fn bare_calls() {
        let read = |text: &str| read(ToolFormat::Bare, text);
        let add = r#"{"name": "add", "parameters": {"a": "1"}}"#;
        let added = || calls("add", r#"{"a":"1"}"#);
        assert_eq!(read(add), [added()]);
        assert_eq!(read(&format!(" {add}; {add}\n")), [added(), added()]);
        assert_eq!(read(&format!("<|python_tag|>{add}")), [added()]);
        for text in [
            "{\"a\": 1}",
            "Sure: {\"name\": \"add\"}",
            "{\"name\": \"add\"} and more",
            "<|pyt",
            "  x",
        ] {
            assert_eq!(read(text), [says(text)]);
        }
        let mut reader = reader(ToolFormat::Bare);
        assert_eq!(reader.push(Some(2), ""), []);
        assert_eq!(reader.push(None, add), []);
        assert_eq!(reader.finish(), [added()]);
    }

    #[test]
    fn formats_are_found_in_templates() {
        let of = ToolFormat::of_template;
        assert_eq!(
            of("{% if tools %}<tools></tools><tool_call></tool_call>{% endif %}"),
            Some(ToolFormat::Tagged)
        );
        assert_eq!(
            of("{% for t in tools %}[AVAILABLE_TOOLS]{% endfor %}[TOOL_CALLS]"),
            Some(ToolFormat::List)
        );
        assert_eq!(
            of("{% if tools %}Environment: ipython <|python_tag|>{% endif %}"),
            Some(ToolFormat::Bare)
        );
        assert_eq!(
            of("{% if tools %}<tool_call><function=x></function></tool_call>{% endif %}"),
            None
        );
        assert_eq!(of("{% for m in messages %}{{ m.content }}{% endfor %}"), None);
    }
}
