//! Finds the export in a folder, and its configuration files.
//!
//! Models are published as folders: `config.json`, `tokenizer.json` and others at the top, exports of one model in
//! several precisions in `onnx/` (transformers.js, optimum), or one export with a `genai_config.json` that names it.
//! [`find`] takes a user's path, a file or a folder, and returns the export, the folder of its configurations, and the
//! other candidates.

use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};

use crate::help::Help;
use crate::units;

/// The files for a path.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ModelFiles {
    /// The export.
    pub model: PathBuf,
    /// The folder searched for `config.json` and `generation_config.json`.
    pub configs: PathBuf,
    /// `tokenizer.json`, if there is one.
    pub tokenizer: Option<PathBuf>,
    /// All exports in the folder that can be chosen, including the chosen one; empty if the path is a file.
    pub variants: Vec<Variant>,
}

/// One export of a folder.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct Variant {
    /// Its variant: its precision (`q4f16`), or its file name if that has none (`model`).
    pub name: String,
    /// The file, relative to the folder.
    pub file: PathBuf,
    /// Bytes of the file and its external data.
    pub bytes: u64,
}

/// `q4f16 (onnx/model_q4f16.onnx, 1.2 GB)`
impl fmt::Display for Variant {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (name, file) = (&self.name, self.file.display());
        write!(f, "{name} ({file}, {})", units::bytes(self.bytes))
    }
}

/// No export can be chosen.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum FilesError {
    /// The system refused.
    #[error("{}: {source}", path.display())]
    Io {
        /// Path of the file or folder.
        path: PathBuf,
        /// What it said.
        source: std::io::Error,
    },
    /// No export of a decoder is in the folder.
    #[error("{}: the folder contains no export of a decoder{}", path.display(), if others.is_empty() {
        String::new()
    } else {
        format!(": {}", others.join(", "))
    })]
    None {
        /// Path of the folder.
        path: PathBuf,
        /// Exports of other parts of a model.
        others: Vec<String>,
    },
    /// Several candidates.
    #[error("{}: the folder contains several exports:\n  {}", path.display(), list(variants))]
    Several {
        /// Path of the folder.
        path: PathBuf,
        /// All of them.
        variants: Vec<Variant>,
    },
    /// A missing variant.
    #[error("{}: the folder contains no variant {name:?}; it contains:\n  {}", path.display(), list(variants))]
    Unknown {
        /// Path of the folder.
        path: PathBuf,
        /// The requested variant.
        name: String,
        /// All of them.
        variants: Vec<Variant>,
    },
    /// A variant with a file instead of a folder.
    #[error("{}: a variant is chosen from a folder, and this is a file", path.display())]
    OfFile {
        /// Path of the file.
        path: PathBuf,
    },
    /// A `genai_config.json` that names a missing file, or none.
    #[error("{}: {message}", path.display())]
    GenAi {
        /// Path of the file.
        path: PathBuf,
        /// What is wrong with it.
        message: String,
    },
}

impl Help for FilesError {
    fn help(&self) -> Option<String> {
        let help = match self {
            FilesError::Io { .. } => return None,
            FilesError::None { .. } => {
                "give the .onnx file, or a folder with model.onnx, decoder_model_merged.onnx or an onnx/ folder of them"
            }
            FilesError::Several { .. } => "choose one with --variant NAME",
            FilesError::Unknown { .. } => "choose one of these with --variant NAME",
            FilesError::OfFile { .. } => "give the folder, or leave --variant out",
            FilesError::GenAi { .. } => "give the .onnx file itself",
        };
        Some(help.to_string())
    }
}

fn list(variants: &[Variant]) -> String {
    let texts: Vec<String> = variants.iter().map(Variant::to_string).collect();
    texts.join("\n  ")
}

/// Exporters' names of decoders, preferred ones first. `decoder_model` alone has no cache.
const DECODERS: [&str; 4] = [
    "model",
    "decoder_model_merged",
    "decoder_with_past_model",
    "decoder_model",
];

/// Prefixes of their names of other parts of a model.
const PARTS: [&str; 9] = [
    "embed_tokens",
    "encoder",
    "vision",
    "audio",
    "image",
    "speech",
    "embedding",
    "projector",
    "tokenizer",
];

/// transformers.js's names that differ from the files'.
const ALIASES: [(&str, &str); 2] = [("q8", "quantized"), ("fp32", "")];

/// Depth of subfolders that are searched for exports.
const DEPTH: usize = 3;

const GENAI: &str = "genai_config.json";
const TOKENIZER: &str = "tokenizer.json";
const CONFIG: &str = "config.json";
const GENERATION: &str = "generation_config.json";

/// The export for a path, and the files that belong to it. `variant` chooses one of a folder.
pub fn find(path: &Path, variant: Option<&str>) -> Result<ModelFiles, FilesError> {
    if !path.is_dir() {
        return match variant {
            Some(_) => Err(FilesError::OfFile {
                path: path.to_path_buf(),
            }),
            None => Ok(with_configs(path.to_path_buf(), None, Vec::new())),
        };
    }
    let (exports, parts) = exports(path)?;
    let (best, rest): (Vec<Export>, Vec<Export>) = {
        let first = exports.iter().map(|e| e.rank).min();
        exports.into_iter().partition(|e| Some(e.rank) == first)
    };
    if best.is_empty() {
        return Err(FilesError::None {
            path: path.to_path_buf(),
            others: parts,
        });
    }
    let variants: Vec<Variant> = best.iter().chain(&rest).map(|export| export.variant.clone()).collect();
    let taken = match variant {
        Some(name) => {
            let alias = ALIASES
                .iter()
                .find(|(alias, _)| *alias == name)
                .map(|(_, suffix)| *suffix);
            let all = || best.iter().chain(&rest);
            let named = all().find(|e| e.is_called(name));
            let named = named.or_else(|| all().find(|e| alias == Some(e.suffix.as_str())));
            named.ok_or_else(|| FilesError::Unknown {
                path: path.to_path_buf(),
                name: name.to_string(),
                variants: variants.clone(),
            })?
        }
        None => {
            let plain: Vec<&Export> = best.iter().filter(|e| e.suffix.is_empty()).collect();
            match (&best[..], &plain[..]) {
                ([one], _) => one,
                (_, [plain]) => plain,
                _ => {
                    return Err(FilesError::Several {
                        path: path.to_path_buf(),
                        variants,
                    });
                }
            }
        }
    };
    let model = path.join(&taken.variant.file);
    Ok(with_configs(model, Some(path), variants))
}

struct Export {
    variant: Variant,
    /// Index in the order of preference.
    rank: usize,
    /// The suffix after the decoder's name: `q4f16`; empty for the plain one.
    suffix: String,
}

impl Export {
    fn is_called(&self, name: &str) -> bool {
        let file = &self.variant.file;
        self.variant.name == name
            || file.as_path() == Path::new(name)
            || file.file_name().is_some_and(|file| file == name)
            || file.file_stem().is_some_and(|stem| stem == name)
    }
}

/// Exports of decoders in a folder and the folders in it, and the files of other parts.
fn exports(folder: &Path) -> Result<(Vec<Export>, Vec<String>), FilesError> {
    let mut files = Vec::new();
    collect(folder, Path::new(""), DEPTH, &mut files)?;
    files.sort();
    let (mut found, mut parts): (Vec<Export>, Vec<String>) = (Vec::new(), Vec::new());
    for file in files {
        let stem = file.file_stem().unwrap_or_default().to_string_lossy().into_owned();
        let inside = file.parent().unwrap_or(Path::new(""));
        let genai = folder.join(inside).join(GENAI);
        let decoder = match genai.is_file() {
            true => Some(decoder_of(&genai)?),
            false => None,
        };
        let is_decoder = match &decoder {
            Some(named) => file.file_name().is_some_and(|name| name == named.as_str()),
            None => !PARTS.iter().any(|part| stem.starts_with(part)),
        };
        if !is_decoder {
            parts.push(file.display().to_string());
            continue;
        }
        let of = |base: &&&str| {
            stem.strip_prefix(**base)
                .is_some_and(|rest| rest.is_empty() || rest.starts_with('_'))
        };
        let base = DECODERS.iter().filter(of).max_by_key(|base| base.len());
        // A file of any other name is a plain export.
        let rank = base.and_then(|base| DECODERS.iter().position(|known| known == base));
        let mut suffix = base
            .map_or("", |base| stem[base.len()..].trim_start_matches('_'))
            .to_string();
        // Folders with one precision each are variants by name.
        let nested = !inside.as_os_str().is_empty() && inside != Path::new("onnx");
        let name = match (nested, suffix.is_empty()) {
            (true, true) => inside.display().to_string(),
            (true, false) => format!("{}/{suffix}", inside.display()),
            (false, true) => stem,
            (false, false) => suffix.clone(),
        };
        if nested {
            suffix = name.clone();
        }
        found.push(Export {
            rank: rank.unwrap_or(0),
            suffix,
            variant: Variant {
                name,
                bytes: bytes(&folder.join(&file))?,
                file,
            },
        });
    }
    // Two with the same name, in the folder and in `onnx/`, differ in their paths.
    let names: Vec<String> = found.iter().map(|e| e.variant.name.clone()).collect();
    for export in &mut found {
        if names.iter().filter(|name| **name == export.variant.name).count() > 1 {
            export.variant.name = export.variant.file.with_extension("").display().to_string();
        }
    }
    Ok((found, parts))
}

/// `.onnx` files in a folder and its subfolders, relative to the first folder.
fn collect(root: &Path, inside: &Path, depth: usize, files: &mut Vec<PathBuf>) -> Result<(), FilesError> {
    let folder = root.join(inside);
    let io = |source| FilesError::Io {
        path: folder.clone(),
        source,
    };
    for entry in fs::read_dir(&folder).map_err(io)? {
        let entry = entry.map_err(io)?;
        let name = entry.file_name();
        if name.to_string_lossy().starts_with('.') {
            continue;
        }
        let (path, from_root) = (entry.path(), inside.join(&name));
        if path.is_dir() {
            if depth > 0 {
                collect(root, &from_root, depth - 1, files)?;
            }
        } else if path.extension().is_some_and(|e| e == "onnx") {
            files.push(from_root);
        }
    }
    Ok(())
}

/// The decoder's file, from ORT-GenAI's configuration.
fn decoder_of(config: &Path) -> Result<String, FilesError> {
    let refuse = |message: String| FilesError::GenAi {
        path: config.to_path_buf(),
        message,
    };
    let text = fs::read_to_string(config).map_err(|source| FilesError::Io {
        path: config.to_path_buf(),
        source,
    })?;
    let value: serde_json::Value = serde_json::from_str(&text).map_err(|error| refuse(error.to_string()))?;
    let decoder = &value["model"]["decoder"];
    if decoder["pipeline"].is_array() {
        return Err(refuse(
            "its decoder is a pipeline of several exports, which are not converted".into(),
        ));
    }
    let name = decoder["filename"].as_str();
    let name = name.ok_or_else(|| refuse("it names no file of a decoder (model.decoder.filename)".into()))?;
    match config.with_file_name(name).is_file() {
        true => Ok(name.to_string()),
        false => Err(refuse(format!("it names the decoder {name:?}, which is missing"))),
    }
}

/// Bytes of an export and its external data, by exporters' names: `model.onnx_data`, `model.onnx.data`,
/// `model.onnx_data_1`.
fn bytes(model: &Path) -> Result<u64, FilesError> {
    let io = |source| FilesError::Io {
        path: model.to_path_buf(),
        source,
    };
    let name = model.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let mut bytes = fs::metadata(model).map_err(io)?.len();
    for entry in fs::read_dir(model.parent().unwrap_or(Path::new("."))).map_err(io)? {
        let entry = entry.map_err(io)?;
        let other = entry.file_name().to_string_lossy().into_owned();
        let is_data = other
            .strip_prefix(&name)
            .is_some_and(|rest| rest.starts_with("_data") || rest.starts_with(".data"));
        if is_data {
            bytes += fs::metadata(entry.path()).map_err(io)?.len();
        }
    }
    Ok(bytes)
}

/// Configurations and tokenizer are beside the export, above `onnx/`, or at the top of the given folder.
fn with_configs(model: PathBuf, given: Option<&Path>, variants: Vec<Variant>) -> ModelFiles {
    let beside = model.parent().filter(|folder| !folder.as_os_str().is_empty());
    let beside = beside.unwrap_or(Path::new(".")).to_path_buf();
    let is_onnx = |folder: &Path| match folder.file_name() {
        Some(name) => name == "onnx",
        // `.` has no name of its own.
        None => folder.canonicalize().is_ok_and(|folder| folder.ends_with("onnx")),
    };
    let above = is_onnx(&beside).then(|| match beside.parent() {
        Some(parent) if beside.file_name().is_some() && !parent.as_os_str().is_empty() => parent.to_path_buf(),
        Some(_) if beside.file_name().is_some() => PathBuf::from("."),
        _ => beside.join(".."),
    });
    let folders: Vec<PathBuf> = std::iter::once(beside.clone())
        .chain(above)
        .chain(given.map(Path::to_path_buf))
        .collect();
    let with = |names: &[&str]| {
        let mut folders = folders.iter();
        folders
            .find(|folder| names.iter().any(|name| folder.join(name).is_file()))
            .cloned()
    };
    ModelFiles {
        configs: with(&[CONFIG, GENERATION, GENAI]).unwrap_or(beside),
        tokenizer: with(&[TOKENIZER]).map(|folder| folder.join(TOKENIZER)),
        model,
        variants,
    }
}

/// The export of the token embeddings for a decoder's file: of the same variant (`embed_tokens_q4f16.onnx` beside
/// `decoder_model_merged_q4f16.onnx`) if there is one, or the plain one.
pub(super) fn embed_tokens(model: &Path) -> Option<PathBuf> {
    let stem = model.file_stem()?.to_string_lossy();
    let variants = stem.match_indices('_').map(|(at, _)| &stem[at..]);
    let names = variants.map(|variant| format!("embed_tokens{variant}.onnx"));
    let mut names = names.chain(["embed_tokens.onnx".to_string()]);
    names.find_map(|name| {
        let path = model.with_file_name(name);
        (path.is_file() && path != model).then_some(path)
    })
}
