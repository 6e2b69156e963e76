//! Text for HTML, with markupsafe's semantics.

use super::Error;
use super::text::is_space;
use super::value::Value;

/// `escape(value)`: safe text stays.
pub(super) fn escape(value: &Value) -> Result<String, Error> {
    if let Value::Safe(text) = value {
        return Ok(text.to_string());
    }
    Ok(escape_text(&value.to_text()?))
}

pub(super) fn escape_text(text: &str) -> String {
    let mut out = String::new();
    for c in text.chars() {
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '\'' => out.push_str("&#39;"),
            '"' => out.push_str("&#34;"),
            c => out.push(c),
        }
    }
    out
}

/// Text without comments and tags, with single spaces, and its entities as characters.
pub(super) fn strip_tags(text: &str) -> Result<String, Error> {
    let mut text = text.to_string();
    for (begin, end) in [("<!--", "-->"), ("<", ">")] {
        while let Some(from) = text.find(begin) {
            let Some(length) = text[from..].find(end) else { break };
            text.replace_range(from..from + length + end.len(), "");
        }
    }
    let words: Vec<&str> = text.split(is_space).filter(|word| !word.is_empty()).collect();
    let text = words.join(" ");
    let mut out = String::new();
    let mut rest = text.as_str();
    while let Some(at) = rest.find('&') {
        out.push_str(&rest[..at]);
        rest = &rest[at..];
        let known = [
            ("&amp;", "&"),
            ("&lt;", "<"),
            ("&gt;", ">"),
            ("&quot;", "\""),
            ("&#39;", "'"),
            ("&#34;", "\""),
        ];
        match known.iter().find(|(entity, _)| rest.starts_with(entity)) {
            Some((entity, c)) => {
                out.push_str(c);
                rest = &rest[entity.len()..];
            }
            None if rest[1..].starts_with(|c: char| c == '#' || c.is_ascii_alphanumeric()) => {
                return Err(Error::unsupported(
                    "an HTML entity other than &amp; &lt; &gt; &quot; &#39; &#34;",
                ));
            }
            None => {
                out.push('&');
                rest = &rest[1..];
            }
        }
    }
    Ok(out + rest)
}

/// Percent-encoding; `plus` for a query string, where a space is a plus sign and a slash is encoded.
pub(super) fn url_quote(text: &str, plus: bool) -> String {
    let mut out = String::new();
    for byte in text.bytes() {
        match byte {
            b'A'..=b'Z' | b'a'..=b'z' | b'0'..=b'9' | b'_' | b'.' | b'-' | b'~' => out.push(byte.into()),
            b'/' if !plus => out.push('/'),
            b' ' if plus => out.push('+'),
            byte => out.push_str(&format!("%{byte:02X}")),
        }
    }
    out
}
