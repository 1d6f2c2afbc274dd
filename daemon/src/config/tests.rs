use super::*;

fn parse(text: &str) -> Result<Config, String> {
    let config: Config = toml::from_str(text).map_err(|e| e.to_string())?;
    config.check().map_err(|e| e.to_string())?;
    Ok(config)
}

#[test]
fn an_empty_file_is_the_defaults() {
    let config = parse("").unwrap();
    assert_eq!(config.host.capacity, ByteSize(4 << 30));
    assert!(config.core_config().unwrap().disk);
}

#[test]
fn mistakes_are_named() {
    let cases = [
        ("hots = 1", "hots"),
        ("[host]\ncapacity = \"4\"", "not a size"),
        ("[host]\ncapacity = \"1MiB\"", "host.capacity"),
        ("[host]\npages = \"big\"", "host.pages"),
        ("[disk]\nio = \"fast\"", "disk.io"),
        ("[disk]\ncapacity = \"300MiB\"", "disk.capacity"),
        ("[disk]\ncapacity = \"8TiB\"", "set disk.segment to 512 MiB or more"),
        ("[disk]\nsegment = \"100MB\"", "disk.segment"),
        ("[disk]\nsegment = \"8GiB\"", "disk.segment"),
        ("[object]\nenabled = true\ncapacity = \"8MiB\"", "object.capacity"),
        ("[object]\nenabled = true\nurl = \"ftp://x\"", "object.url"),
        ("[offload]\nmode = \"lazy\"", "offload.mode"),
        ("[limits]\nlookup = \"2h\"", "limits.lookup"),
        ("[object]\nwrite = \"some\"", "object.write"),
        ("[claims]\nnode_share_percent = 95", "claims.node_share_percent"),
        ("[claims]\nowner_share_percent = 60", "claims.owner_share_percent"),
        ("[claims]\nmax_claims = 100000", "claims.max_claims"),
        ("[claims]\nmax_blocks = 10000000", "claims.max_blocks"),
        ("[transport]\norder = [\"rdma\"]", "transport.order"),
        ("[cluster]\ndirectory = \"http://h:1\"", "cluster.directory"),
        ("[cluster]\ndirectory = \"redis://u:secret@h:1\"", "cluster.directory"),
        ("[cluster]\ndirectory = \"redis://h:1\"\nlisten = \"0.0.0.0:1\"", "cluster.advertise"),
        ("[cluster]\ndirectory = \"redis://h:1\"\nheartbeat = \"1ms\"", "cluster.heartbeat"),
        ("[cluster]\ndirectory = \"redis://h:1\"\n[transport]\nlease = \"1s\"", "transport.lease"),
    ];
    for (text, want) in cases {
        let err = parse(text).unwrap_err();
        assert!(err.contains(want), "{text:?}: {err}");
    }
}

#[test]
fn a_directory_by_tls_is_refused_without_its_password() {
    let error = parse("[cluster]\ndirectory = \"rediss://:secret@h:6380\"").unwrap_err();
    assert!(error.contains("TLS is not built in") && !error.contains("secret"), "{error}");
    parse("[cluster]\ndirectory = \"valkey+cluster://a:1,b:2\"\nlisten = \"127.0.0.1:0\"").unwrap();
}
