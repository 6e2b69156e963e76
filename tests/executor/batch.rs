//! Steps of several sequences in one pass: each is bit-identical to a run alone.

use lapidary::backend::cpu::{Batch, Bindings, CompileOptions, CpuError, Member, Program};
use lapidary::graph::Constant;
use lapidary::network::{Elementwise, LayerKind, Network, WeightMode};
use lapidary::tensor::quantized::Granularity;
use lapidary::tensor::{DType, Tensor};

use super::quantized::Weight;
use super::support::{Random, builder, dims, every_option};

/// Three products, of which two share their left side, with a sum between them: `[1, depth]` to `[1, columns]`.
fn network(weights: [Constant; 3], depth: usize, add: f64) -> Network {
    let mut b = builder();
    let dtype = weights[0].dtype();
    let x = b.input("x", dtype, &dims(&[1, depth])).unwrap();
    let [a, c, d] = ["a", "c", "d"].map(|name| name.to_string());
    let mut names = [a, c, d].into_iter();
    let mut weight = weights.into_iter();
    let mut linear = |b: &mut lapidary::network::NetworkBuilder, x| {
        let (name, weight) = (names.next().unwrap(), weight.next().unwrap());
        let w = b.weight(&name, weight, WeightMode::Bind).unwrap();
        b.linear(&name, x, w).unwrap()
    };
    let (first, second) = (linear(&mut b, x), linear(&mut b, x));
    let more = b
        .constant("more", Tensor::from_f64_as(dtype, vec![1, 1], &[add]))
        .unwrap();
    let sum = b
        .add("sum", LayerKind::Elementwise(Elementwise::Sum), &[first, more])
        .unwrap();
    let third = linear(&mut b, sum);
    b.output("second", second).unwrap();
    b.output("third", third).unwrap();
    b.finish().unwrap()
}

type Outputs = [Vec<f32>; 2];

fn bits(outputs: &Outputs) -> Vec<u32> {
    outputs.iter().flatten().map(|x| x.to_bits()).collect()
}

fn memory(program: &Program) -> Outputs {
    [0, 1].map(|i| vec![f32::NAN; program.outputs()[i].shape.iter().product()])
}

fn bind<'a>(x: &'a [f32], outputs: &'a mut Outputs) -> Bindings<'a> {
    let [second, third] = outputs;
    let mut bindings = Bindings::new();
    bindings.input("x", x);
    bindings
        .output("second", &mut second[..])
        .output("third", &mut third[..]);
    bindings
}

/// Runs of these programs alone, and together in one batch.
fn compare(alone: &mut [Program], together: &[Program], xs: &[Vec<f32>], batch: &mut Batch, what: &str) {
    let expected: Vec<Vec<u32>> = xs
        .iter()
        .enumerate()
        .map(|(i, x)| {
            let program = &mut alone[i % together.len()];
            let mut outputs = memory(program);
            program.run(&mut bind(x, &mut outputs)).unwrap();
            bits(&outputs)
        })
        .collect();
    let of = |i: usize| &together[i % together.len()];
    let mut outputs: Vec<Outputs> = (0..xs.len()).map(|i| memory(of(i))).collect();
    let members = xs.iter().zip(&mut outputs).enumerate();
    let mut members: Vec<Member<'_, '_>> = members
        .map(|(i, (x, outputs))| Member {
            program: of(i),
            bindings: bind(x, outputs),
        })
        .collect();
    for result in batch.run(&mut members) {
        result.unwrap();
    }
    drop(members);
    for (i, (expected, outputs)) in expected.iter().zip(&outputs).enumerate() {
        assert!(*expected == bits(outputs), "{what}: row {i} of {}", xs.len());
    }
}

/// The weights of one case, square so that products follow each other.
fn weights(random: &mut Random, case: usize, depth: usize) -> [Constant; 3] {
    const FORMATS: [DType; 7] = [
        DType::I4,
        DType::U4,
        DType::F4E2M1,
        DType::I8,
        DType::I2,
        DType::F8E4M3Fn,
        DType::F8E5M2,
    ];
    [(); 3].map(|()| match case {
        0..3 => {
            let dtype = [DType::F32, DType::F16, DType::Bf16][case];
            Constant::tensor(random.floats(dtype, &[depth, depth], 0.3))
        }
        _ => {
            let granularity = match case % 2 {
                0 => Granularity::Block { axis: 1, size: 16 },
                _ => Granularity::Channel { axis: 0 },
            };
            let format = FORMATS[(case - 3) % FORMATS.len()];
            Weight::random(
                random,
                format,
                DType::F16,
                &[depth, depth],
                granularity,
                case.is_multiple_of(3),
            )
            .constant()
        }
    })
}

#[test]
fn every_row_is_what_it_is_alone() {
    let mut random = Random::new(5);
    for options in every_option() {
        let in_batches = options.clone().in_batches();
        let mut batch = Batch::new(options.pool().clone());
        for case in 0..17 {
            // Rows that end within a vector, and whole blocks and bytes.
            let depth = if case < 3 { 43 } else { 64 };
            let network = network(weights(&mut random, case, depth), depth, 0.25);
            let mut alone = [Program::compile(&network, &options).unwrap()];
            let together = [Program::compile(&network, &in_batches).unwrap()];
            for rows in [1, 2, 5, 9] {
                let x = |_| (0..depth).map(|_| random.float() as f32).collect();
                let xs: Vec<Vec<f32>> = (0..rows).map(x).collect();
                compare(
                    &mut alone,
                    &together,
                    &xs,
                    &mut batch,
                    &format!("case {case}, {options:?}"),
                );
            }
        }
    }
}

/// Programs with other weights, or another form, run together with others as far as possible.
#[test]
fn programs_of_other_networks_take_part() {
    let mut random = Random::new(6);
    let options = CompileOptions::with_threads(2);
    let shared = weights(&mut random, 0, 48);
    let [mut a, mut b] = [shared.clone(), shared];
    a[1] = Constant::tensor(random.floats(DType::F32, &[48, 48], 0.3));
    b[2] = Constant::tensor(random.floats(DType::F32, &[48, 48], 0.3));
    let networks = [network(a, 48, 1.0), network(b, 48, -1.0), {
        let codes = weights(&mut random, 4, 48);
        network(codes, 48, 0.0)
    }];
    let compiled = |options: &CompileOptions| -> Vec<Program> {
        let all = networks
            .iter()
            .map(|network| Program::compile(network, options).unwrap());
        all.collect()
    };
    let mut alone = compiled(&options);
    let together = compiled(&options.clone().in_batches());
    let mut batch = Batch::new(options.pool().clone());
    let x = |_| (0..48).map(|_| random.float() as f32).collect();
    let xs: Vec<Vec<f32>> = (0..7).map(x).collect();
    compare(&mut alone, &together, &xs, &mut batch, "three networks");
}

#[test]
fn a_member_that_cannot_run_is_the_only_one_that_fails() {
    let options = CompileOptions::with_threads(2);
    let mut b = builder();
    let table = b
        .constant("table", Tensor::from_f64_as(DType::F32, vec![3, 2], &[1.0; 6]))
        .unwrap();
    let at = b.input("at", DType::I32, &dims(&[1])).unwrap();
    let row = b.add("row", LayerKind::Gather { axis: 0 }, &[table, at]).unwrap();
    b.output("y", row).unwrap();
    let program = Program::compile(&b.finish().unwrap(), &options.clone().in_batches()).unwrap();
    let mut outputs = [[0f32; 2]; 4];
    let mut batch = Batch::new(options.pool().clone());
    let indices = [[1], [3], [2], [0]];
    let mut members: Vec<Member<'_, '_>> = Vec::new();
    for (i, (at, y)) in indices.iter().zip(&mut outputs).enumerate() {
        let mut bindings = Bindings::new();
        bindings.output("y", &mut y[..]);
        // The third has no input.
        if i != 2 {
            bindings.input("at", &at[..]);
        }
        members.push(Member {
            program: &program,
            bindings,
        });
    }
    let results = batch.run(&mut members);
    drop(members);
    assert!(results[0].is_ok() && results[3].is_ok());
    assert!(
        matches!(&results[1], Err(CpuError::Index { index: 3, .. })),
        "{:?}",
        results[1]
    );
    assert!(
        matches!(&results[2], Err(CpuError::MissingBinding { .. })),
        "{:?}",
        results[2]
    );
    assert_eq!((outputs[0], outputs[3]), ([1.0; 2], [1.0; 2]));
    assert!(batch.run(&mut []).is_empty());
}
