//! What a device can tell of itself beyond running: for benchmarks. A device that has nothing to tell gives none.

use std::time::Duration;

use super::DeviceError;
use crate::backend::tensorrt::Driver;

/// Facts and clocks of a device with memory of its own.
pub trait Instruments {
    fn facts(&self) -> DeviceFacts;

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

#[derive(Clone, Debug)]
pub struct DeviceFacts {
    /// The first GPU of it is the device.
    pub driver: Driver,
    /// Version of the library that runs the engines.
    pub tensorrt: String,
}

/// Bytes of device memory by what they are for; `total` is all that was taken since the device was opened.
#[derive(Clone, Copy, Debug, Default)]
pub struct DeviceMemory {
    pub weights: u64,
    pub cache: u64,
    pub scratch: u64,
    pub total: u64,
}
