//! The matrices of a canonical graph: their names, their readers, and whether they may be quantized.

use std::collections::HashMap;

use crate::graph::op::Op;
use crate::graph::{Graph, NodeId, ValueId};
use crate::interface::Role;
use crate::target::Quantization;
use crate::weights::modules;

/// A constant matrix `[out, in]` of linear layers, or a lookup table.
#[derive(Clone, Debug)]
pub struct Matrix {
    /// The constant.
    pub value: ValueId,
    /// In the graph.
    pub name: String,
    /// Its name in the export, if it has one.
    pub origin: Option<String>,
    /// Its modules ([`crate::weights::modules`]); several if it is fused.
    pub modules: Vec<String>,
    /// Products with its transpose.
    pub products: Vec<NodeId>,
    /// Rows of it are looked up by token ids.
    pub is_embedding: bool,
    /// It computes the logits.
    pub is_head: bool,
    /// It has a reader that requires floating point: a lookup by other numbers than token ids, or arithmetic.
    pub is_fixed: bool,
}

impl Matrix {
    /// All its names, best known first.
    pub fn names(&self) -> Vec<String> {
        let mut names: Vec<String> = self.modules.clone();
        names.extend(self.origin.clone());
        names.push(self.name.clone());
        names
    }

    /// Whether a word of [`Quantization::keep`] matches it: `lm_head`, `embeddings`, a name, a prefix up to a dot, or a
    /// pattern with `*` for any text.
    pub fn is_called(&self, word: &str) -> bool {
        let named = |name: &String| match word.contains('*') {
            true => matches_pattern(name, word),
            false => name
                .strip_prefix(word)
                .is_some_and(|rest| rest.is_empty() || rest.starts_with('.')),
        };
        self.is_head && word == Quantization::HEAD
            || self.is_embedding && word == Quantization::EMBEDDINGS
            || self.names().iter().any(named)
    }
}

/// All floating-point matrices that linear layers read or that are lookup tables, in the graph's order.
pub fn matrices(graph: &Graph) -> Vec<Matrix> {
    let modules = modules::modules(graph);
    let head = head(graph);
    let mut found: Vec<Matrix> = Vec::new();
    let mut at: HashMap<ValueId, usize> = HashMap::new();
    let mut matrix = |value: ValueId, found: &mut Vec<Matrix>| -> Option<usize> {
        let constant = graph.constant(value)?;
        if constant.shape().len() != 2 || !constant.dtype().is_float() {
            return None;
        }
        Some(*at.entry(value).or_insert_with(|| {
            let leaves = modules.get(&value).map(|recipe| recipe.leaves()).unwrap_or_default();
            found.push(Matrix {
                value,
                name: graph.value(value).name.clone(),
                origin: constant.origin().map(str::to_string),
                modules: leaves.iter().map(|leaf| leaf.name.to_string()).collect(),
                products: Vec::new(),
                is_embedding: false,
                is_head: head == Some(value),
                is_fixed: false,
            });
            found.len() - 1
        }))
    };
    let ids = graph
        .interface
        .as_ref()
        .and_then(|interface| interface.input(Role::TokenIds));
    let uses = graph.uses();
    for id in graph.node_ids() {
        let node = graph.node(id);
        for (i, input) in node.inputs.iter().enumerate() {
            let Some(input) = *input else { continue };
            // A transposed weight is found at the reader of the transpose.
            if let (Op::Transpose { .. }, Some(output)) = (&node.op, node.output(0))
                && let Some(readers) = uses.get(&output)
                && is_turn(&node.op)
                && readers
                    .iter()
                    .all(|(reader, i)| graph.node(*reader).op == Op::MatMul && *i == 1)
                && !graph.outputs.contains(&output)
            {
                if let Some(index) = matrix(input, &mut found) {
                    found[index].products.extend(readers.iter().map(|(reader, _)| *reader));
                }
                continue;
            }
            let Some(index) = matrix(input, &mut found) else {
                continue;
            };
            match node.op {
                // Concatenated matrices of all experts.
                Op::Experts(_) if (3..=5).contains(&i) => found[index].products.push(id),
                // Ids may be cast or reshaped before the lookup: the module identifies the table.
                Op::Gather { axis: 0 }
                    if i == 0 && (node.input(1) == ids || found[index].modules == ["embedding.weight"]) =>
                {
                    found[index].is_embedding = true
                }
                _ => found[index].is_fixed = true,
            }
        }
    }
    // Tables of positions, masks and other two-dimensional constants are not such matrices.
    found.retain(|matrix| !matrix.products.is_empty() || matrix.is_embedding);
    found
}

/// The weight of a product with the transpose of a constant.
pub(super) fn weight_of(graph: &Graph, product: NodeId) -> Option<ValueId> {
    let node = graph.node(product);
    let (_, turn) = graph.def(node.input(1)?).filter(|_| node.op == Op::MatMul)?;
    let weight = turn.input(0).filter(|_| is_turn(&turn.op))?;
    graph.constant(weight).map(|_| weight)
}

/// The transpose of a matrix.
fn is_turn(op: &Op) -> bool {
    matches!(op, Op::Transpose { perm } if perm.as_deref().is_none_or(|perm| perm == [1, 0]))
}

/// The weight of the product that computes the logits, before caps, casts and the choice of rows.
fn head(graph: &Graph) -> Option<ValueId> {
    let mut at = match &graph.interface {
        Some(interface) => interface.logits(),
        None => *graph.outputs.first()?,
    };
    loop {
        let (id, node) = graph.def(at)?;
        if node.op == Op::MatMul {
            return weight_of(graph, id);
        }
        at = node
            .inputs
            .iter()
            .flatten()
            .copied()
            .find(|v| graph.constant(*v).is_none())?;
    }
}

/// Whether a name matches a pattern, where `*` is any text.
fn matches_pattern(name: &str, pattern: &str) -> bool {
    let mut parts = pattern.split('*');
    let Some(mut rest) = name.strip_prefix(parts.next().unwrap_or_default()) else {
        return false;
    };
    let mut parts = parts.peekable();
    while let Some(part) = parts.next() {
        if parts.peek().is_none() {
            return rest.ends_with(part);
        }
        match rest.find(part) {
            Some(at) => rest = &rest[at + part.len()..],
            None => return false,
        }
    }
    rest.is_empty()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patterns() {
        let matches = |name: &str, patterns: &[&str]| patterns.iter().all(|p| matches_pattern(name, p));
        assert!(matches(
            "layers.10.attention.query.weight",
            &[
                "*",
                "layers.*",
                "*.weight",
                "layers.*.query.*",
                "*attention*",
                "layers.1*"
            ]
        ));
        for pattern in ["layers.2.*", "*.bias", "query*", "*query", "layers.*.key.*", ""] {
            assert!(
                !matches_pattern("layers.10.attention.query.weight", pattern),
                "{pattern}"
            );
        }
        // The end is searched after the matched part.
        assert!(!matches_pattern("ab", "ab*b"));
        assert!(matches_pattern("abb", "ab*b"));
    }
}
