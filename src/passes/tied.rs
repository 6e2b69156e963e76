//! A language-model head whose weight repeats the embedding becomes a reader of the embedding.
//!
//! Exporters that transpose weights store a tied embedding twice. Both are sampled in a few places and, if those agree,
//! compared completely; only equal bytes become one weight. Recipes and absent weights stay unchanged.

use super::PassError;
use crate::graph::op::Op;
use crate::graph::{Constant, ConstantSource};
use crate::graph::{Graph, ValueId};
use crate::tensor::Tensor;

/// Returns the number of weights that are the embedding.
pub fn run(graph: &mut Graph) -> Result<usize, PassError> {
    let tables: Vec<ValueId> = graph
        .node_ids()
        .filter_map(|id| {
            let node = graph.node(id);
            let table = node.input(0).filter(|_| matches!(node.op, Op::Gather { axis: 0 }))?;
            plain(graph, table).map(|_| table)
        })
        .collect();
    let heads: Vec<ValueId> = graph
        .node_ids()
        .filter_map(|id| {
            let node = graph.node(id);
            match node.op {
                Op::MatMul | Op::Gemm { .. } => node.input(1),
                _ => None,
            }
        })
        .collect();
    let mut count = 0;
    for table in tables {
        for head in &heads {
            if *head == table {
                continue;
            }
            let (Some(embedding), Some(weight)) = (plain(graph, table), plain(graph, *head)) else {
                continue;
            };
            if embedding.shape() == weight.shape() && embedding.data() == weight.data() {
                graph.replace_uses(*head, table);
                count += 1;
            } else if is_transpose(&embedding, &weight) {
                let transposed = graph.constant(table).expect("checked above").transposed(&[1, 0]);
                graph.set_constant(*head, transposed);
                count += 1;
            }
        }
    }
    graph.remove_dead_nodes();
    graph.sort()?;
    Ok(count)
}

/// A matrix whose bytes are available.
fn plain(graph: &Graph, id: ValueId) -> Option<Tensor> {
    let constant: &Constant = graph.constant(id)?;
    match constant.source() {
        ConstantSource::Tensor(tensor) if tensor.shape().len() == 2 && tensor.dtype().is_float() => {
            Some(tensor.clone())
        }
        _ => None,
    }
}

/// Whether `b` is the transpose of `a`, byte for byte.
fn is_transpose(a: &Tensor, b: &Tensor) -> bool {
    let (&[rows, columns], size) = (&[a.shape()[0], a.shape()[1]], a.dtype().element_bytes());
    if b.shape() != [columns, rows] || a.dtype() != b.dtype() || a.is_empty() {
        return false;
    }
    let same = |r: usize, c: usize| {
        let (x, y) = ((r * columns + c) * size, (c * rows + r) * size);
        a.data()[x..x + size] == b.data()[y..y + size]
    };
    // Coprime strides sample rows and columns everywhere.
    if !(0..512).all(|i| same(i * 7919 % rows, i * 104_729 % columns)) {
        return false;
    }
    const BLOCK: usize = 64;
    let blocks = |n: usize| (0..n).step_by(BLOCK).map(move |start| start..(start + BLOCK).min(n));
    blocks(rows).all(|rs| blocks(columns).all(|cs| rs.clone().all(|r| cs.clone().all(|c| same(r, c)))))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dim::Dim;
    use crate::tensor::DType;

    /// `ids -> Gather(table) -> MatMul(weight)`
    fn model(weight: impl Fn(usize, usize) -> f32) -> Graph {
        let mut graph = Graph::new("g");
        let ids = graph.add_input("ids", DType::I64, vec![Dim::named("batch"), Dim::named("tokens")]);
        let values: Vec<f32> = (0..70 * 3).map(|i| (i / 3 * 10 + i % 3) as f32).collect();
        let table = graph.add_constant(
            "table",
            Constant::tensor(Tensor::from_f32(vec![70, 3], &values)).with_origin("table"),
        );
        let values: Vec<f32> = (0..3 * 70).map(|i| weight(i / 70, i % 70)).collect();
        let head = graph.add_constant("head", Tensor::from_f32(vec![3, 70], &values));
        let x = graph.add_node("x", Op::Gather { axis: 0 }, &[table, ids]);
        let y = graph.add_node("y", Op::MatMul, &[x, head]);
        graph.outputs.push(y);
        graph
    }

    #[test]
    fn a_transposed_copy_is_the_embedding_and_a_near_copy_is_not() {
        let mut tied = model(|h, v| (v * 10 + h) as f32);
        assert_eq!(run(&mut tied).unwrap(), 1);
        let head = tied.constant(tied.find("head").unwrap()).unwrap();
        assert_eq!((head.shape(), head.origin()), (&[3, 70][..], Some("table")));
        let mut other = model(|h, v| (v * 10 + h) as f32 + f32::from(u8::from((h, v) == (2, 69))));
        assert_eq!(run(&mut other).unwrap(), 0);
    }
}
