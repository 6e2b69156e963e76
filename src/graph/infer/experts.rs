//! Routing and experts.

use super::node::{NodeInference, Outputs, one};
use super::{Fact, InferError};
use crate::dim::Dim;
use crate::graph::op::{Experts, Op, Routing};
use crate::tensor::DType;

impl NodeInference<'_> {
    /// The rules of [`Family::Experts`](crate::graph::op::Family).
    pub(super) fn experts_rule(&mut self) -> Result<Outputs, InferError> {
        match &self.node.op {
            Op::Routing(routing) => self.routing(routing),
            Op::Experts(experts) => self.experts(experts),
            _ => self.no_rule(),
        }
    }

    fn routing(&mut self, routing: &Routing) -> Result<Outputs, InferError> {
        self.require_rank(0, 1)?;
        let logits = self.input(0)?.clone();
        let (last, leading) = logits.shape.split_last().expect("a rank of 1 or more");
        if let Some(experts) = last.as_const() {
            let experts = usize::try_from(experts).unwrap_or(0);
            if routing.top_k > experts {
                return Err(self.error(format!("it chooses {} of {experts} experts", routing.top_k)));
            }
            let Routing {
                groups,
                top_groups,
                group_best,
                ..
            } = *routing;
            let size = experts.checked_div(groups).unwrap_or(experts);
            let fits = groups == 0
                || experts.is_multiple_of(groups)
                    && (1..=groups).contains(&top_groups)
                    && (1..=size).contains(&group_best);
            if !fits {
                return Err(self.error(format!(
                    "{experts} experts are not in {groups} groups of which {top_groups} are chosen by their best {group_best}"
                )));
            }
        }
        if let Some(correction) = self.optional(1).cloned() {
            match correction.shape.as_slice() {
                [each] => drop(self.unify(each, last, 1, 0)?),
                _ => return Err(self.error(format!("{} is not a number an expert", self.operand(1)))),
            }
        }
        let mut shape = leading.to_vec();
        shape.push(Dim::from(routing.top_k));
        Ok(vec![
            Some(Fact::new(logits.dtype, shape.clone())),
            Some(Fact::new(DType::I64, shape)),
        ])
    }

    fn experts(&mut self, experts: &Experts) -> Result<Outputs, InferError> {
        self.require_rank(0, 1)?;
        let count = experts.experts;
        let x = self.input(0)?.clone();
        let (width, leading) = x.shape.split_last().expect("a rank of 1 or more");
        for i in [1, 2] {
            let chosen = self.input(i)?.shape.clone();
            if chosen.len() != x.shape.len() {
                return Err(self.error(format!("{} has another rank than {}", self.operand(i), self.operand(0))));
            }
            for (a, b) in leading.iter().zip(&chosen) {
                self.unify(a, b, 0, i)?;
            }
        }
        let (weights, chosen) = (self.input(1)?.shape.clone(), self.input(2)?.shape.clone());
        let last = weights.len() - 1;
        self.unify(&weights[last], &chosen[last], 1, 2)?;
        let hidden = self.rows_of_experts(3, count, width)?;
        if self.optional(4).is_some() {
            let up = self.rows_of_experts(4, count, width)?;
            self.unify(&hidden, &up, 3, 4)?;
        }
        let out = self.rows_of_experts(5, count, &hidden)?;
        for (i, of) in [(6, &hidden), (7, &hidden), (8, &out)] {
            let Some(bias) = self.optional(i).cloned() else {
                continue;
            };
            let all = of * &Dim::from(count);
            match bias.shape.as_slice() {
                [found] if *found == all => {}
                _ => return Err(self.error(format!("{} does not have {all} elements", self.operand(i)))),
            }
        }
        let mut shape = leading.to_vec();
        shape.push(out);
        one(Fact::new(x.dtype, shape))
    }

    /// Rows of one expert in a matrix of all, whose columns meet `depth`.
    fn rows_of_experts(&mut self, i: usize, count: usize, depth: &Dim) -> Result<Dim, InferError> {
        let shape = self.input(i)?.shape.clone();
        let [rows, columns] = shape.as_slice() else {
            return Err(self.error(format!("{} is not a matrix", self.operand(i))));
        };
        self.unify(columns, depth, i, 0)?;
        match rows.as_const().and_then(|rows| usize::try_from(rows).ok()) {
            Some(rows) if rows.is_multiple_of(count) => Ok(Dim::from(rows / count)),
            _ => Err(self.error(format!("{} is not of {count} experts", self.operand(i)))),
        }
    }
}
