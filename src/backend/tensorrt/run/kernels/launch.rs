//! A kernel with its grid and arguments.

use std::ffi::c_void;
use std::rc::Rc;

use cudarc::driver::sys;

use super::super::super::cuda::{Stream, failed};
use super::arguments::Arguments;
use super::module::Module;
use crate::backend::tensorrt::run::{Buffer, RunError};

/// One launch of a kernel.
pub(in super::super) struct Launch {
    module: Rc<Module>,
    layer: String,
    grid: [u32; 3],
    threads: u32,
    /// Dynamic shared memory per block, in bytes.
    shared: usize,
    /// Blocks per cluster; 0 for none.
    cluster: u32,
    /// Whether it may start while the previous kernel is still running.
    dependent: bool,
    arguments: Arguments,
    /// Its own memory, referenced by the arguments.
    memory: Option<Buffer>,
    /// Operands without an address.
    missing: usize,
}

impl Launch {
    /// A launch whose operands are not bound yet. `memory` is referenced by other fields of the arguments.
    pub(super) fn new(
        layer: &str,
        module: Rc<Module>,
        grid: [u32; 3],
        threads: u32,
        shared: usize,
        arguments: Arguments,
        memory: Option<Buffer>,
    ) -> Result<Self, RunError> {
        module.allow_shared(shared)?;
        Ok(Launch {
            missing: arguments.operands().len(),
            layer: layer.to_string(),
            module,
            grid,
            threads,
            shared,
            cluster: 0,
            dependent: false,
            arguments,
            memory,
        })
    }

    /// The same, with clusters of this many blocks (0 for none), and if `dependent` started while the previous kernel
    /// is still running.
    pub(super) fn with(self, cluster: u32, dependent: bool) -> Self {
        Launch {
            cluster,
            dependent,
            ..self
        }
    }

    /// The layer's name in profiles.
    pub fn name(&self) -> &str {
        &self.layer
    }

    /// Its own device memory, in bytes.
    pub fn bytes(&self) -> usize {
        self.memory.as_ref().map_or(0, Buffer::bytes)
    }

    /// Binds `name` to this address. Returns false if the kernel does not use it.
    ///
    /// # Safety
    /// The address must be of device memory that holds the tensor or weight of that name until the last run has ended or
    /// the name is bound to another.
    pub unsafe fn bind(&mut self, name: &str, address: u64) -> bool {
        let operands = self.arguments.operands().iter();
        let places: Vec<(usize, u64)> = operands
            .filter(|operand| operand.name == name)
            .map(|operand| (operand.at, operand.offset))
            .collect();
        for (at, offset) in &places {
            let first = self.arguments.words()[at / 8] == 0;
            self.arguments.address(*at, address + offset);
            self.missing -= usize::from(first);
        }
        !places.is_empty()
    }

    /// Queues one run. `after_kernel`: the previous work in this stream is one of Lapidary's kernels.
    pub fn enqueue(&mut self, stream: &Stream, after_kernel: bool) -> Result<(), RunError> {
        if self.missing > 0 {
            return Err(RunError::Execute {
                engine: self.module.name.clone(),
                message: format!("not every operand of the layer {:?} is bound", self.layer),
            });
        }
        // SAFETY: the driver reads a prefix of it, and all bits zero are a value of every field.
        let mut attributes: [sys::CUlaunchAttribute; 2] = unsafe { std::mem::zeroed() };
        let mut count = 0;
        if self.dependent && after_kernel {
            attributes[count].id = sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION;
            attributes[count].value.programmaticStreamSerializationAllowed = 1;
            count += 1;
        }
        if self.cluster > 0 {
            attributes[count].id = sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION;
            attributes[count].value.clusterDim = sys::CUlaunchAttributeValue_union__bindgen_ty_1 {
                x: self.cluster,
                y: 1,
                z: 1,
            };
            count += 1;
        }
        let [x, y, z] = self.grid;
        let config = sys::CUlaunchConfig {
            gridDimX: x,
            gridDimY: y,
            gridDimZ: z,
            blockDimX: self.threads,
            blockDimY: 1,
            blockDimZ: 1,
            sharedMemBytes: self.shared as u32,
            hStream: stream.raw().cast(),
            attrs: attributes.as_mut_ptr(),
            numAttrs: count as u32,
        };
        let argument: *mut c_void = self.arguments.words().as_mut_ptr().cast();
        let mut parameters = [argument];
        // SAFETY: the module is loaded as long as self lives; the kernel's only parameter is the struct whose bytes
        // `arguments` has, which the driver copies before it returns. All its pointers are bound (`missing`), to memory
        // that `bind` and `memory` keep.
        unsafe {
            sys::cuLaunchKernelEx(
                &config,
                self.module.function,
                parameters.as_mut_ptr(),
                std::ptr::null_mut(),
            )
            .result()
        }
        .map_err(failed("cuLaunchKernelEx"))
    }
}
