//! `bantam serve`: the flags laid over the configuration file.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, anyhow};
use bantam_model::Weights;
use bantam_serve::Origin;
use serde::Deserialize;

use super::providers::{ConfigProvider, ProviderSettings};
use super::threads;
use crate::args::{ServeArgs, ThreadsArg};
use crate::error::advise;

/// `bantam serve`
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct ServeSettings {
    /// What is served; at least one.
    pub(crate) models: Vec<ServedSettings>,
    /// The address to listen on.
    pub(crate) host: IpAddr,
    /// The port; 0 for any free one.
    pub(crate) port: u16,
    /// Keys that open the API; none leaves it open.
    pub(crate) api_keys: Vec<String>,
    /// Database of keys.
    pub(crate) keys: Option<PathBuf>,
    /// Folder for what is kept; none keeps it in memory.
    pub(crate) data: Option<PathBuf>,
    /// Threads and memory, in MiB, of a fine-tuning job.
    pub(crate) train_threads: Option<u16>,
    pub(crate) train_memory_mb: Option<u64>,
    /// Other servers that evals may ask.
    pub(crate) providers: Vec<ProviderSettings>,
    /// Who is told when a job, a batch or a run of an eval is over: addresses, and variables that hold secrets.
    pub(crate) webhooks: Vec<WebhookSettings>,
    /// Time and memory, in MiB, of a grader's program.
    pub(crate) grader_time: Duration,
    pub(crate) grader_memory_mb: u64,
    /// Origins whose pages may call the API.
    pub(crate) cors_origins: Vec<Origin>,
    /// Certificate and private key.
    pub(crate) tls: Option<(PathBuf, PathBuf)>,
    /// How long a client may read nothing of its answer.
    pub(crate) write_timeout: Duration,
    /// The most bytes of adapters in memory.
    pub(crate) adapter_bytes: usize,
    /// The file that lists the models, if they are not given otherwise.
    pub(crate) config: Option<PathBuf>,
    /// How weights are held.
    pub(crate) weights: Weights,
    /// Threads to compute with.
    pub(crate) threads: usize,
}

/// One model of a server.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct ServedSettings {
    /// The model's name or path.
    pub(crate) model: String,
    /// What clients call it.
    pub(crate) id: String,
    /// What else they may call it.
    pub(crate) aliases: Vec<String>,
}

/// The configuration file.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct Config {
    host: Option<String>,
    port: Option<u16>,
    keys: Option<PathBuf>,
    data: Option<PathBuf>,
    train_threads: Option<u16>,
    train_memory_mb: Option<u64>,
    tls_cert: Option<PathBuf>,
    tls_key: Option<PathBuf>,
    threads: Option<u16>,
    adapter_mb: Option<u32>,
    write_timeout_s: Option<u32>,
    #[serde(default)]
    cors_origins: Vec<String>,
    grader_s: Option<u32>,
    grader_memory_mb: Option<u32>,
    #[serde(default)]
    webhooks: Vec<WebhookSettings>,
    #[serde(default)]
    providers: BTreeMap<String, ConfigProvider>,
    #[serde(default)]
    model: Vec<ConfigModel>,
}

/// `[[webhooks]]`
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct WebhookSettings {
    /// Where to post.
    pub(crate) url: String,
    /// The variable of the environment that holds the secret.
    pub(crate) secret_env: String,
}

/// `[[model]]`
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct ConfigModel {
    model: String,
    id: Option<String>,
    #[serde(default)]
    aliases: Vec<String>,
}

impl Config {
    fn read(path: &Path) -> anyhow::Result<Self> {
        let text = fs_err::read_to_string(path)?;
        let document = toml::Deserializer::parse(&text)
            .with_context(|| format!("{} is not TOML", path.display()))?;
        let mut config: Config = serde_path_to_error::deserialize(document).map_err(|error| {
            let field = error.path().to_string();
            advise(
                anyhow!("{}: `{field}`: {}", path.display(), error.into_inner().message()),
                "known are host, port, keys, data, train_threads, train_memory_mb, tls_cert, tls_key, threads, adapter_mb, write_timeout_s, cors_origins, grader_s, grader_memory_mb, [[model]] tables of model, id, aliases, [[webhooks]] tables of url, secret_env, and [providers.NAME] tables of base_url, key_env, models, concurrency, retries, timeout_s, prices",
            )
        })?;
        // Paths of the file are beside it, from wherever the server is started.
        let folder = path.parent().unwrap_or(Path::new(""));
        let beside = |p: &mut PathBuf| *p = folder.join(&*p);
        let paths = [
            &mut config.keys,
            &mut config.data,
            &mut config.tls_cert,
            &mut config.tls_key,
        ];
        paths.into_iter().flatten().for_each(beside);
        for model in &mut config.model {
            let path = folder.join(&model.model);
            if path.exists() {
                model.model = path.to_string_lossy().into_owned();
            }
        }
        Ok(config)
    }
}

impl ConfigModel {
    fn settings(self) -> ServedSettings {
        ServedSettings {
            id: self.id.unwrap_or_else(|| short_name(&self.model)),
            model: self.model,
            aliases: self.aliases,
        }
    }
}

/// The models that a configuration file lists now.
pub(crate) fn listed_models(path: &Path) -> anyhow::Result<Vec<ServedSettings>> {
    let models = Config::read(path)?.model.into_iter();
    Ok(models.map(ConfigModel::settings).collect())
}

impl ServeSettings {
    pub(super) fn resolve(args: ServeArgs) -> anyhow::Result<Self> {
        let config = match &args.config {
            Some(path) => Config::read(path)?,
            None => Config::default(),
        };
        let host = args.host.or(config.host);
        let host = match host.as_deref() {
            None | Some("localhost") => IpAddr::from(Ipv4Addr::LOCALHOST),
            Some(text) => text.trim_matches(['[', ']']).parse().map_err(|_| {
                advise(
                    anyhow!("`{text}` is not an IP address to listen on"),
                    "127.0.0.1 is this machine alone, 0.0.0.0 every network it is in",
                )
            })?,
        };
        let listed = args.config.filter(|_| args.model.is_none());
        let models: Vec<ServedSettings> = match args.model {
            Some(model) => vec![ServedSettings {
                id: args.model_id.unwrap_or_else(|| short_name(&model)),
                model,
                aliases: Vec::new(),
            }],
            None => config
                .model
                .into_iter()
                .map(ConfigModel::settings)
                .collect(),
        };
        if models.is_empty() {
            return Err(advise(
                anyhow!("there is no model to serve"),
                "give --model, or a [[model]] table in the configuration",
            ));
        }
        let tls = args.tls_cert.or(config.tls_cert);
        let tls = match (tls, args.tls_key.or(config.tls_key)) {
            (Some(cert), Some(key)) => Some((cert, key)),
            (None, None) => None,
            _ => {
                return Err(advise(
                    anyhow!("a certificate and its key go together"),
                    "give both tls_cert and tls_key",
                ));
            }
        };
        Ok(Self {
            models,
            host,
            port: args.port.or(config.port).unwrap_or(8080),
            api_keys: args.api_key,
            keys: args.keys.or(config.keys),
            data: args.data.or(config.data),
            train_threads: args.train_threads.or(config.train_threads),
            train_memory_mb: args.train_memory_mb.or(config.train_memory_mb),
            providers: config
                .providers
                .into_iter()
                .map(|(name, provider)| provider.settings(name))
                .collect::<anyhow::Result<_>>()?,
            webhooks: config.webhooks,
            // As long, and as much, as OpenAI gives a grader.
            grader_time: Duration::from_secs(config.grader_s.unwrap_or(120).max(1).into()),
            grader_memory_mb: config.grader_memory_mb.unwrap_or(2048).max(64).into(),
            cors_origins: config
                .cors_origins
                .iter()
                .map(|origin| origin.parse().context("cors_origins"))
                .collect::<anyhow::Result<_>>()?,
            tls,
            adapter_bytes: args
                .adapter_mb
                .or(config.adapter_mb)
                .map_or(bantam_serve::ADAPTER_BYTES, |mb| (mb as usize) << 20),
            write_timeout: Duration::from_secs(config.write_timeout_s.unwrap_or(60).into()),
            config: listed,
            weights: args.weights.weights.into(),
            threads: threads(ThreadsArg {
                threads: args.threads.threads.or(config.threads),
            }),
        })
    }
}

/// A model's name for clients: the last part of a path, without `.gguf`.
pub(crate) fn short_name(model: &str) -> String {
    let last = Path::new(model)
        .file_name()
        .map_or_else(|| model.to_owned(), |n| n.to_string_lossy().into_owned());
    last.strip_suffix(".gguf").unwrap_or(&last).to_owned()
}

#[cfg(test)]
mod tests {
    use clap::Parser as _;

    use super::*;
    use crate::settings::Action;

    fn resolve(arguments: &[&str]) -> anyhow::Result<ServeSettings> {
        let words = [&["bantam", "serve"], arguments].concat();
        let cli = crate::args::Cli::try_parse_from(words)?;
        match Action::resolve(cli.command)? {
            Action::Serve(settings) => Ok(*settings),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn flags_win_over_the_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("bantam.toml");
        let text = "port = 9\nkeys = \"k.db\"\n[[model]]\nmodel = \"a\"\naliases = [\"gpt\"]\n[[model]]\nmodel = \"b\"\nid = \"c\"\n";
        std::fs::write(&path, text).unwrap();
        let file = path.to_str().unwrap();
        let all = resolve(&["--config", file]).unwrap();
        let ids: Vec<&str> = all.models.iter().map(|m| m.id.as_str()).collect();
        assert_eq!((ids, all.port), (vec!["a", "c"], 9));
        assert_eq!(all.models[0].aliases, ["gpt"]);
        assert_eq!(all.keys, Some(dir.path().join("k.db")));
        let one = resolve(&["--config", file, "--port", "7", "--model", "x"]).unwrap();
        assert_eq!((one.models.len(), one.port), (1, 7));
        let text = "cors_origins = [\"https://a.example\", \"*\"]\n[[model]]\nmodel = \"a\"\n";
        std::fs::write(&path, text).unwrap();
        let error = format!("{:#}", resolve(&["--config", file]).unwrap_err());
        assert!(
            error.contains("cors_origins: `*` is not the origin"),
            "{error}"
        );
        std::fs::write(&path, "colour = 1").unwrap();
        let error = format!("{:#}", resolve(&["--config", file]).unwrap_err());
        assert!(error.contains("colour"), "{error}");
        assert!(resolve(&[]).is_err());
    }
}
