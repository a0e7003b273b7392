//! What was measured: a value for each row, column and round, and what can be said about them.

use std::collections::BTreeMap;

use serde_json::{Value, json};

use xtask::arguments::Column;
use xtask::rows::{Better, Row};

/// The values of one row in one column. The index is the round; a round may have none.
type Rounds = Vec<Option<f64>>;

/// Median, least and greatest.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Spread {
    /// The middle one; of an even number the mean of the middle two.
    pub(crate) median: f64,
    /// The least.
    pub(crate) min: f64,
    /// The greatest.
    pub(crate) max: f64,
}

/// All values of a run.
#[derive(Debug)]
pub(crate) struct Results {
    /// The rows, in the order of the report.
    pub(crate) rows: Vec<Row>,
    /// The columns, in the order of the report.
    pub(crate) columns: Vec<Column>,
    /// How many rounds were asked for.
    pub(crate) rounds: usize,
    /// How long each load ran.
    pub(crate) seconds: u64,
    /// What was measured on, one fact per line.
    pub(crate) facts: Vec<String>,
    /// What went wrong.
    pub(crate) failures: Vec<String>,
    values: BTreeMap<(&'static str, Column), Rounds>,
}

impl Spread {
    /// None of nothing.
    pub(crate) fn of(mut values: Vec<f64>) -> Option<Self> {
        values.sort_by(f64::total_cmp);
        let (min, max) = (*values.first()?, *values.last()?);
        let middle = values.len() / 2;
        let median = match values.len() % 2 {
            1 => values[middle],
            _ => f64::midpoint(values[middle - 1], values[middle]),
        };
        Some(Self { median, min, max })
    }
}

impl Results {
    /// Nothing measured yet.
    pub(crate) fn new(rows: Vec<Row>, columns: Vec<Column>, rounds: usize, seconds: u64) -> Self {
        let (facts, failures, values) = (Vec::new(), Vec::new(), BTreeMap::new());
        Self { rows, columns, rounds, seconds, facts, failures, values }
    }

    /// Takes a value, unless its row was not asked for.
    pub(crate) fn add(&mut self, name: &str, column: Column, round: usize, value: f64) {
        let Some(row) = self.rows.iter().find(|row| row.name == name) else { return };
        let rounds = self.values.entry((row.name, column)).or_default();
        if rounds.len() <= round {
            rounds.resize(round + 1, None);
        }
        rounds[round] = Some(value);
    }

    /// A row's values in a column.
    pub(crate) fn spread(&self, row: &Row, column: Column) -> Option<Spread> {
        Spread::of(self.values.get(&(row.name, column))?.iter().flatten().copied().collect())
    }

    /// How many times `base` a column has in a row. Divided round by round, because what the machine does besides
    /// changes more between rounds than within one.
    pub(crate) fn ratio(&self, row: &Row, column: Column, base: Column) -> Option<Spread> {
        let (own, base) = (self.values.get(&(row.name, column))?, self.values.get(&(row.name, base))?);
        let pairs = own.iter().zip(base).filter_map(|(own, base)| Some((*own)? / (*base)?));
        Spread::of(pairs.filter(|ratio| ratio.is_finite()).collect())
    }

    /// For programs.
    pub(crate) fn to_json(&self) -> Value {
        let rows: Vec<Value> = self.rows.iter().map(|row| self.row_json(row)).collect();
        json!({
            "rounds": self.rounds,
            "seconds": self.seconds,
            "facts": self.facts,
            "failures": self.failures,
            "rows": rows,
        })
    }

    fn row_json(&self, row: &Row) -> Value {
        let mut columns = serde_json::Map::new();
        for &column in &self.columns {
            if let Some(Spread { median, min, max }) = self.spread(row, column) {
                let rounds = &self.values[&(row.name, column)];
                let value = json!({ "median": median, "min": min, "max": max, "rounds": rounds });
                columns.insert(column.name().to_owned(), value);
            }
        }
        let better = match row.better {
            Better::Higher => "higher",
            Better::Lower => "lower",
        };
        json!({ "row": row.name, "unit": row.unit, "title": row.title, "better": better, "columns": columns })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use xtask::rows::select;

    #[test]
    fn the_median_of_an_even_number_lies_between_the_middle_two() {
        let spread = |median, min, max| Some(Spread { median, min, max });
        assert_eq!(Spread::of(vec![3.0, 1.0, 2.0]), spread(2.0, 1.0, 3.0));
        assert_eq!(Spread::of(vec![4.0, 1.0, 2.0, 3.0]), spread(2.5, 1.0, 4.0));
        assert_eq!(Spread::of(Vec::new()), None);
    }

    #[test]
    fn ratios_are_made_within_a_round_and_a_missing_round_is_left_out() {
        let rows = select(&["http_1".to_owned()]).expect("known");
        let mut results = Results::new(rows, vec![Column::Bare, Column::Ztunnel], 3, 1);
        for (round, bare, own) in [(0, 10.0, 5.0), (2, 100.0, 60.0)] {
            results.add("http_1", Column::Bare, round, bare);
            results.add("http_1", Column::Ztunnel, round, own);
        }
        results.add("http_1", Column::Ztunnel, 1, 1.0);
        results.add("of no row", Column::Ztunnel, 1, 1.0);
        let row = results.rows[0];
        let ratio = results.ratio(&row, Column::Ztunnel, Column::Bare).expect("two rounds");
        assert!((ratio.median - 0.55).abs() < 1e-9, "{ratio:?}");
        let json = results.to_json();
        assert_eq!(json["rows"][0]["columns"]["ztunnel"]["median"], 5.0);
        assert_eq!(json["rows"][0]["columns"]["bare"]["rounds"], json!([10.0, null, 100.0]));
    }
}
