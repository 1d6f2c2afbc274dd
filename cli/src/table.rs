//! Aligned columns for a terminal.

/// How a column's cells are set.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Align {
    /// Text.
    Left,
    /// Numbers.
    Right,
}

/// A table: columns as wide as their widest cell, two spaces apart, no trailing blanks.
#[derive(Debug, Clone)]
pub struct Table {
    columns: Vec<(String, Align)>,
    rows: Vec<Vec<String>>,
}

impl Table {
    /// A table with these headings.
    #[must_use]
    pub fn new(columns: &[(&str, Align)]) -> Self {
        Self { columns: columns.iter().map(|(name, align)| ((*name).to_owned(), *align)).collect(), rows: Vec::new() }
    }

    /// Adds a row. Missing cells are empty, cells beyond the last column are dropped; an empty cell prints as `-`.
    pub fn row<S: AsRef<str>>(&mut self, cells: impl IntoIterator<Item = S>) {
        let mut row: Vec<String> =
            cells.into_iter().take(self.columns.len()).map(|cell| printable(cell.as_ref())).collect();
        row.resize(self.columns.len(), "-".to_owned());
        self.rows.push(row);
    }

    /// True without rows.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.rows.is_empty()
    }

    /// The table as lines, each indented by `indent` spaces.
    #[must_use]
    pub fn render(&self, indent: usize) -> String {
        let headings: Vec<String> = self.columns.iter().map(|(name, _)| name.clone()).collect();
        let lines = || std::iter::once(&headings).chain(&self.rows);
        let widths: Vec<usize> = (0..self.columns.len())
            .map(|i| lines().filter_map(|line| line.get(i)).map(|cell| cell.chars().count()).max().unwrap_or(0))
            .collect();
        lines().map(|line| self.line(line, &widths, indent)).collect()
    }

    fn line(&self, cells: &[String], widths: &[usize], indent: usize) -> String {
        let mut line = " ".repeat(indent);
        for ((cell, width), (_, align)) in cells.iter().zip(widths).zip(&self.columns) {
            match align {
                Align::Left => line.push_str(&format!("{cell:<width$}  ")),
                Align::Right => line.push_str(&format!("{cell:>width$}  ")),
            }
        }
        line.truncate(line.trim_end().len());
        line.push('\n');
        line
    }
}

/// `text` without control characters (names come from requests of strangers and go to a terminal); `-` when empty.
#[must_use]
pub fn printable(text: &str) -> String {
    if text.is_empty() {
        return "-".to_owned();
    }
    text.chars().map(|c| if c.is_control() { '?' } else { c }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_aligned_without_trailing_blanks() {
        let mut table = Table::new(&[("TIER", Align::Left), ("BLOCKS", Align::Right), ("DETAIL", Align::Left)]);
        table.row(["host", "12", "ok"]);
        table.row(["disk", "123456789", ""]);
        table.row(["x"]);
        assert_eq!(
            table.render(1),
            " TIER     BLOCKS  DETAIL\n host         12  ok\n disk  123456789  -\n x             -  -\n"
        );
    }

    #[test]
    fn an_empty_table_prints_its_headings() {
        let table = Table::new(&[("KEY", Align::Left), ("BYTES", Align::Right)]);
        assert!(table.is_empty());
        assert_eq!(table.render(0), "KEY  BYTES\n");
    }

    #[test]
    fn control_characters_do_not_reach_the_terminal() {
        let mut table = Table::new(&[("MODEL", Align::Left)]);
        table.row(["a\u{1b}[31mred\nline"]);
        assert_eq!(table.render(0), "MODEL\na?[31mred?line\n");
    }
}
