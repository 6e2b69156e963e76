//! Stop strings: [`StopMatcher`] never returns a part of one.
//!
//! It searches text that arrives in pieces, with special tokens between them, which have no visible text. A stop string
//! may span pieces, and may contain special tokens. The matcher only appends, so its output can be printed immediately,
//! and does not depend on how the text is cut into pieces.

use super::tokenizer::Tokenizer;

/// Finds the first of several stop strings in text that arrives in pieces.
#[derive(Clone, Debug, Default)]
pub struct StopMatcher {
    patterns: Vec<Pattern>,
    held: String,
}

/// Text that can be shown.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Shown {
    /// Final text.
    pub text: String,
    /// A stop string was found: `text` ends right before it, and nothing may follow.
    pub stopped: bool,
}

/// The units of stop strings and of the searched text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Unit {
    Char(char),
    /// A special token, by its id.
    Special(u32),
}

/// One stop string and how much of it the text ends with, by the Knuth-Morris-Pratt algorithm.
#[derive(Clone, Debug)]
struct Pattern {
    units: Vec<Unit>,
    /// By the number of matched units: the next shorter prefix that is a suffix of the matched ones.
    shorter: Vec<usize>,
    /// By the number of matched units: bytes of shown text among them.
    bytes: Vec<usize>,
    has_special: bool,
    matched: usize,
}

impl Pattern {
    fn new(units: Vec<Unit>) -> Self {
        let mut shorter = vec![0; units.len() + 1];
        let mut length = 0;
        for i in 1..units.len() {
            while length > 0 && units[i] != units[length] {
                length = shorter[length];
            }
            length += usize::from(units[i] == units[length]);
            shorter[i + 1] = length;
        }
        let mut bytes = vec![0];
        for unit in &units {
            let own = match unit {
                Unit::Char(c) => c.len_utf8(),
                Unit::Special(_) => 0,
            };
            bytes.push(bytes[bytes.len() - 1] + own);
        }
        let has_special = units.iter().any(|unit| matches!(unit, Unit::Special(_)));
        Pattern {
            units,
            shorter,
            bytes,
            has_special,
            matched: 0,
        }
    }

    /// Whether the text with this unit ends with the whole pattern. Visible text continues across special tokens.
    fn step(&mut self, unit: Unit) -> bool {
        if matches!(unit, Unit::Special(_)) && !self.has_special {
            return false;
        }
        while self.matched > 0 && self.units[self.matched] != unit {
            self.matched = self.shorter[self.matched];
        }
        self.matched += usize::from(self.units[self.matched] == unit);
        self.matched == self.units.len()
    }
}

impl StopMatcher {
    /// For text without special tokens. Empty stop strings are ignored.
    pub fn new(stops: impl IntoIterator<Item = String>) -> Self {
        let texts = stops.into_iter().filter(|stop| !stop.is_empty());
        StopMatcher {
            patterns: texts.map(|stop| Pattern::new(literal(&stop))).collect(),
            held: String::new(),
        }
    }

    /// The same, and stop strings that hold special tokens of the tokenizer end at these tokens, too.
    pub fn with_special(stops: impl IntoIterator<Item = String>, tokenizer: &Tokenizer) -> Self {
        let stops: Vec<String> = stops.into_iter().collect();
        let special = tokenizer.special_tokens();
        let mut matcher = StopMatcher::new(stops.iter().cloned());
        let with_special = stops.iter().map(|stop| Pattern::new(units(stop, &special)));
        matcher
            .patterns
            .extend(with_special.filter(|pattern| pattern.has_special));
        matcher
    }

    /// Whether special tokens can be part of a match.
    pub fn watches_special(&self) -> bool {
        self.patterns.iter().any(|pattern| pattern.has_special)
    }

    /// Adds a piece; holds back the longest tail that could still become a stop string. The stop string that is
    /// complete first ends the text; among those that end together, the longest.
    pub fn push(&mut self, piece: &str) -> Shown {
        for c in piece.chars() {
            self.held.push(c);
            if self.step(Unit::Char(c)) {
                return Shown {
                    text: std::mem::take(&mut self.held),
                    stopped: true,
                };
            }
        }
        self.certain()
    }

    /// Adds a special token, which has no text of its own.
    pub fn push_special(&mut self, id: u32) -> Shown {
        match self.step(Unit::Special(id)) {
            true => Shown {
                text: std::mem::take(&mut self.held),
                stopped: true,
            },
            false => self.certain(),
        }
    }

    /// Cuts off a complete stop string.
    fn step(&mut self, unit: Unit) -> bool {
        let mut longest = None;
        for pattern in &mut self.patterns {
            if pattern.step(unit) {
                longest = longest.max(Some(pattern.bytes[pattern.matched]));
            }
        }
        if let Some(bytes) = longest {
            self.held.truncate(self.held.len() - bytes);
            self.patterns.iter_mut().for_each(|pattern| pattern.matched = 0);
        }
        longest.is_some()
    }

    fn certain(&mut self) -> Shown {
        let keep = self.patterns.iter().map(|p| p.bytes[p.matched]).max().unwrap_or(0);
        let rest = self.held.split_off(self.held.len() - keep);
        Shown {
            text: std::mem::replace(&mut self.held, rest),
            stopped: false,
        }
    }

    /// The tail held back, once nothing can follow.
    pub fn finish(&mut self) -> String {
        std::mem::take(&mut self.held)
    }
}

fn literal(text: &str) -> Vec<Unit> {
    text.chars().map(Unit::Char).collect()
}

/// A stop string with its special tokens as units; the longest of several that begin at one position.
fn units(mut stop: &str, special: &[(u32, String)]) -> Vec<Unit> {
    let mut units = Vec::new();
    while let Some(c) = stop.chars().next() {
        let here = special.iter().filter(|(_, content)| stop.starts_with(content.as_str()));
        let (unit, length) = match here.max_by_key(|(_, content)| content.len()) {
            Some((id, content)) => (Unit::Special(*id), content.len()),
            None => (Unit::Char(c), c.len_utf8()),
        };
        units.push(unit);
        stop = &stop[length..];
    }
    units
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shown(stops: &[&str], pieces: &[&str]) -> (String, bool) {
        let mut matcher = StopMatcher::new(stops.iter().map(|s| s.to_string()));
        let mut text = String::new();
        for piece in pieces {
            let step = matcher.push(piece);
            text.push_str(&step.text);
            if step.stopped {
                return (text, true);
            }
        }
        text.push_str(&matcher.finish());
        (text, false)
    }

    #[test]
    fn stop_strings_straddle_pieces() {
        assert_eq!(shown(&["\nUser:"], &["hi", "\nUs", "er", ": x"]), ("hi".into(), true));
        assert_eq!(shown(&["\nUser:"], &["hi\nUs", "age"]), ("hi\nUsage".into(), false));
        assert_eq!(shown(&["aab"], &["a", "a", "a", "b", "c"]), ("a".into(), true));
        assert_eq!(shown(&["end", "d"], &["the en", "d"]), ("the ".into(), true));
        assert_eq!(shown(&["", "xyz"], &["abx", "y"]), ("abxy".into(), false));
        assert_eq!(shown(&["éa"], &["caf", "é", "a"]), ("caf".into(), true));
        assert_eq!(shown(&["abab", "abac"], &["abababac"]), ("".into(), true));
        assert_eq!(shown(&["ababc"], &["aba", "babc"]), ("ab".into(), true));
    }

    #[test]
    fn whatever_the_cuts_the_text_is_the_same() {
        let text = "one STOone STSTOP two";
        for stops in [&["STOP"][..], &["STOP two", "TS"], &["SST", "TOP"], &["ST", "ne S"]] {
            let whole = shown(stops, &[text]);
            for a in 0..text.len() {
                for b in a..text.len() {
                    let cut = [&text[..a], &text[a..b], &text[b..]];
                    assert_eq!(shown(stops, &cut), whole, "{cut:?}");
                }
            }
        }
        assert_eq!(shown(&["STOP"], &[text]), ("one STOone ST".into(), true));
    }

    /// `<a>` is token 1, `<ab>` token 2.
    fn marked(stop: &str, pieces: &[Result<&str, u32>]) -> (String, bool) {
        let special = [(1, "<a>".to_string()), (2, "<ab>".to_string())];
        let mut matcher = StopMatcher::new([stop.to_string()]);
        let pattern = Pattern::new(units(stop, &special));
        assert!(pattern.has_special, "{stop}");
        matcher.patterns.push(pattern);
        let mut text = String::new();
        for piece in pieces {
            let step = match piece {
                Ok(piece) => matcher.push(piece),
                Err(id) => matcher.push_special(*id),
            };
            text.push_str(&step.text);
            if step.stopped {
                return (text, true);
            }
        }
        (text + &matcher.finish(), false)
    }

    #[test]
    fn special_tokens_are_part_of_stop_strings() {
        for (stop, pieces, text, stopped) in [
            ("<a>", &[Ok("hi"), Err(1), Ok("x")][..], "hi", true),
            ("<a>", &[Ok("hi"), Err(2), Ok("x")], "hix", false),
            ("<a>user", &[Ok("hi"), Err(1), Ok("us"), Ok("er x")], "hi", true),
            (
                "<a>user",
                &[Ok("hi"), Err(1), Ok("us"), Err(1), Ok("user")],
                "hius",
                true,
            ),
            ("<a>user", &[Ok("hi"), Err(2), Ok("user")], "hiuser", false),
            ("\n<a>", &[Ok("hi\n"), Err(1)], "hi", true),
            ("\n<a>", &[Ok("hi\n"), Ok("\n"), Err(1)], "hi\n", true),
            ("\n<ab>\n<a>", &[Ok("hi\n"), Err(2), Ok("\n"), Err(1)], "hi", true),
            ("x<a><ab>", &[Ok("xx"), Err(1), Err(2)], "x", true),
            ("x<a><ab>", &[Ok("xx"), Err(1), Err(1), Err(2)], "xx", false),
            // Written with other tokens it is ordinary text, and it continues across special tokens.
            ("<a>", &[Ok("hi <"), Ok("a> x")], "hi ", true),
            ("<a>", &[Ok("hi <"), Err(2), Ok("a> x")], "hi ", true),
        ] {
            assert_eq!(
                marked(stop, pieces),
                (text.to_string(), stopped),
                "{stop:?} in {pieces:?}"
            );
        }
    }
}
