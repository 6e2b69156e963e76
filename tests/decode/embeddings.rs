//! Models that take embeddings: their sessions, and the embedding table for tokens.

use std::path::{Path, PathBuf};

use lapidary::convert::{ConvertError, ConvertOptions, convert};
use lapidary::decode::{self, Prompt, SessionError};
use lapidary::onnx::proto::{
    DimensionProto, GraphProto, ModelProto, NodeProto, OperatorSetIdProto, TensorProto, TensorShapeProto,
    TensorTypeProto, TypeProto, ValueInfoProto,
};
use lapidary::sample::Chain;
use lapidary::tensor::DType;
use lapidary::weights::embeddings::{self, EmbeddingError};
use lapidary::{Limits, Package, SamplerSettings, Session, SessionOptions, Spec};
use prost::Message;

/// The fixture, and the name of its embedding table.
const EXPORT: &str = "fixtures/exports/llama-optimum/model.onnx";
const TABLE: &str = "model.embed_tokens.weight";
const WIDTH: usize = 32;
const TOKENS: usize = 97;
const CAPACITY: &str = "capacity: [32]\n";

fn export() -> ModelProto {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(EXPORT);
    ModelProto::decode(&std::fs::read(path).unwrap()[..]).unwrap()
}

fn info(name: &str, code: i32, dims: &[&str]) -> ValueInfoProto {
    let dim = |text: &&str| DimensionProto {
        dim_value: text.parse().ok(),
        dim_param: text.parse::<i64>().is_err().then(|| text.to_string()),
    };
    ValueInfoProto {
        name: Some(name.into()),
        r#type: Some(TypeProto {
            tensor_type: Some(TensorTypeProto {
                elem_type: Some(code),
                shape: Some(TensorShapeProto {
                    dim: dims.iter().map(dim).collect(),
                }),
            }),
        }),
    }
}

/// The export without its embedding, which takes embeddings as the input `name`, and its table.
fn taken_apart(name: &str) -> (ModelProto, TensorProto) {
    let mut model = export();
    let graph = model.graph.as_mut().unwrap();
    let at = graph
        .node
        .iter()
        .position(|n| n.input.iter().any(|i| i == "input_ids"))
        .unwrap();
    let gather = graph.node.remove(at);
    assert_eq!(gather.op_type.as_deref(), Some("Gather"));
    assert!(graph.node.iter().all(|n| !n.input.iter().any(|i| i == "input_ids")));
    for input in graph.node.iter_mut().flat_map(|n| &mut n.input) {
        if *input == gather.output[0] {
            *input = name.into();
        }
    }
    let table = graph
        .initializer
        .iter()
        .position(|t| t.name.as_deref() == Some(TABLE))
        .unwrap();
    let table = graph.initializer.remove(table);
    let ids = graph
        .input
        .iter()
        .position(|i| i.name.as_deref() == Some("input_ids"))
        .unwrap();
    graph.input[ids] = info(name, 1, &["batch_size", "sequence_length", "32"]);
    (model, table)
}

/// `embed_tokens.onnx`: the table's rows, and nodes that compute `inputs_embeds` from `rows`.
fn embed_tokens(table: &TensorProto, nodes: Vec<NodeProto>, initializers: Vec<TensorProto>) -> ModelProto {
    let node = |op: &str, inputs: &[&str], output: &str| NodeProto {
        input: inputs.iter().map(|i| i.to_string()).collect(),
        output: vec![output.into()],
        name: Some(output.into()),
        op_type: Some(op.into()),
        ..NodeProto::default()
    };
    let mut all = vec![node("Gather", &[TABLE, "input_ids"], "rows")];
    match nodes.is_empty() {
        true => all.push(node("Identity", &["rows"], "inputs_embeds")),
        false => all.extend(nodes),
    }
    ModelProto {
        ir_version: Some(8),
        opset_import: vec![OperatorSetIdProto {
            domain: None,
            version: Some(18),
        }],
        graph: Some(GraphProto {
            node: all,
            name: Some("embed".into()),
            initializer: std::iter::once(table.clone()).chain(initializers).collect(),
            input: vec![info("input_ids", 7, &["batch", "tokens"])],
            output: vec![info("inputs_embeds", 1, &["batch", "tokens", "32"])],
            ..GraphProto::default()
        }),
        ..ModelProto::default()
    }
}

fn write(path: &Path, model: &ModelProto) {
    std::fs::write(path, model.encode_to_vec()).unwrap();
}

fn rows_of(table: &TensorProto, tokens: &[u32]) -> Vec<f32> {
    let bytes = table.raw_data.as_ref().unwrap();
    let row = |token: &u32| bytes[*token as usize * WIDTH * 4..][..WIDTH * 4].chunks_exact(4);
    let floats = tokens.iter().flat_map(row);
    floats.map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect()
}

fn convert_to(folder: &Path, model: &Path, table: Option<&Path>) -> Result<(PathBuf, Vec<String>), ConvertError> {
    let output = folder.join("pkg");
    let options = ConvertOptions {
        force: true,
        embeddings: table,
        ..ConvertOptions::default()
    };
    let converted = convert(
        model,
        &output,
        Spec::parse(CAPACITY).unwrap().resolve().unwrap(),
        &options,
    )?;
    Ok((output, converted.warnings))
}

fn open(package: &Path) -> Session {
    Session::open(&Package::open(package).unwrap(), &SessionOptions::default()).unwrap()
}

fn assert_close(a: &[f32], b: &[f32], what: &str) {
    assert_eq!(a.len(), b.len(), "{what}");
    let worst = a.iter().zip(b).map(|(x, y)| (x - y).abs()).fold(0.0, f32::max);
    assert!(worst < 1e-5, "{what}: {worst}");
}

const PROMPT: [u32; 7] = [1, 20, 33, 47, 5, 96, 0];

#[test]
fn embeddings_give_what_their_tokens_give() {
    let folder = tempfile::tempdir().unwrap();
    let original = folder.path().join("original.onnx");
    write(&original, &export());
    let (package, _) = convert_to(folder.path(), &original, None).unwrap();
    let mut whole = open(&package);
    let expected = whole.feed(&PROMPT).unwrap().to_vec();
    let after = whole.feed(&[9]).unwrap().to_vec();

    // By its name, and by what it does.
    for name in ["inputs_embeds", "arg0"] {
        let (model, table) = taken_apart(name);
        let path = folder.path().join("model.onnx");
        write(&path, &model);
        // Found beside the model.
        write(
            &folder.path().join("embed_tokens.onnx"),
            &embed_tokens(&table, vec![], vec![]),
        );
        let (package, warnings) = convert_to(folder.path(), &path, None).unwrap();
        assert_eq!(warnings, [""; 0]);
        let rows = rows_of(&table, &PROMPT);
        let mut session = open(&package);
        assert_close(session.feed_embeddings(&rows).unwrap(), &expected, name);
        assert_eq!((session.len(), session.tokens()), (PROMPT.len(), &[][..]));
        assert_close(session.feed(&[9]).unwrap(), &after, "a token after embeddings");
        assert_eq!((session.len(), session.tokens()), (PROMPT.len() + 1, &[9][..]));
        // In pieces, and as tokens.
        session.clear();
        session.feed_embeddings(&rows[..3 * WIDTH]).unwrap();
        assert_close(
            session.feed_embeddings(&rows[3 * WIDTH..]).unwrap(),
            &expected,
            "two pieces",
        );
        assert_eq!(
            session.resume(&PROMPT).unwrap(),
            0,
            "what embeddings stood for is not known"
        );
        assert_close(session.logits(), &expected, "as tokens");
        assert_eq!(session.resume(&PROMPT[..3]).unwrap(), 2);
        let mut all = Vec::new();
        session.clear();
        session.feed_all(&PROMPT, &mut all).unwrap();
        assert_close(&all[all.len() - TOKENS..], &expected, "logits of every token");
    }
}

#[test]
fn a_generation_from_embeddings_is_that_from_tokens() {
    let folder = tempfile::tempdir().unwrap();
    let (model, table) = taken_apart("inputs_embeds");
    let path = folder.path().join("decoder_model_merged_q4.onnx");
    write(&path, &model);
    let other = embed_tokens(
        &TensorProto {
            raw_data: Some(vec![0; TOKENS * WIDTH * 4].into()),
            ..table.clone()
        },
        vec![],
        vec![],
    );
    write(&folder.path().join("embed_tokens.onnx"), &other);
    // The table of the same variant.
    write(
        &folder.path().join("embed_tokens_q4.onnx"),
        &embed_tokens(&table, vec![], vec![]),
    );
    let (package, _) = convert_to(folder.path(), &path, None).unwrap();
    let generate = |prompt: Prompt<'_>| {
        let mut chain = Chain::new(&SamplerSettings::greedy()).unwrap();
        let limits = Limits {
            max_new_tokens: 6,
            ..Limits::default()
        };
        let go_on = |_: decode::Piece<'_>| Ok(std::ops::ControlFlow::Continue(()));
        decode::stream_prompt(&mut open(&package), None, prompt, &mut chain, &limits, go_on)
    };
    let by_tokens = generate(Prompt::Tokens(&PROMPT)).unwrap();
    let by_rows = generate(Prompt::Embeddings(&rows_of(&table, &PROMPT))).unwrap();
    assert_eq!(by_tokens.tokens, by_rows.tokens);
    assert_eq!(by_rows.tokens.len(), 6);
}

#[test]
fn without_a_table_only_embeddings_are_fed() {
    let folder = tempfile::tempdir().unwrap();
    let (model, table) = taken_apart("inputs_embeds");
    let path = folder.path().join("model.onnx");
    write(&path, &model);
    let (package, warnings) = convert_to(folder.path(), &path, None).unwrap();
    assert!(
        warnings[0].contains("takes embeddings") && warnings[0].contains("--embeddings"),
        "{warnings:?}"
    );
    let mut session = open(&package);
    assert!(matches!(session.feed(&PROMPT), Err(SessionError::NoTable)));
    let rows = rows_of(&table, &PROMPT);
    let mut generate = |max_new_tokens: usize| {
        let mut chain = Chain::new(&SamplerSettings::greedy()).unwrap();
        let limits = Limits {
            max_new_tokens,
            ..Limits::default()
        };
        let go_on = |_: decode::Piece<'_>| Ok(std::ops::ControlFlow::Continue(()));
        let prompt = Prompt::Embeddings(&rows);
        decode::stream_prompt(&mut session, None, prompt, &mut chain, &limits, go_on).map(|g| g.tokens.len())
    };
    assert_eq!(generate(1).unwrap(), 1);
    let error = generate(2).unwrap_err().to_string();
    assert!(error.contains("no table that gives them for tokens"), "{error}");
    let refused = |rows: &[f32], session: &mut Session| session.feed_embeddings(rows).unwrap_err().to_string();
    session.clear();
    assert!(refused(&rows[1..], &mut session).contains("not a multiple of 32"));
    assert!(refused(&[], &mut session).contains("empty"));
    let long = vec![0.5; 33 * WIDTH];
    assert!(refused(&long, &mut session).contains("33 tokens do not fit"));
}

#[test]
fn embeddings_go_before_tokens_and_to_models_that_take_them() {
    let folder = tempfile::tempdir().unwrap();
    let original = folder.path().join("original.onnx");
    write(&original, &export());
    let (package, _) = convert_to(folder.path(), &original, None).unwrap();
    let mut session = open(&package);
    assert!(matches!(
        session.feed_embeddings(&[0.0; WIDTH]),
        Err(SessionError::TakesTokens)
    ));
    let (model, table) = taken_apart("inputs_embeds");
    let path = folder.path().join("model.onnx");
    write(&path, &model);
    let file = folder.path().join("embed_tokens.onnx");
    write(&file, &embed_tokens(&table, vec![], vec![]));
    let error = convert_to(folder.path(), &original, Some(&file)).err().unwrap();
    assert!(
        matches!(error, ConvertError::Embeddings(EmbeddingError::NotNeeded { .. })),
        "{error}"
    );
    let (package, _) = convert_to(folder.path(), &path, Some(&file)).unwrap();
    let mut session = open(&package);
    session.feed(&PROMPT).unwrap();
    let error = session.feed_embeddings(&[0.0; WIDTH]).unwrap_err();
    assert!(
        matches!(error, SessionError::EmbeddingsAfterTokens { tokens: 7 }),
        "{error}"
    );
}

/// A `.npy` of floats, as NumPy writes it.
fn npy(path: &Path, shape: &str, data: &[u8]) {
    let header = format!("{{'descr': '<f4', 'fortran_order': False, 'shape': ({shape}), }}\n");
    let mut bytes = b"\x93NUMPY\x01\x00".to_vec();
    bytes.extend((header.len() as u16).to_le_bytes());
    bytes.extend(header.as_bytes());
    bytes.extend(data);
    std::fs::write(path, bytes).unwrap();
}

/// A safetensors file of matrices of `TOKENS` rows.
fn safetensors(path: &Path, tensors: &[(&str, &[u8])]) {
    let mut header = serde_json::Map::new();
    let mut data = Vec::new();
    for (name, bytes) in tensors {
        let range = [data.len(), data.len() + bytes.len()];
        let tensor = serde_json::json!({"dtype": "F32", "shape": [TOKENS, WIDTH], "data_offsets": range});
        header.insert(name.to_string(), tensor);
        data.extend_from_slice(bytes);
    }
    let header = serde_json::to_vec(&header).unwrap();
    let mut file = (header.len() as u64).to_le_bytes().to_vec();
    file.extend(header);
    file.extend(data);
    std::fs::write(path, file).unwrap();
}

#[test]
fn the_table_is_read_from_files_of_several_kinds() {
    let folder = tempfile::tempdir().unwrap();
    let (_, table) = taken_apart("inputs_embeds");
    let data = table.raw_data.clone().unwrap();
    let expected = rows_of(&table, &(0..TOKENS as u32).collect::<Vec<_>>());
    let file = |name: &str| folder.path().join(name);
    npy(&file("table.npy"), "97, 32", &data);
    safetensors(&file("one.safetensors"), &[("model.embed_tokens.weight", &data)]);
    let zeros = vec![0; data.len()];
    safetensors(
        &file("part.safetensors"),
        &[
            ("language_model.model.embed_tokens.weight", &data),
            ("lm_head.weight", &zeros),
        ],
    );
    safetensors(
        &file("several.safetensors"),
        &[("a.embed_tokens.weight", &zeros), ("b.embed_tokens.weight", &data)],
    );
    write(&file("plain.onnx"), &embed_tokens(&table, vec![], vec![]));
    let half: Vec<u8> = expected.iter().flat_map(|v| (v * 0.5).to_le_bytes()).collect();
    let scaled = NodeProto {
        input: vec!["two".into(), "rows".into()],
        output: vec!["inputs_embeds".into()],
        op_type: Some("Mul".into()),
        ..NodeProto::default()
    };
    let two = TensorProto {
        name: Some("two".into()),
        data_type: Some(1),
        float_data: vec![2.0],
        ..TensorProto::default()
    };
    let halved = TensorProto {
        raw_data: Some(half.into()),
        ..table.clone()
    };
    write(&file("scaled.onnx"), &embed_tokens(&halved, vec![scaled], vec![two]));
    for (name, tensor) in [
        ("table.npy", None),
        ("one.safetensors", None),
        ("part.safetensors", None),
        ("several.safetensors", Some("b.embed_tokens.weight")),
        ("plain.onnx", None),
        ("scaled.onnx", None),
    ] {
        let table = embeddings::read_for(&file(name), tensor, TOKENS, WIDTH, DType::F32);
        let table = table.unwrap_or_else(|error| panic!("{name}: {error}"));
        assert_eq!(table.materialize().unwrap().to_f32(), expected, "{name}");
    }
}

#[test]
fn what_is_no_table_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let (_, table) = taken_apart("inputs_embeds");
    let data = table.raw_data.clone().unwrap();
    let file = |name: &str| folder.path().join(name);
    npy(&file("wide.npy"), "32, 97", &data);
    npy(&file("flat.npy"), "3104", &data);
    safetensors(&file("other.safetensors"), &[("lm_head.weight", &data)]);
    safetensors(
        &file("several.safetensors"),
        &[("a.embed_tokens.weight", &data), ("b.embed_tokens.weight", &data)],
    );
    let tanh = NodeProto {
        input: vec!["rows".into()],
        output: vec!["inputs_embeds".into()],
        name: Some("bend".into()),
        op_type: Some("Tanh".into()),
        ..NodeProto::default()
    };
    write(&file("bent.onnx"), &embed_tokens(&table, vec![tanh], vec![]));
    std::fs::write(file("text.npy"), "text").unwrap();
    let whole = Path::new(env!("CARGO_MANIFEST_DIR")).join(EXPORT);
    for (path, tensor, expected) in [
        (file("wide.npy"), None, "[32, 97], and the model needs [97 or more, 32]"),
        (file("flat.npy"), None, "[3104]"),
        (file("text.npy"), None, "is not a .npy file"),
        (file("none.npy"), None, "No such file"),
        (file("other.safetensors"), None, "no tensor of it is called"),
        (
            file("several.safetensors"),
            None,
            "a.embed_tokens.weight, b.embed_tokens.weight",
        ),
        (file("several.safetensors"), Some("c"), "has no tensor \"c\""),
        (file("bent.onnx"), None, "bend computes Tanh"),
        (whole, None, "5 outputs"),
    ] {
        let error = embeddings::read_for(&path, tensor, TOKENS, WIDTH, DType::F32)
            .unwrap_err()
            .to_string();
        assert!(error.contains(expected), "{expected:?} is not in {error:?}");
        assert!(error.contains(path.to_str().unwrap()), "{error}");
    }
    // Gemma 3 scales rows outside of the table.
    safetensors(&file("model.safetensors"), &[("model.embed_tokens.weight", &data)]);
    std::fs::write(file("config.json"), r#"{"model_type": "gemma3_text"}"#).unwrap();
    let error = embeddings::read(&file("model.safetensors"), None)
        .unwrap_err()
        .to_string();
    assert!(error.contains("gemma3_text scales the rows"), "{error}");
}
