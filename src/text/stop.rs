//! Stop strings: [`StopMatcher`] never gives part of one.
//!
//! It watches text that arrives in pieces; a stop string may straddle them. It only ever appends, so what it gave can be
//! printed at once.

/// Finds the first of several stop strings in text that arrives in pieces.
#[derive(Clone, Debug, Default)]
pub struct StopMatcher {
    stops: Vec<String>,
    held: String,
}

/// What may be shown now.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Shown {
    /// What nothing can take back.
    pub text: String,
    /// A stop string was met: `text` ends right before it, and nothing may follow.
    pub stopped: bool,
}

impl StopMatcher {
    /// Empty stop strings are ignored.
    pub fn new(stops: impl IntoIterator<Item = String>) -> Self {
        StopMatcher {
            stops: stops.into_iter().filter(|s| !s.is_empty()).collect(),
            held: String::new(),
        }
    }

    /// Adds a piece; keeps back the longest tail that could still become a stop string.
    pub fn push(&mut self, piece: &str) -> Shown {
        self.held.push_str(piece);
        // Of several, the one that begins first wins: it is what a reader meets first.
        if let Some(at) = self.stops.iter().filter_map(|s| self.held.find(s.as_str())).min() {
            self.held.truncate(at);
            return Shown {
                text: std::mem::take(&mut self.held),
                stopped: true,
            };
        }
        let keep = self.stops.iter().map(|s| overlap(&self.held, s)).max().unwrap_or(0);
        let rest = self.held.split_off(self.held.len() - keep);
        Shown {
            text: std::mem::replace(&mut self.held, rest),
            stopped: false,
        }
    }

    /// The tail kept back, once nothing can follow it.
    pub fn finish(&mut self) -> String {
        std::mem::take(&mut self.held)
    }
}

/// Bytes of the longest proper prefix of `stop` that `text` ends with. Always on a character border of both.
fn overlap(text: &str, stop: &str) -> usize {
    let borders = stop.char_indices().map(|(i, _)| i).skip(1);
    borders.filter(|i| text.ends_with(&stop[..*i])).max().unwrap_or(0)
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
    }

    #[test]
    fn whatever_the_cuts_the_text_is_the_same() {
        let text = "one STOone STSTOP two";
        for a in 0..text.len() {
            for b in a..text.len() {
                let cut = [&text[..a], &text[a..b], &text[b..]];
                assert_eq!(shown(&["STOP"], &cut), ("one STOone ST".into(), true), "{cut:?}");
            }
        }
    }
}
