//! The export in tract: <https://github.com/sonos/tract>.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use tract_onnx::prelude::*;

use super::Engine;
use crate::tensor::{DType, Tensor as Ours};

pub struct Tract {
    path: PathBuf,
    /// The plan for the shapes of the last run, usually also those of the next.
    plan: Option<(Vec<Vec<usize>>, Arc<TypedRunnableModel>)>,
}

impl Tract {
    pub fn new(path: &Path) -> Result<Self, String> {
        Ok(Tract {
            path: path.to_path_buf(),
            plan: None,
        })
    }

    fn plan(&mut self, inputs: &[(String, Ours)], logits: &str) -> TractResult<Arc<TypedRunnableModel>> {
        let shapes: Vec<Vec<usize>> = inputs.iter().map(|(_, t)| t.shape().to_vec()).collect();
        if let Some((known, plan)) = &self.plan
            && *known == shapes
        {
            return Ok(plan.clone());
        }
        let mut model = tract_onnx::onnx().model_for_path(&self.path)?;
        let outlets = model.input_outlets()?.to_vec();
        for (i, outlet) in outlets.iter().enumerate() {
            let name = model.node(outlet.node).name.clone();
            let Some((_, tensor)) = inputs.iter().find(|(n, _)| *n == name) else {
                anyhow_bail(format!("it has an input {name:?} that was not expected"))?;
                continue;
            };
            let fact = InferenceFact::dt_shape(dtype(tensor.dtype()), tensor.shape());
            model.set_input_fact(i, fact)?;
        }
        model.select_outputs_by_name([logits])?;
        let plan = model.into_optimized()?.into_runnable()?;
        self.plan = Some((shapes, plan.clone()));
        Ok(plan)
    }
}

fn anyhow_bail(message: String) -> TractResult<()> {
    Err(TractError::msg(message))
}

impl Engine for Tract {
    fn run(&mut self, inputs: &[(String, Ours)], logits: &str) -> Result<Ours, String> {
        // tract's errors are chains; the innermost has the cause.
        let chain = |e: TractError| format!("{e:#}");
        let plan = self.plan(inputs, logits).map_err(chain)?;
        let mut values: TVec<TValue> = tvec!();
        for outlet in plan.model().input_outlets().map_err(chain)? {
            let name = &plan.model().node(outlet.node).name;
            let (_, tensor) = inputs
                .iter()
                .find(|(n, _)| n == name)
                .ok_or_else(|| format!("no input {name:?}"))?;
            values.push(theirs(tensor).map_err(chain)?.into());
        }
        let outputs = plan.run(values).map_err(chain)?;
        let logits = outputs[0].cast_to::<f32>().map_err(chain)?.into_owned();
        let shape = logits.shape().to_vec();
        let view = logits.view();
        let values = view.as_slice::<f32>().map_err(chain)?;
        Ok(Ours::from_f32(shape, values))
    }
}

fn dtype(dtype: DType) -> DatumType {
    match dtype {
        DType::Bool => bool::datum_type(),
        DType::U8 => u8::datum_type(),
        DType::I8 => i8::datum_type(),
        DType::I32 => i32::datum_type(),
        DType::I64 => i64::datum_type(),
        DType::F16 => f16::datum_type(),
        DType::F32 => f32::datum_type(),
        DType::F64 => f64::datum_type(),
        // tract has neither bf16 nor storage-only types; the model was refused when it was loaded.
        _ => f32::datum_type(),
    }
}

fn theirs(tensor: &Ours) -> TractResult<Tensor> {
    let bools: Vec<u8>;
    let bytes = match tensor.dtype() {
        DType::Bool => {
            bools = tensor.data().iter().map(|byte| u8::from(*byte != 0)).collect();
            &bools[..]
        }
        _ => &tensor.data()[..],
    };
    // SAFETY: any bytes are valid numbers, and bools were just converted to 0 or 1. tract compares their count with the
    // shape.
    unsafe { Tensor::from_raw_dt(dtype(tensor.dtype()), tensor.shape(), bytes) }
}
