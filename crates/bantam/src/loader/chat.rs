//! A model's tokenizer and chat template, from whatever its files say of them.

use std::sync::Arc;

use anyhow::{Context as _, anyhow};
use bantam_formats::{Gguf, HfFolder, ModelFiles};
use bantam_text::{Chat, ChatTemplate, GgufVocab, Specials, TemplateTokens, Tokenizer};

use crate::error::advise;

/// The one definition of prompt, loss mask and end of turn for a model.
pub(crate) fn chat_of(files: &ModelFiles) -> anyhow::Result<Arc<Chat>> {
    let (tokenizer, template, tokens, ends) = match files {
        ModelFiles::Gguf(gguf) => of_gguf(gguf)?,
        ModelFiles::Hf(folder) => of_folder(folder)?,
    };
    let Some(template) = template else {
        return Err(advise(
            anyhow!(
                "`{}` has no chat template, so it cannot be talked to",
                files.path().display()
            ),
            "take the model's `instruct` or `chat` version",
        ));
    };
    // Without a clock, templates fall back to the date written in them: the same conversation gives the same tokens.
    let template = ChatTemplate::new(&template, tokens, None)?;
    let chat = Chat::new(Arc::new(tokenizer), template, &ends)?;
    Ok(Arc::new(chat))
}

/// Tokenizer, template, the template's special tokens, and further tokens that end an answer.
type Parts = (Tokenizer, Option<String>, TemplateTokens, Vec<u32>);

fn of_gguf(gguf: &Gguf) -> anyhow::Result<Parts> {
    let metadata = gguf.metadata();
    let text = |key: &str| metadata.str(key).map(str::to_owned);
    let strings = |key: &str| {
        metadata
            .str_array(key)
            .map(<[String]>::to_vec)
            .unwrap_or_default()
    };
    let id = |which: &str| metadata.u32(&format!("tokenizer.ggml.{which}_token_id"));
    let vocab = GgufVocab {
        model: text("tokenizer.ggml.model").unwrap_or_default(),
        pre: text("tokenizer.ggml.pre").unwrap_or_default(),
        tokens: strings("tokenizer.ggml.tokens"),
        token_types: metadata
            .u32_array("tokenizer.ggml.token_type")
            .unwrap_or_default()
            .into_iter()
            .map(|kind| i32::try_from(kind).unwrap_or(i32::MAX))
            .collect(),
        merges: strings("tokenizer.ggml.merges"),
        bos: id("bos"),
        eos: id("eos"),
        pad: id("padding"),
        unk: id("unknown"),
        add_bos: metadata
            .bool("tokenizer.ggml.add_bos_token")
            .unwrap_or(false),
    };
    let spelling = |id: Option<u32>| vocab.tokens.get(id? as usize).cloned();
    let tokens = TemplateTokens {
        bos: spelling(vocab.bos),
        eos: spelling(vocab.eos),
        pad: spelling(vocab.pad),
        unk: spelling(vocab.unk),
    };
    let ends = ["eot", "eom"].into_iter().filter_map(id).collect();
    let tokenizer = Tokenizer::from_gguf(vocab)
        .with_context(|| format!("the tokenizer in `{}`", gguf.path().display()))?;
    Ok((tokenizer, text("tokenizer.chat_template"), tokens, ends))
}

fn of_folder(folder: &HfFolder) -> anyhow::Result<Parts> {
    let config = folder.tokenizer_config();
    let specials = Specials {
        bos: config.bos_token.clone(),
        eos: config.eos_token.clone(),
        pad: config.pad_token.clone(),
        unk: config.unk_token.clone(),
        add_bos: config.add_bos_token.unwrap_or(false),
    };
    let tokens = TemplateTokens {
        bos: specials.bos.clone(),
        eos: specials.eos.clone(),
        pad: specials.pad.clone(),
        unk: specials.unk.clone(),
    };
    let tokenizer = Tokenizer::from_hf_json(&folder.tokenizer_json()?, &specials)
        .with_context(|| format!("the tokenizer in `{}`", folder.path().display()))?;
    Ok((
        tokenizer,
        folder.chat_template().map(str::to_owned),
        tokens,
        folder.eos_token_ids().to_vec(),
    ))
}
