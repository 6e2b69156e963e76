//! The report of `lapidary inspect`: everything that was recognized in an export, and everything that was not.

use std::collections::{BTreeMap, HashMap};

use serde::Serialize;

use super::attention::Obstacle;
use super::attention::layout::CacheLayout;
use super::roles::InputRole;
use super::{ActivationPolicy, Activations, Analyzed, Canonical, CanonicalizeOptions, ModelKind, PassError};
use crate::graph::op::Op;
use crate::graph::{AttentionScores, Graph, Shape, ValueId, infer};
use crate::help::Help;

/// The report.
#[derive(Clone, Debug, Serialize)]
pub struct Recognition {
    /// `concat`, `scatter_nd`, `scatter_elements`, `tensor_scatter`, `group_query_attention`, `attention_past`, or
    /// `none`; of the first cache.
    pub cache: String,
    /// Slots of a static cache, if the export fixed them.
    pub capacity: Option<usize>,
    /// Role of each input, in the export's order.
    pub inputs: Vec<Input>,
    /// Recognized attention layers, in order of execution.
    pub layers: Vec<LayerReport>,
    /// How often each operator occurs in the export.
    pub operators: BTreeMap<String, usize>,
    /// Number of fused and other notable operators, found or recognized, by name.
    pub patterns: BTreeMap<String, usize>,
    /// Activations that the export rounds to codes, and those that will be left in floating point.
    #[serde(skip_serializing_if = "Activations::is_empty")]
    pub activations: Activations,
    /// Unknown operators, with their nodes.
    pub unsupported: BTreeMap<String, Vec<String>>,
    /// Its kind, if it is not a decoder with a cache of keys and values: `encoder_decoder`, `hybrid`, `state_space`,
    /// `no_cache`, `encoder`, `classifier_or_embedding` or `no_tokens`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub kind: Option<&'static str>,
    /// The known sizes of the model if there are obstacles.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub outline: Option<Outline>,
    /// What prevents the export from being converted.
    pub obstacles: Vec<Obstacle>,
    /// What to do about them.
    pub help: Option<String>,
    /// `None` if there are obstacles.
    pub architecture: Option<super::Architecture>,
}

/// Sizes of a model as far as known.
#[derive(Clone, Debug, Serialize)]
pub struct Outline {
    /// Recognized attention layers.
    pub attentions: usize,
    /// Softmaxes and attention operators of the export: candidates for attention.
    pub candidates: usize,
    /// Width of an embedding.
    pub hidden: Option<usize>,
    /// Row length of the logits.
    pub vocabulary: Option<usize>,
    /// Query heads, KV heads and head dim of the first attention.
    pub heads: Option<(usize, usize, usize)>,
}

/// `1 of 2 attentions understood, 4 query heads over 2 KV heads of 16, hidden 64, vocabulary 320, as far as known`
impl std::fmt::Display for Outline {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "{} of {} attentions understood",
            self.attentions,
            self.candidates.max(self.attentions)
        )?;
        if let Some((heads, kv_heads, dim)) = self.heads {
            write!(f, ", {heads} query heads over {kv_heads} KV heads of {dim}")?;
        }
        for (name, size) in [("hidden", self.hidden), ("vocabulary", self.vocabulary)] {
            if let Some(size) = size {
                write!(f, ", {name} {size}")?;
            }
        }
        Ok(())
    }
}

/// An input of the export.
#[derive(Clone, Debug, Serialize)]
pub struct Input {
    /// In the export.
    pub name: String,
    /// Its role, in snake case; `?` if unknown.
    pub role: String,
}

/// One attention.
#[derive(Clone, Debug, Serialize)]
pub struct LayerReport {
    /// Node of the export.
    pub node: String,
    /// Query heads.
    pub heads: usize,
    /// Key and value heads.
    pub kv_heads: usize,
    /// Elements of one head of keys and queries.
    pub head_dim: usize,
    /// Scale, soft cap and window, as separate fields in JSON.
    #[serde(flatten)]
    pub scores: AttentionScores,
    /// `half`, `interleaved` or `none`.
    pub rotary: String,
    /// Leading elements of a head that are rotated; 0 for none.
    pub rotary_dim: usize,
    /// Axes of the cache in the export.
    pub cache_layout: String,
}

/// Analyzes an export as read, without changing it. Never fails: errors are in the report. Also returns the canonical
/// graph if there are none.
pub fn recognize(export: &Graph, options: &CanonicalizeOptions) -> (Recognition, Option<Canonical>) {
    let mut report = Recognition {
        cache: cache_form(export).to_string(),
        capacity: None,
        inputs: Vec::new(),
        layers: Vec::new(),
        operators: super::contract::histogram(export),
        patterns: BTreeMap::new(),
        activations: Activations::default(),
        unsupported: BTreeMap::new(),
        kind: None,
        outline: None,
        obstacles: Vec::new(),
        help: None,
        architecture: None,
    };
    for id in export.node_ids() {
        let node = export.node(id);
        if matches!(node.op, Op::Unknown { .. }) {
            report
                .unsupported
                .entry(node.op.name())
                .or_default()
                .push(node.name.clone());
        }
    }
    let refuse = |report: &mut Recognition, error: PassError| {
        report.help = error.help();
        report.obstacles = obstacles(error);
    };
    // The rest of the model is analyzed regardless of its activations.
    let lenient = CanonicalizeOptions {
        activations: match options.activations {
            ActivationPolicy::Quantized => ActivationPolicy::Partial,
            policy => policy,
        },
        ..options.clone()
    };
    let look = super::look::look(export.clone(), &lenient, &mut Vec::new());
    roles(&mut report, export, &look.roles);
    if let Some(analyzed) = &look.analyzed {
        fill(&mut report, analyzed);
    }
    let kind = look.kind.as_ref().map(ModelKind::name);
    let errors = match look.errors.is_empty() && report.obstacles.is_empty() {
        true => None,
        false => {
            let mut errors = look.errors;
            if !report.obstacles.is_empty() {
                let obstacles = std::mem::take(&mut report.obstacles);
                errors.push(PassError::Obstacles { obstacles });
            }
            Some(PassError::of_kind(look.kind, errors))
        }
    };
    if let Some(error) = errors {
        report.kind = kind;
        report.outline = Some(outline(export, &report));
        refuse(&mut report, error);
    }
    let mut made = None;
    if report.obstacles.is_empty() {
        match super::canonicalize(export.clone(), options) {
            Ok(canonical) => {
                report.architecture = Some(canonical.architecture.clone());
                report.activations = canonical.activations.clone();
                made = Some(canonical);
            }
            Err(error) => refuse(&mut report, error),
        }
    }
    (report, made)
}

fn obstacles(error: PassError) -> Vec<Obstacle> {
    match error {
        PassError::Obstacles { obstacles } => obstacles,
        PassError::Several { errors } => errors.into_iter().flat_map(obstacles).collect(),
        PassError::Kind { kind, errors } => std::iter::once(Obstacle {
            layer: None,
            at: "model".into(),
            reason: kind.to_string(),
        })
        .chain(errors.into_iter().flat_map(obstacles))
        .collect(),
        other => vec![Obstacle {
            layer: None,
            at: "model".into(),
            reason: other.to_string(),
        }],
    }
}

/// Roles of all inputs, as far as they are known.
fn roles(report: &mut Recognition, export: &Graph, of: &HashMap<ValueId, InputRole>) {
    let role = |id: &ValueId| {
        of.get(id)
            .map_or_else(|| "?".to_string(), |role| snake(&format!("{role:?}")))
    };
    let inputs = export.inputs.iter().map(|id| Input {
        name: export.value(*id).name.clone(),
        role: role(id),
    });
    report.inputs = inputs.collect();
}

/// The known sizes despite obstacles.
fn outline(export: &Graph, report: &Recognition) -> Outline {
    let mut typed = export.clone();
    let _ = typed.sort().map(|()| infer(&mut typed));
    let nodes = export.node_ids().map(|id| export.node(id));
    let candidates = nodes
        .filter(|node| matches!(node.op, Op::Softmax { .. } | Op::GroupQueryAttention(_)) || node.op.is_attention());
    let width = |role: &str| {
        let input = report.inputs.iter().find(|input| input.role == role)?;
        typed.find(&input.name)
    };
    let uses = typed.uses();
    let tables = width("input_ids").and_then(|ids| uses.get(&ids)).into_iter().flatten();
    let table = tables.filter_map(|(node, _)| match typed.node(*node) {
        node if matches!(node.op, Op::Gather { .. }) => typed.shape(node.input(0)?),
        _ => None,
    });
    let last = |shape: Option<&Shape>| shape.and_then(|s| s.last()?.as_const()).map(|n| n as usize);
    let logits = typed
        .outputs
        .first()
        .and_then(|id| typed.shape(*id))
        .filter(|shape| shape.len() == 3);
    Outline {
        attentions: report.layers.len(),
        candidates: candidates.count(),
        hidden: last(table.into_iter().next_back())
            .or_else(|| last(width("embeddings").and_then(|id| typed.shape(id)))),
        vocabulary: last(logits),
        heads: report
            .layers
            .first()
            .map(|layer| (layer.heads, layer.kv_heads, layer.head_dim)),
    }
}

fn fill(report: &mut Recognition, analyzed: &Analyzed) {
    let (roles, analysis) = (&analyzed.roles, &analyzed.analysis);
    report.activations = analyzed.activations.clone();
    report.capacity = roles.capacity;
    report.obstacles = analysis.obstacles.clone();
    for layer in &analysis.layers {
        let key = &analysis.caches[&layer.key_cache];
        report.layers.push(LayerReport {
            node: layer.found.name.clone(),
            heads: layer.query.heads,
            kv_heads: key.heads,
            head_dim: key.dim,
            scores: layer.scores,
            rotary: match layer.query.rotated().map(|(_, rope)| rope) {
                None => "none",
                Some(rope) if rope.interleaved => "interleaved",
                Some(_) => "half",
            }
            .to_string(),
            rotary_dim: layer.query.rotated().map_or(0, |(_, rope)| rope.rotary_dim),
            cache_layout: match key.layout {
                CacheLayout::HeadsFirst => "[batch, kv_heads, slots, head_dim]",
                CacheLayout::SlotsFirst => "[batch, slots, kv_heads, head_dim]",
                CacheLayout::Flat => "[batch, slots, kv_heads*head_dim]",
            }
            .to_string(),
        });
    }
    let mut count = |name: &str, n: usize| {
        if n > 0 {
            *report.patterns.entry(name.to_string()).or_insert(0) += n;
        }
    };
    count("attention", analysis.layers.len());
    count(
        "rotary_embedding",
        analysis.layers.iter().filter(|l| l.query.rotated().is_some()).count(),
    );
    count(
        "sliding_window",
        analysis.layers.iter().filter(|l| l.scores.window.is_some()).count(),
    );
    for id in analyzed.graph.node_ids() {
        match analyzed.graph.node(id).op {
            Op::RmsNormalization { .. } => count("rms_norm", 1),
            Op::LayerNormalization { .. } => count("layer_norm", 1),
            Op::Experts(_) => count("experts", 1),
            Op::Swish { .. } => count("silu", 1),
            Op::Gelu { .. } => count("gelu", 1),
            _ => {}
        }
    }
}

fn snake(name: &str) -> String {
    let mut out = String::new();
    for c in name.chars() {
        if c.is_uppercase() && !out.is_empty() {
            out.push('_');
        }
        out.extend(c.to_lowercase());
    }
    out
}

/// How the export writes its cache, from the operators that read float inputs of rank 3 and more.
fn cache_form(graph: &Graph) -> &'static str {
    let mut form = "none";
    let uses = graph.uses();
    let cache = |id: &&crate::graph::ValueId| {
        let value = graph.value(**id);
        value.dtype.is_some_and(|t| t.is_float()) && value.shape.as_ref().is_some_and(|s| s.len() > 2)
    };
    let mut stack: Vec<_> = graph.inputs.iter().filter(cache).copied().collect();
    let mut seen: std::collections::HashSet<_> = stack.iter().copied().collect();
    while let Some(value) = stack.pop() {
        for (node, _) in uses.get(&value).into_iter().flatten() {
            let node = graph.node(*node);
            form = match node.op {
                Op::Concat { .. } => "concat",
                Op::ScatterNd { .. } => "scatter_nd",
                Op::ScatterElements { .. } => "scatter_elements",
                Op::TensorScatter { .. } => "tensor_scatter",
                Op::GroupQueryAttention(_) => "group_query_attention",
                Op::Attention(_) => "attention_past",
                Op::Where | Op::Binary(_) => "select",
                Op::Transpose { .. }
                | Op::Reshape { .. }
                | Op::Identity
                | Op::Cast { .. }
                | Op::QuantizeLinear { .. }
                | Op::DequantizeLinear { .. } => {
                    stack.extend(node.output(0).filter(|v| seen.insert(*v)));
                    continue;
                }
                _ => continue,
            };
            return form;
        }
    }
    form
}
