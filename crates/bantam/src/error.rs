//! How failures end: exit codes, the error chain, and the hints after it.
//!
//! Any error may carry advice: `.hint("...")` on a `Result` adds a line that the user can act on. [`render`] prints the
//! chain, outermost first, then the hints; [`exit_code`] maps it to the process's exit code.

use std::error::Error as StdError;
use std::fmt::{self, Write as _};
use std::io;

/// Success.
pub(crate) const EXIT_OK: u8 = 0;
/// Something about the input, the machine or the network; the message says what.
pub(crate) const EXIT_USER: u8 = 1;
/// A bug in Bantam (`EX_SOFTWARE`).
pub(crate) const EXIT_INTERNAL: u8 = 70;
/// Ctrl-C, as shells count it: 128 + SIGINT.
pub(crate) const EXIT_INTERRUPTED: u8 = 130;

/// The user asked to stop; carries what to do to go on.
#[derive(Debug, thiserror::Error)]
#[error("interrupted")]
pub(crate) struct Interrupted;

/// Bantam broke its own promise; not the user's fault.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub(crate) struct Internal(pub(crate) String);

/// An error with a line of advice around it; invisible in the chain, its hint is printed after.
#[derive(Debug)]
struct Advised {
    hint: String,
    source: anyhow::Error,
}

impl fmt::Display for Advised {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.source.fmt(f)
    }
}

impl StdError for Advised {
    fn source(&self) -> Option<&(dyn StdError + 'static)> {
        Some(self.source.as_ref())
    }
}

/// Adds advice to a failure.
pub(crate) trait HintExt<T> {
    /// Adds a `hint:` line to the error, if there is one.
    fn hint(self, hint: impl Into<String>) -> anyhow::Result<T>;
}

impl<T, E: Into<anyhow::Error>> HintExt<T> for Result<T, E> {
    fn hint(self, hint: impl Into<String>) -> anyhow::Result<T> {
        self.map_err(|error| advise(error, hint))
    }
}

/// An error with a `hint:` line.
pub(crate) fn advise(error: impl Into<anyhow::Error>, hint: impl Into<String>) -> anyhow::Error {
    anyhow::Error::new(Advised {
        hint: hint.into(),
        source: error.into(),
    })
}

/// The text of an error: `error:` line, `cause:` lines, `hint:` lines.
pub(crate) fn render(error: &anyhow::Error, style: Style) -> String {
    let mut messages: Vec<String> = Vec::new();
    let mut hints: Vec<String> = Vec::new();
    for link in error.chain() {
        if let Some(advised) = link.downcast_ref::<Advised>() {
            hints.push(advised.hint.clone());
            continue;
        }
        let (message, own_hint) = split_hint(&link.to_string());
        // Crate errors may print their source inside their own message; say nothing twice.
        if !messages
            .last()
            .is_some_and(|outer: &String| outer.ends_with(&message))
        {
            messages.push(message);
        }
        hints.extend(own_hint);
        if let Some(hint) = known_hint(link) {
            hints.push(hint);
        }
    }
    // The advice nearest to the cause is the most concrete.
    hints.reverse();
    hints.dedup();

    let mut out = String::new();
    let mut messages = messages.into_iter();
    let first = messages.next().unwrap_or_default();
    writeln!(out, "{} {first}", style.red("error:")).ok();
    for message in messages {
        writeln!(out, "  {} {message}", style.dim("cause:")).ok();
    }
    for hint in hints {
        writeln!(out, "{} {hint}", style.cyan("hint:")).ok();
    }
    out
}

/// Crates may end a message in `hint: ...`, after a line break or a semicolon; it is shown like any other hint.
fn split_hint(message: &str) -> (String, Option<String>) {
    let at = ["\nhint: ", "; hint: "]
        .iter()
        .filter_map(|mark| message.rfind(mark))
        .max();
    match at {
        Some(at) => (
            message[..at].to_owned(),
            Some(message[at + "\nhint: ".len()..].trim().to_owned()),
        ),
        None => (message.to_owned(), None),
    }
}

/// Advice for causes that can come from anywhere.
fn known_hint(link: &(dyn StdError + 'static)) -> Option<String> {
    match link.downcast_ref::<io::Error>()?.kind() {
        io::ErrorKind::StorageFull => {
            Some("the disk is full: free some space and run the same command again".into())
        }
        io::ErrorKind::PermissionDenied => {
            Some("check who owns the file and its permissions".into())
        }
        _ => None,
    }
}

/// The exit code of a failed command.
pub(crate) fn exit_code(error: &anyhow::Error) -> u8 {
    for link in error.chain() {
        if link.is::<Interrupted>() {
            return EXIT_INTERRUPTED;
        }
        if link.is::<Internal>() {
            return EXIT_INTERNAL;
        }
        // The reader of our output has gone (`bantam models | head -1`): that is no failure.
        if link
            .downcast_ref::<io::Error>()
            .is_some_and(|e| e.kind() == io::ErrorKind::BrokenPipe)
        {
            return EXIT_OK;
        }
    }
    EXIT_USER
}

/// Makes a panic say that it is a bug and where to report it, in place of the default message.
pub(crate) fn install_panic_hook(style: Style) {
    std::panic::set_hook(Box::new(move |info| {
        let message = info
            .payload()
            .downcast_ref::<&str>()
            .copied()
            .or_else(|| info.payload().downcast_ref::<String>().map(String::as_str))
            .unwrap_or("unknown cause");
        let place = info
            .location()
            .map_or_else(String::new, |l| format!(" ({}:{})", l.file(), l.line()));
        eprintln!("{} internal error: {message}{place}", style.red("error:"));
        eprintln!(
            "{} this is a bug in Bantam {}: please report it at {}/issues with the command you typed and these lines",
            style.cyan("hint:"),
            env!("CARGO_PKG_VERSION"),
            env!("CARGO_PKG_REPOSITORY"),
        );
        if std::env::var_os("RUST_BACKTRACE").is_some_and(|v| v != "0") {
            eprintln!("{}", std::backtrace::Backtrace::force_capture());
        }
    }));
}

/// Colours, or none.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Style {
    /// Whether to write ANSI colours.
    pub(crate) color: bool,
}

impl Style {
    fn paint(self, code: &str, text: &str) -> String {
        if self.color {
            format!("\x1b[{code}m{text}\x1b[0m")
        } else {
            text.to_owned()
        }
    }
    /// Bold, for headings.
    pub(crate) fn bold(self, text: &str) -> String {
        self.paint("1", text)
    }
    /// Dim, for what may be skipped.
    pub(crate) fn dim(self, text: &str) -> String {
        self.paint("2", text)
    }
    /// Red, for errors.
    pub(crate) fn red(self, text: &str) -> String {
        self.paint("1;31", text)
    }
    /// Green, for what is well.
    pub(crate) fn green(self, text: &str) -> String {
        self.paint("32", text)
    }
    /// Yellow, for warnings.
    pub(crate) fn yellow(self, text: &str) -> String {
        self.paint("33", text)
    }
    /// Cyan, for hints.
    pub(crate) fn cyan(self, text: &str) -> String {
        self.paint("36", text)
    }
}

#[cfg(test)]
mod tests {
    use anyhow::{Context as _, anyhow};

    use super::*;

    const PLAIN: Style = Style { color: false };

    #[test]
    fn the_chain_then_the_hints() {
        let error = Err::<(), _>(anyhow!("`config.json` is missing"))
            .hint("download the whole repository")
            .context("could not open `model`")
            .hint("`bantam models` lists names")
            .unwrap_err();
        assert_eq!(
            render(&error, PLAIN),
            "error: could not open `model`\n  cause: `config.json` is missing\n\
             hint: download the whole repository\nhint: `bantam models` lists names\n"
        );
    }

    #[test]
    fn a_message_that_holds_its_cause_is_not_repeated() {
        let error = anyhow!("no such file").context("a.jsonl: no such file");
        assert_eq!(render(&error, PLAIN), "error: a.jsonl: no such file\n");
    }

    #[test]
    fn a_hint_inside_a_message_is_set_apart() {
        let error = anyhow!("a.jsonl:3: no `messages`\nhint: one object a line")
            .context("could not read rows");
        assert_eq!(
            render(&error, PLAIN),
            "error: could not read rows\n  cause: a.jsonl:3: no `messages`\nhint: one object a line\n"
        );
        assert_eq!(
            render(&anyhow!("no pre; hint: use gpt-2"), PLAIN),
            "error: no pre\nhint: use gpt-2\n"
        );
    }

    #[test]
    fn a_full_disk_comes_with_advice() {
        let error = anyhow::Error::new(io::Error::from(io::ErrorKind::StorageFull))
            .context("could not write `x`");
        assert!(
            render(&error, PLAIN).ends_with(
                "hint: the disk is full: free some space and run the same command again\n"
            )
        );
    }

    #[test]
    fn exit_codes() {
        let code = |e: anyhow::Error| exit_code(&e);
        assert_eq!(code(anyhow!("x")), 1);
        assert_eq!(
            code(advise(Interrupted, "go on with the same command")),
            130
        );
        assert_eq!(
            code(anyhow::Error::new(Internal("x".into())).context("y")),
            70
        );
        assert_eq!(code(io::Error::from(io::ErrorKind::BrokenPipe).into()), 0);
    }
}
