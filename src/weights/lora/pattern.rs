//! Keys of PEFT's `rank_pattern` and `alpha_pattern`: Python's regular expressions on a layer's name.
//!
//! PEFT uses the first key of the file for which `re.match(r"(.*\.)?(KEY)$", layer)` matches (`get_pattern_key` in
//! `peft/utils/other.py`). Python's `re` and the crate `regex` agree on most of the syntax, and where they do not, a
//! pattern means another set of layers: syntax outside the common part is refused.

use std::iter::Peekable;
use std::str::Chars;

use regex::Regex;

/// A key of a pattern table.
pub struct Pattern {
    key: String,
    regex: Regex,
}

impl Pattern {
    /// An error names the unsupported syntax.
    pub fn new(key: &str) -> Result<Pattern, String> {
        check(key)?;
        let regex = Regex::new(&format!(r"^(?:(.*\.)?({key})$)")).map_err(|error| match error {
            regex::Error::CompiledTooBig(_) => "it is too large".to_string(),
            // The last line is the error; the others show the position in our wrapping.
            error => {
                let text = error.to_string();
                text.lines().last().unwrap_or_default().trim().to_string()
            }
        })?;
        Ok(Pattern {
            key: key.to_string(),
            regex,
        })
    }

    /// Whether PEFT would use this key for the layer. If no expression matches, PEFT looks up the name itself.
    pub fn matches(&self, layer: &str) -> bool {
        self.regex.is_match(layer) || self.key == layer
    }
}

/// Accepts the syntax that Python and `regex` read alike: literals, `.`, classes without set operations, groups, `|`,
/// anchors, and one quantifier after each atom.
fn check(key: &str) -> Result<(), String> {
    let mut chars = key.chars().peekable();
    while let Some(c) = chars.next() {
        match c {
            '\\' => escape(&mut chars, true)?,
            '[' => class(&mut chars)?,
            '(' if chars.peek() == Some(&'?') => {
                let rest: String = chars.clone().take(3).collect();
                if !(rest.starts_with("?:") || rest == "?P<") {
                    return Err(format!("the group ({rest}"));
                }
            }
            '*' | '+' | '?' => after_quantifier(&mut chars)?,
            '{' => {
                let counts: String = chars.by_ref().take_while(|c| *c != '}').collect();
                let (least, most) = counts.split_once(',').unwrap_or((&counts, ""));
                let digits = |text: &str| text.chars().all(|c| c.is_ascii_digit());
                if least.is_empty() || !digits(least) || !digits(most) {
                    return Err(format!("the quantifier {{{counts}}}"));
                }
                after_quantifier(&mut chars)?;
            }
            _ => {}
        }
    }
    Ok(())
}

/// A second quantifier is an error or possessive in Python, but a nested repetition in `regex`.
fn after_quantifier(chars: &mut Peekable<Chars<'_>>) -> Result<(), String> {
    chars.next_if_eq(&'?');
    match chars.peek() {
        Some('*' | '+' | '?' | '{') => Err("a quantifier after a quantifier".to_string()),
        _ => Ok(()),
    }
}

fn escape(chars: &mut Peekable<Chars<'_>>, anchors: bool) -> Result<(), String> {
    match chars.next() {
        Some('d' | 'D' | 'w' | 'W' | 's' | 'S') => Ok(()),
        Some('b' | 'B' | 'A') if anchors => Ok(()),
        Some(c) if c.is_ascii_punctuation() && !matches!(c, '<' | '>') => Ok(()),
        Some(c) => Err(format!("\\{c}")),
        None => Err("a backslash at the end".to_string()),
    }
}

fn class(chars: &mut Peekable<Chars<'_>>) -> Result<(), String> {
    chars.next_if_eq(&'^');
    // A bracket in the first position is literal.
    chars.next_if_eq(&']');
    while let Some(c) = chars.next() {
        match c {
            ']' => return Ok(()),
            '[' => return Err("a bracket within brackets".to_string()),
            '\\' => escape(chars, false)?,
            '&' | '-' | '~' | '|' if chars.peek() == Some(&c) => return Err(format!("{c}{c} within brackets")),
            _ => {}
        }
    }
    Err("a bracket that is not closed".to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Each with layers, and the result of Python's `re.match(rf"(.*\.)?({key})$", layer)`.
    #[test]
    fn as_python_matches() {
        let (q0, k0, q1) = (
            "model.layers.0.self_attn.q_proj",
            "model.layers.0.self_attn.k_proj",
            "model.layers.11.self_attn.q_proj",
        );
        for (key, expected) in [
            ("q_proj", [true, false, true]),
            ("proj", [false, false, false]),
            ("layers.0.self_attn.q_proj", [true, false, false]),
            (r".*\.layers\.0\..*(q_proj|k_proj|v_proj|o_proj)$", [true, true, false]),
            ("(q_proj|k_proj)", [true, true, true]),
            ("q_proj|k_proj", [true, true, true]),
            ("layers.[01].self_attn.q_proj", [true, false, false]),
            (r"model\.layers\.\d+\.self_attn\.q_proj", [true, false, true]),
            ("layers.0.self.attn.q.proj", [true, false, false]),
            ("^q_proj", [false, false, false]),
            ("^model.layers.0.self_attn.q_proj", [true, false, false]),
            ("model.*proj", [true, true, true]),
            (r"layers\.\d{2}\..*", [false, false, true]),
            (r"layers\.(?:0|1)\..*[^q]_proj", [false, true, false]),
            ("(?P<which>[qk])_proj", [true, true, true]),
            ("Q_proj", [false, false, false]),
            ("layers.1", [false, false, false]),
            (".*?", [true, true, true]),
            ("", [false, false, false]),
            (r"\bq_proj\b", [true, false, true]),
            // The alternation applies to the whole expression.
            ("x)|(model", [false, false, false]),
            ("x)|(.*k_proj", [false, true, false]),
        ] {
            let pattern = Pattern::new(key).unwrap_or_else(|e| panic!("{key}: {e}"));
            assert_eq!([q0, k0, q1].map(|layer| pattern.matches(layer)), expected, "{key}");
        }
        assert!(Pattern::new("a[0]b").unwrap().matches("a[0]b"));
    }

    #[test]
    fn what_means_something_else_is_refused() {
        for (key, what) in [
            (r"(q|k)_proj\1", r"\1"),
            (r"(?=q)q_proj", "(?="),
            (r"(?<!x)q_proj", "(?<!"),
            ("(?i)q_proj", "(?i)"),
            ("(?i:q_proj)", "(?i:"),
            ("(?<n>q)_proj", "(?<n"),
            ("q++_proj", "quantifier"),
            ("q*+", "quantifier"),
            ("q{2}{3}", "quantifier"),
            ("q{,3}", "{,3}"),
            ("q{x}", "{x}"),
            (r"\pL", r"\p"),
            (r"\Z", r"\Z"),
            (r"\x41", r"\x"),
            (r"\<q", r"\<"),
            ("[a&&b]", "&&"),
            ("[a--b]", "--"),
            ("[[a]]", "bracket within"),
            ("[a", "not closed"),
            ("q\\", "backslash"),
            ("(q", "unclosed group"),
            ("a{1000}{1000}", "quantifier"),
            ("((a{500}){500}){500}", "too large"),
        ] {
            let message = Pattern::new(key).err().unwrap_or_else(|| panic!("{key} is accepted"));
            assert!(message.contains(what), "{key}: {message}");
        }
    }
}
