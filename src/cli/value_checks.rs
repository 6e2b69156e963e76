//! The flags that take weights with values that no model can use: NaN, infinity, overflow.

use crate::weights::checks::Allowed;

#[derive(clap::Args)]
pub struct ValueChecks {
    /// Take weights that hold NaN or infinity
    #[arg(long)]
    allow_nonfinite: bool,
    /// Let numbers too large for the package's dtype become infinite
    #[arg(long)]
    allow_overflow: bool,
}

impl ValueChecks {
    pub fn allowed(&self) -> Allowed {
        Allowed {
            nonfinite: self.allow_nonfinite,
            overflow: self.allow_overflow,
        }
    }
}
