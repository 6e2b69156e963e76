//! Finding the library when TensorRT-RTX is installed.

use std::path::Path;

use lapidary::backend::tensorrt::{self, FLAVOUR, Library, LibrarySource};

use crate::net::library;
use crate::no_library::search_with;

#[test]
fn the_wheel_is_found_and_asked_for_its_version() {
    let library = library();
    assert!(library.version() >= FLAVOUR.headers, "{}", library.version());
    let by_path = Library::load(Some(library.path())).expect("the same file again is free");
    assert_eq!(by_path, library);
}

#[test]
fn a_folder_means_the_library_in_it() {
    let library = library();
    if library.source() != LibrarySource::Loader {
        assert_eq!(Library::load(library.path().parent()).unwrap(), library);
    }
}

#[test]
fn the_report_agrees_with_itself() {
    let library = library();
    let report = tensorrt::probe(None);
    assert!(report.compiled && report.build.possible, "{report:?}");
    assert_eq!(report.library.as_ref().unwrap().version, library.version().to_string());
    assert_eq!(report.driver.is_some(), report.driver_problem.is_none());
    assert_eq!(report.build_refittable.possible, report.driver.is_some());
    assert!(report.driver.is_some() || !report.run.possible, "{report:?}");
    let json = serde_json::to_value(&report).unwrap();
    eprintln!("{json:#}"); // shown with --nocapture: what this machine is
    assert_eq!(json["build"]["possible"], true);
    assert_eq!(json["library"]["version"], library.version().to_string());

    let missing = tensorrt::probe(Some(Path::new("/nowhere/lib.so")));
    assert!(!missing.build.possible && missing.library_problem.unwrap().contains("/nowhere/lib.so"));
}

#[test]
fn the_search_takes_environment_then_package_then_loader() {
    let library = library();
    let venv = tempfile::tempdir().unwrap();
    let package = venv.path().join("lib/python3.11/site-packages/tensorrt_rtx_libs");
    std::fs::create_dir_all(&package).unwrap();
    let packaged = package.join(FLAVOUR.libraries[0]);
    std::os::unix::fs::symlink(library.path(), &packaged).unwrap();

    let both = search_with(&[("TENSORRT_RTX_LIB", library.path()), ("VIRTUAL_ENV", venv.path())]);
    assert_eq!(both, format!("found by TENSORRT_RTX_LIB: {}", library.path().display()));
    let empty = search_with(&[("TENSORRT_RTX_LIB", Path::new("")), ("VIRTUAL_ENV", venv.path())]);
    assert_eq!(
        empty,
        format!("found by the Python package tensorrt_rtx_libs: {}", packaged.display())
    );
    let wrong = search_with(&[
        ("TENSORRT_RTX_LIB", Path::new("/nowhere")),
        ("VIRTUAL_ENV", venv.path()),
    ]);
    assert!(
        wrong.starts_with("problem") && wrong.contains("/nowhere"),
        "never passed over: {wrong}"
    );
    let folder = library.path().parent().unwrap();
    let loader = search_with(&[("LD_LIBRARY_PATH", folder)]);
    assert!(loader.starts_with("found by the loader's path: /"), "{loader}");
    let nothing = search_with(&[]);
    // A machine may have the library installed system-wide.
    assert!(
        nothing.contains("pip install tensorrt-rtx-cu12-libs") || nothing.starts_with("found by the loader"),
        "{nothing}"
    );
}
