//! Why inputs and outputs are not a valid interface of a model.

use std::fmt;

use super::Role;

/// Inputs or outputs.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Side {
    /// Inputs of a call.
    Input,
    /// Outputs of a call.
    Output,
}

impl fmt::Display for Side {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Side::Input => "input",
            Side::Output => "output",
        })
    }
}

/// One fault of an interface.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum InterfaceError {
    /// A name that [`Role`] does not have.
    #[error("the canonical graph has no {side} {name:?}")]
    Unknown {
        /// Its side.
        side: Side,
        /// Its name.
        name: String,
    },
    /// A port that every model has, or that belongs to a cache with other ports.
    #[error("the {} {role} is missing", role.side())]
    Missing {
        /// What is missing.
        role: Role,
    },
    /// Both token ids and embeddings.
    #[error(
        "the inputs {} and {} are both present, but a model takes one of them",
        Role::TokenIds,
        Role::Embeddings
    )]
    TwoTokenInputs,
    /// Two ports with one role, or one value with two roles.
    #[error("the {} {role} occurs twice", role.side())]
    Duplicate {
        /// The second of them.
        role: Role,
    },
    /// An input among the outputs, or the reverse.
    #[error("{role} must be an {}", role.side())]
    WrongSide {
        /// The port.
        role: Role,
    },
    /// Ports in an order other than that of [`Role`].
    #[error("the {side}s are {}, which is not the canonical order", list(found))]
    Order {
        /// Which ports.
        side: Side,
        /// Their order.
        found: Vec<Role>,
    },
    /// A dtype or shape that does not match the role.
    #[error("the {} {role} is {found}, expected {expected}", role.side())]
    Shape {
        /// The port.
        role: Role,
        /// The role's dtype and shape.
        expected: String,
        /// The port's dtype and shape.
        found: String,
    },
}

/// All faults of an interface; never empty.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct InterfaceErrors(
    /// In the order in which they were found.
    pub Vec<InterfaceError>,
);

impl fmt::Display for InterfaceErrors {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let texts: Vec<String> = self.0.iter().map(InterfaceError::to_string).collect();
        f.write_str(&texts.join("; "))
    }
}

impl std::error::Error for InterfaceErrors {}

fn list(roles: &[Role]) -> String {
    let names: Vec<String> = roles.iter().map(Role::to_string).collect();
    names.join(", ")
}
