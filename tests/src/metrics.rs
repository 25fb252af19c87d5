//! What a job logged: `<output>/metrics.jsonl`.

use std::collections::BTreeMap;
use std::path::Path;

use serde_json::Value;

/// Name of the log in the job's output directory.
const FILE: &str = "metrics.jsonl";

/// The lines of a job's log.
pub struct Metrics(Vec<Value>);

impl Metrics {
    /// Reads the log; none yet is an empty one. A line that is still being written is left out.
    pub fn read(output: &Path) -> Self {
        let text = std::fs::read_to_string(output.join(FILE)).unwrap_or_default();
        let whole = text.rfind('\n').map_or("", |end| &text[..end]);
        Metrics(whole.lines().map(|line| serde_json::from_str(line).unwrap()).collect())
    }

    /// Bits of the loss of each step, over all attempts.
    ///
    /// # Panics
    /// When a step that ran in two attempts had two losses.
    pub fn losses(&self) -> BTreeMap<u64, u64> {
        let mut losses = BTreeMap::new();
        for line in self.of_kind("step") {
            let (step, loss) = (line["step"].as_u64().unwrap(), line["loss"].as_f64().unwrap());
            assert!(loss.is_finite(), "step {step} has loss {loss}");
            if let Some(before) = losses.insert(step, loss.to_bits()) {
                let before = f64::from_bits(before);
                assert!(before.to_bits() == loss.to_bits(), "step {step} has losses {before} and {loss}");
            }
        }
        losses
    }

    /// The last step that was logged; 0 before the first.
    pub fn last_step(&self) -> u64 {
        self.of_kind("step").filter_map(|line| line["step"].as_u64()).max().unwrap_or(0)
    }

    /// Steps at which a checkpoint was saved.
    pub fn saved_steps(&self) -> Vec<u64> {
        self.of_kind("save").filter_map(|line| line["step"].as_u64()).collect()
    }

    /// Seconds of each step that was logged, ascending.
    pub fn step_seconds(&self) -> Vec<f64> {
        let mut seconds: Vec<_> =
            self.of_kind("step").filter_map(|line| line["step_seconds"].as_f64()).collect();
        seconds.sort_by(f64::total_cmp);
        seconds
    }

    /// Number of attempts that logged a step.
    pub fn attempts(&self) -> usize {
        let mut attempts: Vec<_> = self.of_kind("step").filter_map(|line| line["attempt"].as_u64()).collect();
        attempts.sort_unstable();
        attempts.dedup();
        attempts.len()
    }

    fn of_kind(&self, kind: &str) -> impl Iterator<Item = &Value> {
        self.0.iter().filter(move |line| line["kind"] == kind)
    }
}
