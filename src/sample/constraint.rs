//! Constraints on a text: which tokens may come next.

use crate::help::{Fault, Help};

/// A constraint that cannot continue, for example because it reached a limit on time or memory.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("structured output cannot continue: {0}")]
pub struct ConstraintError(pub String);

impl Help for ConstraintError {
    fn fault(&self) -> Fault {
        Fault::Input
    }

    fn help(&self) -> Option<String> {
        Some("use a simpler schema or grammar".to_string())
    }
}

/// Follows a text token by token, and determines what may come next: a grammar, for example.
pub trait Constraint: Send {
    /// Sets the logits, `[vocabulary]`, of tokens that must not come next to minus infinity.
    fn limit(&mut self, logits: &mut [f32]) -> Result<(), ConstraintError>;

    /// Adds the token that was drawn. Returns true if the text is complete and nothing may follow.
    fn accept(&mut self, token: u32) -> Result<bool, ConstraintError>;
}
