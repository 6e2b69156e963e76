//! Figures of a group of results, each as SVG and PNG.
//!
//! `canvas` draws, `axes` maps numbers to places; one file a figure. A figure that its results do not have is left out,
//! and `missing` says why. Colours are of Okabe and Ito's palette, which colour-blind readers tell apart.

mod axes;
mod bars;
mod canvas;
mod latency;
mod layers;
mod memory;
mod roofline;
mod switches;

use plotters::style::RGBColor;

use super::input::{Group, ResultFile, SourceId};
use crate::help::{Fault, Help};

/// Two pixels a unit, for screens that have them.
const PNG_SCALE: f32 = 2.0;

/// A drawn figure.
#[derive(Clone, Debug)]
pub struct Figure {
    /// File name without its ending.
    pub name: String,
    /// For those who cannot see it, and below it.
    pub caption: String,
    pub svg: String,
    /// Whose figures are in it.
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
    /// The same as pixels, with the font that is in this program.
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

/// Everything that can be drawn of a group.
pub fn figures(group: &Group) -> Vec<Figure> {
    let drawn = [
        latency::figure(group),
        bars::figure(group),
        roofline::figure(group),
        layers::figure(group),
        memory::figure(group),
        switches::figure(group),
    ];
    drawn.into_iter().flatten().collect()
}

/// `llama-1b-fp16-nvidia-h200`: what file names begin with.
pub fn slug(group: &Group) -> String {
    let name = format!("{}-{}-{}", group.model, group.dtype, group.device).to_lowercase();
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
/// Other runs of Lapidary, where colours do not stand for systems.
const OURS_TOO: RGBColor = RGBColor(120, 178, 214);
const MUTED: RGBColor = RGBColor(176, 186, 196);

/// The run of Lapidary that others are compared with.
fn is_ours(group: &Group, r: &ResultFile) -> bool {
    group.ours().is_some_and(|ours| ours.source == r.source)
}

/// Results with their colours: ours always in ours.
fn coloured(group: &Group) -> Vec<(&ResultFile, RGBColor)> {
    let mut others = OTHERS.iter().cycle();
    let mut colour = |r: &ResultFile| match is_ours(group, r) {
        true => OURS,
        false => *others.next().expect("a cycle has no end"),
    };
    group.results.iter().map(|r| (r, colour(r))).collect()
}
