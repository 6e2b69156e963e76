//! `lapidary report`: writes a report and its plots from result files.

use std::fs;
use std::path::{Path, PathBuf};

use super::{Failure, print};
use crate::report::{self, Input};

#[derive(clap::Args)]
pub struct Args {
    /// Results of `lapidary bench`, `lapidary perplexity` and scripts/baselines; other JSON files are listed and not used
    #[arg(value_name = "RESULT", required_unless_present = "package")]
    results: Vec<PathBuf>,
    /// Describe the conversion of a package, or of a record from `lapidary info --conversion` (repeatable)
    #[arg(long, value_name = "PKG_OR_FILE")]
    package: Vec<PathBuf>,
    /// Report to write
    #[arg(short, long, value_name = "REPORT.md")]
    output: PathBuf,
    /// Folder for plots [default: docs/plots beside the report]
    #[arg(long, value_name = "DIR")]
    plots: Option<PathBuf>,
}

pub fn run(args: Args) -> Result<(), Failure> {
    let home = args.output.parent().unwrap_or(Path::new(""));
    if !home.as_os_str().is_empty() && !home.is_dir() {
        let message = format!("{}: the folder does not exist", home.display());
        return Err(Failure::input(message));
    }
    let input = Input::read(&args.results, &args.package)?;
    let folder = args.plots.clone().unwrap_or_else(|| home.join("docs/plots"));
    let report = report::report(&input, &link(&folder, home));
    let cannot = |path: &Path, error: std::io::Error| Failure::other(format!("{}: {error}", path.display()));
    if !report.figures.is_empty() {
        fs::create_dir_all(&folder).map_err(|e| cannot(&folder, e))?;
    }
    for figure in &report.figures {
        let png = figure.png()?;
        for (ending, bytes) in [("svg", figure.svg.as_bytes()), ("png", &png)] {
            let path = folder.join(format!("{}.{ending}", figure.name));
            fs::write(&path, bytes).map_err(|e| cannot(&path, e))?;
        }
    }
    fs::write(&args.output, &report.markdown).map_err(|e| cannot(&args.output, e))?;
    let mut text = format!(
        "wrote {} and {} plots (SVG and PNG)\n",
        args.output.display(),
        report.figures.len()
    );
    if !report.missing.is_empty() {
        text += &format!(
            "{} measurements are missing; the report lists them\n",
            report.missing.len()
        );
    }
    print(&text)
}

/// The plots' folder as written in a report in `home`: relative if it is below, otherwise as given.
fn link(folder: &Path, home: &Path) -> String {
    let below = folder.strip_prefix(home).unwrap_or(folder);
    below.to_string_lossy().replace('\\', "/")
}
