//! docs/reference/chat-templates.md is the table of transformers' environment for chat templates.

use std::fmt::Write;

use lapidary::text::jinja::names::{ENVIRONMENT, Support, support};

use crate::runner::check_page;

const HEAD: &str = "\
# Chat templates

A model's chat template is a Jinja template, and transformers defines the environment that it runs in: Jinja's immutable
sandbox with `trim_blocks` and `lstrip_blocks`, loop controls, `{% generation %}` blocks, its own `tojson`, `raise_exception`
and `strftime_now`. Lapidary has its own interpreter (`src/text/jinja`), because the prompt must be identical: values are
Python's, so they print, compare, sort and slice as in Python.

Rendered text is equal to Jinja's. Everything else is refused by name, including what Jinja itself refuses. This is checked
against Jinja on more than 1400 templates (`fixtures/jinja/cases.json`, written by `scripts/jinja_cases.py`).

- Line ends in a template (`\\r\\n`, `\\r`) become `\\n`, and one at its end is removed; those of messages stay.
- The template sees `messages`, `add_generation_prompt` (true), `tools` (those of a request to `lapidary serve`, none otherwise) and `documents` (none), and the special tokens of
  `tokenizer_config.json` by name.
- Refused in addition to the table: printing what only Python can print (functions, generators, addresses), attributes that
  begin with `__`, integers of more than 127 bits, `\\N{…}` and half surrogates in text, methods of escaped text, and templates
  that would take more than 5 million steps, 16 MiB or 200 levels.

The table is written by `UPDATE_FILES=1 cargo nextest run --features tract --test files`; do not edit.
";

fn page() -> String {
    let mut text = HEAD.to_string();
    for (kind, title, names) in ENVIRONMENT {
        let _ = writeln!(text, "\n## {title}\n\n| name | supported |\n|---|---|");
        for name in names {
            let supported = match support(kind, name) {
                Support::Yes => "yes".to_string(),
                Support::Except(what) => format!("yes; refused: {what}"),
                Support::No(why) => format!("refused: {why}"),
                Support::Sandbox => "refused, as by Jinja's sandbox".to_string(),
            };
            let _ = writeln!(text, "| `{name}` | {supported} |");
        }
    }
    text
}

#[test]
fn the_page_is_the_table() {
    check_page("reference/chat-templates.md", &page());
}
