//! An `If` whose branches are constants: a choice between tables, as ORT-GenAI's builder writes LongRoPE.
//!
//! It becomes a `Where` of the constants. The shorter of two tables is padded with rows of zeros, which the original
//! cannot have read.

use super::Reader;
use super::branches::Branches;
use crate::graph::{Constant, Op, ValueId};
use crate::onnx::proto::GraphProto;
use crate::tensor::Tensor;

impl<'m> Reader<'m> {
    /// Writes the choice of each output to `outputs`. False: the branches are something else.
    pub(super) fn choose_constants(
        &mut self,
        branches: &Branches<'m>,
        condition: ValueId,
        outputs: &[Option<ValueId>],
        name: &str,
    ) -> bool {
        let both = [true, false].map(|taken| self.constants(branches.at(taken)));
        let [Some(then), Some(otherwise)] = both else {
            return false;
        };
        let pairs: Option<Vec<[Constant; 2]>> = then
            .into_iter()
            .zip(otherwise)
            .map(|(a, b)| same_length(a, b))
            .collect();
        let Some(pairs) = pairs else { return false };
        for (pair, output) in pairs.into_iter().zip(outputs) {
            let Some(output) = output else { continue };
            let [then, otherwise] = pair.map(|constant| {
                let own = constant.origin().unwrap_or(name).to_string();
                self.graph.add_constant(&own, constant)
            });
            let inputs = [condition, then, otherwise].map(Some).to_vec();
            self.graph
                .add_node_with_outputs(name, Op::Where, inputs, vec![Some(*output)]);
        }
        true
    }

    /// The outputs of a branch that computes nothing.
    fn constants(&self, branch: &'m GraphProto) -> Option<Vec<Constant>> {
        let is_constant = |op_type: Option<&str>, domain: Option<&str>| {
            op_type == Some("Constant") && super::domain_of(domain).is_empty()
        };
        if !branch
            .node
            .iter()
            .all(|node| is_constant(node.op_type.as_deref(), node.domain.as_deref()))
        {
            return None;
        }
        let of = |name: &str| -> Option<Constant> {
            let stored = branch.initializer.iter().find(|t| t.name.as_deref() == Some(name));
            let node = branch
                .node
                .iter()
                .find(|node| node.output.iter().any(|output| output == name));
            let proto = stored.or_else(|| {
                let value = node?.attribute.iter().find(|a| a.name.as_deref() == Some("value"))?;
                value.t.as_ref()
            })?;
            Some(self.folder.constant(proto, name).ok()?.with_origin(name))
        };
        let outputs = branch.output.iter();
        outputs.map(|output| of(output.name.as_deref()?)).collect()
    }
}

/// Two tensors of one shape, padded with rows of zeros. `None`: they differ in more than their first axis, or in their
/// dtype.
fn same_length(a: Constant, b: Constant) -> Option<[Constant; 2]> {
    let (left, right) = (a.shape().to_vec(), b.shape().to_vec());
    if a.dtype() != b.dtype() || left.len() != right.len() {
        return None;
    }
    if left == right {
        return Some([a, b]);
    }
    // Lookup tables by row.
    if left.len() != 2 || left[1..] != right[1..] || !a.dtype().is_float() {
        return None;
    }
    let rows = left[0].max(right[0]);
    let padded = |constant: Constant| {
        let (own, width, dtype) = (constant.shape()[0], constant.shape()[1], constant.dtype());
        if own == rows {
            return constant;
        }
        let missing = vec![rows - own, width];
        let zeros = Tensor::from_f64_as(dtype, missing, &vec![0.0; (rows - own) * width]);
        Constant::concat(&[constant, Constant::tensor(zeros)], 0)
    };
    Some([padded(a), padded(b)])
}
