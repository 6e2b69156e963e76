//! The text form of a [`Network`], for `inspect --dump network`, snapshots and test files. [`parse`](super::parse()) reads it
//! back.
//!
//! One line per layer: the tensor, its type, `=`, the layer and its inputs. The layer's own name is omitted if it
//! equals the tensor's; a name with spaces or punctuation is in quotes. The text is stable: changing it changes every
//! snapshot and every key of the plan cache.
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

use std::fmt;

use super::{LayerKind, Network, TensorId, WeightMode};
use crate::ir_text::{name, shape};

impl WeightMode {
    /// The name in dumps.
    pub(super) fn word(self) -> &'static str {
        match self {
            WeightMode::Bind => "bind",
            WeightMode::Embed => "embed",
            WeightMode::Strip => "strip",
        }
    }
}

impl fmt::Display for Network {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "network {:?} for {}", self.name, self.profile)?;
        let typed = |id: TensorId| {
            let tensor = self.tensor(id);
            format!("{} {}{}", name(&tensor.name), tensor.dtype, shape(&tensor.shape))
        };
        if !self.weights.is_empty() {
            f.write_str("weights\n")?;
        }
        for weight in &self.weights {
            let constant = &weight.constant;
            let mode = weight.mode.word();
            write!(
                f,
                "  {} {}{:?} {mode}",
                name(&weight.name),
                constant.dtype(),
                constant.shape()
            )?;
            match constant.origin() {
                Some(origin) if origin != weight.name => writeln!(f, " from {}", name(origin))?,
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
            // A weight is its own definition, listed above.
            if matches!(layer.kind, LayerKind::Weight(_)) {
                continue;
            }
            let inputs = layer.inputs.iter().map(|id| name(&self.tensor(*id).name)).collect();
            let outputs: Vec<String> = layer.outputs.iter().map(|id| typed(*id)).collect();
            write!(f, "  {} = {}", outputs.join(", "), layer.kind.expression(inputs))?;
            match layer.name == self.tensor(*output).name {
                true => f.write_str("\n")?,
                false => writeln!(f, " @{}", name(&layer.name))?,
            }
        }
        f.write_str("outputs\n")?;
        for id in &self.outputs {
            writeln!(f, "  {}", typed(*id))?;
        }
        Ok(())
    }
}
