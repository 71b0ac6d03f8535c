//! From what the user typed to a model that makes vectors.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use anyhow::{Context as _, anyhow};
use bantam_engine::{Embedder, SentenceEncoder};
use bantam_formats::ModelFiles;
use bantam_kernels::Compute;
use bantam_model::Weights;
use bantam_model::encoder::{Encoder, EncoderConfig};
use bantam_text::WordPiece;

use super::{Loaded, Place, place};
use crate::commands::Context;

/// A sentence encoder, or a generating model whose hidden rows are averaged; fetched if need be.
pub(crate) fn open(
    context: &Context,
    text: &str,
    cancel: &AtomicBool,
    compute: &Compute,
) -> anyhow::Result<Arc<dyn Embedder>> {
    if let Some(path) = encoder_path(context, text, cancel)? {
        let files = bantam_formats::open_model(&path)?;
        return Ok(Arc::new(sentence_encoder(&files, compute)?));
    }
    let loaded = Loaded::open(context, text, cancel)?;
    let tokenizer = loaded.base.chat.tokenizer().clone();
    Ok(Arc::new(
        loaded
            .load(compute, Weights::default())?
            .embedder(tokenizer),
    ))
}

/// The sentence encoder that was named, if it is one; fetched if need be.
pub(crate) fn sentence_encoder_of(
    context: &Context,
    text: &str,
    cancel: &AtomicBool,
    compute: &Compute,
) -> anyhow::Result<Option<Arc<dyn Embedder>>> {
    let Some(path) = encoder_path(context, text, cancel)? else {
        return Ok(None);
    };
    let files = bantam_formats::open_model(&path)?;
    Ok(Some(Arc::new(sentence_encoder(&files, compute)?)))
}

/// Where the encoder is, if that is what was named.
fn encoder_path(
    context: &Context,
    text: &str,
    cancel: &AtomicBool,
) -> anyhow::Result<Option<PathBuf>> {
    let path = match place(&context.catalogue, text)? {
        Place::Run(_) => return Ok(None),
        Place::Path(path) => path,
        Place::Catalogue(entry) => context.fetcher(cancel).model(entry, false)?.path,
    };
    let files = bantam_formats::open_model(&path)?;
    Ok(EncoderConfig::is_encoder(&files).then_some(path))
}

/// Loads an encoder and its tokenizer.
fn sentence_encoder(files: &ModelFiles, compute: &Compute) -> anyhow::Result<SentenceEncoder> {
    let shown = files.path().display();
    let encoder = Encoder::load(files).with_context(|| format!("could not load `{shown}`"))?;
    let ModelFiles::Hf(folder) = files else {
        return Err(anyhow!("`{shown}` is no folder"));
    };
    let tokenizer = WordPiece::from_hf_json(&folder.tokenizer_json()?)
        .with_context(|| format!("the tokenizer in `{shown}`"))?;
    SentenceEncoder::new(Arc::new(encoder), Arc::new(tokenizer), compute.clone())
        .map_err(|why| anyhow!("`{shown}`: {why}"))
}
