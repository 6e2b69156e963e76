//! Measuring and reporting: the real program on a tiny package, and its errors for inconsistent results.

#[path = "bench/measured.rs"]
mod measured;
#[path = "bench/refusals.rs"]
mod refusals;
#[path = "bench/report.rs"]
mod report;
#[allow(dead_code, reason = "shared with tests/cli.rs, which uses the rest")]
#[path = "cli/support.rs"]
mod support;
