//! One dynamic dim: profiles, and the extents that need shape tensors.

use lapidary::backend::tensorrt::EngineBuildError;
use lapidary::network::{Elementwise, LayerKind, Tokens};
use lapidary::tensor::DType;

use crate::net::{Net, build, dims, shape};

const DYNAMIC: Tokens = Tokens::Dynamic {
    min: 1,
    opt: 8,
    max: 16,
};

fn reshape(to: &[&str]) -> LayerKind {
    LayerKind::Shuffle {
        first: None,
        reshape: Some(to.iter().map(|dim| lapidary::dim::Dim::parse(dim)).collect()),
        second: None,
    }
}

#[test]
fn every_place_that_may_hold_tokens_builds() {
    let mut net = Net::new(DYNAMIC);
    let x = net.input("x", DType::F16, shape(["1", "tokens", "8"]));
    // A second input of the same length: TensorRT must know that the two are equal.
    let y = net.input("y", DType::F16, shape(["1", "tokens", "8"]));
    let x = net.layer(
        "sum",
        LayerKind::Elementwise(Elementwise::Sum),
        [x, y],
        DType::F16,
        shape(["1", "tokens", "8"]),
    );
    let heads = net.layer(
        "heads",
        reshape(&["1", "tokens", "2", "4"]),
        [x],
        DType::F16,
        shape(["1", "tokens", "2", "4"]),
    );
    let turned = LayerKind::Shuffle {
        first: Some(vec![0, 2, 1, 3]),
        reshape: None,
        second: None,
    };
    let q = net.out("turned", turned, [heads], DType::F16, shape(["1", "2", "tokens", "4"]));
    net.out(
        "merged",
        reshape(&["2*tokens", "4"]),
        [q],
        DType::F16,
        shape(["2*tokens", "4"]),
    );
    // Half of each head, for every token: a size that must be given.
    let half = LayerKind::Slice {
        start: vec![0, 0, 0, 2],
        size: shape(["1", "2", "tokens", "2"]),
        stride: vec![1; 4],
    };
    net.out("half", half, [q], DType::F16, shape(["1", "2", "tokens", "2"]));
    // Rows of a table by the number of tokens.
    let table = net.input("table", DType::F16, dims([64, 4]));
    let rows = LayerKind::Slice {
        start: vec![3, 0],
        size: shape(["2*tokens + 1", "4"]),
        stride: vec![1, 1],
    };
    net.out("rows", rows, [table], DType::F16, shape(["2*tokens + 1", "4"]));
    let iota = LayerKind::Fill {
        length: lapidary::dim::Dim::parse("tokens"),
        start: 0.0,
        step: 1.0,
    };
    let columns = net.layer("columns", iota.clone(), [], DType::I32, shape(["tokens"]));
    let columns = net.layer(
        "columns_row",
        reshape(&["1", "tokens"]),
        [columns],
        DType::I32,
        shape(["1", "tokens"]),
    );
    let lines = net.layer("lines", iota, [], DType::I32, shape(["tokens"]));
    let lines = net.layer(
        "lines_column",
        reshape(&["tokens", "1"]),
        [lines],
        DType::I32,
        shape(["tokens", "1"]),
    );
    // Two dynamic dims, which a reshape cannot leave to inference.
    let square = net.layer(
        "square",
        LayerKind::Elementwise(Elementwise::Sum),
        [columns, lines],
        DType::I32,
        shape(["tokens", "tokens"]),
    );
    net.out(
        "blocks",
        reshape(&["1", "tokens", "1", "tokens"]),
        [square],
        DType::I32,
        shape(["1", "tokens", "1", "tokens"]),
    );
    build(&net).unwrap();
}

#[test]
fn a_cache_takes_a_dynamic_update() {
    let mut net = Net::new(DYNAMIC);
    let cache = net.input("key_cache.0", DType::F16, dims([1, 2, 32, 8]));
    let update = net.input("key", DType::F16, shape(["1", "2", "tokens", "8"]));
    let at = net.input("write_indices", DType::I32, dims([1]));
    let q = net.input("q", DType::F16, shape(["1", "4", "tokens", "8"]));
    let mask = net.input("mask", DType::Bool, shape(["1", "1", "tokens", "32"]));
    let k = net.out(
        "update",
        LayerKind::KvCacheUpdate,
        [cache, update, at],
        DType::F16,
        dims([1, 2, 32, 8]),
    );
    net.out(
        "attention",
        LayerKind::Attention,
        [q, k, k, mask],
        DType::F16,
        shape(["1", "4", "tokens", "8"]),
    );
    build(&net).unwrap();
}

#[test]
fn a_profile_must_rise() {
    for (min, opt, max) in [(0, 1, 2), (4, 2, 8), (1, 9, 8)] {
        let net = Net::new(Tokens::Dynamic { min, opt, max });
        let error = build(&net).unwrap_err();
        assert!(matches!(error, EngineBuildError::Profile { .. }), "{error}");
        assert!(error.to_string().contains(&format!("{min}:{opt}:{max}")), "{error}");
    }
}

#[test]
fn a_length_that_no_input_has_is_named() {
    let mut net = Net::new(DYNAMIC);
    let length = lapidary::dim::Dim::parse("tokens");
    let iota = LayerKind::Fill {
        length,
        start: 0.0,
        step: 1.0,
    };
    net.out("iota", iota, [], DType::I32, shape(["tokens"]));
    let error = build(&net).unwrap_err().to_string();
    assert!(
        error.contains("\"iota\"") && error.contains("no input has that dim"),
        "{error}"
    );
}

#[test]
fn layers_share_a_dynamic_mask() {
    // In fp16, where TensorRT-RTX 1.6.1 fails unless every layer has its own mask.
    let mut net = Net::new(DYNAMIC);
    let mask = net.input("mask", DType::Bool, shape(["1", "1", "tokens", "32"]));
    let mut x = net.input("x", DType::F16, shape(["1", "4", "tokens", "16"]));
    let at = net.input("write_indices", DType::I32, dims([1]));
    for i in 0..2 {
        let cache = net.input(&format!("cache.{i}"), DType::F16, dims([1, 2, 32, 16]));
        let update = net.input(&format!("update.{i}"), DType::F16, shape(["1", "2", "tokens", "16"]));
        let update = net.out(
            &format!("updated.{i}"),
            LayerKind::KvCacheUpdate,
            [cache, update, at],
            DType::F16,
            dims([1, 2, 32, 16]),
        );
        let inputs = [x, update, update, mask];
        x = net.layer(
            &format!("attention.{i}"),
            LayerKind::Attention,
            inputs,
            DType::F16,
            shape(["1", "4", "tokens", "16"]),
        );
    }
    net.0.outputs.push(x);
    build(&net).unwrap();
}
