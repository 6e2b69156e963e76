//! Quantized operators of exporters: each form against its own formula, and refusals.

use std::collections::HashMap;

use bytes::Bytes;
use lapidary::graph::eval::Evaluator;
use lapidary::graph::{Graph, Op};
use lapidary::onnx::proto::{
    AttributeProto, DimensionProto, GraphProto, ModelProto, NodeProto, OperatorSetIdProto, TensorProto,
    TensorShapeProto, TensorTypeProto, TypeProto, ValueInfoProto, attribute_type,
};
use lapidary::onnx::{self, ReadError};
use lapidary::tensor::{DType, Tensor};

use crate::nf4::NF4;

pub const FLOAT: i32 = 1;
pub const UINT8: i32 = 2;
pub const INT8: i32 = 3;
pub const INT32: i32 = 6;
pub const INT64: i32 = 7;
const UINT4: i32 = 21;
const INT4: i32 = 22;

/// An initializer of raw bytes.
pub fn raw(name: &str, code: i32, dims: &[i64], bytes: Vec<u8>) -> TensorProto {
    TensorProto {
        name: Some(name.to_string()),
        data_type: Some(code),
        dims: dims.to_vec(),
        raw_data: Some(Bytes::from(bytes)),
        ..TensorProto::default()
    }
}

pub fn floats(name: &str, dims: &[i64], values: &[f32]) -> TensorProto {
    raw(name, FLOAT, dims, values.iter().flat_map(|v| v.to_le_bytes()).collect())
}

fn int(name: &str, value: i64) -> AttributeProto {
    AttributeProto {
        name: Some(name.to_string()),
        r#type: Some(attribute_type::INT),
        i: Some(value),
        ..AttributeProto::default()
    }
}

pub fn node(domain: &str, op: &str, inputs: &[&str], outputs: &[&str], attributes: &[(&str, i64)]) -> NodeProto {
    NodeProto {
        input: inputs.iter().map(|s| s.to_string()).collect(),
        output: outputs.iter().map(|s| s.to_string()).collect(),
        name: Some(format!("{op}_node")),
        op_type: Some(op.to_string()),
        domain: Some(domain.to_string()).filter(|d| !d.is_empty()),
        attribute: attributes.iter().map(|(name, value)| int(name, *value)).collect(),
        overload: None,
    }
}

fn info(name: &str, code: i32, dims: &[i64]) -> ValueInfoProto {
    let dim = dims.iter().map(|d| DimensionProto {
        dim_value: Some(*d),
        dim_param: None,
    });
    ValueInfoProto {
        name: Some(name.to_string()),
        r#type: Some(TypeProto {
            tensor_type: Some(TensorTypeProto {
                elem_type: Some(code),
                shape: Some(TensorShapeProto { dim: dim.collect() }),
            }),
        }),
    }
}

/// A graph from `x` to `y`, read from a file.
pub fn read(x: (i32, &[i64]), nodes: Vec<NodeProto>, initializers: Vec<TensorProto>) -> Result<Graph, ReadError> {
    read_at(21, x, nodes, initializers)
}

/// The same for an opset.
pub fn read_at(
    version: i64,
    x: (i32, &[i64]),
    nodes: Vec<NodeProto>,
    initializers: Vec<TensorProto>,
) -> Result<Graph, ReadError> {
    let opset = |domain: &str, version| OperatorSetIdProto {
        domain: Some(domain.to_string()),
        version: Some(version),
    };
    let model = ModelProto {
        ir_version: Some(10),
        opset_import: vec![opset("", version), opset("com.microsoft", 1)],
        graph: Some(GraphProto {
            name: Some("quantized".to_string()),
            node: nodes,
            initializer: initializers,
            input: vec![info("x", x.0, x.1)],
            output: vec![info("y", FLOAT, &[1, 1])],
            ..GraphProto::default()
        }),
        ..ModelProto::default()
    };
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.onnx");
    std::fs::write(&path, prost::Message::encode_to_vec(&model)).unwrap();
    onnx::read(&path)
}

pub fn run(graph: &Graph, x: Tensor) -> Vec<f32> {
    let bindings = HashMap::from([(graph.inputs[0], x)]);
    Evaluator::new(graph, bindings)
        .value(graph.outputs[0])
        .unwrap()
        .to_f32()
}

/// Packed as ONNX Runtime packs codes of fewer than 8 bits: the first in the lowest bits, rows padded to bytes.
pub fn packed(rows: &[Vec<u8>], bits: usize) -> Vec<u8> {
    let each = 8 / bits;
    let byte = |codes: &[u8]| {
        codes
            .iter()
            .enumerate()
            .fold(0u8, |byte, (i, code)| byte | code << (i * bits))
    };
    rows.iter()
        .flat_map(|row| row.chunks(each).map(byte).collect::<Vec<u8>>())
        .collect()
}

/// A MatMulNBits node of `columns` by `depth`, and the weight `[columns][depth]` that it means.
struct NBits {
    depth: usize,
    columns: usize,
    size: usize,
    bits: usize,
    initializers: Vec<TensorProto>,
    inputs: Vec<&'static str>,
    weight: Vec<Vec<f64>>,
}

impl NBits {
    fn of(
        depth: usize,
        columns: usize,
        size: usize,
        bits: usize,
        zero_points: bool,
        groups: Option<&[usize]>,
    ) -> NBits {
        let blocks = depth.div_ceil(size);
        let top = 1usize << bits;
        let code = |n: usize, k: usize| (n * 7 + k * 5 + k / 3) % top;
        let scale = |n: usize, b: usize| 0.125 + (n * 3 + b * 2) as f32 / 16.0;
        let zero = |n: usize, b: usize| (n + 2 * b) % top;
        let rows: Vec<Vec<u8>> = (0..columns)
            .map(|n| (0..blocks * size).map(|k| code(n, k) as u8).collect())
            .collect();
        let scales: Vec<f32> = (0..columns)
            .flat_map(|n| (0..blocks).map(move |b| scale(n, b)))
            .collect();
        let shape = [columns as i64, blocks as i64, (size * bits / 8) as i64];
        let mut initializers = vec![
            raw("b", UINT8, &shape, packed(&rows, bits)),
            floats("scales", &[columns as i64, blocks as i64], &scales),
        ];
        let mut inputs = vec!["x", "b", "scales"];
        if zero_points {
            let rows: Vec<Vec<u8>> = (0..columns)
                .map(|n| (0..blocks).map(|b| zero(n, b) as u8).collect())
                .collect();
            let bytes = packed(&rows, bits);
            let width = bytes.len() / columns;
            initializers.push(raw("zeros", UINT8, &[columns as i64, width as i64], bytes));
            inputs.push("zeros");
        } else if groups.is_some() {
            inputs.push("");
        }
        if let Some(groups) = groups {
            let bytes = groups.iter().flat_map(|g| (*g as i32).to_le_bytes()).collect();
            initializers.push(raw("groups", INT32, &[depth as i64], bytes));
            inputs.push("groups");
        }
        let group = |k: usize| groups.map_or(k / size, |groups| groups[k]);
        let offset = |n: usize, b: usize| if zero_points { zero(n, b) } else { top / 2 };
        let value = |n: usize, k: usize| {
            let b = group(k);
            (code(n, k) as f64 - offset(n, b) as f64) * f64::from(scale(n, b))
        };
        let weight = (0..columns)
            .map(|n| (0..depth).map(|k| value(n, k)).collect())
            .collect();
        NBits {
            depth,
            columns,
            size,
            bits,
            initializers,
            inputs,
            weight,
        }
    }

    fn read(&self) -> Result<Graph, ReadError> {
        let attributes = [
            ("K", self.depth as i64),
            ("N", self.columns as i64),
            ("bits", self.bits as i64),
            ("block_size", self.size as i64),
            ("accuracy_level", 4),
        ];
        let product = node("com.microsoft", "MatMulNBits", &self.inputs, &["y"], &attributes);
        read(
            (FLOAT, &[1, self.depth as i64]),
            vec![product],
            self.initializers.clone(),
        )
    }
}

pub fn row(depth: usize) -> Vec<f32> {
    (0..depth).map(|k| ((k * 11) % 17) as f32 / 8.0 - 1.0).collect()
}

pub fn times(x: &[f32], weight: &[Vec<f64>]) -> Vec<f64> {
    let dot = |row: &Vec<f64>| row.iter().zip(x).map(|(w, x)| w * f64::from(*x)).sum();
    weight.iter().map(dot).collect()
}

pub fn close(found: &[f32], expected: &[f64], what: &str) {
    assert_eq!(found.len(), expected.len(), "{what}");
    for (found, expected) in found.iter().zip(expected) {
        let difference = (f64::from(*found) - expected).abs();
        assert!(
            difference <= 1e-5 * (1.0 + expected.abs()),
            "{what}: {found} and {expected}"
        );
    }
}

/// The type of the codes of the one quantized weight.
pub fn codes_of(graph: &Graph) -> DType {
    let quantized = graph.value_ids().find_map(|id| graph.constant(id)?.as_quantized());
    quantized.expect("a quantized weight").codes.dtype()
}

#[test]
fn blocks_of_two_four_and_eight_bits() {
    for bits in [2, 4, 8] {
        for (depth, size) in [(64, 16), (96, 32), (128, 128)] {
            for zero_points in [false, true] {
                let case = NBits::of(depth, 5, size, bits, zero_points, None);
                let graph = case.read().unwrap();
                let signed = [DType::I2, DType::I4, DType::I8][bits.trailing_zeros() as usize - 1];
                let unsigned = [DType::U2, DType::U4, DType::U8][bits.trailing_zeros() as usize - 1];
                assert_eq!(codes_of(&graph), if zero_points { unsigned } else { signed });
                let x = row(depth);
                let found = run(&graph, Tensor::from_f32(vec![1, depth], &x));
                close(
                    &found,
                    &times(&x, &case.weight),
                    &format!("{bits} bits, {depth}/{size}, {zero_points}"),
                );
            }
        }
    }
}

/// The last block of a row is padded in the file.
#[test]
fn a_depth_that_blocks_do_not_divide() {
    for (depth, size) in [(40, 32), (72, 16), (56, 64)] {
        for zero_points in [false, true] {
            let case = NBits::of(depth, 3, size, 4, zero_points, None);
            let x = row(depth);
            let found = run(&case.read().unwrap(), Tensor::from_f32(vec![1, depth], &x));
            close(
                &found,
                &times(&x, &case.weight),
                &format!("{depth}/{size}, {zero_points}"),
            );
        }
    }
}

/// Columns that belong to groups in any order, as with GPTQ's act-order.
#[test]
fn groups_in_any_order() {
    let even: Vec<usize> = (0..64).map(|k| (k * 3) % 4).collect();
    for zero_points in [false, true] {
        let case = NBits::of(64, 4, 16, 4, zero_points, Some(&even));
        let x = row(64);
        let found = run(&case.read().unwrap(), Tensor::from_f32(vec![1, 64], &x));
        close(&found, &times(&x, &case.weight), "g_idx");
    }
    let plain: Vec<usize> = (0..64).map(|k| k / 16).collect();
    let graph = NBits::of(64, 4, 16, 4, false, Some(&plain)).read().unwrap();
    let gathers = graph
        .node_ids()
        .filter(|id| matches!(graph.node(*id).op, Op::Gather { .. }));
    assert_eq!(gathers.count(), 0, "groups in order need no other order of columns");
    // Only the last group is short if blocks do not divide the depth.
    let short: Vec<usize> = (0..40).map(|k| (k * 3) % 40 / 16).collect();
    let case = NBits::of(40, 4, 16, 4, false, Some(&short));
    let x = row(40);
    let found = run(&case.read().unwrap(), Tensor::from_f32(vec![1, 40], &x));
    close(
        &found,
        &times(&x, &case.weight),
        "g_idx of a depth that ends within a block",
    );
    let mut wrong = plain.clone();
    wrong[63] = 4;
    let mut case = NBits::of(64, 4, 16, 4, false, Some(&plain));
    case.initializers[2] = raw(
        "groups",
        INT32,
        &[64],
        wrong.iter().flat_map(|g| (*g as i32).to_le_bytes()).collect(),
    );
    let message = case.read().unwrap_err().to_string();
    assert!(
        message.contains("MatMulNBits_node") && message.contains("group 4 at 63"),
        "{message}"
    );
}

#[test]
fn codes_from_a_table_of_bitsandbytes() {
    // The values of a reference implementation: bitsandbytes 0.45, `get_4bit_type`.
    let fp4 = [
        0.0,
        0.005_208_33,
        0.666_666_7,
        1.0,
        0.333_333_3,
        0.5,
        0.166_666_7,
        0.25,
        0.0,
        -0.005_208_33,
        -0.666_666_7,
        -1.0,
        -0.333_333_3,
        -0.5,
        -0.166_666_7,
        -0.25,
    ];
    for (kind, table) in [(0, fp4), (1, NF4.map(f64::from))] {
        let (depth, columns, size) = (64usize, 3usize, 32usize);
        let code = |i: usize| (i * 7 + i / 5) % 16;
        // The first of two codes in the high half.
        let bytes = (0..depth * columns / 2)
            .map(|i| (code(2 * i) << 4 | code(2 * i + 1)) as u8)
            .collect();
        let absmax: Vec<f32> = (0..depth * columns / size).map(|b| 0.5 + b as f32).collect();
        let attributes = [
            ("K", depth as i64),
            ("N", columns as i64),
            ("block_size", size as i64),
            ("quant_type", kind),
        ];
        let product = node(
            "com.microsoft",
            "MatMulBnb4",
            &["x", "b", "absmax"],
            &["y"],
            &attributes,
        );
        let initializers = vec![
            raw("b", UINT8, &[(depth * columns / 2) as i64], bytes),
            floats("absmax", &[absmax.len() as i64], &absmax),
        ];
        let graph = read((FLOAT, &[1, depth as i64]), vec![product], initializers).unwrap();
        let value = |n: usize, k: usize| {
            let at = n * depth + k;
            table[code(at)] * f64::from(absmax[at / size])
        };
        let weight: Vec<Vec<f64>> = (0..columns)
            .map(|n| (0..depth).map(|k| value(n, k)).collect())
            .collect();
        let x = row(depth);
        close(
            &run(&graph, Tensor::from_f32(vec![1, depth], &x)),
            &times(&x, &weight),
            "bnb4",
        );

        // And again through a file written by Lapidary, which has blocks only on the last axis.
        let mut turned = graph.clone();
        let product = turned.node_ids().next().unwrap();
        let weight = turned.node(product).input(1).unwrap();
        let constant = turned.constant(weight).unwrap().transposed(&[1, 0]);
        let out_in = turned.add_constant("out_in", constant);
        let transpose = Op::Transpose { perm: Some(vec![1, 0]) };
        let read = turned.add_node("turn", transpose, &[out_in]);
        turned.node_mut(product).inputs[1] = Some(read);
        turned.sort().unwrap();
        lapidary::graph::infer(&mut turned).unwrap();
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("again.onnx");
        onnx::write(&turned, &path, None).unwrap();
        let again = onnx::read(&path).unwrap();
        assert_eq!(codes_of(&again), if kind == 0 { DType::Fp4 } else { DType::Nf4 });
        let values = |graph: &Graph| run(graph, Tensor::from_f32(vec![1, depth], &x));
        assert_eq!(values(&again), values(&graph));
    }
}

/// Rows looked up in a table of packed codes: bytes have the middle as zero point, uint4 and int4 have 0.
#[test]
fn rows_of_a_quantized_table() {
    let (rows, width, size) = (6usize, 32usize, 16usize);
    let code = |r: usize, k: usize| (r * 3 + k * 5) % 16;
    let table: Vec<Vec<u8>> = (0..rows)
        .map(|r| (0..width).map(|k| code(r, k) as u8).collect())
        .collect();
    let scales: Vec<f32> = (0..rows * 2).map(|i| 0.5 + i as f32 / 4.0).collect();
    for (kind, dims, offset, signed) in [
        (UINT8, vec![6, 16], 8.0, false),
        (UINT4, vec![6, 32], 0.0, false),
        (INT4, vec![6, 32], 0.0, true),
    ] {
        let attributes = [
            ("block_size", size as i64),
            ("quantize_axis", 1),
            ("gather_axis", 0),
            ("bits", 4),
        ];
        let lookup = node(
            "com.microsoft",
            "GatherBlockQuantized",
            &["data", "x", "scales"],
            &["y"],
            &attributes,
        );
        let initializers = vec![
            raw("data", kind, &dims, packed(&table, 4)),
            floats("scales", &[6, 2], &scales),
        ];
        let graph = read((INT64, &[1, 2]), vec![lookup], initializers).unwrap();
        let found = run(&graph, Tensor::from_i64(vec![1, 2], &[4, 1]));
        let number = |r: usize, k: usize| {
            let code = code(r, k) as f64;
            let code = if signed && code >= 8.0 {
                code - 16.0
            } else {
                code - offset
            };
            code * f64::from(scales[r * 2 + k / size])
        };
        let expected: Vec<f64> = [4, 1]
            .into_iter()
            .flat_map(|r| (0..width).map(move |k| number(r, k)))
            .collect();
        close(&found, &expected, &format!("type {kind}"));
    }
}

/// Per tensor, channel and block, on either axis, and scales that are quantized themselves.
#[test]
fn dequantize_linear_of_constants_is_a_quantized_weight() {
    let codes: Vec<u8> = (0..32).map(|i| ((i * 5) % 16) as u8).collect();
    let value = |i: usize| f64::from(((codes[i] as i8) << 4) >> 4);
    for (dims, scale_dims, axis, size) in [
        ([8, 4], vec![], 1, 0),
        ([8, 4], vec![4], 1, 0),
        ([8, 4], vec![8], 0, 0),
        ([8, 4], vec![2, 4], 0, 4),
        ([4, 8], vec![4, 2], -1, 4),
    ] {
        let count: i64 = scale_dims.iter().product();
        let scales: Vec<f32> = (0..count).map(|i| 0.25 + i as f32).collect();
        let mut attributes = vec![("axis", axis)];
        if size > 0 {
            attributes.push(("block_size", size));
        }
        let dequantize = node("", "DequantizeLinear", &["codes", "scales"], &["w"], &attributes);
        let product = node("", "MatMul", &["x", "w"], &["y"], &[]);
        let initializers = vec![
            raw("codes", INT4, &dims, packed(std::slice::from_ref(&codes), 4)),
            floats("scales", &scale_dims, &scales),
        ];
        let graph = read((FLOAT, &[1, dims[0]]), vec![dequantize, product], initializers).unwrap();
        assert_eq!(codes_of(&graph), DType::I4);
        let (depth, columns) = (dims[0] as usize, dims[1] as usize);
        let scale = |k: usize, n: usize| match (scale_dims.len(), axis, size) {
            (0, ..) => scales[0],
            (1, 1, _) => scales[n],
            (1, ..) => scales[k],
            (_, 0, _) => scales[k / 4 * columns + n],
            _ => scales[k * 2 + n / 4],
        };
        let entry = |n: usize, k: usize| value(k * columns + n) * f64::from(scale(k, n));
        let weight: Vec<Vec<f64>> = (0..columns)
            .map(|n| (0..depth).map(|k| entry(n, k)).collect())
            .collect();
        let x = row(depth);
        close(
            &run(&graph, Tensor::from_f32(vec![1, depth], &x)),
            &times(&x, &weight),
            &format!("{scale_dims:?}"),
        );
    }
}

/// Products of codes in one operator, by the formula of each: `Σ (a − zero) · scale · (b − zero) · scale`.
#[test]
fn products_of_codes_in_one_operator() {
    let codes: Vec<u8> = (0..32).map(|i| (i * 37 + 11) as u8).collect();
    let scales: Vec<f32> = (0..4).map(|n| 0.01 + 0.003 * n as f32).collect();
    let weight =
        |n: usize, k: usize, zero: f64, scale: f32| (f64::from(codes[k * 4 + n] as i8) - zero) * f64::from(scale);
    let by_column: Vec<Vec<f64>> = (0..4)
        .map(|n| (0..8).map(|k| weight(n, k, -3.0, scales[n])).collect())
        .collect();
    let bias = [0.5f32, -1.0, 0.25, 2.0];
    let constants = || {
        vec![
            raw("codes", INT8, &[8, 4], codes.clone()),
            floats("scales", &[4], &scales),
            // One zero point for all columns, although each has its own scale.
            raw("zero", INT8, &[], vec![-3i8 as u8]),
            floats("bias", &[4], &bias),
        ]
    };
    let x: Vec<f32> = (0..8).map(|k| (k as f32 - 2.6) * 0.37).collect();
    let row = || Tensor::from_f32(vec![1, 8], &x);
    // The range of x and 0 in 255 steps, as DynamicQuantizeLinear has it.
    let (low, high) = (x[0].min(0.0), x[7].max(0.0));
    let step = (high - low) / 255.0;
    let offset = (-low / step).round_ties_even();
    let near: Vec<f32> = x
        .iter()
        .map(|v| ((v / step).round_ties_even() + offset).clamp(0.0, 255.0))
        .map(|code| (code - offset) * step)
        .collect();
    let biased: Vec<f64> = times(&near, &by_column)
        .into_iter()
        .zip(bias)
        .map(|(v, b)| v + f64::from(b))
        .collect();
    let one = node(
        "com.microsoft",
        "DynamicQuantizeMatMul",
        &["x", "codes", "scales", "zero", "bias"],
        &["y"],
        &[],
    );
    let graph = read((FLOAT, &[1, 8]), vec![one], constants()).unwrap();
    assert_eq!(codes_of(&graph), DType::I8);
    close(&run(&graph, row()), &biased, "DynamicQuantizeMatMul");
    let two = vec![
        node("", "DynamicQuantizeLinear", &["x"], &["a", "a_scale", "a_zero"], &[]),
        node(
            "com.microsoft",
            "MatMulIntegerToFloat",
            &["a", "codes", "a_scale", "scales", "a_zero", "zero", "bias"],
            &["y"],
            &[],
        ),
    ];
    let graph = read((FLOAT, &[1, 8]), two, constants()).unwrap();
    assert_eq!(codes_of(&graph), DType::I8);
    close(&run(&graph, row()), &biased, "MatMulIntegerToFloat");

    // Static: codes of x, of the product, and floats of these.
    let number = |name: &str, value: f32| floats(name, &[], &[value]);
    let three = vec![
        node("", "QuantizeLinear", &["x", "x_scale", "x_zero"], &["a"], &[]),
        node(
            "",
            "QLinearMatMul",
            &["a", "x_scale", "x_zero", "codes", "scale", "zero", "y_scale", "y_zero"],
            &["c"],
            &[],
        ),
        node("", "DequantizeLinear", &["c", "y_scale", "y_zero"], &["y"], &[]),
    ];
    let mut initializers = constants();
    initializers.extend([
        number("x_scale", 0.02),
        number("scale", 0.015),
        number("y_scale", 0.4703),
        raw("x_zero", UINT8, &[], vec![100]),
        raw("y_zero", UINT8, &[], vec![120]),
    ]);
    let graph = read((FLOAT, &[1, 8]), three.clone(), initializers.clone()).unwrap();
    let of_all: Vec<Vec<f64>> = (0..4)
        .map(|n| (0..8).map(|k| weight(n, k, -3.0, 0.015)).collect())
        .collect();
    let near: Vec<f32> = x
        .iter()
        .map(|v| ((v / 0.02).round_ties_even() + 100.0).clamp(0.0, 255.0))
        .map(|code| (code - 100.0) * 0.02)
        .collect();
    let expected: Vec<f64> = times(&near, &of_all)
        .iter()
        .map(|v| (v / 0.4703).round_ties_even() + 120.0)
        .map(|code| (code.clamp(0.0, 255.0) - 120.0) * 0.4703)
        .collect();
    assert!(expected.iter().any(|v| *v != 0.0), "{expected:?}");
    close(&run(&graph, row()), &expected, "QLinearMatMul");

    // Errors name scales that do not match the codes.
    let mut wrong = initializers;
    wrong[5] = floats("scale", &[3], &[0.1; 3]);
    let message = read((FLOAT, &[1, 8]), three, wrong).unwrap_err().to_string();
    assert!(
        message.contains("QLinearMatMul_node") && message.contains("[3]"),
        "{message}"
    );
}

/// ModelOpt's own spelling, before ONNX had the types: codes' types are in the operators' names.
#[test]
fn operators_of_tensorrt() {
    let codes: Vec<u8> = (0..32).map(|i| ((i * 5) % 16) as u8).collect();
    let scales: Vec<f32> = (0..8).map(|i| 0.25 + i as f32).collect();
    let read_with = |scale_dims: &[i64], attributes: &[(&str, i64)]| {
        let dequantize = node(
            "trt",
            "TRT_INT4DequantizeLinear",
            &["codes", "scales"],
            &["w"],
            attributes,
        );
        let count: i64 = scale_dims.iter().product();
        let initializers = vec![
            raw("codes", INT4, &[8, 4], packed(std::slice::from_ref(&codes), 4)),
            floats("scales", scale_dims, &scales[..count as usize]),
        ];
        read(
            (FLOAT, &[1, 8]),
            vec![dequantize, node("", "MatMul", &["x", "w"], &["y"], &[])],
            initializers,
        )
    };
    for attributes in [&[][..], &[("block_size", 4)], &[("axis", 0), ("block_size", 4)]] {
        let graph = read_with(&[2, 4], attributes).unwrap();
        assert_eq!(codes_of(&graph), DType::I4);
        let value = |k: usize, n: usize| f64::from(((codes[k * 4 + n] as i8) << 4) >> 4);
        let entry = |n: usize, k: usize| value(k, n) * f64::from(scales[k / 4 * 4 + n]);
        let weight: Vec<Vec<f64>> = (0..4).map(|n| (0..8).map(|k| entry(n, k)).collect()).collect();
        let x = row(8);
        let found = run(&graph, Tensor::from_f32(vec![1, 8], &x));
        close(&found, &times(&x, &weight), "blocks by shape");
    }
    for (dims, attributes, reason) in [
        (&[2, 4][..], &[("block_size", 2)][..], "its blocks do not divide"),
        (&[8, 1], &[("block_size", 8)], "its blocks do not divide"),
        (&[2, 2], &[], "do not match blocks along one axis"),
        (&[4], &[("block_size", 4)], "its scales are not block scales"),
    ] {
        let error = read_with(dims, attributes).unwrap_err().to_string();
        assert!(error.contains(reason), "{dims:?}: {error}");
    }

    // Weights as they were, rounded by two nodes, and activations in between.
    let weights: Vec<f32> = (0..32).map(|i| (i as f32 - 15.3) * 0.11).collect();
    let nodes = vec![
        node("trt", "TRT_FP8QuantizeLinear", &["weights", "scale"], &["codes"], &[]),
        node("trt", "TRT_FP8DequantizeLinear", &["codes", "scale"], &["w"], &[]),
        node("", "MatMul", &["x", "w"], &["y"], &[]),
    ];
    let initializers = vec![floats("weights", &[8, 4], &weights), floats("scale", &[], &[0.5])];
    let graph = read((FLOAT, &[1, 8]), nodes, initializers).unwrap();
    assert_eq!(codes_of(&graph), DType::F8E4M3Fn);
    let rounded = |v: f32| Tensor::from_f64_as(DType::F8E4M3Fn, vec![1], &[f64::from(v / 0.5)]).to_f64()[0] * 0.5;
    let weight: Vec<Vec<f64>> = (0..4)
        .map(|n| (0..8).map(|k| rounded(weights[k * 4 + n])).collect())
        .collect();
    let x = row(8);
    let found = run(&graph, Tensor::from_f32(vec![1, 8], &x));
    close(&found, &times(&x, &weight), "fp8");
}

/// Each error names its node and the problem.
#[test]
fn what_does_not_belong_together_is_refused() {
    let good = || NBits::of(64, 4, 16, 4, true, None);
    let message = |case: NBits| match case.read() {
        Ok(graph) => {
            let unknown = graph.node_ids().find_map(|id| match &graph.node(id).op {
                Op::Unknown { op_type, .. } => Some(op_type.clone()),
                _ => None,
            });
            unknown.unwrap_or_default()
        }
        Err(error) => error.to_string(),
    };
    assert_eq!(message(good()), "");
    let mut short = good();
    short.initializers[0] = raw("b", UINT8, &[4, 4, 7], vec![0; 112]);
    assert!(message(short).contains("B is u8 [4, 4, 7], and u4 [4, 64] takes 128 bytes"));
    let mut scales = good();
    scales.initializers[1] = floats("scales", &[4, 3], &[1.0; 12]);
    assert!(message(scales).contains("the scales have the shape [4, 3], and [4, 4] is needed"));
    let mut bits = good();
    bits.bits = 3;
    assert!(message(bits).contains("bits=3"));
    let mut fractions = good();
    fractions.initializers[2] = floats("zeros", &[4, 4], &[7.5; 16]);
    assert!(message(fractions).contains("zero points that are not integers"));
    let mut outside = good();
    outside.initializers[2] = floats("zeros", &[4, 4], &[16.0; 16]);
    assert!(message(outside).contains("the zero point 16 at index 0 is out of range"));
    let dequantize = node(
        "",
        "DequantizeLinear",
        &["codes", "scales"],
        &["w"],
        &[("axis", 0), ("block_size", 3)],
    );
    let product = node("", "MatMul", &["x", "w"], &["y"], &[]);
    let initializers = vec![
        raw("codes", INT8, &[8, 4], vec![1; 32]),
        floats("scales", &[3, 4], &[1.0; 12]),
    ];
    let error = read((FLOAT, &[1, 8]), vec![dequantize, product], initializers).unwrap_err();
    let text = error.to_string();
    assert!(
        text.contains("DequantizeLinear_node") && text.contains("blocks of 3 do not divide axis 0"),
        "{text}"
    );
}
