//! Embedders as a server uses them: texts in, vectors out, the same bits in any company.
#![allow(clippy::unwrap_used, reason = "a test")]

use std::sync::Arc;

use bantam_engine::{EmbedError, Embedder, Llama, SentenceEncoder, cosine};
use bantam_formats::{ModelFiles, open_model};
use bantam_kernels::Compute;
use bantam_model::encoder::Encoder;
use bantam_model::{Model, Weights};
use bantam_testkit::{encoder, tiny};
use bantam_text::{Specials, Tokenizer, WordPiece};

fn sentence_encoder() -> SentenceEncoder {
    let dir = tempfile::tempdir().unwrap();
    encoder::write(dir.path());
    let files = open_model(dir.path()).unwrap();
    let ModelFiles::Hf(folder) = &files else {
        unreachable!()
    };
    let tokenizer = WordPiece::from_hf_json(&folder.tokenizer_json().unwrap()).unwrap();
    let encoder = Encoder::load(&files).unwrap();
    SentenceEncoder::new(Arc::new(encoder), Arc::new(tokenizer), Compute::new(2)).unwrap()
}

fn decoder() -> impl Embedder {
    let dir = tempfile::tempdir().unwrap();
    tiny::write_model(dir.path(), 1);
    let files = open_model(dir.path()).unwrap();
    let ModelFiles::Hf(folder) = &files else {
        unreachable!()
    };
    let json = folder.tokenizer_json().unwrap();
    let tokenizer = Tokenizer::from_hf_json(&json, &Specials::default()).unwrap();
    let model = Model::load(&files, Weights::F32, false).unwrap();
    Llama::new(Arc::new(model), None, Compute::new(2)).embedder(Arc::new(tokenizer))
}

const TEXTS: [&str; 4] = [
    "Where is my card?",
    "how do i get a new card",
    "Rain, wind and SNOW!",
    "[SEP] zzz 東京 <|im_end|>",
];

fn check(model: &dyn Embedder) {
    let inputs: Vec<Vec<u32>> = TEXTS.iter().map(|text| model.encode(text)).collect();
    let together = model.embed(&inputs).unwrap();
    assert_eq!(together.len(), TEXTS.len());
    for (input, vector) in inputs.iter().zip(&together) {
        assert_eq!(vector.len(), model.dims());
        let length: f64 = vector.iter().map(|&x| f64::from(x).powi(2)).sum();
        assert!((length - 1.0).abs() < 1e-6, "{length}");
        assert_eq!(
            &model.embed(std::slice::from_ref(input)).unwrap()[0],
            vector
        );
    }
    assert!(cosine(&together[0], &together[2]) < 0.9999);
    let long = vec![5; model.max_tokens() + 1];
    let error = model.embed(&[inputs[0].clone(), long]).unwrap_err();
    assert!(
        matches!(error, EmbedError::TooLong { index: 1, .. }),
        "{error}"
    );
    let stranger = model.vocab() as u32;
    let error = model.embed(&[vec![stranger]]).unwrap_err();
    assert!(
        matches!(error, EmbedError::UnknownToken { index: 0, .. }),
        "{error}"
    );
    assert_eq!(model.embed(&[vec![]]), Err(EmbedError::Empty { index: 0 }));
    assert_eq!(model.embed(&[]), Ok(Vec::new()));
}

#[test]
fn a_sentence_encoder_embeds() {
    let model = sentence_encoder();
    assert_eq!(
        (model.dims(), model.max_tokens()),
        (encoder::DIMS, encoder::MAX_TOKENS)
    );
    let ids = model.encode("my card");
    assert_eq!((ids[0], ids[ids.len() - 1]), encoder::SPECIALS);
    // The file's own truncation, to 16 tokens, does not hold.
    assert_eq!(model.encode(&"card ".repeat(40)).len(), 42);
    check(&model);
}

#[test]
fn a_generating_model_embeds() {
    let model = decoder();
    assert_eq!(model.dims(), tiny::D_MODEL);
    assert!(!model.encode("<|im_end|>").contains(&tiny::IM_END));
    check(&model);
}
