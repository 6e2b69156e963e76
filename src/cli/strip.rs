//! `lapidary strip`: the same package without its weights.

use std::path::PathBuf;

use super::{Failure, bytes, print, print_json};
use crate::package::{self, Package};

#[derive(clap::Args)]
pub struct Args {
    /// The package
    #[arg(value_name = "PKG")]
    package: PathBuf,
    /// The package to make
    #[arg(short, long, value_name = "PKG2")]
    output: PathBuf,
    /// Replace an existing package
    #[arg(long)]
    force: bool,
    /// Print the manifest as JSON
    #[arg(long)]
    json: bool,
}

pub fn run(args: Args) -> Result<(), Failure> {
    let package = Package::open(&args.package)?;
    let manifest = package::strip(&package, &args.output, args.force)?;
    if args.json {
        return print_json(&manifest);
    }
    let mut text = format!(
        "wrote {}: {} of weights left out\n",
        args.output.display(),
        bytes(package.manifest.weights.bytes)
    );
    let gone = package.manifest.engines.len() - manifest.engines.len();
    if gone > 0 {
        text += &format!("{gone} engines that hold weights were left out; `lapidary refit` builds them again\n");
    }
    print(&text)
}
