//! The front end on whole files: reading, types, the verifier, dumps, writing, and errors for refused files.

#[path = "frontend/algebra.rs"]
mod algebra;
#[path = "frontend/bad.rs"]
mod bad;
#[path = "frontend/damage.rs"]
mod damage;
#[path = "frontend/dumps.rs"]
mod dumps;
#[path = "frontend/exports.rs"]
mod exports;
#[path = "frontend/microscales.rs"]
mod microscales;
#[path = "support/nf4.rs"]
mod nf4;
#[path = "support/node_case.rs"]
mod node_case;
#[path = "frontend/node_tests.rs"]
mod node_tests;
#[path = "frontend/on_codes.rs"]
mod on_codes;
#[path = "frontend/opsets.rs"]
mod opsets;
#[path = "frontend/quantized.rs"]
mod quantized;
