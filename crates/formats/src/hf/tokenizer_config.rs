//! `tokenizer_config.json` and its companions: special tokens and the chat template.

use serde::Deserialize;

/// What `tokenizer_config.json` (or `special_tokens_map.json`) says of special tokens, and the template it may hold.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[allow(
    missing_docs,
    reason = "the fields are Hugging Face's and documented there"
)]
pub struct TokenizerConfig {
    #[serde(default, deserialize_with = "token")]
    pub bos_token: Option<String>,
    #[serde(default, deserialize_with = "token")]
    pub eos_token: Option<String>,
    #[serde(default, deserialize_with = "token")]
    pub pad_token: Option<String>,
    #[serde(default, deserialize_with = "token")]
    pub unk_token: Option<String>,
    #[serde(default)]
    pub add_bos_token: Option<bool>,
    #[serde(default)]
    pub add_eos_token: Option<bool>,
    #[serde(default)]
    pub tokenizer_class: Option<String>,
    #[serde(default)]
    chat_template: Option<Templates>,
}

impl TokenizerConfig {
    /// The chat template: the only one, or the one named `default`, or else the first.
    pub fn chat_template(&self) -> Option<&str> {
        match self.chat_template.as_ref()? {
            Templates::One(template) => Some(template),
            Templates::Named(list) => list
                .iter()
                .find(|named| named.name == "default")
                .or(list.first())
                .map(|named| named.template.as_str()),
        }
    }

    /// Takes the tokens that are absent here from `other`.
    pub(super) fn or(mut self, other: TokenizerConfig) -> TokenizerConfig {
        self.bos_token = self.bos_token.or(other.bos_token);
        self.eos_token = self.eos_token.or(other.eos_token);
        self.pad_token = self.pad_token.or(other.pad_token);
        self.unk_token = self.unk_token.or(other.unk_token);
        self
    }
}

#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(untagged)]
enum Templates {
    One(String),
    Named(Vec<NamedTemplate>),
}

#[derive(Clone, Debug, PartialEq, Deserialize)]
struct NamedTemplate {
    name: String,
    template: String,
}

/// A token is written as a string, or as an object with its `content`, or as `null`.
fn token<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<Option<String>, D::Error> {
    #[derive(Deserialize)]
    #[serde(untagged)]
    enum Token {
        Plain(String),
        Added { content: String },
    }
    let token = Option::<Token>::deserialize(deserializer)?;
    Ok(token.map(|token| match token {
        Token::Plain(content) | Token::Added { content } => content,
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(json: &str) -> TokenizerConfig {
        serde_json::from_str(json).unwrap()
    }

    #[test]
    fn tokens_are_strings_objects_or_null() {
        let config = parse(
            r#"{"bos_token": "<s>", "eos_token": {"__type": "AddedToken", "content": "</s>", "lstrip": false},
                "pad_token": null, "model_max_length": 1000000000000000019884624838656}"#,
        );
        assert_eq!(config.bos_token.as_deref(), Some("<s>"));
        assert_eq!(config.eos_token.as_deref(), Some("</s>"));
        assert_eq!((config.pad_token, config.unk_token), (None, None));
    }

    #[test]
    fn a_template_is_a_string_or_one_of_a_list() {
        assert_eq!(parse("{}").chat_template(), None);
        assert_eq!(
            parse(r#"{"chat_template": "a"}"#).chat_template(),
            Some("a")
        );
        let list = r#"{"chat_template": [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]}"#;
        assert_eq!(parse(list).chat_template(), Some("d"));
        assert_eq!(parse(r#"{"chat_template": []}"#).chat_template(), None);
    }
}
