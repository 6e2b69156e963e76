//! The table of operators: one entry each, in the form `Variant { field: type = how ONNX writes it } => facts;`.
//!
//! The comment names the inputs. `onnx` takes the name, the opsets that define a version, and the inputs; `contrib` the
//! name and the inputs.

use super::attributes::{
    Attribute, AttributeSource, AttributeSpec, count, either, element, element_type, flag, float_type, int,
    nonzero_real, optional_int, optional_real, permutation, real, required_int, required_size, rounding, scatter_mode,
    size, word, written_real,
};
use super::declare::operators;
use super::info::{
    self, Family, Moves, OperatorInfo, RowWise, any, boolean, contrib, float, index, int32, int64, number, onnx, own,
};
use super::{Binary, ChosenWeights, ExpertActivation, Reduction, Rounding, RouterScores, ScatterMode, Unary};
use crate::tensor::{DType, Tensor};

const KEEPDIMS: super::attributes::Flag = flag("keepdims", true);
const NOOP: super::attributes::Flag = flag("noop_with_empty_axes", false);

operators! {
    plain {
        // Elementwise
        Gelu { tanh: bool = either("approximate", "none", "tanh") }
            => onnx("Gelu", &[20], &[float()]).family(Family::Elementwise).like_input().row_wise(RowWise::Always);
        /// `x * sigmoid(alpha * x)`; SiLU at alpha 1.
        Swish { alpha: f32 = real("alpha", 1.0) }
            => onnx("Swish", &[24], &[float()]).family(Family::Elementwise).like_input().row_wise(RowWise::Always);
        /// `x` where it is positive, `alpha * (exp(x) - 1)` elsewhere.
        Elu { alpha: f32 = real("alpha", 1.0) }
            => onnx("Elu", &[1, 6, 22], &[float()]).family(Family::Elementwise).like_input().row_wise(RowWise::Always);
        /// Inputs: x, min?, max?.
        Clip => onnx("Clip", &[1, 6, 11, 12, 13], &[number().same(), number().same().optional(), number().same().optional()])
            .family(Family::Elementwise).row_wise(RowWise::Always);
        Identity => onnx("Identity", &[1, 13, 14, 16, 19, 21, 23, 24], &[any()])
            .family(Family::Elementwise).row_wise(RowWise::Always).moves(Moves::InOrder);
        /// `saturate` and `round_mode` matter for float8 only.
        Cast { to: DType = element_type("to") }
            => onnx("Cast", &[1, 6, 9, 13, 19, 21, 23, 24], &[any()])
            .ignores(&["saturate", "round_mode"]).family(Family::Elementwise).row_wise(RowWise::Always);
        /// Inputs: x, a tensor of the dtype to cast to.
        CastLike => onnx("CastLike", &[15, 19, 21, 23, 24], &[any(), any().parameter()])
            .ignores(&["saturate", "round_mode"]).family(Family::Elementwise);
        /// Inputs: condition, then, else.
        Where => onnx("Where", &[9, 16], &[boolean(), any().same(), any().same()])
            .family(Family::Elementwise).row_wise(RowWise::Always);

        // Products
        MatMul => onnx("MatMul", &[1, 9, 13], &[number().same(), number().same()]).family(Family::Product);
        /// `alpha * a' * b' + beta * c`; inputs a, b, c?.
        Gemm {
            alpha: f32 = real("alpha", 1.0),
            beta: f32 = real("beta", 1.0),
            trans_a: bool = flag("transA", false),
            trans_b: bool = flag("transB", false),
        } => onnx("Gemm", &[1, 6, 7, 9, 11, 13], &[number().same(), number().same(), number().same().optional()])
            .family(Family::Product);

        // Reductions
        Softmax { axis: i64 = int("axis", -1) }
            => onnx("Softmax", &[1, 11, 13], &[float()]).family(Family::Reduction).row_wise(RowWise::OverLastAxis);
        LogSoftmax { axis: i64 = int("axis", -1) }
            => onnx("LogSoftmax", &[1, 11, 13], &[float()]).family(Family::Reduction).row_wise(RowWise::OverLastAxis);
        /// Inputs: x, axis.
        CumSum { exclusive: bool = flag("exclusive", false), reverse: bool = flag("reverse", false) }
            => onnx("CumSum", &[11, 14], &[number(), index()]).family(Family::Reduction);

        // Movement
        Shape { start: i64 = int("start", 0), end: Option<i64> = optional_int("end") }
            => onnx("Shape", &[1, 13, 15, 19, 21, 23, 24], &[any().parameter()]).family(Family::Movement);
        Size => onnx("Size", &[1, 13, 19, 21, 23, 24], &[any().parameter()]).family(Family::Movement);
        /// Inputs: x, shape.
        Reshape { allowzero: bool = flag("allowzero", false) }
            => onnx("Reshape", &[1, 5, 13, 14, 19, 21, 23, 24], &[any(), int64().parameter()])
            .family(Family::Movement).moves(Moves::InOrder);
        Transpose { perm: Option<Vec<usize>> = permutation("perm") }
            => onnx("Transpose", &[1, 13, 21, 23, 24], &[any()]).family(Family::Movement).moves(Moves::Elsewhere);
        /// Inputs: x, axes?.
        Squeeze => onnx("Squeeze", &[1, 11, 13, 21, 23, 24], &[any(), int64().optional().parameter()])
            .family(Family::Movement).moves(Moves::InOrder);
        /// Inputs: x, axes.
        Unsqueeze => onnx("Unsqueeze", &[1, 11, 13, 21, 23, 24], &[any(), int64().parameter()])
            .family(Family::Movement).moves(Moves::InOrder);
        Flatten { axis: i64 = int("axis", 1) }
            => onnx("Flatten", &[1, 9, 11, 13, 21, 23, 24], &[any()]).family(Family::Movement).moves(Moves::InOrder);
        /// Inputs: x, shape.
        Expand => onnx("Expand", &[8, 13], &[any(), int64().parameter()]).family(Family::Movement).moves(Moves::Elsewhere);
        /// Inputs: x, repeats.
        Tile => onnx("Tile", &[1, 6, 13], &[any(), int64().parameter()]).family(Family::Movement).moves(Moves::Elsewhere);
        Concat { axis: i64 = required_int("axis") }
            => onnx("Concat", &[1, 4, 11, 13], &[any().same()]).variadic()
            .family(Family::Movement).moves(Moves::Elsewhere);
        /// Inputs: x, sizes?; without sizes, one equal part per output.
        Split { axis: i64 = int("axis", 0) }
            => onnx("Split", &[1, 2, 11, 13, 18], &[any(), int64().optional().parameter()]).outputs(usize::MAX)
            .family(Family::Movement).moves(Moves::Elsewhere);
        /// Inputs: x, starts, ends, axes?, steps?.
        Slice => onnx(
                "Slice",
                &[1, 10, 11, 13],
                &[
                    any(),
                    index().same().parameter(),
                    index().same().parameter(),
                    index().same().optional().parameter(),
                    index().same().optional().parameter(),
                ],
            )
            .family(Family::Movement).moves(Moves::Elsewhere);
        /// Inputs: start, limit, step, all scalars.
        Range => onnx("Range", &[11], &[number().same(), number().same(), number().same()]).family(Family::Movement);
        /// Inputs: shape.
        ConstantOfShape { value: Tensor = element("value") }
            => onnx("ConstantOfShape", &[9, 20, 21, 23, 24], &[int64().parameter()]).family(Family::Movement);
        /// Inputs: x, k?.
        Trilu { upper: bool = flag("upper", true) }
            => onnx("Trilu", &[14], &[any(), int64().optional()]).family(Family::Movement).like_input();

        // Indexing
        /// Inputs: x, indices.
        Gather { axis: i64 = int("axis", 0) }
            => onnx("Gather", &[1, 11, 13], &[any(), index()]).family(Family::Indexing).moves(Moves::Elsewhere);
        /// Inputs: x, indices.
        GatherElements { axis: i64 = int("axis", 0) }
            => onnx("GatherElements", &[11, 13], &[any(), index()]).family(Family::Indexing).moves(Moves::Elsewhere);
        /// Inputs: x, indices.
        GatherNd { batch_dims: usize = size("batch_dims") }
            => onnx("GatherND", &[11, 12, 13], &[any(), int64()]).family(Family::Indexing).moves(Moves::Elsewhere);
        /// Inputs: x, indices, updates.
        ScatterNd { mode: ScatterMode = scatter_mode("reduction") }
            => onnx("ScatterND", &[11, 13, 16, 18], &[any().same(), int64(), any().same()])
            .family(Family::Indexing).not_canonical();
        /// Inputs: x, indices, updates.
        ScatterElements { axis: i64 = int("axis", 0), mode: ScatterMode = scatter_mode("reduction") }
            => onnx("ScatterElements", &[11, 13, 16, 18], &[any().same(), index(), any().same()])
            .family(Family::Indexing).not_canonical();
        /// Inputs: past_cache, update, write_indices?. Writes `update` into the cache from `write_indices[batch]` on.
        TensorScatter { axis: i64 = int("axis", -2), circular: bool = either("mode", "linear", "circular") }
            => onnx("TensorScatter", &[24], &[any().same(), any().same(), int64().optional()]).family(Family::Indexing);

        // Selection
        /// Inputs: x, k (one element). Outputs: the k greatest (or least) along the axis, and their indices.
        TopK { axis: i64 = int("axis", -1), largest: bool = flag("largest", true), sorted: bool = flag("sorted", true) }
            => onnx("TopK", &[1, 10, 11, 24], &[number(), int64().parameter()]).outputs(2)
            .family(Family::Selection).not_canonical();
        ArgMax {
            axis: i64 = int("axis", 0),
            keepdims: bool = flag("keepdims", true),
            select_last_index: bool = flag("select_last_index", false),
        } => onnx("ArgMax", &[1, 11, 12, 13], &[number()]).family(Family::Selection).not_canonical();
        /// Inputs: x. Output: `[rank, n]`, the indices of the n elements that are not 0.
        NonZero => onnx("NonZero", &[9, 13], &[any()]).family(Family::Selection).not_canonical();
        /// Inputs: indices, depth (one element), values (`[off, on]`). A new axis of `depth` elements.
        OneHot { axis: i64 = int("axis", -1) }
            => onnx("OneHot", &[9, 11], &[number(), number().parameter(), any()])
            .family(Family::Selection).not_canonical();

        // Normalizations
        /// Inputs: x, scale, bias?. Statistics in fp32. In ONNX Runtime, scale and bias may have another float type
        /// than x.
        LayerNormalization { axis: i64 = int("axis", -1), epsilon: f32 = real("epsilon", 1e-5) }
            => onnx("LayerNormalization", &[17], &[float(), float(), float().optional()]).outputs(3)
            .ignores(&["stash_type"]).family(Family::Normalization).row_wise(RowWise::OverLastAxis);
        /// Inputs: x, scale. `x / sqrt(mean(x²) + epsilon) * scale` over the axes from `axis` on, statistics in fp32.
        RmsNormalization { axis: i64 = int("axis", -1), epsilon: f32 = real("epsilon", 1e-5) }
            => onnx("RMSNormalization", &[23], &[float(), float()]).outputs(2)
            .ignores(&["stash_type"]).family(Family::Normalization).row_wise(RowWise::OverLastAxis);

        // Attention
        /// Inputs: x, cos_cache, sin_cache, position_ids?. x is `[batch, heads, tokens, head_dim]`, or
        /// `[batch, tokens, heads*head_dim]` with `num_heads` set; caches are `[max_position, rotary_dim/2]` with
        /// position_ids, `[batch, tokens, rotary_dim/2]` without.
        RotaryEmbedding {
            interleaved: bool = flag("interleaved", false),
            num_heads: Option<usize> = count("num_heads"),
            /// 0: the whole head.
            rotary_dim: usize = size("rotary_embedding_dim"),
        } => onnx(
                "RotaryEmbedding",
                &[23],
                &[float().same(), float().same(), float().same(), int64().optional()],
            )
            .family(Family::Attention);

        // Quantization
        /// Inputs: x, scale, zero_point?. `x / scale` rounded to even, plus the zero point, saturated; codes of `to`.
        QuantizeLinear {
            axis: i64 = int("axis", 1),
            block_size: usize = size("block_size"),
            to: DType = element_type("output_dtype"),
        } => onnx("QuantizeLinear", &[10, 13, 19, 21, 23, 24], &[number(), float(), any().optional()])
            .family(Family::Quantization).not_canonical();
        /// Inputs: codes, scale, zero_point?. `(code - zero point) * scale`, in the scale's type. Of constants it is a
        /// constant ([`Constant::quantized`](crate::graph::Constant::quantized)).
        DequantizeLinear { axis: i64 = int("axis", 1), block_size: usize = size("block_size") }
            => onnx("DequantizeLinear", &[10, 13, 19, 21, 23, 24], &[any(), float(), any().optional()])
            .family(Family::Quantization).not_canonical();
        /// Inputs: x. Outputs: u8 codes over the range of all of x and 0, their scale, their zero point.
        DynamicQuantizeLinear => onnx("DynamicQuantizeLinear", &[11], &[float()]).outputs(3)
            .family(Family::Quantization).not_canonical();
        /// Inputs: a, b, zero point of a?, zero point of b?. The i32 product of 8-bit codes less their zero points.
        MatMulInteger => onnx("MatMulInteger", &[10], &[number(), number(), number().optional(), number().optional()])
            .family(Family::Quantization).not_canonical();
        /// Every element rounded to the value of its nearest code: `QuantizeLinear` with one scale for all, followed by
        /// `DequantizeLinear`, in fp32.
        RoundToCodes {
            to: DType = element_type("to"),
            scale: f32 = real("scale", 1.0),
            zero_point: i64 = int("zero_point", 0),
        } => own("RoundToCodes", &[float()])
            .family(Family::Quantization).like_input().row_wise(RowWise::Always);
        /// Every element rounded to the value of its nearest u8 code, over the range of x and 0:
        /// `DynamicQuantizeLinear` followed by `DequantizeLinear`, in fp32.
        DynamicRoundToCodes => own("DynamicRoundToCodes", &[float()]).family(Family::Quantization).like_input();

        // Contrib operators of ONNX Runtime
        /// `com.microsoft::RotaryEmbedding`. Inputs: x, position_ids, cos_cache, sin_cache.
        ContribRotaryEmbedding {
            interleaved: bool = flag("interleaved", false),
            num_heads: Option<usize> = count("num_heads"),
            rotary_dim: usize = size("rotary_embedding_dim"),
        } => contrib("RotaryEmbedding", &[float().same(), int64(), float().same(), float().same()])
            .family(Family::Attention).like_input();
        /// `com.microsoft::SkipSimplifiedLayerNormalization`. Inputs: x, skip, scale, bias?. Outputs: y, _, _, sum?.
        SkipRmsNormalization { epsilon: f32 = written_real("epsilon", 1e-12) }
            => contrib(
                "SkipSimplifiedLayerNormalization",
                &[float().same(), float().same(), float().same(), float().same().optional()],
            )
            .outputs(4).family(Family::Normalization);
        /// `com.microsoft::SkipLayerNormalization`. Inputs: x, skip, gamma, beta?, bias?. Outputs: y, _, _, sum?.
        SkipLayerNormalization { epsilon: f32 = written_real("epsilon", 1e-12) }
            => contrib(
                "SkipLayerNormalization",
                &[
                    float().same(),
                    float().same(),
                    float().same(),
                    float().same().optional(),
                    float().same().optional(),
                ],
            )
            .outputs(4).family(Family::Normalization);
        /// `com.microsoft::FusedMatMul`: `alpha * a' * b'`, transposing the last two axes.
        FusedMatMul {
            alpha: f32 = real("alpha", 1.0),
            trans_a: bool = flag("transA", false),
            trans_b: bool = flag("transB", false),
        } => contrib("FusedMatMul", &[number().same(), number().same()]).family(Family::Product);
    }
    records {
        /// ONNX `Attention` (opset 23 and 24). Inputs: q, k, v, attn_mask?, past_key?, past_value?, nonpad_kv_seqlen?.
        /// Outputs: y, present_key?, present_value?, qk_matmul?. q is `[batch, heads, tokens, head_dim]` or
        /// `[batch, tokens, heads*head_dim]` (then `q_num_heads` is set).
        Attention {
            /// Query `i` sees key `j` only if `j <= i` (after the past).
            is_causal: bool = flag("is_causal", false),
            /// `None`: 1/√head_dim.
            scale: Option<f32> = optional_real("scale"),
            /// 0: none.
            softcap: f32 = real("softcap", 0.0),
            /// Set when q, k, v are three-dimensional.
            q_num_heads: Option<usize> = count("q_num_heads"),
            /// Like `q_num_heads`, for keys and values.
            kv_num_heads: Option<usize> = count("kv_num_heads"),
            /// `None`: the dtype of q.
            softmax_precision: Option<DType> = float_type("softmax_precision"),
        } => onnx(
                "Attention",
                &[23, 24],
                &[
                    float().same(),
                    float().same(),
                    float().same(),
                    any().optional(),
                    float().same().optional(),
                    float().same().optional(),
                    int64().optional(),
                ],
            )
            .outputs(4).family(Family::Attention);
        /// Attention whose scores or probabilities are rounded to codes. Inputs: q `[batch, heads, tokens, head_dim]`,
        /// k and v `[batch, kv_heads, slots, ..]`, mask (bool, true where a token attends to a slot). The scaled
        /// products of queries and keys are rounded before the soft cap, or after it and before the mask; the
        /// probabilities are rounded before their product with the values. All in fp32.
        RoundedAttention {
            /// Factor of the products of queries and keys.
            scale: f32 = written_real("scale", 1.0),
            /// 0: none.
            softcap: f32 = real("softcap", 0.0),
            /// Rounding of the scaled scores.
            scores: Option<Rounding> = rounding("scores_to", "scores_scale", "scores_zero_point"),
            /// Rounding of the scores after the soft cap, before the mask.
            capped: Option<Rounding> = rounding("capped_to", "capped_scale", "capped_zero_point"),
            /// Rounding of the softmax's result.
            probabilities: Option<Rounding>
                = rounding("probabilities_to", "probabilities_scale", "probabilities_zero_point"),
        } => own("RoundedAttention", &[float().same(), float().same(), float().same(), boolean()])
            .family(Family::Attention);
        /// Attention in which each head has a bias and a sink. Inputs: q, k, v and mask as in [`RoundedAttention`] (the
        /// mask can also be additive), slopes and sinks, both f32 `[heads]`. `slopes[head] * slot` is added to the
        /// scores after the soft cap (ALiBi; 0: no bias), and `sinks[head]` is the score of an additional slot, which
        /// takes a share of the softmax but has no value (minus infinity: no sink). All in fp32.
        BiasedAttention {
            /// Factor of the products of queries and keys.
            scale: f32 = written_real("scale", 1.0),
            /// 0: none.
            softcap: f32 = real("softcap", 0.0),
        } => own(
                "BiasedAttention",
                &[float().same(), float().same(), float().same(), any(), float(), float()],
            )
            .family(Family::Attention);
        /// `com.microsoft::GroupQueryAttention`. Inputs: query (or packed qkv), key?, value?, past_key?, past_value?,
        /// seqlens_k (i32 `[batch]`, total − 1), total_sequence_length (i32 scalar), cos_cache?, sin_cache?,
        /// position_ids?, attention_bias?, head_sink?, k_scale?, v_scale?, q_norm_weight?, k_norm_weight? (both
        /// `[head_dim]`, of a norm of every head before its rotation).
        GroupQueryAttention {
            /// Query heads.
            num_heads: usize = required_size("num_heads"),
            /// Key and value heads.
            kv_num_heads: usize = required_size("kv_num_heads"),
            /// `None` (ONNX Runtime's 0): 1/√head_dim.
            scale: Option<f32> = nonzero_real("scale"),
            /// 0: none.
            softcap: f32 = real("softcap", 0.0),
            /// −1: no window. Otherwise the number of positions that a query attends to, itself included.
            local_window_size: i64 = int("local_window_size", -1),
            /// Rotates query and key by the tables.
            do_rotary: bool = flag("do_rotary", false),
            /// Pairs of the rotation are (2i, 2i + 1).
            rotary_interleaved: bool = flag("rotary_interleaved", false),
            /// 1: the softmax has an additional slot with the score 0, which takes a share. Other values: no such slot.
            smooth_softmax: i64 = int("smooth_softmax", 0),
            /// Epsilon of the norm of every query and key head, where it has weights.
            qk_norm_epsilon: f32 = real("qk_norm_epsilon", 1e-6),
        } => contrib(
                "GroupQueryAttention",
                &[
                    float().same(),
                    float().same().optional(),
                    float().same().optional(),
                    float().same().optional(),
                    float().same().optional(),
                    int32(),
                    int32(),
                    float().same().optional(),
                    float().same().optional(),
                    int64().optional(),
                    float().same().optional(),
                    float().same().optional(),
                    float().optional(),
                    float().optional(),
                    float().same().optional(),
                    float().same().optional(),
                ],
            )
            .outputs(3).family(Family::Attention);
        /// The experts of every token and their weights. Inputs: logits `[.., experts]`, correction? `[experts]`.
        /// Outputs: weights `[.., top_k]` (typed like the logits), experts `[.., top_k]` (i64), in descending order of
        /// score.
        ///
        /// Every expert has a score. The `top_k` greatest of score plus correction are chosen, the lower number first
        /// among equals; the correction does not affect the weights. With groups, adjacent experts form groups of equal
        /// size, and outside of the `top_groups` best groups the sum counts as 0. A group's rank is the sum of its
        /// `group_best` greatest. Computed in fp32.
        Routing {
            /// Experts per token.
            top_k: usize = required_size("top_k"),
            /// How scores follow from logits.
            scores: RouterScores = word("scores", RouterScores::Softmax),
            /// How weights follow from the chosen scores.
            weights: ChosenWeights = word("weights", ChosenWeights::Scores),
            /// Of the weights `sparse_mixer`.
            margin: f32 = real("margin", 0.0),
            /// Factor of the weights.
            scale: f32 = real("scale", 1.0),
            /// 0: none.
            groups: usize = size("groups"),
            /// Number of groups that experts are chosen from.
            top_groups: usize = size("top_groups"),
            /// Number of experts that rank a group.
            group_best: usize = size("group_best"),
        } => own("Routing", &[float(), float().optional()]).outputs(2)
            .family(Family::Experts).row_wise(RowWise::Always);
        /// A mixture of feed-forward layers; every token passes through a few. Inputs: x `[.., in]`, weights and
        /// experts `[.., top_k]` (see [`Routing`]), gate `[experts * hidden, in]`, up? (as gate), down `[experts * out,
        /// hidden]`, gate_bias? `[experts * hidden]`, up_bias? (as gate_bias), down_bias? `[experts * out]`. The
        /// matrices of the experts are concatenated.
        ///
        /// The sum over a token's experts `e` of its weight times `down[e] h + down_bias[e]`, where `h` is
        /// `activation(gate[e] x + gate_bias[e])`, times `up[e] x + up_bias[e] + beta` if there is an `up`.
        Experts {
            /// Number of experts.
            experts: usize = required_size("experts"),
            /// The function.
            activation: ExpertActivation = word("activation", ExpertActivation::Swish),
            /// Alpha of the function `swish`.
            alpha: f32 = real("alpha", 1.0),
            /// Added to `up`.
            beta: f32 = real("beta", 0.0),
            /// 0: none. Otherwise the function's argument is at most this, and `up` is clamped to it on both sides.
            limit: f32 = real("limit", 0.0),
        } => own(
                "Experts",
                &[
                    float(),
                    float(),
                    int64(),
                    float().same(),
                    float().same().optional(),
                    float().same(),
                    float().same().optional(),
                    float().same().optional(),
                    float().same().optional(),
                ],
            )
            .family(Family::Experts);
    }
}
