//! Attention: both kernels, grouped heads, masks of every form, blocks that no query attends to.

use lapidary::network::LayerKind;
use lapidary::tensor::{DType, Tensor};
use proptest::prelude::*;

use super::reference::{Value, evaluate};
use super::support::{Random, assert_close, every_option, on_tensorrt, one_layer, run};

fn check(inputs: &[Tensor]) {
    let values: Vec<Value> = inputs.iter().map(Value::from).collect();
    let want = evaluate(&LayerKind::Attention, &values);
    let network = one_layer(LayerKind::Attention, inputs);
    let mut results = Vec::new();
    for options in every_option() {
        let got = run(&network, inputs, &options);
        assert_close(
            &got,
            &want.data,
            1.0,
            2e-5,
            &format!("attention of {inputs:?}, {options:?}"),
        );
        results.push(got.data().to_vec());
    }
    for pair in results.chunks_exact(2) {
        assert!(pair[0] == pair[1], "the result depends on the threads");
    }
}

/// Query `t` at position `past + t` attends to slots `0..=past + t`, and to the last `window` of them.
fn causal(tokens: usize, slots: usize, past: usize, window: usize) -> Tensor {
    let rows = (0..tokens).flat_map(|t| (0..slots).map(move |s| s <= past + t && s + window > past + t));
    Tensor::from_bool(vec![1, 1, tokens, slots], &rows.collect::<Vec<_>>())
}

/// If a query that attends to nothing has no comparable result (on TensorRT, see below), it gets the first slot.
fn answerable(mask: Tensor) -> Tensor {
    if !on_tensorrt() {
        return mask;
    }
    let (shape, dtype, mut values) = (mask.shape().to_vec(), mask.dtype(), mask.to_f64());
    let (hidden, seen) = match dtype {
        DType::Bool => (0.0, 1.0),
        _ => (f64::NEG_INFINITY, 0.0),
    };
    for row in values.chunks_exact_mut(shape[3]) {
        if row.iter().all(|x| *x == hidden) {
            row[0] = seen;
        }
    }
    match dtype {
        DType::Bool => Tensor::from_bool(shape, &values.iter().map(|x| *x != 0.0).collect::<Vec<_>>()),
        _ => Tensor::from_f64_as(dtype, shape, &values),
    }
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(30) })]
    #[test]
    fn any_shape_any_mask(
        batch in 1usize..3,
        kv_heads in 1usize..4,
        group in 1usize..4,
        tokens in prop_oneof![1usize..4, 4usize..40],
        slots in prop_oneof![1usize..40, 250usize..300],
        dim in prop_oneof![Just(1usize), Just(7), Just(16), Just(20)],
        mask in 0usize..5,
        seed in any::<u64>(),
    ) {
        let mut random = Random::new(seed);
        let heads = kv_heads * group;
        let mut inputs = vec![
            random.floats(DType::F32, &[batch, heads, tokens, dim], 1.0),
            random.floats(DType::F32, &[batch, kv_heads, slots, dim], 1.0),
            random.floats(DType::F32, &[batch, kv_heads, slots, dim], 1.0),
        ];
        match mask {
            0 => {}
            1 => inputs.push(random.any(DType::Bool, &[batch, heads, tokens, slots])),
            2 => inputs.push(random.any(DType::Bool, &[batch, 1, tokens, slots])),
            3 => {
                let bias = random.floats(DType::F32, &[1, heads, tokens, slots], 2.0).to_f32();
                let bias: Vec<f32> = bias.iter().map(|x| if *x < -1.0 { f32::NEG_INFINITY } else { *x }).collect();
                inputs.push(Tensor::from_f32(vec![1, heads, tokens, slots], &bias));
            }
            _ => {
                let past = random.below(slots);
                let window = 1 + random.below(slots);
                inputs.push(causal(tokens, slots, past.min(slots.saturating_sub(tokens)), window));
            }
        }
        if inputs.len() > 3 {
            inputs[3] = answerable(inputs[3].clone());
        }
        check(&inputs);
    }
}

#[test]
fn a_query_that_attends_to_nothing_gives_zeros_and_disturbs_nobody() {
    if on_tensorrt() {
        // There the result is NaN. In real networks every query has a slot: it sees its own.
        return;
    }
    let mut random = Random::new(21);
    for tokens in [2, 40] {
        let inputs = [
            random.floats(DType::F32, &[1, 2, tokens, 16], 1.0),
            random.floats(DType::F32, &[1, 1, 70, 16], 1.0),
            random.floats(DType::F32, &[1, 1, 70, 16], 1.0),
            Tensor::from_bool(
                vec![1, 1, tokens, 70],
                &(0..tokens * 70).map(|i| i / 70 != 1 && i % 70 < 50).collect::<Vec<_>>(),
            ),
        ];
        check(&inputs);
        let network = one_layer(LayerKind::Attention, &inputs);
        for options in every_option() {
            let got = run(&network, &inputs, &options).to_f32();
            assert_eq!(got[16..32], [0.0; 16]);
            assert!(got.iter().all(|x| x.is_finite()));
        }
    }
}

#[test]
fn what_is_masked_out_is_not_read_into_the_result() {
    let mut random = Random::new(22);
    for tokens in [1, 30] {
        let (slots, live) = (300, 40);
        let q = random.floats(DType::F32, &[1, 2, tokens, 16], 1.0);
        let mask = causal(tokens, slots, live - tokens, slots);
        // TensorRT adds the mask to the scores, so hidden values must be finite: caches are cleared for that.
        let hidden = if on_tensorrt() { [1e4, 1e4] } else { [f32::NAN, 1e30] };
        let (mut k, mut v) = (vec![hidden[0]; slots * 16], vec![hidden[1]; slots * 16]);
        let (kl, vl) = (
            random.floats(DType::F32, &[live * 16], 1.0).to_f32(),
            random.floats(DType::F32, &[live * 16], 1.0).to_f32(),
        );
        k[..live * 16].copy_from_slice(&kl);
        v[..live * 16].copy_from_slice(&vl);
        let full = [
            q.clone(),
            Tensor::from_f32(vec![1, 1, slots, 16], &k),
            Tensor::from_f32(vec![1, 1, slots, 16], &v),
            mask,
        ];
        let short = [
            Value::from(&q),
            Value::from(&Tensor::from_f32(vec![1, 1, live, 16], &kl)),
            Value::from(&Tensor::from_f32(vec![1, 1, live, 16], &vl)),
            Value::from(&causal(tokens, live, live - tokens, live)),
        ];
        let want = evaluate(&LayerKind::Attention, &short);
        let network = one_layer(LayerKind::Attention, &full);
        for options in every_option() {
            assert_close(&run(&network, &full, &options), &want.data, 1.0, 1e-5, "masked");
        }
    }
}

#[test]
fn not_a_number_in_a_query_stays_in_its_row() {
    let mut random = Random::new(23);
    for tokens in [3, 40] {
        let mut q = random.floats(DType::F32, &[1, 1, tokens, 16], 1.0).to_f32();
        q[16] = f32::NAN;
        let inputs = [
            Tensor::from_f32(vec![1, 1, tokens, 16], &q),
            random.floats(DType::F32, &[1, 1, 64, 16], 1.0),
            random.floats(DType::F32, &[1, 1, 64, 16], 1.0),
        ];
        let network = one_layer(LayerKind::Attention, &inputs);
        for options in every_option() {
            let got = run(&network, &inputs, &options).to_f32();
            for (row, values) in got.chunks(16).enumerate() {
                assert!(values.iter().all(|x| x.is_nan() == (row == 1)), "row {row}: {values:?}");
            }
        }
    }
}

#[test]
fn half_precision_caches() {
    let mut random = Random::new(24);
    for dtype in [DType::F16, DType::Bf16] {
        for tokens in [1, 2, 35] {
            let inputs = [
                random.floats(dtype, &[1, 6, tokens, 64], 1.0),
                random.floats(dtype, &[1, 2, 100, 64], 1.0),
                random.floats(dtype, &[1, 2, 100, 64], 1.0),
            ];
            let values: Vec<Value> = inputs.iter().map(Value::from).collect();
            let want = evaluate(&LayerKind::Attention, &values);
            let network = one_layer(LayerKind::Attention, &inputs);
            for options in every_option() {
                assert_close(&run(&network, &inputs, &options), &want.data, 1.0, 8e-3, "half");
            }
        }
    }
}
