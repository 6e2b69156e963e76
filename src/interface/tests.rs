use super::*;

const KEY: CacheId = CacheId {
    layer: 0,
    part: CachePart::Key,
};
const VALUE: CacheId = CacheId {
    layer: 0,
    part: CachePart::Value,
};

fn shape(cache: CacheId, _: usize) -> Result<CacheShape, InterfaceError> {
    Ok(CacheShape {
        cache,
        kv_heads: 2,
        head_dim: 8,
        dtype: DType::F16,
    })
}

const INPUTS: [&str; 5] = [
    "input_ids",
    "position_ids",
    "write_indices",
    "key_cache.0",
    "value_cache.0",
];
const OUTPUTS: [&str; 3] = ["logits", "updated_key_cache.0", "updated_value_cache.0"];

fn made(inputs: &[&str], outputs: &[&str]) -> Result<Interface<usize>, Vec<InterfaceError>> {
    let inputs = inputs.iter().enumerate().map(|(i, name)| (*name, i));
    let outputs = outputs.iter().enumerate().map(|(i, name)| (*name, 100 + i));
    Interface::from_names(inputs, outputs, shape).map_err(|errors| errors.0)
}

#[test]
fn names_round_trip() {
    let mut roles = vec![
        Role::TokenIds,
        Role::PositionIds,
        Role::WriteIndices,
        Role::LogitRows,
        Role::Logits,
    ];
    for layer in [0, 1, 9, 10, 127] {
        for part in CachePart::ALL {
            let cache = CacheId { layer, part };
            roles.extend([Role::Cache(cache), Role::UpdatedCache(cache)]);
        }
    }
    for role in roles {
        assert_eq!(role.name().parse(), Ok(role), "{role}");
        let json = serde_json::to_string(&role).unwrap();
        assert_eq!(json, format!("\"{role}\""));
        assert_eq!(serde_json::from_str::<Role>(&json).unwrap(), role);
    }
}

#[test]
fn other_names_are_no_roles() {
    for name in [
        "",
        "x",
        "Logits",
        "input_ids ",
        "key_cache",
        "key_cache.",
        "key_cache.x",
        "key_cache.-1",
        "key_cache.+1",
        "key_cache.01",
        "key_cache.99999999999999999999",
        "keys_cache.0",
        "past_key_cache.0",
        "updated_logits",
        "updated_updated_key_cache.0",
    ] {
        assert_eq!(name.parse::<Role>(), Err(UnknownName(name.to_string())), "{name:?}");
    }
}

#[test]
fn ports_are_found_by_role() {
    let interface = made(&INPUTS, &OUTPUTS).unwrap();
    assert_eq!(interface.input(Role::WriteIndices), Some(2));
    assert_eq!(interface.input(Role::LogitRows), None);
    assert_eq!(interface.logits(), 100);
    assert_eq!(interface.role_of(4), Some(Role::Cache(VALUE)));
    assert_eq!(interface.role_of(5), None);
    let pairs: Vec<_> = interface
        .caches()
        .iter()
        .map(|p| (p.shape.cache, p.input, p.output))
        .collect();
    assert_eq!(pairs, [(KEY, 3, 101), (VALUE, 4, 102)]);
    assert_eq!(
        interface.caches()[0].shape.to_string(),
        "key_cache.0 f16[batch, 2, capacity, 8]"
    );
    let mapped = interface.map(|id| id + 1000);
    assert_eq!(mapped.signature(), interface.signature());
    assert_eq!(mapped.caches()[1].output, 1102);
}

#[test]
fn what_is_missing_is_named() {
    for (i, name) in INPUTS.iter().enumerate() {
        let mut inputs = INPUTS.to_vec();
        inputs.remove(i);
        let role = name.parse().unwrap();
        assert_eq!(
            made(&inputs, &OUTPUTS),
            Err(vec![InterfaceError::Missing { role }]),
            "{name}"
        );
    }
    for (i, name) in OUTPUTS.iter().enumerate() {
        let mut outputs = OUTPUTS.to_vec();
        outputs.remove(i);
        let role = name.parse().unwrap();
        assert_eq!(
            made(&INPUTS, &outputs),
            Err(vec![InterfaceError::Missing { role }]),
            "{name}"
        );
    }
}

/// Layers are counted without gaps: a cache of layer 1 needs those of layer 0.
#[test]
fn a_gap_between_layers_is_missing_its_caches() {
    let second = |names: &[&str]| names.iter().map(|name| name.replace(".0", ".1")).collect::<Vec<_>>();
    let (inputs, outputs) = (second(&INPUTS), second(&OUTPUTS));
    let inputs: Vec<&str> = inputs.iter().map(String::as_str).collect();
    let outputs: Vec<&str> = outputs.iter().map(String::as_str).collect();
    let errors = made(&inputs, &outputs).unwrap_err();
    let missing = [
        Role::Cache(KEY),
        Role::UpdatedCache(KEY),
        Role::Cache(VALUE),
        Role::UpdatedCache(VALUE),
    ];
    assert_eq!(errors, missing.map(|role| InterfaceError::Missing { role }));
}

/// The number of layers in an untrusted file costs no memory.
#[test]
fn a_huge_layer_number_is_refused_at_once() {
    let inputs = [
        "input_ids",
        "position_ids",
        "write_indices",
        "key_cache.18446744073709551614",
    ];
    assert!(made(&inputs, &["logits"]).is_err());
    let inputs = [
        "input_ids",
        "position_ids",
        "write_indices",
        "key_cache.18446744073709551615",
    ];
    assert!(made(&inputs, &["logits"]).is_err());
}

#[test]
fn duplicates_strangers_and_wrong_sides_are_refused() {
    let mut twice = INPUTS.to_vec();
    twice.insert(4, "key_cache.0");
    assert_eq!(
        made(&twice, &OUTPUTS),
        Err(vec![InterfaceError::Duplicate { role: Role::Cache(KEY) }])
    );
    let mut stranger = INPUTS.to_vec();
    stranger.push("attention_mask");
    let name = "attention_mask".to_string();
    let side = Side::Input;
    assert_eq!(
        made(&stranger, &OUTPUTS),
        Err(vec![InterfaceError::Unknown { side, name }])
    );
    let mut wrong = OUTPUTS.to_vec();
    wrong.insert(0, "logit_rows");
    assert_eq!(
        made(&INPUTS, &wrong),
        Err(vec![InterfaceError::WrongSide { role: Role::LogitRows }])
    );
    let order = [
        "position_ids",
        "input_ids",
        "write_indices",
        "key_cache.0",
        "value_cache.0",
    ];
    let errors = made(&order, &OUTPUTS).unwrap_err();
    assert!(matches!(&errors[..], [InterfaceError::Order { .. }]), "{errors:?}");
    // One value in two roles.
    let port = |role, id| Port { role, id };
    let inputs = vec![
        port(Role::TokenIds, 0),
        port(Role::PositionIds, 0),
        port(Role::WriteIndices, 1),
    ];
    let errors = Interface::new(inputs, vec![port(Role::Logits, 9)], shape)
        .unwrap_err()
        .0;
    assert_eq!(
        errors,
        [InterfaceError::Duplicate {
            role: Role::PositionIds
        }]
    );
}

#[test]
fn every_fault_is_told_at_once() {
    let errors = made(&["input_ids", "input_ids", "mask"], &[]).unwrap_err();
    let text = InterfaceErrors(errors).to_string();
    for part in [
        "the canonical graph has no input \"mask\"",
        "the input input_ids occurs twice",
        "the input position_ids is missing",
        "the output logits is missing",
    ] {
        assert!(text.contains(part), "{text}");
    }
}

#[test]
fn a_signature_survives_json() {
    let signature = made(&INPUTS, &OUTPUTS).unwrap().signature();
    let json = serde_json::to_value(&signature).unwrap();
    assert_eq!(
        json["caches"][1],
        serde_json::json!({"layer": 0, "part": "value", "kv_heads": 2, "head_dim": 8, "dtype": "f16"})
    );
    assert_eq!(serde_json::from_value::<Signature>(json).unwrap(), signature);
}
