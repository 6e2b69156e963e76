use std::collections::BTreeMap;

use super::error::CpuError;
use crate::dim::{Dim, Sym};
use crate::network::{LayerKind, Network, Shape, Tokens};

/// A network of a dynamic profile with `tokens` bound to a number, so that every shape is static. A network that is
/// already static is returned unchanged if its tokens agree. Cheap: weights are shared.
pub fn bind_tokens(network: &Network, tokens: usize) -> Result<Network, CpuError> {
    let (min, max) = match network.profile.tokens {
        Tokens::Static(n) => (n, n),
        Tokens::Dynamic { min, max, .. } => (min, max),
    };
    if tokens < min || tokens > max {
        return Err(CpuError::Tokens { tokens, min, max });
    }
    let mut bound = network.clone();
    bound.profile.tokens = Tokens::Static(tokens);
    let values = BTreeMap::from([(Sym::tokens(), Dim::from(tokens))]);
    let bind = |shape: &mut Shape| {
        for dim in shape.iter_mut().filter(|d| d.as_const().is_none()) {
            *dim = dim.substitute(&values);
        }
    };
    for tensor in &mut bound.tensors {
        bind(&mut tensor.shape);
    }
    for layer in &mut bound.layers {
        match &mut layer.kind {
            LayerKind::Shuffle {
                reshape: Some(shape), ..
            }
            | LayerKind::Slice { size: shape, .. } => bind(shape),
            LayerKind::Fill { length, .. } => *length = length.substitute(&values),
            _ => {}
        }
    }
    Ok(bound)
}
