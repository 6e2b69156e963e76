//! Links of the documentation are valid: files, headings, and paths below docs/ that sources name.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// Files below a folder with one of these endings, sorted.
fn files(folder: &Path, endings: &[&str], found: &mut Vec<PathBuf>) {
    let mut entries: Vec<PathBuf> = fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .collect();
    entries.sort();
    for path in entries {
        let name = path.file_name().unwrap().to_string_lossy().into_owned();
        if path.is_dir() {
            if !name.starts_with('.') && !name.starts_with("target") {
                files(&path, endings, found);
            }
        } else if endings.iter().any(|ending| name.ends_with(ending)) {
            found.push(path);
        }
    }
}

/// Targets of `](target)` outside of code, with the line they are on.
fn links(text: &str) -> Vec<(usize, String)> {
    let (mut found, mut in_code) = (Vec::new(), false);
    for (number, line) in text.lines().enumerate() {
        if line.trim_start().starts_with("```") {
            in_code = !in_code;
        }
        if in_code {
            continue;
        }
        for part in line.split("](").skip(1) {
            if let Some((target, _)) = part.split_once(')') {
                found.push((number + 1, target.to_string()));
            }
        }
    }
    found
}

/// Anchors that GitHub and mdBook generate from headings.
fn anchors(text: &str) -> BTreeSet<String> {
    let headings = text.lines().filter(|line| line.starts_with('#'));
    let slug = |heading: &str| -> String {
        let plain = heading.trim_start_matches('#').trim().to_lowercase();
        let kept = plain
            .chars()
            .filter(|c| c.is_alphanumeric() || matches!(c, ' ' | '-' | '_'));
        kept.map(|c| if c == ' ' { '-' } else { c }).collect()
    };
    headings.map(slug).collect()
}

#[test]
fn links_of_pages_lead_somewhere() {
    let mut pages = Vec::new();
    files(root(), &[".md"], &mut pages);
    assert!(pages.len() > 40, "{}", pages.len());
    let mut broken = Vec::new();
    // Fuzz corpora and report text are not pages.
    let is_page =
        |page: &&PathBuf| !page.starts_with(root().join("src")) && !page.starts_with(root().join("fuzz/corpus"));
    for page in pages.iter().filter(is_page) {
        let text = fs::read_to_string(page).unwrap();
        for (line, target) in links(&text) {
            if target.contains("://") || target.starts_with("mailto:") {
                continue;
            }
            let (file, anchor) = target.split_once('#').unwrap_or((&target, ""));
            let path = match file {
                "" => page.clone(),
                file => page.parent().unwrap().join(file),
            };
            let leads = path.exists()
                && (anchor.is_empty()
                    || path.extension().is_none_or(|kind| kind != "md")
                    || anchors(&fs::read_to_string(&path).unwrap()).contains(anchor));
            if !leads {
                broken.push(format!("{}:{line}: {target}", page.display()));
            }
        }
    }
    assert!(broken.is_empty(), "{}", broken.join("\n"));
}

#[test]
fn every_page_is_in_the_book() {
    let docs = root().join("docs");
    let summary = fs::read_to_string(docs.join("SUMMARY.md")).unwrap();
    let listed: BTreeSet<PathBuf> = links(&summary)
        .into_iter()
        .map(|(_, target)| docs.join(target))
        .collect();
    let mut pages = Vec::new();
    files(&docs, &[".md"], &mut pages);
    let missing: Vec<&PathBuf> = pages
        .iter()
        .filter(|page| !listed.contains(*page) && !page.ends_with("SUMMARY.md"))
        .collect();
    assert!(missing.is_empty(), "not in docs/SUMMARY.md: {missing:?}");
}

#[test]
fn pages_that_sources_name_exist() {
    let mut sources = Vec::new();
    for folder in ["src", "scripts", "tests", "examples", "benches"] {
        files(
            &root().join(folder),
            &[".rs", ".py", ".sh", ".cu", ".md", ".mjs"],
            &mut sources,
        );
    }
    let mut broken = Vec::new();
    for source in sources {
        let text = fs::read_to_string(&source).unwrap();
        for part in text.split("docs/").skip(1) {
            let end = part.find(|c: char| !(c.is_ascii_alphanumeric() || "-_/.".contains(c)));
            let name = part[..end.unwrap_or(part.len())].trim_end_matches('.');
            if name.ends_with(".md") && !name.contains("ContribOperators") && !root().join("docs").join(name).exists() {
                broken.push(format!("{}: docs/{name}", source.display()));
            }
        }
    }
    assert!(broken.is_empty(), "{}", broken.join("\n"));
}
