//! Roofline: arithmetic intensity and the achieved share of bandwidth and peak. (Williams, Waterman and Patterson,
//! "Roofline: An Insightful Visual Performance Model for Multicore Architectures", 2009.)
//!
//! Floating-point operations and bytes are those that the model needs, so a system that does more than necessary
//! appears slower, not more efficient.

use super::axes::{Scale, mark};
use super::canvas::{HEAD, Side, sheet, width_of};
use super::{AXIS, FAINT_INK, Figure, INK, Mark, Style, slug, styled};
use crate::bench::model::{decode_bytes, decode_flop, prefill_flop};
use crate::bench::result::Document;
use crate::report::ceilings::Ceilings;
use crate::report::input::Group;

const SIZE: (u32, u32) = (960, 560);

struct Point {
    /// FLOP per byte.
    intensity: f64,
    /// FLOP per second.
    reached: f64,
    tokens: usize,
    is_prefill: bool,
    stable: bool,
}

fn points(d: &Document) -> Vec<Point> {
    let decode = d.decode.iter().filter_map(|m| {
        let (flop, bytes) = (decode_flop(&d.model, m.live)?, decode_bytes(&d.model, m.live));
        Some(Point {
            intensity: flop / bytes,
            reached: flop / (m.ms.median / 1e3),
            tokens: m.live,
            is_prefill: false,
            stable: m.stable,
        })
    });
    let prefill = d.prefill.iter().filter_map(|m| {
        // Weights are read once for all tokens; keys and values are written and read again.
        let (flop, bytes) = (prefill_flop(&d.model, m.tokens)?, decode_bytes(&d.model, m.tokens));
        Some(Point {
            intensity: flop / bytes,
            reached: flop / (m.ms.median / 1e3),
            tokens: m.tokens,
            is_prefill: true,
            stable: m.stable,
        })
    });
    decode.chain(prefill).collect()
}

/// Nearby points of a kind with a common label.
struct Label {
    at: (f64, f64),
    is_prefill: bool,
    first: usize,
    last: usize,
}

fn labels_of(points: &[Point], place: impl Fn(&Point) -> (f64, f64)) -> Vec<Label> {
    let mut labels: Vec<Label> = Vec::new();
    for p in points {
        let at = place(p);
        let near = |l: &&mut Label| l.is_prefill == p.is_prefill && (l.at.0 - at.0).abs() < 100.0;
        match labels.iter_mut().find(near) {
            Some(label) => {
                // Beside the rightmost.
                if at.0 > label.at.0 {
                    label.at = at;
                }
                label.first = label.first.min(p.tokens);
                label.last = label.last.max(p.tokens);
            }
            None => labels.push(Label {
                at,
                is_prefill: p.is_prefill,
                first: p.tokens,
                last: p.tokens,
            }),
        }
    }
    labels
}

impl Label {
    fn text(&self) -> String {
        let what = if self.is_prefill { "prefill" } else { "decode" };
        match self.first == self.last {
            true => format!("{what} {}", self.first),
            false => format!("{what} {} to {}", self.first, self.last),
        }
    }
}

pub fn figure(group: &Group) -> Option<Figure> {
    let ours = group.ours()?;
    let ceilings = Ceilings::of(group);
    let (bandwidth, peak) = (ceilings.bandwidth(&ours.of)?, ceilings.peak(&ours.of));
    let results: Vec<_> = styled(group)
        .into_iter()
        .map(|(r, style)| (r, style, points(&r.of)))
        .filter(|(.., points)| !points.is_empty())
        .collect();
    let all = || results.iter().flat_map(|(.., points)| points);
    let least = all().map(|p| p.intensity).fold(f64::INFINITY, f64::min);
    let most = all().map(|p| p.intensity).fold(0.0, f64::max);
    if !least.is_finite() {
        return None;
    }
    let ridge = peak.map(|peak| peak / bandwidth);
    let (x_min, x_max) = (least / 2.0, (most * 2.5).max(ridge.unwrap_or(0.0) * 2.5));
    let roof = |intensity: f64| peak.unwrap_or(f64::INFINITY).min(bandwidth * intensity);
    let lowest = all().map(|p| p.reached).fold(f64::INFINITY, f64::min).min(roof(x_min));
    let highest = all().map(|p| p.reached).fold(0.0, f64::max).max(roof(x_max));
    let unit = if highest > 2e12 {
        (1e12, "TFLOP/s")
    } else {
        (1e9, "GFLOP/s")
    };
    let labels = results
        .iter()
        .map(|(r, ..)| width_of(&r.of.system.label, 12.5))
        .fold(110.0, f64::max)
        .min(300.0);
    let subtitle = format!(
        "{}; {} reached against FLOP a byte, both logarithmic",
        group.title(),
        unit.1
    );
    let svg = sheet(SIZE.0, SIZE.1, "Roofline", &subtitle, |canvas| {
        let (left, right) = (74.0, canvas.width - labels - 64.0);
        let (top, bottom) = (HEAD + 8.0, canvas.height - 62.0);
        let x = Scale::log(x_min, x_max, left, right);
        let y = Scale::log(lowest / unit.0 / 1.6, highest / unit.0 * 1.6, bottom, top);
        let height = |flops: f64| y.at(flops / unit.0);
        canvas.levels(&y, left, right);
        for tick in x.ticks(6) {
            canvas.line(&[(x.at(tick), bottom), (x.at(tick), bottom + 5.0)], AXIS, 1);
            canvas.write(
                (x.at(tick), bottom + 18.0),
                &mark(tick),
                12.0,
                FAINT_INK,
                Side::Middle,
                false,
            );
        }
        canvas.line(&[(left, bottom), (right, bottom)], AXIS, 1);
        let below = "floating-point operations per byte that must be read";
        canvas.write(
            ((left + right) / 2.0, bottom + 42.0),
            below,
            12.5,
            INK,
            Side::Middle,
            false,
        );

        let corner = ridge.filter(|r| *r < x_max).unwrap_or(x_max);
        let slope = [(x.at(x_min), height(roof(x_min))), (x.at(corner), height(roof(corner)))];
        canvas.line(&slope, INK, 2);
        let label = format!("measured copy bandwidth, {} GB/s", mark((bandwidth / 1e9).round()));
        // Above the roof, in free space, high enough for the text.
        let share = (width_of(&label, 12.0) + 22.0) / (slope[1].0 - slope[0].0).max(1.0);
        let along = |from: f64, to: f64| from + (to - from) * share.clamp(0.5, 1.0);
        let above = (
            along(slope[0].0, slope[1].0) - 14.0,
            along(slope[0].1, slope[1].1) - 14.0,
        );
        canvas.label(above, &label, 12.0, INK, Side::End, false);
        if let Some(peak) = peak {
            canvas.line(&[slope[1], (right, height(peak))], INK, 2);
            let label = format!("peak, {} {}", mark((peak / unit.0 * 10.0).round() / 10.0), unit.1);
            canvas.label((right, height(peak) - 13.0), &label, 12.0, INK, Side::End, false);
        }
        for (r, style, points) in results.iter().rev() {
            let is_ours = r.source == ours.source;
            for p in points {
                let at = (x.at(p.intensity), height(p.reached));
                canvas.mark(at, 6.0, *style, !p.stable);
            }
            if is_ours {
                for label in labels_of(points, |p| (x.at(p.intensity), height(p.reached))) {
                    let (at, text) = (label.at, label.text());
                    match label.is_prefill {
                        true => canvas.write((at.0, at.1 - 17.0), &text, 12.0, style.ink, Side::Middle, true),
                        false => canvas.write((at.0 + 13.0, at.1), &text, 12.0, style.ink, Side::Start, true),
                    }
                }
            }
        }
        let mut at = (right + 26.0, top + 14.0);
        let mut entry = |style: Style, hollow: bool, label: &str, bold: bool| {
            canvas.mark(at, 5.0, style, hollow);
            canvas.write((at.0 + 12.0, at.1), label, 12.5, style.ink, Side::Start, bold);
            at.1 += 22.0;
        };
        for (i, (r, style, _)) in results.iter().enumerate() {
            entry(*style, false, &r.of.system.label, i == 0);
        }
        if all().any(|p| !p.stable) {
            let style = Style {
                ink: FAINT_INK,
                dash: &[],
                mark: Mark::Circle,
            };
            entry(style, true, "unstable", false);
        }
        let note = "decode is at the left, prefill at the right";
        canvas.write((right, bottom + 42.0), note, 12.0, FAINT_INK, Side::Start, false);
    });
    Some(Figure {
        name: format!("{}-roofline", slug(group)),
        caption: format!("Roofline, {}", group.title()),
        svg,
        sources: results.iter().map(|(r, ..)| r.source).collect(),
    })
}
