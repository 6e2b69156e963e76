//! Many requests on one device: the scheduler, and the server in front of it, on the CPU.

#[path = "serve/adapters.rs"]
mod adapters;
#[path = "serve/answers.rs"]
mod answers;
#[path = "serve/bench.rs"]
mod bench;
#[path = "serve/client.rs"]
mod client;
#[path = "serve/faults.rs"]
mod faults;
#[path = "serve/gbnf.rs"]
mod gbnf;
#[path = "serve/models.rs"]
mod models;
#[path = "serve/operations.rs"]
mod operations;
#[path = "serve/scheduler.rs"]
mod scheduler;
#[path = "serve/structured.rs"]
mod structured;
#[allow(dead_code, reason = "tests of other commands use the rest")]
#[path = "cli/support.rs"]
mod support;
#[path = "serve/tools.rs"]
mod tools;
