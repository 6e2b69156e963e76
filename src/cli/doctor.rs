//! `lapidary doctor`: what this machine can build and run, and how to fix problems.

use std::fmt::Write;
use std::path::PathBuf;

use serde::Serialize;

use super::{Failure, JsonForm, bytes, print, print_json};
use crate::backend::tensorrt::{self, FLAVOUR, probe};
use crate::bench::machine;

#[derive(clap::Args)]
pub struct Args {
    /// TensorRT library to check
    #[arg(long, value_name = "PATH")]
    tensorrt_lib: Option<PathBuf>,
    /// Print one JSON document
    #[arg(long, value_enum, value_name = "FORM", num_args = 0..=1, require_equals = true, default_missing_value = "pretty")]
    json: Option<JsonForm>,
}

#[derive(Serialize)]
struct MachineReport {
    lapidary: &'static str,
    cpu: Cpu,
    tensorrt: tensorrt::ProbeReport,
    /// Whether `verify` can run exports in tract.
    tract: bool,
}

#[derive(Serialize)]
struct Cpu {
    model: Option<String>,
    architecture: &'static str,
    /// Threads that can run at once.
    threads: usize,
    memory_bytes: Option<u64>,
    /// Instruction sets that the executor's kernels can use.
    features: Vec<&'static str>,
}

pub fn run(args: Args) -> Result<(), Failure> {
    let facts = MachineReport {
        lapidary: env!("CARGO_PKG_VERSION"),
        cpu: cpu(),
        tensorrt: probe(args.tensorrt_lib.as_deref()),
        tract: cfg!(feature = "tract"),
    };
    if let Some(form) = args.json {
        return print_json(&facts, form);
    }
    print(&summary(&facts))
}

fn cpu() -> Cpu {
    Cpu {
        model: machine::cpu_model(),
        architecture: std::env::consts::ARCH,
        threads: machine::cores(),
        memory_bytes: machine::memory_bytes(),
        features: features(),
    }
}

#[cfg(target_arch = "x86_64")]
fn features() -> Vec<&'static str> {
    macro_rules! have {
        ($($name:tt),*) => {
            [$(($name, std::arch::is_x86_feature_detected!($name))),*]
        };
    }
    let all = have!(
        "avx2",
        "fma",
        "f16c",
        "avx512f",
        "avx512bw",
        "avx512vl",
        "avx512bf16",
        "avx512fp16",
        "avx512vnni"
    );
    all.into_iter()
        .filter(|(_, there)| *there)
        .map(|(name, _)| name)
        .collect()
}

#[cfg(target_arch = "aarch64")]
fn features() -> Vec<&'static str> {
    macro_rules! have {
        ($($name:tt),*) => {
            [$(($name, std::arch::is_aarch64_feature_detected!($name))),*]
        };
    }
    let all = have!("neon", "fp16", "bf16", "dotprod", "i8mm");
    all.into_iter()
        .filter(|(_, there)| *there)
        .map(|(name, _)| name)
        .collect()
}

#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
fn features() -> Vec<&'static str> {
    Vec::new()
}

fn summary(facts: &MachineReport) -> String {
    let mut out = String::new();
    let mut line = |name: &str, text: &str| {
        let _ = writeln!(out, "{name:<16} {text}");
    };
    let cpu = &facts.cpu;
    line("lapidary", facts.lapidary);
    let memory = cpu
        .memory_bytes
        .map(|n| format!(", {} of memory", bytes(n)))
        .unwrap_or_default();
    line(
        "cpu",
        &format!(
            "{}, {} threads{memory}",
            cpu.model.as_deref().unwrap_or(cpu.architecture),
            cpu.threads
        ),
    );
    let features = if cpu.features.is_empty() {
        "none that speed up the executor".to_string()
    } else {
        cpu.features.join(" ")
    };
    line("cpu features", &features);

    let t = &facts.tensorrt;
    match (&t.library, &t.library_problem) {
        (Some(library), _) => line(
            FLAVOUR.feature,
            &format!(
                "{} at {} (by {})",
                library.version,
                library.path.display(),
                library.source
            ),
        ),
        (None, problem) => line(
            FLAVOUR.feature,
            &format!("none: {}", problem.as_deref().unwrap_or("not found")),
        ),
    }
    match (&t.driver, &t.driver_problem) {
        (Some(driver), _) => {
            let version = driver.driver_version.as_deref().unwrap_or("of unknown version");
            line(
                "cuda driver",
                &format!("{version}, runs CUDA up to {}", driver.cuda_version),
            );
            for gpu in &driver.gpus {
                let (major, minor) = gpu.compute_capability;
                line(
                    "gpu",
                    &format!("{}, SM {major}.{minor}, {}", gpu.name, bytes(gpu.memory_bytes)),
                );
            }
        }
        (None, problem) => line(
            "cuda driver",
            &format!("none: {}", problem.as_deref().unwrap_or("not found")),
        ),
    }

    out.push('\n');
    // One reason often explains several answers: it is printed once.
    let mut given: Vec<String> = [&t.library_problem, &t.driver_problem]
        .into_iter()
        .flatten()
        .cloned()
        .collect();
    let mut ability = |what: &str, possible: bool, note: Option<&str>| {
        let answer = if possible { "yes" } else { "no" };
        let note = match note {
            None => String::new(),
            Some(note) if given.iter().any(|reason| reason == note) => ", for the reason above".to_string(),
            Some(note) => {
                given.push(note.to_string());
                format!(": {note}")
            }
        };
        let _ = writeln!(out, "{what:<44} {answer}{note}");
    };
    ability("convert, and generate on the CPU", true, None);
    let one = |a: &tensorrt::Ability| (a.possible, a.note.clone());
    let build = format!("build {} engines", FLAVOUR.product);
    for (what, (possible, note)) in [
        (&*build, one(&t.build)),
        ("build engines whose weights can be refitted", one(&t.build_refittable)),
        ("load engines on the GPU", one(&t.run)),
    ] {
        ability(what, possible, note.as_deref());
    }
    let tract = (!facts.tract).then_some("compile with `cargo build --features tract`; `--engine eval` works without");
    ability("verify against tract", facts.tract, tract);
    out
}
