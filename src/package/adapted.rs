//! A package's graph with an adapter's changes, in memory.

use std::collections::HashMap;

use super::refit::{RefitError, find_weights};
use super::{Package, PackageError};
use crate::graph::{Constant, ConstantSource, Graph, ValueId};
use crate::weights::WriteError;
use crate::weights::checks::{Allowed, check};
use crate::weights::lora::Adapter;

/// See [`Package::adapted`].
#[derive(Clone, Debug)]
pub struct Adapted {
    /// The canonical graph.
    pub graph: Graph,
    /// Weights that the adapter changes.
    pub changed: usize,
    /// Bytes of them, which are held in memory.
    pub bytes: usize,
}

impl Package {
    /// The canonical graph with an adapter merged into the weights that it changes. Changed weights are in memory, in
    /// the package's dtype; all others stay mapped from the package. Nothing is written. As in a refit, an adapter that
    /// does not fit, or that changes quantized weights, is refused.
    pub fn adapted(&self, adapter: &Adapter) -> Result<Adapted, RefitError> {
        let source = self.weight_source()?;
        let found = find_weights(self, &source, Some(adapter), false)?;
        let mut graph = self.graph()?;
        let mut merged: HashMap<&str, &Constant> = HashMap::new();
        for (entry, matched) in self.manifest.weights.tensors.iter().zip(&found.weights) {
            if matches!(matched.constant.source(), ConstantSource::Derived(_)) {
                merged.insert(&entry.name, &matched.constant);
            }
        }
        let (mut changed, mut bytes) = (0, 0);
        let ids: Vec<ValueId> = graph.value_ids().collect();
        for id in ids {
            let name = graph.value(id).name.clone();
            let Some(constant) = merged.get(&name[..]) else {
                continue;
            };
            let failed = |error: WriteError| PackageError::Weights(error);
            let computed = constant.materialize().map_err(|source| {
                let name = name.clone();
                failed(WriteError::Constant { name, source })
            })?;
            match check(constant, &computed, Allowed::default()) {
                Ok(None) => {}
                Ok(Some(source)) => return Err(failed(WriteError::Numbers { name, source }).into()),
                Err(source) => return Err(failed(WriteError::Constant { name, source }).into()),
            }
            // Some are computed but unchanged.
            let own = graph.constant(id).and_then(|own| own.materialize().ok());
            if own.is_some_and(|own| own.data() == computed.data()) {
                continue;
            }
            changed += 1;
            bytes += computed.data().len();
            graph.set_constant(id, Constant::tensor(computed));
        }
        Ok(Adapted { graph, changed, bytes })
    }
}
