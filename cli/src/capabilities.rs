//! `kvtier capabilities`: what this kvtierd can do.

use kvtier_proto::v1;
use serde::Serialize;

use crate::report::Report;
use crate::status::tier_text;
use crate::table::{Align, Table, printable};

#[derive(Debug, Serialize)]
struct Capabilities<'a> {
    version: &'a str,
    protocol_version: u32,
    verbs: &'a [String],
    tiers: Vec<String>,
    semantic_types: &'a [String],
    taint_effects: &'a [String],
    target_kinds: &'a [String],
    hint_actions: &'a [String],
    limits: Vec<Limit<'a>>,
}

#[derive(Debug, Serialize)]
struct Limit<'a> {
    name: &'a str,
    value: u64,
}

/// The report of an answer.
pub(crate) fn report(reply: &v1::CapabilitiesReply) -> Report {
    let capabilities = Capabilities {
        version: &reply.version,
        protocol_version: reply.protocol_version,
        verbs: &reply.verbs,
        tiers: reply.tiers.iter().map(|tier| tier_text(*tier)).collect(),
        semantic_types: &reply.semantic_types,
        taint_effects: &reply.taint_effects,
        target_kinds: &reply.target_kinds,
        hint_actions: &reply.hint_actions,
        limits: reply.limits.iter().map(|l| Limit { name: &l.name, value: l.value }).collect(),
    };
    Report::new(text(&capabilities), &capabilities, true)
}

fn text(c: &Capabilities<'_>) -> String {
    let mut out = format!("kvtierd {}  protocol {}\n", printable(c.version), c.protocol_version);
    for (name, list) in [
        ("verbs", c.verbs),
        ("tiers", &c.tiers),
        ("types", c.semantic_types),
        ("effects", c.taint_effects),
        ("targets", c.target_kinds),
        ("hints", c.hint_actions),
    ] {
        out += &format!("{name:<8} {}\n", printable(&list.join(" ")));
    }
    if c.limits.is_empty() {
        return out;
    }
    let mut table = Table::new(&[("LIMIT", Align::Left), ("VALUE", Align::Right)]);
    c.limits.iter().for_each(|limit| table.row([limit.name, &limit.value.to_string()]));
    out + &table.render(0)
}
