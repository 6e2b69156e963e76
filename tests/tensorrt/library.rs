//! Finding the library, and refusing what is not one.

use std::path::Path;

use lapidary::backend::tensorrt::{self, Library, LibraryError, Source, Version};

use crate::net::library;

#[test]
fn the_wheel_is_found_and_asked_for_its_version() {
    let library = library();
    assert!(library.version() >= Version::MIN, "{}", library.version());
    let by_path = Library::load(Some(library.path())).expect("the same file again is free");
    assert_eq!(by_path, library);
}

#[test]
fn a_folder_means_the_library_in_it() {
    let library = library();
    if library.source() != Source::Loader {
        assert_eq!(Library::load(library.path().parent()).unwrap(), library);
    }
}

#[test]
fn a_path_that_leads_nowhere() {
    let error = Library::load(Some(Path::new("/nowhere/libtensorrt_rtx.so.1"))).unwrap_err();
    assert!(
        matches!(error, LibraryError::Missing { by: Source::Flag, .. }),
        "{error:?}"
    );
    let message = error.to_string();
    assert!(
        message.contains("/nowhere/libtensorrt_rtx.so.1") && message.contains("--tensorrt-lib"),
        "{message}"
    );
    let folder = tempfile::tempdir().unwrap();
    let error = Library::load(Some(folder.path())).unwrap_err();
    assert!(matches!(error, LibraryError::Missing { .. }), "{error:?}");
}

#[test]
fn a_file_that_is_no_library() {
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), "not an ELF file\n").unwrap();
    let error = Library::load(Some(file.path())).unwrap_err();
    assert!(matches!(error, LibraryError::NotALibrary { .. }), "{error:?}");
    assert!(
        error.to_string().contains(&file.path().display().to_string()),
        "{error}"
    );
}

#[test]
fn a_library_that_is_not_tensorrt() {
    // Any shared object of this process will do; the C library is always there.
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    let libc = maps
        .lines()
        .filter_map(|line| line.split_whitespace().last())
        .find(|path| path.contains("/libc.so") || path.contains("/libc-"))
        .unwrap();
    let error = Library::load(Some(Path::new(libc))).unwrap_err();
    assert!(
        matches!(
            error,
            LibraryError::NotTensorRt {
                symbol: "getInferLibVersion",
                ..
            }
        ),
        "{error:?}"
    );
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

/// Not a test of its own: says on stdout how a fresh process finds the library. The tests below run it as a child.
#[test]
#[ignore = "run by the tests of the search, each in its own environment"]
fn child_that_searches() {
    match Library::load(None) {
        Ok(library) => println!("\nfound by {}: {}", library.source(), library.path().display()),
        Err(error) => println!("\nproblem: {error}"),
    }
}

/// What a process with just these variables finds.
fn search_with(variables: &[(&str, &Path)]) -> String {
    let output = std::process::Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "--ignored", "--nocapture", "library::child_that_searches"])
        .env_clear()
        .envs(variables.iter().copied())
        .output()
        .unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    let line = text
        .lines()
        .find(|line| line.starts_with("found") || line.starts_with("problem"));
    line.unwrap_or_else(|| panic!("{text}")).to_string()
}

#[test]
fn the_search_takes_environment_then_package_then_loader() {
    let library = library();
    let venv = tempfile::tempdir().unwrap();
    let package = venv.path().join("lib/python3.11/site-packages/tensorrt_rtx_libs");
    std::fs::create_dir_all(&package).unwrap();
    let packaged = package.join(tensorrt::LIBRARY_NAME);
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
