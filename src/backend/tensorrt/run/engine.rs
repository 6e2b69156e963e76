//! A plan with an execution context, which can be bound and queued.

use std::collections::HashMap;
use std::rc::Rc;

use super::{Buffer, LoadedPlan, Port, RunError, Stream};

/// A plan that is ready to run, with its own context. The caller provides its scratch memory
/// ([`Engine::scratch_bytes`]), so that engines that never run at the same time can share it.
/// [`Program`](super::Program) runs it.
pub struct Engine {
    context: trtx::ExecutionContext<'static>,
    plan: Rc<LoadedPlan>,
    scratch_bytes: usize,
    /// Bytes of its scratch memory.
    scratch_given: usize,
    /// The bound addresses.
    bound: HashMap<String, u64>,
    /// The value of dims that depend on the call.
    tokens: usize,
}

impl Engine {
    /// A context for one optimization profile of a plan (0 if there is at most one).
    pub fn of(plan: &Rc<LoadedPlan>, profile: usize) -> Result<Self, RunError> {
        let failed = |error: trtx::Error| plan.runtime.load_error(&plan.name, &error);
        let created = plan
            .inner
            .borrow_mut()
            .create_execution_context_with_config(plan.config.clone());
        let mut context = created.map_err(failed)?;
        if profile > 0 {
            let stream = Stream::new(&plan.runtime.cuda)?;
            // SAFETY: the stream is alive until it was waited for, two lines below.
            let set = unsafe { context.set_optimization_profile_async(profile as i32, stream.raw()) };
            stream.wait()?;
            if !set {
                return Err(RunError::Mismatch {
                    engine: plan.name.clone(),
                    reason: format!("it has no optimization profile {profile}"),
                });
            }
        }
        let is_static = plan.ports.iter().all(|port| port.shape.iter().all(|d| *d >= 0));
        let scratch_bytes = match is_static {
            true => context.update_device_memory_size_for_shapes(),
            false => 0,
        };
        plan.keep_kernels();
        Ok(Engine {
            context,
            plan: plan.clone(),
            scratch_bytes,
            scratch_given: 0,
            bound: HashMap::new(),
            tokens: 1,
        })
    }

    /// The plan, for creating other contexts.
    pub fn plan(&self) -> &Rc<LoadedPlan> {
        &self.plan
    }
    /// The profile for which it was built.
    pub fn name(&self) -> &str {
        &self.plan.name
    }
    /// Its inputs and outputs.
    pub fn ports(&self) -> &[Port] {
        &self.plan.ports
    }
    /// The input or output of that name.
    pub fn port(&self, name: &str) -> Option<&Port> {
        self.plan.ports.iter().find(|port| port.name == name)
    }
    /// Current number of tokens of a dynamic engine; 1 for a static one.
    pub fn tokens(&self) -> usize {
        self.tokens
    }
    /// Scratch memory that a run needs, for the current shapes.
    pub fn scratch_bytes(&self) -> usize {
        self.scratch_bytes
    }

    /// See [`LoadedPlan::keep_kernels`].
    pub fn keep_kernels(&self) {
        self.plan.keep_kernels();
    }

    /// Sets every dim that depends on the call to `tokens`, and updates the required scratch memory.
    pub fn set_tokens(&mut self, tokens: usize) -> Result<(), RunError> {
        for port in self
            .plan
            .ports
            .iter()
            .filter(|p| p.is_input && p.shape.iter().any(|d| *d < 0))
        {
            let dims: Vec<i64> = port
                .shape
                .iter()
                .map(|d| if *d < 0 { tokens as i64 } else { *d })
                .collect();
            let dims = trtx::trtx_sys::Dims64::from_slice(&dims);
            let set = self.context.set_input_shape(&port.name, &dims);
            set.map_err(|error| self.plan.runtime.load_error(&self.plan.name, &error))?;
        }
        self.tokens = tokens;
        self.scratch_bytes = self.context.update_device_memory_size_for_shapes();
        Ok(())
    }

    /// # Safety
    /// As [`Engine::bind`].
    unsafe fn set_address(&mut self, name: &str, address: u64) -> Result<(), RunError> {
        // SAFETY: the caller's promise: TensorRT uses the address in later runs.
        let bound = unsafe { self.context.set_tensor_address(name, address as *mut std::ffi::c_void) };
        bound.map_err(|error| RunError::Mismatch {
            engine: self.plan.name.clone(),
            reason: format!("{name}: {}", self.plan.runtime.own_words(&error)),
        })
    }

    /// Sets its scratch memory: at least [`Engine::scratch_bytes`], or runs are refused.
    ///
    /// # Safety
    /// The buffer must live until the last run has ended or another buffer is set, and no other run may use it at the
    /// same time.
    pub unsafe fn set_scratch(&mut self, scratch: &Buffer) {
        self.scratch_given = scratch.bytes();
        let address = scratch.address() as *mut std::ffi::c_void;
        // SAFETY: an allocation of this many bytes, which the caller promises to keep for this engine.
        unsafe { self.context.set_device_memory_v2(address, scratch.bytes() as i64) };
    }

    /// Binds inputs and outputs to device memory.
    ///
    /// # Safety
    /// Each address must be of device memory that holds the port's tensor ([`Port::bytes`] of every number of tokens
    /// that is set from now on), and that lives until the last run has ended or the port is bound to another. Outputs
    /// must not overlap other ports, except an updated cache, which has the address of its input.
    pub unsafe fn bind<'n>(&mut self, ports: impl IntoIterator<Item = (&'n str, u64)>) -> Result<(), RunError> {
        for (name, address) in ports {
            if self.bound.get(name) != Some(&address) {
                // SAFETY: this function's own contract.
                unsafe { self.set_address(name, address)? };
                self.bound.insert(name.to_string(), address);
            }
        }
        Ok(())
    }

    /// Queues one run. Refused if a port is not bound or there is less scratch memory than it needs.
    pub fn enqueue(&mut self, stream: &Stream) -> Result<(), RunError> {
        if self.scratch_bytes > self.scratch_given {
            return Err(RunError::Execute {
                engine: self.plan.name.clone(),
                message: format!(
                    "it needs {} bytes of scratch memory and was given {}",
                    self.scratch_bytes, self.scratch_given
                ),
            });
        }
        // SAFETY: the stream is borrowed, so alive; the addresses of ports and scratch memory are by the promises of `bind`
        // and `set_scratch`, and TensorRT refuses ports without one.
        let queued = unsafe { self.context.enqueue_v3(stream.raw()) };
        queued.map_err(|error| RunError::Execute {
            engine: self.plan.name.clone(),
            message: self.plan.runtime.own_words(&error),
        })
    }

    /// Reports the time of each of TensorRT's layers after every run. CUDA graphs must be off; call once per engine.
    pub fn profile(&mut self, report: Box<dyn trtx::interfaces::ReportLayerTime>) -> Result<(), RunError> {
        let set = self.context.set_profiler(report);
        set.map_err(|error| self.plan.runtime.load_error(&self.plan.name, &error))
    }

    /// TensorRT's own description of its layers, as JSON.
    pub fn inspect(&self) -> Result<String, RunError> {
        let read = || -> Result<String, trtx::Error> {
            let inner = self.plan.inner.borrow();
            let inspector = inner.create_engine_inspector()?;
            inspector.engine_information(trtx::LayerInformationFormat::kJSON)
        };
        read().map_err(|error| self.plan.runtime.load_error(&self.plan.name, &error))
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        // A queued run uses the context. If waiting fails, nothing is running anymore.
        let _ = self.plan.runtime.cuda.synchronize();
    }
}
