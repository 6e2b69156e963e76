//! Engines made ready: the plan from its file, a context, everything bound but the cache.
//!
//! Takes a slot of the device; gives what runs it. Weights go to the device with the first engine that wants them.

use std::collections::{HashMap, HashSet};
use std::rc::Rc;
use std::time::Instant;

use super::chunks::largest;
use super::error::{unknown, with_versions};
use super::weights::Weights;
use super::{CudaDevice, EngineSlot, Loaded};
use crate::backend::tensorrt::run::{Engine, LoadedPlan, Port, RunError};
use crate::decode::DeviceError;
use crate::interface::Role;
use crate::lower;
use crate::network::{Network, Tokens, WeightMode};
use crate::tensor::DType;

impl CudaDevice {
    pub(super) fn load(&mut self, at: usize) -> Result<Loaded, DeviceError> {
        let slot = &self.slots[at];
        let network = self.lowered(slot)?;
        if slot.entry.weight_mode == WeightMode::Bind && self.weights.is_none() {
            let start = Instant::now();
            let networks = self.networks_by_lowering()?;
            let weights = Weights::upload(self.runtime.cuda(), &self.stream, &networks);
            self.weights = Some(weights.map_err(|e| self.failed(e))?);
            self.times.weights += start.elapsed();
        }
        let plan = self.unpacked(slot, &network).map_err(|error| self.failed(error))?;
        self.context(at, &plan, &network)
    }

    /// A context of the slot's plan, bound to everything but the cache.
    pub(super) fn context(
        &mut self,
        at: usize,
        plan: &Rc<LoadedPlan>,
        network: &Network,
    ) -> Result<Loaded, DeviceError> {
        let slot = &self.slots[at];
        let graphs = self.options.graphs && matches!(slot.profile.tokens, Tokens::Static(_));
        let mut engine =
            Engine::of(plan, slot.entry.optimization_profile, graphs).map_err(|error| self.failed(error))?;
        // A dynamic engine's working memory is for the most that it will ever be asked for.
        let tokens = largest(slot.profile.tokens);
        if matches!(slot.entry.lowered_for().tokens, Tokens::Dynamic { .. }) {
            engine.set_tokens(tokens).map_err(|error| self.failed(error))?;
        }
        let bound = self.bind(&mut engine, network);
        bound.map_err(|error| self.failed(error))?;
        self.share_scratch(&mut engine).map_err(|error| self.failed(error))?;
        Ok(Loaded {
            engine,
            cache: 0,
            tokens,
        })
    }

    /// The slot's plan, from the file or from another slot that runs another profile of it.
    pub(super) fn unpacked(&self, slot: &EngineSlot, network: &Network) -> Result<Rc<LoadedPlan>, RunError> {
        let same_file = self.slots.iter().filter(|other| other.entry.file == slot.entry.file);
        if let Some(loaded) = same_file.filter_map(|other| other.loaded.as_ref()).next() {
            return Ok(loaded.engine.plan().clone());
        }
        let path = self.folder.join(&slot.entry.file);
        let unreadable = |source| RunError::Read {
            path: path.clone(),
            source,
        };
        let file = std::fs::File::open(&path).map_err(unreadable)?;
        // SAFETY: packages are written once and renamed into place; nothing changes them while they are mapped.
        let bytes = unsafe { memmap2::Mmap::map(&file) }.map_err(unreadable)?;
        let plan = LoadedPlan::new(&self.runtime, &path, &bytes, network, self.options.kernels.as_deref());
        let (built_by, here) = (&slot.entry.tensorrt_version, self.runtime.version().to_string());
        plan.map(Rc::new).map_err(|error| with_versions(error, built_by, &here))
    }

    /// The network that the slot's engine was built from.
    pub(super) fn lowered(&self, slot: &EngineSlot) -> Result<Network, DeviceError> {
        let options = lower::LowerOptions {
            weight_mode: slot.entry.weight_mode,
            ..slot.entry.lowering.clone()
        };
        lower::lower(&self.graph, slot.entry.lowered_for(), &options).map_err(|error| DeviceError {
            device: self.runtime.gpu().to_string(),
            message: error.to_string(),
            help: None,
        })
    }

    /// A network of each lowering that engines have, for one token and for several, where other products can be fused:
    /// together they name every weight as any engine does.
    pub(super) fn networks_by_lowering(&self) -> Result<Vec<Network>, DeviceError> {
        let mut seen = HashSet::new();
        let bound = self
            .slots
            .iter()
            .filter(|slot| slot.entry.weight_mode == WeightMode::Bind);
        bound
            .filter(|slot| {
                seen.insert((
                    &slot.entry.lowering,
                    slot.entry.lowered_for().tokens == Tokens::Static(1),
                ))
            })
            .map(|slot| self.lowered(slot))
            .collect()
    }

    /// Everything but the cache. Refuses an engine whose inputs and outputs are not the network's: addresses carry no
    /// sizes, and TensorRT would read on past a weight's end.
    pub(super) fn bind(&self, engine: &mut Engine, network: &Network) -> Result<(), RunError> {
        let declared = check_ports(engine.name(), engine.ports(), network)?;
        for port in engine.ports().to_vec() {
            let address = match declared[port.name.as_str()].role {
                Some(Role::Cache(_) | Role::UpdatedCache(_)) => continue,
                Some(Role::Logits) => (port.bytes(1) == self.logits.bytes()).then(|| self.logits.address()),
                Some(role) => self.inputs.address(role),
                None => self.weights.as_ref().and_then(|weights| weights.address(&port.name)),
            };
            let address = address.ok_or_else(|| unknown(engine.name(), &port))?;
            // SAFETY: these buffers live as long as the device, which drops engines first. They are as large as the
            // network's own tensors, which the ports were compared with: weights each by its constant, the small inputs
            // for the largest profile.
            unsafe { engine.bind([(port.name.as_str(), address)])? };
        }
        Ok(())
    }
}

/// What an engine of a network has for a port.
#[derive(Debug)]
struct Declared {
    dtype: DType,
    /// -1 where it depends on the call.
    shape: Vec<i64>,
    /// What a session binds to it; `None` for a weight.
    role: Option<Role>,
}

/// Whether every input and output has the dtype and shape that it has in the network, and none is missing that the session
/// reads. Gives what the network says of each.
fn check_ports<'n>(engine: &str, ports: &[Port], network: &'n Network) -> Result<HashMap<&'n str, Declared>, RunError> {
    let mismatch = |reason: String| RunError::Mismatch {
        engine: engine.to_string(),
        reason,
    };
    let declared = declared(network);
    for port in ports {
        let Declared { dtype, shape, .. } = declared.get(port.name.as_str()).ok_or_else(|| unknown(engine, port))?;
        if (*dtype, shape) != (port.dtype, &port.shape) {
            return Err(mismatch(format!(
                "its {:?} is {} {:?}, the package's network has {dtype} {shape:?}",
                port.name, port.dtype, port.shape
            )));
        }
    }
    let outputs = network.outputs.iter().map(|id| network.tensor(*id));
    let missing = outputs
        .map(|t| &t.name)
        .find(|name| !ports.iter().any(|port| port.name == **name));
    match missing {
        Some(name) => Err(mismatch(format!("it has no output {name:?}"))),
        None => Ok(declared),
    }
}

/// What an engine of the network has for ports: its inputs and outputs, and every bound weight under the weight's own name.
fn declared(network: &Network) -> HashMap<&str, Declared> {
    let role = |id| network.interface.as_ref().and_then(|interface| interface.role_of(id));
    let tensors = network.inputs.iter().chain(&network.outputs).map(|id| {
        let tensor = network.tensor(*id);
        let declared = Declared {
            dtype: tensor.dtype,
            shape: tensor.shape.iter().map(|dim| dim.as_const().unwrap_or(-1)).collect(),
            role: role(*id),
        };
        (tensor.name.as_str(), declared)
    });
    let bound = network.weights.iter().filter(|w| w.mode == WeightMode::Bind);
    let weights = bound.map(|weight| {
        let declared = Declared {
            dtype: weight.constant.dtype(),
            shape: weight.constant.shape().iter().map(|d| *d as i64).collect(),
            role: None,
        };
        (weight.name.as_str(), declared)
    });
    tensors.chain(weights).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lower::LowerOptions;
    use crate::lower::synthetic::Decoder;
    use crate::network::Profile;

    /// A small network and the ports of its engine, as TensorRT would name them.
    fn engine() -> (Network, Vec<Port>) {
        let options = LowerOptions {
            weight_mode: WeightMode::Bind,
            ..LowerOptions::default()
        };
        let graph = Decoder::tiny().graph();
        let tokens = Tokens::Dynamic { min: 1, opt: 4, max: 8 };
        let profile = Profile {
            tokens,
            ..Profile::decode(16)
        };
        let network = lower::lower(&graph, &profile, &options).unwrap();
        let sides = [(&network.inputs, true), (&network.outputs, false)];
        let ports = sides.into_iter().flat_map(|(ids, is_input)| {
            let network = &network;
            ids.iter().map(move |id| {
                let tensor = network.tensor(*id);
                Port {
                    name: tensor.name.clone(),
                    dtype: tensor.dtype,
                    shape: tensor.shape.iter().map(|d| d.as_const().unwrap_or(-1)).collect(),
                    is_input,
                }
            })
        });
        // `emit` makes an input of every bound weight.
        let weights = network.weights.iter().map(|weight| Port {
            name: weight.name.clone(),
            dtype: weight.constant.dtype(),
            shape: weight.constant.shape().iter().map(|d| *d as i64).collect(),
            is_input: true,
        });
        let ports = ports.chain(weights).collect();
        (network, ports)
    }

    #[test]
    fn engines_of_other_shapes_and_types_are_refused() {
        let (network, ports) = engine();
        assert!(check_ports("e", &ports, &network).is_ok());
        assert!(ports.iter().any(|port| port.shape.contains(&-1)), "tokens are free");
        assert!(
            ports.iter().any(|port| port.name.contains("q_proj.weight")),
            "{ports:?}"
        );
        for at in 0..ports.len() {
            let mut other = ports.clone();
            let last = other[at].shape.last_mut().unwrap();
            *last = if *last == -1 { 8 } else { *last + 1 };
            let error = check_ports("e", &other, &network).unwrap_err();
            let message = error.to_string();
            assert!(matches!(error, RunError::Mismatch { .. }), "{message}");
            assert!(message.contains(&ports[at].name), "{message}");
            let mut other = ports.clone();
            other[at].dtype = match other[at].dtype {
                DType::F16 => DType::Bf16,
                _ => DType::F16,
            };
            assert!(check_ports("e", &other, &network).is_err(), "{}", ports[at].name);
            let mut other = ports.clone();
            other[at].name.push('?');
            assert!(check_ports("e", &other, &network).is_err(), "{}", ports[at].name);
        }
    }

    /// What is bound to each port follows from its role: every port has one, but for the weights.
    #[test]
    fn every_port_has_a_role_or_is_a_weight() {
        let (network, ports) = engine();
        let declared = check_ports("e", &ports, &network).unwrap();
        let mut roles: Vec<Role> = ports.iter().filter_map(|p| declared[p.name.as_str()].role).collect();
        roles.sort_unstable();
        let interface = network.interface.as_ref().unwrap();
        let mut expected: Vec<Role> = interface
            .inputs()
            .iter()
            .chain(interface.outputs())
            .map(|p| p.role)
            .collect();
        expected.sort_unstable();
        assert_eq!(roles, expected);
        for port in ports.iter().filter(|p| declared[p.name.as_str()].role.is_none()) {
            assert!(network.weights.iter().any(|w| w.name == port.name), "{}", port.name);
        }
    }

    #[test]
    fn an_output_that_is_missing_is_named() {
        let (network, mut ports) = engine();
        ports.retain(|port| port.name != Role::Logits.name());
        let message = check_ports("b1-t1-c16", &ports, &network).unwrap_err().to_string();
        assert_eq!(
            message,
            "the engine b1-t1-c16 and the package disagree: it has no output \"logits\""
        );
    }
}
