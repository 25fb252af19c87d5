//! How far an evaluation is: a bar on a terminal, a log line every few seconds elsewhere.

use std::io::IsTerminal;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};

/// Time between two lines where there is no terminal.
const LINE_EVERY: Duration = Duration::from_secs(5);

/// Counts one kind of work.
pub struct Progress {
    label: &'static str,
    total: u64,
    bar: Option<ProgressBar>,
    /// Done, and when that was last said.
    state: Mutex<(u64, Instant)>,
}

impl Progress {
    /// So much is to be done; `done` of it is done already.
    pub fn new(label: &'static str, total: usize, done: usize) -> Self {
        let (total, done) = (total as u64, done as u64);
        let bar = std::io::stderr().is_terminal().then(|| {
            let bar = ProgressBar::new(total).with_prefix(label).with_position(done);
            if let Ok(style) =
                ProgressStyle::with_template("{prefix:12} {wide_bar} {pos}/{len} {elapsed} left {eta}")
            {
                bar.set_style(style);
            }
            bar
        });
        Progress { label, total, bar, state: Mutex::new((done, Instant::now())) }
    }

    /// One more is done.
    pub fn advance(&self) {
        if let Some(bar) = &self.bar {
            return bar.inc(1);
        }
        let Ok(mut state) = self.state.lock() else { return };
        state.0 += 1;
        if state.1.elapsed() >= LINE_EVERY || state.0 == self.total {
            state.1 = Instant::now();
            tracing::info!("{}: {} of {}", self.label, state.0, self.total);
        }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}
