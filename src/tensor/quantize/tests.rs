//! Codes and scales by hand, beside those of the largest magnitude, and at extreme values.

use super::search::nearest_float;
use super::*;
use crate::tensor::narrow;
use crate::tensor::quantized::{check_values, dequantize};

/// Pseudorandom numbers, uniform between -1 and 1.
pub(in crate::tensor) fn uniform(count: usize, seed: u64) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    };
    (0..count).map(|_| next()).collect()
}

/// Pseudorandom numbers, more of them near 0, with an occasional large one.
fn numbers(count: usize, seed: u64) -> Vec<f32> {
    let of_three = uniform(3 * count, seed);
    let sums = of_three.as_chunks::<3>().0.iter().enumerate();
    sums.map(|(i, [a, b, c])| a + b + c * if i % 61 == 0 { 4.0 } else { 1.0 })
        .collect()
}

fn format(codes: DType, granularity: Granularity, zero_points: bool) -> Format {
    Format {
        codes,
        granularity,
        zero_points,
    }
}

/// Every format of the command line and a few besides.
pub(in crate::tensor) fn formats() -> Vec<Format> {
    let mut all = Vec::new();
    for granularity in [
        Granularity::Tensor,
        Granularity::Channel { axis: 0 },
        Granularity::Block { axis: 1, size: 32 },
    ] {
        for (codes, zeros) in [
            (DType::I4, false),
            (DType::U4, true),
            (DType::I8, false),
            (DType::U8, true),
            (DType::I8, true),
            (DType::I2, false),
            (DType::F8E4M3Fn, false),
            (DType::F8E5M2, false),
            (DType::F4E2M1, false),
        ] {
            all.push(format(codes, granularity, zeros));
        }
    }
    all
}

fn values_of(values: &Tensor, scales: &Scales, format: Format) -> Vec<f32> {
    let codes = codes(values, scales, format);
    let zeros = scales.zero_points.as_ref();
    assert_eq!(check_values(&codes, &scales.scales, zeros, format.granularity), Ok(()));
    // In f32, so that rounding of the values does not affect the comparison.
    let wide = Tensor::from_f32(scales.scales.shape().to_vec(), &scales.scales.to_f32());
    dequantize(&codes, &wide, zeros, format.granularity).to_f32()
}

fn error(values: &[f32], found: &[f32], importance: &[f32]) -> f64 {
    let terms = values.iter().zip(found).zip(importance.iter().cycle());
    terms.map(|((v, f), h)| f64::from(*h) * f64::from(v - f).powi(2)).sum()
}

/// The absmax scales, computed independently.
fn absmax(values: &Tensor, format: Format) -> Scales {
    let numbers = values.to_f32();
    let (mut scales, mut zeros) = (Vec::new(), Vec::new());
    for run in numbers.chunks(format.run(values.shape())) {
        let low = run.iter().copied().fold(0f32, f32::min);
        let high = run.iter().copied().fold(0f32, f32::max);
        let most = f64::from(high.max(-low));
        if format.codes.is_float_format() {
            scales.push(most / format.codes.max());
            continue;
        }
        let (first, last) = format.codes.int_range();
        if !format.zero_points {
            scales.push(most / last as f64);
            continue;
        }
        let scale = f64::from(high - low) / (last - first) as f64;
        scales.push(scale);
        zeros.push((first as f64 - f64::from(low) / scale).round_ties_even() as i64);
    }
    let shape = format.granularity.scale_shape(values.shape()).unwrap();
    Scales {
        scales: Tensor::from_f64_as(values.dtype(), shape.clone(), &scales),
        zero_points: format
            .zero_points
            .then(|| Tensor::from_i64_as(format.codes, shape, &zeros)),
    }
}

#[test]
fn by_hand() {
    // 8 / 8: the lowest code is used, and every value is exact.
    let values = Tensor::from_f32(vec![1, 4], &[-8.0, 7.0, 1.0, 0.0]);
    let int4 = format(DType::I4, Granularity::Block { axis: 1, size: 4 }, false);
    let found = scales(&values, None, int4).unwrap();
    assert_eq!(found.scales.to_f32(), [1.0]);
    assert_eq!(codes(&values, &found, int4).to_i64(), [-8, 7, 1, 0]);
    // From 1 to 16 in fifteen steps needs a zero point, which is below all of them: 0 is included, too.
    let values = Tensor::from_f32(vec![1, 4], &[0.0, 3.0, 30.0, -15.0]);
    let found = scales(&values, None, format(DType::U4, Granularity::Tensor, true)).unwrap();
    assert_eq!(found.scales.to_f32(), [3.0]);
    assert_eq!(found.zero_points.unwrap().to_i64(), [5]);
    // Zeros have a positive scale and the code of 0.
    let zeros = Tensor::from_f32(vec![2, 2], &[0.0; 4]);
    for format in formats()
        .into_iter()
        .filter(|f| !matches!(f.granularity, Granularity::Block { .. }))
    {
        let found = scales(&zeros, None, format).unwrap();
        assert!(found.scales.to_f32().iter().all(|s| *s == 1.0));
        assert_eq!(values_of(&zeros, &found, format), [0.0; 4]);
    }
}

#[test]
fn no_format_is_worse_than_absmax_and_each_error_has_its_bound() {
    for dtype in [DType::F32, DType::F16, DType::Bf16] {
        let wide: Vec<f64> = numbers(24 * 96, 5).into_iter().map(f64::from).collect();
        let values = Tensor::from_f64_as(dtype, vec![24, 96], &wide);
        let given = values.to_f32();
        let importance: Vec<f32> = numbers(96, 9).iter().map(|v| v * v).collect();
        for format in formats() {
            let plain = absmax(&values, format);
            for weights in [None, Some(&importance[..])] {
                let found = scales(&values, weights, format).unwrap();
                let weights = weights.unwrap_or(&[1.0]);
                let ours = error(&given, &values_of(&values, &found, format), weights);
                let theirs = error(&given, &values_of(&values, &plain, format), weights);
                // Sums of f32 lose a few digits.
                assert!(ours <= theirs * (1.0 + 1e-5), "{dtype} {format}: {ours} > {theirs}");
                let run = format.run(values.shape()) as f64;
                // A run's error is at most that of absmax: half a step for each of its values.
                let is_int = !format.codes.is_float_format();
                if is_int && weights.len() == 1 && dtype == DType::F32 {
                    let bound: f64 = plain.scales.to_f64().iter().map(|s| run * (s / 2.0).powi(2)).sum();
                    // With a rounded zero point, the ends of the range are up to half a step outside.
                    let bound = if format.zero_points { bound * 4.0 } else { bound };
                    assert!(ours <= bound, "{format}: {ours} > {bound}");
                }
            }
        }
    }
}

#[test]
fn what_lies_on_the_grid_is_kept() {
    for format in formats().into_iter().filter(|f| f.codes.bits() > 2) {
        let Granularity::Block { size, .. } = format.granularity else {
            continue;
        };
        let (first, last) = match format.codes.is_float_format() {
            true => (-format.codes.max(), format.codes.max()),
            false => (format.codes.int_range().0 as f64, format.codes.int_range().1 as f64),
        };
        let zero = if format.zero_points { first + 2.0 } else { 0.0 };
        // Both ends of the range, and zero, with a scale of 0.375.
        let mut grid = vec![0.0; size];
        (grid[0], grid[size - 1]) = ((first - zero) * 0.375, (last - zero) * 0.375);
        let values = Tensor::from_f64_as(DType::F32, vec![1, size], &grid);
        let found = scales(&values, None, format).unwrap();
        let back = values_of(&values, &found, format);
        assert_eq!(back, values.to_f32(), "{format}");
    }
}

#[test]
fn narrow_floats_are_rounded_as_they_are_encoded() {
    for dtype in [DType::F8E4M3Fn, DType::F8E5M2, DType::F4E2M1] {
        let Numbers::Float(format) = dtype.numbers() else {
            unreachable!("a float")
        };
        let mut values: Vec<f32> = (0..=255u8)
            .map(|code| narrow::decode(dtype, code))
            .filter(|v| v.is_finite())
            .collect();
        values.sort_by(f32::total_cmp);
        let between: Vec<f32> = values.windows(2).map(|w| (w[0] + w[1]) / 2.0).collect();
        values.extend(between);
        values.extend(numbers(4000, 3).iter().map(|v| v * format.max() as f32 / 3.0));
        values.extend(numbers(4000, 4).iter().map(|v| v * 0.01));
        values.extend([1e30, -1e30, 1e-30, 0.0]);
        for value in values {
            let expected = narrow::decode(dtype, narrow::encode(dtype, f64::from(value)));
            assert_eq!(nearest_float(value, format), expected, "{dtype} {value}");
        }
    }
}

#[test]
fn an_important_column_is_kept_better() {
    let values = Tensor::from_f32(vec![8, 32], &numbers(256, 21));
    let int4 = format(DType::I4, Granularity::Block { axis: 1, size: 32 }, false);
    let mut importance = vec![1e-3; 32];
    importance[7] = 1.0;
    let at_column = |weights: Option<&[f32]>| {
        let found = scales(&values, weights, int4).unwrap();
        let back = values_of(&values, &found, int4);
        let given = values.to_f32();
        (0..8)
            .map(|row| (back[row * 32 + 7] - given[row * 32 + 7]).powi(2))
            .sum::<f32>()
    };
    assert!(at_column(Some(&importance)) < at_column(None) / 4.0);
}

/// With many threads, with one, and repeated.
#[test]
fn the_same_values_give_the_same_bytes() {
    let values = Tensor::from_f32(vec![1024, 256], &numbers(1 << 18, 2));
    let int4 = format(DType::I4, Granularity::Block { axis: 1, size: 32 }, false);
    let found = scales(&values, None, int4).unwrap();
    let slice = Tensor::from_f32(vec![1, 256], &values.to_f32()[256 * 1023..]);
    let last = scales(&slice, None, int4).unwrap();
    assert_eq!(found.scales.to_f32()[8 * 1023..], last.scales.to_f32());
    assert_eq!(scales(&values, None, int4).unwrap(), found);
    assert_eq!(codes(&values, &found, int4), codes(&values, &found, int4));
}

#[test]
fn extreme_values_have_finite_scales() {
    let int4 = format(DType::I4, Granularity::Tensor, false);
    for (dtype, value) in [
        (DType::F32, f64::from(f32::MAX)),
        (DType::F32, f64::from(f32::from_bits(1))),
        (DType::F16, 65504.0),
        (DType::F16, 6e-8),
        (DType::Bf16, 1e-40),
    ] {
        let values = Tensor::from_f64_as(dtype, vec![1, 2], &[value, -value / 2.0]);
        let found = scales(&values, None, int4).unwrap();
        let scale = found.scales.to_f32()[0];
        assert!(scale.is_finite() && scale > 0.0, "{dtype} {value:e}: {scale:e}");
    }
    let values = Tensor::from_f32(vec![2, 2], &[1.0, f32::NAN, f32::INFINITY, 0.0]);
    assert_eq!(scales(&values, None, int4), Err(NotFinite { count: 2 }));
}

#[test]
fn formats_that_do_not_exist() {
    let message = |f: Format| f.check(&[4, 6]).unwrap_err().to_string();
    let tensor = Granularity::Tensor;
    assert_eq!(
        message(format(DType::U4, tensor, false)),
        "nothing can be quantized to u4 per tensor: unsigned codes need zero points, and float codes have none"
    );
    assert!(format(DType::F8E4M3Fn, tensor, true).check(&[4, 6]).is_err());
    assert!(format(DType::F16, tensor, false).check(&[4, 6]).is_err());
    let blocks = Granularity::Block { axis: 1, size: 4 };
    assert_eq!(
        message(format(DType::I4, blocks, false)),
        "blocks of 4 do not divide axis 1 of codes of shape [4, 6]"
    );
}

/// Ends of the range that shrink from neighbor to neighbor, beside all pairs of them.
#[test]
fn zero_points_are_nearly_as_good_as_of_all_ranges() {
    let (values, size) = (numbers(400 * 32, 23), 32);
    let format = format(DType::U4, Granularity::Block { axis: 1, size }, true);
    let tensor = Tensor::from_f32(vec![400, size], &values);
    let found = values_of(&tensor, &scales(&tensor, None, format).unwrap(), format);
    let squares = |a: &[f32], b: &[f32]| error(a, b, &[1.0]);
    let of_run = |run: &[f32]| -> f64 {
        let low = run.iter().copied().fold(0f32, f32::min);
        let high = run.iter().copied().fold(0f32, f32::max);
        let steps = || (0..8).map(|k| 1.0 - 0.05 * k as f32);
        let ranges = steps().flat_map(|below| steps().map(move |above| (low * below, high * above)));
        let errors = ranges.map(|(low, high)| {
            let scale = (high - low) / 15.0;
            let zero = (-low / scale).clamp(0.0, 15.0).round_ties_even();
            let rounded = run
                .iter()
                .map(|v| (v / scale + zero).clamp(0.0, 15.0).round_ties_even());
            let rounded: Vec<f32> = rounded.map(|code| (code - zero) * scale).collect();
            squares(run, &rounded)
        });
        errors.fold(f64::INFINITY, f64::min)
    };
    let all: f64 = values.chunks(size).map(of_run).sum();
    let ratio = squares(&values, &found) / all;
    assert!((0.9..1.01).contains(&ratio), "{ratio}");
}
