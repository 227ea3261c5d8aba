//! The goals of evrepl's speed, and what results say of each.

use serde_json::Value;

use super::compare::{Spread, numbers};
use super::table::{grouped, markdown};

/// A number that a scenario shall reach, or stay below.
struct Goal {
    measure: &'static str,
    scenario: &'static str,
    place: &'static str,
    shall: Shall,
    digits: usize,
}

#[derive(Clone, Copy)]
enum Shall {
    Reach(f64),
    StayBelow(f64),
    /// So many times what the other scenario has at the same place.
    ReachTimes(f64, &'static str),
}

const fn goal(measure: &'static str, scenario: &'static str, place: &'static str, shall: Shall, digits: usize) -> Goal {
    Goal {
        measure,
        scenario,
        place,
        shall,
        digits,
    }
}

const CPU: &str = "/cpu/relay_and_agent";
const RATE: &str = "/events_per_second";

const GOALS: [Goal; 14] = [
    goal(
        "relay + agent, CPU s per million, 100 B",
        "drain-100",
        CPU,
        Shall::StayBelow(1.8),
        2,
    ),
    goal(
        "relay + agent, CPU s per million, 1 KiB",
        "drain-1k",
        CPU,
        Shall::StayBelow(3.0),
        2,
    ),
    goal("drain, events/s, 100 B", "drain-100", RATE, Shall::Reach(400e3), 0),
    goal("drain, events/s, 1 KiB", "drain-1k", RATE, Shall::Reach(230e3), 0),
    goal(
        "sustained, events/s, 100 B",
        "ramp-100",
        "/max_rate",
        Shall::Reach(240e3),
        0,
    ),
    goal(
        "sustained, events/s, 1 KiB",
        "ramp-1k",
        "/max_rate",
        Shall::Reach(155e3),
        0,
    ),
    goal(
        "latency at 20 000/s, p50, ms",
        "fixed-100",
        "/latency_ms/p50",
        Shall::StayBelow(2.0),
        1,
    ),
    goal(
        "latency at 20 000/s, p99, ms",
        "fixed-100",
        "/latency_ms/p99",
        Shall::StayBelow(8.0),
        1,
    ),
    goal(
        "latency at 20 000/s, p99.9, ms",
        "fixed-100",
        "/latency_ms/p999",
        Shall::StayBelow(20.0),
        1,
    ),
    goal(
        "latency at half of the maximum, p99, ms",
        "half-100",
        "/latency_ms/p99",
        Shall::StayBelow(25.0),
        1,
    ),
    goal(
        "hot keys, events/s",
        "hot-100",
        RATE,
        Shall::ReachTimes(2.0, "drain-100"),
        0,
    ),
    goal(
        "relay, peak RSS MiB",
        "long",
        "/peak_rss_mib/relay",
        Shall::StayBelow(150e6 / 1_048_576.0),
        0,
    ),
    goal(
        "agent, peak RSS MiB",
        "long",
        "/peak_rss_mib/agent",
        Shall::StayBelow(150e6 / 1_048_576.0),
        0,
    ),
    goal("lost", "", "/lost", Shall::StayBelow(0.0), 0),
];

/// A row for each goal of which there is a result: scenarios by name with their runs. `None` without any.
pub fn goals(results: &[(String, Vec<Value>)]) -> Option<String> {
    let spread = |scenario: &str, place: &str| {
        let of = results
            .iter()
            .filter(|(name, _)| scenario.is_empty() || name == scenario);
        Spread::of(of.flat_map(|(_, runs)| numbers(runs, place)))
    };
    let head = ["", "goal", "measured", "met", "by"].map(str::to_string).to_vec();
    let mut lines = vec![head];
    for goal in &GOALS {
        let Some(found) = spread(goal.scenario, goal.place) else {
            continue;
        };
        let number = |number| grouped(number, goal.digits);
        let (shall, met) = match goal.shall {
            Shall::Reach(least) => (format!("≥ {}", number(least)), found.median >= least),
            // One lost key is one too many, so there the most counts.
            Shall::StayBelow(0.0) => ("0 in every run".into(), found.most == 0.0),
            Shall::StayBelow(most) => (format!("≤ {}", number(most)), found.median <= most),
            Shall::ReachTimes(times, other) => match spread(other, goal.place) {
                Some(other) => {
                    let least = other.median * times;
                    (format!("≥ {} × {}", times, number(other.median)), found.median >= least)
                }
                None => continue,
            },
        };
        let scenario = if goal.scenario.is_empty() {
            "all of them"
        } else {
            goal.scenario
        };
        lines.push(vec![
            goal.measure.into(),
            shall,
            found.text(goal.digits),
            if met { "yes" } else { "no" }.into(),
            scenario.into(),
        ]);
    }
    (lines.len() > 2).then(|| markdown(&lines))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_goal_is_met_by_the_median_and_nothing_may_be_lost_in_any_run() {
        let runs = |rates: &[f64], lost: u64| {
            let run = |rate: &f64| json!({ "events_per_second": rate, "lost": 0 });
            let mut runs: Vec<Value> = rates.iter().map(run).collect();
            runs[0]["lost"] = json!(lost);
            runs
        };
        let row = |text: &str, name: &str| {
            let line = text.lines().find(|line| line.contains(name)).unwrap_or_default();
            line.split('|').map(|cell| cell.trim().to_owned()).collect::<Vec<_>>()
        };
        let results = [
            ("drain-100".to_string(), runs(&[390e3, 410e3, 420e3], 0)),
            ("drain-1k".to_string(), runs(&[200e3, 210e3, 240e3], 0)),
            ("hot-100".to_string(), runs(&[700e3, 800e3, 830e3], 1)),
        ];
        let text = goals(&results).unwrap();
        assert_eq!(
            row(&text, "drain, events/s, 100 B")[3..5],
            ["410 000 (390 000–420 000)", "yes"]
        );
        assert_eq!(
            row(&text, "hot keys")[2..5],
            ["≥ 2 × 410 000", "800 000 (700 000–830 000)", "no"]
        );
        assert_eq!(row(&text, "drain, events/s, 1 KiB")[4], "no");
        assert_eq!(row(&text, "lost")[4], "no");
        assert!(!text.contains("latency"), "{text}");
        assert_eq!(goals(&[]), None);
    }
}
