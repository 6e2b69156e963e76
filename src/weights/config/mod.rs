//! Compares the `config.json` of a checkpoint with a package's computation.
//!
//! Names and shapes do not show whether weights were trained for another rotary base, epsilon, activation or window:
//! two versions of Mistral 7B have tensors of equal shapes, but different bases and windows. The configuration has
//! these values, so [`check`] compares it with the package's canonical graph and refuses contradictions. Hugging Face's
//! files are read by [`hugging_face`], those of TensorRT-LLM by [`tensorrt_llm`]; [`facts`] has the package's side,
//! [`rope`] the rotary tables.
//!
//! Only known fields are compared. A missing or null field contradicts nothing, except where null means "none" in the
//! model's library. For an ONNX export or a package the graph has all information, so a configuration beside it is not
//! read.

mod facts;
mod graphs;
mod hugging_face;
mod rope;
mod tensorrt_llm;

use std::collections::BTreeMap;
use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

use self::facts::Facts;
use super::source::WeightSource;
use crate::graph::{Constant, Graph};
use crate::help::Help;
use crate::passes::Architecture;

/// The file's name, in both formats.
pub const CONFIG: &str = "config.json";

/// A field of a configuration that contradicts the package.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Difference {
    /// Its name in the file.
    pub field: String,
    /// The value in the file.
    pub file: String,
    /// The package's value.
    pub package: String,
}

/// A configuration that cannot be read, or contradicts the package.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The system refused.
    #[error("{}: {source}", path.display())]
    Io {
        /// Path of the file.
        path: PathBuf,
        /// The system's error.
        source: std::io::Error,
    },
    /// It is not a JSON object.
    #[error("{}: not a valid configuration: {source}", path.display())]
    Invalid {
        /// Path of the file.
        path: PathBuf,
        /// Where.
        source: serde_json::Error,
    },
    /// It describes another model.
    #[error("{}: the weights are for a different model than the package's{}", path.display(), list(differences))]
    Contradiction {
        /// Path of the file.
        path: PathBuf,
        /// At least one.
        differences: Vec<Difference>,
    },
}

impl ConfigError {
    /// Whether only facts implied by its `model_type` differ, not its fields.
    pub fn is_of_the_model_type(&self) -> bool {
        match self {
            ConfigError::Contradiction { differences, .. } => differences.iter().all(|d| d.field == "model_type"),
            ConfigError::Io { .. } | ConfigError::Invalid { .. } => false,
        }
    }
}

fn list(differences: &[Difference]) -> String {
    let line = |d: &Difference| format!("\n  {}: {} in the file, {} in the package", d.field, d.file, d.package);
    differences.iter().map(line).collect()
}

impl Help for ConfigError {
    fn help(&self) -> Option<String> {
        match self {
            ConfigError::Io { .. } => None,
            ConfigError::Invalid { .. } => Some("correct it, or take it out of the folder".to_string()),
            ConfigError::Contradiction { .. } => Some(
                "convert an export of that model; if it is the file that is wrong, correct it or take it out of the folder"
                    .to_string(),
            ),
        }
    }
}

/// Refuses a checkpoint whose configuration, or an export or package whose graph, contradicts the package of this typed
/// canonical graph. `capacity`: maximum positions of the package; a window that is not shorter is ignored.
pub fn check(
    source: &WeightSource,
    graph: &Graph,
    architecture: &Architecture,
    capacity: Option<usize>,
) -> Result<(), ConfigError> {
    if let Some((their_graph, their_architecture)) = source.graph() {
        // Windows are not compared, since some exporters drop them.
        let theirs = Facts::of(their_graph, their_architecture, capacity);
        let differences = graphs::compare(&theirs, &Facts::of(graph, architecture, capacity));
        let path = source.path.clone();
        return match differences.is_empty() {
            true => Ok(()),
            false => Err(ConfigError::Contradiction { path, differences }),
        };
    }
    // An export whose structure was not recognized.
    if source.trouble().is_some() {
        return Ok(());
    }
    let path = beside(&source.path);
    let text = match fs::read_to_string(&path) {
        Ok(text) => text,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(()),
        Err(source) => return Err(ConfigError::Io { path, source }),
    };
    let fields: Map<String, Value> = match serde_json::from_str(&text) {
        Ok(fields) => fields,
        Err(source) => return Err(ConfigError::Invalid { path, source }),
    };
    let facts = Facts::of(graph, architecture, capacity);
    let differences = compare(&fields, &facts, &source.tensors);
    match differences.is_empty() {
        true => Ok(()),
        false => Err(ConfigError::Contradiction { path, differences }),
    }
}

fn beside(source: &Path) -> PathBuf {
    match source.is_dir() {
        true => source.join(CONFIG),
        false => source.with_file_name(CONFIG),
    }
}

fn compare(fields: &Map<String, Value>, facts: &Facts, tensors: &BTreeMap<String, Constant>) -> Vec<Difference> {
    // What TensorRT-LLM calls `architecture`, Hugging Face calls `model_type` and `architectures`.
    let of_tensorrt_llm = fields.contains_key("architecture") && !fields.contains_key("model_type");
    match of_tensorrt_llm {
        true => tensorrt_llm::compare(fields, facts),
        false => hugging_face::compare(fields, facts, tensors),
    }
}

/// A configuration being compared.
struct Comparison<'a> {
    fields: &'a Map<String, Value>,
    differences: Vec<Difference>,
}

impl<'a> Comparison<'a> {
    fn new(fields: &'a Map<String, Value>) -> Self {
        Comparison {
            fields,
            differences: Vec::new(),
        }
    }

    /// A field that exists and is not null.
    fn value(&self, name: &str) -> Option<&'a Value> {
        self.fields.get(name).filter(|value| !value.is_null())
    }

    fn number(&self, name: &str) -> Option<f64> {
        self.value(name)?.as_f64()
    }

    fn text(&self, name: &str) -> Option<&'a str> {
        self.value(name)?.as_str()
    }

    fn flag(&self, name: &str) -> Option<bool> {
        self.value(name)?.as_bool()
    }

    fn differs(&mut self, field: &str, file: impl fmt::Display, package: impl fmt::Display) {
        self.differences.push(Difference {
            field: field.to_string(),
            file: file.to_string(),
            package: package.to_string(),
        });
    }

    /// Compares a size under any of these names; nothing if either side lacks it.
    fn size(&mut self, names: &[&str], package: Option<usize>) {
        let Some(package) = package else { return };
        for name in names {
            if let Some(file) = self.number(name)
                && file != package as f64
            {
                self.differs(name, file, package);
            }
        }
    }

    /// Compares a factor; relative errors up to `tolerance` count as rounding.
    fn factor(&mut self, name: &str, file: f64, package: f64, tolerance: f64) {
        let same = (file - package).abs() <= tolerance * file.abs().max(package.abs());
        if !same {
            self.differs(name, shown(file), shown(package));
        }
    }

    /// Compares the epsilon of norms, which half precision may have rounded.
    fn epsilon(&mut self, name: &str, package: &[f64]) {
        let Some(file) = self.number(name) else { return };
        let rounded = [
            file,
            half::f16::from_f64(file).to_f64(),
            half::bf16::from_f64(file).to_f64(),
        ];
        let same = |found: f64| rounded.iter().any(|r| (found - r).abs() <= 1e-3 * r.abs());
        if let Some(other) = package.iter().find(|found| !same(**found)) {
            self.differs(name, shown(file), shown(*other));
        }
    }

    /// Compares an optional size, which is `None` if the package does not have it.
    fn optional(&mut self, name: &str, file: Option<f64>, package: Option<f64>) {
        let same = match (file, package) {
            (Some(file), Some(package)) => (file - package).abs() <= 1e-3 * file.abs(),
            (file, package) => file.is_none() && package.is_none(),
        };
        if !same {
            let text = |value: Option<f64>| value.map_or("none".to_string(), shown);
            self.differs(name, text(file), text(package));
        }
    }
}

/// Without the additional digits of fp32.
fn shown(value: f64) -> String {
    let rounded: f64 = format!("{value:.5e}").parse().expect("a number that was just written");
    match rounded != 0.0 && !(1e-4..1e15).contains(&rounded.abs()) {
        true => format!("{rounded:e}"),
        false => rounded.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_shown_without_the_digits_of_fp32() {
        assert_eq!(shown(f64::from(1e-5f32)), "1e-5");
        assert_eq!(shown(f64::from(0.1f32)), "0.1");
        assert_eq!(shown(0.0), "0");
        assert_eq!(shown(10000.0), "10000");
        assert_eq!(shown(f64::from(1e-6f32)), "1e-6");
    }

    #[test]
    fn epsilons_may_be_rounded() {
        let fields: Map<String, Value> = serde_json::from_str(r#"{"e": 1e-6, "n": null}"#).unwrap();
        let differs = |name: &str, package: f64| {
            let mut compared = Comparison::new(&fields);
            compared.epsilon(name, &[package]);
            !compared.differences.is_empty()
        };
        assert!(!differs("e", f64::from(1e-6f32)));
        assert!(!differs("e", half::f16::from_f64(1e-6).to_f64()));
        assert!(differs("e", 1e-5));
        assert!(!differs("n", 1e-5) && !differs("missing", 1e-5));
    }
}
