//! How a model is asked, so that its numbers can be held beside others'.

use std::collections::BTreeMap;

use serde_json::{Value, json};

use crate::data::tokenizer;
use crate::evaluate::subject::Subject;
use crate::evaluate::tasks::Task;
use crate::evaluate::text;
use crate::generate::prompt::{InfillOrder, infill};
use crate::generate::sampling::Sampling;
use crate::serve::stop::Rules;

/// What ends a function in bigcode's protocol.
const STOPS: [&str; 8] = ["\nclass", "\ndef", "\n#", "\n@", "\nprint", "\nif", "\n```", "<file_sep>"];
/// Draws of one task are this far apart from those of the next.
const SEED_STRIDE: u64 = 1_000_003;

/// Prompt, tokens that there is room for, and rules of a task.
pub type Asked = (Vec<u32>, usize, Rules);

/// How completions are drawn.
#[derive(Debug, Clone, Copy)]
pub struct Drawing {
    /// Completions of each task.
    pub samples_per_task: u32,
    /// 0 is greedy.
    pub temperature: f64,
    /// The nucleus.
    pub top_p: f64,
    /// Seed of the draws.
    pub seed: u64,
}

/// How tasks are asked.
#[derive(Debug, Clone, Copy)]
pub enum Protocol {
    /// Functions from their descriptions.
    Humaneval {
        /// Whether white space at the ends of prompts goes.
        stripped: bool,
        /// Of prompt and completion together.
        max_tokens: usize,
    },
    /// Holes.
    Infilling {
        /// How prompts are laid out.
        order: InfillOrder,
        /// Of a completion.
        max_new_tokens: usize,
        /// Whether completions are cut after their first line: where all holes of a set are lines.
        by_line: bool,
    },
    /// What something else has made: with the prompt as it is.
    Given,
}

impl Drawing {
    /// For completion `sample` of task `number`.
    pub fn sampling(&self, number: u64, sample: u64) -> Sampling {
        let seed = self.seed.wrapping_add(number.wrapping_mul(SEED_STRIDE)).wrapping_add(sample);
        Sampling { temperature: self.temperature, top_p: self.top_p, seed, ..Sampling::default() }
    }
}

impl Protocol {
    /// Infilling of a set of tasks.
    pub fn infilling(tasks: &[Task], order: InfillOrder, max_new_tokens: usize) -> Self {
        let is_line = |task: &Task| {
            task.canonical_solution.as_deref().unwrap_or_default().trim_end().lines().count() <= 1
        };
        Protocol::Infilling { order, max_new_tokens, by_line: tasks.iter().all(is_line) }
    }

    /// Everything that decides the numbers.
    pub fn settings(&self, drawing: &Drawing) -> BTreeMap<String, Value> {
        let mut settings = BTreeMap::from([
            ("samples_per_task".to_owned(), json!(drawing.samples_per_task)),
            ("temperature".to_owned(), json!(drawing.temperature)),
            ("top_p".to_owned(), json!(drawing.top_p)),
            ("seed".to_owned(), json!(drawing.seed)),
        ]);
        match self {
            Protocol::Humaneval { stripped, max_tokens } => settings.extend([
                ("stripped".to_owned(), json!(stripped)),
                ("max_tokens".to_owned(), json!(max_tokens)),
                ("stops".to_owned(), json!(STOPS)),
            ]),
            Protocol::Infilling { order, max_new_tokens, by_line } => settings.extend([
                ("order".to_owned(), json!(order.name())),
                ("max_new_tokens".to_owned(), json!(max_new_tokens)),
                ("cut".to_owned(), json!(if *by_line { "first line" } else { "none" })),
            ]),
            Protocol::Given => settings.clear(),
        }
        settings
    }

    /// What the model is asked of a task.
    ///
    /// # Errors
    /// A vocabulary without the markers of infilling.
    pub fn ask(&self, subject: &Subject, task: &Task) -> Result<Asked, tokenizer::Error> {
        match self {
            Protocol::Humaneval { max_tokens, .. } => {
                let prompt = subject.tokenizer.begun(subject.tokenizer.encode_document(self.shown(task))?);
                let room = subject.max_tokens().min(*max_tokens).saturating_sub(prompt.len());
                Ok((prompt, room, Rules::strings(STOPS.map(str::to_owned).to_vec())))
            }
            Protocol::Infilling { order, max_new_tokens, .. } => {
                let most = subject.max_tokens().saturating_sub(*max_new_tokens);
                let suffix = task.suffix.as_deref().unwrap_or_default();
                let prompt = infill(&subject.tokenizer, &task.prompt, suffix, *order, most)?;
                Ok((prompt, if most > 0 { *max_new_tokens } else { 0 }, Rules::default()))
            }
            Protocol::Given => Ok((Vec::new(), 0, Rules::default())),
        }
    }

    /// What stands before the completion in the program that is run.
    pub fn shown<'a>(&self, task: &'a Task) -> &'a str {
        match self {
            Protocol::Humaneval { stripped: true, .. } => task.prompt.trim(),
            _ => &task.prompt,
        }
    }

    /// What counts of a completion.
    pub fn cut<'a>(&self, completion: &'a str) -> &'a str {
        match self {
            Protocol::Infilling { by_line: true, .. } => text::first_line(completion),
            _ => completion,
        }
    }
}
