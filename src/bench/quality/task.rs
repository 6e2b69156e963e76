//! A task: prompts with reference answers, and scores of a model's answers.
//!
//! A file has one JSON object per line: `prompt`, `reference`, optionally `max_new_tokens` and an `id`, which is passed
//! on. Scores of the file are means over lines.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::perplexity::Mean;
use super::rouge::{Score, rouge_l, rouge_n, tokens};
use crate::help::Help;

/// One line of a task.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Example {
    /// In the file, from 1.
    #[serde(skip)]
    pub line: usize,
    #[serde(default)]
    pub id: Option<Value>,
    pub prompt: String,
    pub reference: String,
    #[serde(default)]
    pub max_new_tokens: Option<usize>,
}

/// Why a file is not a valid task.
#[derive(Debug, thiserror::Error)]
pub enum TaskError {
    #[error("{}: {source}", path.display())]
    Io { path: PathBuf, source: std::io::Error },
    #[error("{}: line {line}: {message}", path.display())]
    Line {
        path: PathBuf,
        line: usize,
        message: String,
    },
    #[error("{}: it has no line", path.display())]
    Empty { path: PathBuf },
}

impl Help for TaskError {
    fn help(&self) -> Option<String> {
        match self {
            TaskError::Io { .. } => None,
            _ => Some(
                "--task wants a JSON object a line: {\"prompt\": TEXT, \"reference\": TEXT}, with \"max_new_tokens\": N and \
                 \"id\" where wanted"
                    .to_string(),
            ),
        }
    }
}

/// The lines of a task; empty lines are ignored. `path` is for messages.
pub fn parse(path: &Path, text: &str) -> Result<Vec<Example>, TaskError> {
    let mut examples = Vec::new();
    for (i, text) in text.lines().enumerate().filter(|(_, text)| !text.trim().is_empty()) {
        let line = i + 1;
        let refuse = |message: String| TaskError::Line {
            path: path.to_path_buf(),
            line,
            message,
        };
        let example: Example = serde_json::from_str(text).map_err(|e| {
            // serde's line is always 1.
            let message = e.to_string();
            refuse(message.split(" at line ").next().unwrap_or(&message).to_string())
        })?;
        if example.max_new_tokens == Some(0) {
            return Err(refuse("max_new_tokens is 0".into()));
        }
        if example.reference.trim().is_empty() {
            return Err(refuse("the reference is empty".into()));
        }
        examples.push(Example { line, ..example });
    }
    match examples.is_empty() {
        true => Err(TaskError::Empty {
            path: path.to_path_buf(),
        }),
        false => Ok(examples),
    }
}

/// Metrics for thresholds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Metric {
    #[serde(rename = "rouge1")]
    Rouge1,
    #[serde(rename = "rouge2")]
    Rouge2,
    #[serde(rename = "rougeL")]
    RougeL,
    #[serde(rename = "exact_match")]
    ExactMatch,
}

impl Metric {
    pub const ALL: [Metric; 4] = [Metric::Rouge1, Metric::Rouge2, Metric::RougeL, Metric::ExactMatch];

    pub fn name(self) -> &'static str {
        match self {
            Metric::Rouge1 => "rouge1",
            Metric::Rouge2 => "rouge2",
            Metric::RougeL => "rougeL",
            Metric::ExactMatch => "exact_match",
        }
    }
}

/// Scores of a line, or their means over lines.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Scores {
    pub rouge1: Score,
    pub rouge2: Score,
    #[serde(rename = "rougeL")]
    pub rouge_l: Score,
    /// 1 if text and reference are equal except for white space at their ends, else 0.
    pub exact_match: f64,
}

impl Scores {
    pub fn of(text: &str, reference: &str) -> Scores {
        let (ours, right) = (tokens(text), tokens(reference));
        Scores {
            rouge1: rouge_n(&ours, &right, 1),
            rouge2: rouge_n(&ours, &right, 2),
            rouge_l: rouge_l(&ours, &right),
            exact_match: f64::from(u8::from(text.trim() == reference.trim())),
        }
    }

    /// F1, or the share of exact matches.
    pub fn get(&self, metric: Metric) -> f64 {
        match metric {
            Metric::Rouge1 => self.rouge1.f1,
            Metric::Rouge2 => self.rouge2.f1,
            Metric::RougeL => self.rouge_l.f1,
            Metric::ExactMatch => self.exact_match,
        }
    }

    /// Means over lines.
    pub fn mean(all: &[Scores]) -> Scores {
        let mean = |of: &dyn Fn(&Scores) -> f64| all.iter().map(of).sum::<f64>() / all.len().max(1) as f64;
        let score = |of: &dyn Fn(&Scores) -> Score| Score {
            precision: mean(&|s| of(s).precision),
            recall: mean(&|s| of(s).recall),
            f1: mean(&|s| of(s).f1),
        };
        Scores {
            rouge1: score(&|s| s.rouge1),
            rouge2: score(&|s| s.rouge2),
            rouge_l: score(&|s| s.rouge_l),
            exact_match: mean(&|s| s.exact_match),
        }
    }

    /// The standard error of a metric's mean over lines.
    pub fn error(all: &[Scores], metric: Metric) -> f64 {
        let mut mean = Mean::default();
        all.iter().for_each(|scores| mean.add(scores.get(metric)));
        mean.error()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_read_and_what_is_unknown_is_refused() {
        let read = |text: &str| parse(Path::new("t.jsonl"), text);
        let examples = read(
            "{\"prompt\": \"a\", \"reference\": \"b\", \"id\": 7}\n\n{\"prompt\": \"c\", \"reference\": \"d\", \"max_new_tokens\": 3}\n",
        )
        .unwrap();
        assert_eq!((examples[0].line, &examples[0].id), (1, &Some(Value::from(7))));
        assert_eq!((examples[1].line, examples[1].max_new_tokens), (3, Some(3)));
        for (text, expected) in [
            ("", "t.jsonl: it has no line"),
            ("\n{", "t.jsonl: line 2: EOF while parsing an object"),
            ("{\"prompt\": \"a\"}", "t.jsonl: line 1: missing field `reference`"),
            (
                "{\"prompt\": \"a\", \"reference\": \" \"}",
                "t.jsonl: line 1: the reference is empty",
            ),
            (
                "{\"prompt\": \"a\", \"reference\": \"b\", \"max_new_tokens\": 0}",
                "t.jsonl: line 1: max_new_tokens is 0",
            ),
            (
                "{\"prompt\": \"a\", \"reference\": \"b\", \"max_tokens\": 1}",
                "t.jsonl: line 1: unknown field `max_tokens`",
            ),
        ] {
            let error = read(text).unwrap_err().to_string();
            assert!(error.starts_with(expected), "{error}");
        }
    }

    #[test]
    fn means_are_over_lines() {
        let all = [Scores::of("Paris\n", "Paris"), Scores::of("a city", "The city of Rome")];
        assert_eq!(all[0].exact_match, 1.0);
        assert_eq!((all[1].rouge1.precision, all[1].rouge1.recall), (0.5, 0.25));
        let mean = Scores::mean(&all);
        assert_eq!((mean.exact_match, mean.rouge1.recall), (0.5, 0.625));
        assert_eq!(mean.get(Metric::Rouge1), (1.0 + all[1].rouge1.f1) / 2.0);
        assert!((Scores::error(&all, Metric::ExactMatch) - 0.5).abs() < 1e-12);
    }
}
