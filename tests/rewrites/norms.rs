//! RMSNorm and LayerNorm in every spelling. For graphs that only resemble them see tests/files/passes.

use lapidary::graph::op::{Binary, Unary};
use lapidary::graph::{Graph, ValueId};
use lapidary::passes::{layer_norm, rms_norm};
use lapidary::tensor::DType;

use super::small::{Small, count, rewrite};

#[derive(Clone, Copy, Debug)]
struct Spelling {
    square: &'static str,
    inverse: &'static str,
    weight: &'static str,
    /// The input is fp16, the statistics fp32.
    half: bool,
}

fn spellings() -> Vec<Spelling> {
    let mut all = Vec::new();
    for square in ["pow", "mul"] {
        for inverse in ["div", "reciprocal", "one over", "pow"] {
            for weight in ["none", "left", "right", "plus one"] {
                for half in [false, true] {
                    all.push(Spelling {
                        square,
                        inverse,
                        weight,
                        half,
                    });
                }
            }
        }
    }
    all
}

/// `x / sqrt(mean(x²) + epsilon)`
fn divide_by_root(s: &mut Small, x: ValueId, how: Spelling, epsilon: ValueId, axis: i64) -> ValueId {
    let dtype = if how.half { DType::F32 } else { s.dtype };
    let squared = match how.square {
        "pow" => {
            let two = s.number_as(dtype, 2.0);
            s.binary(Binary::Pow, x, two)
        }
        _ => s.mul(x, x),
    };
    let mean = s.mean(squared, axis);
    let shifted = s.add(epsilon, mean);
    match how.inverse {
        "div" => {
            let root = s.unary(Unary::Sqrt, shifted);
            s.binary(Binary::Div, x, root)
        }
        "reciprocal" => {
            let root = s.unary(Unary::Sqrt, shifted);
            let inverse = s.unary(Unary::Reciprocal, root);
            s.mul(x, inverse)
        }
        "one over" => {
            let (root, one) = (s.unary(Unary::Sqrt, shifted), s.number_as(dtype, 1.0));
            let inverse = s.binary(Binary::Div, one, root);
            s.mul(inverse, x)
        }
        _ => {
            let exponent = s.number_as(dtype, -0.5);
            let inverse = s.binary(Binary::Pow, shifted, exponent);
            s.mul(x, inverse)
        }
    }
}

fn weighted(s: &mut Small, x: ValueId, weight: &str) -> ValueId {
    let w = s.constant(&[8], 7);
    match weight {
        "none" => x,
        "left" => s.mul(w, x),
        "right" => s.mul(x, w),
        _ => {
            let one = s.number(1.0);
            let w = s.add(w, one);
            s.mul(x, w)
        }
    }
}

fn rms(how: Spelling, centered: bool, epsilon: f64) -> Graph {
    let mut s = Small::new(if how.half { DType::F16 } else { DType::F32 });
    let x = s.input("x", &["batch", "tokens", "8"]);
    let mut at = if how.half { s.cast(x, DType::F32) } else { x };
    if centered {
        let mean = s.mean(at, -1);
        at = s.binary(Binary::Sub, at, mean);
    }
    let epsilon = s.number_as(DType::F32, epsilon);
    let normalized = divide_by_root(&mut s, at, how, epsilon, -1);
    let normalized = if how.half {
        s.cast(normalized, DType::F16)
    } else {
        normalized
    };
    let mut end = weighted(&mut s, normalized, how.weight);
    if centered {
        let bias = s.constant(&[8], 9);
        end = s.add(bias, end);
    }
    s.finish(&[end])
}

#[test]
fn every_spelling_becomes_one_operator() {
    for how in spellings() {
        let tolerance = if how.half { 4e-3 } else { 1e-5 };
        let graph = rms(how, false, 1e-5);
        let (rewritten, rewrites) = rewrite(&graph, rms_norm::run, tolerance);
        assert_eq!((rewrites, rewritten.node_ids().count()), (1, 1), "{how:?}");
        assert_eq!(count(&rewritten, "RMSNormalization"), 1);
        // The subtraction makes it another norm.
        let centered = rms(how, true, 1e-5);
        assert_eq!(rewrite(&centered, rms_norm::run, tolerance).1, 0, "{how:?}");
        let (rewritten, rewrites) = rewrite(&centered, layer_norm::run, tolerance);
        assert_eq!((rewrites, rewritten.node_ids().count()), (1, 1), "{how:?}");
        assert_eq!(rewrite(&graph, layer_norm::run, tolerance).1, 0, "{how:?}");
    }
}
