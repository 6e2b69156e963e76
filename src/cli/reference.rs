//! The page docs/reference/cli.md: every command and flag, from the command's definition.

use std::fmt::Write;

use clap::{Arg, Command, CommandFactory};

/// The page as Markdown.
pub fn page() -> String {
    let mut root = super::Cli::command();
    root.build();
    let mut out = String::from(
        "# Command line\n\nWritten from the command's definition by `UPDATE_FILES=1 cargo nextest run --features tract --test \
         files`; do not edit.\n\n\
         Exit status: 0 done; 1 failed; 2 wrong usage or unusable input; 130 interrupted by Ctrl-C. With `--json` one document \
         goes to stdout and nothing else; progress, notes and warnings go to stderr. Progress needs a terminal there; \
         `--quiet` turns off all three. Colors follow `NO_COLOR`.\n\n",
    );
    let commands: Vec<&Command> = root.get_subcommands().filter(|c| c.get_name() != "help").collect();
    out += "| command | |\n|---|---|\n";
    for command in &commands {
        let about = command.get_about().map(|about| cell(&about.to_string()));
        let name = command.get_name();
        let _ = writeln!(out, "| [`{name}`](#lapidary-{name}) | {} |", about.unwrap_or_default());
    }
    for command in commands {
        section(&mut out, command);
    }
    out
}

fn section(out: &mut String, command: &Command) {
    let name = command.get_name();
    let _ = writeln!(out, "\n## `lapidary {name}`\n");
    if let Some(about) = command.get_long_about().or_else(|| command.get_about()) {
        let _ = writeln!(out, "{}.\n", sentence(&about.to_string()));
    }
    let usage = command.clone().render_usage().to_string();
    let _ = writeln!(out, "```text\n{}\n```", usage.trim_start_matches("Usage: ").trim());
    let shown = |arg: &&Arg| {
        !arg.is_hide_set() && arg.get_id() != "help" && arg.get_id() != "version" && arg.get_id() != "quiet"
    };
    let mut headings: Vec<Option<&str>> = Vec::new();
    for arg in command.get_arguments().filter(shown) {
        if !headings.contains(&arg.get_help_heading()) {
            headings.push(arg.get_help_heading());
        }
    }
    // Flags without a heading come first, as in `--help`.
    headings.sort_by_key(|heading| heading.is_some());
    for heading in headings {
        if let Some(heading) = heading {
            let _ = writeln!(out, "\n**{heading}**");
        }
        let _ = writeln!(out, "\n| | |\n|---|---|");
        for arg in command.get_arguments().filter(shown) {
            if arg.get_help_heading() == heading {
                let _ = writeln!(out, "| {} | {} |", spelling(arg), meaning(arg));
            }
        }
    }
}

/// `-o`, `--output <PKG>`
fn spelling(arg: &Arg) -> String {
    let names = arg.get_value_names().unwrap_or_default();
    let takes = arg.get_action().takes_values();
    let values = names
        .iter()
        .map(|name| format!("<{name}>"))
        .collect::<Vec<_>>()
        .join(" ");
    if arg.is_positional() {
        return format!("`{values}`");
    }
    let optional = arg.get_num_args().is_some_and(|n| n.min_values() == 0);
    let mut flags: Vec<String> = arg.get_short().map(|c| format!("-{c}")).into_iter().collect();
    flags.extend(arg.get_long().map(|long| format!("--{long}")));
    let mut text = flags.join(", ");
    match (takes, optional) {
        (true, true) => text += &format!("[={}]", values.trim_matches(['<', '>'])),
        (true, false) => text += &format!(" {values}"),
        (false, _) => {}
    }
    format!("`{text}`").replace('|', "\\|")
}

/// Help, possible values and default.
fn meaning(arg: &Arg) -> String {
    let help = arg.get_long_help().or_else(|| arg.get_help());
    let mut text = help.map(|help| help.to_string()).unwrap_or_default();
    if arg.get_action().takes_values() {
        let values = arg.get_possible_values();
        let values: Vec<String> = values.iter().map(|value| format!("`{}`", value.get_name())).collect();
        if !values.is_empty() {
            text += &format!(". One of {}", values.join(", "));
        }
        let defaults = arg.get_default_values().iter().map(|value| value.to_string_lossy());
        let defaults: Vec<String> = defaults.map(|value| value.to_string()).collect();
        if !defaults.is_empty() && !arg.is_hide_default_value_set() {
            text += &format!(" [default: {}]", defaults.join(","));
        }
    }
    cell(&text)
}

/// Without a period at its end.
fn sentence(text: &str) -> &str {
    text.trim().trim_end_matches('.')
}

/// Text for a cell of a table.
fn cell(text: &str) -> String {
    let text = text.split_whitespace().collect::<Vec<_>>().join(" ");
    text.replace('|', "\\|").replace('<', "&lt;")
}
