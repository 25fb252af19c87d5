//! What was given: settings by name, each taken once by what needs it. What is never taken has no
//! effect, and is told.

use std::fmt;

use super::keys::Key;
use super::note::Notes;
use super::value::Scalar;

/// One given setting.
#[derive(Debug, Clone)]
pub struct Given {
    /// What it says.
    pub scalar: Scalar,
    /// Where it stands, for messages: `fsdp.yaml:3:5`, `--args`.
    pub place: String,
    /// What stands there, for comments and messages: `num_processes: 8`.
    pub written: String,
}

/// A value and where it came from.
#[derive(Debug, Clone)]
pub struct At<T> {
    /// The value.
    pub value: T,
    /// Where it stands; empty for a default.
    pub place: String,
    /// What stands there, or whose default it is.
    pub written: String,
}

impl<T> At<T> {
    /// A value that `whose` default is.
    pub fn default_of(whose: &str, value: T) -> Self {
        At { value, place: String::new(), written: format!("default of {whose}") }
    }

    /// Another value from the same place.
    pub fn map<U>(self, map: impl FnOnce(T) -> U) -> At<U> {
        At { value: map(self.value), place: self.place, written: self.written }
    }
}

/// For use in a message about another place.
impl<T> fmt::Display for At<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.place.is_empty() {
            true => f.write_str(&self.written),
            false => write!(f, "{} ({})", self.written, self.place),
        }
    }
}

/// What can be taken from a [`Scalar`]. `None` where it says something else, or `auto`.
pub trait FromScalar: Sized {
    fn from_scalar(scalar: Scalar) -> Option<Self>;
}

macro_rules! from_scalar {
    ($($kind:ty, $pattern:pat => $value:expr;)*) => {
        $(impl FromScalar for $kind {
            fn from_scalar(scalar: Scalar) -> Option<Self> {
                match scalar { $pattern => Some($value), _ => None }
            }
        })*
    };
}

from_scalar! {
    bool, Scalar::Bool(value) => value;
    u64, Scalar::Count(value) => value;
    f64, Scalar::Number(value) => value;
    (f64, f64), Scalar::Pair(first, second) => (first, second);
    String, Scalar::Text(value) => value;
    &'static str, Scalar::Word(value) => value;
}

/// Settings that were given and not yet taken, in the order in which they were given.
#[derive(Debug, Default)]
pub struct Settings {
    given: Vec<(&'static Key, Given)>,
}

impl Settings {
    /// Adds a setting, or replaces it and returns what it replaces.
    pub fn put(&mut self, key: &'static Key, given: Given) -> Option<Given> {
        match self.given.iter_mut().find(|(other, _)| other.name == key.name) {
            Some((_, earlier)) => Some(std::mem::replace(earlier, given)),
            None => {
                self.given.push((key, given));
                None
            }
        }
    }

    /// Whether nothing was given.
    pub fn is_empty(&self) -> bool {
        self.given.is_empty()
    }

    /// Takes the setting `name`; nothing where it was not given, or says `auto`.
    pub fn take<T: FromScalar>(&mut self, name: &str) -> Option<At<T>> {
        let index = self.given.iter().position(|(key, _)| key.name == name)?;
        let (_, Given { scalar, place, written }) = self.given.remove(index);
        T::from_scalar(scalar).map(|value| At { value, place, written })
    }

    /// Takes the setting `name`, or the value that it has by default in `whose` hands.
    pub fn take_or<T: FromScalar>(&mut self, name: &str, whose: &str, default: T) -> At<T> {
        self.take(name).unwrap_or_else(|| At::default_of(whose, default))
    }

    /// Whether a switch was given, and how a comment tells it.
    pub fn switch(&mut self, name: &str) -> At<bool> {
        match self.take::<bool>(name) {
            Some(at) => at,
            None => At { value: false, place: String::new(), written: format!("no {name}") },
        }
    }

    /// Takes the settings whose names begin with `prefix` away, as settings of their own.
    pub fn set_aside(&mut self, prefix: &str) -> Settings {
        let (aside, given) =
            std::mem::take(&mut self.given).into_iter().partition(|(key, _)| key.name.starts_with(prefix));
        self.given = given;
        Settings { given: aside }
    }

    /// Takes what is given in `over` instead of what is given here, and tells what differs.
    pub fn overlay(&mut self, over: Settings, notes: &mut Notes) {
        for (key, given) in over.given {
            let (new, scalar) = (format!("{} ({})", given.written, given.place), given.scalar.clone());
            if let Some(Given { scalar: old, place, written }) = self.put(key, given)
                && old != scalar
            {
                notes.contradiction(&place, &written, &format!("{new} says otherwise, and is used"));
            }
        }
    }

    /// Tells of every setting that was not taken.
    pub fn tell_rest(self, notes: &mut Notes) {
        for (key, given) in self.given {
            match key.ours.is_empty() {
                true => notes.ignored(&given.place, &given.written, key.remark),
                false => {
                    notes.ignored(&given.place, &given.written, "has no effect beside the other settings")
                }
            }
        }
    }
}
