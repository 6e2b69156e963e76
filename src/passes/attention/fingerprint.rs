//! Layers repeat: a proof for one layer holds for another if both are the same computation.
//!
//! A [`fingerprint`] covers everything that a value computed from given leaves depends on: operators with their
//! attributes, the dtypes and shapes of the leaves, and which constants and positional values are read. Equal
//! fingerprints mean equal computations, so `projection` and `cache` execute one layer and recognize the others; with a
//! static cache of thousands of slots and dozens of layers this takes milliseconds instead of minutes.

use std::collections::HashMap;

use crate::graph::ValueId;
use crate::passes::dependence::Dependence;
use crate::passes::partial_eval::PartialEvaluator;

pub type Fingerprint = blake3::Hash;

/// The computation of `value` from `leaves`; `context` distinguishes further.
pub fn fingerprint(evaluator: &PartialEvaluator<'_>, value: ValueId, leaves: &[ValueId], context: &str) -> Fingerprint {
    let mut memo = HashMap::new();
    let value = walk(evaluator, value, leaves, &mut memo);
    blake3::Hasher::new()
        .update(value.as_bytes())
        .update(context.as_bytes())
        .finalize()
}

fn walk(
    evaluator: &PartialEvaluator<'_>,
    id: ValueId,
    leaves: &[ValueId],
    memo: &mut HashMap<ValueId, Fingerprint>,
) -> Fingerprint {
    if let Some(known) = memo.get(&id) {
        return *known;
    }
    let graph = evaluator.graph;
    let value = graph.value(id);
    let mut hasher = blake3::Hasher::new();
    if let Some(leaf) = leaves.iter().position(|l| *l == id) {
        hasher.update(format!("leaf {leaf} {:?} {:?}", value.dtype, value.shape).as_bytes());
    } else if let (Dependence::Data, Some((node, output))) = (evaluator.dependence(id), graph.producer_of(id)) {
        let node = graph.node(node);
        hasher.update(format!("node {output} {:?}", node.op).as_bytes());
        for input in &node.inputs {
            match input {
                Some(input) => hasher.update(walk(evaluator, *input, leaves, memo).as_bytes()),
                None => hasher.update(b"none"),
            };
        }
    } else {
        // Constants and positional values are equal only if they are the same value; `cleanup` has merged equal ones.
        hasher.update(format!("value {id:?}").as_bytes());
    }
    let found = hasher.finalize();
    memo.insert(id, found);
    found
}
