//! Memory: on a GPU the memory in use, by purpose if known; on a CPU the peak of the process.

use crate::terms::{CUDA_CONTEXT, SCRATCH};
use plotters::style::RGBColor;

use super::canvas::{HEAD, Side, sheet, width_of};
use super::{FAINT_INK, Figure, INK, MUTED, OTHERS, OURS, is_ours, slug};
use crate::bench::result::Document;
use crate::report::input::Group;
use crate::units::bytes;

const WIDTH: u32 = 960;
const BAR: f64 = 28.0;
const GAP: f64 = 10.0;
const PARTS: [(&str, RGBColor); 5] = [
    ("weights", OURS),
    ("cache", OTHERS[3]),
    (SCRATCH.name, OTHERS[1]),
    (CUDA_CONTEXT.name, OTHERS[4]),
    ("other, or not measured separately", MUTED),
];

/// Bytes of each part; only the last is set if parts are not measured.
fn parts(d: &Document, on_gpu: bool) -> Option<[u64; 5]> {
    let memory = d.memory.as_ref()?;
    if !on_gpu {
        return Some([0, 0, 0, 0, memory.peak_host_bytes?]);
    }
    let device = memory.device?;
    let known = [device.weights, device.cache, device.scratch, device.context];
    let [weights, cache, scratch, context] = known.map(|n| n.unwrap_or(0));
    let rest = device.total.saturating_sub(weights + cache + scratch + context);
    Some([weights, cache, scratch, context, rest])
}

pub fn figure(group: &Group) -> Option<Figure> {
    let bars = group
        .results
        .iter()
        .filter_map(|r| Some((r, parts(&r.of, group.on_gpu)?)));
    let bars: Vec<_> = bars.collect();
    let most = bars
        .iter()
        .map(|(_, parts)| parts.iter().sum::<u64>())
        .max()
        .filter(|n| *n > 0)? as f64;
    let legend = if group.on_gpu { 34.0 } else { 4.0 };
    let height = HEAD + legend + bars.len() as f64 * (BAR + GAP) + 18.0;
    let labels = bars
        .iter()
        .map(|(r, _)| width_of(&r.of.system.label, 12.5))
        .fold(80.0, f64::max)
        .min(330.0);
    let what = match group.on_gpu {
        true => "peak device memory, lower is better",
        false => "peak resident memory of the process, with mapped files, lower is better",
    };
    let svg = sheet(
        WIDTH,
        height.ceil() as u32,
        "Memory",
        &format!("{}; {what}", group.title()),
        |canvas| {
            let (left, right) = (40.0 + labels, canvas.width - 110.0);
            if group.on_gpu {
                let mut x = 28.0;
                let shown = |i: &usize| bars.iter().any(|(_, parts)| parts[*i] > 0);
                for (i, (name, color)) in (0..PARTS.len()).filter(shown).map(|i| (i, PARTS[i])) {
                    canvas.hatched((x, HEAD), (x + 14.0, HEAD + 14.0), color, i);
                    canvas.write((x + 21.0, HEAD + 7.0), name, 12.5, INK, Side::Start, false);
                    x += width_of(name, 12.5) + 42.0;
                }
            }
            let mut y = HEAD + legend;
            for (r, parts) in &bars {
                let ours = is_ours(group, r);
                canvas.write(
                    (left - 10.0, y + BAR / 2.0),
                    &r.of.system.label,
                    12.5,
                    INK,
                    Side::End,
                    ours,
                );
                let mut from = left;
                for (i, (part, (_, color))) in parts.iter().zip(PARTS).enumerate() {
                    let to = from + (right - left) * *part as f64 / most;
                    let color = if !group.on_gpu && ours { OURS } else { color };
                    if *part > 0 {
                        canvas.hatched((from, y), (to, y + BAR), color, if group.on_gpu { i } else { 0 });
                    }
                    from = to;
                }
                let total = bytes(parts.iter().sum());
                canvas.write((from + 8.0, y + BAR / 2.0), &total, 12.5, FAINT_INK, Side::Start, ours);
                y += BAR + GAP;
            }
        },
    );
    Some(Figure {
        name: format!("{}-memory", slug(group)),
        caption: format!("Memory, {}", group.title()),
        svg,
        sources: bars.iter().map(|(r, _)| r.source).collect(),
    })
}
