//! Medians, tables and budgets, as text.

use std::fs;

use crate::cpu::Cores;

/// What is printed, and which budgets were met.
#[derive(Debug, Default)]
pub(crate) struct Report {
    met: usize,
    missed: Vec<String>,
    left_out: Vec<String>,
}

/// Median and range of what the rounds gave.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Spread {
    pub(crate) median: f64,
    pub(crate) min: f64,
    pub(crate) max: f64,
}

/// What the design asks for.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Budget {
    AtMost(f64),
    AtLeast(f64),
    None,
}

/// Rows of cells, the first of which are the heads of the columns.
#[derive(Debug)]
pub(crate) struct Table(Vec<Vec<String>>);

// === impl Spread ===

impl Spread {
    /// Of at least one value; nothing is all zeros.
    pub(crate) fn of(values: impl IntoIterator<Item = f64>) -> Self {
        let mut values: Vec<f64> = values.into_iter().collect();
        values.sort_by(f64::total_cmp);
        let at = |index: usize| values.get(index).copied().unwrap_or(0.0);
        let (middle, last) = (values.len() / 2, values.len().saturating_sub(1));
        let median = if values.len().is_multiple_of(2) {
            (at(middle.saturating_sub(1)) + at(middle)) / 2.0
        } else {
            at(middle)
        };
        Self {
            median,
            min: at(0),
            max: at(last),
        }
    }

    /// Of the ratios of each round.
    pub(crate) fn of_ratios(above: &[f64], below: &[f64]) -> Self {
        Self::of(above.iter().zip(below).map(|(above, below)| above / below))
    }

    /// Each value multiplied.
    pub(crate) fn times(self, factor: f64) -> Self {
        Self {
            median: self.median * factor,
            min: self.min * factor,
            max: self.max * factor,
        }
    }

    /// `median (min-max)`
    pub(crate) fn cell(self, digits: usize) -> String {
        let Self { median, min, max } = self;
        format!("{median:.digits$} ({min:.digits$}-{max:.digits$})")
    }
}

// === impl Report ===

impl Report {
    /// Says where all this was measured.
    pub(crate) fn machine(&self, cores: &Cores) {
        let cpus = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        let names = cpus.lines().filter_map(|line| line.strip_prefix("model name"));
        let mut names = names.map(|name| name.trim_start_matches([' ', '\t', ':']));
        let name = names.next().unwrap_or("unknown");
        let kernel = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
        let load = fs::read_to_string("/proc/loadavg").unwrap_or_default();
        let load = load.split_ascii_whitespace().next().unwrap_or("unknown");
        println!(
            "{} x {name}, Linux {}, load before the run {load}",
            names.count() + 1,
            kernel.trim()
        );
        println!("{}", cores.describe());
    }

    /// Begins a part.
    pub(crate) fn title(&self, text: &str) {
        println!("\n{text}\n{}", "-".repeat(text.len()));
    }

    /// A sentence.
    pub(crate) fn note(&self, text: &str) {
        println!("{text}");
    }

    /// The cells for a value that may have a budget: the budget, and whether it is met.
    pub(crate) fn held(&mut self, what: &str, value: f64, budget: Budget, digits: usize) -> [String; 2] {
        let (text, met) = match budget {
            Budget::None => return ["".to_owned(), "".to_owned()],
            Budget::AtMost(most) => (format!("at most {most:.digits$}"), value <= most),
            Budget::AtLeast(least) => (format!("at least {least:.digits$}"), value >= least),
        };
        if met {
            self.met += 1;
        } else {
            self.missed.push(what.to_owned());
        }
        [text, if met { "met" } else { "NOT met" }.to_owned()]
    }

    /// Something that the machine does not have, so that its budgets are not held.
    pub(crate) fn left_out(&mut self, program: &str, package: &str) {
        let text =
            format!("{program} is not installed, so its rows are missing; run apt-get install {package}");
        println!("{text}");
        self.left_out.push(text);
    }

    /// The last words.
    pub(crate) fn finish(&self, not_measured: &str) {
        self.title("Budgets");
        println!("{} met, {} not met", self.met, self.missed.len());
        for what in &self.missed {
            println!("  NOT met: {what}");
        }
        for what in &self.left_out {
            println!("  NOT held: {what}");
        }
        println!("{not_measured}");
    }
}

// === impl Table ===

impl Table {
    pub(crate) fn new<const N: usize>(heads: [&str; N]) -> Self {
        Self(vec![heads.map(str::to_owned).to_vec()])
    }

    pub(crate) fn row(&mut self, cells: impl IntoIterator<Item = String>) {
        self.0.push(cells.into_iter().collect());
    }

    /// Prints it, the first column to the left and the others to the right.
    pub(crate) fn print(&self) {
        let columns = self.0.iter().map(Vec::len).max().unwrap_or(0);
        let width = |column: usize| {
            let cells = self.0.iter().filter_map(|row| row.get(column));
            cells.map(|cell| cell.chars().count()).max().unwrap_or(0)
        };
        let widths: Vec<usize> = (0..columns).map(width).collect();
        for row in &self.0 {
            let mut line = String::new();
            for (column, (cell, width)) in row.iter().zip(&widths).enumerate() {
                line += &match column {
                    0 => format!("{cell:<width$}"),
                    _ => format!("  {cell:>width$}"),
                };
            }
            println!("{}", line.trim_end());
        }
    }
}
