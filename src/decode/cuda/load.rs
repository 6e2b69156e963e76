//! Engines made ready: the plan from its file, a context, everything bound but the cache.
//!
//! Takes a slot of the device; gives what runs it. Weights go to the device with the first engine that wants them; working
//! memory is one buffer for all, as large as the largest engine asks for.

use std::collections::HashSet;
use std::rc::Rc;
use std::time::Instant;

use super::chunks::{covers, largest};
use super::error::{unknown, with_versions};
use super::weights::Weights;
use super::{CudaDevice, Loaded, Slot};
use crate::backend::tensorrt::run::{Buffer, Engine, RunError, Unpacked};
use crate::decode::DeviceError;
use crate::lower;
use crate::network::{Network, Tokens, WeightMode};

impl CudaDevice {
    pub(super) fn load(&mut self, at: usize) -> Result<Loaded, DeviceError> {
        let slot = &self.slots[at];
        let network = self.lowered(slot)?;
        if slot.facts.weight_mode == WeightMode::Bind && self.weights.is_none() {
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
    pub(super) fn context(&mut self, at: usize, plan: &Rc<Unpacked>, network: &Network) -> Result<Loaded, DeviceError> {
        let slot = &self.slots[at];
        let graphs = self.options.graphs && matches!(slot.profile.tokens, Tokens::Static(_));
        let mut engine =
            Engine::of(plan, slot.facts.optimization_profile, graphs).map_err(|error| self.failed(error))?;
        // A dynamic engine's working memory is for the most that it will ever be asked for.
        let tokens = largest(slot.profile.tokens);
        if matches!(slot.facts.lowered_for().tokens, Tokens::Dynamic { .. }) {
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
    pub(super) fn unpacked(&self, slot: &Slot, network: &Network) -> Result<Rc<Unpacked>, RunError> {
        let same_file = self.slots.iter().filter(|other| other.facts.file == slot.facts.file);
        if let Some(loaded) = same_file.filter_map(|other| other.loaded.as_ref()).next() {
            return Ok(loaded.engine.plan().clone());
        }
        let path = self.folder.join(&slot.facts.file);
        let unreadable = |source| RunError::Read {
            path: path.clone(),
            source,
        };
        let file = std::fs::File::open(&path).map_err(unreadable)?;
        // SAFETY: packages are written once and renamed into place; nothing changes them while they are mapped.
        let bytes = unsafe { memmap2::Mmap::map(&file) }.map_err(unreadable)?;
        let plan = Unpacked::new(&self.runtime, &path, &bytes, network, self.options.kernels.as_deref());
        let (built_by, here) = (&slot.facts.tensorrt_version, self.runtime.version().to_string());
        plan.map(Rc::new).map_err(|error| with_versions(error, built_by, &here))
    }

    /// The network that the slot's engine was built from.
    pub(super) fn lowered(&self, slot: &Slot) -> Result<Network, DeviceError> {
        let options = lower::Options {
            weight_mode: slot.facts.weight_mode,
            ..slot.facts.lowering.clone()
        };
        lower::lower(&self.graph, slot.facts.lowered_for(), &options).map_err(|error| DeviceError {
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
            .filter(|slot| slot.facts.weight_mode == WeightMode::Bind);
        bound
            .filter(|slot| {
                seen.insert((
                    &slot.facts.lowering,
                    slot.facts.lowered_for().tokens == Tokens::Static(1),
                ))
            })
            .map(|slot| self.lowered(slot))
            .collect()
    }

    /// Everything but the cache.
    pub(super) fn bind(&self, engine: &mut Engine, network: &Network) -> Result<(), RunError> {
        let caches: Vec<&str> = network
            .aliases()
            .flat_map(|(from, to)| [from, to])
            .map(|id| network.tensor(id).name.as_str())
            .collect();
        for port in engine.ports().to_vec() {
            let weight = || self.weights.as_ref().and_then(|weights| weights.address(&port.name));
            let address = match port.name.as_str() {
                name if caches.contains(&name) => continue,
                "logits" if port.bytes(1) == self.logits.bytes() => self.logits.address(),
                name => match self.control.address(name).or_else(weight) {
                    Some(address) => address,
                    None => return Err(unknown(engine, &port)),
                },
            };
            // SAFETY: these buffers live as long as the device, which drops engines first; sizes are checked above, by
            // the network's own shapes for weights, and by the largest profile for the small inputs.
            unsafe { engine.bind([(port.name.as_str(), address)])? };
        }
        Ok(())
    }

    /// Gives the engine the common working memory, first made larger for all if need be.
    pub(super) fn share_scratch(&mut self, engine: &mut Engine) -> Result<(), RunError> {
        let have = self.scratch.as_ref().map_or(0, Buffer::bytes);
        if self.scratch.is_none() || engine.scratch_bytes() > have {
            let buffer = Buffer::new(
                self.runtime.cuda(),
                engine.scratch_bytes(),
                "the engines' working memory",
            );
            let buffer = buffer.map_err(|error| match error {
                // Engines that are loaded have theirs.
                RunError::Memory { what, needed, free, .. } => RunError::Memory {
                    what,
                    needed,
                    free,
                    fits: self.loaded_capacity(),
                },
                other => other,
            })?;
            for loaded in self.slots.iter_mut().filter_map(|slot| slot.loaded.as_mut()) {
                // SAFETY: kept in self below; engines run one at a time.
                unsafe { loaded.engine.set_scratch(&buffer) };
            }
            self.scratch = Some(buffer);
        }
        // SAFETY: as above.
        unsafe { engine.set_scratch(self.scratch.as_ref().expect("just made")) };
        Ok(())
    }

    /// The largest capacity that can be decoded at already.
    fn loaded_capacity(&self) -> Option<usize> {
        let ready = self.slots.iter().filter(|slot| slot.loaded.is_some());
        let decode = ready.filter(|slot| covers(slot.profile.tokens, 1));
        decode.map(|slot| slot.profile.capacity).max()
    }
}
