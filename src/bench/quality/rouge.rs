//! ROUGE-1, ROUGE-2 and ROUGE-L of one text against one reference.
//!
//! Definition: C.-Y. Lin, "ROUGE: A Package for Automatic Evaluation of Summaries", 2004, sections 2 and 3, with the
//! tokens and the equal weight of precision and recall of Google's `rouge_score` 0.1.2 (`use_stemmer=False`), whose values
//! the tests have. ROUGE-L is over the whole text as one sequence, not sentence by sentence (`rougeLsum`).

use std::collections::HashMap;

use serde::{Deserialize, Serialize};

/// Shares, 0 to 1.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Score {
    /// Share of the text's items that match.
    pub precision: f64,
    /// Share of the reference's items that match.
    pub recall: f64,
    /// Their harmonic mean; 0 if both are 0.
    pub f1: f64,
}

impl Score {
    /// From `hits` and the numbers of items in text and reference.
    fn of(hits: usize, in_text: usize, in_reference: usize) -> Score {
        let share = |of: usize| hits as f64 / of.max(1) as f64;
        let (precision, recall) = (share(in_text), share(in_reference));
        let f1 = match precision + recall {
            0.0 => 0.0,
            sum => 2.0 * precision * recall / sum,
        };
        Score { precision, recall, f1 }
    }
}

/// The tokens of a text: runs of ASCII letters and digits in lower case. Everything else separates them.
pub fn tokens(text: &str) -> Vec<String> {
    let lower = text.to_lowercase();
    let is_in = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit();
    let words = lower.split(|c| !is_in(c)).filter(|word| !word.is_empty());
    words.map(str::to_string).collect()
}

/// ROUGE-N: common runs of `n` tokens, each counted at most as often as in either text.
pub fn rouge_n(text: &[String], reference: &[String], n: usize) -> Score {
    let count = |tokens: &[String]| tokens.len().saturating_sub(n - 1);
    let mut there: HashMap<&[String], usize> = HashMap::new();
    for run in reference.windows(n) {
        *there.entry(run).or_default() += 1;
    }
    let mut hits = 0;
    for run in text.windows(n) {
        if let Some(left) = there.get_mut(run).filter(|left| **left > 0) {
            *left -= 1;
            hits += 1;
        }
    }
    Score::of(hits, count(text), count(reference))
}

/// ROUGE-L: the longest sequence of tokens that both have in this order, gaps allowed.
pub fn rouge_l(text: &[String], reference: &[String]) -> Score {
    // One row of the usual table: the longest common subsequence of the text so far and reference[..i].
    let mut row = vec![0usize; reference.len() + 1];
    for word in text {
        let mut diagonal = 0;
        for (i, other) in reference.iter().enumerate() {
            let above = row[i + 1];
            row[i + 1] = match word == other {
                true => diagonal + 1,
                false => above.max(row[i]),
            };
            diagonal = above;
        }
    }
    Score::of(row[reference.len()], text.len(), reference.len())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Precision, recall and F1 of ROUGE-1, -2 and -L.
    type Expected = [[f64; 3]; 3];

    /// Reference, text, and the values of `rouge_score` 0.1.2.
    const CASES: [(&str, &str, Expected); 12] = [
        (
            "The quick brown fox jumps over the lazy dog",
            "The quick brown dog jumps on the log.",
            [
                [0.75, 0.6666666666666666, 0.7058823529411765],
                [0.2857142857142857, 0.25, 0.26666666666666666],
                [0.625, 0.5555555555555556, 0.5882352941176471],
            ],
        ),
        (
            "testing one two",
            "testing",
            [
                [1.0, 0.3333333333333333, 0.5],
                [0.0, 0.0, 0.0],
                [1.0, 0.3333333333333333, 0.5],
            ],
        ),
        (
            "the the the the",
            "the cat the",
            [
                [0.6666666666666666, 0.5, 0.5714285714285715],
                [0.0, 0.0, 0.0],
                [0.6666666666666666, 0.5, 0.5714285714285715],
            ],
        ),
        ("", "something", [[0.0, 0.0, 0.0], [0.0, 0.0, 0.0], [0.0, 0.0, 0.0]]),
        ("!!!", "something", [[0.0, 0.0, 0.0], [0.0, 0.0, 0.0], [0.0, 0.0, 0.0]]),
        ("one", "one", [[1.0, 1.0, 1.0], [0.0, 0.0, 0.0], [1.0, 1.0, 1.0]]),
        (
            "Don't stop-me now, it's 3.14!",
            "dont stop me now its 3 14",
            [
                [0.7142857142857143, 0.5555555555555556, 0.6250000000000001],
                [0.5, 0.375, 0.42857142857142855],
                [0.7142857142857143, 0.5555555555555556, 0.6250000000000001],
            ],
        ),
        (
            "\u{130}stanbul \u{212a}elvin caf\u{e9} na\u{ef}ve",
            "i stanbul kelvin caf na ve",
            [[1.0, 1.0, 1.0], [1.0, 1.0, 1.0], [1.0, 1.0, 1.0]],
        ),
        (
            "a b c d e f g",
            "g f e d c b a",
            [
                [1.0, 1.0, 1.0],
                [0.0, 0.0, 0.0],
                [0.14285714285714285, 0.14285714285714285, 0.14285714285714285],
            ],
        ),
        (
            "the police killed the gunman",
            "police kill the gunman",
            [
                [0.75, 0.6, 0.6666666666666665],
                [0.3333333333333333, 0.25, 0.28571428571428575],
                [0.75, 0.6, 0.6666666666666665],
            ],
        ),
        (
            "the police killed the gunman",
            "the gunman kill police",
            [
                [0.75, 0.6, 0.6666666666666665],
                [0.3333333333333333, 0.25, 0.28571428571428575],
                [0.5, 0.4, 0.4444444444444445],
            ],
        ),
        (
            "It is a guide to action which ensures that the military always obeys the commands of the party",
            "It is a guide to action that ensures that the military will forever heed Party commands",
            [
                [0.75, 0.6666666666666666, 0.7058823529411765],
                [0.5333333333333333, 0.47058823529411764, 0.5],
                [0.6875, 0.6111111111111112, 0.6470588235294118],
            ],
        ),
    ];

    #[test]
    fn scores_are_those_of_rouge_score() {
        for (reference, text, expected) in CASES {
            let (a, b) = (tokens(text), tokens(reference));
            let found = [rouge_n(&a, &b, 1), rouge_n(&a, &b, 2), rouge_l(&a, &b)];
            for (found, expected) in found.into_iter().zip(expected) {
                let found = [found.precision, found.recall, found.f1];
                let near = found.iter().zip(expected).all(|(x, y)| (x - y).abs() < 1e-12);
                assert!(near, "{text:?} of {reference:?}: {found:?}, not {expected:?}");
            }
        }
    }
}
