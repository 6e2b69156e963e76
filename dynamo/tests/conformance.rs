//! Dynamo's own tests of an engine.

use lapidary_dynamo::engine::{Engine, Options};

#[path = "../examples/tiny_package.rs"]
mod tiny_package;

#[tokio::test(flavor = "multi_thread")]
async fn the_engine_conforms() {
    let folder = tempfile::tempdir().unwrap();
    let package = tiny_package::tiny_package(folder.path(), &[256, 16384]).unwrap();
    let checked = dynamo_backend_common::testing::run_conformance(|| Engine::new(Options::on_cpu(package.clone())));
    checked.await.expect("conforms");
}
