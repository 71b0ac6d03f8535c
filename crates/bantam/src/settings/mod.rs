//! What the arguments, the environment and the machine come to: values that are all present.
//!
//! Nothing else in the workspace reads the environment. Commands take these structs and ask no further.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::anyhow;
use bantam_formats::DType;
use bantam_lab::export::MergeFormat;

use crate::args::{
    Command, DemoArgs, EvalsArgs, ExportArgs, ExportType, GlobalArgs, InspectArgs, JobsArgs,
    KeysCommand, PullArgs, ThreadsArg,
};
use crate::error::advise;

mod bench;
mod preference;
mod providers;
mod serve;
mod work;

pub(crate) use self::bench::BenchSettings;
pub(crate) use self::preference::PreferenceSettings;
pub(crate) use self::providers::{Price, ProviderSettings};
pub(crate) use self::serve::{
    ServeSettings, ServedSettings, WebhookSettings, listed_models, short_name,
};
pub(crate) use self::work::{
    ChatSettings, ConstraintChoice, EmbedSettings, EvalSettings, MetricChoice, PerplexitySettings,
    TrainMode, TrainSettings,
};

/// The environment as it was when the process began.
#[derive(Debug, Clone, Default)]
pub(crate) struct Environment {
    vars: BTreeMap<OsString, OsString>,
}

impl Environment {
    /// This process's environment.
    pub(crate) fn of_process() -> Self {
        Self {
            vars: std::env::vars_os().collect(),
        }
    }

    /// A variable's value; an empty one counts as not set.
    fn get(&self, name: &str) -> Option<&OsString> {
        self.vars
            .get(std::ffi::OsStr::new(name))
            .filter(|v| !v.is_empty())
    }

    fn text(&self, name: &str) -> Option<String> {
        self.get(name).map(|v| v.to_string_lossy().into_owned())
    }

    /// A folder variable; the XDG specification says to ignore relative ones.
    fn absolute(&self, name: &str) -> Option<PathBuf> {
        self.get(name)
            .map(PathBuf::from)
            .filter(|p| p.is_absolute())
    }

    fn home(&self) -> Option<PathBuf> {
        self.absolute("HOME")
            .or_else(|| self.absolute("USERPROFILE"))
    }

    /// The first of these programs on the search path.
    fn program(&self, names: &[&str]) -> Option<PathBuf> {
        let path = self.get("PATH")?;
        let folders: Vec<PathBuf> = std::env::split_paths(path).collect();
        let candidates = names
            .iter()
            .flat_map(|name| folders.iter().map(move |f| f.join(name)));
        candidates
            .map(|c| c.with_extension(std::env::consts::EXE_EXTENSION))
            .find(|c| is_program(c))
    }

    /// Whether colours are welcome (<https://no-color.org>).
    pub(crate) fn color(&self) -> bool {
        self.get("NO_COLOR").is_none() && self.text("TERM").as_deref() != Some("dumb")
    }
}

fn is_program(path: &Path) -> bool {
    let Ok(metadata) = std::fs::metadata(path) else {
        return false;
    };
    #[cfg(unix)]
    {
        use std::os::unix::fs::PermissionsExt as _;
        metadata.is_file() && metadata.permissions().mode() & 0o111 != 0
    }
    #[cfg(not(unix))]
    metadata.is_file()
}

/// What holds for every command.
#[derive(Debug, Clone)]
pub(crate) struct Global {
    /// Say nothing but warnings and errors.
    pub(crate) quiet: bool,
    /// Colours are welcome.
    pub(crate) color: bool,
    /// The cache's root folder.
    pub(crate) cache: PathBuf,
    /// The user's own catalogue, which need not exist.
    pub(crate) catalogue: PathBuf,
    /// How to fetch.
    pub(crate) network: Network,
    /// `BANTAM_LOG`: a filter for diagnostic logs on stderr, such as `debug`.
    pub(crate) log: Option<String>,
}

/// How to fetch.
#[derive(Debug, Clone)]
pub(crate) struct Network {
    /// `HF_ENDPOINT`, or the Hugging Face hub.
    pub(crate) hf_endpoint: String,
    /// `HF_TOKEN`.
    pub(crate) hf_token: Option<String>,
    /// Python, whose pip fetches packages.
    pub(crate) python: Option<PathBuf>,
    /// The pause before the second attempt at a download; it doubles with every further one.
    pub(crate) retry_delay: Duration,
}

impl Global {
    /// Resolves the global flags and the environment.
    pub(crate) fn resolve(args: &GlobalArgs, env: &Environment) -> anyhow::Result<Self> {
        let home = env.get("BANTAM_HOME").map(PathBuf::from);
        let under = |xdg: &str, in_home: &str| {
            env.absolute(xdg)
                .or_else(|| Some(env.home()?.join(in_home)))
                .map(|base| base.join("bantam"))
        };
        let no_home = || {
            advise(
                anyhow!("no home folder is known"),
                "set BANTAM_HOME to a folder for the cache",
            )
        };
        let (cache, config) = match home {
            Some(home) => (std::path::absolute(&home)?, std::path::absolute(&home)?),
            None => (
                under("XDG_CACHE_HOME", ".cache").ok_or_else(no_home)?,
                under("XDG_CONFIG_HOME", ".config").ok_or_else(no_home)?,
            ),
        };
        Ok(Self {
            quiet: args.quiet,
            color: env.color(),
            cache,
            catalogue: config.join("catalogue.toml"),
            network: Network {
                hf_endpoint: env
                    .text("HF_ENDPOINT")
                    .unwrap_or_else(|| "https://huggingface.co".into()),
                hf_token: env.text("HF_TOKEN"),
                python: env.program(&["python3", "python"]),
                retry_delay: Duration::from_secs(1),
            },
            log: env.text("BANTAM_LOG"),
        })
    }
}

/// What a command is to do.
#[derive(Debug)]
pub(crate) enum Action {
    /// `bantam demo`
    Demo(DemoSettings),
    /// `bantam pull`
    Pull(PullSettings),
    /// `bantam models`
    Models(ModelsSettings),
    /// `bantam train`
    Train(Box<TrainSettings>),
    /// `bantam eval`
    Eval(EvalSettings),
    /// `bantam eval --metric perplexity`
    Perplexity(PerplexitySettings),
    /// Reads pairs of answers.
    Preference(PreferenceSettings),
    /// `bantam chat`
    Chat(ChatSettings),
    /// `bantam serve`
    Serve(Box<ServeSettings>),
    /// `bantam keys`
    Keys(KeysCommand),
    /// `bantam jobs`
    Jobs(JobsArgs),
    /// `bantam evals`
    Evals(EvalsArgs),
    /// `bantam embed`
    Embed(EmbedSettings),
    /// `bantam export`
    Export(ExportSettings),
    /// `bantam bench`
    Bench(BenchSettings),
    /// `bantam inspect`
    Inspect(InspectSettings),
    /// `bantam doctor`
    Doctor(DoctorSettings),
}

/// `bantam demo`
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct DemoSettings {
    /// Folder for the run, the scorecard and the report.
    pub(crate) out: PathBuf,
    /// Seed of everything random.
    pub(crate) seed: u64,
    /// Most training steps; `u64::MAX` leaves it to the recipe.
    pub(crate) max_steps: u64,
    /// Most rows judged of each test set; `usize::MAX` for all.
    pub(crate) limit: usize,
    /// Threads to compute with.
    pub(crate) threads: usize,
    /// End with one JSON object.
    pub(crate) json: bool,
}

/// `bantam pull`
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct PullSettings {
    /// Catalogue name or path.
    pub(crate) name: String,
    /// Read every byte again.
    pub(crate) verify: bool,
    /// End with one JSON object.
    pub(crate) json: bool,
}

/// `bantam models`
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct ModelsSettings {
    /// End with one JSON object.
    pub(crate) json: bool,
}

/// `bantam inspect`
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct InspectSettings {
    /// What to look at.
    pub(crate) path: PathBuf,
    /// List every tensor.
    pub(crate) tensors: bool,
    /// End with one JSON object.
    pub(crate) json: bool,
}

/// `bantam doctor`
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct DoctorSettings {
    /// End with one JSON object.
    pub(crate) json: bool,
}

/// `bantam export`
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct ExportSettings {
    /// Run directory.
    pub(crate) model: String,
    /// File or folder to write.
    pub(crate) out: PathBuf,
    /// What to write there.
    pub(crate) format: MergeFormat,
    /// End with one JSON object.
    pub(crate) json: bool,
}

impl ExportSettings {
    fn resolve(args: ExportArgs) -> Self {
        let dtype = match args.r#type {
            ExportType::Q8 => DType::Q8_0,
            ExportType::F16 => DType::F16,
            ExportType::Bf16 => DType::BF16,
            ExportType::F32 => DType::F32,
        };
        let is_gguf = args
            .out
            .extension()
            .is_some_and(|ext| ext.eq_ignore_ascii_case("gguf"));
        Self {
            model: args.model,
            format: if is_gguf {
                MergeFormat::Gguf(dtype)
            } else {
                MergeFormat::Folder(dtype)
            },
            out: args.out,
            json: args.json.json,
        }
    }
}

impl Action {
    /// Resolves a command's flags.
    pub(crate) fn resolve(command: Command) -> anyhow::Result<Self> {
        Ok(match command {
            Command::Demo(DemoArgs {
                out,
                seed,
                max_steps,
                limit,
                threads,
                json,
            }) => Self::Demo(DemoSettings {
                out,
                seed,
                max_steps: max_steps.unwrap_or(u64::MAX),
                limit: count(limit),
                threads: self::threads(threads),
                json: json.json,
            }),
            Command::Pull(PullArgs { name, verify, json }) => Self::Pull(PullSettings {
                name,
                verify,
                json: json.json,
            }),
            Command::Models(args) => Self::Models(ModelsSettings {
                json: args.json.json,
            }),
            Command::Inspect(InspectArgs {
                path,
                tensors,
                json,
            }) => Self::Inspect(InspectSettings {
                path,
                tensors,
                json: json.json,
            }),
            Command::Doctor(args) => Self::Doctor(DoctorSettings {
                json: args.json.json,
            }),
            Command::Export(args) => Self::Export(ExportSettings::resolve(args)),
            Command::Bench(args) => Self::Bench(BenchSettings::resolve(args)),
            Command::Train(args) => Self::Train(Box::new(TrainSettings::resolve(*args)?)),
            Command::Eval(args) => {
                if let Some(settings) = PreferenceSettings::resolve(&args)? {
                    Self::Preference(settings)
                } else if let Some(settings) = PerplexitySettings::resolve(&args)? {
                    Self::Perplexity(settings)
                } else {
                    Self::Eval(EvalSettings::resolve(args))
                }
            }
            Command::Chat(args) => Self::Chat(ChatSettings::resolve(args)),
            Command::Sandbox(_) => {
                return Err(anyhow::anyhow!(
                    "the sandbox is entered before settings are made"
                ));
            }
            Command::Serve(args) => Self::Serve(Box::new(ServeSettings::resolve(args)?)),
            Command::Keys(command) => Self::Keys(command),
            Command::Jobs(args) => Self::Jobs(args),
            Command::Evals(args) => Self::Evals(args),
            Command::Embed(args) => Self::Embed(EmbedSettings::resolve(args)?),
        })
    }
}

/// The threads asked for, or one a core.
fn threads(arg: ThreadsArg) -> usize {
    match arg.threads {
        Some(n) => usize::from(n),
        None => std::thread::available_parallelism().map_or(1, usize::from),
    }
}

/// A count asked for, or no bound.
fn count(limit: Option<u64>) -> usize {
    limit.map_or(usize::MAX, |n| usize::try_from(n).unwrap_or(usize::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn environment(vars: &[(&str, &str)]) -> Environment {
        Environment {
            vars: vars.iter().map(|(k, v)| (k.into(), v.into())).collect(),
        }
    }

    fn global(vars: &[(&str, &str)]) -> anyhow::Result<Global> {
        Global::resolve(&GlobalArgs { quiet: false }, &environment(vars))
    }

    fn places(vars: &[(&str, &str)]) -> (String, String) {
        let global = global(vars).unwrap();
        (
            global.cache.display().to_string(),
            global.catalogue.display().to_string(),
        )
    }

    #[test]
    fn the_cache_is_where_the_user_says() {
        let pair = |a: &str, b: &str| (a.to_owned(), b.to_owned());
        assert_eq!(
            places(&[("HOME", "/h")]),
            pair("/h/.cache/bantam", "/h/.config/bantam/catalogue.toml")
        );
        let xdg = [
            ("HOME", "/h"),
            ("XDG_CACHE_HOME", "/c"),
            ("XDG_CONFIG_HOME", "/f"),
        ];
        assert_eq!(places(&xdg), pair("/c/bantam", "/f/bantam/catalogue.toml"));
        let relative = [("HOME", "/h"), ("XDG_CACHE_HOME", "c"), ("BANTAM_HOME", "")];
        assert_eq!(
            places(&relative),
            pair("/h/.cache/bantam", "/h/.config/bantam/catalogue.toml")
        );
        let home = [
            ("HOME", "/h"),
            ("XDG_CACHE_HOME", "/c"),
            ("BANTAM_HOME", "/b"),
        ];
        assert_eq!(places(&home), pair("/b", "/b/catalogue.toml"));
        assert_eq!(
            global(&[]).unwrap_err().to_string(),
            "no home folder is known"
        );
    }

    #[test]
    fn the_hub_and_the_colours_come_from_the_environment() {
        let plain = global(&[("HOME", "/h")]).unwrap();
        assert_eq!(plain.network.hf_endpoint, "https://huggingface.co");
        assert_eq!(
            (plain.network.hf_token, plain.network.python, plain.color),
            (None, None, true)
        );
        let set = global(&[
            ("HOME", "/h"),
            ("HF_ENDPOINT", "http://x"),
            ("HF_TOKEN", "t"),
            ("NO_COLOR", "1"),
        ])
        .unwrap();
        assert_eq!(
            (
                set.network.hf_endpoint.as_str(),
                set.network.hf_token.as_deref()
            ),
            ("http://x", Some("t"))
        );
        assert!(!set.color);
    }

    #[cfg(unix)]
    #[test]
    fn python3_is_preferred_to_python() {
        use std::os::unix::fs::PermissionsExt as _;
        let dir = tempfile::tempdir().unwrap();
        let put = |name: &str, mode: u32| {
            let path = dir.path().join(name);
            fs_err::write(&path, "").unwrap();
            fs_err::set_permissions(&path, std::fs::Permissions::from_mode(mode)).unwrap();
            path
        };
        let find = || {
            environment(&[("PATH", dir.path().to_str().unwrap())]).program(&["python3", "python"])
        };
        assert_eq!(find(), None);
        put("python3", 0o644);
        assert_eq!(find(), None, "not executable");
        let python = put("python", 0o755);
        assert_eq!(find(), Some(python));
        let python3 = put("python3", 0o755);
        assert_eq!(find(), Some(python3));
    }
}
