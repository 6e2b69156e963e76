//! Kernel variants loaded on the GPU.

use std::cell::RefCell;
use std::collections::HashMap;
use std::ffi::CString;
use std::rc::Rc;

use cudarc::driver::{result, sys};

use super::super::super::cuda::{Cuda, failed};
use super::{Limits, archive};
use crate::backend::tensorrt::run::RunError;

/// The oldest GPUs that the decode kernels run on.
const OLDEST: (u32, u32) = (8, 0);
/// From here on there are clusters and dependent launch.
const WITH_CLUSTERS: (u32, u32) = (9, 0);

/// The loaded kernels, each once.
pub(in super::super) struct Modules {
    loaded: RefCell<HashMap<String, Rc<Module>>>,
    archives: RefCell<HashMap<String, HashMap<String, String>>>,
    limits: Option<Limits>,
    cuda: Rc<Cuda>,
}

/// One variant, compiled by the driver.
pub(super) struct Module {
    raw: sys::CUmodule,
    pub function: sys::CUfunction,
    pub name: String,
    cuda: Rc<Cuda>,
}

impl Modules {
    /// Nothing is loaded yet. `LAPIDARY_KERNEL_TARGET=80` makes a newer GPU use the variants for SM 8.0.
    pub fn new(cuda: &Rc<Cuda>) -> Result<Self, RunError> {
        Ok(Modules {
            loaded: RefCell::default(),
            archives: RefCell::default(),
            limits: limits(cuda)?,
            cuda: cuda.clone(),
        })
    }

    /// The GPU's properties for kernels; refuses a GPU that is too old.
    pub(super) fn limits(&self) -> Result<Limits, RunError> {
        self.limits.ok_or_else(|| {
            let gpu = &self.cuda.facts().gpus[0];
            RunError::OldGpu {
                gpu: gpu.name.clone(),
                found: gpu.compute_capability,
                needed: OLDEST,
            }
        })
    }

    /// The variant of an archive for a target.
    pub(super) fn get(&self, archive: &str, variant: &str, target: u32) -> Result<Rc<Module>, RunError> {
        let name = format!("{variant}-sm{target}");
        if let Some(module) = self.loaded.borrow().get(&name) {
            return Ok(module.clone());
        }
        let mut archives = self.archives.borrow_mut();
        let variants = archives
            .entry(archive.to_string())
            .or_insert_with(|| archive::variants(archive));
        let ptx = variants
            .get(&name)
            .ok_or_else(|| RunError::NoKernel { name: name.clone() })?;
        let module = Rc::new(Module::load(&self.cuda, &name, archive, ptx)?);
        self.loaded.borrow_mut().insert(name, module.clone());
        Ok(module)
    }

    /// Drops the PTX texts, a few megabytes, until another variant is needed.
    pub fn settle(&self) {
        self.archives.borrow_mut().clear();
    }

    pub(super) fn cuda(&self) -> &Rc<Cuda> {
        &self.cuda
    }
}

fn limits(cuda: &Cuda) -> Result<Option<Limits>, RunError> {
    use sys::CUdevice_attribute as Attribute;
    let capability = cuda.facts().gpus[0].compute_capability;
    if capability < OLDEST {
        return Ok(None);
    }
    let number = |attribute| cuda.attribute(attribute).map(|n| n.max(0) as u32);
    let generic = std::env::var("LAPIDARY_KERNEL_TARGET").is_ok_and(|target| target == "80");
    Ok(Some(Limits {
        target: if capability >= WITH_CLUSTERS && !generic {
            90
        } else {
            80
        },
        multiprocessors: number(Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?,
        shared: number(Attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)? as usize,
    }))
}

impl Module {
    /// The entry has the first word of the archive's name.
    fn load(cuda: &Rc<Cuda>, name: &str, archive: &str, ptx: &str) -> Result<Self, RunError> {
        let text = CString::new(ptx).expect("PTX is text");
        // SAFETY: text that ends in a zero, alive during the call, after which the driver has copied what it needs.
        let raw = unsafe { result::module::load_data(text.as_ptr().cast()) }.map_err(failed("cuModuleLoadData"))?;
        let entry = archive.split('-').next().expect("a first word");
        let entry = CString::new(entry).expect("a name");
        // SAFETY: just loaded, and unloaded in `drop`, when the function is not used any more.
        let function = unsafe { result::module::get_function(raw, entry) }.map_err(failed("cuModuleGetFunction"));
        let unload = |error: RunError| {
            // SAFETY: loaded above, and nothing of it is used.
            let _ = unsafe { result::module::unload(raw) };
            error
        };
        Ok(Module {
            raw,
            function: function.map_err(unload)?,
            name: name.to_string(),
            cuda: cuda.clone(),
        })
    }

    /// Allows blocks this much dynamic shared memory, or what other launches of this variant need if that is more.
    pub fn allow_shared(&self, bytes: usize) -> Result<(), RunError> {
        use sys::CUfunction_attribute_enum::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES as MOST;
        // SAFETY: a function of a module that is loaded as long as self lives.
        let allowed = unsafe { result::function::get_function_attribute(self.function, MOST) }
            .map_err(failed("cuFuncGetAttribute"))?;
        if allowed as usize >= bytes {
            return Ok(());
        }
        // SAFETY: as above.
        unsafe { result::function::set_function_attribute(self.function, MOST, bytes as i32) }
            .map_err(failed("cuFuncSetAttribute"))
    }
}

impl Drop for Module {
    fn drop(&mut self) {
        // A run may still be queued.
        let _ = self.cuda.synchronize();
        // SAFETY: loaded in `load` and unloaded once; none of its kernels is queued any more.
        let _ = unsafe { result::module::unload(self.raw) };
    }
}
