//! Bytes that mean ill: no panic, no tensor outside its file, a clear reason.

#![allow(clippy::unwrap_used)]

#[path = "../../../fuzz/bodies/formats.rs"]
mod bodies;

use bantam_formats::{FormatError, Gguf, Problem, SafetensorsFile};
use proptest::prelude::*;
use std::path::{Path, PathBuf};

type Body = fn(&[u8]);

fn corpus() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fuzz/corpus")
}

fn seed(target: &str, name: &str) -> Vec<u8> {
    std::fs::read(corpus().join(target).join(name)).unwrap()
}

fn gguf_problem(name: &str) -> Problem {
    problem(Gguf::from_bytes(seed("gguf", name)))
}

fn safetensors_problem(name: &str) -> Problem {
    problem(SafetensorsFile::from_bytes(seed("safetensors", name)))
}

fn problem<T>(result: Result<T, FormatError>) -> Problem {
    match result {
        Err(FormatError::Invalid { problem, .. }) => problem,
        Err(other) => panic!("{other:?}"),
        Ok(_) => panic!("was accepted"),
    }
}

#[test]
fn the_fuzz_corpus_passes() {
    let targets: [(&str, Body); 4] = [
        ("gguf", bodies::gguf),
        ("safetensors", bodies::safetensors),
        ("hf_config", bodies::hf_config),
        ("jsonl", bodies::jsonl),
    ];
    for (target, body) in targets {
        let mut n = 0;
        for entry in std::fs::read_dir(corpus().join(target)).unwrap() {
            body(&std::fs::read(entry.unwrap().path()).unwrap());
            n += 1;
        }
        assert!(n > 0, "no corpus for {target}");
    }
}

#[test]
fn sound_files_of_another_implementation_are_read() {
    let gguf = Gguf::from_bytes(seed("gguf", "sound")).unwrap();
    assert_eq!(gguf.version(), 3);
    assert_eq!(gguf.metadata().architecture(), Some("llama"));
    assert_eq!(gguf.metadata().str_array("tokens").unwrap(), ["a", "Ġb"]);
    assert_eq!(gguf.metadata().u32_array("types").unwrap(), [1, 3]);
    assert_eq!(gguf.metadata().f64("k6"), Some(1.0));
    assert_eq!(gguf.tensor("a.weight").unwrap().shape, [2, 4]);
    assert_eq!(gguf.tensor("b.weight").unwrap().bytes.len(), 34);
    assert!(gguf.tensor("c.weight").is_none());
    assert_eq!(
        Gguf::from_bytes(seed("gguf", "sound-v2"))
            .unwrap()
            .tensors()
            .len(),
        2
    );
    assert_eq!(
        Gguf::from_bytes(seed("gguf", "sound-empty"))
            .unwrap()
            .tensors(),
        []
    );
    assert_eq!(
        Gguf::from_bytes(seed("gguf", "aligned-64"))
            .unwrap()
            .tensors()
            .len(),
        2
    );
    assert_eq!(
        SafetensorsFile::from_bytes(seed("safetensors", "sound"))
            .unwrap()
            .tensors()
            .len(),
        3
    );
}

#[test]
fn a_gguf_is_refused_for_its_reason() {
    assert!(matches!(
        gguf_problem("overlap"),
        Problem::NotAdjacent { .. }
    ));
    assert!(matches!(
        gguf_problem("out-of-bounds"),
        Problem::OutOfBounds { .. }
    ));
    assert!(matches!(gguf_problem("overflow"), Problem::Shape { .. }));
    assert!(matches!(
        gguf_problem("unaligned"),
        Problem::Unaligned { .. }
    ));
    assert!(matches!(gguf_problem("twice"), Problem::Duplicate { .. }));
    assert!(matches!(gguf_problem("deep"), Problem::OverCap { .. }));
    assert_eq!(
        gguf_problem("type-iq2").to_string(),
        "tensor `a` has type IQ2_XXS, which is not supported; convert the model to one of F32, F16, BF16, Q4_0, \
         Q4_1, Q5_0, Q5_1, Q8_0, Q2_K, Q3_K, Q4_K, Q5_K, Q6_K"
    );
    assert!(
        gguf_problem("big-endian")
            .to_string()
            .contains("big-endian")
    );
    assert!(matches!(
        problem(Gguf::from_bytes(b"PK\x03\x04".to_vec())),
        Problem::Magic { .. }
    ));
    assert!(matches!(
        problem(Gguf::from_bytes(Vec::new())),
        Problem::Magic { .. }
    ));
}

#[test]
fn a_safetensors_file_is_refused_for_its_reason() {
    assert!(matches!(
        safetensors_problem("gap"),
        Problem::NotAdjacent { .. }
    ));
    assert!(matches!(
        safetensors_problem("overlap"),
        Problem::NotAdjacent { .. }
    ));
    assert!(matches!(
        safetensors_problem("short"),
        Problem::Shape { .. }
    ));
    assert!(matches!(
        safetensors_problem("overflow"),
        Problem::Shape { .. }
    ));
    assert!(
        safetensors_problem("twice")
            .to_string()
            .contains("`a` appears twice")
    );
    assert!(matches!(safetensors_problem("deep"), Problem::Json { .. }));
    assert!(
        safetensors_problem("dims")
            .to_string()
            .contains("at most 8 dimensions")
    );
}

#[test]
fn every_cut_of_a_file_is_refused() {
    let whole = seed("gguf", "sound");
    for n in 0..whole.len() {
        assert!(Gguf::from_bytes(whole[..n].to_vec()).is_err(), "cut at {n}");
    }
    let whole = seed("safetensors", "sound");
    for n in 0..whole.len() {
        assert!(
            SafetensorsFile::from_bytes(whole[..n].to_vec()).is_err(),
            "cut at {n}"
        );
    }
}

#[test]
fn every_number_of_a_file_may_be_any_number() {
    const BAD: [u64; 8] = [
        0,
        1,
        1 << 31,
        u32::MAX as u64,
        1 << 32,
        1 << 63,
        u64::MAX / 2,
        u64::MAX,
    ];
    for (target, body) in [
        ("gguf", bodies::gguf as Body),
        ("safetensors", bodies::safetensors),
    ] {
        let whole = seed(target, "sound");
        for at in 0..whole.len() - 8 {
            for n in BAD {
                let mut bytes = whole.clone();
                bytes[at..at + 8].copy_from_slice(&n.to_le_bytes());
                body(&bytes);
                let mut bytes = whole.clone();
                bytes[at..at + 4].copy_from_slice(&n.to_le_bytes()[..4]);
                body(&bytes);
            }
        }
    }
}

proptest! {
    #[test]
    fn flipped_bits_do_no_harm(
        name in prop::sample::select(vec!["sound", "sound-v2", "aligned-64"]),
        flips in prop::collection::vec((any::<prop::sample::Index>(), 0u8..8), 1..6),
    ) {
        let mut bytes = seed("gguf", name);
        for (at, bit) in &flips {
            let at = at.index(bytes.len());
            bytes[at] ^= 1 << bit;
        }
        bodies::gguf(&bytes);
        let mut bytes = seed("safetensors", "sound");
        for (at, bit) in &flips {
            let at = at.index(bytes.len());
            bytes[at] ^= 1 << bit;
        }
        bodies::safetensors(&bytes);
        let mut bytes = seed("hf_config", "sound");
        for (at, bit) in &flips {
            let at = at.index(bytes.len());
            bytes[at] ^= 1 << bit;
        }
        bodies::hf_config(&bytes);
    }

    #[test]
    fn noise_does_no_harm(noise in prop::collection::vec(any::<u8>(), 0..300)) {
        bodies::gguf(&noise);
        bodies::gguf(&[b"GGUF\x03\0\0\0", &noise[..]].concat());
        bodies::safetensors(&noise);
        bodies::safetensors(&[&(noise.len() as u64).to_le_bytes(), &noise[..]].concat());
        bodies::hf_config(&noise);
        bodies::jsonl(&noise);
    }
}
