//! Targets as the daemon takes them, from those of the command line.
//!
//! *Bounds*: at most [`MAX_KEYS`] block keys of one command.

use std::path::Path;

use bytes::Bytes;
use kvtier_proto::v1::target::Target as Kind;
use kvtier_proto::{convert, v1};
use kvtier_types::{BlockKey, NamespaceId};

use crate::args::TargetArgs;
use crate::client::Client;
use crate::error::CliError;
use crate::files::{is_stdin, parse_keys, parse_tokens, read_file};
use crate::keys::{KeyArg, resolve};

/// Block keys of one command: what the daemon takes in one call.
const MAX_KEYS: usize = 65_536;

/// What was named: keys in the order given, then the other targets.
#[derive(Debug, Clone, Default)]
pub(crate) struct Named {
    pub(crate) keys: Vec<BlockKey>,
    pub(crate) others: Vec<v1::Target>,
}

impl Named {
    /// All of it as targets, the keys first.
    pub(crate) fn targets(&self) -> Vec<v1::Target> {
        let keys = (!self.keys.is_empty()).then(|| convert::block_targets(&self.keys));
        keys.into_iter().chain(self.others.iter().cloned()).collect()
    }
}

/// Resolves key prefixes and reads files.
///
/// # Errors
/// What resolving keys can fail with, and [`CliError::File`].
pub(crate) async fn named(client: &mut Client, args: &TargetArgs) -> Result<Named, CliError> {
    // Files first: nothing is asked when they are wrong.
    let (keys, others) = (keys(args)?, others(args)?);
    Ok(Named { keys: resolve(client, &keys).await?, others })
}

/// Keys of the command line, then those of the file.
fn keys(args: &TargetArgs) -> Result<Vec<KeyArg>, CliError> {
    let mut keys = args.keys.clone();
    if let Some(file) = &args.keys_file {
        if args.keys_file == args.tokens_file && is_stdin(file) {
            let both = "--keys-file and --tokens-file cannot both be standard input: write one to a file";
            return Err(CliError::Usage(both.to_owned()));
        }
        keys.extend(parse_keys(&read_file(file)?).map_err(|reason| CliError::file(file, reason))?);
    }
    if keys.len() > MAX_KEYS {
        let many = format!("{} block keys are more than the {MAX_KEYS} of one call: give them in parts", keys.len());
        return Err(CliError::Usage(many));
    }
    Ok(keys)
}

fn others(args: &TargetArgs) -> Result<Vec<v1::Target>, CliError> {
    let mut kinds = Vec::new();
    if let Some(session_id) = &args.session {
        let span = args.tokens.unwrap_or_default();
        let session_id = session_id.clone();
        kinds.push(Kind::Session(v1::SessionTarget { session_id, start_token: span.start, end_token: span.end }));
    }
    if let Some(program_id) = &args.program {
        let program_id = program_id.clone();
        let (descendants, exclusive) = (args.descendants, args.exclusive);
        kinds.push(Kind::Program(v1::ProgramTarget { program_id, descendants, exclusive }));
    }
    if let Some(file) = &args.tokens_file {
        kinds.push(Kind::Tokens(prompt(file, args)?));
    }
    let tenant = args.tenant.clone().unwrap_or_default();
    Ok(kinds.into_iter().map(|kind| v1::Target { target: Some(kind), tenant: tenant.clone() }).collect())
}

fn prompt(file: &Path, args: &TargetArgs) -> Result<v1::TokensTarget, CliError> {
    let ids = parse_tokens(&read_file(file)?).map_err(|reason| CliError::file(file, reason))?;
    let model = args.model.clone().unwrap_or_default();
    let namespace = model.parse::<NamespaceId>().ok();
    Ok(v1::TokensTarget {
        namespace_id: namespace.map(|id| Bytes::copy_from_slice(id.as_bytes())).unwrap_or_default(),
        model: if namespace.is_some() { String::new() } else { model },
        token_ids: ids.iter().flat_map(|id| id.to_le_bytes()).collect::<Vec<u8>>().into(),
        cache_salt: args.salt.clone().unwrap_or_default(),
    })
}

/// What a target is called in a report.
pub(crate) fn target_text(target: &v1::Target) -> String {
    match &target.target {
        Some(Kind::Session(s)) if s.start_token == 0 && s.end_token == 0 => format!("session {}", s.session_id),
        Some(Kind::Session(s)) if s.end_token == 0 => format!("session {} {}..", s.session_id, s.start_token),
        Some(Kind::Session(s)) => format!("session {} {}..{}", s.session_id, s.start_token, s.end_token),
        Some(Kind::Program(p)) => format!("program {}", p.program_id),
        Some(Kind::Tokens(t)) => format!("prompt of {} tokens", t.token_ids.len() / 4),
        Some(Kind::Blocks(_)) => "blocks".to_owned(),
        None => "target".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn targets_carry_all_that_was_said() {
        let args = TargetArgs {
            session: Some("s1".into()),
            tokens: Some("16..48".parse().unwrap()),
            program: Some("p1".into()),
            exclusive: true,
            tenant: Some("acme".into()),
            ..TargetArgs::default()
        };
        let targets = others(&args).unwrap();
        let names: Vec<String> = targets.iter().map(target_text).collect();
        assert_eq!(names, ["session s1 16..48", "program p1"]);
        assert!(targets.iter().all(|t| t.tenant == "acme"));
        let Some(Kind::Program(program)) = &targets[1].target else { panic!("no program") };
        assert!(program.exclusive && !program.descendants);
    }

    #[test]
    fn a_prompt_is_of_a_model_or_a_namespace() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("ids");
        std::fs::write(&file, "1 258").unwrap();
        let named = |model: &str| {
            let args = TargetArgs { model: Some(model.into()), salt: Some("x".into()), ..TargetArgs::default() };
            prompt(&file, &args).unwrap()
        };
        let by_name = named("tiny-llama");
        assert_eq!((by_name.model.as_str(), by_name.namespace_id.len()), ("tiny-llama", 0));
        assert_eq!(by_name.token_ids[..], [1, 0, 0, 0, 2, 1, 0, 0]);
        assert_eq!(by_name.cache_salt, "x");
        let by_id = named(&"ab".repeat(32));
        assert_eq!((by_id.model.as_str(), by_id.namespace_id.len()), ("", 32));
        assert!(prompt(&dir.path().join("none"), &TargetArgs::default()).is_err());
    }

    #[test]
    fn keys_of_a_file_come_after_those_of_the_line_and_are_bounded() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("keys");
        let args = TargetArgs {
            keys: vec!["00000000".parse().unwrap()],
            keys_file: Some(file.clone()),
            ..TargetArgs::default()
        };
        std::fs::write(&file, "11111111 22222222").unwrap();
        let named = keys(&args).unwrap();
        assert_eq!(named, ["00000000", "11111111", "22222222"].map(|key| key.parse().unwrap()));
        std::fs::write(&file, "11111111\n".repeat(MAX_KEYS)).unwrap();
        let error = keys(&args).unwrap_err();
        assert!(error.is_usage() && error.to_string().contains("65537 block keys are more"), "{error}");
    }

    #[test]
    fn standard_input_is_read_once() {
        let stdin = Some("-".into());
        let args = TargetArgs { keys_file: stdin.clone(), tokens_file: stdin, ..TargetArgs::default() };
        assert!(keys(&args).unwrap_err().is_usage());
    }
}
