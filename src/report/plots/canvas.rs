//! A white sheet with a title, and the drawing primitives of the figures. Positions are in pixels from the top left.

use plotters::coord::Shift;
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};

use super::axes::{Scale, mark};
use super::{FAINT_INK, GRID, INK, Mark, Style};

const FONT: &str = "DejaVu Sans, Verdana, sans-serif";

/// The alignment of a text.
#[derive(Clone, Copy, Debug)]
pub enum Side {
    /// It begins at the position.
    Start,
    Middle,
    /// It ends at the position.
    End,
}

pub struct Canvas<'a> {
    root: DrawingArea<SVGBackend<'a>, Shift>,
    pub width: f64,
    pub height: f64,
}

/// Height of the title.
pub const HEAD: f64 = 84.0;
const MARGIN: f64 = 28.0;

/// Draws a sheet and returns its SVG. Drawing into text does not fail.
pub fn sheet(width: u32, height: u32, title: &str, subtitle: &str, draw: impl FnOnce(&Canvas<'_>)) -> String {
    let mut svg = String::new();
    {
        let root = SVGBackend::with_string(&mut svg, (width, height)).into_drawing_area();
        root.fill(&WHITE).expect("text takes everything");
        let canvas = Canvas {
            root,
            width: f64::from(width),
            height: f64::from(height),
        };
        canvas.write((MARGIN, 30.0), title, 20.0, INK, Side::Start, true);
        canvas.write((MARGIN, 55.0), subtitle, 13.5, FAINT_INK, Side::Start, false);
        draw(&canvas);
        canvas.root.present().expect("text takes everything");
    }
    svg
}

fn place((x, y): (f64, f64)) -> (i32, i32) {
    (x.round() as i32, y.round() as i32)
}

impl Canvas<'_> {
    pub fn write(&self, at: (f64, f64), text: &str, size: f64, ink: RGBColor, side: Side, bold: bool) {
        let font = (FONT, size).into_font();
        let font = if bold { font.style(FontStyle::Bold) } else { font };
        let side = match side {
            Side::Start => HPos::Left,
            Side::Middle => HPos::Center,
            Side::End => HPos::Right,
        };
        let style = TextStyle::from(font).color(&ink).pos(Pos::new(side, VPos::Center));
        let text = Text::new(text.to_string(), place(at), style);
        self.root.draw(&text).expect("text takes everything");
    }

    /// Horizontal grid lines at the marks of `y`, from `left` to `right`, with their numbers.
    pub fn levels(&self, y: &Scale, left: f64, right: f64) {
        for tick in y.ticks(6) {
            let at = y.at(tick);
            self.line(&[(left, at), (right, at)], GRID, 1);
            self.write((left - 10.0, at), &mark(tick), 12.0, FAINT_INK, Side::End, false);
        }
    }

    pub fn line(&self, points: &[(f64, f64)], ink: RGBColor, width: u32) {
        let points: Vec<(i32, i32)> = points.iter().copied().map(place).collect();
        let path = PathElement::new(points, ink.stroke_width(width));
        self.root.draw(&path).expect("text takes everything");
    }

    /// Opposite corners.
    pub fn bar(&self, from: (f64, f64), to: (f64, f64), ink: RGBColor) {
        let bar = Rectangle::new([place(from), place(to)], ink.filled());
        self.root.draw(&bar).expect("text takes everything");
    }

    /// A bar with white stripes, so that parts of bars differ in gray; `pattern` 0 has none.
    pub fn hatched(&self, from: (f64, f64), to: (f64, f64), ink: RGBColor, pattern: usize) {
        self.bar(from, to, ink);
        let (width, height) = (to.0 - from.0, to.1 - from.1);
        let step = 8.0;
        match pattern {
            0 => {}
            1 | 2 => {
                // Diagonals, cut at the bar's edges.
                let mut start = step;
                while start < width + height {
                    let (x1, y1) = (start.min(width), (start - width).max(0.0));
                    let (x2, y2) = ((start - height).max(0.0), start.min(height));
                    let place = |x: f64, y: f64| match pattern {
                        1 => (from.0 + x, from.1 + y),
                        _ => (to.0 - x, from.1 + y),
                    };
                    self.line(&[place(x1, y1), place(x2, y2)], WHITE, 1);
                    start += step;
                }
            }
            3 => {
                let lines = (height / step) as usize;
                for i in 1..=lines {
                    let y = from.1 + step * i as f64 - step / 2.0;
                    self.line(&[(from.0, y), (to.0, y)], WHITE, 1);
                }
            }
            _ => {
                let lines = (width / step) as usize;
                for i in 1..=lines {
                    let x = from.0 + step * i as f64 - step / 2.0;
                    self.line(&[(x, from.1), (x, to.1)], WHITE, 1);
                }
            }
        }
    }

    /// A line in a style's dashes.
    pub fn dashed(&self, points: &[(f64, f64)], style: Style, width: u32) {
        if style.dash.is_empty() {
            return self.line(points, style.ink, width);
        }
        // The position in the dash pattern, and the rest of the current part.
        let (mut part, mut left) = (0, style.dash[0]);
        for pair in points.windows(2) {
            let [(x1, y1), (x2, y2)] = [pair[0], pair[1]];
            let length = (x2 - x1).hypot(y2 - y1);
            let at = |done: f64| (x1 + (x2 - x1) * done / length, y1 + (y2 - y1) * done / length);
            let mut done = 0.0;
            while done < length {
                let to = (done + left).min(length);
                if part % 2 == 0 {
                    self.line(&[at(done), at(to)], style.ink, width);
                }
                left -= to - done;
                done = to;
                // Smaller steps would not change `done` because of rounding.
                if left < 1e-6 {
                    part = (part + 1) % style.dash.len();
                    left = style.dash[part];
                }
            }
        }
    }

    /// A system's marker, hollow if the measurement is not stable.
    pub fn mark(&self, at: (f64, f64), size: f64, style: Style, hollow: bool) {
        self.shape(at, size + 2.0, WHITE, style.mark);
        self.shape(at, size, style.ink, style.mark);
        if hollow {
            self.shape(at, size - 2.0, WHITE, style.mark);
        }
    }

    fn shape(&self, (x, y): (f64, f64), size: f64, ink: RGBColor, mark: Mark) {
        let corners: &[(f64, f64)] = match mark {
            Mark::Circle => {
                let circle = Circle::new(place((x, y)), size.round() as i32, ink.filled());
                return self.root.draw(&circle).expect("text takes everything");
            }
            Mark::Square => &[(-0.9, -0.9), (0.9, -0.9), (0.9, 0.9), (-0.9, 0.9)],
            Mark::Triangle => &[(0.0, -1.2), (1.1, 0.8), (-1.1, 0.8)],
            Mark::Inverted => &[(0.0, 1.2), (1.1, -0.8), (-1.1, -0.8)],
            Mark::Diamond => &[(0.0, -1.3), (1.1, 0.0), (0.0, 1.3), (-1.1, 0.0)],
            Mark::Bar => &[(-0.5, -1.3), (0.5, -1.3), (0.5, 1.3), (-0.5, 1.3)],
        };
        let corners: Vec<(i32, i32)> = corners
            .iter()
            .map(|(dx, dy)| place((x + dx * size, y + dy * size)))
            .collect();
        let polygon = Polygon::new(corners, ink.filled());
        self.root.draw(&polygon).expect("text takes everything");
    }

    /// Text with a background, over lines.
    pub fn label(&self, at: (f64, f64), text: &str, size: f64, ink: RGBColor, side: Side, bold: bool) {
        let width = width_of(text, size);
        let left = match side {
            Side::Start => at.0,
            Side::Middle => at.0 - width / 2.0,
            Side::End => at.0 - width,
        };
        self.bar(
            (left - 2.0, at.1 - size * 0.6),
            (left + width + 2.0, at.1 + size * 0.6),
            WHITE,
        );
        self.write(at, text, size, ink, side, bold);
    }
}

/// The approximate width of a text; there are no font metrics during layout.
pub fn width_of(text: &str, size: f64) -> f64 {
    text.chars().count() as f64 * size * 0.6
}
