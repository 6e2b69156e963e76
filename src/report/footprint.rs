//! Tables of loading, building and memory, with a column per model.

use super::input::{Group, ResultFile};
use super::markdown::ms;
use super::matrix::{Cell, heads, labeled, labels, matrix};
use crate::bench::result::{Build, Document};
use crate::terms::{COLD_LOAD, ENGINE, PLAN, WARM_LOAD};
use crate::units::bytes;

/// Loading and building: a row for each system and fact.
pub fn loading(groups: &[&Group]) -> String {
    type Fact = fn(&Document, bool) -> Option<String>;
    let facts: [(&str, Fact); 5] = [
        (COLD_LOAD.column, |d, on_gpu| loads(d, on_gpu).0),
        (WARM_LOAD.column, |d, on_gpu| loads(d, on_gpu).1),
        (ENGINE.column, |d, _| Some(built(d)?.engines.len().to_string())),
        (PLAN.column, |d, _| {
            let plans = d.sizes.as_ref().and_then(|s| s.plans_bytes);
            plans.filter(|n| *n > 0).map(bytes)
        }),
        ("build s", |d, _| built(d).map(build_time)),
    ];
    by_system(groups, &facts)
}

fn built(d: &Document) -> Option<&Build> {
    d.build.as_ref().filter(|b| !b.engines.is_empty())
}

/// A row for each system and fact of at least one model.
fn by_system<F: Fn(&Document, bool) -> Option<String>>(groups: &[&Group], facts: &[(&str, F)]) -> String {
    let mut rows = Vec::new();
    for label in labels(groups) {
        for (what, fact) in facts {
            let cell = |group: &&Group| -> Cell {
                let r = labeled(group, label)?;
                Some((fact(&r.of, group.on_gpu)?, vec![r.source]))
            };
            let keys = vec![label.to_string(), what.to_string()];
            rows.push((keys, groups.iter().map(cell).collect()));
        }
    }
    matrix(&["system", "what"], &heads(groups), rows)
}

/// The load without and with a kernel cache. Only Lapidary has one, on a GPU: other systems' loads are without.
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
    // Older files have 0 for cached engines.
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

/// At its peak: a row for each system and part.
pub fn memory(groups: &[&Group]) -> String {
    type Fact = fn(&Document, bool) -> Option<String>;
    fn device(d: &Document) -> Option<crate::bench::result::DeviceMemory> {
        d.memory.as_ref()?.device
    }
    let facts: [(&str, Fact); 7] = [
        ("device", |d, on_gpu| {
            device(d).filter(|_| on_gpu).map(|m| bytes(m.total))
        }),
        ("device: weights", |d, on_gpu| {
            device(d).filter(|_| on_gpu)?.weights.map(bytes)
        }),
        (DEVICE_CACHE, |d, on_gpu| device(d).filter(|_| on_gpu)?.cache.map(bytes)),
        (DEVICE_SCRATCH, |d, on_gpu| {
            device(d).filter(|_| on_gpu)?.scratch.map(bytes)
        }),
        (DEVICE_CONTEXT, |d, on_gpu| {
            device(d).filter(|_| on_gpu)?.context.map(bytes)
        }),
        ("host, with mapped files", |d, _| {
            d.memory.as_ref()?.peak_host_bytes.map(bytes)
        }),
        ("host, without", |d, _| {
            d.memory.as_ref()?.peak_anonymous_host_bytes.map(bytes)
        }),
    ];
    let mut out = by_system(groups, &facts);
    let mut without: Vec<&str> = groups
        .iter()
        .filter(|g| g.on_gpu)
        .flat_map(|g| &g.results)
        .filter(|r| lacks_context(r))
        .map(|r| r.of.system.label.as_str())
        .collect();
    without.sort_unstable();
    without.dedup();
    if !without.is_empty() {
        out += &format!(
            "\nFiles of {} are older than the field for the context: their device memory does not include it, and Lapidary's is that \
             of the end.\n",
            without.join("; ")
        );
    }
    out
}

const DEVICE_CACHE: &str = "device: cache";
const DEVICE_SCRATCH: &str = "device: scratch";
const DEVICE_CONTEXT: &str = "device: CUDA context";

/// Whether its device memory excludes CUDA's own; transformers' files always include it.
fn lacks_context(r: &ResultFile) -> bool {
    let device = r.of.memory.as_ref().and_then(|m| m.device);
    r.of.system.name != "transformers" && device.is_some_and(|m| m.context.is_none())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::result::BuiltEngine;
    use crate::terms::{CUDA_CONTEXT, KV_CACHE, SCRATCH};

    #[test]
    fn rows_have_the_names_of_the_glossary() {
        for (row, term) in [
            (DEVICE_CACHE, KV_CACHE),
            (DEVICE_SCRATCH, SCRATCH),
            (DEVICE_CONTEXT, CUDA_CONTEXT),
        ] {
            assert_eq!(row, format!("device: {}", term.column));
        }
    }

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
