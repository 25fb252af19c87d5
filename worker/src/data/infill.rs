//! How families of models mark the three spans of infilling: data, one row a family.
//!
//! All lay prompts out as `<prefix> p <suffix> s <middle>`; what differs is how the marks are spelt, and what ends a
//! middle. A vocabulary must hold each mark as exactly one token.

/// The marks of a family.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Template {
    /// Whose they are.
    pub family: &'static str,
    /// Before the prefix.
    pub prefix: &'static str,
    /// Before the suffix. DeepSeek calls it the hole: it stands where the middle was.
    pub suffix: &'static str,
    /// Before the middle.
    pub middle: &'static str,
    /// Fills a short sequence; the end of text does, where there is none.
    pub pad: Option<&'static str>,
    /// Behind the middle, before the end of text.
    pub end: Option<&'static str>,
    /// Whether its models learnt the order suffix, prefix, middle as well.
    pub spm: bool,
}

/// The families, each by the first that published it.
pub const TEMPLATES: [Template; 5] = [
    Template {
        family: "StarCoder, StarCoder2, DeciCoder",
        prefix: "<fim_prefix>",
        suffix: "<fim_suffix>",
        middle: "<fim_middle>",
        pad: Some("<fim_pad>"),
        end: None,
        spm: true,
    },
    Template {
        family: "Qwen2.5-Coder",
        prefix: "<|fim_prefix|>",
        suffix: "<|fim_suffix|>",
        middle: "<|fim_middle|>",
        pad: Some("<|fim_pad|>"),
        end: None,
        spm: false,
    },
    Template {
        family: "DeepSeek-Coder",
        prefix: "<\u{ff5c}fim\u{2581}begin\u{ff5c}>",
        suffix: "<\u{ff5c}fim\u{2581}hole\u{ff5c}>",
        middle: "<\u{ff5c}fim\u{2581}end\u{ff5c}>",
        pad: None,
        end: None,
        spm: false,
    },
    Template {
        family: "Code Llama",
        prefix: "\u{2581}<PRE>",
        suffix: "\u{2581}<SUF>",
        middle: "\u{2581}<MID>",
        pad: None,
        end: Some("\u{2581}<EOT>"),
        spm: true,
    },
    Template {
        family: "SantaCoder",
        prefix: "<fim-prefix>",
        suffix: "<fim-suffix>",
        middle: "<fim-middle>",
        pad: Some("<fim-pad>"),
        end: None,
        spm: true,
    },
];

/// Marks that begin another file, another repository or another speaker: a completion ends before them.
pub const BORDERS: [&str; 9] = [
    "<file_sep>",
    "<repo_name>",
    "<filename>",
    "<reponame>",
    "<|file_sep|>",
    "<|repo_name|>",
    "<|file_separator|>",
    "<|im_start|>",
    "<|im_end|>",
];

/// Ids of a family's marks in one vocabulary.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FimTokens {
    /// Before the prefix.
    pub prefix: u32,
    /// Before the middle.
    pub middle: u32,
    /// Before the suffix.
    pub suffix: u32,
    /// Fills a short sequence, where there is such a token.
    pub pad: Option<u32>,
    /// Behind the middle, where there is one.
    pub end: Option<u32>,
    /// As [`Template::spm`].
    pub spm: bool,
}

impl FimTokens {
    /// Control tokens that a rearrangement adds.
    pub fn count(&self) -> u64 {
        3 + u64::from(self.end.is_some())
    }

    /// All of them.
    pub fn all(&self) -> impl Iterator<Item = u32> {
        [self.prefix, self.middle, self.suffix].into_iter().chain(self.pad).chain(self.end)
    }
}

impl Template {
    /// All its marks.
    pub fn marks(&self) -> impl Iterator<Item = &'static str> {
        self.needed().into_iter().chain(self.pad).chain(self.end)
    }

    /// The marks without which nothing can be laid out.
    pub fn needed(&self) -> [&'static str; 3] {
        [self.prefix, self.middle, self.suffix]
    }

    /// Its tokens, as `single` knows marks that are one token each; else the marks that are missing.
    ///
    /// # Errors
    /// The marks that are needed and are not one token.
    pub fn find(&self, single: impl Fn(&str) -> Option<u32>) -> Result<FimTokens, Vec<&'static str>> {
        match self.needed().map(&single) {
            [Some(prefix), Some(middle), Some(suffix)] => Ok(FimTokens {
                prefix,
                middle,
                suffix,
                pad: self.pad.and_then(&single),
                end: self.end.and_then(&single),
                spm: self.spm,
            }),
            _ => Err(self.needed().into_iter().filter(|mark| single(mark).is_none()).collect()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_family_is_found_by_its_marks_and_what_it_lacks_is_named() {
        for template in TEMPLATES {
            let marks: Vec<&str> = template.marks().collect();
            let single = |mark: &str| marks.iter().position(|own| *own == mark).map(|at| at as u32);
            let tokens = template.find(single).unwrap();
            assert_eq!(tokens.all().count(), marks.len(), "{}", template.family);
            assert_eq!(tokens.count(), if template.end.is_some() { 4 } else { 3 });
            let others = TEMPLATES.iter().filter(|other| **other != template);
            assert!(others.map(|other| other.find(single)).all(|found| found.is_err()));
            let missing = template.find(|mark| single(mark).filter(|_| mark != template.middle));
            assert_eq!(missing.unwrap_err(), [template.middle]);
        }
    }
}
