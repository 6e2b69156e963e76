//! The weights of one model, each with its identity: the records that a package stores in its manifest and that are
//! derived from an export at conversion. Other packages, checkpoints for other programs and hashes of weights use these
//! records, never a graph that is analyzed again, so they cannot differ from the conversion.

use std::collections::HashMap;

use super::content_hash;
use super::inverse::Irreversible;
use super::modules::{is_norm_factor, modules};
use super::recipe::Recipe;
use crate::graph::{Constant, Graph, identity_text};
use crate::lower::stored_weights;

/// A weight and its names.
#[derive(Clone, Debug)]
pub struct ModelWeight {
    /// In the canonical graph.
    pub name: String,
    /// The constant in the graph.
    pub constant: Constant,
    /// Over initializers of the export.
    pub recipe: Option<Recipe>,
    /// Over modules of the model ([`super::modules`]).
    pub modules: Option<Recipe>,
    /// Over the names of a checkpoint that held the same numbers once.
    pub learned: Option<Recipe>,
}

/// The kind of names in a recipe.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum NameKind {
    /// Modules of the model.
    Module,
    /// Tensors of a checkpoint, learned from their numbers.
    Learned,
    /// Initializers of the export.
    Initializer,
}

impl ModelWeight {
    /// The recipe over names of this kind.
    pub fn recipe_over(&self, kind: NameKind) -> Option<&Recipe> {
        match kind {
            NameKind::Module => self.modules.as_ref(),
            NameKind::Learned => self.learned.as_ref(),
            NameKind::Initializer => self.recipe.as_ref(),
        }
    }
}

/// A named tensor that cannot be extracted from the weights of a model.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LeafError {
    /// The recipe of its weight cannot be inverted.
    #[error("{weight:?}: {why}")]
    Irreversible {
        /// In the graph.
        weight: String,
        /// Why.
        why: Irreversible,
    },
    /// Several weights have the name but different values.
    #[error("{} have its name and different values", weights.join(" and "))]
    Ambiguous {
        /// In the graph.
        weights: Vec<String>,
    },
}

/// All weights of a model, without constants that passes computed.
pub struct ModelWeights {
    /// BLAKE3 of the graph's identity text, in hexadecimal: weights of graphs that share it have the same names.
    pub architecture_hash: String,
    /// BLAKE3 of the export's file, in hexadecimal: initializers of equal files have the same names.
    pub export_hash: String,
    /// The graph scales embeddings like Gemma's, whose checkpoints store a norm's factor minus 1
    /// ([`super::norm_parameter`]).
    pub scales_embeddings: bool,
    weights: Vec<ModelWeight>,
    /// Weights whose recipe reads a name.
    by_leaf: HashMap<(NameKind, String), Vec<usize>>,
    by_name: HashMap<String, usize>,
}

impl ModelWeights {
    /// From a typed canonical graph of the passes, whose constants still have the names of their initializers.
    pub fn of_graph(graph: &Graph, export_hash: String) -> ModelWeights {
        let modules = modules(graph);
        let described = stored_weights(graph).into_iter().map(|(id, weight)| ModelWeight {
            recipe: Recipe::of(&weight.constant),
            modules: modules.get(&id).cloned(),
            learned: None,
            name: weight.name,
            constant: weight.constant,
        });
        let weights = described.filter(|weight| weight.recipe.is_some()).collect();
        ModelWeights::new(weights, graph, architecture_hash(graph), export_hash)
    }

    /// From stored records, and their graph.
    pub fn new(
        weights: Vec<ModelWeight>,
        graph: &Graph,
        architecture_hash: String,
        export_hash: String,
    ) -> ModelWeights {
        let mut by_leaf: HashMap<(NameKind, String), Vec<usize>> = HashMap::new();
        for (i, weight) in weights.iter().enumerate() {
            for kind in [NameKind::Module, NameKind::Learned, NameKind::Initializer] {
                let leaves = weight.recipe_over(kind).map(Recipe::leaves).unwrap_or_default();
                for leaf in leaves {
                    let holders = by_leaf.entry((kind, leaf.name.to_string())).or_default();
                    if holders.last() != Some(&i) {
                        holders.push(i);
                    }
                }
            }
        }
        ModelWeights {
            architecture_hash,
            export_hash,
            scales_embeddings: super::norm_parameter::scales_embeddings(graph),
            by_name: weights.iter().enumerate().map(|(i, w)| (w.name.clone(), i)).collect(),
            weights,
            by_leaf,
        }
    }

    /// All of them, in the graph's order.
    pub fn iter(&self) -> impl Iterator<Item = &ModelWeight> {
        self.weights.iter()
    }

    /// The weight of a name in the graph.
    pub fn named(&self, name: &str) -> Option<&ModelWeight> {
        self.by_name.get(name).map(|i| &self.weights[*i])
    }

    /// Weights whose recipe reads the name.
    fn holders(&self, kind: NameKind, name: &str) -> impl Iterator<Item = &ModelWeight> + Clone {
        let holders = self.by_leaf.get(&(kind, name.to_string()));
        holders.into_iter().flatten().map(|i| &self.weights[*i])
    }

    /// The weight with the same recipe, unchanged. A norm's factor is the same vector in every graph, whether an addend
    /// is part of its recipe or the exporter put it into the initializer.
    pub fn alike(&self, kind: NameKind, recipe: &Recipe) -> Option<&ModelWeight> {
        let leaves = recipe.leaves();
        let first = leaves.first()?;
        let is_factor = kind == NameKind::Module && is_norm_factor(recipe);
        let mut alike = self.holders(kind, first.name).filter(|weight| {
            let other = weight.recipe_over(kind).expect("it reads the name");
            other.is_like(recipe) || is_factor && is_norm_factor(other) && other.shape() == recipe.shape()
        });
        let found = alike.next()?;
        // Two with the same name: `tensor` compares their values.
        alike.next().is_none().then_some(found)
    }

    /// The tensor of a name and the weight that it comes from.
    pub fn tensor(&self, kind: NameKind, name: &str) -> Result<Option<(&ModelWeight, Constant)>, LeafError> {
        let mut found: Option<(&ModelWeight, Constant)> = None;
        for weight in self.holders(kind, name) {
            let recipe = weight.recipe_over(kind).expect("it reads the name");
            let failed = |why| LeafError::Irreversible {
                weight: weight.name.clone(),
                why,
            };
            let parts = recipe.take_apart(&weight.constant).map_err(failed)?;
            let part = parts.into_iter().find(|(leaf, _)| leaf == name);
            let (_, constant) = part.expect("leaves and parts have the same names");
            match &found {
                None => found = Some((weight, constant)),
                Some((_, first)) if holds_the_same(first, &constant) => {}
                Some((first, _)) => {
                    let weights = vec![format!("{:?}", first.name), format!("{:?}", weight.name)];
                    return Err(LeafError::Ambiguous { weights });
                }
            }
        }
        Ok(found)
    }

    /// Names that recipes of a kind read, sorted.
    pub fn names(&self, kind: NameKind) -> Vec<&str> {
        let of_kind = self.by_leaf.keys().filter(|(k, _)| *k == kind);
        let mut names: Vec<&str> = of_kind.map(|(_, name)| name.as_str()).collect();
        names.sort_unstable();
        names
    }
}

/// BLAKE3 of a graph without its weights, in hexadecimal.
pub fn architecture_hash(graph: &Graph) -> String {
    let text = identity_text(graph).to_string();
    blake3::hash(text.as_bytes()).to_hex().to_string()
}

/// Whether two tensors are equal in shape, dtype and bytes, quantized ones in codes and scales; unreadable tensors are
/// never equal.
pub(super) fn holds_the_same(a: &Constant, b: &Constant) -> bool {
    if (a.shape(), a.dtype()) != (b.shape(), b.dtype()) {
        return false;
    }
    match (content_hash(a), content_hash(b)) {
        (Ok(a), Ok(b)) => a == b,
        _ => false,
    }
}
