//! Single choices of the lowering on layers of real dims with synthetic weights.

use std::path::Path;
use std::sync::Mutex;

use lapidary::backend::tensorrt::run::timing::SyntheticProgram;
use lapidary::backend::tensorrt::run::{Caches, LoadOptions, Program, Runtime, Stream};
use lapidary::backend::tensorrt::{self, BuildOptions, Library};
use lapidary::graph::{Constant, Graph};
use lapidary::interface::Role;
use lapidary::lower::synthetic::Decoder;
use lapidary::lower::{LowerOptions, QuantizedForm, lower};
use lapidary::network::{LayerKind, Network, Profile, WeightMode};
use lapidary::tensor::quantized::Granularity;
use lapidary::tensor::{DType, Tensor};

use crate::Outcome;

/// The dims, with room for every measured capacity.
fn llama(large: bool) -> Decoder {
    let dims = match large {
        true => Decoder::llama_8b(),
        false => Decoder::llama_1b(),
    };
    Decoder {
        positions: 65536,
        ..dims
    }
}

/// Runs the cases, several at a time, and prints each result at once, so that an interrupted run keeps its results.
/// Building and loading run on the CPU; only one case at a time measures.
pub fn each<T: Send>(threads: usize, cases: Vec<T>, describe: impl Fn(T) -> String + Sync) {
    let cases = Mutex::new(cases.into_iter());
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                loop {
                    let next = cases.lock().expect("no panic").next();
                    let Some(case) = next else { return };
                    println!("{}", describe(case));
                }
            });
        }
    });
}

/// Quantization of linear layers' weights: codes, block size (0: one scale per row), zero points.
#[derive(Clone, Copy)]
pub struct Codes(pub DType, pub usize, pub bool);

impl std::fmt::Display for Codes {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Codes(dtype, block, zeros) = self;
        match block {
            0 => write!(f, "{dtype} by row")?,
            size => write!(f, "{dtype} by {size}")?,
        }
        f.write_str(if *zeros { " with zero points" } else { "" })
    }
}

/// Noise if the bytes become part of the plan.
fn tensor(name: &str, dtype: DType, shape: Vec<usize>, embed: bool) -> Constant {
    if !embed {
        // Seeded by the origin; otherwise weights of one shape would be deduplicated.
        return Constant::absent(dtype, shape).with_origin(name);
    }
    let mut state = 7u64;
    let bytes = (0..dtype.byte_len(shape.iter().product())).map(|i| {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        let byte = (state >> 40) as u8;
        match dtype.is_float() && i % 2 == 1 {
            // Small finite numbers of fp16.
            true => 0x20 | (byte & 3),
            false => byte & 0x77,
        }
    });
    let bytes: Vec<u8> = bytes.collect();
    Constant::tensor(Tensor::new(dtype, shape, bytes.into()).expect("as many bytes as the shape needs"))
}

/// Which weights of a decoder are quantized.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Quantized {
    /// Those of its linear layers, without the head.
    Layers,
    /// Those and the head.
    LayersAndHead,
}

impl Quantized {
    fn has(self, name: &str) -> bool {
        name.contains("proj") || self == Quantized::LayersAndHead && name.contains("lm_head")
    }
}

/// The decoder's graph with these of its weights quantized.
pub fn quantized(decoder: &Decoder, codes: Option<(Codes, Quantized)>, embed: bool) -> Graph {
    decoder.graph_with(|name, dtype, shape| match codes {
        Some((Codes(code, block, zeros), which)) if which.has(name) => {
            let granularity = match block {
                0 => Granularity::Channel { axis: 0 },
                size => Granularity::Block { axis: 1, size },
            };
            let of_scales = granularity.scale_shape(&shape).expect("blocks divide the rows");
            let part = |part: &str, dtype, shape| tensor(&format!("{name}.{part}"), dtype, shape, embed);
            let zeros = zeros.then(|| part("zero_points", code, of_scales.clone()));
            let scales = part("scales", dtype, of_scales);
            let whole = Constant::quantized(part("codes", code, shape), scales, zeros, granularity);
            whole.expect("parts that belong together")
        }
        _ => tensor(name, dtype, shape, embed),
    })
}

/// A label, and what is built and measured under it.
type Case = (String, Profile, LowerOptions, Option<(Codes, Quantized)>);

type Change<'a> = (&'a str, &'a dyn Fn(&mut LowerOptions));

/// One choice at a time against the defaults.
pub fn choices(large: bool, layers: usize, only: &str) -> Outcome<()> {
    use lapidary::lower::{AttentionForm as A, LinearForm as L};
    let library = Library::load(None)?;
    let mut decoder = llama(large);
    decoder.layers = layers;
    let hidden = decoder.hidden;
    let with = |change: &dyn Fn(&mut LowerOptions)| {
        let mut options = LowerOptions::for_engines();
        change(&mut options);
        options
    };
    let mut cases: Vec<Case> = Vec::new();
    for codes in [
        Codes(DType::I8, 0, false),
        Codes(DType::I8, 32, false),
        Codes(DType::F8E4M3Fn, 0, false),
        Codes(DType::I4, 32, false),
        Codes(DType::I4, 128, false),
        Codes(DType::U4, 32, true),
    ] {
        let (one, many) = (Profile::decode(1024), Profile::prefill(512, 1024));
        use QuantizedForm::{Dequantize, DequantizeApart, Elementwise};
        for (mode, mode_name) in [(WeightMode::Bind, "bound"), (WeightMode::Embed, "embedded")] {
            for (form, name) in [
                (Dequantize, "products"),
                (DequantizeApart, "apart"),
                (Elementwise, "elements"),
            ] {
                for profile in [one, many] {
                    let change = |o: &mut LowerOptions| {
                        (o.weight_mode, o.quantized, o.prefill_quantized) = (mode, form, Some(form));
                    };
                    if mode == WeightMode::Bind || form != Elementwise && codes.0.bits() == 4 {
                        let label = format!("quantized {codes}, {mode_name}, {name}");
                        cases.push((label, profile, with(&change), Some((codes, Quantized::Layers))));
                    }
                }
            }
        }
    }
    for form in [
        QuantizedForm::Dequantize,
        QuantizedForm::DequantizeApart,
        QuantizedForm::Elementwise,
        QuantizedForm::Whole,
    ] {
        let change = |o: &mut LowerOptions| o.prefill_quantized = Some(form);
        let label = format!("head quantized too, {form:?}");
        let codes = Some((Codes(DType::I4, 32, false), Quantized::LayersAndHead));
        cases.push((label, Profile::prefill(128, 1024), with(&change), codes));
    }
    for profile in [Profile::decode(1024), Profile::prefill(512, 1024)] {
        cases.push(("quantized not at all".to_string(), profile, with(&|_| {}), None));
    }
    for capacity in [256, 1024, 4096] {
        let attentions = [
            ("layer", A::Layer),
            ("decomposed", A::Decomposed),
            ("reduced scores", A::ReducedScores),
            ("8 parts", A::Split(8)),
            ("16 parts", A::Split(16)),
        ];
        for (name, form) in attentions {
            let options = with(&|o| o.attention = form);
            cases.push((format!("attention {name}"), Profile::decode(capacity), options, None));
        }
    }
    let decode: [Change<'_>; 6] = [
        ("packages", &|_| {}),
        ("pairs", &|o| o.fuse_pairs = true),
        ("reduced at any depth", &|o| o.reduce_depth = None),
        ("reduced at any depth, pairs", &|o| {
            (o.reduce_depth, o.fuse_pairs) = (None, true)
        }),
        ("reduced to hidden", &|o| o.reduce_depth = Some(hidden)),
        ("matrix products", &|o| o.linear = L::FlattenActivation),
    ];
    for (name, change) in decode {
        cases.push((format!("decode {name}"), Profile::decode(1024), with(change), None));
    }
    let prefill: [Change<'_>; 7] = [
        ("packages", &|_| {}),
        ("pairs", &|o| o.fuse_pairs = true),
        ("nothing fused", &|o| o.fuse_linear = false),
        ("flattened", &|o| o.prefill_linear = Some(L::FlattenActivation)),
        ("flattened, pairs", &|o| {
            (o.prefill_linear, o.fuse_pairs) = (Some(L::FlattenActivation), true);
        }),
        ("folded", &|o| o.fold_prefill = Some(0)),
        ("single layers", &|o| o.attention = A::Decomposed),
    ];
    for (name, change) in prefill {
        for tokens in [128, 512] {
            cases.push((
                format!("prefill {name}"),
                Profile::prefill(tokens, 1024),
                with(change),
                None,
            ));
        }
    }
    // If packages fold groups.
    let long = Profile::prefill(512, 65536);
    cases.push(("attention of a long prefill".into(), long, with(&|_| {}), None));
    cases.retain(|(name, ..)| name.contains(only));
    let gpu = Mutex::new(());
    each(10, cases, |(label, profile, options, codes)| {
        let run = || -> Outcome<(f64, f64, usize)> {
            let embed = options.weight_mode != WeightMode::Bind;
            let network = lower(&quantized(&decoder, codes, embed), &profile, &options)?;
            let plans = tensorrt::build_all(&library, &network, &BuildOptions::default())?;
            let built: f64 = plans.iter().map(|plan| plan.elapsed().as_secs_f64()).sum();
            let bytes: Vec<&[u8]> = plans.iter().map(|plan| plan.bytes()).collect();
            Ok((
                measure(&library, &network, &bytes, &gpu, (300, 30))?,
                built,
                bytes.iter().map(|plan| plan.len()).sum(),
            ))
        };
        match run() {
            Ok((seconds, built, bytes)) => format!(
                "{label:<40} {profile}: {:.4} ms (built in {built:.1} s, {} MB)",
                seconds * 1e3,
                bytes >> 20
            ),
            Err(error) => format!("{label:<40} {profile}: {error}"),
        }
    });
    Ok(())
}

/// Seconds that a run takes on the GPU with this many tokens in the cache, with synthetic weights and activations: the mean of
/// `times` runs.
pub fn measure(
    library: &Library,
    network: &Network,
    plans: &[&[u8]],
    gpu: &Mutex<()>,
    (context, times): (i32, u32),
) -> Outcome<f64> {
    let runtime = Runtime::new(library)?;
    let attends_by_kernels = network
        .layers
        .iter()
        .any(|layer| matches!(layer.kind, LayerKind::DecodeAttention(_)));
    let loading = LoadOptions {
        graphs: true,
        kernels: None,
        // Each of several sequences has its own cache, as in serving.
        caches: match network.profile.batch > 1 && attends_by_kernels {
            true => Caches::Tables,
            false => Caches::Tensors,
        },
    };
    let program = Program::load(&runtime, Path::new("synthetic"), plans, network, loading)?;
    let _alone = gpu.lock().expect("no panic");
    let mut program = SyntheticProgram::new(program, network, loading.caches)?;
    for role in [Role::PositionIds, Role::WriteIndices] {
        program.set(role, context)?;
    }
    let took = program.time(&Stream::new(runtime.cuda())?, times)?;
    // Its memory is freed before the next one measures.
    drop(program);
    Ok(took.as_secs_f64())
}
