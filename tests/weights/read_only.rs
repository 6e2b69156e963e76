//! A package on a disk that cannot be written: it runs, and what would change it is refused and changes nothing.
//!
//! Permissions stop nobody who is root, as tests in containers are, so the package lies on a read-only mount that only the
//! program under test sees.

use std::path::Path;
use std::process::Command;

use crate::refit::{export, set_hash, tokens};
use crate::support::{Run, command, names, package, text};

/// `unshare` with what it takes here to get a mount namespace; `None`: not allowed.
fn unshare() -> Option<&'static [&'static str]> {
    let ways: [&[&str]; 2] = [&["-m"], &["-rm"]];
    ways.into_iter().find(|way| {
        let mut probe = Command::new("unshare");
        probe
            .args(*way)
            .args(["sh", "-c", "mount --bind /tmp /tmp && mount -o remount,ro,bind /tmp"]);
        probe.output().is_ok_and(|output| output.status.success())
    })
}

/// Runs the program where `folder` is read-only.
fn read_only(way: &[&str], folder: &Path, args: &[&str]) -> Run {
    let program = command();
    let mut all = Command::new("unshare");
    all.args(way)
        .args([
            "sh",
            "-c",
            "mount --bind $0 $0 && mount -o remount,ro,bind $0 && exec \"$@\"",
        ])
        .args([text(folder), text(Path::new(program.get_program()))])
        .args(args);
    for (name, value) in program.get_envs() {
        match value {
            Some(value) => all.env(name, value),
            None => all.env_remove(name),
        };
    }
    Run::of(all.output().unwrap())
}

#[test]
fn a_package_on_a_read_only_disk() {
    let Some(way) = unshare() else {
        eprintln!("skipped: no mount namespaces here, so no read-only disk");
        return;
    };
    let folder = tempfile::tempdir().unwrap();
    let disk = folder.path().join("disk");
    std::fs::create_dir(&disk).unwrap();
    let pkg = package(&disk, &export("llama-optimum"), &["--capacity", "32"]);
    let (hash, expected) = (set_hash(&pkg), tokens(&pkg, "llama-optimum"));
    let model = export("llama-optimum");
    let run = |args: &[&str]| read_only(way, &disk, args);

    // What only reads works.
    run(&["info", text(&pkg), "--check"]).ok();
    run(&["weights", text(&pkg), "--check", text(&model)]).ok();
    let told = run(&[
        "generate",
        text(&pkg),
        "--prompt-ids",
        "1,2,3",
        "--max-new-tokens",
        "6",
        "--ignore-eos",
        "--json",
    ])
    .ok();
    assert_eq!(told.json()["tokens"].as_array().unwrap().len(), 6);

    // What would write there is refused, and says where to.
    for args in [
        &["refit", text(&pkg), "--from", text(&model)][..],
        &["convert", text(&model), "-o", text(&pkg), "--capacity", "32", "--force"],
        &["strip", text(&pkg), "-o", text(&disk.join("bare"))],
    ] {
        let (message, help) = run(args).refused();
        assert!(
            message.contains("Read-only file system") && message.contains("disk"),
            "{message}"
        );
        assert!(help.contains("nothing was changed"), "{help}");
    }
    assert_eq!(names(&disk), ["pkg"], "nothing is left behind");
    assert_eq!(set_hash(&pkg), hash);

    // The way out that the message names. No hard links lead from one disk to another.
    let copy = folder.path().join("copy");
    run(&["strip", text(&pkg), "-o", text(&copy)]).ok();
    run(&["refit", text(&copy), "--from", text(&pkg)]).ok();
    assert_eq!((set_hash(&copy), tokens(&copy, "llama-optimum")), (hash, expected));
}
