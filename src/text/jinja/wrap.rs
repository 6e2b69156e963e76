//! Filters that lay out text: center, indent, truncate, wordwrap.

use super::Error;
use super::operators::check_size;
use super::text::split_lines;

/// Spaces or another character on both sides, distributed as in Python.
pub(super) fn center(text: &str, width: i128, fill: char) -> Result<String, Error> {
    let length = text.chars().count() as i128;
    let missing = (width - length).max(0);
    let left = missing / 2 + (missing & width & 1);
    pad(text, left, missing - left, fill)
}

pub(super) fn pad(text: &str, left: i128, right: i128, fill: char) -> Result<String, Error> {
    let count = |n: i128| usize::try_from(n.max(0)).unwrap_or(usize::MAX);
    let (left, right) = (count(left), count(right));
    check_size(left.saturating_add(right), 4)?;
    let fill = |n: usize| std::iter::repeat_n(fill, n).collect::<String>();
    Ok(format!("{}{text}{}", fill(left), fill(right)))
}

pub(super) fn indent(text: &str, indention: &str, first: bool, blank: bool) -> String {
    // Jinja adds a newline before it splits, so that one at the end stays.
    let lines = split_lines(&format!("{text}\n"), false);
    let mut out = if first { indention.to_string() } else { String::new() };
    for (i, line) in lines.iter().enumerate() {
        if i > 0 {
            out.push('\n');
            if blank || !line.is_empty() {
                out.push_str(indention);
            }
        }
        out.push_str(line);
    }
    out
}

pub(super) fn truncate(text: &str, length: i128, kill_words: bool, end: &str, leeway: i128) -> Result<String, Error> {
    let ending = end.chars().count() as i128;
    if length < ending || leeway < 0 {
        return Err(Error::failed(
            "truncate: the length is less than that of its end, or the leeway below zero",
        ));
    }
    if text.chars().count() as i128 <= length.saturating_add(leeway) {
        return Ok(text.to_string());
    }
    let cut: String = text.chars().take((length - ending) as usize).collect();
    let cut = match cut.rfind(' ') {
        Some(at) if !kill_words => &cut[..at],
        _ => &cut[..],
    };
    Ok(format!("{cut}{end}"))
}

pub(super) fn word_wrap(
    text: &str,
    width: i128,
    break_long: bool,
    between: &str,
    on_hyphens: bool,
) -> Result<String, Error> {
    if width <= 0 {
        return Err(Error::failed("wordwrap: the width is not above zero"));
    }
    if on_hyphens && text.contains(['-', '\u{2013}', '\u{2014}']) {
        return Err(Error::unsupported("the filter \"wordwrap\" on text with hyphens"));
    }
    let width = usize::try_from(width).unwrap_or(usize::MAX);
    let paragraphs = split_lines(text, false);
    let wrapped = paragraphs
        .iter()
        .map(|paragraph| wrap(paragraph, width, break_long).join(between));
    Ok(wrapped.collect::<Vec<String>>().join(between))
}

/// Lines of one paragraph, as in Python's `textwrap`.
fn wrap(text: &str, width: usize, break_long: bool) -> Vec<String> {
    let is_blank = |c: char| matches!(c, '\t' | '\n' | '\x0b' | '\x0c' | '\r' | ' ');
    let mut chunks: Vec<Vec<char>> = Vec::new();
    for c in text.chars() {
        match chunks.last_mut() {
            Some(chunk) if is_blank(chunk[0]) == is_blank(c) => chunk.push(c),
            _ => chunks.push(vec![c]),
        }
    }
    chunks.reverse();
    let mut lines = Vec::new();
    while let Some(next) = chunks.last() {
        if is_blank(next[0]) && !lines.is_empty() {
            chunks.pop();
        }
        let (mut line, mut length) = (Vec::new(), 0);
        while let Some(chunk) = chunks.pop_if(|chunk| length + chunk.len() <= width) {
            length += chunk.len();
            line.push(chunk);
        }
        if chunks.last().is_some_and(|chunk| chunk.len() > width) {
            if break_long {
                let rest = chunks
                    .last_mut()
                    .map(|chunk| chunk.split_off(width - length))
                    .unwrap_or_default();
                line.extend(chunks.pop());
                chunks.push(rest);
            } else if line.is_empty() {
                line.extend(chunks.pop());
            }
        }
        if line
            .last()
            .is_some_and(|chunk: &Vec<char>| chunk.iter().all(|c| is_blank(*c)))
        {
            line.pop();
        }
        if !line.is_empty() {
            lines.push(line.concat().into_iter().collect());
        }
    }
    lines
}
