//! Ranges and order comparisons, the building blocks of masks.
//!
//! A mask is `slot <= position` (and `slot > position - window`) over an iota of the slots. TensorRT has only Greater
//! and Less; for integers, `a <= b` is `a < b + 1`, with the 1 added on the smaller side: one number in decode.

use super::context::{Lowered, Lowering, network_dtype};
use super::error::Reason;
use crate::dim::{Dim, Sym};
use crate::graph::Node;
use crate::network::{Elementwise, TensorId};
use crate::tensor::{DType, Tensor};

impl Lowering<'_> {
    /// `a <= b`.
    pub(super) fn at_most(&mut self, name: &str, a: TensorId, b: TensorId) -> Lowered {
        let part = |part: &str| format!("{name}/{part}");
        let (dtype, rank) = (self.b.dtype(a), self.b.rank(a));
        if dtype.is_float() {
            let less = self.b.elementwise(&part("less"), Elementwise::Less, a, b)?;
            let equal = self.b.elementwise(&part("equal"), Elementwise::Equal, a, b)?;
            return Ok(self.b.elementwise(name, Elementwise::Or, less, equal)?);
        }
        let one = self.number(dtype, rank, 1.0)?;
        if self.elements(b) <= self.elements(a) {
            let above = self.b.elementwise(&part("above"), Elementwise::Sum, b, one)?;
            return Ok(self.b.elementwise(name, Elementwise::Less, a, above)?);
        }
        let below = self.b.elementwise(&part("below"), Elementwise::Sub, a, one)?;
        Ok(self.b.elementwise(name, Elementwise::Greater, b, below)?)
    }

    /// Number of elements, for comparing sizes; a dynamic token dim counts as 128.
    fn elements(&self, x: TensorId) -> i64 {
        let values = [(Sym::tokens(), 128)].into();
        let sizes = self.b.shape(x).iter().map(|d| d.eval(&values).unwrap_or(128));
        sizes.fold(1, i64::saturating_mul)
    }

    /// `Range(start, limit, delta)`: a Fill, shifted by the start if that is data.
    pub(super) fn range(&mut self, node: &Node, name: &str) -> Lowered {
        let output = self.input_or_output_dtype(node)?;
        let Some(delta) = self.scalar(node, 2) else {
            return Reason::unsupported("its step is not a constant");
        };
        let start = self.scalar(node, 0);
        let length = match (start, self.scalar(node, 1)) {
            (Some(start), Some(limit)) => Dim::from(((limit - start) / delta).ceil().max(0.0) as usize),
            _ => self.range_length(node)?,
        };
        let iota = self.b.fill(name, output, length, start.unwrap_or(0.0), delta)?;
        if start.is_some() {
            return Ok(iota);
        }
        let start = self.operand(node, 0, 1)?;
        Ok(self
            .b
            .elementwise(&format!("{name}/from"), Elementwise::Sum, iota, start)?)
    }

    fn input_or_output_dtype(&self, node: &Node) -> Lowered<DType> {
        let output = node.output(0).and_then(|v| self.graph.value(v).dtype);
        match output.map(network_dtype) {
            Some(dtype @ (DType::I32 | DType::F32)) => Ok(dtype),
            Some(dtype) => Reason::unsupported(format!("a range of {dtype}")),
            None => Reason::unsupported("its dtype is not known"),
        }
    }

    fn range_length(&self, node: &Node) -> Lowered<Dim> {
        let inferred = node.output(0).and_then(|v| self.inferred_shape(v));
        let known = |d: &Dim| d.symbols().iter().all(|s| *s == Sym::tokens());
        match inferred.as_deref() {
            Some([length]) if known(length) => Ok(length.clone()),
            _ => Reason::unsupported("its length is not known; it must follow from the shapes of the graph's inputs"),
        }
    }

    /// `Shape` and `Size` read as data.
    pub(super) fn known_contents(&mut self, node: &Node, name: &str) -> Lowered {
        let output = node
            .output(0)
            .ok_or_else(|| Reason::Unsupported("its output is unused".to_string()))?;
        let Some(contents) = self.facts.contents(output) else {
            return Reason::unsupported("the shape it reads is not known");
        };
        let dims = self.substituted(&contents.elements);
        let numbers: Option<Vec<i32>> = dims.iter().map(|d| d.as_const().map(|n| n as i32)).collect();
        let Some(numbers) = numbers else {
            return Reason::unsupported(format!(
                "the shape {dims:?} is read as data, and is not fixed in this profile"
            ));
        };
        let shape = if contents.scalar { vec![] } else { vec![numbers.len()] };
        Ok(self.b.constant(name, Tensor::from_i32(shape, &numbers))?)
    }
}
