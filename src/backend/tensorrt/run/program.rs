//! The program of one profile: engines and the kernels between them, launched as one CUDA graph.
//!
//! Usually that is one engine. A network with Lapidary's own layers is a sequence ([`Steps`]): the engines of its segments (contexts of
//! plans that several may share) and a launch for each kernel layer. The program owns the memory for values between
//! steps.

use std::collections::HashMap;
use std::path::Path;
use std::rc::Rc;

use super::super::cuda::Graph;
use super::kernels::{self, Launch};
use super::layer_times::ReportLayerTime;
use super::{Buffer, Caches, Engine, Event, LoadOptions, LoadedPlan, Port, RunError, Runtime, Stream};
use crate::network::segments::{Step, Steps};
use crate::network::{Network, Tensor};

/// Alignment of tensors: kernels copy 16 bytes at a time, and TensorRT requires it.
const ALIGNMENT: usize = 256;

/// Engines and kernels in order. The caller provides its scratch memory ([`Program::scratch_bytes`]), so that programs
/// that never run at the same time can share it.
pub struct Program {
    /// Dropped before the memory to which they are bound.
    steps: Vec<ProgramStep>,
    /// Memory for values between steps.
    between: Option<Buffer>,
    name: String,
    launching: Launching,
    /// Receives the time of every kernel.
    report: Option<Box<dyn ReportLayerTime>>,
    runtime: Rc<Runtime>,
}

enum ProgramStep {
    Engine {
        engine: Engine,
        /// The network's name for each name in the plan, since segments can share plans.
        names: Option<HashMap<String, String>>,
    },
    Kernel(Launch),
}

/// How the next run is queued.
enum Launching {
    /// Kernel by kernel, always.
    Kernels,
    /// Kernel by kernel once, since TensorRT's first run does setup work that must not be captured.
    First,
    /// Captured, then launched.
    Capture,
    /// Launched again.
    Again(Graph),
}

impl Program {
    /// Unpacks the plans of a network from [`build_all`](super::super::build_all). `path` is for messages.
    pub fn load(
        runtime: &Rc<Runtime>,
        path: &Path,
        plans: &[&[u8]],
        network: &Network,
        options: LoadOptions<'_>,
    ) -> Result<Self, RunError> {
        if options.caches == Caches::Tables
            && let Some(layer) = network.layer_across_sequences()
        {
            return Err(RunError::Mismatch {
                engine: network.profile.to_string(),
                reason: format!(
                    "its sequences cannot have caches of their own: the layer {:?} is TensorRT's",
                    layer.name
                ),
            });
        }
        let steps = network.has_kernel_layers().then(|| Steps::of(network));
        let networks = steps.as_ref().map_or_else(|| vec![network], Steps::plans);
        if networks.len() != plans.len() {
            return Err(RunError::Mismatch {
                engine: network.profile.to_string(),
                reason: format!(
                    "it has {} plans, the package's network needs {}",
                    plans.len(),
                    networks.len()
                ),
            });
        }
        let loaded = networks
            .iter()
            .zip(plans)
            .map(|(part, plan)| LoadedPlan::new(runtime, path, plan, part, options.kernels).map(Rc::new));
        let loaded = loaded.collect::<Result<Vec<_>, _>>()?;
        match steps {
            Some(steps) => Program::of_steps(runtime, network, &steps, &loaded, options),
            None => Ok(Program::of_engine(Engine::of(&loaded[0], 0)?, options.graphs)),
        }
    }

    /// A network with a single engine. `graphs`: see [`LoadOptions`].
    pub fn of_engine(engine: Engine, graphs: bool) -> Self {
        let runtime = engine.plan().runtime.clone();
        Program {
            name: engine.name().to_string(),
            steps: vec![ProgramStep::Engine { engine, names: None }],
            between: None,
            launching: Launching::new(graphs),
            report: None,
            runtime,
        }
    }

    /// A network in steps; `plans` are those of [`Steps::plans`].
    pub fn of_steps(
        runtime: &Rc<Runtime>,
        network: &Network,
        steps: &Steps,
        plans: &[Rc<LoadedPlan>],
        options: LoadOptions<'_>,
    ) -> Result<Self, RunError> {
        let first = steps.plans();
        let mut made = Vec::with_capacity(steps.steps.len());
        for step in &steps.steps {
            made.push(match step {
                Step::Engine(segment) => {
                    let segment = &steps.segments[*segment];
                    let of_plan = first[segment.plan];
                    let of_plan = steps.segments.iter().find(|s| std::ptr::eq(&s.network, of_plan));
                    let of_plan = of_plan.expect("plans are of segments").ports();
                    let names = of_plan.into_iter().zip(segment.ports());
                    ProgramStep::Engine {
                        engine: Engine::of(&plans[segment.plan], 0)?,
                        names: Some(names.map(|(plan, own)| (plan.to_string(), own.to_string())).collect()),
                    }
                }
                Step::Kernel(layer) => {
                    ProgramStep::Kernel(kernels::launch(&runtime.modules, network, *layer, options.caches)?)
                }
            });
        }
        runtime.modules.settle();
        let mut program = Program {
            name: network.profile.to_string(),
            steps: made,
            between: None,
            launching: Launching::new(options.graphs),
            report: None,
            runtime: runtime.clone(),
        };
        program.provide_between(network, steps)?;
        Ok(program)
    }

    /// Memory for what steps compute that is not an output of the network.
    fn provide_between(&mut self, network: &Network, steps: &Steps) -> Result<(), RunError> {
        let outputs: Vec<&Tensor> = network.outputs.iter().map(|id| network.tensor(*id)).collect();
        let computed = steps.steps.iter().flat_map(|step| -> Vec<&Tensor> {
            let (network, ids) = match step {
                Step::Engine(segment) => {
                    let part = &steps.segments[*segment].network;
                    (part, &part.outputs)
                }
                Step::Kernel(layer) => (network, &network.layers[*layer].outputs),
            };
            ids.iter().map(|id| network.tensor(*id)).collect()
        });
        let mut places = Vec::new();
        let mut end = 0;
        for tensor in computed.filter(|tensor| !outputs.iter().any(|output| output.name == tensor.name)) {
            places.push((tensor.name.as_str(), end as u64));
            end += tensor_bytes(tensor).next_multiple_of(ALIGNMENT);
        }
        if places.is_empty() {
            return Ok(());
        }
        let memory = Buffer::new(self.runtime.cuda(), end, "what a step's kernels pass on")?;
        let address = memory.address();
        // SAFETY: every place holds its tensor, and the memory is the program's, which drops its steps first.
        unsafe { self.bind(places.into_iter().map(|(name, at)| (name, address + at)))? };
        self.between = Some(memory);
        Ok(())
    }

    /// The runtime.
    pub fn runtime(&self) -> &Rc<Runtime> {
        &self.runtime
    }

    /// The profile it runs.
    pub fn name(&self) -> &str {
        &self.name
    }

    fn engines(&self) -> impl Iterator<Item = &Engine> {
        self.steps.iter().filter_map(|step| match step {
            ProgramStep::Engine { engine, .. } => Some(engine),
            ProgramStep::Kernel(_) => None,
        })
    }

    fn engines_mut(&mut self) -> impl Iterator<Item = &mut Engine> {
        self.steps.iter_mut().filter_map(|step| match step {
            ProgramStep::Engine { engine, .. } => Some(engine),
            ProgramStep::Kernel(_) => None,
        })
    }

    /// The engine of a program with a single engine, for functions that only engines have.
    pub fn engine(&self) -> Option<&Engine> {
        match &self.steps[..] {
            [ProgramStep::Engine { engine, .. }] => Some(engine),
            _ => None,
        }
    }

    /// The plan of each of its engines.
    pub fn plans(&self) -> impl Iterator<Item = &Rc<LoadedPlan>> {
        self.engines().map(Engine::plan)
    }

    /// Inputs and outputs of its engines, by the network's names. Tensors that only kernels read or write are not
    /// included.
    pub fn ports(&self) -> Vec<Port> {
        let named = self.steps.iter().filter_map(|step| match step {
            ProgramStep::Engine { engine, names } => Some((engine, names)),
            ProgramStep::Kernel(_) => None,
        });
        let ports = named.flat_map(|(engine, names)| {
            engine.ports().iter().map(move |port| Port {
                name: own_name(names.as_ref(), &port.name).to_string(),
                ..port.clone()
            })
        });
        ports.collect()
    }

    /// Current number of tokens of a dynamic engine; 1 for a static one.
    pub fn tokens(&self) -> usize {
        self.engines().map(Engine::tokens).next().unwrap_or(1)
    }

    /// Scratch memory that a run needs for the current shapes: the maximum of its engines, which run one after the
    /// other.
    pub fn scratch_bytes(&self) -> usize {
        self.engines().map(Engine::scratch_bytes).max().unwrap_or(0)
    }

    /// Its own device memory, in bytes.
    pub fn bytes(&self) -> usize {
        let kernels = self.steps.iter().map(|step| match step {
            ProgramStep::Kernel(launch) => launch.bytes(),
            ProgramStep::Engine { .. } => 0,
        });
        self.between.as_ref().map_or(0, Buffer::bytes) + kernels.sum::<usize>()
    }

    /// See [`LoadedPlan::keep_kernels`].
    pub fn keep_kernels(&self) {
        self.engines().for_each(Engine::keep_kernels);
    }

    /// Sets every dim that depends on the call to `tokens`, and updates the required scratch memory.
    pub fn set_tokens(&mut self, tokens: usize) -> Result<(), RunError> {
        self.launching.recapture();
        self.engines_mut().try_for_each(|engine| engine.set_tokens(tokens))
    }

    /// Sets its scratch memory: at least [`Program::scratch_bytes`], or runs are refused.
    ///
    /// # Safety
    /// As [`Engine::set_scratch`].
    pub unsafe fn set_scratch(&mut self, scratch: &Buffer) {
        self.launching.recapture();
        for engine in self.engines_mut() {
            // SAFETY: the caller's promise; engines of one program run one after the other.
            unsafe { engine.set_scratch(scratch) };
        }
    }

    /// Binds tensors and weights to device memory, by the network's names.
    ///
    /// # Safety
    /// As [`Engine::bind`], for every step that has a tensor or weight of that name.
    pub unsafe fn bind<'n>(&mut self, ports: impl IntoIterator<Item = (&'n str, u64)>) -> Result<(), RunError> {
        self.launching.recapture();
        for (name, address) in ports {
            for step in &mut self.steps {
                match step {
                    ProgramStep::Engine { engine, names } => {
                        let of_plan: Vec<String> = engine
                            .ports()
                            .iter()
                            .filter(|port| own_name(names.as_ref(), &port.name) == name)
                            .map(|port| port.name.clone())
                            .collect();
                        for port in &of_plan {
                            // SAFETY: this function's own contract.
                            unsafe { engine.bind([(port.as_str(), address)])? };
                        }
                    }
                    ProgramStep::Kernel(launch) => {
                        // SAFETY: this function's own contract.
                        unsafe { launch.bind(name, address) };
                    }
                }
            }
        }
        Ok(())
    }

    /// Queues one run. Refused if something is not bound or there is less scratch memory than it needs.
    pub fn enqueue(&mut self, stream: &Stream) -> Result<(), RunError> {
        match &self.launching {
            Launching::Again(graph) => return graph.launch(stream),
            Launching::Kernels => return self.enqueue_steps(stream),
            Launching::First => {
                self.launching = Launching::Capture;
                return self.enqueue_steps(stream);
            }
            Launching::Capture => {}
        }
        let cuda = self.runtime.cuda.clone();
        match Graph::capture(&cuda, stream, || self.enqueue_steps(stream)) {
            Ok(graph) => {
                graph.launch(stream)?;
                self.launching = Launching::Again(graph);
                Ok(())
            }
            // TensorRT may have layers that cannot be captured: slower, but not an error.
            Err(_) => {
                self.runtime.capture.take_errors();
                self.launching = Launching::Kernels;
                self.enqueue_steps(stream)
            }
        }
    }

    /// Reports the time of each layer after every run: see [`Engine::profile`]. Each kernel counts as a layer and is
    /// timed between events, without the benefit of dependent launch.
    pub fn profile(&mut self, report: impl Fn() -> Box<dyn ReportLayerTime>) -> Result<(), RunError> {
        self.engines_mut().try_for_each(|engine| engine.profile(report()))?;
        self.report = Some(report());
        Ok(())
    }

    /// Whether runs are currently launched as one CUDA graph.
    pub fn is_captured(&self) -> bool {
        matches!(self.launching, Launching::Again(_))
    }

    fn enqueue_steps(&mut self, stream: &Stream) -> Result<(), RunError> {
        let mut after_kernel = false;
        for step in &mut self.steps {
            match step {
                ProgramStep::Engine { engine, .. } => engine.enqueue(stream)?,
                ProgramStep::Kernel(launch) => match &self.report {
                    None => launch.enqueue(stream, after_kernel)?,
                    Some(report) => {
                        let (start, end) = (Event::new(&self.runtime.cuda)?, Event::new(&self.runtime.cuda)?);
                        start.record(stream)?;
                        launch.enqueue(stream, false)?;
                        end.record(stream)?;
                        end.wait()?;
                        report.report_layer_time(launch.name(), end.since(&start)?.as_secs_f32() * 1e3);
                    }
                },
            }
            after_kernel = matches!(step, ProgramStep::Kernel(_));
        }
        Ok(())
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        // A queued run uses the steps and their memory. If waiting fails, nothing is running anymore.
        let _ = self.runtime.cuda.synchronize();
    }
}

impl Launching {
    fn new(graphs: bool) -> Self {
        if graphs { Launching::First } else { Launching::Kernels }
    }

    /// Bindings changed, and a captured graph contains the old ones.
    fn recapture(&mut self) {
        if let Launching::Again(_) = self {
            *self = Launching::Capture;
        }
    }
}

fn own_name<'n>(names: Option<&'n HashMap<String, String>>, of_plan: &'n str) -> &'n str {
    names
        .and_then(|names| names.get(of_plan))
        .map_or(of_plan, String::as_str)
}

fn tensor_bytes(tensor: &Tensor) -> usize {
    let dims = tensor.shape.iter().map(|dim| dim.as_const().unwrap_or(1) as usize);
    tensor.dtype.byte_len(dims.product())
}
