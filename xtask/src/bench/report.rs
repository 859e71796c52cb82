//! Rows of figures, for people and for programs.

use serde::Serialize;
use std::{fmt, fs::File, io::Write as _};

/// One figure.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub(super) struct Row {
    /// What was measured.
    pub(super) name: String,
    /// Which figure of it: `p50`.
    pub(super) metric: &'static str,
    pub(super) value: f64,
    pub(super) unit: &'static str,
    /// The name of what it is set against.
    pub(super) compared_to: Option<String>,
    /// `value`, divided by the same metric of what it is compared to, or the median of such ratios.
    pub(super) ratio: Option<f64>,
}

/// All figures of a bench.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Report {
    /// How it was measured.
    pub(super) about: String,
    pub(super) rows: Vec<Row>,
}

impl Report {
    /// Writes the rows as JSON.
    pub(super) fn write(&self, mut file: File) -> anyhow::Result<()> {
        serde_json::to_writer_pretty(&file, &self.rows)?;
        Ok(writeln!(file)?)
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{}\n", self.about)?;
        let width = self.rows.iter().map(|row| row.name.chars().count()).max().unwrap_or(0);
        for Row { name, metric, value, unit, compared_to, ratio } in &self.rows {
            write!(f, "{name:width$}  {metric:9}  {value:>9.2} {unit}")?;
            if let (Some(ratio), Some(other)) = (ratio, compared_to) {
                write!(f, "  {ratio:>6.3} of {other}")?;
            }
            writeln!(f)?;
        }
        Ok(())
    }
}
