//! Vectors printed by vLLM 0.32.0 (`hash_block_tokens` with `sha256_cbor`, `PYTHONHASHSEED=0`).

use super::{ExtraKey, HashChain};

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

fn first_block(extra: &[ExtraKey]) -> String {
    let tokens: Vec<u32> = (0..16).collect();
    hex(HashChain::new("0").push(&tokens, extra).as_bytes())
}

fn lora() -> ExtraKey {
    ExtraKey::Lora { name: "sql".into(), path: "/adapters/sql".into() }
}

fn salt() -> ExtraKey {
    ExtraKey::CacheSalt("tenantA".into())
}

fn image(identifier: &str, offset: i64) -> ExtraKey {
    ExtraKey::Multimodal { identifier: identifier.into(), offset }
}

#[test]
fn plain_blocks_match_vllm() {
    assert_eq!(first_block(&[]), "d830de3d42c00f25a2949b5d12d98642664a44872c1614c5b0147556276afc9c");
    let mut chain = HashChain::new("0");
    chain.push(&(0..16).collect::<Vec<u32>>(), &[]);
    let second: Vec<u32> = [70_000, 200, 30, 1 << 31, 5].into_iter().chain(0..11).collect();
    let want = "951ec8ef435b730d6a90b551972c4aa91a6626b7f789a75d21a5b87076609e15";
    assert_eq!(hex(chain.push(&second, &[]).as_bytes()), want);
}

#[test]
fn extra_keys_match_vllm() {
    let digest: Vec<u8> = (0..32).collect();
    let cases: [(&[ExtraKey], &str); 5] = [
        (&[salt()], "b369ed1147387070c9542cc12ec10dc4392e36a849b1d3f66319e48e8d5a85db"),
        (&[lora()], "350a4da5e633d110d868f4f306baf2fffff5e45ae028dcedc1c0b29bd9f0d7ea"),
        (&[image("abc123", -3), image("def", 40)], "7b60a3c78e580fb8e8f12655a39de8acd0d28e255331f341e478ceb25ab36d00"),
        (&[ExtraKey::PromptEmbeds(digest)], "b35aab804915f620cee19188eb57a761b2c1119e26993f0fd8c2b60c794f453f"),
        (&[lora(), image("abc123", 5), salt()], "9786af661999ab1e884f810ce661bf585a69c164aafad65f1bf70470d6cc94c1"),
    ];
    for (extra, want) in cases {
        assert_eq!(first_block(extra), want, "{extra:?}");
    }
}

#[test]
fn the_seed_matters() {
    let tokens: Vec<u32> = (0..16).collect();
    assert_ne!(HashChain::new("1").push(&tokens, &[]), HashChain::new("0").push(&tokens, &[]));
}
