//! A [`View`] as lines for a terminal. Pure: drawn on any buffer, as large or small as it is.

use std::time::Duration;

use ratatui::Frame;
use ratatui::layout::{Constraint, Layout};
use ratatui::style::{Color, Modifier, Style};
use ratatui::text::{Line, Span};
use ratatui::widgets::Paragraph;

use super::model::{AgentView, FlowView, MailboxView, Mark, StageView, View};
use crate::cli::status::seconds;

const GOOD: Style = Style::new().fg(Color::Green);
const BAD: Style = Style::new().fg(Color::Red).add_modifier(Modifier::BOLD);
const DIM: Style = Style::new().add_modifier(Modifier::DIM);
const TITLE: Style = Style::new().add_modifier(Modifier::BOLD);

/// Wide enough for the longest name of a stage and for a time.
const BEFORE_BAR: usize = 2 + 13 + 10;

/// What is on the screen beside the view.
#[derive(Clone, Debug, Default)]
pub struct Around {
    /// Why the last look failed, and how long the view is old.
    pub silent: Option<(String, Duration)>,
    /// How often is looked.
    pub every: Duration,
    /// Lines above the first one shown.
    pub scrolled: u16,
}

/// Draws it all; gives how many lines of the body there were no room for.
pub fn draw(frame: &mut Frame, view: &View, around: &Around) -> u16 {
    let [head, body] = Layout::vertical([Constraint::Length(1), Constraint::Min(0)]).areas(frame.area());
    frame.render_widget(Paragraph::new(header(view, around)), head);
    let lines = body_lines(view, around, body.width.into());
    let hidden = (lines.len() as u16).saturating_sub(body.height);
    let text = Paragraph::new(lines).scroll((around.scrolled.min(hidden), 0));
    frame.render_widget(text, body);
    hidden
}

fn header(view: &View, around: &Around) -> Line<'static> {
    let every = humantime::format_duration(around.every);
    let title = match view.title.as_str() {
        "" => "evrepl".to_owned(),
        title => title.to_owned(),
    };
    Line::from(vec![
        Span::styled(title, TITLE),
        Span::styled(format!("  every {every}  q quits, arrows scroll"), DIM),
    ])
}

fn body_lines(view: &View, around: &Around, width: usize) -> Vec<Line<'static>> {
    let mut lines = Vec::new();
    if let Some((why, old)) = &around.silent {
        lines.push(Line::styled(format!("! {why}"), BAD));
        let shown = match view.title.is_empty() {
            true => String::new(),
            false => format!(", what is shown is {} old", seconds(old.as_secs_f64())),
        };
        lines.push(Line::styled(format!("  asked again and again{shown}"), BAD));
    }
    for trouble in &view.troubles {
        lines.extend(wrapped(&format!("! {trouble}"), width, BAD));
    }
    for flow in &view.flows {
        flow_lines(flow, width, &mut lines);
    }
    if !view.title.is_empty() {
        agent_lines(&view.agent, &mut lines);
    }
    if !view.restarts.is_empty() {
        let mut spans = vec![Span::styled("restarts", TITLE)];
        for (actor, count, new) in &view.restarts {
            spans.push(Span::raw(format!("  {actor} {count}")));
            if *new > 0 {
                spans.push(Span::styled(format!(" +{new}"), BAD));
            }
        }
        lines.extend([Line::default(), Line::from(spans)]);
    }
    lines
}

fn flow_lines(flow: &FlowView, width: usize, lines: &mut Vec<Line<'static>>) {
    let state = if flow.running { GOOD } else { BAD };
    let unknown = || "-".to_owned();
    let lag = flow.lag.map_or_else(unknown, time);
    let offset_lag = flow.offset_lag.map_or_else(unknown, |lag| lag.to_string());
    lines.push(Line::default());
    lines.push(Line::from(vec![
        Span::styled(flow.name.clone(), TITLE),
        Span::styled(format!("  {}", flow.state), state),
        Span::raw(format!(
            "  {}/s  lag {lag}  offset lag {offset_lag}  in flight {}  dirty {}",
            rate(flow.rate),
            flow.in_flight,
            flow.dirty
        )),
    ]));
    let longest = flow.stages.iter().filter_map(|stage| stage.seconds).fold(0.0, f64::max);
    // A bar beside which the mailbox and the mark still have room.
    let room = width.saturating_sub(BEFORE_BAR + 46).clamp(6, 40);
    for stage in &flow.stages {
        lines.push(stage_line(stage, longest, room));
    }
    if !flow.outcomes.is_empty() {
        lines.push(rates("outcomes", &flow.outcomes));
    }
    for link in &flow.links {
        let style = if link.open { Style::new() } else { BAD };
        lines.push(Line::styled(format!("  {}", link.text), style));
    }
    for (canary, lives) in &flow.canaries {
        let style = if *lives { Style::new() } else { BAD };
        lines.push(Line::styled(format!("  canary {canary}"), style));
    }
    for wait in &flow.waits {
        lines.push(Line::from(format!("  waits: {wait}")));
    }
}

fn stage_line(stage: &StageView, longest: f64, room: usize) -> Line<'static> {
    let style = match (stage.mark, stage.fresh) {
        (Mark::Slow, _) => BAD,
        (_, true) => GOOD,
        (_, false) => DIM,
    };
    let took = stage.seconds.map_or_else(|| "-".to_owned(), time);
    let part = stage
        .seconds
        .map_or(0.0, |seconds| if longest > 0.0 { seconds / longest } else { 0.0 });
    let mut spans = vec![
        Span::raw(format!("  {:<13}", stage.name)),
        Span::styled(format!("{took:>9} "), style),
        Span::styled(bar(part, room), style),
    ];
    if let Some(mailbox) = &stage.mailbox {
        spans.push(mailbox_span(mailbox));
    }
    match stage.mark {
        Mark::None => {}
        Mark::Longest => spans.push(Span::raw(" ◀ longest")),
        Mark::Slow => spans.push(Span::styled(" ◀ slow", BAD)),
    }
    Line::from(spans)
}

fn mailbox_span(mailbox: &MailboxView) -> Span<'static> {
    let MailboxView {
        actor,
        fullest,
        capacity,
        high_water,
        holds_up,
    } = mailbox;
    let style = if *holds_up { BAD } else { Style::new() };
    Span::styled(format!(" {actor} {fullest}/{capacity} (most {high_water})"), style)
}

fn agent_lines(agent: &AgentView, lines: &mut Vec<Line<'static>>) {
    let (listening, style) = match agent.listening {
        true => ("listening", GOOD),
        false => ("not listening", BAD),
    };
    lines.push(Line::default());
    let mut head = vec![
        Span::styled("agent", TITLE),
        Span::styled(format!("  {listening} "), style),
    ];
    head.extend(agent.mailboxes.iter().map(mailbox_span));
    lines.push(Line::from(head));
    lines.push(rates("items", &agent.items));
    if agent.sessions.is_empty() {
        lines.push(Line::from("  no session"));
    }
    for session in &agent.sessions {
        lines.push(Line::from(format!("  session {session}")));
    }
    for (server, answers) in &agent.servers {
        let style = if *answers { Style::new() } else { BAD };
        lines.push(Line::styled(format!("  memcached {server}"), style));
    }
}

fn rates(name: &str, rates: &[(String, f64)]) -> Line<'static> {
    let each = rates
        .iter()
        .map(|(name, per_second)| format!("{name} {}", rate(*per_second)));
    let all = match rates.is_empty() {
        true => "none".to_owned(),
        false => each.collect::<Vec<_>>().join("  "),
    };
    Line::from(format!("  {name}/s  {all}"))
}

/// `part` of `room` cells, in eighths.
fn bar(part: f64, room: usize) -> String {
    let eighths = ((part.clamp(0.0, 1.0) * room as f64 * 8.0).round() as usize).max(usize::from(part > 0.0));
    let mut bar = "█".repeat(eighths / 8);
    if let Some(rest) = ["", "▏", "▎", "▍", "▌", "▋", "▊", "▉"].get(eighths % 8) {
        bar.push_str(rest);
    }
    let cells = bar.chars().count();
    bar.extend(std::iter::repeat_n(' ', room - cells));
    bar
}

/// A text in lines as wide as the terminal, those after the first indented.
fn wrapped(text: &str, width: usize, style: Style) -> Vec<Line<'static>> {
    let mut lines: Vec<String> = Vec::new();
    for word in text.split(' ') {
        match lines.last_mut() {
            Some(line) if line.chars().count() + 1 + word.chars().count() <= width => {
                line.push(' ');
                line.push_str(word);
            }
            Some(_) => lines.push(format!("  {word}")),
            None => lines.push(word.to_owned()),
        }
    }
    lines.into_iter().map(|line| Line::styled(line, style)).collect()
}

/// `250 µs`, `1.2 ms`, `3.4 s`.
fn time(seconds: f64) -> String {
    match seconds {
        s if s < 0.001 => format!("{:.0} µs", s * 1e6),
        s if s < 1.0 => format!("{:.1} ms", s * 1e3),
        s => format!("{s:.1} s"),
    }
}

fn rate(per_second: f64) -> String {
    match per_second {
        r if r > 0.0 && r < 10.0 => format!("{r:.1}"),
        r => format!("{r:.0}"),
    }
}
