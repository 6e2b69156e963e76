//! The required prompt lengths of `lapidary verify`, and what they do not cover.
//!
//! Two models that differ only beyond a window, at the end of a table or where a rotary scaling switches agree on every
//! shorter prompt. So the lengths in the export's masks and tables, and the windows of the package, determine the length of
//! the longest prompt, within the limits of cache, context and engine.

use std::collections::BTreeMap;

use serde::Serialize;

use crate::decode::reference::EngineKind;
use crate::package::manifest::Manifest;

/// Tokens of the longest built-in prompt if nothing requires more.
pub const USUAL: usize = 48;

/// Smaller numbers in an export are not listed.
const SMALLEST: usize = 8;

/// Tokens beyond a length, so that it affects several rows.
const BEYOND: usize = 8;

/// A length at which package and export could begin to differ.
#[derive(Debug, Serialize)]
pub struct Mark {
    pub tokens: usize,
    /// A window, or a constant of the export.
    pub what: String,
    /// A sequence longer than it (or as long as the context, if it is the context's end) was compared.
    pub covered: bool,
    /// Why it was not compared.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
}

/// Limits of a compared sequence, besides its tokens after the prompt.
pub struct Bounds {
    /// Slots of the package's largest cache.
    pub capacity: usize,
    /// Slots of the export's cache, if it is static.
    pub export: Option<usize>,
    /// The engine's limit in a reasonable time.
    pub affordable: usize,
}

impl Bounds {
    /// The bounds of a package and an engine. `longest` is the user's value and overrides the limit by the engine's
    /// speed.
    pub fn new(
        manifest: &Manifest,
        capacity: usize,
        export: Option<usize>,
        kind: EngineKind,
        longest: Option<usize>,
    ) -> Self {
        Bounds {
            capacity,
            export,
            affordable: longest.unwrap_or_else(|| affordable(manifest, kind)),
        }
    }

    /// Tokens of the longest sequence that can be compared.
    pub fn most(&self) -> usize {
        self.capacity
            .min(self.export.unwrap_or(usize::MAX))
            .min(self.affordable)
    }
}

/// Multiply-adds of each engine in about half a minute on a slow machine, and the number of scores that fit into a few
/// gigabytes.
fn affordable(manifest: &Manifest, kind: EngineKind) -> usize {
    const SCORES: usize = 1 << 28;
    let work: u64 = match kind {
        EngineKind::Tract => 1_000_000_000_000,
        EngineKind::Eval => 10_000_000_000,
    };
    let weights = manifest
        .weights
        .tensors
        .iter()
        .map(|t| t.shape.iter().product::<usize>() as u64);
    let tokens = (work / weights.sum::<u64>().max(1)) as usize;
    tokens
        .min((SCORES / manifest.architecture.heads.max(1)).isqrt())
        .max(USUAL)
}

/// The relevant lengths, ascending, and the number of tokens of the longest sequence that exceeds all of them within
/// the limits.
pub fn marks(windows: &[Option<usize>], export: &BTreeMap<usize, String>, bounds: &Bounds) -> (Vec<Mark>, usize) {
    // Every set of prompts exceeds the smallest numbers, few of which are lengths.
    let mut lengths = export.clone().split_off(&SMALLEST);
    for (layer, window) in windows.iter().enumerate().rev() {
        if let Some(window) = window {
            lengths.insert(*window, format!("the window of layer {layer}"));
        }
    }
    let longest = lengths.keys().next_back().map_or(USUAL, |length| length + BEYOND);
    let tokens = longest.max(USUAL).min(bounds.most());
    let mark = |(length, what): (usize, String)| {
        // Nothing follows the last position of the context.
        let covered = tokens > length || (tokens == length && length == bounds.capacity);
        let reason = match covered {
            true => None,
            false if length >= bounds.capacity => Some(format!("the package's cache ends at {}", bounds.capacity)),
            false if bounds.export.is_some_and(|slots| length >= slots) => {
                Some("the export's cache ends before".to_string())
            }
            false => Some("it would take this engine too long; see --longest".to_string()),
        };
        Mark {
            tokens: length,
            what,
            covered,
            reason,
        }
    };
    (lengths.into_iter().map(mark).collect(), tokens)
}

/// Lines about covered and uncovered lengths.
pub fn describe(marks: &[Mark], compared: usize) -> String {
    let list = |covered: bool| -> Vec<String> {
        let chosen = marks.iter().filter(|mark| mark.covered == covered);
        chosen
            .map(|mark| match &mark.reason {
                None => format!("{} ({})", mark.tokens, mark.what),
                Some(reason) => format!("{} ({}): {reason}", mark.tokens, mark.what),
            })
            .collect()
    };
    let mut text = format!("longest sequence compared: {compared} tokens");
    let passed = list(true);
    if !passed.is_empty() {
        // The longest ones are enough.
        let shown = &passed[passed.len().saturating_sub(4)..];
        text += &format!("; it covers {}", shown.join(", "));
    }
    text.push('\n');
    for line in list(false) {
        text += &format!("not covered: {line}\n");
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bounds(capacity: usize, export: Option<usize>, affordable: usize) -> Bounds {
        Bounds {
            capacity,
            export,
            affordable,
        }
    }

    #[test]
    fn what_is_out_of_reach_is_said() {
        let marks = |lengths: &[usize], bounds: &Bounds| {
            let named = lengths.iter().map(|n| (*n, format!("c{n}"))).collect();
            marks(&[None, Some(16)], &named, bounds)
        };
        let (found, tokens) = marks(&[16, 128], &bounds(4096, None, 10_000));
        assert_eq!(tokens, 136);
        assert!(found.iter().all(|mark| mark.covered), "{found:?}");
        let (found, tokens) = marks(&[16, 128, 2048], &bounds(128, None, 10_000));
        assert_eq!(tokens, 128);
        let text = describe(&found, tokens);
        assert!(
            text.contains("not covered: 2048 (c2048): the package's cache ends at 128"),
            "{text}"
        );
        assert!(
            text.contains("it covers 16 (the window of layer 1), 128 (c128)"),
            "{text}"
        );
        let (found, tokens) = marks(&[200], &bounds(4096, None, 100));
        assert_eq!(tokens, 100);
        assert!(describe(&found, tokens).contains("see --longest"));
        let (found, _) = marks(&[200], &bounds(4096, Some(64), 1000));
        assert!(describe(&found, 64).contains("the export's cache ends before"));
    }
}
