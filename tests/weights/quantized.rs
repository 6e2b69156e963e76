//! Quantized weights: the written form in ONNX Runtime, files of weights, and whole packages.

use std::collections::BTreeMap;
use std::path::Path;
use std::process::Command;

use lapidary::graph::{Constant, Graph, Op};
use lapidary::network::{Profile, WeightMode};
use lapidary::package::manifest::ExportFile;
use lapidary::package::{self, Manifest, ManifestHeader, Package, PackageError, Writer};
use lapidary::target::{Prefill, Refit, Target};
use lapidary::tensor::quantized::Granularity;
use lapidary::tensor::{DType, Tensor};
use lapidary::weights::checks::Allowed;
use lapidary::weights::source::{SourceContext, WeightSource};
use lapidary::{lower, onnx, passes};

use crate::support::{fixture, lapidary as program, text};

/// Pseudorandom numbers between -1 and 1.
fn numbers(count: usize, seed: u64) -> Vec<f64> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 11) as f64 / (1u64 << 52) as f64 - 1.0
    };
    (0..count).map(|_| next()).collect()
}

/// A tensor of codes, of every value that the type has.
fn codes(dtype: DType, shape: &[usize], seed: u64) -> Tensor {
    let numbers = numbers(shape.iter().product(), seed);
    if dtype.is_float_format() {
        let scaled: Vec<f64> = numbers.iter().map(|v| v * dtype.max()).collect();
        return Tensor::from_f64_as(dtype, shape.to_vec(), &scaled);
    }
    let (low, high) = dtype.int_range();
    let code = |v: &f64| low + ((v + 1.0) / 2.0 * (high - low + 1) as f64) as i64;
    let codes: Vec<i64> = numbers.iter().map(code).collect();
    Tensor::from_i64_as(dtype, shape.to_vec(), &codes)
}

fn quantized(dtype: DType, scale: DType, shape: &[usize], granularity: Granularity, zero_points: bool) -> Constant {
    let of = granularity.scale_shape(shape).unwrap();
    let scales: Vec<f64> = numbers(of.iter().product(), 3).iter().map(|v| 0.01 + v.abs()).collect();
    let scales = Constant::tensor(Tensor::from_f64_as(scale, of.clone(), &scales)).with_origin("w.scales");
    let zeros = zero_points.then(|| Constant::tensor(codes(dtype, &of, 7)).with_origin("w.zero_points"));
    let codes = Constant::tensor(codes(dtype, shape, 1)).with_origin("w.codes");
    Constant::quantized(codes, scales, zeros, granularity).unwrap()
}

const GRANULARITIES: [Granularity; 5] = [
    Granularity::Tensor,
    Granularity::Channel { axis: 0 },
    Granularity::Channel { axis: 1 },
    Granularity::Block { axis: 0, size: 2 },
    Granularity::Block { axis: 1, size: 16 },
];

/// Every model of a folder, without optimizations: the only output, as f32, beside the model. ONNX Runtime has no kernel
/// for f4 on the CPU; ONNX's own reference has.
const RUN: &str = "
import pathlib, sys, numpy, onnx, onnx.reference, onnxruntime
options = onnxruntime.SessionOptions()
options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
for path in sorted(pathlib.Path(sys.argv[1]).glob('*.onnx')):
    onnx.checker.check_model(str(path), full_check=True)
    if path.name.startswith('f4'):
        session = onnx.reference.ReferenceEvaluator(str(path))
    else:
        session = onnxruntime.InferenceSession(str(path), options, providers=['CPUExecutionProvider'])
    result, = session.run(None, {})
    path.with_suffix('.f32').write_bytes(result.astype(numpy.float32).tobytes())
";

/// Our `DequantizeLinear` gives bit-identical values in ONNX Runtime.
#[test]
fn onnx_runtime_agrees() {
    let Some(python) = std::env::var_os("LAPIDARY_PYTHON") else {
        assert!(std::env::var_os("CI").is_none(), "CI has to set LAPIDARY_PYTHON");
        eprintln!("LAPIDARY_PYTHON is not set: nothing is run in ONNX Runtime");
        return;
    };
    let folder = tempfile::tempdir().unwrap();
    let mut expected = BTreeMap::new();
    for dtype in [
        DType::I4,
        DType::U4,
        DType::I8,
        DType::U8,
        DType::F8E4M3Fn,
        DType::F8E5M2,
        DType::F4E2M1,
    ] {
        for scale in [DType::F32, DType::F16] {
            for (i, granularity) in GRANULARITIES.into_iter().enumerate() {
                let zero_points = !dtype.is_float_format() && i % 2 == 0;
                let weight = quantized(dtype, scale, &[4, 32], granularity, zero_points);
                let name = format!("{dtype}-{scale}-{i}");
                let mut graph = Graph::default();
                let constant = graph.add_constant("w", weight.clone());
                let output = graph.add_node("y", Op::Identity, &[constant]);
                graph.outputs.push(output);
                lapidary::graph::infer(&mut graph).unwrap();
                let path = folder.path().join(format!("{name}.onnx"));
                onnx::write(&graph, &path, None).unwrap();
                // And it is read back unchanged.
                let read = onnx::read(&path).unwrap();
                let back = read.constant(read.find("w").unwrap()).unwrap();
                assert_eq!(format!("{back:?}"), format!("{weight:?}"), "{name}");
                assert_eq!(back.materialize().unwrap(), weight.materialize().unwrap(), "{name}");
                expected.insert(name, weight.materialize().unwrap().to_f32());
            }
        }
    }
    let output = Command::new(&python)
        .args(["-c", RUN])
        .arg(folder.path())
        .output()
        .expect("LAPIDARY_PYTHON can be run");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    for (name, expected) in expected {
        let bytes = std::fs::read(folder.path().join(format!("{name}.f32"))).unwrap();
        let found: Vec<f32> = bytes.as_chunks().0.iter().map(|b| f32::from_le_bytes(*b)).collect();
        assert_eq!(found, expected, "{name}");
    }
}

/// Every form and every packed type, in one valid safetensors file.
#[test]
fn a_file_of_quantized_weights_is_read_back() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.safetensors");
    let mut weights = Vec::new();
    let all = [
        DType::I4,
        DType::U4,
        DType::I2,
        DType::U2,
        DType::I8,
        DType::U8,
        DType::F8E4M3Fn,
        DType::F4E2M1,
    ];
    for dtype in all {
        for (i, granularity) in GRANULARITIES.into_iter().enumerate() {
            let zero_points = !dtype.is_float_format() && i % 2 == 0;
            let weight = quantized(dtype, DType::F16, &[4, 32], granularity, zero_points);
            weights.push((format!("{dtype}.{i}"), weight));
        }
        // Not quantized, only narrow, with a size that ends within a byte.
        weights.push((format!("{dtype}.alone"), Constant::tensor(codes(dtype, &[3, 3], 5))));
    }
    let scales = quantized(DType::F8E4M3Fn, DType::F32, &[4, 2], Granularity::Tensor, false);
    let blocks = Granularity::Block { axis: 1, size: 16 };
    let nvfp4 = Constant::quantized(codes(DType::F4E2M1, &[4, 32], 1).into(), scales, None, blocks).unwrap();
    weights.push(("nvfp4".to_string(), nvfp4));
    weights.push((
        "plain".to_string(),
        Constant::tensor(Tensor::from_f32(vec![3], &[1.0, 2.0, 3.0])),
    ));
    let metadata = BTreeMap::from([("format".to_string(), "lapidary".to_string())]);
    let stored = lapidary::weights::write(&path, &weights, &metadata, &mut |_, _, _| Ok(()), |_| {}).unwrap();

    let bytes = std::fs::read(&path).unwrap();
    let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    assert_eq!(file.tensor("u4.0.codes").unwrap().shape(), [4, 16], "packed, as bytes");
    let context = SourceContext {
        positions: 1,
        dtype: DType::F32,
        architecture_hash: String::new(),
        activations: lapidary::passes::ActivationPolicy::default(),
        mask_windows: Default::default(),
    };
    let source = WeightSource::open(&path, &context).unwrap();
    let names: Vec<&str> = source.tensors.keys().map(String::as_str).collect();
    for ((name, weight), stored) in weights.iter().zip(&stored) {
        // Equal bytes under another name are stored once, and found.
        let Some(back) = source.tensors.get(name) else {
            assert!(stored.tensors()[0].same_as.is_some(), "{name} is not in {names:?}");
            continue;
        };
        assert_eq!(format!("{back:?}"), format!("{weight:?}"), "{name}");
        assert_eq!(back.materialize().unwrap(), weight.materialize().unwrap(), "{name}");
        for ((_, part), (_, expected)) in back.stored_parts("").into_iter().zip(weight.stored_parts("")) {
            assert_eq!(part.materialize().unwrap(), expected.materialize().unwrap(), "{name}");
        }
        assert_eq!(
            lapidary::weights::content_hash(back).unwrap(),
            stored.blake3(),
            "{name}"
        );
    }
    let hashes: std::collections::BTreeSet<String> = stored.iter().map(|s| s.blake3()).collect();
    assert_eq!(hashes.len(), stored.len(), "no two mean the same");
}

#[test]
fn bad_scales_are_named_before_anything_is_written() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.safetensors");
    let weight = Constant::quantized(
        codes(DType::U4, &[2, 32], 1).into(),
        Tensor::from_f32(vec![2, 1], &[1.0, f32::NAN]).into(),
        None,
        Granularity::Block { axis: 1, size: 32 },
    );
    let weights = [("up.weight".to_string(), weight.unwrap())];
    let error = lapidary::weights::write(&path, &weights, &BTreeMap::new(), &mut |_, _, _| Ok(()), |_| {});
    assert_eq!(
        error.unwrap_err().to_string(),
        "the quantized weight \"up.weight\": the scale at index 1 is NaN"
    );
    let weight = quantized(DType::U4, DType::F32, &[2, 32], Granularity::Tensor, false);
    let taken = Constant::tensor(Tensor::from_f32(vec![1], &[1.0]));
    let weights = [("w".to_string(), weight), ("w.scales".to_string(), taken)];
    let path = folder.path().join("other.safetensors");
    let error = lapidary::weights::write(&path, &weights, &BTreeMap::new(), &mut |_, _, _| Ok(()), |_| {});
    assert!(error.unwrap_err().to_string().contains("\"w.scales\""));
    assert!(!path.exists());
}

/// How [`quantized_model`] quantizes.
#[derive(Clone, Copy, PartialEq)]
pub enum Form {
    /// In blocks of 8 with zero points, or per channel if blocks do not divide.
    Blocks,
    /// In signed codes of 8 bits, one scale per row.
    Rows,
}

/// A model whose matrices are quantized.
pub fn quantized_model(model: &Path, form: Form) -> passes::Canonical {
    let options = passes::CanonicalizeOptions {
        max_positions: 64,
        ..passes::CanonicalizeOptions::default()
    };
    let mut canonical = passes::canonicalize(onnx::read(model).unwrap(), &options).unwrap();
    let graph = &mut canonical.graph;
    for id in graph.value_ids().collect::<Vec<_>>() {
        let Some(constant) = graph
            .constant(id)
            .filter(|c| c.shape().len() == 2 && c.dtype().is_float())
        else {
            continue;
        };
        let Some(origin) = constant.origin().map(str::to_string) else {
            continue;
        };
        let (tensor, width) = (constant.materialize().unwrap(), constant.shape()[1]);
        let in_blocks = form == Form::Blocks && width.is_multiple_of(8);
        let (granularity, run) = match in_blocks {
            true => (Granularity::Block { axis: 1, size: 8 }, 8),
            false => (Granularity::Channel { axis: 0 }, width),
        };
        let (dtype, most, zero) = match form {
            Form::Blocks => (DType::U4, 7.0, 8),
            Form::Rows => (DType::I8, 127.0, 0),
        };
        let values = tensor.to_f32();
        let blocks = values.chunks(run);
        let scales: Vec<f64> = blocks
            .clone()
            .map(|block| f64::from(block.iter().fold(1e-3f32, |largest, v| largest.max(v.abs())) / most))
            .collect();
        let shape = granularity.scale_shape(tensor.shape()).unwrap();
        let scales = Tensor::from_f64_as(tensor.dtype(), shape.clone(), &scales);
        let factors = scales.to_f32();
        let rounded = blocks.zip(&factors);
        let codes: Vec<i64> = rounded
            .flat_map(|(block, scale)| {
                block
                    .iter()
                    .map(move |v| (v / scale).round().clamp(-most, most) as i64 + zero)
            })
            .collect();
        let part = |tensor: Tensor, part: &str| Constant::tensor(tensor).with_origin(&format!("{origin}.{part}"));
        let zeros = Tensor::from_i64_as(dtype, shape.clone(), &vec![zero; factors.len()]);
        let weight = Constant::quantized(
            part(Tensor::from_i64_as(dtype, tensor.shape().to_vec(), &codes), "q"),
            part(scales, "s"),
            (zero != 0).then(|| part(zeros, "z")),
            granularity,
        );
        graph.set_constant(id, weight.unwrap());
    }
    canonical
}

pub fn write(target: &Path, canonical: &passes::Canonical) -> Result<Manifest, PackageError> {
    let header = ManifestHeader {
        source: ExportFile {
            file: "model.onnx".into(),
            blake3: "0".repeat(64),
            bytes: 1,
            exporter: "test".into(),
            producer: "test".into(),
            opsets: vec![("ai.onnx".into(), 18)],
        },
        architecture: canonical.architecture.clone(),
        dtype: DType::F32,
        targets: vec![Target::Cpu],
        weight_mode: WeightMode::Bind,
        refit: Refit::None,
        capacities: vec![16, 64],
        prefill: Prefill::Chunks(vec![8]),
        passes: Vec::new(),
        activations: Default::default(),
    };
    Writer::new(target, true, &canonical.graph, header, Allowed::default(), |_, _| {})?.finish()
}

fn parts(graph: &Graph) -> BTreeMap<String, Constant> {
    let stored = lower::stored_weights(graph).into_iter();
    stored.map(|(_, weight)| (weight.name, weight.constant)).collect()
}

#[test]
fn a_package_of_quantized_weights_is_whole_and_runs() {
    let folder = tempfile::tempdir().unwrap();
    let pkg = folder.path().join("pkg");
    let canonical = quantized_model(&fixture("exports/llama-optimum/model.onnx"), Form::Blocks);
    let manifest = write(&pkg, &canonical).unwrap();
    let quantized: Vec<_> = manifest
        .weights
        .tensors
        .iter()
        .filter(|w| w.quantized.is_some())
        .collect();
    assert!(quantized.len() > 10, "the matrices are quantized");
    for weight in &quantized {
        let elements: usize = weight.shape.iter().product();
        assert!(
            weight.bytes < elements as u64 * 2,
            "{}: {} bytes",
            weight.name,
            weight.bytes
        );
        let recipe = weight.recipe.as_ref().unwrap();
        assert_eq!(
            recipe.leaves().len(),
            3,
            "{}: codes, scales and zero points",
            weight.name
        );
    }

    let table = program(["weights", text(&pkg)]).ok();
    assert!(
        table
            .stdout
            .contains("f32 of u4 in blocks of 8 on axis 1 with zero points"),
        "{}",
        table.stdout
    );

    // Opened, every byte checked, read back unchanged.
    let package = Package::open(&pkg).unwrap();
    assert_eq!(package.manifest, manifest);
    package.check_hashes().unwrap();
    let mut graph = package.graph().unwrap();
    lapidary::graph::infer(&mut graph).unwrap();
    let (before, after) = (parts(&canonical.graph), parts(&graph));
    assert_eq!(before.keys().collect::<Vec<_>>(), after.keys().collect::<Vec<_>>());
    for (name, weight) in &before {
        assert_eq!(format!("{:?}", after[name]), format!("{weight:?}"), "{name}");
        assert_eq!(
            after[name].materialize().unwrap(),
            weight.materialize().unwrap(),
            "{name}"
        );
    }
    // A second package from the read graph has the same weights.
    let again = passes::Canonical { graph, ..canonical };
    let second = write(&folder.path().join("again"), &again).unwrap();
    let hashes = |m: &Manifest| -> BTreeMap<String, String> {
        let weights = m.weights.tensors.iter();
        weights.map(|w| (w.name.clone(), w.blake3.clone())).collect()
    };
    let (first, second) = (hashes(&manifest), hashes(&second));
    assert!(first.iter().all(|(name, hash)| second.get(name) == Some(hash)));

    // It runs with the dequantized values.
    let network = lower::lower(&again.graph, &Profile::decode(16), &lower::LowerOptions::default()).unwrap();
    assert!(network.weights.iter().any(|w| w.constant.as_quantized().is_some()));
    let answer = program([
        "generate",
        text(&pkg),
        "--prompt-ids",
        "1,2,3",
        "--max-new-tokens",
        "3",
        "--json",
    ]);
    assert_eq!(answer.status, 0, "{}", answer.stderr);

    // Stripped, it reports missing weights; a changed byte of a scale is detected.
    let stripped = folder.path().join("stripped");
    package::strip(&package, &stripped, false).unwrap();
    let architecture = Package::open(&stripped).unwrap().architecture().unwrap();
    let of = |graph: &Graph| {
        lower::weights(graph)
            .iter()
            .map(|w| format!("{:?}", w.constant))
            .collect::<Vec<_>>()
    };
    assert_eq!(of(&architecture), of(&package.architecture().unwrap()));
    let scales = quantized[0].quantized.as_ref().unwrap().parts()[1].clone();
    let file = pkg.join(&manifest.weights.file);
    let mut bytes = std::fs::read(&file).unwrap();
    bytes[scales.offset as usize] ^= 1;
    std::fs::write(&file, bytes).unwrap();
    let error = package.check_hashes().unwrap_err();
    assert!(error.to_string().contains(&quantized[0].name), "{error}");
}

/// A file's description of a quantized weight is checked when read, and refused by name.
#[test]
fn a_graph_whose_parts_do_not_fit_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.onnx");
    let weight = quantized(
        DType::U4,
        DType::F32,
        &[4, 32],
        Granularity::Block { axis: 1, size: 16 },
        false,
    );
    let mut graph = Graph::default();
    let constant = graph.add_constant("up.weight", weight);
    let output = graph.add_node("y", Op::Identity, &[constant]);
    graph.outputs.push(output);
    lapidary::graph::infer(&mut graph).unwrap();
    onnx::write(&graph, &path, None).unwrap();
    // The attribute block_size, type INT (field 20), value 16 (field 3), becomes 12.
    let mut bytes = std::fs::read(&path).unwrap();
    let name = b"block_size";
    let at = bytes.windows(name.len()).position(|w| w == name).unwrap() + name.len();
    assert_eq!(bytes[at..at + 2], [0x18, 16]);
    bytes[at + 1] = 12;
    std::fs::write(&path, bytes).unwrap();
    let message = onnx::read(&path).unwrap_err().to_string();
    assert!(
        message.contains("up.weight.dequantize") && message.contains("blocks of 12 do not divide axis 1"),
        "{message}"
    );
}
