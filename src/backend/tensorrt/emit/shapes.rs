//! Extents that depend on `tokens`: -1 where TensorRT infers them, shape tensors where it cannot.

use trtx::ElementWiseOperation;

use super::{EmitError, Emitted, Emitter, Handle};
use crate::dim::{Dim, Sym};

/// The dim for a network input: -1 if it is known only at run time.
pub(super) fn runtime_dims(shape: &[Dim]) -> Vec<i64> {
    shape.iter().map(|dim| dim.as_const().unwrap_or(-1)).collect()
}

/// The dim for a number of tokens; -1 for a dim of other symbols, which TensorRT then refuses by name.
pub(in super::super) fn at_tokens(dim: &Dim, tokens: usize) -> i64 {
    dim.eval(&[(Sym::tokens(), tokens as i64)].into()).unwrap_or(-1)
}

/// How a layer gets a shape.
pub(super) enum Extents<'b> {
    Static(Vec<i64>),
    /// One dim is -1, inferred from the volume.
    Inferred(Vec<i64>),
    /// A shape tensor `[rank]` i64.
    Tensor(Handle<'b>),
}

impl<'b> Emitter<'b, '_> {
    /// For a reshape, whose volume is known: at most one symbolic dim needs no shape tensor.
    pub(super) fn reshape_extents(&mut self, layer: &str, shape: &[Dim]) -> Result<Extents<'b>, EmitError> {
        if shape.iter().any(|dim| dim.as_const() == Some(0)) {
            // TensorRT reads 0 as "keep this dim"; a decoder has no empty tensors.
            return Err(EmitError::Malformed(format!("a reshape to {shape:?}, which is empty")));
        }
        match shape.iter().filter(|dim| dim.as_const().is_none()).count() {
            0 => Ok(Extents::Static(runtime_dims(shape))),
            1 => Ok(Extents::Inferred(runtime_dims(shape))),
            _ => Ok(Extents::Tensor(self.shape_tensor(layer, shape)?)),
        }
    }

    /// For slices and fills, where every symbolic dim must be given.
    pub(super) fn extents(&mut self, layer: &str, shape: &[Dim]) -> Result<Extents<'b>, EmitError> {
        if shape.iter().all(|dim| dim.as_const().is_some()) {
            Ok(Extents::Static(runtime_dims(shape)))
        } else {
            Ok(Extents::Tensor(self.shape_tensor(layer, shape)?))
        }
    }

    /// `factors * tokens + offsets` as a shape tensor `[rank]` i64.
    fn shape_tensor(&mut self, layer: &str, shape: &[Dim]) -> Emitted<'b> {
        let lines = shape.iter().map(line).collect::<Result<Vec<_>, _>>()?;
        let (factors, offsets): (Vec<i64>, Vec<i64>) = lines.into_iter().unzip();
        let tokens = self.tokens()?;
        let rank = [shape.len() as i64];
        let factors = self.small_i64(&rank, &factors)?;
        let scaled = self
            .definition
            .add_elementwise(&tokens, &factors, ElementWiseOperation::kPROD)?;
        let scaled = self.named(scaled, &format!("{layer}/extent_factors"))?;
        let offsets = self.small_i64(&rank, &offsets)?;
        let sum = self
            .definition
            .add_elementwise(&scaled, &offsets, ElementWiseOperation::kSUM)?;
        self.named(sum, &format!("{layer}/extents"))
    }

    /// The number of tokens in this call, `[1]` i64, from the first input with such a dim.
    fn tokens(&mut self) -> Emitted<'b> {
        if let Some(tokens) = self.tokens {
            return Ok(tokens);
        }
        let network = self.network;
        let tokens = Sym::tokens();
        let found = network.inputs.iter().find_map(|id| {
            let shape = &network.tensors.get(id.0 as usize)?.shape;
            let axis = shape.iter().position(|dim| dim.as_sym() == Some(&tokens))?;
            Some((*id, axis as i64))
        });
        let (id, axis) = found
            .ok_or_else(|| EmitError::Malformed("a shape holds `tokens`, but no input has that dim".to_string()))?;
        let input = self.handle(id)?;
        let shape = self.definition.add_shape(&input)?;
        let shape = self.named(shape, "tokens/shape")?;
        let slice = self.definition.add_slice(&shape, &[axis], &[1], &[1])?;
        let handle = self.named(slice, "tokens")?;
        self.tokens = Some(handle);
        Ok(handle)
    }
}

/// `(a, b)` of `a * tokens + b`.
fn line(dim: &Dim) -> Result<(i64, i64), EmitError> {
    let at = |n: i64| dim.eval(&[(Sym::tokens(), n)].into());
    match (at(0), at(1), at(2)) {
        (Some(b), Some(one), Some(two)) if two - one == one - b => Ok((one - b, b)),
        _ => Err(EmitError::Malformed(format!(
            "the extent {dim} is not linear in `tokens`"
        ))),
    }
}
