//! Chat templates against Jinja: fixtures/jinja/cases.json has templates with their output in transformers'
//! environment.
//!
//! It is written by `scripts/jinja_cases.py`. A template's output must be equal, or the template is refused as listed
//! in the table of the environment (`jinja::names`).

use std::collections::BTreeSet;
use std::path::Path;

use lapidary::text::jinja::names::{ENVIRONMENT, STATEMENTS, Support, support};
use lapidary::text::jinja::{self, Error};
use lapidary::text::{ChatError, Message, chat};
use serde_json::Value;

struct Case {
    name: String,
    template: String,
    expected: Option<String>,
    found: Result<String, ChatError>,
}

impl Case {
    fn is_same(&self) -> bool {
        match (&self.found, &self.expected) {
            (Ok(found), Some(expected)) => found == expected,
            (Err(_), None) => true,
            _ => false,
        }
    }

    /// Values that only Python can print are refused, regardless of the table.
    fn prints_an_address(&self) -> bool {
        self.expected.as_ref().is_some_and(|text| text.contains(" at 0x"))
    }

    fn is_unsupported(&self) -> bool {
        matches!(self.found, Err(ChatError::Template(Error::Unsupported(_))))
    }
}

fn cases() -> Vec<Case> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/jinja/cases.json");
    let document: Value = serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap();
    let text = |value: &Value| value.as_str().unwrap().to_string();
    let messages: Vec<Message> = document["messages"]
        .as_array()
        .unwrap()
        .iter()
        .map(|m| Message {
            role: text(&m["role"]),
            content: text(&m["content"]),
        })
        .collect();
    let special: Vec<(&str, &str)> = document["special"]
        .as_object()
        .unwrap()
        .iter()
        .map(|(name, token)| (name.as_str(), token.as_str().unwrap()))
        .collect();
    let case = |case: &Value| Case {
        name: text(&case[0]),
        template: text(&case[1]),
        expected: case[2].as_str().map(str::to_string),
        found: chat::render_source(&text(&case[1]), &messages, &special),
    };
    document["cases"].as_array().unwrap().iter().map(case).collect()
}

#[test]
fn no_template_gives_other_text_than_in_jinja() {
    let cases = cases();
    let other: Vec<String> = cases
        .iter()
        .filter(|case| case.found.is_ok() && !case.is_same())
        .map(|case| format!("{:?}: {:?}, in Jinja {:?}", case.template, case.found, case.expected))
        .collect();
    assert!(other.is_empty(), "{}", other.join("\n"));
    // Refusals are few, and each names its reason.
    let refused: Vec<&Case> = cases.iter().filter(|case| !case.is_same()).collect();
    assert!(
        cases.len() > 1400 && refused.len() < 55,
        "{} of {}",
        refused.len(),
        cases.len()
    );
    for case in refused {
        let by_name = case.is_unsupported() || case.template.contains("\\u") || case.template.contains("\\N");
        assert!(
            by_name || case.template.contains("_x"),
            "{:?}: {:?}",
            case.template,
            case.found
        );
    }
}

/// The table lists everything in Jinja, and everything that it calls supported works.
#[test]
fn every_part_of_the_environment_is_supported_or_refused_by_name() {
    let cases = cases();
    for (kind, _, names) in ENVIRONMENT {
        if kind == "statement" {
            continue;
        }
        let prefix = format!("{kind} ");
        let of_kind = cases.iter().filter_map(|case| case.name.strip_prefix(&prefix));
        let in_jinja: BTreeSet<&str> = of_kind.collect();
        assert_eq!(in_jinja, names.iter().copied().collect::<BTreeSet<&str>>(), "{kind}");
        for name in names {
            let all: Vec<&Case> = cases
                .iter()
                .filter(|case| case.name == format!("{prefix}{name}") && !case.prints_an_address())
                .collect();
            assert!(!all.is_empty(), "{kind} {name}");
            for case in &all {
                let about = format!("{kind} {name}, {:?}: {:?}", case.template, case.found);
                match support(kind, name) {
                    Support::Yes => assert!(case.is_same(), "{about}"),
                    Support::Except(_) => assert!(case.is_same() || case.is_unsupported(), "{about}"),
                    Support::No(_) => assert!(case.is_unsupported() || case.expected.is_none(), "{about}"),
                    Support::Sandbox => assert!(case.found.is_err() && case.expected.is_none(), "{about}"),
                }
            }
            if let Support::Except(_) = support(kind, name) {
                assert!(all.iter().any(|case| case.is_same()), "{kind} {name}");
            }
        }
    }
    for name in STATEMENTS {
        let template = match name {
            "autoescape" => "{% autoescape true %}{% endautoescape %}",
            "extends" | "include" => &format!("{{% {name} 'x' %}}"),
            "block" => "{% block x %}{% endblock %}",
            "from" => "{% from 'x' import y %}",
            "import" => "{% import 'x' as y %}",
            _ => continue,
        };
        let error = jinja::render(template, []).unwrap_err();
        assert_eq!(error, Error::Unsupported(format!("the statement {name:?}")));
        assert!(matches!(support("statement", name), Support::No(_)));
    }
    for name in STATEMENTS
        .iter()
        .filter(|name| support("statement", name) == Support::Yes)
    {
        let uses = |case: &&Case| {
            let tags = ["{% ", "{%- ", "{%"].map(|tag| format!("{tag}{name}"));
            tags.iter().any(|tag| case.template.contains(tag)) && case.found.is_ok()
        };
        assert!(cases.iter().any(|case| uses(&case)), "{name}");
    }
}

/// A short template may need unlimited memory, time, or stack.
#[test]
fn templates_without_measure_are_refused() {
    let nested = |open: &str, close: &str| format!("{}1{}", open.repeat(3000), close.repeat(3000));
    for template in [
        "{{ 'a' * 10**12 }}",
        "{{ [0] * 10**12 }}",
        "{{ 10**100 }}",
        "{{ '%99999999d' % 1 }}{{ '{:>99999999}'.format(1) }}",
        "{{ 'x'.center(10**15) }}",
        "{{ 'x'|indent(10**15, true) }}",
        "{% set ns = namespace(x='ab') %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
        "{% set ns = namespace(x=[1]) %}{% for i in range(60) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
        "{% set ns = namespace(x='ab') %}{% for i in range(60) %}{% set ns.x = ns.x|replace('', ns.x) %}{% endfor %}",
        "{% set ns = namespace(x=[]) %}{% for i in range(100000) %}{% set ns.x = [ns.x] %}{% endfor %}{{ ns.x }}",
        "{% set ns = namespace(x=[1]) %}{% for i in range(1000) %}{% set ns.x = ns.x|map('string') %}{% endfor %}{{ ns.x|list }}",
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{% macro m(x) %}{{ m(x + 1) }}{% endmacro %}{{ m(0) }}",
        "{% set ns = namespace() %}{% set ns.a = [ns] %}{{ ns }}",
        &format!("{{{{ {} }}}}", nested("(", ")")),
        &format!("{{{{ {} }}}}", nested("[", "]")),
        &format!("{{{{ {} }}}}", nested("-", "")),
        &format!("{{{{ {} }}}}", nested("not ", "")),
        &format!("{{{{ 1{} }}}}", "+1".repeat(5000)),
        &format!("{{{{ 1{} }}}}", "|string".repeat(5000)),
        &nested("{% if 1 %}", "{% endif %}"),
    ] {
        let error = jinja::render(template, []).unwrap_err();
        assert!(matches!(error, Error::Unsupported(_)), "{template:.80}: {error}");
    }
}

#[test]
fn errors_name_what_is_wrong_and_where() {
    for (template, message) in [
        (
            "a\nb {{ x",
            "line 2: unexpected the end of the template, expected the end of the expression",
        ),
        ("\n\n{% nope %}", "line 3: unknown statement \"nope\""),
        ("{{ 'a'|nope }}", "line 1: no filter named \"nope\""),
        ("{{ 'a'.translate({}) }}", "the method \"translate\" is not supported"),
        ("{{ 'a'|urlize(3) }}", "the filter \"urlize\" is not supported"),
        ("{{ nope.x }}", "\"nope\", which is undefined, has no attributes"),
        (
            "{{ [1].append(2) }}",
            "the method \"append\" changes a value, which Jinja's sandbox does not allow",
        ),
        ("{% include 'x' %}", "the statement \"include\" is not supported"),
    ] {
        assert_eq!(
            jinja::render(template, []).unwrap_err().to_string(),
            message,
            "{template}"
        );
    }
}
