//! A white sheet with a title, and the few strokes that the figures are made of. Places are in pixels from the top left.

use plotters::coord::Shift;
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};

use super::axes::{Scale, mark};
use super::{FAINT_INK, GRID, INK};

const FONT: &str = "DejaVu Sans, Verdana, sans-serif";

/// Where a text stands to its place.
#[derive(Clone, Copy, Debug)]
pub enum Side {
    /// It begins there.
    Start,
    Middle,
    /// It ends there.
    End,
}

pub struct Canvas<'a> {
    root: DrawingArea<SVGBackend<'a>, Shift>,
    pub width: f64,
    pub height: f64,
}

/// Space that the title takes.
pub const HEAD: f64 = 84.0;
const MARGIN: f64 = 28.0;

/// Draws a sheet and gives its SVG. Drawing into text does not fail.
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

    /// Lines across at the marks of `y`, from `left` to `right`, with their numbers.
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

    pub fn dot(&self, at: (f64, f64), size: i32, ink: RGBColor) {
        self.root
            .draw(&Circle::new(place(at), size + 2, WHITE.filled()))
            .expect("text takes everything");
        self.root
            .draw(&Circle::new(place(at), size, ink.filled()))
            .expect("text takes everything");
    }

    /// A dot that says that what it stands for did not hold still.
    pub fn ring(&self, at: (f64, f64), size: i32, ink: RGBColor) {
        self.dot(at, size, ink);
        self.root
            .draw(&Circle::new(place(at), size - 2, WHITE.filled()))
            .expect("text takes everything");
    }

    /// The same of a square.
    pub fn frame(&self, at: (f64, f64), size: f64, ink: RGBColor) {
        self.square(at, size, ink);
        self.bar(
            (at.0 - size + 2.0, at.1 - size + 2.0),
            (at.0 + size - 2.0, at.1 + size - 2.0),
            WHITE,
        );
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

    pub fn square(&self, (x, y): (f64, f64), size: f64, ink: RGBColor) {
        self.bar(
            (x - size - 2.0, y - size - 2.0),
            (x + size + 2.0, y + size + 2.0),
            WHITE,
        );
        self.bar((x - size, y - size), (x + size, y + size), ink);
    }
}

/// About as wide as a text is; there are no font metrics where a figure is laid out.
pub fn width_of(text: &str, size: f64) -> f64 {
    text.chars().count() as f64 * size * 0.6
}
