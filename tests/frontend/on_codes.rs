//! Operators on codes, `QLinear..` and `QGemm`: each against its definition, and refusals.

use lapidary::graph::Graph;
use lapidary::onnx::proto::{NodeProto, TensorProto};
use lapidary::tensor::Tensor;

use crate::quantized::{FLOAT, INT8, INT32, UINT8, close, floats, node, raw, read, run};

const X: (f64, f64) = (0.02, 100.0);
const Y: (f64, f64) = (0.013, 90.0);
const B: (f64, f64) = (0.05, 7.0);

fn x() -> Vec<f32> {
    (0..8).map(|i| (i as f32 - 3.3) * 0.37).collect()
}

/// The values of the nearest u8 codes.
fn rounded(values: &[f64], (scale, zero): (f64, f64)) -> Vec<f64> {
    let scale = f64::from(scale as f32);
    let near = |v: &f64| ((v / scale).round_ties_even() + zero).clamp(0.0, 255.0) - zero;
    values.iter().map(|v| near(v) * scale).collect()
}

fn wide(values: &[f32]) -> Vec<f64> {
    values.iter().copied().map(f64::from).collect()
}

/// Scales and zero points of x, y and b, and codes of b of `[8]`.
fn constants() -> Vec<TensorProto> {
    let number = |name: &str, value: f64| floats(name, &[], &[value as f32]);
    let zero = |name: &str, value: f64| raw(name, UINT8, &[], vec![value as u8]);
    vec![
        number("xs", X.0),
        zero("xz", X.1),
        number("ys", Y.0),
        zero("yz", Y.1),
        number("bs", B.0),
        zero("bz", B.1),
        raw("b", UINT8, &[8], (0..8).map(|i| i * 9 % 17).collect()),
        raw("mask", 9, &[8], (0..8).map(|i| i % 3 / 2).collect()),
    ]
}

fn b() -> Vec<f64> {
    (0..8)
        .map(|i| (f64::from(i * 9 % 17) - B.1) * f64::from(B.0 as f32))
        .collect()
}

/// `operator` between `QuantizeLinear` and `DequantizeLinear`.
fn between(operator: NodeProto, more: Vec<TensorProto>) -> Result<Graph, lapidary::onnx::ReadError> {
    let nodes = vec![
        node("", "QuantizeLinear", &["x", "xs", "xz"], &["a"], &[]),
        operator,
        node("", "DequantizeLinear", &["c", "ys", "yz"], &["y"], &[]),
    ];
    read((FLOAT, &[1, 8]), nodes, [constants(), more].concat())
}

fn found(graph: &Graph) -> Vec<f32> {
    run(graph, Tensor::from_f32(vec![1, 8], &x()))
}

/// Operator, inputs, integer attributes, output.
type Case = (
    &'static str,
    Vec<&'static str>,
    &'static [(&'static str, i64)],
    Vec<f64>,
);

#[test]
fn elementwise_operators_give_codes() {
    let near = rounded(&wide(&x()), X);
    let exponentials: Vec<f64> = near.iter().map(|v| v.exp()).collect();
    let sum: f64 = exponentials.iter().sum();
    let both = ["a", "xs", "xz", "b", "bs", "bz", "ys", "yz"];
    let alone = ["a", "xs", "xz", "ys", "yz"];
    let with_b = |f: fn(f64, f64) -> f64| near.iter().zip(b()).map(|(a, b)| f(*a, b)).collect::<Vec<f64>>();
    let of_mask = near.iter().zip(b()).enumerate();
    let chosen: Vec<f64> = of_mask.map(|(i, (a, b))| if i % 3 == 2 { *a } else { b }).collect();
    let cases: [Case; 5] = [
        ("QLinearAdd", both.to_vec(), &[], with_b(|a, b| a + b)),
        ("QLinearMul", both.to_vec(), &[], with_b(|a, b| a * b)),
        (
            "QLinearSigmoid",
            alone.to_vec(),
            &[],
            near.iter().map(|v| 1.0 / (1.0 + (-v).exp())).collect(),
        ),
        (
            "QLinearSoftmax",
            alone.to_vec(),
            &[("axis", 1), ("opset", 13)],
            exponentials.iter().map(|v| v / sum).collect(),
        ),
        (
            "QLinearWhere",
            vec!["mask", "a", "xs", "xz", "b", "bs", "bz", "ys", "yz"],
            &[],
            chosen,
        ),
    ];
    for (name, inputs, attributes, exact) in cases {
        let operator = node("com.microsoft", name, &inputs, &["c"], attributes);
        let graph = between(operator, Vec::new()).unwrap();
        let expected = rounded(&exact, Y);
        assert!(expected.iter().any(|v| *v != expected[0]), "{name}: {expected:?}");
        close(&found(&graph), &expected, name);
    }
    // Both operands one after the other.
    let inputs = ["ys", "yz", "a", "xs", "xz", "b1", "bs", "bz"];
    let operator = node("com.microsoft", "QLinearConcat", &inputs, &["c"], &[("axis", 1)]);
    let more = raw("b1", UINT8, &[1, 8], (0..8).map(|i| i * 9 % 17).collect());
    let graph = between(operator, vec![more]).unwrap();
    close(&found(&graph), &rounded(&[near, b()].concat(), Y), "QLinearConcat");
}

#[test]
fn a_product_with_an_integer_bias() {
    let near = rounded(&wide(&x()), X);
    let codes: Vec<i8> = (0..32).map(|i| (i * 11 % 31) as i8 - 15).collect();
    let bytes: Vec<u8> = codes.iter().map(|c| *c as u8).collect();
    let bias = [40i32, -300, 7, 111];
    let alpha = 1.5f64;
    let scales = [0.01f32, 0.02, 0.03, 0.005];
    let zeros = [3i8, -2, 0, 1];
    for (transposed, columns) in [(false, 4usize), (true, 4), (true, 1)] {
        let of = |n: usize| if columns == 1 { 0 } else { n };
        let at = |k: usize, n: usize| f64::from(codes[if transposed { n * 8 + k } else { k * 4 + n }]);
        let mut exact: Vec<f64> = Vec::new();
        for n in 0..4 {
            let (scale, zero) = (f64::from(scales[of(n)]), f64::from(zeros[of(n)]));
            let sum: f64 = (0..8).map(|k| near[k] * (at(k, n) - zero) * scale).sum();
            exact.push(alpha * (sum + f64::from(bias[n]) * f64::from(X.0 as f32) * scale));
        }
        let dims: &[i64] = if columns == 1 { &[] } else { &[4] };
        let shape: &[i64] = if transposed { &[4, 8] } else { &[8, 4] };
        let mut alpha_attribute = node(
            "com.microsoft",
            "QGemm",
            &[],
            &["c"],
            &[("transB", i64::from(transposed))],
        );
        alpha_attribute.attribute.push(lapidary::onnx::proto::AttributeProto {
            name: Some("alpha".to_string()),
            r#type: Some(lapidary::onnx::proto::attribute_type::FLOAT),
            f: Some(alpha as f32),
            ..Default::default()
        });
        let more = vec![
            raw("w", INT8, shape, bytes.clone()),
            floats("ws", dims, &scales[..columns]),
            raw("wz", INT8, dims, zeros[..columns].iter().map(|z| *z as u8).collect()),
            raw("bias", INT32, &[4], bias.iter().flat_map(|v| v.to_le_bytes()).collect()),
        ];
        let with = |inputs: &[&str]| {
            let mut operator = alpha_attribute.clone();
            operator.input = inputs.iter().map(|s| s.to_string()).collect();
            operator
        };
        let inputs = ["a", "xs", "xz", "w", "ws", "wz", "bias", "ys", "yz"];
        let graph = between(with(&inputs), more.clone()).unwrap();
        close(&found(&graph), &rounded(&exact, Y), "QGemm of codes");
        // Without a scale for the result it gives floats.
        let mut operator = with(&inputs[..7]);
        operator.output = vec!["y".to_string()];
        let nodes = vec![node("", "QuantizeLinear", &["x", "xs", "xz"], &["a"], &[]), operator];
        let graph = read((FLOAT, &[1, 8]), nodes, [constants(), more].concat()).unwrap();
        close(&found(&graph), &exact, "QGemm of floats");
    }
}

#[test]
fn operators_on_codes_that_are_malformed_or_not_known() {
    let concat = |inputs: &[&str]| {
        between(
            node("com.microsoft", "QLinearConcat", inputs, &["c"], &[("axis", 1)]),
            vec![],
        )
    };
    let text = concat(&["ys", "yz", "a", "xs"]).unwrap_err().to_string();
    assert!(
        text.contains("QLinearConcat_node") && text.contains("it has 4 inputs"),
        "{text}"
    );
    let gemm = |bias: TensorProto| {
        let inputs = ["a", "xs", "xz", "w", "ws", "wz", "bias", "ys", "yz"];
        let more = vec![
            raw("w", INT8, &[8, 4], vec![1; 32]),
            floats("ws", &[4], &[0.1; 4]),
            raw("wz", INT8, &[4], vec![0; 4]),
            bias,
        ];
        between(node("com.microsoft", "QGemm", &inputs, &["c"], &[]), more)
    };
    let text = gemm(floats("bias", &[4], &[0.0; 4])).unwrap_err().to_string();
    assert!(
        text.contains("QGemm_node") && text.contains("its bias is f32"),
        "{text}"
    );
    let text = gemm(raw("bias", INT32, &[3], vec![0; 12])).unwrap_err().to_string();
    assert!(
        text.contains("its bias has the shape [3], and b has 4 scales"),
        "{text}"
    );
    // Before opset 13 a softmax merged axes.
    let alone = ["a", "xs", "xz", "ys", "yz"];
    for (operator, name) in [
        (
            node(
                "com.microsoft",
                "QLinearSoftmax",
                &alone,
                &["c"],
                &[("axis", 0), ("opset", 11)],
            ),
            "com.microsoft::QLinearSoftmax(opset=11, axis=0)",
        ),
        (
            node("com.microsoft", "QLinearLeakyRelu", &alone, &["c"], &[]),
            "com.microsoft::QLinearLeakyRelu",
        ),
        (
            node("com.microsoft", "QAttention", &alone, &["c"], &[]),
            "com.microsoft::QAttention",
        ),
    ] {
        let graph = between(operator, Vec::new()).unwrap();
        let names: Vec<String> = graph.node_ids().map(|id| graph.node(id).op.name()).collect();
        assert!(names.iter().any(|found| found == name), "{names:?}");
    }
}
