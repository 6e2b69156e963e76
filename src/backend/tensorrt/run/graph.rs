//! CUDA graphs: what was queued once, launched again as one piece.
//!
//! TensorRT can capture a network by itself (`kWHOLE_GRAPH_CAPTURE`), but then looks at every input's address before each
//! launch, and a model with bound weights has hundreds. A graph of our own costs one call of the driver.

use std::rc::Rc;

use cudarc::driver::{result, sys};

use super::RunError;
use super::cuda::{Cuda, Stream, failed};

/// A captured piece of work. It holds the addresses that it was captured with: whoever frees or moves that memory drops
/// the graph first.
pub(super) struct Graph {
    exec: sys::CUgraphExec,
    _cuda: Rc<Cuda>,
}

/// What was captured, from which executable graphs are made: they are copies of it.
struct Template(sys::CUgraph);

impl Drop for Template {
    fn drop(&mut self) {
        // SAFETY: made by a capture that ended, and nobody else's.
        let _ = unsafe { result::graph::destroy(self.0) };
    }
}

impl Graph {
    /// Captures what `queue` puts into the stream, without running it.
    pub fn capture(
        cuda: &Rc<Cuda>,
        stream: &Stream,
        queue: impl FnOnce() -> Result<(), RunError>,
    ) -> Result<Graph, RunError> {
        let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        // SAFETY: the stream lives, and nothing else is being captured in it: this is the only place that does.
        unsafe { result::stream::begin_capture(stream.handle(), mode) }.map_err(failed("cuStreamBeginCapture"))?;
        let queued = queue();
        // SAFETY: begun above. Also after an error: a stream left capturing is of no use to anyone.
        let captured = unsafe { result::stream::end_capture(stream.handle()) }.map(Template);
        queued?;
        let template = captured.map_err(failed("cuStreamEndCapture"))?;
        // SAFETY: just captured.
        let exec = unsafe { result::graph::instantiate(template.0, sys::CUgraphInstantiate_flags(0)) };
        Ok(Graph {
            exec: exec.map_err(failed("cuGraphInstantiate"))?,
            _cuda: cuda.clone(),
        })
    }

    /// Queues one run of all of it.
    pub fn launch(&self, stream: &Stream) -> Result<(), RunError> {
        // SAFETY: both live; the memory it touches lives by the type's contract.
        unsafe { result::graph::launch(self.exec, stream.handle()) }.map_err(failed("cuGraphLaunch"))
    }
}

impl Drop for Graph {
    fn drop(&mut self) {
        // SAFETY: made in capture. The driver keeps what is under way until it is done.
        let _ = unsafe { result::graph::exec_destroy(self.exec) };
    }
}
