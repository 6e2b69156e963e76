//! Time of a token against the live length: a line a system.

use super::axes::{Scale, spread};
use super::canvas::{HEAD, Side, sheet, width_of};
use super::{AXIS, FAINT_INK, Figure, GRID, INK, coloured, is_ours, slug};
use crate::report::input::Group;
use crate::report::markdown::ms;

const SIZE: (u32, u32) = (960, 540);

pub fn figure(group: &Group) -> Option<Figure> {
    let results = coloured(group);
    let lines: Vec<_> = results.iter().filter(|(r, _)| !r.of.decode.is_empty()).collect();
    let points = || lines.iter().flat_map(|(r, _)| &r.of.decode);
    let (first, last) = (points().map(|d| d.live).min()?, points().map(|d| d.live).max()?);
    let lowest = points().map(|d| d.ms.median).fold(f64::INFINITY, f64::min);
    let highest = points().map(|d| d.ms.p90.max(d.ms.median)).fold(0.0, f64::max);
    let log = highest > 6.0 * lowest;
    let note = if log { ", logarithmic" } else { "" };
    let labels = lines
        .iter()
        .map(|(r, _)| width_of(&r.of.system.label, 12.5))
        .fold(120.0, f64::max);
    let subtitle = format!(
        "{}; median ms a token{note}, bars to the 90th percentile",
        group.title()
    );
    let svg = sheet(SIZE.0, SIZE.1, "Time of a token by live length", &subtitle, |canvas| {
        let (left, right) = (74.0, canvas.width - labels.min(300.0) - 84.0);
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
        let mut lengths: Vec<usize> = points().map(|d| d.live).collect();
        lengths.sort_unstable();
        lengths.dedup();
        let mut free = f64::NEG_INFINITY;
        for n in lengths {
            let at = x.at(n as f64);
            canvas.line(&[(at, bottom), (at, bottom + 5.0)], AXIS, 1);
            if at - width_of(&n.to_string(), 12.0) / 2.0 > free {
                canvas.write(
                    (at, bottom + 18.0),
                    &n.to_string(),
                    12.0,
                    FAINT_INK,
                    Side::Middle,
                    false,
                );
                free = at + width_of(&n.to_string(), 12.0) / 2.0 + 6.0;
            }
        }
        let below = "tokens in the cache (logarithmic)";
        canvas.write(
            ((left + right) / 2.0, bottom + 42.0),
            below,
            12.5,
            INK,
            Side::Middle,
            false,
        );
        let end = |r: &crate::report::input::ResultFile| {
            let last = r.of.decode.iter().max_by_key(|d| d.live).expect("filtered");
            (x.at(last.live as f64), y.at(last.ms.median), last.ms.median)
        };
        let wanted: Vec<f64> = lines.iter().map(|(r, _)| end(r).1).collect();
        let places = spread(&wanted, 18.0, bottom - 4.0);
        // Ours comes first in the list, and is drawn last, above the others.
        for ((r, colour), label) in lines.iter().zip(&places).rev() {
            let mut decode: Vec<_> = r.of.decode.iter().collect();
            decode.sort_by_key(|d| d.live);
            let path: Vec<(f64, f64)> = decode
                .iter()
                .map(|d| (x.at(d.live as f64), y.at(d.ms.median)))
                .collect();
            let ours = is_ours(group, r);
            canvas.line(&path, *colour, if ours { 3 } else { 2 });
            for d in &decode {
                let at = x.at(d.live as f64);
                canvas.line(&[(at, y.at(d.ms.median)), (at, y.at(d.ms.p90))], *colour, 1);
                canvas.dot((at, y.at(d.ms.median)), if ours { 5 } else { 4 }, *colour);
            }
            let (from, height, value) = end(r);
            if (label - height).abs() > 3.0 || from < right - 20.0 {
                canvas.line(&[(from + 8.0, height), (right + 8.0, *label)], GRID, 1);
            }
            let text = format!("{}: {}", r.of.system.label, ms(value));
            canvas.write((right + 12.0, *label), &text, 12.5, *colour, Side::Start, ours);
        }
    });
    Some(Figure {
        name: format!("{}-latency", slug(group)),
        caption: format!("Time of a token by live length, {}", group.title()),
        svg,
        sources: lines.iter().map(|(r, _)| r.source).collect(),
    })
}
