//! Random tensors, small networks, comparisons.

use std::sync::{Arc, OnceLock};

use lapidary::backend::cpu::{CompileOptions, Isa, Pool, execute};
use lapidary::dim::Dim;
use lapidary::network::{LayerKind, Network, NetworkBuilder, Profile, TensorId};
use lapidary::tensor::{DType, Tensor};

/// A small generator, so that a failing case can be named by its seed.
pub struct Random(u64);

impl Random {
    pub fn new(seed: u64) -> Self {
        Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }
    pub fn bits(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }
    pub fn below(&mut self, n: usize) -> usize {
        (self.bits() >> 33) as usize % n
    }
    /// In [-1, 1).
    pub fn float(&mut self) -> f64 {
        (self.bits() >> 11) as f64 / (1u64 << 52) as f64 - 1.0
    }
    pub fn floats(&mut self, dtype: DType, shape: &[usize], scale: f64) -> Tensor {
        let values: Vec<f64> = (0..shape.iter().product()).map(|_| self.float() * scale).collect();
        Tensor::from_f64_as(dtype, shape.to_vec(), &values)
    }
    /// From `low` to `high`, both included.
    pub fn ints(&mut self, dtype: DType, shape: &[usize], low: i64, high: i64) -> Tensor {
        let span = (high - low + 1) as usize;
        let values: Vec<i64> = (0..shape.iter().product())
            .map(|_| low + self.below(span) as i64)
            .collect();
        match dtype {
            DType::I64 => Tensor::from_i64(shape.to_vec(), &values),
            DType::I32 => Tensor::from_i32(shape.to_vec(), &values.iter().map(|v| *v as i32).collect::<Vec<_>>()),
            DType::Bool => Tensor::from_bool(shape.to_vec(), &values.iter().map(|v| *v != 0).collect::<Vec<_>>()),
            other => panic!("{other}"),
        }
    }
    pub fn any(&mut self, dtype: DType, shape: &[usize]) -> Tensor {
        match dtype {
            DType::Bool => self.ints(dtype, shape, 0, 1),
            DType::I32 | DType::I64 => self.ints(dtype, shape, -9, 9),
            _ => self.floats(dtype, shape, 2.0),
        }
    }
}

pub fn dims(shape: &[usize]) -> Vec<Dim> {
    shape.iter().map(|d| Dim::from(*d)).collect()
}

/// Whether cases run as TensorRT engines on the GPU instead (`LAPIDARY_TEST_BACKEND=tensorrt`): one suite, two back
/// ends. Cases that use features of the executor, such as a compiled program, still run on the CPU.
pub fn on_tensorrt() -> bool {
    std::env::var_os("LAPIDARY_TEST_BACKEND").is_some_and(|name| name == "tensorrt")
}

/// The allowed error of a result: the executor's, or on TensorRT the rounding to `dtype`, which the executor omits
/// where it can.
pub fn tolerance(executor: f64, dtype: DType) -> f64 {
    match dtype {
        DType::F16 if on_tensorrt() => 1e-3,
        DType::Bf16 if on_tensorrt() => 8e-3,
        _ => executor,
    }
}

/// Every instruction set, with one and three threads. Pools are shared: tests run in parallel.
pub fn every_option() -> Vec<CompileOptions> {
    if on_tensorrt() {
        return vec![CompileOptions::default()];
    }
    static POOLS: OnceLock<[Arc<Pool>; 2]> = OnceLock::new();
    let pools = POOLS.get_or_init(|| [1, 3].map(|n| Arc::new(Pool::new(n))));
    let isas = Isa::available();
    let all = isas.into_iter().flat_map(|isa| {
        pools.iter().map(move |pool| {
            let options = CompileOptions::on(pool.clone()).with_isa(isa);
            options.expect("it is among the available ones")
        })
    });
    all.collect()
}

/// A network of one layer: inputs become network inputs `x0`, `x1` .., the output is `y`.
pub fn one_layer(kind: LayerKind, inputs: &[Tensor]) -> Network {
    let mut b = builder();
    let ids: Vec<TensorId> = inputs
        .iter()
        .enumerate()
        .map(|(i, t)| b.input(&format!("x{i}"), t.dtype(), &dims(t.shape())).unwrap())
        .collect();
    let y = b.add("layer", kind, &ids).unwrap();
    b.output("y", y).unwrap();
    b.finish().unwrap()
}

/// Runs independent layers in one network; returns the output of each.
pub fn side_by_side(layers: &[(LayerKind, Vec<Tensor>)], options: &CompileOptions) -> Vec<Tensor> {
    let mut b = builder();
    let mut named = Vec::new();
    for (i, (kind, inputs)) in layers.iter().enumerate() {
        let mut ids = Vec::new();
        for (j, tensor) in inputs.iter().enumerate() {
            let name = format!("x{i}_{j}");
            ids.push(b.input(&name, tensor.dtype(), &dims(tensor.shape())).unwrap());
            named.push((name, tensor.clone()));
        }
        let y = b.add(&format!("layer{i}"), kind.clone(), &ids).unwrap();
        b.output(&format!("y{i}"), y).unwrap();
    }
    let named: Vec<(&str, Tensor)> = named
        .iter()
        .map(|(name, tensor)| (name.as_str(), tensor.clone()))
        .collect();
    outputs(&b.finish().unwrap(), &named, options)
}

pub fn builder() -> NetworkBuilder {
    NetworkBuilder::new("test", Profile::prefill(1, 4096))
}

/// Runs a network with inputs `x0`, `x1` .. and returns its first output.
pub fn run(network: &Network, inputs: &[Tensor], options: &CompileOptions) -> Tensor {
    let names: Vec<String> = (0..inputs.len()).map(|i| format!("x{i}")).collect();
    let named: Vec<(&str, Tensor)> = names.iter().map(String::as_str).zip(inputs.iter().cloned()).collect();
    outputs(network, &named, options).remove(0)
}

pub fn outputs(network: &Network, inputs: &[(&str, Tensor)], options: &CompileOptions) -> Vec<Tensor> {
    if on_tensorrt() {
        return tensorrt::run(network, inputs);
    }
    let outputs = execute(network, inputs, options).unwrap_or_else(|e| panic!("{e}"));
    outputs.into_iter().map(|(_, tensor)| tensor).collect()
}

/// Panics unless `got` equals `want` within `tolerance`, relative to the larger of the value and `scale`.
pub fn assert_close(got: &Tensor, want: &[f64], scale: f64, tolerance: f64, what: &str) {
    assert_eq!(got.len(), want.len(), "{what}");
    for (i, (g, w)) in got.to_f64().iter().zip(want).enumerate() {
        let same = g == w || (g.is_nan() && w.is_nan());
        let error = (g - w).abs();
        assert!(
            same || error <= tolerance * w.abs().max(scale),
            "{what}: element {i} of {:?} is {g}, not {w}",
            got.shape()
        );
    }
}

#[cfg(feature = "engines")]
mod tensorrt {
    use std::rc::Rc;

    use lapidary::backend::tensorrt::run::{Runtime, execute};
    use lapidary::backend::tensorrt::{BuildOptions, Library};

    use super::{Network, Tensor};

    thread_local! {
        static RUNTIME: Rc<Runtime> = Runtime::new(&library()).unwrap_or_else(|e| panic!("{e}"));
    }

    fn library() -> Library {
        Library::load(None).unwrap_or_else(|e| panic!("{e}"))
    }

    pub fn run(network: &Network, inputs: &[(&str, Tensor)]) -> Vec<Tensor> {
        RUNTIME.with(|runtime| {
            let outputs = execute(&library(), runtime, network, inputs, &BuildOptions::default());
            let outputs = outputs.unwrap_or_else(|e| panic!("{e}"));
            outputs.into_iter().map(|(_, tensor)| tensor).collect()
        })
    }
}

#[cfg(not(feature = "engines"))]
mod tensorrt {
    use super::{Network, Tensor};

    pub fn run(_: &Network, _: &[(&str, Tensor)]) -> Vec<Tensor> {
        panic!("compiled without the feature tensorrt-rtx")
    }
}
