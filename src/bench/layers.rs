//! Time by layer, in three groups: attention, products with weights, the rest.
//!
//! TensorRT fuses layers and names the result after its operations (`__myl_ReshCastConcMulReshCastMulSum_myl0_14`),
//! where the scores of attention and a linear layer of one row look alike. So the order of execution decides: attention
//! is everything between the projections before it and the one after it.

use std::collections::BTreeMap;

use super::result::LayerTimes;

pub const ATTENTION: &str = "attention";
pub const PRODUCTS: &str = "matrix products";
pub const REST: &str = "rest";
pub const GROUPS: [&str; 3] = [ATTENTION, PRODUCTS, REST];

/// Milliseconds by group, from layers in execution order.
pub fn grouped(live: usize, layers: Vec<(String, f64)>) -> LayerTimes {
    let names: Vec<&str> = layers.iter().map(|(name, _)| name.as_str()).collect();
    let mut groups = BTreeMap::new();
    for (group, (_, ms)) in groups_of(&names).into_iter().zip(&layers) {
        *groups.entry(group.to_string()).or_insert(0.0) += ms;
    }
    LayerTimes {
        live,
        total_ms: layers.iter().map(|(_, ms)| ms).sum(),
        groups,
        layers,
    }
}

/// The information in a layer's name.
#[derive(Clone, Copy, PartialEq, Eq)]
enum LayerRole {
    /// The attention probabilities: the product before it computes the scores, unless it is included, and the one after
    /// it uses the values.
    Softmax {
        with_scores: bool,
    },
    /// A layer that only occurs in attention.
    Attention,
    /// An update of the cache.
    Scatter,
    Product,
    Other,
}

fn kind(layer: &str) -> LayerRole {
    let layer = layer.to_lowercase();
    let any = |words: &[&str]| words.iter().any(|word| layer.contains(word));
    // With one row, a product is a multiplication and a sum.
    let product = any(&["_proj", "lm_head", "gemm", "gemv", "matmul", "mulsum"]);
    if any(&["softmax", "maxrsub"]) {
        LayerRole::Softmax { with_scores: product }
    } else if layer.contains("_mha_") || is_lowered_attention(&layer) {
        LayerRole::Attention
    } else if product {
        LayerRole::Product
    } else if any(&["kvcache", "scat"]) {
        LayerRole::Scatter
    } else {
        LayerRole::Other
    }
}

/// `layers.3.attention` and its parts, the passes' name, whatever the export.
fn is_lowered_attention(layer: &str) -> bool {
    let index = layer.strip_prefix("layers.");
    let after = index.and_then(|rest| {
        rest.trim_start_matches(|c: char| c.is_ascii_digit())
            .strip_prefix(".attention")
    });
    after.is_some_and(|rest| rest.is_empty() || ["/", "_u", "_myl"].iter().any(|next| rest.starts_with(next)))
}

fn groups_of(names: &[&str]) -> Vec<&'static str> {
    let kinds: Vec<LayerRole> = names.iter().map(|name| kind(name)).collect();
    let mut groups: Vec<&'static str> = kinds
        .iter()
        .map(|kind| if *kind == LayerRole::Product { PRODUCTS } else { REST })
        .collect();
    // Tables of positions are scattered before the first product.
    let first = kinds.iter().position(|kind| *kind == LayerRole::Product).unwrap_or(0);
    for (at, kind) in kinds.iter().enumerate() {
        let (before, after) = match kind {
            LayerRole::Softmax { with_scores } => (usize::from(!with_scores), 1),
            LayerRole::Attention => (0, 0),
            LayerRole::Scatter if at > first => {
                groups[at] = ATTENTION;
                continue;
            }
            _ => continue,
        };
        groups[at] = ATTENTION;
        let before = reach(&kinds, (0..at).rev(), before);
        let after = reach(&kinds, at + 1..kinds.len(), after);
        for other in before.into_iter().chain(after) {
            groups[other] = ATTENTION;
        }
    }
    groups
}

/// The layers before the next product with weights, after this many `products` of attention itself. A product named as
/// attention's is one of those.
fn reach(kinds: &[LayerRole], way: impl Iterator<Item = usize>, mut products: usize) -> Vec<usize> {
    let mut reached = Vec::new();
    for at in way {
        match kinds[at] {
            LayerRole::Product if products == 0 => break,
            LayerRole::Product => products -= 1,
            LayerRole::Attention => products = products.saturating_sub(1),
            _ => {}
        }
        reached.push(at);
    }
    reached
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Names of committed profiles (benches/results/h200), with the group that the lowered network gives them.
    fn check(layers: &[(&str, &'static str)]) {
        let names: Vec<&str> = layers.iter().map(|(name, _)| *name).collect();
        let found: Vec<_> = names.iter().copied().zip(groups_of(&names)).collect();
        assert_eq!(found, layers);
    }

    #[test]
    fn a_step_with_reduced_scores() {
        check(&[
            ("__myl_GathCastMulMean_myl0_0", REST),
            ("__myl_CastReshAddSqrtDivMulCastMulReshCastMulSum_myl0_1", PRODUCTS),
            (
                "__myl_MoveCastReshSlicReshReshReplIotaReplAddIotaReplIotaConcScatSlicReshGathGathReshReshSpliMulEtc_myl0_2",
                ATTENTION,
            ),
            ("__myl_ReshCastConcMulReshCastMulSum_myl0_3", ATTENTION),
            (
                "__myl_ReshAddIotaReshLtReshReshSeleMaxrSubExpSumDivMulCast_myl0_4",
                ATTENTION,
            ),
            ("__myl_Resh_myl0_5", ATTENTION),
            ("layers.0.attention/attended_U161_myl0_6", ATTENTION),
            ("__myl_CastCastMulSum_myl0_7", PRODUCTS),
            ("__myl_CastReshAddCastMulMean_myl0_8", REST),
            (
                "__myl_CastCastReshAddSqrtDivMulCastMulReshCastMulSumMulSum_myl0_9",
                PRODUCTS,
            ),
            ("__myl_CastCastReshCastReshSiluMulReshCastMulSum_myl0_10", PRODUCTS),
            ("__myl_CastReshAddCastMulMean_myl0_11", REST),
            ("__myl_CastReshAddSqrtDivMulCastMulReshCastMulSum_myl0_12", PRODUCTS),
            (
                "__myl_CastReshSlicReshScatSlicReshSpliMulMulMulMulSubAddConcScatSlicReshSpliMulMulMulMulSubAdd_myl0_13",
                ATTENTION,
            ),
            ("__myl_ReshCastConcMulReshCastMulSum_myl0_14", ATTENTION),
            ("__myl_ReshSeleMaxrSubExpSumDivMulCast_myl0_15", ATTENTION),
            ("__myl_Resh_myl0_16", ATTENTION),
            ("layers.1.attention/attended_U222_myl0_17", ATTENTION),
            ("__myl_CastCastMulSum_myl0_18", PRODUCTS),
            (
                "__myl_CastReshAddSqrtDivMulCastMulReshCastMulSumCastReshCast_myl0_243",
                PRODUCTS,
            ),
        ]);
    }

    #[test]
    fn a_step_over_parts_of_the_cache() {
        check(&[
            ("model.layers.0.mlp.down_proj/out/MatMul_U206_myl0_14", PRODUCTS),
            ("__myl_AddCastMulMean_myl0_15", REST),
            ("__myl_CastReshAddSqrtDivMulCastMulReshCastMulSum_myl0_19", PRODUCTS),
            (
                "__myl_CastReshSlicReshScatSlicReshSpliMulMulMulMulSubAddConcScatSlicReshSpliMulMulMulMulSubAddEtc_myl0_20",
                ATTENTION,
            ),
            ("__mye166371_myl0_21", ATTENTION),
            ("__myl_ReshTran_myl0_22", ATTENTION),
            ("layers.1.attention/scores_U221_myl0_23", ATTENTION),
            ("__myl_TranReshCastSeleMaxrSubExpSum_myl0_24", ATTENTION),
            ("__myl_Cast_myl0_25", ATTENTION),
            ("__myl_Resh_myl0_27", ATTENTION),
            ("layers.1.attention/attended_U228_myl0_30", ATTENTION),
            ("__myl_TranReshCastSumDivMulCast_myl0_31", ATTENTION),
            ("__myl_CastReshCastMulSum_myl0_32", PRODUCTS),
            ("__myl_CastReshAddCastMulMean_myl0_33", REST),
            (
                "__myl_CastCastReshAddSqrtDivMulCastMulReshCastMulSumCastReshMulSumCastReshSiluMul_myl0_28",
                PRODUCTS,
            ),
        ]);
    }

    #[test]
    fn a_prompt_with_one_kernel_for_attention() {
        check(&[
            ("__myl_Cums_myl0_2", REST),
            ("__myl_Scat_myl0_5", REST),
            ("__myl_ReshGathCastMulMeanAddSqrtDivMulCastMul_myl0_7", REST),
            ("/model/layers.0/self_attn/q_proj/MatMul/fused_U32_myl0_8", PRODUCTS),
            ("__myl_SlicReshTranSpliMulMulMulMulSubAddConcScat_myl0_22", ATTENTION),
            ("__myl_ReshReplReshMoveTran_myl0_23", ATTENTION),
            ("__myl_SlicReshTranScat_myl0_24", ATTENTION),
            ("__myl_ReshReplReshMove_myl0_25", ATTENTION),
            (
                "__myl_SlicReshTranSpliMulMulMulMulSubAddConcMulReshMove_myl0_26",
                ATTENTION,
            ),
            ("_gemm_mha_v2_myl0_27", ATTENTION),
            ("__myl_MoveReshTran_myl0_28", ATTENTION),
            ("model.layers.1.self_attn.o_proj/out/MatMul_U88_myl0_29", PRODUCTS),
            ("__myl_ReshAddCastMulMeanAddSqrtDivMulCastMul_myl0_30", REST),
            ("model.layers.1.mlp.gate_proj/out/MatMul_U99_myl0_31", PRODUCTS),
            ("model.layers.1.mlp.up_proj/out/MatMul_U98_myl0_32", PRODUCTS),
            ("__myl_SiluMul_myl0_33", REST),
            // The last layer, where only one row continues.
            (
                "model.layers.21.self_attn.q_proj/out/MatMul/fused_U893_myl0_321",
                PRODUCTS,
            ),
            ("_gemm_mha_v2_myl0_327", ATTENTION),
            ("__myl_CastTranReshMoveGathReshCastMulSum_myl0_328", PRODUCTS),
            ("__myl_CastReshAddCastMulMean_myl0_329", REST),
        ]);
    }

    #[test]
    fn projections_one_by_one_and_exports_that_say_attention() {
        check(&[
            ("/gpt_neox/layers.0/attention/query/MatMul", PRODUCTS),
            ("__myl_ReshTran_myl0_1", REST),
            ("gpt_neox.layers.0.attention.key/MatMul", PRODUCTS),
            ("KvCacheUpdate_key.0", ATTENTION),
            ("gpt_neox.layers.0.attention.value/MatMul", PRODUCTS),
            ("__myl_ReshMulSumSeleMaxrSubExpSum_myl0_4", ATTENTION),
            ("layers.0.attention_U12_myl0_6", ATTENTION),
            ("/gpt_neox/layers.0/attention/dense/MatMul", PRODUCTS),
        ]);
    }

    #[test]
    fn groups_add_up() {
        let layers = [
            ("model.layers.0.self_attn.q_proj/MatMul", 3.0),
            ("_gemm_mha_v2_myl0_175", 0.75),
            ("KvCacheUpdate_key.0", 0.25),
            ("__myl_CastCastMulSum_myl0_176", 1.0),
            ("__myl_GathCastMulMean_myl0_0", 0.5),
        ];
        let times = grouped(9, layers.map(|(n, ms)| (n.to_string(), ms)).to_vec());
        assert_eq!((times.live, times.total_ms), (9, 5.5));
        assert_eq!(
            (times.groups[ATTENTION], times.groups[PRODUCTS], times.groups[REST]),
            (1.0, 4.0, 0.5)
        );
    }
}
