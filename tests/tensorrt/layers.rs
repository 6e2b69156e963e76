//! Every layer kind, every operation and every dtype that a lowering may use.

use std::collections::BTreeSet;

use lapidary::network::{Activation, Elementwise, Greatest, LayerKind, MatrixOp, ReduceOp, UnaryOp, WeightMode};
use lapidary::tensor::quantized::Granularity;
use lapidary::tensor::{DType, Tensor};

use crate::net::{Net, build, bytes_of, dims};

const FLOATS: [DType; 3] = [DType::F32, DType::F16, DType::Bf16];

/// Exhaustive, so that a new kind of layer does not compile until it is counted, and does not pass until it is tested.
fn ordinal(kind: &LayerKind) -> usize {
    match kind {
        LayerKind::Weight(_) => 0,
        LayerKind::Constant(_) => 1,
        LayerKind::MatrixMultiply { .. } => 2,
        LayerKind::Elementwise(_) => 3,
        LayerKind::Unary(_) => 4,
        LayerKind::Activation(_) => 5,
        LayerKind::Reduce { .. } => 6,
        LayerKind::Softmax { .. } => 7,
        LayerKind::Shuffle { .. } => 8,
        LayerKind::Slice { .. } => 9,
        LayerKind::Concatenation { .. } => 10,
        LayerKind::Gather { .. } => 11,
        LayerKind::Select => 12,
        LayerKind::Cast { .. } => 13,
        LayerKind::Fill { .. } => 14,
        LayerKind::Normalization { .. } => 15,
        LayerKind::RotaryEmbedding { .. } => 16,
        LayerKind::Attention => 17,
        LayerKind::KvCacheUpdate => 18,
        LayerKind::Dequantize(_) => 19,
        LayerKind::TopK { .. } => 20,
        // TensorRT has no layer for it: lowering for engines uses others.
        LayerKind::Experts { .. } => 21,
        // Lapidary's kernels run them, between engines.
        LayerKind::RowProduct(_) => 22,
        LayerKind::DecodeAttention(_) => 23,
    }
}

/// One network that holds every kind, in one float type.
fn every_kind(float: DType) -> Net {
    let mut net = Net::fixed();
    let x = net.input("x", float, dims([1, 4, 8]));
    let w = net.weight("w", bytes_of(float, &[1, 16, 8], |_| 0), WeightMode::Bind);
    let matmul = LayerKind::MatrixMultiply {
        op_a: MatrixOp::None,
        op_b: MatrixOp::Transpose,
    };
    let h = net.out("matmul", matmul, [x, w], float, dims([1, 4, 16]));
    let e = net.weight("e", bytes_of(float, &[1, 1, 16], |_| 0), WeightMode::Embed);
    let h = net.out(
        "scale",
        LayerKind::Elementwise(Elementwise::Prod),
        [h, e],
        float,
        dims([1, 4, 16]),
    );
    let h = net.out("exp", LayerKind::Unary(UnaryOp::Exp), [h], float, dims([1, 4, 16]));
    let h = net.out(
        "gelu",
        LayerKind::Activation(Activation::GeluTanh),
        [h],
        float,
        dims([1, 4, 16]),
    );
    let mean = LayerKind::Reduce {
        op: ReduceOp::Avg,
        axes: vec![2],
        keep_dims: true,
    };
    net.out("mean", mean, [h], float, dims([1, 4, 1]));
    net.out("softmax", LayerKind::Softmax { axis: 2 }, [h], float, dims([1, 4, 16]));
    for part in [Greatest::Values, Greatest::Indices] {
        let dtype = if part == Greatest::Values { float } else { DType::I32 };
        let kind = LayerKind::TopK { k: 3, part };
        net.out(&format!("top {part:?}"), kind, [h], dtype, dims([1, 4, 3]));
    }
    let heads = LayerKind::Shuffle {
        first: None,
        reshape: Some(dims([1, 4, 2, 8])),
        second: Some(vec![0, 2, 1, 3]),
    };
    let q = net.layer("heads", heads, [h], float, dims([1, 2, 4, 8]));
    let half = LayerKind::Slice {
        start: vec![0, 0, 0, 4],
        size: dims([1, 2, 4, 4]),
        stride: vec![1; 4],
    };
    let half = net.layer("half", half, [q], float, dims([1, 2, 4, 4]));
    net.out(
        "joined",
        LayerKind::Concatenation { axis: 3 },
        [half, half],
        float,
        dims([1, 2, 4, 8]),
    );
    let positions = net.input("position_ids", DType::I32, dims([1, 4]));
    let cos = net.constant("cos", bytes_of(float, &[32, 4], |_| 0));
    let sin = net.constant("sin", bytes_of(float, &[32, 4], |_| 0));
    let rope = LayerKind::RotaryEmbedding {
        interleaved: false,
        rotary_dim: 8,
    };
    let q = net.layer("rope", rope, [q, cos, sin, positions], float, dims([1, 2, 4, 8]));
    let cache = net.input("key_cache.0", float, dims([1, 1, 32, 8]));
    let update = net.input("key", float, dims([1, 1, 4, 8]));
    let at = net.input("write_indices", DType::I32, dims([1]));
    let k = net.out(
        "update",
        LayerKind::KvCacheUpdate,
        [cache, update, at],
        float,
        dims([1, 1, 32, 8]),
    );
    let codes = net.weight("codes", bytes_of(DType::I4, &[8, 8], |_| 0x71), WeightMode::Embed);
    let scales = net.weight("scales", bytes_of(float, &[8, 2], |_| 1), WeightMode::Embed);
    let blocks = LayerKind::Dequantize(Granularity::Block { axis: 1, size: 4 });
    net.out("values", blocks, [codes, scales], float, dims([8, 8]));
    let iota = LayerKind::Fill {
        length: 32usize.into(),
        start: 0.0,
        step: 1.0,
    };
    let iota = net.layer("slots", iota, [], DType::I32, dims([32]));
    let row = LayerKind::Shuffle {
        first: None,
        reshape: Some(dims([1, 1, 1, 32])),
        second: None,
    };
    let slots = net.layer("slot_row", row, [iota], DType::I32, dims([1, 1, 1, 32]));
    let column = LayerKind::Shuffle {
        first: None,
        reshape: Some(dims([1, 1, 4, 1])),
        second: None,
    };
    let rows = net.layer("position_column", column, [positions], DType::I32, dims([1, 1, 4, 1]));
    let mask = net.layer(
        "future",
        LayerKind::Elementwise(Elementwise::Greater),
        [slots, rows],
        DType::Bool,
        dims([1, 1, 4, 32]),
    );
    let mask = net.layer(
        "mask",
        LayerKind::Unary(UnaryOp::Not),
        [mask],
        DType::Bool,
        dims([1, 1, 4, 32]),
    );
    let a = net.out(
        "attention",
        LayerKind::Attention,
        [q, k, k, mask],
        float,
        dims([1, 2, 4, 8]),
    );
    let embedded = net.layer(
        "rows",
        LayerKind::Gather { axis: 1 },
        [x, positions],
        float,
        dims([1, 1, 4, 8]),
    );
    let condition = net.input("condition", DType::Bool, dims([1, 1, 4, 8]));
    let chosen = net.layer(
        "select",
        LayerKind::Select,
        [condition, a, embedded],
        float,
        dims([1, 2, 4, 8]),
    );
    let gamma = net.constant("gamma", bytes_of(float, &[1, 1, 1, 8], |_| 0));
    let norm = LayerKind::Normalization {
        axes: vec![3],
        epsilon: 1e-5,
    };
    let n = net.layer("norm", norm, [chosen, gamma, gamma], float, dims([1, 2, 4, 8]));
    net.out(
        "wide",
        LayerKind::Cast { to: DType::F32 },
        [n],
        DType::F32,
        dims([1, 2, 4, 8]),
    );
    net
}

#[test]
fn every_kind_of_layer_builds_in_every_float_type() {
    for float in FLOATS {
        let net = every_kind(float);
        let kinds: BTreeSet<usize> = net.0.layers.iter().map(|layer| ordinal(&layer.kind)).collect();
        assert_eq!(kinds, (0..=20).collect(), "every kind of layer is in the network");
        let plan = build(&net).unwrap_or_else(|error| panic!("{float}: {error}"));
        assert!(plan.bytes().len() > 1000);
    }
}

#[test]
fn the_same_network_gives_the_same_plan() {
    let plan = || build(&every_kind(DType::F16)).unwrap();
    assert!(plan().bytes() == plan().bytes(), "packages are reproducible");
}

#[test]
fn every_operation_builds_in_every_type_that_has_it() {
    let mut net = Net::fixed();
    for float in FLOATS {
        let a = net.input(&format!("a.{float}"), float, dims([2, 3]));
        let b = net.input(&format!("b.{float}"), float, dims([1, 3]));
        use Elementwise::*;
        for op in [Sum, Sub, Prod, Div, Pow, Max, Min, FloorDiv] {
            net.out(
                &format!("{op:?}.{float}"),
                LayerKind::Elementwise(op),
                [a, b],
                float,
                dims([2, 3]),
            );
        }
        for op in [Equal, Greater, Less] {
            let kind = LayerKind::Elementwise(op);
            net.out(&format!("{op:?}.{float}"), kind, [a, b], DType::Bool, dims([2, 3]));
        }
        use UnaryOp::*;
        for op in [Abs, Ceil, Cos, Erf, Exp, Floor, Log, Neg, Recip, Round, Sign, Sin, Sqrt] {
            net.out(
                &format!("{op:?}.{float}"),
                LayerKind::Unary(op),
                [a],
                float,
                dims([2, 3]),
            );
        }
        net.out(
            &format!("nan.{float}"),
            LayerKind::Unary(IsNan),
            [a],
            DType::Bool,
            dims([2, 3]),
        );
        use Activation::*;
        for op in [Relu, Sigmoid, Tanh, GeluErf, GeluTanh, Softplus] {
            net.out(
                &format!("{op:?}.{float}"),
                LayerKind::Activation(op),
                [a],
                float,
                dims([2, 3]),
            );
        }
        for op in [
            ReduceOp::Sum,
            ReduceOp::Prod,
            ReduceOp::Max,
            ReduceOp::Min,
            ReduceOp::Avg,
        ] {
            let kind = |keep_dims| LayerKind::Reduce {
                op,
                axes: vec![0],
                keep_dims,
            };
            net.out(&format!("kept.{op:?}.{float}"), kind(true), [a], float, dims([1, 3]));
            net.out(&format!("gone.{op:?}.{float}"), kind(false), [a], float, dims([3]));
        }
    }
    build(&net).unwrap();
}

#[test]
fn integers_bools_and_casts_build() {
    let mut net = Net::fixed();
    for int in [DType::I32, DType::I64] {
        let a = net.input(&format!("a.{int}"), int, dims([2, 3]));
        let b = net.constant(
            &format!("b.{int}"),
            bytes_of(int, &[1, 3], |i| u8::from(i % int.element_bytes() == 0)),
        );
        use Elementwise::*;
        for op in [Sum, Sub, Prod, Div, Max, Min, FloorDiv] {
            net.out(
                &format!("{op:?}.{int}"),
                LayerKind::Elementwise(op),
                [a, b],
                int,
                dims([2, 3]),
            );
        }
        for op in [Equal, Greater, Less] {
            let kind = LayerKind::Elementwise(op);
            net.out(&format!("{op:?}.{int}"), kind, [a, b], DType::Bool, dims([2, 3]));
        }
        let iota = LayerKind::Fill {
            length: 5usize.into(),
            start: 2.0,
            step: 3.0,
        };
        net.out(&format!("iota.{int}"), iota, [], int, dims([5]));
        let table = net.input(&format!("table.{int}"), DType::F16, dims([9, 4]));
        net.out(
            &format!("rows.{int}"),
            LayerKind::Gather { axis: 0 },
            [table, a],
            DType::F16,
            dims([2, 3, 4]),
        );
    }
    let p = net.input("p", DType::Bool, dims([2, 3]));
    let q = net.constant(
        "q",
        Tensor::from_bool(vec![2, 3], &[true, false, true, false, true, false]),
    );
    for op in [Elementwise::And, Elementwise::Or, Elementwise::Xor] {
        net.out(
            &format!("{op:?}"),
            LayerKind::Elementwise(op),
            [p, q],
            DType::Bool,
            dims([2, 3]),
        );
    }
    let types = [DType::F32, DType::F16, DType::Bf16, DType::I32, DType::I64, DType::Bool];
    for from in types {
        let x = net.input(&format!("from.{from}"), from, dims([2]));
        for to in types.into_iter().filter(|to| *to != from) {
            net.out(&format!("{from}.{to}"), LayerKind::Cast { to }, [x], to, dims([2]));
        }
    }
    build(&net).unwrap();
}

#[test]
fn matrix_multiplies_transpose_and_broadcast_as_told() {
    let mut net = Net::fixed();
    let operands = [(MatrixOp::None, [2, 3, 4]), (MatrixOp::Transpose, [2, 4, 3])];
    for (op_a, a) in operands {
        for (op_b, b) in [(MatrixOp::None, [1, 4, 5]), (MatrixOp::Transpose, [1, 5, 4])] {
            let name = format!("{op_a:?}.{op_b:?}");
            let a = net.input(&format!("a.{name}"), DType::F16, dims(a));
            let b = net.input(&format!("b.{name}"), DType::F16, dims(b));
            let kind = LayerKind::MatrixMultiply { op_a, op_b };
            net.out(&name, kind, [a, b], DType::F16, dims([2, 3, 5]));
        }
    }
    build(&net).unwrap();
}

#[test]
fn attention_groups_masks_and_partial_rotary_build() {
    let mut net = Net::fixed();
    for (i, (heads, kv_heads, tokens, d)) in [(4, 4, 1, 16), (6, 2, 1, 32), (32, 4, 4, 64), (6, 2, 4, 128)]
        .into_iter()
        .enumerate()
    {
        let q = net.input(&format!("q.{i}"), DType::F16, dims([1, heads, tokens, d]));
        let k = net.input(&format!("k.{i}"), DType::F16, dims([1, kv_heads, 32, d]));
        let v = net.input(&format!("v.{i}"), DType::F16, dims([1, kv_heads, 32, d]));
        let attend = net.input(&format!("attend.{i}"), DType::Bool, dims([1, 1, tokens, 32]));
        let added = net.input(&format!("added.{i}"), DType::F16, dims([1, heads, tokens, 32]));
        let out = dims([1, heads, tokens, d]);
        net.out(
            &format!("bool.{i}"),
            LayerKind::Attention,
            [q, k, v, attend],
            DType::F16,
            out.clone(),
        );
        net.out(
            &format!("float.{i}"),
            LayerKind::Attention,
            [q, k, v, added],
            DType::F16,
            out.clone(),
        );
        net.out(
            &format!("all.{i}"),
            LayerKind::Attention,
            [q, k, v],
            DType::F16,
            out.clone(),
        );
        let positions = net.input(&format!("positions.{i}"), DType::I32, dims([1, tokens]));
        for (interleaved, rotary_dim) in [(false, d / 2), (true, d)] {
            let table = vec![64, rotary_dim as usize / 2];
            let name = format!("rope.{i}.{interleaved}");
            let cos = net.constant(&format!("{name}.cos"), bytes_of(DType::F16, &table, |_| 1));
            let sin = net.constant(&format!("{name}.sin"), bytes_of(DType::F16, &table, |_| 1));
            let kind = LayerKind::RotaryEmbedding {
                interleaved,
                rotary_dim: rotary_dim as usize,
            };
            net.out(&name, kind, [q, cos, sin, positions], DType::F16, out.clone());
        }
    }
    build(&net).unwrap();
}
