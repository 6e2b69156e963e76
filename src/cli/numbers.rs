//! Numbers that no model can use, and the flags to take them all the same.

use crate::weights::checks::Allowed;

#[derive(clap::Args)]
pub struct Numbers {
    /// Take weights that hold NaN or infinity
    #[arg(long)]
    allow_nonfinite: bool,
    /// Let numbers too large for the package's dtype become infinite
    #[arg(long)]
    allow_overflow: bool,
}

impl Numbers {
    pub fn allowed(&self) -> Allowed {
        Allowed {
            nonfinite: self.allow_nonfinite,
            overflow: self.allow_overflow,
        }
    }
}
