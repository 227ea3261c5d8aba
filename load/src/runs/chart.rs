//! Lines in an SVG: numbers by another number, with their spread.

use std::fmt::Write;

use super::compare::Spread;
use super::plot::escaped;
use super::table::grouped;

const WIDTH: f64 = 760.0;
const HEIGHT: f64 = 400.0;
/// What is left for the numbers of the axes, above for the title, on the right for the labels.
const LEFT: f64 = 72.0;
const RIGHT: f64 = 150.0;
const TOP: f64 = 40.0;
const BOTTOM: f64 = 52.0;
/// Lines across, at least.
const LINES: f64 = 5.0;
const COLOURS: [&str; 6] = ["#1f5fa8", "#c4511d", "#3c8a3f", "#7d4aa3", "#8a6d1f", "#4b4b4b"];

/// One place of a line.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Place {
    pub x: f64,
    pub y: Spread,
}

impl Place {
    /// With no spread.
    pub fn at(x: f64, y: f64) -> Place {
        let y = Spread {
            least: y,
            median: y,
            most: y,
        };
        Place { x, y }
    }

    pub fn with_spread(x: f64, y: Spread) -> Place {
        Place { x, y }
    }
}

/// One line.
#[derive(Clone, Debug, PartialEq)]
pub struct Series {
    pub label: String,
    pub places: Vec<Place>,
}

impl Series {
    pub fn new(label: &str, places: Vec<Place>) -> Series {
        Series {
            label: label.into(),
            places,
        }
    }
}

/// Lines on one pair of axes. The upright one begins at 0.
#[derive(Clone, Debug, Default)]
pub struct Chart {
    pub title: String,
    pub x: String,
    pub y: String,
    /// Equal distances along are equal ratios, not differences; each place then has its number below it.
    pub logarithmic: bool,
    pub series: Vec<Series>,
}

impl Chart {
    /// The picture.
    pub fn svg(&self) -> String {
        let places = || self.series.iter().flat_map(|series| &series.places);
        let most = places().map(|place| place.y.most).fold(0.0, f64::max);
        let step = round_step(most / LINES);
        let top = (most / step).ceil().max(1.0) * step;
        let scale = |x: f64| if self.logarithmic { x.max(1e-9).ln() } else { x };
        let (from, to) = places().fold((f64::INFINITY, f64::NEG_INFINITY), |(from, to), place| {
            (from.min(scale(place.x)), to.max(scale(place.x)))
        });
        let across = |x: f64| {
            let room = WIDTH - LEFT - RIGHT;
            // One place alone stands in the middle.
            let share = if to > from {
                (scale(x) - from) / (to - from)
            } else {
                0.5
            };
            LEFT + share * room
        };
        let up = |y: f64| HEIGHT - BOTTOM - y / top * (HEIGHT - TOP - BOTTOM);
        let mut drawn = String::new();
        let mut y = 0.0;
        while y <= top + step / 2.0 {
            let _ = writeln!(
                drawn,
                r#"<path class="grid" d="M{LEFT} {at:.1}H{}"/><text x="{}" y="{:.1}" class="end">{}</text>"#,
                WIDTH - RIGHT,
                LEFT - 8.0,
                up(y) + 4.0,
                grouped(y, digits(step)),
                at = up(y),
            );
            y += step;
        }
        for x in self.marks() {
            let _ = writeln!(
                drawn,
                r#"<text x="{:.1}" y="{}" class="middle">{}</text>"#,
                across(x),
                HEIGHT - BOTTOM + 18.0,
                grouped(x, 0)
            );
        }
        for (number, series) in self.series.iter().enumerate() {
            let colour = COLOURS[number % COLOURS.len()];
            let line: Vec<String> = series
                .places
                .iter()
                .map(|place| format!("{:.1},{:.1}", across(place.x), up(place.y.median)))
                .collect();
            let _ = writeln!(
                drawn,
                r#"<polyline points="{}" style="stroke:{colour}"/>"#,
                line.join(" ")
            );
            for place in series.places.iter().filter(|place| place.y.most > place.y.least) {
                let _ = writeln!(
                    drawn,
                    r#"<path class="spread" d="M{:.1} {:.1}V{:.1}" style="stroke:{colour}"/>"#,
                    across(place.x),
                    up(place.y.least),
                    up(place.y.most)
                );
            }
            let _ = writeln!(
                drawn,
                r#"<text x="{}" y="{:.1}" style="fill:{colour}">{}</text>"#,
                WIDTH - RIGHT + 10.0,
                TOP + 16.0 * number as f64 + 10.0,
                escaped(&series.label)
            );
        }
        format!(
            r##"<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{HEIGHT}" viewBox="0 0 {WIDTH} {HEIGHT}">
<style>text{{font:13px sans-serif;fill:#222}}.title{{font-size:16px;font-weight:bold}}.end{{text-anchor:end}}.middle{{text-anchor:middle}}polyline{{fill:none;stroke-width:2}}.grid{{stroke:#ddd}}.spread{{stroke-width:4;opacity:.45}}</style>
<rect width="100%" height="100%" style="fill:#fff"/>
<text x="0" y="20" class="title">{}</text>
{drawn}<text x="{:.1}" y="{}" class="middle">{}</text>
<text x="{LEFT}" y="{}">{}</text>
</svg>
"##,
            escaped(&self.title),
            (LEFT + WIDTH - RIGHT) / 2.0,
            HEIGHT - 12.0,
            escaped(&self.x),
            TOP - 8.0,
            escaped(&self.y)
        )
    }

    /// Where numbers stand along the lower axis: at each place, or at round numbers.
    fn marks(&self) -> Vec<f64> {
        let mut all: Vec<f64> = self
            .series
            .iter()
            .flat_map(|series| &series.places)
            .map(|place| place.x)
            .collect();
        all.sort_by(f64::total_cmp);
        all.dedup();
        let (Some(first), Some(last)) = (all.first(), all.last()) else {
            return all;
        };
        if self.logarithmic {
            return all;
        }
        let step = round_step((last - first) / LINES).max(1.0);
        let count = ((last - first) / step) as u32;
        (0..=count).map(|number| first + f64::from(number) * step).collect()
    }
}

/// 1, 2 or 5 times a power of ten, at least as large.
fn round_step(least: f64) -> f64 {
    if least <= 0.0 {
        return 1.0;
    }
    let power = 10_f64.powf(least.log10().floor());
    let step = [1.0, 2.0, 5.0, 10.0]
        .into_iter()
        .find(|step| step * power >= least * 0.999);
    step.unwrap_or(10.0) * power
}

fn digits(step: f64) -> usize {
    (-step.log10().floor()).max(0.0) as usize
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn steps_are_round_and_as_fine_as_needed() {
        for (least, step) in [
            (0.0, 1.0),
            (0.31, 0.5),
            (1.0, 1.0),
            (1.1, 2.0),
            (70.0, 100.0),
            (0.02, 0.02),
        ] {
            assert!((round_step(least) - step).abs() < 1e-9, "{least}");
        }
        assert_eq!((digits(0.5), digits(2.0), digits(0.02)), (1, 0, 2));
    }

    #[test]
    fn a_chart_has_its_lines_its_spreads_and_its_numbers_inside_the_picture() {
        let spread = Spread {
            least: 1.0,
            median: 1.5,
            most: 2.0,
        };
        let chart = Chart {
            title: "CPU & more".into(),
            x: "partitions".into(),
            y: "seconds".into(),
            logarithmic: true,
            series: vec![
                Series::new("relay", vec![Place::with_spread(4.0, spread), Place::at(512.0, 1.8)]),
                Series::new("<agent>", vec![Place::at(4.0, 0.4), Place::at(512.0, 0.4)]),
            ],
        };
        let drawn = chart.svg();
        assert!(
            drawn.contains("CPU &amp; more") && drawn.contains("&lt;agent&gt;"),
            "{drawn}"
        );
        assert_eq!(
            (
                drawn.matches("<polyline").count(),
                drawn.matches("class=\"spread\"").count()
            ),
            (2, 1)
        );
        assert!(
            drawn.contains(">4<") && drawn.contains(">512<") && drawn.contains(">2.0<"),
            "{drawn}"
        );
        for point in drawn.split("points=\"").skip(1).flat_map(|rest| rest.split('"').next()) {
            for (x, y) in point.split(' ').filter_map(|pair| pair.split_once(',')) {
                let (x, y): (f64, f64) = (x.parse().unwrap(), y.parse().unwrap());
                assert!(
                    (LEFT..=WIDTH - RIGHT).contains(&x) && (TOP..=HEIGHT - BOTTOM).contains(&y),
                    "{x} {y}"
                );
            }
        }
    }

    #[test]
    fn a_chart_of_nothing_or_of_one_place_is_still_a_picture() {
        assert!(Chart::default().svg().ends_with("</svg>\n"));
        let one = Chart {
            series: vec![Series::new("one", vec![Place::at(3.0, 0.0)])],
            ..Chart::default()
        };
        assert!(
            !one.svg().contains("NaN") && !one.svg().contains("inf"),
            "{}",
            one.svg()
        );
    }
}
