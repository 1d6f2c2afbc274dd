//! Where a pack or a file of tombstones of any writer lies, and how nodes tell each other of it.
//!
//! ```text
//! pack        <root>/<writer>/v2/<2 digits>/<64 digits>.pack     announced  <writer>/<64 digits>-<bytes of the pack>
//! tombstones  <root>/<node>/evicted/<64 digits>.v1               announced  <node>/evicted-<64 digits>
//! ```
//! *Invariants*: whatever a listing or a peer says, only these forms become a [`PackAt`] or a [`TombAt`], and each has one
//! path, below its writer's folder (`hostile_names_are_refused`).

use std::collections::BTreeMap;

use kvtier_types::NodeId;
use object_store::path::Path;

use crate::object::pack::PackName;

/// What a folder of tombstones is called, and how the names of its files end.
const TOMBS: &str = "evicted";
const TOMBS_END: &str = ".v1";
/// Longest announced name.
const MAX_ANNOUNCED_BYTES: usize = NodeId::MAX_BYTES + 1 + 64 + 1 + 10;
/// Most writers told apart; folders beyond are not looked at.
pub(super) const MAX_WRITERS: usize = 1 << 16;

/// A pack and whose it is.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(in crate::object) struct PackAt {
    pub(in crate::object) writer: NodeId,
    pub(in crate::object) name: PackName,
}

impl PackAt {
    /// Where it lies below the floor's `root`.
    pub(super) fn path(&self, root: &Path) -> Path {
        self.name.path(&folder(root, &self.writer))
    }

    /// What a peer is told of it.
    pub(in crate::object) fn announce(&self, pack_bytes: u64) -> String {
        format!("{}/{}-{pack_bytes}", self.writer, hex::encode(self.name.0))
    }

    /// The pack and its length as a peer told them; `None` for anything that [`Self::announce`] does not make of a pack
    /// that an index can hold.
    pub(super) fn parse(announced: &str) -> Option<(Self, u64)> {
        if announced.len() > MAX_ANNOUNCED_BYTES {
            return None;
        }
        let (writer, rest) = announced.split_once('/')?;
        let (digits, bytes) = rest.split_once('-')?;
        let writer = NodeId::new(writer).ok()?;
        let mut name = [0; 32];
        hex::decode_to_slice(digits, &mut name).ok()?;
        let bytes: u32 = bytes.parse().ok()?;
        let at = Self { writer, name: PackName(name) };
        (at.announce(u64::from(bytes)) == announced).then_some((at, u64::from(bytes)))
    }

    /// How it is called in reports.
    pub(super) fn shown(&self) -> String {
        format!("{}/{}", self.writer, hex::encode(self.name.0))
    }
}

/// A file of tombstones and who wrote it.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct TombAt {
    pub(super) burier: NodeId,
    pub(super) name: [u8; 32],
}

impl TombAt {
    /// Where it lies below the floor's `root`.
    pub(super) fn path(&self, root: &Path) -> Path {
        tombs_folder(root, &self.burier).join(format!("{}{TOMBS_END}", hex::encode(self.name)))
    }

    /// What a peer is told of it.
    pub(super) fn announce(&self) -> String {
        format!("{}/{TOMBS}-{}", self.burier, hex::encode(self.name))
    }

    /// The file as a peer told it; `None` for anything that [`Self::announce`] does not make.
    pub(super) fn parse(announced: &str) -> Option<Self> {
        if announced.len() > MAX_ANNOUNCED_BYTES {
            return None;
        }
        let (burier, rest) = announced.split_once('/')?;
        let at = Self::of(NodeId::new(burier).ok()?, rest.strip_prefix(TOMBS)?.strip_prefix('-')?)?;
        (at.announce() == announced).then_some(at)
    }

    fn of(burier: NodeId, digits: &str) -> Option<Self> {
        let mut name = [0; 32];
        hex::decode_to_slice(digits, &mut name).ok()?;
        Some(Self { burier, name })
    }
}

/// The folder of a node's files of tombstones below the floor's `root`.
pub(super) fn tombs_folder(root: &Path, burier: &NodeId) -> Path {
    root.clone().join(burier.as_str()).join(TOMBS)
}

/// The folder of a writer below the floor's `root`, as its tier names it.
pub(super) fn folder(root: &Path, writer: &NodeId) -> Path {
    root.clone().join(writer.as_str()).join("v2")
}

/// The writers seen in one listing: each id is allocated once.
#[derive(Debug, Default)]
pub(super) struct Writers(BTreeMap<String, NodeId>);

impl Writers {
    /// The pack at a listed path; `None` for what is none, and for those of too many writers.
    pub(super) fn pack_at(&mut self, root: &Path, listed: &Path) -> Option<PackAt> {
        let first = listed.prefix_match(root)?.next()?;
        let writer = self.get(first.as_ref())?;
        let name = PackName::parse(&folder(root, &writer), listed)?;
        Some(PackAt { writer, name })
    }

    /// The file of tombstones at a listed path; `None` as for packs.
    pub(super) fn tombs_at(&mut self, root: &Path, listed: &Path) -> Option<TombAt> {
        let mut parts = listed.prefix_match(root)?;
        let (first, folder, file) = (parts.next()?, parts.next()?, parts.next()?);
        if folder.as_ref() != TOMBS || parts.next().is_some() {
            return None;
        }
        let at = TombAt::of(self.get(first.as_ref())?, file.as_ref().strip_suffix(TOMBS_END)?)?;
        (at.path(root) == *listed).then_some(at)
    }

    fn get(&mut self, folder: &str) -> Option<NodeId> {
        if let Some(known) = self.0.get(folder) {
            return Some(known.clone());
        }
        let id = NodeId::new(folder).ok().filter(|_| self.0.len() < MAX_WRITERS)?;
        self.0.insert(folder.to_owned(), id.clone());
        Some(id)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample() -> PackAt {
        PackAt { writer: NodeId::new("node-a.rack_1").unwrap(), name: PackName([0xab; 32]) }
    }

    #[test]
    fn names_round_trip() {
        let (at, root) = (sample(), Path::from("a/b"));
        assert_eq!(PackAt::parse(&at.announce(4711)), Some((at.clone(), 4711)));
        assert_eq!(Writers::default().pack_at(&root, &at.path(&root)), Some(at.clone()));
        assert_eq!(Writers::default().pack_at(&Path::default(), &at.path(&Path::default())), Some(at));
        let tombs = TombAt { burier: NodeId::new("node-a.rack_1").unwrap(), name: [0xab; 32] };
        assert_eq!(TombAt::parse(&tombs.announce()), Some(tombs.clone()));
        assert_eq!(Writers::default().tombs_at(&root, &tombs.path(&root)), Some(tombs.clone()));
        assert_eq!(Writers::default().pack_at(&root, &tombs.path(&root)), None);
        assert_eq!(PackAt::parse(&tombs.announce()), None, "older builds refuse the name");
        assert_eq!(TombAt::parse(&sample().announce(1)), None);
    }

    #[test]
    fn hostile_names_are_refused() {
        let digits = "ab".repeat(32);
        let bad = [
            String::new(),
            "/".to_owned(),
            format!("{digits}-1"),
            format!("/{digits}-1"),
            format!("../{digits}-1"),
            format!("./{digits}-1"),
            format!("a/b/{digits}-1"),
            format!("a/../{digits}-1"),
            format!("a%2f/{digits}-1"),
            format!("a\0/{digits}-1"),
            format!("{}/{digits}-1", "w".repeat(254)),
            format!("a/{}-1", digits.to_uppercase()),
            format!("a/{}-1", &digits[2..]),
            format!("a/{digits}ab-1"),
            format!("a/{digits}"),
            format!("a/{digits}-"),
            format!("a/{digits}-01"),
            format!("a/{digits}-+1"),
            format!("a/{digits}--1"),
            format!("a/{digits}-1 "),
            format!("a/{digits}-4294967296"),
            format!("a/{digits}.pack"),
            format!("a/{digits}-1\n"),
            "x".repeat(1 << 20),
        ];
        for bad in bad {
            assert_eq!(PackAt::parse(&bad), None, "{bad:.80?}");
        }
        let bad = ["", "/", "a", "a/", "a/evicted", "a/evicted-", "a/evicted-ab", "../evicted-{}", "a/b/evicted-{}"];
        let bad = bad.into_iter().chain([
            "a/evicted-{}-1",
            "a/evicted-{} ",
            "a/evicted--{}",
            "a/v2-{}",
            "/evicted-{}",
            "a/{}",
        ]);
        for bad in bad.map(|bad| bad.replace("{}", &digits)).chain([format!("a/evicted-{}", digits.to_uppercase())]) {
            assert_eq!(TombAt::parse(&bad), None, "{bad:.80?}");
        }
    }

    #[test]
    fn foreign_paths_are_not_packs() {
        let (at, root) = (sample(), Path::from("a/b"));
        let good = at.path(&root).to_string();
        let mut writers = Writers::default();
        for foreign in [
            good.replace("a/b/", "a/"),
            good.replace("/v2/", "/v3/"),
            good.replace("node-a.rack_1/", "node a/"),
            good.replace("node-a.rack_1/", ""),
            good.replace("node-a.rack_1/", "x/node-a/"),
            good.replace(".pack", ".tmp"),
            "a/b".to_owned(),
            "a/b/node-a.rack_1/v2/probe".to_owned(),
        ] {
            assert_eq!(writers.pack_at(&root, &Path::from(foreign.as_str())), None, "{foreign}");
            assert_eq!(writers.tombs_at(&root, &Path::from(foreign.as_str())), None, "{foreign}");
        }
        let good = TombAt { burier: NodeId::new("a").unwrap(), name: [0xab; 32] }.path(&root).to_string();
        for foreign in [
            good.replace("/evicted/", "/v2/"),
            good.replace("/evicted/", "/evicted/x/"),
            good.replace(".v1", ".v2"),
            good.replace("/abab", "/ABab"),
            good.replace("/abab", "/ab"),
            format!("{good}/x"),
        ] {
            assert_eq!(writers.tombs_at(&root, &Path::from(foreign.as_str())), None, "{foreign}");
        }
    }
}
