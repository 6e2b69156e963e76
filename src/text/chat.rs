//! Chat templates: the model's own Jinja, rendered as `transformers` renders it.
//!
//! Takes the template's source, messages and special tokens, gives the prompt's text. The environment is the one that
//! templates are written against: blocks trimmed, Python's string and dict methods, `raise_exception`,
//! `strftime_now`, `tojson` that does not escape for HTML.

use minijinja::syntax::SyntaxConfig;
use minijinja::value::Kwargs;
use minijinja::{Environment, ErrorKind, Value};
use serde::Serialize;

use super::tokenizer::Tokenizer;
use crate::help::Help;

/// One turn of a conversation.
#[derive(Clone, Debug)]
pub struct Message {
    /// `system`, `user` or `assistant`.
    pub role: String,
    /// Its text.
    pub content: String,
}

impl Message {
    /// What the user says.
    pub fn user(content: impl Into<String>) -> Self {
        Message {
            role: "user".into(),
            content: content.into(),
        }
    }
    /// Instructions before the conversation.
    pub fn system(content: impl Into<String>) -> Self {
        Message {
            role: "system".into(),
            content: content.into(),
        }
    }
    /// What the model said.
    pub fn assistant(content: impl Into<String>) -> Self {
        Message {
            role: "assistant".into(),
            content: content.into(),
        }
    }
}

/// Why messages do not become a prompt.
#[derive(Debug, thiserror::Error)]
pub enum ChatError {
    /// The model has no chat template.
    #[error("the package has no chat template")]
    NoTemplate,
    /// The template raised an exception, with this message.
    #[error("the model's chat template refuses these messages: {0}")]
    Refused(String),
    /// The template is wrong, or uses what this renderer does not have.
    #[error("the model's chat template does not render: {0}")]
    Template(String),
}

impl Help for ChatError {
    fn help(&self) -> Option<String> {
        let help = match self {
            ChatError::NoTemplate => "use --prompt, or convert with a --tokenizer folder that has a chat template",
            ChatError::Refused(_) => "say it in another form; many models take no system message",
            ChatError::Template(_) => {
                "correct the template in the package's tokenizer files, or use --prompt, which needs none"
            }
        };
        Some(help.to_string())
    }
}

/// The prompt for the model's next turn. Encode it without adding special tokens: the template wrote them.
pub fn render(tokenizer: &Tokenizer, messages: &[Message]) -> Result<String, ChatError> {
    let source = tokenizer.chat_template.as_deref().ok_or(ChatError::NoTemplate)?;
    let special: Vec<(&str, &str)> = tokenizer
        .special
        .iter()
        .map(|(name, token)| (name.as_str(), token.as_str()))
        .chain(tokenizer.bos_token.iter().map(|t| ("bos_token", t.as_str())))
        .chain(tokenizer.eos_token.iter().map(|t| ("eos_token", t.as_str())))
        .collect();
    render_source(source, messages, &special)
}

/// As [`render`], from the template's source and its special tokens by name.
pub fn render_source(source: &str, messages: &[Message], special: &[(&str, &str)]) -> Result<String, ChatError> {
    // Marks of transformers for training masks; they render as what they hold.
    let source = ["generation", "endgeneration"]
        .iter()
        .fold(source.to_string(), |text, tag| {
            ["{% T %}", "{%- T %}", "{% T -%}", "{%- T -%}"]
                .iter()
                .fold(text, |text, form| {
                    let form = form.replace('T', tag);
                    // A plain `set` keeps the whitespace control of the tag it stands for.
                    text.replace(&form, &form.replace(tag, "set _ = 0"))
                })
        });
    let mut env = Environment::new();
    let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
    env.set_syntax(syntax.map_err(|e| ChatError::Template(e.to_string()))?);
    env.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
    env.add_function(
        "raise_exception",
        |message: String| -> Result<Value, minijinja::Error> {
            Err(minijinja::Error::new(
                ErrorKind::InvalidOperation,
                REFUSED.to_string() + &message,
            ))
        },
    );
    env.add_function("strftime_now", strftime_now);
    env.add_filter("tojson", tojson);
    let turn = |m: &Message| Value::from_pairs([("role", m.role.as_str()), ("content", m.content.as_str())]);
    let messages: Vec<Value> = messages.iter().map(turn).collect();
    let globals = special.iter().map(|(name, token)| (*name, Value::from(*token))).chain([
        ("messages", Value::from(messages)),
        ("add_generation_prompt", Value::from(true)),
        ("tools", Value::from(())),
        ("documents", Value::from(())),
    ]);
    env.render_str(&source, Value::from_pairs(globals)).map_err(|e| {
        let detail = e.detail().unwrap_or_default();
        match detail.strip_prefix(REFUSED) {
            Some(message) => ChatError::Refused(message.to_string()),
            None => ChatError::Template(e.to_string()),
        }
    })
}

/// Tells a template's own `raise_exception` from an error of the engine.
const REFUSED: &str = "raise_exception: ";

/// The local time now, in `strftime` notation.
fn strftime_now(format: String) -> Result<String, minijinja::Error> {
    let items: Vec<_> = chrono::format::StrftimeItems::new(&format).collect();
    // chrono reports a bad format by failing to print, which would panic.
    if items.iter().any(|i| matches!(i, chrono::format::Item::Error)) {
        let message = format!("strftime_now cannot read the format {format:?}");
        return Err(minijinja::Error::new(ErrorKind::InvalidOperation, message));
    }
    Ok(chrono::Local::now().format_with_items(items.into_iter()).to_string())
}

/// JSON as Python's `json.dumps(value, ensure_ascii=False, indent=indent)` writes it.
fn tojson(value: Value, kwargs: Kwargs) -> Result<Value, minijinja::Error> {
    let indent: Option<usize> = kwargs.get("indent")?;
    for ignored in ["ensure_ascii", "separators", "sort_keys"] {
        let _ = kwargs.get::<Option<Value>>(ignored)?;
    }
    kwargs.assert_all_used()?;
    let bad = |e: serde_json::Error| minijinja::Error::new(ErrorKind::BadSerialization, e.to_string());
    let mut out = Vec::new();
    match indent {
        Some(n) => {
            let indent = " ".repeat(n);
            let formatter = serde_json::ser::PrettyFormatter::with_indent(indent.as_bytes());
            let mut serializer = serde_json::Serializer::with_formatter(&mut out, formatter);
            value.serialize(&mut serializer).map_err(bad)?;
        }
        None => {
            let mut serializer = serde_json::Serializer::with_formatter(&mut out, PythonFormatter);
            value.serialize(&mut serializer).map_err(bad)?;
        }
    }
    Ok(Value::from_safe_string(String::from_utf8(out).expect("JSON is UTF-8")))
}

/// Python puts a space after `,` and `:`.
struct PythonFormatter;

impl serde_json::ser::Formatter for PythonFormatter {
    fn begin_array_value<W: ?Sized + std::io::Write>(&mut self, writer: &mut W, first: bool) -> std::io::Result<()> {
        writer.write_all(if first { b"" } else { b", " })
    }
    fn begin_object_key<W: ?Sized + std::io::Write>(&mut self, writer: &mut W, first: bool) -> std::io::Result<()> {
        writer.write_all(if first { b"" } else { b", " })
    }
    fn begin_object_value<W: ?Sized + std::io::Write>(&mut self, writer: &mut W) -> std::io::Result<()> {
        writer.write_all(b": ")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SPECIAL: [(&str, &str); 2] = [("bos_token", "<s>"), ("eos_token", "</s>")];

    #[test]
    fn templates_of_the_field_render() {
        // Llama 2's shape: python methods, loop variables, whitespace control, namespace.
        let source = "{%- set ns = namespace(n=0) -%}\n{{ bos_token }}\n{% for m in messages %}\n    \
            {%- set ns.n = ns.n + 1 -%}\n    {% if m['role'] == 'user' %}\n[INST] {{ m['content'].strip() }} [/INST]\n    \
            {%- endif %}\n{% endfor %}\n{%- if add_generation_prompt %}>{{ ns.n }}{% endif %}";
        let text = render_source(source, &[Message::user(" hi ")], &SPECIAL).unwrap();
        assert_eq!(text, "<s>\n[INST] hi [/INST]>1");
    }

    #[test]
    fn json_is_pythons_and_unescaped() {
        let source = "{{ messages | tojson }}";
        let text = render_source(source, &[Message::user("a<b & 'é'")], &SPECIAL).unwrap();
        assert_eq!(text, r#"[{"role": "user", "content": "a<b & 'é'"}]"#);
        let indented = render_source("{{ messages[0] | tojson(indent=2) }}", &[Message::user("x")], &[]).unwrap();
        assert_eq!(indented, "{\n  \"role\": \"user\",\n  \"content\": \"x\"\n}");
    }

    #[test]
    fn a_template_may_refuse() {
        let source = "{{ raise_exception('system role not supported') }}";
        let error = render_source(source, &[Message::system("x")], &SPECIAL).unwrap_err();
        assert_eq!(
            error.to_string(),
            "the model's chat template refuses these messages: system role not supported"
        );
        let broken = render_source("{% for %}", &[], &[]).unwrap_err();
        assert!(matches!(broken, ChatError::Template(_)));
    }

    #[test]
    fn training_marks_vanish_and_time_is_told() {
        let source = "{% generation %}\n{{ messages[0].content }}\n{%- endgeneration %}|{{ strftime_now('%Y') }}";
        let text = render_source(source, &[Message::user("x")], &[]).unwrap();
        let (body, year) = text.split_once('|').unwrap();
        assert_eq!((body, year.len()), ("x", 4));
        assert!(render_source("{{ strftime_now('%Q9') }}", &[], &[]).is_err());
    }
}
