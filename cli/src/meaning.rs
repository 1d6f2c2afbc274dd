//! What lies in which tier, by semantic type: a part of `kvtier status` and `kvtier top`.

use std::collections::BTreeMap;

use kvtier_proto::v1;
use kvtier_types::Tier;
use serde::Serialize;

use crate::status::tier_text;
use crate::table::{Align, Table};
use crate::units::bytes_text;

/// One semantic type's copies as JSON.
#[derive(Debug, Serialize)]
pub(crate) struct TypeRow {
    semantic: &'static str,
    copies: u64,
    bytes: u64,
    /// Bytes by tier.
    tiers: BTreeMap<String, u64>,
}

/// A row for each type that has a copy anywhere, those with most bytes first.
pub(crate) fn rows(uses: &[v1::TypeUse]) -> Vec<TypeRow> {
    let mut by_type: BTreeMap<&'static str, TypeRow> = BTreeMap::new();
    for u in uses.iter().filter(|u| u.copies > 0) {
        let semantic = kvtier_proto::convert::semantic(u.semantic).name();
        let empty = || TypeRow { semantic, copies: 0, bytes: 0, tiers: BTreeMap::new() };
        let row = by_type.entry(semantic).or_insert_with(empty);
        row.copies = row.copies.saturating_add(u.copies);
        row.bytes = row.bytes.saturating_add(u.bytes);
        let tier = row.tiers.entry(tier_text(u.tier)).or_default();
        *tier = tier.saturating_add(u.bytes);
    }
    let mut rows: Vec<TypeRow> = by_type.into_values().collect();
    rows.sort_by(|a, b| b.bytes.cmp(&a.bytes).then(a.semantic.cmp(b.semantic)));
    rows
}

/// The rows as a table, a column for each tier.
pub(crate) fn table(rows: &[TypeRow]) -> Table {
    let names: Vec<String> = Tier::ALL.iter().map(|tier| tier.name().to_uppercase()).collect();
    let mut columns = vec![("TYPE", Align::Left), ("COPIES", Align::Right)];
    columns.extend(names.iter().map(|name| (name.as_str(), Align::Right)));
    let mut table = Table::new(&columns);
    for row in rows {
        let mut cells = vec![row.semantic.to_owned(), row.copies.to_string()];
        cells.extend(
            Tier::ALL.iter().map(|tier| row.tiers.get(tier.name()).map_or_else(String::new, |n| bytes_text(*n))),
        );
        table.row(cells);
    }
    table
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn copies_are_summed_over_tiers() {
        let used = |semantic: v1::SemanticType, tier: v1::Tier, copies| v1::TypeUse {
            semantic: semantic.into(),
            tier: tier.into(),
            copies,
            bytes: copies << 20,
        };
        let rows = rows(&[
            used(v1::SemanticType::Scratchpad, v1::Tier::Host, 1),
            used(v1::SemanticType::ToolDefinition, v1::Tier::Host, 2),
            used(v1::SemanticType::ToolDefinition, v1::Tier::Disk, 3),
            used(v1::SemanticType::Document, v1::Tier::Disk, 0),
        ]);
        assert_eq!(
            table(&rows).render(0),
            "TYPE             COPIES  DEVICE     HOST     DISK  OBJECT\n\
             TOOL_DEFINITION       5       -  2.0 MiB  3.0 MiB       -\n\
             SCRATCHPAD            1       -  1.0 MiB        -       -\n"
        );
    }
}
