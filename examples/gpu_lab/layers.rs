//! Where the time of one engine goes, by TensorRT's own layers.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::{Arc, Mutex};

use lapidary::backend::tensorrt::Library;
use lapidary::backend::tensorrt::run::layer_times::ReportLayerTime;
use lapidary::backend::tensorrt::run::trial::MadeUp;
use lapidary::backend::tensorrt::run::{Engine, LoadOptions, Runtime, Stream};
use lapidary::lower::{Options, lower};
use lapidary::network::Profile;
use lapidary::package::Package;
use serde_json::{Value, json};

use crate::Outcome;

/// Sums layer times over runs.
struct Layers(Arc<Mutex<BTreeMap<String, f64>>>);

impl ReportLayerTime for Layers {
    fn report_layer_time(&self, name: &str, ms: f32) {
        *self.0.lock().expect("no panic").entry(name.to_string()).or_default() += f64::from(ms);
    }
}

pub fn profile(path: &Path, live: usize, prefill: Option<usize>) -> Outcome<Value> {
    let package = Package::open(path)?;
    let library = Library::load(None)?;
    let runtime = Runtime::new(&library)?;
    let rows = prefill.unwrap_or(1);
    let fits = |e: &&lapidary::package::manifest::Engine| {
        e.profile.capacity >= live.max(rows) && e.profile == Profile::prefill(rows, e.profile.capacity)
    };
    let facts = package
        .manifest
        .engines
        .iter()
        .filter(fits)
        .min_by_key(|e| e.profile.capacity);
    let facts = facts.ok_or("no engine of that shape")?;
    let options = Options {
        weight_mode: facts.weight_mode,
        ..facts.lowering.clone()
    };
    let network = lower(&package.graph()?, &facts.profile, &options)?;
    let plan = std::fs::read(path.join(&facts.file))?;
    let loading = LoadOptions {
        graphs: false,
        kernels: None,
    };
    let mut engine = Engine::load(&runtime, Path::new(&facts.file), &plan, &network, loading)?;
    let layers = Arc::new(Mutex::new(BTreeMap::new()));
    engine.profile(Box::new(Layers(layers.clone())))?;
    let bound = MadeUp::bind(&runtime, &mut engine, &network)?;
    bound.set("position_ids", live as i32 - 1)?;
    let stream = Stream::new(runtime.cuda())?;
    for _ in 0..3 {
        engine.enqueue(&stream)?;
        stream.wait()?;
    }
    layers.lock().expect("no panic").clear();
    let runs = 10;
    for _ in 0..runs {
        engine.enqueue(&stream)?;
        stream.wait()?;
    }
    let layers = layers.lock().expect("no panic");
    let mut sorted: Vec<(String, f64)> = layers.iter().map(|(n, ms)| (n.clone(), ms / f64::from(runs))).collect();
    sorted.sort_by(|a, b| b.1.total_cmp(&a.1));
    let total: f64 = sorted.iter().map(|(_, ms)| ms).sum();
    Ok(
        json!({"engine": facts.profile.to_string(), "total_ms": total, "layers": sorted, "information": engine.inspect().ok()}),
    )
}
