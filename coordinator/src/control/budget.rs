//! How long a rank may show no progress: learnt from how long the ranks of the job took before, since nobody
//! can know it beforehand.

use std::collections::BTreeMap;
use std::fmt;

use serde::{Deserialize, Serialize};
use tunefleet_proto::job::RestartSpec;
use tunefleet_proto::rpc::Beat;

/// So many times the longest that it ever took is too long.
const TIMES_THE_LONGEST: f64 = 10.0;

/// What took longer teaches nothing: a machine slept, or a number is wrong.
const MAX_LEARNT_SECONDS: f64 = 6.0 * 3600.0;
/// The section in which ranks make steps.
const STEP_SECTION: &str = "step";

/// What was learnt.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Budget {
    /// The longest time without progress in each section that ended with progress, in seconds.
    longest: BTreeMap<String, f64>,
    /// The newest beat of each rank.
    #[serde(skip)]
    newest: BTreeMap<u32, (u64, String, f64)>,
}

/// A rank that shows no progress.
#[derive(Debug, Clone, PartialEq)]
pub struct Overdue {
    /// Which.
    pub rank: u32,
    section: String,
    step: u64,
    seconds: f64,
    /// The longest that it took before; absent when it never ended.
    longest: Option<f64>,
}

impl Budget {
    /// Takes a beat of a rank.
    pub fn learn(&mut self, rank: u32, beat: &Beat) {
        if !beat.seconds.is_finite() || beat.seconds < 0.0 {
            return;
        }
        let now = (beat.step, beat.section.clone(), beat.seconds);
        let Some((step, section, seconds)) = self.newest.insert(rank, now) else { return };
        let progressed = (step, &section) != (beat.step, &beat.section) || beat.seconds < seconds;
        if progressed && seconds < MAX_LEARNT_SECONDS {
            let longest = self.longest.entry(section).or_insert(0.0);
            *longest = longest.max(seconds);
        }
    }

    /// A step of the training loop took so long.
    pub fn stepped(&mut self, seconds: f64) {
        if seconds.is_finite() && seconds > 0.0 {
            let longest = self.longest.entry(STEP_SECTION.to_owned()).or_insert(0.0);
            *longest = longest.max(seconds);
        }
    }

    /// The ranks start anew.
    pub fn forget_ranks(&mut self) {
        self.newest.clear();
    }

    /// The rank that is overdue by most, of ranks that show no progress at a step and in a section for so many
    /// seconds.
    pub fn overdue<'a>(
        &self,
        spec: &RestartSpec,
        beats: impl Iterator<Item = (u32, u64, &'a str, f64)>,
    ) -> Option<Overdue> {
        let overdue = beats.filter_map(|(rank, step, section, seconds)| {
            let longest = self.longest.get(section).copied();
            let limit = match longest {
                Some(longest) => spec.hang_after_seconds.max(TIMES_THE_LONGEST * longest),
                None => spec.first_hang_after_seconds,
            };
            let section = section.to_owned();
            (seconds > limit).then_some(Overdue { rank, section, step, seconds, longest })
        });
        overdue.max_by(|a, b| a.seconds.total_cmp(&b.seconds))
    }
}

impl fmt::Display for Overdue {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Overdue { rank, section, step, seconds, longest } = self;
        write!(
            f,
            "rank {rank} shows no progress since {seconds:.0} s, after step {step} in section {section:?}"
        )?;
        match longest {
            Some(longest) => write!(f, " (longest before: {longest:.1} s)"),
            None => write!(f, " (which it never ended before)"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn beat(step: u64, section: &str, seconds: f64) -> Beat {
        Beat { step, section: section.to_owned(), seconds }
    }

    fn spec() -> RestartSpec {
        RestartSpec { hang_after_seconds: 30.0, first_hang_after_seconds: 600.0, ..RestartSpec::default() }
    }

    #[test]
    fn what_took_long_before_may_take_long_again() {
        let mut budget = Budget::default();
        for (step, section, seconds) in
            [(1, "save", 8.0), (1, "step", 1.0), (2, "step", 0.5), (2, "save", 1.0)]
        {
            budget.learn(0, &beat(step, section, seconds));
        }
        let overdue = |section, seconds| budget.overdue(&spec(), [(0, 2, section, seconds)].into_iter());
        assert_eq!(overdue("step", 29.0), None, "the least that is waited");
        assert_eq!(
            overdue("step", 31.0).unwrap().to_string(),
            "rank 0 shows no progress since 31 s, after step 2 in section \"step\" (longest before: 1.0 s)"
        );
        assert_eq!(overdue("save", 79.0), None, "ten times as long as ever");
        assert!(overdue("save", 81.0).is_some());
        assert_eq!(overdue("evaluate", 599.0), None, "never seen before");
        assert!(overdue("evaluate", 601.0).unwrap().to_string().contains("never ended before"));
    }

    #[test]
    fn steps_that_were_too_quick_for_a_beat_are_learnt_from_their_reports() {
        let mut budget = Budget::default();
        budget.stepped(f64::NAN);
        assert_eq!(budget.overdue(&spec(), [(0, 2, "step", 40.0)].into_iter()), None);
        budget.stepped(0.02);
        assert!(budget.overdue(&spec(), [(0, 2, "step", 40.0)].into_iter()).is_some());
    }

    #[test]
    fn the_rank_that_is_stuck_longest_is_named_and_numbers_that_are_none_are_ignored() {
        let mut budget = Budget::default();
        for seconds in [f64::NAN, f64::INFINITY, -1.0, 1e300] {
            budget.learn(0, &beat(1, "step", seconds));
        }
        budget.learn(0, &beat(1, "step", 1.0));
        budget.learn(0, &beat(2, "step", 0.1));
        let beats = [(0, 2, "step", 40.0), (1, 2, "step", 60.0), (2, 2, "step", f64::NAN)];
        assert_eq!(budget.overdue(&spec(), beats.into_iter()).unwrap().rank, 1);
    }
}
