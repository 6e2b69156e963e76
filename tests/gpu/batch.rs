//! Several sequences on the GPU: each is bit-identical to a run alone, and equal to the CPU up to rounding.

use std::path::Path;

use lapidary::convert::{ConvertOptions, convert};
use lapidary::decode::batch::{BatchDecoder, BatchOptions, NextToken, SequenceId};
use lapidary::decode::{DeviceChoice, SessionOptions, best};
use lapidary::package::Package;
use lapidary::spec::Spec;
use lapidary::target::{Precision, Prefill, Target};

/// A package with engines for steps of this many sequences, at capacities of 16, 32 and 64.
fn package(folder: &Path, export: &str, batch: &[usize]) -> Package {
    let spec = Spec {
        targets: Some(vec![Target::Cpu, Target::TensorrtRtx]),
        dtype: Some(Precision::Fp16),
        capacity: Some(vec![16, 32, 64]),
        prefill: Some(Prefill::Chunks(vec![16])),
        batch: Some(batch.to_vec()).filter(|batch| !batch.is_empty()),
        ..Spec::default()
    };
    let model = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("fixtures")
        .join(export)
        .join("model.onnx");
    let output = folder.join("package");
    convert(&model, &output, spec.resolve().unwrap(), &ConvertOptions::default())
        .unwrap_or_else(|error| panic!("{export}: {error}"));
    Package::open(&output).unwrap()
}

fn decoder(package: &Package, device: DeviceChoice, sequences: usize) -> BatchDecoder {
    let options = SessionOptions {
        device,
        ..SessionOptions::default()
    };
    let batch = BatchOptions {
        sequences,
        chunk: 16,
        kept: 4,
        cache_bytes: None,
    };
    BatchDecoder::open(package, &options, batch).unwrap_or_else(|error| panic!("{error}"))
}

/// Tokens, and the logits that each was drawn from.
type Given = Vec<(u32, Vec<f32>)>;

/// The best tokens after each prompt, `tokens[i]` of prompt i. Prompt i joins before step `i * apart`. Tokens of
/// `forced` are fed instead of the best ones, so that runs with different rounding can be compared.
fn run(
    batch: &mut BatchDecoder,
    prompts: &[Vec<u32>],
    tokens: &[usize],
    apart: usize,
    forced: Option<&[Given]>,
) -> Vec<Given> {
    let mut given: Vec<Given> = vec![Vec::new(); prompts.len()];
    let mut going: Vec<(usize, SequenceId)> = Vec::new();
    let mut next = 0;
    for round in 0.. {
        while next < prompts.len() && batch.has_place() && round >= next * apart {
            let id = batch.join(prompts[next].clone()).unwrap();
            while batch.prefill(id).unwrap_or_else(|error| panic!("{error}")).left > 0 {}
            going.push((next, id));
            next += 1;
        }
        if going.is_empty() && next == prompts.len() {
            break;
        }
        let mut steps = Vec::new();
        going.retain(|(i, id)| {
            let logits = batch.logits(*id).to_vec();
            let token = match forced {
                Some(forced) => forced[*i][given[*i].len()].0,
                None => best(&logits).expect("finite logits"),
            };
            given[*i].push((token, logits));
            let goes_on = given[*i].len() < tokens[*i];
            if goes_on {
                steps.push((*id, token));
            } else {
                batch.leave(*id);
            }
            goes_on
        });
        for result in batch.step(&steps) {
            result.unwrap_or_else(|error| panic!("{error}"));
        }
    }
    given
}

fn same_bits(a: &Given, b: &Given) -> bool {
    let bits = |given: &Given| -> Vec<Vec<u32>> {
        given
            .iter()
            .map(|(_, logits)| logits.iter().map(|x| x.to_bits()).collect())
            .collect()
    };
    bits(a) == bits(b)
}

#[test]
#[ignore = "needs a GPU"]
fn sequences_on_the_gpu_get_what_they_get_alone() {
    // The last has layer norms, which TensorRT computes: its sequences take turns.
    for (export, batch) in [
        ("exports/llama-optimum", &[2, 4, 8, 16][..]),
        ("exports/qwen3-optimum", &[3, 16]),
        ("exports/llama-optimum", &[]),
        ("exports/gpt2-optimum", &[]),
    ] {
        let folder = tempfile::tempdir().unwrap();
        let package = package(folder.path(), export, batch);
        let vocabulary = package.vocabulary().unwrap() as u32;
        // Shorter and longer than a chunk; caches grow beyond 16 and 32 slots in the middle. One prompt comes twice.
        let lengths = [5, 23, 1, 38, 23, 16, 17, 2, 11, 29, 7, 8, 9, 10, 31, 3, 12, 40];
        let tokens = [14, 12, 18, 6, 10, 3, 20, 40, 8, 9, 10, 11, 12, 13, 14, 15, 16, 5];
        let prompts: Vec<Vec<u32>> = lengths
            .iter()
            .enumerate()
            .map(|(i, n)| {
                let seed = if i == 4 { 1 } else { i as u32 };
                (0..*n)
                    .map(|j: u32| (j * j * 31 + j * (7 + seed) + 3 * seed) % vocabulary)
                    .collect()
            })
            .collect();
        let lone: Vec<Given> = prompts
            .iter()
            .zip(tokens)
            .map(|(prompt, tokens)| {
                let mut alone = decoder(&package, DeviceChoice::Cuda, 1);
                run(&mut alone, std::slice::from_ref(prompt), &[tokens], 0, None).remove(0)
            })
            .collect();
        for (sequences, apart) in [(18, 0), (5, 2), (16, 1)] {
            let mut together = decoder(&package, DeviceChoice::Cuda, sequences);
            let given = run(&mut together, &prompts, &tokens, apart, None);
            for (i, (lone, given)) in lone.iter().zip(&given).enumerate() {
                assert!(
                    same_bits(lone, given),
                    "{export} {batch:?}: {sequences} sequences, prompt {i}"
                );
            }
        }
        let on_cpu = run(
            &mut decoder(&package, DeviceChoice::Cpu, 4),
            &prompts,
            &tokens,
            0,
            Some(&lone),
        );
        let pairs = lone.iter().flatten().zip(on_cpu.iter().flatten());
        let differences = pairs.flat_map(|((_, a), (_, b))| a.iter().zip(b).map(|(a, b)| (a - b).abs()));
        let worst = differences.fold(0.0, |worst, d| if d > worst || d.is_nan() { d } else { worst });
        assert!(worst < 5e-2, "{export} {batch:?}: {worst:e} from the CPU");
    }
}

/// Some rows of a step need the best token alone, others their logits.
#[test]
#[ignore = "needs a GPU"]
fn best_tokens_found_on_the_gpu_are_those_of_the_logits() {
    let folder = tempfile::tempdir().unwrap();
    let package = package(folder.path(), "exports/llama-optimum", &[2, 4, 8]);
    let vocabulary = package.vocabulary().unwrap() as u32;
    let prompts: Vec<Vec<u32>> = (0..6u32)
        .map(|i| (0..4 + i).map(|j| (j * 37 + i * 11 + 5) % vocabulary).collect())
        .collect();
    let expected = run(
        &mut decoder(&package, DeviceChoice::Cuda, 6),
        &prompts,
        &[24; 6],
        0,
        None,
    );

    let mut batch = decoder(&package, DeviceChoice::Cuda, 6);
    let ids: Vec<SequenceId> = prompts
        .iter()
        .map(|prompt| batch.join(prompt.clone()).unwrap())
        .collect();
    for id in &ids {
        while batch.prefill(*id).unwrap().left > 0 {}
    }
    for round in 0..24 {
        let mut next = Vec::new();
        for (i, id) in ids.iter().enumerate() {
            let (token, logits) = &expected[i][round];
            match batch.best(*id) {
                Some(best) => {
                    assert_eq!(best, *token, "sequence {i}, token {round}");
                    assert!(batch.logits(*id).is_empty());
                }
                None => assert!(batch.logits(*id) == logits, "sequence {i}, token {round}"),
            }
            let only_best = (i + round) % 3 > 0;
            assert_eq!(batch.best(*id).is_some(), round > 0 && (i + round - 1) % 3 > 0);
            next.push(NextToken {
                sequence: *id,
                token: *token,
                only_best,
            });
        }
        for result in batch.advance(&next) {
            result.unwrap_or_else(|error| panic!("{error}"));
        }
    }
}
