//! Chat rows: the addresses as examples for training and testing, and the prompts of every contestant.
//!
//! The specialised model gets a prompt of a few words, because it has learnt the rest and every word of it
//! is paid for in every row. The base model gets the full instruction with the list of all components,
//! and its second attempt gets worked examples as well: an opponent is judged at its best.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use anyhow::Context as _;
use bantam_text::Message;
use serde_json::json;

use super::answer::{TAGS, answer};
use super::xml::Labelled;

/// The specialised model's system prompt.
pub(crate) const SYSTEM: &str = "Address to JSON.";

/// Examples in the prompt of the base model's second attempt.
pub(crate) const SHOTS: usize = 6;

/// Longest answer (bytes) that may serve as an example in the prompt.
const LONGEST_SHOT: usize = 260;

/// The base model's instruction: the whole job, with every component's name.
pub(crate) fn instruction() -> String {
    format!(
        "Split the US address into its components. Answer with one JSON object and nothing else. Its keys \
         are component names, in the order of the address; its values are the parts of the address, copied \
         as they are. Use these component names only: {}.",
        TAGS.join(", ")
    )
}

/// Writes rows as OpenAI chat JSONL (`messages` of system, user and assistant).
pub(crate) fn write(path: &Path, rows: &[Labelled]) -> anyhow::Result<()> {
    let mut text = String::new();
    for row in rows {
        let line = json!({"messages": [
            {"role": "system", "content": SYSTEM},
            {"role": "user", "content": row.text},
            {"role": "assistant", "content": answer(&row.tokens)},
        ]});
        text.push_str(&line.to_string());
        text.push('\n');
    }
    bantam_formats::atomic::write(path, text.as_bytes())
        .with_context(|| format!("could not write `{}`", path.display()))
}

/// The specialised model's prompt for an address.
pub(crate) fn specialised_prompt(address: &str) -> Vec<Message> {
    vec![Message::system(SYSTEM), Message::user(address)]
}

/// The base model's prompt: the instruction, `shots` worked examples (none: zero-shot), the address.
pub(crate) fn base_prompt(shots: &[&Labelled], address: &str) -> Vec<Message> {
    let mut messages = vec![Message::system(instruction())];
    for shot in shots {
        messages.push(Message::user(&shot.text));
        messages.push(Message::assistant(answer(&shot.tokens)));
    }
    messages.push(Message::user(address));
    messages
}

/// Picks the examples to put into the prompt, fixed for a given training set.
///
/// Every other one is typical: it has the set of components that the most training rows have, then the
/// next most frequent set. The others are for breadth: each shows the components not shown yet that are the
/// most frequent in training. Among equals the shorter row wins, then the earlier.
pub(crate) fn pick_shots(train: &[Labelled], n_shots: usize) -> Vec<&Labelled> {
    let tags: Vec<BTreeSet<&str>> = train
        .iter()
        .map(|row| row.tokens.iter().map(|token| token.tag).collect())
        .collect();
    let mut rows_with_tag: BTreeMap<&str, usize> = BTreeMap::new();
    let mut rows_with_set: BTreeMap<&BTreeSet<&str>, usize> = BTreeMap::new();
    for set in &tags {
        *rows_with_set.entry(set).or_default() += 1;
        for tag in set {
            *rows_with_tag.entry(tag).or_default() += 1;
        }
    }

    let mut shown: BTreeSet<&str> = BTreeSet::new();
    let mut picked: Vec<usize> = Vec::new();
    while picked.len() < n_shots {
        let typical = picked.len().is_multiple_of(2);
        let candidates = (0..train.len()).filter(|&i| {
            let repeats_a_set = typical && picked.iter().any(|&other| tags[other] == tags[i]);
            !picked.contains(&i) && !repeats_a_set && answer(&train[i].tokens).len() <= LONGEST_SHOT
        });
        let best = candidates.max_by_key(|&i| {
            let worth: usize = if typical {
                rows_with_set[&tags[i]]
            } else {
                tags[i]
                    .difference(&shown)
                    .map(|tag| rows_with_tag[tag])
                    .sum()
            };
            (worth, Reverse(train[i].text.len()), Reverse(i))
        });
        let Some(best) = best else { break };
        shown.extend(&tags[best]);
        picked.push(best);
    }
    picked.into_iter().map(|i| &train[i]).collect()
}

#[cfg(test)]
mod tests {
    use super::super::answer::Token;
    use super::*;

    fn row(text: &str, tags: &[&'static str]) -> Labelled {
        let token = |tag| Token {
            tag,
            text: "x".into(),
        };
        Labelled {
            text: text.into(),
            tokens: tags.iter().copied().map(token).collect(),
            line: 1,
        }
    }

    #[test]
    fn shots_are_typical_and_broad_by_turns() {
        let train = [
            row("common", &["AddressNumber", "StreetName"]),
            row("commoner still", &["AddressNumber", "StreetName"]),
            row("box", &["USPSBoxType", "USPSBoxID"]),
            row("more", &["AddressNumber", "StreetName", "ZipCode"]),
        ];
        let picked = |n| {
            pick_shots(&train, n)
                .iter()
                .map(|r| r.text.as_str())
                .collect::<Vec<_>>()
        };
        assert_eq!(picked(2), ["common", "box"]);
        assert_eq!(picked(3), ["common", "box", "more"]);
    }

    #[test]
    fn rows_are_written_as_chat_lines() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("train.jsonl");
        write(&path, &[row("1 \"Elm\"", &["AddressNumber"])]).unwrap();
        insta::assert_snapshot!(
            fs_err::read_to_string(&path).unwrap(),
            @r#"{"messages":[{"role":"system","content":"Address to JSON."},{"role":"user","content":"1 \"Elm\""},{"role":"assistant","content":"{\"AddressNumber\":\"x\"}"}]}"#
        );
    }
}
