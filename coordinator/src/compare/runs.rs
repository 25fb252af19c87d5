//! What a run left: its settings, its curves, its evaluations and its holes.

use std::collections::BTreeMap;
use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use serde::Deserialize;
use serde_json::Value;
use tunefleet_proto::evaluation::{
    BASE, EVALUATION_FILE, EVALUATION_VERSION, EVALUATIONS_DIR, Evaluation, Filled, HOLES_FILE, SWEEP_FILE,
    SweepRow, TUNED,
};
use tunefleet_proto::job::JobSpec;

use super::Error;
use crate::control::METRICS_LOG_FILE;

/// How deep evaluations are looked for.
const MAX_DEPTH: usize = 4;
/// Directories that are looked into, at most.
const MAX_DIRS: usize = 10_000;

/// One run.
#[derive(Debug)]
pub struct Run {
    /// Its name.
    pub name: String,
    /// Where it is.
    pub dir: PathBuf,
    /// As it was launched last; absent where nothing was.
    pub spec: Option<JobSpec>,
    /// What it logged, step by step.
    pub steps: Vec<Step>,
    /// Losses on held-out files, by step.
    pub evals: Vec<Point>,
    /// By the path below `evaluations`.
    pub evaluations: BTreeMap<String, Found>,
    /// Sweeps, by the path below `evaluations`.
    pub sweeps: BTreeMap<String, Vec<SweepRow>>,
}

/// An evaluation and where it is.
#[derive(Debug)]
pub struct Found {
    /// What it says.
    pub evaluation: Evaluation,
    /// Its directory.
    pub dir: PathBuf,
}

/// One logged step.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Step {
    /// Updates done.
    pub step: u64,
    /// Time that its attempts had run until then.
    pub seconds: f64,
    /// Of the step.
    pub loss: f64,
    /// Of the step.
    pub learning_rate: f64,
    /// Since the last logged step.
    pub tokens_per_second: f64,
    /// Since the last logged step.
    pub step_seconds: f64,
    /// Tokens since the job began.
    pub tokens: u64,
    /// Most that a rank's tensors took; 0 where that was not logged.
    pub peak_memory_bytes: u64,
}

/// A value at a step.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Point {
    /// Updates done.
    pub step: u64,
    /// Time that its attempts had run until then.
    pub seconds: f64,
    /// The value.
    pub value: f64,
}

impl Run {
    /// Reads the output directory of a job.
    ///
    /// # Errors
    /// A directory without anything of a run; files that are not what was written.
    pub fn read(dir: &Path) -> Result<Self, Error> {
        let spec = newest_spec(dir)?;
        let (steps, evals) = curves(&dir.join(METRICS_LOG_FILE))?;
        let mut run = Run {
            name: spec.as_ref().map_or_else(|| name_of(dir), |spec| spec.name.clone()),
            dir: dir.to_owned(),
            spec,
            steps,
            evals,
            evaluations: BTreeMap::new(),
            sweeps: BTreeMap::new(),
        };
        let mut left = MAX_DIRS;
        run.look(&dir.join(EVALUATIONS_DIR), "", 0, &mut left)?;
        if run.steps.is_empty() && run.evaluations.is_empty() && run.sweeps.is_empty() {
            return Err(Error::NoRun(dir.to_owned()));
        }
        Ok(run)
    }

    /// Price of an hour.
    pub fn price_per_hour(&self) -> Option<f64> {
        self.spec.as_ref()?.workers.price_per_hour.filter(|price| *price > 0.0)
    }

    fn look(&mut self, dir: &Path, name: &str, depth: usize, left: &mut usize) -> Result<(), Error> {
        if depth > MAX_DEPTH || *left == 0 || !dir.is_dir() {
            return Ok(());
        }
        *left -= 1;
        if let Some(evaluation) = json::<Evaluation>(&dir.join(EVALUATION_FILE))? {
            if evaluation.version != EVALUATION_VERSION {
                let problem =
                    format!("version {}, this build reads {EVALUATION_VERSION}", evaluation.version);
                return Err(Error::Format { path: dir.join(EVALUATION_FILE), problem });
            }
            self.evaluations.insert(name.to_owned(), Found { evaluation, dir: dir.to_owned() });
            return Ok(());
        }
        if let Some(rows) = json::<Vec<SweepRow>>(&dir.join(SWEEP_FILE))? {
            self.sweeps.insert(name.to_owned(), rows);
            return Ok(());
        }
        let entries = fs::read_dir(dir).map_err(|source| Error::Io { path: dir.to_owned(), source })?;
        let mut names: Vec<String> =
            entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok()).collect();
        names.sort();
        for below in names {
            let path = if name.is_empty() { below.clone() } else { format!("{name}/{below}") };
            self.look(&dir.join(&below), &path, depth + 1, left)?;
        }
        Ok(())
    }
}

/// Whose an evaluation is, by its path below `evaluations`: the model before training, or after; and what it is called.
pub fn whose(path: &str) -> (bool, &str) {
    let below = |of: &str| path.strip_prefix(of)?.strip_prefix('/');
    match (below(BASE), below(TUNED)) {
        (Some(name), _) => (true, name),
        (None, Some(name)) => (false, name),
        (None, None) => (false, path),
    }
}

/// The holes of an evaluation, by their names.
///
/// # Errors
/// Files that are not what was written.
pub fn holes(dir: &Path) -> Result<BTreeMap<String, Filled>, Error> {
    let mut files = vec![dir.join(HOLES_FILE)];
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        files.push(entry.path().join(HOLES_FILE));
    }
    let mut holes = BTreeMap::new();
    for path in files {
        for hole in json_lines::<Filled>(&path)? {
            holes.insert(hole.id.clone(), hole);
        }
    }
    Ok(holes)
}

/// The settings of the last attempt.
fn newest_spec(dir: &Path) -> Result<Option<JobSpec>, Error> {
    let attempts = fs::read_dir(dir.join("logs")).into_iter().flatten().flatten();
    let newest = attempts.filter_map(|entry| {
        let number: u32 = entry.file_name().to_str()?.strip_prefix("attempt-")?.parse().ok()?;
        Some((number, entry.path().join("job.json")))
    });
    match newest.filter(|(_, path)| path.is_file()).max() {
        Some((_, path)) => json(&path),
        None => Ok(None),
    }
}

/// What was logged: of a step that several attempts did, what the last one said.
fn curves(path: &Path) -> Result<(Vec<Step>, Vec<Point>), Error> {
    #[derive(Deserialize)]
    struct Logged {
        kind: String,
        attempt: u32,
        unix_ms: u64,
        step: u64,
        #[serde(default)]
        loss: Option<f64>,
        #[serde(default)]
        learning_rate: f64,
        #[serde(default)]
        tokens: u64,
        #[serde(default)]
        tokens_per_second: f64,
        #[serde(default)]
        step_seconds: f64,
        #[serde(default)]
        peak_memory_bytes: u64,
    }
    let (mut steps, mut evals) = (BTreeMap::new(), BTreeMap::new());
    // An attempt's time counts from its first step on; between attempts none passes.
    let (mut attempt, mut began_ms, mut before, mut now) = (0, 0, 0.0, 0.0);
    let mut last_step = 0;
    for line in json_lines::<Value>(path)? {
        let Ok(logged) = serde_json::from_value::<Logged>(line) else { continue };
        if logged.attempt != attempt {
            attempt = logged.attempt;
            before = now;
            // The first steps were under way before the first of them was logged.
            let steps_done = logged.step.saturating_sub(last_step.min(logged.step)).max(1);
            let under_way_ms = logged.step_seconds * steps_done as f64 * 1000.0;
            began_ms = logged.unix_ms.saturating_sub(under_way_ms as u64);
        }
        now = before + logged.unix_ms.saturating_sub(began_ms) as f64 / 1000.0;
        let Some(loss) = logged.loss else { continue };
        match logged.kind.as_str() {
            "step" => {
                last_step = logged.step;
                steps.insert(
                    logged.step,
                    Step {
                        step: logged.step,
                        seconds: now,
                        loss,
                        learning_rate: logged.learning_rate,
                        tokens_per_second: logged.tokens_per_second,
                        step_seconds: logged.step_seconds,
                        tokens: logged.tokens,
                        peak_memory_bytes: logged.peak_memory_bytes,
                    },
                );
            }
            "eval" => drop(evals.insert(logged.step, Point { step: logged.step, seconds: now, value: loss })),
            _ => {}
        }
    }
    Ok((steps.into_values().collect(), evals.into_values().collect()))
}

fn name_of(dir: &Path) -> String {
    let whole = dir.canonicalize().unwrap_or_else(|_| dir.to_owned());
    whole.file_name().map_or_else(|| "run".to_owned(), |name| name.to_string_lossy().into_owned())
}

/// A file of JSON; `None` where there is none.
fn json<T: for<'de> Deserialize<'de>>(path: &Path) -> Result<Option<T>, Error> {
    match fs::read(path) {
        Ok(bytes) => serde_json::from_slice(&bytes)
            .map(Some)
            .map_err(|error| Error::Format { path: path.to_owned(), problem: error.to_string() }),
        Err(error) if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) => Ok(None),
        Err(source) => Err(Error::Io { path: path.to_owned(), source }),
    }
}

/// Lines of JSON; none where there is no file. A last line that was cut off is left out.
pub fn json_lines<T: for<'de> Deserialize<'de>>(path: &Path) -> Result<Vec<T>, Error> {
    let text = match fs::read_to_string(path) {
        Ok(text) => text,
        Err(error) if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) => {
            return Ok(Vec::new());
        }
        Err(source) => return Err(Error::Io { path: path.to_owned(), source }),
    };
    let mut found = Vec::new();
    for (number, line) in (1..).zip(text.split_inclusive('\n')) {
        match serde_json::from_str(line) {
            Ok(value) => found.push(value),
            Err(_) if !line.ends_with('\n') || line.trim().is_empty() => {}
            Err(error) => {
                let problem = format!("line {number}: {error}");
                return Err(Error::Format { path: path.to_owned(), problem });
            }
        }
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn time_does_not_pass_between_attempts_and_the_last_says_what_a_step_was() {
        let dir = tempfile::tempdir().unwrap();
        let step = |attempt: u32, unix_ms: u64, step: u64, loss: f64| {
            format!(
                "{{\"kind\":\"step\",\"attempt\":{attempt},\"unix_ms\":{unix_ms},\"step\":{step},\"loss\":{loss},\
                 \"learning_rate\":0.1,\"tokens\":10,\"tokens_per_second\":5,\"step_seconds\":2}}\n"
            )
        };
        let text = [
            step(1, 1_000_000, 1, 3.0),
            step(1, 1_002_000, 2, 2.5),
            "{\"kind\":\"eval\",\"attempt\":1,\"unix_ms\":1003000,\"step\":2,\"loss\":2.6}\n".to_owned(),
            step(1, 1_005_000, 3, 9.0),
            // An hour later, from the checkpoint of step 2.
            step(2, 4_600_000, 3, 2.0),
            "{\"kind\":\"save\",\"attempt\":2,\"unix_ms\":4601000,\"step\":3}\n{\"kind\":\"st".to_owned(),
        ];
        fs::write(dir.path().join(METRICS_LOG_FILE), text.concat()).unwrap();
        let run = Run::read(dir.path()).unwrap();
        let found: Vec<_> = run.steps.iter().map(|step| (step.step, step.seconds, step.loss)).collect();
        assert_eq!(found, [(1, 2.0, 3.0), (2, 4.0, 2.5), (3, 9.0, 2.0)]);
        assert_eq!(run.evals, [Point { step: 2, seconds: 5.0, value: 2.6 }]);
    }

    #[test]
    fn what_is_no_run_is_told() {
        let dir = tempfile::tempdir().unwrap();
        assert!(matches!(Run::read(dir.path()), Err(Error::NoRun(_))));
        let broken = dir.path().join("evaluations/tuned/x");
        fs::create_dir_all(&broken).unwrap();
        fs::write(broken.join(EVALUATION_FILE), "{\"version\": 1").unwrap();
        let error = Run::read(dir.path()).unwrap_err().to_string();
        assert!(error.contains("evaluations/tuned/x/evaluation.json: EOF"), "{error}");
    }

    proptest::proptest! {
        #[test]
        fn whatever_stands_in_a_run_never_panics(text in "\\PC{0,80}(\n\\PC{0,80}){0,3}", unix_ms in 0u64.., step in 0u64..) {
            let dir = tempfile::tempdir().unwrap();
            let line = format!(
                "{{\"kind\":\"step\",\"attempt\":1,\"unix_ms\":{unix_ms},\"step\":{step},\"loss\":1,\"step_seconds\":1e300}}\n"
            );
            for name in [METRICS_LOG_FILE, "evaluations/x/evaluation.json", "evaluations/y/sweep.json"] {
                let path = dir.path().join(name);
                fs::create_dir_all(path.parent().unwrap()).unwrap();
                fs::write(path, format!("{line}{text}")).unwrap();
                let _ = Run::read(dir.path());
            }
        }
    }

    #[test]
    fn evaluations_are_of_the_model_before_training_or_after() {
        assert_eq!(whose("base/humaneval"), (true, "humaneval"));
        assert_eq!(whose("tuned/dataset"), (false, "dataset"));
        assert_eq!(whose("mine"), (false, "mine"));
        assert_eq!(whose("baseline/x"), (false, "baseline/x"));
    }
}
