//! The front end on whole files: reading, types, the verifier, dumps, writing, and what it says about files it refuses.

#[path = "frontend/exports.rs"]
mod exports;
#[path = "frontend/node_tests.rs"]
mod node_tests;
