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
mod kind;
pub mod layer_norm;
mod lengths;
pub mod linear;
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

use std::collections::{BTreeMap, HashMap, HashSet};
use std::time::Instant;

use serde::Serialize;

pub use architecture::{Architecture, ExpertCounts, Rotary};
pub use attention::Obstacle;
pub use contract::is_canonical;
pub use error::PassError;
pub use kind::ModelKind;
pub use quantized::{ActivationPolicy, Activations};
pub use recognize::{LayerReport, Recognition, recognize};
pub use table::{PASSES, PassInfo, info};

use crate::graph::infer::infer;
use crate::graph::{Graph, NodeId, ValueId};
use crate::graph::{Obstacles, verify};
use crate::interface::{Interface, Role};
use crate::tensor::DType;
use attention::Analysis;
use roles::Roles;

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

/// An export with its attention recognized, before anything is written.
pub(crate) struct Analyzed {
    /// Tidied up and typed.
    pub graph: Graph,
    /// Roles of its inputs.
    pub roles: Roles,
    /// Analysis of its attention.
    pub analysis: Analysis,
    /// Its quantized activations.
    pub activations: Activations,
}

/// A simple pass: rewrites in place and returns the number of rewrites.
type Pass = fn(&mut Graph) -> Result<usize, PassError>;

/// Passes on the export's own dialect, in order.
const TIDY: &[(&PassInfo, Pass)] = &[
    (&table::FOLD, fold::run),
    (&table::CLEANUP, cleanup::run),
    (&table::DECOMPOSE_CONTRIB, decompose::contrib::run),
    (&table::LAYER_NORM, layer_norm::run),
    (&table::RMS_NORM, rms_norm::run),
    (&table::HEAD_NORMS, head_norms::run),
    (&table::ACTIVATION, activation::run),
];

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

/// Inputs that are masks of `[.., tokens, slots]` which the caller fills and which are not known to be causal.
pub fn unknown_masks(graph: &Graph) -> Option<Vec<String>> {
    let (of, _) = roles::guess(graph);
    fixed_dims::unknown_masks(graph, &of, &MaskWindows::new()).map(|(_, inputs)| inputs)
}

/// The findings about an export, and everything that prevents its conversion.
pub(crate) struct Look {
    /// As far as they are known.
    pub roles: HashMap<ValueId, roles::InputRole>,
    /// Its kind, if it is not a decoder with a cache.
    pub kind: Option<ModelKind>,
    /// `None` if its attention could not be analyzed.
    pub analyzed: Option<Analyzed>,
    /// `None` if no obstacle was found.
    pub errors: Vec<PassError>,
}

/// The first half of the pipeline: everything up to the analysis. Continues after an unknown operator, as far as its
/// consequences allow.
pub(crate) fn look(mut graph: Graph, options: &CanonicalizeOptions, report: &mut Vec<PassReport>) -> Look {
    let mut look = Look {
        roles: HashMap::new(),
        kind: None,
        analyzed: None,
        errors: Vec::new(),
    };
    if let Err(cycle) = graph.sort() {
        look.errors.push(cycle.into());
        return look;
    }
    graph.remove_dead_nodes();
    look.roles = roles::guess(&graph).0;
    look.kind = kind::of(&graph, &look.roles);
    let obstacles = contract::unknown(&graph);
    let all_known = obstacles.is_empty();
    if !all_known {
        look.errors.push(PassError::Obstacles { obstacles });
    }
    let behind: HashSet<String> = {
        let behind = kind::behind_unknown(&graph);
        let nodes = graph.node_ids().map(|id| graph.node(id));
        let nodes = nodes.filter(|node| node.outputs.iter().flatten().any(|v| behind.contains(v)));
        nodes.map(|node| node.name.clone()).collect()
    };
    let roles = timed(&mut graph, report, &table::ROLES, |graph| {
        Ok((0, roles::assign(graph, &options.mask_windows)?))
    });
    let roles = match roles {
        Ok(roles) => roles,
        Err(error) => {
            look.errors.extend(error.each());
            return look;
        }
    };
    match analyzed(graph, roles, all_known, options, report) {
        Ok(mut analyzed) => {
            // An error after an unknown operator may be a consequence of it.
            let obstacles = &mut analyzed.analysis.obstacles;
            obstacles.retain(|obstacle| !behind.contains(&obstacle.at) || moved_codes::is_left(obstacle));
            if !all_known && !obstacles.is_empty() {
                let obstacles = std::mem::take(obstacles);
                look.errors.push(PassError::Obstacles { obstacles });
            }
            look.analyzed = Some(analyzed);
        }
        Err(error) => {
            let reported = |error: &PassError| match error {
                PassError::Obstacles { obstacles } => obstacles
                    .iter()
                    .all(|o| behind.contains(&o.at) && !moved_codes::is_left(o)),
                PassError::Infer(_) => true,
                _ => false,
            };
            look.errors
                .extend(error.each().into_iter().filter(|error| all_known || !reported(error)));
        }
    }
    look
}

/// The analysis of a graph whose inputs have roles. `all_known`: it has no unknown operator.
fn analyzed(
    mut graph: Graph,
    mut roles: Roles,
    all_known: bool,
    options: &CanonicalizeOptions,
    report: &mut Vec<PassReport>,
) -> Result<Analyzed, PassError> {
    timed(&mut graph, report, &table::INFER, |graph| Ok((0, infer(graph)?)))?;
    if let Err(Obstacles(mut obstacles)) = verify(&graph) {
        obstacles.retain(|o| all_known || !matches!(o, crate::graph::Obstacle::UnknownOp { .. }));
        if !obstacles.is_empty() {
            return Err(Obstacles(obstacles).into());
        }
    }
    // Before all others, whose patterns do not handle codes.
    let activations = timed(&mut graph, report, &table::QUANTIZED, |graph| {
        quantized::run(graph, options.activations)
    })?;
    let left = moved_codes::left(&graph, &roles);
    let recognized = recognized(&mut graph, &mut roles, options, report);
    let analysis = match recognized {
        Ok(analysis) if left.obstacles.is_empty() => analysis,
        // Failures caused by codes are not reported.
        Ok(mut analysis) => {
            analysis
                .obstacles
                .retain(|obstacle| !left.behind.contains(&obstacle.at));
            analysis.obstacles.splice(0..0, left.obstacles);
            analysis
        }
        Err(_) if !left.obstacles.is_empty() => {
            return Err(PassError::Obstacles {
                obstacles: left.obstacles,
            });
        }
        Err(error) => return Err(error),
    };
    Ok(Analyzed {
        graph,
        roles,
        analysis,
        activations,
    })
}

/// Tidies up and recognizes experts and attention.
fn recognized(
    graph: &mut Graph,
    roles: &mut Roles,
    options: &CanonicalizeOptions,
    report: &mut Vec<PassReport>,
) -> Result<Analysis, PassError> {
    for (info, pass) in TIDY {
        timed(graph, report, info, |graph| Ok((pass(graph)?, ())))?;
    }
    timed(graph, report, &table::INFER, |graph| Ok((0, infer(graph)?)))?;
    let obstacles = timed(graph, report, &table::EXPERTS, |graph| experts::run(graph, roles))?;
    if !obstacles.is_empty() {
        return Err(PassError::Obstacles { obstacles });
    }
    timed(graph, report, &table::INFER, |graph| Ok((0, infer(graph)?)))?;
    timed(graph, report, &table::CHOSEN_ROWS, |graph| {
        Ok((chosen_rows::run(graph, roles)?, ()))
    })?;
    timed(graph, report, &table::DECOMPOSE_ATTENTION, |graph| {
        Ok((decompose::attention::run(graph), ()))
    })?;
    timed(graph, report, &table::INFER, |graph| Ok((0, infer(graph)?)))?;
    timed(graph, report, &table::LATENT, |graph| {
        Ok((attention::latent::run(graph, roles)?, ()))
    })?;
    timed(graph, report, &table::ATTENTION, |graph| {
        let analysis = attention::analyze(graph, roles, options.max_positions);
        Ok((analysis.layers.len(), analysis))
    })
}

/// [`look`], for callers that only need exports that can be rewritten.
pub(crate) fn analyze(
    graph: Graph,
    options: &CanonicalizeOptions,
    report: &mut Vec<PassReport>,
) -> Result<(Analyzed, Option<ModelKind>), PassError> {
    let look = look(graph, options, report);
    match (look.analyzed, look.errors.is_empty()) {
        (Some(analyzed), true) => Ok((analyzed, look.kind)),
        _ => Err(PassError::of_kind(look.kind, look.errors)),
    }
}

/// Lengths at which the export's positional values may change, each with a constant that it comes from: windows, ends
/// of tables, switches of a scaling.
pub fn lengths_of(export: Graph, max_positions: usize) -> Result<BTreeMap<usize, String>, PassError> {
    let options = CanonicalizeOptions {
        max_positions,
        // Rounding does not affect positions.
        activations: ActivationPolicy::Partial,
        ..CanonicalizeOptions::default()
    };
    Ok(analyze(export, &options, &mut Vec::new())?.0.analysis.lengths)
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
