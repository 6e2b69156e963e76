//! Errors of fp16 layers on TensorRT against the CPU executor in fp32 with the same fp16 inputs.

use lapidary::backend::cpu::{self, execute as execute_on_cpu};
use lapidary::backend::tensorrt::run::{Runtime, execute};
use lapidary::backend::tensorrt::{BuildOptions, Library};
use lapidary::network::{Elementwise, LayerKind, MatrixOp, Network, NetworkBuilder, Profile, TensorId};
use lapidary::tensor::{DType, Tensor};

use crate::Outcome;

/// Approximately normally distributed: sums of uniform numbers.
fn random(seed: u64, shape: &[usize], scale: f64) -> Tensor {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut uniform = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 11) as f64 / (1u64 << 53) as f64 - 0.5
    };
    let values: Vec<f64> = (0..shape.iter().product())
        .map(|_| (0..6).map(|_| uniform()).sum::<f64>() * 2f64.sqrt() * scale)
        .collect();
    Tensor::from_f64_as(DType::F16, shape.to_vec(), &values)
}

struct Case {
    name: String,
    network: Network,
    inputs: Vec<(&'static str, Tensor)>,
}

fn dims(shape: &[usize]) -> Vec<lapidary::dim::Dim> {
    shape.iter().map(|d| (*d).into()).collect()
}

fn input(b: &mut NetworkBuilder, name: &str, tensor: &Tensor) -> Outcome<TensorId> {
    Ok(b.input(name, tensor.dtype(), &dims(tensor.shape()))?)
}

fn products(rows: usize, depth: usize, wide: bool) -> Outcome<Case> {
    let x = random(1, &[rows, depth], 1.0);
    let w = random(2, &[512, depth], (depth as f64).powf(-0.5));
    let mut b = NetworkBuilder::new("product", Profile::decode(16));
    let mut ids = [input(&mut b, "x", &x)?, input(&mut b, "w", &w)?];
    if wide {
        ids = [b.cast("x32", DType::F32, ids[0])?, b.cast("w32", DType::F32, ids[1])?];
    }
    let kind = LayerKind::MatrixMultiply {
        op_a: MatrixOp::None,
        op_b: MatrixOp::Transpose,
    };
    let mut y = b.add("y", kind, &ids)?;
    if wide {
        y = b.cast("y16", DType::F16, y)?;
    }
    let y = b.cast("out", DType::F32, y)?;
    b.output("out32", y)?;
    Ok(Case {
        name: format!(
            "product {rows} x {depth}, {}",
            if wide { "widened" } else { "as it is" }
        ),
        network: b.finish()?,
        inputs: vec![("x", x), ("w", w)],
    })
}

fn attention(tokens: usize, slots: usize, folded: bool) -> Outcome<Case> {
    let (heads, kv, d) = (32, 8, 128);
    let q = random(3, &[1, heads, tokens, d], (d as f64).powf(-0.5));
    let (k, v) = (random(4, &[1, kv, slots, d], 1.0), random(5, &[1, kv, slots, d], 1.0));
    let sees: Vec<bool> = (0..tokens * slots)
        .map(|i| i % slots <= slots - tokens + i / slots)
        .collect();
    let mask = Tensor::from_bool(vec![1, 1, tokens, slots], &sees);
    let mut b = NetworkBuilder::new("attention", Profile::decode(16));
    let (mut qi, ki, vi) = (
        input(&mut b, "q", &q)?,
        input(&mut b, "k", &k)?,
        input(&mut b, "v", &v)?,
    );
    let mut mi = input(&mut b, "mask", &mask)?;
    if folded {
        qi = b.reshape("folded", qi, dims(&[1, kv, heads / kv * tokens, d]))?;
        mi = b.add("repeated", LayerKind::Concatenation { axis: 2 }, &vec![mi; heads / kv])?;
    }
    let y = b.add("attention", LayerKind::Attention, &[qi, ki, vi, mi])?;
    let y = b.reshape("unfolded", y, dims(&[1, heads, tokens, d]))?;
    let y = b.cast("out", DType::F32, y)?;
    b.output("out32", y)?;
    Ok(Case {
        name: format!(
            "attention {tokens} tokens, {slots} slots, {}",
            if folded { "folded" } else { "as it is" }
        ),
        network: b.finish()?,
        inputs: vec![("q", q), ("k", k), ("v", v), ("mask", mask)],
    })
}

fn gated() -> Outcome<Case> {
    let (g, u) = (random(6, &[128, 4096], 1.0), random(7, &[128, 4096], 1.0));
    let mut b = NetworkBuilder::new("gated", Profile::decode(16));
    let (gi, ui) = (input(&mut b, "g", &g)?, input(&mut b, "u", &u)?);
    let s = b.activation("s", lapidary::network::Activation::Sigmoid, gi)?;
    let y = b.elementwise("gs", Elementwise::Prod, gi, s)?;
    let y = b.elementwise("gsu", Elementwise::Prod, y, ui)?;
    let y = b.cast("out", DType::F32, y)?;
    b.output("out32", y)?;
    Ok(Case {
        name: "silu(g) * u".into(),
        network: b.finish()?,
        inputs: vec![("g", g), ("u", u)],
    })
}

pub fn accuracy() -> Outcome<()> {
    let library = Library::load(None)?;
    let runtime = Runtime::new(&library)?;
    let mut cases = vec![gated()?];
    for depth in [2048, 4096, 14336] {
        for wide in [false, true] {
            cases.push(products(128, depth, wide)?);
        }
    }
    for (tokens, slots) in [(128, 256), (512, 1024)] {
        for folded in [false, true] {
            cases.push(attention(tokens, slots, folded)?);
        }
    }
    for case in cases {
        let given: Vec<(&str, Tensor)> = case.inputs.iter().map(|(n, t)| (*n, t.clone())).collect();
        let truth = execute_on_cpu(&case.network, &given, &cpu::CompileOptions::default())?;
        match execute(&library, &runtime, &case.network, &given, &BuildOptions::default()) {
            Ok(found) => {
                let (found, truth) = (found[0].1.to_f64(), truth[0].1.to_f64());
                let norm = |values: &mut dyn Iterator<Item = f64>| values.map(|v| v * v).sum::<f64>().sqrt();
                let error = norm(&mut found.iter().zip(&truth).map(|(a, b)| a - b)) / norm(&mut truth.iter().copied());
                println!("{:<48} {error:.2e}", case.name);
            }
            Err(error) => println!("{:<48} {error}", case.name),
        }
    }
    Ok(())
}
