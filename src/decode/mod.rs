//! From a package to tokens and text: sessions over a growing cache and the generation loop.
//!
//! Input is a loaded [`crate::package::Package`] and prompts, output tokens, log-probabilities and text. A [`Session`]
//! keeps one sequence's cache consistent with its tokens and does not depend on hardware: it drives a [`Device`], a
//! small set of operations (`cpu` implements them with the executor, `cuda` with TensorRT engines). [`generate()`]
//! draws tokens with a [`crate::sample::Chain`] and reports each at once, with its text if [`crate::text`] has the
//! model's tokenizer. [`batch`] is the session for many sequences at once. Flags and printing belong to the command
//! line.

pub mod batch;
pub mod cpu;
#[cfg(feature = "engines")]
pub mod cuda;
mod device;
mod embeddings;
mod generate;
mod instruments;
mod open;
// Only for `lapidary verify`.
#[cfg(feature = "cli")]
pub(crate) mod reference;
mod session;
mod step;
mod transcript;

pub use device::{Chunk, Device, DeviceError, best};
pub use embeddings::Embeddings;
pub use generate::{
    FinishReason, GenerateError, Generation, Limits, Piece, Prompt, Step, Timing, generate, stream, stream_prompt,
};
pub use instruments::{DeviceFacts, DeviceMemory, Instruments};
pub use open::{DeviceChoice, SessionOpenError, SessionOptions};
pub(crate) use session::check_tokens;
pub use session::{Session, SessionError};
pub use transcript::{Added, Transcript};
