//! Caches: written in place, read by attention, grown, refused when they do not fit.

use lapidary::backend::cpu::{Bindings, CompileOptions, CpuError, KvCaches, Program};
use lapidary::network::{LayerKind, Network, NetworkBuilder, Profile};
use lapidary::tensor::DType;

use super::reference::{Value, evaluate};
use super::support::{Random, dims, every_option};

/// Attention over a cache that this call's keys and values (both `x1`) are written into; `x0` are the queries.
fn network(tokens: usize, capacity: usize, dtype: DType) -> Network {
    let mut b = NetworkBuilder::new("cache", Profile::prefill(tokens, capacity));
    let q = b.input("x0", dtype, &dims(&[1, 4, tokens, 16])).unwrap();
    let new = b.input("x1", dtype, &dims(&[1, 2, tokens, 16])).unwrap();
    let at = b.input("write_indices", DType::I32, &dims(&[1])).unwrap();
    let mask = b.input("mask", DType::Bool, &dims(&[1, 1, tokens, capacity])).unwrap();
    let mut updated = Vec::new();
    for name in ["key_cache.0", "value_cache.0"] {
        let cache = b.input(name, dtype, &dims(&[1, 2, capacity, 16])).unwrap();
        let out = b
            .add(&format!("update {name}"), LayerKind::KvCacheUpdate, &[cache, new, at])
            .unwrap();
        updated.push(out);
    }
    let y = b
        .add("attention", LayerKind::Attention, &[q, updated[0], updated[1], mask])
        .unwrap();
    b.output("y", y).unwrap();
    b.output("updated_key_cache.0", updated[0]).unwrap();
    b.output("updated_value_cache.0", updated[1]).unwrap();
    b.finish().unwrap()
}

fn causal(tokens: usize, capacity: usize, past: usize) -> Vec<bool> {
    (0..tokens)
        .flat_map(|t| (0..capacity).map(move |s| s <= past + t))
        .collect()
}

fn step(
    network: &Network,
    options: &CompileOptions,
    caches: &mut KvCaches,
    past: usize,
    q: &[f32],
    new: &[f32],
) -> Vec<f32> {
    let mut program = Program::compile(network, options).unwrap();
    let tokens = q.len() / 64;
    let mut y = vec![0f32; q.len()];
    let mask = causal(tokens, caches.capacity(), past);
    let at = [past as i32];
    let mut bindings = Bindings::new();
    bindings
        .input("x0", q)
        .input("x1", new)
        .input("write_indices", &at[..])
        .input("mask", &mask[..])
        .caches(caches)
        .output("y", &mut y[..]);
    program.run(&mut bindings).unwrap();
    y
}

#[test]
fn prefill_grow_decode_equals_one_call() {
    for dtype in [DType::F32, DType::F16, DType::Bf16] {
        for options in every_option() {
            let mut random = Random::new(31);
            let q = random.floats(dtype, &[1, 4, 24, 16], 1.0).to_f32();
            let new = random.floats(dtype, &[1, 2, 24, 16], 1.0).to_f32();
            // Tokens first..first + n of [heads, 24, 16].
            let part = |x: &[f32], first: usize, n: usize| -> Vec<f32> {
                let heads = x.chunks(24 * 16);
                heads.flat_map(|h| h[first * 16..(first + n) * 16].to_vec()).collect()
            };
            let whole = network(24, 32, dtype);
            let want = step(&whole, &options, &mut KvCaches::new(&whole).unwrap(), 0, &q, &new);

            let small = network(20, 20, dtype);
            let mut caches = KvCaches::new(&small).unwrap();
            let mut got = vec![step(
                &small,
                &options,
                &mut caches,
                0,
                &part(&q, 0, 20),
                &part(&new, 0, 20),
            )];
            caches.grow(32, 20);
            assert_eq!(caches.capacity(), 32);
            let decode = network(1, 32, dtype);
            for t in 20..24 {
                got.push(step(
                    &decode,
                    &options,
                    &mut caches,
                    t,
                    &part(&q, t, 1),
                    &part(&new, t, 1),
                ));
            }
            let mut first = 0;
            for y in got {
                let n = y.len() / 64;
                for (g, w) in y.iter().zip(part(&want, first, n)) {
                    assert!((g - w).abs() < 1e-5, "token {first}: {g}, not {w}");
                }
                first += n;
            }
        }
    }
}

#[test]
fn updates_write_only_their_slots() {
    let options = every_option().remove(0);
    let net = network(3, 9, DType::F32);
    let mut caches = KvCaches::new(&net).unwrap();
    let mut random = Random::new(32);
    let old = random.floats(DType::F32, &[1, 2, 9, 16], 1.0);
    let new = random.floats(DType::F32, &[1, 2, 3, 16], 1.0);
    caches.get_mut("key_cache.0").unwrap().set(&old).unwrap();
    step(&net, &options, &mut caches, 5, &[0.0; 192], &new.to_f32());
    let at = lapidary::tensor::Tensor::from_i32(vec![1], &[5]);
    let want = evaluate(
        &LayerKind::KvCacheUpdate,
        &[Value::from(&old), Value::from(&new), Value::from(&at)],
    );
    let got = caches.iter().next().unwrap().to_f32();
    assert!(got.iter().zip(&want.data).all(|(g, w)| f64::from(*g) == *w));
}

#[test]
fn what_does_not_fit_is_refused_before_the_run() {
    let options = CompileOptions::with_threads(1);
    let net = network(1, 8, DType::F32);
    let mut program = Program::compile(&net, &options).unwrap();
    let (q, new, mask) = ([0f32; 64], [0f32; 32], [true; 8]);
    let run = |program: &mut Program, q: &[f32], at: i32, caches: Option<&mut KvCaches>| {
        let mut y = [0f32; 64];
        let at = [at];
        let mut bindings = Bindings::new();
        bindings.input("x0", q).input("x1", &new[..]).input("mask", &mask[..]);
        bindings.input("write_indices", &at[..]).output("y", &mut y[..]);
        if let Some(caches) = caches {
            bindings.caches(caches);
        }
        program.run(&mut bindings).map_err(|e| e.to_string())
    };
    let mut caches = KvCaches::new(&net).unwrap();
    assert_eq!(run(&mut program, &q, 7, Some(&mut caches)), Ok(()));
    assert_eq!(
        run(&mut program, &q, 8, Some(&mut caches)),
        Err("layer \"update key_cache.0\": cache slot 8 is outside 0..8".to_string())
    );
    assert_eq!(
        run(&mut program, &q, -1, Some(&mut caches)),
        Err("layer \"update key_cache.0\": cache slot -1 is outside 0..8".to_string())
    );
    assert_eq!(
        run(&mut program, &q[..60], 0, Some(&mut caches)),
        Err("\"x0\": needs f32 [1, 4, 1, 16], bound to 60 elements of f32".to_string())
    );
    assert_eq!(
        run(&mut program, &q, 0, None),
        Err("\"key_cache.0\": the cache is not bound".to_string())
    );
    caches.grow(16, 0);
    assert_eq!(
        run(&mut program, &q, 0, Some(&mut caches)),
        Err("\"key_cache.0\": the program needs f32 [1, 2, 8, 16], the cache is f32 [1, 2, 16, 16]".to_string())
    );
    let missing = program.run(&mut Bindings::new()).unwrap_err();
    assert_eq!(missing.to_string(), "\"x0\": the input is not bound");
}

#[test]
fn the_old_cache_may_be_read_before_its_update_and_not_after() {
    let build = |late: bool| {
        let mut b = NetworkBuilder::new("old", Profile::decode(4));
        let cache = b.input("key_cache.0", DType::F32, &dims(&[1, 1, 4, 2])).unwrap();
        let new = b.input("x1", DType::F32, &dims(&[1, 1, 1, 2])).unwrap();
        let at = b.input("write_indices", DType::I32, &dims(&[1])).unwrap();
        let view = |b: &mut NetworkBuilder| b.transpose("turned", cache, &[0, 1, 3, 2]).unwrap();
        let turned = if late { None } else { Some(view(&mut b)) };
        let updated = b.add("update", LayerKind::KvCacheUpdate, &[cache, new, at]).unwrap();
        let turned = turned.unwrap_or_else(|| view(&mut b));
        let sum = b.unary("y", lapidary::network::UnaryOp::Neg, turned).unwrap();
        b.output("y", sum).unwrap();
        b.output("updated", updated).unwrap();
        b.finish().unwrap()
    };
    for options in every_option() {
        let net = build(false);
        let mut caches = KvCaches::new(&net).unwrap();
        let mut program = Program::compile(&net, &options).unwrap();
        let mut y = [9f32; 8];
        let mut bindings = Bindings::new();
        bindings.input("x1", &[5f32, 6.0][..]).input("write_indices", &[0][..]);
        bindings.caches(&mut caches).output("y", &mut y[..]);
        program.run(&mut bindings).unwrap();
        drop(bindings);
        assert_eq!(y, [0.0; 8]);
        assert_eq!(caches.iter().next().unwrap().to_f32()[..2], [5.0, 6.0]);
        let error = Program::compile(&build(true), &options).unwrap_err();
        assert!(matches!(error, CpuError::Layer { .. }), "{error}");
    }
}
