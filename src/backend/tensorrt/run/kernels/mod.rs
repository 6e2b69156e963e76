//! Lapidary's kernels, which run between engines: the layers of [`network`](crate::network) that TensorRT does not
//! have.
//!
//! Input: a layer. Output: a [`Launch`], a kernel with its grid and its arguments, whose addresses are filled in when
//! tensors are bound. `archive` has the kernels' PTX, `variant` chooses among them, `product` and `attention` write the
//! arguments of each, `module` loads them and `launch` queues them. The kernels' sources, with the meaning of each
//! argument, are in `../device/decode`.
//!
//! # Dependent launch
//!
//! From SM 9.0 on a kernel may start while the previous one is still running: it reads what no kernel writes (weights,
//! tables, positions, cache slots of earlier tokens) and then waits until the other is complete. So writes to these
//! must be complete before the *first* kernel of such a chain starts. A kernel after an engine or a copy is launched in
//! the ordinary way, which waits for it ([`Launch::enqueue`]).

mod archive;
mod arguments;
mod attention;
mod launch;
mod module;
mod product;
mod variant;

pub(super) use launch::Launch;
pub(super) use module::Modules;

use super::{Caches, RunError};
use crate::network::{LayerKind, Network};

/// Properties of a GPU for kernels.
#[derive(Clone, Copy, Debug)]
struct Limits {
    /// 80 or 90: the variants that it runs.
    target: u32,
    multiprocessors: u32,
    /// Shared memory per block, in bytes.
    shared: usize,
}

/// The launch of one of Lapidary's own layers.
pub(super) fn launch(modules: &Modules, network: &Network, layer: usize, caches: Caches) -> Result<Launch, RunError> {
    let layer = &network.layers[layer];
    match &layer.kind {
        LayerKind::RowProduct(product) => product::launch(modules, network, layer, product),
        LayerKind::DecodeAttention(attention) => attention::launch(modules, network, layer, attention, caches),
        other => unreachable!("{} is a layer of TensorRT's", other.name()),
    }
}
