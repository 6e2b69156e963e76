//! Quantized weights of every form against `dequantize` and a product in f64: each kind of codes, of scales and of blocks,
//! with and without zero points, in both orientations, for few rows and many, on each instruction set.

use lapidary::backend::cpu::{CpuError, Indexed, execute};
use lapidary::dim::Dim;
use lapidary::graph::Constant;
use lapidary::network::{Elementwise, LayerKind, MatrixOp, Network, WeightMode};
use lapidary::tensor::quantized::{Granularity, dequantize};
use lapidary::tensor::{DType, Tensor};
use proptest::prelude::*;

use super::soundness::misaligned;
use super::support::{Random, assert_close, builder, dims, every_option, on_tensorrt};

pub(super) const INTEGERS: [DType; 6] = [DType::I8, DType::U8, DType::I4, DType::U4, DType::I2, DType::U2];
const FLOATS: [DType; 5] = [DType::F8E4M3Fn, DType::F8E5M2, DType::F4E2M1, DType::Nf4, DType::Fp4];

/// A quantized matrix and its parts.
pub(super) struct Weight {
    codes: Tensor,
    scales: Tensor,
    zero_points: Option<Tensor>,
    granularity: Granularity,
}

impl Weight {
    pub(super) fn random(
        random: &mut Random,
        dtype: DType,
        scale: DType,
        shape: &[usize],
        granularity: Granularity,
        zeros: bool,
    ) -> Weight {
        let is_integer = INTEGERS.contains(&dtype);
        let mut codes = |shape: &[usize]| {
            let count: usize = shape.iter().product();
            match (is_integer, dtype.bits()) {
                (true, _) => {
                    let bits: Vec<i64> = (0..count).map(|_| (random.bits() >> 20) as i64).collect();
                    Tensor::from_i64_as(dtype, shape.to_vec(), &bits)
                }
                (false, 4) => {
                    // Every code is a number.
                    let bits: Vec<i64> = (0..count).map(|_| (random.bits() >> 20) as i64).collect();
                    let bytes = Tensor::from_i64_as(DType::U4, shape.to_vec(), &bits).data().clone();
                    Tensor::new(dtype, shape.to_vec(), bytes).unwrap()
                }
                (false, _) => {
                    // Some subnormal, some saturated.
                    let values = (0..count).map(|i| random.float() * [0.01, 1.0, 600.0][i % 3]);
                    Tensor::from_f64_as(dtype, shape.to_vec(), &values.collect::<Vec<f64>>())
                }
            }
        };
        let of = granularity.scale_shape(shape).unwrap();
        let zero_points = (zeros && is_integer).then(|| codes(&of));
        let codes = codes(shape);
        let values: Vec<f64> = (0..of.iter().product())
            .map(|_| (1.0 + random.float() * 0.9) * 0.02)
            .collect();
        Weight {
            codes: misaligned(&codes),
            scales: misaligned(&Tensor::from_f64_as(scale, of, &values)),
            zero_points: zero_points.map(|zeros| misaligned(&zeros)),
            granularity,
        }
    }

    pub(super) fn constant(&self) -> Constant {
        let part = |tensor: &Tensor| Constant::tensor(tensor.clone());
        let zero_points = self.zero_points.as_ref().map(part);
        Constant::quantized(part(&self.codes), part(&self.scales), zero_points, self.granularity).unwrap()
    }

    /// The values as the executor computes them: products are not rounded to the type of narrower scales.
    pub(super) fn values(&self) -> Vec<f64> {
        let scales = Tensor::from_f32(self.scales.shape().to_vec(), &self.scales.to_f32());
        dequantize(&self.codes, &scales, self.zero_points.as_ref(), self.granularity).to_f64()
    }
}

impl Weight {
    /// Scaled magnitudes of codes and zero points. Kernels subtract zero points from sums of codes, so cancellation
    /// loses accuracy where the two are close.
    fn magnitudes(&self) -> Vec<f64> {
        let values = self.values().into_iter().map(f64::abs);
        let Some(zero_points) = &self.zero_points else {
            return values.collect();
        };
        let zeros = vec![0i64; self.codes.len()];
        let zeros = Tensor::from_i64_as(self.codes.dtype(), self.codes.shape().to_vec(), &zeros);
        let scales = Tensor::from_f32(self.scales.shape().to_vec(), &self.scales.to_f32());
        let offsets = dequantize(&zeros, &scales, Some(zero_points), self.granularity).to_f64();
        values
            .zip(offsets)
            .map(|(value, offset)| value + 2.0 * offset.abs())
            .collect()
    }
}

/// `x · w` in f64, and the sums of the magnitudes of its terms, which bound the error of fp32 sums.
pub(super) fn product(
    x: &[f64],
    w: &[f64],
    [rows, depth, columns]: [usize; 3],
    transposed: bool,
) -> (Vec<f64>, Vec<f64>) {
    let mut sums = (Vec::new(), Vec::new());
    for r in 0..rows {
        for c in 0..columns {
            let terms = (0..depth).map(|p| {
                let at = if transposed { c * depth + p } else { p * columns + c };
                x[r * depth + p] * w[at]
            });
            let (sum, size) = terms.fold((0.0, 0.0), |(sum, size), term| (sum + term, size + term.abs()));
            sums.0.push(sum);
            sums.1.push(size);
        }
    }
    sums
}

fn network_of(x: &Tensor, weight: Constant, op_b: MatrixOp) -> Network {
    let mut b = builder();
    let id = b.input("x0", x.dtype(), &dims(x.shape())).unwrap();
    let dtype = weight.dtype();
    let weight = b.weight("w", weight, WeightMode::Bind).unwrap();
    let id = b.cast("x", dtype, id).unwrap();
    let kind = LayerKind::MatrixMultiply {
        op_a: MatrixOp::None,
        op_b,
    };
    let y = b.add("product", kind, &[id, weight]).unwrap();
    let y = b.cast("y32", DType::F32, y).unwrap();
    b.output("y", y).unwrap();
    b.finish().unwrap()
}

/// Panics unless `got` equals `want` up to the error of fp32 sums of such magnitudes.
fn assert_fp32(got: &Tensor, (want, size): &(Vec<f64>, Vec<f64>), what: &str) {
    assert_eq!(got.len(), want.len(), "{what}");
    for (i, g) in got.to_f64().iter().enumerate() {
        let error = (g - want[i]).abs();
        assert!(
            error <= 6e-7 * size[i] + 1e-30,
            "{what}: element {i} is {g}, not {}",
            want[i]
        );
    }
}

fn check(weight: &Weight, rows: usize, op_b: MatrixOp, random: &mut Random) {
    let shape = weight.codes.shape();
    let transposed = op_b == MatrixOp::Transpose;
    let [columns, depth] = if transposed {
        [shape[0], shape[1]]
    } else {
        [shape[1], shape[0]]
    };
    let x = random.floats(DType::F32, &[rows, depth], 1.0);
    let dims = [rows, depth, columns];
    let (want, _) = product(&x.to_f64(), &weight.values(), dims, transposed);
    let (_, size) = product(&x.to_f64(), &weight.magnitudes(), dims, transposed);
    let want = (want, size);
    let network = network_of(&x, weight.constant(), op_b);
    let mut by_threads: Vec<Vec<u8>> = Vec::new();
    for options in every_option() {
        let (_, got) = execute(&network, &[("x0", x.clone())], &options).unwrap().remove(0);
        let what = format!("{rows} rows by {:?} {op_b:?}, {options:?}", weight.constant());
        assert_fp32(&got, &want, &what);
        by_threads.push(got.data().to_vec());
    }
    for pair in by_threads.chunks_exact(2) {
        assert!(
            pair[0] == pair[1],
            "{:?}: the result depends on the threads",
            weight.constant()
        );
    }
}

/// Every kind of codes in every kind of blocks, for streamed rows and for rows with a packed panel.
#[test]
fn every_form() {
    if on_tensorrt() {
        return;
    }
    let mut random = Random::new(71);
    let block = |size| Granularity::Block { axis: 1, size };
    let granularities = [
        Granularity::Tensor,
        Granularity::Channel { axis: 0 },
        Granularity::Channel { axis: 1 },
        block(16),
        block(32),
        block(64),
        block(192),
        // Not a multiple of a word of codes, and words that do not divide a vector.
        block(12),
        block(48),
        Granularity::Block { axis: 0, size: 7 },
    ];
    for (i, dtype) in INTEGERS.into_iter().chain(FLOATS).enumerate() {
        for (j, granularity) in granularities.into_iter().enumerate() {
            for (zeros, rows) in [(false, 1), (true, 1), (true, 6), (false, 11)] {
                let scale = [DType::F32, DType::F16, DType::Bf16][(i + j + rows) % 3];
                let weight = Weight::random(&mut random, dtype, scale, &[21, 192], granularity, zeros);
                check(&weight, rows, MatrixOp::Transpose, &mut random);
            }
        }
    }
}

/// Blocks that are larger than any vector of codes, over several of them.
#[test]
fn deep_rows() {
    let mut random = Random::new(72);
    for (dtype, size, depth) in [
        (DType::U4, 32, 1536),
        (DType::I4, 128, 1536),
        (DType::U4, 256, 768),
        (DType::I8, 32, 576),
        (DType::U8, 128, 640),
        (DType::U2, 16, 1040),
        (DType::F4E2M1, 16, 592),
        (DType::F8E4M3Fn, 32, 608),
    ] {
        for rows in [1, 4, 9] {
            let granularity = Granularity::Block { axis: 1, size };
            let weight = Weight::random(&mut random, dtype, DType::F16, &[5, depth], granularity, true);
            check(&weight, rows, MatrixOp::Transpose, &mut random);
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(80) })]
    #[test]
    fn any_form_and_size(
        rows in prop_oneof![3 => 1usize..9, 1 => 9usize..40],
        columns in prop_oneof![3 => 1usize..40, 1 => 40usize..90],
        // Blocks on the depth, and their size.
        blocks in prop_oneof![3 => 1usize..12, 1 => 12usize..40],
        size in prop_oneof![Just(2usize), Just(8), Just(16), Just(24), Just(32), Just(7), Just(1)],
        dtype in proptest::sample::select([&INTEGERS[..], &FLOATS[..]].concat()),
        scale in proptest::sample::select(vec![DType::F32, DType::F16, DType::Bf16]),
        kind in 0usize..5,
        zeros in any::<bool>(),
        transposed in any::<bool>(),
        seed in any::<u64>(),
    ) {
        let mut random = Random::new(seed);
        let depth = blocks * size;
        let (shape, op, on) = match transposed {
            true => ([columns, depth], MatrixOp::Transpose, 1),
            false => ([depth, columns], MatrixOp::None, 0),
        };
        let granularity = match kind {
            0 => Granularity::Tensor,
            1 => Granularity::Channel { axis: 1 - on },
            2 => Granularity::Channel { axis: on },
            _ => Granularity::Block { axis: on, size },
        };
        let weight = Weight::random(&mut random, dtype, scale, &shape, granularity, zeros);
        check(&weight, rows, op, &mut random);
    }
}

/// NVFP4: fp8 scales in blocks of 16 with one common scale.
#[test]
fn scales_that_are_quantized_themselves() {
    let mut random = Random::new(73);
    let blocks = Granularity::Block { axis: 1, size: 16 };
    let mut weight = Weight::random(&mut random, DType::F4E2M1, DType::F32, &[9, 96], blocks, false);
    let inner = random.floats(DType::F8E4M3Fn, &[9, 6], 200.0);
    let outer = Tensor::from_f32(vec![], &[0.0078125]);
    let scales = Constant::quantized(inner.clone().into(), outer.clone().into(), None, Granularity::Tensor).unwrap();
    let constant = Constant::quantized(weight.codes.clone().into(), scales, None, blocks).unwrap();
    weight.scales = dequantize(&inner, &outer, None, Granularity::Tensor);
    for rows in [1, 12] {
        let x = random.floats(DType::F32, &[rows, 96], 1.0);
        let want = product(&x.to_f64(), &weight.values(), [rows, 96, 9], true);
        let network = network_of(&x, constant.clone(), MatrixOp::Transpose);
        for options in every_option() {
            let (_, got) = execute(&network, &[("x0", x.clone())], &options).unwrap().remove(0);
            assert_fp32(&got, &want, "NVFP4");
        }
    }
}

/// Codes that are infinite or NaN keep their values; importers refuse them.
#[test]
fn codes_that_are_no_numbers() {
    for (dtype, code, like) in [
        (DType::F8E4M3Fn, 0x7f, f32::NAN),
        (DType::F8E4M3Fn, 0xff, f32::NAN),
        (DType::F8E5M2, 0x7c, f32::INFINITY),
        (DType::F8E5M2, 0xfc, f32::NEG_INFINITY),
        (DType::F8E5M2, 0x7e, f32::NAN),
    ] {
        let mut bytes = vec![0u8; 3 * 40];
        bytes[40 + 5] = code;
        let codes = Tensor::new(dtype, vec![3, 40], bytes.into()).unwrap();
        let scales = Tensor::from_f32(vec![], &[0.5]);
        let weight = Constant::quantized(codes.into(), scales.into(), None, Granularity::Tensor).unwrap();
        for rows in [1, 20] {
            let x = Tensor::from_f32(vec![rows, 40], &vec![1.0; rows * 40]);
            let network = network_of(&x, weight.clone(), MatrixOp::Transpose);
            for options in every_option() {
                let (_, got) = execute(&network, &[("x0", x.clone())], &options).unwrap().remove(0);
                let got = got.to_f32();
                assert_eq!(
                    got[1].to_bits() & 0x7fff_ffff == 0x7f80_0000,
                    like.is_infinite(),
                    "{dtype} {code:x}"
                );
                assert_eq!(got[1].is_nan(), like.is_nan(), "{dtype} {code:x}");
                assert!(like.is_nan() || got[1] == like);
                assert_eq!((got[0], got[2]), (0.0, 0.0));
            }
        }
    }
}

/// One constant as embedding and head, as in tied models; rows by index are the exact values.
#[test]
fn rows_by_index_and_a_tied_head() {
    let mut random = Random::new(74);
    for (dtype, granularity) in [
        (DType::U4, Granularity::Block { axis: 1, size: 16 }),
        (DType::I8, Granularity::Channel { axis: 0 }),
        (DType::F4E2M1, Granularity::Block { axis: 1, size: 32 }),
        (DType::U2, Granularity::Block { axis: 0, size: 5 }),
        // Rows that begin within a byte.
        (DType::I4, Granularity::Channel { axis: 1 }),
    ] {
        let depth = if dtype == DType::I4 { 31 } else { 64 };
        let weight = Weight::random(&mut random, dtype, DType::F32, &[20, depth], granularity, true);
        let mut b = builder();
        let ids = b.input("x0", DType::I32, &dims(&[1, 3])).unwrap();
        let table = b.weight("w", weight.constant(), WeightMode::Bind).unwrap();
        let rows = b
            .add("embedding", LayerKind::Gather { axis: 0 }, &[table, ids])
            .unwrap();
        let flat = b.add("flat", reshape(&[3, depth]), &[rows]).unwrap();
        let head = b.linear("head", flat, table).unwrap();
        b.output("rows", rows).unwrap();
        b.output("logits", head).unwrap();
        let network = b.finish().unwrap();
        let chosen = [19, 0, 7];
        let values = weight.values();
        let x: Vec<f64> = chosen
            .iter()
            .flat_map(|i| values[i * depth..(i + 1) * depth].to_vec())
            .collect();
        let want = product(&x, &values, [3, depth, 20], true);
        for options in every_option() {
            let ids = Tensor::from_i32(vec![1, 3], &chosen.map(|i| i as i32));
            let outputs = execute(&network, &[("x0", ids)], &options).unwrap();
            assert_close(
                &outputs[0].1,
                &x,
                0.0,
                0.0,
                &format!("{weight:?}", weight = weight.constant()),
            );
            assert_fp32(&outputs[1].1, &want, "head");
            for bad in [20, -1] {
                let ids = Tensor::from_i32(vec![1, 3], &[0, bad, 3]);
                let error = execute(&network, &[("x0", ids)], &options).unwrap_err();
                let expected = CpuError::Index {
                    layer: "embedding".to_string(),
                    what: Indexed::Index,
                    index: i64::from(bad),
                    bound: 20,
                };
                assert_eq!(error, expected);
            }
        }
    }
}

fn reshape(shape: &[usize]) -> LayerKind {
    LayerKind::Shuffle {
        first: None,
        reshape: Some(dims(shape)),
        second: None,
    }
}

/// Experts: a quantized matrix for each of a batch, and rows that all of them share.
#[test]
fn a_matrix_for_each_of_a_batch() {
    let mut random = Random::new(75);
    let granularity = Granularity::Block { axis: 1, size: 16 };
    for rows in [1, 3, 14] {
        for shared in [false, true] {
            let weights: Vec<Weight> = (0..3)
                .map(|_| Weight::random(&mut random, DType::U4, DType::F16, &[10, 48], granularity, true))
                .collect();
            let constants: Vec<Constant> = weights.iter().map(Weight::constant).collect();
            let stacked = Constant::concat(&constants, 0).reshaped(vec![3, 10, 48]);
            assert!(stacked.as_quantized().is_some());
            let x = random.floats(DType::F32, &[if shared { 1 } else { 3 }, rows, 48], 1.0);
            let all = x.to_f64();
            let mut want = (Vec::new(), Vec::new());
            for (i, weight) in weights.iter().enumerate() {
                let from = if shared { 0 } else { i * rows * 48 };
                let (sums, sizes) = product(&all[from..from + rows * 48], &weight.values(), [rows, 48, 10], true);
                want.0.extend(sums);
                want.1.extend(sizes);
            }
            let network = network_of(&x, stacked, MatrixOp::Transpose);
            for options in every_option() {
                let (_, got) = execute(&network, &[("x0", x.clone())], &options).unwrap().remove(0);
                assert_fp32(&got, &want, &format!("{rows} rows, shared: {shared}"));
            }
        }
    }
}

/// Codes move with shuffles and slices; layers that split blocks, or read a weight in another way, get its values.
#[test]
fn weights_that_are_moved_or_read_by_other_layers() {
    let mut random = Random::new(76);
    let granularity = Granularity::Block { axis: 1, size: 8 };
    let weight = Weight::random(&mut random, DType::U4, DType::F32, &[12, 32], granularity, true);
    let values = weight.values();
    let x = random.floats(DType::F32, &[2, 32], 1.0);
    let slice = |start: [i64; 2], size: [usize; 2]| LayerKind::Slice {
        start: start.to_vec(),
        size: size.iter().map(|d| Dim::from(*d)).collect(),
        stride: vec![1; 2],
    };
    let transpose = |perm: &[usize]| LayerKind::Shuffle {
        first: Some(perm.to_vec()),
        reshape: None,
        second: None,
    };
    // The remaining columns of the weight, and their columns in the product.
    for (movement, columns, rows) in [
        (vec![transpose(&[1, 0]), transpose(&[1, 0])], 0..32, 0..12),
        (vec![slice([4, 0], [6, 32])], 0..32, 4..10),
        (vec![slice([0, 8], [12, 16])], 8..24, 0..12),
        (vec![slice([0, 4], [12, 16])], 4..20, 0..12),
        (vec![reshape(&[1, 12, 32]), reshape(&[12, 32])], 0..32, 0..12),
    ] {
        let depth = columns.len();
        let mut b = builder();
        let id = b.input("x0", DType::F32, &dims(&[2, depth])).unwrap();
        let mut w = b.weight("w", weight.constant(), WeightMode::Bind).unwrap();
        for kind in &movement {
            w = b.add("moved", kind.clone(), &[w]).unwrap();
        }
        let y = b.linear("product", id, w).unwrap();
        let twice = b.elementwise("twice", Elementwise::Sum, w, w).unwrap();
        b.output("y", y).unwrap();
        b.output("twice", twice).unwrap();
        let network = b.finish().unwrap();
        let part: Vec<f64> = rows
            .clone()
            .flat_map(|r| columns.clone().map(move |c| r * 32 + c))
            .map(|at| values[at])
            .collect();
        let x: Vec<f64> = x.to_f64()[..2 * depth].to_vec();
        let want = product(&x, &part, [2, depth, rows.len()], true);
        let doubled: Vec<f64> = part.iter().map(|v| v * 2.0).collect();
        let x = Tensor::from_f64_as(DType::F32, vec![2, depth], &x);
        for options in every_option() {
            let outputs = execute(&network, &[("x0", x.clone())], &options).unwrap();
            assert_fp32(&outputs[0].1, &want, &format!("{movement:?}"));
            assert_close(&outputs[1].1, &doubled, 0.0, 0.0, "twice");
        }
    }
}
