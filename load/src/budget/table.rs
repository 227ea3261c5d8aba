//! What is printed of it.

use std::collections::BTreeMap;
use std::fmt::Write;

use super::attribute::Counted;
use super::rules::{OTHER, Process, Work};

const COLUMNS: [Work; 3] = [Work::Own, Work::Allocator, Work::Copy];

/// The budget of a process as Markdown: instructions per event, by stage; of several runs their mean, and how far the
/// furthest is from it.
pub fn budget(process: Process, runs: &[Counted]) -> String {
    let mean = |of: &dyn Fn(&Counted) -> f64| runs.iter().map(of).sum::<f64>() / runs.len() as f64;
    let spread = |of: &dyn Fn(&Counted) -> f64| {
        let middle = mean(of);
        runs.iter().map(|run| (of(run) - middle).abs()).fold(0.0, f64::max)
    };
    let total = mean(&Counted::total);
    let mut text = format!(
        "| {} | own code | allocator | memcpy | all | share | ± |\n| --- | ---: | ---: | ---: | ---: | ---: | ---: |\n",
        process.name()
    );
    let mut row = |name: &str, cell: &dyn Fn(&Counted, Work) -> f64| {
        let all = |run: &Counted| COLUMNS.iter().map(|work| cell(run, *work)).sum::<f64>();
        let _ = write!(text, "| {name} ");
        for work in COLUMNS {
            let _ = write!(text, "| {:.0} ", mean(&|run| cell(run, work)));
        }
        let (middle, off) = (mean(&all), spread(&all));
        let _ = writeln!(text, "| {middle:.0} | {:.1} % | {off:.0} |", middle / total * 100.0);
    };
    for stage in process.stages() {
        row(stage, &|run, work| {
            run.stages.get(&(*stage, work)).copied().unwrap_or(0.0)
        });
    }
    row("**total**", &|run, work| {
        let of_work = run.stages.iter().filter(|((_, of), _)| *of == work);
        of_work.map(|(_, instructions)| instructions).sum()
    });
    text
}

/// The share of all that no rule claims.
pub fn unclaimed(run: &Counted) -> f64 {
    let other = run.stages.iter().filter(|((stage, _), _)| *stage == OTHER);
    other.map(|(_, instructions)| instructions).sum::<f64>() / run.total()
}

/// The functions that ran the most, one a line: instructions per event, share, name.
pub fn top(functions: &BTreeMap<String, f64>, total: f64, count: usize) -> String {
    let mut sorted: Vec<_> = functions.iter().collect();
    sorted.sort_by(|(_, one), (_, other)| other.total_cmp(one));
    sorted
        .into_iter()
        .take(count)
        .filter(|(_, instructions)| **instructions > 0.0)
        .map(|(name, instructions)| format!("{instructions:>9.1} {:>5.1} %  {name}\n", instructions / total * 100.0))
        .collect()
}
