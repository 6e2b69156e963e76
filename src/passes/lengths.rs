//! Lengths at which the values that an export computes from positions can change.
//!
//! A proof by execution covers only the sizes at which it runs. A window, the end of a table or a switch of the rotary
//! scaling has an effect only beyond its length, but that length must occur in the export: as a constant of its
//! arithmetic or as a dim of a table. [`lengths`] collects these, so that every proof runs below, at and beyond each of
//! them. Lengths computed from them (a block of 64 times 16 blocks) are covered by proofs at the last position.

use std::collections::{BTreeMap, BTreeSet};

use crate::graph::op::Op;
use crate::graph::{Constant, Graph, ValueId};
use crate::tensor::DType;

/// Larger numbers are "to the end" of a slice or other sentinels, not lengths of a model.
const LONGEST: f64 = (1 << 20) as f64;

/// Constants with more elements are tables: their dims are lengths, their elements are not.
const SMALL: usize = 16;

/// Lengths in the computation of `of`, each with a constant that it comes from. The walk back through the graph stops
/// at values for which `stop` holds.
pub fn lengths(
    graph: &Graph,
    of: impl IntoIterator<Item = ValueId>,
    stop: impl Fn(ValueId) -> bool,
) -> BTreeMap<usize, String> {
    let mut found = BTreeMap::new();
    for id in computed_from(graph, of, stop) {
        for length in of_constant(graph, id) {
            found.entry(length).or_insert_with(|| graph.value(id).name.clone());
        }
    }
    found
}

/// All values that the elements of `of` are computed from, themselves included, up to those for which `stop` holds.
/// Lengths come from shapes; the elements of the tensors with these shapes do not matter.
fn computed_from(
    graph: &Graph,
    of: impl IntoIterator<Item = ValueId>,
    stop: impl Fn(ValueId) -> bool,
) -> BTreeSet<ValueId> {
    let mut stack: Vec<ValueId> = of.into_iter().filter(|id| !stop(*id)).collect();
    let mut seen: BTreeSet<ValueId> = stack.iter().copied().collect();
    while let Some(id) = stack.pop() {
        if let Some((_, node)) = graph.def(id)
            && !matches!(node.op, Op::Shape { .. } | Op::Size)
        {
            stack.extend(node.inputs.iter().flatten().filter(|v| !stop(**v) && seen.insert(**v)));
        }
    }
    seen
}

fn of_constant(graph: &Graph, id: ValueId) -> Vec<usize> {
    let Some(constant) = graph.constant(id) else {
        return Vec::new();
    };
    if constant.len() > SMALL {
        return constant.shape().iter().copied().filter(|dim| *dim > 1).collect();
    }
    if constant.dtype() == DType::Bool {
        return Vec::new();
    }
    let Ok(tensor) = constant.materialize() else {
        return Vec::new();
    };
    let float = constant.dtype().is_float();
    let numbers = tensor.to_f64().into_iter();
    // A float this small is the fill value of masked scores.
    let numbers = numbers.filter(|v| !(float && *v <= super::attention::MASKED));
    let lengths = numbers
        .map(f64::abs)
        .filter(|v| v.fract() == 0.0 && *v <= LONGEST && *v > 1.0);
    lengths.map(|v| v as usize).collect()
}

/// Whether a table with two long axes is read, such as a mask of `[positions, positions]`.
pub fn reads_matrix(graph: &Graph, of: impl IntoIterator<Item = ValueId>) -> bool {
    let long = |constant: &Constant| constant.shape().iter().filter(|dim| **dim >= SMALL).count() > 1;
    let values = computed_from(graph, of, |_| false);
    values.into_iter().any(|id| graph.constant(id).is_some_and(long))
}

/// Positions for proofs, below `end`: around each length, after each power of two, and the last one.
pub fn positions(lengths: &BTreeMap<usize, String>, end: usize) -> BTreeSet<usize> {
    let around = lengths.keys().flat_map(|length| [length - 1, *length, length + 1]);
    let powers = (3..usize::BITS - 1).map(|power| (1 << power) + 1);
    let last = end.checked_sub(1);
    let powers = powers.take_while(|position| *position < end);
    around.chain(powers).filter(|p| *p < end).chain(last).collect()
}

/// The largest total length up to `end` at which `holds`, which is true at `start` and false at `end`.
pub fn last_where(start: usize, end: usize, holds: impl Fn(usize) -> bool) -> usize {
    let (mut good, mut bad) = (start, end);
    while bad - good > 1 {
        let middle = good + (bad - good) / 2;
        match holds(middle) {
            true => good = middle,
            false => bad = middle,
        }
    }
    good
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tensor::Tensor;

    #[test]
    fn numbers_and_the_dims_of_tables_are_lengths_and_sentinels_are_not() {
        let mut graph = Graph::new("lengths");
        let mut constant = |name: &str, tensor: Tensor| graph.add_constant(name, tensor);
        let numbers = constant("numbers", Tensor::from_i64(vec![4], &[-300, 1, i64::MAX, 7]));
        let fill = constant("fill", Tensor::from_f32(vec![], &[-10000.0]));
        let table = constant("table", Tensor::from_bool(vec![1, 20, 30], &[true; 600]));
        let sum = graph.add_node("sum", Op::Concat { axis: 0 }, &[numbers, fill, table]);
        let found = lengths(&graph, [sum], |_| false);
        assert_eq!(found.keys().copied().collect::<Vec<_>>(), [7, 20, 30, 300]);
        assert_eq!(found[&300], "numbers");
        assert!(reads_matrix(&graph, [sum]) && !reads_matrix(&graph, [numbers, fill]));
        assert!(lengths(&graph, [sum], |id| id == sum).is_empty());
        let found: Vec<usize> = positions(&found, 25).into_iter().collect();
        assert_eq!(found, [6, 7, 8, 9, 17, 19, 20, 21, 24]);
    }

    #[test]
    fn the_last_length_is_found() {
        for last in 3..40 {
            assert_eq!(last_where(3, 40, |n| n <= last), last);
        }
    }
}
