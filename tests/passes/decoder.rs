//! Runs a canonical graph in the evaluator, like a session: static caches, positions, chunks of a prompt.

use std::collections::HashMap;

use lapidary::graph::eval::Evaluator;
use lapidary::graph::{Graph, ValueId};
use lapidary::interface::Role;
use lapidary::tensor::{DType, Tensor};

/// Caches of a canonical graph, and how far each sequence is.
pub struct Decoder<'g> {
    graph: &'g Graph,
    batch: usize,
    caches: HashMap<ValueId, Tensor>,
    past: Vec<usize>,
    /// Inputs and outputs of the caches.
    pairs: Vec<(ValueId, ValueId)>,
}

impl<'g> Decoder<'g> {
    /// Caches start full of noise: unused slots may have any finite value.
    pub fn new(graph: &'g Graph, batch: usize, capacity: usize) -> Self {
        let mut caches = HashMap::new();
        let interface = graph.interface.as_ref().expect("a canonical graph has one");
        let pairs: Vec<(ValueId, ValueId)> = interface
            .caches()
            .iter()
            .map(|pair| (pair.input, pair.output))
            .collect();
        for (id, _) in &pairs {
            let value = graph.value(*id);
            let dims = value.shape.as_ref().expect("canonical inputs are typed");
            let fixed = |i: usize| dims[i].as_const().expect("heads and head_dim are numbers") as usize;
            let shape = vec![batch, fixed(1), capacity, fixed(3)];
            let noise: Vec<f64> = (0..shape.iter().product())
                .map(|i: usize| ((i * 37) % 101) as f64 / 25.0 - 2.0)
                .collect();
            caches.insert(*id, Tensor::from_f64_as(value.dtype.unwrap(), shape, &noise));
        }
        Decoder {
            graph,
            batch,
            caches,
            past: vec![0; batch],
            pairs,
        }
    }

    /// Feeds an equal number of tokens to each sequence; returns the logits of the last of each.
    pub fn step(&mut self, rows: &[Vec<i64>]) -> Vec<Vec<f64>> {
        let end = self.past.iter().max().expect("there is a sequence") + rows[0].len();
        self.part_of_run(rows, end)
    }

    /// The same, for a run that continues to position `end`.
    pub fn part_of_run(&mut self, rows: &[Vec<i64>], end: usize) -> Vec<Vec<f64>> {
        let count = rows[0].len();
        let ids: Vec<i64> = rows.iter().flatten().copied().collect();
        let starts: Vec<i64> = self.past.iter().map(|p| *p as i64).collect();
        let positions: Vec<i64> = starts.iter().flat_map(|p| *p..*p + count as i64).collect();
        let mut bindings = self.caches.clone();
        bindings.insert(self.graph.inputs[0], Tensor::from_i64(vec![self.batch, count], &ids));
        bindings.insert(
            self.graph.inputs[1],
            Tensor::from_i64(vec![self.batch, count], &positions),
        );
        bindings.insert(self.graph.inputs[2], Tensor::from_i64(vec![self.batch], &starts));
        let interface = self.graph.interface.as_ref().expect("checked in new");
        if let Some(id) = interface.input(Role::TotalLengths) {
            bindings.insert(id, Tensor::from_i64(vec![self.batch], &vec![end as i64; self.batch]));
        }
        let mut evaluator = Evaluator::new(self.graph, bindings);
        let logits = evaluator.value(self.graph.outputs[0]).expect("logits can be computed");
        for (input, output) in &self.pairs {
            let updated = evaluator.value(*output).expect("caches can be computed");
            assert_eq!(updated.shape(), self.caches[input].shape());
            self.caches.insert(*input, updated);
        }
        self.past.iter_mut().for_each(|p| *p += count);
        let vocabulary = *logits.shape().last().unwrap();
        assert_eq!(logits.shape(), [self.batch, count, vocabulary]);
        assert!(logits.dtype() != DType::I64);
        let values = logits.to_f64();
        values
            .chunks(count * vocabulary)
            .map(|row| row[(count - 1) * vocabulary..].to_vec())
            .collect()
    }
}

pub fn argmax(logits: &[f64]) -> i64 {
    let best = logits.iter().enumerate().max_by(|a, b| a.1.total_cmp(b.1));
    best.expect("logits are not empty").0 as i64
}

/// The largest difference; infinite if either holds a NaN.
pub fn distance(a: &[f64], b: &[f64]) -> f64 {
    let difference = |(a, b): (&f64, &f64)| if (a - b).is_nan() { f64::INFINITY } else { (a - b).abs() };
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(difference).fold(0.0, f64::max)
}
