//! Tables, numbers and citations, as Markdown.

use std::fmt::Write;

use super::input::SourceId;

/// A footnote to a source file.
pub fn cite(source: SourceId) -> String {
    format!("[^{}]", source.0 + 1)
}

/// Footnotes to several files, without duplicates.
pub fn cite_all(sources: impl IntoIterator<Item = SourceId>) -> String {
    let mut sources: Vec<SourceId> = sources.into_iter().collect();
    sources.sort_unstable();
    sources.dedup();
    sources.into_iter().map(cite).collect()
}

/// A table; empty text without rows. Columns of numbers are right-aligned.
pub fn table(header: &[&str], rows: &[Vec<String>]) -> String {
    if rows.is_empty() {
        return String::new();
    }
    let escaped = |cell: &str| cell.replace('|', "\\|");
    let line = |cells: &[String]| {
        format!(
            "| {} |\n",
            cells.iter().map(|c| escaped(c)).collect::<Vec<_>>().join(" | ")
        )
    };
    let numeric = |column: usize| {
        let mut filled = rows
            .iter()
            .map(|row| row[column].as_str())
            .filter(|c| !c.is_empty() && *c != MISSING);
        filled.clone().next().is_some()
            && filled.all(|cell| cell.trim_start_matches('*').starts_with(|c: char| c.is_ascii_digit()))
    };
    let header: Vec<String> = header.iter().map(|h| h.to_string()).collect();
    let mut out = line(&header);
    let rules: Vec<&str> = (0..header.len())
        .map(|c| if numeric(c) { "---:" } else { "---" })
        .collect();
    let _ = writeln!(out, "|{}|", rules.join("|"));
    for row in rows {
        debug_assert_eq!(row.len(), header.len());
        out += &line(row);
    }
    out
}

/// The mark for a missing figure.
pub const MISSING: &str = "—";

/// Milliseconds, with significant decimals only.
pub fn ms(value: f64) -> String {
    match value.abs() {
        v if v >= 1000.0 => format!("{value:.0}"),
        v if v >= 100.0 => format!("{value:.1}"),
        v if v >= 10.0 => format!("{value:.2}"),
        _ => format!("{value:.3}"),
    }
}

pub fn rate(value: f64) -> String {
    match value.abs() {
        v if v >= 1000.0 => format!("{value:.0}"),
        _ => format!("{value:.1}"),
    }
}

/// An error, with its first digits.
pub fn tiny(value: f64) -> String {
    match value {
        0.0 => "0".to_string(),
        _ => format!("{value:.1e}"),
    }
}

pub fn percent(share: f64) -> String {
    format!("{:.1} %", share * 100.0)
}

pub fn times(ratio: f64) -> String {
    format!("{ratio:.2} ×")
}

/// `735.8 TFLOP/s`
pub fn flops(n: f64) -> String {
    match n >= 1e12 {
        true => format!("{:.1} TFLOP/s", n / 1e12),
        false => format!("{:.1} GFLOP/s", n / 1e9),
    }
}

/// An option's text, or the mark for a missing figure.
pub fn or_missing(text: Option<String>) -> String {
    text.unwrap_or_else(|| MISSING.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tables_line_up_and_escape() {
        let rows = [vec!["a|b".to_string(), "1.5".into()], vec!["c".into(), MISSING.into()]];
        assert_eq!(
            table(&["x", "ms"], &rows),
            "| x | ms |\n|---|---:|\n| a\\|b | 1.5 |\n| c | — |\n"
        );
        assert_eq!(table(&["x"], &[]), "");
    }

    #[test]
    fn numbers_keep_what_tells_something() {
        assert_eq!(
            [0.1234, 12.345, 123.45, 12345.6].map(ms),
            ["0.123", "12.35", "123.5", "12346"]
        );
        assert_eq!([735.8e12, 187.25e9].map(flops), ["735.8 TFLOP/s", "187.2 GFLOP/s"]);
        assert_eq!(cite_all([SourceId(2), SourceId(0), SourceId(2)]), "[^1][^3]");
    }
}
