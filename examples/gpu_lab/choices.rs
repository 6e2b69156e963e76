//! Single choices of the lowering on layers of real dims with made-up weights.

use std::path::Path;
use std::sync::Mutex;

use lapidary::backend::tensorrt::run::timing::SyntheticEngine;
use lapidary::backend::tensorrt::run::{Engine, LoadOptions, Runtime, Stream};
use lapidary::backend::tensorrt::{self, BuildOptions, Library};
use lapidary::interface::Role;
use lapidary::lower::synthetic::Decoder;
use lapidary::lower::{LowerOptions, lower};
use lapidary::network::{Network, Profile};

use crate::Outcome;

/// The dims that are measured, with room for every capacity that is.
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

/// Tells of each case, several at a time, and prints it as it comes: a run that is cut off leaves what it had. Building and
/// loading are the processor's work, so only one at a time should measure.
pub fn each<T: Send>(threads: usize, cases: Vec<T>, tell: impl Fn(T) -> String + Sync) {
    let cases = Mutex::new(cases.into_iter());
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                loop {
                    let next = cases.lock().expect("no panic").next();
                    let Some(case) = next else { return };
                    println!("{}", tell(case));
                }
            });
        }
    });
}

type Change<'a> = (&'a str, &'a dyn Fn(&mut LowerOptions));

/// One choice at a time against what packages get.
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
    let mut cases: Vec<(String, Profile, LowerOptions)> = Vec::new();
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
            cases.push((format!("attention {name}"), Profile::decode(capacity), options));
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
        cases.push((format!("decode {name}"), Profile::decode(1024), with(change)));
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
            cases.push((format!("prefill {name}"), Profile::prefill(tokens, 1024), with(change)));
        }
    }
    // Where groups are folded in packages.
    let long = Profile::prefill(512, 65536);
    cases.push(("attention of a long prefill".into(), long, with(&|_| {})));
    cases.retain(|(name, ..)| name.contains(only));
    let gpu = Mutex::new(());
    each(10, cases, |(label, profile, options)| {
        let run = || -> Outcome<(f64, f64)> {
            let network = lower(&decoder.graph(), &profile, &options)?;
            let plan = tensorrt::build(&library, &network, &BuildOptions::default())?;
            let built = plan.elapsed().as_secs_f64();
            Ok((measure(&library, &network, plan.bytes(), &gpu, 30)?, built))
        };
        match run() {
            Ok((seconds, built)) => format!("{label:<40} {profile}: {:.4} ms (built in {built:.1} s)", seconds * 1e3),
            Err(error) => format!("{label:<40} {profile}: {error}"),
        }
    });
    Ok(())
}

/// Seconds that a run takes on the GPU, with synthetic weights and activations.
pub fn measure(library: &Library, network: &Network, plan: &[u8], gpu: &Mutex<()>, times: u32) -> Outcome<f64> {
    let runtime = Runtime::new(library)?;
    let loading = LoadOptions {
        graphs: true,
        kernels: None,
    };
    let engine = Engine::load(&runtime, Path::new("synthetic"), plan, network, loading)?;
    let _alone = gpu.lock().expect("no panic");
    let mut engine = SyntheticEngine::new(engine, network)?;
    engine.set(Role::PositionIds, 300)?;
    let took = engine.time(&Stream::new(runtime.cuda())?, times)?;
    // The engine's memory goes back before the next one measures.
    drop(engine);
    Ok(took.as_secs_f64())
}
