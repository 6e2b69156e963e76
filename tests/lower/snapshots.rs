//! The lowering's output as text: one layer of each model, in the profiles that differ.

use lapidary::dim::{Dim, Sym};
use lapidary::lower::synthetic::Decoder;
use lapidary::lower::{AttentionForm, LowerOptions, lower};
use lapidary::network::{Logits, Profile, Tokens, WeightMode, verify, verify_interface};
use lapidary::tensor::DType;

use crate::models::gpt2;

fn one_layer() -> Decoder {
    Decoder {
        layers: 1,
        ..Decoder::tiny()
    }
}

fn snapshot(name: &str, graph: &lapidary::graph::Graph, profile: Profile, options: &LowerOptions) {
    let network = lower(graph, &profile, options).unwrap();
    verify(&network).unwrap();
    verify_interface(&network).unwrap();
    insta::with_settings!({ snapshot_path => "snapshots", prepend_module_to_snapshot => false, omit_expression => true }, {
        insta::assert_snapshot!(name, network.to_string());
    });
}

fn dynamic(logits: Logits) -> Profile {
    Profile {
        tokens: Tokens::Dynamic { min: 1, opt: 4, max: 8 },
        logits,
        ..Profile::decode(16)
    }
}

#[test]
fn grouped_decode() {
    snapshot(
        "grouped_decode",
        &one_layer().graph(),
        Profile::decode(16),
        &LowerOptions::default(),
    );
}

#[test]
fn half_prefill() {
    let config = Decoder {
        dtype: DType::F16,
        tied: true,
        ..one_layer()
    };
    let options = LowerOptions {
        weight_mode: WeightMode::Embed,
        ..LowerOptions::default()
    };
    snapshot("half_prefill", &config.graph(), Profile::prefill(4, 16), &options);
}

#[test]
fn windowed_qwen_dynamic() {
    let config = Decoder {
        window: Some(3),
        qk_norm: true,
        qkv_bias: true,
        ..one_layer()
    };
    snapshot(
        "windowed_qwen_dynamic",
        &config.graph(),
        dynamic(Logits::All),
        &LowerOptions::default(),
    );
}

#[test]
fn softcap_dynamic_rows() {
    let config = Decoder {
        softcap: 50.0,
        ..one_layer()
    };
    snapshot(
        "softcap_dynamic_rows",
        &config.graph(),
        dynamic(Logits::Rows),
        &LowerOptions::default(),
    );
}

#[test]
fn gpt2_prefill() {
    let options = LowerOptions {
        attention: AttentionForm::Decomposed,
        weight_mode: WeightMode::Strip,
        ..LowerOptions::default()
    };
    snapshot("gpt2_prefill", &gpt2(), Profile::prefill(4, 16), &options);
}

/// No profile leaves a symbol in a static network, and a dynamic one has only `tokens`.
#[test]
fn symbols() {
    let graph = Decoder::tiny().graph();
    let network = lower(&graph, &Profile::prefill(4, 16), &LowerOptions::default()).unwrap();
    assert!(
        network
            .tensors
            .iter()
            .flat_map(|t| &t.shape)
            .all(|d: &Dim| d.as_const().is_some())
    );
    let network = lower(&graph, &dynamic(Logits::Rows), &LowerOptions::default()).unwrap();
    let symbols: std::collections::BTreeSet<Sym> = network
        .tensors
        .iter()
        .flat_map(|t| &t.shape)
        .flat_map(Dim::symbols)
        .collect();
    assert_eq!(symbols.into_iter().collect::<Vec<_>>(), [Sym::tokens()]);
}
