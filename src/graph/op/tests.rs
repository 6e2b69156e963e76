use std::collections::HashSet;

use super::*;
use crate::dim::Dim;
use crate::graph::eval::{EvalError, eval_op};
use crate::graph::{Graph, infer};
use crate::tensor::{DType, Tensor};

/// Attributes as from a dump or a file.
struct Listed(Vec<(&'static str, Attribute)>);

impl Listed {
    fn get(&self, name: &str) -> Option<Attribute> {
        self.0.iter().find(|(n, _)| *n == name).map(|(_, value)| value.clone())
    }
}

impl AttributeSource for Listed {
    type Error = AttributeError;
    fn int(&self, name: &str) -> Result<Option<i64>, AttributeError> {
        Ok(self.get(name).map(|a| match a {
            Attribute::Int(v) => v,
            other => panic!("{name} is {other:?}"),
        }))
    }
    fn float(&self, name: &str) -> Result<Option<f32>, AttributeError> {
        Ok(self.get(name).map(|a| match a {
            Attribute::Float(v) => v,
            other => panic!("{name} is {other:?}"),
        }))
    }
    fn ints(&self, name: &str) -> Result<Option<Vec<i64>>, AttributeError> {
        Ok(self.get(name).map(|a| match a {
            Attribute::Ints(v) => v,
            other => panic!("{name} is {other:?}"),
        }))
    }
    fn text(&self, name: &str) -> Result<Option<String>, AttributeError> {
        Ok(self.get(name).map(|a| match a {
            Attribute::Text(v) => v.to_string(),
            other => panic!("{name} is {other:?}"),
        }))
    }
    fn dtype(&self, name: &str) -> Result<Option<DType>, AttributeError> {
        Ok(self.get(name).map(|a| match a {
            Attribute::DType(v) => v,
            other => panic!("{name} is {other:?}"),
        }))
    }
    fn tensor(&self, name: &str) -> Result<Option<Tensor>, AttributeError> {
        Ok(self.get(name).map(|a| match a {
            Attribute::Tensor(v) => v,
            other => panic!("{name} is {other:?}"),
        }))
    }
    fn ignore(&self, _: &[&str]) {}
}

#[test]
fn names_are_unique_within_their_domain_and_read_back() {
    let mut names = HashSet::new();
    for op in Op::all() {
        assert!(
            names.insert((op.domain().to_string(), op.op_type().to_string())),
            "{op:?} twice"
        );
        let source = Listed(op.attributes());
        assert_eq!(Op::read(op.domain(), op.op_type(), &source), Ok(Some(op.clone())));
        assert!(
            op.info().versions.is_sorted() && !op.info().versions.is_empty(),
            "{op:?}"
        );
    }
    assert_eq!(Op::read("", "Frobnicate", &Listed(Vec::new())), Ok(None));
}

/// Every operator of the table, with as many inputs as it needs at least.
fn node_of(op: &Op) -> Graph {
    let mut graph = Graph::new("g");
    let inputs: Vec<_> = op
        .info()
        .inputs
        .iter()
        .filter(|input| !input.optional)
        .map(|input| {
            let types = [DType::F32, DType::Bool, DType::I64, DType::I32];
            let dtype = types.into_iter().find(|dtype| input.types.takes(*dtype)).unwrap();
            graph.add_input("x", dtype, vec![Dim::constant(2), Dim::constant(2)])
        })
        .collect();
    let y = graph.add_node("y", op.clone(), &inputs);
    graph.outputs.push(y);
    graph
}

/// The families' files match on operators with a fallback, so the compiler does not list what a new operator lacks.
/// This test does.
#[test]
fn every_operator_has_a_rule_and_an_evaluator() {
    let mut missing = Vec::new();
    for op in Op::all() {
        let name = op.name();
        if op.info().family == Family::Unknown {
            missing.push(format!("{name}: a family (src/graph/op/table.rs)"));
            continue;
        }
        if let Err(error) = infer(&mut node_of(&op))
            && error.to_string().contains(crate::graph::infer::NO_RULE)
        {
            missing.push(format!(
                "{name}: a rule in src/graph/infer of the family {:?}",
                op.info().family
            ));
        }
        if matches!(eval_op(&op, &[]), Err(EvalError::Unknown(_))) {
            missing.push(format!(
                "{name}: an evaluator in src/graph/eval of the family {:?}",
                op.info().family
            ));
        }
    }
    assert!(missing.is_empty(), "missing:\n{}", missing.join("\n"));
}
