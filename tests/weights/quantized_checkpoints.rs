//! Quantized checkpoints of Hugging Face into quantized packages: every format is packed here by its own rules, and the
//! read values must equal its formula.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use half::f16;
use lapidary::graph::{Constant, Graph, Op};
use lapidary::package::Package;
use lapidary::tensor::quantized::Granularity;
use lapidary::tensor::{DType, Tensor};
use lapidary::weights::model::NameKind;
use lapidary::{onnx, passes};
use safetensors::tensor::{Dtype, TensorView};
use serde_json::{Value, json};

use crate::nf4::NF4;
use crate::quantized::write;
use crate::refit::export;
use crate::support::{lapidary, package, text};

/// Layers of the model: module and name in a checkpoint, outputs and inputs.
const LAYERS: [(&str, &str, usize, usize); 7] = [
    ("attention.query", "self_attn.q_proj", 64, 32),
    ("attention.key", "self_attn.k_proj", 32, 32),
    ("attention.value", "self_attn.v_proj", 32, 32),
    ("attention.output", "self_attn.o_proj", 32, 64),
    ("feed_forward.gate", "mlp.gate_proj", 48, 32),
    ("feed_forward.up", "mlp.up_proj", 48, 32),
    ("feed_forward.down", "mlp.down_proj", 32, 48),
];

/// Pseudorandom numbers below `range` from a seed.
fn numbers(count: usize, range: u64, seed: u64) -> Vec<u32> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        ((state >> 20) % range) as u32
    };
    (0..count).map(|_| next()).collect()
}

/// The values of a checkpoint's layer.
#[derive(Clone)]
struct Layer {
    out: usize,
    depth: usize,
    bits: usize,
    /// Inputs that share a scale.
    group: usize,
    /// `[out, depth]`, from 0.
    codes: Vec<u32>,
    /// `[out, groups]`, from 0.
    zeros: Vec<u32>,
    /// `[out, groups]`, numbers that f16 has.
    scales: Vec<f32>,
}

impl Layer {
    fn new(out: usize, depth: usize, bits: usize, group: usize, symmetric: bool, seed: u64) -> Layer {
        let (range, groups) = (1u64 << bits, out * depth / group);
        let middle = 1 << (bits - 1);
        Layer {
            out,
            depth,
            bits,
            group,
            codes: numbers(out * depth, range, seed),
            // GPTQ's first form has no zero point 0.
            zeros: match symmetric {
                true => vec![middle; groups],
                false => numbers(groups, range - 1, seed + 100).iter().map(|z| z + 1).collect(),
            },
            scales: numbers(groups, 1000, seed + 200)
                .iter()
                .map(|s| f16::from_f32(0.001 + *s as f32 / 50_000.0).to_f32())
                .collect(),
        }
    }

    fn groups(&self) -> usize {
        self.depth / self.group
    }

    /// `(code - zero) * scale`.
    fn values(&self) -> Vec<f32> {
        let value = |at: usize| {
            let block = at / self.depth * self.groups() + at % self.depth / self.group;
            (self.codes[at] as f32 - self.zeros[block] as f32) * self.scales[block]
        };
        (0..self.out * self.depth).map(value).collect()
    }
}

/// `[rows, columns]` transposed.
fn turned<T: Copy>(values: &[T], columns: usize) -> Vec<T> {
    let rows = values.len() / columns;
    (0..columns)
        .flat_map(|c| (0..rows).map(move |r| values[r * columns + c]))
        .collect()
}

/// Words along rows of `columns` codes: `places[i]` is where the i-th of a word lies, in codes from the lowest bits.
fn words(codes: &[u32], columns: usize, bits: usize, places: &[usize]) -> Vec<u32> {
    let mut words = Vec::new();
    for row in codes.chunks(columns) {
        for run in row.chunks(32 / bits) {
            words.push(
                run.iter()
                    .enumerate()
                    .fold(0, |word, (i, code)| word | code << (places[i] * bits)),
            );
        }
    }
    words
}

const RISING: [usize; 16] = [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15];
/// The order in which AutoAWQ packs eight columns is 0, 2, 4, 6, 1, 3, 5, 7.
const AWQ: [usize; 8] = [0, 4, 1, 5, 2, 6, 3, 7];

#[derive(Clone)]
struct Stored {
    dtype: Dtype,
    shape: Vec<usize>,
    bytes: Vec<u8>,
}

type Checkpoint = BTreeMap<String, Stored>;

fn stored(dtype: Dtype, shape: &[usize], bytes: impl IntoIterator<Item = u8>) -> Stored {
    Stored {
        dtype,
        shape: shape.to_vec(),
        bytes: bytes.into_iter().collect(),
    }
}

fn ints(shape: &[usize], values: &[u32]) -> Stored {
    stored(Dtype::I32, shape, values.iter().flat_map(|v| v.to_le_bytes()))
}

fn halves(shape: &[usize], values: &[f32]) -> Stored {
    stored(
        Dtype::F16,
        shape,
        values.iter().flat_map(|v| f16::from_f32(*v).to_le_bytes()),
    )
}

fn floats(shape: &[usize], values: &[f32]) -> Stored {
    stored(Dtype::F32, shape, values.iter().flat_map(|v| v.to_le_bytes()))
}

fn save(folder: &Path, tensors: &Checkpoint, quantization: Option<Value>) -> PathBuf {
    std::fs::create_dir_all(folder).unwrap();
    let views = tensors.iter().map(|(name, t)| {
        (
            name.as_str(),
            TensorView::new(t.dtype, t.shape.clone(), &t.bytes).unwrap(),
        )
    });
    let bytes = safetensors::serialize(views, None).unwrap();
    std::fs::write(folder.join("model.safetensors"), bytes).unwrap();
    let mut config = json!({"model_type": "llama", "num_hidden_layers": 2});
    if let Some(quantization) = quantization {
        config["quantization_config"] = quantization;
    }
    std::fs::write(folder.join("config.json"), config.to_string()).unwrap();
    folder.to_path_buf()
}

/// The group of each input of a layer whose inputs are not in the order of their groups, 16 a group.
fn scattered(depth: usize) -> Vec<usize> {
    (0..depth).map(|i| i * 7 % depth % (depth / 16)).collect()
}

/// The inputs in the order of their groups.
fn in_order(depth: usize) -> Vec<usize> {
    let groups = scattered(depth);
    let mut order: Vec<usize> = (0..depth).collect();
    order.sort_by_key(|i| groups[*i]);
    order
}

/// A gather before each product with a quantized matrix.
fn take_in_order(graph: &mut Graph) {
    for id in graph.node_ids().collect::<Vec<_>>() {
        let node = graph.node(id);
        let (Op::MatMul, Some(x), Some(turned)) = (&node.op, node.input(0), node.input(1)) else {
            continue;
        };
        let matrix = graph.def(turned).and_then(|(_, node)| graph.constant(node.input(0)?));
        let Some(depth) = matrix.filter(|c| c.as_quantized().is_some()).map(|c| c.shape()[1]) else {
            continue;
        };
        let order: Vec<i64> = in_order(depth).into_iter().map(|i| i as i64).collect();
        let name = graph.value(turned).name.clone();
        let order = graph.add_i64(&format!("{name}.order"), &order);
        let ordered = graph.add_node(&format!("{name}.ordered"), Op::Gather { axis: -1 }, &[x, order]);
        graph.node_mut(id).inputs[0] = Some(ordered);
    }
    graph.sort().unwrap();
    lapidary::graph::infer(graph).unwrap();
}

/// A quantized package of the tiny Llama, and the tensors of a checkpoint that are not quantized.
struct Scene {
    folder: tempfile::TempDir,
    pkg: PathBuf,
    plain: Checkpoint,
}

impl Scene {
    /// The layers' matrices in codes of one form; embedding, head and norms in floats.
    fn new(codes: DType, granularity: impl Fn(usize) -> Granularity, zero_points: bool) -> Scene {
        Scene::of(codes, granularity, zero_points, false)
    }

    /// The same, whose layers take their inputs in the order of groups if `in_order`.
    fn of(codes: DType, granularity: impl Fn(usize) -> Granularity, zero_points: bool, in_order: bool) -> Scene {
        let folder = tempfile::tempdir().unwrap();
        let model = export("llama-optimum");
        let float = package(folder.path(), &model, &["--capacity", "16,64"]);
        let exported = folder.path().join("plain");
        lapidary(["weights", text(&float), "--export", text(&exported)]).ok();
        let bytes = std::fs::read(exported.join("model.safetensors")).unwrap();
        let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
        let is_layer = |name: &str| name.contains("_proj.");
        let plain = file.iter().filter(|(name, _)| !is_layer(name));
        let plain = plain.map(|(name, view)| {
            let tensor = stored(view.dtype(), view.shape(), view.data().iter().copied());
            (name.to_string(), tensor)
        });
        let plain = plain.collect();

        let options = passes::CanonicalizeOptions {
            max_positions: 64,
            ..passes::CanonicalizeOptions::default()
        };
        let mut canonical = passes::canonicalize(onnx::read(&model).unwrap(), &options).unwrap();
        let graph = &mut canonical.graph;
        for id in graph.value_ids().collect::<Vec<_>>() {
            let Some(constant) = graph.constant(id) else { continue };
            let Some(origin) = constant
                .origin()
                .filter(|o| o.starts_with("onnx::MatMul"))
                .map(str::to_string)
            else {
                continue;
            };
            let shape = constant.shape().to_vec();
            if shape.contains(&97) {
                continue;
            }
            let granularity = granularity(shape[1]);
            let of = granularity.scale_shape(&shape).unwrap();
            let named = |tensor: Tensor, part: &str| Constant::tensor(tensor).with_origin(&format!("{origin}.{part}"));
            let filled = |shape: &[usize], value: f64| match codes.is_float_format() {
                true => Tensor::from_f64_as(codes, shape.to_vec(), &vec![value; shape.iter().product()]),
                false => Tensor::from_i64_as(codes, shape.to_vec(), &vec![value as i64; shape.iter().product()]),
            };
            let scales = Tensor::from_f32(of.clone(), &vec![0.5; of.iter().product()]);
            let weight = Constant::quantized(
                named(filled(&shape, 1.0), "codes"),
                named(scales, "scales"),
                zero_points.then(|| named(filled(&of, 1.0), "zeros")),
                granularity,
            );
            graph.set_constant(id, weight.unwrap());
        }
        if in_order {
            take_in_order(graph);
        }
        let pkg = folder.path().join("quantized");
        write(&pkg, &canonical).unwrap();
        Scene { folder, pkg, plain }
    }

    /// The plain tensors, and the result of `pack` for each layer.
    fn checkpoint(&self, pack: impl Fn(&str, usize, usize, u64) -> Checkpoint) -> Checkpoint {
        let mut tensors = self.plain.clone();
        for n in 0..2 {
            for (i, (_, name, out, depth)) in LAYERS.into_iter().enumerate() {
                let layer = format!("model.layers.{n}.{name}");
                tensors.extend(pack(&layer, out, depth, (n * 10 + i) as u64 + 1));
            }
        }
        tensors
    }

    fn save(&self, name: &str, tensors: &Checkpoint, config: Value) -> PathBuf {
        save(&self.folder.path().join(name), tensors, Some(config))
    }

    /// The whole message and help of a refused refit; the package is unchanged.
    fn refused(&self, name: &str, tensors: &Checkpoint, config: Value) -> String {
        let from = self.save(name, tensors, config);
        let before = std::fs::read(self.pkg.join("manifest.json")).unwrap();
        let (message, help) = lapidary(["refit", text(&self.pkg), "--from", text(&from)]).refused();
        assert_eq!(std::fs::read(self.pkg.join("manifest.json")).unwrap(), before);
        format!("{message}\n{help}")
    }

    /// Refits and compares every layer with its formula.
    fn refitted(&self, from: &Path, values: impl Fn(usize, usize, u64) -> Vec<f32>) {
        let forms = |pkg: &Package| -> Vec<Option<String>> {
            let weights = pkg.manifest.weights.tensors.iter();
            weights.map(|w| w.quantized.as_ref().map(|q| q.to_string())).collect()
        };
        let before = forms(&Package::open(&self.pkg).unwrap());
        lapidary(["refit", text(&self.pkg), "--from", text(from)]).ok();
        let package = Package::open(&self.pkg).unwrap();
        package.check_hashes().unwrap();
        assert_eq!(forms(&package), before, "the form stays");
        let weights = package.model_weights().unwrap();
        for n in 0..2 {
            for (i, (module, _, out, depth)) in LAYERS.into_iter().enumerate() {
                let module = format!("layers.{n}.{module}.weight");
                let (_, constant) = weights.tensor(NameKind::Module, &module).unwrap().unwrap();
                assert!(constant.as_quantized().is_some(), "{module}");
                let found = constant.materialize().unwrap().to_f32();
                assert_eq!(found, values(out, depth, (n * 10 + i) as u64 + 1), "{module}");
            }
        }
        let checked = lapidary(["weights", text(&self.pkg), "--check", text(from), "--json"])
            .ok()
            .json();
        assert_eq!(checked["identical"], true, "{checked}");
        // And it runs.
        let prompt = ["--prompt-ids", "1,2,3", "--max-new-tokens", "2", "--temperature", "0"];
        lapidary([&["generate", text(&self.pkg)], &prompt[..]].concat()).ok();
    }
}

fn blocks(size: usize) -> impl Fn(usize) -> Granularity {
    move |_| Granularity::Block { axis: 1, size }
}

fn rows() -> impl Fn(usize) -> Granularity {
    |_| Granularity::Channel { axis: 0 }
}

fn gptq_layer(layer: &Layer, name: &str, stored_less: u32) -> Checkpoint {
    let (out, depth, bits, groups) = (layer.out, layer.depth, layer.bits, layer.groups());
    let each = 32 / bits;
    // Words along the inputs: the transposed matrix in rows of inputs, then transposed as words.
    let qweight = words(&layer.codes, depth, bits, &RISING);
    let zeros: Vec<u32> = turned(&layer.zeros, groups).iter().map(|z| z - stored_less).collect();
    let index: Vec<u32> = (0..depth).map(|i| (i / layer.group) as u32).collect();
    Checkpoint::from([
        (
            format!("{name}.qweight"),
            ints(&[depth / each, out], &turned(&qweight, depth / each)),
        ),
        (
            format!("{name}.qzeros"),
            ints(&[groups, out / each], &words(&zeros, out, bits, &RISING)),
        ),
        (
            format!("{name}.scales"),
            halves(&[groups, out], &turned(&layer.scales, groups)),
        ),
        (format!("{name}.g_idx"), ints(&[depth], &index)),
    ])
}

fn gptq_config(bits: usize, group: i64) -> Value {
    json!({"quant_method": "gptq", "bits": bits, "group_size": group, "desc_act": false, "sym": false,
        "damp_percent": 0.1, "true_sequential": true, "static_groups": false, "checkpoint_format": "gptq",
        "meta": {"quantizer": ["gptqmodel:2.0.0"]}, "model_file_base_name": null})
}

#[test]
fn gptq() {
    let scene = Scene::new(DType::U4, blocks(16), true);
    let layer = |out, depth, seed| Layer::new(out, depth, 4, 16, false, seed);
    let tensors = scene.checkpoint(|name, out, depth, seed| gptq_layer(&layer(out, depth, seed), name, 1));
    let from = scene.save("v1", &tensors, gptq_config(4, 16));
    scene.refitted(&from, |out, depth, seed| layer(out, depth, seed).values());

    // The second form stores zero points as they are; without `g_idx` groups are runs.
    let other = |out, depth, seed| layer(out, depth, seed + 40);
    let mut tensors = scene.checkpoint(|name, out, depth, seed| gptq_layer(&other(out, depth, seed), name, 0));
    tensors.retain(|name, _| !name.ends_with(".g_idx"));
    let mut config = gptq_config(4, 16);
    config["checkpoint_format"] = json!("gptq_v2");
    let from = scene.save("v2", &tensors, config);
    scene.refitted(&from, |out, depth, seed| other(out, depth, seed).values());
}

/// A symmetric checkpoint fits a package of signed codes without zero points, and one group a row is a channel.
#[test]
fn gptq_of_8_bits_into_channels_of_signed_codes() {
    let scene = Scene::new(DType::I8, rows(), false);
    let layer = |out, depth, seed| Layer::new(out, depth, 8, depth, true, seed);
    let tensors = scene.checkpoint(|name, out, depth, seed| gptq_layer(&layer(out, depth, seed), name, 1));
    let from = scene.save("symmetric", &tensors, gptq_config(8, -1));
    scene.refitted(&from, |out, depth, seed| layer(out, depth, seed).values());

    let skewed = |out, depth, seed| Layer::new(out, depth, 8, depth, false, seed);
    let tensors = scene.checkpoint(|name, out, depth, seed| gptq_layer(&skewed(out, depth, seed), name, 1));
    let refused = scene.refused("skewed", &tensors, gptq_config(8, -1));
    assert!(
        refused.contains("model.layers.0.self_attn.q_proj.weight for")
            && refused.contains(
                "of u8 in blocks of 32 on axis 1 with zero points, and the package's is i8 per channel of axis 0"
            ),
        "{refused}"
    );
}

#[test]
fn awq() {
    let scene = Scene::new(DType::U4, blocks(16), true);
    let layer = |out, depth, seed| Layer::new(out, depth, 4, 16, false, seed);
    let pack = |name: &str, out: usize, depth: usize, seed: u64| {
        let layer = layer(out, depth, seed);
        let groups = layer.groups();
        let codes = turned(&layer.codes, depth);
        Checkpoint::from([
            (
                format!("{name}.qweight"),
                ints(&[depth, out / 8], &words(&codes, out, 4, &AWQ)),
            ),
            (
                format!("{name}.qzeros"),
                ints(&[groups, out / 8], &words(&turned(&layer.zeros, groups), out, 4, &AWQ)),
            ),
            (
                format!("{name}.scales"),
                halves(&[groups, out], &turned(&layer.scales, groups)),
            ),
        ])
    };
    let config = json!({"quant_method": "awq", "bits": 4, "group_size": 16, "zero_point": true, "version": "gemm",
        "modules_to_not_convert": null});
    let tensors = scene.checkpoint(pack);
    let from = scene.save("awq", &tensors, config.clone());
    scene.refitted(&from, |out, depth, seed| layer(out, depth, seed).values());

    let with = |field: &str, value: Value| {
        let mut config = config.clone();
        config[field] = value;
        config
    };
    for (config, expected) in [
        (
            with("version", json!("gemv")),
            "quantization_config: version \"gemv\" is not read",
        ),
        (with("bits", json!(3)), "quantization_config: bits is 3"),
        (
            with("rotate", json!(true)),
            "quantization_config: rotate is true, and what it means is not known",
        ),
        (
            with("quant_method", json!("quip")),
            "quantization_config: quant_method \"quip\" is not read",
        ),
        (
            with("group_size", json!(20)),
            "groups of 20 do not divide its 48 inputs",
        ),
        (
            with("group_size", json!(24)),
            "scales has the shape [3, 32], and must have [2, 32]",
        ),
    ] {
        let refused = scene.refused("bad", &tensors, config);
        assert!(refused.contains(expected), "{refused}");
    }
    let mut short = tensors.clone();
    short.remove("model.layers.1.mlp.up_proj.qzeros");
    let refused = scene.refused("short", &short, config.clone());
    assert!(
        refused.contains("model.layers.1.mlp.up_proj: \"model.layers.1.mlp.up_proj.qzeros\" is missing"),
        "{refused}"
    );
    // Another group than the package's: both are named.
    let wide = Scene::new(DType::U4, |_| Granularity::Block { axis: 1, size: 8 }, true);
    let refused = wide.refused("wide", &tensors, config);
    assert!(
        refused.contains(
            "u4 in blocks of 16 on axis 1 with zero points, and the package's is u4 in blocks of 8 on axis 1"
        ),
        "{refused}"
    );
    // Nothing says how it is quantized.
    let bare = save(&scene.folder.path().join("bare"), &tensors, None);
    let (message, help) = lapidary(["refit", text(&scene.pkg), "--from", text(&bare)]).refused();
    assert!(
        message.contains("no quantization_config says how") && help.contains("config.json"),
        "{message}"
    );
}

#[test]
fn gptq_that_cannot_be_read_is_named() {
    let scene = Scene::new(DType::U4, blocks(16), true);
    let layer = |out, depth, seed| Layer::new(out, depth, 4, 16, false, seed);
    let tensors = scene.checkpoint(|name, out, depth, seed| gptq_layer(&layer(out, depth, seed), name, 1));
    let with = |field: &str, value: Value| {
        let mut config = gptq_config(4, 16);
        config[field] = value;
        config
    };
    for (config, expected) in [
        (with("bits", json!(3)), "quantization_config: bits is 3"),
        (
            with("checkpoint_format", json!("marlin")),
            "checkpoint_format \"marlin\" is not read",
        ),
        (
            with("is_marlin_format", json!(true)),
            "checkpoint_format \"marlin\" is not read",
        ),
        (with("pack_dtype", json!("int8")), "pack_dtype \"int8\" is not read"),
        (
            with("dynamic", json!({"+:.*down.*": {"bits": 8}})),
            "dynamic has \"+:.*down.*\"",
        ),
        (with("codebook", json!("E8P12")), "codebook is \"E8P12\""),
    ] {
        let refused = scene.refused("bad", &tensors, config);
        assert!(refused.contains(expected), "{refused}");
    }
    let changed = |name: &str, change: &dyn Fn(&mut Stored)| {
        let mut tensors = tensors.clone();
        change(tensors.get_mut(name).unwrap());
        scene.refused("changed", &tensors, gptq_config(4, 16))
    };
    let layer = "model.layers.0.mlp.down_proj";
    // The first zero point stored as 15, which would be 16.
    let refused = changed(&format!("{layer}.qzeros"), &|t| t.bytes[0] |= 0xf);
    assert!(
        refused.contains(&format!("{layer}: qzeros has the zero point 16 at 0")),
        "{refused}"
    );
    let refused = changed(&format!("{layer}.g_idx"), &|t| t.bytes[4] = 7);
    assert!(
        refused.contains(&format!("{layer}: g_idx has the group 7 at 1, and there are 3")),
        "{refused}"
    );
    let refused = changed(&format!("{layer}.g_idx"), &|t| t.bytes[0] = 1);
    assert!(
        refused.contains(&format!("{layer}: g_idx has 15 inputs in group 0, not 16")),
        "{refused}"
    );
    // Inputs in another order: the package's layers take theirs as they come.
    let refused = changed(&format!("{layer}.g_idx"), &|t| {
        let ids: Vec<u32> = (0..48).map(|i| (i % 3) as u32).collect();
        t.bytes = ids.iter().flat_map(|i| i.to_le_bytes()).collect();
    });
    assert!(
        refused.contains(&format!("{layer}.weight for"))
            && refused.contains("its columns are in an order of their own (act-order)"),
        "{refused}"
    );
    let refused = changed(&format!("{layer}.scales"), &|t| {
        t.bytes[0..2].copy_from_slice(&f16::NAN.to_le_bytes());
    });
    assert!(refused.contains("the scale at index 0 is NaN"), "{refused}");
}

#[test]
fn compressed_tensors() {
    let group = |bits: usize, symmetric: bool, kind: &str, strategy: &str, size: Value| {
        json!({"quant_method": "compressed-tensors", "format": "pack-quantized", "quantization_status": "compressed",
            "ignore": ["lm_head"], "kv_cache_scheme": null, "sparsity_config": {}, "transform_config": {},
            "global_compression_ratio": null, "version": "0.11.0",
            "config_groups": {"group_0": {"targets": ["Linear"], "input_activations": null, "output_activations": null,
                "weights": {"num_bits": bits, "type": kind, "symmetric": symmetric, "strategy": strategy, "group_size": size,
                    "actorder": null, "block_structure": null, "dynamic": false, "observer": "minmax",
                    "observer_kwargs": {}}}}})
    };
    // Packed, asymmetric.
    let scene = Scene::new(DType::U4, blocks(16), true);
    let layer = |out, depth, seed| Layer::new(out, depth, 4, 16, false, seed);
    let packed = |layer: &Layer, name: &str| {
        let (out, depth, groups) = (layer.out, layer.depth, layer.groups());
        let shape = [out as i64, depth as i64].into_iter().flat_map(|n| n.to_le_bytes());
        let mut tensors = Checkpoint::from([
            (
                format!("{name}.weight_packed"),
                ints(&[out, depth / 8], &words(&layer.codes, depth, 4, &RISING)),
            ),
            (format!("{name}.weight_shape"), stored(Dtype::I64, &[2], shape)),
            (format!("{name}.weight_scale"), halves(&[out, groups], &layer.scales)),
        ]);
        if layer.zeros.iter().any(|z| *z != 8) {
            // Packed along the outputs.
            let zeros = words(&turned(&layer.zeros, groups), out, 4, &RISING);
            tensors.insert(
                format!("{name}.weight_zero_point"),
                ints(&[out / 8, groups], &turned(&zeros, out / 8)),
            );
        }
        tensors
    };
    let config = group(4, false, "int", "group", json!(16));
    let tensors = scene.checkpoint(|name, out, depth, seed| packed(&layer(out, depth, seed), name));
    let from = scene.save("packed", &tensors, config.clone());
    scene.refitted(&from, |out, depth, seed| layer(out, depth, seed).values());
    let refuse = |change: &dyn Fn(&mut Value)| {
        let mut config = config.clone();
        change(&mut config);
        scene.refused("bad", &tensors, config)
    };
    for (refused, expected) in [
        (refuse(&|c| c["format"] = json!("marlin-24")), "format is \"marlin-24\""),
        (
            refuse(&|c| c["kv_cache_scheme"] = json!({"num_bits": 8})),
            "kv_cache_scheme is",
        ),
        (
            refuse(&|c| c["sparsity_config"] = json!({"format": "sparse-24-bitmask"})),
            "sparsity_config is",
        ),
        (
            refuse(&|c| c["config_groups"]["group_0"]["input_activations"] = json!({"num_bits": 8, "dynamic": false})),
            "input_activations is",
        ),
        (
            refuse(&|c| c["config_groups"]["group_0"]["weights"]["strategy"] = json!("block")),
            "weights.strategy is \"block\"",
        ),
        (
            refuse(&|c| c["config_groups"]["group_0"]["weights"]["num_bits"] = json!(3)),
            "weights.num_bits is 3",
        ),
    ] {
        assert!(refused.contains(expected), "{refused}");
    }

    // Packed and symmetric, into signed codes.
    let scene = Scene::new(DType::I4, blocks(16), false);
    let layer = |out, depth, seed| Layer::new(out, depth, 4, 16, true, seed);
    let tensors = scene.checkpoint(|name, out, depth, seed| packed(&layer(out, depth, seed), name));
    let from = scene.save("symmetric", &tensors, group(4, true, "int", "group", json!(16)));
    scene.refitted(&from, |out, depth, seed| layer(out, depth, seed).values());
}

#[test]
fn compressed_tensors_of_whole_bytes() {
    let config = |format: &str, kind: &str| {
        json!({"quant_method": "compressed-tensors", "format": format, "quantization_status": "compressed",
            "config_groups": {"group_0": {"targets": ["Linear"],
                "input_activations": {"num_bits": 8, "type": kind, "dynamic": true, "strategy": "token", "symmetric": true},
                "weights": {"num_bits": 8, "type": kind, "symmetric": true, "strategy": "channel", "dynamic": false}}}})
    };
    let bytes = |name: &str, dtype: Dtype, shape: [usize; 2], codes: Vec<u8>, scales: &[f32]| {
        Checkpoint::from([
            (format!("{name}.weight"), stored(dtype, &shape, codes)),
            (format!("{name}.weight_scale"), halves(&[shape[0], 1], scales)),
        ])
    };
    let scene = Scene::new(DType::I8, rows(), false);
    let layer = |out, depth, seed| Layer::new(out, depth, 8, depth, true, seed);
    let tensors = scene.checkpoint(|name, out, depth, seed| {
        let layer = layer(out, depth, seed);
        let codes = layer
            .codes
            .iter()
            .map(|code| (*code as i32 - 128) as i8 as u8)
            .collect();
        bytes(name, Dtype::I8, [out, depth], codes, &layer.scales)
    });
    let from = scene.save("ints", &tensors, config("int-quantized", "int"));
    scene.refitted(&from, |out, depth, seed| layer(out, depth, seed).values());

    let scene = Scene::new(DType::F8E4M3Fn, rows(), false);
    // Sign, four bits of exponent with the bias 7, three of mantissa; NaN is left out.
    let codes = |out: usize, depth: usize, seed: u64| -> Vec<u8> {
        let codes = numbers(out * depth, 255, seed).into_iter();
        codes.map(|code| if code == 127 { 0 } else { code as u8 }).collect()
    };
    let value = |code: u8| {
        let (exponent, mantissa) = (i32::from(code >> 3 & 15), f32::from(code & 7));
        let magnitude = match exponent {
            0 => mantissa / 8.0 * 2f32.powi(-6),
            _ => (1.0 + mantissa / 8.0) * 2f32.powi(exponent - 7),
        };
        if code > 127 { -magnitude } else { magnitude }
    };
    let tensors = scene.checkpoint(|name, out, depth, seed| {
        let scales = layer(out, depth, seed).scales;
        bytes(name, Dtype::F8_E4M3, [out, depth], codes(out, depth, seed), &scales)
    });
    let from = scene.save("floats", &tensors, config("float-quantized", "float"));
    scene.refitted(&from, |out, depth, seed| {
        let scales = layer(out, depth, seed).scales;
        let codes = codes(out, depth, seed).into_iter().enumerate();
        codes.map(|(i, code)| value(code) * scales[i / depth]).collect()
    });
}

#[test]
fn bitsandbytes_in_8_bits() {
    let scene = Scene::new(DType::I8, rows(), false);
    let layer = |out, depth, seed| Layer::new(out, depth, 8, depth, true, seed);
    let tensors = scene.checkpoint(|name, out, depth, seed| {
        let layer = layer(out, depth, seed);
        let codes = layer.codes.iter().map(|code| (*code as i32 - 128) as i8 as u8);
        Checkpoint::from([
            (format!("{name}.weight"), stored(Dtype::I8, &[out, depth], codes)),
            (format!("{name}.SCB"), floats(&[out], &layer.scales)),
            (format!("{name}.weight_format"), stored(Dtype::U8, &[], [0])),
        ])
    });
    let config = json!({"quant_method": "bitsandbytes", "load_in_8bit": true, "load_in_4bit": false,
        "llm_int8_threshold": 6.0, "llm_int8_skip_modules": null, "bnb_4bit_quant_storage": "uint8"});
    let from = scene.save("int8", &tensors, config);
    scene.refitted(&from, |out, depth, seed| {
        let layer = layer(out, depth, seed);
        let codes = layer.codes.iter().enumerate();
        // A code is a 127th of the largest magnitude of its row.
        codes
            .map(|(i, code)| (*code as f32 - 128.0) * (layer.scales[i / depth] / 127.0))
            .collect()
    });
}

#[test]
fn an_adapter_on_codes_is_refused_by_name() {
    let scene = Scene::new(DType::U4, blocks(16), true);
    let layer = |out, depth, seed| Layer::new(out, depth, 4, 16, false, seed);
    let tensors = scene.checkpoint(|name, out, depth, seed| gptq_layer(&layer(out, depth, seed), name, 1));
    let from = scene.save("base", &tensors, gptq_config(4, 16));
    let adapter = scene.folder.path().join("adapter");
    let layers = [("model.layers.1.self_attn.q_proj", 64, 32)];
    let config = r#"{"peft_type": "LORA", "r": 2, "lora_alpha": 6, "target_modules": ["q_proj"]}"#;
    crate::lora::adapter(&adapter, &layers, config);
    for source in [&from, &scene.pkg] {
        let args = [
            "refit",
            text(&scene.pkg),
            "--from",
            text(source),
            "--lora",
            text(&adapter),
        ];
        let (message, _) = lapidary(args).refused();
        assert!(
            message.contains("the adapter changes")
                && message.contains(" of u4 in blocks of 16 on axis 1 with zero points)"),
            "{message}"
        );
        assert!(
            !message.contains("which is no module") && !message.contains("not used"),
            "{message}"
        );
    }
}

/// Columns are in the order of their groups, like the inputs of the package's layers.
#[test]
fn gptq_in_another_order() {
    let scene = Scene::of(DType::U4, blocks(16), true, true);
    let layer = |out, depth, seed| Layer::new(out, depth, 4, 16, false, seed);
    let pack = |name: &str, out: usize, depth: usize, seed: u64| {
        let mut tensors = gptq_layer(&layer(out, depth, seed), name, 1);
        let groups: Vec<u32> = scattered(depth).into_iter().map(|g| g as u32).collect();
        tensors.insert(format!("{name}.g_idx"), ints(&[depth], &groups));
        tensors
    };
    let mut config = gptq_config(4, 16);
    config["desc_act"] = json!(true);
    let tensors = scene.checkpoint(pack);
    let from = scene.save("ordered", &tensors, config.clone());
    scene.refitted(&from, |out, depth, seed| {
        let (layer, groups, order) = (layer(out, depth, seed), scattered(depth), in_order(depth));
        let value = |row: usize, input: usize| {
            let group = row * layer.groups() + groups[input];
            (layer.codes[row * depth + input] as f32 - layer.zeros[group] as f32) * layer.scales[group]
        };
        (0..out)
            .flat_map(|row| order.iter().map(move |input| (row, *input)))
            .map(|(row, input)| value(row, input))
            .collect()
    });
    // Another order, or none, does not fit this package.
    let other = |groups: &dyn Fn(usize) -> Vec<u32>| {
        let mut tensors = tensors.clone();
        let name = "model.layers.0.mlp.down_proj.g_idx";
        tensors.insert(name.to_string(), ints(&[48], &groups(48)));
        scene.refused("other", &tensors, config.clone())
    };
    let refused = other(&|depth| (0..depth).map(|i| ((i + 1) % 3) as u32).collect());
    assert!(
        refused.contains("model.layers.0.mlp.down_proj.weight for")
            && refused.contains("its columns are in another order"),
        "{refused}"
    );
    let refused = other(&|depth| (0..depth).map(|i| (i / 16) as u32).collect());
    assert!(refused.contains("its columns are as the inputs come"), "{refused}");
    // The same matrices do not fit a package whose layers take inputs in their original order either.
    let plain = Scene::new(DType::U4, blocks(16), true);
    let (message, _) = lapidary(["refit", text(&scene.pkg), "--from", text(&plain.pkg)]).refused();
    assert!(message.contains("its columns are as the inputs come"), "{message}");
}

#[test]
fn bitsandbytes_in_4_bits() {
    let scene = Scene::new(DType::Nf4, blocks(16), false);
    let layer = |out, depth, seed| Layer::new(out, depth, 4, 16, true, seed);
    let state = |layer: &Layer, more: Value| {
        let mut state =
            json!({"quant_type": "nf4", "blocksize": 16, "dtype": "float16", "shape": [layer.out, layer.depth]});
        state.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        let bytes = state.to_string().into_bytes();
        stored(Dtype::U8, &[bytes.len()], bytes)
    };
    // The first of two codes is in the high half.
    let common = |layer: &Layer, name: &str, more: Value| {
        let bytes: Vec<u8> = layer
            .codes
            .chunks(2)
            .map(|pair| (pair[0] << 4 | pair[1]) as u8)
            .collect();
        Checkpoint::from([
            (format!("{name}.weight"), stored(Dtype::U8, &[bytes.len(), 1], bytes)),
            (format!("{name}.weight.quant_map"), floats(&[16], &NF4)),
            (
                format!("{name}.weight.quant_state.bitsandbytes__nf4"),
                state(layer, more),
            ),
        ])
    };
    let config = json!({"quant_method": "bitsandbytes", "load_in_4bit": true, "_load_in_4bit": true, "_load_in_8bit": false,
        "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": false, "bnb_4bit_compute_dtype": "bfloat16",
        "bnb_4bit_quant_storage": "uint8", "llm_int8_threshold": 6.0});
    let value = |layer: &Layer, scale: &dyn Fn(usize) -> f32| -> Vec<f32> {
        let codes = layer.codes.iter().enumerate();
        codes.map(|(i, code)| NF4[*code as usize] * scale(i / 16)).collect()
    };
    let tensors = scene.checkpoint(|name, out, depth, seed| {
        let layer = layer(out, depth, seed);
        let mut tensors = common(&layer, name, json!({}));
        tensors.insert(
            format!("{name}.weight.absmax"),
            floats(&[layer.scales.len()], &layer.scales),
        );
        tensors
    });
    let from = scene.save("nf4", &tensors, config.clone());
    scene.refitted(&from, |out, depth, seed| {
        let layer = layer(out, depth, seed);
        value(&layer, &|block| layer.scales[block])
    });
    // Another table is other weights.
    let mut other = tensors.clone();
    let map = other.get_mut("model.layers.1.mlp.up_proj.weight.quant_map").unwrap();
    map.bytes[4..8].copy_from_slice(&(-0.7f32).to_le_bytes());
    let refused = scene.refused("table", &other, config.clone());
    assert!(
        refused.contains("model.layers.1.mlp.up_proj: quant_map has -0.7 for code 1"),
        "{refused}"
    );

    // Double quantization: scales of 8 bits by a table, in blocks of 32, plus an offset.
    let map: Vec<f32> = (0..256).map(|i| i as f32 / 128.0 - 1.0).collect();
    let nested = |blocks: usize, seed: u64| {
        let codes = numbers(blocks, 256, seed + 300);
        let largest: Vec<f32> = (0..blocks.div_ceil(32)).map(|i| 0.5 + i as f32).collect();
        (codes, largest)
    };
    let tensors = scene.checkpoint(|name, out, depth, seed| {
        let layer = layer(out, depth, seed);
        let (codes, largest) = nested(layer.scales.len(), seed);
        let more = json!({"nested_blocksize": 32, "nested_dtype": "float32", "nested_offset": 9.5});
        let mut tensors = common(&layer, name, more);
        let codes: Vec<u8> = codes.iter().map(|code| *code as u8).collect();
        tensors.insert(
            format!("{name}.weight.absmax"),
            stored(Dtype::U8, &[codes.len()], codes),
        );
        tensors.insert(
            format!("{name}.weight.nested_absmax"),
            floats(&[largest.len()], &largest),
        );
        tensors.insert(format!("{name}.weight.nested_quant_map"), floats(&[256], &map));
        tensors
    });
    let from = scene.save("double", &tensors, config);
    scene.refitted(&from, |out, depth, seed| {
        let layer = layer(out, depth, seed);
        let (codes, largest) = nested(layer.scales.len(), seed);
        value(&layer, &|block| map[codes[block] as usize] * largest[block / 32] + 9.5)
    });
}

/// The weightless workflow of docs/guides/weights.md, in int8 on a small GPT-J: a package of codes, pruned, refitted from its own
/// weights as a checkpoint, and verified on a task.
#[test]
fn pruned_refitted_and_verified_on_a_task() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    let canonical = crate::quantized::quantized_model(
        &crate::support::fixture("families/optimum-gptj2048/model.onnx"),
        crate::quantized::Form::Rows,
    );
    let model = at("model.onnx");
    onnx::write(&canonical.graph, &model, None).unwrap();
    let tokenizer = crate::support::fixture("smollm2");
    let full = package(
        folder.path(),
        &model,
        &["--capacity", "32", "--tokenizer", text(&tokenizer)],
    );
    let evaluate = |pkg: &Path, task: &Path, flags: &[&str]| {
        let args = [
            "evaluate",
            text(pkg),
            "--task",
            text(task),
            "--max-new-tokens",
            "4",
            "--ignore-eos",
        ];
        lapidary([&args, flags].concat())
    };
    // The refitted package must give the original's answers.
    let task = at("task.jsonl");
    let lines = |reference: &dyn Fn(usize) -> String| -> String {
        let line = |(i, prompt): (usize, &str)| json!({"prompt": prompt, "reference": reference(i)}).to_string() + "\n";
        ["31415", "27182", "14142"].into_iter().enumerate().map(line).collect()
    };
    std::fs::write(&task, lines(&|_| "unknown".into())).unwrap();
    let answers = evaluate(&full, &task, &["--json"]).ok().json();
    let answer = |i: usize| answers["lines"][i]["text"].as_str().unwrap().to_string();
    std::fs::write(&task, lines(&answer)).unwrap();

    let bare = at("bare");
    lapidary(["strip", text(&full), "-o", text(&bare)]).ok();
    let (message, _) = evaluate(&bare, &task, &[]).refused();
    assert!(message.contains("bare"), "{message}");
    let checkpoint = at("checkpoint");
    lapidary(["weights", text(&full), "--export", text(&checkpoint)]).ok();
    lapidary(["refit", text(&bare), "--from", text(&checkpoint), "--mode", "identical"]).ok();
    evaluate(&bare, &task, &["--threshold", "exact_match=1"]).ok();
}
