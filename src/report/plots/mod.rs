//! Figures of a group of results, each as SVG and PNG.
//!
//! `canvas` draws, `axes` maps numbers to positions; one file per kind of figure. A figure without results is left out,
//! and `missing` gives the reason. Colors are of Okabe and Ito's palette, which color-blind readers can distinguish;
//! line styles, markers and hatches differ too, for prints in gray.

mod axes;
mod canvas;
mod layers;
mod lines;
mod memory;
mod roofline;
mod switches;

use plotters::style::RGBColor;

use super::input::{Group, Input, ResultFile, SourceId};
use crate::help::{Fault, Help};

/// Two pixels per unit, for high-resolution screens.
const PNG_SCALE: f32 = 2.0;

/// A drawn figure.
#[derive(Clone, Debug)]
pub struct Figure {
    /// File name without its ending.
    pub name: String,
    /// Alternative text and caption.
    pub caption: String,
    pub svg: String,
    /// The source files.
    pub sources: Vec<SourceId>,
}

#[derive(Debug, thiserror::Error)]
#[error("drawing {name}: {message}")]
pub struct PlotError {
    pub name: String,
    pub message: String,
}

impl Help for PlotError {
    fn fault(&self) -> Fault {
        Fault::Bug
    }
}

impl Figure {
    /// The same as PNG, with the embedded font.
    pub fn png(&self) -> Result<Vec<u8>, PlotError> {
        let failed = |message: String| PlotError {
            name: self.name.clone(),
            message,
        };
        let mut options = resvg::usvg::Options::default();
        let fonts = options.fontdb_mut();
        fonts.load_font_data(dejavu::sans::regular().to_vec());
        fonts.load_font_data(dejavu::sans::bold().to_vec());
        fonts.set_sans_serif_family("DejaVu Sans");
        let tree = resvg::usvg::Tree::from_str(&self.svg, &options).map_err(|e| failed(e.to_string()))?;
        let size = tree.size();
        let pixels = |length: f32| (length * PNG_SCALE).ceil() as u32;
        let mut pixmap = resvg::tiny_skia::Pixmap::new(pixels(size.width()), pixels(size.height()))
            .ok_or_else(|| failed("it has no size".into()))?;
        let scale = resvg::tiny_skia::Transform::from_scale(PNG_SCALE, PNG_SCALE);
        resvg::render(&tree, scale, &mut pixmap.as_mut());
        pixmap.encode_png().map_err(|e| failed(e.to_string()))
    }
}

/// Times of a group by context and by prompt.
pub fn times(group: &Group) -> Vec<Figure> {
    [lines::decode(group), lines::prefill(group)]
        .into_iter()
        .flatten()
        .collect()
}

/// Time and memory of a group by part.
pub fn parts(group: &Group) -> Vec<Figure> {
    let drawn = [roofline::figure(group), layers::figure(group), memory::figure(group)];
    drawn.into_iter().flatten().collect()
}

/// Ablations of a group.
pub fn switches(group: &Group) -> Option<Figure> {
    switches::figure(group)
}

/// Throughput of the scheduler.
pub fn serving(input: &Input) -> Option<Figure> {
    lines::serving(input)
}

/// `llama-1b-fp16-nvidia-h200`: the prefix of file names.
pub fn slug(group: &Group) -> String {
    let dtype = if group.peers { "peers" } else { &group.dtype };
    let name = format!("{}-{dtype}-{}", group.model, group.device).to_lowercase();
    let name: String = name
        .chars()
        .map(|c| if c.is_ascii_alphanumeric() { c } else { '-' })
        .collect();
    let parts: Vec<&str> = name.split('-').filter(|part| !part.is_empty()).collect();
    parts.join("-")
}

const OURS: RGBColor = RGBColor(0, 114, 178);
const OTHERS: [RGBColor; 6] = [
    RGBColor(213, 94, 0),
    RGBColor(0, 158, 115),
    RGBColor(204, 121, 167),
    RGBColor(230, 159, 0),
    RGBColor(86, 180, 233),
    RGBColor(117, 112, 105),
];
const INK: RGBColor = RGBColor(34, 34, 34);
const FAINT_INK: RGBColor = RGBColor(105, 105, 105);
const GRID: RGBColor = RGBColor(228, 228, 228);
const AXIS: RGBColor = RGBColor(150, 150, 150);
const MUTED: RGBColor = RGBColor(176, 186, 196);

/// Shape of a marker.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Mark {
    Circle,
    Square,
    Triangle,
    Diamond,
    Inverted,
    Bar,
}

/// Color, line style and marker of a system: each of them alone identifies it.
#[derive(Clone, Copy, Debug)]
struct Style {
    ink: RGBColor,
    /// Lengths of dashes and gaps, alternating; a solid line if empty.
    dash: &'static [f64],
    mark: Mark,
}

/// The other systems, in order.
const STYLES: [(&[f64], Mark); 6] = [
    (&[9.0, 4.0], Mark::Square),
    (&[2.0, 4.0], Mark::Triangle),
    (&[12.0, 4.0, 2.0, 4.0], Mark::Diamond),
    (&[5.0, 3.0], Mark::Inverted),
    (&[16.0, 6.0], Mark::Bar),
    (&[9.0, 3.0, 2.0, 3.0, 2.0, 3.0], Mark::Square),
];

/// The `index`-th style; the first is Lapidary's.
fn style(index: usize) -> Style {
    if index == 0 {
        return Style {
            ink: OURS,
            dash: &[],
            mark: Mark::Circle,
        };
    }
    let (dash, mark) = STYLES[(index - 1) % STYLES.len()];
    Style {
        ink: OTHERS[(index - 1) % OTHERS.len()],
        dash,
        mark,
    }
}

/// The run of Lapidary with which others are compared.
fn is_ours(group: &Group, r: &ResultFile) -> bool {
    group.ours().is_some_and(|ours| ours.source == r.source)
}

/// Results with their styles; Lapidary always has the first.
fn styled(group: &Group) -> Vec<(&ResultFile, Style)> {
    let mut others = 0;
    let mut next = |r: &ResultFile| match is_ours(group, r) {
        true => style(0),
        false => {
            others += 1;
            style(others)
        }
    };
    group.results.iter().map(|r| (r, next(r))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Enough systems for one plot are distinct without colors.
    #[test]
    fn styles_differ_in_gray() {
        let styles: Vec<Style> = (0..7).map(style).collect();
        for (i, a) in styles.iter().enumerate() {
            for b in &styles[i + 1..] {
                assert!(a.dash != b.dash, "{a:?} {b:?}");
            }
        }
    }
}
