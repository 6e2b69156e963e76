//! A network cut at Lapidary's own layers: the parts that TensorRT builds, and the kernels between them.
//!
//! [`Steps::of`] orders a network into engine segments and kernel layers. A segment is as large as the order allows: a
//! layer is in segment n if the longest path to it changes n times from kernels to TensorRT's layers. Segments of equal
//! layers over different tensors, such as those of a model's layers, share one plan.

use std::collections::{HashMap, HashSet};

use super::{Layer, LayerKind, Network, Tensor, TensorId, Weight, WeightId, WeightMode};
use crate::graph::Constant;

/// The steps of a network.
#[derive(Clone, Debug)]
pub struct Steps {
    /// In order of execution.
    pub steps: Vec<Step>,
    /// The segments, in order of execution.
    pub segments: Vec<Segment>,
}

/// One step of a network.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Step {
    /// The segment of this number.
    Engine(usize),
    /// The layer of this number, one of Lapidary's own.
    Kernel(usize),
}

/// A part of a network without Lapidary's own layers.
#[derive(Clone, Debug)]
pub struct Segment {
    /// Its tensors and weights have the same names as in the whole network; its inputs and outputs are those of the
    /// whole, and what other steps compute or read. It has no interface.
    pub network: Network,
    /// Which of the plans runs it: segments of equal layers share one.
    pub plan: usize,
}

impl Segment {
    /// Inputs, bound weights and outputs by name. Segments that share a plan have corresponding ones in the same order,
    /// under other names.
    pub fn ports(&self) -> Vec<&str> {
        let network = &self.network;
        let name = |id: &TensorId| network.tensor(*id).name.as_str();
        let bound = network.weights.iter().filter(|weight| weight.mode == WeightMode::Bind);
        let inputs = network.inputs.iter().map(name);
        let weights = bound.map(|weight| weight.name.as_str());
        inputs.chain(weights).chain(network.outputs.iter().map(name)).collect()
    }
}

impl Steps {
    /// Cuts a verified network.
    pub fn of(network: &Network) -> Steps {
        let levels = levels(network);
        let mut steps = Vec::new();
        let mut segments: Vec<Segment> = Vec::new();
        let mut plans: HashMap<String, usize> = HashMap::new();
        let last = levels.iter().flatten().max().copied().unwrap_or(0);
        for level in 0..=last {
            let here = |i: &usize| levels[*i] == Some(level);
            let layers: Vec<usize> = (0..network.layers.len()).filter(here).collect();
            if level % 2 == 1 {
                steps.extend(layers.into_iter().map(Step::Kernel));
            } else if !layers.is_empty() {
                let part = part(network, &layers);
                let next = plans.len();
                let plan = *plans.entry(signature(&part)).or_insert(next);
                steps.push(Step::Engine(segments.len()));
                segments.push(Segment { network: part, plan });
            }
        }
        Steps { steps, segments }
    }

    /// The networks of the plans: the first of those that share one.
    pub fn plans(&self) -> Vec<&Network> {
        let mut plans: Vec<&Network> = Vec::new();
        for segment in &self.segments {
            if segment.plan == plans.len() {
                plans.push(&segment.network);
            }
        }
        plans
    }
}

/// Where each layer runs: kernels at odd levels, others at even ones. Weights and constants have no level: every reader
/// has its own copy.
fn levels(network: &Network) -> Vec<Option<usize>> {
    let mut of_tensor: Vec<Option<usize>> = vec![None; network.tensors.len()];
    let mut levels = Vec::with_capacity(network.layers.len());
    for layer in &network.layers {
        if is_source(layer) {
            levels.push(None);
            continue;
        }
        let parity = usize::from(layer.kind.is_kernel_layer());
        let inputs = layer.inputs.iter().filter_map(|id| of_tensor[id.0 as usize]);
        let after = inputs.map(|level| level + usize::from(level % 2 != parity)).max();
        let level = after.unwrap_or(parity);
        for output in &layer.outputs {
            of_tensor[output.0 as usize] = Some(level);
        }
        levels.push(Some(level));
    }
    levels
}

fn is_source(layer: &Layer) -> bool {
    matches!(layer.kind, LayerKind::Weight(_) | LayerKind::Constant(_))
}

/// These layers, with the weights and constants they read, as their own network.
fn part(whole: &Network, layers: &[usize]) -> Network {
    let mut part = Part {
        whole,
        network: Network::new(whole.name.clone(), whole.profile),
        ids: HashMap::new(),
        sources: HashMap::new(),
    };
    let producers = whole.layers.iter().enumerate();
    let sources = producers.filter(|(_, layer)| is_source(layer));
    part.sources = sources.map(|(i, layer)| (layer.outputs[0], i)).collect();
    let inside: HashSet<TensorId> = layers.iter().flat_map(|i| whole.layers[*i].outputs.clone()).collect();
    for layer in layers.iter().map(|i| &whole.layers[*i]) {
        for input in &layer.inputs {
            if !inside.contains(input) && !part.sources.contains_key(input) && !part.ids.contains_key(input) {
                let id = part.tensor(*input);
                part.network.inputs.push(id);
            }
        }
    }
    for layer in layers.iter().map(|i| &whole.layers[*i]) {
        part.layer(layer);
    }
    let outside = whole.layers.iter().enumerate().filter(|(i, _)| !layers.contains(i));
    let read: HashSet<TensorId> = outside.flat_map(|(_, layer)| layer.inputs.iter().copied()).collect();
    for output in layers.iter().flat_map(|i| &whole.layers[*i].outputs) {
        if read.contains(output) || whole.outputs.contains(output) {
            part.network.outputs.push(part.ids[output]);
        }
    }
    part.network
}

struct Part<'n> {
    whole: &'n Network,
    network: Network,
    ids: HashMap<TensorId, TensorId>,
    /// Layers of weights and constants, by their outputs.
    sources: HashMap<TensorId, usize>,
}

impl Part<'_> {
    fn tensor(&mut self, id: TensorId) -> TensorId {
        let tensors = &mut self.network.tensors;
        *self.ids.entry(id).or_insert_with(|| {
            tensors.push(self.whole.tensor(id).clone());
            TensorId(tensors.len() as u32 - 1)
        })
    }

    fn layer(&mut self, layer: &Layer) {
        for input in &layer.inputs {
            if let Some(source) = self.sources.get(input).copied()
                && !self.ids.contains_key(input)
            {
                self.layer(&self.whole.layers[source]);
            }
        }
        let kind = match layer.kind {
            LayerKind::Weight(id) => {
                self.network.weights.push(self.whole.weight(id).clone());
                LayerKind::Weight(WeightId(self.network.weights.len() as u32 - 1))
            }
            _ => layer.kind.clone(),
        };
        let inputs = layer.inputs.iter().map(|id| self.tensor(*id)).collect();
        let outputs = layer.outputs.iter().map(|id| self.tensor(*id)).collect();
        self.network.layers.push(Layer {
            name: layer.name.clone(),
            kind,
            inputs,
            outputs,
        });
    }
}

/// Equal for networks with the same plan except for names: their text with numbers instead of names, and the elements
/// of constants.
fn signature(network: &Network) -> String {
    let mut network = network.clone();
    network.name.clear();
    let tensors = network.tensors.into_iter().enumerate();
    network.tensors = tensors
        .map(|(i, tensor)| Tensor {
            name: format!("t{i}"),
            ..tensor
        })
        .collect();
    let mut elements = String::new();
    for (i, layer) in network.layers.iter_mut().enumerate() {
        layer.name = format!("l{i}");
        if let LayerKind::Constant(tensor) = &layer.kind {
            elements.push_str(&format!("\n{i}: {:?}", tensor.data()));
        }
    }
    for (i, weight) in network.weights.iter_mut().enumerate() {
        let constant = match weight.mode {
            // Only its type is in the plan.
            WeightMode::Bind => Constant::absent(weight.constant.dtype(), weight.constant.shape().to_vec()),
            WeightMode::Embed | WeightMode::Strip => continue,
        };
        *weight = Weight {
            name: format!("w{i}"),
            constant: constant.with_origin(&format!("w{i}")),
            mode: weight.mode,
        };
    }
    format!("{network}{elements}")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lower::synthetic::Decoder;
    use crate::lower::{LowerOptions, lower};
    use crate::network::{Profile, verify};
    use crate::tensor::DType;

    fn network(decoder: Decoder) -> Network {
        let options = LowerOptions {
            kernels: true,
            ..LowerOptions::for_engines()
        };
        let decoder = Decoder {
            dtype: DType::F16,
            head_dim: 16,
            ..decoder
        };
        lower(&decoder.graph(), &Profile::decode(32), &options).unwrap()
    }

    fn kinds(steps: &Steps) -> String {
        let letter = |step: &Step| match step {
            Step::Engine(_) => 'e',
            Step::Kernel(_) => 'k',
        };
        steps.steps.iter().map(letter).collect()
    }

    #[test]
    fn a_llama_is_one_segment_and_kernels() {
        let network = network(Decoder::tiny());
        let steps = Steps::of(&network);
        // The embedding; of each of two layers q, k and v; attention; output; gate and up; down; the logits.
        assert_eq!(kinds(&steps), "ekkkkkkkkkkk", "{network}");
        assert_eq!(steps.plans().len(), 1);
    }

    /// Every tensor is computed by one step before it is read, in a valid network.
    #[test]
    fn steps_are_in_order() {
        let softcap = Decoder {
            softcap: 3.0,
            ..Decoder::tiny()
        };
        for decoder in [Decoder::tiny(), softcap] {
            let network = network(decoder);
            let steps = Steps::of(&network);
            let mut known: HashSet<&str> = network
                .inputs
                .iter()
                .map(|id| network.tensor(*id).name.as_str())
                .collect();
            known.extend(network.weights.iter().map(|weight| weight.name.as_str()));
            let mut layers = 0;
            for step in &steps.steps {
                let (reads, gives): (Vec<&str>, Vec<&str>) = match step {
                    Step::Engine(segment) => {
                        let part = &steps.segments[*segment].network;
                        verify(part).unwrap();
                        layers += part.layers.iter().filter(|layer| !is_source(layer)).count();
                        let names = |ids: &[TensorId]| ids.iter().map(|id| part.tensor(*id).name.as_str()).collect();
                        (names(&part.inputs), names(&part.outputs))
                    }
                    Step::Kernel(layer) => {
                        layers += 1;
                        let layer = &network.layers[*layer];
                        let names = |ids: &[TensorId]| ids.iter().map(|id| network.tensor(*id).name.as_str()).collect();
                        (names(&layer.inputs), names(&layer.outputs))
                    }
                };
                assert!(reads.iter().all(|name| known.contains(name)), "{reads:?}");
                assert!(gives.iter().all(|name| known.insert(name)), "{gives:?}");
            }
            let all = network.layers.iter().filter(|layer| !is_source(layer)).count();
            assert_eq!(layers, all);
            assert!(
                network
                    .outputs
                    .iter()
                    .all(|id| known.contains(network.tensor(*id).name.as_str()))
            );
        }
    }
}
