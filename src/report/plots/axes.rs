//! Maps numbers to positions, and chooses tick marks.

/// A range of numbers over a range of pixels.
#[derive(Clone, Copy, Debug)]
pub struct Scale {
    pub min: f64,
    pub max: f64,
    /// The positions of `min` and `max`.
    pub from: f64,
    pub to: f64,
    pub log: bool,
}

impl Scale {
    pub fn linear(min: f64, max: f64, from: f64, to: f64) -> Self {
        Scale {
            min,
            max: if max > min { max } else { min + 1.0 },
            from,
            to,
            log: false,
        }
    }

    /// Both numbers above 0.
    pub fn log(min: f64, max: f64, from: f64, to: f64) -> Self {
        Scale {
            min,
            max: if max > min { max } else { min * 2.0 },
            from,
            to,
            log: true,
        }
    }

    pub fn at(&self, value: f64) -> f64 {
        let share = match self.log {
            true => (value / self.min).ln() / (self.max / self.min).ln(),
            false => (value - self.min) / (self.max - self.min),
        };
        self.from + (self.to - self.from) * share
    }

    /// Round numbers within the range: about `wanted` of them, or on a logarithmic axis 1, 2 and 5 of each decade (only
    /// 1 if there are many).
    pub fn ticks(&self, wanted: usize) -> Vec<f64> {
        if self.log {
            let decades = (self.max / self.min).log10();
            let steps: &[f64] = if decades > 3.0 { &[1.0] } else { &[1.0, 2.0, 5.0] };
            let first = self.min.log10().floor() as i32;
            let last = self.max.log10().ceil() as i32;
            let all = (first..=last).flat_map(|e| steps.iter().map(move |s| s * 10f64.powi(e)));
            return all
                .filter(|t| *t >= self.min * 0.999 && *t <= self.max * 1.001)
                .collect();
        }
        let rough = (self.max - self.min) / wanted.max(1) as f64;
        let unit = 10f64.powf(rough.log10().floor());
        let step = [1.0, 2.0, 2.5, 5.0, 10.0]
            .into_iter()
            .map(|s| s * unit)
            .find(|s| *s >= rough);
        let step = step.unwrap_or(10.0 * unit);
        let first = (self.min / step).ceil() as i64;
        let last = (self.max / step * 1.000_001).floor() as i64;
        (first..=last).map(|i| i as f64 * step).collect()
    }
}

/// A tick label with as few digits as necessary.
pub fn mark(value: f64) -> String {
    let text = match value.abs() {
        0.0 => return "0".to_string(),
        v if v >= 10_000.0 => return format!("{}k", mark(value / 1000.0)),
        v if v >= 10.0 => format!("{value:.1}"),
        v if v >= 1.0 => format!("{value:.2}"),
        v if v >= 0.01 => format!("{value:.3}"),
        _ => return format!("{value:.0e}"),
    };
    let text = text.trim_end_matches('0');
    text.trim_end_matches('.').to_string()
}

/// Positions for labels near `wanted`, moved apart by at least `gap`, none beyond `last`, in the same order.
pub fn spread(wanted: &[f64], gap: f64, last: f64) -> Vec<f64> {
    let mut order: Vec<usize> = (0..wanted.len()).collect();
    order.sort_by(|a, b| wanted[*a].total_cmp(&wanted[*b]));
    let mut places = wanted.to_vec();
    let mut floor = f64::NEG_INFINITY;
    for i in &order {
        places[*i] = wanted[*i].max(floor);
        floor = places[*i] + gap;
    }
    let mut ceiling = last;
    for i in order.iter().rev() {
        places[*i] = places[*i].min(ceiling);
        ceiling = places[*i] - gap;
    }
    places
}

/// A position near `wanted`, between `first` and `last`, for a label from `left` to `right` and `reach` up and down
/// that no path crosses and that overlaps no label in `taken`; `wanted` if there is none.
pub fn clear(
    wanted: f64,
    reach: f64,
    (left, right): (f64, f64),
    (first, last): (f64, f64),
    paths: &[Vec<(f64, f64)>],
    taken: &[f64],
) -> f64 {
    let crossed = |place: f64| {
        let crosses = |pair: &[(f64, f64)]| {
            let [(x1, y1), (x2, y2)] = [pair[0], pair[1]];
            let (from, to) = (x1.max(left), x2.min(right));
            let at = |x: f64| y1 + (y2 - y1) * (x - x1) / (x2 - x1).max(1.0);
            let (a, b) = (at(from), at(to));
            from < to && a.min(b) < place + reach && a.max(b) > place - reach
        };
        paths.iter().any(|path| path.windows(2).any(crosses))
    };
    let free = |place: &f64| {
        let near = |other: &f64| (other - place).abs() < 2.0 * reach;
        (first..=last).contains(place) && !taken.iter().any(near) && !crossed(*place)
    };
    let steps = (0..60).map(|i| f64::from(i) * 3.0);
    let places = steps.flat_map(|step| [wanted - step, wanted + step]);
    places.into_iter().find(free).unwrap_or(wanted)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ticks_are_round() {
        assert_eq!(Scale::linear(0.0, 9.3, 0.0, 1.0).ticks(5), [0.0, 2.0, 4.0, 6.0, 8.0]);
        assert_eq!(Scale::log(0.9, 12.0, 0.0, 1.0).ticks(5), [1.0, 2.0, 5.0, 10.0]);
        assert_eq!(Scale::log(1.0, 1e5, 0.0, 1.0).ticks(5).len(), 6);
        assert_eq!(
            [0.0, 0.25, 1.5, 100.0, 20_000.0].map(mark),
            ["0", "0.25", "1.5", "100", "20k"]
        );
    }

    #[test]
    fn places_follow_numbers() {
        let scale = Scale::log(1.0, 100.0, 200.0, 0.0);
        assert_eq!([1.0, 10.0, 100.0].map(|v| scale.at(v).round()), [200.0, 100.0, 0.0]);
        assert_eq!(Scale::linear(2.0, 4.0, 0.0, 10.0).at(3.0), 5.0);
    }

    #[test]
    fn a_label_gives_way_to_lines_and_labels() {
        let rising = vec![(0.0, 100.0), (400.0, 80.0)];
        let place = |wanted: f64, paths: &[Vec<(f64, f64)>], taken: &[f64]| {
            clear(wanted, 9.0, (20.0, 200.0), (0.0, 120.0), paths, taken)
        };
        assert_eq!(place(50.0, std::slice::from_ref(&rising), &[]), 50.0);
        // The line passes between 99 and 90: the nearest way out is down.
        assert_eq!(place(100.0, std::slice::from_ref(&rising), &[]), 109.0);
        // Down is taken, and up it is clear from 81 on.
        assert_eq!(place(100.0, &[rising], &[115.0]), 79.0);
        // Beside the label a line may pass.
        assert_eq!(place(100.0, &[vec![(210.0, 100.0), (400.0, 100.0)]], &[]), 100.0);
    }

    #[test]
    fn labels_do_not_overlap() {
        let places = spread(&[10.0, 12.0, 50.0, 99.0, 98.0], 15.0, 100.0);
        assert_eq!(places, [10.0, 25.0, 50.0, 100.0, 85.0]);
    }
}
