//! Tensors by content.
//!
//! A weight without a useful name, because its exporter lost it and the graph does not show its role, can still be
//! identified by its values: the checkpoint that the package was made from contains them, possibly transposed or in
//! another dtype. Once found, the name works for every later checkpoint of the same kind.

use std::collections::{BTreeMap, HashMap};

use super::content_hash;
use super::recipe::Recipe;
use crate::graph::Constant;
use crate::tensor::DType;

/// Hashes of a source's tensors, computed on demand: only tensors of the requested shape are read.
pub struct Contents<'a> {
    tensors: &'a BTreeMap<String, Constant>,
    /// By dtype and shape: hash to tensors.
    hashed: HashMap<(DType, Vec<usize>), HashMap<String, Vec<Holder>>>,
}

/// A tensor of the source with the requested contents.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Holder {
    pub name: String,
    /// It is a matrix and contains the values transposed.
    pub transposed: bool,
}

impl<'a> Contents<'a> {
    pub fn new(tensors: &'a BTreeMap<String, Constant>) -> Self {
        Contents {
            tensors,
            hashed: HashMap::new(),
        }
    }

    /// The tensors whose contents in this dtype and shape have this [`content_hash`].
    pub fn holding(&mut self, dtype: DType, shape: &[usize], blake3: &str) -> Vec<Holder> {
        let tensors = self.tensors;
        let hashed = self
            .hashed
            .entry((dtype, shape.to_vec()))
            .or_insert_with(|| hashes(tensors, dtype, shape));
        hashed.get(blake3).cloned().unwrap_or_default()
    }

    /// How the weight is computed from it.
    pub fn recipe(&self, held: &Holder) -> Recipe {
        let constant = &self.tensors[&held.name];
        let tensor = Recipe::Tensor {
            name: held.name.clone(),
            dtype: constant.dtype(),
            shape: constant.shape().to_vec(),
        };
        match held.transposed {
            true => Recipe::Transpose {
                perm: vec![1, 0],
                of: Box::new(tensor),
            },
            false => tensor,
        }
    }
}

fn hashes(tensors: &BTreeMap<String, Constant>, dtype: DType, shape: &[usize]) -> HashMap<String, Vec<Holder>> {
    let mut found: HashMap<String, Vec<Holder>> = HashMap::new();
    let comparable = |c: &Constant| match c.dtype().is_storage_only() || dtype.is_storage_only() {
        true => c.dtype() == dtype,
        false => c.dtype().is_float() == dtype.is_float(),
    };
    for (name, constant) in tensors.iter().filter(|(_, c)| comparable(c)) {
        let is_matrix = constant.shape().len() == 2;
        for transposed in [false, true] {
            let candidate = match transposed {
                false => constant.clone(),
                true if is_matrix => constant.transposed(&[1, 0]),
                true => continue,
            };
            if candidate.shape() != shape {
                continue;
            }
            // An unreadable tensor counts as not found and is reported as missing.
            let Ok(hash) = content_hash(&candidate.cast(dtype)) else {
                continue;
            };
            let holders = found.entry(hash).or_default();
            // A symmetric matrix is its own transpose.
            if holders.last().is_none_or(|held| held.name != *name) {
                holders.push(Holder {
                    name: name.clone(),
                    transposed,
                });
            }
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tensor::Tensor;

    fn matrix(rows: usize, columns: usize, first: f32) -> Constant {
        let values: Vec<f32> = (0..rows * columns).map(|i| first + i as f32).collect();
        Constant::tensor(Tensor::from_f32(vec![rows, columns], &values))
    }

    #[test]
    fn turned_rounded_and_twice() {
        let tensors = BTreeMap::from([
            ("a".to_string(), matrix(2, 3, 1.0)),
            ("b".to_string(), matrix(2, 3, 9.0)),
            ("c".to_string(), matrix(3, 3, 0.0)),
            ("d".to_string(), matrix(2, 3, 9.0)),
            (
                "e".to_string(),
                Constant::tensor(Tensor::from_f32(vec![2, 2], &[1.0, 2.0, 2.0, 1.0])),
            ),
        ]);
        let mut contents = Contents::new(&tensors);
        let mut names = |of: Constant| -> Vec<(String, bool)> {
            let tensor = of.materialize().unwrap();
            let hash = blake3::hash(tensor.data()).to_hex().to_string();
            let held = contents.holding(tensor.dtype(), tensor.shape(), &hash);
            held.into_iter().map(|h| (h.name, h.transposed)).collect()
        };
        let found = |name: &str, transposed| (name.to_string(), transposed);
        assert_eq!(names(tensors["a"].clone()), [found("a", false)]);
        assert_eq!(names(tensors["a"].transposed(&[1, 0])), [found("a", true)]);
        assert_eq!(
            names(tensors["a"].transposed(&[1, 0]).cast(DType::F16)),
            [found("a", true)]
        );
        assert_eq!(names(tensors["c"].transposed(&[1, 0])), [found("c", true)]);
        assert_eq!(names(tensors["e"].clone()), [found("e", false)]);
        assert_eq!(names(tensors["b"].clone()), [found("b", false), found("d", false)]);
        assert_eq!(names(matrix(2, 3, 2.0)), []);

        let recipe = contents.recipe(&Holder {
            name: "a".to_string(),
            transposed: true,
        });
        let made = recipe.apply(&mut |leaf| tensors.get(leaf.name).cloned()).unwrap();
        assert_eq!(made.shape(), [3, 2]);
        assert!(recipe.is_transposed());
    }
}
