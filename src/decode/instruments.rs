//! Measurements of a device for benchmarks, besides running it. They are optional.

use std::time::Duration;

use super::DeviceError;
use crate::backend::tensorrt::Driver;

/// Facts and clocks of a device with its own memory.
pub trait Instruments {
    /// Hardware, driver and library.
    fn facts(&self) -> DeviceFacts;

    /// Peak use since the device was opened. Memory of the other instruments counts from their first use.
    fn memory(&self) -> DeviceMemory;

    /// Mean time of the last call by the device's own clock, over `times` more runs with the same inputs and nothing in
    /// between. There must have been a call.
    fn step_time(&mut self, times: usize) -> Result<Duration, DeviceError>;

    /// Bytes read plus bytes written per second by a large copy within the device's memory.
    fn copy_bandwidth(&mut self) -> Result<f64, DeviceError>;

    /// Milliseconds of each layer of the last call, mean of `runs`, in the order in which they run. Layers are timed one
    /// by one, so their sum is more than a step takes.
    fn layer_times(&mut self, runs: usize) -> Result<Vec<(String, f64)>, DeviceError>;
}

/// What a device runs on.
#[derive(Clone, Debug)]
pub struct DeviceFacts {
    /// Its first GPU is the device.
    pub driver: Driver,
    /// Version of the library that runs the engines.
    pub tensorrt: String,
}

/// Bytes of device memory by purpose.
#[derive(Clone, Copy, Debug, Default)]
pub struct DeviceMemory {
    /// Bound weights.
    pub weights: u64,
    /// Both caches during a move to another capacity.
    pub cache: u64,
    /// Working memory of engines.
    pub scratch: u64,
    /// In use when the device was opened: by the driver, CUDA, and other processes.
    pub context: u64,
    /// Total in use: these, and TensorRT's own memory.
    pub total: u64,
}
