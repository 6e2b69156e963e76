//! The CPU executor's kernels and whole models.
//!
//! `cargo bench --no-default-features --bench executor [-- FILTER]`. Rates are bytes of weights or caches read (decode)
//! or floating-point operations (prefill, shown as items). `LAPIDARY_CPU_ISA=avx2|portable` measures the other paths.

use divan::Bencher;
use divan::counter::{BytesCount, ItemsCount};
use lapidary::backend::cpu::{Batch, Bindings, CompileOptions, KvCaches, Member, Program};
use lapidary::dim::Dim;
use lapidary::graph::Constant;
use lapidary::interface::Role;
use lapidary::lower::synthetic::Decoder;
use lapidary::lower::{self, lower};
use lapidary::network::{LayerKind, Network, NetworkBuilder, Profile, WeightMode};
use lapidary::tensor::quantized::Granularity;
use lapidary::tensor::{DType, Tensor};

fn main() {
    divan::main();
}

fn random(dtype: DType, shape: &[usize]) -> Tensor {
    let mut state = 0x9e37_79b9_7f4a_7c15u64;
    let values: Vec<f64> = (0..shape.iter().product::<usize>())
        .map(|_| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            ((state >> 40) as f64 / (1u64 << 24) as f64 - 0.5) * 0.1
        })
        .collect();
    Tensor::from_f64_as(dtype, shape.to_vec(), &values)
}

fn dims(shape: &[usize]) -> Vec<Dim> {
    shape.iter().map(|d| Dim::from(*d)).collect()
}

/// `copies` linear layers with separate weights on one input, so that weights come from memory and not from a cache.
fn linears(dtype: DType, rows: usize, depth: usize, columns: usize, copies: usize) -> Network {
    let mut b = NetworkBuilder::new("linear", Profile::prefill(rows, 4096));
    let x = b.input("x", dtype, &dims(&[rows, depth])).unwrap();
    let weight = random(dtype, &[columns, depth]);
    for i in 0..copies {
        let own = Tensor::new(dtype, weight.shape().to_vec(), weight.data().to_vec().into()).unwrap();
        let w = b
            .weight(&format!("w{i}"), Constant::tensor(own), WeightMode::Bind)
            .unwrap();
        let y = b.linear("y", x, w).unwrap();
        b.output(&format!("y{i}"), y).unwrap();
    }
    b.finish().unwrap()
}

/// A weight quantized in blocks of 32 on its last axis, with f16 scales and, if `zeros`, zero points.
fn quantized(codes: DType, zeros: bool, shape: &[usize]) -> Constant {
    let granularity = Granularity::Block { axis: 1, size: 32 };
    let of = granularity.scale_shape(shape).unwrap();
    let mut state = 0x9e37_79b9_7f4a_7c15u64;
    let mut bytes = |count: usize| -> bytes::Bytes {
        let next = |_| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            // No special codes of floats.
            (state >> 56) as u8 & 0x77
        };
        (0..count).map(next).collect::<Vec<u8>>().into()
    };
    let of_codes = |shape: &[usize], bytes| Constant::tensor(Tensor::new(codes, shape.to_vec(), bytes).unwrap());
    let len = |shape: &[usize]| codes.byte_len(shape.iter().product());
    let scales = random(DType::F16, &of);
    let points = zeros.then(|| of_codes(&of, bytes(len(&of))));
    Constant::quantized(
        of_codes(shape, bytes(len(shape))),
        Constant::tensor(scales),
        points,
        granularity,
    )
    .unwrap()
}

/// As [`linears`], with quantized weights.
fn quantized_linears(codes: DType, zeros: bool, rows: usize, depth: usize, columns: usize, copies: usize) -> Network {
    let mut b = NetworkBuilder::new("linear", Profile::prefill(rows, 4096));
    let x = b.input("x", DType::F16, &dims(&[rows, depth])).unwrap();
    for i in 0..copies {
        let weight = quantized(codes, zeros, &[columns, depth]);
        let w = b.weight(&format!("w{i}"), weight, WeightMode::Bind).unwrap();
        let y = b.linear("y", x, w).unwrap();
        b.output(&format!("y{i}"), y).unwrap();
    }
    b.finish().unwrap()
}

const CODES: [DType; 6] = [
    DType::I4,
    DType::U4,
    DType::F4E2M1,
    DType::I8,
    DType::I2,
    DType::F8E4M3Fn,
];

/// One row times 64 MB of quantized weights of 576 × 1536, in blocks of 32; bytes of codes and scales.
#[divan::bench(args = CODES)]
fn quantized_gemv(bencher: Bencher, codes: DType) {
    let bytes = quantized(codes, false, &[1536, 576]).stored_byte_len();
    let copies = (64 << 20) / bytes;
    let network = quantized_linears(codes, false, 1, 576, 1536, copies);
    run(bencher.counter(BytesCount::new(bytes * copies)), &network, 0);
}

/// `[rows, 576] · [576, 1536]` of 4-bit weights with zero points, items are floating-point operations.
#[divan::bench(args = [4, 8, 16, 37, 128, 512])]
fn quantized_gemm(bencher: Bencher, rows: usize) {
    let network = quantized_linears(DType::U4, true, rows, 576, 1536, 4);
    run(bencher.counter(ItemsCount::new(2 * rows * 576 * 1536 * 4)), &network, 0);
}

/// One token of SmolLM2-135M's shape after 37 others, all matrices quantized; bytes of weights.
#[divan::bench(args = [DType::I4, DType::U4, DType::I8], sample_count = 30)]
fn quantized_decode(bencher: Bencher, codes: DType) {
    let mut bytes = 0;
    let graph = Decoder::smollm2_135m().graph_with(|_, dtype, shape| {
        let weight = match shape.len() {
            2 if shape[1].is_multiple_of(32) => quantized(codes, codes == DType::U4, &shape),
            _ => Constant::tensor(random(dtype, &shape)),
        };
        bytes += weight.stored_byte_len();
        weight
    });
    let network = lower(&graph, &Profile::decode(256), &lower::LowerOptions::default()).unwrap();
    run(bencher.counter(BytesCount::new(bytes)), &network, 37);
}

const DTYPES: [DType; 3] = [DType::F32, DType::F16, DType::Bf16];

/// One row times 64 MB of weights of 576 × 1536.
#[divan::bench(args = DTYPES)]
fn gemv(bencher: Bencher, dtype: DType) {
    let bytes = dtype.byte_len(576 * 1536);
    let copies = (64 << 20) / bytes;
    let network = linears(dtype, 1, 576, 1536, copies);
    run(bencher.counter(BytesCount::new(bytes * copies)), &network, 0);
}

/// Rows that share one pass over the weights.
#[divan::bench(args = [2, 4, 8, 16])]
fn few_rows(bencher: Bencher, rows: usize) {
    let bytes = 576 * 1536 * 2;
    let copies = (64 << 20) / bytes;
    let network = linears(DType::F16, rows, 576, 1536, copies);
    run(bencher.counter(BytesCount::new(bytes * copies)), &network, 0);
}

/// `[rows, 576] · [576, 1536]`, items are floating-point operations.
#[divan::bench(args = [37, 128, 512])]
fn gemm(bencher: Bencher, rows: usize) {
    let network = linears(DType::F16, rows, 576, 1536, 4);
    run(bencher.counter(ItemsCount::new(2 * rows * 576 * 1536 * 4)), &network, 0);
}

/// One token over `live` used slots of a cache of 4096, nine heads over three; bytes of the used slots.
#[divan::bench(args = [64, 512, 4096])]
fn attention_decode(bencher: Bencher, live: usize) {
    let network = attention(1, 4096);
    run(
        bencher.counter(BytesCount::new(2 * 3 * live * 64 * 2)),
        &network,
        live - 1,
    );
}

/// A whole prompt at once; items are the operations of the causal half.
#[divan::bench(args = [128, 512])]
fn attention_prefill(bencher: Bencher, tokens: usize) {
    let network = attention(tokens, tokens);
    run(
        bencher.counter(ItemsCount::new(2 * 9 * tokens * tokens * 64)),
        &network,
        0,
    );
}

fn attention(tokens: usize, capacity: usize) -> Network {
    let mut b = NetworkBuilder::new("attention", Profile::prefill(tokens, capacity));
    let dtype = DType::F16;
    let q = b.input("q", dtype, &dims(&[1, 9, tokens, 64])).unwrap();
    let new = b.input("new", dtype, &dims(&[1, 3, tokens, 64])).unwrap();
    let at = b.input("write_indices", DType::I32, &dims(&[1])).unwrap();
    let mask = b.input("mask", DType::Bool, &dims(&[1, 1, tokens, capacity])).unwrap();
    let mut updated = Vec::new();
    for name in ["key_cache.0", "value_cache.0"] {
        let cache = b.input(name, dtype, &dims(&[1, 3, capacity, 64])).unwrap();
        updated.push(b.add("update", LayerKind::KvCacheUpdate, &[cache, new, at]).unwrap());
    }
    let y = b
        .add("attention", LayerKind::Attention, &[q, updated[0], updated[1], mask])
        .unwrap();
    b.output("y", y).unwrap();
    b.output("keys", updated[0]).unwrap();
    b.output("values", updated[1]).unwrap();
    b.finish().unwrap()
}

fn smollm2(dtype: DType) -> (Decoder, lapidary::graph::Graph, usize) {
    let config = Decoder {
        dtype,
        ..Decoder::smollm2_135m()
    };
    let mut bytes = 0;
    let graph = config.graph_with(|_, dtype, shape| {
        let weight = random(dtype, &shape);
        bytes += weight.data().len();
        Constant::tensor(weight)
    });
    (config, graph, bytes)
}

/// One token of SmolLM2-135M's shape after 37 others; bytes of weights.
#[divan::bench(args = [DType::F16, DType::F32], sample_count = 30)]
fn decode(bencher: Bencher, dtype: DType) {
    let (_, graph, bytes) = smollm2(dtype);
    let network = lower(&graph, &Profile::decode(256), &lower::LowerOptions::default()).unwrap();
    run(bencher.counter(BytesCount::new(bytes)), &network, 37);
}

/// One token of each of this many sequences of SmolLM2-135M's shape in fp16, after 37 others; items are tokens.
#[divan::bench(args = [1, 2, 4, 8, 16], sample_count = 20)]
fn decode_of_sequences(bencher: Bencher, sequences: usize) {
    let (_, graph, _) = smollm2(DType::F16);
    let network = lower(&graph, &Profile::decode(256), &lower::LowerOptions::default()).unwrap();
    let options = CompileOptions::default();
    let program = Program::compile(&network, &options.clone().in_batches()).unwrap();
    let mut batch = Batch::new(options.pool().clone());
    let mut caches: Vec<KvCaches> = (0..sequences).map(|_| KvCaches::new(&network).unwrap()).collect();
    let mut logits = vec![vec![0f32; program.outputs()[0].shape.iter().product()]; sequences];
    let members = caches.iter_mut().zip(&mut logits).map(|(caches, logits)| {
        let mut bindings = Bindings::new();
        bindings.output(Role::Logits, &mut logits[..]).caches(caches);
        for port in program.inputs() {
            match port.role.unwrap() {
                role @ Role::LogitRows => bindings.input(role, &[0i32][..]),
                role => bindings.input(role, &[37i32][..]),
            };
        }
        Member {
            program: &program,
            bindings,
        }
    });
    let mut members: Vec<Member<'_, '_>> = members.collect();
    let bencher = bencher.counter(ItemsCount::new(sequences));
    bencher.bench_local(|| batch.run(&mut members).into_iter().for_each(|result| result.unwrap()));
}

/// A prompt of SmolLM2-135M's shape in fp16; items are tokens.
#[divan::bench(args = [37, 512], sample_count = 10)]
fn prefill(bencher: Bencher, tokens: usize) {
    let (_, graph, _) = smollm2(DType::F16);
    let network = lower(&graph, &Profile::prefill(tokens, 1024), &lower::LowerOptions::default()).unwrap();
    run(bencher.counter(ItemsCount::new(tokens)), &network, 0);
}

/// Compiles a lowered network to a program.
#[divan::bench(args = [1, 37], sample_count = 20)]
fn compile(bencher: Bencher, tokens: usize) {
    let (_, graph, _) = smollm2(DType::F16);
    let network = lower(&graph, &Profile::prefill(tokens, 256), &lower::LowerOptions::default()).unwrap();
    let options = CompileOptions::default();
    bencher.bench_local(|| Program::compile(&network, &options).unwrap());
}

/// Binds every input of a network by its name and runs it after `past` tokens.
fn run(bencher: Bencher<'_, '_>, network: &Network, past: usize) {
    let mut program = Program::compile(network, &CompileOptions::default()).unwrap();
    let mut caches = KvCaches::new(network).unwrap();
    let tokens = match network.profile.tokens {
        lapidary::network::Tokens::Static(n) => n,
        lapidary::network::Tokens::Dynamic { .. } => unreachable!("static profiles above"),
    };
    let len = |shape: &[usize]| shape.iter().product::<usize>();
    let inputs = program.inputs().to_vec();
    let floats: Vec<Vec<f32>> = inputs.iter().map(|p| vec![0.01; len(&p.shape)]).collect();
    let ints: Vec<Vec<i32>> = inputs
        .iter()
        .map(|p| match p.name.parse().ok() {
            Some(Role::PositionIds) => (past as i32..(past + tokens) as i32).collect(),
            Some(Role::WriteIndices) => vec![past as i32],
            Some(Role::LogitRows) => vec![tokens as i32 - 1],
            _ => vec![7; len(&p.shape)],
        })
        .collect();
    let slots = caches.capacity().max(1);
    let mask: Vec<bool> = (0..tokens * slots).map(|i| i % slots <= past + i / slots).collect();
    let outputs = program.outputs().to_vec();
    let mut memory: Vec<Vec<f32>> = outputs.iter().map(|p| vec![0.0; len(&p.shape)]).collect();
    let mut bindings = Bindings::new();
    for (i, port) in inputs.iter().enumerate() {
        match port.dtype {
            DType::Bool => bindings.input(&port.name, &mask[..]),
            DType::I32 => bindings.input(&port.name, &ints[i][..]),
            _ => bindings.input(&port.name, &floats[i][..]),
        };
    }
    for (port, memory) in outputs.iter().zip(&mut memory) {
        bindings.output(&port.name, &mut memory[..]);
    }
    bindings.caches(&mut caches);
    bencher.bench_local(|| program.run(&mut bindings).unwrap());
}
