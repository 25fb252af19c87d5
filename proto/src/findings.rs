//! What a look at machines and states has found: a line for each, and one exit code for all.

use std::fmt;

use crate::rpc::Finding;
use crate::rpc::finding::Verdict;

/// Findings, to be shown.
pub struct Findings<'a>(pub &'a [Finding]);

impl Verdict {
    /// Word on screen and in JSON.
    pub fn word(self) -> &'static str {
        match self {
            Verdict::Ok => "ok",
            Verdict::Warning => "WARNING",
            Verdict::Critical => "CRITICAL",
            Verdict::Unknown | Verdict::Unspecified => "unknown",
        }
    }
}

impl Findings<'_> {
    /// As monitoring plug-ins have it: 0 all is well, 1 a warning, 2 something critical, 3 something that is not known
    /// and nothing worse.
    pub fn exit_code(&self) -> u8 {
        let has = |verdict| self.0.iter().any(|finding| finding.verdict() == verdict);
        match () {
            () if has(Verdict::Critical) => 2,
            () if has(Verdict::Warning) => 1,
            () if has(Verdict::Unknown) || has(Verdict::Unspecified) => 3,
            () => 0,
        }
    }
}

/// `ok        gpu-1: disk: 400.0 GiB free`, a line for each.
impl fmt::Display for Findings<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for finding in self.0 {
            let place = if finding.place.is_empty() { String::new() } else { format!("{}: ", finding.place) };
            // What machines tell is no more than text.
            let detail: String = finding.detail.chars().filter(|c| !c.is_control()).collect();
            writeln!(f, "{:<9} {place}{}: {detail}", finding.verdict().word(), finding.check)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_worst_finding_is_the_exit_code() {
        let of = |verdicts: &[Verdict]| {
            let found: Vec<Finding> = verdicts
                .iter()
                .map(|verdict| Finding { verdict: (*verdict).into(), ..Finding::default() })
                .collect();
            Findings(&found).exit_code()
        };
        assert_eq!(of(&[Verdict::Ok]), 0);
        assert_eq!(of(&[Verdict::Ok, Verdict::Unknown]), 3);
        assert_eq!(of(&[Verdict::Unknown, Verdict::Warning]), 1);
        assert_eq!(of(&[Verdict::Warning, Verdict::Critical, Verdict::Unknown]), 2);
    }
}
