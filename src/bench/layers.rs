//! Time by layer, in three groups that a reader of the network would expect.

use std::collections::BTreeMap;

use super::result::LayerTimes;

pub const ATTENTION: &str = "attention";
pub const PRODUCTS: &str = "matrix products";
pub const REST: &str = "rest";

/// Sums of milliseconds by group. TensorRT names a layer after those of the network that it holds.
pub fn grouped(live: usize, layers: Vec<(String, f64)>) -> LayerTimes {
    let mut groups = BTreeMap::new();
    for (name, ms) in &layers {
        *groups.entry(group(name).to_string()).or_insert(0.0) += ms;
    }
    LayerTimes {
        live,
        total_ms: layers.iter().map(|(_, ms)| ms).sum(),
        groups,
        layers,
    }
}

/// By the name, which is either a layer's of the network or TensorRT's list of the operations that it fused into a kernel.
/// A product of one row is a multiplication and a sum there; a scatter is an update of the cache.
fn group(layer: &str) -> &'static str {
    let layer = layer.to_lowercase();
    let any = |words: &[&str]| words.iter().any(|word| layer.contains(word));
    if any(&["_proj", "lm_head"]) {
        PRODUCTS
    } else if any(&["attention", "mha", "softmax", "kvcache", "scat"]) {
        ATTENTION
    } else if any(&["gemm", "gemv", "matmul", "mulsum"]) {
        PRODUCTS
    } else {
        REST
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn groups_add_up() {
        // Names of an H200's profile, and of a network's own layers.
        let layers = [
            ("_gemm_mha_v2_myl0_175", 0.75),
            ("KvCacheUpdate_key.0", 0.25),
            ("/model/layers.0/self_attn/q_proj/MatMul", 3.0),
            ("__myl_CastReshAddSqrtDivMulCastMulReshCastMulSum_myl0_128", 1.0),
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
