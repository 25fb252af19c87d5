//! A `config.json` as keys with limits: every value is read by one of these, and refused by its key.

use serde_json::{Map, Value};

use super::Error;

/// Largest vocabulary that a config may state. With the limits below, products stay inside u64 and
/// plans inside memory.
const MAX_VOCABULARY: u64 = 1 << 24;
/// Largest width, head count or number of positions.
pub const MAX_DIMENSION: u64 = 1 << 20;
/// Most blocks.
const MAX_LAYERS: u64 = 4096;

/// The keys of a `config.json`, or of an object in it.
#[derive(Debug, Clone, Copy)]
pub struct Keys<'a>(&'a Map<String, Value>);

impl<'a> Keys<'a> {
    /// Of an object.
    pub fn new(map: &'a Map<String, Value>) -> Self {
        Keys(map)
    }

    /// The value of a key, where it is there and not null.
    pub fn get(self, key: &str) -> Option<&'a Value> {
        self.0.get(key).filter(|value| !value.is_null())
    }

    /// An object.
    ///
    /// # Errors
    /// Another kind of value.
    pub fn object(self, key: &'static str) -> Result<Option<Keys<'a>>, Error> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::Object(map)) => Ok(Some(Keys(map))),
            Some(other) => Err(invalid(key, other, "must be an object")),
        }
    }

    /// A text.
    pub fn text(self, key: &str) -> Option<&'a str> {
        self.get(key).and_then(Value::as_str)
    }

    /// A width, a count of heads, or positions.
    ///
    /// # Errors
    /// One that is missing, or outside the limits.
    pub fn size(self, key: &'static str, default: Option<u64>) -> Result<u64, Error> {
        self.limited(key, default, MAX_DIMENSION)
    }

    /// Rows of the vocabulary.
    ///
    /// # Errors
    /// As [`size`](Self::size).
    pub fn vocabulary(self) -> Result<u64, Error> {
        self.limited("vocab_size", None, MAX_VOCABULARY)
    }

    /// Blocks.
    ///
    /// # Errors
    /// As [`size`](Self::size).
    pub fn layers(self, key: &'static str) -> Result<u64, Error> {
        self.limited(key, None, MAX_LAYERS)
    }

    fn limited(self, key: &'static str, default: Option<u64>, most: u64) -> Result<u64, Error> {
        let Some(value) = self.get(key) else { return default.ok_or(Error::Missing(key)) };
        match value.as_u64() {
            Some(n) if (1..=most).contains(&n) => Ok(n),
            _ => Err(invalid(key, value, &format!("must be a whole number from 1 to {most}"))),
        }
    }

    /// A positive number.
    ///
    /// # Errors
    /// Anything else.
    pub fn positive(self, key: &'static str, default: Option<f64>) -> Result<f64, Error> {
        let Some(value) = self.get(key) else { return default.ok_or(Error::Missing(key)) };
        match value.as_f64() {
            Some(x) if x.is_finite() && x > 0.0 => Ok(x),
            _ => Err(invalid(key, value, "must be a positive number")),
        }
    }

    /// A probability of dropout.
    ///
    /// # Errors
    /// Anything else.
    pub fn probability(self, key: &'static str, default: f64) -> Result<f64, Error> {
        let Some(value) = self.get(key) else { return Ok(default) };
        match value.as_f64() {
            Some(p) if (0.0..1.0).contains(&p) => Ok(p),
            _ => Err(invalid(key, value, "must be from 0 to below 1")),
        }
    }

    /// A switch.
    ///
    /// # Errors
    /// Anything but true and false.
    pub fn switch(self, key: &'static str, default: bool) -> Result<bool, Error> {
        let Some(value) = self.get(key) else { return Ok(default) };
        value.as_bool().ok_or_else(|| invalid(key, value, "must be true or false"))
    }

    /// A token, or the first of several.
    pub fn token(self, key: &str) -> Option<u64> {
        let value = self.get(key)?;
        value.as_array().and_then(|several| several.first()).unwrap_or(value).as_u64()
    }
}

/// A key with a value that cannot be used.
pub fn invalid(key: &'static str, value: &Value, rule: &str) -> Error {
    let value = value.as_str().map_or_else(|| value.to_string(), str::to_owned);
    Error::Value { key, value, rule: rule.to_owned() }
}
