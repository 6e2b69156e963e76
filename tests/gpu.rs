//! Tests that need a GPU. Ignored elsewhere: `scripts/gpu/host.sh run suite` runs them with `--ignored` on a machine
//! with one. The semantics of layers on TensorRT are tested by the binary `executor`, whose cases run there too.
#![cfg(feature = "engines")]

#[path = "gpu/batch.rs"]
mod batch;

use std::path::Path;
use std::rc::Rc;

use lapidary::backend::tensorrt::run::{Argmax, Buffer, Caches, LoadOptions, Pinned, Program, Rows, Runtime, Stream};
use lapidary::backend::tensorrt::{self, BuildOptions, Library};
use lapidary::decode::best;
use lapidary::network::{Elementwise, NetworkBuilder, Profile};
use lapidary::tensor::DType;

fn library() -> Library {
    Library::load(None).unwrap_or_else(|e| panic!("{e}"))
}

fn runtime() -> Rc<Runtime> {
    Runtime::new(&library()).unwrap_or_else(|e| panic!("{e}"))
}

fn buffer(runtime: &Rc<Runtime>, values: &[f32]) -> Buffer {
    let buffer = Buffer::new(runtime.cuda(), size_of_val(values), "a test").unwrap();
    buffer.write(0, bytemuck::cast_slice(values)).unwrap();
    buffer
}

fn read(buffer: &Buffer) -> Vec<f32> {
    let mut bytes = vec![0; buffer.bytes()];
    buffer.read(0, &mut bytes).unwrap();
    bytes.chunks_exact(4).map(bytemuck::pod_read_unaligned).collect()
}

#[test]
#[ignore = "needs a GPU"]
fn the_best_token_on_the_device_is_that_of_the_host() {
    let runtime = runtime();
    let stream = Stream::new(runtime.cuda()).unwrap();
    let mut argmax = Argmax::new(runtime.cuda(), &stream, 8).unwrap();
    let mut state = 88_172_645_463_325_252_u64;
    let mut bits = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    };
    for n in [1, 2, 31, 256, 257, 320, 32_000, 49_152, 128_256] {
        let mut rows = Vec::new();
        for kind in 0..8 {
            let mut logits: Vec<f32> = (0..n)
                .map(|_| match kind {
                    // Many ties; negative; every finite bit pattern; with minus infinities.
                    0 => (bits() % 7) as f32,
                    1 => -((bits() % 1000) as f32) - 1.0,
                    2 => Some(f32::from_bits(bits() as u32))
                        .filter(|x| x.is_finite())
                        .unwrap_or(0.0),
                    3 if bits() % 2 == 0 => f32::NEG_INFINITY,
                    _ => (bits() as i32) as f32 * 1e-6,
                })
                .collect();
            let somewhere = bits() as usize % n;
            match kind {
                4 => logits[somewhere] = f32::NAN,
                5 => logits[somewhere] = f32::INFINITY,
                6 => logits.fill(f32::NEG_INFINITY),
                7 => logits.iter_mut().for_each(|l| *l *= 0.0),
                _ => {}
            }
            let on_device = buffer(&runtime, &logits);
            argmax.enqueue(&stream, &on_device, 1, n).unwrap();
            stream.wait().unwrap();
            assert_eq!(argmax.result(0).unwrap(), best(&logits), "{n} logits of kind {kind}");
            rows.extend(logits);
        }
        argmax.enqueue(&stream, &buffer(&runtime, &rows), 8, n).unwrap();
        stream.wait().unwrap();
        for (row, logits) in rows.chunks_exact(n).enumerate() {
            assert_eq!(argmax.result(row).unwrap(), best(logits), "row {row} of {n} logits");
        }
    }
}

/// A queued copy is waited for before its bytes are read or freed; callers need no wait of their own.
#[test]
#[ignore = "needs a GPU"]
fn queued_copies_are_over_when_their_memory_is_used() {
    const N: usize = 16 << 20;
    let runtime = runtime();
    let cuda = runtime.cuda();
    let streams = [Stream::new(cuda).unwrap(), Stream::new(cuda).unwrap()];
    let on_device = Buffer::new(cuda, N, "a test").unwrap();
    let mut there = Pinned::new(cuda, N).unwrap();
    let mut back = Pinned::new(cuda, N).unwrap();
    for round in 1..=6u8 {
        let stream = &streams[usize::from(round) % 2];
        // Waits for the last round's upload before it overwrites what that read.
        there.slice_mut::<u8>(0, N).unwrap().fill(round);
        stream.upload(&there, 0..N, &on_device, 0).unwrap();
        stream.download(&on_device, 0..N, &mut back, 0).unwrap();
        assert!(
            back.slice::<u8>(0, N).unwrap().iter().all(|byte| *byte == round),
            "round {round}"
        );
    }
    // Host and device memory that is freed while its copies are queued.
    let target = Buffer::new(cuda, N, "a test").unwrap();
    for _ in 0..4 {
        let mut host = Pinned::new(cuda, N).unwrap();
        host.slice_mut::<u8>(0, N).unwrap().fill(7);
        let device = Buffer::new(cuda, N, "a test").unwrap();
        streams[0].upload(&host, 0..N, &device, 0).unwrap();
        streams[0].copy(&device, &target, N).unwrap();
        drop((host, device));
        // Likely in the same place.
        let mut other = Pinned::new(cuda, N).unwrap();
        other.slice_mut::<u8>(0, N).unwrap().fill(9);
    }
    streams[0].wait().unwrap();
    let mut bytes = vec![0; N];
    target.read(0, &mut bytes).unwrap();
    assert!(bytes.iter().all(|byte| *byte == 7));
}

#[test]
#[ignore = "needs a GPU"]
fn copies_outside_of_their_memory_are_refused() {
    let runtime = runtime();
    let stream = Stream::new(runtime.cuda()).unwrap();
    let device = buffer(&runtime, &[0.0; 16]);
    let refused = |copy: &dyn Fn()| {
        let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(copy));
        assert!(result.is_err());
    };
    let rows = |at, pitch| Rows {
        buffer: &device,
        at,
        pitch,
    };
    stream.copy_rows(rows(0, 32), rows(16, 32), 16, 2).unwrap();
    refused(&|| drop(stream.copy_rows(rows(0, 32), rows(20, 32), 16, 2)));
    refused(&|| drop(stream.copy_rows(rows(0, 8), rows(16, 32), 16, 2)));
    refused(&|| drop(stream.copy_rows(rows(0, usize::MAX), rows(16, 32), 16, 3)));
    refused(&|| drop(device.write(61, &[0; 4])));
    refused(&|| drop(device.write(usize::MAX, &[0; 4])));
    let host = Pinned::new(runtime.cuda(), 64).unwrap();
    stream.upload(&host, 32..64, &device, 32).unwrap();
    refused(&|| drop(stream.upload(&host, 32..65, &device, 0)));
    refused(&|| drop(stream.upload(&host, 0..64, &device, 4)));
    refused(&|| drop(host.slice::<f32>(2, 1)));
    refused(&|| drop(host.slice::<f32>(0, usize::MAX)));
    stream.wait().unwrap();
}

#[test]
#[ignore = "needs a GPU"]
fn an_engine_without_enough_working_memory_is_refused() {
    let runtime = runtime();
    let mut b = NetworkBuilder::new("products", Profile::decode(16));
    let shape = [512usize.into(), 512usize.into()];
    let x = b.input("x", DType::F32, &shape).unwrap();
    let product = b.linear("product", x, x).unwrap();
    let root = b
        .activation("gelu", lapidary::network::Activation::GeluErf, product)
        .unwrap();
    let y = b.linear("again", root, product).unwrap();
    b.output("y", y).unwrap();
    let network = b.finish().unwrap();
    let plan = tensorrt::build(&library(), &network, &BuildOptions::default()).unwrap();
    let loading = LoadOptions {
        graphs: false,
        kernels: None,
        caches: Caches::Tensors,
    };
    let mut engine = Program::load(&runtime, Path::new("products"), &[plan.bytes()], &network, loading).unwrap();
    if engine.scratch_bytes() == 0 {
        return; // TensorRT made one kernel of it
    }
    let stream = Stream::new(runtime.cuda()).unwrap();
    let error = engine.enqueue(&stream).unwrap_err().to_string();
    assert!(error.contains("scratch memory"), "{error}");
}

#[test]
#[ignore = "needs a GPU"]
fn a_captured_engine_reads_new_inputs_and_follows_its_buffers() {
    let runtime = runtime();
    let mut b = NetworkBuilder::new("squares", Profile::decode(16));
    let x = b.input("x", DType::F32, &[1usize.into(), 64usize.into()]).unwrap();
    let y = b.elementwise("square", Elementwise::Prod, x, x).unwrap();
    b.output("y", y).unwrap();
    let network = b.finish().unwrap();
    let plan = tensorrt::build(&library(), &network, &BuildOptions::default()).unwrap();
    let loading = LoadOptions {
        graphs: true,
        kernels: None,
        caches: Caches::Tensors,
    };
    let mut engine = Program::load(&runtime, Path::new("squares"), &[plan.bytes()], &network, loading).unwrap();
    let stream = Stream::new(runtime.cuda()).unwrap();
    let scratch = Buffer::new(runtime.cuda(), engine.scratch_bytes(), "scratch memory").unwrap();
    // SAFETY: held to the end.
    unsafe { engine.set_scratch(&scratch) };
    let mut kept = Vec::new();
    for round in 0..3 {
        let (input, output) = (buffer(&runtime, &[0.0; 64]), buffer(&runtime, &[-1.0; 64]));
        // SAFETY: of the ports' sizes, kept to the end.
        unsafe { engine.bind([("x", input.address()), ("y", output.address())]).unwrap() };
        for run in 0..4 {
            let values: Vec<f32> = (0..64).map(|i| (i * 3 + run + round) as f32).collect();
            input.write(0, bytemuck::cast_slice(&values)).unwrap();
            output.clear(&stream).unwrap();
            engine.enqueue(&stream).unwrap();
            stream.wait().unwrap();
            let expected: Vec<f32> = values.iter().map(|v| v * v).collect();
            assert_eq!(read(&output), expected, "round {round}, run {run}");
            assert_eq!(engine.is_captured(), round + run > 0, "round {round}, run {run}");
        }
        kept.push((input, output));
    }
}
