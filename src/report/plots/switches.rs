//! Ablations: the effect of each setting on decode and prefill, as a share of the default's time.

use super::canvas::{HEAD, Side, sheet, width_of};
use super::{AXIS, FAINT_INK, Figure, INK, MUTED, OTHERS, OURS, slug};
use crate::report::ablations::{Ablation, ablations};
use crate::report::input::{Group, ResultFile, SourceId};
use crate::report::measure::{decode_at, prefill_of};

const WIDTH: u32 = 960;
const BAR: f64 = 22.0;
const GAP: f64 = 8.0;
const PANEL_HEAD: f64 = 38.0;

/// One setting with one value: its name, the share, the measurement.
struct Bar {
    name: String,
    share: f64,
    at: String,
    stable: bool,
}

/// The share of a run, its measurement, and whether both are stable, if its baseline has the same measurement.
type Measure = dyn Fn(&Ablation<'_>, &ResultFile) -> Option<(f64, String, bool)>;

pub fn figure(group: &Group) -> Option<Figure> {
    let all = ablations(group);
    let runs = || {
        all.iter()
            .flat_map(|a| a.runs.iter().map(move |(position, run)| (a, position, run)))
    };
    let bars = |of: &Measure| -> Vec<Bar> {
        let bar = |(a, position, run): (&Ablation<'_>, &String, &&ResultFile)| {
            let (share, at, stable) = of(a, run)?;
            let mut name = format!("{}: {position}", a.name);
            // A setting with two defaults names the one used for comparison.
            if let (true, Some(usual)) = (all.iter().filter(|b| b.name == a.name).count() > 1, a.usual()) {
                name += &format!(", against {usual}");
            }
            Some(Bar {
                name,
                share,
                at,
                stable,
            })
        };
        let mut bars: Vec<Bar> = runs().filter_map(bar).collect();
        bars.sort_by(|a, b| b.share.total_cmp(&a.share));
        bars
    };
    let decode = bars(&|a, run| {
        run.of.decode.iter().find_map(|d| {
            let usual = decode_at(&a.baseline.of, d.live)?;
            let at = format!("context {}", d.live);
            Some((d.ms.median / usual.ms.median, at, d.stable && usual.stable))
        })
    });
    let prefill = bars(&|a, run| {
        run.of.prefill.iter().rev().find_map(|p| {
            let usual = prefill_of(&a.baseline.of, p.tokens)?;
            let at = format!("{} tokens", p.tokens);
            Some((p.ms.median / usual.ms.median, at, p.stable && usual.stable))
        })
    });
    let panels: Vec<(&str, Vec<Bar>)> = [("decode", decode), ("prefill", prefill)]
        .into_iter()
        .filter(|(_, bars)| !bars.is_empty())
        .collect();
    let shown = || panels.iter().flat_map(|(_, bars)| bars);
    let most = shown().map(|b| b.share).fold(1.0, f64::max);
    let rows = shown().count();
    let steady = shown().all(|b| b.stable);
    if rows == 0 {
        return None;
    }
    let height = HEAD + panels.len() as f64 * (PANEL_HEAD + 14.0) + rows as f64 * (BAR + GAP) + 10.0;
    let labels = shown()
        .map(|b| width_of(&b.name, 12.5))
        .fold(120.0, f64::max)
        .min(360.0);
    let subtitle = format!("{}; time with another value of one setting, default = 1", group.title());
    let svg = sheet(
        WIDTH,
        height.ceil() as u32,
        "One setting at a time",
        &subtitle,
        |canvas| {
            let (left, right) = (40.0 + labels, canvas.width - if steady { 190.0 } else { 240.0 });
            let at = |share: f64| left + (right - left) * share / most;
            let mut y = HEAD;
            for (what, bars) in &panels {
                canvas.write((28.0, y + 16.0), what, 13.5, INK, Side::Start, true);
                y += PANEL_HEAD;
                let top = y;
                for bar in bars {
                    let middle = y + BAR / 2.0;
                    canvas.write((left - 10.0, middle), &bar.name, 12.5, INK, Side::End, false);
                    // Longer than the default favors the default; a difference of a hundredth favors neither.
                    let color = match bar.share {
                        share if (share - 1.0).abs() < 0.01 => MUTED,
                        share if share > 1.0 => OURS,
                        _ => OTHERS[3],
                    };
                    canvas.bar((left, y), (at(bar.share), y + BAR), color);
                    let doubt = if bar.stable { "" } else { ", unstable" };
                    let label = format!("{:.2}, {}{doubt}", bar.share, bar.at);
                    let end = at(bar.share).max(at(1.0));
                    canvas.write((end + 8.0, middle), &label, 12.0, FAINT_INK, Side::Start, false);
                    y += BAR + GAP;
                }
                canvas.line(&[(at(1.0), top - 6.0), (at(1.0), y - GAP + 6.0)], AXIS, 2);
                y += 14.0;
            }
        },
    );
    let mut sources: Vec<SourceId> = runs().flat_map(|(a, _, run)| [a.baseline.source, run.source]).collect();
    sources.sort_unstable();
    sources.dedup();
    Some(Figure {
        name: format!("{}-ablations", slug(group)),
        caption: format!("One setting at a time, {}", group.title()),
        svg,
        sources,
    })
}
