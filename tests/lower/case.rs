//! One operator or a few: a graph over random inputs, lowered, run layer by layer, and compared with the evaluator.

use std::collections::{BTreeMap, HashMap};

use lapidary::dim::Dim;
use lapidary::graph::eval::Evaluator;
use lapidary::graph::op::Op;
use lapidary::graph::{Constant, Graph, ValueId};
use lapidary::lower::{ExpertsForm, LinearForm, LowerOptions, lower_graph};
use lapidary::network::{Logits, Profile};
use lapidary::tensor::{DType, Tensor};

use crate::interpret::interpret;
use crate::models::{Random, difference};

/// A graph over random inputs and given constants.
pub struct Case {
    pub graph: Graph,
    random: Random,
    bindings: HashMap<ValueId, Tensor>,
}

impl Case {
    pub fn new() -> Self {
        Case {
            graph: Graph::new("case"),
            random: Random::new(3),
            bindings: HashMap::new(),
        }
    }

    pub fn bound(&mut self, tensor: Tensor) -> ValueId {
        let shape = tensor.shape().iter().map(|d| Dim::from(*d)).collect();
        let id = self
            .graph
            .add_input(&format!("in{}", self.bindings.len()), tensor.dtype(), shape);
        self.bindings.insert(id, tensor);
        id
    }
    pub fn floats(&mut self, shape: &[usize]) -> ValueId {
        let tensor = self.random.tensor(DType::F32, shape);
        self.bound(tensor)
    }
    pub fn ints(&mut self, shape: &[usize], values: &[i64]) -> ValueId {
        self.bound(Tensor::from_i64(shape.to_vec(), values))
    }
    pub fn bools(&mut self, shape: &[usize], values: &[bool]) -> ValueId {
        self.bound(Tensor::from_bool(shape.to_vec(), values))
    }
    pub fn i64s(&mut self, values: &[i64]) -> ValueId {
        self.graph.add_i64("parameter", values)
    }
    pub fn scalar(&mut self, value: f32) -> ValueId {
        self.graph.add_constant("scalar", Tensor::from_f32(vec![], &[value]))
    }
    pub fn weight(&mut self, shape: &[usize]) -> ValueId {
        let tensor = Constant::tensor(self.random.tensor(DType::F32, shape)).with_origin("weight");
        self.graph.add_constant("weight", tensor)
    }

    /// The node's outputs, lowered and interpreted, equal the evaluator's.
    pub fn node(mut self, op: Op, inputs: &[ValueId], outputs: usize) {
        let text = format!("{op:?}");
        let outputs: Vec<ValueId> = (0..outputs).map(|i| self.graph.add_value(&format!("out{i}"))).collect();
        let some = |ids: &[ValueId]| ids.iter().map(|id| Some(*id)).collect();
        self.graph
            .add_node_with_outputs("node", op, some(inputs), some(&outputs));
        self.graph.outputs = outputs;
        self.check(&text);
    }

    pub fn check(self, what: &str) {
        let Case { graph, bindings, .. } = self;
        let expected = Evaluator::new(&graph, bindings.clone())
            .values(&graph.outputs)
            .unwrap_or_else(|e| panic!("{what}: {e}"));
        let profile = Profile {
            logits: Logits::All,
            ..Profile::prefill(3, 16)
        };
        let narrow = |t: &Tensor| match t.dtype() {
            DType::I64 => Tensor::from_i32(
                t.shape().to_vec(),
                &t.to_i64().iter().map(|v| *v as i32).collect::<Vec<_>>(),
            ),
            _ => t.clone(),
        };
        let inputs: BTreeMap<String, Tensor> = bindings
            .iter()
            .map(|(id, t)| (graph.value(*id).name.clone(), narrow(t)))
            .collect();
        for (linear, experts) in [
            (LinearForm::FlattenActivation, ExpertsForm::Layer),
            (LinearForm::RaiseWeight, ExpertsForm::All),
            (LinearForm::RaiseWeight, ExpertsForm::Chosen),
        ] {
            let options = LowerOptions {
                linear,
                experts,
                ..LowerOptions::default()
            };
            let network = lower_graph(&graph, &profile, &options).unwrap_or_else(|e| panic!("{what}: {e}"));
            let found = interpret(&network, &inputs);
            for (id, expected) in graph.outputs.iter().zip(&expected) {
                let found = &found[&graph.value(*id).name];
                assert_eq!(found.dtype(), narrow(expected).dtype(), "{what}");
                assert_eq!(found.shape(), expected.shape(), "{what}");
                let worst = difference(found, expected);
                assert!(worst < 1e-5, "{what}: differs by {worst}");
            }
        }
    }
}
