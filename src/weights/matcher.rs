//! The search for the tensors of each weight: by the same graph, by modules, by learned names, by names in the export,
//! and finally by values.

use std::collections::{BTreeSet, HashMap};

use super::content_hash;
use super::contents::Contents;
use super::form::{self, conformed};
use super::lora::{Adapter, Change};
use super::matching::{Matched, Misfit, Required, RequiredWeight, rows_of_modules};
use super::model::{LeafError, ModelWeight, NameKind, holds_the_same};
use super::modules::{is_norm_factor, is_norm_weight};
use super::norm_parameter::{NormParameter, is_lost};
use super::recipe::{Leaf, Recipe};
use super::source::WeightSource;
use crate::graph::Constant;
use crate::tensor::DType;

pub(super) struct Matcher<'a> {
    required: &'a Required<'a>,
    source: &'a WeightSource,
    adapter: Option<&'a Adapter>,
    rows: HashMap<String, usize>,
    norms: NormParameter,
    /// How the source stores norms, if known.
    known_norms: Option<NormParameter>,
    /// Names of tensors, or of weights if the source is a graph.
    used: BTreeSet<String>,
    by_contents: BTreeSet<String>,
    used_modules: BTreeSet<String>,
    /// Weights of a graph that were used.
    used_weights: BTreeSet<String>,
    changed: BTreeSet<String>,
    /// The last tensor is the right one, and must not be replaced by one with another name.
    is_final: bool,
}

/// A tensor of the source, or why none is usable.
type Found = Result<Option<(String, Constant)>, (String, String)>;

impl<'a> Matcher<'a> {
    pub fn new(required: &'a Required<'a>, source: &'a WeightSource, adapter: Option<&'a Adapter>) -> Matcher<'a> {
        Matcher {
            required,
            source,
            adapter,
            rows: rows_of_modules(&required.weights),
            norms: NormParameter::Factor,
            known_norms: None,
            used: BTreeSet::new(),
            by_contents: BTreeSet::new(),
            used_modules: BTreeSet::new(),
            used_weights: BTreeSet::new(),
            changed: BTreeSet::new(),
            is_final: false,
        }
    }

    /// Rows of every module.
    pub fn rows(&self) -> &HashMap<String, usize> {
        &self.rows
    }

    /// Determines how the source stores norms whose recipe shows no addend. An error explains why that is unknown.
    pub fn decide_norms(&mut self) -> Result<(), String> {
        let factors: Vec<(&RequiredWeight<'_>, &Recipe)> = self
            .required
            .weights
            .iter()
            .filter_map(|w| Some((w, w.modules.filter(|m| is_norm_factor(m) && !m.is_arithmetic())?)))
            .collect();
        if self.source.is_graph() || factors.is_empty() || !self.source.knows_modules() {
            return Ok(());
        }
        let lost = factors.iter().any(|(weight, _)| {
            let names = weight.recipe.map(Recipe::leaves).unwrap_or_default();
            names.iter().any(|leaf| is_lost(leaf.name))
        });
        let may_add_one = lost || self.required.scales_embeddings;
        let said = match (self.source.norms, self.required.norms) {
            (Some(source), Some(package)) if source != package => {
                Err("its config.json and the package's own differ: one \
                 names a model whose norms multiply by 1 + w, the other one whose norms multiply by w")
            }
            (source, package) => Ok(source.or(package)),
        };
        let by_name = match said {
            Ok(Some(NormParameter::FactorMinusOne)) if !may_add_one => {
                Err("its config.json names a model whose norms \
                 multiply by 1 + w, and the norms of this package's export, by their names, hold w")
            }
            Ok(None) if may_add_one => Err(
                "whether it holds w or 1 + w cannot be known without its config.json: the \
                 export may have computed the sum",
            ),
            Ok(said) => Ok(said.unwrap_or(NormParameter::Factor)),
            Err(why) => Err(why),
        };
        self.norms = match by_name {
            Ok(norms) => norms,
            Err(why) => self.norms_by_contents(&factors).ok_or_else(|| why.to_string())?,
        };
        if by_name.is_err() || said.is_ok_and(|said| said.is_some()) {
            self.known_norms = Some(self.norms);
        }
        Ok(())
    }

    /// How checkpoints store norms, as far as known.
    pub fn known_norms(&self) -> Option<NormParameter> {
        self.known_norms.or(self.required.norms)
    }

    /// How the source stores norms, if one of them has the same numbers as the package's.
    fn norms_by_contents(&self, factors: &[(&RequiredWeight<'_>, &Recipe)]) -> Option<NormParameter> {
        factors.iter().find_map(|(weight, recipe)| {
            let module = recipe.leaves().first()?.name.to_string();
            let (_, constant) = self.source.module(&module, &self.rows).ok()??;
            let hash = |constant: &Constant| content_hash(&constant.cast(weight.dtype)).ok();
            let same = |constant: &Constant| hash(constant).as_deref() == Some(weight.blake3);
            match (same(&constant), same(&plus_one(&constant))) {
                (true, false) => Some(NormParameter::Factor),
                (false, true) => Some(NormParameter::FactorMinusOne),
                _ => None,
            }
        })
    }

    /// The weight, or what does not fit; `None` if there is no tensor.
    pub fn find(&mut self, weight: &RequiredWeight<'_>) -> Result<Matched, Vec<Misfit>> {
        if let Some(matched) = self.find_in_the_same_graph(weight) {
            return Ok(matched);
        }
        let mut misfits = Vec::new();
        // A tensor's role in a model is more reliable than its name: two exporters can use one name for a matrix and
        // for its transpose.
        let ways = [
            (NameKind::Module, weight.modules),
            (NameKind::Learned, weight.learned),
            (NameKind::Initializer, weight.recipe),
        ];
        for (kind, recipe) in ways {
            let Some(recipe) = recipe else { continue };
            if let Some(matched) = self.find_alike(weight, kind, recipe) {
                return Ok(matched);
            }
            match self.find_by_leaves(weight, kind, recipe) {
                Ok(Some(matched)) => return Ok(matched),
                Ok(None) => {}
                // Another name would give the weight without the change, or in another order.
                Err(wrong) if std::mem::take(&mut self.is_final) => return Err(wrong),
                Err(wrong) if misfits.is_empty() => misfits = wrong,
                Err(_) => {}
            }
        }
        Err(misfits)
    }

    /// Whether the adapter changes a tensor that the recipe reads.
    fn is_changed(&self, kind: NameKind, recipe: &Recipe) -> bool {
        let leaves = recipe.leaves();
        leaves.iter().any(|leaf| self.change_of(kind, leaf.name).is_some())
    }

    fn change_of(&self, kind: NameKind, name: &str) -> Option<(String, Change)> {
        let adapter = self.adapter?;
        match kind {
            NameKind::Module => adapter.change(name, &self.rows),
            NameKind::Learned => adapter.change_of(name),
            // A matrix of an export may be the transpose of the matrix that the adapter means.
            NameKind::Initializer => None,
        }
    }

    /// Equal graphs have equal names for each weight.
    fn find_in_the_same_graph(&mut self, weight: &RequiredWeight<'_>) -> Option<Matched> {
        let model = self.source.model()?;
        let is_same = model.architecture_hash == self.required.architecture_hash;
        let found = model.named(weight.name).filter(|_| is_same)?;
        let ways = [(NameKind::Module, weight.modules), (NameKind::Learned, weight.learned)];
        let mut known = ways.into_iter().filter_map(|(kind, recipe)| Some((kind, recipe?)));
        if known.any(|(kind, recipe)| self.is_changed(kind, recipe)) {
            return None;
        }
        self.taken_whole(weight, found)
    }

    /// The weight of another graph with the same recipe, so that nothing needs to be inverted.
    fn find_alike(&mut self, weight: &RequiredWeight<'_>, kind: NameKind, recipe: &Recipe) -> Option<Matched> {
        let found = self.source.model()?.alike(kind, recipe)?;
        if self.is_changed(kind, recipe) || kind == NameKind::Initializer && !self.means_the_same(recipe) {
            return None;
        }
        let leaves = recipe.leaves();
        if kind == NameKind::Module && leaves.iter().any(|leaf| self.other_order(leaf.name, "").is_some()) {
            return None;
        }
        self.taken_whole(weight, found)
    }

    fn taken_whole(&mut self, weight: &RequiredWeight<'_>, found: &ModelWeight) -> Option<Matched> {
        let constant = &found.constant;
        let unlike = unlike_dtypes(weight.dtype, constant.dtype(), constant.as_quantized().is_some());
        if constant.shape() != weight.shape || unlike {
            return None;
        }
        let conforming = conformed(&constant.cast(weight.dtype), weight.form.as_ref()).ok()?;
        let name = constant.origin().unwrap_or(&found.name).to_string();
        self.used.insert(name.clone());
        self.used_weights.insert(found.name.clone());
        let leaves = found.modules.iter().flat_map(Recipe::leaves);
        self.used_modules.extend(leaves.map(|leaf| leaf.name.to_string()));
        Some(Matched {
            constant: conforming,
            from: vec![name],
            learned: found.learned.clone(),
        })
    }

    /// Whether names of initializers mean the same in the source and in the package: numbered names
    /// (`onnx::MatMul_733`, `val_84`) belong to different matrices in different exports.
    fn means_the_same(&self, recipe: &Recipe) -> bool {
        let Some(model) = self.source.model() else {
            return true;
        };
        let same_file = !model.export_hash.is_empty() && model.export_hash == self.required.export_hash;
        same_file || recipe.leaves().iter().all(|leaf| !is_numbered(leaf.name))
    }

    fn find_by_leaves(
        &mut self,
        weight: &RequiredWeight<'_>,
        kind: NameKind,
        recipe: &Recipe,
    ) -> Result<Option<Matched>, Vec<Misfit>> {
        if kind == NameKind::Initializer && !self.means_the_same(recipe) {
            return Ok(None);
        }
        if kind == NameKind::Learned
            && let Some(misfit) = self.turned_change(weight, recipe)
        {
            return Err(vec![misfit]);
        }
        if recipe.is_calibrated() {
            let leaf = recipe
                .leaves()
                .first()
                .map_or(String::new(), |leaf| leaf.name.to_string());
            return Err(vec![Misfit {
                weight: weight.name.to_string(),
                tensor: leaf,
                why: "the package holds it as a calibration on a text changed it, together with the weights around it"
                    .to_string(),
            }]);
        }
        let mut from = Vec::new();
        let mut wrong = Vec::new();
        let adds_one = kind == NameKind::Module
            && self.norms == NormParameter::FactorMinusOne
            && !self.source.is_graph()
            && !recipe.is_arithmetic();
        let mut lookup = |leaf: Leaf<'_>| {
            let misfit = |tensor, why| Misfit {
                weight: weight.name.to_string(),
                tensor,
                why,
            };
            let (name, constant) = match self.lookup(kind, leaf) {
                Ok(found) => found?,
                Err((tensor, why)) => {
                    wrong.push(misfit(tensor, why));
                    return None;
                }
            };
            if let Some(why) = why_not(leaf, &constant, recipe.has_codes()) {
                wrong.push(misfit(name, why));
                return None;
            }
            from.push(name);
            Some(match adds_one && is_norm_weight(leaf.name) {
                true => plus_one(&constant),
                false => constant,
            })
        };
        let Some(constant) = recipe.apply(&mut lookup) else {
            return if wrong.is_empty() { Ok(None) } else { Err(wrong) };
        };
        debug_assert_eq!(constant.shape(), weight.shape, "{}", weight.name);
        self.used.extend(from.iter().cloned());
        let constant = conformed(&constant.cast(weight.dtype), weight.form.as_ref()).map_err(|why| {
            vec![Misfit {
                weight: weight.name.to_string(),
                tensor: from.join(" + "),
                why,
            }]
        })?;
        Ok(Some(Matched {
            constant,
            from,
            learned: None,
        }))
    }

    /// The weight from the tensor with the same values, if exactly one exists.
    pub fn find_by_contents(
        &mut self,
        weight: &RequiredWeight<'_>,
        contents: &mut Contents<'_>,
    ) -> Result<Matched, Vec<Misfit>> {
        // A tensor that should exist by name is missing, even if the same values exist under another name.
        if weight.blake3.is_empty() || weight.modules.is_some() && self.source.knows_modules() {
            return Err(Vec::new());
        }
        let mut held = contents.holding(weight.dtype, weight.shape, weight.blake3);
        held.retain(|held| !self.used.contains(&held.name) || self.by_contents.contains(&held.name));
        let [held] = &held[..] else {
            let names: Vec<&str> = held.iter().map(|held| held.name.as_str()).collect();
            // Two tensors with the same values may differ in a fine-tune, so nothing is guessed.
            let ambiguous = (!names.is_empty()).then(|| Misfit {
                weight: weight.name.to_string(),
                tensor: names.join(", "),
                why: "all of them hold its numbers, so which of them it is cannot be known".to_string(),
            });
            return Err(ambiguous.into_iter().collect());
        };
        let recipe = contents.recipe(held);
        if let Some(misfit) = self.turned_change(weight, &recipe) {
            return Err(vec![misfit]);
        }
        if let Some((target, _)) = self.adapter.and_then(|a| a.change_of(&held.name))
            && let Some(constant) = self.source.tensors.get(&held.name)
            && !self.takes_changes(constant)
        {
            let why = quantized_base(constant, &target);
            self.changed.insert(target);
            self.used.insert(held.name.clone());
            return Err(vec![Misfit {
                weight: weight.name.to_string(),
                tensor: held.name.clone(),
                why,
            }]);
        }
        let mut tensor = |leaf: Leaf<'_>| {
            let constant = self.source.tensors.get(leaf.name)?;
            let change = self.adapter.and_then(|a| a.change_of(leaf.name));
            Some(self.changed(constant, change))
        };
        let constant = recipe.apply(&mut tensor).expect("it was read when it was hashed");
        self.used.insert(held.name.clone());
        self.used_weights.insert(held.name.clone());
        self.by_contents.insert(held.name.clone());
        Ok(Matched {
            constant: constant.cast(weight.dtype),
            from: vec![held.name.clone()],
            // Names in a graph are specific to it; names in a checkpoint also apply to the next one.
            learned: (!self.source.is_graph()).then_some(recipe),
        })
    }

    /// A change of a square matrix whose orientation in the checkpoint differs from the adapter's: shapes do not show
    /// it, but matrices of a canonical graph are `[out, in]`, so the recipe does.
    fn turned_change(&self, weight: &RequiredWeight<'_>, recipe: &Recipe) -> Option<Misfit> {
        let adapter = self.adapter?;
        let leaves = recipe.leaves();
        let square = |leaf: &&Leaf<'_>| matches!(leaf.shape, [rows, columns] if rows == columns);
        let changed = leaves
            .iter()
            .filter(square)
            .find(|leaf| adapter.change_of(leaf.name).is_some())?;
        (recipe.is_transposed() != adapter.is_for_in_out()).then(|| Misfit {
            weight: weight.name.to_string(),
            tensor: changed.name.to_string(),
            why: format!(
                "it holds the matrix as {}, and the adapter's fan_in_fan_out is {}",
                if recipe.is_transposed() {
                    "[in, out]"
                } else {
                    "[out, in]"
                },
                adapter.is_for_in_out()
            ),
        })
    }

    fn lookup(&mut self, kind: NameKind, leaf: Leaf<'_>) -> Found {
        let found = match kind {
            NameKind::Module => self.module(leaf.name)?,
            _ => self.named(kind, leaf.name)?,
        };
        let Some((name, constant)) = found else { return Ok(None) };
        if let Some(why) = self.other_order(leaf.name, &name).filter(|_| kind == NameKind::Module) {
            self.used.insert(name.clone());
            self.is_final = true;
            return Err((name, why));
        }
        match self.change_of(kind, leaf.name) {
            Some((target, _)) if !self.takes_changes(&constant) => {
                let why = quantized_base(&constant, &target);
                self.changed.insert(target);
                self.used.insert(name.clone());
                self.is_final = true;
                Err((name, why))
            }
            change => Ok(Some((name, self.changed(&constant, change)))),
        }
    }

    /// Why a matrix does not fit whose columns are in another order than the inputs of the package's layer.
    fn other_order(&self, module: &str, tensor: &str) -> Option<String> {
        let why = match (self.source.order(module, tensor), self.required.orders.get(module)) {
            (None, None) => return None,
            (Some(found), Some(wanted)) if found == wanted => return None,
            (Some(_), None) => {
                "its columns are in an order of their own (act-order), and the package's layer takes its inputs as they come"
            }
            (None, Some(_)) => {
                "its columns are as the inputs come, and the package's layer takes these in an order (act-order)"
            }
            (Some(_), Some(_)) => {
                "its columns are in another order (act-order) than the package's layer takes its inputs in"
            }
        };
        Some(format!("{why}; convert the export of this checkpoint"))
    }

    fn module(&mut self, module: &str) -> Found {
        let failed = |error: LeafError| (module.to_string(), error.to_string());
        let mut found = self.source.module(module, &self.rows).map_err(failed)?;
        // A missing head is the embedding: tied models are saved this way.
        if found.is_none() && module == "head.weight" {
            found = self.source.module("embedding.weight", &self.rows).map_err(failed)?;
        }
        if found.is_some() {
            self.used_modules.insert(module.to_string());
        }
        Ok(found)
    }

    /// A tensor of a checkpoint or an export by its own name, or of a package by its recorded name.
    fn named(&mut self, kind: NameKind, name: &str) -> Found {
        if let Some(model) = self.source.model() {
            let found = model
                .tensor(kind, name)
                .map_err(|error| (name.to_string(), error.to_string()))?;
            if let Some((weight, constant)) = found {
                self.used_weights.insert(weight.name.clone());
                let leaves = weight.modules.iter().flat_map(Recipe::leaves);
                self.used_modules.extend(leaves.map(|leaf| leaf.name.to_string()));
                return Ok(Some((name.to_string(), constant)));
            }
        }
        let tensor = self.source.tensors.get(name);
        Ok(tensor.map(|constant| (name.to_string(), constant.clone())))
    }

    /// With an adapter's change, given with its layer. A change with another shape stays unused, which is a separate
    /// obstacle.
    fn changed(&mut self, constant: &Constant, change: Option<(String, Change)>) -> Constant {
        match change {
            Some((target, change)) if constant.shape() == change.shape() => {
                self.changed.insert(target);
                let merged = change.merged(constant);
                requantized(&merged, constant).unwrap_or(merged)
            }
            _ => constant.clone(),
        }
    }

    /// Whether an adapter may change a tensor: floats, and codes if they may be rounded again.
    fn takes_changes(&self, constant: &Constant) -> bool {
        let again = self.adapter.is_some_and(Adapter::requantizes);
        constant.as_quantized().is_none() || again && requantized(constant, constant).is_some()
    }

    /// Tensors of the source that no weight uses.
    pub fn extra(&self) -> Vec<String> {
        if let Some(model) = self.source.model() {
            let modules = model.names(NameKind::Module).into_iter();
            let unused = modules.filter(|name| !self.used_modules.contains(*name));
            let unused =
                unused.filter_map(|name| Some((name.to_string(), model.tensor(NameKind::Module, name).ok()??.1)));
            let mut extra = self.without_tied_head(unused);
            let nameless = model.iter().filter(|w| {
                w.modules.is_none() && !self.used_weights.contains(&w.name) && !self.used.contains(&w.name)
            });
            extra.extend(nameless.map(|w| w.name.clone()));
            return extra;
        }
        if self.source.trouble().is_some() {
            return Vec::new();
        }
        let unused = self.source.tensors.iter().filter(|(name, c)| {
            // Buffers in checkpoints that no model needs: rotary frequencies, causal masks, position numbers.
            let buffer = ["rotary_emb.inv_freq", ".attn.masked_bias", ".position_ids"];
            let is_buffer = !c.dtype().is_float()
                || buffer.iter().any(|suffix| name.ends_with(suffix))
                || (name.ends_with(".attn.bias") && c.shape().len() == 4);
            !is_buffer && !self.used.contains(*name)
        });
        self.without_tied_head(unused.map(|(name, c)| (name.clone(), c.clone())))
    }

    /// A separate head is allowed beside a tied embedding if it has the same values.
    fn without_tied_head(&self, unused: impl Iterator<Item = (String, Constant)>) -> Vec<String> {
        let embedding = self.source.module("embedding.weight", &self.rows).ok().flatten();
        let same = |head: &Constant| {
            embedding
                .as_ref()
                .is_some_and(|(_, embedding)| holds_the_same(head, embedding))
        };
        unused
            .filter(|(name, c)| !(name.starts_with("lm_head") || name == "head.weight") || !same(c))
            .map(|(name, _)| name)
            .collect()
    }

    /// Changes of the adapter that no weight uses.
    pub fn unused_changes(&self) -> Vec<String> {
        let targets = self.adapter.map(Adapter::targets).unwrap_or_default();
        targets.into_iter().filter(|t| !self.changed.contains(t)).collect()
    }
}

/// In fp32, like exporters.
fn plus_one(constant: &Constant) -> Constant {
    constant.cast(DType::F32).offset(1.0)
}

/// Why an adapter's change cannot be merged into codes.
fn quantized_base(constant: &Constant, target: &str) -> String {
    format!(
        "the adapter changes {target}, and it is quantized ({}): the sum would have to be rounded to codes again; allow that \
         with --requantize, or merge the adapter into the floating-point model and quantize that",
        form::described(constant)
    )
}

/// Floats in the format of a quantized tensor. `None` if it is not quantized, or in a format that is only read.
fn requantized(values: &Constant, like: &Constant) -> Option<Constant> {
    let format = like.as_quantized()?.format()?;
    values.cast(like.dtype()).quantized_as(format, None).ok()
}

/// Whether a name is an exporter's numbering of an unnamed value.
fn is_numbered(name: &str) -> bool {
    let end = name.rsplit(['/', ':', '.', '_']).next().unwrap_or(name);
    name.starts_with("onnx::") || name.starts_with("val_") || end == name && end.bytes().all(|b| b.is_ascii_digit())
}

fn unlike_dtypes(wanted: DType, found: DType, of_codes: bool) -> bool {
    // Floats convert among themselves, and integers; codes are meaningless in another type.
    let stored_only = wanted.is_storage_only() || found.is_storage_only();
    match stored_only || of_codes && !wanted.is_float() {
        true => wanted != found,
        false => wanted.is_float() != found.is_float(),
    }
}

/// Why a tensor cannot be the leaf of a recipe; `of_codes`: the recipe makes a quantized weight.
fn why_not(leaf: Leaf<'_>, constant: &Constant, of_codes: bool) -> Option<String> {
    let shape = constant.shape();
    if shape != leaf.shape {
        let transposed = shape.iter().rev().eq(leaf.shape) && shape.len() == 2;
        let hint = if transposed { ", the transpose of it" } else { "" };
        return Some(format!("its shape is {shape:?}{hint}, it must be {:?}", leaf.shape));
    }
    unlike_dtypes(leaf.dtype, constant.dtype(), of_codes)
        .then(|| format!("its numbers are {} but must be {}", constant.dtype(), leaf.dtype))
}
