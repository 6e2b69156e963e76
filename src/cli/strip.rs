//! `lapidary strip`: the same package without its weights.

use std::path::PathBuf;

use super::{Failure, JsonForm, bytes, print, print_json};
use crate::package::{self, Package};

#[derive(clap::Args)]
pub struct Args {
    /// The package
    #[arg(value_name = "PKG")]
    package: PathBuf,
    /// The new package
    #[arg(short, long, value_name = "PKG2")]
    output: PathBuf,
    /// Replace an existing package
    #[arg(long)]
    force: bool,
    /// Print the manifest as JSON
    #[arg(long, value_enum, value_name = "FORM", num_args = 0..=1, require_equals = true, default_missing_value = "pretty")]
    json: Option<JsonForm>,
}

pub fn run(args: Args) -> Result<(), Failure> {
    let package = Package::open(&args.package)?;
    let manifest = package::strip(&package, &args.output, args.force)?;
    if let Some(form) = args.json {
        return print_json(&manifest, form);
    }
    let mut text = format!(
        "wrote {} without {} of weights\n",
        args.output.display(),
        bytes(package.manifest.weights.bytes)
    );
    let gone = package.manifest.engines.len() - manifest.engines.len();
    if gone > 0 {
        text += &format!("{gone} engines with embedded weights were omitted; `lapidary refit` builds them again\n");
    }
    print(&text)
}
