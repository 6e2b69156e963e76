//! The export in Lapidary's own evaluator, node by node, without passes.

use std::collections::HashMap;

use super::Engine;
use crate::graph::Graph;
use crate::graph::eval::Evaluator;
use crate::tensor::Tensor;

pub struct Eval {
    graph: Graph,
}

impl Eval {
    pub fn new(graph: Graph) -> Self {
        Eval { graph }
    }
}

impl Engine for Eval {
    fn run(&mut self, inputs: &[(String, Tensor)], logits: &str) -> Result<Tensor, String> {
        let find = |name: &str| {
            self.graph
                .find(name)
                .ok_or_else(|| format!("there is no value {name:?}"))
        };
        let mut bindings = HashMap::new();
        for (name, tensor) in inputs {
            bindings.insert(find(name)?, tensor.clone());
        }
        let logits = find(logits)?;
        Evaluator::new(&self.graph, bindings)
            .value(logits)
            .map_err(|e| e.to_string())
    }
}
