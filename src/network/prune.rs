//! Removes layers, tensors and weights that no output of a network depends on, and renumbers the rest.

use std::collections::HashMap;

use super::{LayerKind, Network, TensorId, WeightId};

/// Inputs stay, whether read or not: they are the interface.
pub(super) fn prune(network: &mut Network) {
    let mut live = vec![false; network.tensors.len()];
    for id in network.outputs.iter().chain(&network.inputs) {
        live[id.0 as usize] = true;
    }
    // Layers are in order of execution, so one walk from the end sees every reader before what it reads.
    let mut kept = vec![false; network.layers.len()];
    for (i, layer) in network.layers.iter().enumerate().rev() {
        if layer.outputs.iter().any(|id| live[id.0 as usize]) {
            kept[i] = true;
            for id in layer.inputs.iter().chain(&layer.outputs) {
                live[id.0 as usize] = true;
            }
        }
    }
    let mut flags = kept.into_iter();
    network.layers.retain(|_| flags.next().expect("one flag a layer"));

    let mut numbers = vec![TensorId(u32::MAX); network.tensors.len()];
    let mut next = 0u32;
    for (i, live) in live.iter().enumerate() {
        if *live {
            numbers[i] = TensorId(next);
            next += 1;
        }
    }
    let mut flags = live.into_iter();
    network.tensors.retain(|_| flags.next().expect("one flag a tensor"));
    let renumber = |id: &mut TensorId| *id = numbers[id.0 as usize];

    let mut weights: HashMap<WeightId, WeightId> = HashMap::new();
    let mut kept_weights = Vec::new();
    for layer in &mut network.layers {
        layer.inputs.iter_mut().chain(&mut layer.outputs).for_each(renumber);
        if let LayerKind::Weight(id) = &mut layer.kind {
            *id = *weights.entry(*id).or_insert_with(|| {
                kept_weights.push(network.weights[id.0 as usize].clone());
                WeightId(kept_weights.len() as u32 - 1)
            });
        }
    }
    network.weights = kept_weights;
    network.inputs.iter_mut().chain(&mut network.outputs).for_each(renumber);
    network.interface = network
        .interface
        .take()
        .map(|interface| interface.map(|id| numbers[id.0 as usize]));
}
