//! docs/reference/cli.md and docs/glossary.md are written from the definitions of flags and of terms.

use std::fmt::Write;

use lapidary::terms::GLOSSARY;

use crate::runner::check_page;

#[test]
fn the_page_of_commands_is_that_of_the_program() {
    check_page("reference/cli.md", &lapidary::cli::reference::page());
}

#[test]
fn the_glossary_is_that_of_the_program() {
    let mut page = String::from(
        "# Glossary\n\nThe names that tables, plots, help texts and these pages use. Written from `src/terms.rs` by \
         `UPDATE_FILES=1 cargo nextest run --features tract --test files`; do not edit.\n\n\
         *Column* is the heading in tables, *field* the key in JSON documents, specs or flags.\n",
    );
    for (chapter, terms) in GLOSSARY {
        let _ = writeln!(
            page,
            "\n## {chapter}\n\n| term | column | field | meaning |\n|---|---|---|---|"
        );
        for term in *terms {
            let field = match term.field {
                "" => String::new(),
                field => format!("`{field}`"),
            };
            let _ = writeln!(
                page,
                "| **{}** | {} | {field} | {} |",
                term.name, term.column, term.meaning
            );
        }
    }
    check_page("glossary.md", &page);
}
