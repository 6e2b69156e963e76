//! The body of each fuzz target. Every function may refuse its input; none must panic, hang or allocate without bound.
//!
//! Most inputs are files, so they are written to a folder in memory and opened in the same way as in the program. Input
//! of targets with several files: a byte that selects the case, the length of the first file (two bytes,
//! little-endian), then both files.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use lapidary::convert::{ConvertOptions, convert};
use lapidary::graph::Constant;
use lapidary::lower::{LowerOptions, lower};
use lapidary::network::Profile;
use lapidary::package::{self, Package};
use lapidary::passes::{CanonicalizeOptions, canonicalize};
use lapidary::sample::{Chain, DrySettings, MirostatSettings, Settings, Stage};
use lapidary::spec::Spec;
use lapidary::tensor::{DType, Tensor};
use lapidary::text::{Detokenizer, Message, Tokenizer, chat};
use lapidary::weights::config;
use lapidary::weights::lora::Adapter;
use lapidary::weights::source::{SourceContext, WeightSource};
use lapidary::{onnx as reader, report};

/// Larger tensors are not computed: a file may contain any shape, and the reader does not allocate it.
const SMALL: usize = 1 << 16;

/// A folder for this process; `scripts/fuzz.sh` provides one in memory, and removes it.
fn scratch() -> &'static Path {
    static FOLDER: OnceLock<PathBuf> = OnceLock::new();
    FOLDER.get_or_init(|| {
        let given = std::env::var_os("LAPIDARY_FUZZ_FOLDER").map(PathBuf::from);
        let home = given.unwrap_or_else(std::env::temp_dir);
        let folder = home.join(format!("lapidary-fuzz-{}", std::process::id()));
        fs::create_dir_all(&folder).expect("a folder can be made");
        folder
    })
}

fn write(name: &str, bytes: &[u8]) -> PathBuf {
    let path = scratch().join(name);
    fs::write(&path, bytes).expect("a file can be written");
    path
}

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../fixtures/exports")
        .join(name)
        .join("model.onnx")
}

/// The choice and two files.
fn split(data: &[u8]) -> Option<(u8, &[u8], &[u8])> {
    let (head, rest) = data.split_at_checked(3)?;
    let first = usize::from(u16::from_le_bytes([head[1], head[2]])).min(rest.len());
    let (first, second) = rest.split_at(first);
    Some((head[0], first, second))
}

/// Reads, rewrites and lowers an ONNX model.
pub fn onnx(data: &[u8]) {
    let path = write("model.onnx", data);
    let Ok(graph) = reader::read_stripped(&path) else {
        return;
    };
    let options = CanonicalizeOptions {
        max_positions: 32,
        ..CanonicalizeOptions::default()
    };
    let Ok(canonical) = canonicalize(graph, &options) else {
        return;
    };
    for profile in [Profile::decode(16), Profile::prefill(4, 16)] {
        let _ = lower(&canonical.graph, &profile, &LowerOptions::default());
    }
}

/// A small package without its weights.
fn stripped() -> &'static Path {
    static FOLDER: OnceLock<PathBuf> = OnceLock::new();
    FOLDER.get_or_init(|| {
        let (whole, folder) = (scratch().join("whole"), scratch().join("package"));
        let spec = Spec {
            capacity: Some(vec![16]),
            ..Spec::default()
        };
        let conversion = spec.resolve().expect("a spec that holds together");
        convert(&fixture("llama-mobius"), &whole, conversion, &ConvertOptions::default()).expect("it converts");
        let whole = Package::open(&whole).expect("it opens");
        package::strip(&whole, &folder, false).expect("it is stripped");
        folder
    })
}

/// Opens a package whose manifest, graph or tables are the input.
pub fn package(data: &[u8]) {
    let Some((&which, bytes)) = data.split_first() else {
        return;
    };
    let folder = stripped();
    let names = ["manifest.json", "graph.onnx", "constants.safetensors"];
    let name = names[usize::from(which) % names.len()];
    static KEPT: OnceLock<Vec<Vec<u8>>> = OnceLock::new();
    let kept = KEPT.get_or_init(|| {
        names
            .iter()
            .map(|n| fs::read(folder.join(n)).expect("it is there"))
            .collect()
    });
    fs::write(folder.join(name), bytes).expect("a file can be written");
    if let Ok(package) = Package::open(folder) {
        let _ = (
            package.name(),
            package.bytes(),
            package.check_present(),
            package.check_hashes(),
        );
        let _ = (package.vocabulary(), package.tokenizer());
        if let Ok(graph) = package.architecture() {
            let _ = lower(&graph, &Profile::decode(16), &LowerOptions::default());
        }
        if let Ok(required) = package.required() {
            let path = write("nothing.safetensors", EMPTY);
            let source = WeightSource::open(&path, &context()).expect("a file of nothing");
            let _ = lapidary::weights::matching::matched(&required, &source, None, false).map(drop);
        }
    }
    let at = usize::from(which) % names.len();
    fs::write(folder.join(name), &kept[at]).expect("a file can be written");
}

/// Opens checkpoints, adapters and configurations.
pub fn weights(data: &[u8]) {
    let Some((which, first, second)) = split(data) else {
        return;
    };
    let folder = scratch().join("checkpoint");
    fs::create_dir_all(&folder).expect("a folder can be made");
    let put = |name: &str, bytes: &[u8]| fs::write(folder.join(name), bytes).expect("a file can be written");
    match which % 4 {
        0 => {
            put("model.safetensors", second);
            if let Ok(source) = WeightSource::open(&folder.join("model.safetensors"), &context()) {
                for constant in source.tensors.values().filter(|c| c.len() < SMALL) {
                    let _ = constant.cast(DType::F16).materialize();
                }
            }
        }
        1 => {
            put("adapter_config.json", first);
            put("adapter_model.safetensors", second);
            if let Ok(adapter) = Adapter::open(&folder) {
                for target in adapter.targets() {
                    let Some((_, change)) = adapter.change_of(&format!("{target}.weight")) else {
                        continue;
                    };
                    let shape = change.shape();
                    if shape[0].saturating_mul(shape[1]) < SMALL {
                        let zero = Tensor::from_f32(shape.to_vec(), &vec![0.0; shape[0] * shape[1]]);
                        let _ = change.merged(&Constant::tensor(zero)).materialize();
                    }
                }
            }
        }
        2 => {
            put("config.json", first);
            put("model.safetensors", EMPTY);
            if let Ok(source) = WeightSource::open(&folder.join("model.safetensors"), &context()) {
                let (graph, architecture) = model();
                let _ = config::check(&source, graph, architecture, Some(16));
            }
            let _ = fs::remove_file(folder.join("config.json"));
        }
        _ => {
            put("model.safetensors.index.json", first);
            put("part.safetensors", second);
            let _ = WeightSource::open(&folder.join("model.safetensors.index.json"), &context()).map(drop);
        }
    }
}

fn context() -> SourceContext {
    SourceContext {
        positions: 16,
        dtype: DType::F32,
        architecture_hash: String::new(),
        activations: Default::default(),
        mask_windows: Default::default(),
    }
}

/// A safetensors file of nothing.
const EMPTY: &[u8] = b"\x02\0\0\0\0\0\0\0{}";

fn model() -> &'static (lapidary::graph::Graph, lapidary::passes::Architecture) {
    static MODEL: OnceLock<(lapidary::graph::Graph, lapidary::passes::Architecture)> = OnceLock::new();
    MODEL.get_or_init(|| {
        let options = CanonicalizeOptions {
            max_positions: 32,
            ..CanonicalizeOptions::default()
        };
        let graph = reader::read(fixture("mistral-optimum")).expect("it is read");
        let canonical = canonicalize(graph, &options).expect("it is understood");
        (canonical.graph, canonical.architecture)
    })
}

/// libFuzzer ends the process at every panic. Panics of the `tokenizers` library are caught and become errors.
fn let_library_panic() {
    static ONCE: std::sync::Once = std::sync::Once::new();
    ONCE.call_once(|| {
        let ends = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |panic| {
            if !panic.location().is_some_and(|at| at.file().contains("/tokenizers-")) {
                ends(panic);
            }
        }));
    });
}

/// Opens tokenizers, encodes and decodes, renders chat templates.
pub fn text(data: &[u8]) {
    let Some((which, first, second)) = split(data) else {
        return;
    };
    let_library_panic();
    let messages = [
        Message::system("Be short."),
        Message::user("Hi\n"),
        Message::assistant("Hello."),
    ];
    if which % 2 == 0 {
        if let Ok(source) = std::str::from_utf8(second) {
            let _ = chat::render_source(source, &messages, &[("bos_token", "<s>"), ("eos_token", "</s>")]);
        }
        return;
    }
    let folder = scratch().join("tokenizer");
    fs::create_dir_all(&folder).expect("a folder can be made");
    fs::write(folder.join("tokenizer_config.json"), first).expect("a file can be written");
    fs::write(folder.join("tokenizer.json"), second).expect("a file can be written");
    let Ok(tokenizer) = Tokenizer::open(&folder) else {
        return;
    };
    let _ = tokenizer.encode("Hello <s> wörld\n\0 12", true);
    let mut stream = Detokenizer::new(&tokenizer);
    for id in 0..24 {
        let _ = stream.push(id);
    }
    let _ = (stream.finish(), tokenizer.token_bytes().len(), tokenizer.vocabulary());
    let _ = chat::render(&tokenizer, &messages);
}

/// Numbers from the input, zeros after its end.
struct Numbers<'a>(&'a [u8]);

impl Numbers<'_> {
    fn byte(&mut self) -> u8 {
        match self.0.split_first() {
            Some((first, rest)) => {
                self.0 = rest;
                *first
            }
            None => 0,
        }
    }

    fn float(&mut self) -> f32 {
        f32::from_le_bytes([(); 4].map(|()| self.byte()))
    }

    fn number(&mut self) -> usize {
        usize::from(u16::from_le_bytes([self.byte(), self.byte()]))
    }
}

/// A chain of samplers over a few steps.
pub fn sampler(data: &[u8]) {
    let mut numbers = Numbers(data);
    let n = &mut numbers;
    let order = (0..n.byte() % 12).map(|_| Stage::ORDER[usize::from(n.byte()) % Stage::ORDER.len()]);
    let mut settings = Settings {
        order: order.collect(),
        logit_bias: (0..n.byte() % 4).map(|_| (u32::from(n.byte()), n.float())).collect(),
        repetition_penalty: n.float(),
        frequency_penalty: n.float(),
        presence_penalty: n.float(),
        penalty_last_n: Some(n.number()).filter(|n| *n != 0),
        dry: DrySettings {
            multiplier: n.float(),
            base: n.float(),
            allowed_length: n.number(),
            ..DrySettings::default()
        },
        top_n_sigma: n.float(),
        top_k: n.number(),
        typical_p: n.float(),
        top_p: n.float(),
        min_p: n.float(),
        xtc_probability: n.float(),
        xtc_threshold: n.float(),
        temperature: n.float(),
        mirostat: None,
        seed: u64::from(n.byte()),
        by_position: false,
    };
    // From a byte that is read anyway, so that the corpus stays valid.
    settings.by_position = !settings.seed.is_multiple_of(2);
    if n.byte() % 4 == 0 {
        settings.mirostat = Some(MirostatSettings {
            tau: n.float(),
            eta: n.float(),
        });
    }
    let Ok(mut chain) = Chain::new(&settings) else { return };
    let mut history: Vec<u32> = (0..n.byte() % 16).map(|_| u32::from(n.byte())).collect();
    let logits: Vec<f32> = (0..n.byte()).map(|_| n.float()).collect();
    for _ in 0..3 {
        let Ok(token) = chain.sample(&logits, &history) else {
            return;
        };
        assert!((token as usize) < logits.len(), "a token that there is");
        history.push(token);
        if let Ok(probabilities) = chain.probabilities(&logits, &history) {
            let sum: f64 = probabilities.iter().sum();
            assert!((sum - 1.0).abs() < 1e-3, "probabilities sum to {sum}");
        }
    }
}

/// Reports on two result files.
pub fn results(data: &[u8]) {
    let Some((_, first, second)) = split(data) else { return };
    let mut paths = vec![write("first.json", first)];
    if !second.is_empty() {
        paths.push(write("second.json", second));
    }
    if let Ok(input) = report::Input::read(&paths, &[]) {
        let _ = report::report(&input, "plots");
    }
}
