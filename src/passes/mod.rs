//! Rewrites of an export into the canonical graph (see [`graph`](crate::graph)'s head).
//!
//! [`canonicalize`] runs a named list of passes ([`PASSES`]) and reports on each. The first passes tidy up (folding,
//! fused norms and activations); the middle ones recognize the model: the role of each input (`roles`), the values that
//! depend on positions alone (`dependence`), the operands and caches of every attention ([`attention`]). They match
//! structure only as far as necessary and prove the rest by execution (`partial_eval`): a mask, a rotation, a cache
//! update or a head repetition is identified by what it computes, whatever form an exporter uses. The last passes write
//! the result (`emit`), check it against the contract (`contract`) and bring weights into the layout and dtype that the
//! lowering requires.
//!
//! Each plain rewrite is `run(&mut Graph, ..) -> Result<usize, PassError>`, returns the number of rewrites (0: the
//! graph is unchanged), leaves the graph sorted and without dead nodes, and can be run alone, in any order and repeatedly. A
//! pass leaves everything unchanged that it cannot prove. Passes read dtypes and shapes that `graph::infer` left on values
//! and keep those of values they keep; values they add may be untyped, so infer again after a pass.
//!
//! | module | rewrite |
//! |---|---|
//! | [`fold`] | constants computed; weights moved by recipe; shape arithmetic by symbolic contents |
//! | [`cleanup`] | operators that change nothing; equal nodes and equal constants merged |
//! | [`decompose`] | contrib operators and attention operators decomposed into plain ones |
//! | [`layer_norm`], [`rms_norm`] | normalizations fused from their parts |
//! | [`activation`] | SiLU and GELU fused from their parts, proved by execution |
//! | `experts` | mixtures of experts, proved by execution |
//! | `emit` | recognized attention as canonical operators |
//! | `batch` | any number of sequences if the export fixed it |
//! | `reshapes` | reshapes with constant targets |
//! | `positions` | embeddings of positions by `position_ids` |
//! | `tied` | a head that repeats the embedding's bytes reads the embedding |
//! | [`linear`] | every linear layer as `MatMul(x, Transpose(weight))` and `Add` |
//! | [`dtype`] | another float type for the whole graph |
//!
//! Everything that prevents an export from being canonical is collected into one [`PassError::Obstacles`], which names
//! layers and nodes.

pub mod activation;
mod architecture;
mod attention;
mod batch;
mod chosen_rows;
pub mod cleanup;
mod contract;
pub mod decompose;
mod dependence;
pub mod dtype;
mod emit;
mod error;
mod experts;
mod fixed_dims;
pub mod fold;
pub mod head_norms;
pub mod joined_values;
mod kind;
pub mod layer_norm;
mod lengths;
pub mod linear;
mod look;
mod moved_codes;
pub(crate) mod partial_eval;
mod pattern;
mod positions;
mod quantized;
mod recognize;
mod reshapes;
pub mod rms_norm;
pub(crate) mod roles;
mod table;
mod tied;

use std::collections::{BTreeMap, HashSet};
use std::time::Instant;

use serde::Serialize;

pub use architecture::{Architecture, ExpertCounts, Rotary};
pub use attention::Obstacle;
pub use contract::is_canonical;
pub use error::PassError;
pub use kind::ModelKind;
pub use look::{lengths_of, unknown_masks};
pub use quantized::{ActivationPolicy, Activations};
pub use recognize::{LayerReport, Recognition, recognize};
pub use table::{PASSES, PassInfo, info};

use crate::graph::infer::infer;
use crate::graph::{Graph, NodeId, ValueId, verify};
use crate::interface::{Interface, Role};
use crate::tensor::DType;
use attention::Analysis;
use look::{Analyzed, analyze};

/// Options of [`canonicalize`].
#[derive(Clone, Debug)]
pub struct CanonicalizeOptions {
    /// Rows of rotary tables: the largest capacity that will be needed. Tables of the export may be shorter.
    pub max_positions: usize,
    /// Element type of weights, activations and caches; `None` keeps the export's.
    pub dtype: Option<DType>,
    /// Weights too large for `dtype` become infinite instead of being refused.
    pub allow_overflow: bool,
    /// Treatment of activations that the export quantizes.
    pub activations: ActivationPolicy,
    /// How many positions the masks that the caller fills let a query attend to, by the names of their inputs.
    pub mask_windows: MaskWindows,
}

/// Windows of inputs that are masks of `[.., tokens, slots]`: the last positions that a query attends to, itself included;
/// `None` for all.
pub type MaskWindows = BTreeMap<String, Option<usize>>;

impl Default for CanonicalizeOptions {
    fn default() -> Self {
        CanonicalizeOptions {
            max_positions: 4096,
            dtype: None,
            allow_overflow: false,
            activations: ActivationPolicy::default(),
            mask_windows: MaskWindows::new(),
        }
    }
}

/// The canonical graph, facts about the model, and reports of the passes.
#[derive(Clone, Debug)]
pub struct Canonical {
    /// Canonical and verified.
    pub graph: Graph,
    /// Sizes of the model.
    pub architecture: Architecture,
    /// The activations that are rounded to codes.
    pub activations: Activations,
    /// One entry for each pass, in order; passes that run several times occur several times.
    pub report: Vec<PassReport>,
}

/// One pass of one run.
#[derive(Clone, Debug, Serialize)]
pub struct PassReport {
    /// A name of [`PASSES`].
    pub name: &'static str,
    /// Rewrites made.
    pub rewrites: usize,
    /// Nodes of the graph before the pass.
    pub nodes_before: usize,
    /// Nodes of the graph after the pass.
    pub nodes_after: usize,
    /// Wall-clock time.
    pub seconds: f64,
}

/// A simple pass: rewrites in place and returns the number of rewrites.
type Pass = fn(&mut Graph) -> Result<usize, PassError>;

/// Passes on the canonical graph, in order.
const FINISH: &[(&PassInfo, Pass)] = &[
    (&table::FOLD, fold::run),
    (&table::TIED, tied::run),
    (&table::LINEAR, linear::run),
    (&table::CLEANUP, cleanup::run),
];

/// ONNX Runtime refuses graphs in which two nodes share a name.
fn unique_names(graph: &mut Graph) {
    let ids: Vec<NodeId> = graph.node_ids().collect();
    let mut taken: HashSet<String> = HashSet::with_capacity(ids.len());
    for id in ids {
        let base = graph.node(id).name.clone();
        let mut name = base.clone();
        for n in 1.. {
            if taken.insert(name.clone()) {
                break;
            }
            name = format!("{base}.{n}");
        }
        graph.node_mut(id).name = name;
    }
}

/// Times a pass, sorts the graph after it and reports.
fn timed<T>(
    graph: &mut Graph,
    report: &mut Vec<PassReport>,
    info: &'static PassInfo,
    pass: impl FnOnce(&mut Graph) -> Result<(usize, T), PassError>,
) -> Result<T, PassError> {
    let start = Instant::now();
    let nodes_before = graph.node_ids().count();
    let (rewrites, result) = pass(graph)?;
    graph.sort()?;
    report.push(PassReport {
        name: info.name,
        rewrites,
        nodes_before,
        nodes_after: graph.node_ids().count(),
        seconds: start.elapsed().as_secs_f64(),
    });
    Ok(result)
}

/// Roundings inside attention that the recognized attention layers do not include, with their inputs.
fn rounded_inside(graph: &Graph, analysis: &Analysis) -> Vec<(NodeId, String)> {
    let roundings = &analysis.roundings;
    let others = roundings.all.difference(&roundings.placed);
    let named = others.filter_map(|value| {
        let (node, _) = graph.def(*value)?;
        Some((node, attention::rounding::name_of_rounded(graph, *value)))
    });
    let mut named: Vec<(NodeId, String)> = named.collect();
    named.sort_unstable();
    named
}

/// Makes an export canonical.
pub fn canonicalize(graph: Graph, options: &CanonicalizeOptions) -> Result<Canonical, PassError> {
    let mut report = Vec::new();
    let (analyzed, kind) = analyze(graph, options, &mut report)?;
    let Analyzed {
        mut graph,
        mut roles,
        analysis,
        activations,
    } = analyzed;
    if !analysis.obstacles.is_empty() {
        let obstacles = analysis.obstacles;
        return Err(PassError::of_kind(kind, vec![PassError::Obstacles { obstacles }]));
    }
    if !analysis.unplaced.is_empty() {
        let values = analysis
            .unplaced
            .iter()
            .map(|at| format!("{} ({})", at.value, at.reason));
        return Err(PassError::RoundedAttention {
            values: values.collect(),
        });
    }
    let inside = rounded_inside(&graph, &analysis);
    let refuse = |obstacles: Vec<Obstacle>| PassError::Obstacles { obstacles };
    timed(&mut graph, &mut report, &table::EMIT, |graph| {
        emit::run(graph, &roles, &analysis).map_err(refuse)?;
        graph.remove_dead_nodes();
        Ok((analysis.layers.len(), ()))
    })?;
    // None is lost: the attention layers include it, or the operator is still in the graph.
    let lost = inside.into_iter().filter(|(id, _)| !graph.contains(*id));
    let lost: Vec<String> = lost
        .map(|(_, name)| format!("{name} (its place is not known)"))
        .collect();
    if !lost.is_empty() {
        return Err(PassError::RoundedAttention { values: lost });
    }
    fn interface(graph: &Graph) -> &Interface<ValueId> {
        graph.interface.as_ref().expect("emit gave the graph its interface")
    }
    timed(&mut graph, &mut report, &table::RESHAPES, |graph| {
        let rewrites = reshapes::run(graph, interface(graph).token_input());
        graph.remove_dead_nodes();
        Ok((rewrites, ()))
    })?;
    let limit = timed(&mut graph, &mut report, &table::POSITIONS, |graph| {
        let rows = analysis.position_limit.unwrap_or(usize::MAX).min(options.max_positions);
        let position_ids = interface(graph).input(Role::PositionIds);
        let position_ids = position_ids.expect("every interface has positions");
        let found = positions::run(graph, &roles, position_ids, rows).map_err(refuse)?;
        graph.remove_dead_nodes();
        Ok(found)
    })?;
    timed(&mut graph, &mut report, &table::INFER, |graph| Ok((0, infer(graph)?)))?;
    // A session feeds one sequence.
    if let Some(number) = roles.batch.filter(|number| *number > 1) {
        timed(&mut graph, &mut report, &table::BATCH, |graph| {
            let values = batch::run(graph, number).map_err(refuse)?;
            graph.remove_dead_nodes();
            Ok((values, ()))
        })?;
        roles.batch = None;
        timed(&mut graph, &mut report, &table::INFER, |graph| Ok((0, infer(graph)?)))?;
    }
    for (info, pass) in FINISH {
        timed(&mut graph, &mut report, info, |graph| Ok((pass(graph)?, ())))?;
    }
    timed(&mut graph, &mut report, &table::INFER, |graph| Ok((0, infer(graph)?)))?;
    if let Some(dtype) = options.dtype {
        timed(&mut graph, &mut report, &table::DTYPE, |graph| {
            Ok((dtype::run(graph, dtype, options.allow_overflow)?, ()))
        })?;
        timed(&mut graph, &mut report, &table::INFER, |graph| Ok((0, infer(graph)?)))?;
    }
    let obstacles = contract::check(&graph);
    if !obstacles.is_empty() {
        return Err(refuse(obstacles));
    }
    unique_names(&mut graph);
    verify(&graph).map_err(|broken| PassError::Broken {
        pass: "canonicalize",
        reason: broken.to_string(),
    })?;
    let architecture = architecture::describe(&graph, &roles, &analysis, limit).ok_or(PassError::NoCache)?;
    Ok(Canonical {
        graph,
        architecture,
        activations,
        report,
    })
}
