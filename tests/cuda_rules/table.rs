//! The table of rules.

/// One rule: a call under a condition, and what comes of it.
pub(crate) struct Row {
    pub(crate) id: String,
    pub(crate) expected: String,
    pub(crate) source: String,
    pub(crate) certainty: String,
}

const TABLE: &str = include_str!("../support/substitute-cuda/rules.tsv");
const COLUMNS: &str = "id\tcall\tcondition\texpected\tsource\tcertainty";

pub(crate) fn rows() -> Vec<Row> {
    let mut lines = TABLE.lines();
    assert_eq!(lines.next(), Some(COLUMNS), "the first line names the columns");
    lines.map(row).collect()
}

fn row(line: &str) -> Row {
    let cells: Vec<&str> = line.split('\t').collect();
    let [id, _call, _condition, expected, source, certainty] = cells[..] else {
        panic!("{line:?} has not six cells");
    };
    assert!(["header", "reported", "inferred"].contains(&certainty), "{certainty:?} of {id} is no certainty");
    let owned = str::to_owned;
    Row { id: owned(id), expected: owned(expected), source: owned(source), certainty: owned(certainty) }
}
