use std::path::Path;

use super::*;
use crate::data::{RowOptions, read_rows};
use crate::eval::{Answer, Metric, judge, questions};

/// An outcome in which the system has the first `n_right` of `n` rows right and a latency that grows by row.
fn outcome(n: usize, n_right: usize) -> EvalOutcome {
    let jsonl: Vec<String> = (0..n)
        .map(|i| {
            let expected =
                serde_json::json!({"number": i.to_string(), "street": "<Main> & \"Co\""})
                    .to_string();
            serde_json::json!({"prompt": format!("{i} <Main> & \"Co\""), "completion": expected})
                .to_string()
        })
        .collect();
    let name = Path::new("test.jsonl");
    let rows = read_rows(jsonl.join("\n").as_bytes(), name, &RowOptions::default()).unwrap();
    let questions = questions(&rows, Metric::Json, name).unwrap();
    let answers = questions.iter().enumerate().map(|(i, question)| {
        let text = match i {
            _ if i < n_right => question.expected.text.clone(),
            _ if i % 3 == 0 => "{\"number\":".to_owned(),
            _ => "{\"number\": \"1\", \"street\": \"<Main> & \\\"Co\\\"\"}".to_owned(),
        };
        Answer {
            latency_ms: Some(20.0 + i as f64),
            completion_tokens: 12,
            ..Answer::text(text)
        }
    });
    judge(&questions, answers.collect(), 2.5, Metric::Json).unwrap()
}

/// Made-up numbers, made once: their bootstraps take a while without optimisation.
fn report() -> &'static Report {
    static REPORT: std::sync::OnceLock<Report> = std::sync::OnceLock::new();
    REPORT.get_or_init(made_up)
}

fn made_up() -> Report {
    let environment = Environment {
        cpu: "Example 9000".into(),
        isa: "avx512".into(),
        threads: 2,
        version: "0.1.0".into(),
    };
    let mut card = Scorecard::new(
        "SmolLM2-135M, specialised: messy US addresses to JSON",
        "2026-11-22T08:00:00Z",
        environment,
    );
    let set = |id: &str, name: &str, rows| TestSet {
        id: id.into(),
        name: name.into(),
        rows,
        note: String::new(),
    };
    card.test_sets = vec![
        set("test", "held-out test", 228),
        set("messiest", "messiest 63", 63),
    ];
    let system = |id: &str, name: &str, kind, note: &str| System {
        id: id.into(),
        name: name.into(),
        kind,
        note: note.into(),
        model_bytes: Some(98_900_000),
        peak_rss_mb: Some(412.0),
        train_s: None,
    };
    card.systems = vec![
        System {
            model_bytes: None,
            peak_rss_mb: None,
            ..system(
                "rules",
                "most frequent tag",
                SystemKind::Trivial,
                "the tag seen most often for each token",
            )
        },
        system(
            "zero",
            "base, zero-shot",
            SystemKind::BaseZeroShot,
            "instructions alone, free text",
        ),
        system(
            "few",
            "base, 8 examples, grammar",
            SystemKind::BaseFewShot,
            "8 training rows in the prompt, constrained to the JSON schema",
        ),
        System {
            train_s: Some(402.0),
            ..system(
                "ours",
                "specialised",
                SystemKind::Specialised,
                "the system message alone",
            )
        },
    ];
    let mut shown = Vec::new();
    for (set, n, right) in [
        ("test", 228, [41, 0, 28, 186]),
        ("messiest", 63, [5, 0, 4, 38]),
    ] {
        let outcomes: Vec<EvalOutcome> = right.iter().map(|n_right| outcome(n, *n_right)).collect();
        for (id, outcome) in ["rules", "zero", "few", "ours"].iter().zip(&outcomes) {
            card.record(id, set, outcome);
        }
        for (id, theirs) in ["rules", "zero", "few"].iter().zip(&outcomes) {
            card.compare(set, ("ours", &outcomes[3]), (id, theirs));
        }
        if set == "test" {
            let named: Vec<(&str, &EvalOutcome)> = card
                .systems
                .iter()
                .map(|system| system.name.as_str())
                .zip(&outcomes)
                .collect();
            shown = examples(&named, 4);
        }
    }
    card.provenance = vec![Source {
        role: "base model".into(),
        name: "smollm2-135m-instruct".into(),
        sha256: "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53".into(),
        licence: "Apache-2.0".into(),
    }];
    let wobble = |i: u32| f64::from(i * 7919 % 101) / 101.0 - 0.5;
    let train = (1..=320)
        .map(|i| {
            (
                f64::from(i),
                0.08 + 2.2 * (-f64::from(i) / 45.0).exp() + 0.12 * wobble(i),
            )
        })
        .collect();
    let valid = (1..=8)
        .map(|i| {
            (
                f64::from(i * 40),
                0.11 + 2.2 * (-f64::from(i * 40) / 48.0).exp(),
            )
        })
        .collect();
    Report {
        scorecard: card,
        curve: Some(LossCurve { train, valid }),
        examples: shown,
        recipe: [
            ("method", "LoRA, every linear layer"),
            ("rank / alpha", "16 / 32"),
            ("peak learning rate", "1e-3"),
        ]
        .map(|(name, value)| (name.to_owned(), value.to_owned()))
        .to_vec(),
        next: vec!["bantam serve --model runs/addresses".to_owned()],
    }
}

#[test]
fn the_page_is_whole_and_escaped() {
    let html = report().to_html().unwrap();
    assert!(
        !html.contains("<Main>") && html.contains("&#60;Main&#62;"),
        "text from rows must be escaped"
    );
    for outside in ["<script", "http://", "https://", "<link", "url("] {
        assert!(
            !html.contains(outside),
            "the page must stand alone: {outside}"
        );
    }
    assert_eq!(
        html.matches("<svg").count(),
        6,
        "three charts in two widths"
    );
    assert_eq!(html.matches("<svg").count(), html.matches("<desc").count());
    assert!(!html.contains("NaN") && !html.contains("inf\""));
    if let Some(path) = std::env::var_os("BANTAM_TEST_REPORT") {
        report().write(Path::new(&path)).unwrap();
    }
}

#[test]
fn a_page_without_results_renders() {
    let empty = Report {
        scorecard: Scorecard::new(
            "nothing yet",
            "2026-11-22T08:00:00Z",
            Environment::default(),
        ),
        curve: Some(LossCurve {
            train: vec![(1.0, f64::NAN)],
            valid: Vec::new(),
        }),
        examples: examples(&[], 4),
        recipe: Vec::new(),
        next: Vec::new(),
    };
    assert!(empty.to_html().unwrap().contains("nothing yet"));
    assert!(text_table(&empty.scorecard).contains("system"));
}

#[test]
fn the_scorecard_survives_its_file() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("scorecard.json");
    let card = &report().scorecard;
    card.write(&path).unwrap();
    let text = std::fs::read_to_string(&path).unwrap();
    assert!(text.starts_with("{\n  \"schema\": \"bantam.scorecard/1\",\n  \"title\":"));
    let back: Scorecard = serde_json::from_str(&text).unwrap();
    assert_eq!(
        (&back.systems, &back.test_sets, &back.environment),
        (&card.systems, &card.test_sets, &card.environment)
    );
    assert_eq!((back.results.len(), back.comparisons.len()), (8, 12));
    for (ours, theirs) in card.comparisons.iter().zip(&back.comparisons) {
        assert!((ours.difference.value - theirs.difference.value).abs() < 1e-12);
        assert_eq!(ours.verdict, theirs.verdict);
    }
}

#[test]
fn comparisons_are_paired_and_say_so() {
    let card = &report().scorecard;
    let first = &card.comparisons[0];
    assert_eq!(
        (
            first.system.as_str(),
            first.against.as_str(),
            first.metric.as_str()
        ),
        ("ours", "rules", "exact match")
    );
    assert!((first.difference.value - (186.0 - 41.0) / 228.0).abs() < 1e-12);
    assert_eq!(
        (first.verdict, first.intervals_disjoint),
        (Verdict::Better, true)
    );
    assert_eq!(first.mcnemar.unwrap().only_ours, 145);
    assert!(
        first
            .difference
            .interval
            .starts_with("bca paired bootstrap")
    );
    assert!(
        card.comparisons[1].mcnemar.is_none(),
        "field F1 is not right or wrong"
    );
}

#[test]
fn the_table_is_aligned() {
    let table = text_table(&report().scorecard);
    assert!(table.contains("held-out test (228 rows)"), "{table}");
    assert!(
        table.contains("specialised                     81.6 [76.0, 86.1]"),
        "{table}"
    );
    assert!(
        table.contains("6 min 42 s") && table.contains("98.9 MB") && table.contains("14 not JSON"),
        "{table}"
    );
    assert!(table.lines().all(|line| line == line.trim_end()));
}

#[test]
fn the_curve_is_smoothed_without_bias() {
    let flat = LossCurve {
        train: (0..100).map(|i| (f64::from(i), 2.0)).collect(),
        valid: Vec::new(),
    };
    assert!(
        flat.smoothed()
            .iter()
            .all(|point| (point.1 - 2.0).abs() < 1e-12)
    );
}
