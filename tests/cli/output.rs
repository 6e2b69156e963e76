//! Features of all commands: `--json=compact`, `--quiet`, completions, manual pages, folded lists.

use std::sync::atomic::{AtomicBool, Ordering};

use crate::support::{BUSY, command, fixture, lapidary, package, text};

#[test]
fn compact_json_is_the_same_document_on_one_line() {
    let model = fixture("exports/llama-optimum/model.onnx");
    let indented = lapidary(["inspect", text(&model), "--json"]).ok();
    let compact = lapidary(["inspect", text(&model), "--json=compact"]).ok();
    assert!(indented.stdout.lines().count() > 10);
    assert_eq!(compact.stdout.lines().count(), 1);
    assert_eq!(compact.json(), indented.json());
    let (message, _) = lapidary(["inspect", text(&model), "--json=short"]).refused();
    assert!(message.contains("'short'"), "{message}");
}

#[test]
fn inspect_folds_the_inputs_of_a_cache() {
    let model = fixture("families/optimum-gemma3/model.onnx");
    let folded = lapidary(["inspect", text(&model)]).ok().stdout;
    let whole = lapidary(["inspect", text(&model), "--verbose"]).ok().stdout;
    assert!(folded.contains("past_key_values.0.key (and 2 more)"), "{folded}");
    assert!(!folded.contains("past_key_values.2.key"), "{folded}");
    assert!(
        whole.contains("past_key_values.2.key ") && !whole.contains("more)"),
        "{whole}"
    );
    assert_eq!(whole.lines().count() - folded.lines().count(), 4 * 2);
}

#[test]
fn doctor_gives_a_reason_once() {
    let printed = lapidary(["doctor", "--tensorrt-lib", "/no/such/library.so"])
        .ok()
        .stdout;
    assert_eq!(printed.matches("/no/such/library.so").count(), 1, "{printed}");
    assert!(printed.contains("no, for the reason above"), "{printed}");
}

#[test]
fn completions_and_manual_pages_know_every_command() {
    let folder = tempfile::tempdir().unwrap();
    let script = lapidary(["completions", "bash"]).ok().stdout;
    let pages = folder.path().join("man1");
    lapidary(["man", text(&pages)]).ok();
    for name in ["convert", "inspect", "generate", "doctor", "man"] {
        assert!(script.contains(&format!("lapidary__subcmd__{name}")), "{name}");
        let page = std::fs::read_to_string(pages.join(format!("lapidary-{name}.1"))).unwrap();
        assert!(page.contains(".SH SYNOPSIS"), "{page}");
    }
    assert!(lapidary(["man"]).ok().stdout.contains(".TH lapidary 1"));
    // A file in the folder's place.
    let file = folder.path().join("file");
    std::fs::write(&file, "").unwrap();
    let (message, _) = lapidary(["man", text(&file)]).refused();
    assert!(message.starts_with(text(&file)), "{message}");
}

/// For the program, threads of this process count as other processes.
#[test]
fn bench_warns_of_a_busy_machine_unless_it_is_quiet() {
    let folder = tempfile::tempdir().unwrap();
    let pkg = package(folder.path(), &fixture("exports/llama-optimum/model.onnx"), &[]);
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        for _ in 0..std::thread::available_parallelism().unwrap().get() {
            scope.spawn(|| {
                while !done.load(Ordering::Relaxed) {
                    std::hint::spin_loop();
                }
            });
        }
        let bench = |flags: &[&str]| {
            let mut bench = command();
            bench.args([
                "bench",
                text(&pkg),
                "--prefill",
                "2",
                "--repetitions",
                "1",
                "--outputs",
                "0",
            ]);
            let output = bench.args(flags).output().unwrap();
            assert!(output.status.success(), "{output:?}");
            String::from_utf8(output.stderr).unwrap()
        };
        let warned = bench(&[]);
        let quiet = bench(&["--quiet"]);
        done.store(true, Ordering::Relaxed);
        assert!(warned.contains(BUSY), "{warned}");
        assert_eq!(quiet, "");
    });
}
