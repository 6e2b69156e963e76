//! The choices of a tuner: for each profile a few questions, each with alternative options.
//!
//! There are questions only for choices that mattered on some GPU (docs/explanation/gpu.md has the figures), since
//! every answer takes a build and a load. The questions are independent enough to be answered one after the other.

use crate::graph::Graph;
use crate::graph::op::Op;
use crate::lower::{self, AttentionForm, LinearForm, LowerOptions, QuantizedForm, through_transpose, weights};
use crate::network::{Profile, Tokens, WeightMode};

/// A choice and the alternatives to the current one.
#[derive(Clone, Debug)]
pub struct Question {
    /// One of [`QUESTIONS`].
    pub about: &'static str,
    /// A short description of each alternative, and the changed options.
    pub alternatives: Vec<(String, LowerOptions)>,
}

/// The questions for a profile, in the order in which they should be answered.
pub const QUESTIONS: [&str; 5] = ["kernels", "products", "attention", "fusion", "quantized weights"];

/// A question of [`QUESTIONS`] for a profile of this graph, with `now` as the current choices. Alternatives that are
/// equivalent to `now` are left out.
pub fn question(about: &'static str, graph: &Graph, profile: &Profile, now: &LowerOptions) -> Question {
    let one_token = profile.tokens == Tokens::Static(1);
    let with = |change: &dyn Fn(&mut LowerOptions)| {
        let mut options = now.clone();
        change(&mut options);
        options
    };
    let mut alternatives: Vec<(String, LowerOptions)> = Vec::new();
    match about {
        "kernels" => {
            alternatives.push(("kernels".into(), with(&|o| o.kernels = true)));
            alternatives.push(("TensorRT's layers".into(), with(&|o| o.kernels = false)));
        }
        "products" if one_token => {
            alternatives.push((
                "matrix products".into(),
                with(&|o| o.linear = LinearForm::FlattenActivation),
            ));
            let reduced = |depth: Option<usize>| with(&|o| (o.linear, o.reduce_depth) = (LinearForm::ReduceRow, depth));
            alternatives.push(("reductions".into(), reduced(None)));
            // Reductions only for narrow weights: one step below the widest.
            let mut depths = depths(graph);
            depths.pop();
            if let Some(depth) = depths.pop() {
                alternatives.push((format!("reductions to depth {depth}"), reduced(Some(depth))));
            }
        }
        "products" => {
            let form = |form| with(&|o| o.prefill_linear = Some(form));
            alternatives.push(("activations flattened".into(), form(LinearForm::FlattenActivation)));
            alternatives.push(("weights raised".into(), form(LinearForm::RaiseWeight)));
        }
        "attention" if one_token => {
            let form = |form| with(&|o| o.attention = form);
            alternatives.push((
                "attention layer, folded".into(),
                with(&|o| {
                    (o.attention, o.fold_groups) = (AttentionForm::Layer, true);
                }),
            ));
            alternatives.push((
                "attention layer, heads as they are".into(),
                with(&|o| {
                    (o.attention, o.fold_groups) = (AttentionForm::Layer, false);
                }),
            ));
            alternatives.push(("single layers".into(), form(AttentionForm::Decomposed)));
            alternatives.push(("scores as reductions".into(), form(AttentionForm::ReducedScores)));
            for parts in [4, 8, 16, 32, 64] {
                if profile.capacity.is_multiple_of(parts) && profile.capacity / parts >= 64 {
                    alternatives.push((format!("{parts} parts"), form(AttentionForm::Split(parts))));
                }
            }
        }
        "attention" => {
            let layer =
                |fold: bool| with(&|o| (o.attention, o.fold_prefill) = (AttentionForm::Layer, fold.then_some(0)));
            alternatives.push(("attention layer".into(), layer(false)));
            alternatives.push(("attention layer, folded".into(), layer(true)));
            alternatives.push((
                "single layers".into(),
                with(&|o| o.attention = AttentionForm::Decomposed),
            ));
        }
        "fusion" => {
            let fused = |all, pairs| with(&|o| (o.fuse_linear, o.fuse_pairs) = (all, pairs));
            alternatives.push(("products of one activation as one".into(), fused(true, true)));
            alternatives.push(("q, k and v as one, gate and up apart".into(), fused(true, false)));
            alternatives.push(("each product alone".into(), fused(false, false)));
        }
        "quantized weights" => {
            let form = |form| {
                with(&|o| match one_token {
                    true => o.quantized = form,
                    false => o.prefill_quantized = Some(form),
                })
            };
            alternatives.push((
                "Dequantize layers before products".into(),
                form(QuantizedForm::Dequantize),
            ));
            alternatives.push(("Dequantize layers apart".into(), form(QuantizedForm::DequantizeApart)));
            alternatives.push(("elementwise layers".into(), form(QuantizedForm::Elementwise)));
        }
        _ => {}
    }
    let same = effective(graph, now, profile);
    alternatives.retain(|(_, options)| effective(graph, options, profile) != same);
    Question { about, alternatives }
}

/// The options with everything resolved that depends on the profile, so that equivalent options are equal.
fn effective(graph: &Graph, options: &LowerOptions, profile: &Profile) -> LowerOptions {
    let mut options = options.clone();
    options.attention = options.attention.at(profile);
    options.kernels &= lower::kernels_apply(profile, &options);
    if profile.tokens == Tokens::Static(1) {
        (options.prefill_linear, options.fold_prefill) = (None, None);
    } else {
        options.prefill_linear.get_or_insert(options.linear);
        let folds = options.fold_prefill.is_some_and(|from| profile.capacity >= from);
        options.fold_prefill = folds.then_some(0);
        options.fold_groups = true;
    }
    if options.attention != AttentionForm::Layer {
        (options.fold_groups, options.fold_prefill) = (true, None);
    }
    let widest = depths(graph).pop().unwrap_or(0);
    let all = options.reduce_depth.is_none_or(|depth| depth >= widest);
    if options.linear != LinearForm::ReduceRow || all {
        options.reduce_depth = None;
    }
    options.fuse_pairs &= options.fuse_linear;
    let is_quantized = || {
        weights(graph)
            .iter()
            .any(|weight| weight.constant.as_quantized().is_some())
    };
    let prefill = options.prefill_quantized.take();
    if profile.tokens != Tokens::Static(1) {
        options.quantized = prefill.unwrap_or(options.quantized);
    }
    if options.quantized == QuantizedForm::Elementwise && options.weight_mode != WeightMode::Bind {
        options.quantized = QuantizedForm::Dequantize;
    }
    if !is_quantized() {
        options.quantized = QuantizedForm::Whole;
    }
    options
}

/// Widths of linear layers' inputs, ascending.
fn depths(graph: &Graph) -> Vec<usize> {
    let mut depths: Vec<usize> = graph
        .node_ids()
        .map(|id| graph.node(id))
        .filter(|node| node.op == Op::MatMul)
        .filter_map(|node| {
            let (weight, transposed) = through_transpose(graph, node.input(1)?);
            let shape = graph.constant(weight)?.shape().to_vec();
            match (transposed, &shape[..]) {
                (true, [_, k]) => Some(*k),
                _ => None,
            }
        })
        .collect();
    depths.sort_unstable();
    depths.dedup();
    depths
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lower::synthetic::Decoder;

    #[test]
    fn questions_differ_from_what_is_chosen_and_from_each_other() {
        let graph = Decoder::llama_1b().graph();
        let base = LowerOptions::for_engines();
        for profile in [Profile::decode(256), Profile::decode(4096), Profile::prefill(128, 1024)] {
            for about in QUESTIONS {
                let asked = question(about, &graph, &profile, &base);
                let mut seen = vec![effective(&graph, &base, &profile)];
                for (what, options) in &asked.alternatives {
                    let effective = effective(&graph, options, &profile);
                    assert!(!seen.contains(&effective), "{profile}: {what} again");
                    seen.push(effective);
                }
            }
        }
        let names = |about, profile: Profile| -> Vec<String> {
            let asked = question(about, &graph, &profile, &base).alternatives;
            asked.into_iter().map(|(what, _)| what).collect()
        };
        assert_eq!(
            names("products", Profile::decode(1024)),
            ["matrix products", "reductions to depth 2048"]
        );
        // 64 parts of 16 slots are nothing; at 1024 slots reduced scores are what ByCapacity means.
        assert_eq!(
            names("attention", Profile::decode(1024)),
            [
                "attention layer, folded",
                "attention layer, heads as they are",
                "single layers",
                "4 parts",
                "8 parts",
                "16 parts"
            ]
        );
        let prefill = Profile::prefill(128, 1024);
        assert_eq!(names("products", prefill), ["activations flattened"]);
        assert_eq!(
            names("attention", prefill),
            ["attention layer, folded", "single layers"]
        );
        assert_eq!(
            names("fusion", prefill),
            ["products of one activation as one", "each product alone"]
        );
    }
}
