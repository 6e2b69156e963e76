//! The passes: exports become canonical and still compute the same; what is not understood is refused with reasons.

#[path = "passes/canonical.rs"]
mod canonical;
#[path = "passes/decoder.rs"]
mod decoder;
