//! Which tensors of a [`WeightSource`] make which weights of a package: every one is found, with the right shape and numbers
//! that can be converted, or the one message says what all the obstacles are.

use std::collections::{BTreeSet, HashMap};
use std::fmt;

use super::checkpoint::has_gate;
use super::contents::Contents;
use super::lora::{Adapter, Change};
use super::recipe::{Leaf, Recipe};
use super::source::WeightSource;
use crate::graph::Constant;
use crate::help::Help;
use crate::tensor::DType;

/// A weight of a package, as far as it matters here.
#[derive(Clone, Copy, Debug)]
pub struct RequiredWeight<'a> {
    /// In the package.
    pub name: &'a str,
    /// Of its values.
    pub dtype: DType,
    /// Of its values.
    pub shape: &'a [usize],
    /// Over initializers of the export.
    pub recipe: Option<&'a Recipe>,
    /// Over modules.
    pub modules: Option<&'a Recipe>,
    /// Over the names of a checkpoint that held the same numbers once.
    pub learned: Option<&'a Recipe>,
    /// Of the bytes it had, in hexadecimal; empty if it never had any.
    pub blake3: &'a str,
}

/// How a weight was found.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum FoundBy {
    /// By what it is in the model.
    Module,
    /// By the name that was learned from an earlier checkpoint's numbers.
    Learned,
    /// By the name it had in the export.
    Name,
    /// By its numbers: those the package had.
    Contents,
}

/// A weight made of tensors of the source.
#[derive(Clone, Debug)]
pub struct Matched {
    /// In the weight's dtype and shape.
    pub constant: Constant,
    /// Names in the source.
    pub from: Vec<String>,
    /// The names that checkpoints of this kind have for it, where its numbers showed them.
    pub learned: Option<Recipe>,
}

/// A tensor that is there and does not fit.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Misfit {
    /// Of the package.
    pub weight: String,
    /// In the source.
    pub tensor: String,
    /// What does not fit.
    pub why: String,
}

/// Everything that keeps a source from being the weights of a package.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Mismatch {
    /// Its path.
    pub source: String,
    /// Weights, with what the source would call them.
    pub missing: Vec<(String, Option<String>)>,
    /// Tensors that do not fit.
    pub misfits: Vec<Misfit>,
    /// Tensors of the source that no weight is made of.
    pub extra: Vec<String>,
    /// Changes of an adapter that no weight takes.
    pub unused_changes: Vec<String>,
    /// What else is known.
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

/// Finds every weight. `extra_allowed`: tensors that no weight needs are no obstacle.
pub fn matched(
    required: &[RequiredWeight<'_>],
    source: &WeightSource,
    adapter: Option<&Adapter>,
    extra_allowed: bool,
) -> Result<Vec<Matched>, Box<Mismatch>> {
    let leaves = required.iter().filter_map(|w| w.modules).flat_map(Recipe::leaves);
    let rows: HashMap<String, usize> = leaves
        .filter_map(|leaf| Some((leaf.name.to_string(), *leaf.shape.first()?)))
        .collect();
    let mut matcher = Matcher {
        source,
        adapter,
        rows,
        used: BTreeSet::new(),
        by_contents: BTreeSet::new(),
        used_modules: BTreeSet::new(),
        changed: BTreeSet::new(),
    };
    let mut mismatch = Mismatch {
        source: source.path.display().to_string(),
        note: source.trouble().map(str::to_string),
        ..Mismatch::default()
    };
    let known: Vec<Result<Matched, Vec<Misfit>>> = required.iter().map(|weight| matcher.find(weight)).collect();
    // What is known otherwise is no candidate for what is known by its numbers alone.
    let mut contents = Contents::new(&source.tensors);
    let mut found = Vec::with_capacity(required.len());
    for (weight, known) in required.iter().zip(known) {
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
                let gated = has_gate(&matcher.rows);
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
        && mismatch.unused_changes.is_empty();
    if fits { Ok(found) } else { Err(Box::new(mismatch)) }
}

struct Matcher<'a> {
    source: &'a WeightSource,
    adapter: Option<&'a Adapter>,
    rows: HashMap<String, usize>,
    used: BTreeSet<String>,
    by_contents: BTreeSet<String>,
    used_modules: BTreeSet<String>,
    changed: BTreeSet<String>,
}

impl Matcher<'_> {
    /// The weight, or what does not fit; nothing if there is nothing.
    fn find(&mut self, weight: &RequiredWeight<'_>) -> Result<Matched, Vec<Misfit>> {
        let mut misfits = Vec::new();
        // What a tensor does in a model is surer than what it is called: two exporters can give one name to a matrix and
        // to its transpose.
        let ways = [
            (FoundBy::Module, weight.modules),
            (FoundBy::Learned, weight.learned),
            (FoundBy::Name, weight.recipe),
        ];
        for (found_by, recipe) in ways {
            let Some(recipe) = recipe else { continue };
            let mut from = Vec::new();
            let mut wrong = Vec::new();
            let mut lookup = |leaf: Leaf<'_>| {
                let (name, constant) = self.lookup(found_by, leaf)?;
                if let Some(why) = misfit(leaf, &constant, recipe.has_codes()) {
                    wrong.push(Misfit {
                        weight: weight.name.to_string(),
                        tensor: name,
                        why,
                    });
                    return None;
                }
                from.push(name);
                Some(constant)
            };
            if let Some(constant) = recipe.apply(&mut lookup) {
                debug_assert_eq!(constant.shape(), weight.shape, "{}", weight.name);
                self.used.extend(from.iter().cloned());
                return Ok(Matched {
                    constant: constant.cast(weight.dtype),
                    from,
                    learned: None,
                });
            }
            if misfits.is_empty() {
                misfits = wrong;
            }
        }
        Err(misfits)
    }

    /// The weight of the tensor that holds its numbers, if there is one and no more.
    fn find_by_contents(
        &mut self,
        weight: &RequiredWeight<'_>,
        contents: &mut Contents<'_>,
    ) -> Result<Matched, Vec<Misfit>> {
        // What ought to be there by its name is missing, even if the same numbers are there under another.
        if weight.blake3.is_empty() || weight.modules.is_some() && self.source.knows_modules() {
            return Err(Vec::new());
        }
        let mut held = contents.holding(weight.dtype, weight.shape, weight.blake3);
        held.retain(|held| !self.used.contains(&held.name) || self.by_contents.contains(&held.name));
        let [held] = &held[..] else {
            let names: Vec<&str> = held.iter().map(|held| held.name.as_str()).collect();
            // Two tensors of the same numbers will not stay the same in a fine-tune: nothing is guessed.
            let ambiguous = (!names.is_empty()).then(|| Misfit {
                weight: weight.name.to_string(),
                tensor: names.join(", "),
                why: "all of them hold its numbers, so which of them it is cannot be known".to_string(),
            });
            return Err(ambiguous.into_iter().collect());
        };
        let recipe = contents.recipe(held);
        let constant = recipe.apply(&mut |leaf| Some(self.lookup(FoundBy::Contents, leaf)?.1));
        let constant = constant.expect("it was read when it was hashed");
        self.used.insert(held.name.clone());
        self.by_contents.insert(held.name.clone());
        Ok(Matched {
            constant: constant.cast(weight.dtype),
            from: vec![held.name.clone()],
            // Names in a graph are its own; those of a checkpoint are those of the next.
            learned: (!self.source.is_graph()).then_some(recipe),
        })
    }

    fn lookup(&mut self, found_by: FoundBy, leaf: Leaf<'_>) -> Option<(String, Constant)> {
        if found_by == FoundBy::Name {
            // An adapter speaks of modules, and would be lost.
            let constant = self.source.tensors.get(leaf.name).filter(|_| self.adapter.is_none())?;
            return Some((leaf.name.to_string(), constant.clone()));
        }
        if found_by == FoundBy::Learned || found_by == FoundBy::Contents {
            let constant = self.source.tensors.get(leaf.name)?;
            let change = self.adapter.and_then(|a| a.change_of(leaf.name));
            return Some((leaf.name.to_string(), self.changed(constant, change)));
        }
        let found = self.source.module(leaf.name, &self.rows);
        // A head that is not there is the embedding: that is how tied models are saved.
        let (name, constant) = match (found, leaf.name) {
            (None, "head.weight") => self.source.module("embedding.weight", &self.rows)?,
            (found, _) => found?,
        };
        self.used_modules.insert(leaf.name.to_string());
        let change = self.adapter.and_then(|a| a.change(leaf.name, &self.rows));
        Some((name, self.changed(&constant, change)))
    }

    /// With an adapter's change, given with its layer. One of another shape stays unused, which is an obstacle of its own.
    fn changed(&mut self, constant: &Constant, change: Option<(String, Change)>) -> Constant {
        match change {
            Some((target, change)) if constant.shape() == change.shape() => {
                self.changed.insert(target);
                change.merged(constant)
            }
            _ => constant.clone(),
        }
    }

    fn extra(&self) -> Vec<String> {
        if self.source.is_graph() {
            let modules = self.source.modules();
            let unused = modules.filter(|(name, _)| !self.used_modules.contains(*name));
            return self.without_tied_head(unused.map(|(name, c)| (name.to_string(), c)));
        }
        if self.source.trouble().is_some() {
            return Vec::new();
        }
        let unused = self.source.tensors.iter().filter(|(name, c)| {
            // Buffers that checkpoints carry and no model needs: rotary frequencies, causal masks, position numbers.
            let buffer = ["rotary_emb.inv_freq", ".attn.masked_bias", ".position_ids"];
            let is_buffer = !c.dtype().is_float()
                || buffer.iter().any(|suffix| name.ends_with(suffix))
                || (name.ends_with(".attn.bias") && c.shape().len() == 4);
            !is_buffer && !self.used.contains(*name)
        });
        self.without_tied_head(unused.map(|(name, c)| (name.clone(), c)))
    }

    /// A head of its own may stand beside a tied embedding if it holds the same numbers.
    fn without_tied_head<'c>(&self, unused: impl Iterator<Item = (String, &'c Constant)>) -> Vec<String> {
        let embedding = self.source.module("embedding.weight", &self.rows).map(|(_, c)| c);
        let same = |head: &Constant| {
            let (a, b) = (head.materialize().ok()?, embedding.as_ref()?.materialize().ok()?);
            Some(a.shape() == b.shape() && a.dtype() == b.dtype() && a.data() == b.data())
        };
        unused
            .filter(|(name, c)| !(name.starts_with("lm_head") || name == "head.weight") || same(c) != Some(true))
            .map(|(name, _)| name)
            .collect()
    }

    fn unused_changes(&self) -> Vec<String> {
        let targets = self.adapter.map(Adapter::targets).unwrap_or_default();
        targets.into_iter().filter(|t| !self.changed.contains(t)).collect()
    }
}

/// Why a tensor cannot be the leaf of a recipe; `of_codes`: the recipe makes a quantized weight.
fn misfit(leaf: Leaf<'_>, constant: &Constant, of_codes: bool) -> Option<String> {
    let shape = constant.shape();
    if shape != leaf.shape {
        let transposed = shape.iter().rev().eq(leaf.shape) && shape.len() == 2;
        let hint = if transposed { ", the transpose of it" } else { "" };
        return Some(format!("its shape is {shape:?}{hint}, it must be {:?}", leaf.shape));
    }
    // Floats convert among themselves, and integers; codes mean nothing in another type.
    let stored_only = leaf.dtype.is_storage_only() || constant.dtype().is_storage_only();
    let unlike = match stored_only || of_codes && !leaf.dtype.is_float() {
        true => leaf.dtype != constant.dtype(),
        false => leaf.dtype.is_float() != constant.dtype().is_float(),
    };
    unlike.then(|| format!("its numbers are {}, and must be {}", constant.dtype(), leaf.dtype))
}
