//! Files that lie beside an export.

use std::path::{Path, PathBuf};

/// The export of the token embeddings that belongs to a decoder's file: of the same variant (`embed_tokens_q4f16.onnx` beside
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
