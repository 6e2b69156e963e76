//! Measurements on a GPU: what `scripts/gpu/` runs on the borrowed machine.
//!
//! ```text
//! gpu_lab bench PKG --live 300 --prefill 128,512       # decode and prefill of a package, as JSON
//! gpu_lab logits PKG --cases cases.json --output F     # logits of given token sequences, to compare with another engine
//! gpu_lab profile PKG --live 300 [--prefill 512]       # time of each of TensorRT's layers
//! gpu_lab forms                                        # ways to write a matrix product of one row
//! ```

use std::collections::BTreeMap;
use std::error::Error;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::{Arc, Mutex};
use std::time::Instant;

use clap::{Parser, Subcommand};
use lapidary::backend::tensorrt::run::{Buffer, Engine, Event, LoadOptions, Runtime, Stream};
use lapidary::backend::tensorrt::{self, BuildOptions, Library};
use lapidary::decode::cuda::{CudaDevice, CudaOptions};
use lapidary::decode::{Chunk, Device};
use lapidary::graph::Constant;
use lapidary::lower::{Options, lower};
use lapidary::network::{Builder, Elementwise, LayerKind, MatrixOp, Network, Profile, ReduceOp, TensorId, WeightMode};
use lapidary::package::Package;
use lapidary::tensor::DType;
use serde_json::{Value, json};

type Outcome<T> = Result<T, Box<dyn Error>>;

#[derive(Parser)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    Bench {
        package: PathBuf,
        #[arg(long, default_value_t = 300)]
        live: usize,
        #[arg(long, value_delimiter = ',')]
        prefill: Vec<usize>,
        #[arg(long, default_value_t = 64)]
        tokens: usize,
    },
    Logits {
        package: PathBuf,
        /// `[{"prompt": [ids], "forced": [ids]}]`
        #[arg(long)]
        cases: PathBuf,
        /// f32 rows: after the prompt, then after each forced token; all cases in order.
        #[arg(long)]
        output: PathBuf,
    },
    Profile {
        package: PathBuf,
        #[arg(long, default_value_t = 300)]
        live: usize,
        #[arg(long)]
        prefill: Option<usize>,
    },
    /// Lowerings of a Llama of made-up weights: decode at several capacities, prefill of 512.
    Sweep {
        #[arg(long)]
        large: bool,
    },
    Forms {
        /// Only forms whose name holds this.
        #[arg(long, default_value = "")]
        only: String,
    },
}

fn main() -> ExitCode {
    let done = match Arguments::parse().command {
        Command::Bench {
            package,
            live,
            prefill,
            tokens,
        } => bench(&package, live, &prefill, tokens).map(|v| println!("{v:#}")),
        Command::Logits { package, cases, output } => logits(&package, &cases, &output).map(|v| println!("{v:#}")),
        Command::Profile { package, live, prefill } => profile(&package, live, prefill).map(|v| println!("{v:#}")),
        Command::Forms { only } => forms(&only),
        Command::Sweep { large } => sweep(large),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}

fn open(package: &Path) -> Outcome<(Package, CudaDevice)> {
    let package = Package::open(package)?;
    let device = CudaDevice::open(&package, &Library::load(None)?, CudaOptions::of(&package))?;
    Ok((package, device))
}

/// Drives a device as a session does, but lets us look at it in between.
struct Driver {
    device: CudaDevice,
    capacities: Vec<usize>,
    capacity: usize,
    position: usize,
    moves: usize,
    logits: Vec<f32>,
}

impl Driver {
    fn new(package: &Package, device: CudaDevice) -> Self {
        Driver {
            device,
            capacities: package.manifest.capacities.clone(),
            capacity: 0,
            position: 0,
            moves: 0,
            logits: Vec::new(),
        }
    }

    fn feed(&mut self, mut tokens: &[u32]) -> Outcome<Vec<Chunk>> {
        let total = self.position + tokens.len();
        if total > self.capacity {
            let capacity = self
                .capacities
                .iter()
                .copied()
                .find(|c| *c >= total)
                .ok_or("too long")?;
            self.device.reserve(capacity, self.position)?;
            self.moves += usize::from(self.capacity > 0);
            self.capacity = capacity;
        }
        let mut chunks = Vec::new();
        while !tokens.is_empty() {
            let chunk = self.device.chunk(tokens.len(), self.position, self.capacity);
            let (now, later) = tokens.split_at(chunk.tokens);
            self.device.forward(chunk, now, self.position, &mut self.logits)?;
            self.position += now.len();
            tokens = later;
            chunks.push(chunk);
        }
        Ok(chunks)
    }

    fn best(&self) -> u32 {
        let best = self.logits.iter().enumerate().max_by(|a, b| a.1.total_cmp(b.1));
        best.map_or(0, |(i, _)| i as u32)
    }
}

/// Token ids that repeat nowhere soon.
fn ids(n: usize, vocabulary: usize) -> Vec<u32> {
    (0..n)
        .map(|i| ((i * 7919 + 13) % (vocabulary - 3) + 3) as u32)
        .collect()
}

fn bench(path: &Path, live: usize, prefill: &[usize], tokens: usize) -> Outcome<Value> {
    let start = Instant::now();
    let (package, mut device) = open(path)?;
    let vocabulary = package.vocabulary()?;
    device.prepare(live, live + tokens + 1)?;
    let load = start.elapsed();
    let engines = device.times().engines;
    let mut driver = Driver::new(&package, device);

    let start = Instant::now();
    driver.feed(&ids(live, vocabulary))?;
    let first = start.elapsed();
    // The graph is captured in the first steps.
    for _ in 0..5 {
        let next = driver.best();
        driver.feed(&[next])?;
    }
    let gpu = driver.device.time_again(100)?;
    let before = driver.device.times();
    let start = Instant::now();
    for i in 0..tokens {
        driver.feed(&[(i % 1000) as u32 + 3])?;
    }
    let wall = start.elapsed() / tokens as u32;
    let after = driver.device.times();
    let start = Instant::now();
    for _ in 0..10 {
        std::hint::black_box(driver.best());
    }
    let argmax = start.elapsed() / 10;
    let decode = json!({
        "live": live, "capacity": driver.capacity, "engine": driver.device.engine(),
        "gpu_ms": gpu.as_secs_f64() * 1e3,
        "wall_ms": wall.as_secs_f64() * 1e3,
        "host_us": (after.host - before.host).as_secs_f64() * 1e6 / (after.calls - before.calls) as f64,
        "outside_gpu_us": (wall.as_secs_f64() - gpu.as_secs_f64()) * 1e6,
        "argmax_us": argmax.as_secs_f64() * 1e6,
    });

    let mut prefills = Vec::new();
    for n in prefill {
        // From an empty cache in the capacity that holds the prompt: what a first token costs.
        let (package, mut device) = open(path)?;
        device.prepare(*n, *n)?;
        let mut again = Driver::new(&package, device);
        let chunks = again.feed(&ids(*n, vocabulary))?;
        for _ in 0..3 {
            again.position = 0;
            again.feed(&ids(*n, vocabulary))?;
        }
        let start = Instant::now();
        for _ in 0..10 {
            again.position = 0;
            again.feed(&ids(*n, vocabulary))?;
        }
        let wall = start.elapsed() / 10;
        let gpu = again.device.time_again(20)?;
        prefills.push(json!({
            "tokens": n, "capacity": again.capacity, "chunks": chunks.iter().map(|c| c.rows).collect::<Vec<_>>(),
            "wall_ms": wall.as_secs_f64() * 1e3, "last_chunk_gpu_ms": gpu.as_secs_f64() * 1e3,
        }));
    }

    // Every engine of the package at once, at the largest capacity.
    let memory_of_session = driver.device.memory();
    drop(driver);
    let mut everything = Value::Null;
    if let Ok((package, mut device)) = open(path) {
        let largest = *package.manifest.capacities.last().ok_or("no capacity")?;
        let all: Result<(), Box<dyn Error>> = (|| {
            for capacity in package.manifest.capacities.clone() {
                device.prepare(capacity, capacity)?;
            }
            device.reserve(largest, 0)?;
            Ok(())
        })();
        everything = match all {
            Ok(()) => json!({"memory": device.memory(), "engines_s": device.times().engines.as_secs_f64()}),
            Err(error) => json!({"error": error.to_string()}),
        };
    }
    Ok(json!({
        "package": path, "load_s": load.as_secs_f64(), "engines_s": engines.as_secs_f64(),
        "first_feed_ms": first.as_secs_f64() * 1e3,
        "decode": decode, "prefill": prefills, "memory": memory_of_session, "all_engines": everything,
    }))
}

#[derive(serde::Deserialize)]
struct Case {
    prompt: Vec<u32>,
    #[serde(default)]
    forced: Vec<u32>,
    /// Greedy tokens to draw instead, without logits of their own.
    #[serde(default)]
    greedy: usize,
}

fn logits(path: &Path, cases: &Path, output: &Path) -> Outcome<Value> {
    use std::io::Write;
    let cases: Vec<Case> = serde_json::from_str(&std::fs::read_to_string(cases)?)?;
    let mut file = std::io::BufWriter::new(std::fs::File::create(output)?);
    let (package, device) = open(path)?;
    let mut driver = Driver::new(&package, device);
    let mut told = Vec::new();
    for case in cases {
        // A new sequence starts in the smallest capacity again.
        driver.capacity = 0;
        driver.position = 0;
        driver.moves = 0;
        let mut write = |driver: &Driver| file.write_all(bytemuck::cast_slice(&driver.logits));
        let chunks = driver.feed(&case.prompt)?;
        write(&driver)?;
        let mut best = vec![driver.best()];
        for token in &case.forced {
            driver.feed(&[*token])?;
            write(&driver)?;
            best.push(driver.best());
        }
        for _ in 1..case.greedy {
            let next = driver.best();
            driver.feed(&[next])?;
            best.push(driver.best());
        }
        told.push(json!({
            "prompt": case.prompt.len(), "forced": case.forced.len(), "best": best, "moves": driver.moves,
            "capacity": driver.capacity, "chunks": chunks.iter().map(|c| c.rows).collect::<Vec<_>>(),
        }));
    }
    file.flush()?;
    Ok(json!({"cases": told}))
}

/// Sums layer times over runs.
struct Layers(Arc<Mutex<BTreeMap<String, f64>>>);

impl trtx_report::ReportLayerTime for Layers {
    fn report_layer_time(&self, name: &str, ms: f32) {
        *self.0.lock().expect("no panic").entry(name.to_string()).or_default() += f64::from(ms);
    }
}

use lapidary::backend::tensorrt::run::layer_times as trtx_report;

fn profile(path: &Path, live: usize, prefill: Option<usize>) -> Outcome<Value> {
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
    let mut bound = Bound::new(&runtime, &mut engine, &network)?;
    bound.write_i32(&mut engine, "position_ids", live as i32 - 1)?;
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

/// Memory for every port of an engine, filled with small numbers.
struct Bound {
    buffers: BTreeMap<String, Buffer>,
    _scratch: Buffer,
}

impl Bound {
    fn new(runtime: &std::rc::Rc<Runtime>, engine: &mut Engine, network: &Network) -> Outcome<Self> {
        let cuda = runtime.cuda();
        let stream = Stream::new(cuda)?;
        let mut buffers: BTreeMap<String, Buffer> = BTreeMap::new();
        let aliases: BTreeMap<String, String> = network
            .aliases()
            .map(|(from, to)| (network.tensor(to).name.clone(), network.tensor(from).name.clone()))
            .collect();
        let mut ports = engine.ports().to_vec();
        ports.sort_by_key(|port| !port.is_input);
        for port in ports {
            if let Some(cache) = aliases.get(&port.name) {
                // SAFETY: the cache's own memory, held by this struct.
                unsafe { engine.bind([(port.name.as_str(), buffers[cache].address())])? };
                continue;
            }
            let buffer = Buffer::new(cuda, port.bytes(1), &port.name)?;
            fill(&stream, &buffer, port.dtype)?;
            // SAFETY: of the port's size, held by this struct.
            unsafe { engine.bind([(port.name.as_str(), buffer.address())])? };
            buffers.insert(port.name.clone(), buffer);
        }
        let scratch = Buffer::new(cuda, engine.scratch_bytes(), "working memory")?;
        // SAFETY: held by this struct.
        unsafe { engine.set_scratch(&scratch) };
        Ok(Bound {
            buffers,
            _scratch: scratch,
        })
    }

    fn write_i32(&mut self, _engine: &mut Engine, name: &str, value: i32) -> Outcome<()> {
        if let Some(buffer) = self.buffers.get(name) {
            buffer.write(0, bytemuck::cast_slice(&vec![value; buffer.bytes() / 4]))?;
        }
        Ok(())
    }
}

/// Random numbers about 0.03 in size, so that long chains neither vanish nor overflow, again and again; zeros for integers.
fn fill(stream: &Stream, buffer: &Buffer, dtype: DType) -> Outcome<()> {
    const BLOCK: usize = 128 << 10;
    if !dtype.is_float() {
        buffer.clear(stream)?;
        return Ok(stream.wait()?);
    }
    let mut state = 0x9e37_79b9_u32;
    let values: Vec<f64> = (0..BLOCK.min(buffer.bytes()) / dtype.size())
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 17;
            state ^= state << 5;
            (f64::from(state) / f64::from(u32::MAX) - 0.5) * 0.06
        })
        .collect();
    let block = lapidary::tensor::Tensor::from_f64_as(dtype, vec![values.len()], &values);
    buffer.write(0, block.data())?;
    // Twice as much with every copy on the device.
    let mut done = block.data().len();
    while done < buffer.bytes() {
        let now = done.min(buffer.bytes() - done);
        let (from, to) = (buffer.address(), buffer.address() + done as u64);
        let rows = now / BLOCK;
        stream.copy_rows((from, BLOCK), (to, BLOCK), BLOCK, rows)?;
        let rest = now % BLOCK;
        let behind = (rows * BLOCK) as u64;
        stream.copy_rows((from + behind, BLOCK), (to + behind, BLOCK), rest, 1)?;
        done += now;
    }
    Ok(stream.wait()?)
}

/// How one row is multiplied by a weight `[n, k]`.
#[derive(Clone, Copy, Debug)]
enum Form {
    /// `[1, k] · [n, k]ᵀ`
    Flat,
    /// `[1, 1, k] · [1, n, k]ᵀ`
    Raised,
    /// `[n, k] · [1, k]ᵀ`
    Swapped,
    /// `sum(w * x)` in fp32
    Reduced,
    /// `[g, n/g, k]`, each part a product of its own
    Parts(i64),
    /// The row repeated, one row of the result kept
    Repeated(i64),
    /// `[g, n/g, k] · [g, k, 1]`
    SwappedParts(i64),
}

/// One product; the result is `[1, n]`.
fn product(b: &mut Builder, name: &str, form: Form, x: TensorId, w: TensorId, [n, k]: [i64; 2]) -> Outcome<TensorId> {
    let part = |part: &str| format!("{name}/{part}");
    let dims = |d: &[i64]| d.iter().map(|d| (*d as usize).into()).collect::<Vec<_>>();
    let mm = |op_a, op_b| LayerKind::MatrixMultiply { op_a, op_b };
    let (no, yes) = (MatrixOp::None, MatrixOp::Transpose);
    Ok(match form {
        Form::Flat => b.add(name, mm(no, yes), &[x, w])?,
        Form::Raised => {
            let x = b.reshape(&part("x"), x, dims(&[1, 1, k]))?;
            let w = b.reshape(&part("w"), w, dims(&[1, n, k]))?;
            let y = b.add(name, mm(no, yes), &[x, w])?;
            b.reshape(&part("y"), y, dims(&[1, n]))?
        }
        Form::Swapped => {
            let y = b.add(name, mm(no, yes), &[w, x])?;
            b.reshape(&part("y"), y, dims(&[1, n]))?
        }
        Form::Reduced => {
            let to = b.dtype(x);
            let x = b.cast(&part("x32"), DType::F32, x)?;
            let w = b.cast(&part("w32"), DType::F32, w)?;
            let y = b.elementwise(&part("terms"), Elementwise::Prod, w, x)?;
            let kind = LayerKind::Reduce {
                op: ReduceOp::Sum,
                axes: vec![1],
                keep_dims: true,
            };
            let y = b.add(name, kind, &[y])?;
            let y = b.cast(&part("narrow"), to, y)?;
            b.reshape(&part("y"), y, dims(&[1, n]))?
        }
        Form::Parts(g) => {
            let x = b.reshape(&part("x"), x, dims(&[1, 1, k]))?;
            let w = b.reshape(&part("w"), w, dims(&[g, n / g, k]))?;
            let y = b.add(name, mm(no, yes), &[x, w])?;
            b.reshape(&part("y"), y, dims(&[1, n]))?
        }
        Form::SwappedParts(g) => {
            let x = b.reshape(&part("x"), x, dims(&[1, 1, k]))?;
            let w = b.reshape(&part("w"), w, dims(&[g, n / g, k]))?;
            let y = b.add(name, mm(no, yes), &[w, x])?;
            b.reshape(&part("y"), y, dims(&[1, n]))?
        }
        Form::Repeated(rows) => {
            let slice = |rows: i64, width: i64, stride: i64| LayerKind::Slice {
                start: vec![0, 0],
                size: vec![(rows as usize).into(), (width as usize).into()],
                stride: vec![stride, 1],
            };
            let x = b.add(&part("x"), slice(rows, k, 0), &[x])?;
            let y = b.add(name, mm(no, yes), &[x, w])?;
            b.add(&part("y"), slice(1, n, 1), &[y])?
        }
    })
}

/// Products `[k -> n]` and `[m -> k]` by turns, `m <= n` taken from the front of the wider result.
fn chain(form: Form, dtype: DType, [k, n, m]: [i64; 3], pairs: usize) -> Outcome<(Network, f64)> {
    let mut b = Builder::new("chain", Profile::decode(16));
    let dims = |d: &[i64]| d.iter().map(|d| (*d as usize).into()).collect::<Vec<_>>();
    let mut x = b.input("x", dtype, &dims(&[1, k]))?;
    let mut bytes = 0.0;
    for i in 0..pairs {
        for (which, [to, from]) in [("up", [n, k]), ("down", [k, m])] {
            let name = format!("{which}.{i}");
            let constant = Constant::absent(dtype, vec![to as usize, from as usize]);
            let w = b.weight(&format!("{name}.weight"), constant, WeightMode::Bind)?;
            let mut y = product(&mut b, &name, form, x, w, [to, from])?;
            bytes += (to * from) as f64 * dtype.size() as f64;
            if which == "up" && m < n {
                let kind = LayerKind::Slice {
                    start: vec![0, 0],
                    size: dims(&[1, m]),
                    stride: vec![1, 1],
                };
                y = b.add(&format!("{name}/front"), kind, &[y])?;
            }
            x = y;
        }
    }
    b.output("y", x)?;
    Ok((b.finish()?, bytes))
}

fn forms(only: &str) -> Outcome<()> {
    let library = Library::load(None)?;
    let mut cases = Vec::new();
    for (label, [k, n, m]) in [
        ("2048x5632", [2048, 5632, 5632]),
        ("2048x11264 gate+up", [2048, 11264, 5632]),
        ("2048x2560 qkv", [2048, 2560, 2048]),
        ("4096x14336", [4096, 14336, 14336]),
        ("4096x28672 gate+up", [4096, 28672, 14336]),
        ("4096x6144 qkv", [4096, 6144, 4096]),
    ] {
        for form in [
            Form::Flat,
            Form::Raised,
            Form::Swapped,
            Form::Reduced,
            Form::Parts(8),
            Form::SwappedParts(8),
            Form::Repeated(8),
        ] {
            cases.push((label, [k, n, m], form, DType::F16));
        }
        cases.push((label, [k, n, m], Form::Flat, DType::Bf16));
    }
    cases.retain(|(label, _, form, dtype)| format!("{label} {form:?} {dtype}").contains(only));
    let cases = Mutex::new(cases.into_iter());
    // Loading is compiling, which several threads can do; only one measures at a time.
    let gpu = Mutex::new(());
    let results = Mutex::new(Vec::new());
    std::thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| {
                loop {
                    let Some((label, [k, n, m], form, dtype)) = cases.lock().expect("no panic").next() else {
                        return;
                    };
                    let measured = measure_chain(&library, form, dtype, [k, n, m], &gpu);
                    let told = match measured {
                        Ok((us, rate)) => format!("{label:<22} {form:?} {dtype}: {us:.1} us a product, {rate:.2} TB/s"),
                        Err(error) => format!("{label:<22} {form:?} {dtype}: {error}"),
                    };
                    eprintln!("{told}");
                    results.lock().expect("no panic").push(told);
                }
            });
        }
    });
    let mut results = results.into_inner().expect("no panic");
    results.sort();
    println!("{}", results.join("\n"));
    Ok(())
}

/// Two threads compile while one measures.
fn sweep(large: bool) -> Outcome<()> {
    use lapidary::lower::synthetic::Decoder;
    use lapidary::lower::{AttentionForm as A, LinearForm as L};
    let library = Library::load(None)?;
    let mut decoder = if large {
        Decoder::llama_8b()
    } else {
        Decoder::llama_1b()
    };
    decoder.positions = 8192;
    let hidden = decoder.hidden;
    let options = |linear, reduce_depth, attention| Options {
        linear,
        reduce_depth,
        fuse_linear: true,
        attention,
        ..Options::default()
    };
    let mut cases = Vec::new();
    // Of the large model's decode engines only a few: each takes 16 GB while it is measured.
    let capacities: &[usize] = if large { &[1024] } else { &[512, 1024, 4096] };
    for (label, linear, depth, attention) in [
        ("matmul", L::FlattenActivation, None, A::Layer),
        ("matmul", L::FlattenActivation, None, A::ByCapacity),
        ("reduce", L::ReduceRow, None, A::Layer),
        ("reduce", L::ReduceRow, None, A::ByCapacity),
        ("reduce", L::ReduceRow, None, A::Split(8)),
        ("reduce narrow", L::ReduceRow, Some(hidden), A::ByCapacity),
    ] {
        for capacity in capacities {
            let label = format!("{label}, {attention:?}");
            cases.push((label, Profile::decode(*capacity), options(linear, depth, attention)));
        }
    }
    for fuse in [true, false] {
        let mut options = options(L::ReduceRow, None, A::ByCapacity);
        options.fuse_linear = fuse;
        for tokens in [128, 512] {
            cases.push((
                format!("prefill fused {fuse}"),
                Profile::prefill(tokens, 1024),
                options.clone(),
            ));
        }
    }
    let cases = Mutex::new(cases.into_iter());
    let gpu = Mutex::new(());
    let results = Mutex::new(Vec::new());
    std::thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| {
                loop {
                    let Some((label, profile, options)) = cases.lock().expect("no panic").next() else {
                        return;
                    };
                    let run = || -> Outcome<f64> {
                        let network = lower(&decoder.graph(), &profile, &options)?;
                        let plan = tensorrt::build(&library, &network, &BuildOptions::default())?;
                        measure(&library, &network, plan.bytes(), &gpu, 20)
                    };
                    let told = match run() {
                        Ok(seconds) => format!("{profile} {label}: {:.3} ms", seconds * 1e3),
                        Err(error) => format!("{profile} {label}: {error}"),
                    };
                    eprintln!("{told}");
                    results.lock().expect("no panic").push(told);
                }
            });
        }
    });
    let mut results = results.into_inner().expect("no panic");
    results.sort();
    println!("{}", results.join("\n"));
    Ok(())
}

/// Seconds a run takes on the GPU, weights and activations made up.
fn measure(library: &Library, network: &Network, plan: &[u8], gpu: &Mutex<()>, times: u32) -> Outcome<f64> {
    let runtime = Runtime::new(library)?;
    let loading = LoadOptions {
        graphs: true,
        kernels: None,
    };
    let mut engine = Engine::load(&runtime, Path::new("made up"), plan, network, loading)?;
    let _alone = gpu.lock().expect("no panic");
    let mut bound = Bound::new(&runtime, &mut engine, network)?;
    bound.write_i32(&mut engine, "position_ids", 300)?;
    let stream = Stream::new(runtime.cuda())?;
    for _ in 0..5 {
        engine.enqueue(&stream)?;
    }
    stream.wait()?;
    let (start, end) = (Event::new(runtime.cuda())?, Event::new(runtime.cuda())?);
    start.record(&stream)?;
    for _ in 0..times {
        engine.enqueue(&stream)?;
    }
    end.record(&stream)?;
    end.wait()?;
    let seconds = end.since(&start)?.as_secs_f64() / f64::from(times);
    drop(engine);
    Ok(seconds)
}

fn measure_chain(
    library: &Library,
    form: Form,
    dtype: DType,
    size: [i64; 3],
    gpu: &Mutex<()>,
) -> Result<(f64, f64), String> {
    let run = || -> Outcome<(f64, f64)> {
        let pairs = if size[0] > 2048 { 3 } else { 8 };
        let (network, bytes) = chain(form, dtype, size, pairs)?;
        let plan = tensorrt::build(library, &network, &BuildOptions::default())?;
        let seconds = measure(library, &network, plan.bytes(), gpu, 30)?;
        Ok((seconds * 1e6 / (2 * pairs) as f64, bytes / seconds / 1e12))
    };
    run().map_err(|error| error.to_string())
}
