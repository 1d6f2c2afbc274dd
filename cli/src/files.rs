//! What files of the command line name: token ids, block keys.
//!
//! *Bounds*: at most [`MAX_TOKENS`] tokens of a prompt, in a file of at most [`MAX_FILE_BYTES`].

use std::io::Read;
use std::path::Path;

use serde_json::Value;

use crate::error::CliError;
use crate::keys::KeyArg;

/// Tokens of one prompt: with four bytes each they fit half of a message.
const MAX_TOKENS: usize = 1 << 20;
/// Largest file that is read: `kvtier ls --json` of the keys of one call fits.
const MAX_FILE_BYTES: u64 = 128 << 20;
/// Levels of JSON that are searched for keys: what kvtier prints has three.
const MAX_LEVELS: u32 = 8;

/// True for `-`.
pub(crate) fn is_stdin(file: &Path) -> bool {
    file.as_os_str() == "-"
}

/// The text of a file; `-` is standard input.
///
/// # Errors
/// [`CliError::File`] when it cannot be read, is too large or is no text.
pub(crate) fn read_file(file: &Path) -> Result<String, CliError> {
    let read = |from: &mut dyn Read| {
        let mut text = String::new();
        from.take(MAX_FILE_BYTES + 1).read_to_string(&mut text).map(|_| text)
    };
    let text = if is_stdin(file) {
        read(&mut std::io::stdin().lock())
    } else {
        std::fs::File::open(file).and_then(|mut file| read(&mut file))
    };
    let text = text.map_err(|e| CliError::file(file, e.to_string()))?;
    if text.len() as u64 > MAX_FILE_BYTES {
        return Err(CliError::file(file, format!("it is larger than {} MiB", MAX_FILE_BYTES >> 20)));
    }
    Ok(text)
}

/// Token ids: a JSON array, or numbers with blanks between.
///
/// # Errors
/// What is wrong with the text.
pub(crate) fn parse_tokens(text: &str) -> Result<Vec<u32>, String> {
    let ids: Vec<u32> = if text.trim_start().starts_with('[') {
        serde_json::from_str(text).map_err(|e| format!("it is no JSON array of token ids: {e}"))?
    } else {
        let id = |word: &str| word.parse().map_err(|_| format!("{word:?} is no token id"));
        text.split_whitespace().map(id).collect::<Result<_, _>>()?
    };
    match ids.len() {
        0 => Err("it has no token ids".to_owned()),
        n if n > MAX_TOKENS => Err(format!("{n} tokens are more than the {MAX_TOKENS} of one call")),
        _ => Ok(ids),
    }
}

/// Block keys: words (what follows a `#` in a line is not read), or JSON as kvtier prints it: one document or a line for
/// each event.
///
/// # Errors
/// What is wrong with the text.
pub(crate) fn parse_keys(text: &str) -> Result<Vec<KeyArg>, String> {
    let mut keys = Vec::new();
    if text.trim_start().starts_with(['[', '{']) {
        for document in serde_json::Deserializer::from_str(text).into_iter::<Value>() {
            collect(&document.map_err(|e| format!("it is no JSON: {e}"))?, MAX_LEVELS, &mut keys)?;
        }
    } else {
        let words = text.lines().flat_map(|line| line.split('#').next().unwrap_or_default().split_whitespace());
        words.map(key).try_for_each(|key| key.map(|key| keys.push(key)))?;
    }
    if keys.is_empty() { Err("it has no block keys".to_owned()) } else { Ok(keys) }
}

fn key(word: &str) -> Result<KeyArg, String> {
    word.parse().map_err(|e| format!("{word:?}: {e}"))
}

/// Keys are texts of a list, and what objects call `key`.
fn collect(value: &Value, levels: u32, keys: &mut Vec<KeyArg>) -> Result<(), String> {
    match value {
        Value::String(text) if !text.is_empty() => keys.push(key(text)?),
        Value::Array(list) if levels > 0 => list.iter().try_for_each(|v| collect(v, levels - 1, keys))?,
        Value::Object(fields) if levels > 0 => {
            let mut named = ["key", "blocks", "outcomes"].into_iter().filter_map(|name| fields.get(name));
            named.try_for_each(|v| collect(v, levels - 1, keys))?;
        }
        _ => {}
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn token_ids_are_json_or_words() {
        for text in ["[1, 2,3]", "1 2\n3\n", " \n[1,2,\n3]\n", "1\t2 3"] {
            assert_eq!(parse_tokens(text), Ok(vec![1, 2, 3]), "{text}");
        }
        for (text, reason) in [
            ("", "no token ids"),
            ("[]", "no token ids"),
            ("1, 2", "\"1,\" is no token id"),
            ("[1, -2]", "no JSON array"),
            ("[1", "no JSON array"),
            ("4294967296", "is no token id"),
        ] {
            assert!(parse_tokens(text).unwrap_err().contains(reason), "{text}");
        }
        let many = "7 ".repeat(MAX_TOKENS + 1);
        assert!(parse_tokens(&many).unwrap_err().contains("more than"));
    }

    #[test]
    fn keys_are_words_or_what_kvtier_prints() {
        let wanted: Vec<KeyArg> = ["0011aabb", "1122bbcc"].map(|text| text.parse().unwrap()).into();
        for text in [
            "0011aabb 1122bbcc",
            "# two blocks\n0011AABB.. # the first\n\n1122bbcc\n",
            r#"["0011aabb", "1122bbcc"]"#,
            r#"{"blocks": [{"key": "0011aabb", "replicas": [{"tier": "host"}]}, {"key": "1122bbcc"}], "truncated": false}"#,
            r#"{"totals": {"MISSING": 2}, "outcomes": [{"key": "0011aabb"}, {"key": "1122bbcc", "blocks": 1}]}"#,
            "{\"key\": \"0011aabb\"}\n{\"lost\": true}\n{\"key\": \"1122bbcc\"}\n",
        ] {
            assert_eq!(parse_keys(text).as_ref(), Ok(&wanted), "{text}");
        }
        for (text, reason) in [
            ("", "no block keys"),
            ("# none", "no block keys"),
            (r#"{"claims": []}"#, "no block keys"),
            (r#"{"key": ""}"#, "no block keys"),
            ("0011aabb xyz", "\"xyz\": a block key has 64"),
            ("[\"0011aabb\"", "no JSON"),
        ] {
            let error = parse_keys(text).unwrap_err();
            assert!(error.contains(reason), "{text}: {error}");
        }
    }
}
