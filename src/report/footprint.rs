//! Tables of a group besides its times: loading and building, and memory.

use super::input::{Group, ResultFile};
use super::markdown::{cite, ms, or_missing, table};
use crate::bench::result::{Build, Document};
use crate::terms::{COLD_LOAD, CUDA_CONTEXT, ENGINE, KV_CACHE, PLAN, SCRATCH, WARM_LOAD};
use crate::units::bytes;

/// From nothing to a session, and what engines are.
pub fn loading(group: &Group) -> String {
    let rows = group.results.iter().map(|r| {
        let d = &r.of;
        let (cold, warm) = loads(d, group.on_gpu);
        let built = d.build.as_ref().filter(|b| !b.engines.is_empty());
        let plans = d.sizes.as_ref().and_then(|s| s.plans_bytes).filter(|n| *n > 0);
        vec![
            d.system.label.clone(),
            or_missing(cold),
            or_missing(warm),
            or_missing(built.map(|b| b.engines.len().to_string())),
            or_missing(plans.map(bytes)),
            or_missing(built.map(build_time)),
            cite(r.source),
        ]
    });
    let header = [
        "system",
        COLD_LOAD.column,
        WARM_LOAD.column,
        ENGINE.column,
        PLAN.column,
        "build s",
        "",
    ];
    table(&header, &rows.collect::<Vec<_>>())
}

/// The load without and with kernels kept from an earlier one. Only Lapidary keeps any, on a GPU: every load of others is without.
fn loads(d: &Document, on_gpu: bool) -> (Option<String>, Option<String>) {
    let Some(load) = &d.load else {
        return (None, None);
    };
    let (first, usual) = (load.first_load_ms.map(ms), load.load_ms.map(ms));
    if d.system.name != "lapidary" || !on_gpu {
        return (usual, None);
    }
    match (first, load.kernels_kept) {
        (Some(first), _) => (Some(first), usual),
        (None, Some(true)) => (None, usual),
        (None, Some(false)) => (usual, None),
        (None, None) => (usual.map(|ms| format!("{ms} (whether kept is not recorded)")), None),
    }
}

/// Seconds of all engines, one after the other.
fn build_time(build: &Build) -> String {
    // Older files have 0 for what came from a cache.
    let built: Vec<f64> = build
        .engines
        .iter()
        .filter_map(|e| e.build_ms)
        .filter(|ms| *ms > 0.0)
        .collect();
    let seconds = format!("{:.1}", built.iter().sum::<f64>() / 1e3);
    match (built.len(), build.engines.len() - built.len()) {
        (0, _) => "from the cache".to_string(),
        (_, 0) => seconds,
        (_, cached) => format!("{seconds} ({cached} from the cache)"),
    }
}

/// At its peak.
pub fn memory(group: &Group) -> String {
    let rows = group.results.iter().map(|r| {
        let memory = r.of.memory.as_ref();
        let device = memory.and_then(|m| m.device);
        let of_device = |part: Option<u64>| or_missing(part.map(bytes));
        let mut row = vec![
            r.of.system.label.clone(),
            or_missing(memory.and_then(|m| m.peak_host_bytes).map(bytes)),
            or_missing(memory.and_then(|m| m.peak_anonymous_host_bytes).map(bytes)),
        ];
        if group.on_gpu {
            row.extend([
                of_device(device.map(|m| m.total)),
                of_device(device.and_then(|m| m.weights)),
                of_device(device.and_then(|m| m.cache)),
                of_device(device.and_then(|m| m.scratch)),
                of_device(device.and_then(|m| m.context)),
            ]);
        }
        row.push(cite(r.source));
        row
    });
    let mut header = vec!["system", "host, with mapped files", "host, without"];
    if group.on_gpu {
        header.extend([
            "device",
            "weights",
            KV_CACHE.column,
            SCRATCH.column,
            CUDA_CONTEXT.column,
        ]);
    }
    header.push("");
    let mut out = table(&header, &rows.collect::<Vec<_>>());
    let without: Vec<String> = group
        .results
        .iter()
        .filter(|r| lacks_context(r))
        .map(|r| r.of.system.label.clone())
        .collect();
    if group.on_gpu && !without.is_empty() {
        out += &format!(
            "\nIn the files of {}, which are older than the field for the context, the device's memory is without it, and Lapidary's is \
             of the end.\n",
            without.join("; ")
        );
    }
    out
}

/// Whether the total of its device memory leaves CUDA's own out: transformers' files always had it in.
fn lacks_context(r: &ResultFile) -> bool {
    let device = r.of.memory.as_ref().and_then(|m| m.device);
    r.of.system.name != "transformers" && device.is_some_and(|m| m.context.is_none())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::result::BuiltEngine;

    #[test]
    fn plans_from_a_cache_took_no_time() {
        let build = |times: &[Option<f64>]| {
            let engine = |build_ms: &Option<f64>| BuiltEngine {
                profile: "b1-t1-c256".to_string(),
                bytes: 1,
                build_ms: *build_ms,
            };
            build_time(&Build {
                engines: times.iter().map(engine).collect(),
            })
        };
        assert_eq!(build(&[None, Some(0.0)]), "from the cache");
        assert_eq!(build(&[Some(1500.0), Some(500.0)]), "2.0");
        assert_eq!(build(&[Some(1500.0), None]), "1.5 (1 from the cache)");
    }
}
