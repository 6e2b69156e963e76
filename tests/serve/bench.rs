//! `lapidary bench --serve`: clients, tokens and times.

use serde_json::Value;

use crate::models::talker;
use crate::support::{lapidary, text};

#[test]
fn clients_are_measured() {
    let folder = tempfile::tempdir().unwrap();
    let package = talker(folder.path(), "64");
    let common = ["bench", text(&package), "--device", "cpu", "--threads", "2"];
    let shape = ["--serve", "1,4", "--serve-shape", "20:8", "--serve-requests", "8"];
    let document = lapidary([&common[..], &shape, &["--json"]].concat()).ok().json();
    assert_eq!(
        (&document["prompt_tokens"], &document["new_tokens"]),
        (&Value::from(20), &Value::from(8))
    );
    let levels = document["levels"].as_array().unwrap();
    assert_eq!(levels.len(), 2);
    for (level, clients) in levels.iter().zip([1, 4]) {
        let number = |pointer: &str| {
            level
                .pointer(pointer)
                .and_then(Value::as_f64)
                .unwrap_or_else(|| panic!("{level}"))
        };
        assert_eq!((number("/clients"), number("/requests")), (f64::from(clients), 8.0));
        let rate = 8.0 * 8.0 / number("/seconds");
        assert!((number("/tokens_per_s") - rate).abs() < 1e-6 * rate);
        assert_eq!(
            (
                number("/ttft_ms/count"),
                number("/itl_ms/count"),
                number("/e2e_ms/count")
            ),
            (8.0, 56.0, 8.0)
        );
        assert!(number("/itl_ms/p50") <= number("/itl_ms/p99") && number("/ttft_ms/p50") <= number("/e2e_ms/p99"));
    }
    assert_eq!(levels[0]["tokens_per_step"], 1.0);
    assert!(levels[1]["tokens_per_step"].as_f64().unwrap() > 1.5, "{}", levels[1]);

    let table = lapidary([&common[..], &shape].concat()).ok().stdout;
    assert!(table.contains("clients") && table.contains("ITL p50"), "{table}");
    let refused = |flags: &[&str]| lapidary([&common[..], flags].concat()).refused().0;
    assert!(refused(&["--serve", "1", "--serve-shape", "60:8"]).contains("64 together at most"));
    assert!(refused(&["--serve", "1", "--serve-shape", "8:0"]).contains("at least one token each"));
    for wrong in [
        &["--serve", "0"][..],
        &["--serve", "1", "--prefill", "8"],
        &["--serve-shape", "8:8"],
    ] {
        assert_eq!(lapidary([&common[..], wrong].concat()).status, 2, "{wrong:?}");
    }
}
