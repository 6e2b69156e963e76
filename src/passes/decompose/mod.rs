//! Operators with conveniences, written out as plain operators.
//!
//! [`contrib`] takes contributed operators apart (normalizations with a residual, scaled products, the contrib rotary
//! embedding), [`attention`] the attention operators with caches, causality and packed operands. What they cannot take
//! apart stays as it is; [`contract`](super::contract) reports it.

pub(crate) mod attention;
pub mod contrib;
