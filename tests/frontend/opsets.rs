//! Differences of opsets before 14 from later ones, each against its own formula.

use std::collections::HashMap;

use bytes::Bytes;
use lapidary::graph::eval::Evaluator;
use lapidary::graph::{Graph, infer};
use lapidary::onnx::proto::{
    AttributeProto, DimensionProto, GraphProto, ModelProto, NodeProto, OperatorSetIdProto, TensorProto,
    TensorShapeProto, TensorTypeProto, TypeProto, ValueInfoProto, attribute_type,
};
use lapidary::onnx::{self, ReadError};
use lapidary::tensor::Tensor;

fn attribute(name: &str, kind: i32) -> AttributeProto {
    AttributeProto {
        name: Some(name.to_string()),
        r#type: Some(kind),
        ..AttributeProto::default()
    }
}

fn int(name: &str, value: i64) -> AttributeProto {
    AttributeProto {
        i: Some(value),
        ..attribute(name, attribute_type::INT)
    }
}

fn ints(name: &str, values: &[i64]) -> AttributeProto {
    AttributeProto {
        ints: values.to_vec(),
        ..attribute(name, attribute_type::INTS)
    }
}

fn node(op: &str, inputs: &[&str], outputs: &[&str], attributes: Vec<AttributeProto>) -> NodeProto {
    NodeProto {
        input: inputs.iter().map(|s| s.to_string()).collect(),
        output: outputs.iter().map(|s| s.to_string()).collect(),
        name: Some(format!("{op}_node")),
        op_type: Some(op.to_string()),
        attribute: attributes,
        ..NodeProto::default()
    }
}

/// A graph from `x`, which has this shape, to `y`, of nodes of an opset.
fn read(opset: i64, shape: &[i64], nodes: Vec<NodeProto>) -> Result<Graph, ReadError> {
    let dim = shape.iter().map(|d| DimensionProto {
        dim_value: Some(*d),
        dim_param: None,
    });
    let typed = TypeProto {
        tensor_type: Some(TensorTypeProto {
            elem_type: Some(1),
            shape: Some(TensorShapeProto { dim: dim.collect() }),
        }),
    };
    let value = |name: &str, r#type: Option<TypeProto>| ValueInfoProto {
        name: Some(name.to_string()),
        r#type,
    };
    let import = |domain: &str, version| OperatorSetIdProto {
        domain: Some(domain.to_string()),
        version: Some(version),
    };
    let constant = |name: &str, data_type: i32, dims: &[i64], bytes: Vec<u8>| TensorProto {
        name: Some(name.to_string()),
        data_type: Some(data_type),
        dims: dims.to_vec(),
        raw_data: Some(Bytes::from(bytes)),
        ..TensorProto::default()
    };
    let weight: Vec<u8> = [1f32, -1.0, 0.5, 2.0].iter().flat_map(|v| v.to_le_bytes()).collect();
    let model = ModelProto {
        ir_version: Some(6),
        opset_import: vec![import("", opset), import("com.microsoft", 1)],
        graph: Some(GraphProto {
            name: Some("older".to_string()),
            node: nodes,
            initializer: vec![
                constant("one", 7, &[1], 1i64.to_le_bytes().to_vec()),
                constant("w", 1, &[2, 2], weight),
            ],
            input: vec![value("x", Some(typed))],
            output: vec![value("y", None)],
            ..GraphProto::default()
        }),
        ..ModelProto::default()
    };
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.onnx");
    std::fs::write(&path, prost::Message::encode_to_vec(&model)).unwrap();
    onnx::read(&path)
}

/// The shape and elements of `y`, for `x` of the numbers 0, 0.5, 1 ...
fn run(opset: i64, shape: &[usize], nodes: Vec<NodeProto>) -> (Vec<usize>, Vec<f32>) {
    let dims: Vec<i64> = shape.iter().map(|d| *d as i64).collect();
    let mut graph = read(opset, &dims, nodes).unwrap();
    infer(&mut graph).unwrap();
    let bindings = HashMap::from([(graph.inputs[0], Tensor::from_f32(shape.to_vec(), &numbers(shape)))]);
    let y = Evaluator::new(&graph, bindings).value(graph.outputs[0]).unwrap();
    (y.shape().to_vec(), y.to_f32())
}

fn numbers(shape: &[usize]) -> Vec<f32> {
    (0..shape.iter().product()).map(|i: usize| i as f32 / 2.0).collect()
}

fn unknown(opset: i64, nodes: Vec<NodeProto>) -> Vec<String> {
    let graph = read(opset, &[2, 2], nodes).unwrap();
    graph.node_ids().map(|id| graph.node(id).op.name()).collect()
}

#[test]
fn lists_are_attributes() {
    for opset in [11, 12] {
        let unsqueezed = run(
            opset,
            &[2, 3],
            vec![node("Unsqueeze", &["x"], &["y"], vec![ints("axes", &[0, 3])])],
        );
        assert_eq!(unsqueezed.0, [1, 2, 3, 1]);
        let squeeze = |axes: Vec<AttributeProto>| run(opset, &[1, 2, 1], vec![node("Squeeze", &["x"], &["y"], axes)]).0;
        assert_eq!(squeeze(vec![ints("axes", &[2])]), [1, 2]);
        assert_eq!(squeeze(vec![]), [2]);
        let (shape, sums) = run(
            opset,
            &[2, 3],
            vec![node(
                "ReduceSum",
                &["x"],
                &["y"],
                vec![ints("axes", &[1]), int("keepdims", 0)],
            )],
        );
        assert_eq!((shape, sums), (vec![2], vec![1.5, 6.0]));
        let parts = vec![
            node(
                "Split",
                &["x"],
                &["a", "b"],
                vec![int("axis", 1), ints("split", &[1, 2])],
            ),
            node("Mul", &["a", "b"], &["y"], vec![]),
        ];
        assert_eq!(run(opset, &[2, 3], parts), (vec![2, 2], vec![0.0, 0.0, 3.0, 3.75]));
    }
}

/// Softmax of each part of `n` elements.
fn softmax(x: &[f32], n: usize) -> Vec<f32> {
    let part = |x: &[f32]| {
        let sum: f32 = x.iter().map(|v| v.exp()).sum();
        x.iter().map(|v| v.exp() / sum).collect::<Vec<_>>()
    };
    x.chunks(n).flat_map(part).collect()
}

#[test]
fn a_softmax_is_over_all_axes_from_its_own_on() {
    let shape = [2, 2, 3];
    let x = numbers(&shape);
    let run = |opset: i64, op: &str, axis: Option<i64>| {
        let attributes = axis.map(|axis| int("axis", axis)).into_iter().collect();
        let (found, y) = run(opset, &shape, vec![node(op, &["x"], &["y"], attributes)]);
        assert_eq!(found, shape);
        y
    };
    // 0: all 12 elements; left out: axis 1 before opset 13, the last one since.
    for (opset, axis, n) in [
        (11, None, 6),
        (12, Some(1), 6),
        (12, Some(-2), 6),
        (11, Some(0), 12),
        (11, Some(2), 3),
        (12, Some(-1), 3),
        (13, None, 3),
        (13, Some(2), 3),
    ] {
        let expected = softmax(&x, n);
        let logs: Vec<f32> = expected.iter().map(|v| v.ln()).collect();
        for (op, expected) in [("Softmax", expected), ("LogSoftmax", logs)] {
            for (a, b) in run(opset, op, axis).iter().zip(&expected) {
                assert!(
                    (a - b).abs() < 1e-5,
                    "{op} of opset {opset}, axis {axis:?}: {a} and {b}"
                );
            }
        }
    }
}

#[test]
fn a_dropout_passes_everything_on() {
    let ratio = AttributeProto {
        f: Some(0.5),
        ..attribute("ratio", attribute_type::FLOAT)
    };
    let dropout = node("Dropout", &["x"], &["y"], vec![ratio.clone()]);
    assert_eq!(run(11, &[2, 2], vec![dropout.clone()]).1, numbers(&[2, 2]));
    assert_eq!(unknown(12, vec![dropout]), ["Dropout(ratio=0.5)"]);
}

#[test]
fn attributes_of_another_opset_are_named() {
    let squeeze = |inputs: &[&str]| vec![node("Squeeze", inputs, &["y"], vec![ints("axes", &[1])])];
    assert_eq!(unknown(13, squeeze(&["x"])), ["Squeeze(axes)"]);
    let error = |nodes| read(12, &[2, 1], nodes).unwrap_err().to_string();
    let both = error(squeeze(&["x", "one"]));
    assert!(both.contains("its axes are an attribute and an input"), "{both}");
    let missing = error(vec![node("Unsqueeze", &["x"], &["y"], vec![])]);
    assert!(missing.contains("its attribute \"axes\" is missing"), "{missing}");
}

#[test]
fn a_fused_gemm_has_its_activation_behind_it() {
    let fused = |activation: &str| {
        let text = AttributeProto {
            s: Some(Bytes::copy_from_slice(activation.as_bytes())),
            ..attribute("activation", attribute_type::STRING)
        };
        let mut fused = node("FusedGemm", &["x", "w"], &["y"], vec![text, int("transB", 1)]);
        fused.domain = Some("com.microsoft".to_string());
        vec![fused]
    };
    // x w' of [0, 0.5; 1, 1.5] and [1, -1; 0.5, 2]
    assert_eq!(run(12, &[2, 2], fused("Relu")).1, [0.0, 1.0, 0.0, 3.5]);
    let tanh: Vec<f32> = [-0.5f32, 1.0, -0.5, 3.5].iter().map(|v| v.tanh()).collect();
    assert_eq!(run(12, &[2, 2], fused("Tanh")).1, tanh);
    assert_eq!(
        unknown(12, fused("LeakyRelu")),
        ["com.microsoft::FusedGemm(activation=LeakyRelu)"]
    );
}
