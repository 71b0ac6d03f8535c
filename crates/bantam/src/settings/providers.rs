//! `[providers.NAME]` of a server's configuration: other servers of the OpenAI API that evals may ask.

use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::anyhow;
use serde::Deserialize;

use crate::error::advise;

/// A provider.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct ProviderSettings {
    /// What it is called here.
    pub(crate) name: String,
    /// Its API, without a slash at the end.
    pub(crate) base_url: String,
    /// The variable of the environment that holds its key.
    pub(crate) key_env: Option<String>,
    /// Models that are asked there under their own names; any other as `NAME/MODEL`.
    pub(crate) models: Vec<String>,
    /// Requests at a time.
    pub(crate) concurrency: usize,
    /// How often a request is tried again.
    pub(crate) retries: u32,
    /// How long an answer may take.
    pub(crate) timeout: Duration,
    /// Prices by model.
    pub(crate) prices: BTreeMap<String, Price>,
}

impl Eq for ProviderSettings {}

/// Dollars a million tokens.
#[derive(Debug, Clone, Copy, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Price {
    /// Of prompts.
    pub(crate) input: f64,
    /// Of what of a prompt the provider had kept; the same as `input`, if absent.
    pub(crate) cached_input: Option<f64>,
    /// Of answers.
    pub(crate) output: f64,
}

/// The table.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct ConfigProvider {
    base_url: String,
    key_env: Option<String>,
    #[serde(default)]
    models: Vec<String>,
    concurrency: Option<u16>,
    retries: Option<u32>,
    timeout_s: Option<u32>,
    #[serde(default)]
    prices: BTreeMap<String, Price>,
}

impl ConfigProvider {
    pub(super) fn settings(self, name: String) -> anyhow::Result<ProviderSettings> {
        let url = self.base_url.trim_end_matches('/');
        if !(url.starts_with("https://") || url.starts_with("http://")) {
            return Err(advise(
                anyhow!("providers.{name}.base_url: `{url}` is not an address"),
                "such as https://api.openai.com/v1",
            ));
        }
        if name.is_empty() || name.contains('/') {
            return Err(advise(
                anyhow!("`{name}` cannot be a provider's name"),
                "models are written NAME/MODEL, so a name has no slash",
            ));
        }
        let is_price = |price: f64| price.is_finite() && price >= 0.0;
        for (model, price) in &self.prices {
            if !(is_price(price.input)
                && is_price(price.output)
                && price.cached_input.is_none_or(is_price))
            {
                return Err(advise(
                    anyhow!("providers.{name}.prices.{model}: a price is a number from 0 up"),
                    "dollars a million tokens: input = 0.15, output = 0.6",
                ));
            }
        }
        Ok(ProviderSettings {
            base_url: url.to_owned(),
            name,
            key_env: self.key_env,
            models: self.models,
            concurrency: self.concurrency.unwrap_or(4).max(1).into(),
            retries: self.retries.unwrap_or(5),
            timeout: Duration::from_secs(self.timeout_s.unwrap_or(120).max(1).into()),
            prices: self.prices,
        })
    }
}
