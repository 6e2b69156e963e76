//! The small inputs of one call: token ids or embeddings, positions, write indices, rows with logits.
//!
//! They are computed here for all devices. A device requests each input of its network by [`Role`] and provides the
//! memory.

use crate::help::{Fault, Help};
use crate::interface::Role;

/// The input of a network for each token.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Fed<'t> {
    /// Their ids.
    Ids(&'t [u32]),
    /// Their embeddings, `[tokens, width]`.
    Rows {
        /// Row-major.
        values: &'t [f32],
        /// Elements of one embedding.
        width: usize,
    },
}

impl Fed<'_> {
    /// Number of tokens.
    pub fn len(&self) -> usize {
        match self {
            Fed::Ids(ids) => ids.len(),
            Fed::Rows { values, width } => values.len() / (*width).max(1),
        }
    }
}

/// One chunk of a sequence as a network's input: tokens at `position..`, padded to `rows`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct StepInputs<'t> {
    /// At least one token, at most `rows`.
    pub fed: Fed<'t>,
    /// Position and slot of the first token.
    pub position: usize,
    /// The position after the last token of the run; these tokens may be its first part.
    pub end: usize,
    /// Rows of the network.
    #[cfg_attr(not(feature = "engines"), allow(dead_code, reason = "only engines have padded rows"))]
    pub rows: usize,
}

/// An input that a session does not provide.
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
    /// Elements of the input of that role, each i32. For embeddings see [`StepInputs::embeddings`].
    pub fn len(&self, role: Role) -> Result<usize, NoStepInput> {
        Self::len_of(role, self.rows)
    }

    /// Elements of an input for a network of this many rows.
    pub fn len_of(role: Role, rows: usize) -> Result<usize, NoStepInput> {
        match role {
            Role::TokenIds | Role::PositionIds => Ok(rows),
            Role::WriteIndices | Role::TotalLengths | Role::LogitRows => Ok(1),
            Role::Embeddings | Role::Cache(_) | Role::Logits | Role::UpdatedCache(_) => Err(role.into()),
        }
    }

    /// The embeddings, padded as [`StepInputs::write`] pads: `rows` times `width` elements. Nothing if token ids are fed.
    pub fn embeddings(&self) -> impl Iterator<Item = f32> {
        let (values, width) = match self.fed {
            Fed::Rows { values, width } => (values, width),
            Fed::Ids(_) => (&[][..], 0),
        };
        let last = &values[values.len().saturating_sub(width)..];
        let padding = std::iter::repeat_n(last, self.rows - self.fed.len().min(self.rows));
        values.iter().chain(padding.flatten()).take(self.rows * width).copied()
    }

    /// Writes the input of that role to `to`, which has [`StepInputs::len`] elements. Padding repeats the last token at
    /// its position, in slots that the next call overwrites. So results over all rows, such as the range of dynamically
    /// quantized activations, are those of the tokens.
    pub fn write(&self, role: Role, to: &mut [i32]) -> Result<(), NoStepInput> {
        let int = |n: usize| i32::try_from(n).expect("positions fit 31 bits");
        match role {
            Role::TokenIds => {
                let Fed::Ids(tokens) = self.fed else {
                    return Err(role.into());
                };
                let last = tokens.last().copied().unwrap_or(0);
                let padded = tokens.iter().copied().chain(std::iter::repeat(last));
                to.iter_mut().zip(padded).for_each(|(to, id)| *to = id as i32);
            }
            Role::PositionIds => {
                let last = self.position + self.fed.len().saturating_sub(1);
                let positions = (self.position..).map(|position| int(position.min(last)));
                to.iter_mut().zip(positions).for_each(|(to, position)| *to = position);
            }
            Role::WriteIndices => to.fill(int(self.position)),
            Role::TotalLengths => to.fill(int(self.end)),
            Role::LogitRows => to.fill(int(self.fed.len() - 1)),
            Role::Embeddings | Role::Cache(_) | Role::Logits | Role::UpdatedCache(_) => return Err(role.into()),
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
            fed: Fed::Ids(&[7, 8, 9]),
            position: 100,
            end: 700,
            rows: 5,
        };
        assert_eq!(written(step, Role::TokenIds), [7, 8, 9, 9, 9]);
        assert_eq!(written(step, Role::PositionIds), [100, 101, 102, 102, 102]);
        assert_eq!(written(step, Role::WriteIndices), [100]);
        assert_eq!(written(step, Role::TotalLengths), [700]);
        assert_eq!(written(step, Role::LogitRows), [2]);
    }

    #[test]
    fn one_token() {
        let step = StepInputs {
            fed: Fed::Ids(&[u32::MAX >> 1]),
            position: 0,
            end: 1,
            rows: 1,
        };
        assert_eq!(written(step, Role::TokenIds), [i32::MAX]);
        assert_eq!(written(step, Role::PositionIds), [0]);
        assert_eq!(written(step, Role::LogitRows), [0]);
    }

    #[test]
    fn embeddings_are_padded_with_the_last() {
        let values = [1.0, 2.0, 3.0, 4.0];
        let step = |rows: usize| StepInputs {
            fed: Fed::Rows {
                values: &values,
                width: 2,
            },
            position: 5,
            end: 7,
            rows,
        };
        let given: Vec<f32> = step(4).embeddings().collect();
        assert_eq!(given, [1.0, 2.0, 3.0, 4.0, 3.0, 4.0, 3.0, 4.0]);
        assert_eq!(step(2).embeddings().collect::<Vec<_>>(), values);
        assert_eq!(written(step(4), Role::PositionIds), [5, 6, 6, 6]);
        assert_eq!(written(step(4), Role::LogitRows), [1]);
        assert_eq!(step(2).write(Role::TokenIds, &mut [0; 2]), Err(Role::TokenIds.into()));
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
