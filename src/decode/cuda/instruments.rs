//! Measurements of a CUDA device for benchmarks: facts, memory, device clocks, time by layer.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use super::{CudaDevice, MemoryUse};
use crate::backend::tensorrt::run::layer_times::ReportLayerTime;
use crate::backend::tensorrt::run::{Buffer, Caches, Event, LoadOptions, Program, RunError};
use crate::decode::device::DeviceError;
use crate::decode::instruments::{DeviceFacts, DeviceMemory, Instruments};
use crate::lower;
use crate::network::Tokens;

/// Sizes of the copy; the first that fits is used. All are much larger than any cache.
const COPIES: [usize; 3] = [2 << 30, 512 << 20, 64 << 20];
/// Copies timed; the fastest counts, as in STREAM.
const COPY_RUNS: usize = 10;

impl Instruments for CudaDevice {
    fn facts(&self) -> DeviceFacts {
        DeviceFacts {
            driver: self.runtime.cuda().facts().clone(),
            tensorrt: self.runtime.version().to_string(),
        }
    }

    fn memory(&self) -> DeviceMemory {
        let MemoryUse {
            weights,
            cache,
            scratch,
            context,
            total,
        } = CudaDevice::memory(self);
        DeviceMemory {
            weights,
            cache,
            scratch,
            context,
            total: context + total,
        }
    }

    fn step_time(&mut self, times: usize) -> Result<Duration, DeviceError> {
        self.time_again(times)
    }

    fn copy_bandwidth(&mut self) -> Result<f64, DeviceError> {
        self.copies().map_err(|error| self.failed(error))
    }

    fn layer_times(&mut self, runs: usize) -> Result<Vec<(String, f64)>, DeviceError> {
        let at = self.last_slot()?;
        self.layers(at, runs).map_err(|error| self.failed(error))
    }
}

impl CudaDevice {
    fn copies(&self) -> Result<f64, RunError> {
        let cuda = self.runtime.cuda();
        let pair = |bytes| -> Result<_, RunError> {
            Ok((
                Buffer::new(cuda, bytes, "a copy's source")?,
                Buffer::new(cuda, bytes, "a copy's target")?,
            ))
        };
        let fitting = COPIES.iter().find_map(|bytes| Some((*bytes, pair(*bytes).ok()?)));
        let (bytes, (from, to)) = match fitting {
            Some(found) => found,
            None => (COPIES[2], pair(COPIES[2])?),
        };
        from.clear(&self.stream)?;
        let mut fastest = Duration::MAX;
        for _ in 0..COPY_RUNS {
            let (start, end) = (Event::new(cuda)?, Event::new(cuda)?);
            start.record(&self.stream)?;
            self.stream.copy(&from, &to, bytes)?;
            end.record(&self.stream)?;
            end.wait()?;
            fastest = fastest.min(end.since(&start)?);
        }
        Ok(2.0 * bytes as f64 / fastest.as_secs_f64())
    }

    /// The last call again, in a separate engine: layers of a captured graph cannot be timed one by one.
    fn layers(&mut self, at: usize, runs: usize) -> Result<Vec<(String, f64)>, RunError> {
        let slot = &self.slots[at];
        let profile = slot.profile;
        let tokens = slot.loaded.as_ref().expect("it ran").tokens;
        let options = lower::LowerOptions {
            weight_mode: slot.entry.weight_mode,
            ..slot.entry.lowering.clone()
        };
        let network = lower::lower(&self.graph, &slot.profile, &options).expect("it was lowered when it was loaded");
        let loading = LoadOptions {
            graphs: false,
            kernels: None,
            caches: Caches::Tensors,
        };
        let mut program = self.with_plan_file(slot, |path, file| {
            let plans = slot.entry.plans_of(file).unwrap_or_default();
            Program::load(&self.runtime, path, &plans, &network, loading)
        })?;
        if matches!(profile.tokens, Tokens::Dynamic { .. }) {
            program.set_tokens(tokens)?;
        }
        let layers = Arc::new(Mutex::new(Vec::new()));
        program.profile(|| Box::new(Layers(layers.clone())))?;
        self.bind(&mut program, &network)?;
        let cache = self.cache.as_ref().expect("something ran before");
        // SAFETY: the cache holds every one of its ports and lives as long as self, and this program ends with this function.
        unsafe { program.bind(cache.ports())? };
        self.share_scratch(&mut program)?;
        // The small inputs of the last call are still on the device.
        for _ in 0..3 {
            program.enqueue(&self.stream)?;
            self.stream.wait()?;
        }
        layers.lock().expect("no reporter panics").clear();
        for _ in 0..runs {
            program.enqueue(&self.stream)?;
            self.stream.wait()?;
        }
        let layers = layers.lock().expect("no reporter panics");
        Ok(layers
            .iter()
            .map(|(name, ms)| (name.clone(), ms / runs as f64))
            .collect())
    }
}

/// Sums times by name, in the order of first occurrence.
struct Layers(Arc<Mutex<Vec<(String, f64)>>>);

impl ReportLayerTime for Layers {
    fn report_layer_time(&self, name: &str, ms: f32) {
        let mut layers = self.0.lock().expect("no reporter panics");
        match layers.iter_mut().find(|(known, _)| known == name) {
            Some((_, sum)) => *sum += f64::from(ms),
            None => layers.push((name.to_string(), f64::from(ms))),
        }
    }
}
