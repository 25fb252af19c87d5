//! What is evaluated of what a job has made.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::base_plan::Quantization;

/// Evaluations of a job's model, by its ranks together.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct EvaluateSpec {
    /// Whether the model is evaluated as it was before training as well.
    pub base: bool,
    /// Tasks of HumanEval.
    pub humaneval: Option<PathBuf>,
    /// Tasks of an infilling set.
    pub infilling: Option<PathBuf>,
    /// Completions of each task of HumanEval.
    pub samples_per_task: u32,
    /// Held-out files of the job's dataset whose loss is computed, at most.
    pub files: u32,
    /// Holes of each kind in them, at most.
    pub holes: u32,
    /// Tokens of a window of a file, and of a prompt.
    pub window_tokens: u32,
    /// Other datasets, whose held-out files tell what is forgotten.
    pub general: Vec<PathBuf>,
    /// An adapter beside the model, of a job that trains nothing.
    pub adapter: Option<PathBuf>,
    /// How linears are held.
    pub quantization: Quantization,
    /// Interpreter that programs run with.
    pub python: Option<PathBuf>,
    /// Whether programs run where they cannot be kept apart.
    pub allow_unisolated: bool,
}

/// One evaluation of a job, by the name of its directory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Exam {
    /// HumanEval, with this file of tasks.
    Humaneval(PathBuf),
    /// An infilling set.
    Infilling(PathBuf),
    /// Held-out files of a dataset; whether it is the job's own.
    Files(PathBuf, bool),
}

impl EvaluateSpec {
    /// The evaluations with the names of their directories; `dataset` is the job's own.
    pub fn exams(&self, dataset: PathBuf) -> Vec<(String, Exam)> {
        let mut exams = Vec::new();
        if self.files > 0 || self.holes > 0 {
            exams.push(("dataset".to_owned(), Exam::Files(dataset, true)));
            for (number, dir) in self.general.iter().enumerate() {
                let name =
                    dir.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
                exams.push((format!("general-{}-{name}", number + 1), Exam::Files(dir.clone(), false)));
            }
        }
        exams.extend(self.humaneval.clone().map(|tasks| ("humaneval".to_owned(), Exam::Humaneval(tasks))));
        exams.extend(self.infilling.clone().map(|tasks| ("infilling".to_owned(), Exam::Infilling(tasks))));
        exams
    }
}
