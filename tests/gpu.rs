//! What only a GPU can show. Ignored elsewhere: `scripts/gpu/host.sh run suite` runs them with `--ignored` where there is one.
//! The layers' own meaning on TensorRT is tested by the binary `executor`, whose cases run there too.
#![cfg(feature = "engines")]

use std::path::Path;
use std::rc::Rc;

use lapidary::backend::tensorrt::run::{Argmax, Buffer, Engine, LoadOptions, Runtime, Stream};
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
    let mut argmax = Argmax::new(runtime.cuda(), &stream).unwrap();
    let mut state = 88_172_645_463_325_252_u64;
    let mut bits = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    };
    for n in [1, 2, 31, 256, 257, 320, 32_000, 49_152, 128_256] {
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
            argmax.enqueue(&stream, &on_device, n).unwrap();
            stream.wait().unwrap();
            assert_eq!(argmax.result().unwrap(), best(&logits), "{n} logits of kind {kind}");
        }
    }
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
    };
    let mut engine = Engine::load(&runtime, Path::new("squares"), plan.bytes(), &network, loading).unwrap();
    let stream = Stream::new(runtime.cuda()).unwrap();
    let scratch = Buffer::new(runtime.cuda(), engine.scratch_bytes(), "working memory").unwrap();
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
