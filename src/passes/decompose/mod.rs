//! Decomposes operators with additional features into plain operators.
//!
//! [`contrib`] decomposes contrib operators (normalizations with a residual, scaled products, the contrib rotary
//! embedding), [`attention`] the attention operators with caches, causality and packed operands. Others
//! stay unchanged; [`contract`](super::contract) reports them.

pub(crate) mod attention;
pub mod contrib;
