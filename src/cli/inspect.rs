//! `lapidary inspect`: describes an export, and whether it can be converted.

mod formats;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write;
use std::path::{Path, PathBuf};

use serde::Serialize;

use formats::Formats;

use super::convert::{mask_window, mask_windows};
use super::table::Table;
use super::{Failure, JsonForm, bytes, print, print_json, words};
use crate::convert::{ConvertError, Variant, examine, find_model};
use crate::graph::{self, Definition, Graph, ValueId};
use crate::lower;
use crate::network::{Profile, WeightMode};
use crate::onnx::{self, Exporter};
use crate::passes::{self, ActivationPolicy, Recognition};
use crate::spec::Spec;
use crate::target::Precision;

#[derive(clap::Args)]
pub struct Args {
    /// The ONNX export, or its folder
    #[arg(value_name = "MODEL")]
    model: PathBuf,
    /// Which export of the folder: a suffix such as q4f16, or a file name [default: the one without suffix, or the only one]
    #[arg(long, value_name = "NAME")]
    variant: Option<String>,
    /// Print the whole graph instead: as exported, canonical, or lowered to the network of one profile
    #[arg(long, value_enum)]
    dump: Option<Dump>,
    /// With --dump network: tokens per run
    #[arg(long, value_name = "N", default_value_t = 1, requires = "dump", value_parser = positive)]
    tokens: usize,
    /// With --dump network: cache capacity
    #[arg(long, value_name = "N", default_value_t = 256, requires = "dump", value_parser = positive)]
    capacity: usize,
    /// With --dump: element type of the canonical graph and the network
    #[arg(long, value_enum, requires = "dump")]
    dtype: Option<Precision>,
    /// With --dump: how quantized activations are handled, as in `convert`
    #[arg(long, requires = "dump", value_parser = words::<ActivationPolicy>(&["quantized", "partial", "float"]))]
    activations: Option<ActivationPolicy>,
    /// Window of a mask that the caller fills, as in `convert`
    #[arg(long, value_name = "INPUT=N", value_parser = mask_window)]
    mask_window: Vec<(String, usize)>,
    /// List every input and output; those of the cache are folded otherwise
    #[arg(short, long)]
    verbose: bool,
    /// Print one JSON document
    #[arg(long, conflicts_with = "dump", value_enum, value_name = "FORM", num_args = 0..=1, require_equals = true, default_missing_value = "pretty")]
    json: Option<JsonForm>,
}

#[derive(Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Dump {
    Graph,
    Canonical,
    Network,
}

fn positive(text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(n) if n > 0 => Ok(n),
        _ => Err("it must be a number above 0".into()),
    }
}

#[derive(Serialize)]
struct Inspection {
    file: PathBuf,
    /// Exports in the given folder, including this one; omitted for a file.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    variants: Vec<Variant>,
    exporter: Exporter,
    producer: String,
    ir_version: i64,
    /// Domain and version.
    opsets: Vec<(String, i64)>,
    inputs: Vec<Tensor>,
    outputs: Vec<Tensor>,
    nodes: usize,
    /// Bytes of all constants that something reads, each counted once.
    weight_bytes: u64,
    weight_bytes_by_dtype: BTreeMap<String, u64>,
    /// How weights are quantized; omitted if none is.
    #[serde(skip_serializing_if = "Option::is_none")]
    quantization: Option<Formats>,
    #[serde(flatten)]
    recognition: Recognition,
    /// Invalid operators and operands.
    faults: Vec<String>,
    /// All reasons that prevent a conversion, as text.
    reasons: Vec<String>,
    convertible: bool,
}

#[derive(Serialize)]
struct Tensor {
    name: String,
    dtype: Option<String>,
    shape: Option<Vec<String>>,
}

pub fn run(args: Args) -> Result<(), Failure> {
    let files = find_model(&args.model, args.variant.as_deref())?;
    let mut graph = onnx::read(&files.model)?;
    if let Some(dump) = args.dump {
        return print(&dumped(graph, dump, &args, &files.model)?);
    }
    // A cyclic graph cannot be sorted.
    graph.sort().map_err(|e| Failure::from(e).at(&files.model))?;
    let spec = Spec {
        mask_windows: Some(args.mask_window.iter().cloned().collect()),
        ..Spec::default()
    };
    let examination = examine(&files, &graph, &spec.resolve()?);
    let (weight_bytes, weight_bytes_by_dtype) = weights(&graph);
    // Exporters need not declare the outputs' types.
    let mut typed = graph.clone();
    let _ = graph::infer::infer(&mut typed);
    let tensors = |ids: &[ValueId]| ids.iter().map(|id| tensor(&typed, *id)).collect();
    let facts = Inspection {
        exporter: onnx::exporter(&graph),
        producer: format!("{} {}", graph.producer.name, graph.producer.version)
            .trim()
            .to_string(),
        ir_version: graph.producer.ir_version,
        opsets: graph.producer.opsets.clone(),
        inputs: tensors(&graph.inputs),
        outputs: tensors(&graph.outputs),
        nodes: graph.node_ids().count(),
        weight_bytes,
        weight_bytes_by_dtype,
        quantization: formats::formats(examination.canonical.as_ref().unwrap_or(&graph)),
        convertible: examination.reasons.is_empty(),
        faults: examination.faults,
        reasons: examination.reasons,
        recognition: Recognition {
            help: examination.help,
            ..examination.recognition
        },
        file: files.model,
        variants: files.variants,
    };
    match args.json {
        Some(form) => print_json(&facts, form),
        None => print(&summary(&facts, args.verbose)),
    }
}

fn dumped(graph: Graph, dump: Dump, args: &Args, model: &Path) -> Result<String, Failure> {
    if dump == Dump::Graph {
        return Ok(graph::dump(&graph).to_string());
    }
    let options = passes::CanonicalizeOptions {
        dtype: args.dtype.map(Precision::dtype),
        max_positions: args.capacity,
        allow_overflow: false,
        activations: args.activations.unwrap_or_default(),
        mask_windows: mask_windows(args.mask_window.iter().cloned()),
    };
    let canonical = passes::canonicalize(graph, &options).map_err(|e| ConvertError::Pass {
        path: model.to_path_buf(),
        source: e,
    })?;
    if dump == Dump::Canonical {
        return Ok(graph::dump(&canonical.graph).to_string());
    }
    let options = lower::LowerOptions {
        weight_mode: WeightMode::Bind,
        ..lower::LowerOptions::default()
    };
    let profile = Profile::prefill(args.tokens, args.capacity);
    let network = lower::lower(&canonical.graph, &profile, &options).map_err(|e| Failure::from(e).at(model))?;
    Ok(network.to_string())
}

fn tensor(graph: &Graph, id: ValueId) -> Tensor {
    let value = graph.value(id);
    Tensor {
        name: value.name.clone(),
        dtype: value.dtype.map(|d| d.to_string()),
        shape: value.shape.as_ref().map(|s| s.iter().map(|d| d.to_string()).collect()),
    }
}

fn weights(graph: &Graph) -> (u64, BTreeMap<String, u64>) {
    let mut by_dtype = BTreeMap::new();
    let uses = graph.uses();
    for id in graph.value_ids().filter(|id| uses.contains_key(id)) {
        if let Definition::Constant(constant) = &graph.value(id).definition {
            match constant.as_quantized() {
                Some(parts) => {
                    for (_, part) in parts.each() {
                        *by_dtype.entry(part.dtype().to_string()).or_insert(0) += part.stored_byte_len() as u64;
                    }
                }
                None => *by_dtype.entry(constant.dtype().to_string()).or_insert(0) += constant.byte_len() as u64,
            }
        }
    }
    (by_dtype.values().sum(), by_dtype)
}

fn summary(facts: &Inspection, verbose: bool) -> String {
    let mut out = String::new();
    let mut line = |name: &str, text: String| {
        let _ = writeln!(out, "{name:<14} {text}");
    };
    let r = &facts.recognition;
    line("model", facts.file.display().to_string());
    for variant in facts
        .variants
        .iter()
        .filter(|variant| !facts.file.ends_with(&variant.file))
    {
        line("variant", variant.to_string());
    }
    let producer = match facts.producer.is_empty() {
        true => String::new(),
        false => format!(", by {}", facts.producer),
    };
    line("exporter", format!("{}{producer}", facts.exporter));
    let opsets = facts.opsets.iter().map(|(domain, version)| match domain.as_str() {
        "" => version.to_string(),
        _ => format!("{domain} {version}"),
    });
    let opsets: Vec<String> = opsets.collect();
    line("opset", format!("{} (IR {})", opsets.join(", "), facts.ir_version));
    if let Some(a) = &r.architecture {
        line("architecture", a.to_string());
    }
    if let Some(outline) = &r.outline {
        line("architecture", format!("{outline} (incomplete)"));
    }
    let slots = r.capacity.map(|n| format!(", {n} slots")).unwrap_or_default();
    line("cache", format!("{}{slots}", r.cache));
    let dtypes: Vec<String> = facts
        .weight_bytes_by_dtype
        .iter()
        .map(|(d, n)| format!("{} in {d}", bytes(*n)))
        .collect();
    line(
        "weights",
        format!("{} ({})", bytes(facts.weight_bytes), dtypes.join(", ")),
    );
    for text in facts.quantization.iter().flat_map(Formats::lines) {
        line("quantized", text);
    }
    if !r.activations.is_empty() {
        line("activations", r.activations.to_string());
    }
    let patterns: Vec<String> = r.patterns.iter().map(|(name, n)| format!("{n} {name}")).collect();
    line(
        "recognized",
        if patterns.is_empty() {
            "nothing".into()
        } else {
            patterns.join(", ")
        },
    );

    let mut table = Table::new(["input", "dtype", "shape", "role"]);
    let role = |input: &Tensor| {
        let found = r.inputs.iter().find(|i| i.name == input.name);
        found.map_or("", |i| i.role.as_str())
    };
    rows(&mut table, &facts.inputs, role, verbose);
    out += &format!("\n{}", table.render());
    let mut table = Table::new(["output", "dtype", "shape", ""]);
    rows(&mut table, &facts.outputs, |_| "", verbose);
    out += &format!("\n{}", table.render());

    let mut operators: Vec<(&String, &usize)> = r.operators.iter().collect();
    operators.sort_by_key(|(name, n)| (std::cmp::Reverse(**n), (*name).clone()));
    let operators: Vec<String> = operators.iter().map(|(name, n)| format!("{name} {n}")).collect();
    let _ = writeln!(out, "\n{} nodes: {}", facts.nodes, operators.join(", "));

    match facts.reasons.len() {
        0 => out.push_str("\nThis model can be converted.\n"),
        n => {
            let _ = writeln!(
                out,
                "\nThis model cannot be converted, for {n} reason{}:",
                if n == 1 { "" } else { "s" }
            );
            for reason in &facts.reasons {
                let _ = writeln!(out, "  {reason}");
            }
            if let Some(help) = &r.help {
                let _ = writeln!(out, "help: {help}");
            }
        }
    }
    out
}

/// A row for each tensor. Unless `verbose`, tensors that differ only in the numbers of their names, such as caches of
/// the layers, become one row if there are more than two.
fn rows<'a>(table: &mut Table, tensors: &'a [Tensor], role: impl Fn(&'a Tensor) -> &'a str, verbose: bool) {
    let key = |tensor: &Tensor| (pattern(&tensor.name), tensor.dtype.clone(), tensor.shape.clone());
    let mut shown = BTreeSet::new();
    for tensor in tensors {
        let alike = tensors.iter().filter(|other| key(other) == key(tensor)).count();
        if verbose || alike <= 2 {
            table.row(cells(tensor, role(tensor)));
        } else if shown.insert(key(tensor)) {
            let mut row = cells(tensor, role(tensor));
            row[0] = format!("{} (and {} more)", row[0], alike - 1);
            table.row(row);
        }
    }
}

/// A name with each run of digits replaced by `#`.
fn pattern(name: &str) -> String {
    let mut out = String::new();
    for c in name.chars() {
        match c.is_ascii_digit() {
            true if out.ends_with('#') => {}
            true => out.push('#'),
            false => out.push(c),
        }
    }
    out
}

fn cells(tensor: &Tensor, role: &str) -> [String; 4] {
    [
        tensor.name.clone(),
        tensor.dtype.clone().unwrap_or_else(|| "?".into()),
        tensor
            .shape
            .as_ref()
            .map_or("?".into(), |s| format!("[{}]", s.join(", "))),
        role.to_string(),
    ]
}
