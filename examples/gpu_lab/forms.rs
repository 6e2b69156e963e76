//! Forms of a matrix product of one row, in chains long enough that weights come from memory.

use std::sync::Mutex;

use lapidary::backend::tensorrt::{self, BuildOptions, Library};
use lapidary::graph::Constant;
use lapidary::network::{
    Elementwise, LayerKind, MatrixOp, Network, NetworkBuilder, Profile, ReduceOp, TensorId, WeightMode,
};
use lapidary::tensor::DType;

use crate::Outcome;
use crate::choices::{each, measure};

/// How one row is multiplied by a weight `[n, k]`.
#[derive(Clone, Copy, Debug)]
enum Form {
    /// `[1, k] · [n, k]ᵀ`
    Flat,
    /// `[1, 1, k] · [1, n, k]ᵀ`
    Raised,
    /// `[n, k] · [1, k]ᵀ`
    Swapped,
    /// `sum(w * x)` in fp32
    Reduced,
    /// `[g, n/g, k]`, each part a separate product
    Parts(i64),
    /// The row repeated; one row of the result is used
    Repeated(i64),
    /// `[g, n/g, k] · [g, k, 1]`
    SwappedParts(i64),
}

/// One product; the result is `[1, n]`.
fn product(
    b: &mut NetworkBuilder,
    name: &str,
    form: Form,
    x: TensorId,
    w: TensorId,
    [n, k]: [i64; 2],
) -> Outcome<TensorId> {
    let part = |part: &str| format!("{name}/{part}");
    let dims = |d: &[i64]| d.iter().map(|d| (*d as usize).into()).collect::<Vec<_>>();
    let mm = |op_a, op_b| LayerKind::MatrixMultiply { op_a, op_b };
    let (no, yes) = (MatrixOp::None, MatrixOp::Transpose);
    Ok(match form {
        Form::Flat => b.add(name, mm(no, yes), &[x, w])?,
        Form::Raised => {
            let x = b.reshape(&part("x"), x, dims(&[1, 1, k]))?;
            let w = b.reshape(&part("w"), w, dims(&[1, n, k]))?;
            let y = b.add(name, mm(no, yes), &[x, w])?;
            b.reshape(&part("y"), y, dims(&[1, n]))?
        }
        Form::Swapped => {
            let y = b.add(name, mm(no, yes), &[w, x])?;
            b.reshape(&part("y"), y, dims(&[1, n]))?
        }
        Form::Reduced => {
            let to = b.dtype(x);
            let x = b.cast(&part("x32"), DType::F32, x)?;
            let w = b.cast(&part("w32"), DType::F32, w)?;
            let y = b.elementwise(&part("terms"), Elementwise::Prod, w, x)?;
            let kind = LayerKind::Reduce {
                op: ReduceOp::Sum,
                axes: vec![1],
                keep_dims: true,
            };
            let y = b.add(name, kind, &[y])?;
            let y = b.cast(&part("narrow"), to, y)?;
            b.reshape(&part("y"), y, dims(&[1, n]))?
        }
        Form::Parts(g) => {
            let x = b.reshape(&part("x"), x, dims(&[1, 1, k]))?;
            let w = b.reshape(&part("w"), w, dims(&[g, n / g, k]))?;
            let y = b.add(name, mm(no, yes), &[x, w])?;
            b.reshape(&part("y"), y, dims(&[1, n]))?
        }
        Form::SwappedParts(g) => {
            let x = b.reshape(&part("x"), x, dims(&[1, 1, k]))?;
            let w = b.reshape(&part("w"), w, dims(&[g, n / g, k]))?;
            let y = b.add(name, mm(no, yes), &[w, x])?;
            b.reshape(&part("y"), y, dims(&[1, n]))?
        }
        Form::Repeated(rows) => {
            let slice = |rows: i64, width: i64, stride: i64| LayerKind::Slice {
                start: vec![0, 0],
                size: vec![(rows as usize).into(), (width as usize).into()],
                stride: vec![stride, 1],
            };
            let x = b.add(&part("x"), slice(rows, k, 0), &[x])?;
            let y = b.add(name, mm(no, yes), &[x, w])?;
            b.add(&part("y"), slice(1, n, 1), &[y])?
        }
    })
}

/// Products `[k -> n]` and `[m -> k]` alternating; `m <= n` elements are taken from the front of the wider result.
fn chain(form: Form, dtype: DType, [k, n, m]: [i64; 3], pairs: usize) -> Outcome<(Network, f64)> {
    let mut b = NetworkBuilder::new("chain", Profile::decode(16));
    let dims = |d: &[i64]| d.iter().map(|d| (*d as usize).into()).collect::<Vec<_>>();
    let mut x = b.input("x", dtype, &dims(&[1, k]))?;
    let mut bytes = 0.0;
    for i in 0..pairs {
        for (which, [to, from]) in [("up", [n, k]), ("down", [k, m])] {
            let name = format!("{which}.{i}");
            let constant = Constant::absent(dtype, vec![to as usize, from as usize]);
            let w = b.weight(&format!("{name}.weight"), constant, WeightMode::Bind)?;
            let mut y = product(&mut b, &name, form, x, w, [to, from])?;
            bytes += dtype.byte_len((to * from) as usize) as f64;
            if which == "up" && m < n {
                let kind = LayerKind::Slice {
                    start: vec![0, 0],
                    size: dims(&[1, m]),
                    stride: vec![1, 1],
                };
                y = b.add(&format!("{name}/front"), kind, &[y])?;
            }
            x = y;
        }
    }
    b.output("y", x)?;
    Ok((b.finish()?, bytes))
}

pub fn forms(only: &str) -> Outcome<()> {
    let library = Library::load(None)?;
    let mut cases = Vec::new();
    for (label, [k, n, m]) in [
        ("2048x5632", [2048, 5632, 5632]),
        ("2048x11264 gate+up", [2048, 11264, 5632]),
        ("2048x2560 qkv", [2048, 2560, 2048]),
        ("4096x14336", [4096, 14336, 14336]),
        ("4096x28672 gate+up", [4096, 28672, 14336]),
        ("4096x6144 qkv", [4096, 6144, 4096]),
    ] {
        for form in [
            Form::Flat,
            Form::Raised,
            Form::Swapped,
            Form::Reduced,
            Form::Parts(8),
            Form::SwappedParts(8),
            Form::Repeated(8),
        ] {
            cases.push((label, [k, n, m], form, DType::F16));
        }
        cases.push((label, [k, n, m], Form::Flat, DType::Bf16));
    }
    cases.retain(|(label, _, form, dtype)| format!("{label} {form:?} {dtype}").contains(only));
    let gpu = Mutex::new(());
    each(8, cases, |(label, [k, n, m], form, dtype)| {
        match measure_chain(&library, form, dtype, [k, n, m], &gpu) {
            Ok((us, rate)) => format!("{label:<22} {form:?} {dtype}: {us:.1} us a product, {rate:.2} TB/s"),
            Err(error) => format!("{label:<22} {form:?} {dtype}: {error}"),
        }
    });
    Ok(())
}

fn measure_chain(
    library: &Library,
    form: Form,
    dtype: DType,
    size: [i64; 3],
    gpu: &Mutex<()>,
) -> Result<(f64, f64), String> {
    let run = || -> Outcome<(f64, f64)> {
        let pairs = if size[0] > 2048 { 3 } else { 8 };
        let (network, bytes) = chain(form, dtype, size, pairs)?;
        let plan = tensorrt::build(library, &network, &BuildOptions::default())?;
        let seconds = measure(library, &network, &[plan.bytes()], gpu, (300, 30))?;
        Ok((seconds * 1e6 / (2 * pairs) as f64, bytes / seconds / 1e12))
    };
    run().map_err(|error| error.to_string())
}
