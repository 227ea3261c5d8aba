//! Flame graphs of what a sampling profiler saw: width is time, and who stands on whom has called.

use std::collections::BTreeMap;
use std::fmt::Write;

use super::frames::plain;

/// Pixels.
const WIDTH: f64 = 1_600.0;
const ROW: f64 = 16.0;
const MARGIN: f64 = 40.0;
/// Narrower ones are left out: nobody sees them, and there are very many.
const NARROWEST: f64 = 0.3;
/// A letter of the font, about.
const LETTER: f64 = 6.6;

/// Calls and how often they were seen.
#[derive(Debug, Default)]
pub struct Flame {
    /// Samples of it and of all that it called.
    samples: u64,
    called: BTreeMap<String, Flame>,
}

impl Flame {
    /// From what `perf script -F comm,ip,sym` prints: for each sample the thread's name, then its functions, the innermost
    /// first.
    pub fn parse(script: &str) -> Flame {
        let mut flame = Flame::default();
        let mut thread = None;
        let mut stack: Vec<String> = Vec::new();
        for line in script.lines().chain([""]) {
            if line.trim().is_empty() {
                if let Some(thread) = thread.take() {
                    flame.add([thread].into_iter().chain(stack.drain(..).rev()));
                }
            } else if line.starts_with(char::is_whitespace) {
                let symbol = line
                    .trim_start()
                    .split_once(' ')
                    .map_or("?", |(_, symbol)| symbol.trim());
                stack.push(plain(symbol));
            } else {
                thread = Some(line.trim().into());
            }
        }
        flame
    }

    fn add(&mut self, stack: impl Iterator<Item = String>) {
        self.samples += 1;
        let mut at = self;
        for name in stack {
            at = at.called.entry(name).or_default();
            at.samples += 1;
        }
    }

    pub fn samples(&self) -> u64 {
        self.samples
    }

    fn depth(&self) -> usize {
        1 + self.called.values().map(Flame::depth).max().unwrap_or(0)
    }

    /// As a picture; the pointer over a box shows its name and share.
    pub fn svg(&self, title: &str) -> String {
        let height = self.depth() as f64 * ROW + 2.0 * MARGIN;
        let mut text = format!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {height}\" font-family=\"monospace\" \
             font-size=\"11\">\n<rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n\
             <text x=\"8\" y=\"24\" font-size=\"15\">{}</text>\n",
            escaped(title)
        );
        self.draw("all", self.samples, 0.0, height - MARGIN, &mut text);
        text.push_str("</svg>\n");
        text
    }

    /// Its box, whose lower edge is at `bottom`, and above it what it called.
    fn draw(&self, name: &str, all: u64, left: f64, bottom: f64, text: &mut String) {
        let share = self.samples as f64 / all.max(1) as f64;
        let width = share * WIDTH;
        if width < NARROWEST {
            return;
        }
        let (top, hue) = (bottom - ROW, hue(name));
        let _ = write!(
            text,
            "<g><title>{}: {:.2} %</title><rect x=\"{left:.1}\" y=\"{top:.1}\" width=\"{width:.1}\" height=\"{:.1}\" \
             fill=\"hsl({hue},75%,68%)\"/>",
            escaped(name),
            share * 100.0,
            ROW - 1.0
        );
        let letters = (width / LETTER) as usize;
        if letters > 3 {
            let short: String = name.chars().take(letters).collect();
            let _ = write!(
                text,
                "<text x=\"{:.1}\" y=\"{:.1}\">{}</text>",
                left + 2.0,
                top + 11.5,
                escaped(&short)
            );
        }
        text.push_str("</g>\n");
        let mut left = left;
        for (name, called) in &self.called {
            called.draw(name, all, left, top, text);
            left += called.samples as f64 / all.max(1) as f64 * WIDTH;
        }
    }
}

/// Warm colours, the same for the same name.
fn hue(name: &str) -> u32 {
    name.bytes()
        .fold(7_u32, |hash, byte| hash.wrapping_mul(31).wrapping_add(byte.into()))
        % 60
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}

#[cfg(test)]
mod tests {
    use super::*;

    const SCRIPT: &str =
        "poll us-east-1- \n\t    7f01 _RNvCs_4main4look\n\t    7f02 start\n\npoll us-east-1- \n\t    7f02 start\n\n";

    #[test]
    fn samples_are_added_from_the_thread_upwards() {
        let flame = Flame::parse(SCRIPT);
        assert_eq!((flame.samples(), flame.depth()), (2, 4));
        let start = &flame.called["poll us-east-1-"].called["start"];
        assert_eq!((start.samples, start.called["main::look"].samples), (2, 1));
    }

    #[test]
    fn a_box_is_as_wide_as_its_share() {
        let svg = Flame::parse(SCRIPT).svg("a < b");
        assert!(svg.contains("a &lt; b") && svg.contains("main::look: 50.00 %"), "{svg}");
        assert!(svg.contains("width=\"800.0\""), "{svg}");
    }
}
