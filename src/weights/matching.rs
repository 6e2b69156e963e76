//! Finds the tensors of a [`WeightSource`] for the weights of a package: either all are found, with the right shapes
//! and convertible values, or one message lists all obstacles.

use std::collections::HashMap;
use std::fmt;

use super::checkpoint::has_gate;
use super::contents::Contents;
use super::form::Form;
use super::lora::Adapter;
use super::matcher::Matcher;
use super::norm_parameter::NormParameter;
use super::recipe::Recipe;
use super::source::WeightSource;
use crate::graph::Constant;
use crate::help::Help;
use crate::tensor::DType;

/// A weight of a package, as far as needed here.
#[derive(Clone, Debug)]
pub struct RequiredWeight<'a> {
    /// In the package.
    pub name: &'a str,
    /// Element type of its values.
    pub dtype: DType,
    /// Shape of its values.
    pub shape: &'a [usize],
    /// Over initializers of the export.
    pub recipe: Option<&'a Recipe>,
    /// Over modules.
    pub modules: Option<&'a Recipe>,
    /// Over the names of a checkpoint that had the same values.
    pub learned: Option<&'a Recipe>,
    /// BLAKE3 of the bytes it had, in hexadecimal; empty if it never had any.
    pub blake3: &'a str,
    /// The form of its codes; `None` if it is not quantized.
    pub form: Option<Form>,
}

/// The weights of a package, and its other properties that determine their tensors.
pub struct Required<'a> {
    /// All weights.
    pub weights: Vec<RequiredWeight<'a>>,
    /// Architecture hash of the package: a graph with the same hash has weights of the same names.
    pub architecture_hash: &'a str,
    /// BLAKE3 of the export that the package was made from: the same file has the same initializers.
    pub export_hash: &'a str,
    /// Its graph scales embeddings like Gemma's ([`super::norm_parameter`]).
    pub scales_embeddings: bool,
    /// How checkpoints of the model store norms, if the package records it.
    pub norms: Option<NormParameter>,
    /// Orders of modules whose layers take their inputs in their own order ([`super::modules::orders`]).
    pub orders: HashMap<String, Vec<i64>>,
}

/// A weight built from tensors of the source.
#[derive(Clone, Debug)]
pub struct Matched {
    /// In the weight's dtype and shape.
    pub constant: Constant,
    /// Names in the source.
    pub from: Vec<String>,
    /// Its names in checkpoints of this kind, if its values showed them.
    pub learned: Option<Recipe>,
}

/// All weights of a package, found.
#[derive(Clone, Debug)]
pub struct Found {
    /// In the package's order.
    pub weights: Vec<Matched>,
    /// How checkpoints of the model store norms, as far as known.
    pub norms: Option<NormParameter>,
}

/// A tensor that exists but does not fit.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Misfit {
    /// Name of the package.
    pub weight: String,
    /// In the source.
    pub tensor: String,
    /// What does not fit.
    pub why: String,
}

/// All obstacles to using a source as the weights of a package.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Mismatch {
    /// Its path.
    pub source: String,
    /// Missing weights, with their names in the source.
    pub missing: Vec<(String, Option<String>)>,
    /// Tensors that do not fit.
    pub misfits: Vec<Misfit>,
    /// Tensors of the source that no weight uses.
    pub extra: Vec<String>,
    /// Changes of an adapter that no weight uses.
    pub unused_changes: Vec<String>,
    /// Why it is unknown how the source stores norms.
    pub norms: Option<String>,
    /// Additional information.
    pub note: Option<String>,
}

impl std::error::Error for Mismatch {}

impl fmt::Display for Mismatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: not the weights of this package", self.source)?;
        if let Some(note) = &self.note {
            write!(f, " ({note})")?;
        }
        for (name, expected) in &self.missing {
            match expected {
                Some(expected) => write!(f, "\n  missing: {expected} (for {name})")?,
                None => write!(f, "\n  missing: {name}")?,
            }
        }
        for misfit in &self.misfits {
            write!(
                f,
                "\n  does not fit: {} for {}: {}",
                misfit.tensor, misfit.weight, misfit.why
            )?;
        }
        if let Some(why) = &self.norms {
            write!(f, "\n  norms: {why}")?;
        }
        for name in &self.extra {
            write!(f, "\n  not used: {name}")?;
        }
        for name in &self.unused_changes {
            write!(f, "\n  the adapter changes {name}, which is no module of this model")?;
        }
        Ok(())
    }
}

impl Help for Mismatch {
    fn help(&self) -> Option<String> {
        let nameless = self.missing.iter().any(|(_, expected)| expected.is_none());
        if self.norms.is_some() && self.missing.is_empty() && self.misfits.is_empty() {
            return Some(
                "put the model's config.json beside the checkpoint, or refit from the model's export".to_string(),
            );
        }
        let only_extra = self.missing.is_empty() && self.misfits.is_empty();
        let help = match only_extra && self.unused_changes.is_empty() {
            true => "if these belong to something else, such as a vision tower, use --ignore-extra",
            false if nameless => {
                "some weights are known by no name; refit once from the checkpoint that the package was made from, and \
                 their numbers tell what they are called there"
            }
            false => "give the weights of the same architecture; `lapidary weights PKG` lists what is needed",
        };
        Some(help.to_string())
    }
}

/// Finds every weight. `extra_allowed`: tensors that no weight needs are not an obstacle.
pub fn matched(
    required: &Required<'_>,
    source: &WeightSource,
    adapter: Option<&Adapter>,
    extra_allowed: bool,
) -> Result<Found, Box<Mismatch>> {
    let mut matcher = Matcher::new(required, source, adapter);
    let mut mismatch = Mismatch {
        source: source.path.display().to_string(),
        note: source.trouble().map(str::to_string),
        norms: matcher.decide_norms().err(),
        ..Mismatch::default()
    };
    let known: Vec<Result<Matched, Vec<Misfit>>> = required.weights.iter().map(|w| matcher.find(w)).collect();
    // Tensors identified otherwise are not candidates for weights identified only by values.
    let mut contents = Contents::new(&source.tensors);
    let mut found = Vec::with_capacity(required.weights.len());
    for (weight, known) in required.weights.iter().zip(known) {
        let known = match known {
            Err(misfits) if misfits.is_empty() => matcher.find_by_contents(weight, &mut contents),
            known => known,
        };
        match known {
            Ok(matched) => found.push(matched),
            Err(misfits) if misfits.is_empty() => {
                let leaf = weight
                    .modules
                    .and_then(|m| m.leaves().first().map(|l| l.name.to_string()));
                let gated = has_gate(matcher.rows());
                let expected = leaf.and_then(|module| source.expected_name(&module, gated));
                mismatch.missing.push((weight.name.to_string(), expected));
            }
            Err(misfits) => mismatch.misfits.extend(misfits),
        }
    }
    if !extra_allowed {
        mismatch.extra = matcher.extra();
    }
    mismatch.unused_changes = matcher.unused_changes();
    let fits = mismatch.missing.is_empty()
        && mismatch.misfits.is_empty()
        && mismatch.extra.is_empty()
        && mismatch.unused_changes.is_empty()
        && mismatch.norms.is_none();
    match fits {
        true => Ok(Found {
            weights: found,
            norms: matcher.known_norms(),
        }),
        false => Err(Box::new(mismatch)),
    }
}

/// Rows of every module in the weights.
pub(super) fn rows_of_modules(weights: &[RequiredWeight<'_>]) -> HashMap<String, usize> {
    let leaves = weights.iter().filter_map(|w| w.modules).flat_map(Recipe::leaves);
    leaves
        .filter_map(|leaf| Some((leaf.name.to_string(), *leaf.shape.first()?)))
        .collect()
}
