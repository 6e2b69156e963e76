//! Chat templates: the model's own Jinja, rendered as `transformers` renders it.
//!
//! Input: the template's source, messages and special tokens. Output: the prompt's text. [`jinja`](super::jinja) is the
//! language and its environment; this module provides the variables of templates.

use super::jinja::{self, Variable};
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
    /// A user message.
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
    /// An assistant message.
    pub fn assistant(content: impl Into<String>) -> Self {
        Message {
            role: "assistant".into(),
            content: content.into(),
        }
    }
}

/// Why messages cannot be rendered.
#[derive(Debug, thiserror::Error)]
pub enum ChatError {
    /// The model has no chat template.
    #[error("the package has no chat template")]
    NoTemplate,
    /// The template raised an exception, with this message.
    #[error("the model's chat template refuses these messages: {0}")]
    Refused(String),
    /// The template is invalid, or uses an unsupported feature.
    #[error("the model's chat template does not render: {0}")]
    Template(jinja::Error),
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
    render_turns(tokenizer, turns(messages), Variable::None)
}

/// Like [`render`], from messages in the templates' form, with tool calls and their results, and from descriptions of
/// tools: none, or a list.
pub fn render_turns(tokenizer: &Tokenizer, messages: Vec<Variable>, tools: Variable) -> Result<String, ChatError> {
    let source = tokenizer.chat_template.as_deref().ok_or(ChatError::NoTemplate)?;
    let special: Vec<(&str, &str)> = tokenizer
        .special
        .iter()
        .map(|(name, token)| (name.as_str(), token.as_str()))
        .chain(tokenizer.bos_token.iter().map(|t| ("bos_token", t.as_str())))
        .chain(tokenizer.eos_token.iter().map(|t| ("eos_token", t.as_str())))
        .collect();
    render_variables(source, messages, tools, &special)
}

fn turns(messages: &[Message]) -> Vec<Variable> {
    let text = |text: &str| Variable::Text(text.to_string());
    let turn = |m: &Message| {
        Variable::Dict(vec![
            ("role".to_string(), text(&m.role)),
            ("content".to_string(), text(&m.content)),
        ])
    };
    messages.iter().map(turn).collect()
}

/// Like [`render`], from the template's source and its special tokens by name.
pub fn render_source(source: &str, messages: &[Message], special: &[(&str, &str)]) -> Result<String, ChatError> {
    render_variables(source, turns(messages), Variable::None, special)
}

fn render_variables(
    source: &str,
    messages: Vec<Variable>,
    tools: Variable,
    special: &[(&str, &str)],
) -> Result<String, ChatError> {
    let text = |text: &str| Variable::Text(text.to_string());
    let globals = special.iter().map(|(name, token)| (*name, text(token))).chain([
        ("messages", Variable::List(messages)),
        ("add_generation_prompt", Variable::Bool(true)),
        ("tools", tools),
        ("documents", Variable::None),
    ]);
    jinja::render(source, globals).map_err(|error| match error {
        jinja::Error::Raised(message) => ChatError::Refused(message),
        error => ChatError::Template(error),
    })
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
