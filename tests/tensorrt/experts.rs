//! Mixtures of experts become engines: chosen matrices gathered for one token, all experts for several, in fp32 and
//! fp16, with bound, embedded and quantized weights.

use std::path::Path;

use lapidary::lower::{ExpertsForm, LowerOptions};
use lapidary::network::WeightMode;
use lapidary::tensor::DType;
use lapidary::{onnx, passes};

use crate::models::{profiles, try_build};

#[test]
fn exports_build_in_every_form() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/experts");
    let mut failed = Vec::new();
    for name in ["dynamo18-qwen2moe", "contrib-moe", "contrib-qmoe4"] {
        let graph = onnx::read(folder.join(name).join("model.onnx")).unwrap();
        for dtype in [DType::F32, DType::F16] {
            let options = passes::CanonicalizeOptions {
                max_positions: 64,
                dtype: Some(dtype),
                ..Default::default()
            };
            let canonical = passes::canonicalize(graph.clone(), &options).unwrap().graph;
            for weight_mode in [WeightMode::Bind, WeightMode::Embed] {
                let engines = LowerOptions {
                    weight_mode,
                    ..LowerOptions::for_engines()
                };
                let plain = LowerOptions {
                    experts: ExpertsForm::All,
                    prefill_experts: Some(ExpertsForm::Chosen),
                    ..engines.clone()
                };
                for (options, profiles) in [(&engines, &profiles(32)[..3]), (&plain, &profiles(32)[..2])] {
                    for profile in profiles {
                        if let Err(error) = try_build(&canonical, profile, options) {
                            failed.push(format!("{name} {dtype} {weight_mode:?}: {error}"));
                        }
                    }
                }
            }
        }
    }
    assert!(failed.is_empty(), "{} failures:\n{}", failed.len(), failed.join("\n"));
}
