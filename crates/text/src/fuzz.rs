//! Entry points for fuzzers and hostile-input tests: bytes in, nothing out, no panic, bounded time.
//!
//! Each does what a user could make Bantam do with a file or a request: read it, and if it reads, use it.

use std::sync::{Arc, OnceLock};

use crate::{
    Chat, ChatTemplate, ConstraintEngine, ConstraintSpec, GgufVocab, Message, Specials,
    TemplateTokens, Tokenizer, WordPiece,
};

/// A tokenizer of the 256 bytes and three control tokens, with GPT-2's splitting and no merges.
pub fn byte_tokenizer() -> Arc<Tokenizer> {
    static SHARED: OnceLock<Arc<Tokenizer>> = OnceLock::new();
    SHARED
        .get_or_init(|| {
            let control = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"];
            let bytes = (0..=255u8).map(|b| crate::tokenizer::spell(&[b]));
            let vocab = GgufVocab {
                model: "gpt2".into(),
                pre: "gpt-2".into(),
                tokens: control.iter().map(|t| t.to_string()).chain(bytes).collect(),
                token_types: std::iter::repeat_n(3, control.len())
                    .chain(std::iter::repeat_n(1, 256))
                    .collect(),
                bos: Some(0),
                eos: Some(2),
                ..GgufVocab::default()
            };
            Arc::new(Tokenizer::from_gguf(vocab).expect("a vocabulary of bytes is well formed"))
        })
        .clone()
}

/// Text that tempts splitters: digits, spaces, marks, emoji, a special token's text.
const TEXT: &str = "It's 12,345\r\n  naïve e\u{301} 日本 👩🏿‍🚀 <|im_end|> \t\u{a0}x";

/// Reads bytes as `tokenizer.json` and encodes with it.
pub fn tokenizer_json(data: &[u8]) {
    if let Ok(tokenizer) = Tokenizer::from_hf_json(data, &Specials::default()) {
        let ids = tokenizer.encode(TEXT);
        let _ = tokenizer.decode(&ids);
        let _ = tokenizer.encode_plain(TEXT);
    }
    if let Ok(tokenizer) = WordPiece::from_hf_json(data) {
        let ids = tokenizer.encode(TEXT);
        assert!(ids.iter().all(|&id| (id as usize) < tokenizer.vocab_size()));
    }
}

/// Reads bytes as lines of GGUF metadata (`pre`, tokens until an empty line, merges) and encodes with them.
pub fn gguf_vocab(data: &[u8]) {
    let text = String::from_utf8_lossy(data);
    let mut lines = text.lines();
    let pre = lines.next().unwrap_or_default().to_string();
    let tokens: Vec<String> = lines
        .by_ref()
        .take_while(|l| !l.is_empty())
        .map(String::from)
        .collect();
    let token_types = tokens
        .iter()
        .map(|t| if t.starts_with("<|") { 3 } else { 1 })
        .collect();
    let vocab = GgufVocab {
        model: "gpt2".into(),
        pre,
        tokens,
        token_types,
        merges: lines.map(String::from).collect(),
        ..Default::default()
    };
    if let Ok(tokenizer) = Tokenizer::from_gguf(vocab) {
        let ids = tokenizer.encode(TEXT);
        let _ = tokenizer.decode(&ids);
    }
}

/// Reads bytes as a chat template and renders a conversation with it.
pub fn chat_template(data: &[u8]) {
    let Ok(source) = std::str::from_utf8(data) else {
        return;
    };
    let Ok(template) = ChatTemplate::new(source, TemplateTokens::default(), Some(0)) else {
        return;
    };
    let Ok(chat) = Chat::new(byte_tokenizer(), template, &[]) else {
        return;
    };
    let turns = [
        Message::system("s"),
        Message::user(TEXT),
        Message::assistant("a <|im_start|>"),
    ];
    let _ = chat.prompt(&turns[..2], &[]);
    if let Ok(example) = chat.example(&turns, &[]) {
        let _ = chat.preview(&example);
    }
}

/// Reads bytes as a JSON schema, compiles it and takes some steps.
pub fn json_schema(data: &[u8]) {
    if let Ok(schema) = serde_json::from_slice(data) {
        constraint(&ConstraintSpec::JsonSchema(schema));
    }
}

/// Reads bytes as a regex, compiles it and takes some steps.
pub fn regex(data: &[u8]) {
    if let Ok(text) = std::str::from_utf8(data) {
        constraint(&ConstraintSpec::Regex(text.to_string()));
    }
}

/// Reads bytes as a Lark grammar, compiles it and takes some steps.
pub fn lark(data: &[u8]) {
    if let Ok(text) = std::str::from_utf8(data) {
        constraint(&ConstraintSpec::Lark(text.to_string()));
    }
}

fn constraint(spec: &ConstraintSpec) {
    static ENGINE: OnceLock<ConstraintEngine> = OnceLock::new();
    let engine = ENGINE.get_or_init(|| {
        ConstraintEngine::new(&byte_tokenizer(), &[2]).expect("the trie of bytes is well formed")
    });
    let Ok(mut constraint) = engine.compile(spec) else {
        return;
    };
    for step in 0..16 {
        let Ok(mask) = constraint.allowed() else {
            return;
        };
        let allowed: Vec<u32> = mask.iter().collect();
        if constraint
            .commit(allowed[(step * 7) % allowed.len()])
            .is_err()
            || constraint.is_done()
        {
            return;
        }
    }
}
