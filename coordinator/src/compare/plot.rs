//! Lines over numbers, as SVG that needs nothing else and follows the reader's light or dark.

use std::fmt::Write as _;

use crate::html::Escaped;

/// In its own units.
const WIDTH: f64 = 720.0;
const HEIGHT: f64 = 340.0;
const LEFT: f64 = 64.0;
const RIGHT: f64 = 16.0;
const TOP: f64 = 40.0;
const BOTTOM: f64 = 48.0;
/// Ticks of an axis, about.
const TICKS: f64 = 6.0;
/// Points of a line; more are put together.
const MAX_POINTS: usize = 600;
/// Colours that are told apart on white and on black, also by those who see few colours (Okabe and Ito 2008).
const COLOURS: [&str; 6] = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9"];
/// So that lines are told apart without colours as well.
const DASHES: [&str; 6] = ["none", "7 4", "2 3", "9 3 2 3", "12 5", "4 2"];

/// One line.
#[derive(Debug, Clone, PartialEq)]
pub struct Line {
    /// What it is called.
    pub name: String,
    /// Its points, from left to right.
    pub points: Vec<(f64, f64)>,
    /// Which colour: lines of one run have the same in every plot.
    pub colour: usize,
}

/// A whole plot. Points that are no numbers are left out.
#[derive(Debug, Clone, PartialEq)]
pub struct Plot {
    /// Above it, and the name of its file.
    pub title: String,
    /// Below it.
    pub x: String,
    /// Beside it.
    pub y: String,
    /// What it shows.
    pub lines: Vec<Line>,
}

impl Plot {
    /// Whether there is nothing to show.
    pub fn is_empty(&self) -> bool {
        self.lines.iter().all(|line| line.points.len() < 2)
    }

    /// A name for its file.
    pub fn file_name(&self) -> String {
        let letters = |c: char| if c.is_ascii_alphanumeric() { c.to_ascii_lowercase() } else { '-' };
        format!("{}.svg", self.title.chars().map(letters).collect::<String>())
    }

    /// As SVG.
    pub fn svg(&self) -> String {
        let lines: Vec<Line> = self.lines.iter().map(thinned).collect();
        let (x, y) = (Axis::over(&lines, |point| point.0, 0.0), Axis::over(&lines, |point| point.1, 0.04));
        let across = |value: f64| LEFT + (WIDTH - LEFT - RIGHT) * x.share(value);
        let down = |value: f64| HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * y.share(value);
        let mut out = format!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {HEIGHT}\" role=\"img\" \
             aria-label=\"{}\">\n<style>{}</style>\n<rect class=\"paper\" width=\"{WIDTH}\" height=\"{HEIGHT}\"/>\n",
            Escaped(&self.summary(&lines)),
            STYLE
        );
        for tick in y.ticks() {
            let at = down(tick);
            let (edge, label, below) = (WIDTH - RIGHT, LEFT - 8.0, at + 4.0);
            let _ = writeln!(
                out,
                "<path class=\"grid\" d=\"M{LEFT} {at:.1}H{edge}\"/><text x=\"{label}\" y=\"{below:.1}\" \
                 text-anchor=\"end\">{}</text>",
                shown(tick)
            );
        }
        for tick in x.ticks() {
            let (at, foot, label) = (across(tick), HEIGHT - BOTTOM, HEIGHT - BOTTOM + 18.0);
            let _ = writeln!(
                out,
                "<path class=\"grid\" d=\"M{at:.1} {TOP}V{foot}\"/><text x=\"{at:.1}\" y=\"{label}\" \
                 text-anchor=\"middle\">{}</text>",
                shown(tick)
            );
        }
        let (middle, foot) = ((LEFT + WIDTH - RIGHT) / 2.0, HEIGHT - 10.0);
        let _ = writeln!(
            out,
            "<text x=\"{middle}\" y=\"{foot}\" text-anchor=\"middle\">{}</text>",
            Escaped(&self.x)
        );
        let _ = writeln!(out, "<text x=\"{LEFT}\" y=\"18\" class=\"soft\">{}</text>", Escaped(&self.y));
        let mut legend = LEFT;
        for line in &lines {
            let colour = COLOURS[line.colour % COLOURS.len()];
            let dash = DASHES[line.colour % DASHES.len()];
            let style = format!("stroke=\"{colour}\" stroke-dasharray=\"{dash}\"");
            let path: String = line
                .points
                .iter()
                .enumerate()
                .map(|(at, (a, b))| {
                    format!("{}{:.1} {:.1}", if at == 0 { 'M' } else { 'L' }, across(*a), down(*b))
                })
                .collect();
            let name = Escaped(&line.name);
            let _ = writeln!(out, "<path class=\"line\" {style} d=\"{path}\"><title>{name}</title></path>");
            let (from, to, text) = (legend, legend + 26.0, legend + 32.0);
            let _ = writeln!(
                out,
                "<path class=\"line\" {style} d=\"M{from} 30H{to}\"/><text x=\"{text}\" y=\"34\">{name}</text>"
            );
            legend += 48.0 + 7.5 * line.name.chars().count() as f64;
        }
        out.push_str("</svg>\n");
        out
    }

    /// For who hears it.
    fn summary(&self, lines: &[Line]) -> String {
        let ends = lines.iter().filter_map(|line| {
            let (first, last) = (line.points.first()?, line.points.last()?);
            Some(format!("{} from {} to {}", line.name, shown(first.1), shown(last.1)))
        });
        format!("{}: {}", self.title, ends.collect::<Vec<_>>().join(", "))
    }
}

const STYLE: &str = "text{font:12px system-ui,sans-serif;fill:#1b1f24}.soft{fill:#59636e}.paper{fill:#fff}\
.grid{stroke:#d1d9e0;stroke-width:1}.line{fill:none;stroke-width:2;stroke-linejoin:round}\
@media (prefers-color-scheme:dark){text{fill:#e6edf3}.soft{fill:#9198a1}.paper{fill:#0d1117}.grid{stroke:#3d444d}}";

/// What an axis goes from and to.
struct Axis {
    low: f64,
    high: f64,
    step: f64,
}

impl Axis {
    fn over(lines: &[Line], value: impl Fn(&(f64, f64)) -> f64, margin: f64) -> Self {
        let values = || lines.iter().flat_map(|line| line.points.iter().map(&value));
        let (low, high) =
            values().fold((f64::INFINITY, f64::NEG_INFINITY), |(low, high), v| (low.min(v), high.max(v)));
        let (low, high) = if low <= high { (low, high) } else { (0.0, 1.0) };
        let span = if high > low { high - low } else { low.abs().max(1.0) };
        let (low, high) = (low - margin * span, low.max(high) + margin * span);
        let high = if high > low { high } else { low + span };
        Axis { low, high, step: round_step((high - low) / TICKS) }
    }

    fn share(&self, value: f64) -> f64 {
        (value - self.low) / (self.high - self.low)
    }

    fn ticks(&self) -> impl Iterator<Item = f64> + '_ {
        let first = (self.low / self.step).ceil();
        let count = ((self.high / self.step).floor() - first).max(0.0) as usize;
        (0..=count.min(50)).map(move |number| (first + number as f64) * self.step)
    }
}

/// 1, 2 or 5 times a power of ten, at least `least`.
fn round_step(least: f64) -> f64 {
    let power = 10f64.powf(least.log10().floor());
    [1.0, 2.0, 5.0].into_iter().map(|times| times * power).find(|step| *step >= least).unwrap_or(10.0 * power)
}

/// As short as it says what it is.
fn shown(value: f64) -> String {
    let text = match value.abs() {
        0.0 => return "0".to_owned(),
        size if size < 1e-3 => return format!("{value:.1e}"),
        size if size < 1.0 => format!("{value:.4}"),
        size if size < 100.0 => format!("{value:.3}"),
        _ => format!("{value:.0}"),
    };
    if text.contains('.') { text.trim_end_matches('0').trim_end_matches('.').to_owned() } else { text }
}

/// Points that are numbers; where there are too many, means of runs of them.
fn thinned(line: &Line) -> Line {
    let points: Vec<(f64, f64)> =
        line.points.iter().copied().filter(|(x, y)| x.is_finite() && y.is_finite()).collect();
    let run = points.len().div_ceil(MAX_POINTS).max(1);
    let mean = |run: &[(f64, f64)]| {
        let count = run.len() as f64;
        let (x, y) = run.iter().fold((0.0, 0.0), |(x, y), point| (x + point.0, y + point.1));
        (x / count, y / count)
    };
    let points = if run == 1 { points } else { points.chunks(run).map(mean).collect() };
    Line { points, ..line.clone() }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plot(points: Vec<(f64, f64)>) -> Plot {
        let line = Line { name: "a <run>".to_owned(), points, colour: 1 };
        Plot {
            title: "Train loss".to_owned(),
            x: "steps".to_owned(),
            y: "loss".to_owned(),
            lines: vec![line],
        }
    }

    #[test]
    fn a_line_goes_from_corner_to_corner() {
        let svg = plot(vec![(0.0, 2.0), (50.0, 1.5), (100.0, 1.0)]).svg();
        assert!(svg.contains("aria-label=\"Train loss: a &lt;run&gt; from 2 to 1\""), "{svg}");
        let line = svg.lines().find(|line| line.contains("<title>")).unwrap();
        assert!(line.contains("d=\"M64.0 49.3L384.0 166.0L704.0 282.7\""), "{line}");
        for tick in [">20<", ">100<", ">1.2<", ">1.8<"] {
            assert!(svg.contains(tick), "{tick}: {svg}");
        }
    }

    #[test]
    fn long_lines_are_thinned_and_what_is_no_number_is_left_out() {
        let mut points: Vec<(f64, f64)> = (0..10_000).map(|at| (f64::from(at), 1.0)).collect();
        points.push((1.0, f64::NAN));
        let line = thinned(&plot(points).lines[0]);
        assert!(line.points.len() <= MAX_POINTS && line.points.len() > MAX_POINTS / 2);
        assert!(line.points.iter().all(|(_, y)| *y == 1.0));
    }

    #[test]
    fn any_numbers_make_a_plot() {
        for points in [
            vec![],
            vec![(0.0, 0.0)],
            vec![(5.0, 3.0), (5.0, 3.0)],
            vec![(0.0, -1e300), (1.0, 1e300)],
            vec![(f64::NAN, f64::INFINITY)],
        ] {
            let svg = plot(points).svg();
            assert!(svg.ends_with("</svg>\n") && !svg.contains("NaN"), "{svg}");
        }
        assert_eq!([3.0, 0.02, 700.0].map(round_step), [5.0, 0.02, 1000.0]);
    }
}
