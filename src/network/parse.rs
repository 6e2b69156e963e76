//! Reads the text form of a network, as its `Display` writes it.
//!
//! What the text omits is synthetic: weights are absent, and constants of more than eight elements have synthetic ones.
//! The layer of a weight precedes the first layer that reads it. So the text of a parsed network is equal to the parsed
//! text. The network is not verified: [`verify`](super::verify()) does that.

use std::collections::HashMap;

use super::{Layer, LayerKind, Logits, Network, Profile, Tensor, TensorId, Tokens, Weight, WeightId, WeightMode};
use crate::graph::Constant;
use crate::ir_text::{Cursor, Lines, ParseError, Parsed};

/// The network of a dump.
pub fn parse(text: &str) -> Result<Network, ParseError> {
    let mut lines = Lines::of(text);
    let mut header = lines.next("\"network\"")?;
    header.expect("network ")?;
    let name = header.name(&[])?;
    header.expect(" for ")?;
    let profile = profile(&mut header)?;
    header.expect_end()?;
    let mut parser = Parser {
        network: Network::new(name, profile),
        names: HashMap::new(),
        weights: HashMap::new(),
    };
    if lines.eat_title("weights") {
        while let Some(line) = lines.item() {
            parser.weight(line)?;
        }
    }
    lines.title("inputs")?;
    while let Some(mut line) = lines.item() {
        let id = parser.typed(&mut line)?;
        line.expect_end()?;
        parser.network.inputs.push(id);
    }
    lines.title("layers")?;
    while let Some(line) = lines.item() {
        parser.layer(line)?;
    }
    lines.title("outputs")?;
    while let Some(line) = lines.item() {
        parser.output(line)?;
    }
    lines.end()?;
    let mut network = parser.network;
    // A text has only names.
    network.interface = network.canonical_interface().ok();
    Ok(network)
}

/// `b1-t128-c1024`, `b1-t1_128_512-c1024-all`.
fn profile(line: &mut Cursor) -> Parsed<Profile> {
    line.expect("b")?;
    let batch = number(line)?;
    line.expect("-t")?;
    let first = number(line)?;
    let tokens = match line.eat("_") {
        false => Tokens::Static(first),
        true => {
            let opt = number(line)?;
            line.expect("_")?;
            Tokens::Dynamic {
                min: first,
                opt,
                max: number(line)?,
            }
        }
    };
    line.expect("-c")?;
    Ok(Profile {
        batch,
        tokens,
        capacity: number(line)?,
        logits: match line.eat("-all") {
            true => Logits::All,
            false => Logits::Rows,
        },
    })
}

/// A number without a sign, since `-` separates the parts of a profile.
fn number(line: &mut Cursor) -> Parsed<usize> {
    let start = line.position();
    let digits = line.take(|c| c.is_ascii_digit());
    digits.parse().map_err(|_| line.error_at(start, "a number"))
}

struct Parser {
    network: Network,
    names: HashMap<String, TensorId>,
    /// Weights that no layer has read yet.
    weights: HashMap<String, WeightId>,
}

impl Parser {
    /// A new tensor: `name dtype[shape]`.
    fn typed(&mut self, line: &mut Cursor) -> Parsed<TensorId> {
        let start = line.position();
        let name = line.name(&[])?;
        line.expect(" ")?;
        let dtype = line.dtype()?;
        let shape = line.shape()?;
        if self.names.contains_key(&name) || self.weights.contains_key(&name) {
            return Err(line.error_at(start, "a name of its own"));
        }
        Ok(self.push(Tensor { name, dtype, shape }))
    }

    fn push(&mut self, tensor: Tensor) -> TensorId {
        let id = TensorId(self.network.tensors.len() as u32);
        self.names.insert(tensor.name.clone(), id);
        self.network.tensors.push(tensor);
        id
    }

    fn weight(&mut self, mut line: Cursor) -> Parsed<()> {
        let start = line.position();
        let name = line.name(&[])?;
        line.expect(" ")?;
        let dtype = line.dtype()?;
        let shape = line.sizes()?;
        line.expect(" ")?;
        let at = line.position();
        let word = line.take(char::is_alphabetic);
        let modes = [WeightMode::Bind, WeightMode::Embed, WeightMode::Strip];
        let mode = modes.into_iter().find(|mode| mode.word() == word);
        let mode = mode.ok_or_else(|| line.error_at(at, "\"bind\", \"embed\" or \"strip\""))?;
        let origin = match line.eat(" from ") {
            true => line.name(&[])?,
            false => name.clone(),
        };
        line.expect_end()?;
        let id = WeightId(self.network.weights.len() as u32);
        if self.weights.insert(name.clone(), id).is_some() {
            return Err(line.error_at(start, "a name of its own"));
        }
        self.network.weights.push(Weight {
            name,
            constant: Constant::absent(dtype, shape).with_origin(&origin),
            mode,
        });
        Ok(())
    }

    fn layer(&mut self, mut line: Cursor) -> Parsed<()> {
        // The inputs come after the outputs, and a weight among them adds a layer that goes first.
        let mut outputs = Vec::new();
        loop {
            let start = line.position();
            let name = line.name(&[])?;
            line.expect(" ")?;
            let (dtype, shape) = (line.dtype()?, line.shape()?);
            outputs.push((start, Tensor { name, dtype, shape }));
            if !line.eat(", ") {
                break;
            }
        }
        line.expect(" = ")?;
        let mut inputs = Vec::new();
        let (_, first) = &outputs[0];
        let kind = LayerKind::parse(&mut line, (first.dtype, &first.shape), |line| {
            inputs.push(self.read(line)?);
            Ok(())
        })?;
        let name = match line.eat(" @") {
            true => line.name(&[])?,
            false => first.name.clone(),
        };
        line.expect_end()?;
        let mut ids = Vec::new();
        for (start, tensor) in outputs {
            if self.names.contains_key(&tensor.name) || self.weights.contains_key(&tensor.name) {
                return Err(line.error_at(start, "a name of its own"));
            }
            ids.push(self.push(tensor));
        }
        self.network.layers.push(Layer {
            name,
            kind,
            inputs,
            outputs: ids,
        });
        Ok(())
    }

    /// A tensor that was defined earlier, or a weight.
    fn read(&mut self, line: &mut Cursor) -> Parsed<TensorId> {
        let start = line.position();
        let name = line.name(&[')', '^'])?;
        if let Some(id) = self.names.get(&name) {
            return Ok(*id);
        }
        match self.weights.remove(&name) {
            Some(weight) => Ok(self.weight_layer(weight)),
            None => Err(line.error_at(start, "a tensor that is defined above")),
        }
    }

    fn weight_layer(&mut self, weight: WeightId) -> TensorId {
        let Weight { name, constant, .. } = self.network.weight(weight);
        let tensor = Tensor {
            name: name.clone(),
            dtype: constant.dtype(),
            shape: constant.shape().iter().map(|d| (*d).into()).collect(),
        };
        let name = tensor.name.clone();
        let output = self.push(tensor);
        self.network.layers.push(Layer {
            name,
            kind: LayerKind::Weight(weight),
            inputs: Vec::new(),
            outputs: vec![output],
        });
        output
    }

    fn output(&mut self, mut line: Cursor) -> Parsed<()> {
        let start = line.position();
        let name = line.name(&[])?;
        line.expect(" ")?;
        let (dtype, shape) = (line.dtype()?, line.shape()?);
        line.expect_end()?;
        let Some(id) = self.names.get(&name).copied() else {
            return Err(line.error_at(start, "a tensor that is defined above"));
        };
        let tensor = self.network.tensor(id);
        if (tensor.dtype, &tensor.shape) != (dtype, &shape) {
            return Err(line.error_at(start, "the type that the tensor has where it is defined"));
        }
        self.network.outputs.push(id);
        Ok(())
    }
}
