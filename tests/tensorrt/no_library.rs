//! Files other than the library of this build (TensorRT-RTX or full TensorRT): each is refused before a call into it,
//! and the message names the searched locations. Needs no real library.

use std::path::{Path, PathBuf};
use std::process::Command;

use lapidary::backend::tensorrt::flavour::{ENTERPRISE, RTX};
use lapidary::backend::tensorrt::{FLAVOUR, Library, LibraryError, LibrarySource};
use lapidary::help::Help;

/// A shared object that only reports a version of TensorRT, encoded as by `getInferLibVersion`.
fn impostor(folder: &Path, name: &str, version: i32, builder: bool) -> PathBuf {
    let (path, source) = (folder.join(name), folder.join("impostor.c"));
    let builder = if builder {
        "void* createInferBuilder_INTERNAL(void) { return 0; }"
    } else {
        ""
    };
    std::fs::write(
        &source,
        format!("int getInferLibVersion(void) {{ return {version}; }}\n{builder}\n"),
    )
    .unwrap();
    let mut compiler = Command::new("cc");
    compiler.args(["-shared", "-fPIC", "-o"]).args([&path, &source]);
    assert!(compiler.status().expect("rustc links with it too").success());
    path
}

fn encoded(major: u32, minor: u32) -> i32 {
    (major * 10_000 + minor * 100) as i32
}

#[test]
fn a_path_that_leads_nowhere() {
    let error = Library::load(Some(Path::new("/nowhere/libtensorrt.so"))).unwrap_err();
    assert!(
        matches!(
            error,
            LibraryError::Missing {
                by: LibrarySource::Flag,
                ..
            }
        ),
        "{error:?}"
    );
    let message = error.to_string();
    assert!(
        message.contains("/nowhere/libtensorrt.so") && message.contains("--tensorrt-lib"),
        "{message}"
    );
    let folder = tempfile::tempdir().unwrap();
    let error = Library::load(Some(folder.path())).unwrap_err();
    assert!(matches!(error, LibraryError::NotInFolder { .. }), "{error:?}");
    assert!(error.to_string().contains(FLAVOUR.libraries[0]), "{error}");
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

/// Not a test itself: prints how a fresh process finds the library. Tests run it as a child.
#[test]
#[ignore = "run by the tests of the search, each in its own environment"]
fn child_that_searches() {
    match Library::load(None) {
        Ok(library) => println!("\nfound by {}: {}", library.source(), library.path().display()),
        Err(error) => println!("\nproblem: {error}; {}", error.help().unwrap_or_default()),
    }
}

/// The library found by a process with only these variables.
pub fn search_with(variables: &[(&str, &Path)]) -> String {
    let output = std::process::Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "--ignored", "--nocapture", "no_library::child_that_searches"])
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
fn a_library_older_than_the_headers() {
    let folder = tempfile::tempdir().unwrap();
    let headers = FLAVOUR.headers;
    let path = impostor(
        folder.path(),
        "older.so",
        encoded(headers.major, headers.minor - 1),
        true,
    );
    let error = Library::load(Some(&path)).unwrap_err();
    assert!(matches!(error, LibraryError::Version { .. }), "{error:?}");
    let message = error.to_string();
    let found = format!("is TensorRT {}.{}.0", headers.major, headers.minor - 1);
    let needed = format!("{} {}.x from {headers} on", FLAVOUR.product, headers.major);
    for part in [&*found, &*needed, "older.so"] {
        assert!(message.contains(part), "{part}: {message}");
    }
    assert_eq!(error.help().unwrap(), format!("install {}", FLAVOUR.install));
}

#[test]
fn a_library_of_the_other_tensorrt_or_of_a_later_major_version() {
    let folder = tempfile::tempdir().unwrap();
    let other = if FLAVOUR == RTX { ENTERPRISE } else { RTX };
    for (name, version) in [
        ("other.so", encoded(other.headers.major, other.headers.minor)),
        ("later.so", encoded(FLAVOUR.headers.major + 1, 0)),
    ] {
        let path = impostor(folder.path(), name, version, true);
        let error = Library::load(Some(&path)).unwrap_err();
        assert!(matches!(error, LibraryError::Version { .. }), "{error:?}");
    }
}

#[test]
fn a_runtime_that_cannot_build() {
    let folder = tempfile::tempdir().unwrap();
    let headers = FLAVOUR.headers;
    let path = impostor(folder.path(), "lean.so", encoded(headers.major, headers.minor), false);
    let error = Library::load(Some(&path)).unwrap_err();
    let symbol = "createInferBuilder_INTERNAL";
    assert!(
        matches!(&error, LibraryError::NotTensorRt { symbol: missing, .. } if *missing == symbol),
        "{error:?}"
    );
}

/// The loader finds either name; without one, the message lists all searched locations.
#[test]
fn the_loaders_path() {
    let headers = FLAVOUR.headers;
    for name in FLAVOUR.libraries {
        let folder = tempfile::tempdir().unwrap();
        impostor(folder.path(), name, encoded(headers.major, headers.minor), true);
        let found = search_with(&[("LD_LIBRARY_PATH", folder.path())]);
        let path = folder.path().join(name);
        assert_eq!(found, format!("found by the loader's path: {}", path.display()));
        let by_variable = search_with(&[(FLAVOUR.variable, folder.path())]);
        assert_eq!(
            by_variable,
            format!("found by {}: {}", FLAVOUR.variable, path.display())
        );
    }
    let nothing = search_with(&[]);
    // A machine may have the library installed system-wide.
    if !nothing.starts_with("found by the loader") {
        for part in [
            FLAVOUR.install,
            FLAVOUR.variable,
            FLAVOUR.python_package,
            "--tensorrt-lib",
        ] {
            assert!(nothing.contains(part), "{part}: {nothing}");
        }
        assert!(nothing.contains(&FLAVOUR.libraries.join(", ")), "{nothing}");
    }
}

#[test]
fn engines_of_the_other_tensorrt() {
    let (own, other) = if FLAVOUR == RTX {
        (&RTX, &ENTERPRISE)
    } else {
        (&ENTERPRISE, &RTX)
    };
    assert!(own.check().is_ok());
    let error = other.check().unwrap_err();
    let compiled = format!("compiled for {}, not for {}", own.product, other.product);
    let remedy = format!("`cargo build --no-default-features --features cli,{}`", other.feature);
    let (message, help) = (error.to_string(), error.help().unwrap());
    assert!(
        message.contains(&compiled) && help.contains(&remedy),
        "{message}: {help}"
    );
}
