//! `kvtierd`: serves a node's KV-cache tiers.
#![forbid(unsafe_code)]

use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;

use clap::Parser;
use kvtierd::config::Config;
use kvtierd::config::tenants::salt_digest_text;
use kvtierd::{open_files, recovery, rules, serve};
use tokio::signal::unix::{SignalKind, signal};
use tracing_subscriber::EnvFilter;

/// The kvtier node daemon: owns this node's KV-cache tiers and serves engines and operators.
#[derive(Debug, Parser)]
#[command(name = "kvtierd", version)]
struct Args {
    /// Configuration file (TOML). Without one, the defaults.
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Check the configuration, print what is in force, and exit.
    #[arg(long)]
    check: bool,
    /// Print the digest of the cache salt on standard input under the key in FILE, for `tenants.salt_digests`, and exit.
    #[arg(long, value_name = "FILE")]
    salt_digest: Option<PathBuf>,
    /// Log as JSON lines.
    #[arg(long)]
    log_json: bool,
}

fn main() -> ExitCode {
    let args = Args::parse();
    if let Some(key) = &args.salt_digest {
        return print_salt_digest(key);
    }
    let config = match Config::load(args.config.as_deref()) {
        Ok(config) => config,
        Err(error) => {
            eprintln!("kvtierd: {error}");
            return ExitCode::from(2);
        }
    };
    if args.check {
        if let Err(error) = rules::RulesFile::open(&config) {
            eprintln!("kvtierd: {error}");
            return ExitCode::from(2);
        }
        println!("{config:#?}\nconfiguration ok");
        return ExitCode::SUCCESS;
    }
    let filter = EnvFilter::try_from_env("KVTIER_LOG").unwrap_or_else(|_| EnvFilter::new("info"));
    let log = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
    if args.log_json {
        log.json().init()
    } else {
        log.init()
    }
    open_files::raise(&config);
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().thread_name("kvtierd").build();
    let ended = runtime.map_err(anyhow::Error::from).and_then(|runtime| {
        let ended = runtime.block_on(serve_until_signal(config));
        runtime.shutdown_timeout(std::time::Duration::from_secs(2));
        ended
    });
    match ended {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("kvtierd: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn print_salt_digest(key: &std::path::Path) -> ExitCode {
    let digest = std::fs::read(key).and_then(|key| {
        let salt = std::io::read_to_string(std::io::stdin())?;
        Ok(salt_digest_text(&key, salt.trim_end_matches('\n')))
    });
    match digest {
        Ok(digest) => {
            println!("{digest}");
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("kvtierd: {}: {error}", key.display());
            ExitCode::from(2)
        }
    }
}

async fn serve_until_signal(config: Config) -> anyhow::Result<()> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut hangup = signal(SignalKind::hangup())?;
    let node = recovery::open(config).await?;
    let of_task = Arc::clone(&node);
    node.tasks.spawn(async move {
        loop {
            tokio::select! {
                () = of_task.stopping.cancelled() => return,
                _ = hangup.recv() => drop(rules::reload(&of_task).await),
            }
        }
    });
    let stop = async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
    };
    serve::run(node, stop).await
}
