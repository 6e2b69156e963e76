//! Why inputs and outputs are not a valid interface of a model.

use std::fmt;

use super::Role;

/// Inputs or outputs.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Side {
    /// What a call takes.
    Input,
    /// What a call gives.
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
        /// Where it stands.
        side: Side,
        /// Its name.
        name: String,
    },
    /// A port that every model has, or that belongs to a cache of which other ports are there.
    #[error("the {} {role} is missing", role.side())]
    Missing {
        /// What is missing.
        role: Role,
    },
    /// Token ids and embeddings.
    #[error(
        "the inputs {} and {} are both there, and a model takes one of them",
        Role::TokenIds,
        Role::Embeddings
    )]
    TwoTokenInputs,
    /// Two ports of one role, or one value in two roles.
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
    /// Ports in another order than that of [`Role`].
    #[error("the {side}s are {}, which is not the canonical order", list(found))]
    Order {
        /// Which ports.
        side: Side,
        /// Their order.
        found: Vec<Role>,
    },
    /// A dtype or shape that does not go with the role.
    #[error("the {} {role} is {found}, expected {expected}", role.side())]
    Shape {
        /// The port.
        role: Role,
        /// dtype and shape by its role.
        expected: String,
        /// dtype and shape that it has.
        found: String,
    },
}

/// Every fault of an interface; never empty.
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
