//! Weights bound, embedded and stripped.

use bytes::Bytes;
use lapidary::backend::tensorrt::{self, BuildOptions, EngineBuildError};
use lapidary::graph::Constant;
use lapidary::help::Help;
use lapidary::network::{LayerKind, MatrixOp, WeightMode};
use lapidary::target::Refit;
use lapidary::tensor::{DType, Tensor};

use crate::net::{Net, build, bytes_of, dims, library};

/// Bytes without repetition, so that finding them in a plan proves that it contains the weight.
fn noise(i: usize) -> u8 {
    let mixed = (i as u64).wrapping_mul(0x9E37_79B9_7F4A_7C15);
    // Below 0x78 in the upper byte of each half: finite numbers only.
    ((mixed >> 32) as u8) & if i % 2 == 1 { 0x3f } else { 0xff }
}

/// `x wᵀ` for a weight `[1, out, in]`.
fn linear(constant: impl Into<Constant>, mode: WeightMode) -> Net {
    let constant = constant.into();
    let [_, out, depth] = *constant.shape() else {
        unreachable!()
    };
    let mut net = Net::fixed();
    let x = net.input("x", DType::F16, dims([1, 4, depth as i64]));
    let w = net.weight("proj.weight", constant, mode);
    let kind = LayerKind::MatrixMultiply {
        op_a: MatrixOp::None,
        op_b: MatrixOp::Transpose,
    };
    net.out("proj", kind, [x, w], DType::F16, dims([1, 4, out as i64]));
    net
}

fn holds(plan: &[u8], row: &[u8]) -> bool {
    plan.windows(row.len()).any(|window| window == row)
}

#[test]
fn an_embedded_weight_is_in_the_plan_and_a_bound_one_is_not() {
    let weight = bytes_of(DType::F16, &[1, 64, 32], noise);
    // TensorRT may reorder rows, but it keeps short runs contiguous.
    let run = weight.data().slice(128..144);
    let embedded = build(&linear(weight.clone(), WeightMode::Embed)).unwrap();
    assert!(holds(embedded.bytes(), &run), "the weight's bytes are in the plan");
    let bound = build(&linear(weight, WeightMode::Bind)).unwrap();
    assert!(!holds(bound.bytes(), &run));
    assert!(holds(bound.bytes(), b"proj.weight"), "the input has the weight's name");
}

#[test]
fn a_bound_weight_needs_no_bytes_and_an_embedded_one_does() {
    let absent = || Constant::absent(DType::F16, vec![1, 64, 32]).with_origin("model.proj.weight");
    build(&linear(absent(), WeightMode::Bind)).unwrap();
    let error = build(&linear(absent(), WeightMode::Embed)).unwrap_err();
    assert!(
        matches!(&error, EngineBuildError::Weight { weight, .. } if weight == "proj.weight"),
        "{error}"
    );
    assert!(error.help().unwrap().contains("`lapidary refit`"), "{error}");
}

#[test]
fn bytes_at_an_odd_address_embed() {
    let mut data = vec![0u8];
    data.extend((0..64 * 32 * 2).map(noise));
    let weight = Tensor::new(DType::F16, vec![1, 64, 32], Bytes::from(data).slice(1..)).unwrap();
    let run = weight.data().slice(128..144);
    let plan = build(&linear(weight, WeightMode::Embed)).unwrap();
    assert!(holds(plan.bytes(), &run));
}

#[test]
fn one_weight_may_feed_several_layers() {
    for mode in [WeightMode::Bind, WeightMode::Embed] {
        let mut net = linear(bytes_of(DType::F16, &[1, 64, 32], noise), mode);
        let LayerKind::Weight(id) = net.0.layers[0].kind else {
            unreachable!()
        };
        let again = net.layer("again", LayerKind::Weight(id), [], DType::F16, dims([1, 64, 32]));
        let y = net.0.outputs[0];
        let kind = LayerKind::MatrixMultiply {
            op_a: MatrixOp::None,
            op_b: MatrixOp::None,
        };
        net.out("back", kind, [y, again], DType::F16, dims([1, 4, 32]));
        build(&net).unwrap();
    }
}

#[test]
fn refittable_weights_build_with_a_driver_and_say_so_without() {
    let has_gpu = tensorrt::probe(None).driver.is_some();
    for (mode, refit) in [
        (WeightMode::Strip, Refit::None),
        (WeightMode::Strip, Refit::General),
        (WeightMode::Embed, Refit::Identical),
        (WeightMode::Embed, Refit::General),
    ] {
        // 4 MiB, far more than the kernels of one layer.
        let weight = bytes_of(DType::F16, &[1, 2048, 1024], noise);
        let size = weight.data().len();
        let options = BuildOptions {
            refit,
            ..Default::default()
        };
        let built = tensorrt::build(&library(), &linear(weight, mode).0, &options);
        if has_gpu {
            let plan = built.unwrap();
            eprintln!("{mode:?} {refit:?}: {plan:?}");
            assert_eq!(
                plan.bytes().len() > size,
                mode == WeightMode::Embed,
                "{mode:?} {refit:?}: {plan:?}"
            );
        } else {
            let error = built.unwrap_err();
            assert!(matches!(error, EngineBuildError::NeedsGpu { .. }), "{error}");
            assert!(error.help().unwrap().contains("--weights bind"), "{error}");
        }
    }
    // Bound weights can be replaced at any time, so a refit mode needs nothing from TensorRT.
    let options = BuildOptions {
        refit: Refit::General,
        ..Default::default()
    };
    let net = linear(bytes_of(DType::F16, &[1, 64, 32], noise), WeightMode::Bind);
    tensorrt::build(&library(), &net.0, &options).unwrap();
}
