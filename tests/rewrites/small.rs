//! Small graphs: made by hand, rewritten, and compared with themselves before on random inputs.

use std::collections::{BTreeMap, HashMap};

use lapidary::dim::{Dim, Sym};
use lapidary::graph::eval::Evaluator;
use lapidary::graph::infer;
use lapidary::graph::op::{Binary, Reduction, Unary};
use lapidary::graph::{Graph, Op, ValueId};
use lapidary::passes::PassError;
use lapidary::tensor::{DType, Tensor};

/// A graph builder with the operators of these tests as methods.
pub struct Small {
    pub graph: Graph,
    pub dtype: DType,
}

impl Small {
    pub fn new(dtype: DType) -> Self {
        Small {
            graph: Graph::new("small"),
            dtype,
        }
    }

    /// A float input; dims by name or number.
    pub fn input(&mut self, name: &str, dims: &[&str]) -> ValueId {
        let shape = dims.iter().map(|d| Dim::parse(d)).collect();
        self.graph.add_input(name, self.dtype, shape)
    }

    pub fn number(&mut self, value: f64) -> ValueId {
        self.number_as(self.dtype, value)
    }

    pub fn number_as(&mut self, dtype: DType, value: f64) -> ValueId {
        self.graph
            .add_constant("number", Tensor::from_f64_as(dtype, vec![], &[value]))
    }

    pub fn constant(&mut self, shape: &[usize], seed: u64) -> ValueId {
        let tensor = random(self.dtype, shape.to_vec(), seed);
        self.graph.add_constant("weight", tensor)
    }

    pub fn ints(&mut self, values: &[i64]) -> ValueId {
        self.graph.add_i64("ints", values)
    }

    pub fn op(&mut self, op: Op, inputs: &[ValueId]) -> ValueId {
        let name = op.name();
        self.graph.add_node(&name, op, inputs)
    }
    pub fn unary(&mut self, op: Unary, x: ValueId) -> ValueId {
        self.op(Op::Unary(op), &[x])
    }
    pub fn binary(&mut self, op: Binary, a: ValueId, b: ValueId) -> ValueId {
        self.op(Op::Binary(op), &[a, b])
    }
    pub fn mul(&mut self, a: ValueId, b: ValueId) -> ValueId {
        self.binary(Binary::Mul, a, b)
    }
    pub fn add(&mut self, a: ValueId, b: ValueId) -> ValueId {
        self.binary(Binary::Add, a, b)
    }
    pub fn cast(&mut self, x: ValueId, to: DType) -> ValueId {
        self.op(Op::Cast { to }, &[x])
    }
    pub fn mean(&mut self, x: ValueId, axis: i64) -> ValueId {
        let axes = self.ints(&[axis]);
        let op = Op::Reduce {
            reduction: Reduction::Mean,
            keepdims: true,
            noop_with_empty_axes: false,
        };
        self.op(op, &[x, axes])
    }
    pub fn reshape(&mut self, x: ValueId, target: &[i64]) -> ValueId {
        let target = self.ints(target);
        self.op(Op::Reshape { allowzero: false }, &[x, target])
    }

    /// Types the graph with these outputs.
    pub fn finish(mut self, outputs: &[ValueId]) -> Graph {
        self.graph.outputs = outputs.to_vec();
        self.graph.sort().unwrap();
        infer(&mut self.graph).unwrap();
        self.graph
    }
}

/// Numbers between -2 and 2.
pub fn random(dtype: DType, shape: Vec<usize>, seed: u64) -> Tensor {
    let mut state = seed.wrapping_mul(0x2545_F491_4F6C_DD1D) | 1;
    let values: Vec<f64> = (0..shape.iter().product())
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state >> 40) as f64 / f64::from(1u32 << 22) - 2.0
        })
        .collect();
    Tensor::from_f64_as(dtype, shape, &values)
}

/// The outputs for random inputs.
pub fn run(graph: &Graph, seed: u64) -> Vec<Tensor> {
    let sizes = BTreeMap::from([("batch", 2), ("tokens", 3), ("past", 5)].map(|(n, v)| (Sym::new(n), v)));
    let bindings: HashMap<ValueId, Tensor> = graph
        .inputs
        .iter()
        .enumerate()
        .map(|(i, id)| {
            let value = graph.value(*id);
            let dims = value.shape.as_ref().unwrap();
            let shape: Vec<usize> = dims.iter().map(|d| d.eval(&sizes).unwrap() as usize).collect();
            (*id, random(value.dtype.unwrap(), shape, seed + i as u64))
        })
        .collect();
    let outputs = graph.outputs.clone();
    Evaluator::new(graph, bindings)
        .values(&outputs)
        .unwrap_or_else(|e| panic!("{e}"))
}

/// Rewrites a copy of the graph, checks that it computes the same with the same types, and returns it with the number
/// of rewrites.
pub fn rewrite(graph: &Graph, pass: impl Fn(&mut Graph) -> Result<usize, PassError>, tolerance: f64) -> (Graph, usize) {
    let mut rewritten = graph.clone();
    let count = pass(&mut rewritten).unwrap();
    infer(&mut rewritten).unwrap();
    for seed in [1, 2] {
        for (a, b) in run(graph, seed).iter().zip(run(&rewritten, seed)) {
            assert_eq!((a.dtype(), a.shape()), (b.dtype(), b.shape()));
            for (x, y) in a.to_f64().iter().zip(b.to_f64()) {
                assert!((x - y).abs() <= tolerance * (1.0 + x.abs()), "{x} became {y}");
            }
        }
    }
    (rewritten, count)
}

/// How many nodes have this ONNX name.
pub fn count(graph: &Graph, op: &str) -> usize {
    graph.node_ids().filter(|id| graph.node(*id).op.name() == op).count()
}
