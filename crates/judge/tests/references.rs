//! Every metric of texts against its reference implementation; `data/make.py` made the pairs.
#![allow(clippy::unwrap_used)]

use bantam_judge::grader::Similarity;
use bantam_judge::text::stem;
use serde_json::Value;

fn data() -> Value {
    serde_json::from_str(include_str!("data/pairs.json")).unwrap()
}

#[test]
fn metrics_agree_with_their_references() {
    let data = data();
    let pairs = data["pairs"].as_array().unwrap();
    assert!(pairs.len() >= 200);
    let mut n_scores = 0;
    for pair in pairs {
        let (answer, reference) = (
            pair["answer"].as_str().unwrap(),
            pair["reference"].as_str().unwrap(),
        );
        for (name, want) in pair["scores"].as_object().unwrap() {
            let metric: Similarity = serde_json::from_value(name.as_str().into()).unwrap();
            let (got, want) = (
                metric.score(answer, reference).unwrap(),
                want.as_f64().unwrap(),
            );
            assert!(
                (got - want).abs() < 1e-9,
                "{name}: {got}, not {want}\n answer: {answer:?}\n reference: {reference:?}"
            );
            n_scores += 1;
        }
    }
    assert_eq!(n_scores, 10 * pairs.len());
}

#[test]
fn stems_agree_with_nltk() {
    for (word, want) in data()["stems"].as_object().unwrap() {
        assert_eq!(stem(word), want.as_str().unwrap(), "{word}");
    }
}
