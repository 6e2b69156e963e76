//! The passes by name, as in reports and manifests, with descriptions.
//!
//! A pass runs under an entry of this table, so each has a description.

/// A pass, by its name in reports and manifests.
#[derive(Debug, PartialEq, Eq)]
pub struct PassInfo {
    /// Its name in [`PassReport`](super::PassReport), manifests and results: its module.
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
    ROLES = "roles": "finds the role of each input: ids, masks, positions, past keys and values";
    INFER = "infer": "infers every value's dtype and shape of symbolic dims";
    QUANTIZED = "quantized": "brings quantized weights and activations of all exporters into one form";
    FOLD = "fold": "folds constants and shape arithmetic";
    CLEANUP = "cleanup": "removes operators that change nothing, merges equal ones";
    DECOMPOSE_CONTRIB = "decompose_contrib" formerly "decompose": "decomposes contrib operators into plain ones";
    LAYER_NORM = "layer_norm": "fuses LayerNorm from its parts";
    RMS_NORM = "rms_norm": "fuses RMSNorm from its parts";
    HEAD_NORMS = "head_norms": "joins norms of single heads into one";
    ACTIVATION = "activation": "fuses SiLU and GELU, proved by execution";
    EXPERTS = "experts": "recognizes each mixture of experts: its routing, matrices and sum, proved by execution";
    CHOSEN_ROWS = "chosen_rows": "computes logits of all tokens where the export keeps the last ones";
    DECOMPOSE_ATTENTION = "decompose_attention" formerly "expand":
        "brings attention operators of all exporters into one plain form";
    JOINED_VALUES = "joined_values": "joins values that one attention reads apart into one";
    LATENT = "latent": "caches keys and values where the export caches latent rows";
    ATTENTION = "attention": "recognizes each attention: its mask, rotation, heads and cache, proved by execution";
    EMIT = "emit": "writes recognized attention as Attention, RotaryEmbedding and a static cache";
    RESHAPES = "reshapes": "gives reshapes constant targets";
    POSITIONS = "positions": "looks up position embeddings by position_ids";
    BATCH = "batch": "makes a fixed number of sequences symbolic";
    TIED = "tied": "ties a head that repeats the embedding to it";
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
