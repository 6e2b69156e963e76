//! The state of a lowering: the layers so far, the network's interface at its start and its outputs at its end.

use std::collections::{BTreeMap, HashMap, HashSet};

use super::LowerOptions;
use super::error::{LowerError, Reason};
use super::fuse::Fusions;
use super::kernels::KernelPlan;
use super::logit_rows::logits;
use super::quantized_weights::QuantizedWeight;
use super::weights::Table;
use crate::dim::{Dim, Sym};
use crate::graph::infer::InferenceFacts;
use crate::graph::{Constant, Graph, Node, NodeId, ValueId};
use crate::interface::{Interface, Port, Role};
use crate::network::{BuildError, LayerKind, Logits, Network, NetworkBuilder, Profile, TensorId, Tokens, VerifyError};
use crate::tensor::DType;

pub(super) type Lowered<T = TensorId> = Result<T, Reason>;

pub(super) struct Lowering<'a> {
    pub graph: &'a Graph,
    pub facts: &'a InferenceFacts,
    pub profile: Profile,
    pub options: &'a LowerOptions,
    pub b: NetworkBuilder,
    pub table: &'a Table,
    /// Nodes that compute on chosen rows only.
    pub rows: HashSet<NodeId>,
    pub fusions: Fusions,
    pub kernels: KernelPlan,
    /// Results of kernel groups that are not values of the graph, by group.
    pub packed: HashMap<usize, TensorId>,
    /// Whether the node being lowered is one of them.
    pub in_rows: bool,
    pub logit_rows: Option<TensorId>,
    pub chosen: HashMap<TensorId, TensorId>,
    pub values: HashMap<ValueId, TensorId>,
    /// Constants in the rank required by a reader.
    pub raised: HashMap<(ValueId, usize), TensorId>,
    pub numbers: HashMap<(DType, usize, u64), TensorId>,
    /// Ones that TensorRT cannot fold.
    pub ones: HashMap<DType, TensorId>,
    /// Weights whose codes are in the network, by the tensor of their values.
    pub quantized: HashMap<TensorId, QuantizedWeight>,
    /// Activations as matrices.
    pub flat: HashMap<TensorId, TensorId>,
    /// Masks repeated for folded query rows: by mask and number of rows.
    pub repeated_masks: HashMap<(TensorId, usize), TensorId>,
    /// Biases of attention by their slopes.
    pub biases: HashMap<ValueId, TensorId>,
    pub symbols: BTreeMap<Sym, Dim>,
}

/// The network's dtype for a graph's dtype.
pub(super) fn network_dtype(dtype: DType) -> DType {
    match dtype {
        DType::I64 => DType::I32,
        other => other,
    }
}

pub(super) fn one() -> Dim {
    Dim::from(1usize)
}

impl<'a> Lowering<'a> {
    pub fn new(
        graph: &'a Graph,
        facts: &'a InferenceFacts,
        profile: Profile,
        options: &'a LowerOptions,
        table: &'a Table,
        rows: HashSet<NodeId>,
        fusions: Fusions,
    ) -> Self {
        let mut symbols = BTreeMap::from([
            (Sym::batch(), Dim::from(profile.batch)),
            (Sym::capacity(), Dim::from(profile.capacity)),
        ]);
        if let Tokens::Static(n) = profile.tokens {
            symbols.insert(Sym::tokens(), Dim::from(n));
        }
        Lowering {
            graph,
            facts,
            profile,
            options,
            b: NetworkBuilder::new(graph.name.clone(), profile),
            table,
            rows,
            fusions,
            kernels: KernelPlan::default(),
            packed: HashMap::new(),
            in_rows: false,
            logit_rows: None,
            chosen: HashMap::new(),
            values: HashMap::new(),
            raised: HashMap::new(),
            numbers: HashMap::new(),
            ones: HashMap::new(),
            quantized: HashMap::new(),
            flat: HashMap::new(),
            repeated_masks: HashMap::new(),
            biases: HashMap::new(),
            symbols,
        }
    }

    /// The network's inputs: the graph's in their order, the choice of rows before the caches.
    pub fn inputs(&mut self) -> Result<(), LowerError> {
        let Some(interface) = &self.graph.interface else {
            for value in &self.graph.inputs {
                self.graph_input(*value)?;
            }
            return self.logit_rows();
        };
        let ports = interface.inputs();
        let first_cache = ports.partition_point(|port| port.role < Role::LogitRows);
        for port in &ports[..first_cache] {
            self.graph_input(port.id)?;
        }
        self.logit_rows()?;
        for port in &ports[first_cache..] {
            self.graph_input(port.id)?;
        }
        Ok(())
    }

    /// The input that chooses rows, if the profile has one.
    fn logit_rows(&mut self) -> Result<(), LowerError> {
        if self.profile.logits == Logits::Rows {
            let (name, batch) = (Role::LogitRows.name(), Dim::from(self.profile.batch));
            let input = self.b.input(&name, DType::I32, &[batch]);
            let id = input.map_err(|e| input_error(&name, &e.to_string()))?;
            self.logit_rows = Some(id);
        }
        Ok(())
    }

    fn graph_input(&mut self, id: ValueId) -> Result<(), LowerError> {
        let value = self.graph.value(id);
        let (Some(dtype), Some(shape)) = (value.dtype, &value.shape) else {
            return Err(input_error(&value.name, "it has no dtype or shape"));
        };
        let shape = self.substituted(shape);
        let added = self.b.input(&value.name, network_dtype(dtype), &shape);
        let tensor = added.map_err(|e| input_error(&value.name, &e.to_string()))?;
        self.values.insert(id, tensor);
        Ok(())
    }

    pub fn is_known(&self, value: ValueId) -> bool {
        self.values.contains_key(&value)
    }

    /// Name and bytes of a constant that is a weight.
    pub fn weight_of(&self, value: ValueId) -> (String, Constant) {
        let weight = &self.table.list[self.table.by_value[&value]];
        (weight.name.clone(), weight.constant.clone())
    }

    pub fn define(&mut self, value: ValueId, tensor: TensorId) {
        self.values.insert(value, tensor);
    }

    /// The node's name, or its output's if it has none.
    pub fn base_name(&self, node: &Node) -> String {
        match (&node.name, node.outputs.iter().flatten().next()) {
            (name, Some(output)) if name.is_empty() => self.graph.value(*output).name.clone(),
            (name, _) => name.clone(),
        }
    }

    /// The network with its outputs.
    pub fn finish(mut self) -> Result<Network, LowerError> {
        self.in_rows = false;
        let logits = logits(self.graph);
        let mut outputs = HashMap::new();
        for id in self.graph.outputs.clone() {
            let name = self.graph.value(id).name.clone();
            let fail = |reason: String| LowerError::Output {
                name: name.clone(),
                reason,
            };
            let tensor = self.output(id, logits).map_err(|e| fail(e.to_string()))?;
            let named = self.b.output(&name, tensor).or_else(|error| match error {
                // An input, a weight or another output: the copy is an empty shuffle.
                BuildError::Output { .. } => {
                    let kind = LayerKind::Shuffle {
                        first: None,
                        reshape: None,
                        second: None,
                    };
                    let copy = self.b.add(&format!("{name}/copy"), kind, &[tensor])?;
                    self.b.output(&name, copy)
                }
                other => Err(other),
            });
            named.map_err(|e| fail(e.to_string()))?;
            outputs.insert(id, *self.b.network().outputs.last().expect("just added"));
        }
        if let Some(interface) = &self.graph.interface {
            let interface = self.interface(interface, &outputs)?;
            self.b.interface(interface);
        }
        Ok(self.b.finish_pruned().map_err(Box::new)?)
    }

    /// The graph's interface over the network's tensors, with the choice of rows.
    fn interface(
        &self,
        of_graph: &Interface<ValueId>,
        outputs: &HashMap<ValueId, TensorId>,
    ) -> Result<Interface<TensorId>, LowerError> {
        let ports = |ports: &[Port<ValueId>], ids: &HashMap<ValueId, TensorId>| -> Vec<Port<TensorId>> {
            let found = ports.iter().filter_map(|Port { role, id }| {
                let (role, id) = (*role, *ids.get(id)?);
                Some(Port { role, id })
            });
            found.collect()
        };
        let mut inputs = ports(of_graph.inputs(), &self.values);
        if let Some(id) = self.logit_rows {
            let role = Role::LogitRows;
            let at = inputs.partition_point(|port| port.role < role);
            inputs.insert(at, Port { role, id });
        }
        let outputs = ports(of_graph.outputs(), outputs);
        let network = self.b.network();
        let interface = Interface::new(inputs, outputs, |cache, id| network.cache_shape(cache, id));
        Ok(interface.map_err(|errors| Box::new(VerifyError::Ports(errors)))?)
    }

    fn output(&mut self, id: ValueId, logits: Option<ValueId>) -> Lowered {
        let mut tensor = self.value(id)?;
        if Some(id) != logits {
            return Ok(tensor);
        }
        let in_rows = self
            .graph
            .producer_of(id)
            .is_some_and(|(node, _)| self.rows.contains(&node));
        if self.profile.logits == Logits::Rows && !in_rows {
            tensor = self.chosen_rows(tensor)?;
        }
        Ok(self.b.cast("logits/f32", DType::F32, tensor)?)
    }
}

fn input_error(name: &str, reason: &str) -> LowerError {
    LowerError::Input {
        name: name.to_string(),
        reason: reason.to_string(),
    }
}
