//! Models and profiles that cannot be lowered. Single graphs are in tests/files/lower.

use lapidary::interface::{InterfaceError, InterfaceErrors, Role};
use lapidary::lower::synthetic::Decoder;
use lapidary::lower::{LowerOptions, lower};
use lapidary::network::{Profile, Tokens};
use lapidary::tensor::DType;

use crate::models::dims;

#[test]
fn profiles_that_cannot_be() {
    let graph = Decoder::tiny().graph();
    let refused = |profile: Profile| {
        lower(&graph, &profile, &LowerOptions::default())
            .unwrap_err()
            .to_string()
    };
    let error = refused(Profile::prefill(17, 16));
    assert!(error.contains("17 tokens do not fit a cache of 16 slots"), "{error}");
    let error = refused(Profile {
        tokens: Tokens::Dynamic { min: 4, opt: 2, max: 8 },
        ..Profile::decode(16)
    });
    assert!(error.contains("4 to 8 tokens (opt 2)"), "{error}");
    let error = refused(Profile {
        batch: 0,
        ..Profile::decode(16)
    });
    assert!(
        error.contains("0 sequences") || error.contains("at least 1") || error.contains("empty"),
        "{error}"
    );
}

/// Inputs and outputs that a session could not bind.
#[test]
fn interfaces_that_are_not_canonical() {
    let missing = |errors: InterfaceErrors| match &errors.0[..] {
        [InterfaceError::Missing { role }] => *role,
        other => panic!("{other:?}"),
    };
    let mut graph = Decoder::tiny().graph();
    let last = graph.outputs.pop().unwrap();
    let role = missing(graph.canonical_interface().unwrap_err());
    assert_eq!(role.name(), graph.value(last).name);
    let mut graph = Decoder::tiny().graph();
    graph.outputs.remove(0);
    assert_eq!(missing(graph.canonical_interface().unwrap_err()), Role::Logits);
    // An input that is not in the interface is not bound.
    let mut graph = Decoder::tiny().graph();
    graph.add_input("attention_mask", DType::I64, dims(&[1, 16]));
    let errors = graph.canonical_interface().unwrap_err();
    assert_eq!(
        errors.to_string(),
        "the canonical graph has no input \"attention_mask\""
    );
}

/// A batch fixed by the export cannot change.
#[test]
fn a_fixed_batch_stays() {
    let mut graph = Decoder::tiny().graph();
    for id in graph.inputs.clone() {
        let shape = graph.value_mut(id).shape.as_mut().unwrap();
        shape[0] = dims(&[1])[0].clone();
    }
    assert!(lower(&graph, &Profile::decode(16), &LowerOptions::default()).is_ok());
    let error = lower(
        &graph,
        &Profile {
            batch: 2,
            ..Profile::decode(16)
        },
        &LowerOptions::default(),
    )
    .unwrap_err();
    assert!(error.to_string().contains("[2, 1]"), "{error}");
}
