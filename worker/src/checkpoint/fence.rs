//! Ranks of an attempt that counts as lost may live on where nobody sees them: they may finish no checkpoint once
//! a newer attempt has begun. The coordinator makes a directory of logs for each attempt; that is the sign.

use std::fs;
use std::path::{Path, PathBuf};

use super::Error;

/// What keeps an old attempt out.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fence {
    logs: PathBuf,
    attempt: u32,
}

impl Fence {
    /// For the ranks of `attempt` of the job whose output is there.
    pub fn new(output: &Path, attempt: u32) -> Self {
        Fence { logs: output.join("logs"), attempt }
    }

    /// The attempt that it is for.
    pub fn attempt(&self) -> u32 {
        self.attempt
    }

    /// Whether this attempt may still write.
    ///
    /// # Errors
    /// [`Error::Elsewhere`] when a newer one has begun.
    pub fn check(&self) -> Result<(), Error> {
        // Where there are no logs, no coordinator has begun anything.
        let Ok(entries) = fs::read_dir(&self.logs) else { return Ok(()) };
        let names = entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
        let newest = names.filter_map(|name| name.strip_prefix("attempt-")?.parse::<u32>().ok()).max();
        match newest.filter(|newest| *newest > self.attempt) {
            Some(newest) => Err(Error::Elsewhere(format!(
                "attempt {newest} has begun: attempt {} may write no checkpoint any more",
                self.attempt
            ))),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_attempt_may_write_until_a_newer_one_has_begun() {
        let dir = tempfile::tempdir().unwrap();
        let fence = Fence::new(dir.path(), 2);
        fence.check().unwrap();
        for name in ["attempt-1", "attempt-2", "worker.log"] {
            fs::create_dir_all(dir.path().join("logs").join(name)).unwrap();
        }
        fence.check().unwrap();
        fs::create_dir(dir.path().join("logs/attempt-10")).unwrap();
        let error = fence.check().unwrap_err().to_string();
        assert!(error.contains("attempt 10 has begun"), "{error}");
    }
}
