//! Progress of work that has many parts: bars on a terminal, a line every few seconds elsewhere.

use std::io::IsTerminal;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use indicatif::{MultiProgress, ProgressBar, ProgressStyle};

/// Time between two lines of one task where there is no terminal.
const LINE_EVERY: Duration = Duration::from_secs(5);

/// Where progress is shown.
pub trait Progress: Sync {
    /// Shows a new task; it disappears when dropped.
    fn task(&self, label: &str) -> Box<dyn Task>;
    /// Shows a line that stays.
    fn note(&self, text: &str);
}

/// One part of the work.
pub trait Task: Send + Sync {
    /// Sets how much there is to do, once that is known.
    fn length(&self, total: u64);
    /// Sets how much is done.
    fn position(&self, done: u64);
}

/// What suits standard error: [`Bars`] or [`Lines`].
pub fn on_stderr() -> Box<dyn Progress> {
    match std::io::stderr().is_terminal() {
        true => Box::new(Bars(MultiProgress::new())),
        false => Box::new(Lines),
    }
}

/// A bar per task.
struct Bars(MultiProgress);

impl Progress for Bars {
    fn task(&self, label: &str) -> Box<dyn Task> {
        let bar = self.0.add(ProgressBar::no_length().with_prefix(label.to_owned()));
        if let Ok(style) = ProgressStyle::with_template("{spinner} {prefix:40!} {human_pos:>10} {elapsed:>5}")
        {
            bar.set_style(style);
        }
        bar.enable_steady_tick(Duration::from_millis(200));
        Box::new(Bar(bar))
    }

    fn note(&self, text: &str) {
        self.0.suspend(|| eprintln!("{text}"));
    }
}

struct Bar(ProgressBar);

impl Task for Bar {
    fn length(&self, total: u64) {
        if self.0.length() == Some(total) {
            return;
        }
        self.0.set_length(total);
        let template = "{spinner} {prefix:40!} {human_pos:>10} / {human_len:<10} {wide_bar} {eta:>5}";
        if let Ok(style) = ProgressStyle::with_template(template) {
            self.0.set_style(style);
        }
    }

    fn position(&self, done: u64) {
        self.0.set_position(done);
    }
}

impl Drop for Bar {
    fn drop(&mut self) {
        self.0.finish_and_clear();
    }
}

/// Plain lines.
struct Lines;

impl Progress for Lines {
    fn task(&self, label: &str) -> Box<dyn Task> {
        Box::new(Line { label: label.to_owned(), total: AtomicU64::new(0), last: Mutex::new(Instant::now()) })
    }

    fn note(&self, text: &str) {
        eprintln!("{text}");
    }
}

struct Line {
    label: String,
    /// 0 while unknown.
    total: AtomicU64,
    last: Mutex<Instant>,
}

impl Task for Line {
    fn length(&self, total: u64) {
        self.total.store(total, Ordering::Relaxed);
    }

    fn position(&self, done: u64) {
        let mut last = self.last.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        if last.elapsed() < LINE_EVERY {
            return;
        }
        *last = Instant::now();
        match self.total.load(Ordering::Relaxed) {
            0 => eprintln!("{}: {done}", self.label),
            total => eprintln!("{}: {done} of {total}", self.label),
        }
    }
}
