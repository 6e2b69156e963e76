//! From a package to text: sessions over a growing cache, the generation loop, the tokenizer and the chat template.
//!
//! Takes a loaded [`crate::package::Package`] and prompts, gives tokens, log-probabilities and text. A [`Session`] keeps
//! one sequence's cache in step with its tokens and knows nothing of hardware: it drives a [`Device`], which is the few
//! operations that a machine must offer (`cpu` is one over the executor, `cuda` one over TensorRT engines). [`generate()`]
//! draws tokens with a [`crate::sample::Chain`] and reports them as they come. Options and printing belong to the command
//! line.

pub mod chat;
pub mod conversation;
pub mod cpu;
#[cfg(feature = "engines")]
pub mod cuda;
mod device;
mod generate;
pub mod instruments;
mod pieces;
pub mod reference;
mod session;
pub mod text;
pub mod tokenizer;

pub use device::{Chunk, Device, DeviceError, best};
pub use generate::{FinishReason, GenerateError, Generation, Limits, Piece, Step, Timing, generate, stream};
pub use instruments::Instruments;
pub use session::{Session, SessionError};
