//! Exports of ONNX Runtime's `MatMulNBits` with columns in any order of groups (GPTQ's act-order, `g_idx`) and a depth
//! that ends within a block, as whole packages.

use std::path::Path;

use bytes::Bytes;
use lapidary::onnx::proto::{AttributeProto, ModelProto, NodeProto, OperatorSetIdProto, TensorProto, attribute_type};
use prost::Message;

use crate::packages::{converted, difference, export, forms};

const FLOAT: i32 = 1;
const UINT8: i32 = 2;
const INT32: i32 = 6;

fn raw(name: &str, code: i32, dims: &[usize], bytes: Vec<u8>) -> TensorProto {
    TensorProto {
        name: Some(name.to_string()),
        data_type: Some(code),
        dims: dims.iter().map(|d| *d as i64).collect(),
        raw_data: Some(Bytes::from(bytes)),
        ..TensorProto::default()
    }
}

fn int(name: &str, value: usize) -> AttributeProto {
    AttributeProto {
        name: Some(name.to_string()),
        r#type: Some(attribute_type::INT),
        i: Some(value as i64),
        ..AttributeProto::default()
    }
}

fn bytes(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|v| v.to_le_bytes()).collect()
}

/// Codes of four bits, the first of a byte in its low half; rows are padded to bytes.
fn packed(row: &[u8]) -> Vec<u8> {
    row.chunks(2)
        .map(|pair| pair[0] | pair.get(1).copied().unwrap_or(0) << 4)
        .collect()
}

/// A matrix `[depth, columns]` as MatMulNBits has it, in blocks of 32 or for 32 rows of 16, and the floats that it means.
struct Coded {
    size: usize,
    tensors: Vec<TensorProto>,
    floats: Vec<f32>,
}

fn coded(name: &str, values: &[f32], [depth, columns]: [usize; 2], zero_points: bool) -> Coded {
    let size = if depth == 32 { 16 } else { 32 };
    let blocks = depth.div_ceil(size);
    // 7 divides no depth, so this is a permutation.
    let group = |k: usize| (k * 7 + 3) % depth / size;
    let zero = |n: usize, g: usize| if zero_points { 5 + (n + g) % 5 } else { 8 } as f32;
    let mut scales = vec![0f32; columns * blocks];
    let mut codes = Vec::new();
    let mut floats = vec![0f32; depth * columns];
    for n in 0..columns {
        for k in 0..depth {
            let scale = &mut scales[n * blocks + group(k)];
            *scale = scale.max(values[k * columns + n].abs() / 5.0);
        }
        let mut row = vec![0u8; blocks * size];
        for k in 0..depth {
            let (scale, zero) = (scales[n * blocks + group(k)], zero(n, group(k)));
            let code = (values[k * columns + n] / scale + zero).round().clamp(0.0, 15.0);
            row[k] = code as u8;
            floats[k * columns + n] = (code - zero) * scale;
        }
        codes.extend(packed(&row));
    }
    let groups = (0..depth).flat_map(|k| (group(k) as i32).to_le_bytes()).collect();
    let zeros: Vec<u8> = (0..columns)
        .flat_map(|n| packed(&(0..blocks).map(|g| zero(n, g) as u8).collect::<Vec<u8>>()))
        .collect();
    let of = |part: &str| format!("{name}.{part}");
    Coded {
        size,
        tensors: vec![
            raw(&of("codes"), UINT8, &[columns, blocks, size / 2], codes),
            raw(&of("scales"), FLOAT, &[columns, blocks], bytes(&scales)),
            raw(&of("zeros"), UINT8, &[columns * blocks.div_ceil(2)], zeros),
            raw(&of("groups"), INT32, &[depth], groups),
        ],
        floats,
    }
}

/// The tiny Llama with every linear layer as MatMulNBits, and the same with the floats that these mean.
fn models(folder: &Path, zero_points: bool) -> [std::path::PathBuf; 2] {
    let mut quantized = ModelProto::decode(&std::fs::read(export("llama-optimum")).unwrap()[..]).unwrap();
    let mut floating = quantized.clone();
    let graph = quantized.graph.as_mut().unwrap();
    let reference = floating.graph.as_mut().unwrap();
    let mut replaced = 0;
    for node in graph.node.iter_mut().filter(|node| node.op_type() == "MatMul") {
        let name = node.input[1].clone();
        let Some(at) = graph.initializer.iter().position(|t| t.name() == name) else {
            continue;
        };
        let weight = graph.initializer.remove(at);
        let [depth, columns] = [weight.dims[0] as usize, weight.dims[1] as usize];
        let values: Vec<f32> = weight
            .raw_data()
            .chunks_exact(4)
            .map(|b| f32::from_le_bytes(b.try_into().unwrap()))
            .collect();
        let coded = coded(&name, &values, [depth, columns], zero_points);
        let of = reference.initializer.iter_mut().find(|t| t.name() == name).unwrap();
        of.raw_data = Some(Bytes::from(bytes(&coded.floats)));
        let mut inputs = vec![node.input[0].clone()];
        inputs.extend(coded.tensors.iter().map(|t| t.name().to_string()));
        if !zero_points {
            inputs[3] = String::new();
        }
        graph.initializer.extend(coded.tensors);
        *node = NodeProto {
            input: inputs,
            op_type: Some("MatMulNBits".to_string()),
            domain: Some("com.microsoft".to_string()),
            attribute: vec![
                int("K", depth),
                int("N", columns),
                int("bits", 4),
                int("block_size", coded.size),
            ],
            ..node.clone()
        };
        replaced += 1;
    }
    assert_eq!(replaced, 15);
    quantized.opset_import.push(OperatorSetIdProto {
        domain: Some("com.microsoft".to_string()),
        version: Some(1),
    });
    [("quantized", quantized), ("floating", floating)].map(|(name, model)| {
        let path = folder.join(format!("{name}.onnx"));
        std::fs::write(&path, model.encode_to_vec()).unwrap();
        path
    })
}

#[test]
fn groups_in_any_order_and_short_last_blocks_become_packages() {
    for zero_points in [false, true] {
        let folder = tempfile::tempdir().unwrap();
        let [quantized, floating] = models(folder.path(), zero_points);
        let ours = converted(&quantized, folder.path(), "quantized-pkg", "");
        let reference = converted(&floating, folder.path(), "floating-pkg", "");
        let (apart, largest) = difference(&reference, &ours);
        assert!(apart < 2e-5 * largest.max(1.0), "{zero_points}: {apart} of {largest}");
        let forms = forms(&ours.manifest);
        // The rows of a depth of 48 are blocks of 32 and half of one: three of 16.
        let kind = if zero_points { "u4" } else { "i4" };
        assert!(
            forms.len() >= 11 && forms.iter().all(|(_, form)| form.starts_with(kind)),
            "{forms:?}"
        );
    }
}
