//! How something grows: the points of each family of scenarios as a table, and what a plot draws of results.

use serde_json::Value;

use super::chart::{Chart, Place, Series};
use super::compare::{Spread, numbers};
use super::table::markdown;

/// What a table of a family shows of each point: a title, where the number is, its digits.
const COLUMNS: [(&str, &str, usize); 8] = [
    ("events/s", "/events_per_second", 0),
    ("relay", "/cpu_seconds_per_million/relay", 2),
    ("agent", "/cpu_seconds_per_million/agent", 2),
    ("relay and agent", "/cpu/relay_and_agent", 2),
    ("by the memcacheds", "/cpu/relay_and_agent_by_memcacheds", 3),
    ("latency p99, ms", "/latency_ms/p99", 1),
    ("relay, RSS MiB", "/peak_rss_mib/relay", 0),
    ("agent, RSS MiB", "/peak_rss_mib/agent", 0),
];

/// What a plot of a family draws.
const DRAWN: [(&str, &str); 3] = [
    ("relay and agent", "/cpu/relay_and_agent"),
    ("relay", "/cpu_seconds_per_million/relay"),
    ("agent", "/cpu_seconds_per_million/agent"),
];

/// The results of one family.
#[derive(Clone, Debug, Default)]
pub struct Family {
    /// What its points differ in.
    pub axis: String,
    /// A value and all runs with it, in order.
    pub points: Vec<(u64, Vec<Value>)>,
}

/// The families among these results, in the order in which they first come. Results of one point stand together.
pub fn families(results: &[Value]) -> Vec<Family> {
    let mut families: Vec<Family> = Vec::new();
    for result in results {
        let point = &result["scenario"]["point"];
        let (Some(axis), Some(value)) = (point["axis"].as_str(), point["value"].as_u64()) else {
            continue;
        };
        let runs = result["runs"].as_array().cloned().unwrap_or_default();
        let known = families.iter().position(|family| family.axis == axis);
        let at = known.unwrap_or_else(|| {
            families.push(Family {
                axis: axis.into(),
                points: Vec::new(),
            });
            families.len() - 1
        });
        let points = &mut families[at].points;
        match points.iter_mut().find(|(known, _)| *known == value) {
            Some((_, known)) => known.extend(runs),
            None => points.push((value, runs)),
        }
        points.sort_by_key(|(value, _)| *value);
    }
    families
}

impl Family {
    /// A row for each point; CPU is in seconds a million events.
    pub fn table(&self) -> String {
        let measured = |place: &str| {
            self.points
                .iter()
                .any(|(_, runs)| numbers(runs, place).next().is_some())
        };
        let columns: Vec<_> = COLUMNS.into_iter().filter(|(_, place, _)| measured(place)).collect();
        let mut head = vec![self.axis.clone()];
        head.extend(columns.iter().map(|(title, ..)| title.to_string()));
        let mut lines = vec![head];
        for (value, runs) in &self.points {
            let mut line = vec![value.to_string()];
            line.extend(columns.iter().map(|(_, place, digits)| {
                let spread = Spread::of(numbers(runs, place));
                spread.map_or("–".into(), |spread| spread.text(*digits))
            }));
            lines.push(line);
        }
        markdown(&lines)
    }

    /// CPU for each event by what the points differ in.
    pub fn chart(&self) -> Chart {
        let series = DRAWN.iter().filter_map(|(label, place)| {
            let at = |(value, runs): &(u64, Vec<Value>)| {
                let spread = Spread::of(numbers(runs, place))?;
                Some(Place::with_spread(*value as f64, spread))
            };
            let places: Vec<Place> = self.points.iter().filter_map(at).collect();
            (!places.is_empty()).then(|| Series::new(label, places))
        });
        Chart {
            title: format!("CPU by {}", self.axis),
            x: self.axis.clone(),
            y: "CPU seconds per million events".into(),
            logarithmic: true,
            series: series.collect(),
        }
    }
}

/// What can be drawn by time of a result's first run that has it: file names and charts.
pub fn by_time(result: &Value) -> Vec<(String, Chart)> {
    let name = result["scenario"]["name"].as_str().unwrap_or("unnamed");
    let runs = result["runs"].as_array().map(Vec::as_slice).unwrap_or_default();
    let chart = |title: &str, y: &str, series: Vec<Series>| Chart {
        title: format!("{name}: {title}"),
        x: "second".into(),
        y: y.into(),
        logarithmic: false,
        series,
    };
    let series = |label: &str, of: Vec<f64>| {
        let place = |(second, number): (usize, f64)| Place::at(second as f64, number);
        Series::new(label, of.into_iter().enumerate().map(place).collect())
    };
    let mut charts = Vec::new();
    if let Some(seconds) = runs.iter().find_map(|run| run["latency_ms_by_second"].as_array()) {
        let of = |quantile: &str| seconds.iter().filter_map(|second| second[quantile].as_f64()).collect();
        let quantiles = [("p50", "p50"), ("p99", "p99"), ("max", "max")];
        let drawn = quantiles.map(|(label, quantile)| series(label, of(quantile)));
        charts.push((format!("latency-{name}.svg"), chart("latency", "ms", drawn.into())));
    }
    if let Some(by_role) = runs.iter().find_map(|run| run["rss_mib_by_second"].as_object()) {
        let of = |(role, mib): (&String, &Value)| {
            let mib = mib.as_array().into_iter().flatten().filter_map(Value::as_f64);
            series(role, mib.collect())
        };
        let drawn: Vec<Series> = by_role.iter().map(of).collect();
        charts.push((format!("memory-{name}.svg"), chart("memory", "resident MiB", drawn)));
    }
    charts
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn result(value: u64, cpu: &[f64]) -> Value {
        let run = |cpu: &f64| json!({ "cpu": { "relay_and_agent": cpu }, "events_per_second": 1000.0 });
        json!({
            "scenario": { "name": format!("lanes-{value}"), "point": { "axis": "lanes", "value": value } },
            "runs": cpu.iter().map(run).collect::<Vec<_>>(),
        })
    }

    #[test]
    fn results_of_a_family_are_a_curve_in_order_with_all_runs_of_a_point_together() {
        let alone = json!({ "scenario": { "name": "drain-100" }, "runs": [{}] });
        let results = [result(4, &[3.0]), alone, result(1, &[1.0, 2.0]), result(4, &[5.0, 4.0])];
        let [family] = families(&results).try_into().unwrap();
        let values: Vec<u64> = family.points.iter().map(|(value, _)| *value).collect();
        assert_eq!((family.axis.as_str(), values.as_slice()), ("lanes", &[1, 4][..]));
        let table = family.table();
        assert!(table.contains("4.00 (3.00–5.00)") && table.contains("1 000"), "{table}");
        assert!(!table.contains("latency"), "{table}");
        let [series] = family.chart().series.try_into().unwrap();
        assert_eq!(
            series.places[1],
            Place::with_spread(
                4.0,
                Spread {
                    least: 3.0,
                    median: 4.0,
                    most: 5.0
                }
            )
        );
    }

    #[test]
    fn latency_and_memory_are_drawn_by_time_where_they_were_measured() {
        let run = json!({
            "latency_ms_by_second": [{ "p50": 1.0, "p99": 2.0, "max": 9.0 }, { "p50": 1.5, "p99": 2.5, "max": 7.0 }],
            "rss_mib_by_second": { "agent": [30.0, 31.0], "relay": [60.0, 61.0] },
        });
        let long = json!({ "scenario": { "name": "long" }, "runs": [run] });
        let drawn = by_time(&long);
        let names: Vec<&str> = drawn.iter().map(|(name, _)| name.as_str()).collect();
        assert_eq!(names, ["latency-long.svg", "memory-long.svg"]);
        assert_eq!(drawn[0].1.series.len(), 3);
        assert_eq!(
            drawn[1].1.series[1].places,
            [Place::at(0.0, 60.0), Place::at(1.0, 61.0)]
        );
        assert!(by_time(&result(1, &[1.0])).is_empty());
    }
}
