//! The engines of a package, for a conversion and a refit: the list, and building them in parallel, with a cache of
//! plans.

use std::borrow::Cow;
use std::collections::HashSet;
use std::ops::ControlFlow;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use super::{ConvertError, Progress};
use crate::backend::tensorrt::{self, BuildOptions, BuildProgress, FLAVOUR, Flavour, Library, LibraryError};
use crate::graph::Graph;
use crate::lower;
use crate::network::segments::Steps;
use crate::network::{Logits, Profile, Tokens, WeightMode};
use crate::package::manifest::EngineEntry;
use crate::package::{Package, PackageError, PlanCache, Writer};
use crate::spec::Conversion;
use crate::target::Target;
use crate::units::bytes;

/// The library that builds the engines of these targets, if any needs engines.
pub fn library(targets: &[Target], explicit: Option<&Path>) -> Result<Option<Library>, LibraryError> {
    let mut flavours = targets.iter().filter_map(|target| Flavour::of(*target)).peekable();
    if flavours.peek().is_none() {
        return Ok(None);
    }
    for flavour in flavours {
        flavour.check()?;
    }
    Ok(Some(Library::load(explicit)?))
}

/// The context for building engines.
pub struct EngineOptions<'a> {
    /// The path of the export or package, for errors.
    pub model: &'a Path,
    /// The plan cache.
    pub cache: Option<PlanCache>,
    /// Receives progress.
    pub progress: Arc<dyn Progress>,
}

/// A plan, built or from the cache.
enum Built {
    New(tensorrt::Plan),
    Kept(Vec<u8>),
}

impl Built {
    fn bytes(&self) -> &[u8] {
        match self {
            Built::New(plan) => plan.bytes(),
            Built::Kept(plan) => plan,
        }
    }

    /// Build time; `None` if it came from the cache.
    fn elapsed(&self) -> Option<Duration> {
        match self {
            Built::New(plan) => Some(plan.elapsed()),
            Built::Kept(_) => None,
        }
    }
}

/// The result for one profile.
struct BuiltProfile {
    /// One plan, or if the network has Lapidary's own layers one per distinct segment between them.
    plans: Vec<Built>,
    in_steps: bool,
    /// The names of its weights.
    weights: HashSet<String>,
}

/// Builds an engine for decoding and for each prefill shape at every capacity, and adds them to the package.
pub fn build(
    writer: &mut Writer,
    library: &Library,
    options: &EngineOptions<'_>,
    conversion: &Conversion,
    capacities: &[usize],
) -> Result<(), ConvertError> {
    let package = writer.package();
    let graph = graph(&package, conversion)?;
    let profiles = profiles(conversion, capacities);
    let fractions = Arc::new(Mutex::new(vec![0f32; profiles.len()]));
    let EngineOptions { model, cache, progress } = options;
    let manifest = &package.manifest;
    let constants = manifest.constants.as_ref().map_or("", |c| c.set_hash.as_str());
    let set_hash = manifest.weights.set_hash.clone();
    let weights = format!("{set_hash} {constants}");
    let stopped = progress.stop_signal();
    let one = |i: usize| -> Result<BuiltProfile, ConvertError> {
        let network = lower::lower(&graph, &profiles[i], &conversion.lowering_of(&profiles[i])).map_err(|source| {
            ConvertError::Lower {
                path: model.to_path_buf(),
                source,
            }
        })?;
        let taken = network.weights.iter().flat_map(|w| lower::parts(&w.name));
        let weights_taken = taken.map(str::to_string).collect();
        let in_steps = network.has_kernel_layers();
        let steps = in_steps.then(|| Steps::of(&network));
        let parts = steps.as_ref().map_or_else(|| vec![&network], Steps::plans);
        let mut plans = Vec::with_capacity(parts.len());
        for (part, network) in parts.iter().enumerate() {
            let mut options = BuildOptions {
                refit: conversion.refit,
                decode_profile: served_by(&profiles[i], conversion.one_engine).len() > 1,
                observer: None,
            };
            let key = cache
                .as_ref()
                .map(|_| PlanCache::key(network, &options, &library.fits(), &weights));
            if let (Some(cache), Some(key)) = (cache, &key)
                && let Some(plan) = cache.get(key)
            {
                plans.push(Built::Kept(plan));
                continue;
            }
            let (heard, fractions, stopped) = (progress.clone(), fractions.clone(), stopped.clone());
            let profile = profiles[i].to_string();
            let all = parts.len() as f32;
            let observer = move |p: BuildProgress<'_>| {
                if stopped() {
                    return ControlFlow::Break(());
                }
                let mut fractions = fractions.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
                fractions[i] = (part as f32 + p.fraction) / all;
                let done = fractions.iter().filter(|fraction| **fraction >= 1.0).count();
                let label = format!("building engine {profile} ({done} of {} done)", fractions.len());
                heard.share(&label, fractions.iter().sum::<f32>() / fractions.len() as f32);
                ControlFlow::Continue(())
            };
            options.observer = Some(Arc::new(observer));
            let plan = tensorrt::build(library, network, &options).map_err(|e| match e {
                tensorrt::EngineBuildError::Cancelled { .. } => ConvertError::Stopped,
                source => ConvertError::Engine {
                    path: model.to_path_buf(),
                    source,
                },
            })?;
            if let (Some(cache), Some(key)) = (cache, &key) {
                // A plan that cannot be stored is built again next time.
                if let Err(error) = cache.put(key, plan.bytes()) {
                    progress.note(&format!("{}: the plan was not kept: {error}", profiles[i]));
                }
            }
            plans.push(Built::New(plan));
        }
        Ok(BuiltProfile {
            plans,
            in_steps,
            weights: weights_taken,
        })
    };
    progress.step("engines");
    let indices: Vec<usize> = (0..profiles.len()).collect();
    for batch in indices.chunks(at_once(conversion.weights)) {
        if stopped() {
            return Err(ConvertError::Stopped);
        }
        let built: Vec<_> = std::thread::scope(|scope| {
            let threads: Vec<_> = batch.iter().map(|i| scope.spawn(|| one(*i))).collect();
            let joined = threads.into_iter().map(|thread| thread.join());
            joined
                .map(|done| done.unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
                .collect()
        });
        for (i, built) in batch.iter().zip(built) {
            let built = built?;
            let profile = profiles[*i];
            let file: Cow<'_, [u8]> = match &built.plans[..] {
                [only] => only.bytes().into(),
                several => several.iter().map(Built::bytes).collect::<Vec<_>>().concat().into(),
            };
            let new: Vec<Duration> = built.plans.iter().filter_map(Built::elapsed).collect();
            let elapsed: Duration = new.iter().sum();
            let sizes = || built.plans.iter().map(|plan| plan.bytes().len() as u64).collect();
            for (i, serves) in served_by(&profile, conversion.one_engine).into_iter().enumerate() {
                let mut engine = EngineEntry {
                    file: String::new(),
                    bytes: 0,
                    blake3: String::new(),
                    plans: built.in_steps.then(sizes),
                    target: FLAVOUR.target,
                    profile: serves,
                    built_as: (serves != profile).then_some(profile),
                    optimization_profile: i,
                    weight_mode: conversion.weights,
                    refit: conversion.refit,
                    lowering: conversion.lowering_of(&profile),
                    built_with: None,
                    tensorrt_version: library.version().to_string(),
                    build_ms: elapsed.as_millis() as u64,
                };
                engine.built_with = engine.takes_only_its_own_weights().then(|| set_hash.clone());
                writer.engine(engine, &file, &built.weights)?;
            }
            let how = match new.is_empty() && !built.plans.is_empty() {
                false => format!("in {:.1} s", elapsed.as_secs_f64()),
                true => "kept from before".to_string(),
            };
            progress.note(&format!("{profile}: {} {how}", bytes(file.len() as u64)));
        }
    }
    match stopped() {
        true => Err(ConvertError::Stopped),
        false => Ok(()),
    }
}

/// The graph from which engines are lowered, without the weights' bytes if they are bound at load and only their shapes
/// matter.
pub(super) fn graph(package: &Package, conversion: &Conversion) -> Result<Graph, PackageError> {
    match package.manifest.weights.stripped && conversion.weights == WeightMode::Bind {
        true => package.architecture(),
        false => package.graph(),
    }
}

/// Number of engines built at once: a build keeps one core busy, and loading keeps another busy.
pub(super) fn at_once(weights: WeightMode) -> usize {
    let cores = std::thread::available_parallelism().map_or(1, |n| n.get());
    match weights {
        WeightMode::Bind => (cores / 2).clamp(1, 6),
        // With embedded weights a build takes twice their size of memory.
        WeightMode::Embed | WeightMode::Strip => 1,
    }
}

/// Refuses a graph whose engines for several sequences would not compute each sequence independently.
pub(super) fn check_batch(graph: &Graph, conversion: &Conversion, model: &Path) -> Result<(), ConvertError> {
    let Some(batch) = conversion.batch.first().copied() else {
        return Ok(());
    };
    let path = || model.to_path_buf();
    if graph.embedding_width().is_some() {
        return Err(ConvertError::BatchOfEmbeddings { path: path() });
    }
    let profile = Profile {
        batch,
        ..Profile::decode(1)
    };
    let network = lower::lower(graph, &profile, &conversion.lowering_of(&profile));
    let network = network.map_err(|source| ConvertError::Lower { path: path(), source })?;
    match network.layer_across_sequences() {
        None => Ok(()),
        Some(layer) => Err(ConvertError::Batch {
            path: path(),
            layer: layer.name.clone(),
            kind: layer.kind.name(),
        }),
    }
}

/// Differences of this graph's engines from its package: one line per format of codes that they store as floats.
pub(super) fn warnings(graph: &Graph, conversion: &Conversion) -> Vec<String> {
    let lowering = conversion.lowering_of(&Profile::decode(1));
    let formats = lower::widened_formats(graph, &lowering).into_iter();
    let lines = formats.map(|(format, count)| {
        format!(
            "engines hold {count} weights as floats, {format} in the package: TensorRT has no layers for such codes"
        )
    });
    lines.collect()
}

/// The list of engines: decode at every capacity, and prefill wherever a chunk fits; or one engine for both where a
/// chunk fits. For steps of several sequences one engine per number, whatever the capacities of their caches.
pub(super) fn profiles(conversion: &Conversion, capacities: &[usize]) -> Vec<Profile> {
    let mut profiles = Vec::new();
    for capacity in capacities {
        let mut chunks = Vec::new();
        for tokens in conversion.prefill.tokens() {
            let tokens = match tokens {
                Tokens::Static(n) if n > *capacity || n == 1 => continue,
                Tokens::Static(n) => Tokens::Static(n),
                Tokens::Dynamic { min, .. } if min > *capacity => continue,
                Tokens::Dynamic { min, opt, max } => Tokens::Dynamic {
                    min,
                    opt: opt.min(*capacity),
                    max: max.min(*capacity),
                },
            };
            chunks.push(Profile {
                batch: 1,
                tokens,
                capacity: *capacity,
                logits: Logits::Rows,
            });
        }
        if !conversion.one_engine || chunks.is_empty() {
            profiles.push(Profile::decode(*capacity));
        }
        profiles.extend(chunks);
    }
    let largest = capacities.iter().max().copied().unwrap_or(1);
    profiles.extend(conversion.batch.iter().map(|batch| Profile {
        batch: *batch,
        ..Profile::decode(largest)
    }));
    profiles
}

/// The profiles that an engine runs, in the order of its optimization profiles.
fn served_by(built: &Profile, one_engine: bool) -> Vec<Profile> {
    match built.tokens {
        Tokens::Dynamic { .. } if one_engine => vec![Profile::decode(built.capacity), *built],
        _ => vec![*built],
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::spec::Spec;

    fn conversion(text: &str) -> Conversion {
        Spec::parse(text).unwrap().resolve().unwrap()
    }

    #[test]
    fn an_engine_for_decoding_and_for_each_chunk_that_fits() {
        let names = |text: &str| -> Vec<String> {
            let c = conversion(text);
            profiles(&c, &c.capacities).iter().map(Profile::to_string).collect()
        };
        assert_eq!(
            names("{capacity: [256, 1024], prefill: [128, 512]}"),
            [
                "b1-t1-c256",
                "b1-t128-c256",
                "b1-t1-c1024",
                "b1-t128-c1024",
                "b1-t512-c1024"
            ]
        );
        assert_eq!(
            names("{capacity: [256], prefill: {min: 1, opt: 128, max: 512}}"),
            ["b1-t1-c256", "b1-t1_128_256-c256"]
        );
        assert_eq!(
            names("{capacity: [256], prefill: {min: 1, opt: 128, max: 512}, one_engine: true}"),
            ["b1-t1_128_256-c256"]
        );
        assert_eq!(
            names("{capacity: [16, 256], prefill: [128], batch: [8, 2]}"),
            ["b1-t1-c16", "b1-t1-c256", "b1-t128-c256", "b2-t1-c256", "b8-t1-c256"]
        );
        // If no chunk fits, decode still needs an engine.
        assert_eq!(
            names("{capacity: [16, 32], prefill: {min: 24, opt: 24, max: 24}, one_engine: true}"),
            ["b1-t1-c16", "b1-t24_24_24-c32"]
        );
    }
}
