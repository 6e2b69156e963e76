//! Full TensorRT's counterpart of `rtx`: plans contain compiled kernels, and there is nothing to configure.

use crate::backend::tensorrt::cuda::driver::Driver;
use crate::backend::tensorrt::library::Version;
use crate::backend::tensorrt::run::Objection;

/// No check before the plan is deserialized; TensorRT logs problems at that time.
pub(in super::super) fn judge(
    _runtime: &trtx::Runtime<'_>,
    _plan: &[u8],
    _tried: bool,
    _version: Version,
    _facts: &Driver,
) -> Result<(), Objection> {
    Ok(())
}

pub(in super::super) fn configure(_config: &mut trtx::RuntimeConfig<'_>) {}

/// Never created: nothing is compiled at load.
pub(in super::super) enum KernelStore {}

impl KernelStore {
    pub fn new(_config: &trtx::RuntimeConfig<'_>) -> Result<Option<Self>, trtx::Error> {
        Ok(None)
    }

    pub fn fill(&self, _bytes: &[u8]) -> bool {
        match *self {}
    }

    pub fn give_to(&self, _config: &mut trtx::RuntimeConfig<'_>) -> Result<(), trtx::Error> {
        match *self {}
    }

    pub fn bytes(&self) -> Option<Vec<u8>> {
        match *self {}
    }
}
