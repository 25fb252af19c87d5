//! Where the time of a job's training went: into steps that count, or lost, and to what.
//!
//! The clock starts when the job first trains, or first waits for slots to train on, and stands still while a person
//! has suspended it. What lies between two reports of a step and is none of its steps is lost to whatever was
//! going on: so that the parts always add up to the whole.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::settings::Now;

/// What time was lost to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Lost {
    /// From the first ranks' start to the first step.
    Start,
    /// Between an attempt's last step and the next one's first.
    Restart,
    /// Steps that were made again, because no checkpoint had them.
    Rework,
    /// Waiting for ranks that no longer came.
    Hang,
    /// Waiting for slots.
    Queue,
    /// Between steps: evaluation, and what training stood still for checkpoints.
    Pause,
}

impl Lost {
    /// All of them.
    pub const ALL: [Lost; 6] =
        [Lost::Start, Lost::Restart, Lost::Rework, Lost::Hang, Lost::Queue, Lost::Pause];

    /// Name in metrics.
    pub fn name(self) -> &'static str {
        match self {
            Lost::Start => "start",
            Lost::Restart => "restart",
            Lost::Rework => "rework",
            Lost::Hang => "hang",
            Lost::Queue => "queue",
            Lost::Pause => "pause",
        }
    }
}

/// Steps that a report tells of.
#[derive(Debug, Clone, Copy)]
pub struct Stepped {
    /// Made for the first time.
    pub new: u64,
    /// Made again.
    pub again: u64,
    /// Mean duration of each.
    pub step_seconds: f64,
    /// What lies before the first of them, and since the last report.
    pub before: Lost,
}

/// The time of one job.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Account {
    /// All until then is accounted for; absent while the clock stands still.
    until_unix_ms: Option<u64>,
    productive_seconds: f64,
    lost_seconds: BTreeMap<Lost, f64>,
}

impl Account {
    /// The clock runs.
    pub fn begin(&mut self, now: Now) {
        self.until_unix_ms.get_or_insert(now.unix_ms);
    }

    /// What has passed was lost to `to`.
    pub fn lost(&mut self, to: Lost, now: Now) {
        let seconds = self.take(now);
        self.lose(to, seconds);
    }

    /// As [`lost`](Self::lost), and the clock stands still.
    pub fn stop(&mut self, to: Lost, now: Now) {
        self.lost(to, now);
        self.until_unix_ms = None;
    }

    /// Steps were made.
    pub fn stepped(&mut self, stepped: Stepped, now: Now) {
        let Stepped { new, again, step_seconds, before } = stepped;
        let passed = self.take(now);
        let (new, again) = (new as f64 * step_seconds, again as f64 * step_seconds);
        // Clocks of two machines, and the way of a report: steps never take more than what has passed.
        let shrink = if new + again > passed { passed / (new + again) } else { 1.0 };
        self.productive_seconds += new * shrink;
        self.lose(Lost::Rework, again * shrink);
        self.lose(before, (passed - (new + again) * shrink).max(0.0));
    }

    fn take(&mut self, now: Now) -> f64 {
        let Some(until) = &mut self.until_unix_ms else { return 0.0 };
        let passed = now.unix_ms.saturating_sub(*until);
        *until = now.unix_ms.max(*until);
        passed as f64 / 1000.0
    }

    fn lose(&mut self, to: Lost, seconds: f64) {
        if seconds > 0.0 {
            *self.lost_seconds.entry(to).or_insert(0.0) += seconds;
        }
    }

    /// In steps that count.
    pub fn productive_seconds(&self) -> f64 {
        self.productive_seconds
    }

    /// Lost to `to`.
    pub fn lost_seconds(&self, to: Lost) -> f64 {
        self.lost_seconds.get(&to).copied().unwrap_or(0.0)
    }

    /// The productive share of all; 0 before anything has passed.
    pub fn goodput(&self) -> f64 {
        let all = self.productive_seconds + self.lost_seconds.values().sum::<f64>();
        if all > 0.0 { self.productive_seconds / all } else { 0.0 }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn at(seconds: u64) -> Now {
        Now { unix_ms: 1_000_000 + 1000 * seconds, uptime: Duration::from_secs(seconds) }
    }

    fn steps(new: u64, again: u64, before: Lost) -> Stepped {
        Stepped { new, again, step_seconds: 2.0, before }
    }

    #[test]
    fn the_parts_of_a_job_with_a_failure_add_up_to_its_time() {
        let mut account = Account::default();
        account.lost(Lost::Queue, at(0));
        assert_eq!(account, Account::default(), "before the clock runs nothing is lost");
        account.begin(at(10));
        account.lost(Lost::Queue, at(20));
        account.stepped(steps(5, 0, Lost::Start), at(35));
        account.stepped(steps(5, 0, Lost::Pause), at(47));
        account.lost(Lost::Hang, at(60));
        account.stepped(steps(3, 2, Lost::Restart), at(90));
        account.stop(Lost::Pause, at(91));
        let lost: Vec<f64> = Lost::ALL.into_iter().map(|to| account.lost_seconds(to)).collect();
        assert_eq!(account.productive_seconds(), 26.0);
        assert_eq!(lost, [5.0, 20.0, 4.0, 13.0, 10.0, 3.0]);
        assert_eq!(account.goodput(), 26.0 / 81.0);

        account.begin(at(1000));
        account.stop(Lost::Restart, at(1001));
        assert_eq!(account.lost_seconds(Lost::Restart), 21.0, "suspended time is nobody's");
        let kept: Account = serde_json::from_str(&serde_json::to_string(&account).unwrap()).unwrap();
        assert_eq!(kept, account);
    }

    #[test]
    fn steps_never_take_more_than_has_passed_and_a_clock_set_back_takes_nothing_away() {
        let mut account = Account::default();
        account.begin(at(0));
        account.stepped(steps(10, 10, Lost::Pause), at(20));
        assert_eq!((account.productive_seconds(), account.lost_seconds(Lost::Rework)), (10.0, 10.0));
        assert_eq!(account.lost_seconds(Lost::Pause), 0.0);
        account.lost(Lost::Hang, at(5));
        assert_eq!(account.lost_seconds(Lost::Hang), 0.0);
    }
}
