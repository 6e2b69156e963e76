//! One network, built, loaded, run once and thrown away: how tests compare TensorRT with the CPU executor.

use std::collections::HashMap;
use std::path::Path;
use std::rc::Rc;

use bytes::Bytes;

use super::{Buffer, Engine, LoadOptions, Runtime, Stream};
use crate::backend::tensorrt::{self, BuildOptions, Library};
use crate::network::{Network, WeightMode};
use crate::tensor::Tensor;

/// Builds the engine of a static network and runs it. `inputs` are by name, of the network's dtypes, caches included;
/// gives every output in the network's order. Bound weights are bound to their own bytes.
pub fn execute(
    library: &Library,
    runtime: &Rc<Runtime>,
    network: &Network,
    inputs: &[(&str, Tensor)],
    options: &BuildOptions,
) -> Result<Vec<(String, Tensor)>, Box<dyn std::error::Error>> {
    let plan = tensorrt::build(library, network, options)?;
    let loading = LoadOptions {
        graphs: false,
        kernels: None,
    };
    let mut engine = Engine::load(runtime, Path::new("(in memory)"), plan.bytes(), network, loading)?;
    drop(plan);
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
    let mut ports = engine.ports().to_vec();
    // Inputs first: an updated cache is in the memory of its input.
    ports.sort_by_key(|port| !port.is_input);
    for port in &ports {
        let buffer = match aliases.get(port.name.as_str()).and_then(|cache| memory.get(*cache)) {
            Some(cache) => cache.clone(),
            None => Rc::new(Buffer::new(cuda, port.bytes(1), &port.name)?),
        };
        if port.is_input {
            let value = values
                .get(&port.name)
                .ok_or_else(|| format!("no value for the input {:?}", port.name))?;
            if (value.dtype(), value.data().len()) != (port.dtype, port.bytes(1)) {
                return Err(format!("{:?} wants {} {:?}, not {value:?}", port.name, port.dtype, port.shape).into());
            }
            buffer.write(0, value.data())?;
        } else if !aliases.contains_key(port.name.as_str()) {
            // Whatever is not written shows.
            buffer.write(0, &vec![0xff; buffer.bytes()])?;
        }
        // SAFETY: of the port's size, and held until the run is over.
        unsafe { engine.bind([(port.name.as_str(), buffer.address())])? };
        memory.insert(port.name.clone(), buffer);
    }
    let scratch = Buffer::new(cuda, engine.scratch_bytes(), "working memory")?;
    // SAFETY: held until the run is over.
    unsafe { engine.set_scratch(&scratch) };
    engine.enqueue(&stream)?;
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
