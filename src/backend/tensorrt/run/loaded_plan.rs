//! A plan in memory: deserialized, refitted if its weights were stripped, with cached kernels.

use std::cell::RefCell;
use std::path::Path;
use std::rc::Rc;

use trtx::ExecutionContextAllocationStrategy;

use super::super::flavour::{self, KernelStore};
use super::kernel_cache::KernelCache;
use super::{Objection, ObjectionKind, Port, RunError, Runtime, refit};
use crate::network::{Network, WeightMode};
use crate::tensor::DType;

/// The part that contexts of one plan share. They own it together: TensorRT requires contexts to be dropped before
/// their engine.
pub struct LoadedPlan {
    pub(super) config: Rc<trtx::RuntimeConfig<'static>>,
    pub(super) inner: RefCell<trtx::CudaEngine<'static>>,
    kernels: RefCell<Option<KernelCache>>,
    pub(super) runtime: Rc<Runtime>,
    /// The profile for which it was built.
    pub(super) name: String,
    pub(super) ports: Vec<Port>,
}

impl LoadedPlan {
    /// `network` is the one from which the plan was built: the source of stripped weights. `path` is for messages,
    /// `kernels` is the folder of the kernel cache.
    pub fn new(
        runtime: &Rc<Runtime>,
        path: &Path,
        plan: &[u8],
        network: &Network,
        kernels: Option<&Path>,
    ) -> Result<Self, RunError> {
        let name = network.profile.to_string();
        // The engine's own memory is in addition to bound weights.
        let own = network.weights.iter().filter(|w| w.mode != WeightMode::Bind);
        let needed: u64 = own.map(|w| w.constant.byte_len() as u64).sum();
        let (free, _) = runtime.cuda.memory()?;
        let too_large = || RunError::Memory {
            what: format!("the engine {} with its weights", path.display()),
            needed,
            free,
            fits: None,
        };
        let unusable = |objection: Objection| match objection.kind {
            ObjectionKind::Memory if needed > 0 => too_large(),
            _ => RunError::Plan {
                path: path.to_path_buf(),
                objection,
            },
        };
        runtime.capture.take_errors();
        runtime.check(plan, false).map_err(unusable)?;
        if needed > free {
            return Err(too_large());
        }
        let deserialized = runtime.inner.borrow_mut().deserialize_cuda_engine(plan);
        let mut inner = deserialized.map_err(|error| {
            let words = runtime.own_words(&error);
            unusable(match runtime.check(plan, true) {
                Ok(()) => Objection {
                    kind: ObjectionKind::Plan,
                    reason: words,
                },
                Err(known) => Objection {
                    reason: format!("{known} ({words})"),
                    ..known
                },
            })
        })?;
        let failed = |error: trtx::Error| runtime.load_error(&name, &error);
        if network.weights.iter().any(|w| w.mode == WeightMode::Strip) {
            refit::refit(runtime, &mut inner, network, &name)?;
        }
        let mut config = inner.create_runtime_config().map_err(failed)?;
        config.set_execution_context_allocation_strategy(ExecutionContextAllocationStrategy::kUSER_MANAGED);
        flavour::configure(&mut config);
        // Without a store, loading only takes longer.
        let store = kernels.and_then(|folder| Some((folder, KernelStore::new(&config).ok().flatten()?)));
        let kept = store.and_then(|(folder, store)| {
            let kernels = KernelCache::open(folder, plan, runtime, store);
            kernels.store().give_to(&mut config).is_ok().then_some(kernels)
        });
        runtime.capture.take_errors();
        let ports = ports(&inner).map_err(failed)?;
        Ok(LoadedPlan {
            inner: RefCell::new(inner),
            config: Rc::new(config),
            kernels: RefCell::new(kept),
            runtime: runtime.clone(),
            name,
            ports,
        })
    }

    /// Refits a plan whose weights were stripped with the weights of `network`. Nothing may be running, and contexts
    /// must be created again. After an error the plan is unusable.
    pub fn refit(&self, network: &Network) -> Result<(), RunError> {
        self.runtime.capture.take_errors();
        refit::refit(&self.runtime, &mut self.inner.borrow_mut(), network, &self.name)
    }

    /// Writes the kernels that TensorRT compiled since the last call, if any, for the next process.
    pub fn keep_kernels(&self) {
        if let Some(kernels) = &mut *self.kernels.borrow_mut() {
            kernels.keep();
        }
    }
}

fn ports(engine: &trtx::CudaEngine<'_>) -> Result<Vec<Port>, trtx::Error> {
    let mut ports = Vec::new();
    for i in 0..engine.nb_io_tensors()? {
        let name = engine.io_tensor_name(i)?;
        ports.push(Port {
            dtype: dtype(engine.tensor_data_type(&name)?)?,
            shape: engine.tensor_shape(&name)?,
            is_input: matches!(engine.tensor_io_mode(&name)?, trtx::TensorIOMode::kINPUT),
            name,
        });
    }
    Ok(ports)
}

fn dtype(data_type: trtx::DataType) -> Result<DType, trtx::Error> {
    use trtx::DataType as T;
    Ok(match data_type {
        T::kBOOL => DType::Bool,
        T::kUINT8 => DType::U8,
        T::kINT8 => DType::I8,
        T::kINT32 => DType::I32,
        T::kINT64 => DType::I64,
        T::kINT4 => DType::I4,
        T::kFP8 => DType::F8E4M3Fn,
        T::kHALF => DType::F16,
        T::kBF16 => DType::Bf16,
        T::kFLOAT => DType::F32,
        other => {
            return Err(trtx::Error::InvalidArgument(format!(
                "an input or output of type {other:?}"
            )));
        }
    })
}
