//! Builds, loads and runs one network once, for tests that compare TensorRT with the CPU executor.

use std::collections::HashMap;
use std::path::Path;
use std::rc::Rc;

use bytes::Bytes;

use super::{Buffer, Caches, LoadOptions, Program, Runtime, Stream, timing};
use crate::backend::tensorrt::{self, BuildOptions, Library};
use crate::network::{Network, WeightMode};
use crate::tensor::Tensor;

/// Builds the engine of a static network and runs it. `inputs` are by name, with the network's dtypes, including
/// caches. Returns every output in the network's order. Bound weights are bound to their bytes.
pub fn execute(
    library: &Library,
    runtime: &Rc<Runtime>,
    network: &Network,
    inputs: &[(&str, Tensor)],
    options: &BuildOptions,
) -> Result<Vec<(String, Tensor)>, Box<dyn std::error::Error>> {
    let plans = tensorrt::build_all(library, network, options)?;
    let loading = LoadOptions {
        graphs: false,
        kernels: None,
        caches: Caches::Tensors,
    };
    let bytes: Vec<&[u8]> = plans.iter().map(tensorrt::Plan::bytes).collect();
    let mut program = Program::load(runtime, Path::new("(in memory)"), &bytes, network, loading)?;
    drop(plans);
    let cuda = runtime.cuda();
    let stream = Stream::new(cuda)?;
    let mut memory: HashMap<String, Rc<Buffer>> = HashMap::new();
    let given = inputs.iter().map(|(name, tensor)| (name.to_string(), tensor.clone()));
    let bound = network.weights.iter().filter(|w| w.mode == WeightMode::Bind);
    let mut values: HashMap<String, Tensor> = given.collect();
    for weight in bound {
        values.insert(weight.name.clone(), weight.constant.materialize()?);
    }
    let aliases: HashMap<&str, &str> = network
        .aliases()
        .map(|(cache, updated)| {
            (
                network.tensor(updated).name.as_str(),
                network.tensor(cache).name.as_str(),
            )
        })
        .collect();
    // Inputs first: an updated cache is in the memory of its input.
    let outputs = network.inputs.len() + network.weights.iter().filter(|w| w.mode == WeightMode::Bind).count();
    for (i, (port, dtype, bytes)) in timing::ports(network, 1).into_iter().enumerate() {
        let cache = aliases.get(port.as_str()).and_then(|cache| memory.get(*cache));
        let buffer = match cache {
            Some(cache) => cache.clone(),
            None => Rc::new(Buffer::new(cuda, bytes, &port)?),
        };
        if i < outputs {
            let value = values
                .get(&port)
                .ok_or_else(|| format!("no value for the input {port:?}"))?;
            if (value.dtype(), value.data().len()) != (dtype, bytes) {
                return Err(format!("{port:?} needs {dtype} in {bytes} bytes, not {value:?}").into());
            }
            buffer.write(0, value.data())?;
        } else if !aliases.contains_key(port.as_str()) {
            // Makes unwritten outputs visible.
            buffer.write(0, &vec![0xff; buffer.bytes()])?;
        }
        // SAFETY: of the tensor's size, and held until the run is over.
        unsafe { program.bind([(port.as_str(), buffer.address())])? };
        memory.insert(port, buffer);
    }
    let scratch = Buffer::new(cuda, program.scratch_bytes(), "scratch memory")?;
    // SAFETY: held until the run is over.
    unsafe { program.set_scratch(&scratch) };
    program.enqueue(&stream)?;
    stream.wait()?;
    let mut outputs = Vec::new();
    for id in &network.outputs {
        let tensor = network.tensor(*id);
        let shape: Option<Vec<usize>> = tensor.shape.iter().map(|d| Some(d.as_const()? as usize)).collect();
        let shape = shape.ok_or("only static networks are executed")?;
        let mut bytes = vec![0; tensor.dtype.byte_len(shape.iter().product())];
        memory[&tensor.name].read(0, &mut bytes)?;
        outputs.push((
            tensor.name.clone(),
            Tensor::new(tensor.dtype, shape, Bytes::from(bytes))?,
        ));
    }
    Ok(outputs)
}
