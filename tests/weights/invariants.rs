//! Invariants of refits: every export, in every precision, with the package's own weights, its export's, and those that
//! it writes.
//!
//! Every export that converts is tried, half of the fixtures in fp16 and the other half in bf16; other tests cover
//! exports that do not convert. `LAPIDARY_EXPORTS` names a folder with more.

use std::path::{Path, PathBuf};

use lapidary::package::manifest::WeightFile;
use lapidary::package::{self, Package, RefitRequest, differing_weights};
use lapidary::weights::checks::Allowed;
use lapidary::weights::export::{ExportError, Format, export};
use lapidary::weights::matching::matched;
use lapidary::weights::source::WeightSource;
use lapidary::{ConvertOptions, Limits, SamplerSettings, Session, SessionOptions, Spec, convert};

use crate::quantized::{Form, quantized_model};
use crate::support::fixture;

/// Every `model.onnx` below a folder, and every other `.onnx`.
fn exports(folder: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut stack = vec![folder.to_path_buf()];
    while let Some(folder) = stack.pop() {
        for entry in std::fs::read_dir(&folder).unwrap() {
            let path = entry.unwrap().path();
            match path.is_dir() {
                true => stack.push(path),
                false if path.extension().is_some_and(|e| e == "onnx") => found.push(path),
                false => {}
            }
        }
    }
    found.sort();
    found
}

fn tokens(package: &Package) -> Vec<u32> {
    let mut session = Session::open(package, &SessionOptions::default()).unwrap_or_else(|e| panic!("{e}"));
    let mut chain = lapidary::Chain::new(&SamplerSettings::greedy()).unwrap();
    let limits = Limits {
        max_new_tokens: 3,
        ..Limits::default()
    };
    let made = lapidary::generate(&mut session, None, &[1, 20, 5, 9], &mut chain, &limits, |_| Ok(()));
    made.unwrap().tokens
}

fn set_hash(file: &Option<WeightFile>) -> Option<&str> {
    file.as_ref().map(|file| file.set_hash.as_str())
}

#[derive(Default)]
struct Counts {
    packages: usize,
    checkpoints: usize,
    failures: Vec<String>,
}

impl Counts {
    fn expect(&mut self, is_true: bool, message: impl FnOnce() -> String) {
        if !is_true {
            self.failures.push(message());
        }
    }
}

/// All invariants of one package. `what` names it in messages.
fn check(what: &str, model: &Path, package: &Package, folder: &Path, counts: &mut Counts) {
    let model_weights = package.model_weights().unwrap();
    let context = package.source_context();
    let mut sources = vec![
        ("itself", package.weight_source().unwrap()),
        ("its export", WeightSource::open(model, &context).unwrap()),
    ];
    let manifest = &package.manifest;
    let graph = package.architecture().unwrap();
    for (name, format) in [
        ("Hugging Face's form", Format::HuggingFace),
        ("GPT-2's form", Format::Gpt2),
        ("TensorRT-LLM's form", Format::TensorRtLlm),
    ] {
        let to = folder.join("checkpoint").join(name);
        match export(
            &model_weights,
            &graph,
            &manifest.architecture,
            manifest.norms,
            format,
            &to,
        ) {
            Ok(_) => {
                counts.checkpoints += 1;
                sources.push((name, WeightSource::open(&to, &context).unwrap()));
            }
            // Refused by name, with no output.
            Err(e @ (ExportError::Io { .. } | ExportError::Write(_))) => panic!("{what}: {name}: {e}"),
            Err(_) => counts.expect(!to.exists(), || {
                format!("{what}: {name} was refused, and something is there")
            }),
        }
    }
    for (i, (name, source)) in sources.iter().enumerate() {
        let required = package.required().unwrap();
        let found = match matched(&required, source, None, false) {
            Ok(found) => found,
            Err(e) => {
                counts.failures.push(format!("{what} from {name}: {e}"));
                continue;
            }
        };
        let different = differing_weights(&manifest.weights, &found.weights).unwrap();
        counts.expect(different.is_empty(), || format!("{what} from {name}: {different:?}"));
        // After strip and refit it has the same weights, and so the same tokens.
        let bare = folder.join(format!("bare-{i}"));
        package::strip(package, &bare, true).unwrap();
        let stripped = Package::open(&bare).unwrap();
        let request = RefitRequest {
            source,
            adapter: None,
            identical: None,
            allowed: Allowed::default(),
            extra_allowed: false,
        };
        let refitted = package::refit(&stripped, &request, |_, _| {})
            .unwrap()
            .finish()
            .unwrap();
        let same = refitted.weights.set_hash == manifest.weights.set_hash
            && refitted.architecture_hash == manifest.architecture_hash
            && set_hash(&refitted.constants) == set_hash(&manifest.constants);
        counts.expect(same, || format!("{what} refitted from {name} is another package"));
        // One check is enough.
        if i + 1 == sources.len() {
            let (before, after) = (tokens(package), tokens(&Package::open(&bare).unwrap()));
            counts.expect(before == after, || {
                format!("{what} refitted from {name}: {after:?} for {before:?}")
            });
        }
    }
}

/// Which exports of a folder are checked, by their index.
#[derive(Clone, Copy)]
enum Part {
    All,
    Even,
    Odd,
}

impl Part {
    fn has(self, i: usize) -> bool {
        match self {
            Part::All => true,
            Part::Even => i.is_multiple_of(2),
            Part::Odd => !i.is_multiple_of(2),
        }
    }
}

/// Converts some of the exports below a folder in one precision and checks those that convert.
fn check_all(folder: &Path, dtype: Option<&str>, part: Part) -> Counts {
    let mut counts = Counts::default();
    for (_, model) in exports(folder).into_iter().enumerate().filter(|(i, _)| part.has(*i)) {
        let at = tempfile::tempdir().unwrap();
        let spec = format!(
            "capacity: [32]\n{}",
            dtype.map_or(String::new(), |d| format!("dtype: {d}\n"))
        );
        let conversion = Spec::parse(&spec).unwrap().resolve().unwrap();
        let output = at.path().join("package");
        if convert(&model, &output, conversion, &ConvertOptions::default()).is_err() {
            continue;
        }
        let what = format!("{} in {}", model.display(), dtype.unwrap_or("its own precision"));
        check(&what, &model, &Package::open(&output).unwrap(), at.path(), &mut counts);
        counts.packages += 1;
    }
    counts
}

/// Fixtures, other families, and the folder that the environment names.
fn check_everything(dtype: Option<&str>, part: Part) {
    let fixtures = check_all(&fixture("exports"), dtype, part);
    let families = check_all(&fixture("families"), dtype, part);
    let more = std::env::var_os("LAPIDARY_EXPORTS").map(|folder| check_all(Path::new(&folder), dtype, Part::All));
    let all: Vec<&Counts> = [&fixtures, &families].into_iter().chain(&more).collect();
    let counted: Vec<_> = all.iter().map(|c| (c.packages, c.checkpoints)).collect();
    println!("packages and checkpoints: {counted:?}");
    let failures: Vec<&String> = all.iter().flat_map(|c| &c.failures).collect();
    assert!(failures.is_empty(), "{failures:#?}");
    let least = match part {
        Part::All => (45, 60),
        Part::Even | Part::Odd => (20, 25),
    };
    assert!(
        fixtures.packages > least.0 && fixtures.checkpoints > least.1 && families.packages >= 4,
        "{counted:?}"
    );
}

#[test]
fn packages_in_their_own_precision() {
    check_everything(None, Part::All);
}

#[test]
fn packages_in_fp16() {
    check_everything(Some("fp16"), Part::Even);
}

#[test]
fn packages_in_bf16() {
    check_everything(Some("bf16"), Part::Odd);
}

/// Exports with quantized weights, made here from unquantized ones: in blocks with zero points, and in signed codes per
/// row.
#[test]
fn packages_of_quantized_weights() {
    let folder = tempfile::tempdir().unwrap();
    let mut made = 0;
    for name in [
        "llama-optimum",
        "gpt2-optimum",
        "qwen3-dynamo-static",
        "mistral-ort-genai",
        "llama-ort-genai-fp16",
    ] {
        for (kind, form) in [("blocks", Form::Blocks), ("rows", Form::Rows)] {
            let canonical = quantized_model(&fixture("exports").join(name).join("model.onnx"), form);
            let to = folder.path().join(format!("{name}-{kind}"));
            std::fs::create_dir(&to).unwrap();
            lapidary::onnx::write(&canonical.graph, to.join("model.onnx"), None).unwrap();
            made += 1;
        }
    }
    let counts = check_all(folder.path(), None, Part::All);
    assert!(counts.failures.is_empty(), "{:#?}", counts.failures);
    assert!(
        counts.packages == made && counts.checkpoints >= made,
        "{}, {}",
        counts.packages,
        counts.checkpoints
    );
}
