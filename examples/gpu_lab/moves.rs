//! The time per token at a capacity, for a cache that started in it and for one that was moved from the previous
//! capacity.

use std::path::Path;
use std::time::{Duration, Instant};

use lapidary::backend::tensorrt::Library;
use lapidary::decode::cuda::{CudaDevice, CudaOptions};
use lapidary::package::Package;
use serde_json::{Value, json};

use crate::Outcome;
use crate::drive::{Driver, ids};

/// Tokens in the cache beyond the smaller capacity, before timing starts.
const BEYOND: usize = 44;

/// Every history twice, with CUDA graphs and without. Milliseconds of a greedy step, and of the GPU alone.
pub fn moves(path: &Path, steps: usize) -> Outcome<Value> {
    let package = Package::open(path)?;
    let [smaller, larger, ..] = package.manifest.capacities[..] else {
        return Err("the package has one capacity: nothing moves".into());
    };
    let vocabulary = package.vocabulary()?;
    let mut records = Vec::new();
    for graphs in [true, false] {
        let options = CudaOptions {
            graphs,
            ..CudaOptions::of(&package)
        };
        let mut device = CudaDevice::open(&package, &Library::load(None)?, options)?;
        device.prepare(smaller, larger)?;
        let mut driver = Driver::new(&package, device);
        for history in ["started there", "moved there"].repeat(2) {
            let at_once = match history {
                "started there" => smaller + BEYOND,
                _ => smaller - BEYOND,
            };
            driver.begin();
            driver.feed(&ids(at_once, vocabulary))?;
            let mut next = 3;
            for _ in at_once..smaller + BEYOND {
                next = driver.step(next)?;
            }
            let mut took: Vec<Duration> = Vec::new();
            for _ in 0..steps {
                let start = Instant::now();
                next = driver.step(next)?;
                took.push(start.elapsed());
            }
            took.sort_unstable();
            let gpu = driver.device().time_again(50)?;
            records.push(json!({
                "history": history, "cuda_graphs": graphs, "capacity": larger, "live": smaller + BEYOND,
                "median_ms": took[took.len() / 2].as_secs_f64() * 1e3, "gpu_ms": gpu.as_secs_f64() * 1e3,
            }));
        }
    }
    Ok(json!({"package": path, "steps": steps, "runs": records}))
}
