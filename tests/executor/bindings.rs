//! Bindings of a run: each input, output and cache once, by role or name, and nothing else.

use lapidary::backend::cpu::{Bindings, CompileOptions, CpuError, KvCaches, Program};
use lapidary::graph::Constant;
use lapidary::interface::Role;
use lapidary::lower::synthetic::Decoder;
use lapidary::lower::{LowerOptions, lower};
use lapidary::network::{Network, Profile};
use lapidary::tensor::Tensor;

/// A small model's program, its caches, and the numbers of a call.
struct Call {
    program: Program,
    caches: KvCaches,
    vocabulary: usize,
}

const ONE: [i32; 1] = [1];
const ROLES: [Role; 4] = [Role::TokenIds, Role::PositionIds, Role::WriteIndices, Role::LogitRows];

fn network(decoder: &Decoder) -> Network {
    let graph = decoder.graph_with(|_, dtype, shape| {
        let count = shape.iter().product();
        let values: Vec<f64> = (0..count).map(|i: usize| (i % 7) as f64 * 0.01).collect();
        Constant::tensor(Tensor::from_f64_as(dtype, shape.to_vec(), &values))
    });
    lower(&graph, &Profile::decode(16), &LowerOptions::default()).unwrap()
}

impl Call {
    fn new() -> Self {
        let decoder = Decoder::tiny();
        let network = network(&decoder);
        Call {
            program: Program::compile(&network, &CompileOptions::with_threads(1)).unwrap(),
            caches: KvCaches::new(&network).unwrap(),
            vocabulary: decoder.vocabulary,
        }
    }

    /// A run with the usual bindings, changed.
    fn run(&mut self, roles: &[Role], change: impl FnOnce(&mut Bindings<'_>)) -> Result<(), CpuError> {
        let mut logits = vec![0.0; self.vocabulary];
        let zero = [0];
        let mut bindings = Bindings::new();
        for role in roles {
            // The first token of a text: everything is 0 except the id.
            let values = if *role == Role::TokenIds { &ONE } else { &zero };
            bindings.input(*role, &values[..]);
        }
        bindings.output(Role::Logits, &mut logits[..]).caches(&mut self.caches);
        change(&mut bindings);
        self.program.run(&mut bindings)
    }
}

#[test]
fn roles_and_names_bind_the_same_ports() {
    let mut call = Call::new();
    assert_eq!(call.run(&ROLES, |_| {}), Ok(()));
    let by_name = call.run(&ROLES[1..], |bindings| {
        bindings.input("input_ids", &ONE[..]);
    });
    assert_eq!(by_name, Ok(()));
}

#[test]
fn what_is_missing_is_named() {
    let mut call = Call::new();
    for (i, role) in ROLES.iter().enumerate() {
        let mut roles = ROLES.to_vec();
        roles.remove(i);
        let (what, name) = ("input", role.name());
        assert_eq!(call.run(&roles, |_| {}), Err(CpuError::MissingBinding { what, name }));
    }
}

#[test]
fn what_is_unknown_is_named_with_what_there_is() {
    let mut call = Call::new();
    let error = call.run(&ROLES, |bindings| {
        bindings.input("attention_mask", &ONE[..]);
    });
    let Err(CpuError::UnknownBinding { what, name, known }) = error else {
        panic!("{error:?}")
    };
    assert_eq!((what, name.as_str()), ("input", "attention_mask"));
    assert_eq!(known, ROLES.map(|role| role.name()));
    // An output is not an input.
    let error = call.run(&ROLES, |bindings| {
        bindings.input(Role::Logits, &[0f32][..]);
    });
    assert!(matches!(error, Err(CpuError::UnknownBinding { .. })), "{error:?}");
}

#[test]
fn one_port_takes_one_binding() {
    let mut call = Call::new();
    let error = call.run(&ROLES, |bindings| {
        bindings.input("position_ids", &ONE[..]);
    });
    let (what, name) = ("input", "position_ids".to_string());
    assert_eq!(error, Err(CpuError::BoundTwice { what, name }));
}

/// KvCaches of a model with more layers, and of one with fewer.
#[test]
fn caches_are_those_of_the_model() {
    let of = |layers: usize| {
        let decoder = Decoder {
            layers,
            ..Decoder::tiny()
        };
        KvCaches::new(&network(&decoder)).unwrap()
    };
    let mut call = Call::new();
    call.caches = of(3);
    let error = call.run(&ROLES, |_| {}).unwrap_err();
    assert!(
        matches!(&error, CpuError::UnknownBinding { what: "cache", name, .. } if name == "key_cache.2"),
        "{error}"
    );
    call.caches = of(1);
    let error = call.run(&ROLES, |_| {}).unwrap_err();
    assert!(
        matches!(&error, CpuError::MissingBinding { what: "cache", name } if name == "key_cache.1"),
        "{error}"
    );
}
