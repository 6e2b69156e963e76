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
    assert_eq!(json["build"]["possible"], true);
    assert_eq!(json["library"]["version"], library.version().to_string());

    let missing = tensorrt::probe(Some(Path::new("/nowhere/lib.so")));
    assert!(!missing.build.possible && missing.library_problem.unwrap().contains("/nowhere/lib.so"));
}
