//! Python's text properties: whitespace, lines, case, printable characters.

use super::Error;

/// `str.isspace` of one character.
pub(super) fn is_space(c: char) -> bool {
    c.is_whitespace() || ('\x1c'..='\x1f').contains(&c)
}

pub(super) fn rstrip(text: &str) -> &str {
    text.trim_end_matches(is_space)
}

/// `str.isprintable` of one character. The library's own table is of the same categories.
pub(super) fn is_printable(c: char) -> bool {
    // After a letter, so that a combining mark is not escaped.
    matches!(c, '"' | '\\' | '\'') || !format!("{:?}", format!("a{c}")).contains('\\')
}

/// `str.splitlines`.
pub(super) fn split_lines(text: &str, keep: bool) -> Vec<String> {
    let mut lines = Vec::new();
    let mut start = 0;
    let mut chars = text.char_indices().peekable();
    while let Some((at, c)) = chars.next() {
        if !matches!(
            c,
            '\n' | '\r' | '\x0b' | '\x0c' | '\x1c'..='\x1e' | '\u{85}' | '\u{2028}' | '\u{2029}'
        ) {
            continue;
        }
        let mut end = at + c.len_utf8();
        if c == '\r' && chars.next_if(|(_, c)| *c == '\n').is_some() {
            end += 1;
        }
        lines.push(text[start..if keep { end } else { at }].to_string());
        start = end;
    }
    if start < text.len() {
        lines.push(text[start..].to_string());
    }
    lines
}

fn is_title_case(c: char) -> bool {
    matches!(c, '\u{1C5}' | '\u{1C8}' | '\u{1CB}' | '\u{1F2}' | '\u{1F88}'..='\u{1F8F}' | '\u{1F98}'..='\u{1F9F}'
        | '\u{1FA8}'..='\u{1FAF}' | '\u{1FBC}' | '\u{1FCC}' | '\u{1FFC}')
}

pub(super) fn is_cased(c: char) -> bool {
    c.is_uppercase() || c.is_lowercase() || is_title_case(c)
}

/// A character at the start of a word. Few have a separate title case, which the standard library does not have.
fn title_case(c: char) -> Result<String, Error> {
    let upper: String = c.to_uppercase().collect();
    let has_own =
        matches!(c, '\u{1C4}'..='\u{1CC}' | '\u{1F1}'..='\u{1F3}' | '\u{10D0}'..='\u{10FF}') || is_title_case(c);
    match has_own || upper.chars().count() > 1 {
        true => Err(Error::unsupported(format!("the title case of {c:?}"))),
        false => Ok(upper),
    }
}

/// `str.lower`.
pub(super) fn lower(text: &str) -> String {
    text.to_lowercase()
}

/// `str.upper`.
pub(super) fn upper(text: &str) -> String {
    text.to_uppercase()
}

/// `str.capitalize`.
pub(super) fn capitalize(text: &str) -> Result<String, Error> {
    let mut chars = text.chars();
    match chars.next() {
        None => Ok(String::new()),
        Some(first) => Ok(title_case(first)? + &chars.as_str().to_lowercase()),
    }
}

/// `str.title`: a word begins after every character without case.
pub(super) fn title(text: &str) -> Result<String, Error> {
    let mut out = String::new();
    let mut in_word = false;
    for c in text.chars() {
        match in_word {
            true => out.extend(one_lower(c)?),
            false => out.push_str(&title_case(c)?),
        }
        in_word = is_cased(c);
    }
    Ok(out)
}

/// The lower case of a character that does not depend on those around it.
fn one_lower(c: char) -> Result<impl Iterator<Item = char>, Error> {
    match c {
        'Σ' => Err(Error::unsupported("the lower case of 'Σ' inside a word")),
        _ => Ok(c.to_lowercase()),
    }
}

/// `str.swapcase`.
pub(super) fn swap_case(text: &str) -> Result<String, Error> {
    let mut out = String::new();
    for c in text.chars() {
        if c.is_uppercase() {
            out.extend(one_lower(c)?);
        } else if c.is_lowercase() {
            out.extend(c.to_uppercase());
        } else {
            out.push(c);
        }
    }
    Ok(out)
}

/// Refuses text whose characters the standard library may classify differently from Python.
pub(super) fn plain_classes(text: &str, method: &str) -> Result<(), Error> {
    let is_known = |c: char| c.is_ascii() || (('\u{C0}'..='\u{24F}').contains(&c) && !matches!(c, '×' | '÷'));
    match text.chars().all(|c| is_known(c) || is_space(c)) {
        true => Ok(()),
        false => Err(Error::unsupported(format!("{method} of text beyond the Latin letters"))),
    }
}

/// Positions of a slice or a search: from the beginning, from the end if negative, never outside.
pub(super) fn clamp(index: i128, length: usize) -> usize {
    let length = length as i128;
    let index = if index < 0 { index + length } else { index };
    index.clamp(0, length) as usize
}
