//! A package without its weights: for shipping, for version control, for refitting later.

use std::path::Path;

use super::manifest::Manifest;
use super::staging::{Staging, carry_over};
use super::{Package, PackageError, Writer};
use crate::network::WeightMode;

/// Makes a copy of a package without weights: no weights file, no engines that contain weights. The manifest still
/// records the weights, so that only the same ones, or the same kind, are accepted later. Returns the manifest of the
/// copy.
pub fn strip(package: &Package, target: &Path, force: bool) -> Result<Manifest, PackageError> {
    let mut manifest = package.manifest.clone();
    manifest.weights.stripped = true;
    manifest
        .engines
        .retain(|engine| engine.weight_mode != WeightMode::Embed);
    let staging = Staging::new(target, force)?;
    let graph = staging.folder().join(&manifest.graph.file);
    std::fs::copy(package.path(&manifest.graph.file)?, &graph).map_err(PackageError::io(&graph))?;
    if let Some(constants) = &manifest.constants {
        let to = staging.folder().join(&constants.file);
        std::fs::copy(package.path(&constants.file)?, &to).map_err(PackageError::io(&to))?;
    }
    carry_over(package, &staging, &manifest)?;
    Writer::resume(staging, force, manifest).finish()
}
