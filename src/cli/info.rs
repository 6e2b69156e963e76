//! `lapidary info`: the contents of a package, as text or as the manifest itself.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::path::PathBuf;

use super::{Failure, JsonForm, bytes, print, print_json};
use crate::package::{Manifest, Package};
use crate::report::conversion;
use crate::target::Prefill;

#[derive(clap::Args)]
pub struct Args {
    /// The package
    #[arg(value_name = "PKG")]
    package: PathBuf,
    /// Print the manifest as JSON
    #[arg(long, value_enum, value_name = "FORM", num_args = 0..=1, require_equals = true, default_missing_value = "pretty")]
    json: Option<JsonForm>,
    /// Verify the hash of every file
    #[arg(long)]
    check: bool,
    /// Print the conversion record as JSON, for `lapidary report --package` on another machine
    #[arg(long, conflicts_with = "json")]
    conversion: bool,
}

pub fn run(args: Args) -> Result<(), Failure> {
    let package = Package::open(&args.package)?;
    if args.check {
        package.check_hashes()?;
    }
    if let Some(form) = args.json {
        return print_json(&package.manifest, form);
    }
    if args.conversion {
        return print_json(&conversion::conversion(&package)?, JsonForm::Pretty);
    }
    let mut text = summary(&package.manifest);
    if args.check {
        text += "checked        all files match their hashes\n";
    }
    print(&text)
}

/// The formats of quantized weights, with the number of each.
fn forms(m: &Manifest) -> BTreeMap<String, usize> {
    let mut forms = BTreeMap::new();
    for quantized in m.weights.tensors.iter().filter_map(|w| w.quantized.as_ref()) {
        *forms.entry(quantized.to_string()).or_default() += 1;
    }
    forms
}

pub fn summary(m: &Manifest) -> String {
    let mut out = String::new();
    let mut line = |name: &str, text: String| {
        let _ = writeln!(out, "{name:<14} {text}");
    };
    let list = |items: &[usize]| items.iter().map(usize::to_string).collect::<Vec<_>>().join(", ");
    line("model", format!("{}, {}", m.source.file, m.source.exporter));
    line("architecture", m.architecture.to_string());
    line("dtype", m.dtype.to_string());
    let targets: Vec<String> = m.targets.iter().map(|t| t.to_string()).collect();
    line("targets", targets.join(", "));
    line("capacities", list(&m.capacities));
    line(
        "prefill",
        match &m.prefill {
            Prefill::Chunks(chunks) => format!("chunks of {}", list(chunks)),
            Prefill::Range(r) => format!("{} to {} tokens, optimized for {}", r.min, r.max, r.opt),
        },
    );
    let w = &m.weights;
    let shared = w.tensors.iter().filter(|t| t.same_as.is_some()).count();
    let shared = match shared {
        0 => String::new(),
        n => format!(", {n} of them share the bytes of another"),
    };
    line(
        "weights",
        format!("{} tensors, {}{shared}", w.tensors.len(), bytes(w.bytes)),
    );
    if let Some(quantization) = &m.quantization {
        let calibrated = quantization.calibration.as_ref().map_or(String::new(), |calibration| {
            let (text, tokens) = (&calibration.text, calibration.tokens);
            format!(", calibrated on {tokens} tokens of {text}")
        });
        let (format, weights) = (&quantization.format, quantization.weights);
        line("quantized", format!("{weights} weights as {format}{calibrated}"));
        for (form, count) in forms(m) {
            line("", format!("{count} of {form}"));
        }
    }
    line("weight set", w.set_hash.clone());
    match m.engines.len() {
        0 => line("engines", "none: runs on the CPU".into()),
        n => {
            let files: BTreeMap<&str, u64> = m.engines.iter().map(|e| (e.file.as_str(), e.bytes)).collect();
            let total = files.values().sum();
            line("engines", format!("{n}, {}", bytes(total)));
            for e in &m.engines {
                line(
                    "",
                    format!(
                        "{}  {}, {} weights{}, {} {}",
                        e.profile,
                        bytes(e.bytes),
                        serde_json::json!(e.weight_mode).as_str().unwrap_or_default(),
                        if e.plans.is_some() { ", decode kernels" } else { "" },
                        e.target,
                        e.tensorrt_version
                    ),
                );
            }
        }
    }
    line(
        "tokenizer",
        match &m.tokenizer {
            None => "none: prompts are token ids".into(),
            Some(t) if t.chat_template => "yes, with a chat template".into(),
            Some(_) => "yes, without a chat template".into(),
        },
    );
    let ids: Vec<usize> = m.eos_token_ids.iter().map(|id| *id as usize).collect();
    line("end tokens", if ids.is_empty() { "none".into() } else { list(&ids) });
    line(
        "made by",
        format!("lapidary {}, format {}", m.lapidary_version, m.format_version),
    );
    out
}
