//! The `bantam` binary: the only reader of arguments, environment and configuration, the only printer.
//!
//! `args` (what was typed) becomes `settings` (nothing left open) becomes a call of one file in `commands`.

mod args;
mod cache;
mod catalogue;
mod client;
mod commands;
mod courier;
mod demo;
mod error;
mod fetch;
mod http;
mod import;
mod interrupt;
mod jobs;
mod loader;
mod printer;
mod progress;
mod providers;
mod sandbox;
mod settings;

use std::io::IsTerminal as _;
use std::process::ExitCode;

use clap::Parser as _;

use crate::args::{Cli, Command};
use crate::commands::Context;
use crate::error::{EXIT_INTERNAL, EXIT_OK, Style};
use crate::settings::{Action, Environment, Global};

fn main() -> ExitCode {
    let env = Environment::of_process();
    let style = Style {
        color: env.color() && std::io::stderr().is_terminal(),
    };
    error::install_panic_hook(style);
    // A panic has been reported by the hook by the time it arrives here.
    let code = std::panic::catch_unwind(|| run(&env, style)).unwrap_or(EXIT_INTERNAL);
    ExitCode::from(code)
}

fn run(env: &Environment, style: Style) -> u8 {
    // clap prints usage errors itself and exits with 2.
    let cli = Cli::parse();
    // Before anything is looked for: this process gives up its rights and becomes another.
    if let Command::Sandbox(limits) = &cli.command {
        eprintln!("{}", sandbox::enter(limits.seconds, limits.memory_mb));
        return EXIT_INTERNAL;
    }
    let result = Global::resolve(&cli.global, env).and_then(|global| {
        start_logging(global.log.as_deref());
        commands::run(&Context::new(global)?, Action::resolve(cli.command)?)
    });
    match result {
        Ok(()) => EXIT_OK,
        Err(error) => {
            let code = error::exit_code(&error);
            if code != EXIT_OK {
                eprint!("{}", error::render(&error, style));
            }
            code
        }
    }
}

/// Diagnostic logs on stderr for `BANTAM_LOG`; none without it.
fn start_logging(filter: Option<&str>) {
    let Some(filter) = filter else { return };
    tracing_subscriber::fmt()
        .with_env_filter(tracing_subscriber::EnvFilter::new(filter))
        .with_writer(std::io::stderr)
        .with_ansi(false)
        .init();
}
