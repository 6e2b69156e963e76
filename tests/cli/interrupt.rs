//! Ctrl-C while engines are built: TensorRT cancels, nothing is left behind, and an existing package stays.

use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use lapidary::backend::tensorrt::Library;

use crate::support::{Run, command, fixture, lapidary, names, package, text};

/// A run of the program to interrupt once its first engine is built. It is killed if a test fails before that: it would
/// build engines for minutes.
struct Building(Option<Child>);

impl Drop for Building {
    fn drop(&mut self) {
        if let Some(child) = &mut self.0 {
            // It may have ended already; then there is nothing to kill.
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

impl Building {
    fn start(folder: &Path, args: &[&str]) -> Self {
        let mut command = command();
        command.args(args).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut building = Building(Some(command.spawn().expect("the program starts")));
        let engines = folder.join(format!(".pkg.lapidary-{}/engines", building.child().id()));
        let begun = Instant::now();
        while !engines.read_dir().is_ok_and(|mut plans| plans.next().is_some()) {
            assert!(
                building.child().try_wait().unwrap().is_none(),
                "it ended before it was interrupted"
            );
            assert!(begun.elapsed() < Duration::from_secs(120), "no engine was built");
            std::thread::sleep(Duration::from_millis(5));
        }
        building
    }

    fn child(&mut self) -> &mut Child {
        self.0.as_mut().expect("it runs until `end`")
    }

    fn interrupt(&mut self) {
        let sent = Command::new("kill")
            .args(["-INT", &self.child().id().to_string()])
            .status();
        assert!(sent.unwrap().success());
    }

    /// Its exit status, and the time until then.
    fn end(mut self) -> (Run, Duration) {
        let waited = Instant::now();
        while self.child().try_wait().unwrap().is_none() {
            assert!(waited.elapsed() < Duration::from_secs(60), "it did not end");
            std::thread::sleep(Duration::from_millis(5));
        }
        let took = waited.elapsed();
        let child = self.0.take().expect("it runs until here");
        (Run::of(child.wait_with_output().unwrap()), took)
    }
}

/// About 130 engines of a small model, so that most are not built yet when the first is.
#[test]
fn ctrl_c_stops_builds_and_leaves_nothing() {
    let library = Library::load(None).unwrap_or_else(|e| panic!("{e}"));
    let folder = tempfile::tempdir().unwrap();
    let pkg = folder.path().join("pkg");
    let model = fixture("exports/llama-optimum/model.onnx");
    let capacities: Vec<String> = (1..=64).map(|n| (n * 2).to_string()).collect();
    let capacities = capacities.join(",");
    // The plain lowering builds fastest; the test waits for one engine.
    let specs = tempfile::tempdir().unwrap();
    let spec = specs.path().join("plain.yaml");
    std::fs::write(&spec, "lowering: {linear: flatten_activation, fuse_linear: false}\n").unwrap();
    let mut args = vec!["convert", text(&model), "-o", text(&pkg), "--without-weights", "--json"];
    args.extend(["--spec", text(&spec)]);
    args.extend([
        "--target",
        "cpu,tensorrt-rtx",
        "--prefill",
        "2",
        "--capacity",
        &capacities,
    ]);
    args.extend(["--tensorrt-lib", text(library.path())]);
    for times in [1, 2] {
        let mut building = Building::start(folder.path(), &args);
        for _ in 0..times {
            building.interrupt();
            std::thread::sleep(Duration::from_millis(20));
        }
        let (run, took) = building.end();
        assert_eq!(run.status, 130, "{}", run.stderr);
        assert_eq!(run.stderr, "interrupted: the unfinished package is removed\n");
        assert_eq!(run.stdout, "");
        assert!(took < Duration::from_secs(10), "{took:?} after signal {times}");
        assert!(names(folder.path()).is_empty(), "{:?}", names(folder.path()));
    }
}

#[test]
fn ctrl_c_while_a_refit_builds_keeps_the_old_package() {
    let library = Library::load(None).unwrap_or_else(|e| panic!("{e}"));
    let folder = tempfile::tempdir().unwrap();
    let model = fixture("exports/llama-optimum/model.onnx");
    let capacities: Vec<String> = (1..=32).map(|n| (n * 4).to_string()).collect();
    let capacities = capacities.join(",");
    let mut flags = vec!["--target", "cpu,tensorrt-rtx", "--weights", "embed", "--prefill", "1"];
    flags.extend(["--capacity", &capacities, "--tensorrt-lib", text(library.path())]);
    let pkg = package(folder.path(), &model, &flags);
    let before = std::fs::read(pkg.join("manifest.json")).unwrap();
    let mut args = vec!["refit", text(&pkg), "--from", text(&model)];
    args.extend(["--tensorrt-lib", text(library.path())]);
    let mut building = Building::start(folder.path(), &args);
    building.interrupt();
    let (run, _) = building.end();
    assert_eq!((run.status, run.stdout.as_str()), (130, ""), "{}", run.stderr);
    assert_eq!(names(folder.path()), ["pkg"]);
    assert_eq!(std::fs::read(pkg.join("manifest.json")).unwrap(), before);
    lapidary(["info", text(&pkg), "--check"]).ok();
}
