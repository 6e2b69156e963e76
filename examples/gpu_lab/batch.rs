//! Several sequences in one batch: engines of a batched profile, built here from a package's graph and run with its
//! weights.
//!
//! Sessions run one sequence; this shows that the layers below do not depend on it.

use std::collections::HashMap;
use std::path::Path;
use std::rc::Rc;

use lapidary::backend::tensorrt::run::{Buffer, Caches, LoadOptions, Program, Runtime, Stream};
use lapidary::backend::tensorrt::{self, BuildOptions, Library};
use lapidary::graph::Graph;
use lapidary::interface::Role;
use lapidary::lower::{LowerOptions, lower};
use lapidary::network::{Logits, Profile, Tokens};
use lapidary::package::Package;
use serde_json::{Value, json};

use crate::Outcome;
use crate::drive::Case;

/// The small inputs of a call.
const INPUTS: [Role; 4] = [Role::TokenIds, Role::PositionIds, Role::WriteIndices, Role::LogitRows];

/// One engine with its inputs; weights and caches are shared by name.
struct Part {
    engine: Program,
    tokens: usize,
    inputs: HashMap<Role, Buffer>,
    _scratch: Buffer,
}

/// Without Lapidary's own layers: a part is one engine here.
fn of_tensorrt() -> LowerOptions {
    LowerOptions {
        kernels: false,
        ..LowerOptions::for_engines()
    }
}

struct Batch {
    stream: Stream,
    shared: HashMap<String, Rc<Buffer>>,
    logits: Buffer,
    runtime: Rc<Runtime>,
    sequences: usize,
}

impl Batch {
    fn part(&mut self, library: &Library, graph: &Graph, tokens: usize, capacity: usize) -> Outcome<Part> {
        let profile = Profile {
            batch: self.sequences,
            tokens: Tokens::Static(tokens),
            capacity,
            logits: Logits::Rows,
        };
        let network = lower(graph, &profile, &of_tensorrt())?;
        let plan = tensorrt::build(library, &network, &BuildOptions::default())?;
        let loading = LoadOptions {
            graphs: true,
            kernels: None,
            caches: Caches::Tensors,
        };
        let mut engine = Program::load(&self.runtime, Path::new("batch"), &[plan.bytes()], &network, loading)?;
        let cuda = self.runtime.cuda().clone();
        let name = |id| network.tensor(id).name.clone();
        let caches: HashMap<String, String> = network.aliases().map(|(from, to)| (name(to), name(from))).collect();
        let interface = network
            .interface
            .as_ref()
            .expect("lowering gives networks an interface");
        let roles = interface.inputs().iter().chain(interface.outputs());
        let roles: HashMap<String, Role> = roles.map(|port| (name(port.id), port.role)).collect();
        let mut inputs = HashMap::new();
        let mut ports = engine.ports().to_vec();
        ports.sort_by_key(|port| !port.is_input);
        for port in ports {
            let bytes = port.bytes(1);
            let cache = caches.get(&port.name).unwrap_or(&port.name);
            let role = roles.get(&port.name).copied();
            let address = if role == Some(Role::Logits) {
                self.logits.address()
            } else if let Some(known) = self.shared.get(cache) {
                known.address()
            } else if let Some(role) = role.filter(|role| INPUTS.contains(role)) {
                let buffer = Buffer::new(&cuda, bytes, &port.name)?;
                let address = buffer.address();
                inputs.insert(role, buffer);
                address
            } else {
                let buffer = Buffer::new(&cuda, bytes, &port.name)?;
                match network.weights.iter().find(|weight| weight.name == port.name) {
                    Some(weight) => buffer.write(0, weight.constant.materialize()?.data())?,
                    None => buffer.clear(&self.stream)?,
                }
                let address = buffer.address();
                self.shared.insert(port.name.clone(), Rc::new(buffer));
                address
            };
            // SAFETY: of the port's size; owned by the batch or the part, which are dropped together.
            unsafe { engine.bind([(port.name.as_str(), address)])? };
        }
        let scratch = Buffer::new(&cuda, engine.scratch_bytes(), "scratch memory")?;
        // SAFETY: owned by the part.
        unsafe { engine.set_scratch(&scratch) };
        Ok(Part {
            engine,
            tokens,
            inputs,
            _scratch: scratch,
        })
    }

    /// One call: for each sequence these tokens at this position (none: a padding token that is overwritten later).
    /// Returns the logits after the last of each.
    fn run(&mut self, part: &mut Part, calls: &[(&[u32], usize)], vocabulary: usize) -> Outcome<Vec<f32>> {
        let mut columns: [Vec<i32>; 4] = Default::default();
        for (tokens, position) in calls {
            for i in 0..part.tokens {
                columns[0].push(tokens.get(i).map_or(0, |id| *id as i32));
                columns[1].push((position + i) as i32);
            }
            columns[2].push(*position as i32);
            columns[3].push(tokens.len().saturating_sub(1) as i32);
        }
        for (role, column) in INPUTS.iter().zip(&columns) {
            if let Some(buffer) = part.inputs.get(role) {
                buffer.write(0, bytemuck::cast_slice(column))?;
            }
        }
        part.engine.enqueue(&self.stream)?;
        self.stream.wait()?;
        let mut bytes = vec![0; calls.len() * vocabulary * size_of::<f32>()];
        self.logits.read(0, &mut bytes)?;
        Ok(bytes.chunks_exact(4).map(bytemuck::pod_read_unaligned).collect())
    }
}

pub fn logits(path: &Path, cases: &Path, output: &Path, capacity: usize, chunk: usize) -> Outcome<Value> {
    use std::io::Write;
    let cases: Vec<Case> = serde_json::from_str(&std::fs::read_to_string(cases)?)?;
    let mut file = std::io::BufWriter::new(std::fs::File::create(output)?);
    let package = Package::open(path)?;
    let (graph, vocabulary) = (package.graph()?, package.vocabulary()?);
    let library = Library::load(None)?;
    let runtime = Runtime::new(&library)?;
    let row = vocabulary * size_of::<f32>();
    let mut batch = Batch {
        stream: Stream::new(runtime.cuda())?,
        shared: HashMap::new(),
        logits: Buffer::new(runtime.cuda(), cases.len() * row, "logits")?,
        runtime,
        sequences: cases.len(),
    };
    let mut prefill = batch.part(&library, &graph, chunk, capacity)?;
    let mut decode = batch.part(&library, &graph, 1, capacity)?;

    let mut rows = vec![0.0; cases.len() * vocabulary];
    let mut positions = vec![0; cases.len()];
    // Prompts chunk by chunk, each at its own position; a finished one waits and writes padding at the position of its
    // next token.
    while positions.iter().zip(&cases).any(|(at, case)| *at < case.prompt.len()) {
        let calls: Vec<(&[u32], usize)> = cases
            .iter()
            .zip(&positions)
            .map(|(case, at)| (&case.prompt[*at..(*at + chunk).min(case.prompt.len())], *at))
            .collect();
        let now = batch.run(&mut prefill, &calls, vocabulary)?;
        let fed: Vec<usize> = calls.iter().map(|(tokens, _)| tokens.len()).collect();
        for (i, fed) in fed.into_iter().enumerate().filter(|(_, fed)| *fed > 0) {
            let of = i * vocabulary..(i + 1) * vocabulary;
            rows[of.clone()].copy_from_slice(&now[of]);
            positions[i] += fed;
        }
    }
    file.write_all(bytemuck::cast_slice(&rows))?;
    let steps = cases.first().map_or(0, |case| case.forced.len());
    for step in 0..steps {
        let calls: Vec<(&[u32], usize)> = cases
            .iter()
            .zip(&positions)
            .map(|(case, at)| (&case.forced[step..=step], *at))
            .collect();
        let rows = batch.run(&mut decode, &calls, vocabulary)?;
        file.write_all(bytemuck::cast_slice(&rows))?;
        positions.iter_mut().for_each(|at| *at += 1);
    }
    file.flush()?;
    Ok(json!({"sequences": cases.len(), "steps": steps, "capacity": capacity, "chunk": chunk}))
}
