//! The first half of the pipeline: an export is tidied up, and the roles of its inputs and its attention are recognized. Nothing
//! is written yet. [`super::canonicalize`] goes on from here; [`recognize`](super::recognize) only reports what was found.

use std::collections::{BTreeMap, HashMap, HashSet};

use super::attention::{self, Analysis};
use super::error::PassError;
use super::kind::{self, ModelKind};
use super::quantized::{self, ActivationPolicy, Activations};
use super::roles::{self, Roles};
use super::{
    CanonicalizeOptions, MaskWindows, Pass, PassInfo, PassReport, activation, chosen_rows, cleanup, contract,
    decompose, experts, fixed_dims, fold, head_norms, joined_values, layer_norm, moved_codes, rms_norm, table, timed,
};
use crate::graph::infer::infer;
use crate::graph::{Graph, Obstacles, ValueId, verify};

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

/// Everything up to the analysis. Continues after an unknown operator, as far as its
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
    let joined = timed(graph, report, &table::JOINED_VALUES, |graph| {
        let joined = joined_values::run(graph)?;
        Ok((joined, joined))
    })?;
    if joined > 0 {
        timed(graph, report, &table::INFER, |graph| Ok((0, infer(graph)?)))?;
    }
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

/// Inputs that are masks of `[.., tokens, slots]` which the caller fills and which are not known to be causal.
pub fn unknown_masks(graph: &Graph) -> Option<Vec<String>> {
    let (of, _) = roles::guess(graph);
    fixed_dims::unknown_masks(graph, &of, &MaskWindows::new()).map(|(_, inputs)| inputs)
}
