//! The PTX of all variants of the decode kernels, packed by `scripts/gpu/compile_kernels.py`.

use std::collections::HashMap;
use std::io::Read;

use lzma_rust2::XzReader;

/// Name and bytes of each archive.
const ARCHIVES: [(&str, &[u8]); 8] = [
    ("attention-f16", include_bytes!("../device/decode/attention-f16.xz")),
    ("attention-bf16", include_bytes!("../device/decode/attention-bf16.xz")),
    (
        "product-f16-floats",
        include_bytes!("../device/decode/product-f16-floats.xz"),
    ),
    ("product-f16-i8", include_bytes!("../device/decode/product-f16-i8.xz")),
    ("product-f16-i4", include_bytes!("../device/decode/product-f16-i4.xz")),
    (
        "product-bf16-floats",
        include_bytes!("../device/decode/product-bf16-floats.xz"),
    ),
    ("product-bf16-i8", include_bytes!("../device/decode/product-bf16-i8.xz")),
    ("product-bf16-i4", include_bytes!("../device/decode/product-bf16-i4.xz")),
];

/// The PTX of every variant in an archive, by the variant's name. Panics if the archive, which is part of this program,
/// is invalid.
pub(super) fn variants(archive: &str) -> HashMap<String, String> {
    let (_, packed) = ARCHIVES
        .iter()
        .find(|(name, _)| *name == archive)
        .expect("an archive of the list");
    let mut text = String::new();
    let mut reader = XzReader::new(*packed, false);
    reader.read_to_string(&mut text).expect("a whole archive");
    let mut variants = HashMap::new();
    let mut rest = text.as_str();
    while !rest.is_empty() {
        let (head, tail) = rest.split_once('\n').expect("a line before each variant");
        let mut words = head.split(' ').skip(1);
        let (name, bytes) = (words.next().expect("a name"), words.next().expect("a size"));
        let (ptx, next) = tail.split_at(bytes.parse().expect("a number"));
        variants.insert(name.to_string(), ptx.to_string());
        rest = next;
    }
    variants
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use sha2::{Digest, Sha256};

    use super::*;

    /// By their hashes, the archives match the sources beside them; `compile_kernels.py --check` compiles them again.
    #[test]
    fn archives_are_of_their_sources() {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/backend/tensorrt/run/device/decode");
        let hashes = std::fs::read(folder.join("sources.json")).unwrap();
        let hashes: HashMap<String, String> = serde_json::from_slice(&hashes).unwrap();
        let mut sources = 0;
        for entry in std::fs::read_dir(&folder).unwrap() {
            let path = entry.unwrap().path();
            let name = path.file_name().unwrap().to_str().unwrap().to_string();
            if name.ends_with(".cu") || name.ends_with(".cuh") {
                let hash = Sha256::digest(std::fs::read(&path).unwrap());
                let hash: String = hash.iter().map(|byte| format!("{byte:02x}")).collect();
                assert_eq!(
                    hashes.get(&name),
                    Some(&hash),
                    "{name}: run scripts/gpu/compile_kernels.py"
                );
                sources += 1;
            } else if let Some(archive) = name.strip_suffix(".xz") {
                assert!(ARCHIVES.iter().any(|(known, _)| *known == archive), "{name}");
            }
        }
        assert_eq!(sources, hashes.len());
    }

    #[test]
    fn every_variant_is_ptx_with_its_entry() {
        for (archive, _) in ARCHIVES {
            let variants = variants(archive);
            let entry = archive.split('-').next().unwrap();
            assert!(variants.len() >= 12, "{archive}: {}", variants.len());
            for (name, ptx) in variants {
                let target = name.rsplit('-').next().unwrap();
                assert!(name.starts_with(archive), "{name}");
                assert!(
                    ptx.contains(&format!(".target {}", target.replace("sm", "sm_"))),
                    "{name}"
                );
                assert!(ptx.contains(&format!(".visible .entry {entry}(")), "{name}");
            }
        }
    }
}
