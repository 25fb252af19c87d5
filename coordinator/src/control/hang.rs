//! A collective that does not end: which rank the others wait for. All ranks start the same
//! operations in the same order, so it is the one that does not answer, or has started fewest; among
//! those that have started as many, the one that does not take part in what the others wait for.

use std::collections::BTreeMap;
use std::path::Path;

use serde::{Deserialize, Serialize};
use tunefleet_proto::rpc::{Collective, Collectives};

/// What the ranks answered so far.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Hang {
    answers: BTreeMap<u32, Collectives>,
    /// A rank that shows no progress, and since when, in words.
    overdue: Option<(u32, String)>,
}

/// Who is to blame.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Verdict {
    /// The ranks that the others wait for, ascending; empty when all are at the same operation.
    pub behind: Vec<u32>,
    /// In words, for people.
    pub words: String,
}

impl Hang {
    /// Takes a rank's answer; a later one counts in place of an earlier.
    pub fn answer(&mut self, rank: u32, answer: Collectives) {
        self.answers.insert(rank, answer);
    }

    /// Takes note of a rank that shows no progress.
    pub fn suspect(&mut self, rank: u32, words: String) {
        self.overdue = Some((rank, words));
    }

    /// Whether all of `ranks` have answered.
    pub fn is_answered_by<'r>(&self, mut ranks: impl Iterator<Item = &'r u32>) -> bool {
        ranks.all(|rank| self.answers.contains_key(rank))
    }

    /// What follows from the answers of the ranks in `live`, which were asked; with the section that
    /// each was last heard of in.
    pub fn verdict(&self, live: &BTreeMap<u32, String>) -> Verdict {
        let silent: Vec<u32> = live.keys().copied().filter(|rank| !self.answers.contains_key(rank)).collect();
        let behind =
            [silent, self.lowest(live), self.absent(live)].into_iter().find(|ranks| !ranks.is_empty());
        let behind = behind.unwrap_or_default();
        let stalls = self.answers_of(live).any(|(_, answer)| answer.oldest_unfinished.is_some());
        if let Some((rank, words)) = &self.overdue
            && (behind.is_empty() || !stalls)
        {
            // Nobody waits for anybody: what is slow is what the rank itself does.
            let hint = "look at its log, and raise restart.hang_after_seconds if it may take so long";
            return Verdict { behind: vec![*rank], words: format!("{words}; {hint}") };
        }
        let mut words = if behind.is_empty() {
            "all ranks are at the same collective".to_owned()
        } else {
            let whereabouts = |rank: &u32| self.whereabouts(*rank, live);
            match behind.as_slice() {
                [rank] => format!("rank {rank} is behind: it {}", whereabouts(rank)),
                ranks => {
                    let each = ranks.iter().map(|rank| format!("rank {rank} {}", whereabouts(rank)));
                    format!("{} are behind: {}", listed(ranks), each.collect::<Vec<_>>().join(", "))
                }
            }
        };
        let waiting = self.answers_of(live).filter(|(rank, _)| !behind.contains(rank));
        let oldest = waiting.filter_map(|(_, answer)| answer.oldest_unfinished.as_ref());
        if let Some(oldest) = oldest.min_by_key(|collective| collective.sequence) {
            let who = if behind.is_empty() { ", and wait" } else { "; the others wait" };
            words += &format!("{who} in {}, for {:.1} s", named(oldest), oldest.seconds);
        }
        let dumps = self.answers.values().find(|answer| !answer.dump_path.is_empty());
        if let Some(dir) = dumps.and_then(|answer| Path::new(&answer.dump_path).parent()) {
            words += &format!("; dumps in {}", dir.display());
        }
        words += if behind.is_empty() {
            "; look at the network between their workers, then launch with --resume"
        } else {
            "; raise train.collective_timeout_seconds if it may take so long"
        };
        Verdict { behind, words }
    }

    fn answers_of<'a>(
        &'a self,
        live: &'a BTreeMap<u32, String>,
    ) -> impl Iterator<Item = (&'a u32, &'a Collectives)> {
        self.answers.iter().filter(|(rank, _)| live.contains_key(rank))
    }

    /// The ranks that have started fewest; none when all have started as many.
    fn lowest(&self, live: &BTreeMap<u32, String>) -> Vec<u32> {
        let started = |answer: &Collectives| answer.last_started.as_ref().map_or(0, |last| last.sequence);
        let fewest = self.answers_of(live).map(|(_, answer)| started(answer)).min().unwrap_or(0);
        let (lowest, others): (Vec<_>, Vec<_>) =
            self.answers_of(live).partition(|(_, answer)| started(answer) == fewest);
        if others.is_empty() { Vec::new() } else { lowest.into_iter().map(|(rank, _)| *rank).collect() }
    }

    /// The ranks that are in no collective, and have not finished the one that another is in.
    fn absent(&self, live: &BTreeMap<u32, String>) -> Vec<u32> {
        let sequence = |collective: &Option<Collective>| collective.as_ref().map(|one| one.sequence);
        let waited_for =
            self.answers_of(live).filter_map(|(_, answer)| sequence(&answer.oldest_unfinished)).min();
        let Some(waited_for) = waited_for else { return Vec::new() };
        let is_absent = |answer: &Collectives| {
            answer.oldest_unfinished.is_none()
                && sequence(&answer.last_finished).is_none_or(|finished| finished < waited_for)
        };
        self.answers_of(live).filter(|(_, answer)| is_absent(answer)).map(|(rank, _)| *rank).collect()
    }

    fn whereabouts(&self, rank: u32, live: &BTreeMap<u32, String>) -> String {
        let Some(answer) = self.answers.get(&rank) else {
            let section = in_section(live.get(&rank).map_or("", String::as_str));
            return format!("did not answer when it was asked where it is; it was last heard of{section}");
        };
        let section = in_section(&answer.section);
        match &answer.last_started {
            Some(last) => format!("is at {}{section}", named(last)),
            None => format!("has started no collective{section}"),
        }
    }
}

fn named(collective: &Collective) -> String {
    format!("{} (#{})", collective.about, collective.sequence)
}

fn in_section(section: &str) -> String {
    if section.is_empty() { String::new() } else { format!(" in section {section:?}") }
}

/// `rank 1`, `ranks 0 and 2`, `ranks 0, 1 and 3`.
pub fn listed(ranks: &[u32]) -> String {
    let texts: Vec<String> = ranks.iter().map(u32::to_string).collect();
    match texts.split_last() {
        None => "no rank".to_owned(),
        Some((only, [])) => format!("rank {only}"),
        Some((last, others)) => format!("ranks {} and {last}", others.join(", ")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn collective(sequence: u64, about: &str) -> Option<Collective> {
        Some(Collective { sequence, about: about.to_owned(), seconds: 2.04, ..Collective::default() })
    }

    /// An answer of a rank that has started `sequence` operations.
    fn at(sequence: u64, about: &str, oldest_unfinished: Option<Collective>) -> Collectives {
        Collectives {
            last_started: collective(sequence, about),
            oldest_unfinished,
            section: "step".to_owned(),
            dump_path: "/o/hangs/attempt-1/rank-0.json".to_owned(),
            ..Collectives::default()
        }
    }

    fn verdict(answers: &[(u32, Collectives)], world: u32) -> Verdict {
        let mut hang = Hang::default();
        for (rank, answer) in answers {
            hang.answer(*rank, answer.clone());
        }
        hang.verdict(&(0..world).map(|rank| (rank, "save".to_owned())).collect())
    }

    #[test]
    fn the_rank_that_has_started_fewest_is_behind_and_the_others_wait_for_it() {
        let waits = || at(1206, "gather of block.5", collective(1204, "reduce of block.7"));
        let found = verdict(&[(0, waits()), (1, waits()), (2, at(1203, "gather of block.6", None))], 3);
        assert_eq!(found.behind, [2]);
        assert_eq!(
            found.words,
            "rank 2 is behind: it is at gather of block.6 (#1203) in section \"step\"; the others wait in \
             reduce of block.7 (#1204), for 2.0 s; dumps in /o/hangs/attempt-1; raise \
             train.collective_timeout_seconds if it may take so long"
        );
    }

    #[test]
    fn a_rank_that_does_not_answer_is_to_blame_whoever_else_is_behind() {
        let waits = |sequence| at(sequence, "gather of block.1", collective(8, "gather of block.0"));
        let found = verdict(&[(0, waits(9)), (1, waits(8))], 3);
        assert_eq!(found.behind, [2]);
        assert!(found.words.starts_with("rank 2 is behind: it did not answer"), "{}", found.words);
        assert!(
            found.words.contains("last heard of in section \"save\"; the others wait in"),
            "{}",
            found.words
        );
    }

    #[test]
    fn several_ranks_that_are_behind_are_all_named() {
        let waits = at(5, "barrier", collective(5, "barrier"));
        let answers = [(0, at(4, "target count", None)), (1, waits), (2, Collectives::default())];
        assert_eq!(verdict(&answers, 3).behind, [2]);
        let found = verdict(&answers[..1], 3);
        assert_eq!(found.behind, [1, 2]);
        assert!(found.words.starts_with("ranks 1 and 2 are behind: rank 1 did not"), "{}", found.words);
    }

    #[test]
    fn among_ranks_that_have_started_as_many_the_one_that_takes_no_part_is_behind() {
        let waits = || at(7, "reduce of block.0", collective(6, "reduce of block.1"));
        let idle = |finished| Collectives {
            last_finished: collective(finished, "target count"),
            ..at(7, "reduce of block.0", None)
        };
        assert_eq!(verdict(&[(0, waits()), (1, idle(5)), (2, waits())], 3).behind, [1]);
        // It has done its part: somebody else keeps the others waiting.
        assert_eq!(verdict(&[(0, waits()), (1, idle(6)), (2, waits())], 3).behind, [0; 0]);
    }

    #[test]
    fn no_rank_is_blamed_when_all_are_at_the_same_operation() {
        let waits = || at(7, "reduce of block.1", collective(7, "reduce of block.1"));
        let found = verdict(&[(0, waits()), (1, waits())], 2);
        assert_eq!(found.behind, [0; 0]);
        assert!(
            found
                .words
                .starts_with("all ranks are at the same collective, and wait in reduce of block.1 (#7)"),
            "{}",
            found.words
        );
    }

    #[test]
    fn ranks_are_listed_as_people_do() {
        assert_eq!([listed(&[1]), listed(&[0, 2])], ["rank 1", "ranks 0 and 2"]);
        assert_eq!(listed(&[0, 1, 3]), "ranks 0, 1 and 3");
    }
}
