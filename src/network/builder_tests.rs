//! The builder, the rules it enforces, the verifier and the dump, on small networks.

use super::*;
use crate::dim::Sym;
use crate::graph::Constant;
use crate::tensor::DType;

fn dims(text: &str) -> Shape {
    text.split_whitespace().map(Dim::parse).collect()
}

fn decode() -> NetworkBuilder {
    NetworkBuilder::new("test", Profile::decode(8))
}

fn fault(result: Result<TensorId, BuildError>) -> LayerFault {
    match result {
        Err(BuildError::Layer(error)) => error.fault,
        other => panic!("expected a fault of the layer, got {other:?}"),
    }
}

#[test]
fn layers_infer_their_outputs() {
    let mut b = NetworkBuilder::new(
        "test",
        Profile {
            tokens: Tokens::Dynamic { min: 1, opt: 4, max: 8 },
            ..Profile::decode(8)
        },
    );
    let x = b.input("x", DType::F16, &dims("1 tokens 64")).unwrap();
    let w = b
        .weight("w", Constant::absent(DType::F16, vec![128, 64]), WeightMode::Bind)
        .unwrap();
    let w3 = b.raise("w3", w, 3).unwrap();
    let y = b.linear("y", x, w3).unwrap();
    assert_eq!(*b.shape(y), dims("1 tokens 128"));
    let heads = LayerKind::Shuffle {
        first: None,
        reshape: Some(dims("1 tokens 4 32")),
        second: Some(vec![0, 2, 1, 3]),
    };
    let heads = b.add("heads", heads, &[y]).unwrap();
    assert_eq!(*b.shape(heads), dims("1 4 tokens 32"));
    let ids = b.input("ids", DType::I32, &dims("1 tokens")).unwrap();
    let rows = b.add("rows", LayerKind::Gather { axis: 0 }, &[w, ids]).unwrap();
    assert_eq!(*b.shape(rows), dims("1 tokens 64"));
    let more = b.add("more", LayerKind::Concatenation { axis: 1 }, &[rows, x]).unwrap();
    assert_eq!(*b.shape(more), dims("1 2*tokens 64"));
    let greater = b.elementwise("greater", Elementwise::Greater, x, rows).unwrap();
    assert_eq!(b.dtype(greater), DType::Bool);
    let expanded = LayerKind::Slice {
        start: vec![0; 3],
        size: dims("1 tokens 64"),
        stride: vec![1, 1, 0],
    };
    let column = b.input("column", DType::F32, &dims("1 tokens 1")).unwrap();
    let expanded = b.add("expanded", expanded, &[column]).unwrap();
    assert_eq!(*b.shape(expanded), dims("1 tokens 64"));
}

#[test]
fn mistakes_name_the_layer_its_inputs_and_the_rule() {
    let mut b = decode();
    let x = b.input("x", DType::F16, &dims("2 3")).unwrap();
    let y = b.input("y", DType::F16, &dims("2 4")).unwrap();
    let wide = b.input("wide", DType::F32, &dims("2 3")).unwrap();
    let row = b.input("row", DType::F16, &dims("3")).unwrap();
    let ids = b.input("ids", DType::I32, &dims("2 3")).unwrap();

    let error = b.elementwise("sum", Elementwise::Sum, x, y).unwrap_err().to_string();
    assert_eq!(
        error,
        "layer \"sum\" (Elementwise): dims 3 and 4 of axis 1 do not broadcast: only a 1 does; \
         inputs: \"x\" f16[2, 3], \"y\" f16[2, 4]"
    );
    let sum = |b: &mut NetworkBuilder, left, right| fault(b.elementwise("sum", Elementwise::Sum, left, right));
    assert_eq!(sum(&mut b, x, wide), LayerFault::UnlikeDTypes { left: 0, right: 1 });
    assert_eq!(sum(&mut b, x, row), LayerFault::UnlikeRanks { left: 0, right: 1 });
    assert!(matches!(fault(b.linear("mm", x, y)), LayerFault::Contraction { .. }));
    assert!(matches!(
        fault(b.unary("neg", UnaryOp::Neg, ids)),
        LayerFault::DType { .. }
    ));
    assert!(matches!(fault(b.reshape("r", x, dims("7"))), LayerFault::Volume { .. }));
    // More elements than an i64 counts.
    let huge = dims("4294967296 4294967296");
    assert!(matches!(fault(b.reshape("r", x, huge)), LayerFault::Volume { .. }));
    assert!(matches!(
        fault(b.transpose("t", x, &[0, 0])),
        LayerFault::Permutation { .. }
    ));
    let beyond = LayerKind::Slice {
        start: vec![0, 1],
        size: dims("2 3"),
        stride: vec![1, 1],
    };
    assert!(matches!(
        fault(b.add("s", beyond, &[x])),
        LayerFault::Slice { axis: 1, .. }
    ));
    assert!(matches!(
        fault(b.add("g", LayerKind::Gather { axis: 2 }, &[x, ids])),
        LayerFault::Axis { .. }
    ));
    assert!(matches!(
        fault(b.add("c", LayerKind::Cast { to: DType::F64 }, &[x])),
        LayerFault::Parameter(_)
    ));
    assert_eq!(b.input("x", DType::F32, &dims("1")), Err(BuildError::Name("x".into())));
    assert!(matches!(b.output("z", x), Err(BuildError::Output { .. })));
    let mut weight = |shape: &[usize]| b.weight("w", Constant::absent(DType::I8, shape.to_vec()), WeightMode::Bind);
    assert_eq!(weight(&[4, 8]), weight(&[4, 8]));
    let error = weight(&[4, 4]).unwrap_err().to_string();
    assert!(
        error.starts_with("the weight \"w\" is i8[4, 8], and a layer reads it as i8[4, 4]"),
        "{error}"
    );
}

#[test]
fn attention_masks_broadcast_over_batch_and_heads_only() {
    let mut b = decode();
    let q = b.input("q", DType::F32, &dims("2 4 3 16")).unwrap();
    let k = b.input("k", DType::F32, &dims("2 2 8 16")).unwrap();
    let good = b.input("good", DType::Bool, &dims("1 1 3 8")).unwrap();
    let bad = b.input("bad", DType::Bool, &dims("2 4 1 8")).unwrap();
    let y = b.add("a", LayerKind::Attention, &[q, k, k, good]).unwrap();
    assert_eq!(*b.shape(y), dims("2 4 3 16"));
    assert!(matches!(
        fault(b.add("a", LayerKind::Attention, &[q, k, k, bad])),
        LayerFault::Extent { .. }
    ));
    let odd = b.input("odd", DType::F32, &dims("2 3 8 16")).unwrap();
    assert!(
        fault(b.add("a", LayerKind::Attention, &[q, odd, odd]))
            .to_string()
            .contains("multiple")
    );
}

#[test]
fn names_are_unique_and_outputs_keep_theirs() {
    let mut b = decode();
    let x = b.input("x", DType::F32, &dims("1")).unwrap();
    let first = b.activation("logits", Activation::Relu, x).unwrap();
    let second = b.activation("logits", Activation::Tanh, first).unwrap();
    assert_eq!(b.network().tensor(second).name, "logits.1");
    b.output("logits", second).unwrap();
    let network = b.finish().unwrap();
    assert_eq!(network.tensor(second).name, "logits");
    assert_ne!(network.tensor(first).name, "logits");
}

#[test]
fn pruning_removes_what_no_output_needs() {
    let mut b = decode();
    let x = b.input("x", DType::F32, &dims("1 4")).unwrap();
    let dead = b
        .weight("dead", Constant::absent(DType::F32, vec![4, 4]), WeightMode::Bind)
        .unwrap();
    b.linear("unread", x, dead).unwrap();
    let live = b
        .weight("live", Constant::absent(DType::F32, vec![4, 4]), WeightMode::Embed)
        .unwrap();
    let y = b.linear("y", x, live).unwrap();
    b.output("y", y).unwrap();
    assert!(b.network().weights.len() == 2);
    let network = b.finish_pruned().unwrap();
    assert_eq!(
        network.to_string(),
        "network \"test\" for b1-t1-c8\n\
         weights\n  live f32[4, 4] embed\n\
         inputs\n  x f32[1, 4]\n\
         layers\n  y f32[1, 4] = MatrixMultiply(x, live^T)\n\
         outputs\n  y f32[1, 4]\n"
    );
}

/// A network with a cache; each case below breaks it in one way.
fn cached() -> Network {
    let mut b = decode();
    let cache = b.input("key_cache.0", DType::F32, &dims("1 2 8 4")).unwrap();
    let new = b.input("new", DType::F32, &dims("1 2 1 4")).unwrap();
    let at = b.input("at", DType::I32, &dims("1")).unwrap();
    let updated = b.add("update", LayerKind::KvCacheUpdate, &[cache, new, at]).unwrap();
    b.output("updated_key_cache.0", updated).unwrap();
    let y = b.activation("y", Activation::Relu, new).unwrap();
    b.output("y", y).unwrap();
    b.finish().unwrap()
}

#[test]
fn the_verifier_finds_each_broken_rule() {
    type Case = (fn(&mut Network), fn(&VerifyError) -> bool);
    let cases: Vec<Case> = vec![
        (
            |n| n.layers[1].inputs[0] = n.layers[1].outputs[0],
            |e| matches!(e, VerifyError::Order { .. }),
        ),
        (
            |n| n.layers[1].outputs[0] = n.layers[0].outputs[0],
            |e| matches!(e, VerifyError::Twice { .. }),
        ),
        (
            |n| n.layers[1].outputs.clear(),
            |e| matches!(e, VerifyError::Outputs { .. }),
        ),
        (
            |n| n.layers[1].inputs[0] = TensorId(99),
            |e| matches!(e, VerifyError::NoTensor { .. }),
        ),
        (
            |n| n.tensors[1].name = "at".into(),
            |e| matches!(e, VerifyError::Name { .. }),
        ),
        (
            |n| n.layers[1].name = "update".into(),
            |e| matches!(e, VerifyError::Name { .. }),
        ),
        (
            |n| n.tensors[4].dtype = DType::F16,
            |e| matches!(e, VerifyError::Stated { .. }),
        ),
        (
            |n| n.tensors[4].shape[0] = Dim::sym(Sym::tokens()),
            |e| matches!(e, VerifyError::Symbol { .. }),
        ),
        (
            |n| n.outputs.retain(|id| id.0 != 3),
            |e| matches!(e, VerifyError::Cache { .. }),
        ),
        (|n| n.outputs.clear(), |e| matches!(e, VerifyError::NoOutput)),
        (
            |n| n.profile.tokens = Tokens::Static(9),
            |e| matches!(e, VerifyError::Profile { .. }),
        ),
        (
            |n| {
                n.weights.push(Weight {
                    name: "w".into(),
                    constant: Constant::absent(DType::F32, vec![1]),
                    mode: WeightMode::Bind,
                });
            },
            |e| matches!(e, VerifyError::UnusedWeight(_)),
        ),
    ];
    verify(&cached()).unwrap();
    for (i, (spoil, expected)) in cases.into_iter().enumerate() {
        let mut network = cached();
        spoil(&mut network);
        let error = verify(&network).expect_err("a spoilt network");
        assert!(expected(&error), "case {i}: {error}");
    }
    assert!(matches!(
        verify_interface(&cached()),
        Err(VerifyError::NoInterface { .. })
    ));
}
