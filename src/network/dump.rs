//! The text form of a [`Network`], for `inspect --dump network`, snapshots and eyes.
//!
//! One line a layer: the tensor, its type, `=`, the layer and what it reads. The layer's own name is not repeated where
//! it is the tensor's. Stable: a change of this text is a change of every snapshot.
//!
//! ```text
//! network "mlp" for b1-t1-c16
//! weights
//!   up.weight f16[128, 64] bind
//! inputs
//!   x f16[1, 64]
//! layers
//!   up f16[1, 128] = MatrixMultiply(x, up.weight^T)
//!   y f16[1, 128] = Relu(up) @act
//! outputs
//!   y f16[1, 128]
//! ```

use std::fmt::{self, Write};

use crate::tensor::{self, DType};

use super::{Layer, LayerKind, MatrixOp, Network, Shape, TensorId, WeightMode};

/// Constants up to this many elements are written out.
const SHOWN_ELEMENTS: usize = 8;

impl fmt::Display for Network {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "network {:?} for {}", self.name, self.profile)?;
        let typed = |id: TensorId| {
            let tensor = self.tensor(id);
            format!("{} {}", tensor.name, dtype_shape(tensor.dtype, &tensor.shape))
        };
        if !self.weights.is_empty() {
            f.write_str("weights\n")?;
        }
        for weight in &self.weights {
            let mode = match weight.mode {
                WeightMode::Bind => "bind",
                WeightMode::Embed => "embed",
                WeightMode::Strip => "strip",
            };
            let constant = &weight.constant;
            write!(f, "  {} {}{:?} {mode}", weight.name, constant.dtype(), constant.shape())?;
            match constant.origin() {
                Some(origin) if origin != weight.name => writeln!(f, " from {origin}")?,
                _ => f.write_str("\n")?,
            }
        }
        f.write_str("inputs\n")?;
        for id in &self.inputs {
            writeln!(f, "  {}", typed(*id))?;
        }
        f.write_str("layers\n")?;
        for layer in &self.layers {
            let Some(output) = layer.outputs.first() else { continue };
            // A weight is its own definition: the list above has it.
            if matches!(layer.kind, LayerKind::Weight(_)) {
                continue;
            }
            write!(f, "  {} = {}", typed(*output), expression(self, layer))?;
            match layer.name == self.tensor(*output).name {
                true => f.write_str("\n")?,
                false => writeln!(f, " @{}", layer.name)?,
            }
        }
        f.write_str("outputs\n")?;
        for id in &self.outputs {
            writeln!(f, "  {}", typed(*id))?;
        }
        Ok(())
    }
}

fn dtype_shape(dtype: DType, shape: &Shape) -> String {
    format!("{dtype}{shape:?}")
}

/// `Layer(inputs, parameter: value)`.
fn expression(network: &Network, layer: &Layer) -> String {
    let mut arguments: Vec<String> = layer.inputs.iter().map(|id| network.tensor(*id).name.clone()).collect();
    let mut head = layer.kind.name().to_string();
    match &layer.kind {
        LayerKind::Weight(_) | LayerKind::Select | LayerKind::Attention | LayerKind::KvCacheUpdate => {}
        LayerKind::Constant(tensor) => arguments.push(elements(tensor)),
        LayerKind::MatrixMultiply { op_a, op_b } => {
            for (argument, op) in arguments.iter_mut().zip([op_a, op_b]) {
                if *op == MatrixOp::Transpose {
                    argument.push_str("^T");
                }
            }
        }
        LayerKind::Elementwise(op) => head = format!("{op:?}"),
        LayerKind::Unary(op) => head = format!("{op:?}"),
        LayerKind::Activation(op) => head = format!("{op:?}"),
        LayerKind::Reduce { op, axes, keep_dims } => {
            head = format!("Reduce{op:?}");
            arguments.push(format!("axes: {axes:?}"));
            if !keep_dims {
                arguments.push("keep_dims: false".to_string());
            }
        }
        LayerKind::Softmax { axis } | LayerKind::Concatenation { axis } | LayerKind::Gather { axis } => {
            arguments.push(format!("axis: {axis}"));
        }
        LayerKind::Shuffle { first, reshape, second } => {
            // In the order in which they happen.
            arguments.extend(first.as_ref().map(|o| format!("transpose: {o:?}")));
            arguments.extend(reshape.as_ref().map(|to| format!("reshape: {to:?}")));
            arguments.extend(second.as_ref().map(|o| format!("transpose: {o:?}")));
        }
        LayerKind::Slice { start, size, stride } => {
            arguments.push(format!("start: {start:?}, size: {size:?}"));
            if stride.iter().any(|s| *s != 1) {
                arguments.push(format!("stride: {stride:?}"));
            }
        }
        LayerKind::Cast { to } => arguments.push(to.to_string()),
        LayerKind::Fill { start, step, .. } => arguments.push(format!("start: {start}, step: {step}")),
        LayerKind::Normalization { axes, epsilon } => {
            arguments.push(format!("axes: {axes:?}, epsilon: {epsilon}"));
        }
        LayerKind::RotaryEmbedding {
            interleaved,
            rotary_dim,
        } => {
            arguments.push(format!("rotary_dim: {rotary_dim}"));
            if *interleaved {
                arguments.push("interleaved".to_string());
            }
        }
    }
    format!("{head}({})", arguments.join(", "))
}

fn elements(tensor: &tensor::Tensor) -> String {
    let mut text = String::new();
    let values = match tensor.len() <= SHOWN_ELEMENTS {
        true => tensor.to_f64(),
        false => return format!("{} elements", tensor.len()),
    };
    for (i, value) in values.iter().enumerate() {
        let separator = if i == 0 { "" } else { ", " };
        match tensor.dtype() {
            DType::Bool => write!(text, "{separator}{}", *value != 0.0),
            // The shortest decimal that reads back as the same f32, not its expansion in f64.
            dtype if dtype.is_float() => write!(text, "{separator}{}", *value as f32),
            _ => write!(text, "{separator}{value}"),
        }
        .expect("writing to a string");
    }
    text
}
