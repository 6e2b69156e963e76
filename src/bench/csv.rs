//! A result as a table for spreadsheets: one row per summary.

use std::io;
use std::path::Path;

use super::result::Document;
use super::summary::Summary;

/// Columns of the measurement.
const NUMBERS: [&str; 18] = [
    "measurement",
    "tokens",
    "new_tokens",
    "capacity",
    "unit",
    "count",
    "mean",
    "median",
    "stddev",
    "p50",
    "p90",
    "p99",
    "min",
    "max",
    "gpu_ms",
    "tokens_per_s",
    "share_of_peak",
    "stable",
];

/// The document's columns, repeated in every row, before and after the measurement.
type Columns = Vec<(&'static str, String)>;

/// A row's own values.
struct Row<'a> {
    measurement: &'a str,
    tokens: usize,
    new_tokens: Option<usize>,
    capacity: Option<usize>,
    summary: &'a Summary,
    gpu_ms: Option<f64>,
    tokens_per_s: Option<f64>,
    /// `mfu` of a prefill, `mbu` of decode.
    share: Option<f64>,
    stable: bool,
}

/// Writes `prefill`, `decode`, `ttft`, `tpot`, `itl` and `latency` rows to a file, each with the document's data on the
/// system, the machine, loading and memory, so that rows of many files fit in one sheet.
pub fn write(path: &Path, document: &Document) -> io::Result<()> {
    let mut out = csv::Writer::from_path(path)?;
    let (before, after) = (identity(document), circumstances(document));
    let names = |facts: &Columns| -> Vec<&'static str> { facts.iter().map(|(name, _)| *name).collect() };
    out.write_record([names(&before), NUMBERS.to_vec(), names(&after)].concat())?;
    for row in rows(document) {
        let values = |facts: &Columns| -> Vec<String> { facts.iter().map(|(_, value)| value.clone()).collect() };
        out.write_record([values(&before), row.cells(), values(&after)].concat())?;
    }
    out.flush()
}

/// Empty if missing.
fn text(value: Option<impl ToString>) -> String {
    value.map_or(String::new(), |value| value.to_string())
}

fn identity(d: &Document) -> Columns {
    vec![
        ("label", d.system.label.clone()),
        ("system", d.system.name.clone()),
        ("variant", d.system.variant.clone()),
        ("model", d.model.name.clone()),
        ("dtype", d.model.dtype.clone()),
    ]
}

impl Row<'_> {
    /// A cell for each of [`NUMBERS`].
    fn cells(&self) -> Vec<String> {
        let mut cells = vec![
            self.measurement.to_string(),
            self.tokens.to_string(),
            text(self.new_tokens),
            text(self.capacity),
            "ms".to_string(),
            self.summary.count.to_string(),
        ];
        cells.extend(self.summary.numbers().map(|(_, value)| value.to_string()));
        cells.extend([
            text(self.gpu_ms),
            text(self.tokens_per_s),
            text(self.share),
            self.stable.to_string(),
        ]);
        cells
    }
}

fn circumstances(d: &Document) -> Columns {
    let (machine, gpu) = (&d.machine, d.machine.gpu.as_ref());
    let versions: Vec<String> = d
        .versions
        .iter()
        .filter_map(|(name, version)| Some(format!("{name} {}", version.as_ref()?)))
        .collect();
    let load = d.load.as_ref();
    let engines = d.build.iter().flat_map(|build| &build.engines);
    let built: Vec<f64> = engines.filter_map(|engine| engine.build_ms).collect();
    let sizes = d.sizes.as_ref();
    let memory = d.memory.as_ref();
    let device = memory.and_then(|m| m.device);
    vec![
        ("date", d.date.clone()),
        ("commit", d.commit.clone()),
        ("weights_hash", d.model.weights_hash.clone()),
        (
            "settings",
            serde_json::Value::from(d.system.settings.clone()).to_string(),
        ),
        ("cpu", machine.cpu.clone()),
        ("gpu", text(gpu.map(|gpu| &gpu.name))),
        ("driver", text(gpu.and_then(|gpu| gpu.driver.as_ref()))),
        ("os", machine.os.clone()),
        ("versions", versions.join("; ")),
        ("copy_bandwidth_bytes_per_s", text(machine.copy_bandwidth_bytes_per_s)),
        ("peak_flops", text(machine.peak_flops.as_ref().map(|peak| peak.flops))),
        ("load_ms", text(load.and_then(|l| l.load_ms))),
        ("first_load_ms", text(load.and_then(|l| l.first_load_ms))),
        ("kernels_kept", text(load.and_then(|l| l.kernels_kept))),
        // For the engines that were built: none if all came from a cache.
        ("build_ms", text((!built.is_empty()).then(|| built.iter().sum::<f64>()))),
        ("package_bytes", text(sizes.and_then(|s| s.package_bytes))),
        ("plans_bytes", text(sizes.and_then(|s| s.plans_bytes))),
        ("weights_bytes", text(sizes.and_then(|s| s.weights_bytes))),
        ("peak_host_bytes", text(memory.and_then(|m| m.peak_host_bytes))),
        (
            "peak_anonymous_host_bytes",
            text(memory.and_then(|m| m.peak_anonymous_host_bytes)),
        ),
        ("device_total_bytes", text(device.map(|m| m.total))),
        ("device_weights_bytes", text(device.and_then(|m| m.weights))),
        ("device_cache_bytes", text(device.and_then(|m| m.cache))),
        ("device_scratch_bytes", text(device.and_then(|m| m.scratch))),
        ("device_context_bytes", text(device.and_then(|m| m.context))),
    ]
}

fn rows(document: &Document) -> Vec<Row<'_>> {
    let prefill = document.prefill.iter().map(|p| Row {
        measurement: "prefill",
        tokens: p.tokens,
        new_tokens: None,
        capacity: None,
        summary: &p.ms,
        gpu_ms: None,
        tokens_per_s: Some(p.prefill_tokens_per_s),
        share: p.mfu,
        stable: p.stable,
    });
    let decode = document.decode.iter().map(|d| Row {
        measurement: "decode",
        tokens: d.live,
        new_tokens: None,
        capacity: d.capacity,
        summary: &d.ms,
        gpu_ms: d.gpu_ms,
        tokens_per_s: Some(d.output_tokens_per_s),
        share: d.mbu,
        stable: d.stable,
    });
    let end_to_end = document.end_to_end.iter().flat_map(|e| {
        let parts = [
            ("ttft", &e.ttft_ms, None),
            ("tpot", &e.tpot_ms, None),
            ("itl", &e.itl_ms, None),
            ("latency", &e.latency_ms, Some(e.output_tokens_per_s)),
        ];
        parts.map(|(measurement, summary, tokens_per_s)| Row {
            measurement,
            tokens: e.prompt,
            new_tokens: Some(e.new_tokens),
            capacity: None,
            summary,
            gpu_ms: None,
            tokens_per_s,
            share: None,
            stable: e.stable,
        })
    });
    prefill.chain(decode).chain(end_to_end).collect()
}
