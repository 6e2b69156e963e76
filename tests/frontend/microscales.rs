//! Weights of the microscaling formats (MXFP8, MXFP4: codes in blocks of 32 with f8e8m0 scales) and of 2 bits, as
//! written in opsets 24 and 25: their values, unchanged writing, and refusals.

use lapidary::graph::{Constant, Graph, infer};
use lapidary::onnx::proto::TensorProto;
use lapidary::onnx::{self, ReadError};
use lapidary::tensor::{DType, Tensor};

use crate::quantized::{FLOAT, close, codes_of, floats, node, packed, raw, read_at, row, run, times};

const FLOAT8E4M3FN: i32 = 17;
const FLOAT8E5M2: i32 = 19;
const FLOAT4E2M1: i32 = 23;
const FLOAT8E8M0: i32 = 24;
const UINT2: i32 = 25;
const INT2: i32 = 26;

/// `x · DequantizeLinear(codes, scales)` of opset 25, with a weight `[depth, columns]` in blocks along the depth.
fn product(
    depth: i64,
    columns: i64,
    size: i64,
    tensors: Vec<TensorProto>,
    output: Option<i64>,
) -> Result<Graph, ReadError> {
    let mut attributes = vec![("axis", 0), ("block_size", size)];
    attributes.extend(output.map(|dtype| ("output_dtype", dtype)));
    let inputs: Vec<&str> = ["codes", "scales", "zeros"].into_iter().take(tensors.len()).collect();
    let nodes = vec![
        node("", "DequantizeLinear", &inputs, &["w"], &attributes),
        node("", "MatMul", &["x", "w"], &["y"], &[]),
    ];
    read_at(25, (FLOAT, &[1, depth]), nodes, tensors)
        .inspect(|graph| assert_eq!(graph.value(graph.outputs[0]).name, "y", "{columns} columns"))
}

/// The number of a code, by the format's definition: sign, exponent, mantissa.
fn number(code: u8, exponent: u32, mantissa: u32) -> f64 {
    let bits = exponent + mantissa;
    let sign = if code >> bits & 1 == 1 { -1.0 } else { 1.0 };
    let field = i32::from(code >> mantissa & ((1 << exponent) - 1) as u8);
    let part = f64::from(code & ((1 << mantissa) - 1) as u8) / f64::from(1 << mantissa);
    let bias = (1 << (exponent - 1)) - 1;
    sign * match field {
        0 => part * 2f64.powi(1 - bias),
        _ => (1.0 + part) * 2f64.powi(field - bias),
    }
}

struct Mx {
    graph: Graph,
    weight: Vec<Vec<f64>>,
}

/// A weight of 96 inputs, three blocks, and 3 columns.
fn mx(code: i32, exponent: u32, mantissa: u32) -> Mx {
    let (depth, columns) = (96, 3);
    let bits = 1 + exponent + mantissa;
    let mask = (1u32 << bits) - 1;
    // No NaN and no infinities, unlike fp8.
    let finite = |code: u8| number(code, exponent, mantissa).abs() < 300.0;
    let all = (0u32..)
        .map(|i| ((i * 37 + i / 7) & mask) as u8)
        .filter(|code| finite(*code));
    let codes: Vec<u8> = all.take(depth * columns).collect();
    let scales: Vec<u8> = (0..9).map(|i| 120 + i * 5 % 11).collect();
    let packed = if bits == 4 {
        packed(std::slice::from_ref(&codes), 4)
    } else {
        codes.clone()
    };
    let tensors = vec![
        raw("codes", code, &[depth as i64, columns as i64], packed),
        raw("scales", FLOAT8E8M0, &[3, columns as i64], scales.clone()),
    ];
    let graph = product(depth as i64, columns as i64, 32, tensors, Some(i64::from(FLOAT))).unwrap();
    let scale = |k: usize, n: usize| 2f64.powi(i32::from(scales[k / 32 * columns + n]) - 127);
    let entry = |n: usize, k: usize| number(codes[k * columns + n], exponent, mantissa) * scale(k, n);
    let weight = (0..columns)
        .map(|n| (0..depth).map(|k| entry(n, k)).collect())
        .collect();
    Mx { graph, weight }
}

/// The quantized weight of a graph.
fn weight(graph: &Graph) -> &Constant {
    let mut all = graph.value_ids().filter_map(|id| graph.constant(id));
    all.find(|constant| constant.as_quantized().is_some()).unwrap()
}

#[test]
fn blocks_with_powers_of_two_as_scales() {
    for (code, exponent, mantissa, dtype) in [
        (FLOAT8E4M3FN, 4, 3, DType::F8E4M3Fn),
        (FLOAT8E5M2, 5, 2, DType::F8E5M2),
        (FLOAT4E2M1, 2, 1, DType::F4E2M1),
    ] {
        let Mx {
            mut graph,
            weight: means,
        } = mx(code, exponent, mantissa);
        assert_eq!(codes_of(&graph), dtype);
        let parts = weight(&graph).as_quantized().unwrap().to_string();
        assert_eq!(
            parts,
            format!("{dtype} in blocks of 32 on axis 0 with scales of f8e8m0 per tensor")
        );
        let x = row(96);
        let found = run(&graph, Tensor::from_f32(vec![1, 96], &x));
        close(&found, &times(&x, &means), dtype.name());

        // Written with unchanged scales, and read again.
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("written.onnx");
        infer(&mut graph).unwrap();
        onnx::write(&graph, &path, None).unwrap();
        let again = onnx::read(&path).unwrap();
        assert_eq!(run(&again, Tensor::from_f32(vec![1, 96], &x)), found);
        assert_eq!(weight(&again).as_quantized().unwrap().to_string(), parts);
        let model: onnx::proto::ModelProto = prost::Message::decode(&*std::fs::read(&path).unwrap()).unwrap();
        let written = model.graph.unwrap();
        let kinds: Vec<i32> = written.initializer.iter().map(|t| t.data_type()).collect();
        assert_eq!(kinds.iter().filter(|kind| **kind == FLOAT8E8M0).count(), 1);
        let nodes: Vec<_> = written
            .node
            .iter()
            .filter(|n| n.op_type() == "DequantizeLinear")
            .collect();
        assert_eq!(nodes.len(), 1);
        let attributes: Vec<&str> = nodes[0].attribute.iter().map(|a| a.name()).collect();
        assert_eq!(attributes, ["axis", "block_size", "output_dtype"]);
    }
}

#[test]
fn codes_of_two_bits() {
    let (depth, columns, size) = (48, 4, 16);
    let codes: Vec<u8> = (0..depth * columns).map(|i| (i * 7 + i / 3) as u8 & 3).collect();
    let scales: Vec<f32> = (0..12).map(|i| 0.25 + i as f32 / 8.0).collect();
    let zeros: Vec<u8> = (0..12).map(|i| i % 4).collect();
    for signed in [false, true] {
        let value = |code: u8| match signed {
            true => f64::from(((code as i8) << 6) >> 6),
            false => f64::from(code),
        };
        let kind = if signed { INT2 } else { UINT2 };
        let all = |codes: &Vec<u8>| packed(std::slice::from_ref(codes), 2);
        let mut tensors = vec![
            raw("codes", kind, &[depth as i64, columns as i64], all(&codes)),
            floats("scales", &[3, columns as i64], &scales),
        ];
        if !signed {
            tensors.push(raw("zeros", kind, &[3, columns as i64], all(&zeros)));
        }
        let graph = product(depth as i64, columns as i64, size, tensors, None).unwrap();
        assert_eq!(codes_of(&graph), if signed { DType::I2 } else { DType::U2 });
        let at = |k: usize, n: usize| k / 16 * columns + n;
        let zero = |k: usize, n: usize| if signed { 0.0 } else { f64::from(zeros[at(k, n)]) };
        let entry = |n: usize, k: usize| (value(codes[k * columns + n]) - zero(k, n)) * f64::from(scales[at(k, n)]);
        let weight: Vec<Vec<f64>> = (0..columns)
            .map(|n| (0..depth).map(|k| entry(n, k)).collect())
            .collect();
        let x = row(depth);
        let found = run(&graph, Tensor::from_f32(vec![1, depth], &x));
        close(&found, &times(&x, &weight), kind.to_string().as_str());
    }
}

#[test]
fn microscales_that_mean_nothing() {
    let codes = || raw("codes", FLOAT8E4M3FN, &[32, 2], vec![0x38; 64]);
    let scales = |dims: &[i64], bytes: Vec<u8>| raw("scales", FLOAT8E8M0, dims, bytes);
    let text = |found: Result<Graph, ReadError>| found.map(drop).unwrap_err().to_string();
    let two = || scales(&[1, 2], vec![127; 2]);
    let found = text(product(32, 2, 32, vec![codes(), two()], None));
    assert!(
        found.contains("DequantizeLinear_node") && found.contains("no output_dtype"),
        "{found}"
    );
    let found = text(product(
        32,
        2,
        32,
        vec![codes(), scales(&[2, 2], vec![127; 4])],
        Some(1),
    ));
    assert!(found.contains("[2, 2]") && found.contains("[1, 2]"), "{found}");
    let powers = raw("codes", FLOAT8E8M0, &[32, 2], vec![127; 64]);
    let found = text(product(
        32,
        2,
        32,
        vec![powers, floats("scales", &[1, 2], &[1.0; 2])],
        None,
    ));
    assert!(
        found.contains("its codes are f8e8m0, a type for scales only"),
        "{found}"
    );
    let found = text(product(
        40,
        2,
        32,
        vec![
            raw("codes", FLOAT8E4M3FN, &[40, 2], vec![0x38; 80]),
            scales(&[2, 2], vec![127; 4]),
        ],
        Some(1),
    ));
    assert!(found.contains("blocks of 32 do not divide axis 0"), "{found}");
    // 255 is NaN.
    let graph = product(32, 2, 32, vec![codes(), scales(&[1, 2], vec![127, 255])], Some(1)).unwrap();
    let checked = weight(&graph).as_quantized().unwrap().check_values().unwrap();
    let message = checked.unwrap_err().to_string();
    assert!(message.contains("index 1") && message.contains("NaN"), "{message}");
}
