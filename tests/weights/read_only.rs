//! A package on a read-only disk: it runs, and commands that would change it are refused and change nothing.
//!
//! Permissions do not restrict root, which tests in containers usually are, so the package is on a read-only mount that
//! only the program under test sees.

use std::path::Path;
use std::process::Command;

use crate::refit::{export, set_hash, tokens};
use crate::support::{Run, command, names, package, text};

/// `unshare` with the flags for a mount namespace on this machine; `None`: not allowed.
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

/// Runs the program with `folder` read-only.
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

    // Commands that only read work.
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

    // Commands that would write there are refused, and suggest another place.
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

    // The alternative named in the message. Hard links do not work across disks.
    let copy = folder.path().join("copy");
    run(&["strip", text(&pkg), "-o", text(&copy)]).ok();
    run(&["refit", text(&copy), "--from", text(&pkg)]).ok();
    assert_eq!((set_hash(&copy), tokens(&copy, "llama-optimum")), (hash, expected));
}
