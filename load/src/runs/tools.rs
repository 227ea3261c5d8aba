//! What is done with results that are there: tables, plots, comparisons.

use std::fs;
use std::path::{Path, PathBuf};

use serde_json::Value;

use super::arguments::{Tool, results};
use super::compare::{self, compare};
use super::plot::{Labelled, svg};
use super::report::median;
use super::{curves, goals, table};

/// Does it; what is to be printed.
///
/// # Errors
/// What can't be read or written, in words.
pub fn run(tool: &Tool) -> Result<String, String> {
    match tool {
        Tool::Table { files } => Ok(tables(&read(files)?)),
        Tool::Plot { files, out } => plot(&read(files)?, &results(out)),
        Tool::Bars { file, of, title } => {
            let all = Labelled::read(of)?;
            write(file, &svg(title, &all))?;
            Ok(table::medians(&all.iter().map(Labelled::column).collect::<Vec<_>>()))
        }
    }
}

/// Two results beside each other.
///
/// # Errors
/// When they can't be read, or are of different scenarios, in words.
pub fn compare_files(a: &Path, b: &Path) -> Result<String, String> {
    let ((scenario, runs_a), (other, runs_b)) = (compare::read(a)?, compare::read(b)?);
    if scenario != other {
        return Err(format!("{} is of {scenario}, {} of {other}", a.display(), b.display()));
    }
    let (name_a, name_b) = (a.display().to_string(), b.display().to_string());
    Ok(format!(
        "{scenario}\n\n{}",
        compare((&name_a, &runs_a), (&name_b, &runs_b))
    ))
}

fn read(files: &[PathBuf]) -> Result<Vec<Value>, String> {
    let one = |file: &PathBuf| {
        let named = |error: String| format!("{}: {error}", file.display());
        let text = fs::read_to_string(file).map_err(|error| named(error.to_string()))?;
        serde_json::from_str(&text).map_err(|error| named(error.to_string()))
    };
    files.iter().map(one).collect()
}

fn write(file: &Path, text: &str) -> Result<(), String> {
    fs::write(file, text).map_err(|error| format!("cannot write {}: {error}", file.display()))
}

/// Runs by the name of their scenario; results of one scenario together.
fn by_scenario(results: &[Value]) -> Vec<(String, Vec<Value>)> {
    let mut all: Vec<(String, Vec<Value>)> = Vec::new();
    for result in results {
        let name = result["scenario"]["name"].as_str().unwrap_or("unnamed");
        let runs = result["runs"].as_array().cloned().unwrap_or_default();
        match all.iter_mut().find(|(known, _)| known == name) {
            Some((_, known)) => known.extend(runs),
            None => all.push((name.into(), runs)),
        }
    }
    all
}

/// The goals, the curves and everything else that these results say.
pub fn tables(results: &[Value]) -> String {
    let all = by_scenario(results);
    let mut texts = Vec::new();
    texts.extend(goals::goals(&all));
    texts.extend(curves::families(results).iter().map(curves::Family::table));
    let column = |(name, runs): &(String, Vec<Value>)| (format!("{name} ({})", runs.len()), median(runs));
    texts.push(table::medians(&all.iter().map(column).collect::<Vec<_>>()));
    texts.join("\n")
}

fn plot(results: &[Value], folder: &Path) -> Result<String, String> {
    fs::create_dir_all(folder).map_err(|error| format!("{}: {error}", folder.display()))?;
    let of_families = curves::families(results).into_iter();
    let mut charts: Vec<_> = of_families
        .map(|family| (format!("growth-{}.svg", family.axis), family.chart()))
        .collect();
    charts.extend(results.iter().flat_map(curves::by_time));
    let mut said = String::new();
    for (name, chart) in charts {
        let file = folder.join(name);
        write(&file, &chart.svg())?;
        said += &format!("{}\n", file.display());
    }
    match said.is_empty() {
        true => Err("there is nothing to draw by time, and no family of scenarios".into()),
        false => Ok(said),
    }
}

#[cfg(test)]
mod tests {
    use evrepl_lab::Dir;
    use serde_json::json;

    use super::*;

    #[test]
    fn results_of_one_scenario_are_compared_and_others_refused() {
        let dir = Dir::new("tools");
        let file = |name: &str, scenario: &str, rates: &[f64]| {
            let runs: Vec<Value> = rates
                .iter()
                .map(|rate| json!({ "events_per_second": rate, "lost": 0 }))
                .collect();
            let path = dir.path().join(name);
            write(
                &path,
                &json!({ "scenario": { "name": scenario }, "runs": runs }).to_string(),
            )
            .unwrap();
            path
        };
        let a = file("a.json", "drain-100", &[100.0, 110.0]);
        let b = file("b.json", "drain-100", &[200.0, 220.0]);
        let c = file("c.json", "fixed-100", &[200.0, 220.0]);
        let said = compare_files(&a, &b).unwrap();
        assert!(
            said.contains("2.000") && said.contains("B is higher in every pair"),
            "{said}"
        );
        assert!(compare_files(&a, &c).unwrap_err().contains("fixed-100"));
        assert!(
            compare_files(&a, &dir.path().join("d.json"))
                .unwrap_err()
                .contains("d.json")
        );
        let files = vec![a.clone(), b, c];
        let table = run(&Tool::Table { files: files.clone() }).unwrap();
        assert!(
            table.contains("drain-100 (4)") && table.contains("drain, events/s"),
            "{table}"
        );
        let out = Some(dir.path().to_path_buf());
        let nothing = run(&Tool::Plot {
            files,
            out: out.clone(),
        })
        .unwrap_err();
        assert!(nothing.contains("nothing to draw"), "{nothing}");
        let run_of = json!({ "latency_ms_by_second": [{ "p50": 1.0, "p99": 2.0, "max": 3.0 }] });
        write(
            &a,
            &json!({ "scenario": { "name": "long" }, "runs": [run_of] }).to_string(),
        )
        .unwrap();
        let said = run(&Tool::Plot { files: vec![a], out }).unwrap();
        assert!(fs::read_to_string(said.trim()).unwrap().starts_with("<svg"), "{said}");
    }
}
