//! Tenants and operators: which users of this machine and which cache salts belong to whom.
//!
//! Salts are secrets of their requests. The file may hold them as they are, or as digests under a key that only the
//! daemon reads: `kvtierd --salt-digest KEY_FILE` prints the digest of the salt on its standard input.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;

use kvtier_types::{FieldHasher, TenantId};
use serde::Deserialize;

use super::{Config, ConfigError};

/// Most tenants of a node.
const MAX_TENANTS: usize = 4096;
/// Permissions of the sockets when none are configured.
const DEFAULT_MODE: u32 = 0o600;

/// Digest of a cache salt.
pub type SaltDigest = [u8; 32];

/// Who may act for all tenants, beside root, who runs the daemon, and callers of the TCP control port.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Operators {
    /// Users of this machine.
    pub uids: Vec<u32>,
}

/// One tenant.
#[derive(Clone, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Tenant {
    /// Its name: letters, digits, `-`, `_` and `.`.
    pub id: String,
    /// Users of this machine whose calls and engines are this tenant's.
    pub uids: Vec<u32>,
    /// Cache salts whose blocks are this tenant's.
    pub salts: Vec<String>,
    /// The same as digests, 64 hexadecimal digits each.
    pub salt_digests: Vec<String>,
    /// File with the key of `salt_digests`; the same for all tenants that have one, or one each.
    pub salt_key_file: Option<PathBuf>,
}

impl std::fmt::Debug for Tenant {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // Salts are not for logs.
        f.debug_struct("Tenant")
            .field("id", &self.id)
            .field("uids", &self.uids)
            .field("salts", &self.salts.len())
            .field("salt_digests", &self.salt_digests.len())
            .finish_non_exhaustive()
    }
}

/// Tenants and operators as calls are judged by them.
#[derive(Debug, Clone, Default)]
pub struct Tenancy {
    by_uid: BTreeMap<u32, TenantId>,
    operators: BTreeSet<u32>,
    /// Keys of digests, each with the digests under it.
    by_salt: BTreeMap<Vec<u8>, BTreeMap<SaltDigest, TenantId>>,
}

/// The digest of a salt under a key.
#[must_use]
pub fn salt_digest(key: &[u8], salt: &str) -> SaltDigest {
    FieldHasher::new("kvtier tenant salt v1").bytes(key).text(salt).finish()
}

/// The same as `salt_digests` has it: 64 hexadecimal digits. White space around the key does not count.
#[must_use]
pub fn salt_digest_text(key: &[u8], salt: &str) -> String {
    hex::encode(salt_digest(key.trim_ascii(), salt))
}

impl Tenancy {
    /// The tenant of a user of this machine.
    #[must_use]
    pub fn of_uid(&self, uid: u32) -> Option<&TenantId> {
        self.by_uid.get(&uid)
    }

    /// Whether a user of this machine is listed as an operator.
    #[must_use]
    pub fn is_operator(&self, uid: u32) -> bool {
        self.operators.contains(&uid)
    }

    /// The tenant whose salt this is.
    #[must_use]
    pub fn of_salt(&self, salt: &str) -> Option<&TenantId> {
        self.by_salt.iter().find_map(|(key, digests)| digests.get(&salt_digest(key, salt)))
    }

    fn take_uids(&mut self, id: &TenantId, uids: &[u32]) -> Result<(), ConfigError> {
        let field = |reason| Err(ConfigError::Field { field: "tenants.uids", reason });
        for uid in uids {
            if *uid == 0 || self.operators.contains(uid) {
                return field(format!(
                    "user {uid} of tenant {id} is an operator, who acts for all: take it out of one"
                ));
            }
            if let Some(other) = self.by_uid.insert(*uid, id.clone()) {
                return field(format!("user {uid} is listed twice: {other} and {id}"));
            }
        }
        Ok(())
    }

    fn take_salt(&mut self, id: &TenantId, key: &[u8], digest: SaltDigest) -> Result<(), ConfigError> {
        let other = self.by_salt.entry(key.to_vec()).or_default().insert(digest, id.clone());
        match other {
            None => Ok(()),
            Some(other) => {
                let reason = format!("one salt is listed twice: {other} and {id}");
                Err(ConfigError::Field { field: "tenants.salts", reason })
            }
        }
    }
}

impl Tenant {
    fn key(&self) -> Result<Vec<u8>, ConfigError> {
        let field = |reason| ConfigError::Field { field: "tenants.salt_key_file", reason };
        let Some(path) = &self.salt_key_file else {
            return Err(field(format!("tenant {} has salt_digests: name the file that holds their key", self.id)));
        };
        let key = std::fs::read(path).map_err(|e| field(format!("{}: {e}", path.display())))?;
        let key = key.trim_ascii().to_vec();
        if key.len() < 16 {
            return Err(field(format!("{}: a key has at least 16 bytes", path.display())));
        }
        Ok(key)
    }
}

impl Config {
    /// Tenants and operators, checked. Reads the files of salt keys.
    ///
    /// # Errors
    /// [`ConfigError::Field`] naming the field, and what is wrong with it.
    pub fn tenancy(&self) -> Result<Tenancy, ConfigError> {
        let field = |field, reason: String| ConfigError::Field { field, reason };
        let mut tenancy = Tenancy { operators: self.operators.uids.iter().copied().collect(), ..Tenancy::default() };
        if self.tenants.len() > MAX_TENANTS {
            return Err(field("tenants", format!("at most {MAX_TENANTS}")));
        }
        let mut ids = BTreeSet::new();
        for tenant in &self.tenants {
            let id = TenantId::new(&tenant.id).map_err(|e| field("tenants.id", e.to_string()))?;
            if id == TenantId::shared() || tenant.id.starts_with("salt-") {
                return Err(field(
                    "tenants.id",
                    format!("{id} is what blocks of nobody are called: choose another id"),
                ));
            }
            if !ids.insert(id.clone()) {
                return Err(field("tenants.id", format!("{id} is listed twice")));
            }
            tenancy.take_uids(&id, &tenant.uids)?;
            for salt in &tenant.salts {
                if salt.is_empty() {
                    return Err(field("tenants.salts", format!("{id}: blocks without a salt are everybody's")));
                }
                tenancy.take_salt(&id, &[], salt_digest(&[], salt))?;
            }
            if !tenant.salt_digests.is_empty() {
                let key = tenant.key()?;
                for text in &tenant.salt_digests {
                    let digest = hex::decode(text).ok().and_then(|bytes| bytes.try_into().ok());
                    let bad = || field("tenants.salt_digests", format!("{id}: {text:?} is not 64 hexadecimal digits"));
                    tenancy.take_salt(&id, &key, digest.ok_or_else(bad)?)?;
                }
            }
        }
        let strangers = tenancy.by_uid.len() + tenancy.operators.len();
        if strangers > 0 && self.socket_mode()? & 0o066 == 0 {
            let reason = "0600 keeps other users out: set 0660, with a group of theirs on run_dir, or 0666";
            return Err(field("listen.socket_mode", reason.into()));
        }
        Ok(tenancy)
    }

    /// Permissions of the Unix sockets.
    ///
    /// # Errors
    /// [`ConfigError::Field`] for what is no mode that a socket can work with.
    pub fn socket_mode(&self) -> Result<u32, ConfigError> {
        let Some(text) = &self.listen.socket_mode else { return Ok(DEFAULT_MODE) };
        let mode = u32::from_str_radix(text, 8).ok().filter(|mode| mode & !0o777 == 0 && mode & 0o600 == 0o600);
        let reason =
            format!("{text:?} is not an octal mode from 0600 to 0777 with which the daemon's user can connect");
        mode.ok_or(ConfigError::Field { field: "listen.socket_mode", reason })
    }
}

#[cfg(test)]
mod tests {
    use super::super::Config;
    use super::*;

    fn parse(text: &str) -> Result<Tenancy, String> {
        let config: Config = toml::from_str(text).map_err(|e| e.to_string())?;
        config.socket_mode().map_err(|e| e.to_string())?;
        config.tenancy().map_err(|e| e.to_string())
    }

    const OPEN: &str = "[listen]\nsocket_mode = \"0666\"\n";

    #[test]
    fn users_and_salts_have_their_tenants() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("key");
        std::fs::write(&file, "a key of some length\n").unwrap();
        let digest = hex::encode(salt_digest(b"a key of some length", "secret"));
        let text = format!(
            "{OPEN}[operators]\nuids = [7]\n[[tenants]]\nid = \"a\"\nuids = [1001, 1002]\nsalts = [\"plain\"]\n\
             [[tenants]]\nid = \"b\"\nsalt_key_file = {file:?}\nsalt_digests = [\"{digest}\"]"
        );
        let tenancy = parse(&text).unwrap();
        let id = |id| Some(TenantId::new(id).unwrap());
        assert_eq!((tenancy.of_uid(1002).cloned(), tenancy.of_uid(7).cloned()), (id("a"), None));
        assert!(tenancy.is_operator(7) && !tenancy.is_operator(1001));
        assert_eq!(tenancy.of_salt("plain").cloned(), id("a"));
        assert_eq!(tenancy.of_salt("secret").cloned(), id("b"));
        assert_eq!(tenancy.of_salt("other"), None);
        let config: Config = toml::from_str(&text).unwrap();
        assert!(!format!("{config:?}").contains("plain"), "salts are not shown");
    }

    #[test]
    fn mistakes_are_named() {
        let cases = [
            ("[[tenants]]\nid = \"a b\"", "tenants.id"),
            ("[[tenants]]\nid = \"shared\"", "tenants.id"),
            ("[[tenants]]\nid = \"salt-01\"", "tenants.id"),
            ("[[tenants]]\nid = \"a\"\n[[tenants]]\nid = \"a\"", "listed twice"),
            ("[[tenants]]\nid = \"a\"\nuids = [5]", "listen.socket_mode"),
            ("[listen]\nsocket_mode = \"777777\"", "listen.socket_mode"),
            ("[listen]\nsocket_mode = \"0466\"", "listen.socket_mode"),
            ("[[tenants]]\nid = \"a\"\nuids = [0]", "tenants.uids"),
            ("[[tenants]]\nid = \"a\"\nuids = [5]\n[[tenants]]\nid = \"b\"\nuids = [5]", "tenants.uids"),
            ("[operators]\nuids = [5]\n[[tenants]]\nid = \"a\"\nuids = [5]", "tenants.uids"),
            ("[[tenants]]\nid = \"a\"\nsalts = [\"\"]", "tenants.salts"),
            ("[[tenants]]\nid = \"a\"\nsalts = [\"x\"]\n[[tenants]]\nid = \"b\"\nsalts = [\"x\"]", "tenants.salts"),
            ("[[tenants]]\nid = \"a\"\nsalt_digests = [\"00\"]", "tenants.salt_key_file"),
            ("[[tenants]]\nid = \"a\"\nname = \"x\"", "name"),
        ];
        for (text, want) in cases {
            let err = parse(text).unwrap_err();
            assert!(err.contains(want), "{text:?}: {err}");
        }
    }
}
