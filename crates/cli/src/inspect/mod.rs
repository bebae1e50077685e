//! Questions to a running mesh: `proxy-status`, `proxy-config`, `describe`.
//!
//! Everything is asked through the Kubernetes API: a command is executed in the proxy's or control plane's container and
//! answers with the JSON of `model::query`. The commands return tables; `main` prints them. Nothing here changes
//! the cluster.

pub mod describe;
pub mod proxy_config;
pub mod proxy_status;
pub(crate) mod target;
pub mod tls_check;

use std::fmt;

use anyhow::Context;

/// A table with a header, printed with columns three spaces apart, as istioctl does.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Table {
    header: Vec<String>,
    rows: Vec<Vec<String>>,
}

impl Table {
    /// A table without rows.
    pub fn new(header: &[&str]) -> Table {
        Table {
            header: header.iter().map(|h| h.to_string()).collect(),
            rows: Vec::new(),
        }
    }

    /// Adds a row; it has one cell per column.
    pub fn row<S: Into<String>>(&mut self, cells: impl IntoIterator<Item = S>) {
        let cells: Vec<String> = cells.into_iter().map(Into::into).collect();
        debug_assert_eq!(cells.len(), self.header.len(), "a row has one cell per column");
        self.rows.push(cells);
    }

    /// Sorts the rows by their cells, left to right.
    pub fn sort(&mut self) {
        self.rows.sort();
    }
}

impl fmt::Display for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut widths: Vec<usize> = self.header.iter().map(|h| h.chars().count()).collect();
        for row in &self.rows {
            for (width, cell) in widths.iter_mut().zip(row) {
                *width = (*width).max(cell.chars().count());
            }
        }
        for row in std::iter::once(&self.header).chain(&self.rows) {
            let mut line = String::new();
            for (index, (cell, width)) in row.iter().zip(&widths).enumerate() {
                line.push_str(cell);
                if index + 1 < row.len() {
                    line.extend(std::iter::repeat_n(' ', width + 3 - cell.chars().count()));
                }
            }
            writeln!(f, "{}", line.trim_end())?;
        }
        Ok(())
    }
}

/// The cluster of the current kubeconfig context.
pub struct Mesh {
    /// Client of its API.
    pub client: kube::Client,
    /// Namespace of the context.
    pub namespace: String,
}

/// Connects to the current context and asks a question.
///
/// # Errors
/// No usable kubeconfig, or the question's own error.
pub fn ask<T>(question: impl AsyncFnOnce(&Mesh) -> anyhow::Result<T>) -> anyhow::Result<T> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("starting the runtime")?;
    runtime.block_on(async {
        let config = kube::Config::infer()
            .await
            .context("reading the kubeconfig; start a cluster with `mantlet cluster up`")?;
        let namespace = config.default_namespace.clone();
        let client = kube::Client::try_from(config).context("building a client from the kubeconfig")?;
        question(&Mesh { client, namespace }).await
    })
}

/// How an answer is printed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum Output {
    /// Columns.
    #[default]
    Short,
    /// JSON.
    Json,
    /// YAML.
    Yaml,
}

/// Renders a value as JSON or YAML text.
pub(crate) fn render<T: serde::Serialize>(value: &T, output: Output) -> anyhow::Result<String> {
    Ok(match output {
        Output::Yaml => serde_saphyr::to_string(value)?,
        _ => serde_json::to_string_pretty(value)? + "\n",
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tables_align() {
        let mut table = Table::new(&["NAME", "CDS"]);
        table.row(["sleep-abc.default", "SYNCED"]);
        table.row(["x", ""]);
        assert_eq!(
            table.to_string(),
            "NAME                CDS\nsleep-abc.default   SYNCED\nx\n"
        );
    }
}
