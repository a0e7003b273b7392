//! The report for people: a table of text.

use std::fmt::Write;

use super::results::{Results, Spread};
use xtask::arguments::Column;
use xtask::rows::{Group, Row};

/// The whole report.
pub(crate) fn table(results: &Results) -> String {
    let ratios = ratios(results);
    let mut lines = vec![head(results, &ratios)];
    let mut last = None;
    for row in &results.rows {
        if last.replace(row.group).is_some_and(|last| last != row.group) {
            lines.push(Vec::new());
        }
        lines.push(line(results, row, &ratios));
    }
    let mut text = aligned(&lines);
    let _always_fits = writeln!(
        text,
        "\nMedians of {} rounds of {} s (least–greatest). Ratios are medians of the ratios within each round.",
        results.rounds, results.seconds
    );
    for fact in &results.facts {
        let _always_fits = writeln!(text, "{fact}");
    }
    for failure in &results.failures {
        let _always_fits = writeln!(text, "FAILED: {failure}");
    }
    text
}

/// Which column is compared with which: ours with every other, where both are there.
pub(crate) fn ratios(results: &Results) -> Vec<(Column, Column)> {
    let others = results.columns.iter().filter(|&&column| column != Column::Ztunnel);
    match results.columns.contains(&Column::Ztunnel) {
        true => others.map(|&other| (Column::Ztunnel, other)).collect(),
        false => Vec::new(),
    }
}

/// A number with as many digits as are worth reading.
pub(crate) fn number(value: f64) -> String {
    match value.abs() {
        size if size >= 100_000.0 => format!("{:.0}k", value / 1000.0),
        size if size >= 10_000.0 => format!("{:.1}k", value / 1000.0),
        size if size >= 100.0 => format!("{value:.0}"),
        size if size >= 10.0 => format!("{value:.1}"),
        _ => format!("{value:.2}"),
    }
}

fn head(results: &Results, ratios: &[(Column, Column)]) -> Vec<String> {
    let mut cells = vec!["row".to_owned(), "unit".to_owned()];
    cells.extend(results.columns.iter().map(|column| column.name().to_owned()));
    cells.extend(ratios.iter().map(|(_, base)| format!("/{}", base.name())));
    cells
}

fn line(results: &Results, row: &Row, ratios: &[(Column, Column)]) -> Vec<String> {
    let mut cells = vec![row.name.to_owned(), row.unit.to_owned()];
    let spread =
        |Spread { median, min, max }| format!("{} ({}–{})", number(median), number(min), number(max));
    let none = || "-".to_owned();
    cells.extend(results.columns.iter().map(|&column| results.spread(row, column).map_or_else(none, spread)));
    cells.extend(ratios.iter().map(|&(column, base)| {
        let ratio = results.ratio(row, column, base);
        ratio.map_or_else(none, |ratio| format!("{:.2}", ratio.median))
    }));
    cells
}

fn aligned(lines: &[Vec<String>]) -> String {
    let columns = lines.iter().map(Vec::len).max().unwrap_or_default();
    let width = |column: usize| {
        let cells = lines.iter().filter_map(|line| line.get(column));
        cells.map(|cell| cell.chars().count()).max().unwrap_or_default()
    };
    let widths: Vec<usize> = (0..columns).map(width).collect();
    let mut text = String::new();
    for line in lines {
        let cells: Vec<String> = line
            .iter()
            .zip(&widths)
            .enumerate()
            .map(|(column, (cell, &width))| match column {
                0 | 1 => format!("{cell:<width$}"),
                _ => format!("{cell:>width$}"),
            })
            .collect();
        text += cells.join("  ").trim_end();
        text.push('\n');
    }
    text
}

/// The headings of the groups.
pub(crate) fn heading(group: Group) -> &'static str {
    match group {
        Group::Throughput => "Throughput (longer is better)",
        Group::Latency => "Latency (shorter is better)",
        Group::Cpu => "CPU of the proxies (shorter is better)",
        Group::Memory => "Memory of a proxy (shorter is better)",
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use xtask::rows::select;

    #[test]
    fn numbers_keep_about_three_digits() {
        let numbers = [123_456.0, 12_345.0, 1234.5, 12.34, 1.234, 0.034];
        assert_eq!(numbers.map(number), ["123k", "12.3k", "1234", "12.3", "1.23", "0.03"]);
    }

    #[test]
    fn what_was_not_measured_is_a_dash() {
        let rows = select(&["http_1".into(), "rss_idle".into()]).expect("known");
        let mut results = Results::new(rows, vec![Column::Bare, Column::Ztunnel], 1, 2);
        results.add("http_1", Column::Bare, 0, 2000.0);
        results.add("http_1", Column::Ztunnel, 0, 1000.0);
        results.add("rss_idle", Column::Ztunnel, 0, 8.0);
        let text = table(&results);
        let words = |start: &str| -> Vec<String> {
            let line = text.lines().find(|line| line.starts_with(start)).expect("a line of the row");
            line.split_whitespace().map(str::to_owned).collect()
        };
        let http = ["http_1", "req/s", "2000", "(2000–2000)", "1000", "(1000–1000)", "0.50"];
        assert_eq!(words("http_1"), http);
        assert_eq!(words("rss_idle"), ["rss_idle", "MiB", "-", "8.00", "(8.00–8.00)", "-"]);
    }
}
