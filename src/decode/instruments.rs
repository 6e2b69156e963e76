//! Measurements of a device for benchmarks, besides running it. They are optional.

use std::time::Duration;

use super::DeviceError;
use crate::backend::tensorrt::Driver;

/// Facts and clocks of a device with memory of its own.
pub trait Instruments {
    /// Hardware, driver and library.
    fn facts(&self) -> DeviceFacts;

    /// The most that was in use at once since the device was opened. What the other instruments take counts from then on.
    fn memory(&self) -> DeviceMemory;

    /// By the device's own clock: the last call run `times` more, with the same inputs and nothing in between; its mean.
    /// Something must have run.
    fn step_time(&mut self, times: usize) -> Result<Duration, DeviceError>;

    /// Bytes read plus bytes written a second by a large copy within the device's memory.
    fn copy_bandwidth(&mut self) -> Result<f64, DeviceError>;

    /// Milliseconds of each layer of the last call, mean of `runs`, in the order in which they run. Layers are timed one
    /// by one, so their sum is more than a step takes.
    fn layer_times(&mut self, runs: usize) -> Result<Vec<(String, f64)>, DeviceError>;
}

/// What a device runs on.
#[derive(Clone, Debug)]
pub struct DeviceFacts {
    /// The first GPU of it is the device.
    pub driver: Driver,
    /// Version of the library that runs the engines.
    pub tensorrt: String,
}

/// Bytes of device memory by what they are for.
#[derive(Clone, Copy, Debug, Default)]
pub struct DeviceMemory {
    /// Bound weights.
    pub weights: u64,
    /// Two while it moves to another capacity.
    pub cache: u64,
    /// Working memory of engines.
    pub scratch: u64,
    /// In use when the device was opened: the driver's and CUDA's own, and what other processes hold.
    pub context: u64,
    /// Everything in use: these, and what TensorRT takes for itself.
    pub total: u64,
}
