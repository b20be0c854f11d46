//! JSON read and written as Go's `encoding/json` does it, because flannel's formats are defined by
//! that: key names match without regard to case, unknown keys are ignored, and of a repeated key
//! the last entry counts, so entries are kept in the order of the text.

use std::fmt;

use serde::de::{Deserialize, Deserializer, MapAccess, Visitor};
use serde_json::value::RawValue;

/// The members of a JSON object in the order of the text, each value as its own text.
pub(crate) struct Members<'a>(pub(crate) Vec<(String, &'a RawValue)>);

impl<'a> Members<'a> {
    /// Reads a text that is one JSON object.
    pub(crate) fn parse(text: &'a str) -> Result<Self, serde_json::Error> {
        serde_json::from_str(text)
    }
}

impl<'de> Deserialize<'de> for Members<'de> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Collect;

        impl<'de> Visitor<'de> for Collect {
            type Value = Members<'de>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a JSON object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
                let mut members = Vec::new();
                while let Some(member) = map.next_entry()? {
                    members.push(member);
                }
                Ok(Members(members))
            }
        }

        deserializer.deserialize_map(Collect)
    }
}

/// Whether Go takes a key of the text for a field of this (ASCII) name.
pub(crate) fn is_key(key: &str, name: &str) -> bool {
    let mut folded = key.chars().map(fold);
    name.chars().map(fold).all(|c| folded.next() == Some(c)) && folded.next().is_none()
}

/// Simple case folding, as far as it reaches ASCII: beside the ASCII letters themselves there are
/// just the long s and the Kelvin sign.
const fn fold(c: char) -> char {
    match c {
        '\u{17f}' => 's',
        '\u{212a}' => 'k',
        _ => c.to_ascii_lowercase(),
    }
}

/// A JSON value as far as flannel's fields need it.
pub(crate) enum Scalar {
    Null,
    Bool(bool),
    /// A number as written: `24.0` is no unsigned integer to Go.
    Number(String),
    Text(String),
    /// An array or an object.
    Other,
}

impl Scalar {
    /// The value behind a JSON text.
    pub(crate) fn of(json: &str) -> Self {
        match json.as_bytes().first() {
            Some(b'n') => Self::Null,
            Some(b't') => Self::Bool(true),
            Some(b'f') => Self::Bool(false),
            // A string whose escapes stand for no text (half a surrogate pair) is of no use to us.
            Some(b'"') => serde_json::from_str(json).map_or(Self::Other, Self::Text),
            Some(b'-' | b'0'..=b'9') => Self::Number(json.to_owned()),
            _ => Self::Other,
        }
    }

    /// The number, if it is written as an unsigned integer.
    pub(crate) fn unsigned(&self) -> Option<u64> {
        match self {
            Self::Number(digits) if digits.bytes().all(|b| b.is_ascii_digit()) => {
                digits.parse().ok()
            }
            _ => None,
        }
    }

    /// What kind of value it is, in words: for errors that must not repeat the value.
    pub(crate) const fn kind(&self) -> &'static str {
        match self {
            Self::Null => "null",
            Self::Bool(_) => "a boolean",
            Self::Number(_) => "a number",
            Self::Text(_) => "a string",
            Self::Other => "an array or object",
        }
    }
}
