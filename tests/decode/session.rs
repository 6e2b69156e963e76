use std::path::Path;

use lapidary::decode::cpu::{CpuDevice, LARGEST_CHUNK};
use lapidary::decode::{self, FinishReason, Limits, Session};
use lapidary::sample::{Chain, Settings};
use lapidary::{onnx, passes};

fn device(export: &str, capacity: usize, threads: usize) -> (CpuDevice, usize) {
    let model = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("fixtures/exports")
        .join(export)
        .join("model.onnx");
    let options = passes::CanonicalizeOptions {
        max_positions: capacity,
        ..passes::CanonicalizeOptions::default()
    };
    let canonical = passes::canonicalize(onnx::read(model).unwrap(), &options).unwrap();
    let vocabulary = canonical.architecture.vocabulary.unwrap();
    (CpuDevice::new(canonical.graph, vocabulary, Some(threads)), vocabulary)
}

fn session(export: &str, capacities: &[usize]) -> Session {
    let (device, vocabulary) = device(export, *capacities.iter().max().unwrap(), 2);
    Session::new(Box::new(device), capacities, vocabulary)
}

fn prompt(n: usize) -> Vec<u32> {
    (0..n as u32).map(|i| (i * i * 31 + i * 7 + 3) % 97).collect()
}

fn assert_close(a: &[f32], b: &[f32], what: &str) {
    assert_eq!(a.len(), b.len());
    let worst = a.iter().zip(b).map(|(x, y)| (x - y).abs()).fold(0.0, f32::max);
    assert!(worst < 1e-4, "{what}: {worst}");
}

#[test]
fn chunks_are_as_good_as_one_and_as_token_by_token() {
    // Mistral's window of 8 must look across the borders of chunks too.
    for export in ["llama-optimum", "mistral-optimum"] {
        let tokens = prompt(60);
        let mut whole = session(export, &[64]);
        whole.feed(&tokens).unwrap();
        let mut pieces = session(export, &[64]);
        for piece in tokens.chunks(17) {
            pieces.feed(piece).unwrap();
        }
        assert_close(whole.logits(), pieces.logits(), export);
        let mut single = session(export, &[64]);
        for token in &tokens {
            single.feed(&[*token]).unwrap();
        }
        assert_close(whole.logits(), single.logits(), export);
    }
}

#[test]
fn a_prompt_longer_than_the_largest_chunk() {
    let tokens = prompt(LARGEST_CHUNK + 90);
    let mut whole = session("llama-optimum", &[1024]);
    whole.feed(&tokens).unwrap();
    assert!(
        whole.device().engine().contains("b1-t90-c1024"),
        "{}",
        whole.device().engine()
    );
    let mut pieces = session("llama-optimum", &[1024]);
    for piece in tokens.chunks(200) {
        pieces.feed(piece).unwrap();
    }
    assert_close(whole.logits(), pieces.logits(), "600 tokens");
}

#[test]
fn moving_up_gives_what_one_large_cache_gives() {
    for export in ["llama-optimum", "llama-optimum-fp16", "gpt2-optimum"] {
        let mut large = session(export, &[64]);
        let mut grows = session(export, &[8, 16, 24, 64]);
        large.feed(&prompt(5)).unwrap();
        grows.feed(&prompt(5)).unwrap();
        assert_eq!(grows.capacity(), 8);
        for token in prompt(40) {
            large.feed(&[token]).unwrap();
            grows.feed(&[token]).unwrap();
            assert_close(large.logits(), grows.logits(), export);
        }
        assert_eq!((grows.capacity(), grows.moves().0), (64, 3));
    }
}

#[test]
fn a_session_can_start_over() {
    let mut session = session("llama-optimum", &[16, 32]);
    session.feed(&prompt(9)).unwrap();
    let first = session.logits().to_vec();
    session.feed(&prompt(20)).unwrap();
    session.clear();
    session.feed(&prompt(9)).unwrap();
    // Now in the larger cache, with stale slots of the old tokens.
    assert_eq!(session.capacity(), 32);
    assert_close(session.logits(), &first, "after clear");
}

#[test]
fn generation_is_reproducible_on_any_number_of_threads() {
    let tokens = |threads: usize, seed: u64| {
        let (device, vocabulary) = device("qwen3-optimum", 64, threads);
        let mut session = Session::new(Box::new(device), &[16, 64], vocabulary);
        let mut chain = Chain::new(&Settings {
            seed,
            ..Settings::neutral()
        })
        .unwrap();
        let limits = Limits {
            max_new_tokens: 30,
            ..Limits::default()
        };
        let generation = decode::generate(&mut session, None, &prompt(7), &mut chain, &limits, |_| Ok(())).unwrap();
        assert_eq!(generation.finish_reason, FinishReason::Length);
        assert!(generation.steps.is_empty() && generation.text.is_empty());
        generation.tokens
    };
    assert_eq!(tokens(1, 5), tokens(2, 5));
    assert_ne!(tokens(2, 5), tokens(2, 6));
}

#[test]
fn a_common_prefix_is_kept_and_changes_nothing() {
    // Mistral's window of 8 must still see the tokens before the branch; the last prompt moves to the larger cache.
    for export in ["llama-optimum", "mistral-optimum", "gpt2-optimum"] {
        let mut kept = session(export, &[32, 64]);
        let (mut first, mut second) = (prompt(24), prompt(40));
        first[20] = 90;
        second.truncate(12);
        second.extend(prompt(30));
        for (tokens, reused) in [(prompt(24), 0), (first, 20), (prompt(18), 17), (second, 12)] {
            assert_eq!(kept.resume(&tokens).unwrap(), reused, "{export}");
            let mut fresh = session(export, &[64]);
            fresh.feed(&tokens).unwrap();
            assert_close(kept.logits(), fresh.logits(), export);
        }
        assert_eq!(kept.moves().0, 1);
    }
}
