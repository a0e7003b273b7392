//! The report as a picture: one block of bars for each row, in a panel for each group that was measured.

use std::fmt::Write;

use super::results::{Results, Spread};
use super::table::{heading, number};
use xtask::arguments::Column;
use xtask::rows::{Group, Row};

const PANELS: [Group; 4] = [Group::Throughput, Group::Latency, Group::Cpu, Group::Memory];
const PANEL: f64 = 400.0;
/// The notes below the panels need so much.
const WIDTH_MIN: f64 = 840.0;
const NOTE_STEP: f64 = 16.0;
const MARGIN: f64 = 20.0;
const TOP: f64 = 84.0;
const LABEL: f64 = 74.0;
/// The longest bar; behind it there is room for the number.
const BAR: f64 = 230.0;
const BAR_HEIGHT: f64 = 12.0;
const BAR_STEP: f64 = 16.0;
const BLOCK_HEAD: f64 = 20.0;
const BLOCK_GAP: f64 = 12.0;

/// Draws it.
pub(crate) fn draw(results: &Results) -> String {
    let rows_of = |group| -> Vec<&Row> {
        results.rows.iter().filter(|row| row.group == group && measured(results, row)).collect()
    };
    let panels: Vec<(Group, Vec<&Row>)> = PANELS
        .into_iter()
        .map(|group| (group, rows_of(group)))
        .filter(|(_, rows)| !rows.is_empty())
        .collect();
    let width = (MARGIN + PANEL * panels.len() as f64).max(WIDTH_MIN);
    let mut body = String::new();
    let mut height: f64 = TOP;
    for (index, (group, rows)) in panels.into_iter().enumerate() {
        let left = MARGIN + index as f64 * PANEL;
        text(&mut body, left, TOP - 20.0, "panel", heading(group));
        let mut top = TOP;
        for row in rows {
            top = block(&mut body, results, row, left, top);
        }
        height = height.max(top);
    }
    let medians = format!(
        "Medians of {} rounds of {} s; the thin line goes from the least to the greatest.",
        results.rounds, results.seconds
    );
    let mut legend = String::new();
    for (index, &column) in results.columns.iter().enumerate() {
        let left = MARGIN + index as f64 * 120.0;
        bar(&mut legend, column, left, 18.0, 14.0);
        text(&mut legend, left + 20.0, 28.0, "name", column.name());
    }
    for note in std::iter::once(&medians).chain(results.facts.first()) {
        text(&mut body, MARGIN, height + 10.0, "note", note);
        height += NOTE_STEP;
    }
    let height = height + 8.0;
    format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {width} {height}\" width=\"{width}\" \
         height=\"{height}\">\n<style>text {{ font: 11px sans-serif; fill: #222 }} .panel {{ font-size: 14px; \
         font-weight: bold }} .row {{ font-weight: bold }} .note {{ fill: #666 }}</style>\n\
         <rect width=\"100%\" height=\"100%\" fill=\"#fff\"/>\n{legend}{body}</svg>\n"
    )
}

fn measured(results: &Results, row: &Row) -> bool {
    results.columns.iter().any(|&column| results.spread(row, column).is_some())
}

/// One row: a heading and a bar for each column. Returns where the next begins.
fn block(body: &mut String, results: &Results, row: &Row, left: f64, top: f64) -> f64 {
    text(body, left, top + 12.0, "row", &format!("{}, {}", row.title, row.unit));
    let spreads: Vec<(Column, Spread)> =
        results.columns.iter().filter_map(|&column| Some((column, results.spread(row, column)?))).collect();
    let longest = spreads.iter().map(|(_, spread)| spread.max).fold(f64::MIN_POSITIVE, f64::max);
    let length = |value: f64| (value / longest * BAR).max(0.0);
    let mut y = top + BLOCK_HEAD;
    for (column, Spread { median, min, max }) in spreads {
        let start = left + LABEL;
        text(body, left, y + 10.0, "name", column.name());
        bar(body, column, start, y, length(median));
        let middle = y + BAR_HEIGHT / 2.0;
        let _always_fits = writeln!(
            body,
            "<path d=\"M{:.1} {middle:.1}H{:.1}\" stroke=\"#222\" stroke-width=\"1\"/>",
            start + length(min),
            start + length(max)
        );
        text(body, start + length(max) + 6.0, y + 10.0, "value", &number(median));
        y += BAR_STEP;
    }
    y + BLOCK_GAP
}

fn bar(body: &mut String, column: Column, x: f64, y: f64, width: f64) {
    let fill = match column {
        Column::Bare => "#b8bcc2",
        Column::Ztunnel => "#1b6ef3",
        Column::Peer => "#2f9e72",
        Column::EnvoyTcp => "#ac6199",
        Column::EnvoyHttp => "#d9a3cb",
    };
    let _always_fits = writeln!(
        body,
        "<rect x=\"{x:.1}\" y=\"{y:.1}\" width=\"{width:.1}\" height=\"{BAR_HEIGHT}\" fill=\"{fill}\"/>"
    );
}

fn text(body: &mut String, x: f64, y: f64, class: &str, content: &str) {
    let escaped = content.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;");
    let _always_fits = writeln!(body, "<text x=\"{x:.1}\" y=\"{y:.1}\" class=\"{class}\">{escaped}</text>");
}

#[cfg(test)]
mod tests {
    use super::*;
    use xtask::rows::select;

    #[test]
    fn every_measured_row_has_its_bars_and_text_is_escaped() {
        let rows = select(&["http_1".into(), "open_2000_p50".into(), "rss_idle".into()]).expect("known");
        let mut results = Results::new(rows, vec![Column::Bare, Column::Ztunnel], 1, 2);
        results.facts.push("a < b & c".to_owned());
        results.add("http_1", Column::Bare, 0, 2000.0);
        results.add("http_1", Column::Ztunnel, 0, 1000.0);
        results.add("open_2000_p50", Column::Ztunnel, 0, 150.0);
        results.add("rss_idle", Column::Ztunnel, 0, 8.0);
        let picture = draw(&results);
        // The background, two in the legend, four bars.
        assert_eq!(picture.matches("<rect ").count(), 7, "{picture}");
        let panels = |name: &str| picture.matches(&format!("class=\"panel\">{name}")).count();
        assert_eq!(["Throughput", "Latency", "CPU", "Memory"].map(panels), [1, 1, 0, 1]);
        assert!(picture.contains(&format!("width=\"{BAR:.1}\"")), "the greatest value has the longest bar");
        assert!(picture.contains("a &lt; b &amp; c"));
        assert!(picture.starts_with("<svg ") && picture.ends_with("</svg>\n"));
    }
}
