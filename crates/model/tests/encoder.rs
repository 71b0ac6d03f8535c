//! The encoder against PyTorch, and the laws of vectors: a sequence has the same bits alone and among others.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

use bantam_formats::open_model;
use bantam_kernels::{Compute, Isa};
use bantam_model::encoder::{Encoder, EncoderConfig, EncoderError};
use bantam_testkit::close::assert_close;
use bantam_testkit::golden::Golden;
use std::path::Path;

fn sequences(golden: &Golden) -> Vec<Vec<u32>> {
    let tokens = golden.tokens();
    let mut rest = tokens.as_slice();
    let cut = golden.seq_lens().into_iter().map(|n| {
        let (own, later) = rest.split_at(n);
        rest = later;
        own.to_vec()
    });
    cut.collect()
}

fn slices(sequences: &[Vec<u32>]) -> Vec<&[u32]> {
    sequences.iter().map(Vec::as_slice).collect()
}

#[test]
fn rows_and_vectors_are_those_of_transformers() {
    let golden = Golden::load("encoder");
    let encoder = Encoder::load(&open_model(golden.model_dir()).unwrap()).unwrap();
    assert_eq!(
        (encoder.config().positions, encoder.config().max_tokens),
        (64, 48)
    );
    let sequences = sequences(&golden);
    let vectors: Vec<f64> = golden.f64("vectors");
    for isa in Isa::available() {
        let compute = Compute::with_isa(2, isa);
        let hidden = encoder.hidden(&slices(&sequences), &compute);
        assert_close("hidden", &hidden, &golden.f64("hidden"), 1e-11);
        let got = encoder.embed(&slices(&sequences), &compute);
        for (got, want) in got.iter().zip(vectors.chunks_exact(got[0].len())) {
            let cosine: f64 = got.iter().zip(want).map(|(&a, b)| f64::from(a) * b).sum();
            assert!(
                (cosine - 1.0).abs() < 1e-6,
                "{}: cosine {cosine}",
                isa.name()
            );
        }
    }
}

#[test]
fn a_vector_does_not_depend_on_its_neighbours_or_the_threads() {
    let golden = Golden::load("encoder");
    let encoder = Encoder::load(&open_model(golden.model_dir()).unwrap()).unwrap();
    // More than one pass, so that cuts between passes are crossed as well.
    let mut many = Vec::new();
    for i in 0..60 {
        let length = 1 + (i * 29) % 64;
        many.push(
            (0..length)
                .map(|t| ((t * 31 + i * 17) % 150) as u32)
                .collect(),
        );
    }
    many.extend(sequences(&golden));
    for isa in Isa::available() {
        let together = encoder.embed(&slices(&many), &Compute::with_isa(2, isa));
        for (sequence, want) in many.iter().zip(&together) {
            let alone = encoder.embed(&[sequence], &Compute::with_isa(1, isa));
            assert_eq!(
                &alone[0],
                want,
                "{} with {} tokens",
                isa.name(),
                sequence.len()
            );
        }
    }
}

/// The golden's folder with a changed `config.json`.
fn changed(dir: &Path, from: &str, to: &str) -> EncoderError {
    let golden = Golden::load("encoder");
    let config = std::fs::read_to_string(golden.model_dir().join("config.json")).unwrap();
    assert!(config.contains(from));
    std::fs::write(dir.join("config.json"), config.replace(from, to)).unwrap();
    let weights = golden.model_dir().join("model.safetensors");
    std::fs::copy(weights, dir.join("model.safetensors")).unwrap();
    Encoder::load(&open_model(dir).unwrap()).unwrap_err()
}

#[test]
fn variants_that_are_not_built_are_refused() {
    let dir = std::env::temp_dir().join(format!("bantam-encoder-{}", std::process::id()));
    std::fs::create_dir_all(&dir).unwrap();
    let say = |from: &str, to: &str| changed(&dir, from, to).to_string();
    assert!(say("\"gelu\"", "\"gelu_new\"").contains("gelu_new"));
    assert!(say("\"absolute\"", "\"relative_key\"").contains("relative_key"));
    assert!(say("\"bert\"", "\"roberta\"").contains("roberta"));
    assert!(say("\"vocab_size\": 150", "\"vocab_size\": 151").contains("word_embeddings"));
    assert!(
        say("\"num_hidden_layers\": 3", "\"num_hidden_layers\": 4").contains("encoder.layer.3")
    );
    assert!(say("\"num_hidden_layers\": 3", "\"num_hidden_layers\": 2").contains("no place"));
    std::fs::remove_dir_all(&dir).unwrap();
    let golden = Golden::load("tied");
    let files = open_model(golden.model_dir()).unwrap();
    assert!(!EncoderConfig::is_encoder(&files));
    assert!(
        Encoder::load(&files)
            .unwrap_err()
            .to_string()
            .contains("`llama`")
    );
}
