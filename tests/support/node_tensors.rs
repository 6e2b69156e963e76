//! The tensors of ONNX's node tests, read by Lapidary's reader, and the comparison of results with them.

use std::fs;
use std::path::Path;

use lapidary::onnx::proto::{GraphProto, ModelProto, OperatorSetIdProto, TensorProto};
use lapidary::tensor::{DType, Tensor};
use prost::Message;

/// The `N`-th tensors of a case, decoded by Lapidary's reader.
pub fn tensors(case: &Path, kind: &str, scratch: &Path) -> Vec<Tensor> {
    let files = (0..).map(|n| case.join(format!("test_data_set_0/{kind}_{n}.pb")));
    let initializer: Vec<TensorProto> = files
        .take_while(|file| file.exists())
        .enumerate()
        .map(|(n, file)| {
            let mut tensor = TensorProto::decode(fs::read(file).unwrap().as_slice()).unwrap();
            tensor.name = Some(format!("t{n}"));
            tensor
        })
        .collect();
    let count = initializer.len();
    let model = ModelProto {
        ir_version: Some(10),
        graph: Some(GraphProto {
            initializer,
            ..Default::default()
        }),
        opset_import: vec![OperatorSetIdProto {
            domain: None,
            version: Some(24),
        }],
        ..Default::default()
    };
    let file = scratch.join(format!("{kind}.onnx"));
    fs::write(&file, model.encode_to_vec()).unwrap();
    let graph = lapidary::onnx::read(&file).unwrap();
    let tensor = |n: usize| graph.constant(graph.find(&format!("t{n}")).unwrap()).unwrap().clone();
    (0..count).map(|n| tensor(n).materialize().unwrap()).collect()
}

/// Checks that `found` equals `wanted` in dtype and shape, and in values within the tolerance of its dtype, relative to
/// `1 + |wanted|`.
pub fn compare(found: &Tensor, wanted: &Tensor, tolerance: impl Fn(DType) -> f64) -> Result<(), String> {
    if (found.dtype(), found.shape()) != (wanted.dtype(), wanted.shape()) {
        return Err(format!("{found:?} instead of {wanted:?}"));
    }
    let tolerance = tolerance(wanted.dtype());
    for (i, (f, w)) in found.to_f64().into_iter().zip(wanted.to_f64()).enumerate() {
        let equal = f == w || (f.is_nan() && w.is_nan()) || (f - w).abs() <= tolerance * (1.0 + w.abs());
        if !equal {
            return Err(format!("element {i} of {wanted:?} is {f} instead of {w}"));
        }
    }
    Ok(())
}
