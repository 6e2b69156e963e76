//! The passes by name, as in reports and manifests, with a description.
//!
//! A pass runs under an entry of this table, so each has a description.

/// A pass as reports and manifests name it.
#[derive(Debug, PartialEq, Eq)]
pub struct PassInfo {
    /// Its name in [`PassReport`](super::PassReport), manifests and results: the module that holds it.
    pub name: &'static str,
    /// Its name in packages written before it was renamed.
    pub formerly: Option<&'static str>,
    /// What it does, in a few words for a table.
    pub description: &'static str,
}

/// The entry of a name, present or former. `None` for a pass that this version does not have.
pub fn info(name: &str) -> Option<&'static PassInfo> {
    PASSES
        .iter()
        .copied()
        .find(|info| info.name == name || info.formerly == Some(name))
}

macro_rules! passes {
    ($($constant:ident = $name:literal $(formerly $formerly:literal)?: $description:literal;)*) => {
        $(pub(super) const $constant: PassInfo = PassInfo {
            name: $name,
            formerly: passes!(@ $($formerly)?),
            description: $description,
        };)*
        /// Every pass of [`canonicalize`](super::canonicalize), in the order in which they first run.
        pub const PASSES: &[&PassInfo] = &[$(&$constant),*];
    };
    (@) => { None };
    (@ $formerly:literal) => { Some($formerly) };
}

passes! {
    ROLES = "roles": "finds which input is what: ids, masks, positions, past keys and values";
    INFER = "infer": "gives every value its dtype and its shape of symbolic dims";
    QUANTIZED = "quantized": "brings quantized weights and activations of all exporters into one form";
    FOLD = "fold": "computes constants ahead, moves shape arithmetic out of the graph";
    CLEANUP = "cleanup": "drops operators that change nothing, merges equal ones";
    DECOMPOSE_CONTRIB = "decompose_contrib" formerly "decompose": "takes contributed operators apart into plain ones";
    LAYER_NORM = "layer_norm": "finds LayerNorm in its parts";
    RMS_NORM = "rms_norm": "finds RMSNorm in its parts";
    HEAD_NORMS = "head_norms": "joins norms of single heads into one";
    ACTIVATION = "activation": "finds SiLU and GELU, proven by running them";
    EXPERTS = "experts": "understands each mixture of experts: its routing, matrices and sum, proven by running them";
    CHOSEN_ROWS = "chosen_rows": "gives all tokens logits where the export keeps the last ones";
    DECOMPOSE_ATTENTION = "decompose_attention" formerly "expand":
        "brings attention operators of all exporters into one plain form";
    LATENT = "latent": "caches keys and values where the export caches what they are computed from";
    ATTENTION = "attention": "understands each attention: its mask, rotation, heads and cache, proven by running them";
    EMIT = "emit": "writes attention, rotary embedding and a static cache in place of what was understood";
    RESHAPES = "reshapes": "gives reshapes constant targets";
    POSITIONS = "positions": "looks embeddings of positions up by position";
    BATCH = "batch": "takes any number of sequences where the export fixed one";
    TIED = "tied": "lets a head that repeats the embedding read the embedding";
    LINEAR = "linear": "writes every linear layer as a product with a weight stored output by input";
    DTYPE = "dtype": "changes the float type of the whole graph";
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn names_are_unique_and_found_by_their_former_ones_too() {
        let all = PASSES.iter().flat_map(|p| std::iter::once(p.name).chain(p.formerly));
        let names: Vec<&str> = all.collect();
        assert_eq!(names.iter().collect::<BTreeSet<_>>().len(), names.len(), "{names:?}");
        assert_eq!(info("expand"), Some(&DECOMPOSE_ATTENTION));
        assert_eq!(info("linear"), Some(&LINEAR));
        assert_eq!(info("twins"), None);
    }
}
