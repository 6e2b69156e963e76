//! The canonical graph to TensorRT layers, for one [`Profile`].
//!
//! Input: the canonical graph (head of [`graph`](crate::graph)). Output: the [`Network`] whose interface is in the head
//! of [`network`](crate::network). `batch` and `capacity` become numbers; so does `tokens` in a static profile, while
//! in a dynamic one it is the only symbol. i64 becomes i32 throughout. Choices that do not change the result are in
//! [`LowerOptions`], so that a tuner can try them. [`LowerError`] reports at once everything that cannot be lowered.
//!
//! One file per family: `linear`, `elementwise`, `normalization`, `attention` (and the cache), `rotary`, `movement`,
//! `positions` (ranges, comparisons, masks), `gather`, `experts`, `fuse` (products of one activation),
//! `quantized_weights`, `kernels` (Lapidary's own layers). `dispatch` selects the file of an operator. Around them: `weights` decides
//! which constants are weights and names them, `demand` finds the values that are needed as data, `logit_rows` drops tokens without
//! logits, `constant_folding` prevents TensorRT from folding. `context` holds the state of a lowering, `values` turns the graph's
//! values into tensors, `shuffles` joins reshapes and transposes.
//!
//! # What is a weight
//!
//! A constant is a weight of the network if its bytes are elsewhere ([`ConstantSource::Absent`]), if it is larger than
//! [`LITERAL_BYTES`], or if it is a float tensor of two elements or more that came from the export (it has an
//! [`origin`](crate::graph::Constant::origin)): linear weights, embeddings, norm scales, biases, rotary tables.
//! Everything else (an epsilon, a scale, index vectors) is a constant layer and part of the plan. The rule reads the
//! graph alone, so all profiles of one graph have the same weights under the same names; [`weights`] lists them, and
//! [`stored_weights`] those of the graph after it was written to a package and read back. One constant with several
//! readers, such as tied embedding and output weights, is one weight. A quantized weight is one weight too, or in
//! networks of an engine its parts: [`QuantizedForm`].
//!
//! # A synthetic model
//!
//! [`synthetic`] builds the canonical graph of a Llama of any size with absent weights, for build benchmarks: `cargo
//! run --release --example llama_shape -- 8b` lowers it and builds its bound engine (target: under 30 s).

mod attention;
mod constant_folding;
mod context;
mod demand;
mod dispatch;
mod elementwise;
mod error;
mod experts;
mod fuse;
mod gather;
mod kernels;
mod linear;
mod logit_rows;
mod movement;
mod normalization;
mod positions;
mod quantization;
mod quantized_weights;
mod rotary;
mod shuffles;
pub mod synthetic;
mod values;
mod weights;
mod written_out;

pub(crate) use demand::through_transpose;
pub use error::{LowerError, Obstacle};
pub use fuse::parts;
pub use kernels::apply as kernels_apply;
pub use quantized_weights::widened_formats;
pub use weights::{LITERAL_BYTES, NamedWeight, stored_weights, weights};
pub use written_out::rotations_before_norms;

use crate::dim::Dim;
#[cfg(doc)]
use crate::graph::ConstantSource;
use crate::graph::Graph;
use crate::graph::infer::{InferenceFacts, infer};
use crate::network::{Network, Profile, Tokens, WeightMode, verify_interface};
use attention::{PARTS, SHORT};
use context::Lowering;

/// The form of linear layers. Their inputs are `[batch, tokens, in]`, their weights `[out, in]`, and
/// TensorRT multiplies equal ranks only.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LinearForm {
    /// The activation becomes `[batch * tokens, in]`: one matrix product for the whole batch, and the weight is read as
    /// stored.
    #[default]
    FlattenActivation,
    /// The weight becomes `[1, out, in]`.
    RaiseWeight,
    /// Like [`LinearForm::FlattenActivation`], but a single row is multiplied with every row of the weight and summed,
    /// in fp32: TensorRT's fused reduction reads weights faster than its matrix product of one row does.
    ReduceRow,
}

/// The form of attention.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum AttentionForm {
    /// One Attention layer. Attention with a softcap is still decomposed, because the layer has none.
    #[default]
    Layer,
    /// Matrix products and a softmax in fp32, the query heads of a group always folded into rows.
    Decomposed,
    /// With one token: the same, over this many parts of the cache in parallel. Otherwise [`AttentionForm::Layer`].
    Split(usize),
    /// With one token: scores as sums over products of query and keys, the rest like [`AttentionForm::Decomposed`].
    /// Otherwise [`AttentionForm::Layer`].
    ReducedScores,
    /// The fastest in measurements: with one token [`AttentionForm::ReducedScores`] up to 1024 slots and sixteen parts beyond, with
    /// several one Attention layer.
    ByCapacity,
}

impl AttentionForm {
    /// Resolves [`AttentionForm::ByCapacity`] for a profile; other forms stay the same.
    pub fn at(self, profile: &Profile) -> AttentionForm {
        match self {
            AttentionForm::ByCapacity if profile.tokens != Tokens::Static(1) => AttentionForm::Layer,
            AttentionForm::ByCapacity if profile.capacity <= SHORT => AttentionForm::ReducedScores,
            AttentionForm::ByCapacity => AttentionForm::Split(PARTS),
            form => form,
        }
    }
}

/// How quantized weights enter a network. A format that a form does not support becomes a weight of floats, or uses the
/// elementwise form.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum QuantizedForm {
    /// Each is one weight with a quantized constant, for an executor that reads codes itself. Engines get dequantized
    /// values.
    #[default]
    Whole,
    /// Codes and scales are separate weights, which TensorRT's Dequantize layer reads before a product.
    Dequantize,
    /// The same with a value in between that prevents TensorRT from fusing it with the product: fused products of codes
    /// and several rows are slow, or fail when an engine is loaded.
    DequantizeApart,
    /// Elementwise layers convert and scale bound codes; for one row as part of the sums, if
    /// [`LowerOptions::reduce_depth`] allows them.
    Elementwise,
}

impl QuantizedForm {
    fn is_whole(&self) -> bool {
        *self == QuantizedForm::Whole
    }
}

/// The form of a mixture of experts.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ExpertsForm {
    /// One layer, for an executor that computes only the chosen experts.
    #[default]
    Layer,
    /// Every token through every expert, times weights that are 0 for those not chosen: `experts / top_k` times the
    /// multiplications, and every weight is read once whatever the number of tokens.
    All,
    /// The matrices of the chosen experts gathered for each token, for few rows: `top_k` experts are read for each row
    /// (and written and read again, unless the gather is fused into the product).
    Chosen,
}

impl ExpertsForm {
    fn is_layer(&self) -> bool {
        *self == ExpertsForm::Layer
    }
}

/// Choices of a lowering. None changes the result, except for rounding.
#[derive(Clone, Debug, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct LowerOptions {
    /// How every weight enters an engine.
    pub weight_mode: WeightMode,
    /// With one token, the query heads of a KV group become query rows:
    /// `[batch, heads, 1, d]` → `[batch, kv_heads, heads/kv_heads, d]`.
    pub fold_groups: bool,
    /// Form of products of one row, and of all others unless `prefill_linear` is set.
    pub linear: LinearForm,
    /// Form of products of several rows.
    pub prefill_linear: Option<LinearForm>,
    /// [`LinearForm::ReduceRow`] only for weights of at most this many columns: the input of a product is recomputed
    /// for each of its rows, which costs more for wider weights.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reduce_depth: Option<usize>,
    /// Linear layers that read the same activation become one product (see [`parts`] for its weight).
    pub fuse_linear: bool,
    /// Also for pairs, such as gate and up. As separate products, the second can include the activation and the product
    /// with the first.
    pub fuse_pairs: bool,
    /// Like `fold_groups`, for several tokens and from this capacity on: `[batch, heads, tokens, d]` → `[batch,
    /// kv_heads, heads/kv_heads * tokens, d]`. TensorRT's attention kernel repeats keys and values for every query head
    /// otherwise, which is a little faster and takes `4 * heads * d` bytes per slot.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub fold_prefill: Option<usize>,
    /// The form of attention.
    pub attention: AttentionForm,
    /// How quantized weights enter the network: for one row, and for more unless `prefill_quantized` is set.
    #[serde(skip_serializing_if = "QuantizedForm::is_whole")]
    pub quantized: QuantizedForm,
    /// The same for several rows.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub prefill_quantized: Option<QuantizedForm>,
    /// The form of mixtures of experts: for one row, and for more unless `prefill_experts` is set.
    #[serde(skip_serializing_if = "ExpertsForm::is_layer")]
    pub experts: ExpertsForm,
    /// The same for several rows.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub prefill_experts: Option<ExpertsForm>,
    /// With one row and bound weights in 16 bits or quantized: parts that Lapidary's kernels support become its own
    /// layers ([`LayerKind::RowProduct`](crate::network::LayerKind::RowProduct),
    /// [`LayerKind::DecodeAttention`](crate::network::LayerKind::DecodeAttention)).
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub kernels: bool,
}

impl Default for LowerOptions {
    fn default() -> Self {
        LowerOptions {
            weight_mode: WeightMode::default(),
            fold_groups: true,
            linear: LinearForm::default(),
            prefill_linear: None,
            reduce_depth: None,
            fuse_linear: false,
            fuse_pairs: true,
            fold_prefill: None,
            attention: AttentionForm::default(),
            quantized: QuantizedForm::default(),
            prefill_quantized: None,
            experts: ExpertsForm::default(),
            prefill_experts: None,
            kernels: false,
        }
    }
}

/// Deeper rows are read faster as matrix products: 14336 columns at 2.95 TB/s against 2.15 reduced, 5632 at 1.9 against
/// 2.8 (docs/explanation/gpu.md).
const WIDEST_REDUCED: usize = 8192;

/// From this many slots on, keys and values repeated for each query head would take more than a few hundred megabytes.
const LONG: usize = 32768;

impl LowerOptions {
    /// The form of products of this many rows.
    pub(crate) fn form(&self, rows: &Dim) -> LinearForm {
        match self.prefill_linear {
            Some(form) if !rows.is_one() => form,
            _ => self.linear,
        }
    }

    /// The form of experts of this many rows.
    pub(crate) fn experts_form(&self, rows: &Dim) -> ExpertsForm {
        match self.prefill_experts {
            Some(form) if !rows.is_one() => form,
            _ => self.experts,
        }
    }

    /// Good choices for TensorRT engines without tuning: docs/explanation/gpu.md has the figures.
    pub fn for_engines() -> Self {
        LowerOptions {
            linear: LinearForm::ReduceRow,
            prefill_linear: Some(LinearForm::RaiseWeight),
            reduce_depth: Some(WIDEST_REDUCED),
            fuse_linear: true,
            fuse_pairs: false,
            attention: AttentionForm::ByCapacity,
            fold_prefill: Some(LONG),
            quantized: QuantizedForm::Dequantize,
            prefill_quantized: Some(QuantizedForm::DequantizeApart),
            experts: ExpertsForm::Chosen,
            prefill_experts: Some(ExpertsForm::All),
            kernels: true,
            ..LowerOptions::default()
        }
    }
}

/// Lowers a canonical graph. The network passes [`verify`](crate::network::verify()) and [`verify_interface`].
pub fn lower(canonical: &Graph, profile: &Profile, options: &LowerOptions) -> Result<Network, LowerError> {
    let network = lower_graph(canonical, profile, options)?;
    verify_interface(&network).map_err(Box::new)?;
    Ok(network)
}

/// Lowers any graph of operators that have a lowering, without requiring a cache or logits. For tests of single
/// operators.
pub fn lower_graph(graph: &Graph, profile: &Profile, options: &LowerOptions) -> Result<Network, LowerError> {
    // Canonical graphs of the passes are typed, and a session lowers one for every prompt length. So inference runs
    // only if a type is missing or the graph contains shape arithmetic.
    if is_typed(graph) {
        match lower_typed(graph, &InferenceFacts::default(), profile, options) {
            Err(LowerError::Unsupported(_)) => {}
            done => return done,
        }
    }
    let mut graph = graph.clone();
    graph.sort()?;
    let facts = infer(&mut graph).map_err(Box::new)?;
    lower_typed(&graph, &facts, profile, options)
}

fn is_typed(graph: &Graph) -> bool {
    let mut outputs = graph.node_ids().flat_map(|id| graph.node(id).outputs.iter().flatten());
    outputs.all(|v| graph.value(*v).dtype.is_some() && graph.shape(*v).is_some())
}

fn lower_typed(
    graph: &Graph,
    facts: &InferenceFacts,
    profile: &Profile,
    options: &LowerOptions,
) -> Result<Network, LowerError> {
    let mut demand = demand::demand(graph);
    let table = weights::table(graph, &demand);
    let kernels = match kernels::apply(profile, options) {
        true => kernels::KernelPlan::find(graph, &mut demand, &table),
        false => kernels::KernelPlan::default(),
    };
    let rows = logit_rows::row_wise(graph, &demand, profile);
    let fusions = match options.fuse_linear {
        true => fuse::Fusions::find(graph, &demand, &table, options, |node| rows.contains(&node)),
        false => fuse::Fusions::default(),
    };
    let mut lowering = Lowering::new(graph, facts, *profile, options, &table, rows, fusions);
    lowering.kernels = kernels;
    lowering.inputs()?;
    let mut obstacles = Vec::new();
    for id in graph.node_ids() {
        let node = graph.node(id);
        let lowered = match lowering.kernels.writes_at(id) {
            true => lowering.kernel_layer(id),
            false if demand.nodes.contains(&id) => lowering.node(id),
            false => continue,
        };
        match lowered {
            Ok(()) | Err(error::Reason::Upstream) => {}
            Err(reason) => obstacles.push(Obstacle {
                node: lowering.base_name(node),
                op: node.op.name(),
                reason: reason.to_string(),
            }),
        }
    }
    if !obstacles.is_empty() {
        return Err(LowerError::Unsupported(obstacles));
    }
    lowering.finish()
}
