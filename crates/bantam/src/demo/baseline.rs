//! The trivial opponent: every token gets the tag it had most often in the training rows.
//!
//! An unseen token gets the tag that tokens of its shape (five digits, two capitals, an ordinal ...) had
//! most often at such a place (first, last, before a comma). It knows nothing of its neighbours, yet it is
//! learnt from the same rows as the model and takes no time at all, so it must be beaten by a wide margin.

use std::collections::{BTreeMap, HashMap};

use super::answer::{TAGS, Token};
use super::xml::Labelled;

/// Most-frequent-tag tables, learnt from training rows only.
#[derive(Debug)]
pub(crate) struct MostFrequentTag {
    by_word: HashMap<String, &'static str>,
    by_shape_and_place: HashMap<(Shape, Place), &'static str>,
    by_shape: HashMap<Shape, &'static str>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
enum Shape {
    FiveDigits,
    ZipPlusFour,
    UpToSixDigits,
    LongNumber,
    Ordinal,
    DigitsFirst,
    DigitsInside,
    OneLetter,
    TwoCapitals,
    Capitals,
    Capitalised,
    OtherWord,
    Sign,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
enum Place {
    First,
    BeforeComma,
    Last,
    Inside,
}

/// How often each key had each tag; a `BTreeMap` so that ties fall the same way every time.
type Counts<K> = BTreeMap<K, BTreeMap<usize, usize>>;

impl MostFrequentTag {
    /// Counts the tags of the training rows' tokens.
    pub(crate) fn learn(train: &[Labelled]) -> Self {
        let mut words: Counts<String> = Counts::new();
        let mut places: Counts<(Shape, Place)> = Counts::new();
        let mut shapes: Counts<Shape> = Counts::new();
        for row in train {
            for (i, token) in row.tokens.iter().enumerate() {
                let tag = TAGS.iter().position(|tag| *tag == token.tag);
                let tag = tag.expect("a token carries one of TAGS");
                let shape = Shape::of(&token.text);
                let place = Place::of(&token.text, i, row.tokens.len());
                count(&mut words, word(&token.text), tag);
                count(&mut places, (shape, place), tag);
                count(&mut shapes, shape, tag);
            }
        }
        MostFrequentTag {
            by_word: most_frequent(words),
            by_shape_and_place: most_frequent(places),
            by_shape: most_frequent(shapes),
        }
    }

    /// Tags an address as written.
    pub(crate) fn tag(&self, text: &str) -> Vec<Token> {
        let tokens = tokenise(text);
        let n_tokens = tokens.len();
        let tagged = tokens.into_iter().enumerate().map(|(i, text)| {
            let shape = Shape::of(&text);
            let place = Place::of(&text, i, n_tokens);
            let tag = (self.by_word.get(&word(&text)))
                .or_else(|| self.by_shape_and_place.get(&(shape, place)))
                .or_else(|| self.by_shape.get(&shape))
                .copied()
                .unwrap_or("StreetName");
            Token { tag, text }
        });
        tagged.collect()
    }
}

fn count<K: Ord>(counts: &mut Counts<K>, key: K, tag: usize) {
    *counts.entry(key).or_default().entry(tag).or_default() += 1;
}

fn most_frequent<K: Eq + std::hash::Hash>(counts: Counts<K>) -> HashMap<K, &'static str> {
    let best = counts.into_iter().filter_map(|(key, tags)| {
        let (tag, _) = tags
            .into_iter()
            .max_by_key(|&(tag, n)| (n, std::cmp::Reverse(tag)))?;
        Some((key, TAGS[tag]))
    });
    best.collect()
}

/// Splits an address as the corpus does: at white space, after commas and semicolons, with `#` and `&`
/// as tokens of their own.
fn tokenise(text: &str) -> Vec<String> {
    let mut tokens = Vec::new();
    for chunk in text.split_whitespace() {
        let mut token = String::new();
        let mut ended = false; // a comma was seen: the token takes no more letters
        for c in chunk.chars() {
            let sign = matches!(c, '#' | '&');
            let comma = matches!(c, ',' | ';');
            if (sign || (ended && !comma)) && !token.is_empty() {
                tokens.push(std::mem::take(&mut token));
            }
            ended = comma;
            if sign {
                tokens.push(c.to_string());
            } else if !(comma && token.is_empty()) {
                token.push(c);
            }
        }
        if !token.is_empty() {
            tokens.push(token);
        }
    }
    tokens
}

/// A token without case and outer punctuation; the key of the word table.
fn word(token: &str) -> String {
    let bare = token.trim_matches(|c: char| !c.is_alphanumeric());
    if bare.is_empty() {
        token.to_owned()
    } else {
        bare.to_lowercase()
    }
}

impl Shape {
    fn of(token: &str) -> Shape {
        let bare = token.trim_matches(|c: char| !c.is_alphanumeric());
        let n_digits = bare.chars().filter(char::is_ascii_digit).count();
        let n_letters = bare.chars().filter(|c| c.is_alphabetic()).count();
        let n_capitals = bare.chars().filter(|c| c.is_uppercase()).count();
        let starts_with_digit = bare.starts_with(|c: char| c.is_ascii_digit());
        let lower = bare.to_lowercase();
        let ordinal = ["st", "nd", "rd", "th"]
            .iter()
            .any(|end| lower.ends_with(end));
        match (n_digits, n_letters) {
            (0, 0) => Shape::Sign,
            (5, 0) if bare.len() == 5 => Shape::FiveDigits,
            (9, 0) => Shape::ZipPlusFour,
            (1..=6, 0) => Shape::UpToSixDigits,
            (_, 0) => Shape::LongNumber,
            (0, 1) => Shape::OneLetter,
            (0, 2) if n_capitals == 2 => Shape::TwoCapitals,
            (0, n) if n_capitals == n => Shape::Capitals,
            (0, _) if bare.starts_with(char::is_uppercase) => Shape::Capitalised,
            (0, _) => Shape::OtherWord,
            (_, 2) if starts_with_digit && ordinal => Shape::Ordinal,
            _ if starts_with_digit => Shape::DigitsFirst,
            _ => Shape::DigitsInside,
        }
    }
}

impl Place {
    fn of(token: &str, index: usize, n_tokens: usize) -> Place {
        match index {
            0 => Place::First,
            i if i + 1 == n_tokens => Place::Last,
            _ if token.ends_with([',', ';']) => Place::BeforeComma,
            _ => Place::Inside,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::answer::answer;
    use super::super::xml::parse;
    use super::*;

    fn toy() -> Vec<Labelled> {
        let address = |inner: &str| format!("<AddressString>{inner}</AddressString>");
        let xml = format!(
            "<AddressCollection>{}{}</AddressCollection>",
            address(
                "<AddressNumber>19</AddressNumber> <StreetName>Main</StreetName> \
                 <StreetNamePostType>St.,</StreetNamePostType> <PlaceName>Deale,</PlaceName> \
                 <StateName>MD</StateName> <ZipCode>20751</ZipCode>"
            ),
            address(
                "<AddressNumber>7</AddressNumber> <StreetName>Oak</StreetName> \
                 <StreetNamePostType>St</StreetNamePostType> <OccupancyIdentifier>#</OccupancyIdentifier> \
                 <OccupancyIdentifier>4,</OccupancyIdentifier> <PlaceName>Mars,</PlaceName> \
                 <StateName>ME</StateName> <ZipCode>04758</ZipCode>"
            ),
        );
        parse("toy.xml", &xml).unwrap()
    }

    #[test]
    fn known_words_by_count_unknown_ones_by_shape_and_place() {
        let baseline = MostFrequentTag::learn(&toy());
        assert_eq!(
            answer(&baseline.tag("233 Main ST., #4, Kenai, AK 99611")),
            r##"{"AddressNumber":"233","StreetName":"Main","StreetNamePostType":"ST.","OccupancyIdentifier":"# 4","PlaceName":"Kenai","StateName":"AK","ZipCode":"99611"}"##
        );
    }

    #[test]
    fn tokens_are_cut_as_in_the_corpus() {
        assert_eq!(
            tokenise("Road# 1,Kenai , A&B (USA) ;x"),
            ["Road", "#", "1,", "Kenai", "A", "&", "B", "(USA)", "x"]
        );
    }

    #[test]
    fn shapes() {
        let shapes = [
            ("60602,", Shape::FiveDigits),
            ("19006-8504", Shape::ZipPlusFour),
            ("123", Shape::UpToSixDigits),
            ("94-210", Shape::UpToSixDigits),
            ("12th", Shape::Ordinal),
            ("3529a", Shape::DigitsFirst),
            ("F4", Shape::DigitsInside),
            ("(N.", Shape::OneLetter),
            ("WI", Shape::TwoCapitals),
            ("MAIN", Shape::Capitals),
            ("Main", Shape::Capitalised),
            ("c/o", Shape::OtherWord),
            ("#", Shape::Sign),
            ("", Shape::Sign),
        ];
        for (token, shape) in shapes {
            assert_eq!(Shape::of(token), shape, "{token}");
        }
    }
}
