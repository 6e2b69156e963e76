//! Tokens per second: one bar per system, the longest first, for each context length and each text.

use super::canvas::{HEAD, Side, sheet, width_of};
use super::{FAINT_INK, Figure, INK, MUTED, OURS, OURS_TOO, is_ours, slug};
use crate::bench::result::Document;
use crate::report::benchmarks::{Verdict, decode_at, live_lengths, text_of, texts};
use crate::report::input::{Group, ResultFile, SourceId};
use crate::report::markdown::rate;

const WIDTH: u32 = 960;
const BAR: f64 = 26.0;
const GAP: f64 = 8.0;
const PANEL_HEAD: f64 = 38.0;
/// A sheet of more could not be read.
const PANELS: usize = 4;

struct Panel<'a> {
    what: String,
    /// Tokens a second, and whether they held still.
    bars: Vec<(&'a ResultFile, f64, bool)>,
}

pub fn figure(group: &Group) -> Option<Figure> {
    let panel = |what: String, of: &dyn Fn(&Document) -> Option<(f64, bool)>| {
        let bars = group.results.iter().filter_map(|r| {
            let (rate, stable) = of(&r.of)?;
            Some((r, rate, stable))
        });
        let mut bars: Vec<_> = bars.collect();
        bars.sort_by(|a, b| b.1.total_cmp(&a.1));
        Panel { what, bars }
    };
    let mut panels = Vec::new();
    for text in texts(&group.results) {
        let what = format!("{} + {} tokens, end to end", text.0, text.1);
        panels.push(panel(what, &|d| {
            text_of(d, text).map(|e| (e.output_tokens_per_s, e.stable))
        }));
    }
    for live in live_lengths(&group.results) {
        let what = format!("decode at context {live}");
        panels.push(panel(what, &|d| {
            decode_at(d, live).map(|d| (d.output_tokens_per_s, d.stable))
        }));
    }
    panels.truncate(PANELS);
    if panels.is_empty() {
        return None;
    }
    let bars: usize = panels.iter().map(|p| p.bars.len()).sum();
    let height = HEAD + panels.len() as f64 * (PANEL_HEAD + 14.0) + bars as f64 * (BAR + GAP) + 14.0;
    let labels = group
        .results
        .iter()
        .map(|r| width_of(&r.of.system.label, 12.5))
        .fold(80.0, f64::max)
        .min(330.0);
    let subtitle = format!("{}; output tokens per second, higher is better", group.title());
    let svg = sheet(WIDTH, height.ceil() as u32, "Throughput", &subtitle, |canvas| {
        let (left, right) = (40.0 + labels, canvas.width - 140.0);
        let mut y = HEAD;
        for panel in &panels {
            let most = panel.bars.first().map_or(1.0, |b| b.1);
            canvas.write((28.0, y + 16.0), &panel.what, 13.5, INK, Side::Start, true);
            y += PANEL_HEAD;
            for (r, value, stable) in &panel.bars {
                let ours = is_ours(group, r);
                let colour = match (ours, r.of.system.name.as_str()) {
                    (true, _) => OURS,
                    (false, "lapidary") => OURS_TOO,
                    _ => MUTED,
                };
                let middle = y + BAR / 2.0;
                let end = left + (right - left) * value / most;
                let wrong = Verdict::of(r, group).comparison().is_some_and(|c| !c.equal);
                let label = &r.of.system.label;
                canvas.write((left - 10.0, middle), label, 12.5, INK, Side::End, ours);
                canvas.bar((left, y), (end.max(left + 1.0), y + BAR), colour);
                let mut text = rate(*value);
                text += if *stable { "" } else { ", unstable" };
                text += if wrong { " (outputs not equal)" } else { "" };
                // Inside the bar where the sheet ends.
                match width_of(&text, 12.5) + end + 10.0 < canvas.width - 8.0 {
                    true => canvas.write((end + 8.0, middle), &text, 12.5, FAINT_INK, Side::Start, ours),
                    false => canvas.write((end - 8.0, middle), &text, 12.5, INK, Side::End, ours),
                }
                y += BAR + GAP;
            }
            y += 14.0;
        }
    });
    let mut sources: Vec<SourceId> = panels
        .iter()
        .flat_map(|p| p.bars.iter().map(|(r, ..)| r.source))
        .collect();
    sources.sort_unstable();
    sources.dedup();
    Some(Figure {
        name: format!("{}-throughput", slug(group)),
        caption: format!("Output tokens per second, {}", group.title()),
        svg,
        sources,
    })
}
