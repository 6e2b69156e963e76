//! Layers that move, select or convert elements, alone and in chains of views.

use lapidary::dim::Dim;
use lapidary::network::{LayerKind, UnaryOp};
use lapidary::tensor::{DType, Tensor};
use proptest::prelude::*;

use super::layers::{Cases, PAIRS};
use super::reference::{Value, evaluate};
use super::support::{Random, assert_close, builder, dims, every_option, one_layer, run};

#[test]
fn shuffles_slices_and_concatenations() {
    let mut cases = Cases::default();
    let mut random = Random::new(6);
    for dtype in [DType::F32, DType::F16, DType::I32, DType::I64, DType::Bool] {
        let x = random.any(dtype, &[2, 3, 4, 5]);
        let reshape = |shape: &[usize]| Some(dims(shape));
        for (first, reshape, second) in [
            (None, None, None),
            (Some(vec![0, 2, 1, 3]), None, None),
            (Some(vec![3, 1, 2, 0]), reshape(&[5, 24]), None),
            (None, reshape(&[6, 4, 5]), Some(vec![1, 0, 2])),
            (Some(vec![0, 2, 1, 3]), reshape(&[2, 4, 15]), Some(vec![2, 1, 0])),
            (Some(vec![1, 0, 2, 3]), reshape(&[3, 2, 20]), None),
            (None, reshape(&[120]), None),
            (None, reshape(&[1, 120, 1]), Some(vec![1, 2, 0])),
        ] {
            cases.add(LayerKind::Shuffle { first, reshape, second }, std::slice::from_ref(&x));
        }
        for (start, size, stride) in [
            ([0i64, 0, 0, 0], [2usize, 3, 4, 5], [1i64, 1, 1, 1]),
            ([1, 0, 1, 2], [1, 3, 2, 2], [1, 1, 2, 1]),
            ([1, 2, 3, 4], [2, 3, 2, 5], [-1, -1, -2, -1]),
            ([0, 1, 0, 0], [2, 4, 1, 5], [1, 0, 1, 1]),
        ] {
            let (start, stride) = (start.to_vec(), stride.to_vec());
            let size = dims(&size);
            cases.add(LayerKind::Slice { start, size, stride }, std::slice::from_ref(&x));
        }
        for axis in 0..3 {
            let mut parts = Vec::new();
            for n in [2, 1, 3] {
                let mut shape = [2, 3, 4];
                shape[axis] = n;
                parts.push(random.any(dtype, &shape));
            }
            cases.add(LayerKind::Concatenation { axis }, &parts);
        }
    }
    cases.check();
}

#[test]
fn gathers_along_any_axis() {
    let mut cases = Cases::default();
    let mut random = Random::new(7);
    for dtype in [DType::F32, DType::F16, DType::Bf16, DType::I32, DType::I64, DType::Bool] {
        for index in [DType::I32, DType::I64] {
            let data = random.any(dtype, &[4, 5, 37]);
            for axis in 0..3 {
                for shape in [&[1usize][..], &[3], &[2, 3]] {
                    let last = data.shape()[axis] as i64 - 1;
                    cases.add(
                        LayerKind::Gather { axis },
                        &[data.clone(), random.ints(index, shape, 0, last)],
                    );
                }
            }
        }
    }
    // An index computed from inputs is checked when it is used.
    let inputs = [random.any(DType::F32, &[4, 3]), Tensor::from_i32(vec![2], &[1, 4])];
    let network = one_layer(LayerKind::Gather { axis: 0 }, &inputs);
    for options in every_option() {
        let named = [("x0", inputs[0].clone()), ("x1", inputs[1].clone())];
        let error = lapidary::backend::cpu::execute(&network, &named, &options).unwrap_err();
        assert_eq!(error.to_string(), "layer \"layer\": index 4 is outside 0..4");
    }
    cases.check();
}

#[test]
fn selects_casts_and_fills() {
    let mut cases = Cases::default();
    let mut random = Random::new(8);
    for dtype in [DType::F32, DType::F16, DType::I32, DType::I64] {
        for (a, b) in PAIRS {
            let condition = random.any(DType::Bool, b);
            cases.add(
                LayerKind::Select,
                &[condition, random.any(dtype, a), random.any(dtype, b)],
            );
            let condition = random.any(DType::Bool, a);
            cases.add(
                LayerKind::Select,
                &[condition, random.any(dtype, b), random.any(dtype, a)],
            );
        }
    }
    let all = [DType::F32, DType::F16, DType::Bf16, DType::I32, DType::I64, DType::Bool];
    for from in all {
        for to in all {
            cases.add(LayerKind::Cast { to }, &[random.any(from, &[3, 41])]);
        }
    }
    for (dtype, start, step) in [(DType::I32, 3.0, 2.0), (DType::F32, -1.0, 0.25)] {
        let mut b = builder();
        let fill = b.fill("fill", dtype, Dim::from(2100usize), start, step).unwrap();
        b.output("y", fill).unwrap();
        let network = b.finish().unwrap();
        let want: Vec<f64> = (0..2100).map(|i| start + step * f64::from(i)).collect();
        for options in every_option() {
            let got = run(&network, &[], &options);
            assert_eq!(got.dtype(), dtype);
            assert_close(&got, &want, 1.0, 0.0, "fill");
        }
    }
    cases.check();
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(40) })]
    /// A chain of views, and a layer that reads it.
    #[test]
    fn chains_of_views_read_the_right_elements(seed in any::<u64>()) {
        let mut random = Random::new(seed);
        let shape: Vec<usize> = (0..3).map(|_| 1 + random.below(6)).collect();
        let input = random.floats(DType::F32, &shape, 1.0);
        let mut b = builder();
        let mut id = b.input("x0", DType::F32, &dims(&shape)).unwrap();
        let mut value = Value::from(&input);
        for step in 0..4 {
            let rank = value.shape.len();
            let kind = match random.below(4) {
                0 => {
                    let mut perm: Vec<usize> = (0..rank).collect();
                    perm.rotate_left(random.below(rank));
                    LayerKind::Shuffle { first: Some(perm), reshape: None, second: None }
                }
                1 => {
                    let cut = random.below(rank + 1);
                    let mut shape: Vec<usize> = value.shape[..cut].to_vec();
                    shape.push(value.shape[cut..].iter().product());
                    LayerKind::Shuffle { first: None, reshape: Some(dims(&shape)), second: None }
                }
                2 => {
                    let start: Vec<i64> = value.shape.iter().map(|d| random.below(*d) as i64).collect();
                    let size: Vec<usize> = value.shape.iter().zip(&start).map(|(d, s)| d - *s as usize).collect();
                    LayerKind::Slice { start, size: dims(&size), stride: vec![1; rank] }
                }
                _ => LayerKind::Unary(UnaryOp::Neg),
            };
            value = evaluate(&kind, &[value]);
            id = b.add(&format!("step{step}"), kind, &[id]).unwrap();
        }
        b.output("y", id).unwrap();
        let network = b.finish().unwrap();
        for options in every_option() {
            let got = run(&network, std::slice::from_ref(&input), &options);
            prop_assert_eq!(got.shape(), value.shape.as_slice());
            assert_close(&got, &value.data, 1.0, 0.0, "views");
        }
    }
}
