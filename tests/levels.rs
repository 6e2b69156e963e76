//! Levels: a module uses only modules of lower levels.
//!
//! The order is defined only by the table in the head of `src/lib.rs`. This reads the sources, not the compiled crate:
//! it checks every path that begins with `crate`, `super` or `self`, in `use` and in expressions. Comments, strings and
//! code only for tests or documentation (`#[cfg(test)]`, `#[cfg(doc)]`) do not count.

#[path = "levels/scan.rs"]
mod scan;

use std::collections::HashSet;
use std::fs;
use std::path::{Path, PathBuf};

use scan::{Paths, scan};

/// The table's rows from bottom to top; modules of one row must not use each other.
struct Levels(Vec<Vec<String>>);

impl Levels {
    /// From the lines `//! | 3 | `graph` | … |` of a crate's head.
    fn read(head: &str) -> Self {
        let mut rows = Vec::new();
        for line in head.lines().filter_map(|line| line.strip_prefix("//! | ")) {
            let cells: Vec<&str> = line.split('|').map(str::trim).collect();
            if cells[0].parse::<usize>().is_err() {
                continue;
            }
            assert_eq!(
                cells[0],
                (rows.len() + 1).to_string(),
                "levels are numbered from bottom to top"
            );
            rows.push(
                cells[1]
                    .split(',')
                    .map(|name| name.trim().trim_matches('`').to_string())
                    .collect(),
            );
        }
        Levels(rows)
    }

    fn modules(&self) -> impl Iterator<Item = (usize, &str)> {
        let rows = self.0.iter().enumerate();
        rows.flat_map(|(level, row)| row.iter().map(move |name| (level + 1, name.as_str())))
    }

    /// The level of a path, and its module in the table. A folder of several (`backend`) counts as the highest of them.
    fn of(&self, path: &[String]) -> Option<(usize, &str)> {
        let inside =
            |name: &str| name.split("::").zip(path).filter(|(a, b)| a == b).count() == name.split("::").count();
        let around = |name: &str| path.iter().zip(name.split("::")).filter(|(a, b)| a == b).count() == path.len();
        let found = self.modules().find(|(_, name)| inside(name));
        found.or_else(|| self.modules().filter(|(_, name)| around(name)).max())
    }

    /// The violations in a file, one line each: `file:line: …`.
    fn violations(&self, file: &str, module: &[String], paths: &Paths) -> Vec<String> {
        let here = module.join("::");
        let Some((own_level, own)) = self.of(module) else {
            return vec![format!(
                "{file}: the module `{here}` is not in the table of levels in src/lib.rs"
            )];
        };
        let mut found = Vec::new();
        for (line, path) in &paths.used {
            // An enclosing module, as in `pub(in crate::backend)`, is not another module.
            if path.is_empty() || module.starts_with(path) {
                continue;
            }
            let name = path.join("::");
            match self.of(path) {
                None => found.push(format!(
                    "{file}:{line}: `{name}` is in no module of the table of levels in src/lib.rs"
                )),
                Some((_, theirs)) if theirs == own => {}
                Some((level, _)) if level < own_level => {}
                Some((level, theirs)) => found.push(format!(
                    "{file}:{line}: `{own}` (level {own_level}) uses `{name}` of `{theirs}` (level {level}), which is not \
                     below it"
                )),
            }
        }
        found
    }
}

/// Every source file below a folder with its module.
fn sources(folder: &Path, module: &[String], found: &mut Vec<(PathBuf, Vec<String>)>) {
    let mut entries: Vec<PathBuf> = fs::read_dir(folder).unwrap().map(|e| e.unwrap().path()).collect();
    entries.sort();
    for path in entries {
        let name = path.file_stem().unwrap().to_string_lossy().into_owned();
        let child = [module, std::slice::from_ref(&name)].concat();
        if path.is_dir() {
            sources(&path, &child, found);
        } else if path.extension().is_some_and(|e| e == "rs") {
            let is_root = module.is_empty() && ["lib", "main"].contains(&name.as_str());
            match name.as_str() {
                "mod" => found.push((path, module.to_vec())),
                _ if is_root => {}
                _ => found.push((path, child)),
            }
        }
    }
}

#[test]
fn no_module_uses_one_above_it() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let head = fs::read_to_string(root.join("src/lib.rs")).unwrap();
    let levels = Levels::read(&head);
    for (_, name) in levels.modules() {
        let path = root.join("src").join(name.replace("::", "/"));
        let there = path.join("mod.rs").is_file() || path.with_extension("rs").is_file();
        assert!(
            there,
            "the table of levels in src/lib.rs names `{name}`, and there is no such module"
        );
    }
    let mut files = Vec::new();
    sources(&root.join("src"), &[], &mut files);
    let scanned: Vec<(PathBuf, Vec<String>, Paths)> = files
        .into_iter()
        .map(|(path, module)| {
            let paths = scan(&fs::read_to_string(&path).unwrap(), &module);
            (path, module, paths)
        })
        .collect();
    let only_tests: HashSet<PathBuf> = scanned
        .iter()
        .flat_map(|(path, module, paths)| paths.test_files.iter().map(|file| beside(path, module, file)))
        .collect();
    let mut violations = Vec::new();
    for (path, module, paths) in &scanned {
        if !only_tests.contains(path) {
            let file = path.strip_prefix(root).unwrap().display().to_string();
            violations.extend(levels.violations(&file, module, paths));
        }
    }
    assert!(violations.is_empty(), "{}", violations.join("\n"));
    // The scanner found the expected number of paths.
    let seen: usize = scanned.iter().map(|(_, _, paths)| paths.used.len()).sum();
    assert!(
        scanned.len() > 200 && seen > 1000,
        "{} files, {seen} paths",
        scanned.len()
    );
}

/// The file of `mod name;` or `#[path = "name.rs"] mod tests;`: beside a `mod.rs`, in the module's folder otherwise; a
/// `path` is always beside the file.
fn beside(file: &Path, module: &[String], name: &scan::TestFile) -> PathBuf {
    let folder = file.parent().unwrap();
    match name {
        scan::TestFile::Path(path) => folder.join(path),
        scan::TestFile::Name(name) if file.ends_with("mod.rs") => folder.join(name).with_extension("rs"),
        scan::TestFile::Name(name) => folder.join(module.last().unwrap()).join(name).with_extension("rs"),
    }
}

const TABLE: &str = "\
//! | level | module | holds |
//! |---|---|---|
//! | 1 | `dim` | sizes |
//! | 2 | `backend::cpu`, `backend::gpu` | machines |
//! | 3 | `package` | files |
//! | 4 | `decode` | sessions |
";

fn check(module: &str, source: &str) -> Vec<String> {
    let module: Vec<String> = module.split("::").map(str::to_string).collect();
    Levels::read(TABLE).violations("a.rs", &module, &scan(source, &module))
}

#[test]
fn upward_paths_are_found_wherever_they_stand() {
    let one = |module, source| match &check(module, source)[..] {
        [one] => one.clone(),
        other => panic!("{source}: {other:?}"),
    };
    assert_eq!(
        one("package::write", "use crate::dim::Dim;\nuse crate::decode::Session;\n"),
        "a.rs:2: `package` (level 3) uses `decode::Session` of `decode` (level 4), which is not below it"
    );
    for source in [
        "use crate::{dim, decode};",
        "use crate::{\n    dim::{self, Dim},\n    decode::{text::{Tokenizer as T}},\n};",
        "fn f() { let n = crate::decode::count::<u8>(1); }",
        "use super::super::decode;",
        "mod inner { use super::super::super::decode::*; }",
        "pub use crate::decode::Session;",
        "#[cfg(feature = \"x\")] use crate::decode::Session;",
        "macro_rules! m { () => { $crate::decode::f() } }",
        "const A: char = '\"'; const B: char = '\\''; fn f<'a>(_: &'a u8) { crate::decode::f() }",
        "/* /* */ */ const R: &str = r#\"\"#; fn f() { crate::decode::f() }",
    ] {
        let found = one("package::write", source);
        assert!(found.contains("of `decode` (level 4)"), "{found}");
    }
    assert!(one("backend::cpu::pool", "use crate::backend::gpu::Stream;").contains("`backend::gpu` (level 2)"));
    assert!(one("dim", "use crate::backend;").contains("`backend::gpu` (level 2)"));
}

#[test]
fn modules_that_the_table_does_not_have_are_found() {
    assert_eq!(
        check("serve", "use crate::dim::Dim;"),
        ["a.rs: the module `serve` is not in the table of levels in src/lib.rs"]
    );
    assert_eq!(
        check("decode", "use crate::Session;"),
        ["a.rs:1: `Session` is in no module of the table of levels in src/lib.rs"]
    );
}

#[test]
fn what_is_no_upward_use_passes() {
    let source = r##"
        //! See [`crate::decode::Session`].
        use std::fmt;
        use super::{Package, error};
        use crate::backend::cpu::Program;
        // use crate::decode;
        /* use crate::decode; /* nested */ */
        pub(in crate::package) fn f() -> &'static str { "crate::decode" }
        const RAW: &str = r#"crate::decode "quoted""#;
        #[cfg(doc)]
        use crate::decode::Session;
        #[cfg(test)]
        mod tests;
        #[cfg(test)]
        #[path = "more.rs"]
        mod more;
        #[cfg(all(test, unix))]
        mod inline { use super::*; use crate::decode::Session; fn g() { if true { crate::decode::f() } } }
        #[test]
        fn a_test() { crate::dim::f() }
        mod deeper { use super::super::error; }
    "##;
    assert_eq!(check("package::write", source), Vec::<String>::new());
    let scanned = scan(source, &["package".into(), "write".into()]);
    assert_eq!(
        scanned.test_files,
        [
            scan::TestFile::Name("tests".into()),
            scan::TestFile::Path("more.rs".into())
        ]
    );
}
