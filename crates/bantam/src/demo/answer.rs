//! The answer: an address's components as one JSON object, and the schema that all answers obey.
//!
//! Keys stand in order of first appearance. Consecutive tokens of one tag are joined by one space and the
//! result loses spaces, commas and semicolons at both ends, as the corpus's own parser does ("Road," is
//! the street type "Road"). A tag that comes again after another one makes its value an array.

use serde_json::{Map, Value, json};

/// Every tag an address token may carry, in the usual order of an address.
pub(crate) const TAGS: [&str; 29] = [
    "AddressNumberPrefix",
    "AddressNumber",
    "AddressNumberSuffix",
    "StreetNamePreModifier",
    "StreetNamePreDirectional",
    "StreetNamePreType",
    "StreetName",
    "StreetNamePostType",
    "StreetNamePostDirectional",
    "StreetNamePostModifier",
    "SubaddressType",
    "SubaddressIdentifier",
    "BuildingName",
    "OccupancyType",
    "OccupancyIdentifier",
    "CornerOf",
    "LandmarkName",
    "PlaceName",
    "StateName",
    "ZipCode",
    "ZipPlus4",
    "CountryName",
    "USPSBoxType",
    "USPSBoxID",
    "USPSBoxGroupType",
    "USPSBoxGroupID",
    "IntersectionSeparator",
    "Recipient",
    "NotAddress",
];

/// Most characters of one component that the schema allows: enough for every real one, and an end for a
/// model that rambles inside quotes.
const LONGEST_PART: usize = 80;

/// One token of an address with its tag (one of [`TAGS`]).
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Token {
    pub(crate) tag: &'static str,
    pub(crate) text: String,
}

/// The components of an address as an ordered JSON object.
pub(crate) fn components(tokens: &[Token]) -> Map<String, Value> {
    let mut answer = Map::new();
    for run in tokens.chunk_by(|a, b| a.tag == b.tag) {
        let joined = run
            .iter()
            .map(|t| t.text.as_str())
            .collect::<Vec<_>>()
            .join(" ");
        let part = joined.trim_matches([' ', ',', ';']);
        if part.is_empty() {
            continue;
        }
        let part = Value::String(part.to_owned());
        match answer.get_mut(run[0].tag) {
            None => {
                answer.insert(run[0].tag.to_owned(), part);
            }
            Some(Value::Array(parts)) => parts.push(part),
            Some(first) => *first = Value::Array(vec![first.take(), part]),
        }
    }
    answer
}

/// The components as compact JSON text: what the model is taught to write.
pub(crate) fn answer(tokens: &[Token]) -> String {
    Value::Object(components(tokens)).to_string()
}

/// The JSON schema of every answer: known tags only, each a string or an array of at least two strings.
///
/// The tags stand in one pattern, not as `properties`, because a grammar takes `properties` in their written
/// order, and the parts of an address come in any.
pub(crate) fn schema() -> Value {
    let part = json!({"type": "string", "minLength": 1, "maxLength": LONGEST_PART});
    json!({
        "type": "object",
        "patternProperties": {
            format!("^({})$", TAGS.join("|")): {
                "anyOf": [part, {"type": "array", "items": part, "minItems": 2}]
            }
        },
        "additionalProperties": false
    })
}

/// A direction or a street type on the wrong side of the street's name, moved to the right tag.
///
/// The messiest set was labelled under an older reading in which every direction is a
/// `StreetNamePreDirectional` and every street type a `StreetNamePostType`, wherever they stand ("7th
/// Street Southeast"). In the training set, as in the tags' own definition, `Pre` is before the name and
/// `Post` after. Scores are shown against both the labels as they are and these. Returns whether
/// anything changed.
pub(crate) fn harmonise(tokens: &mut [Token]) -> bool {
    let is_name = |token: &Token| token.tag == "StreetName";
    let mut changed = false;
    for i in 0..tokens.len() {
        let before = tokens[..i].iter().any(is_name);
        let after = tokens[i + 1..].iter().any(is_name);
        let tag = match tokens[i].tag {
            "StreetNamePreDirectional" if before && !after => "StreetNamePostDirectional",
            "StreetNamePostType" if !before && after => "StreetNamePreType",
            _ => continue,
        };
        tokens[i].tag = tag;
        changed = true;
    }
    changed
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tokens(pairs: &[(&'static str, &str)]) -> Vec<Token> {
        pairs
            .iter()
            .map(|&(tag, text)| Token {
                tag,
                text: text.to_owned(),
            })
            .collect()
    }

    #[test]
    fn joins_runs_strips_ends_and_keeps_order() {
        let got = answer(&tokens(&[
            ("PlaceName", "St."),
            ("PlaceName", "Paul,"),
            ("AddressNumber", "12"),
            ("StreetName", "Main;"),
        ]));
        assert_eq!(
            got,
            r#"{"PlaceName":"St. Paul","AddressNumber":"12","StreetName":"Main"}"#
        );
    }

    #[test]
    fn a_tag_that_returns_becomes_an_array() {
        let got = answer(&tokens(&[
            ("StreetName", "12th"),
            ("IntersectionSeparator", "&"),
            ("StreetName", "\"Q\""),
            ("PlaceName", "X"),
            ("StreetName", "Elm"),
        ]));
        assert_eq!(
            got,
            r#"{"StreetName":["12th","\"Q\"","Elm"],"IntersectionSeparator":"&","PlaceName":"X"}"#
        );
    }

    #[test]
    fn a_component_of_punctuation_alone_is_no_component() {
        let got = answer(&tokens(&[
            ("StreetName", "Elm"),
            ("NotAddress", ","),
            ("StreetName", "St"),
        ]));
        assert_eq!(got, r#"{"StreetName":["Elm","St"]}"#);
    }

    #[test]
    fn schema_names_every_tag_and_no_other_key() {
        let schema = schema();
        let patterns = schema["patternProperties"].as_object().unwrap();
        assert_eq!(patterns.len(), 1);
        let (pattern, _) = patterns.iter().next().unwrap();
        assert_eq!(
            pattern
                .trim_matches(['^', '$', '(', ')'])
                .split('|')
                .collect::<Vec<_>>(),
            TAGS
        );
        assert_eq!(schema["additionalProperties"], Value::Bool(false));
    }

    #[test]
    fn harmonise_moves_directions_and_types_to_their_side() {
        let mut street = tokens(&[
            ("StreetNamePostType", "Highway"),
            ("StreetName", "63"),
            ("StreetNamePreDirectional", "South"),
        ]);
        assert!(harmonise(&mut street));
        assert_eq!(
            answer(&street),
            r#"{"StreetNamePreType":"Highway","StreetName":"63","StreetNamePostDirectional":"South"}"#
        );
        let mut crossing = tokens(&[
            ("StreetName", "Elm"),
            ("IntersectionSeparator", "&"),
            ("StreetNamePreDirectional", "N"),
            ("StreetName", "1st"),
        ]);
        assert!(!harmonise(&mut crossing));
    }
}
