//! Adds the weights to an engine that was built without them.
//!
//! Input: a freshly deserialized engine and the network it was built from. Every weight that TensorRT requires must be
//! present: with a missing weight the engine would compute with zeros.

use std::rc::Rc;

use super::{RunError, Runtime};
use crate::network::{LayerKind, Network};
use crate::tensor::{DType, Tensor};

/// More names than any network has.
const ALL: i32 = 1 << 16;

pub(super) fn refit(
    runtime: &Rc<Runtime>,
    engine: &mut trtx::CudaEngine<'static>,
    network: &Network,
    name: &str,
) -> Result<(), RunError> {
    let failed = |error: trtx::Error| runtime.load_error(name, &error);
    // Declared before the refitter, which points to these bytes, so dropped after it.
    let mut held: Vec<Tensor> = Vec::new();
    let mut refitter = trtx::Refitter::new(engine, &runtime.logger).map_err(failed)?;
    let mut missing = Vec::new();
    for wanted in refitter.all_weights(ALL).map_err(failed)? {
        let Some(tensor) = bytes(network, &wanted) else {
            missing.push(wanted);
            continue;
        };
        let Some(data_type) = data_type(tensor.dtype()) else {
            return Err(RunError::Mismatch {
                engine: name.to_string(),
                reason: format!("its weight {wanted:?} is {} in the network", tensor.dtype()),
            });
        };
        let tensor = aligned(tensor);
        let weights = trtx::trtx_sys::nvinfer1::Weights {
            type_: data_type.into(),
            values: tensor.data().as_ptr().cast(),
            count: tensor.len() as i64,
        };
        let host = trtx::TensorLocation::kHOST.into();
        // SAFETY: the bytes are of that type and count and aligned for it; `held` keeps them where they are (clones and moves
        // of a tensor share its bytes) until the refitter is gone.
        unsafe { refitter.set_named_weights_with_location(&wanted, weights, host) }.map_err(failed)?;
        held.push(tensor);
    }
    if missing.is_empty() {
        // Unnamed constants, which are stripped too.
        missing = refitter.missing_weights(ALL).map_err(failed)?;
        let by_layer = refitter.missing(ALL).map_err(failed)?;
        missing.extend(by_layer.into_iter().map(|(layer, _)| layer));
    }
    if !missing.is_empty() {
        let engine = name.to_string();
        return Err(RunError::Weights { engine, names: missing });
    }
    refitter.refit_cuda_engine().map_err(failed)
}

/// The tensor at an address that is a multiple of its element's size: TensorRT reads elements, and bytes of a mapped
/// file may be unaligned.
fn aligned(tensor: Tensor) -> Tensor {
    let size = tensor.dtype().bits().div_ceil(8);
    if (tensor.data().as_ptr() as usize).is_multiple_of(size) {
        return tensor;
    }
    /// Aligned for elements of up to eight bytes.
    struct Words(Vec<u64>, usize);
    impl AsRef<[u8]> for Words {
        fn as_ref(&self) -> &[u8] {
            &bytemuck::cast_slice(&self.0)[..self.1]
        }
    }
    let mut words = Words(
        vec![0; tensor.data().len().div_ceil(size_of::<u64>())],
        tensor.data().len(),
    );
    bytemuck::cast_slice_mut(&mut words.0)[..words.1].copy_from_slice(tensor.data());
    let copy = bytes::Bytes::from_owner(words);
    Tensor::new(tensor.dtype(), tensor.shape().to_vec(), copy).expect("as many bytes as before")
}

/// TensorRT's suffix to a layer's name for an unnamed constant.
const UNNAMED: &str = " CONSTANT";

/// The bytes of a weight, if available, or of a constant layer: an engine whose weights are all refittable requires
/// every constant.
fn bytes(network: &Network, name: &str) -> Option<Tensor> {
    if let Some(weight) = network.weights.iter().find(|weight| weight.name == name) {
        return weight.constant.materialize().ok();
    }
    network.layers.iter().find_map(|layer| match &layer.kind {
        LayerKind::Constant(tensor) if name.strip_suffix(UNNAMED) == Some(&layer.name) => Some(tensor.clone()),
        _ => None,
    })
}

/// `None`: TensorRT has no such type.
fn data_type(dtype: DType) -> Option<trtx::DataType> {
    Some(match dtype {
        DType::Bool => trtx::DataType::kBOOL,
        DType::U8 => trtx::DataType::kUINT8,
        DType::I8 => trtx::DataType::kINT8,
        DType::I32 => trtx::DataType::kINT32,
        DType::I64 => trtx::DataType::kINT64,
        DType::I4 => trtx::DataType::kINT4,
        DType::F8E4M3Fn => trtx::DataType::kFP8,
        DType::F16 => trtx::DataType::kHALF,
        DType::Bf16 => trtx::DataType::kBF16,
        DType::F32 => trtx::DataType::kFLOAT,
        _ => return None,
    })
}
