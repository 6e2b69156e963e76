//! `lapidary weights`: lists every weight of a package, and checks whether other weights fit.

use std::path::{Path, PathBuf};

use serde_json::json;

use super::table::Table;
use super::{Failure, JsonForm, bytes, print, print_json, refit};
use crate::package::manifest::{Manifest, WeightEntry};
use crate::package::{self, Package};
use crate::weights::export::{Format, export};
use crate::weights::lora::Adapter;
use crate::weights::recipe::Recipe;

#[derive(clap::Args)]
pub struct Args {
    /// The package
    #[arg(value_name = "PKG")]
    package: PathBuf,
    /// Check whether these weights fit, and whether they are the same: an ONNX export, safetensors, a Hugging Face folder or a
    /// package
    #[arg(long, value_name = "FILE_OR_DIR")]
    check: Option<PathBuf>,
    /// With --check: merge this LoRA adapter first
    #[arg(long, value_name = "DIR", requires = "check")]
    lora: Option<PathBuf>,
    /// With --check: ignore tensors that the package does not use
    #[arg(long, requires = "check")]
    ignore_extra: bool,
    /// Export the weights as a safetensors checkpoint (with config.json for TensorRT-LLM)
    #[arg(long, value_name = "DIR", conflicts_with = "check")]
    export: Option<PathBuf>,
    /// Tensor names of the exported checkpoint
    #[arg(long, value_name = "FORMAT", requires = "export", default_value = "hugging-face",
          value_parser = ["hugging-face", "gpt2", "tensorrt-llm"])]
    format: String,
    /// Print one JSON document
    #[arg(long, value_enum, value_name = "FORM", num_args = 0..=1, require_equals = true, default_missing_value = "pretty")]
    json: Option<JsonForm>,
}

pub fn run(args: Args) -> Result<(), Failure> {
    let package = Package::open(&args.package)?;
    if let Some(from) = &args.check {
        return check(&args, &package, from);
    }
    if let Some(folder) = &args.export {
        return write_checkpoint(&args, &package, folder);
    }
    let manifest = &package.manifest;
    if let Some(form) = args.json {
        let weights: Vec<_> = manifest.weights.tensors.iter().map(|w| document(w, manifest)).collect();
        return print_json(
            &json!({
                "architecture_hash": manifest.architecture_hash,
                "set_hash": manifest.weights.set_hash,
                "stripped": manifest.weights.stripped,
                "refit": manifest.weights.refit,
                "weights": weights,
            }),
            form,
        );
    }
    let mut table = Table::new(["name", "module", "source name", "dtype", "shape", "hash", "bytes", ""]);
    for w in &manifest.weights.tensors {
        let turned = w.recipe.as_ref().is_some_and(|r| r.is_transposed());
        let source = w.source_name.clone().unwrap_or_default();
        table.row([
            w.name.clone(),
            called(w),
            if turned {
                format!("{source} (transposed)")
            } else {
                source
            },
            match &w.quantized {
                Some(format) => format!("{} of {format}", w.dtype),
                None => w.dtype.to_string(),
            },
            format!("{:?}", w.shape),
            w.blake3.get(..12).unwrap_or_default().to_string(),
            w.bytes.to_string(),
            if manifest.weights.stripped {
                "missing"
            } else {
                "present"
            }
            .to_string(),
        ]);
    }
    let mut text = table.render();
    text += &format!(
        "{} weights, {}; weight set {}\n",
        manifest.weights.tensors.len(),
        bytes(manifest.weights.bytes),
        manifest.weights.set_hash
    );
    if let Some(record) = &manifest.weights.refit {
        let lora = record
            .lora
            .as_ref()
            .map(|l| format!(" with the adapter {l}"))
            .unwrap_or_default();
        text += &format!("refitted from {} ({}){lora}\n", record.source, record.kind);
    }
    print(&text)
}

fn modules(weight: &WeightEntry) -> Vec<String> {
    weight.modules.as_ref().map(names).unwrap_or_default()
}

fn names(recipe: &Recipe) -> Vec<String> {
    recipe.leaves().iter().map(|leaf| leaf.name.to_string()).collect()
}

/// Names in one line; those of experts, which differ in a number, as one.
fn joined(recipe: &Recipe) -> String {
    const EXPERTS: &str = ".experts.";
    let names = names(recipe);
    let general = |name: &str| {
        let (before, rest) = name.split_once(EXPERTS)?;
        let (_, part) = rest.split_once('.')?;
        Some(format!("{before}{EXPERTS}*.{part}"))
    };
    match names.first().and_then(|name| general(name)) {
        Some(first) if names.len() > 1 && names.iter().all(|name| general(name).as_ref() == Some(&first)) => {
            format!("{first} ({})", names.len())
        }
        _ => names.join(" + "),
    }
}

/// Its modules, or the name found by its values.
fn called(weight: &WeightEntry) -> String {
    match (&weight.modules, &weight.learned) {
        (None, Some(learned)) => format!("({})", joined(learned)),
        (modules, _) => modules.as_ref().map(joined).unwrap_or_default(),
    }
}

fn document(weight: &WeightEntry, manifest: &Manifest) -> serde_json::Value {
    json!({
        "name": weight.name,
        "source_name": weight.source_name,
        "modules": modules(weight),
        "learned": weight.learned.as_ref().map(names),
        "dtype": weight.dtype,
        "shape": weight.shape,
        "quantized": weight.quantized,
        "transposed": weight.recipe.as_ref().is_some_and(|r| r.is_transposed()),
        "blake3": weight.blake3,
        "bytes": weight.bytes,
        "file": manifest.weights.file,
        "offset": weight.offset,
        "same_as": weight.same_as,
        "present": !manifest.weights.stripped,
        "engines": weight.engines,
    })
}

/// Exit status 0: they fit; the text states whether they are the same.
fn check(args: &Args, package: &Package, from: &Path) -> Result<(), Failure> {
    let source = refit::open(from, package)?;
    let adapter = args.lora.as_deref().map(Adapter::open).transpose()?;
    let weights = &package.manifest.weights;
    let found = package::find_weights(package, &source, adapter.as_ref(), args.ignore_extra)?.weights;
    let different = package::differing_weights(weights, &found)?;
    if let Some(form) = args.json {
        let from: Vec<_> = weights
            .tensors
            .iter()
            .zip(&found)
            .map(|(w, m)| json!({"name": w.name, "from": m.from}))
            .collect();
        return print_json(
            &json!({
                "kind": source.kind, "fits": true, "identical": different.is_empty(), "weights": from,
                "different": different.iter().map(|d| &d.name).collect::<Vec<_>>(),
                "transposed": different.iter().filter(|d| d.transposed).map(|d| &d.name).collect::<Vec<_>>(),
            }),
            form,
        );
    }
    let of = weights.tensors.len();
    print(&match different.len() {
        0 => format!(
            "{} ({}): all {of} weights are present and equal the package's\n",
            from.display(),
            source.kind
        ),
        n => format!(
            "{} ({}): all {of} weights are present and fit; {n} differ from the package's, for example {}{}\n",
            from.display(),
            source.kind,
            different[0].name,
            package::transposed_note(&different)
        ),
    })
}

fn write_checkpoint(args: &Args, package: &Package, folder: &Path) -> Result<(), Failure> {
    let format = match args.format.as_str() {
        "tensorrt-llm" => Format::TensorRtLlm,
        "gpt2" => Format::Gpt2,
        _ => Format::HuggingFace,
    };
    package.check_present()?;
    let graph = package.architecture()?;
    let weights = package.weights_of(&graph)?;
    let manifest = &package.manifest;
    let written = export(&weights, &graph, &manifest.architecture, manifest.norms, format, folder)?;
    print(&format!("wrote {} tensors to {}\n", written, folder.display()))
}
