//! Aligned columns of text.

/// Rows of cells under a header, columns padded to their widest cell; numbers are right-aligned.
pub struct Table {
    rows: Vec<Vec<String>>,
}

impl Table {
    pub fn new<const N: usize>(header: [&str; N]) -> Self {
        Table {
            rows: vec![header.map(str::to_string).to_vec()],
        }
    }

    pub fn row<const N: usize>(&mut self, cells: [String; N]) {
        debug_assert_eq!(N, self.rows[0].len());
        self.rows.push(cells.to_vec());
    }

    pub fn render(&self) -> String {
        let columns = self.rows[0].len();
        let width = |c: usize| self.rows.iter().map(|r| r[c].chars().count()).max().unwrap_or(0);
        let widths: Vec<usize> = (0..columns).map(width).collect();
        let numeric = |c: usize| {
            let mut cells = self.rows[1..].iter().map(|r| r[c].as_str());
            self.rows.len() > 1 && cells.all(|cell| cell.is_empty() || cell.starts_with(|ch: char| ch.is_ascii_digit()))
        };
        let right: Vec<bool> = (0..columns).map(numeric).collect();
        let mut out = String::new();
        for row in &self.rows {
            let mut line = String::new();
            for (c, cell) in row.iter().enumerate() {
                let pad = " ".repeat(widths[c] - cell.chars().count());
                if right[c] {
                    line += &pad;
                    line += cell;
                } else {
                    line += cell;
                    line += &pad;
                }
                line += "  ";
            }
            out += line.trim_end();
            out.push('\n');
        }
        out
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn columns_line_up() {
        let mut table = super::Table::new(["op", "count"]);
        table.row(["MatMul".into(), "211".into()]);
        table.row(["Add".into(), "7".into()]);
        assert_eq!(table.render(), "op      count\nMatMul    211\nAdd         7\n");
    }
}
