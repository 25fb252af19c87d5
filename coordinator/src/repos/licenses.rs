//! Licences by SPDX identifiers: of a repository, the texts in its top directory; of a file, the line that names one.

use std::sync::LazyLock;

use spdx::detection::{Store, TextData};
use spdx::{Expression, ParseMode};
use tunefleet_proto::job::LicenseSpec;

/// Larger texts are no licences.
pub const MAX_TEXT_BYTES: usize = 256 << 10;
/// A text this much like a known one is that one; of askalono, whose method this is.
const MIN_SCORE: f32 = 0.9;
/// A file names its licence in so many first lines.
const HEAD_LINES: usize = 20;
const TAG: &str = "SPDX-License-Identifier:";

/// Whether a file of this name in the top directory holds a licence.
pub fn is_license_file(name: &str) -> bool {
    let name = name.to_ascii_lowercase();
    ["license", "licence", "copying", "unlicense"].iter().any(|start| name.starts_with(start))
}

/// The identifier of a licence's text, where it is a known one.
pub fn identify(text: &str) -> Option<String> {
    static KNOWN: LazyLock<Option<Store>> = LazyLock::new(|| Store::load_inline().ok());
    let found = KNOWN.as_ref()?.analyze(&TextData::new(text));
    (found.score >= MIN_SCORE).then(|| found.name.to_owned())
}

/// Which licences are wanted.
#[derive(Debug)]
pub struct Licenses {
    spec: LicenseSpec,
}

impl Licenses {
    /// Those that a job asks for.
    pub fn new(spec: &LicenseSpec) -> Self {
        Licenses { spec: spec.clone() }
    }

    /// Whether a repository with these licences is wanted.
    pub fn takes_repository(&self, found: &[String]) -> bool {
        let among = |list: &[String]| found.iter().any(|id| list.iter().any(|wanted| is_same(wanted, id)));
        !among(&self.spec.deny) && (self.spec.allow.is_empty() || among(&self.spec.allow))
    }

    /// Whether a file is wanted, by the licence that it names. One that leaves a choice is, where one of the choices is.
    pub fn takes_file(&self, text: &str) -> bool {
        if self.spec.deny.is_empty() {
            return true;
        }
        let named = text.lines().take(HEAD_LINES).find_map(|line| line.split_once(TAG));
        let Some((_, expression)) = named else { return true };
        let expression = expression.trim().trim_end_matches("*/").trim_end_matches("-->").trim();
        let is_denied = |id: &str| self.spec.deny.iter().any(|denied| is_same(denied, id));
        match Expression::parse_mode(expression, ParseMode::LAX) {
            Ok(expression) => expression.evaluate(|required| !is_denied(&required.license.to_string())),
            Err(_) => !is_denied(expression),
        }
    }
}

/// `GPL-3.0` stands for `GPL-3.0-only` and `GPL-3.0-or-later`.
fn is_same(wanted: &str, found: &str) -> bool {
    let plain = |id: &str| {
        let id = id.to_ascii_lowercase();
        let id = id.strip_suffix('+').unwrap_or(&id);
        ["-only", "-or-later"].iter().find_map(|end| id.strip_suffix(end)).unwrap_or(id).to_owned()
    };
    let has_suffix = wanted.ends_with("-only") || wanted.ends_with("-or-later");
    if has_suffix { wanted.eq_ignore_ascii_case(found) } else { plain(wanted) == plain(found) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn licenses(allow: &[&str], deny: &[&str]) -> Licenses {
        let list = |ids: &[&str]| ids.iter().map(|&id| id.to_owned()).collect();
        Licenses::new(&LicenseSpec { allow: list(allow), deny: list(deny) })
    }

    #[test]
    fn the_text_of_this_projects_licence_is_known() {
        let text = include_str!("../../../LICENSE");
        assert_eq!(identify(text).as_deref(), Some("Apache-2.0"));
        assert_eq!(identify("All rights reserved. Nothing may be done with this."), None);
        for (name, expected) in
            [("LICENSE", true), ("License-MIT.txt", true), ("COPYING.LESSER", true), ("main.rs", false)]
        {
            assert_eq!(is_license_file(name), expected, "{name}");
        }
    }

    #[test]
    fn repositories_are_taken_by_what_is_allowed_and_denied() {
        let found = |ids: &[&str]| ids.iter().map(|&id| id.to_owned()).collect::<Vec<_>>();
        let (mit, gpl) = (found(&["MIT"]), found(&["GPL-3.0-only", "MIT"]));
        assert!(licenses(&[], &[]).takes_repository(&[]));
        assert!(licenses(&["mit"], &[]).takes_repository(&mit));
        assert!(!licenses(&["Apache-2.0"], &[]).takes_repository(&mit));
        assert!(!licenses(&["Apache-2.0"], &[]).takes_repository(&[]));
        assert!(!licenses(&[], &["GPL-3.0"]).takes_repository(&gpl));
        assert!(licenses(&[], &["GPL-3.0-or-later"]).takes_repository(&gpl));
    }

    #[test]
    fn files_are_taken_by_the_licence_that_they_name() {
        let licenses = licenses(&[], &["GPL-2.0"]);
        for (text, expected) in [
            ("// SPDX-License-Identifier: MIT\n", true),
            ("/* SPDX-License-Identifier: GPL-2.0-only */\n", false),
            ("// SPDX-License-Identifier: GPL-2.0 OR MIT\n", true),
            ("// SPDX-License-Identifier: GPL-2.0+ AND MIT\n", false),
            ("// SPDX-License-Identifier: (((\n", true),
            ("int x;\n", true),
        ] {
            assert_eq!(licenses.takes_file(text), expected, "{text}");
        }
    }
}
