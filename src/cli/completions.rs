//! `lapidary completions` and `lapidary man`: shell completions and manual pages, generated from the command's definition.

use std::path::PathBuf;

use clap::CommandFactory;

use super::{Cli, Failure};

#[derive(clap::Args)]
pub struct CompletionsArgs {
    /// The shell
    #[arg(value_enum, value_name = "SHELL")]
    shell: clap_complete::Shell,
}

#[derive(clap::Args)]
pub struct ManArgs {
    /// Folder for one page per command [default: print lapidary(1)]
    #[arg(value_name = "DIR")]
    folder: Option<PathBuf>,
}

pub fn completions(args: CompletionsArgs) -> Result<(), Failure> {
    let mut script = Vec::new();
    clap_complete::generate(args.shell, &mut Cli::command(), "lapidary", &mut script);
    super::print(&String::from_utf8_lossy(&script))
}

pub fn man(args: ManArgs) -> Result<(), Failure> {
    let Some(folder) = args.folder else {
        let mut page = Vec::new();
        clap_mangen::Man::new(Cli::command()).render(&mut page)?;
        return super::print(&String::from_utf8_lossy(&page));
    };
    let written = std::fs::create_dir_all(&folder).and_then(|()| clap_mangen::generate_to(Cli::command(), &folder));
    written.map_err(|error| Failure::input(error).at(&folder))
}
