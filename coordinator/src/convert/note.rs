//! What a conversion has to say: settings that were left out, that differ, or that contradict each
//! other; and what makes a conversion impossible.

use std::fmt;

/// One thing to say of a setting.
#[derive(Debug)]
struct Note {
    place: String,
    written: String,
    text: String,
}

/// What is said, by kind, in the order in which it was found.
#[derive(Debug, Default)]
pub struct Notes {
    contradictions: Vec<Note>,
    differences: Vec<Note>,
    ignored: Vec<Note>,
}

fn note(place: &str, written: &str, text: &str) -> Note {
    Note { place: place.to_owned(), written: written.to_owned(), text: text.to_owned() }
}

impl Notes {
    /// Two settings contradict each other; `text` says which is used.
    pub fn contradiction(&mut self, place: &str, written: &str, text: &str) {
        self.contradictions.push(note(place, written, text));
    }

    /// The job does something else here; `text` says what, and why.
    pub fn differs(&mut self, place: &str, written: &str, text: &str) {
        self.differences.push(note(place, written, text));
    }

    /// The setting becomes nothing; `text` says why nothing is lost.
    pub fn ignored(&mut self, place: &str, written: &str, text: &str) {
        self.ignored.push(note(place, written, text));
    }
}

/// A title for each kind that there is, and a line for each note: `fsdp.yaml:2:8: debug: false: why`.
impl fmt::Display for Notes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (title, notes) in [
            ("contradictions", &self.contradictions),
            ("different from the original", &self.differences),
            ("without a place in the job file", &self.ignored),
        ] {
            if !notes.is_empty() {
                writeln!(f, "{title}:")?;
            }
            for Note { place, written, text } in notes {
                let place = if place.is_empty() { String::new() } else { format!("{place}: ") };
                writeln!(f, "  {place}{written}: {text}")?;
            }
        }
        Ok(())
    }
}

/// What makes a conversion impossible, all of it at once.
#[derive(Debug, Default)]
pub struct Faults {
    lines: Vec<String>,
}

/// Faults beyond this many are not kept: nobody reads them, and a hostile file can have many.
const MAX_FAULTS: usize = 100;

impl Faults {
    /// Reports a fault at `place`.
    pub fn report(&mut self, place: &str, message: impl fmt::Display) {
        if self.lines.len() < MAX_FAULTS {
            let line = if place.is_empty() { message.to_string() } else { format!("{place}: {message}") };
            self.lines.push(line);
        }
    }

    /// Whether there are any.
    pub fn any(&self) -> bool {
        !self.lines.is_empty()
    }
}

/// One line for each.
impl fmt::Display for Faults {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.lines.join("\n"))
    }
}
