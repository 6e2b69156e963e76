//! Values as tensors of the network: constants, ranks, and the parameters that decide shapes.

use super::context::{Lowered, Lowering, one};
use super::error::Reason;
use crate::dim::{Dim, Sym};
use crate::graph::{Node, ValueId};
use crate::network::{Shape, TensorId, Tokens};
use crate::tensor::{DType, Tensor};

impl Lowering<'_> {
    pub fn input_id(&self, node: &Node, i: usize) -> Lowered<ValueId> {
        node.input(i)
            .ok_or_else(|| Reason::Unsupported(format!("input {i} is missing")))
    }

    /// Input `i` as a tensor.
    pub fn data(&mut self, node: &Node, i: usize) -> Lowered {
        let id = self.input_id(node, i)?;
        self.value(id)
    }

    /// Input `i` as a tensor of at least this rank.
    pub fn operand(&mut self, node: &Node, i: usize, rank: usize) -> Lowered {
        let id = self.input_id(node, i)?;
        self.value_of_rank(id, rank)
    }

    pub fn value(&mut self, id: ValueId) -> Lowered {
        let tensor = match self.values.get(&id) {
            Some(tensor) => *tensor,
            None if self.graph.constant(id).is_some() => {
                let tensor = self.constant(id)?;
                self.values.insert(id, tensor);
                tensor
            }
            None => return Err(Reason::Upstream),
        };
        // A row-wise node reads values of all tokens through the gather, and values of other row-wise nodes directly.
        let of_rows = |id| {
            self.graph
                .producer_of(id)
                .is_some_and(|(node, _)| self.rows.contains(&node))
        };
        if self.in_rows && self.graph.constant(id).is_none() && !of_rows(id) {
            return self.chosen_rows(tensor);
        }
        Ok(tensor)
    }

    fn constant(&mut self, id: ValueId) -> Lowered {
        if let Some(index) = self.table.by_value.get(&id) {
            let weight = &self.table.list[*index];
            return self.weights(&[(weight.name.clone(), weight.constant.clone())], weight.is_table);
        }
        let literal = self.literal(id)?;
        Ok(self.b.constant(&self.graph.value(id).name, literal)?)
    }

    /// The bytes of a constant that is part of the plan.
    fn literal(&self, id: ValueId) -> Lowered<Tensor> {
        let constant = self.graph.constant(id).expect("the caller saw a constant");
        let tensor = constant.materialize()?;
        if tensor.dtype() != DType::I64 {
            return Ok(tensor);
        }
        let values = tensor.to_i64();
        let narrow: Result<Vec<i32>, _> = values.iter().map(|v| i32::try_from(*v)).collect();
        match narrow {
            Ok(narrow) => Ok(Tensor::from_i32(tensor.shape().to_vec(), &narrow)),
            Err(_) => Reason::unsupported(format!(
                "the constant {:?} holds integers beyond 32 bits",
                self.graph.value(id).name
            )),
        }
    }

    /// The value with leading 1s up to `rank`. Small constants are created with that rank.
    pub fn value_of_rank(&mut self, id: ValueId, rank: usize) -> Lowered {
        let literal = self.graph.constant(id).is_some() && !self.table.by_value.contains_key(&id);
        if let Some(tensor) = self.raised.get(&(id, rank)) {
            return Ok(*tensor);
        }
        let tensor = if literal {
            let literal = self.literal(id)?;
            let mut shape = vec![1; rank.saturating_sub(literal.shape().len())];
            shape.extend(literal.shape());
            let literal = literal.reshaped(shape).expect("ones keep the volume");
            self.b.constant(&self.graph.value(id).name, literal)?
        } else {
            let tensor = self.value(id)?;
            if self.graph.constant(id).is_none() {
                return self.raise(tensor, rank);
            }
            self.raise(tensor, rank)?
        };
        self.raised.insert((id, rank), tensor);
        Ok(tensor)
    }

    pub fn raise(&mut self, x: TensorId, rank: usize) -> Lowered {
        let name = format!("{}/rank{rank}", self.b.network().tensor(x).name);
        let shape = self.b.shape(x);
        if shape.len() >= rank {
            return Ok(x);
        }
        let mut to = vec![one(); rank - shape.len()];
        to.extend(shape.iter().cloned());
        self.reshape(&name, x, to)
    }

    /// Inputs `indices` in their common rank.
    pub fn aligned<const N: usize>(&mut self, node: &Node, indices: [usize; N]) -> Lowered<[TensorId; N]> {
        let mut rank = 0;
        for i in indices {
            let id = self.input_id(node, i)?;
            rank = rank.max(self.rank_of(id)?);
        }
        let mut tensors = [TensorId(0); N];
        for (slot, i) in tensors.iter_mut().zip(indices) {
            *slot = self.operand(node, i, rank)?;
        }
        Ok(tensors)
    }

    pub fn rank_of(&mut self, id: ValueId) -> Lowered<usize> {
        match self.graph.constant(id) {
            Some(constant) => Ok(constant.shape().len()),
            None => {
                let tensor = self.value(id)?;
                Ok(self.b.rank(tensor))
            }
        }
    }

    /// One number in the given rank; created once.
    pub fn number(&mut self, dtype: DType, rank: usize, value: f64) -> Lowered {
        let key = (dtype, rank, value.to_bits());
        if let Some(tensor) = self.numbers.get(&key) {
            return Ok(*tensor);
        }
        // The shortest decimal that reads back as the same f32.
        let tensor = self
            .b
            .number(&format!("const/{dtype}/{}", value as f32), dtype, rank, value)?;
        self.numbers.insert(key, tensor);
        Ok(tensor)
    }

    pub fn tokens(&self) -> Dim {
        match self.profile.tokens {
            Tokens::Static(n) => Dim::from(n),
            Tokens::Dynamic { .. } => Dim::sym(Sym::tokens()),
        }
    }

    pub fn substituted(&self, shape: &[Dim]) -> Shape {
        shape.iter().map(|d| d.substitute(&self.symbols)).collect()
    }

    /// The shape that inference found for a value, for this profile.
    pub fn inferred_shape(&self, id: ValueId) -> Option<Shape> {
        self.graph.shape(id).map(|shape| self.substituted(shape))
    }

    /// The scalar constant in input `i`.
    pub fn scalar(&self, node: &Node, i: usize) -> Option<f64> {
        let constant = self.graph.constant(node.input(i)?)?;
        (constant.len() == 1)
            .then(|| constant.materialize().ok()?.scalar())
            .flatten()
    }

    /// The elements of a parameter (a shape, axes, ends), as dims of this profile; `None` if it is omitted.
    pub fn parameter(&self, node: &Node, i: usize) -> Lowered<Option<Vec<Dim>>> {
        let Some(id) = node.input(i) else {
            return Ok(None);
        };
        if let Some(constant) = self.graph.constant(id) {
            let values = constant.materialize()?.to_i64();
            return Ok(Some(values.into_iter().map(Dim::from).collect()));
        }
        match self.facts.contents(id) {
            Some(contents) => Ok(Some(self.substituted(&contents.elements))),
            None => Reason::unsupported(format!(
                "its parameter {:?} is computed from data; only constants and shapes can be lowered",
                self.graph.value(id).name
            )),
        }
    }

    /// A parameter whose elements are numbers.
    pub fn integers(&self, node: &Node, i: usize) -> Lowered<Option<Vec<i64>>> {
        let Some(dims) = self.parameter(node, i)? else {
            return Ok(None);
        };
        let numbers: Option<Vec<i64>> = dims.iter().map(Dim::as_const).collect();
        match numbers {
            Some(numbers) => Ok(Some(numbers)),
            None => Reason::unsupported(format!("its parameter {i} is {dims:?}, which must be numbers")),
        }
    }
}
