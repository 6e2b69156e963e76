//! Invalid networks: each is refused at its layer, by name, with shapes and TensorRT's own message.

use lapidary::backend::tensorrt::EngineBuildError;
use lapidary::network::{Elementwise, LayerKind, MatrixOp, TensorId};
use lapidary::tensor::{DType, Tensor};

use crate::net::{Net, build, dims};

fn refused(net: &Net) -> String {
    match build(net) {
        Err(error @ (EngineBuildError::Layer { .. } | EngineBuildError::Build { .. })) => error.to_string(),
        other => panic!("{other:?}"),
    }
}

#[track_caller]
fn says(message: &str, parts: &[&str]) {
    for part in parts {
        assert!(message.contains(part), "{part:?} is not in: {message}");
    }
}

#[test]
fn a_matrix_multiply_of_unlike_depths() {
    let mut net = Net::fixed();
    let a = net.input("hidden", DType::F16, dims([2, 3, 4]));
    let b = net.input("weight", DType::F16, dims([1, 5, 7]));
    let kind = LayerKind::MatrixMultiply {
        op_a: MatrixOp::None,
        op_b: MatrixOp::Transpose,
    };
    net.out("layers.0.q_proj", kind, [a, b], DType::F16, dims([2, 3, 5]));
    let message = refused(&net);
    says(
        &message,
        &[
            "\"layers.0.q_proj\"",
            "MatrixMultiply",
            "hidden: f16[2, 3, 4]",
            "weight: f16[1, 5, 7]",
        ],
    );
    says(
        &message,
        &[
            "TensorRT 1.",
            "last dimension of input0 = 4 and last dimension of input1 = 7",
        ],
    );
}

#[test]
fn operands_of_unlike_rank_or_type() {
    let unlike = [(DType::F16, dims([3])), (DType::F32, dims([2, 3]))];
    for (dtype, shape) in unlike {
        let mut net = Net::fixed();
        let a = net.input("a", DType::F16, dims([2, 3]));
        let b = net.input("b", dtype, shape);
        net.out(
            "residual",
            LayerKind::Elementwise(Elementwise::Sum),
            [a, b],
            DType::F16,
            dims([2, 3]),
        );
        let message = refused(&net);
        says(&message, &["\"residual\"", "Elementwise Sum", "a: f16[2, 3]", "b: "]);
    }
}

#[test]
fn heads_that_do_not_divide() {
    let mut net = Net::fixed();
    let q = net.input("q", DType::F16, dims([1, 5, 1, 32]));
    let k = net.input("k", DType::F16, dims([1, 2, 32, 32]));
    net.out(
        "attention",
        LayerKind::Attention,
        [q, k, k],
        DType::F16,
        dims([1, 5, 1, 32]),
    );
    says(
        &refused(&net),
        &["\"attention\"", "query number of heads must be divisible"],
    );
}

#[test]
fn a_slice_outside_its_input() {
    let mut net = Net::fixed();
    let x = net.input("x", DType::F32, dims([4, 4]));
    let kind = LayerKind::Slice {
        start: vec![3, 0],
        size: dims([4, 2]),
        stride: vec![1, 2],
    };
    net.out("tail", kind, [x], DType::F32, dims([4, 2]));
    // TensorRT only notices when it builds; the layer is found by the name in its message.
    says(
        &refused(&net),
        &[
            "out of bounds slice",
            "in layer \"tail\" (Slice: x: f32[4, 4] -> tail.out: f32[4, 2])",
        ],
    );
}

#[test]
fn a_cache_that_is_no_input() {
    let mut net = Net::fixed();
    let x = net.input("x", DType::F16, dims([1, 2, 32, 8]));
    let cache = net.layer(
        "copy",
        LayerKind::Elementwise(Elementwise::Sum),
        [x, x],
        DType::F16,
        dims([1, 2, 32, 8]),
    );
    let update = net.input("update", DType::F16, dims([1, 2, 4, 8]));
    let at = net.input("at", DType::I32, dims([1]));
    net.out(
        "cache",
        LayerKind::KvCacheUpdate,
        [cache, update, at],
        DType::F16,
        dims([1, 2, 32, 8]),
    );
    says(&refused(&net), &["\"cache\"", "cache tensor must be a network input"]);
}

#[test]
fn a_network_without_outputs_or_with_one_name_twice() {
    let mut net = Net::fixed();
    net.input("x", DType::F16, dims([2]));
    says(&refused(&net), &["must have at least one output"]);

    let mut net = Net::fixed();
    let x = net.input("x", DType::F16, dims([2]));
    net.input("x", DType::F16, dims([2]));
    net.out(
        "y",
        LayerKind::Elementwise(Elementwise::Sum),
        [x, x],
        DType::F16,
        dims([2]),
    );
    says(&refused(&net), &["\"x\" (Input"]);
}

#[test]
fn a_wrong_declaration_is_found_at_its_layer() {
    for (dtype, shape, declared) in [
        (DType::F16, dims([4, 2]), "f16[4, 2]"),
        (DType::F32, dims([2, 4]), "f32[2, 4]"),
    ] {
        let mut net = Net::fixed();
        let x = net.input("x", DType::F16, dims([2, 4]));
        let kind = LayerKind::Softmax { axis: 1 };
        net.out("softmax", kind, [x], dtype, shape);
        let error = build(&net).unwrap_err();
        assert!(matches!(error, EngineBuildError::Inference { .. }), "{error}");
        says(&error.to_string(), &["softmax.out", "kHALF[2, 4]", declared]);
    }
}

#[test]
fn what_the_list_itself_gets_wrong() {
    let malformed = |net: &Net, parts: &[&str]| {
        let error = build(net).unwrap_err();
        assert!(matches!(error, EngineBuildError::Malformed { .. }), "{error}");
        says(&error.to_string(), parts);
    };
    let sum = LayerKind::Elementwise(Elementwise::Sum);

    let mut net = Net::fixed();
    let x = net.input("x", DType::F32, dims([2]));
    net.out("arity", sum.clone(), [x], DType::F32, dims([2]));
    malformed(&net, &["\"arity\"", "1 inputs and needs 2"]);

    let mut net = Net::fixed();
    let x = net.input("x", DType::F32, dims([2]));
    let later = TensorId(2);
    net.out("early", sum.clone(), [x, later], DType::F32, dims([2]));
    net.out("late", sum.clone(), [x, x], DType::F32, dims([2]));
    malformed(&net, &["\"early\"", "\"late.out\" is used before"]);

    let mut net = Net::fixed();
    let x = net.input("x", DType::F32, dims([2]));
    net.out("lost", sum.clone(), [x, TensorId(77)], DType::F32, dims([2]));
    malformed(&net, &["\"lost\"", "no tensor 77"]);

    let mut net = Net::fixed();
    let x = net.input("x", DType::F32, dims([2]));
    net.out("axis", LayerKind::Softmax { axis: 40 }, [x], DType::F32, dims([2]));
    malformed(&net, &["\"axis\"", "out of range"]);

    let mut net = Net::fixed();
    let empty = net.constant("nothing", Tensor::from_f32(vec![0], &[]));
    net.0.outputs.push(empty);
    malformed(&net, &["\"nothing\"", "empty"]);

    let mut net = Net::fixed();
    net.input("wide", DType::F64, dims([2]));
    malformed(&net, &["\"wide\"", "no f64"]);
}
