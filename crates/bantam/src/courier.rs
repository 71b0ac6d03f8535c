//! Carries the server's webhooks over HTTP.

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, anyhow};
use bantam_serve::{Courier, HookTarget, Hooks};
use ureq::Agent;

use crate::error::advise;
use crate::http;
use crate::settings::WebhookSettings;

/// How long whoever is told may take.
const PATIENCE: Duration = Duration::from_secs(10);

/// Posts over HTTP, following nobody elsewhere.
struct Http(Agent);

impl Courier for Http {
    fn post(&self, url: &str, headers: &[(&str, String)], body: &str) -> Result<u16, String> {
        let mut request = self.0.post(url);
        for (name, value) in headers {
            request = request.header(*name, value);
        }
        let answer = request.send(body).map_err(|error| error.to_string())?;
        Ok(answer.status().as_u16())
    }
}

/// Who is told, if anyone is. `secret_of` reads a variable of the environment.
pub(crate) fn hooks(
    settings: &[WebhookSettings],
    secret_of: impl Fn(&str) -> Option<String>,
) -> anyhow::Result<Option<Hooks>> {
    if settings.is_empty() {
        return Ok(None);
    }
    let target = |hook: &WebhookSettings| {
        let name = &hook.secret_env;
        if !(hook.url.starts_with("https://") || hook.url.starts_with("http://")) {
            return Err(advise(
                anyhow!("webhooks: `{}` is not an address", hook.url),
                "such as https://example.com/hooks",
            ));
        }
        let secret = secret_of(name).ok_or_else(|| {
            advise(
                anyhow!("webhooks: the variable {name} is not set"),
                "it holds what deliveries are signed with; `openssl rand -base64 24` makes one",
            )
        })?;
        HookTarget::new(&hook.url, &secret)
            .with_context(|| format!("webhooks: the variable {name}"))
    };
    let agent = http::config()
        .timeout_global(Some(PATIENCE))
        .build()
        .new_agent();
    Ok(Some(Hooks {
        targets: settings.iter().map(target).collect::<anyhow::Result<_>>()?,
        courier: Arc::new(Http(agent)),
    }))
}
