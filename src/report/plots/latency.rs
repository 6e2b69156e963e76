//! Time per output token by context length: one line per system.

use super::axes::{Scale, clear, spread};
use super::canvas::{HEAD, Side, sheet, width_of};
use super::{AXIS, FAINT_INK, Figure, GRID, INK, coloured, is_ours, slug};
use crate::bench::result::Decode;
use crate::report::input::{Group, ResultFile};
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
        .filter(|(r, _)| r.of.decode.iter().any(|d| d.live == last))
        .map(|(r, _)| width_of(&r.of.system.label, 12.5))
        .fold(120.0, f64::max);
    let rings = match points().all(|d| d.stable) {
        true => "",
        false => ", hollow where unstable",
    };
    let subtitle = format!(
        "{}; median ms/token{note}, bars to the 90th percentile{rings}",
        group.title()
    );
    let svg = sheet(
        SIZE.0,
        SIZE.1,
        "Time per output token by context length",
        &subtitle,
        |canvas| {
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
            let below = "context length (logarithmic)";
            canvas.write(
                ((left + right) / 2.0, bottom + 42.0),
                below,
                12.5,
                INK,
                Side::Middle,
                false,
            );
            let end = |r: &ResultFile| {
                let last = r.of.decode.iter().max_by_key(|d| d.live).expect("filtered");
                (x.at(last.live as f64), y.at(last.ms.median), last.ms.median)
            };
            let sorted = |r: &ResultFile| {
                let mut decode = r.of.decode.clone();
                decode.sort_by_key(|d| d.live);
                decode
            };
            let path_of = |r: &ResultFile| -> Vec<(f64, f64)> {
                let place = |d: &Decode| (x.at(d.live as f64), y.at(d.ms.median));
                sorted(r).iter().map(place).collect()
            };
            // Ours comes first in the list, and is drawn last, above the others.
            for (r, colour) in lines.iter().rev() {
                let (ours, path) = (is_ours(group, r), path_of(r));
                canvas.line(&path, *colour, if ours { 3 } else { 2 });
                for (d, at) in sorted(r).iter().zip(path) {
                    canvas.line(&[at, (at.0, y.at(d.ms.p90))], *colour, 1);
                    let size = if ours { 5 } else { 4 };
                    match d.stable {
                        true => canvas.dot(at, size, *colour),
                        false => canvas.ring(at, size, *colour),
                    }
                }
            }
            // A system's name is beside its last point: outside where that is the last of all, else within, where no line is.
            let name = |r: &ResultFile| format!("{}: {}", r.of.system.label, ms(end(r).2));
            let pointed = |at: (f64, f64), to: (f64, f64)| {
                if (at.1 - to.1).abs() > 3.0 {
                    canvas.line(&[(at.0 + 8.0, at.1), (to.0 - 4.0, to.1)], GRID, 1);
                }
            };
            let at_edge = |r: &ResultFile| end(r).0 >= x.at(last as f64);
            let (outside, mut within): (Vec<_>, Vec<_>) = lines.iter().copied().partition(|(r, _)| at_edge(r));
            within.sort_by(|(a, _), (b, _)| end(a).1.total_cmp(&end(b).1));
            let wanted: Vec<f64> = outside.iter().map(|(r, _)| end(r).1).collect();
            for ((r, colour), place) in outside.iter().zip(spread(&wanted, 18.0, bottom - 4.0)) {
                let to = (right + 12.0, place);
                pointed((end(r).0, end(r).1), to);
                canvas.write(to, &name(r), 12.5, *colour, Side::Start, is_ours(group, r));
            }
            let paths: Vec<Vec<(f64, f64)>> = lines.iter().map(|(r, _)| path_of(r)).collect();
            let mut taken = Vec::new();
            for (r, colour) in within {
                let (at, height, _) = end(r);
                let span = (at + 16.0, at + 16.0 + width_of(&name(r), 12.5));
                let place = clear(height, 9.0, span, (top, bottom - 10.0), &paths, &taken);
                taken.push(place);
                pointed((at, height), (span.0, place));
                canvas.write((span.0, place), &name(r), 12.5, colour, Side::Start, is_ours(group, r));
            }
        },
    );
    Some(Figure {
        name: format!("{}-latency", slug(group)),
        caption: format!("Time per output token by context length, {}", group.title()),
        svg,
        sources: lines.iter().map(|(r, _)| r.source).collect(),
    })
}
