//! Constraints on a text: which tokens may come next.

use crate::help::{Fault, Help};

/// A constraint that cannot go on, as one whose limits on time or memory are met.
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

/// Follows a text token by token, and says what may come next: a grammar, for example.
pub trait Constraint: Send {
    /// Makes the logits, `[vocabulary]`, of tokens that may not come next minus infinity.
    fn limit(&mut self, logits: &mut [f32]) -> Result<(), ConstraintError>;

    /// Takes the token that was drawn. True if the text is complete and nothing may follow.
    fn accept(&mut self, token: u32) -> Result<bool, ConstraintError>;
}
