//! The input of a report: results in comparable groups, conversions, and files of other forms.
//!
//! A group is one model in one dtype on one machine. All its results must have the same weights and prompts, and
//! different labels; otherwise nothing is reported. Results of a session that compares Lapidary with its peers (`peer`
//! in the file name, or the setting `comparison: peers`) form separate groups, one per model and machine, with weights
//! in several formats.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde_json::Value;

use super::conversion::{self, Conversion};
use crate::bench::quality::result::{self as quality, Perplexity, PerplexityResultError};
use crate::bench::serving::{self, Serving};
use crate::bench::side_by_side::{self, SideBySide};
use crate::bench::{self, Document, ResultError};
use crate::help::{Fault, Help};
use crate::package::Package;
use crate::report::conversion::ConversionError;

/// A file, with its citation number.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct SourceId(pub usize);

#[derive(Clone, Debug)]
pub struct SourceFile {
    pub path: PathBuf,
    /// First digits of the BLAKE3 of its bytes.
    pub hash: String,
    /// Description.
    pub what: String,
}

#[derive(Clone, Debug)]
pub struct Sourced<T> {
    pub source: SourceId,
    pub of: T,
}

pub type ResultFile = Sourced<Document>;

/// Results of one model on one machine that can be compared: in one dtype, or from one session with peers.
#[derive(Clone, Debug)]
pub struct Group {
    pub model: String,
    /// Element type of the arithmetic.
    pub dtype: String,
    /// Whether it is a session with peers, with weights in several formats.
    pub peers: bool,
    /// GPU, or CPU for runs on it.
    pub device: String,
    pub on_gpu: bool,
    /// Lapidary first, then by label.
    pub results: Vec<ResultFile>,
    /// Runs of ablations.
    pub ablations: Vec<ResultFile>,
    /// Systems that could not run.
    pub failed: Vec<ResultFile>,
    pub reference: Option<ResultFile>,
}

#[derive(Clone, Debug, Default)]
pub struct Input {
    pub sources: Vec<SourceFile>,
    pub groups: Vec<Group>,
    /// Sessions with peers.
    pub peers: Vec<Group>,
    /// Quantized forms in several systems on the CPU.
    pub side_by_side: Vec<Sourced<SideBySide>>,
    pub serving: Vec<Sourced<Serving>>,
    pub conversions: Vec<Sourced<Conversion>>,
    pub quality: Vec<Sourced<Perplexity>>,
    /// JSON of other forms, for other pages.
    pub others: Vec<SourceId>,
}

#[derive(Debug, thiserror::Error)]
pub enum InputError {
    #[error(transparent)]
    Result(#[from] ResultError),
    #[error(transparent)]
    Conversion(#[from] ConversionError),
    #[error(transparent)]
    Quality(#[from] PerplexityResultError),
    #[error("{}: {message}", path.display())]
    File { path: PathBuf, message: String },
    /// Figures that must not be compared.
    #[error(
        "{} and {} are both of {model} in {dtype}, but not of the same {what}: they cannot be compared",
        first.display(), second.display()
    )]
    Different {
        first: PathBuf,
        second: PathBuf,
        model: String,
        dtype: String,
        what: &'static str,
    },
    #[error("{} and {} are both called {label:?} in one table", first.display(), second.display())]
    SameLabel {
        first: PathBuf,
        second: PathBuf,
        label: String,
    },
}

impl Help for InputError {
    fn fault(&self) -> Fault {
        match self {
            InputError::Conversion(error) => error.fault(),
            _ => Fault::Input,
        }
    }

    fn help(&self) -> Option<String> {
        let help = match self {
            InputError::Result(error) => return error.help(),
            InputError::Conversion(error) => return error.help(),
            InputError::Quality(error) => return error.help(),
            InputError::File { .. } => return None,
            InputError::Different { .. } => {
                "report them separately, give them different --model-name, or measure again with the same"
            }
            InputError::SameLabel { .. } => "measure again with another --label, or leave one of them out",
        };
        Some(help.to_string())
    }
}

impl Input {
    /// Reads everything. `packages` are folders, or files with a conversion.
    pub fn read(results: &[PathBuf], packages: &[PathBuf]) -> Result<Input, InputError> {
        let mut input = Input::default();
        let mut documents = Vec::new();
        for path in results {
            let bytes = std::fs::read(path).map_err(|e| file_error(path, e))?;
            let text = String::from_utf8(bytes).map_err(|_| file_error(path, "is not text"))?;
            match bench::parse(path, &text) {
                Ok(document) => {
                    let what = format!(
                        "{}, {} {}",
                        document.system.label, document.model.name, document.model.dtype
                    );
                    let source = input.source(path, text.as_bytes(), what);
                    documents.push(Sourced { source, of: document });
                }
                Err(ResultError::NoSchema { .. }) => {
                    let what = "not in the bench schema; no figure is taken from it".to_string();
                    let source = input.source(path, text.as_bytes(), what);
                    input.others.push(source);
                }
                Err(ResultError::Schema { found, .. }) if found == conversion::SCHEMA => {
                    input.conversion(path, &text)?;
                }
                Err(ResultError::Schema { found, .. }) if found == serving::SCHEMA => {
                    let of = serving::parse(path, &text)?;
                    let what = format!("serving {} on {}", of.package, of.device);
                    let source = input.source(path, text.as_bytes(), what);
                    input.serving.push(Sourced { source, of });
                }
                Err(ResultError::Schema { found, .. }) if found == side_by_side::SCHEMA => {
                    let of = side_by_side::parse(path, &text)?;
                    let what = format!("quantized {} in several systems, threads: {}", of.model, of.threads);
                    let source = input.source(path, text.as_bytes(), what);
                    input.side_by_side.push(Sourced { source, of });
                }
                Err(ResultError::Schema { found, .. }) if found == quality::PERPLEXITY => {
                    let value = serde_json::from_str(&text).map_err(|e| file_error(path, e))?;
                    let found = quality::parse(path, &value)?;
                    let what = format!("perplexity of {}, {}", found.model.name, found.model.format);
                    let source = input.source(path, text.as_bytes(), what);
                    input.quality.push(Sourced { source, of: found });
                }
                Err(error) => return Err(error.into()),
            }
        }
        for path in packages {
            if path.is_dir() {
                let package = Package::open(path).map_err(ConversionError::from)?;
                let found = conversion::conversion(&package)?;
                let manifest = path.join(crate::package::MANIFEST);
                let bytes = std::fs::read(&manifest).map_err(|e| file_error(&manifest, e))?;
                let what = format!(
                    "the package {}, whose networks were lowered again to be counted",
                    found.name
                );
                let source = input.source(&manifest, &bytes, what);
                input.conversions.push(Sourced { source, of: found });
            } else {
                let text = std::fs::read_to_string(path).map_err(|e| file_error(path, e))?;
                input.conversion(path, &text)?;
            }
        }
        input.group(documents)?;
        Ok(input)
    }

    fn source(&mut self, path: &Path, bytes: &[u8], what: String) -> SourceId {
        self.sources.push(SourceFile {
            path: path.to_path_buf(),
            hash: blake3::hash(bytes).to_hex()[..12].to_string(),
            what,
        });
        SourceId(self.sources.len() - 1)
    }

    fn conversion(&mut self, path: &Path, text: &str) -> Result<(), InputError> {
        let value: Value = serde_json::from_str(text).map_err(|e| file_error(path, e))?;
        if value["schema"] != conversion::SCHEMA {
            let wanted = "is neither a package nor a conversion that `lapidary info --conversion` wrote";
            return Err(file_error(path, wanted));
        }
        let found: Conversion = serde_path_to_error::deserialize(&value)
            .map_err(|e| file_error(path, format!("{}: {}", e.path(), e.inner())))?;
        let source = self.source(
            path,
            text.as_bytes(),
            format!("what the conversion did to {}", found.name),
        );
        self.conversions.push(Sourced { source, of: found });
        Ok(())
    }

    pub fn path(&self, source: SourceId) -> &Path {
        &self.sources[source.0].path
    }

    fn group(&mut self, documents: Vec<ResultFile>) -> Result<(), InputError> {
        let (references, measured): (Vec<_>, Vec<_>) = documents.into_iter().partition(|r| is_reference(&r.of));
        let (peers, usual): (Vec<_>, Vec<_>) = measured.into_iter().partition(|r| self.is_of_peers(r));
        self.groups = self.groups_of(usual, &references, false)?;
        self.peers = self.groups_of(peers, &references, true)?;
        Ok(())
    }

    /// Whether a result is from a session that compares Lapidary with its peers.
    fn is_of_peers(&self, r: &ResultFile) -> bool {
        let stem = self.path(r.source).file_stem().unwrap_or_default().to_string_lossy();
        let comparison = r.of.system.settings.get("comparison");
        comparison.is_some_and(|c| c == "peers") || stem.split('-').any(|word| word == "peer" || word == "peers")
    }

    fn groups_of(
        &self,
        measured: Vec<ResultFile>,
        references: &[ResultFile],
        peers: bool,
    ) -> Result<Vec<Group>, InputError> {
        let mut groups: BTreeMap<(String, String, String), Group> = BTreeMap::new();
        for result in measured {
            let d = &result.of;
            let gpu = d.machine.gpu.as_ref().map(|gpu| gpu.name.clone()).filter(|_| on_gpu(d));
            let device = gpu.clone().unwrap_or_else(|| d.machine.cpu.clone());
            let dtype = if peers { String::new() } else { d.model.dtype.clone() };
            let group = groups
                .entry((d.model.name.clone(), dtype, device.clone()))
                .or_insert_with(|| Group {
                    model: d.model.name.clone(),
                    dtype: d.model.dtype.clone(),
                    peers,
                    device,
                    on_gpu: gpu.is_some(),
                    results: Vec::new(),
                    ablations: Vec::new(),
                    failed: Vec::new(),
                    reference: None,
                });
            let list = match (&d.error, d.system.settings.get("ablation")) {
                (Some(_), _) => &mut group.failed,
                (None, Some(_)) => &mut group.ablations,
                (None, None) => &mut group.results,
            };
            list.push(result);
        }
        let mut groups = with_failures_at_home(groups.into_values().collect());
        for group in &mut groups {
            // A model measured on two machines can have a reference of each one's prompts. A mismatch is refused below;
            // a session with peers may have none.
            let fits = |r: &ResultFile| {
                group
                    .all()
                    .all(|measured| group.difference(&r.of, &measured.of).is_none())
            };
            let of_model = references
                .iter()
                .filter(|r| r.of.model.name == group.model && (!peers || fits(r)));
            let reference = of_model.max_by_key(|r| (fits(r), &r.of.date)).cloned();
            group.reference = reference;
            let order = |r: &ResultFile| (r.of.system.name != "lapidary", r.of.system.label.clone());
            group.results.sort_by_key(order);
            group.ablations.sort_by_key(order);
            group.failed.sort_by_key(order);
            self.check(group)?;
        }
        Ok(groups)
    }

    /// Checks that everything in the group is comparable.
    fn check(&self, group: &Group) -> Result<(), InputError> {
        let all: Vec<&ResultFile> = group.all().collect();
        let Some(first) = all.first() else {
            return Ok(());
        };
        let path = |r: &ResultFile| self.path(r.source).to_path_buf();
        for other in &all {
            let Some(what) = group.difference(&first.of, &other.of) else {
                continue;
            };
            return Err(InputError::Different {
                first: path(first),
                second: path(other),
                model: group.model.clone(),
                dtype: group.dtype.clone(),
                what,
            });
        }
        let mut labels: BTreeMap<&str, &ResultFile> = BTreeMap::new();
        for result in group.results.iter().chain(&group.ablations) {
            if let Some(before) = labels.insert(&result.of.system.label, result) {
                return Err(InputError::SameLabel {
                    first: path(before),
                    second: path(result),
                    label: result.of.system.label.clone(),
                });
            }
        }
        Ok(())
    }
}

/// A system that could not run has no dtype: it belongs to the groups of its model.
fn with_failures_at_home(groups: Vec<Group>) -> Vec<Group> {
    let measured = |group: &Group| !group.results.is_empty() || !group.ablations.is_empty();
    let (mut homes, strays): (Vec<_>, Vec<_>) = groups.into_iter().partition(measured);
    for stray in strays {
        let same = |home: &&mut Group| home.model == stray.model && home.device == stray.device;
        match homes.iter_mut().find(same) {
            Some(home) => home.failed.extend(stray.failed),
            None => homes.push(stray),
        }
    }
    homes
}

impl Group {
    /// The group's results, with the same weights and prompts.
    fn all(&self) -> impl Iterator<Item = &ResultFile> {
        let measured = self.results.iter().chain(&self.ablations);
        measured.chain(&self.reference)
    }

    /// `llama-1b in fp16 on NVIDIA H200`
    pub fn title(&self) -> String {
        match self.peers {
            true => format!("{} beside its peers on {}", self.model, self.device),
            false => format!("{} in {} on {}", self.model, self.dtype, self.device),
        }
    }

    /// The result with which others are compared.
    pub fn ours(&self) -> Option<&ResultFile> {
        self.results.iter().find(|r| r.of.system.name == "lapidary")
    }

    /// The result with which `r` is compared: the first one of Lapidary with weights in the same format.
    pub fn ours_beside(&self, r: &ResultFile) -> Option<&ResultFile> {
        let same = |other: &&ResultFile| !self.peers || format(&other.of) == format(&r.of);
        self.results
            .iter()
            .filter(|r| r.of.system.name == "lapidary")
            .find(same)
    }

    /// Parameters of the model.
    pub fn parameters(&self) -> u64 {
        self.all().map(|r| r.of.model.parameters).max().unwrap_or(0)
    }

    /// Why the two cannot be compared. In a session with peers each system quantizes the weights itself, so their
    /// hashes differ.
    fn difference(&self, a: &Document, b: &Document) -> Option<&'static str> {
        let quantized = |d: &Document| self.peers && format(d) != d.model.dtype;
        if a.model.weights_hash != b.model.weights_hash && !quantized(a) && !quantized(b) {
            Some("weights")
        } else if a.workload.prompts != b.workload.prompts {
            Some("prompts")
        } else if a.workload.batch != b.workload.batch {
            Some("batch size")
        } else {
            None
        }
    }
}

/// Format of the weights: `int4`, `int8`, `fp8`, or the dtype of the arithmetic. By the setting `weight_bits`, the
/// system's name in tables, or the bytes that a token reads, in this order.
pub fn format(d: &Document) -> String {
    let bits = d.system.settings.get("weight_bits").and_then(Value::as_u64);
    if let Some(bits) = bits {
        return if bits < 16 {
            format!("int{bits}")
        } else {
            d.model.dtype.clone()
        };
    }
    let words = format!("{} {}", d.system.label, d.system.variant);
    if let Some(named) = ["int4", "int8", "fp8", "fp4"].into_iter().find(|f| words.contains(f)) {
        return named.to_string();
    }
    // The bytes include scales and tables that stay wide. A token reads the layers' matrices and the head.
    let head = (d.model.hidden * d.model.vocabulary) as u64;
    let read = d
        .model
        .matrix_parameters
        .map_or(d.model.parameters, |layers| layers + head);
    match 8.0 * d.model.weight_bytes_per_token as f64 / read.max(1) as f64 {
        bits if bits < 6.5 => "int4".to_string(),
        bits if bits < 11.0 => "int8".to_string(),
        _ => d.model.dtype.clone(),
    }
}

/// transformers in fp32, run only for its outputs.
fn is_reference(d: &Document) -> bool {
    d.system.name == "transformers" && d.system.variant.starts_with("fp32 reference")
}

/// A machine with a GPU may have run something on its CPU.
fn on_gpu(d: &Document) -> bool {
    d.system.settings.get("device").and_then(Value::as_str) != Some("cpu")
}

fn file_error(path: &Path, message: impl ToString) -> InputError {
    InputError::File {
        path: path.to_path_buf(),
        message: message.to_string(),
    }
}
