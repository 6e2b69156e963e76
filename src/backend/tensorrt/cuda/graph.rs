//! CUDA graphs: work that was queued once and is launched again as a whole.
//!
//! TensorRT can capture a network itself (`kWHOLE_GRAPH_CAPTURE`), but then it checks every input's address before each
//! launch, and a model with bound weights has hundreds of inputs. Lapidary's own graph costs one driver call.

use std::rc::Rc;

use cudarc::driver::{result, sys};

use super::context::{Cuda, failed};
use super::stream::Stream;
use crate::backend::tensorrt::run::RunError;

/// Captured work. It contains the addresses at capture time: drop the graph before that memory is freed or moved.
pub(in super::super) struct Graph {
    exec: sys::CUgraphExec,
    _cuda: Rc<Cuda>,
}

/// The captured graph; executable graphs are copies of it.
struct Template(sys::CUgraph);

impl Drop for Template {
    fn drop(&mut self) {
        // SAFETY: made by a capture that ended, and destroyed once. Executable graphs made from it are copies.
        let _ = unsafe { result::graph::destroy(self.0) };
    }
}

impl Graph {
    /// Captures what `queue` puts into the stream, without running it. Panics on copies of pinned memory.
    pub fn capture(
        cuda: &Rc<Cuda>,
        stream: &Stream,
        queue: impl FnOnce() -> Result<(), RunError>,
    ) -> Result<Graph, RunError> {
        let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        // SAFETY: the stream is borrowed, so alive, and nothing else is being captured in it: this is the only place that
        // does, and `queue` has no graph to capture.
        unsafe { result::stream::begin_capture(stream.handle(), mode) }.map_err(failed("cuStreamBeginCapture"))?;
        stream.set_capturing(true);
        let queued = queue();
        stream.set_capturing(false);
        // SAFETY: begun above. Also after an error: a stream left capturing can do nothing else.
        let captured = unsafe { result::stream::end_capture(stream.handle()) }.map(Template);
        queued?;
        let template = captured.map_err(failed("cuStreamEndCapture"))?;
        // SAFETY: just captured, and alive until the end of this function; the executable graph is a copy.
        let exec = unsafe { result::graph::instantiate(template.0, sys::CUgraphInstantiate_flags(0)) };
        Ok(Graph {
            exec: exec.map_err(failed("cuGraphInstantiate"))?,
            _cuda: cuda.clone(),
        })
    }

    /// Queues one run of the whole graph.
    pub fn launch(&self, stream: &Stream) -> Result<(), RunError> {
        // SAFETY: both are borrowed, so alive. What it touches is device memory, which the type's contract keeps.
        unsafe { result::graph::launch(self.exec, stream.handle()) }.map_err(failed("cuGraphLaunch"))
    }
}

impl Drop for Graph {
    fn drop(&mut self) {
        // SAFETY: made in `capture` and destroyed once. The driver keeps what is under way until it is done.
        let _ = unsafe { result::graph::exec_destroy(self.exec) };
    }
}
