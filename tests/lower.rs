//! The lowering: hand-written canonical graphs, lowered for every kind of profile, checked by the verifier, by
//! snapshots and by execution against the graph's evaluation.

#[path = "lower/case.rs"]
mod case;
#[path = "lower/fixtures.rs"]
mod fixtures;
#[path = "lower/interpret.rs"]
mod interpret;
#[path = "lower/kernels.rs"]
mod kernels;
#[path = "lower/models.rs"]
mod models;
#[path = "lower/movement.rs"]
mod movement;
#[path = "lower/operators.rs"]
mod operators;
#[path = "lower/refusals.rs"]
mod refusals;
#[path = "support/rounded.rs"]
mod rounded;
#[path = "lower/semantics.rs"]
mod semantics;
#[path = "lower/snapshots.rs"]
mod snapshots;
#[path = "lower/weights.rs"]
mod weights;
