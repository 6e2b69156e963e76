//! The flags that allow invalid values in weights: NaN, infinity, overflow.

use crate::weights::checks::Allowed;

#[derive(clap::Args)]
pub struct ValueChecks {
    /// Accept weights that contain NaN or infinity
    #[arg(long)]
    allow_nonfinite: bool,
    /// Let values too large for the package's element type become infinite
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
