//! Loads engines: the plan from its file, a context, all bindings except the cache.
//!
//! Input is a slot of the device, output the program that runs it. Weights go to the device with the first engine that
//! needs them.

use std::collections::{HashMap, HashSet};
use std::path::Path;
use std::rc::Rc;
use std::time::Instant;

use super::chunks::largest;
use super::error::{unknown, with_versions};
use super::weights::Weights;
use super::{CudaDevice, EngineSlot, Loaded};
use crate::backend::tensorrt::run::{Caches, Engine, LoadOptions, LoadedPlan, Port, Program, RunError};
use crate::decode::DeviceError;
use crate::decode::step::NoStepInput;
use crate::interface::Role;
use crate::lower;
use crate::network::{Network, TensorId, Tokens, WeightMode};
use crate::tensor::DType;

impl CudaDevice {
    pub(super) fn load(&mut self, at: usize) -> Result<Loaded, DeviceError> {
        let slot = &self.slots[at];
        let network = self.lowered(slot)?;
        if slot.entry.weight_mode == WeightMode::Bind {
            self.provide_weights()?;
        }
        let slot = &self.slots[at];
        match network.has_kernel_layers() {
            true => {
                let program = self.in_steps(slot, &network).map_err(|error| self.failed(error))?;
                self.ready_to_run(at, program, &network)
            }
            false => {
                let plan = self.unpacked(slot, &network).map_err(|error| self.failed(error))?;
                self.context(at, &plan, &network)
            }
        }
    }

    /// Uploads bound weights, if not done yet.
    pub(super) fn provide_weights(&mut self) -> Result<(), DeviceError> {
        if self.weights.is_some() {
            return Ok(());
        }
        let start = Instant::now();
        let networks = self.networks_by_lowering()?;
        let weights = Weights::upload(self.runtime.cuda(), &self.stream, &networks);
        self.weights = Some(weights.map_err(|e| self.failed(e))?);
        self.times.weights += start.elapsed();
        Ok(())
    }

    /// A context of the slot's plan, bound to everything except the cache.
    pub(super) fn context(
        &mut self,
        at: usize,
        plan: &Rc<LoadedPlan>,
        network: &Network,
    ) -> Result<Loaded, DeviceError> {
        let slot = &self.slots[at];
        let engine = Engine::of(plan, slot.entry.optimization_profile).map_err(|error| self.failed(error))?;
        let program = Program::of_engine(engine, self.graphs(slot));
        self.ready_to_run(at, program, network)
    }

    /// Bound to everything except the cache, with scratch memory.
    fn ready_to_run(&mut self, at: usize, mut program: Program, network: &Network) -> Result<Loaded, DeviceError> {
        let slot = &self.slots[at];
        // A dynamic engine's scratch memory is for its maximum number of tokens.
        let tokens = largest(slot.profile.tokens);
        if matches!(slot.entry.lowered_for().tokens, Tokens::Dynamic { .. }) {
            program.set_tokens(tokens).map_err(|error| self.failed(error))?;
        }
        let bound = self.bind(&mut program, network);
        bound.map_err(|error| self.failed(error))?;
        self.share_scratch(&mut program).map_err(|error| self.failed(error))?;
        Ok(Loaded {
            program,
            cache: 0,
            tokens,
        })
    }

    fn graphs(&self, slot: &EngineSlot) -> bool {
        let captured = match slot.profile.tokens {
            Tokens::Static(1) => true,
            Tokens::Static(_) => self.captures_prompts,
            Tokens::Dynamic { .. } => false,
        };
        self.options.graphs && captured
    }

    /// Engines and kernels alternating, from the plans in the slot's file.
    fn in_steps(&self, slot: &EngineSlot, network: &Network) -> Result<Program, RunError> {
        let options = LoadOptions {
            graphs: self.graphs(slot),
            kernels: self.options.kernels.as_deref(),
            caches: Caches::Tensors,
        };
        self.program(slot, network, options)
    }

    /// The program of a network that has kernels, from the plans in the slot's file.
    pub(super) fn program(
        &self,
        slot: &EngineSlot,
        network: &Network,
        options: LoadOptions<'_>,
    ) -> Result<Program, RunError> {
        self.with_plan_file(slot, |path, file| {
            let plans = slot.entry.plans_of(file).ok_or_else(|| RunError::Mismatch {
                engine: slot.profile.to_string(),
                reason: "its file size is not the sum of its plans".to_string(),
            })?;
            Program::load(&self.runtime, path, &plans, network, options)
        })
    }

    /// The slot's plan, from the file or from a slot that runs another profile of it.
    pub(super) fn unpacked(&self, slot: &EngineSlot, network: &Network) -> Result<Rc<LoadedPlan>, RunError> {
        let same_file = self.slots.iter().filter(|other| other.entry.file == slot.entry.file);
        let loaded = same_file
            .filter_map(|other| other.loaded.as_ref()?.program.engine())
            .next();
        if let Some(engine) = loaded {
            return Ok(engine.plan().clone());
        }
        self.with_plan_file(slot, |path, bytes| {
            LoadedPlan::new(&self.runtime, path, bytes, network, self.options.kernels.as_deref()).map(Rc::new)
        })
    }

    /// Calls `load` with the slot's file, mapped. Its errors name the versions of TensorRT.
    pub(super) fn with_plan_file<T>(
        &self,
        slot: &EngineSlot,
        load: impl FnOnce(&Path, &[u8]) -> Result<T, RunError>,
    ) -> Result<T, RunError> {
        let path = self.folder.join(&slot.entry.file);
        let unreadable = |source| RunError::Read {
            path: path.clone(),
            source,
        };
        let file = std::fs::File::open(&path).map_err(unreadable)?;
        // An empty file, of a program that is all kernels, cannot be mapped.
        if file.metadata().map_err(unreadable)?.len() == 0 {
            return load(&path, &[]);
        }
        // SAFETY: packages are written once and renamed into place; nothing changes them while they are mapped.
        let bytes = unsafe { memmap2::Mmap::map(&file) }.map_err(unreadable)?;
        let (built_by, here) = (&slot.entry.tensorrt_version, self.runtime.version().to_string());
        load(&path, &bytes).map_err(|error| with_versions(error, built_by, &here))
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

    /// A network for each lowering of the engines, for one token and for several, since different products can be
    /// fused: together they name every weight of every engine.
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

    /// Bindings of everything except the cache. Refuses an engine whose inputs and outputs differ from the network's:
    /// addresses carry no sizes, and TensorRT would read past a weight's end.
    pub(super) fn bind(&self, program: &mut Program, network: &Network) -> Result<(), RunError> {
        let ports = program.ports();
        let declared = check_ports(program.name(), &ports, network)?;
        for (name, port) in declared {
            let role = match port.is {
                Is::Port(role) => role,
                Is::Weight => {
                    let address = self.weights.as_ref().and_then(|weights| weights.address(name));
                    let address = address.ok_or_else(|| nothing_to_bind(program.name(), name))?;
                    // SAFETY: weights are in a buffer of the device, which drops programs first, each at its own
                    // location, which holds its constant.
                    unsafe { program.bind([(name, address)])? };
                    continue;
                }
                Is::Between => continue,
            };
            let address = match role {
                Role::Cache(_) | Role::UpdatedCache(_) => continue,
                Role::Logits => (port.bytes() == Some(self.logits.bytes())).then(|| self.logits.address()),
                role => self.inputs.address(role),
            };
            let address = address.ok_or_else(|| nothing_to_bind(program.name(), name))?;
            // SAFETY: these buffers live as long as the device, which drops programs first. They have the sizes of the
            // network's tensors, with which the engines' ports were compared; the small inputs have those of the
            // largest profile.
            unsafe { program.bind([(name, address)])? };
        }
        Ok(())
    }
}

pub(super) fn nothing_to_bind(engine: &str, name: &str) -> RunError {
    RunError::Mismatch {
        engine: engine.to_string(),
        reason: NoStepInput(name.to_string()).to_string(),
    }
}

/// The expected port of a network's engine.
#[derive(Debug)]
pub(super) struct Declared {
    dtype: DType,
    /// -1 if it depends on the call.
    shape: Vec<i64>,
    pub is: Is,
}

/// What is bound to a port.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Is {
    /// The session's tensor for this role.
    Port(Role),
    Weight,
    /// Memory of the program: one step computes it, another reads it.
    Between,
}

impl Declared {
    /// `None` if it depends on the call.
    pub fn bytes(&self) -> Option<usize> {
        let dims: Option<Vec<usize>> = self.shape.iter().map(|dim| usize::try_from(*dim).ok()).collect();
        Some(self.dtype.byte_len(dims?.iter().product()))
    }
}

/// Checks that every input and output has its dtype and shape in the network, and that no output that the session reads
/// is missing. Returns the network's description of each.
pub(super) fn check_ports<'n>(
    engine: &str,
    ports: &[Port],
    network: &'n Network,
) -> Result<HashMap<&'n str, Declared>, RunError> {
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
    // In a network in steps, kernels may compute an output.
    let by_kernels = network.layers.iter().filter(|layer| layer.kind.is_kernel_layer());
    let by_kernels: HashSet<TensorId> = by_kernels.flat_map(|layer| layer.outputs.iter().copied()).collect();
    let mut outputs = network.outputs.iter().filter(|id| !by_kernels.contains(id));
    let missing = outputs.find(|id| !ports.iter().any(|port| port.name == network.tensor(**id).name));
    match missing {
        Some(id) => Err(mismatch(format!("it has no output {:?}", network.tensor(*id).name))),
        None => Ok(declared),
    }
}

/// The ports of the network's engines: its inputs and outputs, every bound weight under the weight's own name, and the
/// results of each step if it runs in steps.
fn declared(network: &Network) -> HashMap<&str, Declared> {
    let role = |id| network.interface.as_ref().and_then(|interface| interface.role_of(id));
    let in_steps = network.has_kernel_layers();
    let tensors = network.tensors.iter().enumerate().filter_map(|(i, tensor)| {
        let is = match role(TensorId(i as u32)) {
            Some(role) => Is::Port(role),
            None if in_steps => Is::Between,
            None => return None,
        };
        let shape = tensor.shape.iter().map(|dim| dim.as_const().unwrap_or(-1)).collect();
        let dtype = tensor.dtype;
        Some((tensor.name.as_str(), Declared { dtype, shape, is }))
    });
    let bound = network.weights.iter().filter(|w| w.mode == WeightMode::Bind);
    let weights = bound.map(|weight| {
        let declared = Declared {
            dtype: weight.constant.dtype(),
            shape: weight.constant.shape().iter().map(|d| *d as i64).collect(),
            is: Is::Weight,
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

    /// The binding of each port follows from its role; every port has one, except weights.
    #[test]
    fn every_port_has_a_role_or_is_a_weight() {
        let (network, ports) = engine();
        let declared = check_ports("e", &ports, &network).unwrap();
        let role = |port: &Port| match declared[port.name.as_str()].is {
            Is::Port(role) => Some(role),
            Is::Weight | Is::Between => None,
        };
        let mut roles: Vec<Role> = ports.iter().filter_map(role).collect();
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
        for port in ports.iter().filter(|p| role(p).is_none()) {
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
