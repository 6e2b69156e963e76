//! The passes: exports become canonical and still compute the same; unsupported ones are refused with reasons.

#[path = "passes/beyond.rs"]
mod beyond;
#[path = "passes/branches.rs"]
mod branches;
#[path = "passes/canonical.rs"]
mod canonical;
#[path = "passes/chosen_rows.rs"]
mod chosen_rows;
#[path = "passes/decoder.rs"]
mod decoder;
#[path = "passes/experts.rs"]
mod experts;
#[path = "passes/fixed_batch.rs"]
mod fixed_batch;
#[path = "passes/given_masks.rs"]
mod given_masks;
#[path = "passes/grouped.rs"]
mod grouped;
#[path = "passes/kinds.rs"]
mod kinds;
#[path = "passes/moved_codes.rs"]
mod moved_codes;
#[path = "passes/older.rs"]
mod older;
#[path = "passes/onnx.rs"]
mod onnx;
#[path = "passes/refusals.rs"]
mod refusals;
#[path = "passes/reports.rs"]
mod reports;
#[path = "passes/rounded.rs"]
mod rounded;
#[path = "passes/same_answer.rs"]
mod same_answer;
#[path = "passes/sinks.rs"]
mod sinks;
#[path = "passes/unnamed.rs"]
mod unnamed;
