//! Perplexity of a text, and how far one model's distributions are from another's.
//!
//! Input: sessions and the tokens of a text. A text longer than a window is cut into windows; each token after the
//! first is scored once, with the preceding tokens of its window as context. For the n scored tokens x:
//!
//! - mean NLL = −(1/n) Σ ln p(xᵢ | before), perplexity = e^NLL,
//! - KL = (1/n) Σᵢ Σᵥ q(v) ln(q(v) / p(v)), the divergence of the other model's distribution q from this one's p: the
//!   cost, in nats per token, of using p instead of q (S. Kullback and R. Leibler, "On Information and Sufficiency",
//!   1951),
//! - top-1 agreement: the share of positions at which both models' most probable token is the same.
//!
//! A standard error is s / √n of the scored tokens' values, assuming independence; that of the perplexity is the
//! perplexity times the NLL's (the delta method).

use crate::decode::{Session, SessionError};
use crate::help::{Fault, Help};
use crate::sample::softmax::weigh;

/// Maximum logits in memory per model: 64 MiB.
const MOST_LOGITS: usize = 1 << 24;

/// How a text is cut into windows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Windows {
    /// Tokens that begin every window, such as the tokenizer's first token; may be empty.
    pub prefix: Vec<u32>,
    /// Tokens that a window feeds, including the prefix.
    pub window: usize,
    /// Tokens between the beginnings of two windows.
    pub stride: usize,
}

/// Why a text cannot be scored.
#[derive(Debug, thiserror::Error)]
pub enum PerplexityError {
    #[error("the text has {tokens} tokens, and none of them has one before it to be predicted from")]
    TooShort { tokens: usize },
    #[error("a window of {window} tokens cannot hold {prefix} first tokens and one to predict")]
    Window { window: usize, prefix: usize },
    #[error("a stride of {stride} tokens: a window scores {most}, so it is 1 to {most}")]
    Stride { stride: usize, most: usize },
    #[error("{whose}: the logit of token {id} after position {position} is {value}: it has no distribution")]
    NotFinite {
        whose: &'static str,
        id: usize,
        position: usize,
        value: f32,
    },
    #[error(transparent)]
    Session(#[from] SessionError),
}

impl Help for PerplexityError {
    fn fault(&self) -> Fault {
        match self {
            PerplexityError::Session(error) => error.fault(),
            PerplexityError::NotFinite { .. } => Fault::Machine,
            _ => Fault::Input,
        }
    }

    fn help(&self) -> Option<String> {
        let help = match self {
            PerplexityError::Session(error) => return error.help(),
            PerplexityError::TooShort { .. } => "give a longer text",
            PerplexityError::Window { .. } => "use a larger --window",
            PerplexityError::Stride { .. } => "use another --stride, or leave it out",
            PerplexityError::NotFinite { .. } => {
                "the model's numbers overflowed; convert it with --dtype fp32 or bf16, and try `lapidary verify`"
            }
        };
        Some(help.to_string())
    }
}

impl Windows {
    /// Targets of a full window. Its last fed token predicts one that is not fed.
    pub fn targets(&self) -> Result<usize, PerplexityError> {
        let (window, prefix) = (self.window, self.prefix.len());
        let most = match prefix {
            0 => window,
            _ => (window + 1).saturating_sub(prefix),
        };
        match most {
            0 => Err(PerplexityError::Window { window, prefix }),
            most if (1..=most).contains(&self.stride) => Ok(most),
            most => Err(PerplexityError::Stride {
                stride: self.stride,
                most,
            }),
        }
    }

    /// The index of the first scored token: without a prefix, the first token has no context.
    fn first(&self) -> usize {
        usize::from(self.prefix.is_empty())
    }

    /// Number of scored tokens in a text of `tokens`.
    pub fn scored(&self, tokens: usize) -> usize {
        tokens.saturating_sub(self.first())
    }

    /// The tokens that each window feeds, and the first row with a scored target: `targets[i]` is predicted by row
    /// `skip + i`.
    fn cut<'t>(&self, text: &'t [u32]) -> Result<Vec<Cut<'t>>, PerplexityError> {
        let most = self.targets()?;
        let mut cuts = Vec::new();
        let (mut begin, mut next) = (self.first(), self.first());
        while next < text.len() {
            let end = (begin + most).min(text.len());
            // The last target is not fed; without a prefix the token before the first is.
            let context = &text[begin - self.first()..end - 1];
            let before = self.prefix.len().saturating_sub(1);
            cuts.push(Cut {
                fed: self.prefix.iter().chain(context).copied().collect(),
                skip: before + (next - begin),
                targets: &text[next..end],
            });
            next = end;
            begin += self.stride;
        }
        Ok(cuts)
    }
}

struct Cut<'t> {
    fed: Vec<u32>,
    skip: usize,
    targets: &'t [u32],
}

/// A mean with its standard error.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Mean {
    pub count: usize,
    pub mean: f64,
    /// Sum of squared deviations.
    squares: f64,
    pub largest: f64,
}

impl Mean {
    /// B. P. Welford, "Note on a Method for Calculating Corrected Sums of Squares and Products", 1962.
    pub fn add(&mut self, value: f64) {
        self.largest = match self.count {
            0 => value,
            _ => self.largest.max(value),
        };
        self.count += 1;
        let off = value - self.mean;
        self.mean += off / self.count as f64;
        self.squares += off * (value - self.mean);
    }

    /// Standard error of the mean; 0 for fewer than two values.
    pub fn error(&self) -> f64 {
        match self.count {
            0 | 1 => 0.0,
            n => (self.squares / (n - 1) as f64 / n as f64).sqrt(),
        }
    }
}

/// The result.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Measured {
    /// Negative log-likelihood of the scored tokens, in nats.
    pub nll: Mean,
    pub against: Option<Against>,
}

/// The same for another model, and the comparison of its distributions with this one's.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Against {
    pub nll: Mean,
    /// KL divergence of the other's distribution from this one's, in nats.
    pub kl: Mean,
    pub same_best: usize,
}

/// Scores every token of a text; both sessions have one vocabulary. `progress` gets the result so far and the completed
/// share of tokens.
pub fn perplexity(
    session: &mut Session,
    mut against: Option<&mut Session>,
    text: &[u32],
    windows: &Windows,
    progress: &mut dyn FnMut(&Measured, f32),
) -> Result<Measured, PerplexityError> {
    let all = windows.scored(text.len());
    if all == 0 {
        return Err(PerplexityError::TooShort { tokens: text.len() });
    }
    let mut measured = Measured {
        against: against.is_some().then(Against::default),
        ..Measured::default()
    };
    let vocabulary = session.vocabulary();
    let most = (MOST_LOGITS / vocabulary.max(1)).max(1);
    let (mut ours, mut theirs) = (Vec::new(), Vec::new());
    let mut scorer = Scorer::default();
    for cut in windows.cut(text)? {
        for session in std::iter::once(&mut *session).chain(against.as_deref_mut()) {
            session.clear();
            if cut.skip > 0 {
                session.feed(&cut.fed[..cut.skip])?;
            }
        }
        let mut position = cut.skip;
        let mut targets = cut.targets;
        while !targets.is_empty() {
            let (now, later) = targets.split_at(most.min(targets.len()));
            let fed = &cut.fed[position..position + now.len()];
            session.feed_all(fed, &mut ours)?;
            if let Some(other) = against.as_deref_mut() {
                other.feed_all(fed, &mut theirs)?;
            }
            for (i, target) in now.iter().enumerate() {
                let row = i * vocabulary..(i + 1) * vocabulary;
                let other = against.is_some().then(|| &theirs[row.clone()]);
                scorer.score(&mut measured, &ours[row], other, *target, position + i)?;
            }
            targets = later;
            position += now.len();
            progress(&measured, measured.nll.count as f32 / all as f32);
        }
    }
    Ok(measured)
}

/// A row's softmax: the largest logit, and the logarithm of the sum of all exponentials.
struct Softmax {
    best: usize,
    log_sum: f64,
    total: f64,
}

#[derive(Default)]
struct Scorer {
    weights: Vec<f32>,
}

impl Scorer {
    fn score(
        &mut self,
        measured: &mut Measured,
        logits: &[f32],
        other: Option<&[f32]>,
        target: u32,
        position: usize,
    ) -> Result<(), PerplexityError> {
        let own = self.softmax(logits, "the model", position)?;
        measured.nll.add(own.log_sum - f64::from(logits[target as usize]));
        let (Some(other), Some(against)) = (other, &mut measured.against) else {
            return Ok(());
        };
        let theirs = self.softmax(other, "the model of --against", position)?;
        against.nll.add(theirs.log_sum - f64::from(other[target as usize]));
        let pairs = self.weights.iter().zip(other).zip(logits);
        let sum: f64 = pairs
            .map(|((w, q), p)| f64::from(*w) * (f64::from(*q) - f64::from(*p)))
            .sum();
        // It is never negative; rounding can make it negative by an insignificant amount.
        let kl = sum / theirs.total + own.log_sum - theirs.log_sum;
        against.kl.add(kl.max(0.0));
        against.same_best += usize::from(own.best == theirs.best);
        Ok(())
    }

    /// Leaves the exponentials, relative to the largest, in `weights`.
    fn softmax(&mut self, logits: &[f32], whose: &'static str, position: usize) -> Result<Softmax, PerplexityError> {
        let mut best = 0;
        for (id, logit) in logits.iter().enumerate() {
            if !logit.is_finite() {
                return Err(PerplexityError::NotFinite {
                    whose,
                    id,
                    position,
                    value: *logit,
                });
            }
            if *logit > logits[best] {
                best = id;
            }
        }
        let weighed = weigh(logits, logits[best], &mut self.weights);
        Ok(Softmax {
            best,
            log_sum: f64::from(weighed.max) + weighed.total.ln(),
            total: weighed.total,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn windows(prefix: &[u32], window: usize, stride: usize) -> Windows {
        Windows {
            prefix: prefix.to_vec(),
            window,
            stride,
        }
    }

    /// The fed tokens, and each row that scores a target.
    type Scored = (Vec<u32>, Vec<(usize, u32)>);

    fn cuts(windows: &Windows, n: u32) -> Vec<Scored> {
        let text: Vec<u32> = (0..n).collect();
        let cuts = windows.cut(&text).unwrap().into_iter().map(|cut| {
            let rows = cut.targets.iter().enumerate().map(|(i, t)| (cut.skip + i, *t));
            (cut.fed.clone(), rows.collect())
        });
        cuts.collect()
    }

    #[test]
    fn every_token_is_scored_once_by_the_row_before_it() {
        for (prefix, window, stride) in [
            (&[][..], 4, 4),
            (&[], 4, 1),
            (&[], 1, 1),
            (&[], 5, 3),
            (&[90], 4, 4),
            (&[90], 4, 2),
            (&[90], 1, 1),
            (&[90, 91], 5, 3),
            (&[], 64, 64),
            (&[90], 64, 20),
        ] {
            let windows = windows(prefix, window, stride);
            for n in 2..30 {
                let mut scored = Vec::new();
                for (fed, rows) in cuts(&windows, n) {
                    assert!(fed.len() <= window && fed.starts_with(prefix), "{windows:?}");
                    for (row, target) in rows {
                        assert!(row < fed.len(), "{windows:?}");
                        let before = if target == 0 {
                            prefix.last().copied()
                        } else {
                            Some(target - 1)
                        };
                        let begins = row + 1 == prefix.len();
                        assert!(fed.get(row).copied() == before || begins, "{windows:?} {target}");
                        scored.push(target);
                    }
                }
                let first = u32::from(prefix.is_empty());
                assert_eq!(scored, (first..n).collect::<Vec<_>>(), "{windows:?}");
            }
        }
        // Overlapping windows give each token after the first window at least window - stride before it.
        let (fed, rows) = cuts(&windows(&[], 8, 2), 30).pop().unwrap();
        assert_eq!((fed.len(), rows.len()), (7, 1));
        assert!(rows[0].0 >= 6);
    }

    #[test]
    fn what_cannot_be_cut_is_refused() {
        assert!(windows(&[1, 2], 1, 1).targets().is_err());
        assert!(windows(&[], 0, 1).targets().is_err());
        assert!(windows(&[], 8, 0).targets().is_err() && windows(&[], 8, 9).targets().is_err());
        assert_eq!(windows(&[1], 8, 8).targets().unwrap(), 8);
        assert_eq!(windows(&[1, 2], 8, 7).targets().unwrap(), 7);
    }

    /// Two distributions over three tokens, by the definition.
    #[test]
    fn nll_and_divergence_are_those_of_the_definition() {
        let (p, q) = ([0.5f64, 0.25, 0.25], [0.2f64, 0.5, 0.3]);
        let logits = |d: [f64; 3], by: f64| d.map(|p| (p.ln() + by) as f32);
        let mut scorer = Scorer::default();
        let mut measured = Measured {
            against: Some(Against::default()),
            ..Measured::default()
        };
        let (ours, theirs) = (logits(p, 30.0), logits(q, -7.0));
        scorer.score(&mut measured, &ours, Some(&theirs), 2, 0).unwrap();
        let expected: f64 = p.iter().zip(q).map(|(p, q)| q * (q / p).ln()).sum();
        let against = measured.against.as_ref().unwrap();
        assert!((measured.nll.mean - 4f64.ln()).abs() < 1e-6, "{measured:?}");
        assert!((against.nll.mean + 0.3f64.ln()).abs() < 1e-6, "{measured:?}");
        assert!((against.kl.mean - expected).abs() < 1e-6, "{measured:?}");
        assert_eq!(against.same_best, 0);
        // The divergence from itself is zero, despite rounding.
        scorer.score(&mut measured, &ours, Some(&ours), 0, 1).unwrap();
        let against = measured.against.as_ref().unwrap();
        assert!((against.kl.mean - expected / 2.0).abs() < 1e-6);
        assert_eq!((against.same_best, against.kl.count), (1, 2));

        let bad = scorer.score(&mut measured, &[0.0, f32::NAN], None, 0, 5).unwrap_err();
        assert_eq!(
            bad.to_string(),
            "the model: the logit of token 1 after position 5 is NaN: it has no distribution"
        );
    }

    #[test]
    fn means_and_their_errors() {
        let mut mean = Mean::default();
        for value in [2.0, 4.0, 4.0, 4.0, 5.0, 5.0, 7.0, 9.0] {
            mean.add(value);
        }
        // Variance 32 / 7 of the sample.
        assert_eq!((mean.mean, mean.largest), (5.0, 9.0));
        assert!((mean.error() - (32.0f64 / 7.0 / 8.0).sqrt()).abs() < 1e-12);
        assert_eq!(Mean::default().error(), 0.0);
    }
}
