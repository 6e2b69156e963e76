//! Time of a step by group of layers: one bar per profile.

use plotters::style::RGBColor;

use super::canvas::{HEAD, Side, sheet, width_of};
use super::{FAINT_INK, Figure, INK, MUTED, OTHERS, OURS, slug};
use crate::bench::layers::{ATTENTION, PRODUCTS, REST, grouped};
use crate::report::input::Group;
use crate::report::markdown::ms;

const WIDTH: u32 = 960;
const BAR: f64 = 44.0;
const ROW: f64 = 84.0;
const GROUPS: [(&str, RGBColor); 3] = [(PRODUCTS, OURS), (ATTENTION, OTHERS[3]), (REST, MUTED)];

pub fn figure(group: &Group) -> Option<Figure> {
    let r = group
        .results
        .iter()
        .find(|r| r.of.profile.as_ref().is_some_and(|p| !p.is_empty()))?;
    let profiles = r.of.profile.as_ref()?;
    let longest = profiles.values().map(|p| p.total_ms).fold(0.0, f64::max);
    let height = HEAD + 34.0 + profiles.len() as f64 * ROW;
    let subtitle = format!(
        "{}, {}; ms of layers timed one by one, without CUDA graphs",
        r.of.system.label,
        group.title()
    );
    let svg = sheet(WIDTH, height.ceil() as u32, "Time by layer", &subtitle, |canvas| {
        let (left, right) = (28.0, canvas.width - 110.0);
        let mut x = left;
        for (pattern, (name, color)) in GROUPS.into_iter().enumerate() {
            canvas.hatched((x, HEAD), (x + 14.0, HEAD + 14.0), color, pattern);
            canvas.write((x + 21.0, HEAD + 7.0), name, 12.5, INK, Side::Start, false);
            x += width_of(name, 12.5) + 58.0;
        }
        let mut y = HEAD + 34.0;
        for (name, profile) in profiles {
            let title = format!("{name}, context {}", profile.live);
            canvas.write((left, y + 9.0), &title, 13.0, INK, Side::Start, true);
            // Recomputed, by one rule for files of every version.
            let groups = grouped(profile.live, profile.layers.clone()).groups;
            let top = y + 22.0;
            let mut from = left;
            for (pattern, (name, color)) in GROUPS.into_iter().enumerate() {
                let time = groups.get(name).copied().unwrap_or(0.0);
                let to = from + (right - left) * time / longest;
                canvas.hatched((from, top), (to, top + BAR), color, pattern);
                let share = format!("{:.0} %", 100.0 * time / profile.total_ms);
                let label = format!("{} ms, {share}", ms(time));
                let middle = ((from + to) / 2.0, top + BAR / 2.0);
                let fitting = [(&label, 12.5), (&share, 11.0)];
                let fitting = fitting
                    .into_iter()
                    .find(|(text, size)| width_of(text, *size) < to - from);
                match fitting {
                    // Stripes would cross the letters.
                    Some((text, size)) if pattern > 0 => canvas.label(middle, text, size, INK, Side::Middle, false),
                    Some((text, size)) => {
                        canvas.write(middle, text, size, plotters::style::WHITE, Side::Middle, false);
                    }
                    None => {}
                }
                from = to;
            }
            let total = format!("{} ms", ms(profile.total_ms));
            canvas.write(
                (from + 8.0, top + BAR / 2.0),
                &total,
                12.5,
                FAINT_INK,
                Side::Start,
                false,
            );
            y += ROW;
        }
    });
    Some(Figure {
        name: format!("{}-layers", slug(group)),
        caption: format!("Time by group of layers, {}", group.title()),
        svg,
        sources: vec![r.source],
    })
}
