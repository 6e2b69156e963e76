//! Many requests on one device: the scheduler, and the server in front of it, on the CPU.

#[path = "serve/models.rs"]
mod models;
#[path = "serve/scheduler.rs"]
mod scheduler;
#[allow(dead_code, reason = "tests of other commands use the rest")]
#[path = "cli/support.rs"]
mod support;
