//! Line plots: time per output token by context length, time to first token by prompt length, throughput by clients.

use super::axes::{Scale, clear, spread};
use super::canvas::{HEAD, Side, sheet, width_of};
use super::{AXIS, FAINT_INK, Figure, GRID, INK, Style, is_ours, slug, style, styled};
use crate::bench::result::Document;
use crate::bench::summary::Summary;
use crate::report::input::{Group, Input, SourceId};
use crate::report::markdown::{ms, rate};
use crate::report::serving;

const SIZE: (u32, u32) = (960, 540);

/// A point of a line.
#[derive(Clone, Copy)]
struct Point {
    x: usize,
    value: f64,
    /// The 90th percentile.
    high: Option<f64>,
    stable: bool,
}

impl Point {
    fn of(x: usize, ms: &Summary, stable: bool) -> Self {
        Point {
            x,
            value: ms.median,
            high: Some(ms.p90),
            stable,
        }
    }
}

/// A line.
struct Series {
    label: String,
    is_ours: bool,
    style: Style,
    /// By `x`.
    points: Vec<Point>,
    source: SourceId,
}

/// The quantity of a plot.
struct Chart {
    title: &'static str,
    subtitle: String,
    below: &'static str,
    show: fn(f64) -> String,
}

/// Time per output token by context length; a line for each system.
pub fn decode(group: &Group) -> Option<Figure> {
    let chart = Chart {
        title: "Time per output token by context length",
        subtitle: format!("{}; median ms/token", group.title()),
        below: "context length, tokens (logarithmic)",
        show: ms,
    };
    let points = |d: &Document| d.decode.iter().map(|d| Point::of(d.live, &d.ms, d.stable)).collect();
    of_group(group, "latency", chart, points)
}

/// Time to first token by prompt length; a line for each system.
pub fn prefill(group: &Group) -> Option<Figure> {
    let chart = Chart {
        title: "Time to first token by prompt length",
        subtitle: format!("{}; median ms", group.title()),
        below: "prompt length, tokens (logarithmic)",
        show: ms,
    };
    let points = |d: &Document| d.prefill.iter().map(|p| Point::of(p.tokens, &p.ms, p.stable)).collect();
    of_group(group, "prefill", chart, points)
}

fn of_group(group: &Group, kind: &str, chart: Chart, points: fn(&Document) -> Vec<Point>) -> Option<Figure> {
    let series = styled(group).into_iter().map(|(r, style)| Series {
        label: r.of.system.label.clone(),
        is_ours: is_ours(group, r),
        style,
        points: points(&r.of),
        source: r.source,
    });
    let caption = format!("{}, {}", chart.title, group.title());
    figure(format!("{}-{kind}", slug(group)), caption, chart, series.collect())
}

/// Output tokens per second of the scheduler by concurrent clients; a line for each package.
pub fn serving(input: &Input) -> Option<Figure> {
    let series = input.serving.iter().enumerate().map(|(i, s)| Series {
        label: serving::name(input, s),
        is_ours: i == 0,
        style: style(i),
        points: s
            .of
            .levels
            .iter()
            .map(|level| Point {
                x: level.clients,
                value: level.tokens_per_s,
                high: None,
                stable: true,
            })
            .collect(),
        source: s.source,
    });
    let titles: Vec<String> = input.serving.iter().map(|s| serving::title(&s.of)).collect();
    let chart = Chart {
        title: "Throughput by concurrent clients",
        subtitle: format!("output tokens/s of all clients; {}", titles.first()?),
        below: "concurrent clients (logarithmic)",
        show: rate,
    };
    figure(
        "serving-throughput".to_string(),
        chart.title.to_string(),
        chart,
        series.collect(),
    )
}

fn figure(name: String, caption: String, chart: Chart, mut series: Vec<Series>) -> Option<Figure> {
    series.retain(|s| !s.points.is_empty());
    for s in &mut series {
        s.points.sort_by_key(|p| p.x);
    }
    let points = || series.iter().flat_map(|s| &s.points);
    let (first, last) = (points().map(|p| p.x).min()?, points().map(|p| p.x).max()?);
    let lowest = points().map(|p| p.value).fold(f64::INFINITY, f64::min);
    let top_of = |p: &Point| p.high.unwrap_or(p.value).max(p.value);
    let highest = points().map(top_of).fold(0.0, f64::max);
    let log = highest > 6.0 * lowest;
    let named = |s: &Series| format!("{}: {}", s.label, (chart.show)(s.points[s.points.len() - 1].value));
    let at_edge = |s: &&Series| s.points[s.points.len() - 1].x == last;
    let labels = series
        .iter()
        .filter(at_edge)
        .map(|s| width_of(&named(s), 12.5))
        .fold(160.0, f64::max);
    let mut subtitle = chart.subtitle.clone();
    subtitle += if log { ", logarithmic" } else { "" };
    subtitle += if points().any(|p| p.high.is_some()) {
        ", bars to the 90th percentile"
    } else {
        ""
    };
    subtitle += if points().all(|p| p.stable) {
        ""
    } else {
        ", hollow where unstable"
    };
    let svg = sheet(SIZE.0, SIZE.1, chart.title, &subtitle, |canvas| {
        let (left, right) = (74.0, canvas.width - labels.min(400.0) - 24.0);
        let (top, bottom) = (HEAD + 8.0, canvas.height - 62.0);
        let y = match log {
            true => Scale::log(lowest * 0.75, highest * 1.2, bottom, top),
            false => Scale::linear(0.0, highest * 1.08, bottom, top),
        };
        let x = match first == last {
            true => Scale::log(first as f64 * 0.5, first as f64 * 2.0, left, right),
            false => Scale::log(first as f64 * 0.85, last as f64 * 1.12, left, right),
        };
        canvas.levels(&y, left, right);
        canvas.line(&[(left, bottom), (right, bottom)], AXIS, 1);
        let mut lengths: Vec<usize> = points().map(|p| p.x).collect();
        lengths.sort_unstable();
        lengths.dedup();
        let mut free = f64::NEG_INFINITY;
        for n in lengths {
            let (at, text) = (x.at(n as f64), n.to_string());
            let half = width_of(&text, 12.0) / 2.0;
            canvas.line(&[(at, bottom), (at, bottom + 5.0)], AXIS, 1);
            if at - half > free {
                canvas.write((at, bottom + 18.0), &text, 12.0, FAINT_INK, Side::Middle, false);
                free = at + half + 6.0;
            }
        }
        let middle = ((left + right) / 2.0, bottom + 42.0);
        canvas.write(middle, chart.below, 12.5, INK, Side::Middle, false);

        let place = |p: &Point| (x.at(p.x as f64), y.at(p.value));
        let path_of = |s: &Series| -> Vec<(f64, f64)> { s.points.iter().map(place).collect() };
        // Lapidary is first in the list, and is drawn last, above the others.
        for s in series.iter().rev() {
            let path = path_of(s);
            canvas.dashed(&path, s.style, if s.is_ours { 3 } else { 2 });
            for (p, at) in s.points.iter().zip(path) {
                if let Some(high) = p.high {
                    canvas.line(&[at, (at.0, y.at(high))], s.style.ink, 1);
                }
                canvas.mark(at, if s.is_ours { 6.0 } else { 5.0 }, s.style, !p.stable);
            }
        }
        // A system's name is beside its last point: outside if that is the last of all, else inside, where there is no
        // line.
        let end = |s: &Series| place(&s.points[s.points.len() - 1]);
        let pointed = |at: (f64, f64), to: (f64, f64)| {
            if (at.1 - to.1).abs() > 3.0 {
                canvas.line(&[(at.0 + 8.0, at.1), (to.0 - 4.0, to.1)], GRID, 1);
            }
        };
        let write = |at, s: &Series| canvas.write(at, &named(s), 12.5, s.style.ink, Side::Start, s.is_ours);
        let (outside, mut within): (Vec<&Series>, Vec<&Series>) = series.iter().partition(at_edge);
        within.sort_by(|a, b| end(a).1.total_cmp(&end(b).1));
        let wanted: Vec<f64> = outside.iter().map(|s| end(s).1).collect();
        for (s, place) in outside.iter().zip(spread(&wanted, 18.0, bottom - 4.0)) {
            let to = (right + 12.0, place);
            pointed(end(s), to);
            write(to, s);
        }
        let paths: Vec<Vec<(f64, f64)>> = series.iter().map(path_of).collect();
        let mut taken = Vec::new();
        for s in within {
            let (at, height) = end(s);
            let span = (at + 16.0, at + 16.0 + width_of(&named(s), 12.5));
            let place = clear(height, 9.0, span, (top, bottom - 10.0), &paths, &taken);
            taken.push(place);
            pointed((at, height), (span.0, place));
            write((span.0, place), s);
        }
    });
    Some(Figure {
        name,
        caption,
        svg,
        sources: series.iter().map(|s| s.source).collect(),
    })
}
