//! Figures: a table of them, their ratios, and the ones that the last release left in `benches/saved.toml`.

use std::collections::BTreeMap;
use std::fs;

use valetkey::clock::Clock;

use crate::machine;
use crate::works::{Done, Show, Work};

/// One line of the table.
#[derive(Debug)]
pub(crate) struct Figure {
    /// What the saved figures call it.
    pub(crate) key: String,
    pub(crate) title: String,
    pub(crate) unit: String,
    /// In the order of the columns; the last one is that of `valetkey`, or of what is compared with the first.
    pub(crate) values: Vec<Option<f64>>,
    pub(crate) ratio: Option<Ratio>,
}

/// The last column against the one before it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Ratio {
    /// Of the medians.
    pub(crate) median: f64,
    /// The least and the greatest of any round.
    pub(crate) spread: (f64, f64),
}

impl Ratio {
    /// Of what pairs of turns gave: the second against the first. `None` where there is nothing to divide by.
    pub(crate) fn of(pairs: &[(f64, f64)]) -> Option<Self> {
        let of = |pick: fn(&(f64, f64)) -> f64| median(pairs.iter().map(pick).collect());
        let ratios = pairs.iter().map(|(before, after)| after / before);
        let ratios: Vec<f64> = ratios.filter(|ratio| ratio.is_finite()).collect();
        let low = ratios.iter().copied().min_by(f64::total_cmp)?;
        let high = ratios.iter().copied().max_by(f64::total_cmp)?;
        let median = of(|pair| pair.1) / of(|pair| pair.0);
        median.is_finite().then_some(Self { median, spread: (low, high) })
    }
}

impl Figure {
    /// One that is measured once, and has no ratio.
    pub(crate) fn plain(key: &str, title: &str, unit: &str, values: Vec<Option<f64>>) -> Self {
        let [key, title, unit] = [key, title, unit].map(str::to_owned);
        Self { key, title, unit, values, ratio: None }
    }

    /// What the rounds of a work tell. In each round the first is straight to the API and the last goes through `valetkey`.
    pub(crate) fn of_work(work: &Work, show: Show, rounds: &[Vec<Option<Done>>]) -> Self {
        let values_of = |round: &Vec<Option<Done>>| -> Vec<Option<f64>> {
            let straight = round[0].as_ref().unwrap();
            let all = round.iter().enumerate();
            all.map(|(at, done)| {
                Some(value(work, show, done.as_ref()?, (at > 0).then_some(straight)))
            })
            .collect()
        };
        let rounds: Vec<Vec<Option<f64>>> = rounds.iter().map(values_of).collect();
        let ways = rounds[0].len();
        let column = |at: usize| rounds.iter().filter_map(|round| round[at]).collect::<Vec<_>>();
        let values = (0..ways).map(|at| Some(column(at)).filter(|it| !it.is_empty()).map(median));
        let pairs = rounds.iter().filter_map(|round| round[ways - 2].zip(round[ways - 1]));
        Self {
            key: format!("{}.{}", work.name, show.key()),
            title: work.title.to_owned(),
            unit: unit(work, show),
            values: values.collect(),
            ratio: Ratio::of(&pairs.collect::<Vec<_>>()),
        }
    }

    /// What is saved of it, and held against what was: the ratio, which says more than what a machine brings, where there is
    /// one.
    fn lasting(&self) -> Option<f64> {
        self.ratio.map(|ratio| ratio.median).or(*self.values.last()?)
    }
}

/// What one turn says of it. Its added wait is against the turn straight to the API, which itself has a whole one, and the
/// CPU of that turn is what load and API had.
fn value(work: &Work, show: Show, done: &Done, straight: Option<&Done>) -> f64 {
    let cpu = if straight.is_some() { done.proxy_cpu } else { done.own_cpu };
    let added = |share| done.wait(share) - straight.map_or(0.0, |straight| straight.wait(share));
    match show {
        Show::Rate if work.unit == "GB" => done.units / done.seconds * 1e3,
        Show::Rate => done.units / done.seconds,
        Show::Cpu if work.unit == "GB" => cpu / done.units,
        Show::Cpu => cpu / done.units * 1e6,
        Show::Half => done.wait(0.5),
        Show::Most => done.wait(0.99),
        Show::AddedHalf => added(0.5),
        Show::AddedMost => added(0.99),
    }
}

impl Show {
    fn key(self) -> &'static str {
        match self {
            Self::Rate => "rate",
            Self::Cpu => "cpu",
            Self::Half => "p50",
            Self::Most => "p99",
            Self::AddedHalf => "added-p50",
            Self::AddedMost => "added-p99",
        }
    }
}

fn unit(work: &Work, show: Show) -> String {
    match (show, work.unit) {
        (Show::Rate, "GB") => "MB/s".to_owned(),
        (Show::Rate, unit) => format!("{unit}/s"),
        (Show::Cpu, "GB") => "CPU s/GB".to_owned(),
        (Show::Cpu, unit) => format!("CPU us/{unit}"),
        (Show::Half, _) => "us p50".to_owned(),
        (Show::Most, _) => "us p99".to_owned(),
        (Show::AddedHalf, _) => "us p50 added".to_owned(),
        (Show::AddedMost, _) => "us p99 added".to_owned(),
    }
}

/// The one in the middle; 0 of none.
pub(crate) fn median(mut all: Vec<f64>) -> f64 {
    all.sort_by(f64::total_cmp);
    all.get(all.len() / 2).copied().unwrap_or(0.0)
}

/// All figures of a run, printed as they come.
#[derive(Debug, Default)]
pub(crate) struct Table {
    saved: BTreeMap<String, f64>,
    lasting: BTreeMap<String, f64>,
}

impl Table {
    /// With the figures of the last release to compare with, if that is wanted.
    pub(crate) fn new(compares: bool) -> Self {
        let saved = if compares { saved() } else { BTreeMap::new() };
        Self { saved, lasting: BTreeMap::new() }
    }

    /// Begins a part of the table.
    pub(crate) fn begin(&self, title: &str, columns: &[&str]) {
        let columns: String = columns.iter().map(|column| format!(" {column:>10}")).collect();
        println!(
            "\n{title:<36} {:<14}{columns} {:>7} {:>13} {:>7} {:>8}",
            "", "ratio", "spread", "saved", "new/old"
        );
    }

    /// Prints a figure and keeps it.
    pub(crate) fn add(&mut self, figure: &Figure) {
        let values: String =
            figure.values.iter().map(|value| format!(" {:>10}", short(*value))).collect();
        let (ratio, spread) = match figure.ratio {
            Some(Ratio { median, spread: (low, high) }) => {
                (format!("{median:.2}"), format!("{low:.2}-{high:.2}"))
            }
            None => ("-".to_owned(), "-".to_owned()),
        };
        let old = self.saved.get(&figure.key).copied();
        let change = figure.lasting().zip(old).map(|(new, old)| new / old);
        println!(
            "{:<36} {:<14}{values} {ratio:>7} {spread:>13} {:>7} {:>8}",
            figure.title,
            figure.unit,
            short(old),
            change.map_or_else(|| "-".to_owned(), |change| format!("{change:.2}"))
        );
        if let Some(lasting) = figure.lasting() {
            self.lasting.insert(figure.key.clone(), lasting);
        }
    }

    /// Writes what was measured over the same of the last release; what was not measured stays.
    pub(crate) fn save(self) {
        let mut all = saved();
        all.extend(self.lasting);
        let (version, date) = (env!("CARGO_PKG_VERSION"), Clock::system().now().date());
        let mut text = format!(
            "# Written by `cargo bench --bench end_to_end -- --save`: ratios, and where there is none, what was measured.\n\
             version = \"{version}\"\ndate = \"{date}\"\nmachine = \"{}\"\n\n[figures]\n",
            machine::name()
        );
        for (key, figure) in all {
            text += &format!("\"{key}\" = {figure:.4}\n");
        }
        fs::write(SAVED, text).unwrap();
        println!("\nwritten: benches/saved.toml");
    }
}

/// The figures of the last release; none where nobody has saved any.
fn saved() -> BTreeMap<String, f64> {
    let text = fs::read_to_string(SAVED).unwrap_or_default();
    let table: toml::Table = text.parse().expect("benches/saved.toml can be read");
    let figures = table.get("figures").and_then(toml::Value::as_table).cloned().unwrap_or_default();
    figures.into_iter().filter_map(|(key, figure)| Some((key, figure.as_float()?))).collect()
}

/// With as many digits as mean something.
fn short(value: Option<f64>) -> String {
    match value {
        None => "-".to_owned(),
        Some(value) if value.abs() >= 100.0 => format!("{value:.0}"),
        Some(value) if value.abs() >= 10.0 => format!("{value:.1}"),
        Some(value) => format!("{value:.2}"),
    }
}

const SAVED: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/benches/saved.toml");
