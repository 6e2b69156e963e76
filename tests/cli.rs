//! The real binary, end to end: exports in, tokens out, and errors for unusable input.

#[path = "cli/bad_input.rs"]
mod bad_input;
#[path = "cli/chat.rs"]
mod chat;
#[path = "cli/commands.rs"]
mod commands;
#[cfg(all(feature = "engines", not(feature = "tensorrt")))]
#[path = "cli/engines.rs"]
mod engines;
#[path = "cli/exports.rs"]
mod exports;
#[path = "cli/folders.rs"]
mod folders;
#[cfg(all(feature = "engines", not(feature = "tensorrt")))]
#[path = "cli/interrupt.rs"]
mod interrupt;
#[path = "cli/output.rs"]
mod output;
#[path = "cli/quality.rs"]
mod quality;
#[path = "cli/sampling.rs"]
mod sampling;
#[path = "cli/support.rs"]
mod support;
#[path = "cli/verify.rs"]
mod verify;
