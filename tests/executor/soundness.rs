//! Assumptions of the kernels' raw pointers: bytes of mapped files at any address, bools that are 0 or 1, caches that
//! are not written into themselves, available instruction sets, activations that fit memory.

use lapidary::backend::cpu::{Bindings, CompileOptions, CpuError, Isa, KvCaches, Program, execute};
use lapidary::graph::Constant;
use lapidary::network::{
    Elementwise, LayerKind, MatrixOp, Network, NetworkBuilder, Profile, ReduceOp, TensorId, VerifyError, WeightMode,
};
use lapidary::tensor::{DType, Tensor};

use super::reference::{Value, evaluate};
use super::support::{Random, assert_close, builder, dims, every_option};

/// The same tensor with its bytes at an odd address, as a mapped file may have it.
pub fn misaligned(tensor: &Tensor) -> Tensor {
    let mut bytes = vec![0u8; tensor.data().len() + 2];
    let start = 1 + bytes.as_ptr() as usize % 2;
    bytes[start..start + tensor.data().len()].copy_from_slice(tensor.data());
    let bytes = bytes::Bytes::from(bytes).slice(start..start + tensor.data().len());
    assert!(bytes.as_ptr() as usize % 2 == 1);
    Tensor::new(tensor.dtype(), tensor.shape().to_vec(), bytes).unwrap()
}

/// One layer over weights and constants in turn, all of them at odd addresses.
fn over_constants(kind: &LayerKind, inputs: &[Tensor]) -> Network {
    let mut b = builder();
    let ids: Vec<TensorId> = inputs
        .iter()
        .enumerate()
        .map(|(i, tensor)| {
            let (name, tensor) = (format!("w{i}"), misaligned(tensor));
            match i % 2 {
                0 => b.weight(&name, Constant::tensor(tensor), WeightMode::Embed).unwrap(),
                _ => b.constant(&name, tensor).unwrap(),
            }
        })
        .collect();
    let y = b.add("layer", kind.clone(), &ids).unwrap();
    b.output("y", y).unwrap();
    b.finish().unwrap()
}

/// In debug builds an aligned read of these would panic; under an address sanitizer a read beyond them.
#[test]
fn every_operand_may_be_a_constant_at_an_odd_address() {
    let mut random = Random::new(51);
    let mut cases: Vec<(LayerKind, Vec<Tensor>)> = Vec::new();
    let product = |op_b| LayerKind::MatrixMultiply {
        op_a: MatrixOp::None,
        op_b,
    };
    for dtype in [DType::F32, DType::F16, DType::Bf16] {
        let mut floats = |shape: &[usize]| random.floats(dtype, shape, 1.0);
        // A few rows are streamed, many packed; 37 leaves a tail after every vector.
        for rows in [1, 3, 8, 30] {
            let (x, w) = (floats(&[rows, 37]), floats(&[50, 37]));
            cases.push((product(MatrixOp::Transpose), vec![x, w]));
            let (x, w) = (floats(&[rows, 37]), floats(&[37, 50]));
            cases.push((product(MatrixOp::None), vec![x, w]));
        }
        // Attention as in decode and as in prefill; with one element per head, columns are rows.
        for (tokens, dim) in [(1, 7), (1, 16), (3, 20), (40, 20), (40, 1), (40, 16)] {
            let (q, kv) = ([1, 4, tokens, dim], [1, 2, 45, dim]);
            let mut inputs = vec![floats(&q), floats(&kv), floats(&kv)];
            cases.push((LayerKind::Attention, inputs.clone()));
            inputs.push(floats(&[1, 1, tokens, 45]));
            cases.push((LayerKind::Attention, inputs));
        }
        for interleaved in [false, true] {
            let rotary_dim = 6;
            let inputs = vec![
                floats(&[1, 2, 3, 9]),
                floats(&[5, 3]),
                floats(&[5, 3]),
                Tensor::from_i32(vec![1, 3], &[0, 4, 2]),
            ];
            let kind = LayerKind::RotaryEmbedding {
                interleaved,
                rotary_dim,
            };
            cases.push((kind, inputs));
        }
        cases.push((
            LayerKind::Elementwise(Elementwise::Sum),
            vec![floats(&[3, 37]), floats(&[1, 37])],
        ));
        cases.push((LayerKind::Softmax { axis: 1 }, vec![floats(&[3, 37])]));
        let mean = |axis| LayerKind::Reduce {
            op: ReduceOp::Avg,
            axes: vec![axis],
            keep_dims: true,
        };
        cases.push((mean(1), vec![floats(&[3, 37])]));
        cases.push((mean(0), vec![floats(&[3, 37])]));
        let axes = vec![1];
        let normal = LayerKind::Normalization { axes, epsilon: 1e-5 };
        cases.push((normal, vec![floats(&[3, 37]), floats(&[1, 37]), floats(&[1, 37])]));
        cases.push((
            LayerKind::Gather { axis: 1 },
            vec![floats(&[3, 5, 7]), Tensor::from_i32(vec![4], &[4, 0, 2, 2])],
        ));
    }
    for dtype in [DType::I32, DType::I64] {
        let x = random.ints(dtype, &[3, 37], -9, 9);
        cases.push((LayerKind::Elementwise(Elementwise::Prod), vec![x.clone(), x.clone()]));
        cases.push((LayerKind::Concatenation { axis: 0 }, vec![x.clone(), x.clone(), x]));
    }
    let choice = random.ints(DType::Bool, &[3, 37], 0, 1);
    let (yes, no) = (random.any(DType::F32, &[3, 37]), random.any(DType::F32, &[3, 37]));
    cases.push((LayerKind::Select, vec![choice, yes, no]));

    for (kind, inputs) in &cases {
        let values: Vec<Value> = inputs.iter().map(Value::from).collect();
        let want = evaluate(kind, &values);
        let network = over_constants(kind, inputs);
        for options in every_option() {
            let (_, got) = execute(&network, &[], &options).unwrap().remove(0);
            // The output is rounded to the network's dtype.
            let tolerance = match got.dtype() {
                DType::F16 => 1e-3,
                DType::Bf16 => 8e-3,
                _ => 3e-5,
            };
            assert_close(&got, &want.data, 1.0, tolerance, &format!("{kind:?} of {inputs:?}"));
        }
    }
}

/// A cache update whose rows are a constant at an odd address.
#[test]
fn a_cache_may_be_written_from_a_constant_at_an_odd_address() {
    for dtype in [DType::F32, DType::F16, DType::Bf16] {
        let rows = Random::new(52).floats(dtype, &[1, 2, 3, 7], 1.0);
        let mut b = NetworkBuilder::new("constant", Profile::prefill(3, 5));
        let cache = b.input("key_cache.0", dtype, &dims(&[1, 2, 5, 7])).unwrap();
        let new = b.constant("new", misaligned(&rows)).unwrap();
        let at = b.constant("at", misaligned(&Tensor::from_i32(vec![1], &[1]))).unwrap();
        let updated = b.add("update", LayerKind::KvCacheUpdate, &[cache, new, at]).unwrap();
        b.output("updated", updated).unwrap();
        let network = b.finish().unwrap();
        for options in every_option() {
            let (_, got) = execute(&network, &[], &options).unwrap().remove(0);
            let want = evaluate(
                &LayerKind::KvCacheUpdate,
                &[
                    Value::from(&Tensor::from_f64_as(dtype, vec![1, 2, 5, 7], &[0.0; 70])),
                    Value::from(&rows),
                    Value::from(&Tensor::from_i32(vec![1], &[1])),
                ],
            );
            assert_close(&got, &want.data, 1.0, 0.0, "updated");
        }
    }
}

/// In a file, any byte except 0 means true. The caller's `bool`s must be 0 or 1.
#[test]
fn bools_of_any_byte_are_true() {
    let odd = Tensor::new(DType::Bool, vec![1, 6], vec![0u8, 1, 2, 255, 128, 0].into()).unwrap();
    let truth = [false, true, true, true, true, false];
    let mut b = builder();
    let weight = b.weight("w", Constant::tensor(odd.clone()), WeightMode::Embed).unwrap();
    let constant = b.constant("c", odd).unwrap();
    let at = b.input("at", DType::I32, &dims(&[6])).unwrap();
    let four = b.constant("four", Tensor::from_bool(vec![1, 6], &[true; 6])).unwrap();
    let gathered = b.add("gathered", LayerKind::Gather { axis: 1 }, &[weight, at]).unwrap();
    let joined = b
        .add("joined", LayerKind::Concatenation { axis: 0 }, &[constant, weight])
        .unwrap();
    let both = b.elementwise("both", Elementwise::And, weight, four).unwrap();
    let other = b.elementwise("other", Elementwise::Xor, constant, four).unwrap();
    let number = b.cast("number", DType::F32, constant).unwrap();
    let number = b.elementwise("twice", Elementwise::Sum, number, number).unwrap();
    let turned = b.transpose("turned", weight, &[1, 0]).unwrap();
    for (name, id) in [
        ("gathered", gathered),
        ("joined", joined),
        ("both", both),
        ("other", other),
        ("number", number),
        ("turned", turned),
    ] {
        b.output(name, id).unwrap();
    }
    let network = b.finish().unwrap();
    for options in every_option() {
        let mut program = Program::compile(&network, &options).unwrap();
        let at = [0, 1, 2, 3, 4, 5];
        let (mut gathered, mut joined, mut both) = ([true; 6], [true; 12], [false; 6]);
        let (mut other, mut number, mut turned) = ([false; 6], [9f32; 6], [false; 6]);
        let mut bindings = Bindings::new();
        bindings
            .input("at", &at[..])
            .output("gathered", &mut gathered[..])
            .output("joined", &mut joined[..])
            .output("both", &mut both[..])
            .output("other", &mut other[..])
            .output("number", &mut number[..])
            .output("turned", &mut turned[..]);
        program.run(&mut bindings).unwrap();
        drop(bindings);
        for (name, got) in [
            ("gathered", gathered),
            ("both", both),
            ("other", other.map(|b| !b)),
            ("turned", turned),
        ] {
            // Compared as numbers: comparing an invalid `bool` is undefined.
            assert_eq!(got.map(u8::from), truth.map(u8::from), "{name}");
        }
        assert_eq!(
            joined.map(u8::from),
            [truth, truth].concat()[..]
                .iter()
                .map(|b| u8::from(*b))
                .collect::<Vec<_>>()[..]
        );
        assert_eq!(number, truth.map(|t| if t { 2.0 } else { 0.0 }));
    }
}

#[test]
fn an_instruction_set_is_there_or_refused() {
    for isa in [Isa::Avx512, Isa::Avx2, Isa::Portable] {
        match CompileOptions::with_threads(1).with_isa(isa) {
            Ok(options) => assert!(isa.is_available() && options.isa() == isa),
            Err(error) => {
                assert!(!isa.is_available());
                assert_eq!(error, CpuError::Isa { isa });
                assert!(error.to_string().contains("portable"), "{error}");
            }
        }
    }
}

#[test]
fn a_cache_is_not_its_own_update() {
    let mut b = NetworkBuilder::new("own", Profile::prefill(4, 4));
    let cache = b.input("key_cache.0", DType::F32, &dims(&[1, 1, 4, 2])).unwrap();
    let at = b.input("write_indices", DType::I32, &dims(&[1])).unwrap();
    let updated = b.add("update", LayerKind::KvCacheUpdate, &[cache, cache, at]).unwrap();
    b.output("updated", updated).unwrap();
    let error = b.finish().unwrap_err();
    let cache = "key_cache.0".to_string();
    let layer = "update".to_string();
    assert_eq!(error, VerifyError::SelfUpdate { layer, cache });
}

/// The written tensor may be a view of the cache, and others may read that view later: both see the old cache.
#[test]
fn a_cache_may_be_updated_from_a_view_of_itself() {
    for early in [false, true] {
        let mut b = NetworkBuilder::new("view", Profile::prefill(2, 4));
        let cache = b.input("key_cache.0", DType::F32, &dims(&[1, 1, 4, 2])).unwrap();
        let at = b.input("write_indices", DType::I32, &dims(&[1])).unwrap();
        let turned = b.transpose("turned", cache, &[0, 1, 3, 2]).unwrap();
        let back = b.transpose("back", turned, &[0, 1, 3, 2]).unwrap();
        let slice = LayerKind::Slice {
            start: vec![0; 4],
            size: dims(&[1, 1, 2, 2]),
            stride: vec![1; 4],
        };
        let rows = b.add("rows", slice, &[back]).unwrap();
        let join = |b: &mut NetworkBuilder, name: &str| {
            b.add(name, LayerKind::Concatenation { axis: 2 }, &[rows, rows])
                .unwrap()
        };
        // A layer that is computed immediately fixes the location of its inputs before the update.
        let before = early.then(|| join(&mut b, "before"));
        let updated = b.add("update", LayerKind::KvCacheUpdate, &[cache, rows, at]).unwrap();
        let after = join(&mut b, "after");
        let old = b
            .elementwise("old", Elementwise::Sum, after, before.unwrap_or(after))
            .unwrap();
        b.output("old", old).unwrap();
        b.output("updated", updated).unwrap();
        let network = b.finish().unwrap();
        for options in every_option() {
            let mut caches = KvCaches::new(&network).unwrap();
            let was = Tensor::from_f32(vec![1, 1, 4, 2], &[1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0]);
            caches.get_mut("key_cache.0").unwrap().set(&was).unwrap();
            let mut program = Program::compile(&network, &options).unwrap();
            let mut old = [0f32; 8];
            let mut bindings = Bindings::new();
            bindings.input("write_indices", &[1][..]).caches(&mut caches);
            bindings.output("old", &mut old[..]);
            program.run(&mut bindings).unwrap();
            drop(bindings);
            assert_eq!(old, [2.0, 4.0, 6.0, 8.0, 2.0, 4.0, 6.0, 8.0], "early: {early}");
            let now = caches.iter().next().unwrap().to_f32();
            assert_eq!(now, [1.0, 2.0, 1.0, 2.0, 3.0, 4.0, 7.0, 8.0], "early: {early}");
        }
    }
}

/// The total size of simultaneously live tensors exceeds the address space, although each tensor fits.
#[test]
fn activations_beyond_memory_are_refused() {
    let mut b = builder();
    let mut sums = Vec::new();
    for i in 0..5 {
        let column = b.input(&format!("a{i}"), DType::F32, &dims(&[1 << 30, 1])).unwrap();
        let row = b.input(&format!("b{i}"), DType::F32, &dims(&[1, 1 << 29])).unwrap();
        let kind = LayerKind::MatrixMultiply {
            op_a: MatrixOp::None,
            op_b: MatrixOp::None,
        };
        let product = b.add(&format!("product{i}"), kind, &[column, row]).unwrap();
        let sum = LayerKind::Reduce {
            op: ReduceOp::Sum,
            axes: vec![1],
            keep_dims: true,
        };
        sums.push(b.add(&format!("sum{i}"), sum, &[product]).unwrap());
    }
    let all = b.add("all", LayerKind::Concatenation { axis: 1 }, &sums).unwrap();
    b.output("y", all).unwrap();
    let error = Program::compile(&b.finish().unwrap(), &CompileOptions::with_threads(2)).unwrap_err();
    assert_eq!(error, CpuError::TooLarge);
}
