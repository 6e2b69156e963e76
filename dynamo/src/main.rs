use std::sync::Arc;

use clap::Parser;
use lapidary_dynamo::args::Args;
use lapidary_dynamo::engine::Engine;

fn main() -> anyhow::Result<()> {
    let (options, config) = Args::parse().read()?;
    dynamo_backend_common::run(Arc::new(Engine::new(options)), config)
}
