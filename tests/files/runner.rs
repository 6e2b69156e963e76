//! Finds the cases, runs each, and compares with the expected output in its file.
//!
//! | option | of | meaning |
//! |---|---|---|
//! | `pass` | passes | names, in order; `dtype f16` is the dtype pass |
//! | `also in` | passes | element types in which f32 in the input is tried as well |
//! | `profile` | lower | as networks write it, `b1-t3-c16-all` |
//! | `options` | lower | `LowerOptions` as JSON |
//! | `whole` | lower | `yes`: with the interface of a language model |
//! | `execute` | passes, lower | `no`, or the greatest difference of outputs between input and output, 1e-5 by default |
//! | `sizes` | passes, lower | symbols and their numbers when it is executed where the profile does not say them |

use std::collections::{BTreeMap, HashMap};
use std::fmt::Write;
use std::fs;
use std::path::{Path, PathBuf};

use lapidary::backend::cpu::{CompileOptions, bind_tokens, execute};
use lapidary::dim::Sym;
use lapidary::graph::eval::Evaluator;
use lapidary::graph::{Constant, Graph, ValueId, dump, infer, made_up, parse_with, verify};
use lapidary::help::Help;
use lapidary::lower::{LowerOptions, lower, lower_graph};
use lapidary::network::{self, Network, Profile, Tokens};
use lapidary::passes::{
    activation, cleanup, decompose, dtype, fold, head_norms, joined_values, layer_norm, linear, rms_norm,
};
use lapidary::tensor::{DType, Tensor};

struct Case {
    path: PathBuf,
    options: BTreeMap<String, String>,
    head: String,
    input: String,
    output: String,
}

impl Case {
    fn read(path: PathBuf) -> Result<Case, String> {
        let text = fs::read_to_string(&path).map_err(|e| e.to_string())?;
        let (head, rest) = text.split_once("--- input\n").ok_or("has no line \"--- input\"")?;
        let (input, output) = rest.split_once("--- output\n").unwrap_or((rest, ""));
        let mut options = BTreeMap::new();
        for line in head.lines().filter(|l| !l.starts_with('#') && !l.is_empty()) {
            let (name, value) = line.split_once(": ").ok_or(format!("{line:?} is not an option"))?;
            options.insert(name.to_string(), value.to_string());
        }
        if !head.starts_with('#') {
            return Err("does not say what it shows in its first line".to_string());
        }
        Ok(Case {
            path,
            options,
            head: head.to_string(),
            input: input.to_string(),
            output: output.to_string(),
        })
    }

    fn option(&self, name: &str) -> Option<&str> {
        self.options.get(name).map(String::as_str)
    }

    /// The greatest difference; `None`: it is not executed.
    fn tolerance(&self) -> Option<f64> {
        match self.option("execute") {
            None => Some(1e-5),
            Some("no") => None,
            Some(number) => Some(number.parse().expect("a tolerance")),
        }
    }

    fn sizes(&self) -> BTreeMap<Sym, i64> {
        let text = self
            .option("sizes")
            .unwrap_or("batch=2, tokens=3, past=5, capacity=16, n=4");
        let pair = |pair: &str| {
            let (name, size) = pair.split_once('=').expect("name=size");
            (Sym::new(name), size.parse().expect("a size"))
        };
        text.split(", ").map(pair).collect()
    }
}

/// A number from a name, so that equal names have equal synthetic elements.
fn seed(name: &str) -> u64 {
    name.bytes().fold(7, |seed, byte| seed * 31 + u64::from(byte))
}

fn graph_of(text: &str) -> Result<Graph, String> {
    let fill = |name: &str, dtype, shape: &[usize]| Constant::tensor(made_up(dtype, shape.to_vec(), seed(name)));
    parse_with(text, fill).map_err(|e| e.to_string())
}

/// Synthetic inputs for a graph, by name. Integers are small indices.
fn inputs_of(graph: &Graph, sizes: &BTreeMap<Sym, i64>, seed: u64) -> HashMap<String, Tensor> {
    let mut inputs = HashMap::new();
    for (i, id) in graph.inputs.iter().enumerate() {
        let value = graph.value(*id);
        let shape = value.shape.as_ref().expect("a typed input");
        let size = |d: &lapidary::dim::Dim| d.eval(sizes).unwrap_or_else(|| panic!("{d} has no size")) as usize;
        let shape: Vec<usize> = shape.iter().map(size).collect();
        let tensor = made_up(value.dtype.expect("a typed input"), shape, seed * 100 + i as u64);
        inputs.insert(value.name.clone(), tensor);
    }
    inputs
}

fn run(graph: &Graph, inputs: &HashMap<String, Tensor>) -> Result<Vec<Tensor>, String> {
    let bound = graph
        .inputs
        .iter()
        .map(|id| (*id, inputs[&graph.value(*id).name].clone()));
    let bindings: HashMap<ValueId, Tensor> = bound.collect();
    Evaluator::new(graph, bindings)
        .values(&graph.outputs)
        .map_err(|e| format!("it cannot be executed: {e}"))
}

fn compare(before: &[Tensor], after: &[Tensor], tolerance: f64) -> Result<(), String> {
    for (i, (a, b)) in before.iter().zip(after).enumerate() {
        if (a.dtype(), a.shape()) != (b.dtype(), b.shape()) {
            return Err(format!("output {i} was {a:?} and became {b:?}"));
        }
        for (x, y) in a.to_f64().iter().zip(b.to_f64()) {
            let same = *x == y || x.is_nan() && y.is_nan();
            if !same && (x - y).abs() > tolerance * (1.0 + x.abs()) {
                return Err(format!("output {i}: {x} became {y}"));
            }
        }
    }
    Ok(())
}

/// The output of a case.
fn perform(folder: &str, case: &Case) -> Result<String, String> {
    match folder {
        "passes" => {
            let text = rewrite(case, &case.input)?;
            for dtype in case.option("also in").iter().flat_map(|list| list.split(", ")) {
                let typed = |text: &str| text.replace("f32", dtype);
                let found = rewrite(case, &typed(&case.input)).map_err(|e| format!("in {dtype}: {e}"))?;
                if found != typed(&text) {
                    return Err(format!("in {dtype} it becomes\n{found}"));
                }
            }
            Ok(text)
        }
        "lower" => lowered(case),
        "infer" => Ok(inferred(&case.input)),
        "parse" => Ok(parsed(&case.input)),
        other => Err(format!("nothing is done with files of {other:?}")),
    }
}

fn rewrite(case: &Case, input: &str) -> Result<String, String> {
    let mut graph = graph_of(input)?;
    infer(&mut graph).map_err(|e| e.to_string())?;
    verify(&graph).map_err(|e| e.to_string())?;
    let before = graph.clone();
    let mut rewrites = 0;
    for name in case.option("pass").ok_or("has no option \"pass\"")?.split(", ") {
        let done = match name {
            "fold" => fold::run(&mut graph),
            "cleanup" => cleanup::run(&mut graph),
            "decompose_contrib" => decompose::contrib::run(&mut graph),
            "layer_norm" => layer_norm::run(&mut graph),
            "rms_norm" => rms_norm::run(&mut graph),
            "head_norms" => head_norms::run(&mut graph),
            "joined_values" => joined_values::run(&mut graph),
            "activation" => activation::run(&mut graph),
            "linear" => linear::run(&mut graph),
            "dtype f16" => dtype::run(&mut graph, DType::F16, false),
            "dtype bf16" => dtype::run(&mut graph, DType::Bf16, false),
            other => return Err(format!("there is no pass {other:?}")),
        };
        match done {
            Ok(count) => rewrites += count,
            Err(error) => {
                let help = error.help().map(|help| format!("help: {help}\n"));
                return Ok(format!("refused by {name}\n{error}\n{}", help.unwrap_or_default()));
            }
        }
        infer(&mut graph).map_err(|e| format!("after {name}: {e}"))?;
        verify(&graph).map_err(|e| format!("after {name}: {e}"))?;
    }
    let text = dump(&graph).to_string();
    if let Some(tolerance) = case.tolerance() {
        for seed in [1, 2] {
            let inputs = inputs_of(&before, &case.sizes(), seed);
            compare(&run(&before, &inputs)?, &run(&graph, &inputs)?, tolerance)?;
        }
    }
    Ok(match rewrites {
        0 if text == dump(&before).to_string() => "unchanged\n".to_string(),
        1 => format!("1 rewrite\n{text}"),
        n => format!("{n} rewrites\n{text}"),
    })
}

fn profile_of(text: &str) -> Profile {
    let network = format!("network \"\" for {text}\ninputs\nlayers\noutputs\n");
    network::parse(&network)
        .unwrap_or_else(|e| panic!("{text} is no profile: {e}"))
        .profile
}

fn lowered(case: &Case) -> Result<String, String> {
    let graph = graph_of(&case.input)?;
    let profile = profile_of(case.option("profile").unwrap_or("b1-t3-c16-all"));
    let options = match case.option("options") {
        Some(json) => serde_json::from_str(json).map_err(|e| e.to_string())?,
        None => LowerOptions::default(),
    };
    let network = match case.option("whole") {
        Some("yes") => lower(&graph, &profile, &options),
        _ => lower_graph(&graph, &profile, &options),
    };
    let network = match network {
        Ok(network) => network,
        Err(error) => return Ok(format!("refused\n{error}\n")),
    };
    if let Some(tolerance) = case.tolerance() {
        let mut sizes = case.sizes();
        sizes.insert(Sym::batch(), profile.batch as i64);
        if let Tokens::Static(tokens) = profile.tokens {
            sizes.insert(Sym::tokens(), tokens as i64);
        }
        executes(&graph, &network, &sizes, tolerance)?;
    }
    Ok(network.to_string())
}

/// The network on the CPU computes the same as the graph.
fn executes(graph: &Graph, network: &Network, sizes: &BTreeMap<Sym, i64>, tolerance: f64) -> Result<(), String> {
    let network = &bind_tokens(network, sizes[&Sym::tokens()] as usize).map_err(|e| e.to_string())?;
    for seed in [1, 2] {
        let inputs = inputs_of(graph, sizes, seed);
        let expected = run(graph, &inputs)?;
        let given: Vec<(&str, Tensor)> = inputs.iter().map(|(n, t)| (n.as_str(), narrow(t))).collect();
        let found = execute(network, &given, &CompileOptions::default()).map_err(|e| e.to_string())?;
        let found: HashMap<String, Tensor> = found.into_iter().collect();
        let names = graph.outputs.iter().map(|id| &graph.value(*id).name);
        let found: Vec<Tensor> = names.map(|name| found[name].clone()).collect();
        let expected: Vec<Tensor> = expected.iter().map(narrow).collect();
        compare(&expected, &found, tolerance)?;
    }
    Ok(())
}

/// Networks have i32 where graphs have i64.
fn narrow(tensor: &Tensor) -> Tensor {
    match tensor.dtype() {
        DType::I64 => {
            let values: Vec<i32> = tensor.to_i64().into_iter().map(|v| v as i32).collect();
            Tensor::from_i32(tensor.shape().to_vec(), &values)
        }
        _ => tensor.clone(),
    }
}

fn inferred(input: &str) -> String {
    let mut graph = match graph_of(input) {
        Ok(graph) => graph,
        Err(error) => return format!("no graph\n{error}\n"),
    };
    if let Err(error) = graph.sort() {
        return format!("refused\n{error}\n");
    }
    let facts = match infer(&mut graph) {
        Ok(facts) => facts,
        Err(error) => return format!("refused by inference\n{error}\n"),
    };
    let mut text = dump(&graph).to_string();
    let known: Vec<(ValueId, _)> = graph
        .value_ids()
        .filter(|id| graph.constant(*id).is_none())
        .filter_map(|id| Some((id, facts.contents(id)?)))
        .collect();
    if !known.is_empty() {
        text.push_str("elements\n");
    }
    for (id, contents) in known {
        let _ = writeln!(text, "  {} = {:?}", graph.value(id).name, contents.elements);
    }
    if let Err(obstacles) = verify(&graph) {
        let _ = writeln!(text, "refused by the verifier\n{obstacles}");
    }
    text
}

/// The first word of a text distinguishes graphs and networks.
fn parsed(input: &str) -> String {
    let text = match input.starts_with("network") {
        true => network::parse(input).map(|network| network.to_string()),
        false => lapidary::graph::parse(input).map(|graph| dump(&graph).to_string()),
    };
    text.unwrap_or_else(|error| format!("refused\n{error}\n"))
}

fn cases() -> Vec<(String, PathBuf)> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/files");
    let mut cases = Vec::new();
    for folder in fs::read_dir(root).unwrap().map(|entry| entry.unwrap().path()) {
        if !folder.is_dir() {
            continue;
        }
        let name = folder.file_name().unwrap().to_string_lossy().into_owned();
        for file in fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()) {
            if file.extension().is_some_and(|e| e == "txt") {
                cases.push((name.clone(), file));
            }
        }
    }
    cases.sort();
    cases
}

/// The first line that differs, with both.
fn difference(expected: &str, found: &str) -> String {
    let (mut left, mut right) = (expected.lines(), found.lines());
    for number in 1.. {
        match (left.next(), right.next()) {
            (a, b) if a != b => {
                return format!(
                    "line {number} of the output is\n    {}\nand was expected to be\n    {}",
                    b.unwrap_or("(nothing)"),
                    a.unwrap_or("(nothing)")
                );
            }
            (None, None) => break,
            _ => {}
        }
    }
    "it differs in its last line break".to_string()
}

#[test]
fn every_file_gives_its_output() {
    let update = std::env::var_os("UPDATE_FILES").is_some();
    let (mut failed, cases) = (Vec::new(), cases());
    let count = cases.len();
    for (folder, path) in cases {
        let name = format!("tests/files/{folder}/{}", path.file_name().unwrap().to_string_lossy());
        let case = match Case::read(path) {
            Ok(case) => case,
            Err(error) => {
                failed.push(format!("{name} {error}"));
                continue;
            }
        };
        match perform(&folder, &case) {
            Err(error) => failed.push(format!("{name}: {error}")),
            Ok(found) if found == case.output => {}
            Ok(found) if update => {
                let text = format!("{}--- input\n{}--- output\n{found}", case.head, case.input);
                fs::write(&case.path, text).unwrap();
            }
            Ok(found) => failed.push(format!("{name}: {}", difference(&case.output, &found))),
        }
    }
    assert!(
        failed.is_empty(),
        "{} of {count} files failed (UPDATE_FILES=1 accepts what comes out):\n{}",
        failed.len(),
        failed.join("\n")
    );
    assert!(count >= 30, "only {count} files were found");
}

/// A page of docs/ that is generated from a table: it must be up to date, and `UPDATE_FILES=1` writes it.
pub fn check_page(file: &str, page: &str) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs").join(file);
    if std::env::var_os("UPDATE_FILES").is_some() {
        fs::write(&path, page).unwrap();
    }
    let found = fs::read_to_string(&path).unwrap_or_default();
    let other = page.lines().zip(found.lines()).find(|(a, b)| a != b);
    assert!(
        page == found,
        "docs/{file} is not what its table gives ({other:?}); UPDATE_FILES=1 writes it"
    );
}
