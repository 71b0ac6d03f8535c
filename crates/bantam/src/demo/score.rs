//! What of an answer is marked: leniency in form, for every contestant alike.
//!
//! The first JSON object found in the answer counts, whatever stands around it, and a number counts as its
//! text. The marking itself is the lab's `json` metric: the order of keys does not matter, and a component is
//! right only if tag and text are both exactly right.

use serde_json::{Map, Value};

/// The part of an answer that is marked, as compact JSON; the answer as it is if it holds no JSON object.
pub(crate) fn marked_part(text: &str) -> String {
    match first_object(text) {
        Some(object) => {
            let object = object.into_iter().map(|(key, value)| (key, as_text(value)));
            Value::Object(object.collect()).to_string()
        }
        None => text.to_owned(),
    }
}

/// The first JSON object in a text, wherever it begins.
fn first_object(text: &str) -> Option<Map<String, Value>> {
    text.match_indices('{').find_map(|(at, _)| {
        let mut values = serde_json::Deserializer::from_str(&text[at..]).into_iter::<Value>();
        match values.next() {
            Some(Ok(Value::Object(object))) => Some(object),
            _ => None,
        }
    })
}

/// A value with every number and the like in it made text.
fn as_text(value: Value) -> Value {
    match value {
        Value::String(_) => value,
        Value::Array(parts) => Value::Array(parts.into_iter().map(as_text).collect()),
        other => Value::String(other.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn form_is_forgiven() {
        let right = r#"{"AddressNumber":"12","StreetName":["Elm","4"]}"#;
        assert_eq!(marked_part(right), right);
        assert_eq!(
            marked_part(&format!("Sure {{ok}}! ```json\n{right}\n``` {{}}")),
            right
        );
        assert_eq!(
            marked_part(r#"{"AddressNumber": 12, "StreetName": ["Elm", 4]}"#),
            right
        );
    }

    #[test]
    fn what_is_no_object_stays_as_it_is() {
        for text in ["", "[1]", "{\"AddressNumber\":\"12\"", "no {json} here"] {
            assert_eq!(marked_part(text), text);
        }
    }
}
