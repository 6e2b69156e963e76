//! The small inputs of one call: token ids, positions, where to write, which row gets logits.
//!
//! Written here once for all devices. A device asks for each input that its network has, by [`Role`], and provides the
//! memory.

use crate::help::{Fault, Help};
use crate::interface::Role;

/// One chunk of a sequence on its way into a network: `tokens` at `position..`, padded to `rows`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct StepInputs<'t> {
    /// Token ids; at least one, at most `rows`.
    pub tokens: &'t [u32],
    /// Position and slot of the first token.
    pub position: usize,
    /// Rows that the network has.
    #[cfg_attr(not(feature = "engines"), allow(dead_code, reason = "only engines have padded rows"))]
    pub rows: usize,
}

/// An input that is none of those that a session makes for a call.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a session has nothing to bind to the input {0:?}")]
pub(crate) struct NoStepInput(pub String);

impl Help for NoStepInput {
    fn fault(&self) -> Fault {
        Fault::Bug
    }
}

impl From<Role> for NoStepInput {
    fn from(role: Role) -> Self {
        NoStepInput(role.name())
    }
}

impl StepInputs<'_> {
    /// Elements of the input of that role, each i32.
    pub fn len(&self, role: Role) -> Result<usize, NoStepInput> {
        Self::len_of(role, self.rows)
    }

    /// Elements of an input for a network of so many rows.
    pub fn len_of(role: Role, rows: usize) -> Result<usize, NoStepInput> {
        match role {
            Role::TokenIds | Role::PositionIds => Ok(rows),
            Role::WriteIndices | Role::LogitRows => Ok(1),
            Role::Cache(_) | Role::Logits | Role::UpdatedCache(_) => Err(role.into()),
        }
    }

    /// Writes the input of that role to `to`, which has [`StepInputs::len`] elements. Padding is the last token again, at its
    /// position, in slots that the next call writes anew: so what is computed over all rows, as the range of dynamically
    /// quantized activations is, is that of the tokens.
    pub fn write(&self, role: Role, to: &mut [i32]) -> Result<(), NoStepInput> {
        let int = |n: usize| i32::try_from(n).expect("positions fit 31 bits");
        match role {
            Role::TokenIds => {
                let last = self.tokens.last().copied().unwrap_or(0);
                let padded = self.tokens.iter().copied().chain(std::iter::repeat(last));
                to.iter_mut().zip(padded).for_each(|(to, id)| *to = id as i32);
            }
            Role::PositionIds => {
                let last = self.position + self.tokens.len().saturating_sub(1);
                let positions = (self.position..).map(|position| int(position.min(last)));
                to.iter_mut().zip(positions).for_each(|(to, position)| *to = position);
            }
            Role::WriteIndices => to.fill(int(self.position)),
            Role::LogitRows => to.fill(int(self.tokens.len() - 1)),
            Role::Cache(_) | Role::Logits | Role::UpdatedCache(_) => return Err(role.into()),
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::interface::{CacheId, CachePart};

    fn written(step: StepInputs<'_>, role: Role) -> Vec<i32> {
        let mut to = vec![-1; step.len(role).unwrap()];
        step.write(role, &mut to).unwrap();
        to
    }

    #[test]
    fn a_padded_chunk() {
        let step = StepInputs {
            tokens: &[7, 8, 9],
            position: 100,
            rows: 5,
        };
        assert_eq!(written(step, Role::TokenIds), [7, 8, 9, 9, 9]);
        assert_eq!(written(step, Role::PositionIds), [100, 101, 102, 102, 102]);
        assert_eq!(written(step, Role::WriteIndices), [100]);
        assert_eq!(written(step, Role::LogitRows), [2]);
    }

    #[test]
    fn one_token() {
        let step = StepInputs {
            tokens: &[u32::MAX >> 1],
            position: 0,
            rows: 1,
        };
        assert_eq!(written(step, Role::TokenIds), [i32::MAX]);
        assert_eq!(written(step, Role::PositionIds), [0]);
        assert_eq!(written(step, Role::LogitRows), [0]);
    }

    #[test]
    fn caches_and_outputs_are_no_step_inputs() {
        let cache = CacheId {
            layer: 0,
            part: CachePart::Key,
        };
        for role in [Role::Cache(cache), Role::UpdatedCache(cache), Role::Logits] {
            assert_eq!(StepInputs::len_of(role, 1), Err(NoStepInput(role.name())));
        }
    }
}
