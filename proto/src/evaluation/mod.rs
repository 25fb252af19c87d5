//! `evaluation.json`: what a model did with a set of tasks, task by task, and what follows from it.

/// pass@k, intervals, and whether two models differ.
pub mod statistics;

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use statistics::{Estimate, Score, mean, pass_at_k};

/// Version of [`Evaluation`] that this build writes.
pub const EVALUATION_VERSION: u32 = 1;
/// File name inside an evaluation's directory.
pub const EVALUATION_FILE: &str = "evaluation.json";
/// Directory of a job's evaluations inside its output; one directory for each.
pub const EVALUATIONS_DIR: &str = "evaluations";
/// Directory, inside that, of evaluations of what a job made.
pub const TUNED: &str = "tuned";
/// Directory of evaluations of the model before training.
pub const BASE: &str = "base";
/// Holes with what a model made of them, one [`Filled`] in a line: in an evaluation's directory, or in those of ranks there.
pub const HOLES_FILE: &str = "holes.jsonl";
/// What a sweep found, a list of [`SweepRow`].
pub const SWEEP_FILE: &str = "sweep.json";
/// Name of the group that holds all items.
pub const ALL: &str = "all";

/// What is evaluated.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    /// Functions from their descriptions, judged by tests (Chen et al. 2021).
    Humaneval,
    /// Holes in solutions, judged by tests and by what stood there (Bavarian et al. 2022).
    Infilling,
    /// Held-out files of a dataset: loss, and holes judged by what stood there.
    Repository,
}

/// One model on one set of tasks.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Evaluation {
    /// [`EVALUATION_VERSION`].
    pub version: u32,
    /// Program and version that wrote it.
    pub written_by: String,
    /// What was evaluated.
    pub kind: Kind,
    /// The model.
    pub subject: Subject,
    /// Every setting that decides the numbers.
    pub protocol: BTreeMap<String, Value>,
    /// SHA-256 of the tasks: evaluations of other tasks are not compared.
    pub tasks_digest: String,
    /// Task by task.
    pub items: Vec<Item>,
    /// Losses of whole files.
    #[serde(default)]
    pub files: Vec<FileLoss>,
    /// How often something happened that a reader should know of, such as a prompt that was too long.
    #[serde(default)]
    pub notes: BTreeMap<String, u64>,
}

/// A model as it was asked.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Subject {
    /// Directory of the model, or of samples that somebody else made.
    pub model: String,
    /// SHA-256 of its `config.json`, and of the names, sizes and times of its weights.
    #[serde(default)]
    pub digest: String,
    /// Directory of the adapter.
    #[serde(default)]
    pub adapter: Option<String>,
    /// What the adapter's difference is multiplied by.
    #[serde(default)]
    pub adapter_weight: Option<f64>,
    /// How the linears are held.
    #[serde(default)]
    pub quantization: Option<String>,
    /// Dtype of activations.
    #[serde(default)]
    pub precision: String,
}

/// One task.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Item {
    /// Its name.
    pub id: String,
    /// What kind of task it is, such as `single_line`; empty where there is one kind.
    #[serde(default)]
    pub kind: String,
    /// Language of its file.
    #[serde(default)]
    pub language: String,
    /// Repository of its file.
    #[serde(default)]
    pub repository: String,
    /// Completions that were judged.
    pub samples: u64,
    /// Of those, so many passed the tests; absent where there are none.
    #[serde(default)]
    pub passed: Option<u64>,
    /// Of those, so many are what stood there, white space at both ends aside.
    #[serde(default)]
    pub exact: Option<u64>,
    /// Mean similarity to what stood there, 0 to 1: 1 - edits / length of the longer.
    #[serde(default)]
    pub similarity: Option<f64>,
}

/// The loss of one file.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FileLoss {
    /// Repository and path.
    pub id: String,
    /// Its language.
    pub language: String,
    /// Its repository.
    pub repository: String,
    /// Sum over its tokens, in nats.
    pub loss_sum: f64,
    /// Tokens that count.
    pub tokens: u64,
}

/// A hole in a file, and what a model made of it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Filled {
    /// Kind, repository, path and place.
    pub id: String,
    /// What kind of hole it is, such as `single_line`.
    pub kind: String,
    /// Its repository.
    pub repository: String,
    /// Its path there.
    pub path: String,
    /// What stands before it, as far as a model may look.
    pub before: String,
    /// What stood there.
    pub truth: String,
    /// What the model made.
    pub completion: String,
    /// What stands after it.
    pub after: String,
}

/// One weight of an adapter: the values of measures by their names.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct SweepRow {
    /// What the adapter's difference was multiplied by.
    pub weight: f64,
    /// On the code that it was trained for.
    pub dataset: BTreeMap<String, f64>,
    /// On other code.
    #[serde(default)]
    pub general: BTreeMap<String, f64>,
}

/// What is measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Measure {
    /// Probability that one of k completions passes.
    Pass(u64),
    /// Share of completions that are what stood there.
    Exact,
    /// Mean similarity to what stood there.
    Similarity,
    /// Mean loss of a token.
    Loss,
}

impl Measure {
    /// As people write it.
    pub fn name(self) -> String {
        match self {
            Measure::Pass(k) => format!("pass@{k}"),
            Measure::Exact => "exact match".to_owned(),
            Measure::Similarity => "edit similarity".to_owned(),
            Measure::Loss => "loss".to_owned(),
        }
    }

    /// The number of some tasks, and its interval. Where all tasks went the same way no draw of them differs: the interval
    /// is then what so many tasks cannot rule out, 3 / tasks (Hanley and Lippman-Hand 1983).
    pub fn estimate(self, scores: &[Score]) -> Estimate {
        let found = mean(scores);
        let all_are = |value: f64| !scores.is_empty() && scores.iter().all(|score| score.sum == value);
        let unseen = (3.0 / scores.len().max(1) as f64).min(1.0);
        match self {
            Measure::Pass(_) | Measure::Exact if all_are(0.0) => Estimate { high: unseen, ..found },
            Measure::Pass(_) | Measure::Exact if all_are(1.0) => Estimate { low: 1.0 - unseen, ..found },
            _ => found,
        }
    }

    /// Whether more is better.
    pub fn is_better_high(self) -> bool {
        self != Measure::Loss
    }
}

/// How items are put together.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Grouping {
    /// All in one group.
    All,
    /// By kind of task.
    Kind,
    /// By language.
    Language,
    /// By repository.
    Repository,
}

impl Grouping {
    /// Every grouping, the coarsest first.
    pub const EVERY: [Grouping; 4] =
        [Grouping::All, Grouping::Kind, Grouping::Language, Grouping::Repository];

    /// What a group of it is called.
    pub fn name(self) -> &'static str {
        match self {
            Grouping::All => ALL,
            Grouping::Kind => "kind",
            Grouping::Language => "language",
            Grouping::Repository => "repository",
        }
    }
}

/// One number of a table.
#[derive(Debug, Clone, PartialEq)]
pub struct Cell {
    /// What was measured.
    pub measure: Measure,
    /// How items were put together.
    pub grouping: Grouping,
    /// Which group.
    pub group: String,
    /// The number.
    pub estimate: Estimate,
}

impl Evaluation {
    /// The measures that it has, in the order of a table. pass@k needs k completions of every task.
    pub fn measures(&self) -> Vec<Measure> {
        let fewest = self.items.iter().filter(|item| item.passed.is_some()).map(|item| item.samples).min();
        let passes = [1, 10, 100].into_iter().filter(|k| fewest.is_some_and(|fewest| *k <= fewest));
        let mut measures: Vec<Measure> = passes.map(Measure::Pass).collect();
        if self.items.iter().any(|item| item.exact.is_some()) {
            measures.push(Measure::Exact);
        }
        if self.items.iter().any(|item| item.similarity.is_some()) {
            measures.push(Measure::Similarity);
        }
        if !self.files.is_empty() {
            measures.push(Measure::Loss);
        }
        measures
    }

    /// Scores by task (by file, for losses) of the groups of a grouping; only groups with a name.
    pub fn scores(&self, measure: Measure, grouping: Grouping) -> BTreeMap<String, BTreeMap<String, Score>> {
        let mut groups: BTreeMap<String, BTreeMap<String, Score>> = BTreeMap::new();
        let mut add = |id: &str, kind: &str, language: &str, repository: &str, score: Score| {
            let group = match grouping {
                Grouping::All => ALL,
                Grouping::Kind => kind,
                Grouping::Language => language,
                Grouping::Repository => repository,
            };
            if !group.is_empty() {
                groups.entry(group.to_owned()).or_default().insert(id.to_owned(), score);
            }
        };
        if measure == Measure::Loss {
            for file in &self.files {
                let score = Score { sum: file.loss_sum, weight: file.tokens as f64 };
                add(&file.id, "", &file.language, &file.repository, score);
            }
            return groups;
        }
        for item in &self.items {
            let share = |count: Option<u64>| {
                count.filter(|_| item.samples > 0).map(|count| count as f64 / item.samples as f64)
            };
            let value = match measure {
                Measure::Pass(k) => item.passed.map(|passed| pass_at_k(item.samples, passed, k)),
                Measure::Exact => share(item.exact),
                Measure::Similarity => item.similarity,
                Measure::Loss => None,
            };
            if let Some(sum) = value {
                add(&item.id, &item.kind, &item.language, &item.repository, Score { sum, weight: 1.0 });
            }
        }
        groups
    }

    /// Scores of the tasks that another evaluation has as well, this one's first.
    pub fn paired(&self, other: &Evaluation, measure: Measure) -> Vec<(Score, Score)> {
        let all = |of: &Evaluation| of.scores(measure, Grouping::All).remove(ALL).unwrap_or_default();
        let own = all(self);
        all(other).into_iter().filter_map(|(id, score)| Some((*own.get(&id)?, score))).collect()
    }

    /// Every number with its interval. Groups of one kind are left out where there is only one.
    pub fn cells(&self) -> Vec<Cell> {
        let mut cells = Vec::new();
        for grouping in Grouping::EVERY {
            for measure in self.measures() {
                let groups = self.scores(measure, grouping);
                if grouping != Grouping::All && groups.len() < 2 {
                    continue;
                }
                for (group, scores) in groups {
                    let scores: Vec<Score> = scores.into_values().collect();
                    cells.push(Cell { measure, grouping, group, estimate: measure.estimate(&scores) });
                }
            }
        }
        cells
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tasks_that_all_failed_rule_out_only_so_much() {
        let scores = vec![Score { sum: 0.0, weight: 1.0 }; 60];
        let Estimate { value, low, high, .. } = Measure::Exact.estimate(&scores);
        assert_eq!((value, low, high), (0.0, 0.0, 0.05));
        assert_eq!(Measure::Similarity.estimate(&scores).high, 0.0);
        let scores = vec![Score { sum: 1.0, weight: 1.0 }; 2];
        assert_eq!(Measure::Pass(1).estimate(&scores).low, 0.0);
    }

    fn item(id: &str, kind: &str, samples: u64, passed: u64) -> Item {
        Item {
            id: id.to_owned(),
            kind: kind.to_owned(),
            language: String::new(),
            repository: String::new(),
            samples,
            passed: Some(passed),
            exact: None,
            similarity: None,
        }
    }

    #[test]
    fn a_measure_is_there_when_every_task_has_completions_for_it() {
        let evaluation = Evaluation {
            version: EVALUATION_VERSION,
            written_by: String::new(),
            kind: Kind::Humaneval,
            subject: Subject {
                model: "m".to_owned(),
                digest: String::new(),
                adapter: None,
                adapter_weight: None,
                quantization: None,
                precision: String::new(),
            },
            protocol: BTreeMap::new(),
            tasks_digest: String::new(),
            items: vec![item("a", "x", 20, 10), item("b", "y", 9, 0)],
            files: vec![FileLoss {
                id: "f".to_owned(),
                language: "Rust".to_owned(),
                repository: "r".to_owned(),
                loss_sum: 30.0,
                tokens: 10,
            }],
            notes: BTreeMap::new(),
        };
        assert_eq!(evaluation.measures(), [Measure::Pass(1), Measure::Loss]);
        let cells = evaluation.cells();
        let shown: Vec<_> =
            cells.iter().map(|c| (c.measure.name(), c.group.as_str(), c.estimate.value)).collect();
        let expected = [
            ("pass@1".to_owned(), "all", 0.25),
            ("loss".to_owned(), "all", 3.0),
            ("pass@1".to_owned(), "x", 0.5),
            ("pass@1".to_owned(), "y", 0.0),
        ];
        assert_eq!(shown, expected);
        let text = serde_json::to_string(&evaluation).unwrap();
        assert_eq!(serde_json::from_str::<Evaluation>(&text).unwrap(), evaluation);
    }
}
