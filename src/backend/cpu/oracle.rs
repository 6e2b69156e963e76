use super::bindings::{Bindings, Input, Output};
use super::compile::CompileOptions;
use super::error::CpuError;
use super::kv_cache::KvCaches;
use super::program::{Port, Program};
use crate::network::Network;
use crate::tensor::{DType, Tensor};

/// Runs a static network once on whole tensors, for tests and callers that need values, not speed.
///
/// Inputs are found by name and must have the dtype and shape of the network's inputs; caches may be omitted and are
/// then zero. Returns every output of the network, including updated caches, by name, in the network's dtypes.
pub fn execute(
    network: &Network,
    inputs: &[(&str, Tensor)],
    options: &CompileOptions,
) -> Result<Vec<(String, Tensor)>, CpuError> {
    let mut program = Program::compile(network, options)?;
    let mut caches = KvCaches::new(network)?;
    for (name, tensor) in inputs {
        if let Some(cache) = caches.get_mut(name) {
            cache.set(tensor)?;
        }
    }
    let (ports_in, ports_out) = (program.inputs().to_vec(), program.outputs().to_vec());
    let stray = inputs.iter().find(|(name, _)| {
        let known = ports_in.iter().chain(program.caches());
        !known.into_iter().any(|port| port.name == *name)
    });
    if let Some((name, _)) = stray {
        return Err(CpuError::UnknownBinding {
            what: "input",
            name: name.to_string(),
            known: ports_in.iter().map(|port| port.name.clone()).collect(),
        });
    }
    let values = ports_in
        .iter()
        .map(|port| {
            let tensor = inputs
                .iter()
                .find(|(name, _)| *name == port.name)
                .map(|(_, tensor)| tensor);
            let tensor = tensor.ok_or_else(|| problem(port, "not given".to_string()))?;
            if tensor.dtype() != port.dtype || tensor.shape() != port.shape {
                let wanted = format!("needs {} {:?}, given {tensor:?}", port.dtype, port.shape);
                return Err(problem(port, wanted));
            }
            Ok(Values::of(tensor))
        })
        .collect::<Result<Vec<_>, _>>()?;
    let mut results: Vec<Values> = ports_out.iter().map(Values::zeroed).collect();
    let mut bindings = Bindings::new();
    for (port, values) in ports_in.iter().zip(&values) {
        bindings.input(&port.name, values.input());
    }
    for (port, values) in ports_out.iter().zip(&mut results) {
        bindings.output(&port.name, values.output());
    }
    bindings.caches(&mut caches);
    program.run(&mut bindings)?;
    drop(bindings);

    let mut given = Vec::new();
    for id in &network.outputs {
        let tensor = network.tensor(*id);
        let value = match network.aliases().find(|(_, updated)| updated == id) {
            Some((cache, _)) => {
                let cache = caches
                    .get_mut(&network.tensor(cache).name)
                    .expect("made for this network");
                let bytes = cache.bytes().to_vec();
                Tensor::new(cache.dtype(), cache.shape().to_vec(), bytes.into()).expect("sized for its shape")
            }
            None => {
                let at = ports_out
                    .iter()
                    .position(|p| p.name == tensor.name)
                    .expect("a port for every output");
                results[at].tensor(&ports_out[at])
            }
        };
        given.push((tensor.name.clone(), value));
    }
    Ok(given)
}

fn problem(port: &Port, reason: String) -> CpuError {
    CpuError::Binding {
        name: port.name.clone(),
        reason,
    }
}

/// Elements in their bound form.
enum Values {
    F32(Vec<f32>),
    I32(Vec<i32>),
    I64(Vec<i64>),
    I8(Vec<i8>),
    U8(Vec<u8>),
    Bool(Vec<bool>),
}

impl Values {
    fn of(tensor: &Tensor) -> Values {
        let ints = || tensor.to_i64().into_iter();
        match tensor.dtype() {
            DType::I32 => Values::I32(ints().map(|v| v as i32).collect()),
            DType::I64 => Values::I64(tensor.to_i64()),
            DType::I8 => Values::I8(ints().map(|v| v as i8).collect()),
            DType::U8 => Values::U8(ints().map(|v| v as u8).collect()),
            DType::Bool => Values::Bool(ints().map(|v| v != 0).collect()),
            _ => Values::F32(tensor.to_f32()),
        }
    }
    fn zeroed(port: &Port) -> Values {
        let len = port.shape.iter().product();
        match port.dtype {
            DType::I32 => Values::I32(vec![0; len]),
            DType::I64 => Values::I64(vec![0; len]),
            DType::I8 => Values::I8(vec![0; len]),
            DType::U8 => Values::U8(vec![0; len]),
            DType::Bool => Values::Bool(vec![false; len]),
            _ => Values::F32(vec![0.0; len]),
        }
    }
    fn input(&self) -> Input<'_> {
        match self {
            Values::F32(v) => v.as_slice().into(),
            Values::I32(v) => v.as_slice().into(),
            Values::I64(v) => v.as_slice().into(),
            Values::I8(v) => v.as_slice().into(),
            Values::U8(v) => v.as_slice().into(),
            Values::Bool(v) => v.as_slice().into(),
        }
    }
    fn output(&mut self) -> Output<'_> {
        match self {
            Values::F32(v) => v.as_mut_slice().into(),
            Values::I32(v) => v.as_mut_slice().into(),
            Values::I64(v) => v.as_mut_slice().into(),
            Values::I8(v) => v.as_mut_slice().into(),
            Values::U8(v) => v.as_mut_slice().into(),
            Values::Bool(v) => v.as_mut_slice().into(),
        }
    }
    fn tensor(&self, port: &Port) -> Tensor {
        let bytes: Vec<u8> = match self {
            Values::F32(v) => {
                let values: Vec<f64> = v.iter().map(|x| f64::from(*x)).collect();
                return Tensor::from_f64_as(port.dtype, port.shape.clone(), &values);
            }
            Values::I32(v) => v.iter().flat_map(|x| x.to_le_bytes()).collect(),
            Values::I64(v) => v.iter().flat_map(|x| x.to_le_bytes()).collect(),
            Values::I8(v) => v.iter().map(|x| *x as u8).collect(),
            Values::U8(v) => v.clone(),
            Values::Bool(v) => v.iter().map(|x| u8::from(*x)).collect(),
        };
        Tensor::new(port.dtype, port.shape.clone(), bytes.into()).expect("sized for its shape")
    }
}
