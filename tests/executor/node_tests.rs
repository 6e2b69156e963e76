//! The ONNX project's node tests, lowered and executed, for each operator that has a lowering.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use lapidary::backend::cpu::{CompileOptions, CpuError, execute};
use lapidary::graph::{Constant, Graph};
use lapidary::lower::{self, lower_graph};
use lapidary::network::{Logits, Profile};
use lapidary::tensor::{DType, Tensor};
use prost::Message;

use crate::node_case::{each_case, model};
use crate::node_tensors::{compare, tensors};

/// The lowering computes integers in i32.
fn narrow(tensor: &Tensor) -> Tensor {
    match tensor.dtype() {
        DType::I64 => {
            let values: Vec<i32> = tensor.to_i64().into_iter().map(|v| v as i32).collect();
            Tensor::from_i32(tensor.shape().to_vec(), &values)
        }
        _ => tensor.clone(),
    }
}

/// Why a case was not compared, or the difference.
enum Outcome {
    Passed,
    /// The reader or the lowering refuses it, because decoder exports do not contain it.
    NotLowered(String),
    Wrong(String),
}

fn run(case: &Path, scratch: &Path, options: &CompileOptions) -> Outcome {
    let file = scratch.join("model.onnx");
    fs::write(&file, model(case).encode_to_vec()).unwrap();
    let graph = match lapidary::onnx::read(&file) {
        Ok(graph) => graph,
        Err(error) => return Outcome::NotLowered(error.to_string()),
    };
    let inputs = tensors(case, "input", scratch);
    let wanted = tensors(case, "output", scratch);
    // Shapes, axes and the like must be constants for a lowering. First all inputs stay inputs, then integer inputs
    // after the first become constants, then all inputs after the first.
    let ways: [fn(usize, &Tensor) -> bool; 3] = [|_, _| false, |i, t| i > 0 && t.dtype() == DType::I64, |i, _| i > 0];
    let mut refusal = String::new();
    let profile = Profile {
        logits: Logits::All,
        ..Profile::prefill(1, 4096)
    };
    for fixed in ways {
        let mut graph: Graph = graph.clone();
        let mut given = Vec::new();
        for (i, (id, tensor)) in graph.inputs.clone().into_iter().zip(&inputs).enumerate() {
            if fixed(i, tensor) {
                graph.set_constant(id, Constant::tensor(tensor.clone()));
                graph.inputs.retain(|other| *other != id);
            } else {
                given.push((graph.value(id).name.clone(), narrow(tensor)));
            }
        }
        let network = match lower_graph(&graph, &profile, &lower::LowerOptions::default()) {
            Ok(network) => network,
            Err(error) => {
                refusal = error.to_string();
                continue;
            }
        };
        let given: Vec<(&str, Tensor)> = given
            .iter()
            .filter(|(name, _)| network.find(name).is_some())
            .map(|(name, tensor)| (name.as_str(), tensor.clone()))
            .collect();
        let outputs = match execute(&network, &given, options) {
            Ok(outputs) => outputs.into_iter().collect::<BTreeMap<_, _>>(),
            // ONNX counts negative indices from the end. No export computes one, and the executor refuses them like a
            // token id outside the vocabulary.
            Err(CpuError::Index { index, .. }) if index < 0 => {
                return Outcome::NotLowered(format!("the index {index}"));
            }
            Err(error) => return Outcome::Wrong(error.to_string()),
        };
        for (id, wanted) in graph.outputs.iter().zip(&wanted) {
            let Some(got) = outputs.get(&graph.value(*id).name) else {
                return Outcome::NotLowered("an output has another name".to_string());
            };
            if let Err(difference) = compare(got, &narrow(wanted), tolerance) {
                return Outcome::Wrong(difference);
            }
        }
        return Outcome::Passed;
    }
    Outcome::NotLowered(refusal)
}

/// The vectors of half floats were rounded after every step, the executor rounds at the end.
fn tolerance(dtype: DType) -> f64 {
    match dtype {
        DType::F16 => 5e-3,
        DType::Bf16 => 4e-2,
        DType::F32 => 2e-5,
        _ => 0.0,
    }
}

#[test]
fn node_tests_give_the_recorded_outputs() {
    let options = CompileOptions::with_threads(1);
    let (mut passed, mut left, mut wrong) = (0, Vec::new(), Vec::new());
    let all = each_case(|name, case, scratch| match run(case, scratch, &options) {
        Outcome::Passed => passed += 1,
        Outcome::NotLowered(why) => left.push(format!("{name}: {why}")),
        Outcome::Wrong(why) => wrong.push(format!("{name}: {why}")),
    });
    println!("{passed} passed; not lowered:\n{}", left.join("\n"));
    let count = wrong.len();
    assert!(wrong.is_empty(), "{count} of {all} differ:\n{}", wrong.join("\n"));
    // An operator that stops being lowered must not go unnoticed.
    assert!(passed >= LOWERED, "only {passed} cases were run");
}

/// The number of cases with a lowering today.
const LOWERED: usize = 300;
