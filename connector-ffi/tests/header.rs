//! `include/kvtier.h` is what cbindgen makes of the code. `UPDATE_HEADER=1` rewrites it.

use std::path::Path;

#[test]
fn the_header_is_generated_from_the_code() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let config = cbindgen::Config::from_file(root.join("cbindgen.toml")).unwrap();
    let sources = ["types", "session", "scheduler", "worker"].map(|name| root.join(format!("src/ffi/{name}.rs")));
    let builder = sources.iter().fold(cbindgen::Builder::new().with_config(config), |b, path| b.with_src(path));
    let mut generated = Vec::new();
    builder.generate().unwrap().write(&mut generated);
    let generated = String::from_utf8(generated).unwrap();
    let path = root.join("include/kvtier.h");
    if std::env::var_os("UPDATE_HEADER").is_some() {
        std::fs::write(&path, &generated).unwrap();
    }
    let checked_in = std::fs::read_to_string(&path).unwrap_or_default();
    assert!(
        checked_in == generated,
        "kvtier.h is stale: run UPDATE_HEADER=1 cargo test -p kvtier-connector-ffi --test header"
    );
}
