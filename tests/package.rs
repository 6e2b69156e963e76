//! The package on disk: it can be read back, by Lapidary and by any safetensors reader.

use std::collections::BTreeMap;
use std::path::Path;

use lapidary::graph::Graph;
use lapidary::interface::Role;
use lapidary::network::{Profile, Tokens, WeightMode};
use lapidary::package::manifest::{EngineEntry, ExportFile};
use lapidary::package::{Manifest, ManifestHeader, Package, PackageError, Writer};
use lapidary::target::{Prefill, Refit, Target};
use lapidary::tensor::DType;
use lapidary::weights::checks::Allowed;
use lapidary::{lower, onnx, passes};

fn canonical(export: &str) -> passes::Canonical {
    let model = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("fixtures/exports")
        .join(export)
        .join("model.onnx");
    let options = passes::CanonicalizeOptions {
        max_positions: 64,
        ..passes::CanonicalizeOptions::default()
    };
    passes::canonicalize(onnx::read(model).unwrap(), &options).unwrap()
}

fn facts(canonical: &passes::Canonical) -> ManifestHeader {
    ManifestHeader {
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
    }
}

fn write(target: &Path, force: bool, canonical: &passes::Canonical) -> Result<Manifest, PackageError> {
    Writer::new(
        target,
        force,
        &canonical.graph,
        facts(canonical),
        Allowed::default(),
        |_, _| {},
    )?
    .finish()
}

/// Every weight of the graph by name, as f32.
fn weights(graph: &Graph) -> BTreeMap<String, Vec<f32>> {
    let list = lower::weights(graph).into_iter();
    list.map(|w| (w.name, w.constant.materialize().unwrap().to_f32()))
        .collect()
}

/// The folders of all exports that have a model.
fn exports() -> Vec<String> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/exports");
    let folders = std::fs::read_dir(root).unwrap().map(|entry| entry.unwrap().path());
    let with_model = folders.filter(|folder| folder.join("reference.json").exists());
    let mut names: Vec<String> = with_model
        .map(|folder| folder.file_name().unwrap().to_string_lossy().into_owned())
        .collect();
    names.sort();
    assert!(names.len() > 40, "{names:?}");
    names
}

/// Passes create the interface; the manifest, the graph read back from ONNX and every network have the same one.
#[test]
fn every_level_has_the_same_interface() {
    for export in exports() {
        let folder = tempfile::tempdir().unwrap();
        let pkg = folder.path().join("pkg");
        let canonical = canonical(&export);
        let interface = canonical.graph.interface.as_ref().unwrap();
        let expected = interface.signature();
        let architecture = &canonical.architecture;
        assert_eq!(expected.caches.len(), 2 * architecture.caches, "{export}");
        for shape in &expected.caches {
            assert_eq!(
                (shape.kv_heads, shape.dtype),
                (architecture.kv_heads, architecture.cache_dtype)
            );
        }
        let manifest = write(&pkg, false, &canonical).unwrap();
        assert_eq!(manifest.interface.as_ref(), Some(&expected), "{export}");
        let package = Package::open(&pkg).unwrap();
        for graph in [package.graph().unwrap(), package.architecture().unwrap()] {
            assert_eq!(graph.interface.as_ref().unwrap().signature(), expected, "{export}");
        }
        let graph = package.graph().unwrap();
        for profile in [Profile::decode(16), Profile::prefill(3, 24)] {
            if architecture
                .tokens
                .is_some_and(|tokens| Tokens::Static(tokens) != profile.tokens)
            {
                continue;
            }
            let network = lower::lower(&graph, &profile, &lower::LowerOptions::default()).unwrap();
            let found = network.interface.as_ref().unwrap();
            assert_eq!(found.signature().of_graph(), expected, "{export} {profile}");
            assert_eq!(network.canonical_interface().as_ref(), Ok(found), "{export} {profile}");
            assert!(found.input(Role::LogitRows).is_some());
        }
    }
}

/// Packages of versions without an interface in the manifest have it in the names of their graph.
#[test]
fn a_manifest_without_interface_opens() {
    let folder = tempfile::tempdir().unwrap();
    let pkg = folder.path().join("pkg");
    let canonical = canonical("llama-optimum");
    write(&pkg, false, &canonical).unwrap();
    let path = pkg.join("manifest.json");
    let mut manifest: serde_json::Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    let interface = manifest.as_object_mut().unwrap().remove("interface").unwrap();
    std::fs::write(&path, manifest.to_string()).unwrap();
    let package = Package::open(&pkg).unwrap();
    assert_eq!(package.manifest.interface, None);
    let graph = package.graph().unwrap();
    let expected = canonical.graph.interface.as_ref().unwrap().signature();
    assert_eq!(graph.interface.as_ref().unwrap().signature(), expected);

    // One that describes another graph is refused.
    let mut other = interface;
    other["caches"][0]["head_dim"] = serde_json::json!(1);
    manifest["interface"] = other;
    std::fs::write(&path, manifest.to_string()).unwrap();
    let error = Package::open(&pkg).unwrap().graph().unwrap_err().to_string();
    assert!(error.contains("its inputs and outputs are not those"), "{error}");
}

#[test]
fn what_was_written_is_read_back_without_a_copy() {
    for export in [
        "llama-optimum",
        "gpt2-optimum",
        "qwen2-dynamo-opset23",
        "llama-ort-genai-fp16",
    ] {
        let folder = tempfile::tempdir().unwrap();
        let pkg = folder.path().join("pkg");
        let canonical = canonical(export);
        let manifest = write(&pkg, false, &canonical).unwrap();
        let package = Package::open(&pkg).unwrap();
        assert_eq!(package.manifest, manifest);
        package.check_hashes().unwrap();
        let graph = package.graph().unwrap();

        // The manifest, the network and the graph use the same names for the same weights.
        let network = lower::lower(&graph, &Profile::decode(16), &lower::LowerOptions::default()).unwrap();
        assert!(!network.weights.is_empty());
        for weight in &network.weights {
            // Tables that passes computed lie in their own file.
            let files = std::iter::once(&manifest.weights).chain(&manifest.constants);
            let mut entries = files.flat_map(|w| w.tensors.iter().map(move |t| (&w.file, t)));
            let entry = entries.find(|(_, t)| t.name == weight.name);
            let (file, entry) = entry.unwrap_or_else(|| panic!("{export}: {} is not in the manifest", weight.name));
            let file = std::fs::read(pkg.join(file)).unwrap();
            let tensor = weight.constant.materialize().unwrap();
            assert_eq!(
                (entry.dtype, &entry.shape[..]),
                (tensor.dtype(), tensor.shape()),
                "{}",
                weight.name
            );
            let start = entry.offset as usize;
            assert_eq!(
                &file[start..start + entry.bytes as usize],
                &tensor.data()[..],
                "{}",
                weight.name
            );
        }
        // The values are unchanged.
        let after: Vec<Vec<f32>> = weights(&graph).into_values().collect();
        for (name, values) in weights(&canonical.graph) {
            assert!(after.contains(&values), "{export}: the values of {name} are gone");
        }
    }
}

#[test]
fn equal_tensors_are_stored_once_and_the_file_is_aligned() {
    let folder = tempfile::tempdir().unwrap();
    let pkg = folder.path().join("pkg");
    let mut canonical = canonical("llama-optimum");
    let names = |m: &Manifest| -> Vec<String> { m.weights.tensors.iter().map(|t| t.name.clone()).collect() };
    let names = names(&write(&folder.path().join("first"), false, &canonical).unwrap());
    // The second norm scale becomes a copy of the first: only the hash shows that their bytes are equal.
    let scales: Vec<&String> = names.iter().filter(|n| n.ends_with(".scale")).collect();
    let id = |name: &str| canonical.graph.find(name).unwrap();
    let (one, two) = (id(scales[0]), id(scales[1]));
    let copy = canonical.graph.constant(one).unwrap().scaled(1.0);
    canonical.graph.set_constant(two, copy);
    let manifest = write(&pkg, false, &canonical).unwrap();
    let tensors = &manifest.weights.tensors;
    let shared: Vec<_> = tensors.iter().filter(|t| t.same_as.is_some()).collect();
    assert!(!shared.is_empty(), "{tensors:#?}");
    for weight in shared {
        let first = tensors
            .iter()
            .find(|t| Some(&t.name) == weight.same_as.as_ref())
            .unwrap();
        assert_eq!((first.offset, &first.blake3), (weight.offset, &weight.blake3));
        assert_eq!(first.same_as, None);
    }
    let stored: u64 = tensors.iter().filter(|t| t.same_as.is_none()).map(|t| t.bytes).sum();
    let first = tensors.iter().map(|t| t.offset).min().unwrap();
    assert_eq!(first % 4096, 0);
    assert_eq!(manifest.weights.bytes, first + stored);
    for weight in tensors {
        let alignment = if weight.bytes % 64 == 0 {
            64
        } else {
            weight.dtype.element_bytes() as u64
        };
        assert_eq!(weight.offset % alignment, 0, "{}", weight.name);
    }
}

#[test]
fn the_set_hash_names_the_numbers() {
    let folder = tempfile::tempdir().unwrap();
    let canonical = canonical("llama-optimum");
    let one = write(&folder.path().join("one"), false, &canonical).unwrap();
    let two = write(&folder.path().join("two"), false, &canonical).unwrap();
    assert_eq!(one.weights, two.weights);
    assert_eq!(one.graph, two.graph, "packages are reproducible");
    let mut other = canonical;
    let scale = other.graph.find(&one.weights.tensors.last().unwrap().name).unwrap();
    let scaled = other.graph.constant(scale).unwrap().scaled(1.5);
    other.graph.set_constant(scale, scaled);
    let three = write(&folder.path().join("three"), false, &other).unwrap();
    assert_ne!(one.weights.set_hash, three.weights.set_hash);
}

#[test]
fn engines_are_listed_with_the_weights_they_take() {
    let folder = tempfile::tempdir().unwrap();
    let pkg = folder.path().join("pkg");
    let canonical = canonical("llama-optimum");
    let mut writer = Writer::new(
        &pkg,
        false,
        &canonical.graph,
        facts(&canonical),
        Allowed::default(),
        |_, _| {},
    )
    .unwrap();
    let graph = writer.package().graph().unwrap();
    let profile = Profile::decode(16);
    let network = lower::lower(&graph, &profile, &lower::LowerOptions::default()).unwrap();
    let taken = network.weights.iter().map(|w| w.name.clone()).collect();
    let engine = EngineEntry {
        file: String::new(),
        bytes: 0,
        blake3: String::new(),
        plans: None,
        target: Target::TensorrtRtx,
        profile,
        built_as: None,
        optimization_profile: 0,
        weight_mode: WeightMode::Bind,
        refit: Refit::None,
        lowering: lapidary::lower::LowerOptions::default(),
        built_with: None,
        tensorrt_version: "1.6.1".into(),
        build_ms: 1,
    };
    writer.engine(engine, b"not really a plan", &taken).unwrap();
    let manifest = writer.finish().unwrap();
    assert_eq!(manifest.engines[0].file, "engines/b1-t1-c16-tensorrt-rtx.plan");
    assert_eq!(
        std::fs::read(pkg.join(&manifest.engines[0].file)).unwrap(),
        b"not really a plan"
    );
    let stored = manifest.weights.tensors.iter();
    let listed = stored
        .chain(manifest.constants.iter().flat_map(|c| &c.tensors))
        .filter(|t| t.engines == ["b1-t1-c16"])
        .count();
    assert_eq!(listed, taken.len());
    Package::open(&pkg).unwrap().check_hashes().unwrap();
}

#[test]
fn dropping_a_writer_leaves_the_old_package_alone() {
    let folder = tempfile::tempdir().unwrap();
    let pkg = folder.path().join("pkg");
    let canonical = canonical("llama-optimum");
    write(&pkg, false, &canonical).unwrap();
    let before = std::fs::read(pkg.join("manifest.json")).unwrap();
    drop(
        Writer::new(
            &pkg,
            true,
            &canonical.graph,
            facts(&canonical),
            Allowed::default(),
            |_, _| {},
        )
        .unwrap(),
    );
    assert_eq!(std::fs::read(pkg.join("manifest.json")).unwrap(), before);
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
    assert!(matches!(
        write(&pkg, false, &canonical),
        Err(PackageError::Exists { .. })
    ));
}
