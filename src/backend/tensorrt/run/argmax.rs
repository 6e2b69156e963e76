//! The largest logit of each row, found on the device: eight bytes are copied to the host instead of a row of logits.

use std::ffi::{CString, c_void};
use std::rc::Rc;

use cudarc::driver::{result, sys};

use super::super::cuda::{Buffer, Cuda, Pinned, Stream, failed};
use super::RunError;

/// `device/argmax.cu`, compiled.
const PTX: &str = include_str!("device/argmax.ptx");
const THREADS: u32 = 256;
const BLOCKS: u32 = 64;

/// The kernel with its memory; one run at a time.
pub struct Argmax {
    module: sys::CUmodule,
    function: sys::CUfunction,
    /// What the blocks of each row share; zero between runs.
    state: Buffer,
    result: Buffer,
    host: Pinned,
    most: usize,
    cuda: Rc<Cuda>,
}

/// Bytes of `State` in `argmax.cu`.
const STATE: usize = 16;
/// Bytes of a row's result: the id, and whether there is none.
const RESULT: usize = 8;

impl Argmax {
    /// For up to `most` rows. `stream` is the stream in which it will run.
    pub fn new(cuda: &Rc<Cuda>, stream: &Stream, most: usize) -> Result<Self, RunError> {
        let text = CString::new(PTX).expect("PTX is text");
        // SAFETY: text that ends in a zero, alive during the call, after which the driver has copied what it needs.
        let module = unsafe { result::module::load_data(text.as_ptr().cast()) }.map_err(failed("cuModuleLoadData"))?;
        let name = CString::new("argmax").expect("a name");
        // SAFETY: just loaded, and unloaded in `drop`, when the function is not used any more.
        let function = unsafe { result::module::get_function(module, name) }.map_err(failed("cuModuleGetFunction"))?;
        let state = Buffer::new(cuda, most * STATE, "the search for the best token")?;
        state.clear(stream)?;
        Ok(Argmax {
            module,
            function,
            state,
            result: Buffer::new(cuda, most * RESULT, "the best token")?,
            host: Pinned::new(cuda, most * RESULT)?,
            most,
            cuda: cuda.clone(),
        })
    }

    /// Queues the search in each of the first `rows` rows of `logits` (`[rows, n]`, f32).
    pub fn enqueue(&mut self, stream: &Stream, logits: &Buffer, rows: usize, n: usize) -> Result<(), RunError> {
        assert!(
            rows * n <= logits.bytes() / size_of::<f32>(),
            "{rows} rows of {n} logits in {} bytes",
            logits.bytes()
        );
        assert!((1..=self.most).contains(&rows), "{rows} of {} rows", self.most);
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
        // SAFETY: the kernel's own parameters in order, which the driver copies before it returns. The kernel reads `rows` times
        // `n` floats of `logits`, which has them, and writes the states and results of `rows` rows, for which `new` allocated
        // memory; each buffer is freed after what is queued. Nothing else uses state and result: self is borrowed mutably, and runs of one stream follow one
        // another.
        unsafe {
            result::launch_kernel(
                self.function,
                (blocks, rows as u32, 1),
                (THREADS, 1, 1),
                0,
                stream.handle(),
                &mut arguments,
            )
        }
        .map_err(failed("cuLaunchKernel"))?;
        stream.download(&self.result, 0..rows * RESULT, &mut self.host, 0)
    }

    /// Waits for the last run and returns its result for a row; `None` if a logit is NaN or plus infinity, or none is
    /// above minus infinity.
    pub fn result(&self, row: usize) -> Result<Option<u32>, RunError> {
        let found = self.host.slice::<i32>(row * RESULT, 2)?;
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
