//! Profile of the CPU executor for a model of SmolLM2-135M's shape with random weights.
//!
//! `cargo run --release --no-default-features --example cpu_profile -- [f16|bf16|f32] [tokens] [past] [threads]` prints
//! the best of several runs, and the time of each kind of step (measured one step at a time, so each includes a wake-up
//! of the threads).

use std::collections::BTreeMap;
use std::time::Instant;

use lapidary::backend::cpu::{Bindings, CompileOptions, KvCaches, Program, available_threads};
use lapidary::graph::Constant;
use lapidary::interface::Role;
use lapidary::lower::synthetic::Decoder;
use lapidary::lower::{self, lower};
use lapidary::network::Profile;
use lapidary::tensor::{DType, Tensor};

fn main() {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let number = |i: usize, default: usize| args.get(i).map_or(default, |a| a.parse().expect("a number"));
    let dtype = match args.first().map(String::as_str) {
        Some("f32") => DType::F32,
        Some("bf16") => DType::Bf16,
        _ => DType::F16,
    };
    let (tokens, past, threads) = (number(1, 1), number(2, 0), number(3, available_threads()));
    let config = Decoder {
        dtype,
        ..Decoder::smollm2_135m()
    };
    let mut bytes = 0;
    let graph = config.graph_with(|_, dtype, shape| {
        let weight = random(dtype, shape);
        bytes += weight.data().len();
        Constant::tensor(weight)
    });
    let capacity = (past + tokens).next_power_of_two().max(256);
    let start = Instant::now();
    let network = lower(
        &graph,
        &Profile::prefill(tokens, capacity),
        &lower::LowerOptions::default(),
    )
    .expect("it lowers");
    let lowered = start.elapsed();
    let start = Instant::now();
    let mut program = Program::compile(&network, &CompileOptions::with_threads(threads)).expect("it compiles");
    println!(
        "{program:?}: lowered in {lowered:.1?}, compiled in {:.1?}, arena {:.1} MB, weights {:.1} MB",
        start.elapsed(),
        program.arena_bytes() as f64 / 1e6,
        bytes as f64 / 1e6
    );
    let mut caches = KvCaches::new(&network).expect("static");
    let ids: Vec<i32> = (0..tokens as i32).map(|i| i * 37 % 49152).collect();
    let positions: Vec<i32> = (0..tokens as i32).map(|i| i + past as i32).collect();
    let (write, last) = ([past as i32], [tokens as i32 - 1]);
    let mut logits = vec![0f32; config.vocabulary];
    let mut bindings = Bindings::new();
    bindings
        .input(Role::TokenIds, &ids[..])
        .input(Role::PositionIds, &positions[..])
        .input(Role::WriteIndices, &write[..])
        .input(Role::LogitRows, &last[..])
        .caches(&mut caches)
        .output(Role::Logits, &mut logits[..]);
    let mut times: Vec<f64> = Vec::new();
    let until = Instant::now();
    while times.len() < 5 || (until.elapsed().as_secs_f64() < 2.0 && times.len() < 200) {
        let start = Instant::now();
        program.run(&mut bindings).expect("it runs");
        times.push(start.elapsed().as_secs_f64() * 1e3);
    }
    times.sort_by(f64::total_cmp);
    println!(
        "{dtype} {tokens} tokens after {past}: best {:.2} ms, median {:.2} ms of {} runs; {:.1} GB/s of weights",
        times[0],
        times[times.len() / 2],
        times.len(),
        bytes as f64 / times[0] / 1e6,
    );
    let mut kinds: BTreeMap<&str, (usize, f64)> = BTreeMap::new();
    for (_, kind, nanoseconds) in program.profile(&mut bindings).expect("it runs").steps {
        let entry = kinds.entry(kind).or_default();
        *entry = (entry.0 + 1, entry.1 + nanoseconds as f64 / 1e6);
    }
    for (kind, (count, time)) in kinds {
        println!("{time:9.3} ms  {count:4} × {kind}");
    }
}

fn random(dtype: DType, shape: Vec<usize>) -> Tensor {
    let mut state = 0x9e37_79b9_7f4a_7c15u64;
    let values: Vec<f64> = (0..shape.iter().product::<usize>())
        .map(|_| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            ((state >> 40) as f64 / (1u64 << 24) as f64 - 0.5) * 0.1
        })
        .collect();
    Tensor::from_f64_as(dtype, shape, &values)
}
