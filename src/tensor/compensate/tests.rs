//! Compensated codes beside nearest codes, on matrices whose inputs are correlated and on others.

use super::*;
use crate::tensor::DType;
use crate::tensor::quantize::{self, tests::uniform};
use crate::tensor::quantized::dequantize;

/// Enough tokens for second moments without sampling error.
const MANY: usize = 1 << 40;

fn matrix(rows: usize, depth: usize) -> Tensor {
    Tensor::from_f32(vec![rows, depth], &uniform(rows * depth, 3))
}

/// Second moments of inputs that a few hidden causes share.
fn correlated(width: usize) -> Vec<f32> {
    let (samples, causes) = (400, 6);
    let (mix, own) = (uniform(causes * width, 5), uniform(samples * width, 7));
    let hidden = uniform(samples * causes, 11);
    let mut moments = vec![0f32; width * width];
    for t in 0..samples {
        let x: Vec<f32> = (0..width)
            .map(|j| {
                let shared: f32 = (0..causes).map(|c| hidden[t * causes + c] * mix[c * width + j]).sum();
                shared + 0.3 * own[t * width + j]
            })
            .collect();
        for (i, row) in moments.chunks_mut(width).enumerate() {
            row.iter_mut()
                .zip(&x)
                .for_each(|(m, v)| *m += x[i] * v / samples as f32);
        }
    }
    moments
}

/// Formats whose blocks are within rows.
fn formats() -> Vec<Format> {
    let mut all = quantize::tests::formats();
    all.retain(|format| {
        let integers =
            matches!(format.codes, DType::I4 | DType::U4) || format.codes == DType::I8 && !format.zero_points;
        format.granularity != Granularity::Tensor && (integers || format.codes == DType::F8E4M3Fn)
    });
    all
}

fn values_of(codes: &Tensor, scales: &Scales, format: Format) -> Vec<f32> {
    dequantize(codes, &scales.scales, scales.zero_points.as_ref(), format.granularity).to_f32()
}

/// `tr((W − Q) H (W − Q)ᵀ)`
fn cost(matrix: &Tensor, found: &[f32], moments: &[f32]) -> f64 {
    let width = matrix.shape()[1];
    let errors: Vec<f64> = matrix
        .to_f32()
        .iter()
        .zip(found)
        .map(|(w, q)| f64::from(w - q))
        .collect();
    let row = |e: &[f64]| -> f64 {
        let through = |i: usize| {
            (0..width)
                .map(|j| f64::from(moments[i * width + j]) * e[j])
                .sum::<f64>()
        };
        (0..width).map(|i| e[i] * through(i)).sum()
    };
    errors.chunks(width).map(row).sum()
}

#[test]
fn errors_of_correlated_inputs_compensate_for_each_other() {
    let (matrix, moments) = (matrix(24, 128), correlated(128));
    let importance: Vec<f32> = (0..128).map(|i| moments[i * 128 + i]).collect();
    for format in formats() {
        let scales = quantize::scales(&matrix, Some(&importance), format).unwrap();
        let nearest = values_of(&quantize::codes(&matrix, &scales, format), &scales, format);
        let factors = [Factor::of(&moments, 128, MANY).unwrap()];
        let (codes, scales) = compensate(&matrix, &factors, format).unwrap();
        let found = values_of(&codes, &scales, format);
        let (nearest, found) = (cost(&matrix, &nearest, &moments), cost(&matrix, &found, &moments));
        assert!(found < nearest * 0.5, "{format}: {found} for {nearest}");
    }
}

/// Uncorrelated channels cannot compensate: as good as the nearest codes with the scales of weighted least squares, and
/// hardly better.
#[test]
fn independent_inputs_are_rounded_to_nearest() {
    let matrix = matrix(9, 96);
    let importance: Vec<f32> = uniform(96, 17).iter().map(|v| 1.0 + v * v * 8.0).collect();
    let mut moments = vec![0f32; 96 * 96];
    importance
        .iter()
        .enumerate()
        .for_each(|(i, w)| moments[i * 96 + i] = *w);
    for format in formats() {
        let scales = quantize::scales(&matrix, Some(&importance), format).unwrap();
        let nearest = values_of(&quantize::codes(&matrix, &scales, format), &scales, format);
        let (codes, scales) = compensate(&matrix, &[Factor::of(&moments, 96, MANY).unwrap()], format).unwrap();
        let found = values_of(&codes, &scales, format);
        let ratio = cost(&matrix, &found, &moments) / cost(&matrix, &nearest, &moments);
        assert!((0.9..1.01).contains(&ratio), "{format}: {ratio}");
    }
}

#[test]
fn a_row_depends_on_itself_alone() {
    let (all, moments) = (matrix(21, 64), correlated(64));
    for format in formats() {
        let factors = [Factor::of(&moments, 64, MANY).unwrap()];
        let (codes, scales) = compensate(&all, &factors, format).unwrap();
        let again = compensate(&all, &factors, format).unwrap();
        assert_eq!((&codes, &scales), (&again.0, &again.1), "{format}");
        for row in [0, 7, 8, 20] {
            let alone = Tensor::from_f32(vec![1, 64], &all.to_f32()[row * 64..(row + 1) * 64]);
            let (own, _) = compensate(&alone, &factors, format).unwrap();
            let bytes = own.data().len();
            assert_eq!(
                own.data()[..],
                codes.data()[row * bytes..(row + 1) * bytes],
                "{format}, row {row}"
            );
        }
    }
}

/// Two spans with uncorrelated channels equal one span.
#[test]
fn uncorrelated_spans_equal_one() {
    let (all, half) = (matrix(8, 128), correlated(64));
    let mut whole = vec![0f32; 128 * 128];
    for (i, row) in half.chunks(64).enumerate() {
        whole[i * 128..][..64].copy_from_slice(row);
        whole[(i + 64) * 128 + 64..][..64].copy_from_slice(row);
    }
    // The scale of a run that spans share is not searched for again.
    for format in formats()
        .into_iter()
        .filter(|f| matches!(f.granularity, Granularity::Block { .. }))
    {
        let (one, _) = compensate(&all, &[Factor::of(&whole, 128, MANY).unwrap()], format).unwrap();
        let two = [
            Factor::of(&half, 64, MANY).unwrap(),
            Factor::of(&half, 64, MANY).unwrap(),
        ];
        let (two, _) = compensate(&all, &two, format).unwrap();
        assert_eq!(one, two, "{format}");
    }
    assert_eq!(spans(1536, 32), [1536]);
    assert_eq!(spans(14336, 32), [4096, 4096, 4096, 2048]);
    assert_eq!(spans(9000, 48), [4080, 4080, 840]);
    assert_eq!(spans(9000, 9000), [4096, 4096, 808]);
    assert_eq!(spans(16, 16), [16]);
}

#[test]
fn a_factor_reproduces_the_moments() {
    for width in [1, 5, 32, 33, 100] {
        let moments = correlated(width);
        let factor = Factor::of(&moments, width, MANY).unwrap();
        let mean = (0..width).map(|i| moments[i * width + i]).sum::<f32>() / width as f32;
        let row = |i: usize| &factor.upper[i * width..(i + 1) * width];
        for i in 0..width {
            assert!(row(i)[..i].iter().all(|r| *r == 0.0) && row(i)[i] > 0.0);
            for j in 0..width {
                let found: f32 = row(i).iter().zip(row(j)).map(|(a, b)| a * b).sum();
                let own = if i == j {
                    0.2 * moments[i * width + j] + 5e-4 * mean
                } else {
                    0.0
                };
                let expected = moments[i * width + j] + own;
                assert!((found - expected).abs() < 1e-5 * mean.max(1.0), "{width}: {i}, {j}");
            }
        }
    }
    assert!(Factor::of(&[1.0, 0.0, 0.0, f32::NAN], 2, MANY).is_none());
    assert!(Factor::of(&[1.0, f32::INFINITY, 0.0, 1.0], 2, MANY).is_none());
    assert!(Factor::of(&[0.0; 4], 2, MANY).is_some());
}

#[test]
fn values_that_are_not_finite_are_counted() {
    let matrix = Tensor::from_f32(vec![1, 32], &[f32::NAN; 32]);
    let factors = [Factor::of(&correlated(32), 32, MANY).unwrap()];
    assert_eq!(
        compensate(&matrix, &factors, formats()[0]),
        Err(NotFinite { count: 32 })
    );
}
