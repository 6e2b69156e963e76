//! Which exporter made a file, decided by the producer's name and by the structure.

use std::fmt;

use crate::graph::Graph;

/// The exporters whose dialects the passes know.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Exporter {
    /// optimum, through `torch.onnx`'s TorchScript exporter.
    Optimum,
    /// `torch.onnx.export(dynamo=False)`.
    TorchScript,
    /// `torch.onnx.export(dynamo=True)`.
    TorchDynamo,
    /// The model builder of onnxruntime-genai.
    OrtGenAi,
    /// mobius.
    Mobius,
    /// Any other, or unknown.
    Other,
}

impl fmt::Display for Exporter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Exporter::Optimum => "optimum (TorchScript)",
            Exporter::TorchScript => "torch.onnx (TorchScript)",
            Exporter::TorchDynamo => "torch.onnx (dynamo)",
            Exporter::OrtGenAi => "onnxruntime-genai",
            Exporter::Mobius => "mobius",
            Exporter::Other => "unknown",
        })
    }
}

/// The exporter of a graph as it was read, before any pass.
pub fn exporter(graph: &Graph) -> Exporter {
    match graph.producer.name.as_str() {
        "onnxruntime-genai" => return Exporter::OrtGenAi,
        "mobius" => return Exporter::Mobius,
        // Merges a decoder without past keys and values with one that has them.
        "optimum-onnx" => return Exporter::Optimum,
        _ => {}
    }
    // Optimizers and converters replace the producer's name, so the structure decides among torch's exporters:
    // TorchScript names nodes by module path ("/model/layers.0/..."), dynamo "node_add_3".
    let (mut paths, mut numbered, mut nodes) = (0usize, 0usize, 0usize);
    for id in graph.node_ids() {
        let name = &graph.node(id).name;
        nodes += 1;
        paths += usize::from(name.starts_with('/'));
        numbered += usize::from(name.starts_with("node_"));
    }
    if numbered * 2 > nodes {
        return Exporter::TorchDynamo;
    }
    if paths * 2 <= nodes {
        return Exporter::Other;
    }
    let named = |prefix: &str| {
        let has = |v: &crate::graph::ValueId| graph.value(*v).name.starts_with(prefix);
        (graph.inputs.iter().any(has), graph.outputs.iter().any(has))
    };
    // optimum's cache grows: it has no input for positions in a cache of fixed size.
    let fixed_cache = named("cache_position").0;
    match (named("past_key_values.").0, named("present.").1, fixed_cache) {
        (true, true, false) => Exporter::Optimum,
        _ => Exporter::TorchScript,
    }
}
