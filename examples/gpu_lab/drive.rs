//! Drives a device like a session, with measurements in between: decode and prefill times, logits of given tokens.

use std::path::Path;
use std::time::Instant;

use lapidary::backend::tensorrt::Library;
use lapidary::decode::cuda::{CudaDevice, CudaOptions};
use lapidary::decode::{Chunk, Device, best};
use lapidary::package::Package;
use serde_json::{Value, json};

use crate::Outcome;

pub fn open(package: &Path) -> Outcome<(Package, CudaDevice)> {
    let package = Package::open(package)?;
    let device = CudaDevice::open(&package, &Library::load(None)?, CudaOptions::of(&package))?;
    Ok((package, device))
}

/// Drives a device like a session, but with access to it in between.
pub struct Driver {
    device: CudaDevice,
    capacities: Vec<usize>,
    capacity: usize,
    position: usize,
    moves: usize,
    logits: Vec<f32>,
}

impl Driver {
    pub fn new(package: &Package, device: CudaDevice) -> Self {
        Driver {
            device,
            capacities: package.manifest.capacities.clone(),
            capacity: 0,
            position: 0,
            moves: 0,
            logits: Vec::new(),
        }
    }

    /// A new sequence starts in the smallest capacity again.
    pub fn begin(&mut self) {
        (self.capacity, self.position, self.moves) = (0, 0, 0);
    }

    pub fn device(&mut self) -> &mut CudaDevice {
        &mut self.device
    }

    pub fn logits(&self) -> &[f32] {
        &self.logits
    }

    /// Room for `more` tokens.
    fn reserve(&mut self, more: usize) -> Outcome<()> {
        let total = self.position + more;
        if total > self.capacity {
            let capacity = self
                .capacities
                .iter()
                .copied()
                .find(|c| *c >= total)
                .ok_or("too long")?;
            self.device.reserve(capacity, self.position)?;
            self.moves += usize::from(self.capacity > 0);
            self.capacity = capacity;
        }
        Ok(())
    }

    /// One greedy step: feeds the token, returns the best one.
    pub fn step(&mut self, token: u32) -> Outcome<u32> {
        self.reserve(1)?;
        let chunk = self.device.chunk(1, self.position, self.capacity);
        let best = self
            .device
            .forward_best(chunk, &[token], self.position, &mut self.logits)?;
        self.position += 1;
        best.ok_or_else(|| "logits are not finite".into())
    }

    pub fn feed(&mut self, mut tokens: &[u32]) -> Outcome<Vec<Chunk>> {
        self.reserve(tokens.len())?;
        let mut chunks = Vec::new();
        while !tokens.is_empty() {
            let chunk = self.device.chunk(tokens.len(), self.position, self.capacity);
            let (now, later) = tokens.split_at(chunk.tokens);
            self.device.forward(chunk, now, self.position, &mut self.logits)?;
            self.position += now.len();
            tokens = later;
            chunks.push(chunk);
        }
        Ok(chunks)
    }

    fn best(&self) -> u32 {
        best(&self.logits).unwrap_or(0)
    }
}

/// Token ids without early repetition.
pub fn ids(n: usize, vocabulary: usize) -> Vec<u32> {
    (0..n)
        .map(|i| ((i * 7919 + 13) % (vocabulary - 3) + 3) as u32)
        .collect()
}

pub fn bench(path: &Path, live: usize, prefill: &[usize], tokens: usize) -> Outcome<Value> {
    let start = Instant::now();
    let (package, mut device) = open(path)?;
    let vocabulary = package.vocabulary()?;
    device.prepare(live, live + tokens + 1)?;
    let load = start.elapsed();
    let engines = device.times().engines;
    let mut driver = Driver::new(&package, device);

    let start = Instant::now();
    driver.feed(&ids(live, vocabulary))?;
    let first = start.elapsed();
    // The graph is captured in the first steps.
    for _ in 0..5 {
        let next = driver.best();
        driver.feed(&[next])?;
    }
    let gpu = driver.device.time_again(100)?;
    let before = driver.device.times();
    let start = Instant::now();
    for i in 0..tokens {
        driver.feed(&[(i % 1000) as u32 + 3])?;
    }
    let wall = start.elapsed() / tokens as u32;
    let after = driver.device.times();
    let mut next = driver.best();
    for _ in 0..4 {
        next = driver.step(next)?;
    }
    let start = Instant::now();
    for _ in 0..tokens {
        next = driver.step(next)?;
    }
    let greedy = start.elapsed() / tokens as u32;
    let decode = json!({
        "live": live, "capacity": driver.capacity, "engine": driver.device.engine(),
        "gpu_ms": gpu.as_secs_f64() * 1e3,
        "wall_ms": wall.as_secs_f64() * 1e3,
        "host_us": (after.host - before.host).as_secs_f64() * 1e6 / (after.calls - before.calls) as f64,
        "outside_gpu_us": (wall.as_secs_f64() - gpu.as_secs_f64()) * 1e6,
        "greedy_wall_ms": greedy.as_secs_f64() * 1e3,
        "greedy_outside_gpu_us": (greedy.as_secs_f64() - gpu.as_secs_f64()) * 1e6,
    });

    let mut prefills = Vec::new();
    for n in prefill {
        // From an empty cache in the capacity of the prompt: the time to the first token.
        let (package, mut device) = open(path)?;
        device.prepare(*n, *n)?;
        let mut again = Driver::new(&package, device);
        let chunks = again.feed(&ids(*n, vocabulary))?;
        for _ in 0..3 {
            again.position = 0;
            again.feed(&ids(*n, vocabulary))?;
        }
        let start = Instant::now();
        for _ in 0..10 {
            again.position = 0;
            again.feed(&ids(*n, vocabulary))?;
        }
        let wall = start.elapsed() / 10;
        let gpu = again.device.time_again(20)?;
        prefills.push(json!({
            "tokens": n, "capacity": again.capacity, "chunks": chunks.iter().map(|c| c.rows).collect::<Vec<_>>(),
            "wall_ms": wall.as_secs_f64() * 1e3, "last_chunk_gpu_ms": gpu.as_secs_f64() * 1e3,
        }));
    }

    // Every engine of the package at once, at the largest capacity.
    let memory_of_session = driver.device.memory();
    drop(driver);
    let mut everything = Value::Null;
    if let Ok((package, mut device)) = open(path) {
        let largest = *package.manifest.capacities.last().ok_or("no capacity")?;
        let all: Outcome<()> = (|| {
            for capacity in package.manifest.capacities.clone() {
                device.prepare(capacity, capacity)?;
            }
            device.reserve(largest, 0)?;
            Ok(())
        })();
        everything = match all {
            Ok(()) => json!({"memory": device.memory(), "engines_s": device.times().engines.as_secs_f64()}),
            Err(error) => json!({"error": error.to_string()}),
        };
    }
    Ok(json!({
        "package": path, "load_s": load.as_secs_f64(), "engines_s": engines.as_secs_f64(),
        "first_feed_ms": first.as_secs_f64() * 1e3,
        "decode": decode, "prefill": prefills, "memory": memory_of_session, "all_engines": everything,
    }))
}

#[derive(serde::Deserialize)]
pub struct Case {
    pub prompt: Vec<u32>,
    #[serde(default)]
    pub forced: Vec<u32>,
    /// Number of greedy tokens to draw instead, without logits.
    #[serde(default)]
    greedy: usize,
}

pub fn logits(path: &Path, cases: &Path, output: &Path) -> Outcome<Value> {
    use std::io::Write;
    let cases: Vec<Case> = serde_json::from_str(&std::fs::read_to_string(cases)?)?;
    let mut file = std::io::BufWriter::new(std::fs::File::create(output)?);
    let (package, device) = open(path)?;
    let mut driver = Driver::new(&package, device);
    let mut records = Vec::new();
    for case in cases {
        driver.begin();
        let mut write = |driver: &Driver| file.write_all(bytemuck::cast_slice(&driver.logits));
        let chunks = driver.feed(&case.prompt)?;
        write(&driver)?;
        let mut best = vec![driver.best()];
        for token in &case.forced {
            driver.feed(&[*token])?;
            write(&driver)?;
            best.push(driver.best());
        }
        let mut next = driver.best();
        for _ in 1..case.greedy {
            next = driver.step(next)?;
            best.push(next);
        }
        records.push(json!({
            "prompt": case.prompt.len(), "forced": case.forced.len(), "best": best, "moves": driver.moves,
            "capacity": driver.capacity, "chunks": chunks.iter().map(|c| c.rows).collect::<Vec<_>>(),
        }));
    }
    file.flush()?;
    Ok(json!({"cases": records}))
}
