use kvtier_types::SemanticType;

use super::*;

fn namespace() -> Namespace {
    Namespace {
        model: "m".into(),
        weights_digest: "w".into(),
        kv_dtype: "bfloat16".into(),
        quantization: "awq".into(),
        adapter_digest: "a".into(),
        hash_algorithm: HashAlgorithm::Sha256Cbor,
        hash_seed: "0".into(),
        hash_block_tokens: 16,
        revision: "r".into(),
    }
}

fn a_layout() -> Layout {
    Layout {
        attention_backend: "CPU_ATTN".into(),
        isa: "amx".into(),
        layout: "LBHNC".into(),
        tensor_parallel: 2,
        pipeline_parallel: 1,
        prefill_context_parallel: 1,
        decode_context_parallel: 1,
        shards: 2,
        groups: vec![
            GroupSpec { kind: GroupKind::Full, block_tokens: 32, layers: vec!["a".into()] },
            GroupSpec { kind: GroupKind::SlidingWindow { window_tokens: 64 }, block_tokens: 16, layers: vec![] },
            GroupSpec { kind: GroupKind::Mla, block_tokens: 16, layers: vec![] },
            GroupSpec { kind: GroupKind::State, block_tokens: 16, layers: vec![] },
        ],
        block_bytes: vec![1, 2, 3, 4],
    }
}

#[test]
fn identities_round_trip() {
    assert_eq!(Namespace::try_from(&v1::Namespace::from(&namespace())), Ok(namespace()));
    assert_eq!(layout(&v1::Layout::from(&a_layout()), 16), Ok(a_layout()));
}

#[test]
fn enums_round_trip_and_match_their_wire_names() {
    for t in Tier::ALL {
        assert_eq!(tier("t", v1::Tier::from(t).into()), Ok(Some(t)));
    }
    assert_eq!(tier("t", 0), Ok(None));
    assert!(tier("t", 99).is_err());
    for s in SemanticType::ALL {
        let wire = v1::SemanticType::from(s);
        assert_eq!(semantic(wire.into()), s);
        assert!(wire.as_str_name().ends_with(s.name()));
    }
    assert_eq!(semantic(-1), SemanticType::Unspecified);
    assert_eq!(v1::Outcome::from(Outcome::Clipped).as_str_name(), "CLIPPED");
}

#[test]
fn hostile_values_are_refused_by_name() {
    let long = "x".repeat(MAX_TEXT_BYTES + 1);
    let wire = v1::Namespace { model: long, ..v1::Namespace::from(&namespace()) };
    assert!(Namespace::try_from(&wire).unwrap_err().to_string().contains("namespace.model"));
    let wire = v1::Namespace { hash_algorithm: "md5".into(), ..v1::Namespace::from(&namespace()) };
    assert!(Namespace::try_from(&wire).unwrap_err().to_string().contains("md5"));
    let wire = v1::Layout { shards: 70_000, ..v1::Layout::from(&a_layout()) };
    assert!(layout(&wire, 16).unwrap_err().to_string().contains("layout.shards"));
    let wire = v1::GroupSpec { kind: 77, ..Default::default() };
    assert!(GroupSpec::try_from(&wire).is_err());
    assert!(unpack_keys(&[0; 33]).is_err());
    assert!(key("k", &[0; 31]).is_err());
}

#[test]
fn keys_round_trip_packed() {
    let keys = [BlockKey::new([1; 32]), BlockKey::new([2; 32])];
    assert_eq!(unpack_keys(&pack_keys(&keys)).unwrap(), keys);
}
