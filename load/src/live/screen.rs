//! What the demo shows while it runs: a small table, refreshed in place on a terminal; one line a second elsewhere.

use std::io::{IsTerminal, Write};
use std::time::{Duration, Instant};

use crate::latency::Latencies;
use crate::runs::table::grouped;

const ON_A_TERMINAL: Duration = Duration::from_millis(250);
const ELSEWHERE: Duration = Duration::from_secs(1);

/// How one direction fares, or both together.
#[derive(Clone, Debug, Default)]
pub struct Numbers {
    /// Writes whose event Kafka holds.
    pub writes: u64,
    /// Of those, how many the relay has brought to an end.
    pub replicated: u64,
    /// Keys overdue.
    pub lost: u64,
    pub latencies: Latencies,
}

impl Numbers {
    /// Written, and not brought to an end yet.
    pub fn in_flight(&self) -> u64 {
        self.writes - self.replicated.min(self.writes)
    }

    /// Both directions together.
    pub fn sum(both: &[Numbers; 2]) -> Numbers {
        let mut sum = both[0].clone();
        sum.writes += both[1].writes;
        sum.replicated += both[1].replicated;
        sum.lost += both[1].lost;
        sum.latencies.add(&both[1].latencies);
        sum
    }

    /// Milliseconds in words; a dash without samples.
    fn ms(&self, quantile: f64) -> String {
        match self.latencies.count() {
            0 => "–".into(),
            _ => format!("{} ms", grouped(self.latencies.ms(quantile), 1)),
        }
    }
}

/// The place where it is shown.
pub struct Screen {
    terminal: bool,
    /// Lines of the table that stands there now.
    drawn: usize,
    next: Instant,
}

impl Screen {
    pub fn new() -> Screen {
        Screen {
            terminal: std::io::stdout().is_terminal(),
            drawn: 0,
            next: Instant::now(),
        }
    }

    /// How often something new should be drawn.
    pub fn interval(&self) -> Duration {
        if self.terminal { ON_A_TERMINAL } else { ELSEWHERE }
    }

    /// Draws, when it is time to; `what` says how far the demo is.
    pub fn draw(&mut self, what: &str, titles: &[String; 2], both: &[Numbers; 2]) {
        let now = Instant::now();
        if now < self.next {
            return;
        }
        self.next = now + self.interval();
        let total = Numbers::sum(both);
        let mut stdout = std::io::stdout().lock();
        // Whoever reads may have gone; the demo goes on and cleans up.
        let _ = if self.terminal {
            let lines = table(what, titles, both, &total);
            let up = match self.drawn {
                0 => String::new(),
                lines => format!("\x1b[{lines}A"),
            };
            self.drawn = lines.len();
            let text: String = lines.iter().map(|line| format!("{line}\x1b[K\n")).collect();
            write!(stdout, "{up}{text}")
        } else {
            writeln!(stdout, "{}", line(what, &total))
        };
        let _ = stdout.flush();
    }

    /// The next [`Screen::draw`] draws, whatever the time.
    pub fn soon(&mut self) {
        self.next = Instant::now();
    }
}

impl Default for Screen {
    fn default() -> Screen {
        Screen::new()
    }
}

fn line(what: &str, total: &Numbers) -> String {
    format!(
        "{what}: writes {}, replicated {}, in flight {}, lost {}, p50 {}, p99 {}",
        total.writes,
        total.replicated,
        total.in_flight(),
        total.lost,
        total.ms(0.5),
        total.ms(0.99)
    )
}

fn table(what: &str, titles: &[String; 2], both: &[Numbers; 2], total: &Numbers) -> Vec<String> {
    type Cell = fn(&Numbers) -> String;
    let rows: [(&str, Cell); 6] = [
        ("writes", |numbers| grouped(numbers.writes as f64, 0)),
        ("replicated", |numbers| grouped(numbers.replicated as f64, 0)),
        ("in flight", |numbers| grouped(numbers.in_flight() as f64, 0)),
        ("lost", |numbers| grouped(numbers.lost as f64, 0)),
        ("p50 end to end", |numbers| numbers.ms(0.5)),
        ("p99 end to end", |numbers| numbers.ms(0.99)),
    ];
    let mut lines = vec![format!("{what:<20}{:>24}{:>24}{:>12}", titles[0], titles[1], "both")];
    for (name, cell) in rows {
        let [one, other] = [cell(&both[0]), cell(&both[1])];
        lines.push(format!("  {name:<18}{one:>24}{other:>24}{:>12}", cell(total)));
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::*;

    fn numbers(writes: u64, replicated: u64, lost: u64, ms: u64) -> Numbers {
        let mut latencies = Latencies::default();
        latencies.record(Duration::from_millis(ms));
        Numbers {
            writes,
            replicated,
            lost,
            latencies,
        }
    }

    #[test]
    fn the_line_and_the_table_add_both_directions_up() {
        let both = [numbers(1_000, 990, 1, 4), numbers(2_000, 2_001, 0, 8)];
        let total = Numbers::sum(&both);
        let text = line("12 s of 30 s", &total);
        assert!(
            text.starts_with("12 s of 30 s: writes 3000, replicated 2991, in flight 9, lost 1, p50 4.0 ms, p99 8.0 ms"),
            "{text}"
        );
        let titles = [
            "us-east-1 -> eu-west-1".to_string(),
            "eu-west-1 -> us-east-1".to_string(),
        ];
        let lines = table("12 s of 30 s", &titles, &both, &total);
        assert_eq!(lines.len(), 7);
        // It fits an ordinary terminal: a line that wraps could not be drawn over.
        assert!(lines.iter().all(|line| line.chars().count() <= 80), "{lines:#?}");
        assert!(lines[3].ends_with("9") && lines[4].ends_with("1"), "{lines:#?}");
    }

    #[test]
    fn a_relay_ahead_of_our_count_of_writes_is_not_in_flight() {
        assert_eq!(numbers(10, 12, 0, 1).in_flight(), 0);
        assert_eq!(Numbers::default().ms(0.5), "–");
    }
}
