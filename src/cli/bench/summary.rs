//! A result as a readable table.

use std::fmt::Write;

use crate::bench::result::Document;
use crate::cli::bytes;
use crate::cli::table::Table;
use crate::terms::{LATENCY, OUTPUT_RATE, TPOT, TTFT};

pub fn summary(d: &Document) -> String {
    let mut out = String::new();
    let gpu = d.machine.gpu.as_ref().map(|gpu| gpu.name.clone());
    let on = gpu.unwrap_or_else(|| d.machine.cpu.clone());
    let _ = writeln!(out, "{} {} on {on}: {}\n", d.model.name, d.model.dtype, d.system.label);
    let mut table = Table::new(["", "median ms", "p90", "p99", OUTPUT_RATE.column, "MFU, MBU", ""]);
    let ms = |n: f64| format!("{n:.3}");
    let share = |n: Option<f64>| n.map_or(String::new(), |n| format!("{:.1} %", n * 100.0));
    let stable = |stable: bool| if stable { "" } else { "unstable" }.to_string();
    for p in &d.prefill {
        let [median, p90, p99] = [p.ms.median, p.ms.p90, p.ms.p99].map(ms);
        let rate = format!("{:.1}", p.prefill_tokens_per_s);
        table.row([
            format!("prefill {}", p.tokens),
            median,
            p90,
            p99,
            rate,
            share(p.mfu),
            stable(p.stable),
        ]);
    }
    for p in &d.decode {
        let [median, p90, p99] = [p.ms.median, p.ms.p90, p.ms.p99].map(ms);
        let rate = format!("{:.1}", p.output_tokens_per_s);
        table.row([
            format!("decode, context {}", p.live),
            median,
            p90,
            p99,
            rate,
            share(p.mbu),
            stable(p.stable),
        ]);
    }
    for e in &d.end_to_end {
        let name = format!("{} + {}", e.prompt, e.new_tokens);
        for (what, summary) in [
            (TTFT.name, &e.ttft_ms),
            (TPOT.name, &e.tpot_ms),
            (LATENCY.name, &e.latency_ms),
        ] {
            let [median, p90, p99] = [summary.median, summary.p90, summary.p99].map(ms);
            let all = what == LATENCY.name;
            let rate = if all {
                format!("{:.1}", e.output_tokens_per_s)
            } else {
                String::new()
            };
            let note = if all { stable(e.stable) } else { String::new() };
            table.row([format!("{name}, {what}"), median, p90, p99, rate, String::new(), note]);
        }
    }
    out += &table.render();
    let mut notes = vec![];
    if let Some((load, load_ms)) = d.load.as_ref().and_then(|load| Some((load, load.load_ms?))) {
        let first = load.first_load_ms.map(|ms| format!(" (cold: {:.1} s)", ms / 1e3));
        notes.push(format!("loaded in {:.1} s{}", load_ms / 1e3, first.unwrap_or_default()));
    }
    if let Some(memory) = &d.memory {
        let device = memory.device.map(|m| format!("{} of device memory", bytes(m.total)));
        let host = memory.peak_host_bytes.map(|n| format!("{} of host memory", bytes(n)));
        notes.extend(device.into_iter().chain(host));
    }
    if let Some(bandwidth) = d.machine.copy_bandwidth_bytes_per_s {
        notes.push(format!("copy bandwidth {}/s", bytes(bandwidth as u64)));
    }
    let _ = writeln!(out, "\n{}", notes.join("; "));
    if let Some(found) = d.outputs.as_ref().and_then(|o| o.reference.as_ref()) {
        let verdict = if found.equal { "equal to" } else { "NOT EQUAL to" };
        let _ = writeln!(
            out,
            "outputs {verdict} {}: worst relative logit error {:.2e} (limit {:.0e}), top-1 agreement in {} of {} rows",
            found.system, found.worst_relative_logit_error, found.limit, found.same_best, found.rows
        );
    }
    for (name, times) in d.profile.iter().flatten() {
        let groups: Vec<String> = times.groups.iter().map(|(g, ms)| format!("{g} {ms:.3} ms")).collect();
        let _ = writeln!(out, "layers of {name}: {}", groups.join(", "));
    }
    out
}
