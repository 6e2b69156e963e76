//! The largest logit, found on the device: eight bytes are copied to the host instead of a row of logits.

use std::ffi::{CString, c_void};
use std::rc::Rc;

use cudarc::driver::{result, sys};

use super::super::cuda::{Buffer, Cuda, Pinned, Stream, failed};
use super::RunError;

/// `device/argmax.cu`, compiled.
const PTX: &str = include_str!("device/argmax.ptx");
const THREADS: u32 = 256;
const BLOCKS: u32 = 64;

/// The kernel with its working memory; one run at a time.
pub struct Argmax {
    module: sys::CUmodule,
    function: sys::CUfunction,
    /// What blocks share; zero between runs.
    state: Buffer,
    result: Buffer,
    host: Pinned,
    cuda: Rc<Cuda>,
}

impl Argmax {
    /// `stream` is the one that it will run in.
    pub fn new(cuda: &Rc<Cuda>, stream: &Stream) -> Result<Self, RunError> {
        let text = CString::new(PTX).expect("PTX is text");
        // SAFETY: text that ends in a zero, alive during the call, after which the driver has copied what it needs.
        let module = unsafe { result::module::load_data(text.as_ptr().cast()) }.map_err(failed("cuModuleLoadData"))?;
        let name = CString::new("argmax").expect("a name");
        // SAFETY: just loaded, and unloaded in `drop`, when the function is not used any more.
        let function = unsafe { result::module::get_function(module, name) }.map_err(failed("cuModuleGetFunction"))?;
        let state = Buffer::new(cuda, 16, "the search for the best token")?;
        state.clear(stream)?;
        Ok(Argmax {
            module,
            function,
            state,
            result: Buffer::new(cuda, 8, "the best token")?,
            host: Pinned::new(cuda, 8)?,
            cuda: cuda.clone(),
        })
    }

    /// Queues the search among the first `n` floats of `logits` (`[n]`, f32).
    pub fn enqueue(&mut self, stream: &Stream, logits: &Buffer, n: usize) -> Result<(), RunError> {
        assert!(
            n <= logits.bytes() / size_of::<f32>(),
            "{n} logits in {} bytes",
            logits.bytes()
        );
        let mut logits = logits.address();
        let mut count = i32::try_from(n).expect("a vocabulary fits 31 bits");
        let (mut state, mut result_at) = (self.state.address(), self.result.address());
        let mut arguments: [*mut c_void; 4] = [
            (&raw mut logits).cast(),
            (&raw mut count).cast(),
            (&raw mut state).cast(),
            (&raw mut result_at).cast(),
        ];
        let blocks = (n as u32).div_ceil(THREADS).clamp(1, BLOCKS);
        // SAFETY: the kernel's own parameters in order, which the driver copies before it returns. The kernel reads `n` floats
        // of `logits`, as many as there are, and writes the 16 and 8 bytes that `new` allocated; each buffer is freed after
        // what is queued. Nothing else uses state and result: self is borrowed mutably, and runs of one stream follow one
        // another.
        unsafe {
            result::launch_kernel(
                self.function,
                (blocks, 1, 1),
                (THREADS, 1, 1),
                0,
                stream.handle(),
                &mut arguments,
            )
        }
        .map_err(failed("cuLaunchKernel"))?;
        stream.download(&self.result, 0..8, &mut self.host, 0)
    }

    /// What the last run found, for which it waits; `None` where a logit is not a number or infinite, or none
    /// is above minus infinity.
    pub fn result(&self) -> Result<Option<u32>, RunError> {
        let found = self.host.slice::<i32>(0, 2)?;
        Ok((found[1] == 0).then_some(found[0] as u32))
    }
}

impl Drop for Argmax {
    fn drop(&mut self) {
        // A run may still be queued.
        let _ = self.cuda.synchronize();
        // SAFETY: loaded in `new` and unloaded once; none of its kernels is queued any more.
        let _ = unsafe { result::module::unload(self.module) };
    }
}
