//! Two sets of runs beside each other: ratios, their spread, and whether it says anything.

use std::fmt::Write;
use std::path::Path;

use serde_json::Value;

use super::table::{ROWS, grouped, markdown};

/// What is the same in all runs of a scenario, or a count of its own: no ratio of it says anything.
const NO_RATIO: [&str; 5] = ["/events", "/rate", "/compared", "/evictions", "/lost"];

/// Least, median and most of some numbers.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Spread {
    pub least: f64,
    pub median: f64,
    pub most: f64,
}

impl Spread {
    /// `None` without any. Of an even number the lower one in the middle, which was measured.
    pub fn of(numbers: impl IntoIterator<Item = f64>) -> Option<Spread> {
        let mut numbers: Vec<f64> = numbers.into_iter().collect();
        numbers.sort_by(f64::total_cmp);
        Some(Spread {
            least: *numbers.first()?,
            median: numbers[(numbers.len() - 1) / 2],
            most: *numbers.last()?,
        })
    }

    /// `1.25 (1.20–1.31)`; only the median where there is no spread.
    pub fn text(&self, digits: usize) -> String {
        let one = |number| grouped(number, digits);
        match one(self.least) == one(self.most) {
            true => one(self.median),
            false => format!("{} ({}–{})", one(self.median), one(self.least), one(self.most)),
        }
    }
}

/// A number at that place in each of these runs which has it.
pub fn numbers<'a>(runs: &'a [Value], place: &'a str) -> impl Iterator<Item = f64> + 'a {
    runs.iter().filter_map(move |run| run.pointer(place)?.as_f64())
}

/// One measure of both.
#[derive(Clone, Debug, PartialEq)]
pub struct Compared {
    pub a: Spread,
    pub b: Spread,
    /// B by A, pair by pair.
    pub ratio: Spread,
    pub pairs: usize,
}

impl Compared {
    /// Compares the numbers of A with those of B. Runs that were made in turn are paired, so that what changed on the machine
    /// meanwhile is in both; of different numbers of runs each is paired with each.
    pub fn new(a: &[f64], b: &[f64]) -> Option<Compared> {
        let by = |(a, b): (&f64, &f64)| (*a != 0.0).then(|| b / a);
        let ratios: Vec<f64> = match a.len() == b.len() {
            true => a.iter().zip(b).filter_map(by).collect(),
            false => a
                .iter()
                .flat_map(|a| b.iter().filter_map(move |b| by((a, b))))
                .collect(),
        };
        Some(Compared {
            a: Spread::of(a.iter().copied())?,
            b: Spread::of(b.iter().copied())?,
            ratio: Spread::of(ratios.iter().copied())?,
            pairs: ratios.len(),
        })
    }

    /// What the spread says, in words.
    pub fn says(&self) -> &'static str {
        match self.ratio {
            _ if self.pairs < 2 => "one pair: nothing is known of the spread",
            Spread { least, most, .. } if least <= 1.0 && most >= 1.0 => "the spread covers 1: no difference is shown",
            Spread { most, .. } if most < 1.0 => "B is lower in every pair",
            _ => "B is higher in every pair",
        }
    }
}

/// A table with a row for everything that was measured in both, and below it what A and B are.
pub fn compare((name_a, a): (&str, &[Value]), (name_b, b): (&str, &[Value])) -> String {
    let head = ["", "A", "B", "B by A", ""].map(str::to_string).to_vec();
    let mut lines = vec![head];
    for (title, place, digits) in ROWS.into_iter().filter(|(_, place, _)| !NO_RATIO.contains(place)) {
        let of = |runs| numbers(runs, place).collect::<Vec<f64>>();
        if let Some(compared) = Compared::new(&of(a), &of(b)) {
            lines.push(vec![
                title.to_string(),
                compared.a.text(digits),
                compared.b.text(digits),
                compared.ratio.text(3),
                compared.says().to_string(),
            ]);
        }
    }
    let mut text = markdown(&lines);
    let _ = writeln!(
        text,
        "\nMedians, with least and most. A: {name_a}, {} runs. B: {name_b}, {} runs.",
        a.len(),
        b.len()
    );
    for (name, runs) in [(name_a, a), (name_b, b)] {
        let lost: f64 = numbers(runs, "/lost").sum();
        if lost > 0.0 {
            let _ = writeln!(text, "{name} lost {lost} keys.");
        }
    }
    text
}

/// The name of a result's scenario, and its runs.
///
/// # Errors
/// What can't be read, in words.
pub fn read(file: &Path) -> Result<(String, Vec<Value>), String> {
    let wrong = |error: String| format!("{}: {error}", file.display());
    let text = std::fs::read_to_string(file).map_err(|error| wrong(error.to_string()))?;
    let report: Value = serde_json::from_str(&text).map_err(|error| wrong(error.to_string()))?;
    let runs = report["runs"].as_array().cloned().unwrap_or_default();
    match (report["scenario"]["name"].as_str(), runs.is_empty()) {
        (Some(name), false) => Ok((name.to_owned(), runs)),
        _ => Err(wrong("there are no runs in it".into())),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::values::Mixer;

    #[test]
    fn a_ratio_is_taken_pair_by_pair_so_that_a_slower_machine_does_not_show() {
        // The machine is half as fast in the second half of the time; B is a tenth cheaper in every pair.
        let compared = Compared::new(&[2.0, 2.0, 4.0, 4.0], &[1.8, 1.8, 3.6, 3.6]).unwrap();
        assert!((compared.ratio.least - 0.9).abs() < 1e-9 && (compared.ratio.most - 0.9).abs() < 1e-9);
        assert_eq!(compared.says(), "B is lower in every pair");
        assert_eq!((compared.a.median, compared.b.most), (2.0, 3.6));
    }

    #[test]
    fn what_a_comparison_says_is_what_its_pairs_say() {
        let mut mixer = Mixer::new(3);
        for _ in 0..1_000 {
            let mut some = |count| -> Vec<f64> { (0..count).map(|_| 1.0 + mixer.below(100) as f64 / 500.0).collect() };
            let (a, b) = (some(4), some(4));
            let compared = Compared::new(&a, &b).unwrap();
            let (lower, higher) = (
                a.iter().zip(&b).all(|(a, b)| b < a),
                a.iter().zip(&b).all(|(a, b)| b > a),
            );
            let says = match (lower, higher) {
                (true, _) => "B is lower in every pair",
                (_, true) => "B is higher in every pair",
                _ => "the spread covers 1: no difference is shown",
            };
            assert_eq!(compared.says(), says, "{a:?} {b:?}");
            assert!(compared.ratio.least <= compared.ratio.median && compared.ratio.median <= compared.ratio.most);
        }
        assert_eq!(Compared::new(&[1.0], &[2.0, 3.0]).unwrap().pairs, 2);
        assert!(Compared::new(&[1.0], &[3.0]).unwrap().says().contains("one pair"));
        assert!(Compared::new(&[], &[3.0]).is_none() && Compared::new(&[0.0], &[3.0]).is_none());
    }

    #[test]
    fn only_what_both_have_measured_is_compared_and_losses_are_said() {
        let a = [json!({ "events": 5, "events_per_second": 100.0, "max_rate": 7, "lost": 0 })];
        let b = [json!({ "events": 5, "events_per_second": 150.0, "lost": 3 })];
        let text = compare(("old", &a), ("new", &b));
        assert!(
            text.contains("events/s") && text.contains("1.500") && text.contains("new lost 3 keys"),
            "{text}"
        );
        assert!(!text.contains("maximum") && !text.contains("| events "), "{text}");
    }
}
