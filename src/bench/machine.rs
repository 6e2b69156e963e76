//! The machine of a measurement: processor, memory, system, GPU, commit, copy bandwidth, peak arithmetic.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::sync::Barrier;
use std::time::Instant;

use super::result::{Gpu, Machine, Peak};
use crate::decode::DeviceFacts;

/// Facts about this machine; bandwidth and peak are filled in later.
pub fn machine(device: Option<&DeviceFacts>) -> Machine {
    Machine {
        cpu: cpu_model().unwrap_or_else(|| std::env::consts::ARCH.to_string()),
        cores: cores(),
        memory_bytes: memory_bytes(),
        os: os(),
        gpu: device.map(gpu),
        copy_bandwidth_bytes_per_s: None,
        peak_flops: None,
    }
}

fn gpu(facts: &DeviceFacts) -> Gpu {
    let gpu = &facts.driver.gpus[0];
    let (major, minor) = gpu.compute_capability;
    Gpu {
        name: gpu.name.clone(),
        driver: facts.driver.driver_version.clone(),
        memory_bytes: Some(gpu.memory_bytes),
        compute_capability: Some(format!("{major}.{minor}")),
    }
}

/// The value after `name:` in a kernel file.
fn field(path: &str, name: &str) -> Option<String> {
    let text = fs::read_to_string(path).ok()?;
    let line = text.lines().find(|line| line.starts_with(name))?;
    Some(line.split_once(':')?.1.trim().to_string())
}

/// A value in kB, as bytes.
fn kilobytes(path: &str, name: &str) -> Option<u64> {
    Some(field(path, name)?.split(' ').next()?.parse::<u64>().ok()? * 1024)
}

/// Number of cores that other processes keep busy: a mean over a third of a second, from `/proc/stat`. `None` if there
/// is no such file.
pub fn busy_cores() -> Option<f64> {
    // user, nice, system, idle, iowait, irq, softirq, steal: ticks since boot, of all cores together
    let ticks = || -> Option<(u64, u64)> {
        let text = fs::read_to_string("/proc/stat").ok()?;
        let line = text.lines().next()?.strip_prefix("cpu ")?;
        let fields: Vec<u64> = line.split_whitespace().map_while(|n| n.parse().ok()).take(8).collect();
        Some((fields.iter().sum(), fields.get(3)? + fields.get(4)?))
    };
    let (all, idle) = ticks()?;
    std::thread::sleep(std::time::Duration::from_millis(330));
    let (all_after, idle_after) = ticks()?;
    let (all, idle) = (all_after.checked_sub(all)?, idle_after.saturating_sub(idle));
    (all > 0).then(|| cores() as f64 * (1.0 - idle.min(all) as f64 / all as f64))
}

pub fn cpu_model() -> Option<String> {
    field("/proc/cpuinfo", "model name")
}

/// Threads that can run at once.
pub fn cores() -> usize {
    std::thread::available_parallelism().map_or(1, |n| n.get())
}

pub fn memory_bytes() -> Option<u64> {
    kilobytes("/proc/meminfo", "MemTotal")
}

/// Largest resident set of this process so far, mapped files included.
pub fn peak_host_bytes() -> Option<u64> {
    kilobytes("/proc/self/status", "VmHWM")
}

/// Current anonymous memory of the resident set: the system records no peak of it.
pub fn anonymous_host_bytes() -> Option<u64> {
    kilobytes("/proc/self/status", "RssAnon")
}

/// `Debian GNU/Linux 12 (bookworm), Linux 6.1.0`
fn os() -> String {
    let release = fs::read_to_string("/etc/os-release").unwrap_or_default();
    let pretty = release.lines().find_map(|line| line.strip_prefix("PRETTY_NAME="));
    let kernel = fs::read_to_string("/proc/sys/kernel/osrelease").ok();
    let kernel = kernel.map(|version| format!("Linux {}", version.trim()));
    let known: Vec<String> = pretty
        .map(|name| name.trim_matches('"').to_string())
        .into_iter()
        .chain(kernel)
        .collect();
    match known.is_empty() {
        true => std::env::consts::OS.to_string(),
        false => known.join(", "),
    }
}

/// The commit of the running program: `LAPIDARY_COMMIT`, else that of the checkout that contains its file, else the
/// content of `.gpu/commit` for sources without history. `+changes` marks uncommitted changes.
pub fn commit() -> String {
    let nonempty = |text: String| Some(text.trim().to_string()).filter(|t| !t.is_empty());
    let unknown = || "unknown".to_string();
    if let Some(commit) = std::env::var("LAPIDARY_COMMIT").ok().and_then(nonempty) {
        return commit;
    }
    let of_binary = std::env::current_exe().ok();
    let folder = of_binary.as_deref().and_then(Path::parent);
    if let Some(commit) = folder.and_then(commit_of) {
        return commit;
    }
    fs::read_to_string(".gpu/commit")
        .ok()
        .and_then(nonempty)
        .unwrap_or_else(unknown)
}

fn commit_of(folder: &Path) -> Option<String> {
    let git = |args: &[&str]| {
        let done = Command::new("git").arg("-C").arg(folder).args(args).output().ok()?;
        done.status
            .success()
            .then(|| String::from_utf8_lossy(&done.stdout).trim().to_string())
    };
    let commit = git(&["rev-parse", "HEAD"])?;
    let changes = git(&["status", "--porcelain", "--untracked-files=no"])?;
    Some(if changes.is_empty() {
        commit
    } else {
        commit + "+changes"
    })
}

/// Bytes that each copy of [`copy_bandwidth`] reads: far more than fits in caches.
const COPY_BYTES: usize = 512 << 20;
/// Copies timed; the fastest counts.
const COPY_RUNS: usize = 7;

/// Bytes read plus bytes written per second when `threads` threads copy memory in parallel, each its own part: the Copy
/// of STREAM (McCalpin, <https://www.cs.virginia.edu/stream/ref.html>), the best of several runs. Reads for write
/// allocation are not counted.
pub fn copy_bandwidth(threads: usize) -> f64 {
    let threads = threads.max(1);
    let share = COPY_BYTES / threads;
    let barrier = Barrier::new(threads);
    let spans: Vec<Vec<(Instant, Instant)>> = std::thread::scope(|scope| {
        let workers: Vec<_> = (0..threads)
            .map(|_| {
                scope.spawn(|| {
                    // Written once by the thread that uses it, so that its pages exist and are local.
                    let from = vec![1u8; share];
                    let mut to = vec![2u8; share];
                    let mut spans = Vec::new();
                    for _ in 0..COPY_RUNS {
                        barrier.wait();
                        let start = Instant::now();
                        to.copy_from_slice(std::hint::black_box(&from));
                        std::hint::black_box(&mut to);
                        spans.push((start, Instant::now()));
                    }
                    spans
                })
            })
            .collect();
        workers
            .into_iter()
            .map(|w| w.join().expect("copying does not panic"))
            .collect()
    });
    let run = |i: usize| {
        let first = spans.iter().map(|s| s[i].0).min().expect("at least one thread");
        let last = spans.iter().map(|s| s[i].1).max().expect("at least one thread");
        (last - first).as_secs_f64()
    };
    let fastest = (0..COPY_RUNS).map(run).fold(f64::INFINITY, f64::min);
    2.0 * (share * threads) as f64 / fastest
}

/// Dense matrix products from NVIDIA's data sheets, in operations per second: name, half precision, and single
/// precision without TF32. The sheets give half precision with sparsity, which is twice the dense rate. The first entry
/// that matches a name applies.
const PEAKS: [(&str, f64, f64); 5] = [
    ("H200 NVL", 835.5e12, 60e12),
    ("H200", 989.5e12, 67e12),
    ("H100 PCIe", 756.5e12, 51e12),
    ("H100 80GB HBM3", 989.5e12, 67e12),
    ("A100", 312e12, 19.5e12),
];

/// The data sheet's value for a dtype, for known GPUs.
pub fn stated_peak(gpu: &str, dtype: &str) -> Option<Peak> {
    let (model, half, single) = PEAKS.into_iter().find(|(model, ..)| gpu.contains(model))?;
    let flops = match dtype {
        "fp16" | "bf16" => half,
        "fp32" => single,
        _ => return None,
    };
    Some(Peak {
        flops,
        source: format!("stated: NVIDIA's data sheet of the {model}, {dtype}, dense"),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_machine_has_facts() {
        let machine = machine(None);
        assert!(machine.cores >= 1 && !machine.cpu.is_empty() && !machine.os.is_empty());
        if cfg!(target_os = "linux") {
            assert!(machine.memory_bytes.unwrap() > 64 << 20);
            let (peak, anonymous) = (peak_host_bytes().unwrap(), anonymous_host_bytes().unwrap());
            assert!(
                (1..peak).contains(&anonymous) && peak > 1 << 20,
                "{anonymous} of {peak}"
            );
        }
    }

    #[test]
    fn peaks_are_found_by_the_gpus_name() {
        assert_eq!(stated_peak("NVIDIA H200", "fp16").unwrap().flops, 989.5e12);
        assert_eq!(stated_peak("NVIDIA H100 PCIe", "bf16").unwrap().flops, 756.5e12);
        assert_eq!(stated_peak("NVIDIA H100 80GB HBM3", "fp32").unwrap().flops, 67e12);
        assert_eq!(stated_peak("NVIDIA T4", "fp16"), None);
    }
}
