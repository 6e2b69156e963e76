//! A result as a table for spreadsheets: one row a summary.

use std::io;
use std::path::Path;

use super::result::Document;
use super::summary::Summary;

const HEADER: [&str; 22] = [
    "label",
    "system",
    "variant",
    "model",
    "dtype",
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
    "tokens_per_s",
    "share_of_peak",
    "stable",
];

/// What a row says besides its numbers.
struct Row<'a> {
    measurement: &'a str,
    tokens: usize,
    new_tokens: Option<usize>,
    capacity: Option<usize>,
    summary: &'a Summary,
    tokens_per_s: Option<f64>,
    /// `mfu` of a prefill, `mbu` of decode.
    share: Option<f64>,
    stable: bool,
}

/// Writes `prefill`, `decode`, `ttft`, `tpot`, `itl` and `latency` rows to a file.
pub fn write(path: &Path, document: &Document) -> io::Result<()> {
    let mut out = csv::Writer::from_path(path)?;
    out.write_record(HEADER)?;
    for row in rows(document) {
        let text = |n: Option<usize>| n.map_or(String::new(), |n| n.to_string());
        let number = |n: Option<f64>| n.map_or(String::new(), |n| n.to_string());
        let mut cells = vec![
            document.system.label.clone(),
            document.system.name.clone(),
            document.system.variant.clone(),
            document.model.name.clone(),
            document.model.dtype.clone(),
            row.measurement.to_string(),
            row.tokens.to_string(),
            text(row.new_tokens),
            text(row.capacity),
            "ms".to_string(),
            row.summary.count.to_string(),
        ];
        cells.extend(row.summary.numbers().map(|(_, value)| value.to_string()));
        cells.extend([number(row.tokens_per_s), number(row.share), row.stable.to_string()]);
        out.write_record(cells)?;
    }
    out.flush()
}

fn rows(document: &Document) -> Vec<Row<'_>> {
    let prefill = document.prefill.iter().map(|p| Row {
        measurement: "prefill",
        tokens: p.tokens,
        new_tokens: None,
        capacity: None,
        summary: &p.ms,
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
            tokens_per_s,
            share: None,
            stable: e.stable,
        })
    });
    prefill.chain(decode).chain(end_to_end).collect()
}
